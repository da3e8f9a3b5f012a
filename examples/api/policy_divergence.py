"""How far the policies of the layers are from the model's own: the KL that may end the first phase of BuPO."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo_kernels import policy_divergence

model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6))
ids = torch.randint(0, 1000, (2, 16))
mask = torch.arange(16).expand(2, -1) >= 4  # where it is looked at

for layer in (2, 4, 6):
    divergence = policy_divergence(model, ids, mask, layer=layer).divergence.detach()  # KL(π^l ‖ π), [B, S], nats
    print(f"layer {layer}: {divergence[mask].mean():.4f} nats")
assert divergence.abs().max() < 1e-5  # layer 6 is the last one: the model's own policy
