"""A model that is its own internal policy for a while: it runs its first layers only."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo_kernels import internal_policy

model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6))
ids = torch.randint(0, 1000, (2, 16))

with internal_policy(model, layer=4):  # layers count from 1
    logits = model(ids).logits
logits.sum().backward()

states = model(ids, output_hidden_states=True).hidden_states  # of the embedding, then of each layer
torch.testing.assert_close(logits, states[4] @ model.lm_head.weight.T, atol=1e-4, rtol=0)
assert model.model.layers[3].mlp.up_proj.weight.grad is not None
assert model.model.layers[4].mlp.up_proj.weight.grad is None
