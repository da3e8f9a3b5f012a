"""The whole loss of a reinforcement-learning step in one pass, with the clip of DAPO."""

import torch

from bupo_kernels import PolicyObjective, linear_logprobs, linear_policy_loss

hidden = torch.randn(4, 8, 64, requires_grad=True)  # [B, S, D]
weight = torch.randn(1000, 64, requires_grad=True)  # [V, D]
targets = torch.randint(0, 1000, (4, 8))
mask = torch.arange(8).expand(4, -1) >= 4
advantages = torch.tensor([[1.0], [-1.0], [0.5], [0.0]])  # one a sequence; that of the last costs nothing
with torch.no_grad():
    old = linear_logprobs(hidden + 0.01 * torch.randn_like(hidden), weight, targets, mask=mask)

dapo = PolicyObjective(clip_low=0.2, clip_high=0.28)
loss, metrics = linear_policy_loss(hidden, weight, targets, advantages, old_logprobs=old.logprobs, mask=mask, objective=dapo)
loss.backward()

print(f"loss {loss.item():.3f}, ratio {metrics.ratio_mean:.3f}, clipped {metrics.clipped_low + metrics.clipped_high:.0%}")
