"""The log-prob and entropy of every response token, and a loss made of them, without logits."""

import torch

from bupo_kernels import linear_logprobs

hidden = torch.randn(2, 8, 64, requires_grad=True)  # [B, S, D], the last hidden states of a model
weight = torch.randn(1000, 64, requires_grad=True)  # [V, D], its lm_head.weight
targets = torch.randint(0, 1000, (2, 8))  # the token that follows each position
mask = torch.arange(8).expand(2, -1) >= 4  # the responses

policy = linear_logprobs(hidden, weight, targets, mask=mask, temperature=0.7)
loss = -(policy.logprobs + 0.01 * policy.entropy)[mask].mean()
loss.backward()

logprobs = (hidden @ weight.T / 0.7).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
torch.testing.assert_close(policy.logprobs, logprobs * mask, atol=1e-4, rtol=0)
