"""Distil a teacher into a student of another width, without the logits of either; and look at how far they are, token by token."""

import torch

from bupo_kernels import linear_divergence

teacher_hidden, teacher_weight = torch.randn(2, 8, 96), torch.randn(1000, 96) / 10  # [B, S, D'], [V, D']
hidden = torch.randn(2, 8, 64, requires_grad=True)  # [B, S, D]
weight = (torch.randn(1000, 64) / 8).requires_grad_()  # [V, D]

# A loss: the mean of KL(teacher ‖ student), its gradients taken in the same pass.
found = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, reduction="mean")
found.divergence.backward()
print(f"loss {found.divergence:.3f}, entropy of the student {found.entropy.mean():.2f} nats, dW {tuple(weight.grad.shape)}")

# Tokens weighed by an advantage, as a policy is drawn to its teacher on good ones, and away on bad ones (OISD, arXiv 2605.29089).
advantages = torch.tensor([[1.0], [-0.5]])  # [B, 1]
signed = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, kind="jsd", row_weights=advantages, reduction="mean")

# Values of rows, differentiable each.
values = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, kind="reverse_kl").divergence  # [B, S], nats
p, q = (hidden @ weight.T).log_softmax(-1), (teacher_hidden @ teacher_weight.T).log_softmax(-1)
torch.testing.assert_close(values, (p.exp() * (p - q)).sum(-1), atol=1e-4, rtol=0)
torch.testing.assert_close(found.per_row, (q.exp() * (q - p)).sum(-1), atol=1e-4, rtol=0)
assert signed.per_row.max() < 0.6932  # ln 2
