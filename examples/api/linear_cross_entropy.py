"""The cross entropy of fine-tuning, in which the prompt's labels are -100."""

import torch
import torch.nn.functional as F

from bupo_kernels import linear_cross_entropy

hidden = torch.randn(2, 8, 64, requires_grad=True)  # [B, S, D]
weight = torch.randn(1000, 64, requires_grad=True)  # [V, D]
labels = torch.randint(0, 1000, (2, 8))
labels[:, :3] = -100

loss = linear_cross_entropy(hidden, weight, labels)
loss.backward()

torch.testing.assert_close(loss, F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten()), atol=1e-4, rtol=0)
