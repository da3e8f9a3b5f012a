"""Tensors that are not plain: a frozen quantised weight is read a slice of rows at a time, harmless classes change nothing, and
what cannot be read is refused by name."""

from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from problems import OPTIONS, Case, assert_same_gradients, assert_values, case_with, gradients, random_case
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

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
    reference,
)

MIB = 2**20


class Int8Rows(torch.Tensor):
    """int8 with a scale per row, as torchao keeps it: it knows slices of rows, and refuses ops that it does not know."""

    dequantised: ClassVar[list[int]] = []  # rows of each slice that was asked for

    @staticmethod
    def __new__(cls, rows, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=dtype, device=rows.device)

    def __init__(self, rows, scale, dtype):
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().amax(1, keepdim=True).float() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale, weight.dtype)

    def __repr__(self):  # torch.compile writes down what it traces
        return f"{type(self).__name__}({tuple(self.shape)})"

    def dequantize(self):
        Int8Rows.dequantised.append(len(self.rows))
        return (self.rows * self.scale).to(self.dtype)

    def __tensor_flatten__(self):
        return ["rows", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner, dtype, size, stride):
        return cls(inner["rows"], inner["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, arguments=(), named=None):
        if func in (torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            x, *rest = arguments
            assert not rest or rest[0] == 0
            return cls(func(x.rows, *rest), func(x.scale, *rest), x.dtype)
        raise NotImplementedError(f"Int8Rows: {func}")


class Opaque(Int8Rows):
    """One that is not for reading."""

    def dequantize(self):
        raise NotImplementedError("Opaque: dequantize")


class Misshapen(Int8Rows):
    def dequantize(self):
        return torch.zeros(3, 4)


class Named(nn.Parameter):
    pass


class Plain(torch.Tensor):
    pass


def int8_case(dtype=torch.float32, rows=9, vocab=301, width=16, **options):
    """A case with a frozen weight, and its quantised twin."""
    case = case_with(options, rows=rows, vocab=vocab, width=width, dtype=dtype)
    quantised = Int8Rows.of(case.weight)
    case.weight = quantised.dequantize()
    return case, quantised


# ---- a frozen quantised weight


@pytest.mark.parametrize("budget", [None, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_T48_a_frozen_quantised_weight_is_worth_the_numbers_it_stands_for(name, dtype, budget):
    case, quantised = int8_case(dtype, **OPTIONS[name])
    case.options["memory_budget"] = budget
    ours = linear_logprobs(case.hidden, quantised, case.targets, **case.options)
    assert_values(ours, case)
    leaves = [x for x in (case.hidden, case.options.get("bias")) if x is not None]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    options = case.oracle_options | ({"bias": doubles[1]} if len(doubles) > 1 else {})
    exact = reference.linear_logprobs(doubles[0], case.weight, case.targets, **options)
    got, want = (gradients(x[0].sum() + x[1].sum(), *y) for x, y in ((ours, leaves), (exact, doubles)))
    assert_same_gradients(got, want, case)


@pytest.mark.parametrize("objective", [PolicyObjective(entropy_coefficient=0.1), PolicyObjective(ratio="sequence")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_T48_every_op_gives_what_it_gives_for_the_dequantised_weight(dtype, objective):
    case, quantised = int8_case(dtype)
    hidden, targets, advantages = case.hidden[None], case.targets[None], torch.linspace(-1, 1, 9)[None]

    def all_of(weight):
        loss, metrics = linear_policy_loss(hidden, weight, targets, advantages, objective=objective, backend="torch")
        loss = loss + linear_cross_entropy(hidden, weight, targets, backend="torch")
        seen = logit_lens([hidden, 2 * hidden], weight, targets, backend="torch", outputs=("logprobs", "entropy"))
        more = logit_lens([hidden, 2 * hidden], weight, targets, final=hidden, top_k=3, outputs=("rank", "jsd", "pairwise_kl"))
        kl = linear_divergence(hidden, weight, -hidden, kind="jsd", reduction="mean", backend="torch")
        values = (loss, metrics.entropy, *gradients(loss + kl.divergence, case.hidden), *seen, *more, *kl)
        return [x for x in values if x is not None]

    for a, b in zip(all_of(quantised), all_of(case.weight), strict=True):
        assert torch.equal(a, b)


def test_T48_it_is_dequantised_a_slice_at_a_time_within_the_budget():
    hidden, targets = torch.randn(64, 256, requires_grad=True), torch.randint(0, 20_000, (64,))
    quantised = Int8Rows.of(torch.randn(20_000, 256))  # 20 MB as numbers
    for budget in (2 * MIB, None):
        plan = explain(hidden, quantised, targets, memory_budget=budget)
        assert plan.backend == "torch"
        assert plan.why_not["native"] == "weight: a quantised one given, accepted is a plain Tensor"
        Int8Rows.dequantised.clear()
        kept = []
        forward = peak_bytes(lambda kept=kept, b=budget: kept.append(linear_logprobs(hidden, quantised, targets, memory_budget=b)))
        loss = kept[0].logprobs.sum()
        backward = peak_bytes(lambda kept=kept, loss=loss: kept.append(gradients(loss, hidden)))
        assert max(Int8Rows.dequantised) <= plan.tile_plan.tile.columns < 20_000
        assert sum(Int8Rows.dequantised) <= 2 * (20_000 + 1)  # once forward, once backward, and a look at the first
        memory = plan.tile_plan.memory
        assert 0.6 * memory.forward <= forward <= memory.forward + 3 * 64 * 4
        assert 0.6 * memory.backward <= backward <= memory.backward + hidden.nbytes
        assert memory.working <= plan.problem.memory_budget
        if budget:
            lens = peak_bytes(lambda b=budget: logit_lens([hidden], quantised, targets, outputs=("rank",), memory_budget=b))
            assert lens <= budget


def test_T48_a_quantised_head_answers_and_goes_on_under_autocast():
    head = FusedLMHead(16, 301, bias=False)
    head.weight = nn.Parameter(Int8Rows.of(head.weight), requires_grad=False)
    hidden, targets = torch.randn(9, 16), torch.randint(0, 301, (9,))
    case = Case(hidden, head.weight.data.dequantize(), targets)
    assert_values(head(hidden, targets), case)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden, targets)
    assert_values(found, Case(hidden.bfloat16(), case.weight, targets))


def test_T48_a_weight_that_torch_has_quantised_works_where_its_rows_can_be_taken():
    case = random_case(9, 301, 16)
    per_tensor = torch.quantize_per_tensor(case.weight.detach(), 0.01, 0, torch.qint8)
    assert_values(linear_logprobs(case.hidden, per_tensor, case.targets), Case(case.hidden, per_tensor.dequantize(), case.targets))
    per_row = torch.quantize_per_channel(case.weight.detach(), torch.full((301,), 0.01), torch.zeros(301), 0, torch.qint8)
    with pytest.raises(TypeError, match=r"weight: torch.qint8 given, accepted is a Tensor whose numbers lie in memory"):
        linear_logprobs(case.hidden, per_row, case.targets)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_T48_a_head_that_torchao_has_quantised(config, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    head = FusedLMHead(64, 301, bias=False).to(dtype)
    quantization.quantize_(head, getattr(quantization, config)())
    assert type(head.weight) not in (nn.Parameter, torch.Tensor)
    hidden, targets = torch.randn(9, 64, dtype=dtype, requires_grad=True), torch.randint(0, 301, (9,))
    case = Case(hidden, head.weight.dequantize(), targets)
    ours, dense = head(hidden, targets), linear_logprobs(hidden, case.weight, targets, backend="torch")
    assert_values(ours, case)
    assert_same_gradients(gradients(ours.logprobs.sum(), hidden), gradients(dense.logprobs.sum(), hidden), case)


@pytest.mark.parametrize("kind", [Opaque, Misshapen])
def test_T48_a_weight_that_cannot_be_read_is_refused_by_name(kind):
    case = random_case(9, 30, 16)
    weight = kind.of(case.weight)
    accepted = r"accepted is a Tensor whose numbers lie in memory \(strided\), or one that is frozen and of which"
    for call in (linear_logprobs, explain, linear_cross_entropy):
        with pytest.raises(TypeError, match=rf"weight: {kind.__name__} of torch.float32 given, .*{accepted}"):
            call(case.hidden, weight, case.targets)


def test_T48_a_quantised_weight_that_wants_a_gradient_is_refused():
    case, quantised = int8_case()
    quantised.requires_grad_()
    with pytest.raises(TypeError, match=r"weight: Int8Rows of torch.float32 that requires a gradient given, .* one that is frozen"):
        linear_logprobs(case.hidden, quantised, case.targets)
    with torch.no_grad():
        assert_values(linear_logprobs(case.hidden, quantised, case.targets), case)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_T48_other_backends_say_that_they_take_no_quantised_weight(backend):
    case, quantised = int8_case()
    with pytest.raises(ValueError, match="it cannot run this: weight: a quantised one given, accepted is a plain Tensor"):
        linear_logprobs(case.hidden, quantised, case.targets, backend=backend)


def test_T48_a_quantised_weight_within_torch_compile_is_refused_by_name_or_runs_beside_the_graph():
    case, quantised = int8_case()
    torch._dynamo.reset()

    def call(hidden, weight, targets):
        return linear_logprobs(hidden * 2, weight, targets).logprobs

    with pytest.raises(Exception, match=r"weight: Int8Rows of torch.float32 given, accepted within torch.compile is a Tensor"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(case.hidden, quantised, case.targets)
    found = torch.compile(call, backend="aot_eager")(case.hidden, quantised, case.targets)
    assert torch.equal(found, call(case.hidden, quantised, case.targets))


# ---- harmless ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_T48_harmless_classes_and_views_give_what_their_numbers_give(dtype, backend):
    case = random_case(9, 30, 16, dtype=dtype)
    hidden, weight, targets = case.hidden.detach(), case.weight.detach(), case.targets
    imaginary = torch.randn(9, 16, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    same = [
        ((hidden, Named(weight), targets), (hidden, weight, targets)),
        ((hidden, nn.Buffer(weight), targets), (hidden, weight, targets)),
        ((hidden.as_subclass(Plain), weight.as_subclass(Plain), targets.as_subclass(Plain)), (hidden, weight, targets)),
        ((AsyncCollectiveTensor(hidden), weight, targets), (hidden, weight, targets)),
        ((hidden, torch._neg_view(weight), targets), (hidden, -weight, targets)),
        ((imaginary, weight.float(), targets), (imaginary.clone(), weight.float(), targets)),
        ((hidden, torch._efficientzerotensor((30, 16), dtype=dtype), targets), (hidden, torch.zeros(30, 16, dtype=dtype), targets)),
    ]
    for unusual, usual in same:
        a, b = (linear_logprobs(*x, backend=backend) for x in (unusual, usual))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_T48_a_parameter_of_a_class_of_its_own_gets_its_gradient(backend):
    case = random_case(9, 30, 16)
    weight = Named(case.weight.detach().clone())
    ours = linear_logprobs(case.hidden, weight, case.targets, backend=backend)
    usual = linear_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    (a,), (b,) = gradients(ours.logprobs.sum(), weight), gradients(usual.logprobs.sum(), case.weight)
    assert torch.equal(a, b)


def test_T48_fake_tensors_give_shapes_forward_and_backward():
    with FakeTensorMode():
        hidden, weight = torch.randn(2, 7, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
        targets = torch.zeros(2, 7, dtype=torch.int64)
        found = linear_logprobs(hidden, weight, targets)
        loss, _ = linear_policy_loss(hidden, weight, targets, torch.ones(2, 7))
        of_hidden, of_weight = torch.autograd.grad(found.logprobs.sum() + loss, (hidden, weight))
    assert found.entropy.shape == (2, 7)
    assert (of_hidden.shape, of_weight.shape) == (hidden.shape, weight.shape)


# ---- refused by name

NESTED = [torch.randn(3, 16), torch.randn(2, 16)]
REFUSED = {
    "a wrapper": (
        "hidden",
        lambda x: Int8Rows.of(x),
        "hidden: Int8Rows of torch.float32 given, accepted is a Tensor whose numbers",
    ),
    "nested": ("hidden", lambda x: torch.nested.nested_tensor(NESTED), "hidden: nested Tensor of torch.float32 given"),
    "jagged": (
        "hidden",
        lambda x: torch.nested.nested_tensor(NESTED, layout=torch.jagged),
        "hidden: jagged NestedTensor of torch.float32 given",
    ),
    "masked": ("hidden", lambda x: torch.masked.masked_tensor(x, x > 0), "hidden: MaskedTensor of torch.float32 given"),
    "meta": ("all", lambda x: x.to("meta"), "hidden: on meta, accepted are devices with memory; for shapes alone use torch's Fake"),
    "a meta weight": ("weight", lambda x: x.to("meta"), "weight: on meta, accepted is the device of hidden, cpu"),
    "sparse": ("weight", lambda x: x.to_sparse(), "weight: sparse_coo Tensor of torch.float32 given"),
    "sparse rows": ("weight", lambda x: x.to_sparse_csr(), "weight: sparse_csr Tensor of torch.float32 given"),
    "uninitialised": (
        "weight",
        lambda x: nn.UninitializedParameter(),
        "weight: UninitializedParameter given, accepted is one with a",
    ),
    "packed 4 bit": (
        "weight",
        lambda x: Named(torch.zeros(240, 1, dtype=torch.uint8), requires_grad=False),
        "weight: Named of torch.uint8 given, accepted are torch.float32",
    ),
    "float8": ("weight", lambda x: x.to(torch.float8_e4m3fn), "weight: torch.float8_e4m3fn given, accepted are torch.float32"),
    "sparse targets": ("targets", lambda x: x.to_sparse(), "targets: sparse_coo Tensor of torch.int64 given"),
    "sparse mask": ("mask", lambda x: torch.ones(5, dtype=torch.bool).to_sparse(), "mask: sparse_coo Tensor of torch.bool given"),
    "quantised bias": (
        "bias",
        lambda x: torch.quantize_per_tensor(torch.ones(30), 0.1, 0, torch.qint8),
        "bias: torch.qint8 given, accepted is a Tensor whose numbers",
    ),
    "a wrapped temperature": (
        "temperature",
        lambda x: Int8Rows(torch.ones(5, 1), torch.ones(5, 1), torch.float32),
        "temperature: Int8Rows of torch.float32 given",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")  # of torch, about what it is asked to make
def test_T48_what_cannot_be_read_is_refused_by_name(name):
    argument, unusual, message = REFUSED[name]
    case = random_case(5, 30, 16)
    arguments = {"hidden": case.hidden.detach(), "weight": case.weight.detach(), "targets": case.targets}
    for changed in arguments if argument == "all" else [argument]:
        arguments[changed] = unusual(arguments.get(changed))
    hidden, weight, targets = (arguments.pop(x) for x in ("hidden", "weight", "targets"))
    calls = [
        lambda: linear_logprobs(hidden, weight, targets, **arguments),
        lambda: linear_policy_loss(hidden, weight, targets, torch.ones(5), **arguments),
        lambda: logit_lens([hidden], weight, targets, outputs=("rank",), **arguments),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert message.replace("hidden:", "") in str(error.value)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_T48_sharded_and_replicated_weights_work_and_other_tensors_of_a_mesh_are_refused_by_name(mesh):
    case = random_case(5, 30, 16)
    usual = linear_logprobs(case.hidden, case.weight, case.targets)
    (want,) = gradients(usual.logprobs.sum(), case.weight)
    for placement in (Shard(0), Shard(1), Replicate()):
        weight = distribute_tensor(case.weight.detach(), mesh, [placement]).requires_grad_()
        ours = linear_logprobs(case.hidden, weight, case.targets)
        assert torch.equal(ours.logprobs, usual.logprobs)
        assert torch.equal(gradients(ours.logprobs.sum(), weight)[0].full_tensor(), want)
    with pytest.raises(TypeError, match=r"weight: a DTensor of P.*sum.* given, accepted are Shard and Replicate"):
        linear_logprobs(case.hidden, DTensor.from_local(case.weight.detach(), mesh, [Partial()]), case.targets)
    hidden = distribute_tensor(case.hidden.detach(), mesh, [Shard(0)])
    with pytest.raises(TypeError, match="hidden: a DTensor given, accepted is a plain Tensor"):
        linear_logprobs(hidden, case.weight, case.targets)
    with pytest.raises(TypeError, match=r"hidden_states\[0\]: DTensor of torch.float32 given, accepted is a Tensor whose numbers"):
        logit_lens([hidden], case.weight, case.targets)
    advantages = distribute_tensor(torch.ones(5), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"advantages: DTensor of torch.float32 given, accepted is a Tensor whose numbers"):
        linear_policy_loss(case.hidden, case.weight, case.targets, advantages)


@pytest.mark.parametrize("name", ["advantages", "old_logprobs"])
def test_T48_what_comes_per_row_is_refused_by_name(name):
    case = random_case(5, 30, 16)
    arguments = {"advantages": torch.ones(5), name: torch.ones(5).to_sparse()}
    with pytest.raises(TypeError, match=f"{name}: sparse_coo Tensor of torch.float32 given"):
        linear_policy_loss(case.hidden, case.weight, case.targets, **arguments)
