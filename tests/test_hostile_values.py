"""NaN, inf and −inf in whatever comes in: what is not finite in a loss is not finite in any gradient that it touches, and a logit
of −inf is a column that cannot be chosen. On every backend; docs/reliability.md says what users met."""

import math
from dataclasses import replace

import pytest
import torch
from problems import (
    CONTRACT,
    OPTIONS,
    Case,
    assert_stored_gradients,
    assert_values,
    case_with,
    contract,
    covering,
    divergence_factor,
    entropy_factor,
    gradients,
    largest_logit,
    leaves,
    random_case,
)
from test_native_cuda import emulated, on_gpu  # noqa: F401 (fixtures)
from torch import nn

from bupo_kernels import (
    FusedLMHead,
    PolicyObjective,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    logit_lens,
)
from bupo_kernels.backends import compiled
from bupo_kernels.lens import LENS_OUTPUTS
from bupo_kernels.policy_losses import policy_terms

NAN, INF = math.nan, math.inf
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FIELDS = ("logprobs", "entropy", "logsumexp")
DTYPES = {
    "torch": (FP32, BF16, FP16),
    **{f"native:{isa}": (FP32, BF16) for isa in compiled.ISAS},
    "cuda rows": (FP32, BF16),
    "triton": (FP32, BF16, FP16),
    "triton:cached": (BF16, FP16),
}
OBJECTIVES = {
    "ppo": PolicyObjective(),
    "grpo with kl and entropy": PolicyObjective(
        aggregation="sequence-mean-token-mean", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.01
    ),
    "kl of k1": PolicyObjective(kl="k1", kl_coefficient=0.1),
    "cispo": PolicyObjective(clip="cispo"),
    "sapo": PolicyObjective(clip="sapo"),
    "gmpo": PolicyObjective(ratio="sequence", clip="gmpo"),
    "vespo": PolicyObjective(ratio="sequence", clip="vespo"),
    "top entropy": PolicyObjective(top_entropy_quantile=0.5),
    "delta": PolicyObjective(clip=None, delta=2.0),
    "reinforce": PolicyObjective(ratio="none", clip=None),
    "truncated importance": PolicyObjective(importance="token"),
    "gspo": PolicyObjective(ratio="sequence", aggregation="sequence-mean-token-mean"),
    "sequence mask of reinforce": PolicyObjective(ratio="none", clip=None, importance="sequence"),
}


@pytest.fixture
def backend(request):
    """For ``backend=``, wherever the test's parameter says."""
    name = request.param
    if name == "cuda rows":
        request.getfixturevalue("on_gpu")
        return "native"
    if name.startswith("native") and name.partition(":")[2] not in compiled.isas():
        pytest.skip(f"this CPU or this build has no {name}")
    if name.startswith("triton"):
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("for the interpreter, on the CPU")
    return name


def on(*names: str, dtypes=(FP32, BF16, FP16)):
    """Each of these backends with each of the dtypes that it has."""
    pairs = [(name, dtype) for name in names or DTYPES for dtype in DTYPES[name] if dtype in dtypes]
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in pairs]
    return pytest.mark.parametrize(("backend", "dtype"), covering(pairs, 1, unpacked=True), indirect=["backend"], ids=ids)


def stores_16_bits(backend: str) -> bool:
    """Whether dz of 16-bit operands is rounded to them."""
    return backend not in ("torch", "native:avx512", "native:avx2", "native:portable")


# ---- what is not finite in the loss


class Batch:
    """[5, 8] rows of a vocabulary of 70: one at (1, 3) to be spoilt, and a masked one at (2, 2) that is rubbish already."""

    def __init__(self, dtype: torch.dtype):
        self.hidden, self.weight, self.bias = torch.randn(5, 8, 16).to(dtype), torch.randn(70, 16).to(dtype), torch.randn(70)
        self.targets, self.mask = torch.randint(0, 70, (5, 8)), torch.rand(5, 8) < 0.8
        self.mask[1, 3], self.mask[2, 2] = True, False
        self.advantages = torch.randn(5, 8)
        self.old, self.reference, self.sampler = (-5 + 0.1 * torch.randn(5, 8) for _ in range(3))
        for x in (self.hidden, self.advantages, self.old, self.reference):
            x[2, 2] = NAN

    def leaves(self) -> tuple[torch.Tensor, ...]:
        return tuple(x.requires_grad_() for x in (self.hidden, self.weight, self.bias))

    def statistics(self, backend: str):
        options = {"bias": self.bias, "mask": self.mask, "backend": backend}
        return linear_logprobs(self.hidden, self.weight, self.targets, **options)

    def losses(self, backend: str, objectives=("ppo", "grpo with kl and entropy", "gspo")):
        """(name, loss) of everything with a gradient."""
        options = {"bias": self.bias, "mask": self.mask, "backend": backend}
        out = self.statistics(backend)
        for name in FIELDS:
            yield name, getattr(out, name).sum()
        yield "all", sum(x.sum() for x in out)
        yield "cross entropy", linear_cross_entropy(self.hidden, self.weight, self.targets, **options)
        for name in objectives:
            yield name, self.policy_loss(OBJECTIVES[name], backend)

    def policy_loss(self, objective: PolicyObjective, backend: str):
        given = {"old_logprobs": self.old}
        given |= {"reference_logprobs": self.reference} if objective.needs_reference else {}
        given |= {"sampler_logprobs": self.sampler} if objective.needs_sampler else {}
        options = {"bias": self.bias, "mask": self.mask, "backend": backend, "objective": objective, **given}
        return linear_policy_loss(self.hidden, self.weight, self.targets, self.advantages, **options)[0]


def assert_not_finite(name: str, loss, batch: Batch, rows=None) -> None:
    """Neither the loss nor any of its gradients is, of ``rows`` [5, 8] of the hidden states; those of masked rows are 0."""
    operands = batch.leaves()
    d_hidden, *others = torch.autograd.grad(loss, operands, retain_graph=True)
    spoilt = torch.zeros_like(batch.mask)
    spoilt[1, 3] = True
    rows = spoilt if rows is None else rows
    assert not loss.isfinite(), name
    assert not d_hidden[rows].isfinite().any(), name
    assert not any(gradient.isfinite().any() for gradient in others), name
    assert (d_hidden[~batch.mask] == 0).all(), name
    if rows is spoilt and name not in ("gspo", "gmpo"):  # whose sequences share a ratio
        assert d_hidden[~spoilt].isfinite().all(), name


@on()
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_hidden_vector_that_is_not_finite_reaches_its_own_gradient_and_all_of_dW(backend, dtype, value):
    batch = Batch(dtype)
    batch.hidden[1, 3, 5] = value
    batch.leaves()
    for name, loss in batch.losses(backend):
        assert_not_finite(name, loss, batch)


@on()
@pytest.mark.parametrize("of", ["weight", "bias"])
def test_a_parameter_with_a_nan_reaches_every_row_that_counts(backend, dtype, of):
    batch = Batch(dtype)
    getattr(batch, of)[7] = NAN
    batch.leaves()
    for name, loss in batch.losses(backend):
        assert_not_finite(name, loss, batch, rows=batch.mask)


@on()
def test_a_nan_from_above_reaches_every_gradient(backend, dtype):
    batch = Batch(dtype)
    batch.leaves()
    out, upstream = batch.statistics(backend), torch.ones(5, 8)
    upstream[1, 3] = NAN
    for name, statistic in zip(FIELDS, out, strict=True):
        assert_not_finite(name, (statistic * upstream).sum(), batch)
    assert_not_finite("inf", (out.logprobs * upstream.nan_to_num(nan=INF)).sum(), batch)
    loss = batch.policy_loss(PolicyObjective(), backend) * NAN
    assert not any(gradient.isfinite().any() for gradient in torch.autograd.grad(loss, batch.leaves()))


@on()
def test_a_loss_that_weighs_a_nan_with_zero_is_nan_and_so_are_its_gradients(backend, dtype):
    batch, weights = Batch(dtype), torch.rand(5, 8)
    batch.hidden[1, 3], weights[1, 3] = NAN, 0
    batch.leaves()
    for name, statistic in zip(FIELDS, batch.statistics(backend), strict=True):
        assert_not_finite(name, (statistic * weights).sum(), batch)


@on("torch", "cuda rows", dtypes=(FP32,))
@pytest.mark.parametrize("of", ["advantages", "old", "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_input_of_the_objective_that_is_nan_reaches_every_gradient(backend, dtype, objective, of):
    batch, goal = Batch(dtype), OBJECTIVES[objective]
    if (of == "reference" and not goal.needs_reference) or (of == "old" and objective == "reinforce"):
        pytest.skip("not read")
    getattr(batch, of)[1, 3] = NAN
    batch.leaves()
    loss = batch.policy_loss(goal, backend)
    sequence = torch.zeros_like(batch.mask)
    sequence[1] = batch.mask[1]
    assert_not_finite(objective, loss, batch, rows=sequence if goal.needs_sequence and of == "old" else None)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_inputs_spoil_has_a_derivative_they_spoil(objective, bad):
    # Ratios within, on either side of and far from the clips; each input in turn.
    goal = OBJECTIVES[objective]
    log_ratio = torch.tensor([[0.0, 0.5, -0.5, 30.0, -30.0]]).repeat(2, 1)
    advantages = torch.tensor([[1.0], [-1.0]]).repeat(1, 5)
    logprobs = torch.full((2, 5), -3.0)
    for name in ("advantages", "old_logprobs", "reference_logprobs"):
        for position in range(5):
            inputs = {
                "advantages": advantages.clone(),
                "old_logprobs": logprobs - log_ratio,
                "reference_logprobs": logprobs.clone(),
                "sampler_logprobs": logprobs.clone(),
            }
            inputs[name][:, position] = bad
            terms = policy_terms(goal, logprobs, torch.ones(2, 5), **inputs)
            spoilt = ~terms.loss.isfinite()
            assert not terms.d_logprob[spoilt].isfinite().any(), (name, position)
            assert not (math.isnan(bad) and terms.loss.isfinite()[:, position].any() and name == "advantages")


def test_the_scaler_of_mixed_precision_skips_the_step():
    for spoil in ("hidden", "weight"):
        head, hidden = nn.Linear(16, 70, bias=False), torch.randn(4, 6, 16)
        if spoil == "weight":
            head.weight.data[3, 3] = NAN
        else:
            hidden[1, 2, 0] = NAN
        before = head.weight.detach().clone()
        optimizer, scaler = torch.optim.SGD(head.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(2):
            loss, _ = linear_policy_loss(hidden, head.weight, torch.randint(0, 70, (4, 6)), torch.randn(4, 6))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert torch.equal(head.weight, before) or spoil == "weight"
        assert torch.equal(head.weight.isnan(), before.isnan())
        assert scaler.get_scale() == 256.0


def test_a_temperature_that_is_nan_is_refused_where_its_row_counts():
    case, temperature = random_case(5, 20, 4), torch.ones(5)
    temperature[2] = NAN
    with pytest.raises(ValueError, match="temperature: nan given"):
        linear_logprobs(case.hidden, case.weight, case.targets, temperature=temperature)
    out = linear_logprobs(case.hidden, case.weight, case.targets, temperature=temperature, mask=temperature == 1)
    assert all(gradient.isfinite().all() for gradient in gradients(sum(x.sum() for x in out), case.hidden, case.weight))


# ---- logits of −inf


def ruled_out(case: Case, value: float = -INF) -> tuple[Case, Case, torch.Tensor]:
    """The case with a bias of ``value`` on columns at both ends and in between, that of the others alone, and which they are."""
    vocab = len(case.weight)
    there = torch.ones(vocab, dtype=torch.bool)
    there[: vocab // 2] = there[::7] = there[-20:] = False
    bias = case.options.get("bias", torch.zeros(vocab)).detach().float().masked_fill(~there, value).requires_grad_()
    targets = there.nonzero().squeeze(1)[case.targets % there.sum()]
    few = {"bias": bias.detach()[there].requires_grad_()}
    few = Case(case.hidden, case.weight.detach()[there].requires_grad_(), there.cumsum(0)[targets] - 1, case.options | few)
    return replace(case, targets=targets, options=case.options | {"bias": bias}), few, there


def run(case: Case, backend: str, **options):
    return linear_logprobs(case.hidden, case.weight, case.targets, backend=backend, **case.options, **options)


@on()
@pytest.mark.parametrize("options", ["plain", "temperature per row", "everything"])
@pytest.mark.parametrize("value", [-INF, torch.finfo(FP32).min], ids=["-inf", "lowest"])
def test_columns_that_a_bias_rules_out_are_as_if_they_were_not_there(backend, dtype, options, value):
    options = {k: v for k, v in OPTIONS[options].items() if k != "softcap"}
    # More than one slice of the vocabulary, and the first of them without any column.
    vocab = 1300 if backend.startswith("native:") and dtype == BF16 else 301
    budget = 40_000 if backend in ("torch", "native") else 400_000 if dtype == FP32 and backend != "triton" else None
    case, few, there = ruled_out(case_with(options, 23, vocab, 16, dtype=dtype, scale=3.0), value)
    out = run(case, backend, memory_budget=budget)
    assert_values(out, few)
    upstream = [torch.randn(23) for _ in FIELDS]
    d_hidden, d_weight, d_bias = gradients(sum((g * x).sum() for g, x in zip(upstream, out, strict=True)), *leaves(case))
    assert (d_weight[~there] == 0).all()
    assert (d_bias[~there] == 0).all()
    error_model = "triton:cached" if backend == "triton:cached" else "triton" if backend == "triton" else "native"
    found = d_hidden, d_weight[there], d_bias[there]
    assert_stored_gradients(found, few, upstream, error_model if stores_16_bits(backend) else "torch")


@on()
def test_one_pass_over_columns_that_are_ruled_out(backend, dtype):
    case, few, there = ruled_out(random_case(24, 301, 16, dtype=dtype))
    objective = PolicyObjective(entropy_coefficient=0.1)
    found = []
    for each, where in ((case, backend), (few, "torch")):
        loss, _ = linear_policy_loss(
            each.hidden, each.weight, each.targets, torch.ones(24), objective=objective, backend=where, **each.options
        )
        found.append((loss, gradients(loss, *leaves(each))))
    (loss, (d_hidden, d_weight, d_bias)), (want, of_few) = found
    assert (loss - want).abs() <= 20 * CONTRACT * 10
    assert (d_weight[~there] == 0).all()
    assert (d_bias[~there] == 0).all()
    for a, b in zip((d_hidden, d_weight[there], d_bias[there]), of_few, strict=True):
        assert (a.double() - b.double()).norm() <= 4 * torch.finfo(dtype).eps * b.double().norm()


@on()
def test_a_target_that_is_ruled_out_has_logprob_minus_inf_and_the_gradient_of_log_softmax(backend, dtype):
    case, few, there = ruled_out(random_case(23, 301, 16, dtype=dtype))
    case.targets[:4] = torch.tensor([0, 7, 14, 300])
    out = run(case, backend)
    assert (out.logprobs[:4] == -INF).all()
    few.targets[:4] = 0
    want = run(few, "torch")
    bound = contract(largest_logit(few))
    assert (out.logprobs[4:] - want.logprobs[4:]).abs().max() <= 2 * bound
    assert (out.entropy - want.entropy).abs().max() <= 2 * bound * entropy_factor(301)
    assert linear_cross_entropy(case.hidden, case.weight, case.targets, backend=backend, **case.options) == INF
    got = gradients(out.logprobs.sum(), *leaves(case))
    exact = [x.detach().double().requires_grad_() for x in (case.hidden, case.weight, case.options["bias"])]
    z = exact[0] @ exact[1].T + exact[2]
    expected = gradients(z.log_softmax(1).gather(1, case.targets[:, None]).sum(), *exact)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= (4 * torch.finfo(dtype).eps + 8 * bound) * b.norm()
    # Entropies are of the other columns: a target that cannot be adds nothing to their gradient.
    with_entropy = gradients(out.entropy.sum(), *leaves(case))
    assert all(gradient.isfinite().all() for gradient in with_entropy)
    assert (with_entropy[1][~there] == 0).all()


def test_a_target_that_is_ruled_out_is_outside_of_the_ratios_of_its_sequence():
    case, _, _ = ruled_out(random_case(24, 301, 16))
    case.targets[5] = 0
    old = torch.full((4, 6), -4.0)
    for objective in (PolicyObjective(ratio="sequence"), PolicyObjective(importance="sequence"), PolicyObjective()):
        given = {"old_logprobs": old, "sampler_logprobs": old} if objective.needs_sampler else {"old_logprobs": old}
        loss, _ = linear_policy_loss(
            case.hidden.view(4, 6, 16),
            case.weight,
            case.targets.view(4, 6),
            -torch.ones(4, 6),
            objective=objective,
            **given,
            **case.options,
        )
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(loss, *leaves(case)))


def overflowing(dtype: torch.dtype, rows: int, columns: slice, vocab: int = 301) -> Case:
    """Products of −inf in the first ``rows`` rows and those columns, of finite operands."""
    case = random_case(23, vocab, 16, dtype=dtype)
    with torch.no_grad():
        case.hidden[:, 0], case.weight[:, 0] = 0, 0
        case.hidden[:rows, 0], case.weight[columns, 0] = 1e30, -1e30
    return case


@on(dtypes=(FP32, BF16))
def test_products_that_overflow_to_minus_inf_rule_columns_out_in_their_row(backend, dtype):
    case = overflowing(dtype, 5, slice(40, 200))
    case.targets %= 40
    out = run(case, backend)
    z = case.hidden.detach()[:, 1:].double() @ case.weight.detach()[:, 1:].double().T
    z[:5, 40:200] = -INF
    p = z.softmax(1)
    log_p = z.log_softmax(1).nan_to_num(neginf=0)
    bound = contract(z[z > -INF].abs().max())
    assert (out.logprobs - log_p.gather(1, case.targets[:, None]).squeeze(1)).abs().max() <= bound
    assert (out.entropy + (p * log_p).sum(1)).abs().max() <= 2 * (1 + math.log(301)) * bound
    assert (out.logsumexp - z.logsumexp(1)).abs().max() <= bound
    (d_hidden,) = gradients(sum(x.sum() for x in out), case.hidden)
    assert d_hidden.isfinite().all()
    assert d_hidden[:5, 1:].any(1).all()


@on(dtypes=(FP32, BF16))
def test_a_row_without_any_logit_is_nan_and_stays_alone(backend, dtype):
    case = overflowing(dtype, 1, slice(None))
    out = run(case, backend)
    assert all(x[0].isnan() for x in out)
    assert all(x[1:].isfinite().all() for x in out)
    for loss in (*(x.sum() for x in out), sum(x.sum() for x in out)):
        d_hidden, d_weight = gradients(loss, case.hidden, case.weight)
        assert not d_hidden[0].isfinite().any()
        assert d_hidden[1:].isfinite().all()
        assert not d_weight.isfinite().any()


@on("torch", "native:amx", "native:avx2", "native:portable", "cuda rows", "triton", dtypes=(FP32, BF16))
def test_a_softcap_bounds_minus_inf_like_any_logit(backend, dtype):
    case = random_case(23, 301, 16, dtype=dtype, softcap=5.0)
    bias, last = torch.zeros(301), torch.zeros(301)
    bias[::3], last[::3] = -INF, -1e30
    out, want = (run(replace(case, options=case.options | {"bias": b}), backend) for b in (bias, last))
    for a, b in zip(out, want, strict=True):
        assert torch.equal(a, b)
    upstream = [torch.randn(23) for _ in FIELDS]
    got, expected = (
        gradients(sum((g * x).sum() for g, x in zip(upstream, o, strict=True)), case.hidden, case.weight) for o in (out, want)
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_softcap_between_padding_and_infinite_weights():
    # 40 rows fill two panels of 32 of the packed kernels: the others are zeros, and 0 · inf must not come out of them.
    hidden, weight = torch.rand(40, 16).to(BF16), torch.randn(70, 16).to(BF16)
    weight[5] = -INF
    for backend in ("torch", *(f"native:{isa}" for isa in compiled.isas())):
        w = weight.clone().requires_grad_()
        out = linear_logprobs(hidden, w, torch.zeros(40, dtype=torch.int64), softcap=5.0, backend=backend)
        (d_weight,) = gradients(sum(x.sum() for x in out), w)
        assert d_weight.isfinite().all(), backend


# ---- the lens


def lens_of(dtype=FP32, vocab: int = 301, layers: int = 3):
    states, final = torch.randn(layers, 4, 5, 16).to(dtype), torch.randn(4, 5, 16).to(dtype)
    return states, final, torch.randn(vocab, 16).to(dtype), torch.randint(0, vocab, (4, 5))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("budget", [None, 60_000], ids=["whole", "in slices"])
def test_every_output_of_the_lens_with_columns_ruled_out(dtype, budget):
    states, final, weight, targets = lens_of(dtype)
    case, few, there = ruled_out(Case(final.flatten(0, 1), weight, targets.flatten()))
    top_k = int(there.sum()) + 10
    options = {"outputs": LENS_OUTPUTS, "final": final, "memory_budget": budget}
    found = logit_lens(states, weight, case.targets.view(4, 5), bias=case.options["bias"].detach(), top_k=top_k, **options)
    exact = [x.double() for x in (states, few.weight.detach())]
    options |= {"final": final.double(), "memory_budget": None}
    want = logit_lens(*exact, few.targets.view(4, 5), top_k=top_k - 10, **options)
    bound = contract((exact[0] @ exact[1].T).abs().max())
    ids = there.nonzero().squeeze(1)
    assert torch.equal(found.argmax, ids[want.argmax])
    assert torch.equal(found.rank, want.rank)
    assert (found.top_ids.sort(-1).values.diff(dim=-1) > 0).all()  # no id twice, those that cannot be at the end
    assert (found.top_logprobs[..., top_k - 10 :] == -INF).all()
    assert (found.top_logprobs[..., : top_k - 10] - want.top_logprobs).abs().max() <= 2 * bound
    for name in set(LENS_OUTPUTS) - {"argmax", "rank"}:
        assert (getattr(found, name) - getattr(want, name)).abs().max() <= 20 * bound, name


@pytest.mark.parametrize("budget", [None, 60_000], ids=["whole", "in slices"])
def test_a_divergence_is_infinite_where_only_the_other_rules_a_column_out(budget):
    states, final, weight, targets = lens_of(layers=2)
    states[..., 0], final[..., 0], weight[:, 0] = 0, 0, 0
    states[1, ..., 0], weight[100:140, 0] = 1e30, -1e30  # layer 1 gives them no probability
    found = logit_lens(states, weight, targets % 100, final=final, outputs=LENS_OUTPUTS, memory_budget=budget)
    z, last = (x[..., 1:].double() @ weight[:, 1:].double().T for x in (states, final))
    z[1, ..., 100:140] = -INF
    p, q = z.softmax(-1), last.softmax(-1)
    log_p, log_q = z.log_softmax(-1), last.log_softmax(-1)

    def kl(p, log_p, log_q):
        return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)

    def near(ours, exact):  # the least exact are divergences
        return (ours.double() - exact).abs().max() <= bound * divergence_factor(exact.max().item())

    bound = contract(max(x[x > -INF].abs().max().item() for x in (z, last))) * entropy_factor(weight.shape[0])
    assert near(found.kl_to_final, kl(p, log_p, log_q))
    assert (found.kl_from_final[1] == INF).all()
    assert near(found.kl_from_final[0], kl(q, log_q, log_p[0]))
    assert (found.pairwise_kl[0, 1] == INF).all()
    assert near(found.pairwise_kl[1, 0], kl(p[1], log_p[1], log_p[0]))
    middle = ((p + q) / 2).log()
    assert near(found.jsd, (kl(p, log_p, middle) + kl(q, log_q, middle)) / 2)
    assert near(found.entropy, -kl(p, log_p, torch.zeros_like(p)))
    assert (linear_divergence(final, weight, states[1], kind="reverse_kl").divergence == INF).all()


def test_a_nan_stays_in_every_float_of_the_lens():
    states, final, weight, targets = lens_of()
    states[1, 2, 3] = NAN
    found = logit_lens(states, weight, targets, final=final, outputs=LENS_OUTPUTS, top_k=3)
    for name, value in found._asdict().items():
        if value.is_floating_point() and name != "pairwise_kl":
            assert value[1, 2, 3].isnan().all(), name
            assert value[0].isfinite().all(), name
    assert found.pairwise_kl[1, :, 2, 3].isnan().all()
    assert found.pairwise_kl[:, 1, 2, 3].isnan().all()


# ---- ids that no tokenizer has


def test_a_view_of_the_first_rows_of_the_weight_cuts_the_padding_off_for_nothing(monkeypatch):
    weight, hidden = torch.randn(70, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    targets = torch.randint(0, 50, (9,))
    short = weight.detach()[:50].clone().requires_grad_()
    out, want = (linear_logprobs(hidden, w, targets) for w in (weight[:50], short))
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    (d_weight,) = gradients(sum(x.sum() for x in out), weight)
    (d_short,) = gradients(sum(x.sum() for x in want), short)
    assert d_weight.shape == weight.shape
    assert torch.equal(d_weight[:50], d_short)
    assert (d_weight[50:] == 0).all()


def test_a_head_without_a_bias_takes_one_of_minus_inf_as_a_buffer():
    # As docs/integrations.md has it.
    head = FusedLMHead(16, 70, bias=False)
    keys = list(head.state_dict())
    del head.bias
    head.register_buffer("bias", torch.zeros(70).masked_fill(torch.arange(70) >= 50, -INF), persistent=False)
    hidden, targets = torch.randn(3, 4, 16), torch.randint(0, 50, (3, 4))
    out = head(hidden, targets)
    want = linear_logprobs(hidden, head.weight[:50], targets)
    for a, b in zip(out, want, strict=True):
        assert (a - b).abs().max() <= 2 * contract(10.0) * entropy_factor(70)
    assert (head(hidden)[..., 50:] == -INF).all()
    assert list(head.state_dict()) == keys
    out.entropy.sum().backward()
    assert (head.weight.grad[50:] == 0).all()
    assert head.weight.grad[:50].isfinite().all()
