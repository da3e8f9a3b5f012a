"""The gradient tile from the cache, without a product: ``E = 2^(z·log2e − k)`` in bf16 becomes ``dz``.

``e^(z−m) = E · 2^(k − m·log2e)`` and ``z − m = ln 2 · (log2 E + k − m·log2e)``; the exponent is formed with one rounding, so
nothing cancels at large |z|. Only E is inexact: 2⁻⁸ relative in p, at most 0.004 nat in log p. Memory traffic bounds the kernel:
two bytes are read and two written for each of rows × columns. dz may lie where E does: a program reads its tile before it writes,
and no other one reads there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Cache
from bupo_kernels.backends.triton_.product import LN2, LOG2E, LOG2E_REST


@triton.jit(do_not_specialize=["cache_rows", "targets", "maximum", "constant", "slope", "dz_target", "exponent_stride", "n"])
def gradient_cached_kernel(
    cache,  # [cached rows, cache_stride] bf16
    exponents,  # [cached rows, exponent_stride] int32, one for BLOCK_V columns
    cache_rows,  # [n] int64: the cache's row of each row
    targets,  # [n] int64
    maximum,  # [n] fp32: m
    constant,  # [n] fp32
    slope,  # [n] fp32
    dz_target,  # [n] fp32
    dz,  # [n, dz_stride]
    cache_stride,
    exponent_stride,
    dz_stride,
    first_column,  # of the slice, a multiple of BLOCK_V
    n,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = rows < n
    first = first_column + tl.program_id(1) * BLOCK_V
    columns = first + tl.arange(0, BLOCK_V)
    stored = within[:, None]  # columns are whole blocks: E is 0 past the vocabulary, and dz has room
    cache_row = tl.load(cache_rows + rows, mask=within, other=0)
    e = tl.load(cache + cache_row[:, None] * cache_stride + columns[None, :], mask=stored, other=0.0).to(tl.float32)
    k = tl.load(exponents + cache_row * exponent_stride + first // BLOCK_V, mask=within, other=0).to(tl.float32)
    m = tl.load(maximum + rows, mask=within, other=0.0)
    power = tl.math.fma(m, -LOG2E_REST, tl.math.fma(m, -LOG2E, k))[:, None]  # k − m·log2e
    factor = tl.load(constant + rows, mask=within, other=0.0)[:, None]
    if WITH_ENTROPY:
        x = tl.where(e > 0, (tl.log2(e) + power) * LN2, 0.0)
        factor = factor - tl.load(slope + rows, mask=within, other=0.0)[:, None] * x
    y = tl.load(targets + rows, mask=within, other=-1)[:, None]
    on_target = tl.load(dz_target + rows, mask=within, other=0.0)[:, None]
    gradient = tl.where(columns[None, :] == y, on_target, e * tl.exp2(power) * factor)
    tl.store(
        dz + rows[:, None] * dz_stride + (columns - first_column)[None, :],
        gradient.to(dz.dtype.element_ty),
        mask=stored,
    )


def gradient_cached(
    cache: Cache,  # E and its exponents
    exponent_columns: int,  # how many columns share an exponent: BLOCK_V of the kernel that wrote them
    cache_rows: Tensor,  # [n] int64
    coefficients: Coefficients,  # [n] each
    dz: Tensor,  # [n or more, whole blocks of columns], overwritten
    columns: slice,  # of the vocabulary, from a multiple of COLUMN_UNIT on
) -> None:
    """Write the gradients of the logits of some rows and columns into ``dz``. It may be the memory of E where ``cache_rows`` have
    ``gradients.in_place_order``."""
    e, exponents = cache
    n, rows = len(cache_rows), min(32, 4096 // exponent_columns)
    m, constant, slope, on_target, y = coefficients
    gradient_cached_kernel[(triton.cdiv(n, rows), triton.cdiv(columns.stop - columns.start, exponent_columns))](
        e,
        exponents,
        cache_rows,
        y,
        m,
        constant,
        slope,
        on_target,
        dz,
        e.stride(0),
        exponents.stride(0),
        dz.stride(0),
        columns.start,
        n,
        WITH_ENTROPY=slope is not None,
        BLOCK_N=rows,
        BLOCK_V=exponent_columns,
        num_warps=8,
        enable_fp_fusion=True,
    )
