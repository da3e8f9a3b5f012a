"""The logit lens of a whole model in one forward."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo_kernels import policy_lens

model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6))
ids = torch.randint(0, 1000, (2, 17))

seen = policy_lens(model, ids[:, :-1], ids[:, 1:], outputs=("entropy", "rank", "kl_to_final"))

names = ["embedding", *(f"layer {layer}" for layer in range(1, 7)), "the model"]
for name, entropy, rank, divergence in zip(names, seen.entropy, seen.rank, seen.kl_to_final, strict=True):
    print(f"{name:9}  entropy {entropy.mean():.2f}  rank {rank.float().mean():5.1f}  KL to the model {divergence.mean():.3f}")
