"""The statistics of a row and what follows from them: log-prob, entropy, logsumexp, and the gradient of its logits.

A row's logits z have four: ``m = max z``, ``s = Σ e^(z−m)``, ``t = Σ (z−m) e^(z−m)`` and ``z_y``. Centred on m, the entropy
``ln s − t/s`` does not cancel at large |z|. Backends stream these four; everything per row that is not streamed is here.

A logit of −inf is a column that cannot be chosen: ``0 · ln 0 = 0`` wherever it enters a sum. The maximum of no logits is
:func:`lowest`, a finite number, so that the difference of two maxima is never NaN; a row without a logit above −inf has ``s = 0``,
and NaN for every result. A NaN among a row's logits is always in ``s``, and from there in every result and gradient of the row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# No number that enters a product with e^x = 0 may be infinite, so exponents end here: e^x is 0 in float64 too.
LEAST_EXPONENT = -1e4


def lowest(dtype: torch.dtype) -> float:
    """Return the maximum of no logits."""
    return torch.finfo(dtype).min


class Statistics(NamedTuple):
    """The statistics of rows, [N] each. Rows that are not active have ``m = −inf`` and ``s = 1``; no other row has that m."""

    m: Tensor
    s: Tensor
    t: Tensor
    z_y: Tensor

    @staticmethod
    def empty(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # [4, N]
        """Return the statistics of rows none of which is active."""
        statistics = torch.zeros(4, rows, dtype=dtype, device=device)
        statistics[0].fill_(-math.inf)
        statistics[1].fill_(1)
        return statistics

    @staticmethod
    def of_no_columns(rows: int, dtype: torch.dtype, device: torch.device) -> Statistics:
        """Return the statistics of rows that are active, over no logits."""
        statistics = torch.zeros(4, rows, dtype=dtype, device=device)
        statistics[0].fill_(lowest(dtype))
        return Statistics(*statistics)


def of_all_rows(part: Statistics, rows: Tensor, count: int) -> Statistics:
    """Return the statistics of all ``count`` rows, of which the active ``rows`` [n] have those of ``part``."""
    whole = Statistics(*Statistics.empty(count, part.m.dtype, part.m.device))
    for all_rows, some in zip(whole, part, strict=True):
        all_rows[rows] = some
    return whole


def of_active_rows(part: Statistics, active: Tensor) -> Statistics:  # [N] each, [N] bool
    """Return the statistics of all rows, of which those that are not active have lost what ``part`` has of them."""
    idle = Statistics.empty(len(active), part.m.dtype, part.m.device)
    return Statistics(*(torch.where(active, some, none) for some, none in zip(part, idle, strict=True)))


def in_order(parts: Tensor) -> Tensor:  # [ranks, ...] -> [...]
    """Return the sum over the ranks in their order, which is the same, bit for bit, on each of them."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class Results(NamedTuple):
    """The results of N rows, [N] each; 0 on rows that are not active."""

    logprob: Tensor
    entropy: Tensor | None
    logsumexp: Tensor
    log_s: Tensor


def finish(statistics: Statistics, vocab: int | Tensor, with_entropy: bool) -> Results:  # or []
    """Return the results that follow from the statistics of ``vocab`` logits a row."""
    m, s, t, z_y = statistics
    log_s = s.log().masked_fill_(s == 0, math.nan)
    logprob = ((z_y - m) - log_s).clamp_(max=0)
    entropy = (log_s - t / s).clamp_(min=0) if with_entropy else None
    if entropy is not None:
        entropy.clamp_(max=vocab.to(s.dtype).log() if isinstance(vocab, Tensor) else math.log(vocab))
    idle = m == -math.inf
    return Results(logprob.masked_fill_(idle, 0), entropy, (m + log_s).masked_fill_(idle, 0), log_s)


class Coefficients(NamedTuple):
    """The numbers that turn the logits of rows into their gradient, [n] each: ``dz_j = e^(z_j−m) (constant − slope (z_j−m))`` for
    j ≠ y, and ``dz_y = on_target``."""

    m: Tensor
    constant: Tensor
    slope: Tensor | None  # None where no entropy has a gradient
    on_target: Tensor
    targets: Tensor  # int64

    def scaled(self, factor: float | Tensor) -> Coefficients:  # or [n]
        """Return the coefficients of ``factor · dz``."""
        slope = self.slope if self.slope is None else self.slope * factor
        return self._replace(constant=self.constant * factor, slope=slope, on_target=self.on_target * factor)

    def bound(self) -> Tensor:  # [n]
        """Return a bound of ``|dz_j|`` for each row, from ``e^x ≤ 1`` and ``|x| e^x ≤ 1/e`` for ``x = z_j − m ≤ 0``."""
        off_target = self.constant.abs() if self.slope is None else self.constant.abs() + self.slope.abs() / math.e
        return torch.maximum(off_target, self.on_target.abs())

    def rows(self, block: slice) -> Coefficients:
        """Return the coefficients of some of the rows."""
        m, constant, slope, on_target, targets = self
        slope = slope if slope is None else slope[block]
        return Coefficients(m[block], constant[block], slope, on_target[block], targets[block])


def coefficients(g_logprob, g_entropy, g_logsumexp, m, log_s, logprob, entropy, targets) -> Coefficients:  # [n] each, or None
    """Return the coefficients of ``dz_j = g_lp (1[j=y] − p_j) − g_H p_j (log p_j + H) + g_lse p_j``, an upstream gradient of None
    being 0, with ``p_j = e^(z_j−m) / s`` and ``log p_j = (z_j−m) − ln s``. On the target ``1 − p_y = −expm1(log p_y)`` keeps its
    relative accuracy when p_y is near 1."""
    g_lp, g_h, g_lse = (0.0 if g is None else g for g in (g_logprob, g_entropy, g_logsumexp))
    s, p_y = log_s.exp(), logprob.exp()
    constant, on_target = torch.zeros_like(m) + (g_lse - g_lp), p_y * g_lse - g_lp * logprob.expm1()
    slope = None
    if g_entropy is not None:
        constant = constant - g_h * (entropy - log_s)
        on_target = on_target - g_h * (p_y * (logprob.clamp(min=LEAST_EXPONENT) + entropy))
        slope = g_h / s
    return Coefficients(m, constant / s, slope, on_target, targets)
