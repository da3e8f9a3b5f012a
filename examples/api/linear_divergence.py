"""How far the policy of one hidden state is from that of another, token by token."""

import torch

from bupo_kernels import linear_divergence

final = torch.randn(2, 8, 64)  # [B, S, D]
internal = final + 0.1 * torch.randn_like(final)
weight = torch.randn(1000, 64)  # [V, D]

divergence = linear_divergence(internal, final, weight)  # KL(internal ‖ final), [B, S], nats

p, q = (internal @ weight.T).log_softmax(-1), (final @ weight.T).log_softmax(-1)
torch.testing.assert_close(divergence, (p.exp() * (p - q)).sum(-1), atol=1e-3, rtol=0)
