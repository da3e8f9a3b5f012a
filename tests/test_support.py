"""Log-probs on supports: float64 on ragged sets, the full op where a support is the whole vocabulary, and what is refused."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from problems import (
    OPTIONS,
    Case,
    assert_same_gradients,
    case_with,
    contract_of,
    covering,
    device_of,
    examples,
    gradients,
    leaves,
    random_case,
)

from bupo.measurement import peak_bytes
from bupo_kernels import (
    FusedLMHead,
    PolicyObjective,
    explain,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    logit_lens,
    policy_divergence,
    policy_logprobs,
    reference,
)
from bupo_kernels.backends.compiled import isas
from bupo_kernels.backends.gathers import Segments
from bupo_kernels.dispatch import GATHERS
from bupo_kernels.numerics import contract, entropy_factor
from bupo_kernels.support import BYTES_PER_ID

BACKENDS = ("torch", "native", "triton")


def csr(sets, device="cpu"):
    """The support of rows with these ids."""
    sizes = [len(ids) for ids in sets]
    ids = torch.tensor([i for ids in sets for i in ids], dtype=torch.int64, device=device)
    return ids, torch.tensor([0, *sizes], dtype=torch.int64, device=device).cumsum(0)


def random_support(case: Case, sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids in any order, of which the target is one."""
    generator, sets = torch.Generator().manual_seed(7), []
    for target, size in zip(case.targets.flatten().tolist(), sizes, strict=True):
        others = [i for i in torch.randperm(len(case.weight), generator=generator).tolist() if i != target]
        place = int(torch.randint(0, size, (), generator=generator))
        sets.append([*others[:place], target, *others[place : size - 1]])
    return csr(sets, case.targets.device)


def whole(rows: int, vocab: int):
    return csr([range(vocab)] * rows)


def judge(case: Case, backend: str, bound: float | None = None) -> None:
    """Values within the contract of the oracle's, and gradients of all three together within what that makes of them."""
    support = case.options["support"]
    found = linear_logprobs(case.hidden, case.weight, case.targets, backend=backend, **case.options)
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets, **case.oracle_options)
    bound = contract_of(replace_support(case)) if bound is None else bound
    longest = int(support[1].diff().max()) if len(support[1]) > 1 else 1
    factors = 1, entropy_factor(max(longest, 2)), 1
    upstream = [torch.randn(case.targets.shape, dtype=torch.float64).to(case.targets.device) for _ in exact]
    for value, truth, factor in zip(found, exact, factors, strict=True):
        finite = truth.isfinite()
        assert value.dtype == torch.promote_types(case.hidden.dtype, torch.float32)
        assert torch.equal(value.double().nan_to_num(-1)[~finite], truth.detach().nan_to_num(-1)[~finite])
        assert ((value.double() - truth)[finite].abs() <= bound * factor).all()
    counted = [u.where(x.isfinite(), 0) for u, x in zip(upstream, exact, strict=True)]

    def total(values):
        return sum((x.double().nan_to_num(0, neginf=0) * u).sum() for x, u in zip(values, counted, strict=True))

    ours, truth = total(found), total(exact)
    assert_same_gradients(gradients(ours, *leaves(case)), gradients(truth, *leaves(case)), replace_support(case))


def replace_support(case: Case) -> Case:
    return replace(case, options={k: v for k, v in case.options.items() if k != "support"})


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    covering(
        [*itertools.product(BACKENDS, (torch.float32, torch.bfloat16, torch.float16)), ("torch", torch.float64)], 1, unpacked=True
    ),
)
def test_values_and_gradients_are_those_of_float64(backend, dtype, name):
    case = case_with(OPTIONS[name], rows=9, vocab=41, width=37, dtype=dtype, device=device_of(backend))
    case.options["support"] = random_support(case, [1, 2, 3, 8, 41, 1, 17, 5, 2])
    judge(case, backend)


@st.composite
def ragged(draw):
    """Sets of any size, none and duplicates included, and any target."""
    vocab = draw(st.integers(1, 20))
    ids = st.lists(st.integers(0, vocab - 1), max_size=12)
    rows = draw(st.lists(st.tuples(ids, st.integers(0, vocab - 1), st.booleans()), min_size=1, max_size=12))
    return vocab, rows


@pytest.mark.parametrize("backend", ["torch", "native"])
@given(case=ragged(), width=st.integers(1, 70), budget=st.sampled_from([1, 1000, 10**8]), seed=st.integers(0, 9))
@examples(60)
def test_ragged_sets_give_what_float64_gives(backend, case, width, budget, seed):
    vocab, rows = case
    dtype = torch.float32 if backend == "native" else torch.float64
    problem = random_case(len(rows), vocab, width, dtype=dtype, seed=seed)
    targets = torch.tensor([target for _, target, _ in rows], dtype=torch.int64)
    mask = torch.tensor([counts for _, _, counts in rows], dtype=torch.bool)
    options = {"support": csr([ids for ids, _, _ in rows]), "mask": mask}
    problem = replace(problem, targets=targets, options=options)
    bound = contract_of(replace_support(problem)) if rows else 0.0
    judge(replace(problem, options=options), backend, bound)
    found = linear_logprobs(problem.hidden, problem.weight, targets, backend=backend, memory_budget=budget, **options)
    again = linear_logprobs(problem.hidden, problem.weight, targets, backend=backend, **options)
    assert torch.equal(found.logprobs.nan_to_num(), again.logprobs.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_support_of_the_whole_vocabulary_gives_what_the_full_op_gives(backend):
    case = case_with(OPTIONS["everything"], rows=6, vocab=100, width=24, dtype=torch.float32, device=device_of(backend))
    support = whole(6, 100)
    options = case.options | {"backend": backend}
    full = linear_logprobs(case.hidden, case.weight, case.targets, **options)
    on_support = linear_logprobs(case.hidden, case.weight, case.targets, support=support, **options)
    bound = 2 * contract_of(case)
    for a, b, factor in zip(full, on_support, (1, entropy_factor(100), 1), strict=True):
        assert (a - b).abs().max() <= bound * factor
    losses = [(x.logprobs + 0.3 * x.entropy - 0.2 * x.logsumexp).sum() for x in (full, on_support)]
    assert_same_gradients(*(gradients(loss, *leaves(case)) for loss in losses), case)


def test_a_long_row_is_as_exact_as_a_short_one():
    """A hundred thousand equal logits: added up one after the other in fp32, they would be off by more than the contract."""
    vocab = 100_000
    hidden, weight = torch.ones(1, 2), torch.full((vocab, 2), 0.1)
    found = linear_logprobs(hidden, weight, torch.zeros(1, dtype=torch.int64), support=whole(1, vocab))
    assert abs(found.logprobs.item() + math.log(vocab)) <= contract(0.2)
    assert abs(found.entropy.item() - math.log(vocab)) <= contract(0.2) * entropy_factor(vocab)


# ---- rows of one id, targets outside, rows of none


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_one_id_are_certain_and_have_the_gradient_of_their_logsumexp_alone(backend):
    case = random_case(5, 11, 16, scale=8.0, device=device_of(backend))
    support = csr([[y] for y in case.targets.tolist()])
    found = linear_logprobs(case.hidden, case.weight, case.targets, support=support, temperature=0.5, backend=backend)
    assert not found.logprobs.any()
    assert not found.entropy.any()
    for gradient in gradients((found.logprobs + found.entropy).sum(), case.hidden, case.weight):
        assert not gradient.any()
    z = 2 * (case.hidden * case.weight[case.targets]).sum(-1)
    assert (found.logsumexp - z).abs().max() <= contract(float(z.detach().abs().max()))
    got, want = (gradients(x.sum(), case.hidden, case.weight) for x in (found.logsumexp, z))
    assert_same_gradients(got, want, case)


def count_entries(monkeypatch, name: str) -> list[int]:
    """The number of entries of each call of a product of the torch backend."""
    counts, product = [], getattr(GATHERS["torch"], name)

    def counted(first, *rest):
        counts.append(len(rest[0] if name == "dots" else first.factors))
        return product(first, *rest)

    monkeypatch.setattr(type(GATHERS["torch"]), name, staticmethod(counted))
    return counts


def test_what_cannot_matter_enters_no_product(monkeypatch):
    """Masked rows, rows without an upstream gradient, and, of a loss, rows of one id and of no advantage."""
    dots, sums = count_entries(monkeypatch, "dots"), count_entries(monkeypatch, "sums")
    case = random_case(4, 30, 8)
    support = random_support(case, [6, 1, 4, 9])
    options = {"support": support, "backend": "torch"}
    mask = torch.tensor([True, True, True, False])
    found = linear_logprobs(case.hidden, case.weight, case.targets, mask=mask, **options)
    (found.logprobs * torch.tensor([1.0, 1.0, 0.0, 1.0])).sum().backward()
    assert dots == [11]
    assert sums == [6, 6]
    dots.clear(), sums.clear()
    advantages = torch.tensor([1.0, 1.0, 0.0, -1.0])
    loss, _ = linear_policy_loss(case.hidden, case.weight, case.targets, advantages, **options)
    loss.backward()
    assert dots == [15]
    assert sums == [15, 15]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_outside_its_set_has_the_logprob_of_a_masked_logit(backend):
    case = random_case(2, 9, 8, device=device_of(backend))
    case.targets[:] = torch.tensor([3, 4])
    support = csr([[1, 2, 5], [4, 8]])
    found = linear_logprobs(case.hidden, case.weight, case.targets, support=support, backend=backend)
    assert found.logprobs.tolist()[0] == -math.inf
    assert found.logprobs.tolist()[1] > -math.inf
    dense = (case.hidden @ case.weight.T).masked_fill(
        torch.tensor([[i not in (1, 2, 5) for i in range(9)], [i not in (4, 8) for i in range(9)]]), -math.inf
    )
    want = dense.log_softmax(-1).gather(-1, case.targets[:, None]).squeeze(1)
    assert_same_gradients(*(gradients(x.sum(), case.hidden, case.weight) for x in (found.logprobs, want)), case)


def test_a_row_without_ids_has_no_policy_and_spoils_no_other():
    case = random_case(3, 9, 8)
    found = linear_logprobs(case.hidden, case.weight, case.targets, support=csr([[], range(9), []]))
    assert [x.isnan().tolist() for x in found] == [[True, False, True]] * 3
    hidden, weight = gradients(found.logprobs[1], case.hidden, case.weight)
    assert hidden.isfinite().all()
    assert weight.isfinite().all()
    none = torch.zeros(0, dtype=torch.int64)
    found = linear_logprobs(case.hidden, case.weight, case.targets, support=(none, torch.zeros(4, dtype=torch.int64)))
    assert found.logprobs.isnan().all()


def test_a_nan_in_a_row_is_in_all_of_its_results():
    case = random_case(2, 9, 8)
    with torch.no_grad():
        case.hidden[0, 0] = math.nan
    found = linear_logprobs(case.hidden, case.weight, case.targets, support=random_support(case, [1, 3]))
    assert [x.isnan().tolist() for x in found] == [[True, False]] * 3
    hidden, weight = gradients(found.logprobs[0], case.hidden, case.weight)
    assert hidden[0].isnan().all()
    assert weight.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_are_a_call_like_any_other(backend):
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    options = {"support": (none, torch.zeros(1, dtype=torch.int64)), "backend": backend, "check": True}
    found = linear_logprobs(hidden, weight, none, **options)
    assert [x.shape for x in found] == [(0,)] * 3
    assert not gradients(found.logprobs.sum(), weight)[0].any()


# ---- the losses and the divergence


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean"])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_a_policy_loss_on_the_whole_vocabulary_is_the_full_one(aggregation, entropy):
    case = random_case(8, 50, 16)
    hidden, targets, advantages = case.hidden.view(2, 4, 16), case.targets.view(2, 4), torch.randn(2, 4)
    objective = PolicyObjective(aggregation=aggregation, entropy_coefficient=entropy)
    options = {"objective": objective, "old_logprobs": -torch.rand(2, 4) - 3, "temperature": 0.8}
    full, on_support = (
        linear_policy_loss(hidden, case.weight, targets, advantages, support=support, **options) for support in (None, whole(8, 50))
    )
    bound = contract_of(case)
    assert (full[0] - on_support[0]).abs() <= 20 * bound  # of ratios below e^3, and entropies
    for name, value in full[1]._asdict().items():
        assert torch.allclose(value, getattr(on_support[1], name), atol=40 * bound, equal_nan=True), name
    assert_same_gradients(*(gradients(loss, case.hidden, case.weight) for loss, _ in (full, on_support)), case)


def test_a_policy_loss_on_supports_is_that_of_their_logprobs():
    case = random_case(6, 40, 16)
    support, advantages = random_support(case, [1, 4, 9, 1, 2, 7]), torch.randn(6)
    old = linear_logprobs(case.hidden, case.weight, case.targets, support=support).logprobs.detach() - 0.1
    loss, metrics = linear_policy_loss(
        case.hidden, case.weight, case.targets, advantages, old_logprobs=old, support=support, check=True
    )
    exact, entropy, _ = reference.linear_logprobs(case.hidden, case.weight, case.targets, support=support)
    ratio = (exact - old).exp()
    want = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    assert abs(loss.item() - want.item()) <= 4 * contract_of(case)
    assert abs(metrics.entropy.item() - entropy.mean().item()) <= contract_of(case) * entropy_factor(9)
    assert_same_gradients(*(gradients(x, case.hidden, case.weight) for x in (loss, want)), case)


def test_cross_entropy_is_minus_the_logprob():
    case = random_case(5, 20, 8)
    support = random_support(case, [3, 1, 5, 2, 4])
    found = linear_cross_entropy(case.hidden, case.weight, case.targets, support=support, reduction="none", check=True)
    assert torch.equal(-found, linear_logprobs(case.hidden, case.weight, case.targets, support=support).logprobs)


def test_a_divergence_is_that_of_both_policies_on_the_set():
    case = case_with(OPTIONS["everything"], rows=5, vocab=30, width=12, dtype=torch.float32)
    other = case.hidden.detach() + 0.5 * torch.randn_like(case.hidden)
    sets = [[1, 2, 3], [4], list(range(30)), [7, 9], [2, 29, 5, 4]]
    found = linear_divergence(case.hidden, case.weight, other, support=csr(sets), kind="reverse_kl", **case.options).divergence
    options = {k: v for k, v in case.options.items() if k != "mask"}
    options = {k: v.detach().double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    z, r = (reference.logits(x.detach().double(), case.weight.detach().double(), **options) for x in (case.hidden, other))
    for row, ids in enumerate(sets):
        log_p, log_q = z[row, ids].log_softmax(0), r[row, ids].log_softmax(0)
        want = (log_p.exp() * (log_p - log_q)).sum() * case.options["mask"][row]
        assert abs(found[row].item() - want.item()) <= 2 * contract_of(case) * (2 + want.item() + math.sqrt(2 * want.item()))


def test_an_internal_policy_is_renormalised_on_the_same_set():
    model = tiny_model()
    ids = torch.randint(0, 61, (1, 9))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    support = csr([[y, *(i for i in range(61) if i % 7 == y % 3 and i != y)] for y in targets[0].tolist()])
    for layer in (None, 2):
        own = policy_logprobs(model, inputs, targets, layer=layer, support=support, check=True)
        whole_vocabulary = policy_logprobs(model, inputs, targets, layer=layer)
        assert (own.logprobs >= whole_vocabulary.logprobs).all()
        assert (own.entropy <= math.log(11)).all()
    kl = policy_divergence(model, inputs, torch.ones_like(inputs, dtype=torch.bool), layer=2, support=support)
    assert (kl.divergence > 0).all()


# ---- torch


def test_gradients_pass_gradcheck():
    case = case_with(OPTIONS["everything"], rows=5, vocab=12, width=4)
    case.options["support"] = random_support(case, [3, 1, 12, 2, 5])

    def call(*operands):
        hidden, weight, bias = operands
        return tuple(linear_logprobs(hidden, weight, case.targets, **case.options | {"bias": bias}))

    assert torch.autograd.gradcheck(call, leaves(case))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_ops_pass_torchs_own_check(with_gradient):
    case = random_case(4, 12, 8)
    hidden, weight = (x if with_gradient else x.detach() for x in (case.hidden, case.weight))
    from bupo_kernels.request import Request

    request = Request.of(hidden, weight, case.targets, support=random_support(case, [3, 1, 2, 5]))
    tensors = hidden, weight, None, case.targets, None, None, *request.support
    torch.library.opcheck(torch.ops.bupo_kernels.support_statistics, (*tensors, *request.numbers, request.settings().encode()))


def test_a_compiled_call_is_one_graph_for_any_number_of_rows_and_ids():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def call(hidden, weight, targets, ids, offsets):
        return linear_logprobs(hidden, weight, targets, support=(ids, offsets), backend="torch")

    for sizes in ([2, 3, 1], [4, 1, 2, 9]):
        case = random_case(len(sizes), 20, 8)
        support = random_support(case, sizes)
        found, plain = (
            call(case.hidden, case.weight, case.targets, *support),
            linear_logprobs(case.hidden, case.weight, case.targets, support=support, backend="torch"),
        )
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
        losses = [x.logprobs.sum() + x.entropy.sum() for x in (found, plain)]
        got, want = (torch.autograd.grad(loss, (case.hidden, case.weight)) for loss in losses)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    covering([*itertools.product(BACKENDS, (torch.float32, torch.bfloat16, torch.float16))], 1, unpacked=True),
)
def test_gradients_repeat_bit_for_bit_and_do_not_depend_on_threads(backend, dtype):
    case = random_case(40, 30, 48, dtype=dtype, device=device_of(backend))
    support = random_support(case, [1 + i % 9 for i in range(40)])

    def run():
        found = linear_logprobs(case.hidden, case.weight, case.targets, support=support, backend=backend)
        return *found, *gradients(found.logprobs.sum() + found.entropy.sum(), case.hidden, case.weight)

    before, first = torch.get_num_threads(), run()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_gives_the_same_within_the_contract(dtype):
    for width in (1, 3, 64, 200):
        case = random_case(7, 25, width, dtype=dtype)
        case.options["support"] = random_support(case, [1, 5, 9, 2, 25, 3, 4])
        for isa in isas():
            judge(case, f"native:{isa}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_where_they_lie(backend):
    case = random_case(12, 20, 16, device=device_of(backend))
    support = random_support(case, [1 + i % 5 for i in range(12)])
    wide = torch.randn(4, 3, 32)
    wide[..., ::2] = case.hidden.detach().view(4, 3, 16)
    tall = case.weight.detach().T.contiguous().T
    want = linear_logprobs(case.hidden.view(4, 3, 16), case.weight, case.targets.view(4, 3), support=support, backend=backend)
    found = linear_logprobs(wide[..., ::2], tall, case.targets.view(4, 3), support=support, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_backend_copies_no_more_rows_than_the_budget_has_room_for(dtype, monkeypatch):
    """A hundredth of the rows of all entries."""
    case = random_case(64, 200, 256, dtype=dtype)
    support, budget = random_support(case, [50] * 64), 64 * 50 * 256 * 4 // 100
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            is_rows = isinstance(found, torch.Tensor) and found.dim() == 2 and found.shape[1] == 256
            if is_rows and found.data_ptr() not in (case.hidden.data_ptr(), case.weight.data_ptr()):
                largest.append(found.nbytes)
            return found

    gathers = GATHERS["torch"]
    rows = torch.arange(64).repeat_interleave(50)
    with torch.no_grad(), Watch():
        gathers.dots(case.hidden, rows, case.weight, support[0], budget, None)
        assert max(largest) <= budget
        largest.clear()
        out, factors = torch.zeros_like(case.weight), torch.randn(64 * 50)
        largest.clear()
        gathers.sums(Segments(factors, case.weight, *support), out, torch.arange(64), budget, None)
    assert max(largest) <= budget


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_beyond_the_budget_a_call_holds_so_many_bytes_an_id(backend):
    case = case_with(OPTIONS["everything"], rows=300, vocab=400, width=8, dtype=torch.float32)
    case.options["support"] = random_support(case, [100] * 300)
    stated, budget = 30_000 * BYTES_PER_ID + 300 * 200, 10_000

    def call():
        return linear_logprobs(case.hidden, case.weight, case.targets, backend=backend, memory_budget=budget, **case.options)

    with torch.no_grad():
        assert peak_bytes(call) <= stated + budget
    found = call()
    gradients_and_peak = peak_bytes(lambda: gradients(found.logprobs.sum() + found.entropy.sum(), *leaves(case)))
    assert gradients_and_peak <= stated + budget + sum(x.nbytes for x in leaves(case))


# ---- what is refused, and explained


def refused(support, error, message, **options):
    case = random_case(3, 9, 8)
    case.targets[:] = torch.tensor([1, 2, 3])
    with pytest.raises(error, match=message):
        linear_logprobs(case.hidden, case.weight, case.targets, support=support, **options)


IDS, OFFSETS = csr([[1, 4], [2], [3, 5]])


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (IDS, TypeError, r"support: Tensor given, accepted is a pair \(ids, offsets\)"),
        ((IDS,), TypeError, "support: tuple of 1 given"),
        ((IDS.int(), OFFSETS), TypeError, "support: ids of torch.int32 given, accepted is a Tensor of torch.int64"),
        ((IDS, OFFSETS.tolist()), TypeError, "support: offsets of list given"),
        ((IDS, OFFSETS[:-1]), ValueError, r"support: offsets of shape \(3,\) given, accepted is \(4,\)"),
        ((IDS[None], OFFSETS), ValueError, r"support: ids of shape \(1, 5\) given, accepted is \[M\]"),
        ((IDS, OFFSETS + 1), ValueError, r"support: offsets \[1, 3, 4, 6\] given, accepted are numbers that ascend from 0 to 5"),
        ((IDS, OFFSETS[[0, 2, 1, 3]]), ValueError, r"support: offsets \[0, 3, 2, 5\] given"),
        ((IDS + 6, OFFSETS), ValueError, r"support: 10 given, accepted are ids in \[0, 9\)"),
        ((IDS - 2, OFFSETS), ValueError, r"support: -1 given"),
    ],
)
def test_a_support_that_is_none_is_refused(support, error, message):
    refused(support, error, message)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([[1, 4], [], [3, 5]], "support: no id for row 1 given, accepted is at least one for each row that counts"),
        ([[1, 4], [2], [5, 3, 5]], "support: id 5 twice for row 2 given, accepted is each id once in a row"),
        ([[1, 4], [0, 6], [3]], r"targets: 2 for row 1 given, accepted is an id of its support: \[0, 6\]"),
    ],
)
def test_a_check_names_the_row_whose_set_is_wrong(sets, message):
    refused(csr(sets), ValueError, message, check=True)
    case, mask = random_case(3, 9, 8), torch.zeros(3, dtype=torch.bool)
    linear_logprobs(case.hidden, case.weight, case.targets, support=csr(sets), mask=mask, check=True)
    with pytest.raises(ValueError, match="hidden: nan at index"):
        linear_logprobs(case.hidden * math.nan, case.weight, case.targets, check=True)


def test_what_has_no_support_says_so():
    case = random_case(3, 9, 8)
    with pytest.raises(ValueError, match="support: given, accepted is None: the policies of a lens are whole"):
        logit_lens([case.hidden], case.weight, support=(IDS, OFFSETS))
    with pytest.raises(ValueError, match="backend: 'triton:cached' given, accepted are 'auto', 'triton', 'native'"):
        linear_logprobs(case.hidden, case.weight, case.targets, support=(IDS, OFFSETS), backend="triton:cached")
    with pytest.raises(ValueError, match=r"cannot run this: dtype: torch.float64 given, accepted are fp32, bf16 and fp16"):
        linear_logprobs(case.hidden.double(), case.weight.double(), case.targets, support=(IDS, OFFSETS), backend="native")


def test_a_plan_says_what_a_support_costs():
    case = random_case(3, 1000, 64)
    plan = explain(case.hidden, case.weight, case.targets, support=csr([[1, 4], [2], [3, 5]]), ignore_index=int(case.targets[0]))
    assert plan.backend == "native"
    assert plan.flops_forward == 2 * 3 * 64
    assert plan.flops_backward == 2 * plan.flops_forward
    assert "3 of 1000 ids in all, 2 of 3 rows x 64, float32 on cpu" in str(plan)
    assert set(plan.why_not) == {"triton", "torch"}


def test_torchs_flop_counter_is_told():
    from torch.utils.flop_counter import FlopCounterMode

    case = random_case(3, 1000, 64)
    arguments, support = (case.hidden, case.weight, case.targets), random_support(case, [2, 1, 3])
    linear_logprobs(*arguments, support=support)  # a counter knows what was registered before it was made
    with FlopCounterMode(display=False) as counter:
        linear_logprobs(*arguments, support=support).logprobs.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 64


def test_a_head_hands_a_support_on():
    head = FusedLMHead(8, 9, bias=False)
    found = head(torch.randn(3, 8), torch.tensor([1, 2, 3]), support=(IDS, OFFSETS))
    assert found.logprobs[1] == 0
