"""Per-token RL objectives as pure functions of log-probs and advantages.

Aggregation is a weight per token, so that a loss is always ``Σ weight · token_loss`` and its denominator may span
micro-batches and ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# |ln ratio| is clamped before exp: e^20 is far outside any clip range and far inside fp32's.
MAX_LOG_RATIO = 20.0


class TokenLoss(NamedTuple):
    loss: Tensor  # [...], differentiable in logprobs
    clipped: Tensor  # [...] bool, True where a clip decides, so that the gradient is zero
    ratio: Tensor  # [...], detached


def clipped_policy_loss(
    logprobs: Tensor,  # [...]
    old_logprobs: Tensor,  # [...]
    advantages: Tensor,  # [...] or broadcastable to it
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """``−min(r A, clip(r, 1 − clip_low, 1 + clip_high) A)`` per token, with ``r = e^(logprob − old_logprob)``.

    PPO and GRPO; with the log-probs of an internal layer policy the paper's InterGRPO / IPA (arXiv 2512.19673, equations 3, 9).

    Args:
        dual_clip: with ``c > 1`` the loss of a token with negative advantage is at most ``−c A`` (dual-clip PPO, arXiv 1912.09729).

    Numerics: ``logprob − old_logprob`` is clamped to ±20; outside, the gradient is zero. ``old_logprobs`` and ``advantages`` are
    constants. Gradient: ``−A r`` where no clip decides, else 0.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low: {clip_low} given, accepted are 0 to 1")
    if clip_high < 0:
        raise ValueError(f"clip_high: {clip_high} given, accepted are 0 and above")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip: {dual_clip} given, accepted are None and numbers above 1")
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        exceeds = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(exceeds, ceiling, loss), clipped | exceeds
    return TokenLoss(loss, clipped, ratio.detach())


def token_weights(mask: Tensor, aggregation: str) -> Tensor:  # [B, S] bool -> [B, S]
    """Weights that turn per-token losses of a whole (mini-)batch into its loss ``Σ weight · loss``; they sum to 1.

    Args:
        mask: ``[B, S]``, True on the tokens that count, one sequence a row.
        aggregation: ``"token-mean"``, every token alike (DAPO, and the reference code of BuPO), or ``"sequence-mean"``, every
            sequence alike and every token alike within it (GRPO, equations 3 and 9 of the paper).

    A batch to be run in parts is weighted *before* it is cut. Empty sequences count for nothing.
    """
    lengths = mask.sum(1, keepdim=True)
    if aggregation == "token-mean":
        denominator = lengths.sum()
    elif aggregation == "sequence-mean":
        denominator = lengths * (lengths > 0).sum()
    else:
        raise ValueError(f"aggregation: {aggregation!r} given, accepted are 'token-mean', 'sequence-mean'")
    return mask / denominator.clamp(min=1)
