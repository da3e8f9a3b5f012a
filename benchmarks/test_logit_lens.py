"""logit_lens against the bare products of the same run: ``make bench``.

Each group has the floor (the library's own products, one layer after the other), the naive lens (log-softmax of the logits of one
layer at a time), and this library: the statistics that every backend gives, then those that compare policies.
"""

import pytest
import torch

from bupo_kernels import logit_lens

SHAPES = [(8, 128, 32000, 1024), (37, 32, 151936, 1024)]  # layers, tokens, vocabulary, width
DTYPES = [torch.float32, torch.bfloat16]


def gemms(states, weight, targets):
    return [state @ weight.T for state in states]


def naive(states, weight, targets):
    """Entropy, log-prob, rank and KL to the last layer."""
    final, found = (states[-1] @ weight.T).float().log_softmax(-1), []
    for state in states:
        log_p = (state @ weight.T).float().log_softmax(-1)
        chosen = log_p.gather(1, targets[:, None])
        entropy = -(log_p.exp() * log_p).sum(-1)
        found.append((entropy, chosen, (log_p > chosen).sum(-1), (log_p.exp() * (log_p - final)).sum(-1)))
    return found


def entropy(states, weight, targets):
    return logit_lens(states, weight, targets, outputs=("entropy", "logprobs", "max_probability"))


def divergence(states, weight, targets):
    return logit_lens(states, weight, targets, final=states[-1], outputs=("entropy", "logprobs", "kl_to_final", "kl_from_final"))


def pairwise(states, weight, targets):
    return logit_lens(states, weight, targets, outputs=("entropy", "pairwise_kl"))


def report(states, weight, targets):
    """What a cell of the report needs; the rank takes a second pass."""
    return logit_lens(states, weight, targets, final=states[-1], top_k=10, outputs=("entropy", "logprobs", "rank", "kl_to_final"))


@pytest.mark.parametrize("contender", [gemms, naive, entropy, divergence, pairwise, report], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lens(benchmark, shape, dtype, contender):
    layers, tokens, vocab, width = shape
    states = torch.randn(layers, tokens, width).to(dtype)
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, (tokens,))
    benchmark.group = f"{shape} {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(contender, (states, weight, targets), warmup_rounds=1, rounds=3)
