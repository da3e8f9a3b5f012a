"""Divergences of a student from its teacher: values and gradients against float64, what costs nothing, and what is refused."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LARGEST, tiny_model, token_batch
from problems import (
    OPTIONS,
    Case,
    case_with,
    chain_error,
    contract,
    contract_of,
    covering,
    divergence_factor,
    examples,
    gradients,
    products,
    random_case,
)
from torch.utils.flop_counter import FlopCounterMode

from bupo.measurement import peak_bytes
from bupo_kernels import FusedLMHead, explain, linear_divergence, numerics, policy_divergence, reference
from bupo_kernels.backends.base import Readout
from bupo_kernels.backends.divergences import Side, Upstream
from bupo_kernels.dispatch import DIVERGENCES
from bupo_kernels.numerics import entropy_factor

MIB = 2**20
KINDS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5, "gjsd": 0.2}
kinds = pytest.mark.parametrize("kind", KINDS)
BACKENDS = ["torch", "native", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def beta_of(kind: str) -> dict:
    return {"kind": kind} | ({"beta": KINDS[kind]} if kind == "gjsd" else {})


def split(options: dict) -> tuple[dict, dict]:
    """The options of a case as those of the op and of the oracle."""
    return options, {k: v for k, v in options.items() if k not in ("mask", "memory_budget", "backend")}


def both(name: str, *, teacher_width: int | None = 7, dtype=torch.float32, teacher_dtype=None, rows=9, vocab=41, width=6):
    """A student's case, with one of :data:`OPTIONS`, and its teacher's, with a readout of its own."""
    student = case_with(OPTIONS[name], rows=rows, vocab=vocab, width=width, dtype=dtype)
    if teacher_width is None:
        return student, replace(student, hidden=random_case(rows, vocab, width, dtype=dtype, seed=1).hidden, options={})
    teacher = random_case(rows, vocab, teacher_width, dtype=teacher_dtype or dtype, seed=1)
    teacher.options = {"logit_scale": 0.8, "softcap": 5.0, "temperature": 1.3} if name == "everything" else {}
    return student, teacher


def operands_of(student: Case, teacher: Case, shared: bool) -> tuple:
    return (student.hidden, student.weight, teacher.hidden, *(() if shared else (teacher.weight,)))


def expected(student: Case, teacher: Case, kind: str, shared: bool = False):
    """Divergence and entropy of the oracle."""
    return reference.linear_divergence(
        *(student.hidden, student.weight, teacher.hidden, teacher.weight.detach() if shared else teacher.weight, KINDS[kind]),
        of_student=split(student.options)[1],
        of_teacher=of_teacher(student, teacher, shared),
        mask=student.options.get("mask"),
    )


def bound_of(student: Case, teacher: Case) -> float:
    """Of the error of either policy's log-probs."""
    readout = of_teacher(student, teacher, teacher.weight is student.weight)
    return max(contract_of(replace(student, options=split(student.options)[1])), contract_of(replace(teacher, options=readout)))


def assert_near(found, exact, bound: float) -> None:
    """Within the error model, row by row."""
    for one, value in zip(found.detach().double().flatten().tolist(), exact.detach().flatten().tolist(), strict=True):
        assert abs(one - value) <= bound * divergence_factor(value)


def assert_gradients(loss, upstream, student: Case, teacher: Case, kind: str) -> None:
    """Each element of the gradients of ``loss``, ``Σ upstream · (divergence, entropy)``, within its bound."""
    shared = teacher.weight is student.weight
    mask = student.options.get("mask")
    upstream = upstream if mask is None else upstream * mask
    sides = []
    for case, options in ((student, split(student.options)[1]), (teacher, of_teacher(student, teacher, shared))):
        stored = torch.promote_types(case.hidden.dtype, torch.float32)  # on a CPU
        sides.append(numerics.Side(case.hidden, case.weight, options, stored))
    exact = numerics.divergence_gradients(*sides, KINDS[kind], upstream, bound_of(student, teacher))
    operands = {"hidden": student.hidden, "weight": student.weight, "bias": student.options.get("bias")}
    named = [("student", name, x) for name, x in operands.items() if x is not None]
    named += [("teacher", "hidden", teacher.hidden), *(() if shared else (("teacher", "weight", teacher.weight),))]
    for (side, name, operand), gradient in zip(named, gradients(loss, *(x for *_, x in named)), strict=True):
        assert gradient.dtype == operand.dtype
        truth, bound = exact[side == "teacher"][name]
        excess = (gradient.double() - truth).abs() - bound
        assert not (excess > 0).any(), f"{name} of the {side}: over its bound by {excess.max().item():.2e}"


def of_teacher(student: Case, teacher: Case, shared: bool) -> dict:
    """The options of the teacher's readout, as the oracle takes them."""
    own = split(student.options)[1]
    found = dict(own) if shared else {"temperature": own.get("temperature", 1.0)} | teacher.options
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def as_options(teacher: Case) -> dict:
    return {f"teacher_{k}": v for k, v in teacher.options.items()}


# Dtypes of both sides, and whether they share a head; left out is what a backend does not take, or the interpreter takes long for.
SIDES = [(x, x, shared) for x in DTYPES for shared in (True, False)] + [(torch.float32, torch.bfloat16, False)]
CASES = [
    (name, kind, backend, *sides)
    for name, kind, backend, sides in itertools.product(OPTIONS, KINDS, BACKENDS, SIDES)
    if (backend == "torch" or sides[0] != torch.float64) and (backend != "triton" or name == "everything")
]


@pytest.mark.parametrize(("name", "kind", "backend", "dtype", "teacher_dtype", "shared"), covering(CASES, unpacked=True))
def test_values_and_gradients_of_both_sides_are_those_of_float64(name, kind, backend, dtype, teacher_dtype, shared):
    student, teacher = both(name, dtype=dtype, teacher_dtype=teacher_dtype, teacher_width=None if shared else 7)
    options = student.options | as_options(teacher) | beta_of(kind) | {"backend": backend}
    found = linear_divergence(*operands_of(student, teacher, shared), **options)
    exact = expected(student, teacher, kind, shared)
    assert found.divergence.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(found.divergence, exact[0], bound_of(student, teacher))
    assert (found.entropy - exact[1]).abs().max() <= bound_of(student, teacher) * entropy_factor(len(student.weight))
    upstream = torch.randn(2, 9, dtype=torch.float64)
    assert_gradients(
        sum((g * x.double()).sum() for g, x in zip(upstream, found[:2], strict=True)), upstream, student, teacher, kind
    )


@backends
@kinds
def test_a_sum_has_its_gradients_in_one_pass_and_equals_the_sum_of_rows(kind, backend):
    if backend == "triton" and kind != "jsd":
        pytest.skip("the interpreter takes its time")
    student, teacher = both("everything")
    options = student.options | as_options(teacher) | beta_of(kind) | {"backend": backend}
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0, 0.0, 3.0, -1.0, 1.0])
    operands = (student.hidden, student.weight, teacher.hidden, teacher.weight)
    by_row = linear_divergence(*operands, row_weights=weights, **options)
    for reduction, denominator, divisor in (
        ("sum", None, 1.0),
        ("mean", None, float(student.options["mask"].sum())),
        ("mean", 5.0, 5.0),
    ):
        found = linear_divergence(*operands, row_weights=weights, reduction=reduction, denominator=denominator, **options)
        want = by_row.divergence.double().sum() / divisor
        torch.testing.assert_close(
            found.divergence, want.float(), rtol=0, atol=chain_error(9) * 9 * 3 * float(by_row.per_row.max())
        )
        assert torch.equal(found.per_row, by_row.per_row)
        assert not found.entropy.requires_grad
        upstream = torch.stack([3 * weights.double() / divisor, torch.zeros(9, dtype=torch.float64)])
        assert_gradients(3 * found.divergence, upstream, student, teacher, kind)
    kept = student.options["mask"] & (weights != 0)
    assert torch.equal(by_row.per_row != 0, kept)
    assert torch.equal(by_row.divergence.detach(), torch.where(kept, weights * by_row.per_row, 0))


@examples(30)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 5000),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 300.0]),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 99),
    backend=st.sampled_from(["torch", "native"]),
)
def test_it_holds_its_error_bound_from_flat_to_steep_policies(rows, vocab, scale, kind, seed, backend):
    student, teacher = (random_case(rows, vocab, 8, scale=scale, seed=s) for s in (seed, seed + 100))
    found = linear_divergence(student.hidden, student.weight, teacher.hidden, backend=backend, **beta_of(kind))
    exact, _ = expected(student, replace(teacher, weight=student.weight), kind, shared=True)
    assert (found.divergence >= 0).all()
    if rows:
        assert_near(found.divergence, exact, bound_of(student, replace(teacher, weight=student.weight)))


def test_a_policy_diverges_from_itself_by_nothing_and_masked_rows_are_zero():
    hidden, weight = torch.randn(2, 3, 8), torch.randn(50, 8)
    for kind in KINDS:
        same = linear_divergence(hidden, weight, hidden, **beta_of(kind)).divergence
        assert (same <= 2 * contract(float((hidden @ weight.T).abs().max()))).all()
        mask = torch.tensor([[True, False, True], [False, False, True]])
        found = linear_divergence(hidden, weight, -hidden, mask=mask, **beta_of(kind))
        for values in found:
            assert values.shape == (2, 3)
            assert ((values > 0) == mask).all()


def test_a_teacher_on_the_students_head_is_a_constant_to_it_and_its_own_head_is_not():
    case, other = random_case(5, 30, 6), random_case(5, 30, 6, seed=1).hidden.detach()
    shared = linear_divergence(case.hidden, case.weight, other, reduction="sum").divergence
    frozen = linear_divergence(case.hidden, case.weight, other, case.weight.detach(), reduction="sum").divergence
    own = linear_divergence(case.hidden, case.weight, other, case.weight, reduction="sum").divergence
    assert torch.equal(*(gradients(x, case.weight)[0] for x in (shared, frozen)))
    teachers = linear_divergence(case.hidden, case.weight.detach(), other, case.weight, reduction="sum").divergence
    through_both = sum(gradients(x, case.weight)[0] for x in (shared, teachers))
    torch.testing.assert_close(gradients(own, case.weight)[0], through_both)


def test_what_cannot_matter_enters_no_product():
    """Masked rows, rows of weight 0, in the backward those without an upstream gradient, and operands that are frozen."""
    case, teacher = random_case(6, 40, 8), random_case(6, 40, 5, seed=1)
    frozen = (teacher.hidden.detach(), teacher.weight.detach())
    mask = torch.tensor([True, True, True, True, False, True])
    weights = torch.tensor([1.0, -1.0, 0.0, 2.0, 1.0, 0.0])
    options = {"mask": mask, "row_weights": weights, "backend": "torch"}

    def one_pass(hidden, weight):
        return linear_divergence(hidden, weight, *frozen, reduction="sum", **options).divergence

    of_both = [(3, 8, 40), (3, 5, 40)]
    assert sorted(products(lambda: one_pass(case.hidden, case.weight).backward())) == sorted([*of_both, (3, 40, 8), (40, 3, 8)])
    assert sorted(products(lambda: one_pass(case.hidden, case.weight.detach()).backward())) == sorted([*of_both, (3, 40, 8)])
    assert sorted(products(lambda: one_pass(case.hidden.detach(), case.weight.detach()))) == sorted(of_both)
    by_row = linear_divergence(case.hidden, case.weight, *frozen, **options).divergence
    upstream = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    found = products(lambda: by_row.backward(upstream))
    assert sorted(found) == sorted([(1, 8, 40), (1, 5, 40), (1, 40, 8), (40, 1, 8)])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_budget_gives_the_same_in_chunks_of_rows(kind, dtype):
    student, teacher = both("everything", dtype=dtype, rows=40, vocab=300, width=16)
    found = []
    for budget in (45_000, None):
        options = student.options | as_options(teacher) | beta_of(kind) | {"memory_budget": budget}
        one = linear_divergence(student.hidden, student.weight, teacher.hidden, teacher.weight, reduction="sum", **options)
        rows = linear_divergence(student.hidden, student.weight, teacher.hidden, teacher.weight, **options)
        found.append((one.per_row, rows.per_row))
        upstream = torch.tensor([[1.0], [0.0]], dtype=torch.float64).expand(2, 40)
        for loss in (one.divergence, rows.divergence.sum()):
            assert_gradients(loss, upstream, student, teacher, kind)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_logits_never_exceed_the_budget():
    rows, vocab, width, budget = 300, 20_000, 32, 4 * MIB  # 48 MB of logits
    student, teacher = random_case(rows, vocab, width), random_case(rows, vocab, width, seed=1)

    def call():
        found = linear_divergence(
            student.hidden, student.weight, teacher.hidden.detach(), kind="jsd", reduction="mean", memory_budget=budget
        )
        found.divergence.backward()

    call()
    student.hidden.grad = student.weight.grad = None
    gradients_and_results = 4 * (vocab * width + rows * width) + 40 * rows
    assert peak_bytes(call) <= budget + gradients_and_results + MIB // 4
    with pytest.raises(ValueError, match="memory_budget: 1000 bytes given, accepted are at least"):
        linear_divergence(student.hidden, student.weight, teacher.hidden, memory_budget=1000)


@backends
def test_columns_that_are_ruled_out(backend):
    case, other = random_case(4, 20, 8), random_case(4, 20, 8, seed=1)
    bias = torch.zeros(20)
    bias[3] = -math.inf
    operands = case.hidden, case.weight, other.hidden, other.weight
    both_ruled = {"bias": bias, "teacher_bias": bias, "backend": backend}
    for kind in KINDS:
        found = linear_divergence(*operands, **both_ruled, **beta_of(kind))
        exact = reference.linear_divergence(*operands, KINDS[kind], of_student={"bias": bias}, of_teacher={"bias": bias})
        assert_near(found.divergence, exact[0], max(contract_of(case), contract_of(other)))
        for gradient in gradients(found.divergence.sum() + found.entropy.sum(), *operands):
            assert gradient.isfinite().all()
    # By the student alone: its forward KL is inf, with the finite gradient p − q.
    found = linear_divergence(*operands, backend=backend, bias=bias)
    assert (found.divergence == math.inf).all()
    assert gradients(found.divergence.sum(), case.hidden)[0].isfinite().all()
    assert linear_divergence(*operands, backend=backend, bias=bias, kind="reverse_kl").divergence.isfinite().all()
    assert linear_divergence(*operands, backend=backend, bias=bias, kind="jsd").divergence.isfinite().all()
    # By the teacher alone: the reverse KL is inf, and so is nothing that could be trained on.
    found = linear_divergence(*operands, backend=backend, teacher_bias=bias, kind="reverse_kl")
    assert (found.divergence == math.inf).all()
    assert not gradients(found.divergence.sum(), case.hidden)[0].isfinite().any()


@backends
def test_a_nan_stays_in_its_row_and_in_every_gradient_it_touches(backend):
    case, other = random_case(4, 20, 8), random_case(4, 20, 8, seed=1)
    with torch.no_grad():
        case.hidden[1, 2] = math.nan
        other.hidden[2, 0] = math.inf
    for kind in KINDS:
        found = linear_divergence(case.hidden, case.weight, other.hidden, other.weight, backend=backend, **beta_of(kind))
        assert found.divergence.isnan().tolist() == [False, True, True, False]
        assert found.entropy.isnan().tolist() == [False, True, False, False]
        # A loss that weighs such a row with 0 is NaN all the same.
        dh, dw = gradients((found.divergence * torch.tensor([1.0, 0.0, 1.0, 1.0])).sum(), case.hidden, case.weight)
        assert dh.isfinite().all(1).tolist() == [True, False, False, True]
        assert not dw.isfinite().any()
        masked = linear_divergence(
            *(case.hidden, case.weight, other.hidden, other.weight),
            mask=torch.tensor([True, False, False, True]),
            reduction="sum",
            backend=backend,
            **beta_of(kind),
        )
        assert all(g.isfinite().all() for g in gradients(masked.divergence, case.hidden, case.weight))


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_16_bit_gradients_over_the_products_are_those_beside_them(beta):
    """As on tensor cores: row by row in the first half of the memory of the products, several slices of columns."""
    rows, vocab = 3, 5000
    memory = torch.randn(2, 2, rows, vocab + 24) * 3
    upstream = Upstream(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 0.0, 1.0]))
    found = []
    for backend, store in (("torch", memory[0]), ("triton", memory[0].clone())):
        store = store.clone()
        sides = [Side(x[:, :vocab], x.view(torch.bfloat16)[:, :vocab], None, Readout(0.7, 1.0, None)) for x in store]
        values = DIVERGENCES[backend].rows(sides[0], sides[1], beta, upstream, True, None)
        found.append((*values, *(side.dz.float() for side in sides)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-6)


# ---- a teacher that is known by its top


def top_of(teacher: Case, k: int):
    """The k most probable ids of a teacher and their log-probs, in any order."""
    log_q = (teacher.hidden.detach().double() @ teacher.weight.detach().double().T).log_softmax(1)
    values, ids = log_q.topk(k, 1)
    order = torch.randperm(k)
    return ids[:, order], values[:, order].to(torch.promote_types(teacher.hidden.dtype, torch.float32))


@kinds
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("k", [0, 1, 5, 41])
def test_a_top_and_what_it_leaves_are_a_policy_of_their_own(kind, name, k):
    student, teacher = both(name, dtype=torch.float64)
    top = top_of(teacher, k)
    upstream = torch.randn(2, 9, dtype=torch.float64)
    mask = student.options.get("mask", torch.ones(9, dtype=torch.bool))
    found = linear_divergence(student.hidden, student.weight, teacher_top=top, **student.options, **beta_of(kind))
    z = reference.logits(student.hidden, student.weight, **split(student.options)[1])
    exact = torch.where(mask, reference.divergence_from_top(z, *top, KINDS[kind]), 0)
    entropy = torch.where(mask, -(z.softmax(1) * z.log_softmax(1)).sum(1), 0)
    torch.testing.assert_close(found.divergence, exact)
    torch.testing.assert_close(found.entropy, entropy)
    operands = [x for x in (student.hidden, student.weight, student.options.get("bias")) if x is not None]
    losses = [(upstream[0] * d + upstream[1] * h).sum() for d, h in ((found.divergence, found.entropy), (exact, entropy))]
    for a, b in zip(*(gradients(x, *operands) for x in losses), strict=True):
        torch.testing.assert_close(a, b)
    one = linear_divergence(
        student.hidden,
        student.weight,
        teacher_top=top,
        row_weights=upstream[0],
        reduction="sum",
        **student.options,
        **beta_of(kind),
    )
    for a, b in zip(gradients(one.divergence, *operands), gradients((upstream[0] * exact).sum(), *operands), strict=True):
        torch.testing.assert_close(a, b)


def test_what_a_top_leaves_is_exact_however_little_it_is():
    """The student gives its other ids e^-30 together, which 1 less the probabilities of the top does not know in fp32."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [0.0, -1.0], *[[-30 - math.log(6), 0.5]] * 3])
    top = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]).log()
    found = linear_divergence(hidden, weight, teacher_top=top)
    z = hidden.double() @ weight.double().T
    exact = reference.divergence_from_top(z, *top, 0.0)
    bound = contract(float(z.detach().abs().max()))
    assert abs(found.divergence.item() - exact.item()) <= bound * divergence_factor(exact.item())
    torch.testing.assert_close(*(gradients(x.sum(), hidden)[0].float() for x in (found.divergence, exact)), rtol=1e-5, atol=0)


def test_a_top_that_is_none_raises():
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    ids, logprobs = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.full((3, 2), -1.0)

    def refuses(error, match, ids=ids, logprobs=logprobs, **options):
        with pytest.raises(error, match=match):
            linear_divergence(hidden, weight, teacher_top=(ids, logprobs), **options)

    refuses(TypeError, "teacher_hidden: given with teacher_top", teacher_hidden=hidden)
    refuses(TypeError, "teacher_softcap: given with teacher_top", teacher_softcap=3.0)
    refuses(ValueError, r"teacher_top: ids of shape \(2, 2\)", ids=ids[:2])
    refuses(ValueError, r"teacher_top: logprobs of shape \(3, 1\)", logprobs=logprobs[:, :1])
    refuses(TypeError, "teacher_top: ids of torch.int32", ids=ids.int())
    refuses(ValueError, "teacher_top: requires a gradient", logprobs=logprobs.clone().requires_grad_())
    refuses(ValueError, r"teacher_top: id 50 given, accepted are ids in \[0, 50\)", ids=ids + 44)
    refuses(ValueError, "teacher_top: id 7 given twice for a row", ids=torch.full((3, 2), 7))
    refuses(ValueError, "teacher_top: a log-prob of 1.0 given", logprobs=-logprobs, check=True)
    refuses(ValueError, "it cannot run this: it has no kernel for teacher_top", backend="native")


def test_the_plan_says_what_a_call_does():
    case, teacher = random_case(6, 40, 8), random_case(6, 40, 5, seed=1)
    frozen = {"teacher_hidden": teacher.hidden.detach(), "teacher_weight": teacher.weight.detach()}
    plan = explain(case.hidden, case.weight, reduction="mean", kind="jsd", **frozen)
    assert (plan.flops_forward, plan.flops_backward) == (2 * 6 * 40 * (3 * 8 + 5), 0)
    assert "6 of 6 rows x 40 columns x 8 in float32 (student) and 5 in float32 (teacher), on cpu" in str(plan)
    plan = explain(case.hidden, case.weight.detach(), **frozen)
    assert (plan.flops_forward, plan.flops_backward) == (2 * 6 * 40 * (8 + 5), 2 * 6 * 40 * (2 * 8 + 5))
    top = explain(case.hidden, case.weight, teacher_top=(torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6, 1)))
    assert top.flops_forward == 2 * 6 * 40 * 8
    assert top.why_not["native"] == "it has no kernel for teacher_top"
    with pytest.raises(TypeError, match="targets: given with a teacher"):
        explain(case.hidden, case.weight, case.targets, **frozen)


def test_torchs_flop_counter_counts_what_the_plan_does():
    case, teacher = random_case(6, 40, 8), random_case(6, 40, 5, seed=1)
    frozen = {"teacher_hidden": teacher.hidden.detach(), "teacher_weight": teacher.weight.detach()}
    top = {"teacher_top": (torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6, 1))}
    for options in (frozen, frozen | {"reduction": "mean"}, top, top | {"reduction": "sum"}):
        plan = explain(case.hidden, case.weight, **options)
        with FlopCounterMode(display=False) as counter:
            linear_divergence(case.hidden, case.weight, **options).divergence.sum().backward()
        assert counter.get_total_flops() == plan.flops_forward + plan.flops_backward
    support = torch.arange(6), torch.arange(7)
    with FlopCounterMode(display=False) as counter:
        linear_divergence(case.hidden, case.weight, **frozen, support=support).divergence.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * (3 * 8 + 5)


# ---- torch


def test_a_compiled_call_gives_what_it_gives_without():
    case, other = random_case(6, 33, 8), random_case(6, 33, 8, seed=1).hidden

    def loss(hidden, weight, teacher):
        rows = linear_divergence(hidden, weight, teacher, kind="jsd", temperature=0.7)
        total = linear_divergence(hidden, weight, teacher, kind="reverse_kl", reduction="mean", row_weights=rows.per_row)
        return rows.divergence.sum() + 0.1 * rows.entropy.sum() + total.divergence

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    operands = case.hidden, case.weight, other
    a, b = loss(*operands), compiled(*operands)
    assert torch.equal(a, b)
    for x, y in zip(gradients(a, *operands), gradients(b, *operands), strict=True):
        torch.testing.assert_close(x, y)


def test_what_cannot_be_compared_raises():
    case = random_case(3, 50, 8)
    hidden, weight = case.hidden.detach(), case.weight.detach()

    def refuses(error, match, *operands, **options):
        with pytest.raises(error, match=match):
            linear_divergence(*(operands or (hidden, weight, hidden)), **options)

    refuses(ValueError, r"teacher_hidden: shape \(2, 8\) on cpu given", hidden, weight, hidden[:2])
    refuses(ValueError, r"teacher_weight: 49 rows given, accepted are the 50", hidden, weight, hidden, weight[:49])
    refuses(ValueError, r"teacher_weight: shape \(50, 7\) given", hidden, weight, hidden, weight[:, :7])
    refuses(ValueError, r"student_weight: shape \(50, 7\) given", hidden, weight[:, :7], hidden)
    refuses(TypeError, "teacher_hidden: None given, accepted is a Tensor, or teacher_top instead", hidden, weight, None)
    refuses(TypeError, "teacher_hidden: torch.float64 given", hidden, weight, hidden.double(), weight.double())
    refuses(ValueError, "teacher_temperature: -1 given", teacher_temperature=-1)
    refuses(ValueError, "kind: 'kl' given, accepted are 'forward_kl', 'reverse_kl', 'jsd', 'gjsd'", kind="kl")
    refuses(ValueError, "beta: 0.3 given with kind='jsd', accepted with kind='gjsd'", kind="jsd", beta=0.3)
    refuses(ValueError, "beta: 1.5 given", kind="gjsd", beta=1.5)
    refuses(ValueError, "reduction: 'batchmean' given", reduction="batchmean")
    refuses(ValueError, "denominator: given with reduction='none'", denominator=3)
    refuses(ValueError, "row_weights: requires a gradient", row_weights=torch.ones(3, requires_grad=True))
    refuses(ValueError, r"row_weights: torch.float32 of shape \(2,\)", row_weights=torch.ones(2))
    refuses(TypeError, "norm: given, accepted are bias", norm=None)
    refuses(ValueError, "student_hidden: nan at index", hidden * math.nan, weight, hidden, check=True)
    refuses(ValueError, "teacher_hidden: nan at index", hidden, weight, hidden * math.nan, check=True)
    found = linear_divergence(case.hidden, case.weight, 2 * hidden)
    with pytest.raises(NotImplementedError, match="linear_divergence: a derivative of its gradient"):
        torch.autograd.grad(found.divergence.sum(), case.hidden, create_graph=True)[0].sum().backward()
    with pytest.raises(TypeError, match="teacher_hidden: given with targets"):
        FusedLMHead(8, 50)(hidden, torch.zeros(3, dtype=torch.long), teacher_hidden=hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_the_divergence_of_a_layer_from_the_final_policy_is_that_of_its_logits(tied):
    model, (ids, targets) = tiny_model(tied=tied), token_batch()
    states = model(ids, output_hidden_states=True).hidden_states
    found = policy_divergence(model, ids, targets != -100, layer=2, temperature=0.7)
    weight = model.lm_head.weight
    options = {"of_student": {"temperature": 0.7}, "of_teacher": {"temperature": 0.7}, "mask": targets != -100}
    exact, _ = reference.linear_divergence(states[2], weight, states[4].detach(), weight.detach(), 1.0, **options)
    assert_near(found.divergence, exact, contract(LARGEST / 0.7))
    assert model.config.num_hidden_layers == 4
    inner, above = (model.model.layers[i].mlp.up_proj.weight for i in (1, 2))
    mine, its = (torch.autograd.grad(x.sum(), [inner, above], allow_unused=True) for x in (found.divergence, exact))
    assert mine[1] is its[1] is None
    torch.testing.assert_close(mine[0], its[0], rtol=1e-3, atol=1e-3 * float(its[0].abs().max()))
