"""Reinforcement learning in a loop of your own, on this library's head: ``python examples/plain_loop.py``, a minute on a CPU.

A small random Qwen3 learns to say even tokens: ten steps on the policy of layer 2 (BuPO, arXiv 2512.19673), then on its own.
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo_kernels import PolicyObjective, internal_policy
from bupo_kernels.integrations.transformers import apply_fused_head

PROMPTS, GROUP, PROMPT, RESPONSE, VOCAB, LAYERS = 8, 8, 4, 16, 64, 4


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3Config(vocab_size=VOCAB, num_hidden_layers=LAYERS, eos_token_id=None, bos_token_id=None, **size)
    model = apply_fused_head(Qwen3ForCausalLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": RESPONSE, "pad_token_id": 0}
    means = []
    for step in range(1, steps + 1):
        prompts = torch.randint(0, VOCAB, (PROMPTS, PROMPT)).repeat_interleave(GROUP, 0)
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)  # [PROMPTS · GROUP, PROMPT + RESPONSE]
        rewards = (ids[:, PROMPT:] % 2 == 0).float().mean(1).view(PROMPTS, GROUP)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)

        mask = torch.arange(ids.shape[1] - 1).expand(len(ids), -1) >= PROMPT - 1  # where a response token follows
        with internal_policy(model, layer=2 if step <= 10 else LAYERS):
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
            # On-policy, so that the old log-probs are the new ones; with more updates a rollout give old_logprobs=.
            loss, _ = model.lm_head(hidden, ids[:, 1:], advantages.view(-1, 1), mask=mask, objective=PolicyObjective())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(rewards.mean().item())
        print(f"step {step:2}  {'layer 2' if step <= 10 else 'final  '}  reward {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    main()
