"""Per-token RL objectives as pure functions of log-probs, with their analytic derivative: no autograd, no wait for the device.

The loss of a token with log-prob ``lp`` and advantage ``A`` is
``weight · policy term + kl_coefficient · KL − entropy_coefficient · H``. With ``r = e^(lp − old)``, of the token or, for GSPO, of
its sequence, the policy term is one of

* ``−min(r A, clip(r, 1 − clip_low, 1 + clip_high) A)``: PPO (arXiv 1707.06347, equation 7), GRPO (2402.03300), DAPO (2503.14476),
  Dr. GRPO (2503.20783), GSPO (2507.18071, equation 5); on an internal policy BuPO's InterGRPO (2512.19673, equations 3 and 9).
  Where ``A < 0``, ``r`` counts at most ``dual_clip`` (1912.09729) or ``delta`` (TRL's; INTELLECT-2): two names for one bound.
* ``−stopgrad(min(r, 1 + clip_high)) A lp``: CISPO (MiniMax-M1, 2506.13585), bounded above only
* ``−min(r, delta) A`` and ``−A lp`` (REINFORCE): not clipped

Conventions, the same everywhere. A bound decides only *strictly* beyond it: a token exactly on a bound keeps its gradient. The
log-ratios of ``r`` and of the KL are clamped to ±20; strictly outside, the gradient through them is zero. A sequence is the last
dimension. Everything but ``lp`` and ``H`` is a constant. Tokens that do not count may hold anything, NaN included; of one that
counts, a loss that is not finite for its inputs has a derivative that is not: gradients are therefore switched off by a product
with 0, which keeps NaN and inf, and never by a selection.

A batch's loss is ``Σ token_weights · loss``, with the denominator an argument, so that it may span micro-batches and ranks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# |ln ratio| is clamped before exp: e^20 is far outside any clip range and far inside fp32's.
MAX_LOG_RATIO = 20.0

AGGREGATIONS = ("token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm")
CHOICES = {
    "ratio": ("token", "sequence", "none"),
    "clip": ("ppo", "cispo", None),
    "kl": (None, "k1", "k2", "k3"),
    "importance": (None, "token", "sequence"),
    "aggregation": AGGREGATIONS,
}


@dataclass(frozen=True)
class PolicyObjective:
    """The objective of an RL step. Raises ``ValueError``, naming the field, for values and combinations that make no sense."""

    ratio: str = "token"  # "sequence": e^(mean of the sequence's log-ratios), GSPO; "none": REINFORCE
    clip: str | None = "ppo"  # "cispo"; None
    clip_low: float = 0.2  # "ppo" only
    clip_high: float = 0.2  # "ppo" and "cispo"; TRL's CISPO names the bound itself: its epsilon_high is 1 + clip_high
    dual_clip: float | None = None  # "ppo" only
    delta: float | None = None  # "ppo" and None
    kl: str | None = None  # estimator of KL(π ‖ reference): "k1" −d, "k2" d²/2, "k3" e^d − 1 − d, with d = reference − lp
    kl_coefficient: float = 0.0  # 0 with an estimator: measured only
    entropy_coefficient: float = 0.0  # of a bonus
    importance: str | None = None  # weight of the policy term for π_old ≠ π_sampler, see `importance_weights`
    importance_cap: float = 2.0
    aggregation: str = "token-mean"  # see `token_weights`
    max_length: int | None = None  # "sequence-mean-token-sum-norm" only
    encoded: str = field(init=False, repr=False, compare=False)  # the fields above as JSON: how torch ops take an objective

    def __post_init__(self):
        for name, accepted in CHOICES.items():
            self._require(name, getattr(self, name) in accepted, ", ".join(map(repr, accepted)))
        self._number("clip_low", lambda x: 0 <= x <= 1, "0 to 1")
        for name in ("clip_high", "kl_coefficient", "entropy_coefficient"):
            self._number(name, lambda x: x >= 0, "0 and above")
        self._number("importance_cap", lambda x: x >= 1, "1 and above")
        if self.dual_clip is not None:
            self._number("dual_clip", lambda x: x > 1, "None and numbers above 1")
        if self.delta is not None:
            least = 1 + self.clip_high if self.clip == "ppo" else 1
            self._number("delta", lambda x: x > least, f"None and numbers above {least}")
        self._require("clip", self.ratio != "none" or self.clip is None, "None with ratio='none', which has nothing to clip")
        self._require("dual_clip", self.dual_clip is None or self.clip == "ppo", f"None with clip={self.clip!r}")
        bounded = self.clip != "cispo" and self.ratio != "none"
        self._require("delta", self.delta is None or bounded, f"None with ratio={self.ratio!r}, clip={self.clip!r}")
        self._require("delta", self.delta is None or self.dual_clip is None, "None with dual_clip, which is the same bound")
        self._require("kl_coefficient", self.kl_coefficient == 0 or self.kl is not None, "0 with kl=None")
        _check_max_length(self.aggregation, self.max_length)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        object.__setattr__(self, "encoded", json.dumps(values))

    def _require(self, name: str, holds: bool, accepted: str):
        if not holds:
            raise ValueError(f"{name}: {getattr(self, name)!r} given, accepted are {accepted}")

    def _number(self, name: str, holds, accepted: str):
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        self._require(name, is_number and holds(value), accepted)

    def require_inputs(self, **given: Tensor | None) -> None:
        """Raise ``ValueError`` naming the first of ``given`` that is None and needed."""
        needed = {
            "entropy": self.needs_entropy,
            "reference_logprobs": self.needs_reference,
            "sampler_logprobs": self.needs_sampler,
        }
        for name, values in given.items():
            if values is None and needed[name]:
                raise ValueError(f"{name}: None given, accepted is a tensor of the log-probs' shape, which {self} needs")

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coefficient != 0

    @property
    def needs_reference(self) -> bool:
        return self.kl is not None

    @property
    def needs_sampler(self) -> bool:
        return self.importance is not None

    @property
    def needs_sequence(self) -> bool:
        """Whether a token's terms depend on the log-probs of its whole sequence."""
        return "sequence" in (self.ratio, self.importance)


class PolicyTerms(NamedTuple):
    """The terms of each token, in shape and dtype of the log-probs, detached; loss and derivatives are 0 where not ``active``."""

    loss: Tensor  # before aggregation
    d_logprob: Tensor  # ∂(Σ w·loss)/∂lp / w, for weights w that are equal within a sequence
    d_entropy: Tensor  # ∂(Σ w·loss)/∂H / w
    ratio: Tensor  # clamped to e^±20, not clipped; the sequence's on each of its tokens for ratio="sequence"
    clipped_low: Tensor  # bool, 1 − clip_low decides
    clipped_high: Tensor  # bool, a bound from above decides: 1 + clip_high, dual_clip or delta
    kl: Tensor  # estimate of KL(π ‖ reference), 0 without one
    weight: Tensor  # importance weight of the policy term, 1 without
    active: Tensor  # bool, the token counts: in the numerator, and as the mask of `token_weights` in the denominator


@torch.no_grad()
def policy_terms(
    objective: PolicyObjective,
    logprobs: Tensor,  # [...] or [B, S]
    entropy: Tensor | None,  # [...]
    advantages: Tensor,  # [...] or broadcastable to it
    *,
    old_logprobs: Tensor | None = None,  # [...]
    reference_logprobs: Tensor | None = None,  # [...]
    sampler_logprobs: Tensor | None = None,  # [...]
    mask: Tensor | None = None,  # [...] bool
) -> PolicyTerms:
    """Return the loss of every token and its derivative in log-prob and entropy; the module's docstring has the formulas.

    Args:
        entropy: read only with an ``entropy_coefficient``.
        old_logprobs: None means on-policy: the ratio is 1, with the gradient it has there.
        sampler_logprobs: those of the engine that generated. A token whose value is not finite does not count.
        mask: True = the token counts.

    The importance weight multiplies the policy term alone, as in TRL and verl, not KL and entropy. With ``ratio="sequence"`` every
    token's derivative goes through the ratio they share and is the mean over the sequence; with equal advantages each one's own.
    """
    objective.require_inputs(entropy=entropy, reference_logprobs=reference_logprobs, sampler_logprobs=sampler_logprobs)
    active = active_tokens(logprobs, mask, sampler_logprobs)

    def where_active(x: Tensor) -> Tensor:
        return torch.where(active, x.to(logprobs.dtype), 0)

    def sequence_mean(x: Tensor) -> Tensor:
        return where_active(x.sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp(min=1))

    logprobs, advantages = where_active(logprobs), where_active(advantages)
    old = logprobs if old_logprobs is None else where_active(old_logprobs)
    log_ratio = sequence_mean(logprobs - old) if objective.ratio == "sequence" else logprobs - old
    log_ratio, inside = _clamp(log_ratio)
    ratio = log_ratio.exp()
    weight = torch.ones_like(ratio)
    if objective.importance is not None:
        assert sampler_logprobs is not None
        weight = importance_weights(objective, old - where_active(sampler_logprobs))

    loss, d_logprob, low, high = _policy_term(objective, ratio, logprobs, advantages)
    loss, d_logprob = weight * loss, weight * d_logprob
    if objective.clip != "cispo" and objective.ratio != "none":  # the derivative is one through the ratio
        d_logprob = d_logprob * inside
        d_logprob = sequence_mean(d_logprob) if objective.ratio == "sequence" else d_logprob

    kl = torch.zeros_like(ratio)
    if objective.kl is not None:
        assert reference_logprobs is not None
        kl, d_kl = _kl(objective.kl, where_active(reference_logprobs) - logprobs)
        loss, d_logprob = loss + objective.kl_coefficient * kl, d_logprob + objective.kl_coefficient * d_kl
    if objective.needs_entropy:
        assert entropy is not None
        loss = loss - objective.entropy_coefficient * where_active(entropy)
    d_entropy = where_active(torch.full_like(ratio, -objective.entropy_coefficient))
    return PolicyTerms(where_active(loss), where_active(d_logprob), d_entropy, ratio, low, high, kl, weight, active)


def active_tokens(logprobs: Tensor, mask: Tensor | None = None, sampler_logprobs: Tensor | None = None) -> Tensor:
    """Return which tokens count, ``[...]`` bool: those of ``mask`` with a finite sampler log-prob. ``logprobs`` give the shape."""
    active = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    return active if sampler_logprobs is None else active & sampler_logprobs.isfinite()


def importance_weights(objective: PolicyObjective, log_ratio: Tensor) -> Tensor:  # [...] -> [...]
    """Return weights for samples of another policy, from ``ln π_old − ln π_sampler``, which is 0 on tokens that do not count.

    ``"token"``: ``min(π_old / π_sampler, cap)``, truncated importance sampling. ``"sequence"``: the product over the sequence where
    it lies in ``[1 / cap, cap]``, bounds included, else 0: TRL's ``sequence_mask`` with both bounds. A sequence of weight 0 still
    counts in the denominator.
    """
    if objective.importance == "token":
        return _clamp(log_ratio)[0].exp().clamp(max=objective.importance_cap)
    total = log_ratio.sum(-1, keepdim=True)
    return torch.where(total.abs() > math.log(objective.importance_cap), 0, total.exp()).expand_as(log_ratio)


def _policy_term(
    objective: PolicyObjective, ratio: Tensor, logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each [...]
    """Return the loss, its derivative (in ``ln ratio``, or in ``lp`` where the ratio is a constant), clipped low, clipped high."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if objective.ratio == "none":
        return -advantages * logprobs, -advantages, never, never
    top = 1 + objective.clip_high
    if objective.clip == "cispo":
        slope = -ratio.clamp(max=top) * advantages
        return slope * logprobs, slope, never, ratio > top
    # The minimum of both branches is one clamp of the ratio, to bounds that depend on the advantage's sign.
    ceiling = objective.dual_clip or objective.delta or math.inf  # where A < 0
    floor, top = (1 - objective.clip_low, top) if objective.clip == "ppo" else (0.0, ceiling)
    low = (advantages < 0) & (ratio < floor)
    high = torch.where(advantages > 0, ratio > top, (advantages < 0) & (ratio > ceiling))
    bounded = torch.where(advantages > 0, ratio.clamp(max=top), ratio.clamp(floor, ceiling))
    loss = -bounded * advantages
    return loss, loss * ~(low | high), low, high


def _kl(estimator: str, log_ratio: Tensor) -> tuple[Tensor, Tensor]:  # [...] -> [...], [...]
    """Return Schulman's k1, k2 or k3 of KL(π ‖ other) from ``ln other − ln π``, and its derivative in ``ln π``."""
    d, inside = _clamp(log_ratio)
    if estimator == "k1":
        value, slope = -d, 0 * d + 1
    elif estimator == "k2":
        value, slope = d.square() / 2, -d
    else:
        value, slope = d.expm1() - d, -d.expm1()
    return value, slope * inside


def _clamp(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log_ratio`` clamped to ±20, and where it was not beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), log_ratio.abs() <= MAX_LOG_RATIO


def token_weights(
    mask: Tensor,  # [B, S] bool
    aggregation: str,
    *,
    denominator: float | Tensor | None = None,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [B, S]
    """Return weights that turn per-token losses into the batch's loss ``Σ weight · loss``; 0 off the mask, equal within a sequence.

    Args:
        mask: True on the tokens that count (:attr:`PolicyTerms.active`), one sequence a row.
        aggregation: ``"token-mean"``, every token alike (DAPO, and the reference code of BuPO); ``"sequence-mean-token-mean"``,
            every sequence alike and every token alike within it (GRPO, equations 3 and 9 of BuPO);
            ``"sequence-mean-token-sum-norm"``, the sequences' mean of their sum over ``max_length`` (Dr. GRPO).
            The first two sum to 1.
        denominator: replaces the batch's own, so that parts of a batch are weighted as the whole: the number of tokens that count
            for ``"token-mean"``, else of sequences that have one, over all micro-batches and ranks.
        max_length: the divisor of a sequence's sum, for ``"sequence-mean-token-sum-norm"`` alone.
        dtype: that of the weights.

    Empty sequences count for nothing.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: {aggregation!r} given, accepted are {', '.join(map(repr, AGGREGATIONS))}")
    _check_max_length(aggregation, max_length)
    lengths = mask.sum(1, keepdim=True)  # [B, 1]
    if denominator is None:
        denominator = batch_denominator(mask, aggregation).clamp(min=1)
    within = max_length or (1 if aggregation == "token-mean" else lengths.clamp(min=1))
    return torch.where(mask, mask.to(dtype) / within / denominator, 0)


def batch_denominator(mask: Tensor, aggregation: str) -> Tensor:  # [B, S] bool -> []
    """Count the tokens of a whole batch that count, or its sequences that have one: for :func:`token_weights` of its parts."""
    return mask.sum() if aggregation == "token-mean" else mask.any(1).sum()


def _check_max_length(aggregation: str, max_length: int | None):
    needed = aggregation == "sequence-mean-token-sum-norm"
    is_length = isinstance(max_length, int) and not isinstance(max_length, bool) and max_length > 0
    if not (is_length if needed else max_length is None):
        accepted = "positive integers" if needed else "None"
        raise ValueError(f"max_length: {max_length!r} given, accepted are {accepted} with aggregation={aggregation!r}")


class PolicyMetrics(NamedTuple):
    """Means over the tokens that count, 0-d and on the device; 0 over no token, the ratio 1; NaN for what was not given."""

    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clipped_low: Tensor  # share
    clipped_high: Tensor  # share
    kl_old: Tensor  # k3 of KL(π_old ‖ π); 0 on-policy
    kl_reference: Tensor
    entropy: Tensor
    sampler_gap: Tensor  # |lp − sampler's lp|
    active_rows: Tensor  # how many tokens count


@torch.no_grad()
def policy_metrics(
    terms: PolicyTerms,
    logprobs: Tensor,  # [...]
    entropy: Tensor | None = None,  # [...]
    old_logprobs: Tensor | None = None,  # [...]
    sampler_logprobs: Tensor | None = None,  # [...]
    mask: Tensor | None = None,  # [...] bool, all of the active tokens if not given
) -> PolicyMetrics:
    """Return the metrics of a step, for its log. Nothing here waits for the device."""
    rows = terms.active if mask is None else terms.active & mask
    count = rows.sum()

    def mean(x: Tensor | None) -> Tensor:
        if x is None:
            return logprobs.new_full((), math.nan)
        return torch.where(rows, x, 0).sum(dtype=logprobs.dtype) / count.clamp(min=1)

    def extreme(sign: int) -> Tensor:
        values = torch.where(rows, sign * terms.ratio, -math.inf)
        return torch.where(count > 0, sign * F.pad(values.flatten(), (0, 1), value=-math.inf).amax(), 1.0)

    return PolicyMetrics(
        ratio_mean=torch.where(count > 0, mean(terms.ratio), 1.0),
        ratio_min=extreme(-1),
        ratio_max=extreme(1),
        clipped_low=mean(terms.clipped_low),
        clipped_high=mean(terms.clipped_high),
        kl_old=mean(torch.zeros_like(logprobs) if old_logprobs is None else _kl("k3", logprobs - old_logprobs)[0]),
        kl_reference=mean(terms.kl),
        entropy=mean(entropy),
        sampler_gap=mean(None if sampler_logprobs is None else (logprobs - sampler_logprobs).abs()),
        active_rows=count,
    )
