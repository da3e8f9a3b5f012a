"""Every mode of differentiation that torch has: first derivatives in reverse mode are right, whatever else is asked for raises, and
nothing is ever a silent zero."""

import itertools

import numpy as np
import pytest
import torch
from problems import assert_same_gradients, contract, covering, first_of, gradients, random_case
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bupo_kernels import (
    FusedLMHead,
    PolicyObjective,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    logit_lens,
    reference,
)
from bupo_kernels.dispatch import DIVERGENCES

OVER_SEQUENCES = PolicyObjective(ratio="sequence")


def logprobs(hidden, weight, targets, backend):
    found = linear_logprobs(hidden, weight, targets, backend=backend)
    return (found.logprobs + found.entropy).sum()


def cross_entropy(hidden, weight, targets, backend):
    return linear_cross_entropy(hidden, weight, targets, backend=backend)


def policy_loss(hidden, weight, targets, backend):
    return linear_policy_loss(hidden, weight, targets, torch.linspace(-1, 1, len(targets)), backend=backend)[0]


def sequence_loss(hidden, weight, targets, backend):
    advantages = torch.linspace(-1, 1, len(targets))[None]
    options = {"objective": OVER_SEQUENCES, "backend": backend}
    return linear_policy_loss(hidden[None], weight, targets[None], advantages, **options)[0]


def divergence(hidden, weight, targets, backend):
    backend = backend if backend in DIVERGENCES else "torch"
    return linear_divergence(hidden, weight, 2 * hidden.detach(), backend=backend).divergence.sum()


def divergence_sum(hidden, weight, targets, backend):
    backend = backend if backend in DIVERGENCES else "torch"
    return linear_divergence(hidden, weight, 2 * hidden.detach(), kind="jsd", reduction="mean", backend=backend).divergence


def lens(hidden, weight, targets, backend):
    return logit_lens([hidden], weight, backend=backend).entropy.sum()


DIFFERENTIABLE = [logprobs, cross_entropy, policy_loss, sequence_loss, divergence, divergence_sum]
ops = pytest.mark.parametrize("op", DIFFERENTIABLE)
all_ops = pytest.mark.parametrize("op", [*DIFFERENTIABLE, lens])


def on_backends_in_turn(ops: list) -> pytest.MarkDecorator:
    """What is refused is refused by the op, and what is saved and handed on is torch's: each backend has some of the ops."""
    cases = list(itertools.product(ops, ("torch", "native", "triton")))
    return pytest.mark.parametrize(("op", "backend"), covering(cases, 1, unpacked=True), indirect=["backend"])


RAISES = "accepted are first derivatives in reverse mode"


@pytest.fixture
def case():
    return random_case(6, 23, 5)


def dense(op, hidden, weight, targets):
    """The op's loss in plain torch."""
    z = reference.linear_logprobs(hidden, weight, targets)
    advantages = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    if op is logprobs:
        return (z[0] + z[1]).sum()
    if op is cross_entropy:
        return -z[0].mean()
    if op is policy_loss:
        return -((z[0] - z[0].detach()).exp() * advantages).mean()
    if op in (divergence, divergence_sum):
        beta, reduce = (0.0, torch.sum) if op is divergence else (0.5, torch.mean)
        return reduce(reference.linear_divergence(hidden, weight, 2 * hidden.detach(), weight.detach(), beta)[0])
    raise AssertionError(op)


# ---- derivatives of derivatives


def penalty(op, case, backend):
    """|dL/dh|²: its own gradient takes a second derivative."""
    (g,) = torch.autograd.grad(op(case.hidden, case.weight, case.targets, backend), case.hidden, create_graph=True)
    return g.pow(2).sum()


@on_backends_in_turn(DIFFERENTIABLE)
@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, case: loss.backward(),
        lambda loss, case: torch.autograd.grad(loss, case.weight),
        lambda loss, case: torch.autograd.grad(loss, case.weight, allow_unused=True),
        lambda loss, case: torch.autograd.grad(loss + case.weight.sum(), case.weight),
        lambda loss, case: (loss + case.weight.sum()).backward(inputs=[case.weight]),
    ],
    ids=["backward", "grad", "allow_unused", "sum with another term", "inputs"],
)
def test_T45_a_gradient_penalty_raises_whichever_way_its_gradient_is_asked_for(op, ask, case, backend):
    with pytest.raises(NotImplementedError, match=RAISES):
        ask(penalty(op, case, backend), case)
    assert case.weight.grad is None


@ops
def test_T45_hessians_raise(op, case):
    with pytest.raises(NotImplementedError, match=RAISES):
        torch.autograd.functional.hessian(lambda h: op(h, case.weight.detach(), case.targets, "torch"), case.hidden.detach())


@pytest.mark.parametrize("op", first_of(DIFFERENTIABLE))
def test_T45_a_compiled_gradient_penalty_raises(op, case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, y: op(h, w, y, "torch"), backend="aot_eager", fullgraph=True)
    loss = compiled(case.hidden, case.weight, case.targets)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):  # torch's own refusal
        torch.autograd.grad(loss, case.hidden, create_graph=True)[0].sum().backward()


@on_backends_in_turn(DIFFERENTIABLE)
def test_T45_the_gradient_itself_is_right_whoever_takes_it(op, case, backend):
    arguments = case.hidden, case.weight, case.targets
    leaves = case.hidden, case.weight
    want = gradients(op(*arguments, backend), *leaves)
    if op is not sequence_loss:
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        bound = 8 * contract((doubles[0] @ doubles[1].T).abs().max().item())
        for got, exact in zip(want, gradients(dense(op, *doubles, case.targets), *doubles), strict=True):
            assert (got - exact).norm() <= bound * exact.norm()
    found = {}
    for reentrant in (True, False):
        again = checkpoint(op, *arguments, backend, use_reentrant=reentrant)
        for x in leaves:
            x.grad = None
        again.backward()
        found[f"checkpoint, reentrant={reentrant}"] = [x.grad for x in leaves]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True) if x.dtype != torch.bfloat16 else x, _unpacked):
        loss = op(*arguments, backend)
    found["saved tensors hooks"] = gradients(loss, *leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = op(*arguments, backend)
    found["saved on the CPU"] = gradients(loss, *leaves)
    scaled = op(*arguments, backend)
    scaled.register_hook(lambda g: 2 * g)
    found["hook"] = [g / 2 for g in gradients(scaled, *leaves)]
    for name, got in found.items():
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), name


def _unpacked(packed):
    return torch.from_numpy(packed) if isinstance(packed, np.ndarray) else packed


@on_backends_in_turn(DIFFERENTIABLE)
def test_T45_several_upstream_gradients_at_once_are_those_one_after_the_other(op, case, backend):
    leaves = case.hidden, case.weight
    loss = op(case.hidden, case.weight, case.targets, backend)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    batched = torch.autograd.grad(loss, leaves, upstream, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(loss, leaves, g, retain_graph=True) for g in upstream]
    for i, got in enumerate(batched):
        torch.testing.assert_close(got, torch.stack([one[i] for one in single]), rtol=8 * torch.finfo(got.dtype).eps, atol=0)


# ---- forward mode


@on_backends_in_turn([*DIFFERENTIABLE, lens])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("tangent_of", ["hidden", "weight"])
def test_T46_a_forward_mode_tangent_raises(op, tangent_of, leaf, case, backend):
    operands = {name: getattr(case, name).detach().requires_grad_(leaf) for name in ("hidden", "weight")}
    with forward_ad.dual_level():
        x = operands[tangent_of]
        operands[tangent_of] = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"tangent given, " + RAISES):
            op(operands["hidden"], operands["weight"], case.targets, backend)
        op(case.hidden.detach(), case.weight.detach(), case.targets, backend)  # those without one may be used beside


@all_ops
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "hessian", "linearize", "jvp of vmap"])
def test_T46_forward_mode_transforms_raise(op, transform, case):
    h = case.hidden.detach()
    ways = {
        "jvp": lambda f: torch.func.jvp(f, (h,), (h,)),
        "jacfwd": lambda f: torch.func.jacfwd(f)(h),
        "hessian": lambda f: torch.func.hessian(f)(h),
        "linearize": lambda f: torch.func.linearize(f, h),
        "jvp of vmap": lambda f: torch.func.jvp(torch.func.vmap(f), (h.expand(2, 6, 5),), (h.expand(2, 6, 5),)),
    }
    with pytest.raises(NotImplementedError, match=f"{RAISES}|by torch.func"):
        ways[transform](lambda h: op(h, case.weight.detach(), case.targets, "torch"))


@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "temperature", "bias"])
def test_T46_a_tangent_of_any_operand_raises(name, case):
    arguments = {"advantages": torch.ones(6), "old_logprobs": torch.ones(6), "temperature": torch.ones(6), "bias": torch.ones(23)}
    with forward_ad.dual_level():
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        with pytest.raises(NotImplementedError, match=f"{name}: a tensor with a forward-mode tangent"):
            linear_policy_loss(case.hidden.detach(), case.weight.detach(), case.targets, **arguments)


@pytest.mark.parametrize("op", first_of([*DIFFERENTIABLE, lens]))
def test_T46_forward_mode_around_a_compiled_call_raises_and_the_call_alone_goes_on(op, case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, y: op(h, w, y, "torch"), backend="aot_eager")
    arguments = case.hidden.detach(), case.weight.detach(), case.targets
    want = compiled(*arguments)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=RAISES):
        compiled(forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])
    with pytest.raises(NotImplementedError, match=RAISES):
        torch.func.jvp(lambda h: compiled(h, *arguments[1:]), arguments[:1], arguments[:1])
    assert torch.equal(compiled(*arguments), want)


# ---- torch.func


@all_ops
@pytest.mark.parametrize("transform", ["grad", "grad_and_value", "vjp", "jacrev", "grad of grad", "vmap of grad", "grad of vmap"])
def test_T47_reverse_mode_transforms_raise(op, transform, case):
    h = case.hidden.detach()
    several = h.expand(2, 6, 5)
    ways = {
        "grad": lambda f: torch.func.grad(f)(h),
        "grad_and_value": lambda f: torch.func.grad_and_value(f)(h),
        "vjp": lambda f: torch.func.vjp(f, h),
        "jacrev": lambda f: torch.func.jacrev(f)(h),
        "grad of grad": lambda f: torch.func.grad(lambda h: torch.func.grad(f)(h).sum())(h),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(several),
        "grad of vmap": lambda f: torch.func.grad(lambda h: torch.func.vmap(f)(h).sum())(several),
    }
    with pytest.raises(NotImplementedError, match=r"by torch\.func"):
        ways[transform](lambda h: op(h, case.weight.detach(), case.targets, "torch"))


@ops
def test_T47_a_transform_of_something_else_is_not_refused_but_would_be_with_a_gradient_of_an_operand(op, case):
    x = torch.ones(3)

    def beside(*operands):
        return lambda x: x.sum() * op(*operands, case.targets, "torch")

    detached = case.hidden.detach(), case.weight.detach()
    value = op(*detached, case.targets, "torch")
    assert torch.equal(torch.func.grad(beside(*detached))(x), value.expand(3))

    def watched(hidden):
        with torch.no_grad():
            of_graph = op(hidden, *detached[1:], case.targets, "torch")
        return (hidden * of_graph).sum() + op(hidden.detach(), *detached[1:], case.targets, "torch")

    assert torch.equal(torch.func.grad(watched)(detached[0]), value.expand(6, 5))
    with pytest.raises(NotImplementedError, match=r"weight: differentiated by torch\.func"):
        torch.func.grad(beside(detached[0], case.weight))(x)


@on_backends_in_turn(DIFFERENTIABLE)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_T47_vmap_gives_the_calls_of_each_sample_and_their_gradients(op, case, backend):
    targets = torch.stack([case.targets, case.targets.flip(0), case.targets.roll(1)])
    hidden = torch.randn(3, 6, 5, requires_grad=True)
    together = torch.func.vmap(lambda h, y: op(h, case.weight, y, backend))(hidden, targets)
    alone = torch.stack([op(h, case.weight, y, backend) for h, y in zip(hidden, targets, strict=True)])
    assert torch.equal(together, alone)
    for a, b in zip(*(gradients(x.sum(), hidden, case.weight) for x in (together, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * contract(10.0) * b.abs().max().item())


def test_T47_the_lens_refuses_vmap(case):
    with pytest.raises(
        NotImplementedError, match=r"hidden_states\[0\]: batched by torch.func.vmap, accepted is the batch as a leading"
    ):
        torch.func.vmap(lambda h: lens(h, case.weight, case.targets, "torch"))(case.hidden.expand(2, 6, 5))


def test_T47_functional_call_of_the_head_gives_the_gradients_of_what_it_is_given(case, backend):
    head = FusedLMHead(5, 23, bias=False)
    found = torch.func.functional_call(head, {"weight": case.weight}, (case.hidden, case.targets), {"backend": backend})
    want = linear_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    leaves = case.hidden, case.weight
    for a, b in zip(gradients(found.logprobs.sum(), *leaves), gradients(want.logprobs.sum(), *leaves), strict=True):
        assert torch.equal(a, b)
    assert head.weight.grad is None


# ---- what no gradient flows to


@pytest.mark.parametrize(
    "name", ["advantages", "old_logprobs", "reference_logprobs", "sampler_logprobs", "temperature", "denominator"]
)
@pytest.mark.parametrize("objective", [PolicyObjective(kl="k3", kl_coefficient=0.1), OVER_SEQUENCES])
def test_T45_an_operand_that_no_gradient_flows_to_is_refused_when_it_wants_one(name, objective, case):
    rows = {"advantages", "old_logprobs", "reference_logprobs", "sampler_logprobs", "temperature"}
    arguments = {x: torch.ones(1, 6) for x in rows} | {"denominator": torch.tensor(6.0), "objective": objective}
    operands = case.hidden[None], case.weight, case.targets[None]
    want, _ = linear_policy_loss(*operands, **arguments)
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires a gradient, accepted is a tensor that does not; detach it"):
        linear_policy_loss(*operands, **arguments)
    with torch.no_grad():
        assert torch.equal(linear_policy_loss(*operands, **arguments)[0], want)


def test_T45_a_divergence_is_a_term_of_a_loss_beside_others(case):
    other = random_case(6, 23, 5, seed=1).hidden.detach()
    kl = linear_divergence(case.hidden, case.weight, other, reduction="mean").divergence
    loss = linear_cross_entropy(case.hidden, case.weight, case.targets) + 0.1 * kl
    z = case.hidden.double() @ case.weight.double().T
    q = (other.double() @ case.weight.detach().double().T).softmax(1)
    want = torch.nn.functional.cross_entropy(z, case.targets) + 0.1 * (q * (q.log() - z.log_softmax(1))).sum(1).mean()
    assert_same_gradients(gradients(loss, case.hidden, case.weight), gradients(want, case.hidden, case.weight), case)


def test_T45_a_lens_asked_for_a_gradient_raises(case):
    with pytest.raises(RuntimeError, match="does not require grad"):
        lens(case.hidden, case.weight, case.targets, "torch").backward()
