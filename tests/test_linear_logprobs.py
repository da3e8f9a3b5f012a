"""linear_logprobs and linear_cross_entropy against the float64 oracle: values, gradients, options, exact savings."""

import pytest
import torch
import torch.nn.functional as F
from problems import (
    CONTRACT,
    OPTIONS,
    assert_same_gradients,
    case_with,
    contract,
    first_of,
    gradients,
    largest_logit,
    products,
    random_case,
)

from bupo_kernels import explain, linear_cross_entropy, linear_logprobs, reference

# A budget of a few KiB cuts even these small problems into many tiles, ragged ones included.
SMALL_BUDGET = 24 * 1024


@pytest.mark.parametrize("options", first_of([OPTIONS["everything"], *OPTIONS.values()]), ids=str)
def test_gradcheck_of_all_three_statistics(options):
    case = case_with(options)
    leaves = [case.hidden, case.weight] + ([case.options["bias"]] if "bias" in case.options else [])

    def statistics(hidden, weight, bias=None):
        extra = {**case.options, "bias": bias} if bias is not None else case.options
        return tuple(linear_logprobs(hidden, weight, case.targets, memory_budget=SMALL_BUDGET, **extra))

    assert torch.autograd.gradcheck(statistics, leaves)


# ---- masks and exact savings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", ["first", "last", "scattered", "one"])
def test_gradients_of_dropped_rows_land_where_they_belong(kept, dtype):
    rows = {"first": slice(0, 40), "last": slice(50, 90), "scattered": slice(1, 90, 3), "one": slice(47, 48)}[kept]
    case = random_case(90, 33, 8, dtype=dtype)
    upstream = torch.zeros(90)
    upstream[rows] = torch.randn(len(upstream[rows]))
    grid = {"hidden": case.hidden.view(3, 5, 6, 8), "targets": case.targets.view(3, 5, 6)}
    out = linear_logprobs(weight=case.weight, memory_budget=20 * 1024, **grid)  # blocks of a few rows
    (got,) = gradients((out.logprobs.flatten() * upstream).sum(), case.hidden)
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets)[0]
    (want,) = gradients((exact * upstream).sum(), case.hidden)
    assert_same_gradients([got], [want], case)
    idle = upstream == 0
    assert (got[idle] == 0).all()


def flops(made) -> int:
    return sum(2 * m * k * n for m, k, n in made)


def test_masked_rows_cost_no_product():
    case = random_case(40, 64, 16)
    mask = torch.arange(40) % 4 == 0
    made = products(lambda: linear_logprobs(case.hidden, case.weight, case.targets, mask=mask))
    assert flops(made) == 2 * 10 * 64 * 16 == explain(case.hidden, case.weight, case.targets, mask=mask).flops_forward


def test_rows_whose_upstream_gradient_is_zero_cost_no_product():
    case = random_case(40, 64, 16)
    upstream = (torch.arange(40) % 4 == 0).float()
    out = linear_logprobs(case.hidden, case.weight, case.targets, backend="torch")
    made = products(lambda: gradients((out.logprobs * upstream).sum(), case.hidden, case.weight))
    assert flops(made) == 3 * 2 * 10 * 64 * 16
    full = gradients((out.logprobs * upstream).sum(), case.hidden, case.weight)
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets)[0]
    assert_same_gradients(full, gradients((exact * upstream).sum(), case.hidden, case.weight), case)
    assert (full[0][1::4] == 0).all()


# ---- cross entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs_own(reduction):
    case = random_case(30, 80, 16)
    targets = case.targets.clone()
    targets[::7] = -100
    ours = linear_cross_entropy(case.hidden, case.weight, targets, reduction=reduction)
    theirs = F.cross_entropy(case.hidden.double() @ case.weight.double().T, targets, reduction=reduction)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= CONTRACT * (1 + largest_logit(case)) * (30 if reduction == "sum" else 1)
    for a, b in zip(
        gradients(ours.sum(), case.hidden, case.weight), gradients(theirs.sum(), case.hidden, case.weight), strict=True
    ):
        assert (a - b).norm() <= 8 * CONTRACT * (1 + largest_logit(case)) * b.norm()


def test_cross_entropy_counts_only_unmasked_rows_in_its_mean():
    case = random_case(30, 80, 16)
    mask = torch.arange(30) < 6
    ours = linear_cross_entropy(case.hidden, case.weight, case.targets, mask=mask)
    theirs = F.cross_entropy(case.hidden[:6] @ case.weight.T, case.targets[:6])
    assert abs(ours - theirs) <= 2 * contract(largest_logit(case))
