"""A step of BuPO: the policy of layer 4 is optimised, and what lies above it stays as it is."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo_kernels import policy_loss

model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(0, 1000, (2, 17))
targets = ids[:, 1:].clone()
targets[:, :5] = -100  # the prompt

loss, metrics = policy_loss(model, ids[:, :-1], targets, torch.tensor([[1.0], [-1.0]]), layer=4)
loss.backward()
optimizer.step()

print(f"{metrics.active_rows} tokens of entropy {metrics.entropy:.2f} nats")
assert model.model.layers[5].mlp.up_proj.weight.grad is None
