"""What each layer takes for the next token, how sure it is, and how far it is from the last one."""

import torch

from bupo_kernels import logit_lens

states = [torch.randn(2, 8, 64) for _ in range(6)]  # hidden states of six layers, [B, S, D] each
weight = torch.randn(1000, 64)  # [V, D]
targets = torch.randint(0, 1000, (2, 8))

seen = logit_lens(states, weight, targets, final=states[-1], outputs=("entropy", "rank", "kl_to_final"), top_k=5)

for layer, (entropy, divergence) in enumerate(zip(seen.entropy, seen.kl_to_final, strict=True), 1):
    print(f"layer {layer}: entropy {entropy.mean():.2f} nats, KL to the last layer {divergence.mean():.2f} nats")
print("layer 3, last token:", seen.top_ids[2, 0, -1].tolist())
