"""The C++ kernels of the CPU, each instruction set forced in turn: as a backend against the oracle, and one by one against what
csrc/cpu/kernels.h says of them. ``make sanitize`` runs this file, so shapes are small."""

import math
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lenses import OUTPUTS, assert_agrees, random_lens
from problems import (
    CONTRACT,
    OPTIONS,
    assert_same_gradients,
    assert_stored_gradients,
    assert_values,
    case_with,
    examples,
    gradients,
    leaves,
    random_case,
)
from torch import Tensor

from bupo.measurement import peak_bytes
from bupo_kernels import PolicyObjective, explain, linear_logprobs, linear_policy_loss, reference
from bupo_kernels.backends import compiled, cpu_panels, lens_loop, native_rows, tile_loop
from bupo_kernels.backends.compiled import MULTIPLY_BF16, address
from bupo_kernels.backends.native_lens import NativeLens

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bfloat16", FP16: "float16", FP32: "float32"}  # as C++ knows them
EPS = torch.finfo(FP32).eps  # 2 roundoffs; an ulp of x is between EPS/2 and EPS times |x|
FIELDS = ("logprobs", "entropy", "logsumexp")
THREADS = (1, 2, 3, 7)
SENTINEL = 7.0

# The least and the largest subnormal, the least that is not, 1, and the largest number.
FP16_EDGES = (0.0, 2.0**-24, 2.0**-14 - 2.0**-24, 2.0**-14, 1.0, 65504.0)

pytestmark = pytest.mark.skipif(compiled.built is None, reason="the C++ kernels were not built")
all_dtypes = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
both_16_bit = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


@pytest.fixture(params=compiled.ISAS, scope="module")
def isa(request):
    if request.param not in compiled.isas():
        pytest.skip(f"this CPU or this build has no {request.param}")
    return request.param


@pytest.fixture(params=[isa for isa in compiled.ISAS if isa not in MULTIPLY_BF16], scope="module")
def isa_of_fp32(request):
    """An instruction set whose panels are of fp32."""
    if request.param not in compiled.isas():
        pytest.skip(f"this CPU or this build has no {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def _no_fp16_in_panels_of_bf16(request):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("dtype") == FP16 and params.get("isa") in MULTIPLY_BF16 and "lens" not in request.node.name:
        pytest.skip(f"{params['isa']} multiplies bf16")


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tiles_of(rows, columns):
    """At most this many at a time, in both paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_panels, "MOST_ROWS", rows)
        patch.setattr(cpu_panels, "MOST_COLUMNS", columns)
        patch.setattr(tile_loop, "CPU_TILE", (rows, columns))
        yield


@contextmanager
def keeping(rows):
    """Products of at most so many rows, whole panels of them, are kept for the backward, in both paths."""
    with pytest.MonkeyPatch.context() as patch:
        for path in (native_rows, cpu_panels):
            patch.setattr(path, "kept_rows", lambda problem, *bytes_a_row: torch.sym_min(problem.rows, rows))
        yield


def run(case, isa, **options):
    return linear_logprobs(case.hidden, case.weight, case.targets, backend=f"native:{isa}", **{**case.options, **options})


def backward(out, upstream, case):
    return gradients(sum((g * x).sum() for g, x in zip(upstream, out, strict=True) if g is not None), *leaves(case))


def run_with_gradients(case, isa):
    out = run(case, isa)
    return [*out, *backward(out, [torch.linspace(-1, 1, len(case.targets))] * 3, case)]


def check(case, isa, upstream=None, **options):
    """Values and gradients, each within its bound."""
    out = run(case, isa, **options)
    assert_values(out, case)
    upstream = [torch.randn(len(case.targets)) for _ in out] if upstream is None else upstream
    got = backward(out, upstream, case)
    if len(case.targets) == 0:
        assert not any(gradient.any() for gradient in got)
    elif lowest_exponent(case) > -87:
        assert_stored_gradients(got, case, upstream, "native" if isa in MULTIPLY_BF16 else "torch")
    else:  # where e^x is taken for 0, which elementwise the error model does not allow for
        exact = reference.linear_logprobs(case.hidden, case.weight, case.targets, **case.oracle_options)
        assert_same_gradients(got, backward(exact, upstream, case), case)
    return out, got


def lowest_exponent(case):
    """The smallest of all z − max z."""
    options = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in case.oracle_options.items() if k not in ("mask", "ignore_index")
    }
    z = reference.logits(case.hidden.detach().double(), case.weight.detach().double(), **options)
    return (z.amin(1) - z.amax(1)).min()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- values and gradients

any_vocab = st.one_of(
    st.integers(1, 1500), st.builds(lambda panels, beside: 32 * panels + beside, st.integers(1, 46), st.integers(-1, 1))
)


@all_dtypes
@examples(30)
@given(
    rows=st.integers(0, 100),
    vocab=any_vocab,
    width=st.integers(1, 130),
    scale=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]),  # 1e-6: subnormals of fp16
    options=st.sampled_from([*OPTIONS.values(), {"ignore_index": 0}]),
    tile=st.sampled_from([(8192, 2048), (64, 2048), (8192, 96), (32, 64)]),
    kept=st.sampled_from([0, 32, 64, 1024]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_option_and_tile_matches_the_oracle(isa, dtype, rows, vocab, width, scale, options, tile, kept, seed):
    if "softcap" in options:  # where it saturates, a gradient of 0 has no relative accuracy for the error model to bound
        scale = min(scale, 1.0)
    with tiles_of(*tile), keeping(kept):
        check(case_with(options, rows, vocab, width, dtype=dtype, scale=scale, seed=seed), isa)


@all_dtypes
@given(rows=st.integers(1, 70), vocab=any_vocab, width=st.integers(1, 70), options=st.sampled_from(["softcap", "everything"]))
@examples(15)
def test_a_saturated_softcap_keeps_its_values(isa, dtype, rows, vocab, width, options):
    # Whole numbers, whose products are exact: what fp32 loses of a product of hundreds, a softcap of 3 makes large.
    case = case_with(OPTIONS[options], rows, vocab, width, dtype=dtype, scale=3.0)
    with torch.no_grad():
        for operand in (case.hidden, case.weight.mul_(width**0.5), case.options.get("bias", torch.empty(0))):
            operand.round_()
    assert_values(run(case, isa), case)


def split_columns(isa, width):
    """Columns whose statistics are folded together, from the workspace that they take."""
    k = compiled.kernels(isa)
    columns = 32
    while k.statistics_bytes(1, columns + 1, width, 1) == k.statistics_bytes(1, 1, width, 1):
        columns += 32
    return columns


@pytest.mark.parametrize("rows", [1, 200])
def test_splits_of_the_vocabulary(isa, rows):
    width = 700
    split = split_columns(isa, width)
    assert 512 <= split <= 1024
    for vocab in (split - 1, split, split + 1, 2 * split + 33, 5 * split - 31) if rows == 1 else (2 * split + 33,):
        case = random_case(rows, vocab, width, dtype=BF16, scale=3.0)
        assert_values(run(case, isa), case)
        case.targets = (torch.arange(rows) * split + vocab - 1) % vocab  # of the last split, and the others
        assert_values(run(case, isa), case)


@all_dtypes
@pytest.mark.parametrize(
    "used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=lambda used: "+".join(FIELDS[i] for i in used)
)
def test_each_statistic_has_its_gradient_alone_and_together(isa, dtype, used):
    case = random_case(11, 297, 17, scale=2.0, dtype=dtype)
    _, got = check(case, isa, [torch.randn(11) if i in used else None for i in range(3)])
    assert all(gradient.any() for gradient in got)


@all_dtypes
def test_several_slices_of_the_vocabulary(isa, dtype):
    case = case_with({"bias": True}, 40, 4150, 40, dtype=dtype, scale=2.0)
    case.targets[:3] = torch.tensor([2047, 2048, 4149])
    check(case, isa)


def test_several_blocks_of_rows_and_a_width_of_several_sets_of_panels(isa):
    # 288 rows and 900 columns: the panels of one operand fill more than a third of what is kept in cache: sets take turns.
    with tiles_of(288, 1024):
        check(case_with({"bias": True}, 310, 900, 1100, dtype=BF16), isa)


@all_dtypes
@pytest.mark.parametrize("kept", ["first", "last", "scattered", "one", "none"])
def test_dropped_rows_get_exactly_nothing_and_shift_no_other(isa, dtype, kept):
    rows = {"first": slice(0, 40), "last": slice(150, 190), "scattered": slice(1, 190, 3), "one": slice(47, 48), "none": slice(0)}
    case = case_with({"bias": True}, 190, 150, 20, dtype=dtype)
    case.targets[45:60:3] = -100
    weights = torch.zeros(190)
    weights[rows[kept]] = torch.rand(190)[rows[kept]] + 0.5
    with tiles_of(32, 64), keeping(96):
        _, got = check(case, isa, [weights, None, -weights])
    assert (got[0][weights == 0] == 0).all()
    assert all(gradient.any() == (kept != "none") for gradient in got)


@both_16_bit
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_what_is_kept_changes_no_bit(isa, dtype, entropy):
    case, found = case_with({"bias": True, "softcap": 20.0, "mask": True}, 75, 150, 20, dtype=dtype), []
    weights = torch.linspace(-1, 1, 75).masked_fill(torch.arange(75) % 5 == 0, 0)
    for kept in (0, 75):
        with keeping(kept):
            assert explain(case.hidden, case.weight, backend=f"native:{isa}").tile_plan.cached_rows == kept
            out = run(case, isa)
            policy = PolicyObjective(entropy_coefficient=entropy)
            loss, _ = linear_policy_loss(case.hidden, case.weight, case.targets, weights, objective=policy, backend=f"native:{isa}")
            found.append(
                [*out, *backward(out, [weights, entropy * weights, None], case), loss, *gradients(loss, *leaves(case)[:2])]
            )
    assert same(*found)


@all_dtypes
def test_a_backward_may_run_twice(isa, dtype):
    case = random_case(70, 150, 20, dtype=dtype)
    with keeping(32):
        loss = run(case, isa).logprobs.sum()
    twice = [torch.autograd.grad(loss, leaves(case)[:2], retain_graph=True) for _ in range(2)]
    assert same(*twice)


@all_dtypes
@pytest.mark.parametrize("mib", [1, 4, 16, 256])
def test_as_many_rows_are_kept_as_the_budget_holds(isa, dtype, mib):
    hidden, weight = torch.zeros(600, 64, dtype=dtype), torch.zeros(20_000, 64, dtype=dtype)
    if mib == 1 and dtype != FP32:
        return  # which holds no panel of W for each thread
    options = {"backend": f"native:{isa}", "memory_budget": mib * 2**20}
    assert explain(hidden, weight, **options).tile_plan.cached_rows == 0
    plan = explain(hidden, weight.requires_grad_(), **options)
    kept = plan.tile_plan.cached_rows
    assert plan.tile_plan.memory.working <= mib * 2**20
    assert kept == 600 if mib == 256 else kept % 32 == 0 and 4 * 20_000 * kept <= 0.75 * mib * 2**20
    assert kept >= {1: 0, 4: 0, 16: 128, 256: 600}[mib]
    assert plan.flops_backward == (1 + (600 - kept) / 600) * plan.flops_forward
    assert "logits of 600 rows kept" in str(plan) or mib < 256


@both_16_bit
def test_a_one_pass_loss_takes_chunks_of_rows_whose_products_are_all_kept(isa, dtype):
    case, objective = random_case(700, 4000, 40, dtype=dtype), PolicyObjective(ratio="none", clip=None)
    options = {"objective": objective, "backend": f"native:{isa}", "memory_budget": 8 * 2**20}
    plan = explain(case.hidden, case.weight, **options)
    assert plan.tile_plan.chunk_rows in range(256, 700, 32)
    assert plan.tile_plan.memory.working <= 8 * 2**20
    assert plan.flops_forward == 3 * 2 * 700 * 4000 * 40
    advantages = torch.randn(700)
    peak = peak_bytes(lambda: linear_policy_loss(case.hidden, case.weight, case.targets, advantages, **options))
    assert peak <= sum(plan.tile_plan.memory) + case.hidden.nbytes + case.weight.nbytes + 3 * 4 * 700
    loss, _ = linear_policy_loss(case.hidden, case.weight, case.targets, advantages, **options)
    stored = "native" if isa in MULTIPLY_BF16 else "torch"
    assert_stored_gradients(torch.autograd.grad(loss, leaves(case)), case, [-advantages / 700, None, None], stored)

    # Where the budget does not hold the sum of dW, all rows are one chunk, and some of the products are formed again.
    wide = explain(torch.zeros(700, 300, dtype=dtype), torch.zeros(9000, 300, dtype=dtype, requires_grad=True), **options)
    assert wide.tile_plan.chunk_rows == 700
    assert 3 * 2 * 700 * 9000 * 300 > wide.flops_forward > 2 * 2 * 700 * 9000 * 300


@all_dtypes
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden bias", "weight bias"])
def test_a_frozen_operand_changes_no_other_gradient(isa, dtype, trained):
    case = case_with({"bias": True}, 40, 300, 33, dtype=dtype)
    operands = {"hidden": case.hidden, "weight": case.weight, "bias": case.options["bias"]}
    upstream = [torch.randn(40) for _ in FIELDS]
    _, whole = check(case, isa, upstream)
    for name, operand in operands.items():
        operand.requires_grad_(name in trained)
    _, got = check(case, isa, upstream)
    assert same(got, [gradient for name, gradient in zip(operands, whole, strict=True) if name in trained])


WEIGHTS = {
    "rows of a wider matrix": lambda x: x[:150, 3:36],
    "every other row": lambda x: x[::2, :33],
    "one row again and again": lambda x: x[7:8, :33].expand(150, 33),
    "transposed": lambda x: x[:33, :150].T,
    "every other column": lambda x: x[:150, :66:2],
    "one column again and again": lambda x: x[:150, 5:6].expand(150, 33),
}


@all_dtypes
@pytest.mark.parametrize("view", WEIGHTS.values(), ids=WEIGHTS)
def test_any_view_of_the_weight(isa, dtype, view):
    case = random_case(40, 150, 33, dtype=dtype)
    case.weight = view(torch.randn(300, 151).to(dtype).requires_grad_())
    check(case, isa)


@all_dtypes
@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:, ::2].T, lambda x: x[:, :1].expand(33, 40).T], ids=["T", "2", "1"])
def test_any_view_of_the_hidden_vectors(isa, dtype, view):
    case = random_case(40, 150, 33, dtype=dtype)
    case.hidden = view(torch.randn(33, 80).to(dtype).requires_grad_())[:40]
    check(case, isa)


@all_dtypes
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_the_one_pass_loss_has_the_gradients_of_its_log_probs(isa, dtype, entropy):
    case = case_with({"bias": True, "temperature": "rows"}, 90, 301, 33, dtype=dtype, scale=2.0)
    advantages = torch.randn(90)
    if not entropy:
        advantages[10:50] = 0
    objective = PolicyObjective(entropy_coefficient=entropy)
    for budget in (None, 160 * 1024 if dtype == FP32 else 8 * 2**20):
        arguments = {"objective": objective, "backend": f"native:{isa}", "memory_budget": budget, **case.options}
        with threads(2), tiles_of(32 if budget and dtype != FP32 else 512, 2048):
            plan = explain(case.hidden, case.weight, case.targets, **arguments)
            assert (plan.tile_plan.chunk_rows < 90) == (dtype == FP32 and budget is not None)
            loss, _ = linear_policy_loss(case.hidden, case.weight, case.targets, advantages, **arguments)
        got = gradients(loss, *leaves(case))
        of_entropy = torch.full((90,), -entropy / 90) if entropy else None
        assert_stored_gradients(got, case, [-advantages / 90, of_entropy, None], "native" if isa in MULTIPLY_BF16 else "torch")
        assert (got[0][advantages == 0] == 0).all() or entropy


# ---- repeatability


@both_16_bit
def test_results_do_not_depend_on_the_number_of_threads(isa, dtype):
    case = case_with({"bias": True, "temperature": "rows"}, 70, 2300, 520, dtype=dtype)
    found = []
    for count in (*THREADS, 2):
        with threads(count):
            found.append(run_with_gradients(case, isa))
    assert all(same(found[0], other) for other in found[1:])


@both_16_bit
def test_a_row_does_not_depend_on_the_other_rows_nor_on_its_place(isa, dtype):
    case = case_with({"bias": True, "temperature": "rows"}, 140, 2100, 70, dtype=dtype)
    case.targets[::7] = -100
    upstream = torch.randn(140)

    def of(rows):
        hidden = case.hidden[rows]
        options = {**case.options, "temperature": case.options["temperature"][rows]}
        out = linear_logprobs(hidden, case.weight, case.targets[rows], backend=f"native:{isa}", **options)
        return [*out, *gradients(sum((upstream[rows] * x).sum() for x in out), hidden)]

    whole = of(torch.arange(140))
    assert whole[3].any()
    order = torch.randperm(140)
    for rows in (order, order[:1], order[:33], torch.arange(139, 140), torch.arange(60), torch.arange(5).repeat(9)):
        assert same(of(rows), [x[rows] for x in whole])
    with tiles_of(32, 2048):
        assert same(of(order), [x[order] for x in whole])


# ---- extremes


@all_dtypes
def test_a_target_far_below_the_largest_logit(isa, dtype):
    case = random_case(40, 100, 3, dtype=dtype)
    case.hidden = torch.tensor([[1.0, 0.0, 0.0]] * 40).to(dtype).requires_grad_()
    case.weight = torch.tensor([[-1e4, 0.0, 1.0]] * 99 + [[1e4, 1.0, 0.0]]).to(dtype).requires_grad_()
    most = case.weight[99, 0].item()
    case.targets = torch.tensor([0, 99] * 20)
    out = run(case, isa)
    assert torch.equal(out.logprobs, torch.tensor([-2 * most, 0.0] * 20))
    assert (out.entropy == 0).all()
    assert (out.logsumexp == most).all()
    d_hidden, d_weight = backward(out, [torch.ones(40), torch.ones(40), torch.zeros(40)], case)
    assert torch.equal(d_hidden, torch.tensor([[-2 * most, -1.0, 1.0], [0.0, 0.0, 0.0]] * 20).to(dtype))
    assert d_weight[[0, 50, 99], 0].tolist() == [20.0, 0.0, -20.0]


@all_dtypes
@pytest.mark.parametrize("vocab", [1, 31, 2111])
def test_equal_logits(isa, dtype, vocab):
    case = random_case(33, vocab, 5, scale=0.0, dtype=dtype)
    out = run(case, isa)
    assert (out.logprobs + math.log(vocab)).abs().max() <= CONTRACT
    assert (out.entropy - math.log(vocab)).abs().max() <= CONTRACT
    assert (out.logsumexp - math.log(vocab)).abs().max() <= CONTRACT
    case.weight = torch.ones(vocab, 5).to(dtype).requires_grad_()
    d_hidden, d_weight = backward(run(case, isa), [torch.zeros(33), torch.ones(33), None], case)
    assert (d_hidden == 0).all()  # of entropy
    assert (d_weight == 0).all()


@all_dtypes
@pytest.mark.parametrize("value", [torch.finfo(FP32).min, -3e38, -1e30, -1e4], ids=str)
def test_columns_that_a_bias_rules_out_are_as_if_they_were_not(isa, dtype, value):
    case = random_case(21, 70, 9, dtype=dtype)
    case.targets %= 40
    bias = torch.zeros(70)
    bias[40:], bias[::9] = value, value
    there = bias == 0
    case.targets = there.nonzero().flatten()[case.targets % there.sum()]
    out = run(case, isa, bias=bias)
    few = random_case(21, 70, 9, dtype=dtype)
    few.weight, few.targets = case.weight[there], there.cumsum(0)[case.targets] - 1
    assert_values(out, few)
    d_hidden, d_weight = backward(out, [torch.ones(21)] * 3, case)
    assert d_hidden.isfinite().all()
    assert d_weight.isfinite().all()
    assert (d_weight[~there] == 0).all()
    assert d_weight[there].any(1).all()


@pytest.mark.parametrize("huge", [1e30, 1e32, 1e38], ids=str)
@all_dtypes
def test_logits_next_to_the_largest_number(isa, dtype, huge):
    bias = torch.zeros(70)
    bias[33] = huge
    case = random_case(3, 70, 5, dtype=dtype)
    case.targets = torch.tensor([33, 0, 69])
    out = run(case, isa, bias=bias)
    assert torch.equal(out.logprobs, torch.tensor([0.0, -huge, -huge]))
    assert (out.entropy == 0).all()
    assert torch.equal(out.logsumexp, torch.full((3,), huge))


@all_dtypes
@pytest.mark.parametrize("offset", [60.0, 88.5, 89.0, 150.0, 1e4, 3e38])
def test_a_common_offset_overflows_nowhere(isa, dtype, offset):
    # Also not in what pads the rows to a whole panel, whose hidden vectors are 0, and whose logits are then the bias.
    case = random_case(5, 70, 9, dtype=dtype)
    case.options = {"bias": torch.full((70,), offset).requires_grad_()}
    got = backward(run(case, isa), [torch.ones(5)] * 3, case)
    assert all(gradient.isfinite().all() for gradient in got)
    if offset < 1e4:
        check(case, isa)


@all_dtypes
def test_a_row_of_nan_stays_alone(isa, dtype):
    case = random_case(40, 100, 33, dtype=dtype)
    upstream = torch.randn(40)

    def of(case):
        out = run(case, isa)
        return [*out, backward(out, [upstream] * 3, case)[0]]

    others = torch.arange(40) != 17
    whole = [x[others] for x in of(case)]
    with torch.no_grad():
        case.hidden[17] = torch.nan
    found = of(case)
    assert found[0][17].isnan()
    if dtype != FP32:  # else the products are a library's
        assert same([x[others] for x in found], whole)
    assert all(x[others].isfinite().all() for x in found)
    case.targets[17] = -100  # now masked: not read at all
    out, (_, d_weight) = run(case, isa), backward(run(case, isa), [upstream] * 3, case)
    assert all(x[17] == 0 for x in out)
    assert d_weight.isfinite().all()


@all_dtypes
@examples(30)
@given(
    scales=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 300.0]), min_size=1, max_size=6),
    rows=st.integers(1, 40),
    vocab=st.one_of(any_vocab, st.integers(2040, 4200)),
    width=st.integers(1, 40),
    options=st.sampled_from([name for name in OPTIONS if name != "softcap"]),
    outputs=st.lists(st.sampled_from(OUTPUTS), unique=True),
    top_k=st.integers(0, 12),
    budget=st.sampled_from([None, 2**21, 2**18]),
    seed=st.integers(0, 99),
)
def test_every_output_of_a_lens_matches_the_oracle(isa, dtype, scales, rows, vocab, width, options, outputs, top_k, budget, seed):
    lens = random_lens(scales, (rows,), vocab, width, dtype=dtype, options=OPTIONS[options], seed=seed)
    outputs, top_k = outputs or ["rank"], min(top_k, vocab)
    assert_agrees(lens.run(outputs, top_k, memory_budget=budget, backend=f"native:{isa}"), lens, outputs, top_k)


@given(rows=st.integers(1, 100), columns=st.integers(1, 100), width=st.integers(1, 70), margin=st.integers(0, 3))
@examples(20)
def test_products_are_written_where_they_belong_and_nowhere_else(isa, rows, columns, width, margin):
    # Whole numbers, whose products are exact.
    hidden, weight = (torch.randint(-9, 10, (n, width + margin)).to(BF16)[:, :width] for n in (rows, columns))
    lens, out = NativeLens(), torch.full((rows + 1, columns + margin), SENTINEL)
    operands = lens.pack_hidden(hidden, isa), lens.pack_weight(weight, isa)
    for count in THREADS[:2]:
        with threads(count):
            lens.multiply(out[:rows, :columns], *operands, width, isa)
        assert torch.equal(out[:rows, :columns], hidden.float() @ weight.float().T)
        assert (out[rows] == SENTINEL).all()
        assert (out[:, columns:] == SENTINEL).all()


def test_a_lens_of_rows_longer_than_a_segment(isa, monkeypatch):
    monkeypatch.setattr(lens_loop, "CPU_TILE", (64, 5003))
    lens = random_lens((0.1, 1.0, 30.0), (5,), 5003, 16)
    lens.targets[:4] = torch.tensor([0, 2047, 2048, 5002])
    assert_agrees(lens.run(top_k=20, backend=f"native:{isa}"), lens, top_k=20)
    outputs = [name for name in OUTPUTS if name != "pairwise_kl"]
    assert_agrees(lens.run(outputs, 3, backend=f"native:{isa}"), lens, outputs, 3)


def test_a_lens_does_not_depend_on_the_number_of_threads_nor_on_whether_logits_are_kept(isa):
    lens = random_lens((0.1, 1.0, 30.0), (40,), 3000, 16, options=OPTIONS["everything"])
    # Whole numbers, whose products are exact whatever the order in which the library adds.
    lens = replace(lens, **{name: (4 * getattr(lens, name)).round() for name in ("states", "weight", "final")})
    found = []
    for count, budget in [*((count, None) for count in THREADS), (2, 3 * 2**20)]:
        with threads(count):
            found.append(lens.run(top_k=7, memory_budget=budget, backend=f"native:{isa}"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@all_dtypes
@pytest.mark.parametrize("columns", [100, 5000])
def test_a_column_of_nan_is_in_every_row(isa, dtype, columns):
    case = random_case(9, columns, 16, dtype=dtype)
    with torch.no_grad():
        case.weight[11] = torch.nan
    assert all(x.isnan().all() for x in run(case, isa))


# ---- fp16


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 200),
    width=st.integers(1, 40),
    numbers=st.lists(st.sampled_from(FP16_EDGES), min_size=1, max_size=9),
    seed=st.integers(0, 2**16),
)
@examples(20)
def test_fp16_of_any_size_is_exact(isa_of_fp32, rows, vocab, width, numbers, seed):
    case = random_case(rows, vocab, width, dtype=FP16, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for operand in (case.hidden, case.weight):
            chosen = torch.randint(0, len(numbers), operand.shape, generator=generator)
            operand.copy_(torch.tensor(numbers, dtype=FP16)[chosen] * torch.randn(operand.shape, generator=generator).sign())
    assert_values(run(case, isa_of_fp32), case)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**18], ids=["subnormal", "too large"])
def test_gradients_beyond_fp16_are_infinite_and_those_below_it_subnormal(isa_of_fp32, factor):
    case, largest = random_case(40, 70, 9, dtype=FP16), torch.finfo(FP16).max
    upstream = [factor * torch.randn(40), None, None]
    if factor < 1:
        _, got = check(case, isa_of_fp32, upstream)
        assert all((gradient[gradient != 0].abs() < torch.finfo(FP16).smallest_normal).any() for gradient in got)
        return
    got = backward(run(case, isa_of_fp32), upstream, case)
    wide = random_case(40, 70, 9, dtype=FP16)
    wide.hidden, wide.weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    exact = backward(linear_logprobs(wide.hidden, wide.weight, wide.targets), upstream, wide)
    for gradient, want in zip(got, exact, strict=True):
        assert gradient.isinf().any()
        assert gradient[want.abs() < 0.999 * largest].isfinite().all()
        beyond = want.abs() > 1.001 * largest
        assert torch.equal(gradient[beyond], torch.inf * want[beyond].sign().half())


@pytest.mark.parametrize("flushed", [False, True], ids=["", "subnormals of fp32 flushed"])
def test_every_number_of_fp16_is_packed_as_it_is(isa_of_fp32, flushed):
    every = torch.arange(2**16, dtype=torch.int32).short().view(FP16).view(512, 128)
    exact = every.float()
    k = compiled.kernels(isa_of_fp32)
    to = compiled.words(k.packed_words(512, 128))
    torch.set_flush_denormal(flushed)
    try:
        k.pack_rows(address(every), 128, 512, 128, NAMES[FP16], address(to), 1)
    finally:
        torch.set_flush_denormal(False)
    found = unpacked(to, isa_of_fp32, 512, 128)
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.nan_to_num(7), exact.nan_to_num(7))


def test_every_sum_is_rounded_to_fp16_as_torch_rounds(isa_of_fp32):
    # All numbers of fp16, what lies halfway between two, and what lies beside that.
    bits = torch.arange(0x7C01, dtype=torch.int32).short().view(FP16).float()
    halfway = (bits[1:-1] + bits[:-2]) / 2
    beside = [torch.nextafter(halfway, torch.full_like(halfway, x)) for x in (-math.inf, math.inf)]
    ends = torch.tensor([65519.99, 65520.0, 65536.0, 1e30, math.inf, math.nan, 1e-8, 1e-30, 0.0])
    values = torch.cat([bits, halfway, *beside, ends])
    values = F.pad(torch.cat([values, -values]), (0, -2 * len(values) % 32))
    # As left panels of one token: the products with its hidden vector of ones are the values themselves.
    k, count = compiled.kernels(isa_of_fp32), len(values)
    left = torch.zeros(k.packed_words(count, 32))
    left.view(-1, 2, 2, 16, 16)[:, 0, :, :, 0] = values.view(-1, 2, 16)
    ones, out = torch.ones(1, 33, dtype=FP16), torch.empty(count, 33, dtype=FP16)
    by_rows = compiled.words(k.packed_words(33, 32))
    k.pack_columns(address(ones), 33, 1, 33, NAMES[FP16], address(by_rows), 1)
    workspace = compiled.words(k.workspace_bytes(0, 1) // 4)
    k.weight_gradient(address(left), count, address(by_rows), 1, 33, address(out), 33, NAMES[FP16], False, address(workspace), 1)
    exact = values.half()[:, None].expand(count, 33)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.nan_to_num(7), exact.nan_to_num(7))


# ---- one by one: the layout of packed panels


def padded(x, value=0.0):
    """To a multiple of 32."""
    return F.pad(x, (0, -len(x) % 32), value=value)


def up(count):
    return -(-count // 32) * 32


def guarded(count, dtype=torch.int32):
    """Memory amid sentinels; the whole, and what is to be written."""
    whole = torch.full((count + 128,), SENTINEL).to(dtype)
    return whole, whole[64:-64]


def assert_untouched(whole, *written):
    for view in written:
        view.fill_(SENTINEL)
    assert (whole == SENTINEL).all()


def unpacked(words: Tensor, isa: str, count: int, depth: int, left=False) -> Tensor:  # [count up to panels, depth up to steps]
    """As csrc/cpu/panels.h has it."""
    elements = words.view(BF16).view(-1, 2) if isa in MULTIPLY_BF16 else words.view(FP32).view(-1, 1)
    e = elements.shape[1]
    panels = elements.view(up(count) // 32, -(-depth // (16 * e)), 2, 16, 16, e)
    order = (0, 2, 3, 1, 4, 5) if left else (0, 2, 4, 1, 3, 5)
    return panels.permute(*order).reshape(up(count), -1)


@both_16_bit
@given(rows=st.integers(1, 70), width=st.integers(1, 70), margin=st.integers(0, 3), seed=st.integers(0, 2**16))
@examples(20)
def test_panels_hold_the_matrix_and_zeros(isa, dtype, rows, width, margin, seed):
    k = compiled.kernels(isa)
    # Bit patterns, so that no element is like another, NaN neither: bf16 of exponents below 128, and fp16 of those below 16.
    whole = torch.randint(0, 2**14, (rows, width + margin), generator=torch.Generator().manual_seed(seed)).short().view(dtype)
    matrix = whole[:, margin:]
    for pack, count, depth, expected in ((k.pack_rows, rows, width, matrix), (k.pack_columns, width, up(rows), matrix.T)):
        around, to = guarded(k.packed_words(count, depth))
        pack(address(matrix), matrix.stride(0), rows, width, NAMES[dtype], address(to), 3)
        found = unpacked(to, isa, count, depth)
        there = found[: expected.shape[0], : expected.shape[1]]
        assert torch.equal(there.float(), expected.float())
        assert found.count_nonzero() == expected.count_nonzero()
        assert_untouched(around, to)


def packed_operands(isa, dtype, rows, columns, width):
    """A problem as the fused kernels take it, with guards around what they write."""
    case = random_case(rows, columns, width, dtype=dtype, scale=2.0)
    k, weight = compiled.kernels(isa), F.pad(case.weight.detach(), (1, 2), value=torch.nan)[:, 1:-2]
    by_width, by_rows = compiled.words(k.packed_words(rows, width)), compiled.words(k.packed_words(width, up(rows)))
    hidden = case.hidden.detach()
    k.pack_rows(address(hidden), width, rows, width, NAMES[dtype], address(by_width), 2)
    k.pack_columns(address(hidden), width, rows, width, NAMES[dtype], address(by_rows), 2)
    matrix = address(weight), weight.stride(0), columns, width, NAMES[dtype]
    return k, hidden, weight, matrix, by_width, by_rows, case.targets


IDENTITY = (0, 0, 1.0, False)  # of a readout
some_shapes = pytest.mark.parametrize(
    ("rows", "columns", "width"), [(1, 1, 1), (33, 70, 40), (64, 64, 64), (5, 161, 77), (70, 31, 3), (150, 430, 210)]
)


@both_16_bit
@some_shapes
def test_statistics_are_written_where_they_belong_and_nowhere_else(isa, dtype, rows, columns, width):
    k, hidden, weight, matrix, by_width, _, targets = packed_operands(isa, dtype, rows, columns, width)
    stride = rows + 5
    around, out = guarded(4 * stride, FP32)
    around_workspace, workspace = guarded(k.statistics_bytes(rows, columns, width, 3), torch.uint8)
    y = padded(targets.int(), -1)
    nothing_kept = 0, 0, 0
    k.linear_statistics(
        *(address(by_width), rows, *matrix, *IDENTITY, address(y), address(out), stride, *nothing_kept, address(workspace), 3)
    )
    z = hidden.double() @ weight.double().T
    m, s, t, z_y = out.view(4, stride)[:, :rows].double()
    bound = CONTRACT * (1 + z.abs().max())
    x = z - z.amax(1, keepdim=True)
    assert (m - z.amax(1)).abs().max() <= bound
    assert (z_y - z.gather(1, targets[:, None])[:, 0]).abs().max() <= bound
    assert ((s / x.exp().sum(1)) - 1).abs().max() <= bound
    assert (t - (x * x.exp()).sum(1)).abs().max() <= bound * ((1 - x) * x.exp()).sum(1).max()
    assert (s >= 1).all()
    assert_untouched(around, out.view(4, stride)[:, :rows])
    assert_untouched(around_workspace, workspace)


@both_16_bit
@some_shapes
@pytest.mark.parametrize("slope", [True, False])
def test_gradients_of_a_tile_are_written_where_they_belong_and_nowhere_else(isa, dtype, rows, columns, width, slope):
    k, hidden, weight, matrix, by_width, by_rows, targets = packed_operands(isa, dtype, rows, columns, width)
    targets = targets - 7  # less the first column: those before it are another slice's
    z = hidden.double() @ weight.double().T
    m, constant, steepness, on_target = z.amax(1).float(), *torch.randn(3, rows)
    arrays = [padded(m), padded(constant), padded(steepness) if slope else None, padded(on_target), padded(targets.int(), -1)]
    around_left, left = guarded(k.packed_words(columns, up(rows)))
    around_right, right = guarded(k.packed_words(rows, up(columns)))
    around_sums, sums = guarded(columns, FP32)
    around_workspace, workspace = guarded(max(k.workspace_bytes(width, 3), k.workspace_bytes(up(columns), 3)), torch.uint8)
    k.linear_gradient(
        *(address(by_width), rows, *matrix, *IDENTITY, *map(address, arrays), 0, 0, 0, 0, address(left), address(right)),
        *(address(sums), address(workspace), 3),
    )
    dz = unpacked(right, isa, rows, up(columns))
    assert torch.equal(unpacked(left, isa, columns, up(rows), left=True)[: up(columns), : up(rows)], dz.T)
    assert not dz[rows:].any()
    assert not dz[:, columns:].any()

    x, one = z - m.double()[:, None], torch.arange(columns) == targets[:, None]
    factor = constant.double()[:, None] - steepness.double()[:, None] * x * slope
    exact = torch.where(one, on_target.double()[:, None], x.exp() * factor)
    size = x.exp() * (constant.abs()[:, None] + steepness.abs()[:, None] * (1 + x.abs()))
    bound = CONTRACT * (1 + z.abs().max()) * size * ~one
    stored = torch.finfo(BF16).eps / 2 if isa in MULTIPLY_BF16 else 0.0
    dz = dz[:rows, :columns].double()
    assert ((dz - exact).abs() <= bound + stored * (exact.abs() + bound)).all()
    assert ((sums - exact.sum(0)).abs() <= (bound + rows * EPS * exact.abs()).sum(0)).all()

    # The products with the two other operands, of dz as it was stored.
    stride = width + 3
    products = {"weight": (dz.T @ hidden.double(), dz.abs().T @ hidden.double().abs(), columns)}
    products["hidden"] = (dz @ weight.double(), dz.abs() @ weight.double().abs(), rows)
    d_weight = {}
    for name, of, add in (("fp32", FP32, False), ("bf16", BF16, False), ("fp16", FP16, False), ("added", FP32, True)):
        around, out = guarded(columns * stride, of)
        out = out.view(columns, stride)[:, 1 : 1 + width]
        k.weight_gradient(
            *(address(left), columns, address(by_rows), rows, width, address(out), stride, NAMES[of], add, address(workspace), 3),
        )
        d_weight[name] = out.clone()
        assert_untouched(around, out)
    exact, size, _ = products["weight"]
    assert ((d_weight["fp32"] - exact).abs() <= rows * EPS * size).all()
    assert torch.equal(d_weight["bf16"], d_weight["fp32"].bfloat16())
    assert torch.equal(d_weight["fp16"], d_weight["fp32"].half())
    assert torch.equal(d_weight["added"], SENTINEL + d_weight["fp32"])

    exact, size, _ = products["hidden"]
    around_blocks, blocks = guarded(up(rows) * up(width), FP32)
    around, out = guarded(rows * stride, FP32)
    out = out.view(rows, stride)[:, 1 : 1 + width]
    for times in (1, 2):
        k.hidden_gradient(address(right), rows, *matrix, address(blocks), times == 2, address(workspace), 3)
        k.unpack_hidden(address(blocks), rows, width, address(out), stride, 3)
        assert ((out - times * exact).abs() <= times * columns * EPS * size).all()
    for whole, *written in (
        (around_left, left),
        (around_right, right),
        (around_sums, sums),
        (around_workspace, workspace),
        (around_blocks, blocks),
        (around, out),
    ):
        assert_untouched(whole, *written)


# ---- one by one: rows of products


def fold(isa, products, targets, readout=IDENTITY, slices=None, thread_count=2):
    """Statistics [4, n] of the rows of ``products`` [n, c], which become logits."""
    n, columns = products.shape
    running = torch.zeros(4, n + 3)
    running[0], running[:, n:] = -math.inf, SENTINEL
    y, (bias, *rest) = targets.int(), readout
    for start, stop in slices or [(0, columns)]:
        part = products[:, start:stop]
        compiled.kernels(isa).row_statistics(
            *(address(part), products.stride(0), n, stop - start, start, bias + 4 * start if bias else 0, *rest),
            *(address(y), address(running), running.stride(0), thread_count),
        )
    assert (running[:, n:] == SENTINEL).all()
    return running[:, :n]


def row_gradient(isa, logits, arrays, readout=IDENTITY, formed=True, thread_count=2):  # -> [n, c]
    n = len(arrays[0])
    whole, dz = guarded(n * logits.shape[1], FP32)
    compiled.kernels(isa).row_gradient(
        *(address(logits), logits.stride(0), n, logits.shape[1], *readout, formed),
        *(*map(address, arrays), address(dz), thread_count),
    )
    found = dz.view(n, -1).clone()
    assert_untouched(whole, dz)
    return found


def assert_statistics(found, z, targets):
    """Against float64 of the same logits. Sums of k terms, in halves: each term within a few roundings of its own and of x."""
    x = z.double() - z.double().amax(1, keepdim=True)
    bound = EPS * (8 + math.log2(z.shape[1]))
    assert torch.equal(found[0], z.amax(1))
    assert (found[1] - x.exp().sum(1)).abs().le(bound * (x.exp() * (1 - x)).sum(1)).all()
    assert (found[2] - (x * x.exp()).sum(1)).abs().le(bound * (x.exp() * (1 - x + x**2)).sum(1)).all()
    assert torch.equal(found[3], z.gather(1, targets[:, None])[:, 0])


def test_rows_of_any_length(isa):
    # Each tail of a vector, and of four of them.
    for columns in [*range(1, 71), 2047, 2048, 2049, 4100]:
        whole = torch.full((9, columns + 5), torch.nan)
        z = whole[:, 2 : 2 + columns].copy_(4 * torch.randn(9, columns))
        targets = torch.randint(0, columns, (9,))
        assert_statistics(fold(isa, z, targets), z, targets)


@given(columns=st.integers(1, 300), cuts=st.lists(st.integers(1, 299), max_size=5), scale=st.sampled_from([0.1, 5.0, 200.0]))
@examples(20)
def test_statistics_of_slices_fold_into_those_of_the_whole(isa, columns, cuts, scale):
    z, targets = scale * torch.randn(5, columns), torch.randint(0, columns, (5,))
    borders = sorted({0, columns, *(cut for cut in cuts if cut < columns)})
    assert_statistics(fold(isa, z, targets, slices=list(pairwise(borders))), z, targets)


READOUTS = {
    "bias": {"bias": True},
    "inner": {"inner": 0.37},
    "outer": {"outer": True},
    "softcap": {"inner": 0.5, "softcap": True},
    "everything": {"bias": True, "outer": True, "inner": 0.7, "softcap": True},
}


@pytest.mark.parametrize("options", READOUTS.values(), ids=READOUTS)
@pytest.mark.parametrize("formed", [True, False], ids=["from logits", "from products"])
def test_logits_and_gradients_of_rows(isa, options, formed):
    n, columns = 11, 77
    products, bias, outer = 2 * torch.randn(n, columns + 4)[:, 1:-3], torch.randn(columns), torch.rand(n) + 0.5
    targets = torch.randint(-30, columns + 30, (n,))  # of other slices, too
    bias, outer = (x if name in options else None for name, x in (("bias", bias), ("outer", outer)))
    inner, softcap = options.get("inner", 1.0), options.get("softcap", False)

    x = (products.double() + (0 if bias is None else bias)) * inner
    factor = torch.ones(n, 1) if outer is None else outer[:, None]
    bend = 1 - x.tanh() ** 2 if softcap else torch.ones_like(x)
    z = (x.tanh() if softcap else x) * factor
    of_z = 4 * EPS * (x.abs() + 1) * factor  # products, sums and the tanh, which is at most as steep as 1
    logits, inside = products.clone(memory_format=torch.preserve_format), (targets >= 0) & (targets < columns)
    found = fold(isa, logits, targets, (address(bias), address(outer), inner, softcap))
    assert ((logits - z).abs() <= of_z).all()
    assert torch.equal(found[0], logits.amax(1))
    assert torch.equal(found[3], torch.where(inside, logits.gather(1, targets.clamp(0, columns - 1)[:, None])[:, 0], 0))

    source = logits if formed else products
    for index in (torch.tensor([3, 3, 10, 0, 7]), torch.arange(n)):
        m, outer_there = found[0][index], None if outer is None else outer[index]
        constant, slope, on_target = torch.randn(3, len(index))
        arrays = (m, constant, slope, on_target, targets[index].int())
        readout = address(bias), address(outer_there), inner, softcap
        dz = row_gradient(isa, source[index], arrays, readout, formed)

        exponent, one = z[index] - m.double()[:, None], torch.arange(columns) == targets[index][:, None]
        c, k, y = (a.double()[:, None] for a in (constant, slope, on_target))
        exact = torch.where(one, y, exponent.exp() * (c - k * exponent))
        size = torch.where(one, y.abs(), exponent.exp() * (c.abs() + k.abs() * (1 + exponent.abs())))
        bound = size * ((4 * EPS + of_z[index]) * bend[index] + 8 * EPS * softcap)
        assert ((dz - exact * bend[index]).abs() <= bound).all()


def test_row_kernels_do_not_depend_on_the_number_of_threads_nor_on_other_rows(isa):
    products, targets = 3 * torch.randn(41, 3001), torch.randint(0, 3001, (41,))
    arrays = (products.amax(1), *torch.randn(3, 41), targets.int())
    runs = [(fold(isa, products, targets, thread_count=n), row_gradient(isa, products, arrays, thread_count=n)) for n in THREADS]
    assert all(same(runs[0], other) for other in runs[1:])
    some = torch.tensor([40, 3, 17])
    alone = fold(isa, products[some], targets[some]), row_gradient(isa, products[some], tuple(a[some] for a in arrays))
    assert torch.equal(alone[0], runs[0][0][:, some])
    assert torch.equal(alone[1], runs[0][1][some])


# ---- one by one: the functions


def in_ulp(found: Tensor, exact: Tensor) -> float:
    """The largest error, in the distance of fp32 neighbours there."""
    return ((found.double() - exact).abs().numpy() / np.spacing(exact.abs().float().numpy())).max()


def exponential(isa, x):
    one, zero = torch.ones(1), torch.zeros(1)
    return row_gradient(isa, x[None], (zero, one, None, zero, torch.tensor([-1], dtype=torch.int32)))[0]


def hyperbolic_tangent(isa, x):
    z = x[None].clone()
    fold(isa, z, torch.tensor([0]), (0, 0, 1.0, True))
    return z[0]


def test_the_exponential(isa):
    near = -torch.logspace(-40, 0, 20001, base=2.0)
    x = torch.cat([torch.linspace(-87, 0, 400_001), near, -torch.arange(126) * math.log(2)])
    x = x[x >= -87]
    assert in_ulp(exponential(isa, x), x.double().exp()) <= 1
    assert exponential(isa, torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    below = torch.cat([torch.linspace(-200, -87.34, 10_001), -torch.logspace(2, 38.5, 1001)])
    assert (exponential(isa, below) == 0).all()  # where it would be subnormal
    assert (exponential(isa, torch.linspace(-87.34, -86, 1001)) >= 0).all()


def test_the_hyperbolic_tangent(isa):
    x = torch.cat([torch.linspace(0, 12, 400_001), torch.logspace(-37, 38, 20_001), torch.tensor([1e-40, 0.0])])
    found = hyperbolic_tangent(isa, x)
    normal = x > torch.finfo(FP32).smallest_normal
    assert in_ulp(found[normal], x[normal].double().tanh()) <= 2
    assert (found <= 1).all()
    assert torch.equal(found[~normal], x[~normal])
    assert torch.equal(hyperbolic_tangent(isa, -x), -found)


# ---- what is refused


def test_the_backend_runs_what_was_asked_for(isa):
    case = random_case(4, 20, 8, dtype=BF16)
    plan = explain(case.hidden, case.weight, case.targets, backend=f"native:{isa}")
    assert (plan.backend, plan.tile_plan.isa) == ("native", isa)
    assert f"with {isa}," in str(plan)
    assert explain(case.hidden, case.weight, case.targets).tile_plan.isa == compiled.isas()[0]


def test_float64_is_refused():
    case = random_case(4, 20, 8, dtype=torch.float64)
    reason = r"'native' given, it cannot run this: dtype: torch.float64 given, accepted are fp32, bf16 and fp16"
    with pytest.raises(ValueError, match=reason):
        linear_logprobs(case.hidden, case.weight, case.targets, backend="native")
    assert explain(case.hidden, case.weight, case.targets).backend == "torch"


def test_other_instruction_sets_are_refused(monkeypatch):
    case = random_case(4, 20, 8)
    with pytest.raises(ValueError, match=r"backend: 'native:nope' given, accepted are .*'native:amx'.*'native:portable'"):
        run(case, "nope")
    with pytest.raises(ValueError, match=r"isa: 'nope' given, which this build or this machine does not have"):
        compiled.built.cpu.Kernels("nope")
    for module in (native_rows, cpu_panels):
        monkeypatch.setattr(module, "isas", lambda: ("avx2", "portable"))
    with pytest.raises(ValueError, match=r"instruction set: amx given, .* does not have; it has avx2, portable"):
        run(case, "amx")
    assert explain(case.hidden, case.weight, case.targets).tile_plan.isa == "avx2"


def test_fp16_takes_the_fastest_instruction_set_that_does_not_multiply_bf16(monkeypatch):
    case = random_case(4, 20, 8, dtype=FP16)
    for module in (native_rows, cpu_panels):
        monkeypatch.setattr(module, "isas", lambda: compiled.ISAS)
    accepted = cpu_panels.isas_for(FP16)
    assert accepted[0] == "avx512"
    assert set(accepted) == set(compiled.ISAS) - set(MULTIPLY_BF16)
    assert cpu_panels.isas_for(BF16) == compiled.ISAS
    for isa in MULTIPLY_BF16:
        with pytest.raises(ValueError, match=f"{isa} given, which multiplies bf16; accepted for fp16 are {', '.join(accepted)}"):
            run(case, isa)


def test_without_the_module_torch_runs_and_explain_says_why(monkeypatch):
    case = random_case(4, 20, 8, dtype=BF16)
    memory = torch.ones(3)
    try:
        monkeypatch.setattr(compiled, "built", None)
        compiled.isas.cache_clear()
        plan = explain(case.hidden, case.weight, case.targets)
        assert plan.backend == "torch"
        assert plan.why_not["native"] == "the C++ kernels were not built; `bupo env` says why"
        with pytest.raises(ValueError, match=r"'native' given, it cannot run this: the C\+\+ kernels were not built"):
            linear_logprobs(case.hidden, case.weight, case.targets, backend="native")
        out = linear_logprobs(case.hidden, case.weight, case.targets)
        assert_values(out, case)
        assert all(gradient.any() for gradient in backward(out, [torch.ones(4)] * 3, case))
        assert compiled.present(memory) is memory
    finally:
        monkeypatch.undo()
        compiled.isas.cache_clear()


def test_the_least_budget_is_enough_and_less_is_left_to_torch(isa):
    case = random_case(100, 300, 40, dtype=BF16)
    least = cpu_panels.least_budget(explain(case.hidden, case.weight).problem, isa)
    check(case, isa, memory_budget=least)
    reason = f"memory_budget: {least - 1} bytes given, accepted are at least {least} with {torch.get_num_threads()} threads"
    with pytest.raises(ValueError, match=reason):
        run(case, isa, memory_budget=least - 1)
    plan = explain(case.hidden, case.weight, case.targets, memory_budget=2**18)
    assert plan.backend == "torch"
    assert plan.why_not["native"].startswith("memory_budget: 262144 bytes given, accepted are at least ")
    assert_values(linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=2**18), case)


# ---- memory


@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 2**20, 3 * 2**20 + 12345])
@pytest.mark.parametrize("offset", [0, 1, 1024, 5000])
def test_memory_made_present_keeps_what_it_holds(count, offset):
    whole = torch.arange(count + 2 * offset, dtype=torch.int32)
    part = whole[offset : offset + count]
    assert compiled.present(part) is part
    assert torch.equal(whole, torch.arange(count + 2 * offset, dtype=torch.int32))
    new = compiled.present(torch.empty(count))
    assert new.fill_(1).sum() == count
