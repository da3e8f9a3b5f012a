"""One pass of a model over responses, which sums what the policies of every block are on every generated token.

Nothing of size ``[points, layers, tokens, D]`` and nothing of size ``[layers, tokens, vocab]`` is ever there: the head reads the
modules of a block while the block runs, and only H^0..H^L of one batch stay, for the comparison of layers. The positions that a
report shows are read in the same pass, with their most likely tokens and ranks.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from bupo.output import claim, progress, replacing
from bupo.rollout import Sample
from bupo_kernels import FusedLMHead

# How a hidden state becomes a policy: as it is, behind the model's final norm, or behind a translator and the norm.
READINGS = ("raw", "normed", "tuned")
MODULES = ("layer", "attention", "ffn")  # what --points chooses from: the residual stream, and two modules with what they read

# The KL between all pairs of layers is taken of so many elements at a time, the cosines of so many rows.
PAIR_ELEMENTS = 2**24
COSINE_ROWS = 64
# So many rows of the residual stream are read at a time on a CPU: a product of some thousand rows, between two moves of the bar.
CPU_ROWS = 256


@dataclass(frozen=True)
class Look:
    """The choice of what a pass reads, and how."""

    readings: tuple[str, ...] = ("raw",)  # of READINGS
    points: tuple[str, ...] = MODULES  # of MODULES
    temperature: float = 1.0  # that of all policies
    top_k: int = 10  # of the positions that are shown
    track: tuple[int, ...] = ()  # ids whose ranks and log-probs are taken at the positions that are shown
    translate: Callable[[Tensor, int], Tensor] | None = None  # for "tuned": [n, D] of H^layer -> [n, D], before the final norm

    def rows(self, depth: int) -> int:
        """Return how many policies there are of a position: rows of a product with the unembedding."""
        modules = 2 * len({"attention", "ffn"} & set(self.points)) * depth
        return len(self.readings) * (modules + (depth + 2 if "layer" in self.points else 1))


class Batch(NamedTuple):
    """Right-padded sequences; nothing real looks at the padding, so causal attention needs no mask for it."""

    input_ids: Tensor  # [B, S] int64; the last token of a sequence is only a target
    row: Tensor  # [n] the rows of the positions that are followed by a generated token, those of one response together
    column: Tensor  # [n] their columns
    targets: Tensor  # [n] the tokens that follow


Values = dict[str, np.ndarray]  # by "point.statistic", or "map.statistic" of the positions that are shown


@dataclass(frozen=True)
class Collected:
    """The findings of a pass, by reading."""

    sums: dict[str, Sums] = field(default_factory=dict)
    maps: dict[str, dict[int, Values]] = field(default_factory=dict)  # by the place of the sample: what Heatmap is made of


def analyze(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    final_norm: bool = False,
    temperature: float = 1.0,
    max_tokens: int = 2048,
    points: Sequence[str] = MODULES,
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
        points: some of ``"layer"`` (the residual stream), ``"attention"`` and ``"ffn"`` (these two modules with what they read).
        partial: folder for the sums of each batch. A call that finds those of another there, begun and not ended, goes on after
            them and returns exactly what the other would have. Whoever calls removes it.
        seed: that of the bootstrap.

    Raises:
        ConfigError: ``partial`` holds sums of another model, of other responses, or with other options.
        UnsupportedModel, ValueError, TypeError: the message names what the model or a sample is and what is accepted.
    """
    (reading,) = readings = (READINGS[final_norm],)
    look = Look(readings, tuple(points), temperature)
    collected = collect(model, samples, look, max_tokens=max_tokens, partial=partial)
    return estimate(collected.sums[reading], summary_of(model, look, reading), seed)


def summary_of(model: PreTrainedModel, look: Look, reading: str) -> dict[str, Any]:
    """Return what is known of an analysis before its numbers are: model, options, versions."""
    return {
        "model": model.config.name_or_path,
        "model_type": model.config.model_type,
        "layers": len(decoder_of(model).layers),
        "vocab": model.get_output_embeddings().out_features,
        "final_norm": reading != "raw",
        **({"translators": True} if reading == "tuned" else {}),
        "temperature": look.temperature,
        "precision": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "versions": {name: version(name) for name in ("bupo-kernels", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


def sample_ids(sample: Sample) -> list[int]:
    """Return the tokens of prompt and response."""
    return [*sample.prompt_ids, *sample.response_ids]


def collect(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    look: Look,
    *,
    max_tokens: int = 2048,
    shown: int = 0,
    positions: int = 64,
    partial: Path | None = None,
) -> Collected:
    """Return the sums of all responses, in their order, and the maps of the first ``positions`` tokens of the first ``shown``.

    Other arguments and errors are those of :func:`analyze`.
    """
    if not samples or not all(len(sample.prompt_ids) and len(sample.response_ids) for sample in samples):
        raise ValueError(f"samples: {len(samples)} given, accepted is at least one, each with prompt and response tokens")
    for name, given, accepted in (("points", look.points, MODULES), ("readings", look.readings, READINGS)):
        if not given or (unknown := [one for one in given if one not in accepted]):
            raise ValueError(f"{name}: {unknown[0]!r} given, accepted are some of {', '.join(map(repr, accepted))}")
    if "tuned" in look.readings and (look.translate is None or look.points != ("layer",)):
        raise ValueError(f"readings: 'tuned' given with points {look.points}, accepted with translators and ('layer',)")
    FusedLMHead.adopt(model.get_output_embeddings())
    shown = shown if "layer" in look.points else 0
    lengths = [len(sample_ids(sample)) - 1 for sample in samples]
    batches = batches_of(lengths, max_tokens)
    if partial is not None:
        options = {"readings": look.readings, "points": look.points, "temperature": look.temperature, "track": look.track}
        options |= {"max_tokens": max_tokens, "examples": shown}
        claim(partial, "plan.json", _settings(model, samples, options), "analysis")
    parts: list[Values] = []
    with evaluating(model), progress("analysis, tokens", sum(lengths)) as advance:
        check_readout(model, torch.tensor([sample_ids(samples[0])[:32]], device=model.device))
        for number, indices in enumerate(batches):
            path = None if partial is None else partial / f"batch-{number:06}.npz"
            tokens = sum(lengths[i] for i in indices)
            if path is not None and path.exists():
                with np.load(path, allow_pickle=False) as file:
                    part = dict(file)
                advance(tokens)
            else:
                chosen = [samples[i] for i in indices]
                cuts = [min(len(samples[i].response_ids), positions) if i < shown else 0 for i in indices]
                batch = make_batch(chosen, model.device)
                found = measure(model, batch, look, shown=cuts, advance=scaled(advance, tokens))
                counts = [len(sample.response_ids) for sample in chosen]
                part = {f"{reading}/{name}": x for reading in found for name, x in _sums(found[reading], counts).items()}
                if path is not None:
                    with replacing(path) as unfinished, unfinished.open("wb") as file:
                        np.savez(file, **dict[str, Any](part))  # mypy takes arrays for its options
            parts.append(part)
    return Collected(
        {reading: _joined(parts, reading, batches, samples) for reading in look.readings},
        {reading: _maps(parts, reading, batches, samples, shown, positions) for reading in look.readings},
    )


def scaled(advance: Callable[[float], None], whole: float) -> Callable[[float], None]:
    """Return ``advance`` for shares of ``whole``."""
    return lambda share: advance(share * whole)


def _joined(parts: list[Values], reading: str, batches: list[list[int]], samples: Sequence[Sample]) -> Sums:
    """Return the sums of all batches, those of a response at its place among ``samples``."""
    order = np.argsort([i for indices in batches for i in indices])
    totals, matrices = {}, {}
    for name in parts[0]:
        kind, point, statistic = re.split("[/.]", name)
        if kind != reading or point == "map":
            continue
        if point == "pair":
            matrices[statistic] = np.sum([part[name] for part in parts], 0)
        else:
            totals[point, statistic] = np.concatenate([part[name] for part in parts], 1)[:, order]
    return Sums(np.array([len(sample.response_ids) for sample in samples]), totals, matrices)


def _maps(
    parts: list[Values], reading: str, batches: list[list[int]], samples: Sequence[Sample], shown: int, positions: int
) -> dict[int, Values]:
    """Return the values of the positions that are shown, by the place of their sample."""
    maps = {}
    for part, indices in zip(parts, batches, strict=True):
        start, here = 0, f"{reading}/map."
        values = {name.removeprefix(here): x for name, x in part.items() if name.startswith(here)}
        for i in (i for i in indices if i < shown):
            stop = start + min(len(samples[i].response_ids), positions)
            maps[i] = {name: x[..., start:stop, :] if name.startswith("top_") else x[..., start:stop] for name, x in values.items()}
            start = stop
    return maps


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
def measure(
    model: PreTrainedModel,
    batch: Batch,
    look: Look,
    *,
    shown: Sequence[int] = (),
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Values]:
    """Return, by reading, ``"point.statistic"``, ``[layers, n]``, on the n positions of ``batch``; of ``"pair.…"`` the sum over
    these; and ``"map.…"`` of the m that are shown.

    Args:
        shown: how many positions of each sequence a map shows, from its first.
        advance: told, now and then, what share of the work has been done since it was told last.

    Raises :class:`UnsupportedModel` where a value is not finite.
    """
    decoder, head = decoder_of(model), model.get_output_embeddings()
    readout = readout_options(model) | {"temperature": look.temperature}
    depth, n, width = len(decoder.layers), len(batch.targets), head.in_features
    precision = torch.promote_types(model.dtype, torch.float32)
    modules = [module for module in ("attention", "ffn") if module in look.points]
    inside = [point for module in modules for point in (f"{module}_input", module)]
    whole = n * look.rows(depth)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=precision, device=model.device)

    # What stays has its place from the start. Small tensors that stay, put among large ones that go, leave a heap full of holes:
    # measured, 1 GB instead of 0.4 for 24 layers, 2,048 tokens and D = 1,024.
    streams = depth + 1 if "layer" in look.points else 0
    residual = torch.empty(streams, n, width, dtype=model.dtype, device=model.device)  # H^0..H^L
    common = {f"{point}.cosine": numbers(depth, n) for point in look.points}
    common |= {f"{point}.rms": numbers(depth, n) for point in modules}
    found: dict[str, dict[str, Tensor]] = {
        reading: {f"{point}.entropy": numbers(depth, n) for point in inside} for reading in look.readings
    }

    def read(reading: str, states: Tensor, layer: int) -> Tensor:
        if reading == "tuned" and look.translate is not None:
            states = look.translate(states, layer)
        return states if reading == "raw" else decoder.norm(states)

    def receive(block: BlockStates) -> None:
        number = block.number
        states = {point: getattr(block, point)[batch.row, batch.column] for point in BlockStates._fields[1:]}
        if inside:
            policies = [read(reading, states[point], number) for reading in look.readings for point in inside]
            entropies = iter(head(policies, outputs=("entropy",), **readout).entropy)
            for reading in look.readings:
                for point in inside:
                    found[reading][f"{point}.entropy"][number - 1] = next(entropies)
            advance(n * len(policies) / whole)
        for point, before in (("attention", "previous"), ("ffn", "attention_residual"), ("layer", "previous")):
            if point in look.points:
                common[f"{point}.cosine"][number - 1] = _cosine(states[point], states[before])
        for point in modules:
            common[f"{point}.rms"][number - 1] = _rms(states[point])
        if streams:
            if number == 1:
                residual[0] = states["previous"]
            residual[number] = states["layer"]

    with residual_points(model, receive):
        final = decoder(batch.input_ids, use_cache=False).last_hidden_state[batch.row, batch.column]
    if streams:
        common["layer.rms"] = torch.stack([_rms(states) for states in residual])
        common["pair.cosine"] = _pair_cosine(residual)
    show, rest = _rows_to_show(batch, shown)
    for reading, values in found.items():
        for module in modules:
            values[f"{module}.delta_entropy"] = values[f"{module}.entropy"] - values[f"{module}_input.entropy"]
        names = ("entropy", "logprob", "max_probability", *(("kl_to_final", "kl_from_final") if streams else ()))
        outputs = ("entropy", "logprobs", "max_probability", *(("pairwise_kl",) if streams else ()))
        by_layer = {name: numbers(streams + 1, n) for name in names}  # the last is the final policy
        if streams:
            values["pair.kl"] = torch.zeros(streams + 1, streams + 1, dtype=torch.float64, device=model.device)
        at_once = max(PAIR_ELEMENTS // (streams + 1) ** 2, 1)
        at_once = min(at_once, CPU_ROWS) if model.device.type == "cpu" else at_once
        shown_parts: list[dict[str, Tensor]] = []
        for rows in filter(len, (*show.split(at_once), *rest.split(at_once))):
            policies = [*(read(reading, states[rows], layer) for layer, states in enumerate(residual)), final[rows]]
            targets, more = batch.targets[rows], {}
            if is_shown := len(shown_parts) * at_once < len(show):
                more = {"top_k": min(look.top_k, head.out_features)}
            wanted = (*outputs, "rank") if is_shown else outputs
            statistics = head(policies, targets, outputs=wanted, **more, **readout)
            pairs: tuple[Tensor, ...] = ()
            if streams:
                kl = statistics.pairwise_kl  # [L+2, L+2, rows]
                values["pair.kl"] += kl.sum(-1, dtype=torch.float64)
                pairs = (kl[:, -1], kl[-1])
            columns = (statistics.entropy, statistics.logprobs, statistics.max_probability, *pairs)
            for name, value in zip(names, columns, strict=True):
                by_layer[name][:, rows] = value
            if is_shown:
                part = {"rank": statistics.rank, "top_ids": statistics.top_ids, "top_logprobs": statistics.top_logprobs}
                tracked = [
                    head(policies, torch.full_like(targets, token), outputs=("rank", "logprobs"), **readout) for token in look.track
                ]
                if tracked:
                    part["tracked_rank"] = torch.stack([one.rank for one in tracked])  # [T, L+2, rows]
                    part["tracked_logprobs"] = torch.stack([one.logprobs for one in tracked])
                shown_parts.append(part)
            advance(len(rows) * len(policies) / whole)
        for name, value in by_layer.items():
            if streams:
                values[f"layer.{name}"] = value[:-1]
            values[f"final.{name}"] = value[-1:]
        if streams:
            values["layer.delta_entropy"] = values["layer.entropy"].diff(dim=0)
        values |= common
        for name, value in values.items():
            if not value.isfinite().all():
                kind = f"of type {model.config.model_type!r}, whose {name} is not finite"
                raise UnsupportedModel(f"model: {kind}, accepted are models with finite hidden states and logits")
        if shown_parts:
            for name in shown_parts[0]:
                place = -2 if name.startswith("top_") else -1
                values[f"map.{name}"] = torch.cat([part[name] for part in shown_parts], place)
            for name in ("entropy", "logprob", "kl_to_final"):
                values[f"map.{name}"] = by_layer[name][:, show]
    return {reading: {name: value.cpu().numpy() for name, value in values.items()} for reading, values in found.items()}


def _rows_to_show(batch: Batch, shown: Sequence[int]) -> tuple[Tensor, Tensor]:  # -> [m], [n − m]
    """Return the positions among those of ``batch`` that maps show, and the others."""
    counts = torch.bincount(batch.row, minlength=len(batch.input_ids)).tolist()
    starts = np.cumsum([0, *counts[:-1]])
    show = [int(start) + i for start, many in zip(starts, shown or [0] * len(counts), strict=True) for i in range(many)]
    chosen = torch.zeros(len(batch.row), dtype=torch.bool, device=batch.row.device)
    chosen[show] = True
    return chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)


def _sums(values: Values, lengths: Sequence[int]) -> Values:
    """Return the sums of values and of their squares over the tokens of each response, ``[2, R, layers]``; maps as they are."""
    starts = np.cumsum([0, *lengths[:-1]])

    def summed(value: np.ndarray) -> np.ndarray:
        value = value.astype(np.float64)
        return np.stack([np.add.reduceat(x, starts, axis=1).T for x in (value, value**2)])

    return {name: value if name.startswith(("pair.", "map.")) else summed(value) for name, value in values.items()}


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
