"""The products of a call on supports: dot products of gathered rows, and sums of them.

Both are bound by memory: of a row of D elements that is read, each is multiplied once. ``gathered_dots`` has BLOCK_M entries a
program and goes down D; ``gathered_sums`` has one segment and BLOCK_D columns a program, adds up the segment's rows in their order,
BLOCK_M at a time, and writes each sum once: no two programs write the same place, and the result repeats bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["left_rows", "right_rows", "out", "count"])
def gathered_dots_kernel(
    left,  # [l, left_stride]
    left_rows,  # [count] int64
    right,  # [r, right_stride]
    right_rows,  # [count] int64
    out,  # [count] fp32
    left_stride,
    right_stride,
    count,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = entries < count
    a = left + tl.load(left_rows + entries, mask=within, other=0)[:, None] * left_stride
    b = right + tl.load(right_rows + entries, mask=within, other=0)[:, None] * right_stride
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D))[None, :]
        there = within[:, None] & (columns < width)
        x = tl.load(a + columns, mask=there, other=0.0).to(tl.float32)
        sums += x * tl.load(b + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + entries, tl.sum(sums, 1), mask=within)


@triton.jit(do_not_specialize=["factors", "index", "offsets", "places"])
def gathered_sums_kernel(
    factors,  # [m] fp32
    source,  # [n, source_stride]
    index,  # [m] int64
    offsets,  # [s + 1] int64
    places,  # [s] int64
    out,  # [o, width]
    source_stride,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = columns < width
    begin = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_M):
        entries = first + tl.arange(0, BLOCK_M)
        within = entries < end
        rows = tl.load(index + entries, mask=within, other=0)
        factor = tl.load(factors + entries, mask=within, other=0.0)
        there = within[:, None] & here[None, :]
        x = tl.load(source + rows[:, None] * source_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        sums += tl.sum(factor[:, None] * x, 0)
    place = tl.load(places + segment)
    tl.store(out + place * width + columns, sums.to(out.dtype.element_ty), mask=here)


def gathered_dots(left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor, out: Tensor) -> None:
    """Write ``left[left_rows] · right[right_rows]``, of [l, D], [m], [r, D] and [m], to ``out`` [m], which is not empty."""
    gathered_dots_kernel[(triton.cdiv(len(out), 8),)](
        left,
        left_rows,
        right,
        right_rows,
        out,
        left.stride(0),
        right.stride(0),
        len(out),
        left.shape[1],
        BLOCK_M=8,
        BLOCK_D=256,
        num_warps=4,
    )


def gathered_sums(factors: Tensor, source: Tensor, index: Tensor, offsets: Tensor, out: Tensor, places: Tensor) -> None:
    """Write the weighted sums of segments of rows, as :meth:`bupo_kernels.backends.gathers.Gathers.sums` has them; there is at
    least one segment, and its rows have an element."""
    gathered_sums_kernel[(len(places), triton.cdiv(out.shape[1], 256))](
        factors,
        source,
        index,
        offsets,
        places,
        out,
        source.stride(0),
        out.shape[1],
        BLOCK_M=8,
        BLOCK_D=256,
        num_warps=4,
    )
