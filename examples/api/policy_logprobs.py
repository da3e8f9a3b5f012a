"""Log-probs under the policy of a layer, of its attention, and under the model's own."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo_kernels import policy_logprobs

model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=6))
ids = torch.randint(0, 1000, (2, 17))
inputs, targets = ids[:, :-1], ids[:, 1:]

layer = policy_logprobs(model, inputs, targets, layer=4)  # runs layers 1 to 4
attention = policy_logprobs(model, inputs, targets, layer=4, module="attention")
final = policy_logprobs(model, inputs, targets)

for name, policy in {"layer 4": layer, "its attention": attention, "the model": final}.items():
    print(f"{name}: log-prob {policy.logprobs.mean().item():.2f}, entropy {policy.entropy.mean().item():.2f} nats")
