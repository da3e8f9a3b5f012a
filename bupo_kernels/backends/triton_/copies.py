"""What the kernels with a product read: rows of H side by side, and W with rows that begin on multiples of 16 bytes.

TMA and asynchronous copies want both so. Rows of H that count are gathered, a chunk or block of them at a time: 4 bytes moved for
each of their elements in 16 bit, beside 2·V FLOP in the product, 0.3 % of its time at V = 152k and 700 TFLOP/s. W is read in place;
where that cannot be, for its width or its strides, it is copied, a slice of the vocabulary at a time (``tiling.Reads``). Forward
and backward make copies of their own: the backward takes other rows, and W's, kept from one to the other, would be as large as W.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bupo_kernels.backends.base import Operands, is_aligned


class WeightSlice(NamedTuple):
    """Some columns of the vocabulary, and their rows of W, or of a copy of it."""

    columns: slice
    values: Tensor  # [c, width]


def weight_slice(weight: Tensor, columns: slice, width: int) -> WeightSlice:
    """Return ``columns`` of W with rows of ``width``, as a view where they can be read as they lie."""
    values = weight[columns]
    as_it_is = width == weight.shape[1] and reads_in_place(weight)
    return WeightSlice(columns, values if as_it_is else _copied(values, width))


def reads_in_place(matrix: Tensor) -> bool:  # [..., D]
    """Tell whether rows of ``matrix`` can be read where they lie, in what ``config.read_width`` says of their width."""
    return is_aligned(matrix) and matrix.data_ptr() % 16 == 0


class HiddenRows:
    """Rows of H, a block of which is brought side by side when it is asked for."""

    def __init__(self, operands: Operands, rows: Tensor, width: int, *, ascending: bool = True):  # [n]
        self.hidden, self.width = operands.hidden, width
        self.coordinates = operands.coordinates(rows)
        given = self.hidden.shape[-1]
        everything = ascending and len(rows) == operands.targets.numel()
        in_place = everything and width == given and self.hidden.is_contiguous() and reads_in_place(self.hidden)
        self.matrix = self.hidden.view(len(rows), given) if in_place else None

    def __getitem__(self, block: slice) -> Tensor:  # [r, width]
        if self.matrix is not None:
            return self.matrix[block]
        rows = self.hidden[tuple(i[block] for i in self.coordinates)]
        return rows.contiguous() if self.width == rows.shape[1] else _copied(rows, self.width)


def _copied(matrix: Tensor, width: int) -> Tensor:  # [n, D] -> [n, width]
    copy = matrix.new_empty(len(matrix), width)
    copy[:, : matrix.shape[1]] = matrix
    copy[:, matrix.shape[1] :] = 0
    return copy
