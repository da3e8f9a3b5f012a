"""From samples to packed micro-batches: sequences one after the other without padding, the same number of batches on every rank.

Every rank knows all samples of a step and makes the same plan, so that no rank waits for one that has less to do.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bupo.rollout import Sample

IGNORE = -100  # target of a position that is not followed by a response token


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences, one row of T tokens; the last token of a sequence is only a target. Tensors are ``[1, T]``."""

    input_ids: Tensor
    position_ids: Tensor  # restart at 0 for every sequence
    targets: Tensor  # the token after each position; IGNORE but for response tokens
    coefficients: Tensor  # advantage times the token's weight in the mini-batch's mean
    sampler_logprobs: Tensor  # NaN where there is none
    lengths: tuple[int, ...]  # of the sequences, in order
    old_logprobs: Tensor | None = None  # of the optimised policy before the step's first update

    @property
    def mask(self) -> Tensor:  # [1, T] bool, True where a response token follows
        return self.targets != IGNORE


def pack(samples: Sequence[Sample], coefficients: Sequence[float], device: torch.device) -> MicroBatch:
    """``samples`` in one row, with one coefficient each. No sample at all gives a row that changes nothing: one ignored token."""
    ids, positions, targets, factors, sampler, lengths = [], [], [], [], [], []
    for sample, coefficient in zip(samples, coefficients, strict=True):
        sequence = [*sample.prompt_ids, *sample.response_ids]
        before, length, new = len(sample.prompt_ids) - 1, len(sequence) - 1, len(sample.response_ids)
        ids += sequence[:-1]
        positions += range(length)
        targets += [IGNORE] * before + sequence[before + 1 :]
        factors += [coefficient] * length
        sampler += [math.nan] * before + [*(sample.logprobs or [math.nan] * new)]
        lengths.append(length)
    if not samples:
        ids, positions, targets, factors, sampler, lengths = [0], [0], [IGNORE], [0.0], [math.nan], [1]
    row = lambda values, dtype: torch.tensor([values], dtype=dtype, device=device)  # noqa: E731
    integers = (row(values, torch.int64) for values in (ids, positions, targets))
    return MicroBatch(*integers, row(factors, torch.float32), row(sampler, torch.float32), tuple(lengths))


def pack_all(samples: Sequence[Sample], coefficients: Sequence[float], max_tokens: int, world) -> list[MicroBatch]:
    """This rank's share of ``samples``, in micro-batches of at most ``max_tokens`` tokens; every rank has as many of them."""
    plan = plan_micro_batches([tokens(sample) for sample in samples], max_tokens, world.size)[world.rank]
    return [pack([samples[i] for i in part], [coefficients[i] for i in part], world.device) for part in plan]


def tokens(sample: Sample) -> int:
    """How many tokens of it a forward reads."""
    return len(sample.prompt_ids) + len(sample.response_ids) - 1


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Indices of sequences by rank and micro-batch: as few micro-batches as will hold them, as many on each rank, of about equal
    size; some may be empty. Raises ``ValueError`` for a sequence above ``max_tokens``."""
    if lengths and max(lengths) > max_tokens:
        raise ValueError(f"lengths: {max(lengths)} given, accepted are up to max_tokens ({max_tokens})")
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = math.ceil(sum(lengths) / (ranks * max_tokens))
    while True:
        bins, left_out = fill(lengths, longest_first, count * ranks, max_tokens)
        if not left_out:
            return [bins[rank * count : (rank + 1) * count] for rank in range(ranks)]
        count += 1


def fill(lengths: Sequence[int], order: Iterable[int], bins: int, capacity: int) -> tuple[list[list[int]], list[int]]:
    """Puts each index, in ``order``, into the emptiest of the ``bins`` if it holds it; returns the bins and what was left out."""
    contents, left_out = [[] for _ in range(bins)], []
    loads = [(0, b) for b in range(bins)]
    for i in order:
        if loads and loads[0][0] + lengths[i] <= capacity:
            load, emptiest = loads[0]
            contents[emptiest].append(i)
            heapq.heapreplace(loads, (load + lengths[i], emptiest))
        else:
            left_out.append(i)
    return contents, left_out


def token_weights(lengths: Sequence[int], aggregation: str) -> list[float]:
    """The weight of each response token of each sequence, given the response lengths of a whole mini-batch (all ranks), which may
    have none: ``token-mean`` counts every token alike, ``sequence-mean-token-mean`` every sequence."""
    if aggregation == "token-mean":
        return [1 / sum(lengths) for _ in lengths]
    return [1 / (length * len(lengths)) for length in lengths]
