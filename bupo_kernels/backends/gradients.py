"""dH, dW and db from tiles of dz: the same two products and one sum, wherever the tiles come from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bupo_kernels.backends.compiled import present

# Rows of a 16-bit product that leave the library GEMM in fp32 at a time, before they are added.
PRODUCT_ROWS = 4096


def bytes_of_sum(elements: int, products: int, dtype: torch.dtype) -> int:
    """Return the bytes that an fp32 sum of so many ``products`` of operands of ``dtype`` moves as :func:`accumulate_` forms it, up
    to where it is read to be rounded. The first is written where the sum is; each further one of 16-bit operands is written, and
    read again with the sum, which is written; of fp32 operands the library adds it as it multiplies."""
    size = max(dtype.itemsize, 4)
    passes = 1 + (4 if dtype.itemsize < size else 2) * (products - 1) + 1
    return elements * size * passes


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that operands of ``dtype`` are multiplied in: their own where the library's product of 16-bit operands on
    ``device`` keeps its fp32 sum (``torch.mm(out_dtype=)``, on tensor cores), and else fp32, to which upcasting is exact."""
    wide = torch.promote_types(dtype, torch.float32)
    return dtype if dtype == wide or keeps_fp32_sums(device) else wide


@functools.cache
def keeps_fp32_sums(device: torch.device) -> bool:
    """Return whether ``torch.mm`` on ``device`` multiplies 16-bit operands into an fp32 result, at more than the rate of fp32:
    on NVIDIA GPUs from compute capability 8.0 on, before which there are no bf16 products; and on GPUs of AMD and Intel."""
    key = {"cuda": "CUDA", "xpu": "XPU"}.get(device.type)  # torch calls AMD's cuda too
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key):
        return False
    return key == "XPU" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def accumulate_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:  # [m, n] += [m, k] @ [k, n]
    """Add a product to an fp32 (or float64) ``total`` without rounding it first; or put the ``first`` one there, rounded to the
    dtype of ``total``.

    (``addmm`` with an ``out_dtype`` would save a pass over the sum, but what it accepts has changed with torch's releases.)
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    if product_dtype(a.dtype, a.device) != dtype:
        if first and total.dtype == dtype:
            torch.mm(a, b, out_dtype=dtype, out=total)
            return
        for rows in range(0, len(a), PRODUCT_ROWS):
            block = slice(rows, rows + PRODUCT_ROWS)
            product = torch.mm(a[block], b, out_dtype=dtype)
            total[block].copy_(product) if first else total[block].add_(product)
        return
    a, b = a.to(dtype), b.to(dtype)
    if not first:
        total.addmm_(a, b)
    elif total.dtype == dtype:
        torch.mm(a, b, out=total)
    else:
        total.copy_(torch.mm(a, b))


class GradientTile(Protocol):
    """One tile of dz: columns side by side, a slice of the vocabulary, and rows side by side, a block of them. Tiles come slice by
    slice in ascending order, and within a slice block by block; each is overwritten by the next.

    ``total`` is fp32 (float64); where the product is the ``first`` there, and alone, it may be of another dtype, to which the
    product is then rounded.
    """

    @property
    def columns(self) -> slice: ...

    @property
    def rows(self) -> slice: ...

    def add_to_hidden(self, total: Tensor, first: bool) -> None:  # [r, D]
        """Add ``dz W`` to ``total``; put it there if it is the ``first``."""

    def add_to_weight(self, total: Tensor, first: bool) -> None:  # [c, D]
        """Add ``dzᵀ h`` to ``total``; put it there if it is the ``first``."""

    def column_sums(self, dtype: torch.dtype) -> Tensor:  # [c]
        """Return the sums of dz over the rows, in ``dtype``."""
        ...


class MatrixTile(NamedTuple):
    """A tile of dz as a matrix, with the operands that the library's products take. All three are of one dtype."""

    columns: slice
    rows: slice
    dz: Tensor  # [r, c]
    weight: Tensor  # [c, D]
    hidden: Tensor | None  # [r, D]; None when dW is not wanted

    def add_to_hidden(self, total: Tensor, first: bool) -> None:  # [r, D]
        accumulate_(total, self.dz, self.weight, first)

    def add_to_weight(self, total: Tensor, first: bool) -> None:  # [c, D]
        assert self.hidden is not None
        accumulate_(total, self.dz.T, self.hidden, first)

    def column_sums(self, dtype: torch.dtype) -> Tensor:  # [c]
        return self.dz.sum(0, dtype=dtype)


class RowsTile(NamedTuple):
    """A slice of dz whose rows are whole: dH, one product over the vocabulary, is taken with the first of them."""

    columns: slice
    rows: slice
    dz: Tensor  # [n, V]
    weight: Tensor  # [V, D]
    hidden: Tensor | None  # [n, D]; None when dW is not wanted

    def add_to_hidden(self, total: Tensor, first: bool) -> None:  # [n, D]
        if first:
            accumulate_(total, self.dz, self.weight, first)

    def add_to_weight(self, total: Tensor, first: bool) -> None:  # [c, D]
        assert self.hidden is not None
        accumulate_(total, self.dz[:, self.columns].T, self.hidden, first)

    def column_sums(self, dtype: torch.dtype) -> Tensor:  # [c]
        return self.dz[:, self.columns].sum(0, dtype=dtype)


def whole_rows(
    dz: Tensor,  # [n, V]
    weight: Tensor,  # [V, D]
    hidden: Tensor | None,  # [n, D]
    columns: int,
) -> Iterator[RowsTile]:
    """Yield whole rows of dz, so many ``columns`` of dW at a time."""
    vocab, rows = len(weight), slice(0, len(dz))
    for start in range(0, vocab, columns):
        yield RowsTile(slice(start, min(start + columns, vocab)), rows, dz, weight, hidden)


def in_place_order(kept: Tensor) -> Tensor:  # [n] bool -> [k] int64
    """Return the k rows that are ``kept``, in an order in which the i-th is row i or, where that one is not kept, a row past the
    first k. So nobody reads row i but the i-th, whose dz may take its place while others are yet to be read."""
    rows = kept.nonzero().squeeze(1)
    order = torch.arange(len(rows), dtype=torch.int64, device=kept.device)
    order[~kept[: len(rows)]] = rows[rows >= len(rows)]
    return order


class GradientSums:
    """The gradients of one call, summed in ``dtype`` and each rounded once, to the dtype of its tensor. Rows that were never added
    get exactly 0.

    ``parts`` says whether the rows come in several additions. Then dW and db are summed over all of them in ``dtype``; otherwise
    each slice of dW is finished, and rounded, while it is at hand.
    """

    def __init__(
        self,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        *,
        needed: tuple[bool, bool, bool],
        dtype: torch.dtype,
        parts: bool,
    ):
        need_hidden, need_weight, need_bias = needed
        self.dtype, self.parts, self.shape, self.columns = dtype, parts, hidden.shape, len(weight)
        self._nothing = hidden.new_empty(0)
        self.hidden: Tensor | None = None
        self.weight: _SliceSums | None = None
        self.bias: _SliceSums | None = None
        if need_hidden:
            self.hidden = torch.zeros(hidden.shape[:-1].numel(), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        if need_weight:
            dense = torch.empty_like(weight, memory_format=torch.contiguous_format)
            self.weight = _SliceSums(present(dense), dtype, parts)
        if need_bias and bias is not None:
            self.bias = _SliceSums(torch.empty_like(bias), dtype, parts)

    def add(
        self,
        tiles: Iterator[GradientTile],
        positions: Tensor,  # [n]: the rows of the tiles, numbered through; ascending where dH is of the sums' dtype
        *,
        unscale: Tensor | None = None,  # [] power of two by which every dz is too large
        step: int,
    ) -> None:
        """Add the products of ``tiles``. Rows of dH are put in place with no more than ``step`` rows of memory."""
        self.put(self.products(tiles, len(positions), unscale=unscale), positions, step)

    def products(self, tiles: Iterator[GradientTile], n: int, *, unscale: Tensor | None = None) -> Tensor | None:  # [n, D]
        """Add the products of ``tiles``, of ``n`` rows, but for their rows of dH: return these, for :meth:`put`; None where dH is
        not needed."""
        rows_sum = None
        if self.hidden is not None:
            # Where dH is of the sums' dtype, and there is but one addition, its first rows hold the sum.
            shared = self.hidden.dtype == self.dtype and not self.parts
            rows_sum = self.hidden[:n] if shared else self.hidden.new_empty(n, self.shape[-1], dtype=self.dtype)
            if self.columns == 0:  # so no tile comes
                rows_sum.zero_()
        by_column = [sums for sums in (self.weight, self.bias) if sums is not None]
        for tile in tiles:
            first_block, last_block = tile.rows.start == 0, tile.rows.stop == n
            if rows_sum is not None:
                tile.add_to_hidden(rows_sum[tile.rows], first=tile.columns.start == 0)
            if first_block:
                for sums in by_column:
                    sums.open(tile.columns, unscale, one_product=last_block)
            if self.weight is not None:
                tile.add_to_weight(self.weight.part, first=first_block and self.weight.is_unwritten)
            if self.bias is not None:
                self.bias.add(tile.column_sums(self.dtype), first=first_block and self.bias.is_unwritten)
            if last_block:
                for sums in by_column:
                    sums.close()
            del tile  # the next one is made while the name would still hold this one's operands
        for sums in by_column:
            sums.is_empty = sums.is_empty and n == 0
        return rows_sum if rows_sum is None or unscale is None else rows_sum.mul_(unscale)

    def put(self, rows_sum: Tensor | None, positions: Tensor, step: int) -> None:  # [n, D], [n]
        """Put rows of dH in place, with no more than ``step`` rows of memory."""
        if rows_sum is not None and self.hidden is not None:
            _move_rows(rows_sum, self.hidden, positions, step)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dH, dW and db; [0] where not needed, since an op returns tensors."""
        hidden = self._nothing if self.hidden is None else self.hidden.view(self.shape)
        weight, bias = (self._nothing.clone() if sums is None else sums.result() for sums in (self.weight, self.bias))
        return hidden, weight, bias


class _SliceSums:
    """The sum of dW or of db over blocks of rows, a slice of the vocabulary at a time, in ``dtype``.

    ``part`` is the sum of the open slice, and ``is_unwritten`` whether it is yet to be written. It is memory of the whole where
    nothing is left to do to it: where it is of its dtype, or comes to one product alone.
    """

    def __init__(self, whole: Tensor, dtype: torch.dtype, parts: bool):
        self.whole, self.dtype = whole, dtype
        apart = parts and whole.dtype != dtype
        self.total = present(torch.empty_like(whole, dtype=dtype)) if apart else whole
        self.is_empty = True

    def open(self, columns: slice, unscale: Tensor | None, *, one_product: bool) -> None:
        """Begin with a slice, whose dz are too large by ``1 / unscale``."""
        self.columns, self.unscale = columns, unscale
        self.in_place = unscale is None and (self.total.dtype == self.dtype or (one_product and self.is_empty))
        self.part = self.total[columns] if self.in_place else torch.empty_like(self.total[columns], dtype=self.dtype)
        self.is_unwritten = self.is_empty or not self.in_place

    def add(self, values: Tensor, first: bool) -> None:
        self.part.copy_(values) if first else self.part.add_(values)

    def close(self) -> None:
        """Put the sum of the open slice in its place, and let go of it."""
        if not self.in_place:
            sums = self.part if self.unscale is None else self.part.mul_(self.unscale)
            self.total[self.columns].copy_(sums) if self.is_empty else self.total[self.columns].add_(sums)
        del self.part

    def result(self) -> Tensor:
        """Return the gradient, rounded to the dtype of its tensor."""
        if self.is_empty:
            self.total.zero_()
        if self.total is not self.whole:
            self.whole.copy_(self.total)
        return self.whole


def _move_rows(source: Tensor, target: Tensor, position: Tensor, step: int) -> None:  # [n, D], [N, D], [n]
    """Set ``target[position] = source``, rounded to the dtype of ``target``, with no more than ``step`` rows of memory.

    ``source`` may be the first rows of ``target``: positions then ascend, so a row only moves towards the end, and going from the
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
