"""Policies from hidden states: log-prob, entropy and logsumexp of ``softmax(h Wᵀ)`` without ``[tokens, vocab]`` logits."""

from bupo_kernels.backends import forks as _forks  # noqa: F401 (for what it registers)
from bupo_kernels.dispatch import Plan
from bupo_kernels.functional import (
    LinearDivergence,
    LinearLogprobs,
    explain,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
)
from bupo_kernels.internal_policy import internal_policy, policy_divergence, policy_lens, policy_logprobs, policy_loss
from bupo_kernels.lens import LensStatistics, logit_lens
from bupo_kernels.modules import FusedLMHead
from bupo_kernels.policy_losses import PolicyMetrics, PolicyObjective, simpo_loss
from bupo_kernels.self_distillation import SelfDistillation, self_distillation_loss

__all__ = [
    "FusedLMHead",
    "LensStatistics",
    "LinearDivergence",
    "LinearLogprobs",
    "Plan",
    "PolicyMetrics",
    "PolicyObjective",
    "SelfDistillation",
    "explain",
    "internal_policy",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "linear_policy_loss",
    "logit_lens",
    "policy_divergence",
    "policy_lens",
    "policy_logprobs",
    "policy_loss",
    "self_distillation_loss",
    "simpo_loss",
]
