"""One pass of a model over responses, which sums what the policies of every block are on every generated token.

Nothing of size ``[points, layers, tokens, D]`` and nothing of size ``[layers, tokens, vocab]`` is ever there: the head reads the
modules of a block while the block runs, and only H^0..H^L of one batch stay, for the comparison of layers.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from bupo.analysis.blocks import (
    BlockStates,
    UnsupportedModel,
    check_readout,
    decoder_of,
    evaluating,
    readout_options,
    residual_points,
)
from bupo.analysis.statistics import Statistics, Sums, estimate
from bupo.distributed import full
from bupo.output import claim, progress_bar, replacing
from bupo.rollout import Sample
from bupo_kernels import FusedLMHead

# The KL between all pairs of layers is taken of so many elements at a time, the cosines of so many rows.
PAIR_ELEMENTS = 2**24
COSINE_ROWS = 64


class Batch(NamedTuple):
    """Right-padded sequences; nothing real looks at the padding, so causal attention needs no mask for it."""

    input_ids: Tensor  # [B, S] int64; the last token of a sequence is only a target
    row: Tensor  # [n] the rows of the positions that are followed by a generated token, those of one response together
    column: Tensor  # [n] their columns
    targets: Tensor  # [n] the tokens that follow


def analyze(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    final_norm: bool = False,
    temperature: float = 1.0,
    max_tokens: int = 2048,
    partial: Path | None = None,
    seed: int = 0,
) -> Statistics:
    """Return :class:`Statistics` of ``model`` on prompts with responses, over the positions that predict a response token.

    Args:
        model: any causal language model that :func:`residual_points` takes, on one device, float32 or bfloat16; its head becomes a
            :class:`FusedLMHead` in place.
        samples: at least one, each with a prompt and a response that are not empty.
        final_norm: put every internal policy through the model's final norm first. The paper does not.
        temperature: that of all policies.
        max_tokens: those of a batch, padding included; a longer sequence is a batch of its own. They bound memory, not the result.
        partial: folder for the sums of each batch. A call that finds those of another there, begun and not ended, goes on after
            them and returns exactly what the other would have. Whoever calls removes it.
        seed: that of the bootstrap.

    Raises:
        ConfigError: ``partial`` holds sums of another model, of other responses, or with other options.
        UnsupportedModel, ValueError, TypeError: the message names what the model or a sample is and what is accepted.
    """
    if not samples or not all(len(sample.prompt_ids) and len(sample.response_ids) for sample in samples):
        raise ValueError(f"samples: {len(samples)} given, accepted is at least one, each with prompt and response tokens")
    head, decoder = FusedLMHead.adopt(model.get_output_embeddings()), decoder_of(model)
    with evaluating(model):
        check_readout(model, torch.tensor([sample_ids(samples[0])[:32]], device=model.device))
        sums = collect(model, samples, final_norm=final_norm, temperature=temperature, max_tokens=max_tokens, partial=partial)
    summary = {
        "model": model.config.name_or_path,
        "model_type": model.config.model_type,
        "layers": len(decoder.layers),
        "vocab": head.out_features,
        "final_norm": final_norm,
        "temperature": temperature,
        "precision": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "versions": {name: version(name) for name in ("bupo-kernels", "torch", "transformers")}
        | {"python": platform.python_version()},
    }
    return estimate(sums, len(decoder.layers), summary, seed)


def sample_ids(sample: Sample) -> list[int]:
    """Return the tokens of prompt and response."""
    return [*sample.prompt_ids, *sample.response_ids]


def collect(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    final_norm: bool,
    temperature: float,
    max_tokens: int,
    partial: Path | None,
) -> Sums:
    """Return the sums of all responses, in their order. Arguments and errors are those of :func:`analyze`."""
    lengths = [len(sample_ids(sample)) - 1 for sample in samples]
    batches = batches_of(lengths, max_tokens)
    if partial is not None:
        options = {"final_norm": final_norm, "temperature": temperature, "max_tokens": max_tokens}
        claim(partial, "plan.json", _settings(model, samples, options), "analysis")
    parts: list[dict[str, np.ndarray]] = []
    with progress_bar() as bar:
        task = bar.add_task("analysis, tokens", total=sum(lengths))
        for number, indices in enumerate(batches):
            path = None if partial is None else partial / f"batch-{number:06}.npz"
            if path is not None and path.exists():
                with np.load(path, allow_pickle=False) as file:
                    part = dict(file)
            else:
                chosen = [samples[i] for i in indices]
                values = measure(model, make_batch(chosen, model.device), final_norm=final_norm, temperature=temperature)
                part = _sums(values, [len(sample.response_ids) for sample in chosen])
                if path is not None:
                    with replacing(path) as unfinished, unfinished.open("wb") as file:
                        np.savez(file, **dict[str, Any](part))  # mypy takes arrays for its options
            parts.append(part)
            bar.advance(task, sum(lengths[i] for i in indices))
    order = np.argsort([i for indices in batches for i in indices])
    totals, matrices = {}, {}
    for name in parts[0]:
        point, statistic = name.split(".")
        if point == "pair":
            matrices[statistic] = np.sum([part[name] for part in parts], 0)
        else:
            totals[point, statistic] = np.concatenate([part[name] for part in parts], 1)[:, order]
    return Sums(np.array([len(sample.response_ids) for sample in samples]), totals, matrices)


def batches_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return indices of sequences for each batch, the longest first: up to ``max_tokens`` with the padding, or one sequence."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def make_batch(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Pad prompts and responses into a :class:`Batch` on ``device``."""
    width = max(len(sample_ids(sample)) for sample in samples) - 1
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    row: list[int] = []
    column: list[int] = []
    targets: list[int] = []
    for i, sample in enumerate(samples):
        sequence, before = sample_ids(sample)[:-1], len(sample.prompt_ids) - 1
        ids[i, : len(sequence)] = torch.tensor(sequence)
        row += [i] * len(sample.response_ids)
        column += range(before, len(sequence))
        targets += sample.response_ids
    return Batch(ids.to(device), *(torch.tensor(x, device=device) for x in (row, column, targets)))


@torch.inference_mode()
def measure(model: PreTrainedModel, batch: Batch, *, final_norm: bool, temperature: float) -> dict[str, np.ndarray]:
    """Return ``"point.statistic"``, ``[layers, n]``, on the n positions of ``batch``; of ``"pair.…"`` the sum over these.

    Raises :class:`UnsupportedModel` where a value is not finite.
    """
    decoder, head = decoder_of(model), model.get_output_embeddings()
    readout = readout_options(model) | {"temperature": temperature}
    depth, n, width = len(decoder.layers), len(batch.targets), head.in_features
    precision = torch.promote_types(model.dtype, torch.float32)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=precision, device=model.device)

    # What stays has its place from the start. Small tensors that stay, put among large ones that go, leave a heap full of holes:
    # measured, 1 GB instead of 0.4 for 24 layers, 2,048 tokens and D = 1,024.
    residual = torch.empty(depth + 1, n, width, dtype=model.dtype, device=model.device)  # H^0..H^L
    values = {f"{point}.entropy": numbers(depth, n) for point in ("attention_input", "attention", "ffn_input", "ffn")}
    values |= {f"{point}.cosine": numbers(depth, n) for point in ("attention", "ffn", "layer")}
    values |= {f"{point}.rms": numbers(depth, n) for point in ("attention", "ffn")}

    def normed(states: Tensor) -> Tensor:
        return decoder.norm(states) if final_norm else states

    def receive(block: BlockStates) -> None:
        number, *points = block
        previous, read, attention, middle, read_by_ffn, ffn, layer = (x[batch.row, batch.column] for x in points)
        policies = {"attention_input": read, "attention": attention, "ffn_input": read_by_ffn, "ffn": ffn}
        entropies = head([normed(states) for states in policies.values()], outputs=("entropy",), **readout).entropy
        for point, entropy in zip(policies, entropies, strict=True):
            values[f"{point}.entropy"][number - 1] = entropy
        for point, update, before in (("attention", attention, previous), ("ffn", ffn, middle), ("layer", layer, previous)):
            values[f"{point}.cosine"][number - 1] = _cosine(update, before)
        for point, states in (("attention", attention), ("ffn", ffn)):
            values[f"{point}.rms"][number - 1] = _rms(states)
        if number == 1:
            residual[0] = previous
        residual[number] = layer

    with residual_points(model, receive):
        final = decoder(batch.input_ids, use_cache=False).last_hidden_state[batch.row, batch.column]
    for module in ("attention", "ffn"):
        values[f"{module}.delta_entropy"] = values[f"{module}.entropy"] - values[f"{module}_input.entropy"]
    values["layer.rms"] = torch.stack([_rms(states) for states in residual])
    values["pair.cosine"] = _pair_cosine(residual)

    if final_norm:
        for states in residual:
            states.copy_(normed(states))
    streams, outputs = [*residual, final], ("entropy", "logprobs", "max_probability", "pairwise_kl")
    names = ("entropy", "logprob", "max_probability", "kl_to_final", "kl_from_final")
    by_layer = {name: numbers(len(streams), n) for name in names}  # the last is the final policy
    values["pair.kl"] = torch.zeros(len(streams), len(streams), dtype=torch.float64, device=model.device)
    for rows in torch.arange(n).split(max(PAIR_ELEMENTS // len(streams) ** 2, 1)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        found = head([states[part] for states in streams], batch.targets[part], outputs=outputs, **readout)
        kl = found.pairwise_kl  # [L+2, L+2, rows]
        values["pair.kl"] += kl.sum(-1, dtype=torch.float64)
        for name, value in zip(names, (found.entropy, found.logprobs, found.max_probability, kl[:, -1], kl[-1]), strict=True):
            by_layer[name][:, part] = value
    for name, value in by_layer.items():
        values[f"layer.{name}"], values[f"final.{name}"] = value[:-1], value[-1:]
    values["layer.delta_entropy"] = values["layer.entropy"].diff(dim=0)
    for name, value in values.items():
        if not value.isfinite().all():
            kind = f"of type {model.config.model_type!r}, whose {name} is not finite"
            raise UnsupportedModel(f"model: {kind}, accepted are models with finite hidden states and logits")
    return {name: value.cpu().numpy() for name, value in values.items()}


def _sums(values: dict[str, np.ndarray], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the sums of values and of their squares over the tokens of each response, ``[2, R, layers]``."""
    starts = np.cumsum([0, *lengths[:-1]])

    def summed(value: np.ndarray) -> np.ndarray:
        value = value.astype(np.float64)
        return np.stack([np.add.reduceat(x, starts, axis=1).T for x in (value, value**2)])

    return {name: value if name.startswith("pair.") else summed(value) for name, value in values.items()}


def _rms(states: Tensor) -> Tensor:  # [n, D] -> [n]
    return _wide(states).square().mean(-1).sqrt()


def _cosine(a: Tensor, b: Tensor) -> Tensor:  # [n, D] -> [n]
    return F.cosine_similarity(_wide(a), _wide(b), dim=-1)


def _pair_cosine(states: Tensor) -> Tensor:  # [P, n, D] -> [P, P], summed over n
    total = torch.zeros(len(states), len(states), dtype=torch.float64, device=states.device)
    for rows in states.split(COSINE_ROWS, dim=1):
        units = F.normalize(rows.double(), dim=-1).flatten(1)
        total += units @ units.T
    return total


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _settings(model: PreTrainedModel, samples: Sequence[Sample], options: dict[str, Any]) -> dict[str, Any]:
    """Return all that the sums of a batch depend on."""
    return {
        "model": model_fingerprint(model),
        "responses": ids_fingerprint([(*sample.prompt_ids, -1, *sample.response_ids) for sample in samples]),
        **options,
        "precision": str(model.dtype),
        "device": model.device.type,
    }


def ids_fingerprint(sequences: Sequence[Sequence[int]]) -> str:
    """Return the fingerprint of sequences of token ids."""
    return hashlib.sha256(json.dumps([list(map(int, ids)) for ids in sequences]).encode()).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return the fingerprint of the config and of some 64 numbers of each parameter; it is a collective.

    Another training step changes nearly all of these numbers.
    """
    config = {
        name: value for name, value in model.config.to_dict().items() if name not in ("_name_or_path", "transformers_version")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        numbers = full(parameter.detach()).flatten()[:: max(parameter.numel() // 64, 1)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + numbers.numpy().tobytes())
    return digest.hexdigest()
