"""RL objectives as pure functions of log-probs, with their analytic derivative: no autograd, no wait for the device.

The loss of a token with log-prob ``lp`` and advantage ``A`` is
``weight · policy term + kl_coefficient · KL − entropy_coefficient · H``. With ``r = e^(lp − old)``, of the token or, for GSPO, of
its sequence, the policy term is one of

* ``−min(r A, clip(r, 1 − clip_low, 1 + clip_high) A)``: PPO (arXiv 1707.06347, equation 7), GRPO (2402.03300), DAPO (2503.14476),
  Dr. GRPO (2503.20783), GSPO (2507.18071, equation 5); on an internal policy BuPO's InterGRPO (2512.19673, equations 3 and 9).
  Where ``A < 0``, ``r`` counts at most ``dual_clip`` (1912.09729) or ``delta`` (TRL's; INTELLECT-2): two names for one bound.
* ``−stopgrad(min(r, 1 + clip_high)) A lp``: CISPO (MiniMax-M1, 2506.13585), bounded above only
* ``−(4/τ) σ(τ (r − 1)) A``, with τ of the advantage's sign: SAPO (2511.20347), a gate in place of the clip, whose derivative in
  ``ln r`` is ``−4 σ (1 − σ) r A``, which is ``−A`` at ``r = 1``
* ``−R A``, with ``R = e^(mean of the clipped ln r of the sequence)`` and ``ln r`` clipped to ``[−clip_low, clip_high]`` on the side
  that PPO would: GMPO (2507.20673), the geometric mean of clipped ratios, where GSPO clips the geometric mean
* ``−stopgrad(φ(R)) A lp``, with ``R`` the *product* of the sequence's ratios and ``φ(R) = R^k e^(λ (1 − R))``, k and λ of the
  advantage's sign: VESPO (2602.10693). With ``importance="token"`` R has those weights as factors, as in TRL.
* ``−min(r, delta) A`` and ``−A lp`` (REINFORCE): not clipped

LUSPO (2602.05261) is GSPO with each sequence's loss times its length: ``ratio="sequence"``, ``"sequence-mean-token-sum"``. With
``top_entropy_quantile`` ρ below 1 the policy term is that of the share ρ of the batch's tokens that have the highest entropy, and 0
on all others, which still count in the denominator ("beyond the 80/20 rule", 2506.01939). The equations of SAPO, GMPO, VESPO and
LUSPO are those that TRL 1.16 states. :func:`simpo_loss` is of pairs of sequences, without advantages.

Conventions, the same everywhere. A bound decides only *strictly* beyond it: a token exactly on a bound keeps its gradient. The
log-ratios of ``r`` and of the KL are clamped to ±20; strictly outside, the gradient through them is zero. A sequence is the last
dimension, or, of sequences that are packed one after the other, one of the ``lengths`` that are given. Everything but ``lp`` and
``H`` is a constant. Tokens that do not count may hold anything, NaN included; of one that counts, a loss that is not finite for
its inputs has a derivative that is not: gradients are therefore switched off by a product with 0, which keeps NaN and inf, and
never by a selection.

A batch's loss is ``Σ token_weights · loss``, with the denominator an argument, so that it may span micro-batches and ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo_kernels.row_parallel import Rows

# |ln ratio| is clamped before exp: e^20 is far outside any clip range and far inside fp32's.
MAX_LOG_RATIO = 20.0

AGGREGATIONS = ("token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum-norm", "sequence-mean-token-sum")
CHOICES = {
    "ratio": ("token", "sequence", "none"),
    "clip": ("ppo", "cispo", "sapo", "gmpo", "vespo", None),
    "kl": (None, "k1", "k2", "k3"),
    "importance": (None, "token", "sequence"),
    "aggregation": AGGREGATIONS,
}


@dataclass(frozen=True)
class PolicyObjective:
    """The objective of an RL step. Raises ``ValueError``, naming the field, for values and combinations that make no sense."""

    ratio: str = "token"  # "sequence": e^(mean of the sequence's log-ratios), GSPO; "none": REINFORCE
    clip: str | None = "ppo"  # what bounds the ratio: "ppo", "cispo", "sapo", of sequences "gmpo" and "vespo"; None
    clip_low: float = 0.2  # "ppo" and "gmpo", there of ln r
    clip_high: float = 0.2  # the same and "cispo"; TRL's CISPO names the bound itself: its epsilon_high is 1 + clip_high
    dual_clip: float | None = None  # "ppo" only
    delta: float | None = None  # "ppo" and None
    sapo_temperature_pos: float = 1.0  # τ where A > 0
    sapo_temperature_neg: float = 1.05  # τ elsewhere
    vespo_k_pos: float = 2.0  # k where A ≥ 0: how fast the weight falls with R below 1
    vespo_lambda_pos: float = 3.0  # λ where A ≥ 0: how fast it falls above 1
    vespo_k_neg: float = 3.0  # k where A < 0
    vespo_lambda_neg: float = 2.0  # λ where A < 0
    top_entropy_quantile: float = 1.0  # ρ, the share of tokens whose policy term counts; 0 = the one of highest entropy
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
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
            self._number(name, lambda x: x > 0, "above 0")
        for name in ("vespo_k_pos", "vespo_k_neg"):
            self._number(name, lambda x: x >= 0, "0 and above")
        self._number("top_entropy_quantile", lambda x: 0 <= x <= 1, "0 to 1")
        self._number("importance_cap", lambda x: x >= 1, "1 and above")
        if self.dual_clip is not None:
            self._number("dual_clip", lambda x: x > 1, "None and numbers above 1")
        if self.delta is not None:
            least = 1 + self.clip_high if self.clip == "ppo" else 1
            self._number("delta", lambda x: x > least, f"None and numbers above {least}")
        self._require("clip", self.ratio != "none" or self.clip is None, "None with ratio='none', which has nothing to clip")
        self._require("dual_clip", self.dual_clip is None or self.clip == "ppo", f"None with clip={self.clip!r}")
        if self.clip in ("gmpo", "vespo"):
            self._require("ratio", self.ratio == "sequence", f"'sequence' with clip={self.clip!r}")
        if self.clip == "vespo":
            self._require("importance", self.importance != "sequence", "None and 'token' with clip='vespo', whose ratio it enters")
        everywhere = self.top_entropy_quantile == 1 or self.clip != "gmpo"
        self._require("top_entropy_quantile", everywhere, "1 with clip='gmpo', whose mean is of all tokens of a sequence")
        bounded = self.clip in ("ppo", None) and self.ratio != "none"
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
        return self.entropy_coefficient != 0 or self.needs_batch

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

    @property
    def needs_batch(self) -> bool:
        """Whether a token's terms depend on the entropies of the whole batch."""
        return self.top_entropy_quantile < 1


class PolicyTerms(NamedTuple):
    """The terms of each token, in shape and dtype of the log-probs, detached; loss and derivatives are 0 where not ``active``."""

    loss: Tensor  # before aggregation
    d_logprob: Tensor  # ∂(Σ w·loss)/∂lp / w, for weights w that are equal within a sequence
    d_entropy: Tensor  # ∂(Σ w·loss)/∂H / w
    ratio: Tensor  # clamped to e^±20, not clipped; the sequence's on each of its tokens for ratio="sequence"
    clipped_low: Tensor  # bool, 1 − clip_low (GMPO: −clip_low) decides
    clipped_high: Tensor  # bool, a bound from above decides: 1 + clip_high (GMPO: clip_high), dual_clip or delta
    kl: Tensor  # estimate of KL(π ‖ reference), 0 without one
    weight: Tensor  # importance weight of the policy term, 1 without; 0 beside the tokens of top_entropy_quantile
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
    lengths: Tensor | None = None,  # [n] int64
    entropy_bound: float | Tensor | None = None,  # or []
) -> PolicyTerms:
    """Return the loss of every token and its derivative in log-prob and entropy; the module's docstring has the formulas.

    Args:
        entropy: read only with an ``entropy_coefficient`` or a ``top_entropy_quantile``.
        old_logprobs: None means on-policy: the ratio is 1, with the gradient it has there.
        sampler_logprobs: those of the engine that generated. A token whose value is not finite does not count.
        mask: True = the token counts.
        lengths: how many tokens each sequence of a packed batch has, of all tokens, numbered through. Without, a sequence is the
            last dimension.
        entropy_bound: the entropy at which ``top_entropy_quantile`` divides a batch of which this is a part, see
            :func:`top_entropy_bound`; None means the one of these tokens.

    The importance weight multiplies the policy term alone, as in TRL and verl, not KL and entropy. With ``ratio="sequence"`` every
    token's derivative goes through the ratio they share and is the mean over the sequence; with equal advantages each one's own.
    """
    objective.require_inputs(entropy=entropy, reference_logprobs=reference_logprobs, sampler_logprobs=sampler_logprobs)
    active = active_tokens(logprobs, mask, sampler_logprobs)
    sequence_sum = _sum_of_sequences(lengths)

    def where_active(x: Tensor) -> Tensor:
        return torch.where(active, x.to(logprobs.dtype), 0)

    def sequence_mean(x: Tensor) -> Tensor:
        return where_active(sequence_sum(x) / sequence_sum(active.to(x.dtype)).clamp(min=1))

    logprobs, advantages = where_active(logprobs), where_active(advantages)
    old = logprobs if old_logprobs is None else where_active(old_logprobs)
    log_ratio = logprobs - old
    weight = torch.ones_like(logprobs)
    if objective.importance is not None:
        assert sampler_logprobs is not None
        weight = importance_weights(objective, old - where_active(sampler_logprobs), lengths)
    tokens = log_ratio
    if objective.clip == "vespo":
        log_ratio, weight = sequence_sum(log_ratio + weight.log()), torch.ones_like(weight)
    elif objective.ratio == "sequence":
        log_ratio = sequence_mean(log_ratio)
    log_ratio, inside = _clamp(log_ratio)
    ratio = log_ratio.exp()
    if objective.needs_batch:
        assert entropy is not None
        if entropy_bound is None:
            entropy_bound = top_entropy_bound(entropy, active, objective.top_entropy_quantile)
        weight = weight * where_active(entropy >= entropy_bound)

    if objective.clip == "gmpo":
        bounded, inside, low, high = _clipped_logs(objective, tokens, advantages)
        loss = d_logprob = -sequence_mean(bounded).exp() * advantages
        through_ratio = True
    else:
        loss, d_logprob, low, high = _policy_term(objective, ratio, logprobs, advantages)
        through_ratio = objective.clip not in ("cispo", "vespo") and objective.ratio != "none"
    loss, d_logprob = weight * loss, weight * d_logprob
    if through_ratio:  # the derivative is one in ln ratio
        d_logprob = sequence_mean(d_logprob) if objective.ratio == "sequence" else d_logprob
        d_logprob = d_logprob * inside

    kl = torch.zeros_like(ratio)
    if objective.kl is not None:
        assert reference_logprobs is not None
        kl, d_kl = _kl(objective.kl, where_active(reference_logprobs) - logprobs)
        loss, d_logprob = loss + objective.kl_coefficient * kl, d_logprob + objective.kl_coefficient * d_kl
    if objective.entropy_coefficient != 0:
        assert entropy is not None
        loss = loss - objective.entropy_coefficient * where_active(entropy)
    d_entropy = where_active(torch.full_like(ratio, -objective.entropy_coefficient))
    return PolicyTerms(where_active(loss), where_active(d_logprob), d_entropy, ratio, low, high, kl, weight, active)


def _sum_of_sequences(lengths: Tensor | None) -> Callable[[Tensor], Tensor]:  # [n]
    """Return the function that puts the sum of each sequence on all of its tokens."""
    if lengths is None:
        return lambda x: x.sum(-1, keepdim=True).expand_as(x)

    def of_packed(x: Tensor) -> Tensor:
        # In the order of the tokens, whatever the device: atomic sums would differ from run to run.
        sums = torch.segment_reduce(x.flatten(), "sum", lengths=lengths, unsafe=True)
        return sums.repeat_interleave(lengths, output_size=x.numel()).view_as(x)

    return of_packed


def top_entropy_bound(
    entropy: Tensor,  # [...]
    mask: Tensor,  # [...] bool
    quantile: float,
    row_group: Any = None,
) -> Tensor:  # []
    """Return the entropy that the share ``quantile`` of the tokens in ``mask`` have or exceed, without a wait for the device.

    Of n tokens these are ``1 + floor(quantile · (n − 1))``, and those that have exactly that of the last: as many as lie at or
    above torch's (and TRL's) quantile ``1 − quantile``. Without a token it is infinite.

    It is for a batch whose loss is taken in parts, given the entropies of the whole batch; where these are known before the loss,
    as with old log-probs, zero advantages for the tokens below the bound have the same gradient in one pass, and cost no product.
    With a ``row_group`` it is of the tokens of all its ranks, which all call this; this waits for the device, once.
    """
    rows = Rows(row_group, entropy)
    values = rows.joined(torch.where(mask, entropy.detach(), -math.inf).flatten())
    if values.numel() == 0:
        return values.new_full((), math.inf)
    count = rows.sum(mask.sum())
    last = ((count - 1).clamp(min=0).double() * quantile).floor().long()
    bound = values.sort(descending=True).values.gather(0, last.view(1)).squeeze(0)
    return torch.where(count > 0, bound, math.inf)


def active_tokens(logprobs: Tensor, mask: Tensor | None = None, sampler_logprobs: Tensor | None = None) -> Tensor:
    """Return which tokens count, ``[...]`` bool: those of ``mask`` with a finite sampler log-prob. ``logprobs`` give the shape."""
    active = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    return active if sampler_logprobs is None else active & sampler_logprobs.isfinite()


def importance_weights(
    objective: PolicyObjective,
    log_ratio: Tensor,  # [...]
    lengths: Tensor | None = None,  # [n] int64
) -> Tensor:  # [...]
    """Return weights for samples of another policy, from ``ln π_old − ln π_sampler``, which is 0 on tokens that do not count.

    ``"token"``: ``min(π_old / π_sampler, cap)``, truncated importance sampling. ``"sequence"``: the product over the sequence where
    it lies in ``[1 / cap, cap]``, bounds included, else 0: TRL's ``sequence_mask`` with both bounds. A sequence of weight 0 still
    counts in the denominator. ``lengths`` as in :func:`policy_terms`.
    """
    if objective.importance == "token":
        return _clamp(log_ratio)[0].exp().clamp(max=objective.importance_cap)
    total = _sum_of_sequences(lengths)(log_ratio)
    return torch.where(total.abs() > math.log(objective.importance_cap), 0, total.exp())


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
    if objective.clip == "vespo":
        k = _by_sign(advantages >= 0, objective.vespo_k_pos, objective.vespo_k_neg, ratio)
        decay = _by_sign(advantages >= 0, objective.vespo_lambda_pos, objective.vespo_lambda_neg, ratio)
        slope = -(k * ratio.log() + decay * (1 - ratio)).exp() * advantages
        return slope * logprobs, slope, never, never
    if objective.clip == "sapo":
        temperature = _by_sign(advantages > 0, objective.sapo_temperature_pos, objective.sapo_temperature_neg, ratio)
        x = temperature * (ratio - 1)
        gate, rest = x.sigmoid(), (-x).sigmoid()  # 1 − gate would round to 0
        return -4 / temperature * gate * advantages, -4 * gate * rest * ratio * advantages, never, never
    # The minimum of both branches is one clamp of the ratio, to bounds that depend on the advantage's sign.
    ceiling = objective.dual_clip or objective.delta or math.inf  # where A < 0
    floor, top = (1 - objective.clip_low, top) if objective.clip == "ppo" else (0.0, ceiling)
    low = (advantages < 0) & (ratio < floor)
    high = torch.where(advantages > 0, ratio > top, (advantages < 0) & (ratio > ceiling))
    bounded = torch.where(advantages > 0, ratio.clamp(max=top), ratio.clamp(floor, ceiling))
    loss = -bounded * advantages
    return loss, loss * ~(low | high), low, high


def _by_sign(positive: Tensor, value: float, otherwise: float, like: Tensor) -> Tensor:  # [...] -> [...]
    """Return one of two numbers for each token, in the dtype of ``like``."""
    return torch.where(positive, torch.full_like(like, value), otherwise)


def _clipped_logs(
    objective: PolicyObjective, log_ratio: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each [...]
    """Return GMPO's clipped log-ratio of each token, where its gradient goes through, clipped low, clipped high."""
    log_ratio, inside = _clamp(log_ratio)
    low = (advantages < 0) & (log_ratio < -objective.clip_low)
    high = (advantages > 0) & (log_ratio > objective.clip_high)
    bounded = torch.where(low, -objective.clip_low, torch.where(high, objective.clip_high, log_ratio))
    return bounded, inside & ~(low | high), low, high


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
            ``"sequence-mean-token-sum"``, the sequences' mean of their sum (LUSPO), and ``"sequence-mean-token-sum-norm"``, of
            that over ``max_length`` (Dr. GRPO). The first two sum to 1.
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
    within = lengths.clamp(min=1) if aggregation == "sequence-mean-token-mean" else max_length or 1
    return torch.where(mask, mask.to(dtype) / within / denominator, 0)


def batch_denominator(mask: Tensor, aggregation: str, row_group: Any = None) -> Tensor:  # [B, S] bool -> []
    """Count the tokens of a whole batch that count, or its sequences that have one: for :func:`token_weights` of its parts. Of a
    batch whose sequences lie on the ranks of a ``row_group``, this rank has those of ``mask``, and all of them call this."""
    return Rows(row_group, mask).sum(mask.sum() if aggregation == "token-mean" else mask.any(1).sum())


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
    row_group: Any = None,
) -> PolicyMetrics:
    """Return the metrics of a step, for its log. Nothing here waits for the device. With a ``row_group`` they are of the tokens of
    all its ranks, which all call this."""
    rows = terms.active if mask is None else terms.active & mask

    def total(x: Tensor | None) -> Tensor:
        return logprobs.new_full((), math.nan) if x is None else torch.where(rows, x, 0).sum(dtype=logprobs.dtype)

    def extreme(sign: int) -> Tensor:
        values = torch.where(rows, sign * terms.ratio, -math.inf)
        return F.pad(values.flatten(), (0, 1), value=-math.inf).amax()

    count, extremes = rows.sum(), torch.stack([extreme(-1), extreme(1)])
    totals = torch.stack(
        [
            total(terms.ratio),
            total(terms.clipped_low),
            total(terms.clipped_high),
            total(torch.zeros_like(logprobs) if old_logprobs is None else _kl("k3", logprobs - old_logprobs)[0]),
            total(terms.kl),
            total(entropy),
            total(None if sampler_logprobs is None else (logprobs - sampler_logprobs).abs()),
        ]
    )
    if row_group is not None:
        parts = Rows(row_group, logprobs).gathered(torch.cat([count.view(1), totals, extremes]))  # [ranks, 10]
        count = parts[:, 0].sum().to(count.dtype)
        totals, extremes = parts[:, 1:8].sum(0).to(totals.dtype), parts[:, 8:].amax(0).to(extremes.dtype)
    ratio, low, high, kl_old, kl_reference, mean_entropy, gap = (totals / count.clamp(min=1)).unbind()
    return PolicyMetrics(
        ratio_mean=torch.where(count > 0, ratio, 1.0),
        ratio_min=torch.where(count > 0, -extremes[0], 1.0),
        ratio_max=torch.where(count > 0, extremes[1], 1.0),
        clipped_low=low,
        clipped_high=high,
        kl_old=kl_old,
        kl_reference=kl_reference,
        entropy=mean_entropy,
        sampler_gap=gap,
        active_rows=count,
    )


def simpo_loss(
    chosen_logprobs: Tensor,  # [P, S]
    rejected_logprobs: Tensor,  # [P, T]
    chosen_mask: Tensor,  # [P, S] bool
    rejected_mask: Tensor,  # [P, T] bool
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return SimPO's loss of each pair of sequences and its margin, ``[P]`` each (arXiv 2405.14734, equation 6).

    ``loss = −(1 − ε) ln σ(m) − ε ln σ(−m)`` with the margin ``m = β (mean chosen lp − mean rejected lp) − γ``, means over the
    tokens of a sequence that count, and ε the ``label_smoothing`` (TRL's, 0 in the paper). There is no reference policy and
    no advantage. The loss has a gradient for both log-probs, that of a chosen token being ``−β (σ(−m) − ε) / (its sequence's
    length)``; the margin is detached.

    Args:
        chosen_logprobs: per-token log-probs of the preferred sequences, as :func:`bupo_kernels.linear_logprobs` gives them; those
            that do not count may hold anything.
        rejected_logprobs: the same of the others, in the order of the pairs.
        chosen_mask, rejected_mask: True = the token counts. A sequence without one has the mean 0.
        beta: scale of the means' difference, positive.
        gamma: the margin to be exceeded, the paper's γ and TRL's ``simpo_gamma``; 0 and above.
        label_smoothing: the share of pairs taken for wrongly labelled, from 0 to below 0.5.

    Raises ``ValueError`` naming the argument. The loss is in the dtype of the log-probs.
    """
    for name, value, holds, accepted in (
        ("beta", beta, beta > 0, "numbers above 0"),
        ("gamma", gamma, gamma >= 0, "0 and above"),
        ("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "0 to below 0.5"),
        ("rejected_logprobs", len(rejected_logprobs), len(rejected_logprobs) == len(chosen_logprobs), "as many as chosen"),
        ("chosen_mask", tuple(chosen_mask.shape), chosen_mask.shape == chosen_logprobs.shape, "chosen_logprobs' shape"),
        ("rejected_mask", tuple(rejected_mask.shape), rejected_mask.shape == rejected_logprobs.shape, "rejected_logprobs' shape"),
    ):
        if not holds:
            raise ValueError(f"{name}: {value!r} given, accepted are {accepted}")
    means = [
        torch.where(mask, logprobs, 0).sum(-1) / mask.sum(-1).clamp(min=1)
        for logprobs, mask in ((chosen_logprobs, chosen_mask), (rejected_logprobs, rejected_mask))
    ]
    margin = beta * (means[0] - means[1]) - gamma
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, margin.detach()
