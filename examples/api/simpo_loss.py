"""SimPO: a preferred sequence and another one, compared by the mean log-prob of their tokens, without a reference policy."""

import torch

from bupo_kernels import linear_logprobs, simpo_loss

hidden = torch.randn(2, 3, 8, 64, requires_grad=True)  # [preferred or not, pairs, S, D]
weight = torch.randn(1000, 64, requires_grad=True)  # [V, D]
targets = torch.randint(0, 1000, (2, 3, 8))
mask = torch.arange(8) < torch.tensor([[[8], [5], [3]], [[2], [7], [8]]])  # the tokens of each sequence

chosen, rejected = linear_logprobs(hidden, weight, targets, mask=mask, return_entropy=False).logprobs
loss, margin = simpo_loss(chosen, rejected, *mask, beta=2.0, gamma=1.0)
loss.mean().backward()

print(f"loss {loss.mean().item():.3f}, the preferred one wins in {(margin > 0).sum()} of {len(margin)} pairs")
