"""A head that answers with logits, with the statistics of targets, or with a loss."""

import torch

from bupo_kernels import FusedLMHead

head = FusedLMHead(64, 1000, bias=False)  # or FusedLMHead.adopt(model.lm_head), which keeps its parameter
hidden, targets, advantages = torch.randn(2, 8, 64), torch.randint(0, 1000, (2, 8)), torch.randn(2, 1)

logits = head(hidden)  # [B, S, V], as nn.Linear
policy = head(hidden, targets, temperature=0.7)  # linear_logprobs
loss, metrics = head(hidden, targets, advantages)  # linear_policy_loss
loss.backward()  # reaches head.weight

torch.testing.assert_close(policy.entropy, torch.distributions.Categorical(logits=logits / 0.7).entropy(), atol=1e-4, rtol=0)
