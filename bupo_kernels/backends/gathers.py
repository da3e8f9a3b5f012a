"""Gathers: the two products of a call on supports, where a row has logits of a few ids alone (``support.py``).

A logit is the dot product of a row of the hidden states and a row of W, and all logits together are as many as there are ids. A
gradient is a sum of weighted rows: dH of rows of W, one segment for each token; dW of rows of the hidden states, one segment for
each id, once the entries are sorted by it. So both are the same sum, each result is added up in a fixed order, and nothing is
scattered.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo_kernels.backends.base import Candidate, Problem

# Entries whose rows are at hand together. On a CPU they are to stay in its second cache.
CPU_ENTRIES, DEVICE_ENTRIES = 128, 65536


class Segments(NamedTuple):
    """Rows of ``source`` with a factor each, segment after segment; a segment may be of none."""

    factors: Tensor  # [m] fp32 (float64)
    source: Tensor  # [n, D], the elements of a row side by side
    rows: Tensor  # [m] int64: which
    offsets: Tensor  # [s + 1] int64: where the segments begin, and where the last one ends


class Gathers(Candidate):
    """An implementation of the two products. Its methods hold no state, and index nothing that the caller has not checked."""

    @abstractmethod
    def dots(
        self,
        left: Tensor,  # [l, D], the elements of a row side by side
        left_rows: Tensor,  # [m] int64
        right: Tensor,  # [r, D], the same, of the same dtype
        right_rows: Tensor,  # [m] int64
        budget: int,
        strategy: str | None,
    ) -> Tensor:  # [m]
        """Return ``left[left_rows] · right[right_rows]``, in fp32 (float64) sums, with no more than ``budget`` bytes at hand."""

    @abstractmethod
    def sums(
        self,
        segments: Segments,
        out: Tensor,  # [o, D], contiguous
        places: Tensor,  # [s] int64, each another
        budget: int,
        strategy: str | None,
    ) -> None:
        """Write ``Σ factors[e] · source[rows[e]]`` over the entries e of segment i to ``out[places[i]]``, summed in fp32 (float64)
        and rounded once, with no more than ``budget`` bytes at hand."""


class TorchGathers(Gathers):
    """The products in plain torch, on any device and in any dtype."""

    strategies = ()

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return None

    def dots(self, left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor, budget: int, strategy: str | None) -> Tensor:
        wide = torch.promote_types(left.dtype, torch.float32)
        found = left.new_empty(len(left_rows), dtype=wide)
        step = _entries(left, budget // 2)
        for start in range(0, len(found), step):
            some = slice(start, start + step)
            a, b = left[left_rows[some]].to(wide), right[right_rows[some]].to(wide)
            torch.sum(a.mul_(b), 1, out=found[some])
        return found

    def sums(self, segments: Segments, out: Tensor, places: Tensor, budget: int, strategy: str | None) -> None:
        if len(places) == 0:
            return
        factors, source, index, offsets = segments
        ends = offsets.tolist()
        most = max(budget // 2 // (8 * max(source.shape[1], 1)), 1)
        first = 0
        while first < len(places):  # as many segments as there is room for, whose sums are put in their places together
            last = min(first + most, len(places))
            entries = slice(ends[first], ends[last])
            some = Segments(factors[entries], source, index[entries], offsets[first : last + 1] - ends[first])
            out[places[first:last]] = self._sums(some, budget // 2).to(out.dtype)
            first = last

    @staticmethod
    def _sums(segments: Segments, budget: int) -> Tensor:  # [s, D]
        factors, source, index, offsets = segments
        if source.dtype == factors.dtype:
            # This gathers without a copy, and a bag is one loop, so that the sum has an order on a GPU too.
            return _bags(segments)
        ends = offsets.cpu()
        sums = factors.new_zeros(len(offsets) - 1, source.shape[1])
        step = _entries(source, budget)
        for start in range(0, len(index), step):
            stop = min(start + step, len(index))
            first = int(torch.searchsorted(ends, start, right=True)) - 1
            last = int(torch.searchsorted(ends, stop))
            rows = source[index[start:stop]].to(factors.dtype)
            here = torch.arange(stop - start, dtype=torch.int64, device=index.device)
            within = (offsets[first : last + 1] - start).clamp(0, stop - start)
            sums[first:last] += _bags(Segments(factors[start:stop], rows, here, within))
        return sums


def _bags(segments: Segments) -> Tensor:  # [s, D]
    factors, source, index, offsets = segments
    if len(index) == 0:
        return source.new_zeros(len(offsets) - 1, source.shape[1])
    return F.embedding_bag(index, source, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True)


def _entries(rows: Tensor, budget: int) -> int:  # [n, D]
    """Return how many entries may have their ``rows`` copied and upcast, twice, within ``budget``; at least one."""
    wide = max(rows.dtype.itemsize, 4)
    per_entry = 2 * max(rows.shape[1], 1) * (wide + (rows.dtype.itemsize if rows.dtype.itemsize < wide else 0))
    return max(min(budget // per_entry, CPU_ENTRIES if rows.device.type == "cpu" else DEVICE_ENTRIES), 1)
