"""The tuned lens: an affine translator for each layer, between the residual stream and the final norm (arXiv 2303.08112).

A layer's representation is rotated, shifted and stretched against the last one's, which the final norm and the unembedding are made
for. A translator ``h + A_l h + b_l`` undoes what of that is affine; it is fitted so that the policy behind it is the final policy's
closest, ``KL(π ‖ π^l)``, without logits: :func:`bupo_kernels.linear_divergence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bupo.analysis.blocks import BlockStates, decoder_of, evaluating, readout_options, residual_points
from bupo.analysis.collect import Batch, batches_of, make_batch, model_fingerprint, sample_ids
from bupo.errors import ConfigError
from bupo.output import progress, replacing
from bupo.rollout import Sample
from bupo_kernels import FusedLMHead

HELD_OUT = 8  # one of so many samples is held out, and at least one
# AdamW's, linearly down to 0. The paper takes SGD with momentum at a rate of 1, and 2^18 tokens a step, for which few machines have
# time; weight decay and clipping are the paper's.
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 1e-3, 1.0


class Translators(nn.Module):
    """The translators of H^0 to H^(L-1): ``h + A_l h + b_l`` in float32. They begin as the identity."""

    def __init__(self, depth: int, width: int, device: torch.device) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.ParameterList:  # one for each layer, so that a gradient is of no other
            return nn.ParameterList(torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(depth))

        self.weight, self.bias = zeros(width, width), zeros(width)  # A_l and b_l

    def forward(self, states: Tensor, layer: int) -> Tensor:  # [n, D] of H^layer -> [n, D]
        """Translate the states of a layer, in their dtype; those of layer L need no translator and stay."""
        if layer == len(self.bias):
            return states
        wide = states.float()
        return (wide + wide @ self.weight[layer].T + self.bias[layer]).to(states.dtype)

    def save(self, path: Path, model: PreTrainedModel) -> None:
        """Write ``weight.l`` and ``bias.l`` to a safetensors file, whole or not at all, with the fingerprint of ``model``."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.named_parameters()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, {"kind": "bupo translators", "model": model_fingerprint(model)})

    @classmethod
    def load(cls, path: Path, model: PreTrainedModel, key: str = "translators") -> Translators:
        """Read what :meth:`save` wrote of ``model``. Raises :class:`ConfigError` with ``key`` where the file is something else."""
        depth, width = len(decoder_of(model).layers), model.get_output_embeddings().in_features
        translators = cls(depth, width, model.device)
        try:
            with safe_open(path, "pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            translators.load_state_dict(tensors)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{key}: {path} cannot be used ({reason:.200}), accepted is what --fit-translators wrote") from None
        if metadata.get("model") != model_fingerprint(model):
            raise ConfigError(f"{key}: {path} was fitted to another model, or in another precision; accepted is one of this model")
        return translators.requires_grad_(False)


class Fit(NamedTuple):
    """The change that a fit made: KL(π ‖ π^l) in nats per token of the samples that were held out, of H^0 to H^(L-1)."""

    before: np.ndarray  # [L] of the final norm alone
    after: np.ndarray  # [L]
    positions: int


def fit_translators(
    model: PreTrainedModel, samples: Sequence[Sample], *, steps: int = 250, max_tokens: int = 2048, seed: int = 0
) -> tuple[Translators, Fit]:
    """Fit :class:`Translators` of ``model`` to ``KL(π ‖ π^l)`` on response positions of ``samples``; return them and the change.

    Each of ``steps`` takes a batch of up to ``max_tokens`` tokens through the model once, and a gradient of every layer's
    translator: 6·n·V·D FLOP a layer. One of eight samples is held out. The model's weights stay as they are. The same seed gives
    the same order.

    Raises ``ValueError`` where there are fewer than two samples; errors of the model as in :func:`bupo.analysis.analyze`.
    """
    if len(samples) < 2:
        raise ValueError(f"samples: {len(samples)} given, accepted are at least 2: one is held out")
    order = np.random.default_rng(seed).permutation(len(samples))
    held = max(len(samples) // HELD_OUT, 1)
    kept, rest = ([samples[i] for i in chosen] for chosen in (order[:held], order[held:]))
    head = FusedLMHead.adopt(model.get_output_embeddings())
    translators = Translators(len(decoder_of(model).layers), head.in_features, model.device)
    optimizer = torch.optim.AdamW(translators.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / (steps + 1), total_iters=steps)
    stream = _batches(rest, max_tokens, seed, model.device)
    with evaluating(model), _frozen(model), progress("translators, steps", steps) as advance:
        before = _divergences(model, None, kept, max_tokens)
        for _ in range(steps):
            batch = next(stream)
            for layer, divergence in _each_layer(model, translators, batch):
                divergence.backward()
                nn.utils.clip_grad_norm_([translators.weight[layer], translators.bias[layer]], CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1)
        after = _divergences(model, translators, kept, max_tokens)
    return translators.requires_grad_(False), Fit(before, after, sum(len(sample.response_ids) for sample in kept))


def fit_table(fit: Fit) -> Table:
    """Return a table of what was gained, the last layer on top."""
    table = Table(caption=f"KL(π ‖ π^l), nats, over {fit.positions:,} positions that were held out", caption_justify="left")
    for name in ("layer", "final norm alone", "translated"):
        table.add_column(name, justify="right")
    for layer in reversed(range(len(fit.before))):
        table.add_row(str(layer), f"{fit.before[layer]:.3f}", f"{fit.after[layer]:.3f}")
    return table


def _batches(samples: Sequence[Sample], max_tokens: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches for ever, in a new order each time all samples have been in one."""
    generator = np.random.default_rng(seed + 1)
    indices = batches_of([len(sample_ids(sample)) - 1 for sample in samples], max_tokens)
    while True:
        for i in generator.permutation(len(indices)):
            yield make_batch([samples[j] for j in indices[i]], device)


def _each_layer(model: PreTrainedModel, translators: Translators | None, batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each layer below the last and the mean of KL(π ‖ π^l) over the positions of ``batch``."""
    decoder, head, options = decoder_of(model), model.get_output_embeddings(), readout_options(model)
    residual: list[Tensor] = []

    def receive(block: BlockStates) -> None:
        residual.append(block.previous[batch.row, batch.column])

    with torch.no_grad(), residual_points(model, receive):
        final = decoder(batch.input_ids, use_cache=False).last_hidden_state[batch.row, batch.column]
    for layer, states in enumerate(residual):
        read = states if translators is None else translators(states, layer)
        found = head(decoder.norm(read), teacher_hidden=final, reduction="mean", return_entropy=False, **options)
        yield layer, found.divergence


@torch.no_grad()
def _divergences(
    model: PreTrainedModel, translators: Translators | None, samples: Sequence[Sample], max_tokens: int
) -> np.ndarray:  # [L]
    """Return the mean over all positions of ``samples``."""
    total, count = np.zeros(len(decoder_of(model).layers)), 0
    for indices in batches_of([len(sample_ids(sample)) - 1 for sample in samples], max_tokens):
        batch = make_batch([samples[i] for i in indices], model.device)
        n = len(batch.targets)
        total += [n * divergence.item() for _, divergence in _each_layer(model, translators, batch)]
        count += n
    return total / count


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Have no gradient of the weights of ``model`` formed within the context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
