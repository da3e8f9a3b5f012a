"""The ordered finaliser: the partials of the vocabulary splits, or tiles, folded so many at once and always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bupo_kernels.backends.triton_.product import LEAST_EXPONENT, LOWEST


@triton.jit(do_not_specialize=["active_rows", "results", "splits", "N"])
def merge_kernel(
    partials,  # [splits, 4, N] fp32: m, s, t, z_y
    active_rows,  # [1] int64: how many rows are active, the first ones
    positions,  # [N] int64: where each row belongs in the results
    statistics,  # [4, results] fp32: the same four, over the whole vocabulary
    results,
    splits,
    N,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    active = rows < tl.load(active_rows)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    z_y = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(0, splits, AT_ONCE):  # several at once, so that their loads are under way together
        some = first + tl.arange(0, AT_ONCE)
        there = (some < splits)[:, None] & active[None, :]
        partial = partials + (some.to(tl.int64) * 4 * N)[:, None] + rows[None, :]
        split_m = tl.load(partial, mask=there, other=LOWEST)
        split_s = tl.load(partial + N, mask=there, other=0.0)
        new_m = tl.maximum(m, tl.max(split_m, 0))
        a, b = tl.exp(m - new_m), tl.exp(split_m - new_m[None, :])
        if WITH_ENTROPY:
            split_t = tl.load(partial + 2 * N, mask=there, other=0.0)
            carried = tl.maximum(m - new_m, LEAST_EXPONENT) * s
            below = tl.maximum(split_m - new_m[None, :], LEAST_EXPONENT)
            t = a * (t + carried) + tl.sum(b * (split_t + below * split_s), 0)
        s = a * s + tl.sum(b * split_s, 0)
        m = new_m
        z_y += tl.sum(tl.load(partial + 3 * N, mask=there, other=0.0), 0)
    position = tl.load(positions + rows, mask=active, other=0)
    tl.store(statistics + position, m, mask=active)
    tl.store(statistics + results + position, s, mask=active)
    tl.store(statistics + 2 * results + position, t, mask=active)
    tl.store(statistics + 3 * results + position, z_y, mask=active)


def merge(
    partials: Tensor,  # [splits, 4, N]
    active_rows: Tensor,  # [1]
    positions: Tensor,  # [N]
    statistics: Tensor,  # [4, results], written at the positions of active rows
    *,
    with_entropy: bool,
) -> None:
    """Fold the ``partials`` of each row into its ``statistics``."""
    splits, _, n = partials.shape
    rows = 32
    merge_kernel[(triton.cdiv(n, rows),)](
        partials,
        active_rows,
        positions,
        statistics,
        statistics.shape[1],
        splits,
        n,
        WITH_ENTROPY=with_entropy,
        BLOCK_N=rows,
        AT_ONCE=16,
        num_warps=4,
        enable_fp_fusion=True,
    )
