"""The forward: per row, running (m, s, t, z_y) over the vocabulary, straight from the fp32 accumulator.

One work item is (row block, vocabulary split). Its program walks the split's column blocks, multiplies, and folds each tile into
registers; a logit never leaves the chip. The fold works on products: a positive scale keeps their order, and enters the exponent of
2 together with log2(e). Only four fp32 numbers per row and split leave, and ``merge.py`` merges them in order. Splits and tile
sizes do not depend on the number of rows, so neither does any row's result.

With ``SPECIALISED`` an item is a single tile instead, and nothing is carried from one to the next: a partial for each tile lets the
compiler run loads, products and fold in warps of their own, so that a tile is folded while the next one's products are under way.

With ``CACHE`` the first ``cached_rows`` rows also leave ``E = 2^(z·log2e − k)`` in bf16, ``k`` an integer per row and column
block chosen so that the block's largest E is in (½, 1]: a relative error of 2⁻⁸ at any |z|, for ``gradient_cached.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bupo_kernels.backends.base import Cache
from bupo_kernels.backends.triton_.config import split_columns, statistics_config
from bupo_kernels.backends.triton_.copies import WeightSlice
from bupo_kernels.backends.triton_.product import (
    LEAST_EXPONENT,
    LN2,
    LOG2E,
    LOG2E_REST,
    LOWEST,
    SPLIT_UNIT,
    Launch,
    any_target,
    in_order,
    positive_scale,
    product_tile,
    readout,
    store_tile,
)


@triton.jit
def target_logit(product, y, first, z_scale, BLOCK_V: tl.constexpr):
    """Return the logits of the targets that are in a tile, [BLOCK_N], and 0 for the other rows."""
    on_target = first + tl.arange(0, BLOCK_V)[None, :] == y[:, None]
    return tl.sum(tl.where(on_target, product, 0.0), 1) * z_scale


@triton.jit
def store_e(
    e,  # [BLOCK_N, BLOCK_V]
    m,  # [BLOCK_N]: the logits that e is 1 at
    cache,
    cache_stride,
    exponents,
    exponent_stride,
    rows,  # [BLOCK_N] int64: of the cache
    cached,  # [BLOCK_N]: those that it has
    first,
    TMA: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write a tile of E, and its exponents."""
    base = tl.maximum(m, -1e9)  # a block of −inf has an E of 0 for any k, which must be an int32
    k = tl.ceil(base * LOG2E)
    power = tl.math.fma(base, LOG2E_REST, tl.math.fma(base, LOG2E, -k))  # m·log2e − k
    store_tile((e * tl.exp2(power)[:, None]).to(tl.bfloat16), cache, cache_stride, rows, cached, first, TMA)
    tl.store(exponents + rows * exponent_stride + first // BLOCK_V, k.to(tl.int32), mask=cached)


for helper in (target_logit, store_e):  # as in product.py
    getattr(helper, "cache_key", None)


@triton.jit(do_not_specialize=[*("active_rows", "exponent_stride", "cached_rows", "first_row", "N", "splits", "split_units")])
def linear_statistics_kernel(
    hidden,  # [N, D]: TMA descriptor, or pointer; the active rows first
    targets,  # [N] int64
    active_rows,  # [1] int64: how many rows are active
    hidden_stride,
    weight,  # [columns from weight_first on, D]: TMA descriptor, or pointer
    weight_stride,
    weight_first,  # where the first split begins
    bias,
    row_scale,  # [N] fp32, or None
    scale,
    inner,
    partials,  # [splits, 4, N] fp32: m, s, t, z_y
    cache,  # [cached_rows, V up to whole blocks] bf16: TMA descriptor, or pointer, or None
    exponents,  # [cached_rows, column blocks] int32, or None
    cache_stride,
    exponent_stride,
    cached_rows,
    first_row,  # the row of E that the first of these rows has
    N,
    V,
    D,
    splits,
    split_units,  # columns of a split, in units of SPLIT_UNIT; with SPECIALISED a split is a single tile
    WITH_ENTROPY: tl.constexpr,
    CACHE: tl.constexpr,
    SIGN: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALISED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    active_count = tl.load(active_rows).to(tl.int32)  # no call has 2³¹ rows; element offsets are 64 bit
    row_blocks = tl.cdiv(active_count, BLOCK_N)
    items = row_blocks * splits
    if SPECIALISED:
        tl.assume(D > 0)  # else the flattened loop is compiled once more, for tiles without a step
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=SPECIALISED, warp_specialize=SPECIALISED):
        block, split = in_order(item, row_blocks, splits, GROUP)
        if SPECIALISED:
            first = (weight_first // BLOCK_V + split) * BLOCK_V  # seen to be a multiple: no column needs a register
            product = product_tile(
                hidden,
                hidden_stride,
                block * BLOCK_N,
                N,
                weight,
                weight_stride,
                weight_first,
                first,
                V,
                D,
                TMA,
                PRECISION,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
            )
            product, _ = readout(product, bias, first, V, inner, SIGN, HAS_BIAS, HAS_SOFTCAP, BLOCK_V)
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        active = rows < active_count
        y = tl.load(targets + rows, mask=active, other=-1).to(tl.int32)
        z_scale = positive_scale(scale, row_scale, rows, active, ROW_SCALE, BLOCK_N)
        scale_2 = z_scale * LOG2E
        of_cache = first_row + rows
        cached = active & (of_cache < cached_rows)

        partial = partials + split.to(tl.int64) * 4 * N + rows
        if SPECIALISED:
            z_y = tl.zeros((BLOCK_N,), tl.float32)
            if any_target(y, first, BLOCK_V):
                z_y = target_logit(product, y, first, z_scale, BLOCK_V)
            tl.store(partial + 3 * N, z_y, mask=active)
            top = tl.maximum(tl.max(product, 1), LOWEST)
            x = (product - top[:, None]) * scale_2[:, None]
            e = tl.exp2(x)
            m = top * z_scale
            tl.store(partial, tl.maximum(m, LOWEST), mask=active)
            tl.store(partial + N, tl.sum(e, 1), mask=active)
            if WITH_ENTROPY:
                tl.store(partial + 2 * N, tl.sum(tl.maximum(x, LEAST_EXPONENT) * e, 1) * LN2, mask=active)
            if CACHE:
                store_e(e, m, cache, cache_stride, exponents, exponent_stride, of_cache, cached, first, TMA, BLOCK_V)
        else:
            top = tl.full((BLOCK_N,), LOWEST, tl.float32)
            s = tl.zeros((BLOCK_N,), tl.float32)
            t = tl.zeros((BLOCK_N,), tl.float32)
            # A row's target is in one tile of one split, and that tile's z_y takes the place of this 0.
            tl.store(partial + 3 * N, tl.zeros((BLOCK_N,), tl.float32), mask=active)
            start = (weight_first // SPLIT_UNIT + split * split_units) * SPLIT_UNIT
            for first in tl.range(start, tl.minimum(V, start + split_units * SPLIT_UNIT), BLOCK_V):
                product = product_tile(
                    hidden,
                    hidden_stride,
                    block * BLOCK_N,
                    N,
                    weight,
                    weight_stride,
                    weight_first,
                    first,
                    V,
                    D,
                    TMA,
                    PRECISION,
                    BLOCK_N,
                    BLOCK_V,
                    BLOCK_D,
                )
                product, _ = readout(product, bias, first, V, inner, SIGN, HAS_BIAS, HAS_SOFTCAP, BLOCK_V)
                if any_target(y, first, BLOCK_V):
                    z_y = target_logit(product, y, first, z_scale, BLOCK_V)
                    tl.store(partial + 3 * N, z_y, mask=(y >= first) & (y < first + BLOCK_V))
                new_top = tl.maximum(top, tl.max(product, 1))
                # The difference first: it is exact where e^x counts, and 0 for the largest at any |z|.
                x = (product - new_top[:, None]) * scale_2[:, None]
                e = tl.exp2(x)
                step = (top - new_top) * scale_2
                a = tl.exp2(step)
                if WITH_ENTROPY:
                    carried = tl.maximum(step, LEAST_EXPONENT) * s
                    t = a * (t + carried) + tl.sum(tl.maximum(x, LEAST_EXPONENT) * e, 1)  # a NaN stays one in e
                s = a * s + tl.sum(e, 1)
                top = new_top
                if CACHE:
                    m = top * z_scale
                    store_e(e, m, cache, cache_stride, exponents, exponent_stride, of_cache, cached, first, TMA, BLOCK_V)

            tl.store(partial, tl.maximum(top * z_scale, LOWEST), mask=active)
            tl.store(partial + N, s, mask=active)
            if WITH_ENTROPY:
                tl.store(partial + 2 * N, t * LN2, mask=active)


def linear_statistics(
    launch: Launch,
    weight: WeightSlice,  # from a multiple of a split on
    active_rows: Tensor,  # [1] int64
    partials: Tensor,  # [splits of the slice, 4, N], each of config.partial_columns
    *,
    with_entropy: bool,
    cache: Cache | None = None,  # E and its exponents
    first_row: int = 0,  # the row of the cache that the first row has
) -> None:
    """Write the ``partials`` of the first ``active_rows`` rows of ``launch`` and some columns, and their part of the ``cache``."""
    config = statistics_config(
        launch.hidden.dtype,
        launch.target,
        width=launch.hidden.shape[1],
        softcap=launch.readout.softcap is not None,
        cache=cache is not None,
    )
    splits = partials.shape[0]
    cached: dict[str, object] = {"cache": None, "exponents": None, "cache_stride": 0, "exponent_stride": 0, "cached_rows": 0}
    if cache is not None:
        e, exponents = cache
        cached = {
            "cache": launch.tile_of(e, config),
            "exponents": exponents,
            "cache_stride": e.stride(0),
            "exponent_stride": exponents.stride(0),
            "cached_rows": len(e),
        }
    linear_statistics_kernel[launch.programs(config, splits)](
        active_rows=active_rows,
        partials=partials,
        first_row=first_row,
        N=len(launch.rows),
        splits=splits,
        split_units=split_columns(launch.vocab) // SPLIT_UNIT.value,
        WITH_ENTROPY=with_entropy,
        CACHE=cache is not None,
        **cached,
        **launch.arguments(weight, config),
    )
