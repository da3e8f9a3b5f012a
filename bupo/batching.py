"""Packed micro-batches of samples: sequences one after the other without padding, the same number of batches on every rank.

Every rank knows all samples of a step and divides them alike, so that no rank waits for one that has less to do.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bupo.distributed import World
from bupo.rollout import Sample

IGNORE = -100  # the target of a position that is not followed by a response token


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences as one row of T tokens; the last token of a sequence is only a target. Tensors are ``[1, T]``."""

    input_ids: Tensor
    position_ids: Tensor  # positions, which restart at 0 for every sequence
    targets: Tensor  # the token after each position where that is of a response, else IGNORE
    coefficients: Tensor  # advantage times the token's weight in the mini-batch's mean
    sampler_logprobs: Tensor  # the log-probs the targets were sampled with, NaN where there are none
    lengths: tuple[int, ...]  # the lengths of the sequences, in order
    old_logprobs: Tensor | None = None  # the optimised policy's before the step's first update
    old_entropy: Tensor | None = None  # the same, where the objective asks for it
    kept: tuple[Tensor, Tensor] | None = None  # ids [M] and offsets [T + 1] that the sampler kept for targets; None for all

    @property
    def sequence_lengths(self) -> Tensor:  # [n] int64
        """:attr:`lengths` as a tensor."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.targets.device)

    @property
    def mask(self) -> Tensor:  # [1, T] bool
        """Where a response token follows."""
        return self.targets != IGNORE


def pack(samples: Sequence[Sample], coefficients: Sequence[float], device: torch.device) -> MicroBatch:
    """Pack ``samples`` into one row, with a coefficient each. Without any, the row is one ignored token, which changes nothing."""
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    factors: list[float] = []
    sampler: list[float] = []
    lengths: list[int] = []
    for sample, coefficient in zip(samples, coefficients, strict=True):
        sequence = [*sample.prompt_ids, *sample.response_ids]
        before, length = len(sample.prompt_ids) - 1, len(sequence) - 1
        ids += sequence[:-1]
        positions += range(length)
        targets += [IGNORE] * before + sequence[before + 1 :]
        factors += [coefficient] * length
        sampler += [math.nan] * before + [*(sample.logprobs or [math.nan] * len(sample.response_ids))]
        lengths.append(length)
    if not samples:
        ids, positions, targets, factors, sampler, lengths = [0], [0], [IGNORE], [0.0], [math.nan], [1]
    return MicroBatch(
        input_ids=torch.tensor([ids], dtype=torch.int64, device=device),
        position_ids=torch.tensor([positions], dtype=torch.int64, device=device),
        targets=torch.tensor([targets], dtype=torch.int64, device=device),
        coefficients=torch.tensor([factors], dtype=torch.float32, device=device),
        sampler_logprobs=torch.tensor([sampler], dtype=torch.float32, device=device),
        lengths=tuple(lengths),
        kept=_support(samples, device),
    )


def _support(samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return the ids that the sampler kept for each position of the row, none where no response token follows; or None where
    it kept all. Raise ``ValueError`` where it did so for some samples alone."""
    sets = [sample.kept for sample in samples]
    if not any(sets):
        return None
    ids, sizes = array("i"), array("i")
    for sample, kept in zip(samples, sets, strict=True):
        if kept is None:
            raise ValueError("samples: some with and some without kept sets given, accepted are those of one sampling")
        ids += kept.ids
        sizes += array("i", [0] * (len(sample.prompt_ids) - 1)) + kept.sizes
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int64, device=device)
    return torch.tensor(ids, dtype=torch.int64, device=device), offsets


def pack_all(samples: Sequence[Sample], coefficients: Sequence[float], max_tokens: int, world: World) -> list[MicroBatch]:
    """Pack this rank's share of ``samples`` into micro-batches of at most ``max_tokens`` tokens, as many as on every rank."""
    parts = plan_micro_batches([tokens(sample) for sample in samples], max_tokens, world.size)[world.rank]
    return [pack([samples[i] for i in part], [coefficients[i] for i in part], world.device) for part in parts]


def tokens(sample: Sample) -> int:
    """Return how many tokens of ``sample`` a forward reads."""
    return len(sample.prompt_ids) + len(sample.response_ids) - 1


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Return the indices of sequences by rank and micro-batch.

    There are as few micro-batches as will hold them, as many on each rank, of about equal size; some may be empty. Raises
    ``ValueError`` for a sequence above ``max_tokens``.
    """
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
    """Put each index, in ``order``, into the emptiest of the ``bins`` if it fits; return the bins and what was left out."""
    contents: list[list[int]] = [[] for _ in range(bins)]
    left_out, loads = [], [(0, number) for number in range(bins)]
    for i in order:
        if loads and loads[0][0] + lengths[i] <= capacity:
            load, emptiest = loads[0]
            contents[emptiest].append(i)
            heapq.heapreplace(loads, (load + lengths[i], emptiest))
        else:
            left_out.append(i)
    return contents, left_out


def token_weights(lengths: Sequence[int], aggregation: str) -> list[float]:
    """Return the weight of each response token, for each sequence of a whole mini-batch (all ranks), which may have none.

    ``token-mean`` counts every token alike, ``sequence-mean-token-mean`` every sequence, ``sequence-mean-token-sum`` each token as
    the first counts a sequence. ``lengths`` are those of the responses.
    """
    if aggregation == "token-mean":
        return [1 / sum(lengths) for _ in lengths]
    if aggregation == "sequence-mean-token-sum":
        return [1 / len(lengths) for _ in lengths]
    return [1 / (length * len(lengths)) for length in lengths]
