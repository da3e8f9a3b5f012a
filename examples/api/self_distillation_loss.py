"""A step of OISD: GRPO on the model's own policy, from which layer 2 learns what was done well, and unlearns the rest."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo_kernels import self_distillation_loss

model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(0, 1000, (2, 17))
targets = ids[:, 1:].clone()
targets[:, :5] = -100  # the prompt

step = self_distillation_loss(model, ids[:, :-1], targets, torch.tensor([[1.0], [-1.0]]), layer=2)
step.loss.backward()
optimizer.step()

counts = targets != -100
print(f"loss {step.loss.item():+.4f}; layer 2 is {step.divergence[counts].mean():.4f} nats from the model's own policy")
