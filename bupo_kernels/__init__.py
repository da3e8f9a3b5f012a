"""Policies from hidden states: log-prob, entropy and logsumexp of ``softmax(h Wᵀ)`` without ``[tokens, vocab]`` logits."""

from bupo_kernels.dispatch import Plan
from bupo_kernels.functional import LinearLogprobs, explain, linear_cross_entropy, linear_logprobs
from bupo_kernels.internal_policy import internal_policy, policy_logprobs
from bupo_kernels.modules import FusedLMHead

__all__ = [
    "FusedLMHead",
    "LinearLogprobs",
    "Plan",
    "explain",
    "internal_policy",
    "linear_cross_entropy",
    "linear_logprobs",
    "policy_logprobs",
]
