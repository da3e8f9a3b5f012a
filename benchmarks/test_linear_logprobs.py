"""linear_logprobs with entropy against the bare GEMM of the same run: ``make bench``.

Each group has the floor (the library's own products, fp32 for fp32 and bf16 for bf16), the naive logits, and this library. Read
the multiple in brackets behind the median. Inputs are fresh for every benchmark; memory is tested in tests/test_plan.py.
"""

import pytest
import torch

from bupo_kernels import PolicyObjective, linear_logprobs, linear_policy_loss

SHAPES = [(512, 32000, 1024), (512, 151936, 1024), (2048, 32000, 2048)]  # rows, vocabulary, width
DTYPES = [torch.float32, torch.bfloat16]


def gemms(hidden, weight, targets, backward):
    product = hidden @ weight.T
    if backward:
        return product @ weight, product.T @ hidden
    return product


def naive(hidden, weight, targets, backward):
    logits = (hidden @ weight.T).float()
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    loss = logprobs.gather(1, targets[:, None]).sum() + entropy.sum()
    return torch.autograd.grad(loss, (hidden, weight)) if backward else loss


def bupo(hidden, weight, targets, backward):
    out = linear_logprobs(hidden, weight, targets)
    loss = out.logprobs.sum() + out.entropy.sum()
    return torch.autograd.grad(loss, (hidden, weight)) if backward else loss


def bupo_one_pass(hidden, weight, targets, backward):
    """A policy loss with an entropy bonus: every row has a gradient of both statistics."""
    objective = PolicyObjective(entropy_coefficient=0.01)
    loss, _ = linear_policy_loss(hidden, weight, targets, torch.ones(len(targets)), objective=objective)
    return torch.autograd.grad(loss, (hidden, weight)) if backward else loss


@pytest.mark.parametrize("contender", [gemms, naive, bupo, bupo_one_pass], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head(benchmark, shape, dtype, backward, contender):
    rows, vocab, width = shape
    grad = backward and contender is not gemms
    hidden = torch.randn(rows, width).to(dtype).requires_grad_(grad)
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_(grad)
    targets = torch.randint(0, vocab, (rows,))
    benchmark.group = f"{shape} {str(dtype).removeprefix('torch.')} {'forward+backward' if backward else 'forward'}"
    benchmark.pedantic(contender, (hidden, weight, targets, backward), warmup_rounds=1, rounds=5)
