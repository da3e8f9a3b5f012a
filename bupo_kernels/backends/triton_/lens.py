"""The policies of a lens, from tiles of logits that the library's product left in memory (``backends/lens_loop.py``).

Both kernels have a program for each policy and token, which reads its row of the tile, and the last policy's beside it where one is
compared with. Memory bounds them: 4 bytes are read for each logit. A row's sums are added up in one order, and no two programs
write the same place, so results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bupo_kernels.backends.algebra import Statistics
from bupo_kernels.backends.lens_loop import Comparison, Running
from bupo_kernels.backends.triton_.product import LEAST_EXPONENT

BLOCK_V, WARPS = 2048, 8


@triton.jit(do_not_specialize=["s", "t", "cross", "policy_stride"])
def lens_sums_kernel(
    z,  # [P, r, columns] fp32; z − m is left there for PAIRS
    powers,  # [P, r, columns] fp32: e^(z−m), written for PAIRS
    m_before,  # [P, r] fp32: the maxima of the columns before
    m,  # [P, r] fp32: those with the tile's
    s_before,  # [P, r] fp32
    s,  # [P, r] fp32, policies `policy_stride` apart
    t,  # the same
    cross,  # [r, P, P] fp32
    policy_stride,
    columns,
    WITH_LAST: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    token, policy = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tokens, last = tl.num_programs(0).to(tl.int64), tl.num_programs(1).to(tl.int64) - 1
    at, at_last = policy * tokens + token, last * tokens + token
    own_m = tl.load(m + at)
    last_m = own_m
    if WITH_LAST:
        last_m = tl.load(m + at_last)
    sum_s = tl.zeros([BLOCK_V], tl.float32)
    sum_t = tl.zeros([BLOCK_V], tl.float32)
    sum_to = tl.zeros([BLOCK_V], tl.float32)
    sum_from = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, columns, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        within = column < columns
        x = tl.load(z + at * columns + column, mask=within, other=-float("inf")) - own_m
        e = tl.exp(x)
        sum_s += e
        sum_t += e * tl.maximum(x, LEAST_EXPONENT)
        if WITH_LAST:
            last_x = tl.load(z + at_last * columns + column, mask=within, other=-float("inf")) - last_m
            last_e = tl.exp(last_x)
            sum_to += tl.where(e > 0, e * last_x, 0.0)  # what a policy rules out does not count
            sum_from += tl.where(last_e > 0, last_e * x, 0.0)
        if PAIRS:
            tl.store(powers + at * columns + column, e, mask=within)
            tl.store(z + at * columns + column, x, mask=within)
    moved, before = tl.load(m_before + at) - own_m, tl.load(s_before + at)
    shrink = tl.exp(tl.maximum(moved, LEAST_EXPONENT))
    running = policy * policy_stride + token
    tl.store(s + running, shrink * before + tl.sum(sum_s, 0))
    carried = tl.load(t + running) + tl.maximum(moved, LEAST_EXPONENT) * before
    tl.store(t + running, shrink * carried + tl.sum(sum_t, 0))
    if WITH_LAST:  # noqa: SIM102 (known to the compiler, and the other one is not)
        if policy != last:
            last_moved, last_before = tl.load(m_before + at_last) - last_m, tl.load(s_before + at_last)
            last_shrink = tl.exp(tl.maximum(last_moved, LEAST_EXPONENT))
            pairs = cross + token * (last + 1) * (last + 1)
            to, back = pairs + policy * (last + 1) + last, pairs + last * (last + 1) + policy
            old_to = shrink * (tl.load(to) + last_moved * before)
            old_back = last_shrink * (tl.load(back) + moved * last_before)
            gone = (before == 0) | (shrink == 0)
            last_gone = (last_before == 0) | (last_shrink == 0)
            tl.store(to, tl.where(gone, 0.0, old_to) + tl.sum(sum_to, 0))
            tl.store(back, tl.where(last_gone, 0.0, old_back) + tl.sum(sum_from, 0))


@triton.jit(do_not_specialize=["m", "log_s", "z_y", "rank", "jsd", "policy_stride"])
def lens_comparison_kernel(
    z,  # [P, r, columns] fp32: logits
    m,  # [P, r] fp32, policies `policy_stride` apart, as all that follow
    log_s,
    z_y,
    rank,  # int64, or null
    jsd,  # fp32, or null
    policy_stride,
    columns,
    RANK: tl.constexpr,
    JSD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    token, policy = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tokens, last = tl.num_programs(0).to(tl.int64), tl.num_programs(1).to(tl.int64) - 1
    running, of_last = policy * policy_stride + token, last * policy_stride + token
    limit, norm, last_norm = 0.0, 0.0, 0.0
    own_m, last_m = 0.0, 0.0
    if RANK:
        limit = tl.load(z_y + running)
    if JSD:
        own_m, norm, last_m, last_norm = (
            tl.load(m + running),
            tl.load(log_s + running),
            tl.load(m + of_last),
            tl.load(log_s + of_last),
        )
    above = tl.zeros([BLOCK_V], tl.int32)
    apart = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, columns, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        within = column < columns
        own = tl.load(z + (policy * tokens + token) * columns + column, mask=within, other=-float("inf"))
        if RANK:
            above += tl.where(own > limit, 1, 0)
        if JSD:
            other = tl.load(z + (last * tokens + token) * columns + column, mask=within, other=-float("inf"))
            a = tl.maximum(own - own_m - norm, LEAST_EXPONENT)
            b = tl.maximum(other - last_m - last_norm, LEAST_EXPONENT)
            # With M the larger of p and q, r = e^−|ln p − ln q|: p ln p + q ln q − (p + q) ln ½(p + q), never below 0.
            log_r = -tl.abs(a - b)
            r = tl.exp(log_r)
            apart += tl.exp(tl.maximum(a, b)) * (r * log_r - (1 + r) * tl.log((1 + r) * 0.5))
    if RANK:
        tl.store(rank + running, tl.load(rank + running) + tl.sum(above, 0))
    if JSD:  # noqa: SIM102
        if policy != last:
            tl.store(jsd + running, tl.load(jsd + running) + 0.5 * tl.sum(apart, 0))


def lens_sums(
    z: Tensor,  # [P, r, c], contiguous: logits
    powers: Tensor | None,  # as z, for all pairs
    before: Statistics,  # [P, r] each, contiguous: those of the columns before
    m: Tensor,  # [P, r], contiguous: maxima with the tile's
    running: Running,  # [P, r] each: s, t and, but for all pairs, `cross` are overwritten
) -> None:
    """Fold a tile into the sums of its rows. For all pairs leave ``e^(z−m)`` and ``z − m`` of it in ``powers`` and ``z``."""
    policies, tokens, columns = z.shape
    s, t = running.statistics.s, running.statistics.t
    lens_sums_kernel[(tokens, policies)](
        z,
        z if powers is None else powers,
        before.m,
        m,
        before.s,
        s,
        t,
        s if running.cross is None else running.cross,
        s.stride(0),
        columns,
        WITH_LAST=running.cross is not None and not running.pairs,
        PAIRS=running.pairs,
        BLOCK_V=BLOCK_V,
        num_warps=WARPS,
    )


def lens_comparison(z: Tensor, statistics: Statistics, log_s: Tensor, found: Comparison) -> None:  # [P, r, c], [P, r] each
    """Add to rank and jsd what follows from a tile of logits. All [P, r] have policies as far apart as ``statistics``."""
    policies, tokens, columns = z.shape
    m, z_y = statistics.m, statistics.z_y
    lens_comparison_kernel[(tokens, policies)](
        z,
        m,
        log_s,
        z_y,
        m if found.rank is None else found.rank,
        m if found.jsd is None else found.jsd,
        m.stride(0),
        columns,
        RANK=found.rank is not None,
        JSD=found.jsd is not None,
        BLOCK_V=BLOCK_V,
        num_warps=WARPS,
    )
