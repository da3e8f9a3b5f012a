"""linear_logprobs and linear_cross_entropy against the float64 oracle: values, gradients, options, exact savings."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import CONTRACT, assert_same_gradients, dense_fp32_error, gradients, largest_logit, random_case

from bupo_kernels import explain, linear_cross_entropy, linear_logprobs, reference

FIELDS = ("logprobs", "entropy", "logsumexp")

# A budget of a few KiB cuts even these small problems into many tiles, ragged ones included.
SMALL_BUDGET = 24 * 1024

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "temperature per row": {"temperature": "rows"},
    "logit scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "everything": {"bias": True, "temperature": "rows", "logit_scale": 1.7, "softcap": 3.0, "mask": True},
}


def case_with(options: dict, rows=7, vocab=37, width=5, dtype=torch.float64, **kwargs):
    case = random_case(rows, vocab, width, dtype=dtype, **kwargs)
    options = dict(options)
    if options.get("bias"):
        options["bias"] = torch.randn(vocab, dtype=dtype).requires_grad_()
    if options.get("temperature") == "rows":
        options["temperature"] = torch.rand(rows, dtype=dtype) + 0.5
    if options.get("mask"):
        options["mask"] = torch.rand(rows) > 0.3
    case.options = options
    return case


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_all_three_statistics(options):
    case = case_with(options)
    leaves = [case.hidden, case.weight] + ([case.options["bias"]] if "bias" in case.options else [])

    def statistics(hidden, weight, bias=None):
        extra = {**case.options, "bias": bias} if bias is not None else case.options
        return tuple(linear_logprobs(hidden, weight, case.targets, memory_budget=SMALL_BUDGET, **extra))

    assert torch.autograd.gradcheck(statistics, leaves)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_match_the_oracle(options, dtype):
    case = case_with(options, rows=23, vocab=301, width=48, dtype=dtype, scale=3.0)
    ours = linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=96 * 1024, **case.options)
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets, **case.oracle_options)
    bound = CONTRACT * (1 + largest_logit(case))
    for name, value, truth in zip(FIELDS, ours, exact, strict=True):
        assert value.dtype == torch.float32
        # Entropy is Σ p (−log p): an error of the bound in each log p shifts it by at most twice that times (1 + H).
        assert (value - truth).abs().max() <= bound * (1 if name != "entropy" else 2 * (1 + math.log(301))), name

    upstream = [torch.randn(23) for _ in FIELDS]
    leaves = [case.hidden, case.weight] + ([case.options["bias"]] if "bias" in case.options else [])
    got = gradients(sum((g * x).sum() for g, x in zip(upstream, ours, strict=True)), *leaves)
    want = gradients(sum((g * x).sum() for g, x in zip(upstream, exact, strict=True)), *leaves)
    assert all(gradient.dtype == dtype for gradient in got)
    assert_same_gradients(got, want, case)


@given(
    rows=st.integers(0, 40),
    vocab=st.integers(1, 700),
    width=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3, 6e4]),
    budget=st.sampled_from([48 * 1024, 300 * 1024, None]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_scale_stays_within_the_contract(rows, vocab, width, scale, budget, seed):
    case = random_case(rows, vocab, width, scale=scale, seed=seed)
    ours = linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=budget)
    logprobs = reference.linear_logprobs(case.hidden, case.weight, case.targets)[0]
    if rows == 0:
        assert all(statistic.shape == (0,) for statistic in ours)
        return
    error = (ours.logprobs - logprobs).abs().max()
    assert error <= max(CONTRACT * (1 + largest_logit(case)), 2 * dense_fp32_error(case).max())
    assert (ours.logprobs <= 0).all()
    assert (ours.entropy >= 0).all()
    assert (ours.entropy <= torch.tensor(math.log(vocab))).all()
    assert torch.isfinite(torch.stack(ours)).all()


@pytest.mark.parametrize("offset", [6e4, -6e4, -150.0, 1e4])
def test_a_common_offset_of_all_logits_changes_nothing_but_logsumexp(offset):
    # Integers and a constant last coordinate: the products are exact in fp32, so nothing may be lost to the offset.
    hidden = torch.randint(-4, 5, (9, 6)).float()
    weight = torch.randint(-2, 3, (203, 6)).float()
    shifted = torch.cat([hidden, torch.ones(9, 1)], 1), torch.cat([weight, torch.full((203, 1), offset)], 1)
    targets = torch.randint(0, 203, (9,))
    plain = linear_logprobs(hidden, weight, targets)
    moved = linear_logprobs(*shifted, targets)
    assert torch.equal(plain.logprobs, moved.logprobs)
    assert torch.equal(plain.entropy, moved.entropy)
    assert (moved.logsumexp - plain.logsumexp - offset).abs().max() <= 2**-24 * 2 * abs(offset)


def test_logits_of_both_extremes_in_one_row():
    weight = torch.tensor([[6e4], [-6e4], [0.0], [5.9e4]], requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    ours = linear_logprobs(hidden, weight, torch.tensor([0, 0, 3]))
    assert ours.logprobs.tolist() == pytest.approx([0.0, -1.2e5, -math.log(4)], rel=1e-6)
    assert ours.entropy.tolist() == pytest.approx([0.0, 0.0, math.log(4)], rel=1e-6)
    d_hidden, d_weight = gradients(ours.logprobs.sum() + ours.entropy.sum(), hidden, weight)
    assert torch.isfinite(d_hidden).all()
    assert torch.isfinite(d_weight).all()


def test_uniform_rows_reach_the_largest_entropy_and_their_gradient_sums_to_zero():
    hidden, weight = torch.zeros(4, 8, requires_grad=True), torch.randn(5003, 8, requires_grad=True)
    ours = linear_logprobs(hidden, weight, torch.tensor([0, 1, 5001, 5002]))
    assert ours.entropy.tolist() == pytest.approx([math.log(5003)] * 4, rel=1e-6)
    ones = torch.cat([torch.randn(4, 7), torch.ones(4, 1)], 1)  # the last column of dW is the sum of dz over rows
    d_weight = gradients(linear_logprobs(ones, weight, torch.tensor([0, 1, 5001, 5002])).logprobs.sum(), weight)[0]
    assert abs(d_weight[:, -1].sum().item()) < 5e-6


def test_saturated_target_keeps_the_relative_accuracy_of_its_gradient():
    # 1 − p_y is 3e-4, which 16-bit probabilities could not resolve; fp32 sums leave it an error of 2^-24 / 3e-4.
    weight = torch.tensor([[8.0], [0.0]], requires_grad=True)
    (d_weight,) = gradients(linear_logprobs(torch.ones(1, 1), weight, torch.tensor([0])).logprobs.sum(), weight)
    rest = math.exp(-8) / (1 + math.exp(-8))
    assert d_weight.flatten().tolist() == pytest.approx([rest, -rest], rel=2**-24 / rest)


@pytest.mark.parametrize("used", FIELDS)
def test_each_statistic_alone_has_its_gradient(used):
    case = random_case(11, 97, 16)
    ours = getattr(linear_logprobs(case.hidden, case.weight, case.targets), used)
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets)[FIELDS.index(used)]
    assert_same_gradients(gradients(ours.sum(), case.hidden, case.weight), gradients(exact.sum(), case.hidden, case.weight), case)


def test_backward_twice_gives_the_same_gradients_and_leaves_saved_tensors_alone():
    case = random_case(13, 129, 24, softcap=5.0, temperature=0.9)
    before = case.hidden.detach().clone(), case.weight.detach().clone()
    loss = sum(x.sum() for x in linear_logprobs(case.hidden, case.weight, case.targets, **case.options))
    first, second = (gradients(loss, case.hidden, case.weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(case.hidden, before[0])
    assert torch.equal(case.weight, before[1])


def test_repeated_calls_agree_bit_for_bit():
    case = random_case(31, 999, 40)
    runs = []
    for _ in range(2):
        out = linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=64 * 1024)
        runs.append([*out, *gradients(out.logprobs.sum() + out.entropy.sum(), case.hidden, case.weight)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- masks and exact savings


def test_masked_rows_are_zero_and_have_no_gradient():
    case = random_case(10, 51, 8)
    targets = case.targets.clone()
    targets[0] = targets[9] = -100
    mask = torch.ones(10, dtype=torch.bool)
    mask[4] = False
    out = linear_logprobs(case.hidden, case.weight, targets, mask=mask)
    (d_hidden,) = gradients(sum(x.sum() for x in out), case.hidden)
    for row in (0, 4, 9):
        assert all(statistic[row] == 0 for statistic in out)
        assert (d_hidden[row] == 0).all()
    kept = [1, 2, 3, 5, 6, 7, 8]
    alone = linear_logprobs(case.hidden[kept], case.weight, targets[kept])
    # The same rows in a product of another height: fp32 sums may come in another order.
    assert (out.logprobs[kept] - alone.logprobs).abs().max() <= CONTRACT * (1 + largest_logit(case))


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


def test_a_temperature_changed_after_the_forward_is_noticed():
    case, temperature = random_case(5, 20, 4), torch.ones(5)
    out = linear_logprobs(case.hidden, case.weight, case.targets, temperature=temperature)
    temperature.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs.sum().backward()


def test_ignore_index_may_be_any_number_even_a_token():
    case = random_case(5, 20, 4)
    targets = torch.tensor([7, 1, 7, 2, 3])
    out = linear_logprobs(case.hidden, case.weight, targets, ignore_index=7)
    assert (out.logprobs == 0).tolist() == [True, False, True, False, False]
    assert (linear_logprobs(case.hidden, case.weight, targets).logprobs != 0).all()


def test_masked_rows_may_hold_anything():
    case = random_case(6, 33, 8)
    hidden = case.hidden.detach().clone()
    hidden[2] = float("nan")
    targets = case.targets.clone()
    targets[2] = -100
    out = linear_logprobs(hidden.requires_grad_(), case.weight, targets)
    grads = gradients(sum(x.sum() for x in out), hidden, case.weight)
    assert torch.isfinite(torch.stack(out)).all()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 0), (2, 3)], ids=str)
def test_no_row_at_all_gives_zeros_and_zero_gradients(shape):
    hidden, weight = torch.randn(*shape, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    targets = torch.full(shape, -100)
    out = linear_logprobs(hidden, weight, targets)
    d_hidden, d_weight = gradients(sum(x.sum() for x in out), hidden, weight)
    assert all((statistic == 0).all() and statistic.shape == shape for statistic in out)
    assert (d_hidden == 0).all()
    assert (d_weight == 0).all()
    assert linear_cross_entropy(hidden, weight, targets).item() == 0


def count_products(call) -> list[tuple[int, ...]]:
    """Shapes (m, k, n) of every matrix product in ``call``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as record:
        call()
    first = {"aten::mm": 0, "aten::addmm_": 1}  # which argument is the left operand
    found = [e.input_shapes[first[e.name] :][:2] for e in record.events() if e.name in first]
    return [(a[0], a[1], b[1]) for a, b in found]


def flops(products) -> int:
    return sum(2 * m * k * n for m, k, n in products)


def test_masked_rows_cost_no_product():
    case = random_case(40, 64, 16)
    mask = torch.arange(40) % 4 == 0
    products = count_products(lambda: linear_logprobs(case.hidden, case.weight, case.targets, mask=mask))
    assert flops(products) == 2 * 10 * 64 * 16 == explain(case.hidden, case.weight, case.targets, mask=mask).flops_forward


def test_rows_whose_upstream_gradient_is_zero_cost_no_product():
    case = random_case(40, 64, 16)
    upstream = (torch.arange(40) % 4 == 0).float()
    out = linear_logprobs(case.hidden, case.weight, case.targets)
    products = count_products(lambda: gradients((out.logprobs * upstream).sum(), case.hidden, case.weight))
    assert flops(products) == 3 * 2 * 10 * 64 * 16
    full = gradients((out.logprobs * upstream).sum(), case.hidden, case.weight)
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets)[0]
    assert_same_gradients(full, gradients((exact * upstream).sum(), case.hidden, case.weight), case)
    assert (full[0][1::4] == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_operands_cost_no_gradient_product(frozen):
    case = random_case(20, 64, 16)
    getattr(case, frozen).requires_grad_(False)
    leaf = case.weight if frozen == "hidden" else case.hidden
    out = linear_logprobs(case.hidden, case.weight, case.targets)
    products = count_products(lambda: gradients(out.logprobs.sum(), leaf))
    assert flops(products) == 2 * 2 * 20 * 64 * 16 == explain(case.hidden, case.weight, case.targets).flops_backward


def test_bias_alone_can_be_trained():
    case = random_case(20, 64, 16)
    bias = torch.randn(64, requires_grad=True)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    (got,) = gradients(linear_logprobs(hidden, weight, case.targets, bias=bias).logprobs.sum(), bias)
    (want,) = gradients(reference.linear_logprobs(hidden, weight, case.targets, bias=bias)[0].sum(), bias)
    case.options = {"bias": bias}
    assert_same_gradients([got], [want], case)


def test_no_grad_records_nothing():
    case = random_case(5, 20, 4)
    with torch.no_grad():
        out = linear_logprobs(case.hidden, case.weight, case.targets)
        plan = explain(case.hidden, case.weight, case.targets)
    assert not out.logprobs.requires_grad
    assert plan.flops_backward == 0


def test_entropy_can_be_left_out():
    case = random_case(5, 20, 4)
    out = linear_logprobs(case.hidden, case.weight, case.targets, return_entropy=False)
    assert out.entropy is None
    assert torch.equal(out.logprobs, linear_logprobs(case.hidden, case.weight, case.targets).logprobs)
    gradients(out.logprobs.sum(), case.hidden, case.weight)


# ---- views, dtypes, devices


def test_any_view_of_hidden_gives_the_result_of_its_copy():
    base = torch.randn(4, 12, 6, 2)
    weight, targets = torch.randn(50, 6, requires_grad=True), torch.randint(0, 50, (4, 12))
    views = {
        "shifted": lambda x: x[..., 0][:, :-1],
        "transposed": lambda x: x[..., 1].transpose(0, 1),
        "strided": lambda x: x[::2, ::3, :, 0],
        "expanded": lambda x: x[:1, ..., 0].expand(4, 12, 6),
        "three leading dimensions": lambda x: x[..., 0].unflatten(1, (3, 4)),
    }
    for name, view in views.items():
        leaf = base.clone().requires_grad_()
        copied = base.clone().requires_grad_()
        y = targets.flatten()[: view(base)[..., 0].numel()].view(view(base).shape[:-1])
        a, b = linear_logprobs(view(leaf), weight, y), linear_logprobs(view(copied).contiguous(), weight, y)
        assert torch.equal(a.logprobs, b.logprobs), name
        assert torch.equal(*(gradients(out.logprobs.sum(), x)[0] for out, x in ((a, leaf), (b, copied)))), name


def test_weight_may_be_a_view():
    case = random_case(6, 40, 8)
    wide = torch.randn(8, 90, requires_grad=True)
    a = linear_logprobs(case.hidden, wide.T[5:45], case.targets)
    b = linear_logprobs(case.hidden, wide.T[5:45].contiguous(), case.targets)
    assert (a.logprobs - b.logprobs).abs().max() <= CONTRACT * 20
    assert gradients(a.logprobs.sum(), wide)[0].shape == (8, 90)


def test_autocast_computes_what_the_cast_operands_give():
    case = random_case(12, 70, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprobs(case.hidden, case.weight, case.targets)
        grads = gradients(inside.logprobs.sum(), case.hidden, case.weight)
    cast = linear_logprobs(case.hidden.bfloat16(), case.weight.bfloat16(), case.targets)
    assert inside.logprobs.dtype == torch.float32
    assert torch.equal(inside.logprobs, cast.logprobs)
    assert torch.equal(inside.entropy, cast.entropy)
    assert all(g.dtype == torch.float32 for g in grads)
    for a, b in zip(grads, gradients(cast.logprobs.sum(), case.hidden, case.weight), strict=True):
        assert torch.equal(a, b)


def test_autocast_takes_mixed_operands():
    case = random_case(12, 70, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_logprobs(case.hidden.bfloat16(), case.weight, case.targets)
    assert torch.equal(mixed.logprobs, linear_logprobs(case.hidden.bfloat16(), case.weight.bfloat16(), case.targets).logprobs)


def test_sixteen_bit_inputs_lose_nothing_to_rounded_logits():
    case = random_case(64, 500, 64, scale=20.0, dtype=torch.bfloat16)
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets)[0]
    ours = linear_logprobs(case.hidden, case.weight, case.targets).logprobs
    rounded_logits = (case.hidden @ case.weight.T).float().log_softmax(-1).gather(1, case.targets[:, None]).squeeze(1)
    assert (ours - exact).abs().max() * 1000 < (rounded_logits - exact).abs().max()


def test_weight_gradient_error_does_not_grow_with_the_number_of_rows():
    errors = []
    for rows in (64, 4096):
        case = random_case(rows, 50, 32, dtype=torch.bfloat16)
        (got,) = gradients(
            linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=1024 * 1024).logprobs.sum(), case.weight
        )
        exact_weight = case.weight.detach().double().requires_grad_()
        exact = reference.linear_logprobs(case.hidden.detach(), exact_weight, case.targets)[0]
        (want,) = gradients(exact.sum(), exact_weight)
        errors.append(((got.double() - want).norm() / want.norm()).item())
    assert max(errors) <= torch.finfo(torch.bfloat16).eps / 2  # one rounding, whatever the number of tiles


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
    assert ours.item() == pytest.approx(F.cross_entropy(case.hidden[:6] @ case.weight.T, case.targets[:6]).item(), rel=1e-5)
