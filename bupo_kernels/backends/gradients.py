"""dH, dW and db from tiles of dz: the same two products and one sum, wherever the tiles come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class GradientTile(NamedTuple):
    """``dz`` of some rows and a slice of the vocabulary, and the operands its products take. Slices come in ascending order,
    and within a slice blocks of rows. All three matrices have one dtype; ``dz`` is overwritten by the next tile."""

    columns: slice
    rows: slice
    dz: Tensor  # [r, c]
    weight: Tensor | None  # [c, D]; None when dH is not wanted
    hidden: Tensor | None  # [r, D]; None when dW is not wanted


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# Rows of a 16-bit product that leave the library GEMM in fp32 at a time, before they are added.
PRODUCT_ROWS = 4096


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> None:  # [m, n] += [m, k] @ [k, n]
    """Adds a product without rounding it first: ``total`` is fp32 (or float64) whatever the operands are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        for rows in range(0, len(a), PRODUCT_ROWS):
            block = slice(rows, rows + PRODUCT_ROWS)
            total[block] += torch.mm(a[block], b, out_dtype=total.dtype)
    else:  # no library product keeps its fp32 accumulator here, but upcasting 16-bit operands is exact
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def linear_gradients(
    tiles: Iterator[GradientTile],
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    positions: Tensor,  # [n]: the rows that have a gradient, numbered through, ascending
    *,
    need: tuple[bool, bool, bool],
    dtype: torch.dtype,
    unscale: Tensor | None = None,  # [] power of two by which every dz is too large
    step: int,
) -> Gradients:
    """Sums in ``dtype``, each gradient rounded once, to the dtype of its tensor. Rows without a gradient get exactly 0."""
    need_hidden, need_weight, need_bias = need
    n, width = len(positions), hidden.shape[-1]
    d_hidden = d_sum = None
    if need_hidden:
        # Where dH is of the sums' dtype itself its first rows hold the sum.
        d_hidden = torch.zeros(hidden.shape[:-1].numel(), width, dtype=hidden.dtype, device=hidden.device)
        d_sum = d_hidden[:n] if dtype == hidden.dtype else d_hidden.new_zeros(n, width, dtype=dtype)
    d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = torch.zeros_like(bias) if need_bias else None

    def put(slice_sum: Tensor, target: Tensor) -> None:
        if unscale is not None:
            slice_sum.mul_(unscale)
        if slice_sum.data_ptr() != target.data_ptr():
            target.copy_(slice_sum)

    for tile in tiles:
        if need_hidden:
            accumulate_(d_sum[tile.rows], tile.dz, tile.weight)
        if tile.rows.start == 0:
            # Sums of this slice; where the gradient is of their dtype they are its own rows.
            d_weight_slice = d_weight[tile.columns].to(dtype) if need_weight else None
            d_bias_slice = d_bias[tile.columns].to(dtype) if need_bias else None
        if need_weight:
            accumulate_(d_weight_slice, tile.dz.T, tile.hidden)
        if need_bias:
            d_bias_slice.add_(tile.dz.sum(0, dtype=dtype))
        if tile.rows.stop == n:
            if need_weight:
                put(d_weight_slice, d_weight[tile.columns])
            if need_bias:
                put(d_bias_slice, d_bias[tile.columns])
            d_weight_slice = d_bias_slice = None

    if need_hidden:
        if unscale is not None:
            d_sum.mul_(unscale)
        _move_rows(d_sum, d_hidden, positions, step)
        d_hidden = d_hidden.view(hidden.shape)
    return Gradients(d_hidden, d_weight, d_bias)


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
