"""dH, dW and db from tiles of dz: the same two products and one sum, wherever the tiles come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends.compiled import present

# Rows of a 16-bit product that leave the library GEMM in fp32 at a time, before they are added.
PRODUCT_ROWS = 4096


def accumulate_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:  # [m, n] += [m, k] @ [k, n]
    """Adds a product without rounding it first, to an fp32 (or float64) ``total``; or puts the ``first`` one there, rounded to the
    dtype of ``total``."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.dtype != dtype and a.is_cuda:
        if first and total.dtype == dtype:
            torch.mm(a, b, out_dtype=dtype, out=total)
            return
        for rows in range(0, len(a), PRODUCT_ROWS):
            block = slice(rows, rows + PRODUCT_ROWS)
            product = torch.mm(a[block], b, out_dtype=dtype)
            total[block].copy_(product) if first else total[block].add_(product)
        return
    # Where no library product keeps its fp32 accumulator: upcasting 16-bit operands is exact.
    a, b = a.to(dtype), b.to(dtype)
    if not first:
        total.addmm_(a, b)
    elif total.dtype == dtype:
        torch.mm(a, b, out=total)
    else:
        total.copy_(torch.mm(a, b))


class GradientTile(NamedTuple):
    """``dz`` of some rows and a slice of the vocabulary, and the operands its products take. Slices come in ascending order,
    and within a slice blocks of rows. All three matrices have one dtype; ``dz`` is overwritten by the next tile.

    Sums ask a tile for its columns and rows, and for the three methods. ``total`` is fp32 (float64); where the product is the
    ``first`` there, and alone, it may be of another dtype, to which the product is then rounded."""

    columns: slice
    rows: slice
    dz: Tensor  # [r, c]
    weight: Tensor  # [c, D]
    hidden: Tensor | None  # [r, D]; None when dW is not wanted

    def add_to_hidden(self, total: Tensor, first: bool) -> None:  # [r, D]
        accumulate_(total, self.dz, self.weight, first)

    def add_to_weight(self, total: Tensor, first: bool) -> None:  # [c, D]
        accumulate_(total, self.dz.T, self.hidden, first)

    def column_sums(self, dtype: torch.dtype) -> Tensor:  # [c]
        return self.dz.sum(0, dtype=dtype)


class GradientSums:
    """The gradients of one call, summed in ``dtype`` and each rounded once, to the dtype of its tensor. Rows that were never added
    get exactly 0.

    ``parts``: whether the rows come in several additions. Then dW and db are summed over all of them in ``dtype``; otherwise each
    slice of dW is finished, and rounded, while it is at hand.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, need: tuple[bool, ...], dtype: torch.dtype, parts: bool
    ):
        self.dtype, self.parts, width = dtype, parts, hidden.shape[-1]
        self.shape, self._nothing = hidden.shape, hidden.new_empty(0)
        rows = hidden.shape[:-1].numel()
        self.hidden = torch.zeros(rows, width, dtype=hidden.dtype, device=hidden.device) if need[0] else None
        self.weight = present(torch.empty_like(weight, memory_format=torch.contiguous_format)) if need[1] else None
        self.bias = torch.empty_like(bias) if need[2] else None
        self._sums = [x if x is None else x.to(dtype) for x in (self.weight, self.bias)] if parts else [self.weight, self.bias]
        self._nothing_yet = True

    def add(
        self,
        tiles: Iterator[GradientTile],
        positions: Tensor,  # [n]: the rows of the tiles, numbered through, ascending
        *,
        unscale: Tensor | None = None,  # [] power of two by which every dz is too large
        step: int,
    ) -> None:
        n = len(positions)
        rows_sum = None
        if self.hidden is not None:
            # Where dH is of the sums' dtype, and there is but one addition, its first rows hold the sum.
            shared = self.hidden.dtype == self.dtype and not self.parts
            rows_sum = self.hidden[:n] if shared else self.hidden.new_empty(n, self.shape[-1], dtype=self.dtype)
        weight_sum, bias_sum = self._sums
        for tile in tiles:
            if rows_sum is not None:
                tile.add_to_hidden(rows_sum[tile.rows], first=tile.columns.start == 0)
            if tile.rows.start == 0:
                alone = unscale is None and self._nothing_yet and tile.rows.stop == n
                of_weight, of_bias = (self._slice(total, tile.columns, unscale, alone) for total in (weight_sum, bias_sum))
            if weight_sum is not None:
                tile.add_to_weight(of_weight[0], first=tile.rows.start == 0 and of_weight[1])
            if bias_sum is not None:
                column_sums = tile.column_sums(self.dtype)
                of_bias[0].copy_(column_sums) if tile.rows.start == 0 and of_bias[1] else of_bias[0].add_(column_sums)
            if tile.rows.stop == n:
                for total, part in ((weight_sum, of_weight), (bias_sum, of_bias)):
                    self._put(total, tile.columns, part, unscale)
                of_weight = of_bias = None
            del tile  # the next one is made while the name would still hold this one's operands
        self._nothing_yet = self._nothing_yet and n == 0
        if rows_sum is not None:
            if unscale is not None:
                rows_sum.mul_(unscale)
            _move_rows(rows_sum, self.hidden, positions, step)

    def _slice(self, total: Tensor | None, columns: slice, unscale: Tensor | None, alone: bool) -> tuple[Tensor, bool] | None:
        """Sums of a slice, and whether they are yet to be written. They are rows of the whole where nothing is left to do to them:
        they are of its dtype, or of a product ``alone``."""
        if total is None:
            return None
        if alone or (total.dtype == self.dtype and unscale is None):
            return total[columns], self._nothing_yet
        return torch.empty_like(total[columns], dtype=self.dtype), True

    def _put(self, total: Tensor | None, columns: slice, part: tuple[Tensor, bool] | None, unscale: Tensor | None) -> None:
        if total is None or part[0].data_ptr() == total[columns].data_ptr():
            return
        sums = part[0] if unscale is None else part[0].mul_(unscale)
        total[columns].copy_(sums) if self._nothing_yet else total[columns].add_(sums)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dH, dW, db; [0] where not needed, since an op returns tensors."""
        if self._nothing_yet:
            for total in self._sums:
                total is None or total.zero_()
        for whole, total in zip((self.weight, self.bias), self._sums, strict=True):
            if whole is not None and total.data_ptr() != whole.data_ptr():
                whole.copy_(total)
        found = self.hidden if self.hidden is None else self.hidden.view(self.shape), self.weight, self.bias
        return tuple(self._nothing.clone() if x is None else x for x in found)


def _move_rows(source: Tensor, target: Tensor, position: Tensor, step: int) -> None:  # [n, D], [N, D], [n]
    """``target[position] = source``, rounded to the dtype of ``target``, with no more than ``step`` rows of memory.

    ``source`` may be the first rows of ``target``: positions ascend, so a row only moves towards the end, and going from the
    last block to the first none is overwritten before it has moved.
    """
    shared = source.dtype == target.dtype
    if shared and len(source) == len(target):
        return
    for last in range(len(source), 0, -step):
        block = slice(max(last - step, 0), last)
        values = source[block].to(target.dtype, copy=True)
        if shared:
            source[block].zero_()
        target[position[block]] = values
