"""The gradient tile, recomputed: ``dz`` of rows × columns of a slice, in the dtype of the gradient GEMMs.

The product is formed again, in the order along D that it had in the forward whatever the tiles of the two (``config.candidates``),
so it is the one that the statistics came from, bit for bit. What its logit is below the row's maximum is rounded once, after the
difference was taken, so that nothing cancels or overflows at any |z|. The target column is not ``1 − p_y`` of a rounded
p but the value that the row's fp32 log-prob gives.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.triton_.config import gradient_config
from bupo_kernels.backends.triton_.copies import WeightSlice
from bupo_kernels.backends.triton_.product import (
    LEAST_EXPONENT,
    LN2,
    LOG2E,
    Launch,
    any_target,
    in_order,
    positive_scale,
    product_tile,
    readout,
    store_tile,
)

DTYPES = {"torch.float32": tl.float32, "torch.bfloat16": tl.bfloat16, "torch.float16": tl.float16}


@triton.jit(do_not_specialize=["maximum", "constant", "slope", "dz_target", "slice_columns", "n"])
def gradient_recompute_kernel(
    hidden,  # [n, D]: TMA descriptor, or pointer
    targets,  # [n] int64
    hidden_stride,
    weight,  # [columns of the slice, D]: TMA descriptor, or pointer
    weight_stride,
    weight_first,  # of the slice, a multiple of BLOCK_V
    bias,
    row_scale,  # [n] fp32, or None
    scale,
    inner,
    maximum,  # [n] fp32: m
    constant,  # [n] fp32: off the target dz_j = e^(z_j−m) (constant − slope (z_j−m))
    slope,  # [n] fp32
    dz_target,  # [n] fp32: dz_y, on the target
    dz,  # [n, slice_columns up to whole blocks]: TMA descriptor, or pointer
    dz_stride,
    slice_columns,
    n,
    V,
    D,
    DTYPE: tl.constexpr,  # of dz
    WITH_ENTROPY: tl.constexpr,
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
    row_blocks = tl.cdiv(n, BLOCK_N)
    column_blocks = tl.cdiv(slice_columns, BLOCK_V)
    items = row_blocks * column_blocks
    if SPECIALISED:
        tl.assume(D > 0)  # else the flattened loop is compiled once more, for tiles without a step
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=SPECIALISED, warp_specialize=SPECIALISED):
        block, column_block = in_order(item, row_blocks, column_blocks, GROUP)
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        within = rows < n
        first = (weight_first // BLOCK_V + column_block) * BLOCK_V  # seen to be a multiple: no column needs a register
        product = product_tile(
            hidden,
            hidden_stride,
            block * BLOCK_N,
            n,
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
        product, cap_slope = readout(product, bias, first, V, inner, SIGN, HAS_BIAS, HAS_SOFTCAP, BLOCK_V)
        z_scale = positive_scale(scale, row_scale, rows, within, ROW_SCALE, BLOCK_N)
        m = tl.load(maximum + rows, mask=within, other=0.0)
        # No logit is above its row's maximum; m was rounded, and what that leaves at large |z| must not become a power of 2.
        x = tl.minimum(tl.math.fma(product, z_scale[:, None], -m[:, None]) * LOG2E, 0.0)
        factor = tl.load(constant + rows, mask=within, other=0.0)[:, None]
        if WITH_ENTROPY:
            slope_2 = tl.load(slope + rows, mask=within, other=0.0) * LN2
            factor = factor - slope_2[:, None] * tl.maximum(x, LEAST_EXPONENT)
        gradient = tl.exp2(x) * factor
        y = tl.load(targets + rows, mask=within, other=-1).to(tl.int32)
        if HAS_SOFTCAP or any_target(y, first, BLOCK_V):  # its slope leaves no registers for a branch
            on_target = tl.load(dz_target + rows, mask=within, other=0.0)
            gradient = tl.where(first + tl.arange(0, BLOCK_V)[None, :] == y[:, None], on_target[:, None], gradient)
        if HAS_SOFTCAP:
            gradient *= cap_slope
        store_tile(gradient.to(DTYPE), dz, dz_stride, rows, within, column_block * BLOCK_V, TMA)


def gradient_recompute(
    launch: Launch,
    weight: WeightSlice,  # from a multiple of COLUMN_UNIT on
    coefficients: Coefficients,  # [n] each
    dz: Tensor,  # [n or more, whole blocks of columns], overwritten
) -> None:
    """Write the gradients of the logits of ``launch``'s rows in some columns into ``dz``."""
    softcap = launch.readout.softcap is not None
    config = gradient_config(launch.hidden.dtype, launch.target, width=launch.hidden.shape[1], softcap=softcap)
    n, width = len(launch.rows), weight.columns.stop - weight.columns.start
    m, constant, slope, on_target, _ = coefficients
    gradient_recompute_kernel[launch.programs(config, triton.cdiv(width, config.columns))](
        maximum=m,
        constant=constant,
        slope=slope,
        dz_target=on_target,
        dz=launch.tile_of(dz[:n], config),
        dz_stride=dz.stride(0),
        slice_columns=width,
        n=n,
        DTYPE=DTYPES[str(dz.dtype)],
        WITH_ENTROPY=slope is not None,
        **launch.arguments(weight, config),
    )
