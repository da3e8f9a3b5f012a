"""Nothing depends on torch's default dtype or device, kernels are handed only what they can read, and any size may be 0."""

import ast
from pathlib import Path

import pytest
import test_hostile_values
import torch
from problems import OPTIONS, case_with, contract, first_of, leaves
from test_hostile_values import on

import bupo_kernels
from bupo_kernels import (
    FusedLMHead,
    PolicyObjective,
    explain,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    logit_lens,
)
from bupo_kernels.backends import compiled
from bupo_kernels.backends.compiled import address
from bupo_kernels.integrations.functional import (
    apple_linear_cross_entropy,
    liger_fused_linear_cross_entropy,
    torch_linear_cross_entropy,
    verl_linear_cross_entropy,
)
from bupo_kernels.lens import LENS_OUTPUTS

backend, on_gpu, emulated = test_hostile_values.backend, test_hostile_values.on_gpu, test_hostile_values.emulated  # fixtures
FP32, BF16 = torch.float32, torch.bfloat16
OBJECTIVES = {
    "grpo": PolicyObjective(aggregation="sequence-mean-token-mean", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.01),
    "gspo": PolicyObjective(ratio="sequence", aggregation="sequence-mean-token-mean"),
    "dr_grpo": PolicyObjective(aggregation="sequence-mean-token-sum-norm", max_length=7),
}

# ---- defaults


@pytest.fixture(params=[BF16, "meta", *(pytest.param(x, marks=pytest.mark.broad) for x in (torch.float16, torch.float64))], ids=str)
def defaults(request):
    """Sets one of torch's defaults when called; both are as before when the test ends."""

    def change():
        torch.set_default_device("meta") if request.param == "meta" else torch.set_default_dtype(request.param)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(FP32)


def everything(case, backend: str, given: dict[str, torch.Tensor], upstream: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every op gives for [5, 8] rows: values and gradients."""
    found, operands = {}, leaves(case)
    options = {k: v if k == "bias" or not isinstance(v, torch.Tensor) else v.view(5, 8) for k, v in case.options.items()}
    rows = case.hidden.view(5, 8, -1), case.weight, case.targets.view(5, 8)

    def keep(name: str, values, loss) -> None:
        found.update({f"{name} {i}": x.detach() for i, x in enumerate(values)})
        found.update({f"{name} gradient {i}": g for i, g in enumerate(torch.autograd.grad(loss, operands))})

    out = linear_logprobs(*rows, backend=backend, **options)
    keep("logprobs", out, sum((g * x).sum() for g, x in zip(upstream, out, strict=True)))
    loss = linear_cross_entropy(*rows, backend=backend, **options)
    keep("cross entropy", [loss], loss)
    for name, objective in OBJECTIVES.items():
        by_row = {k: v for k, v in given.items() if k != "reference_logprobs" or objective.needs_reference}
        loss, metrics = linear_policy_loss(*rows, **by_row, objective=objective, backend=backend, **options)
        keep(name, [loss, *metrics], loss)
    if backend == "torch":
        options = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        hidden, weight, targets = (x.detach() for x in rows)
        final = hidden.flip(0)
        lens = logit_lens([hidden, final], weight, targets, final=final, outputs=LENS_OUTPUTS, top_k=3, **options)
        found.update(lens._asdict())
        found["divergence"] = linear_divergence(hidden, weight, final, kind="jsd", **options).divergence
    return found


@on(dtypes=(FP32, BF16))
@pytest.mark.parametrize("options", first_of(["everything", *(name for name in OPTIONS if name != "everything")]))
def test_no_op_depends_on_the_default_dtype_or_device(backend, dtype, options, defaults):
    if backend.startswith("triton") and options != ("everything" if backend == "triton" else "temperature per row"):
        pytest.skip("the interpreter takes its time")
    case = case_with(OPTIONS[options], 40, 70, 16, dtype=dtype)
    names = ("advantages", "old_logprobs", "reference_logprobs")
    given = {name: torch.randn(5, 8) - 4 * (name != "advantages") for name in names}
    upstream = [torch.randn(5, 8) for _ in range(3)]
    want = everything(case, backend, given, upstream)
    defaults()
    found = everything(case, backend, given, upstream)
    for name, value in want.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].device == value.device, name
        assert torch.equal(found[name].isnan(), value.isnan()), name
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


def test_peers_signatures_do_not_depend_on_them_either(defaults):
    hidden, weight, targets = torch.randn(20, 16), torch.randn(70, 16), torch.randint(0, 70, (20,))
    factors, head = torch.rand(70), FusedLMHead(16, 70)

    def all_of_them():
        return [
            liger_fused_linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1, lse_square_scale=0.01),
            torch_linear_cross_entropy(hidden, weight, targets, weight=factors, label_smoothing=0.2),
            apple_linear_cross_entropy(hidden, weight, targets),
            *verl_linear_cross_entropy(hidden, weight, targets),
            *head(hidden, targets),
        ]

    want = all_of_them()
    defaults()
    for a, b in zip(all_of_them(), want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


FACTORIES = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "as_tensor",
    "eye",
    "linspace",
    "rand",
    "randn",
    "randint",
    "randperm",
}


def test_every_tensor_is_made_with_a_dtype_and_on_a_device():
    # The one rule that keeps out what the tests above can only meet by chance.
    made = 0
    for path in Path(bupo_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                made += 1
                missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
                assert not missing, f"{path}:{node.lineno}: torch.{node.func.attr} without {missing}"
    assert made > 20


# ---- what kernels are handed


def test_memory_that_a_kernel_could_write_past_is_refused():
    right = torch.zeros(64)
    assert address(right, FP32, 64) == right.data_ptr()
    assert address(None, FP32, 64) == 0
    with pytest.raises(TypeError, match=r"torch.bfloat16 given, accepted is torch.float32"):
        address(right.bfloat16(), FP32)
    with pytest.raises(ValueError, match="on meta given, accepted is cpu"):
        address(right.to("meta"), FP32)
    with pytest.raises(ValueError, match=r"accepted are 65 or more side by side"):
        address(right, FP32, 65)
    with pytest.raises(ValueError, match=r"with strides \(2,\) given"):
        address(right[::2], FP32, 32)


@on(dtypes=(FP32, BF16))
def test_a_bias_may_be_any_view(backend, dtype):
    case, wide = case_with({}, 40, 70, 16, dtype=dtype), torch.randn(70, 2)
    found = []
    for bias in (wide[:, 0].clone(), wide[:, 0]):
        bias = bias.requires_grad_()
        out = linear_logprobs(case.hidden, case.weight, case.targets, bias=bias, backend=backend)
        found.append([*out, *torch.autograd.grad(sum(x.sum() for x in out), (case.hidden, case.weight, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(compiled.built is None, reason="the C++ kernels were not built")
def test_the_bindings_refuse_sizes_and_pointers_that_cannot_be():
    kernels = compiled.kernels("portable")
    z, y = torch.zeros(32, 70), torch.zeros(32, dtype=torch.int32)
    running = torch.zeros(4, 32)
    right = {
        "products": address(z),
        "stride": 70,
        "rows": 32,
        "columns": 70,
        "first": 0,
        "bias": 0,
        "outer": 0,
        "inner": 1.0,
        "softcap": False,
        "targets": address(y),
        "running": address(running),
        "running_stride": 32,
        "threads": 1,
    }
    kernels.row_statistics(*right.values())
    wrong = {"products": [0, 2], "stride": [69], "rows": [-1], "columns": [0], "bias": [1], "targets": [0], "running": [0]}
    wrong |= {"running_stride": [31], "threads": [0, -1]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="a kernel's arguments: accepted are"):
                kernels.row_statistics(*(right | {name: value}).values())


# ---- sizes of 0


def zero_gradients(loss, *operands) -> None:
    assert loss == 0
    found = torch.autograd.grad(loss, operands)
    for gradient, operand in zip(found, operands, strict=True):
        assert gradient.shape == operand.shape
        assert gradient.dtype == operand.dtype
        assert (gradient == 0).all()


@on()
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (0, 0), (2, 0, 3), (2, 3, 0)], ids=str)
def test_no_row_is_zero_with_zero_gradients_in_every_op(backend, dtype, shape):
    hidden, weight = torch.randn(*shape, 8).to(dtype).requires_grad_(), torch.randn(33, 8).to(dtype).requires_grad_()
    bias, targets = torch.randn(33, requires_grad=True), torch.zeros(shape, dtype=torch.int64)
    operands, options = (hidden, weight, bias), {"bias": bias, "backend": backend}
    out = linear_logprobs(hidden, weight, targets, **options)
    assert {x.shape for x in out} == {torch.Size(shape)}
    zero_gradients(sum(x.sum() for x in out), *operands)
    for reduction in ("mean", "sum", "none"):
        zero_gradients(linear_cross_entropy(hidden, weight, targets, reduction=reduction, **options).sum(), *operands)
    for name, objective in {"ppo": PolicyObjective(), **OBJECTIVES}.items():
        if len(shape) == 1 and name != "ppo":
            continue  # of sequences
        given = {"reference_logprobs": torch.zeros(shape)} if objective.needs_reference else {}
        for advantages in (torch.zeros(shape), torch.zeros(*shape[:-1], 1)):
            loss, metrics = linear_policy_loss(
                hidden, weight, targets, advantages, old_logprobs=torch.zeros(shape), objective=objective, **given, **options
            )
            zero_gradients(loss, *operands)
            assert metrics.active_rows == metrics.entropy == metrics.clipped_low == 0
            assert metrics.ratio_mean == metrics.ratio_min == metrics.ratio_max == 1
    lens = logit_lens([hidden, hidden], weight, targets, outputs=("entropy", "logprobs"), backend=backend)
    assert lens.entropy.shape == lens.logprobs.shape == (2, *shape)
    assert explain(hidden, weight, targets, **options).problem.active_rows == 0


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 0)], ids=str)
def test_no_row_in_every_output_of_the_lens(shape):
    hidden, weight = torch.randn(*shape, 8), torch.randn(33, 8)
    found = logit_lens([hidden] * 2, weight, torch.zeros(shape, dtype=torch.int64), final=hidden, outputs=LENS_OUTPUTS, top_k=3)
    for name, value in found._asdict().items():
        front, back = (2, 2) if name == "pairwise_kl" else (2,), (3,) if name.startswith("top_") else ()
        assert value.shape == (*front, *shape, *back), name
    for reduction in ("none", "mean"):
        assert linear_divergence(hidden, weight, hidden, reduction=reduction).per_row.shape == shape


@pytest.mark.parametrize("shape", first_of([[2, 0], [0], [3, 4]]), ids=str)
def test_a_compiled_graph_takes_no_row_too(shape):
    weight = torch.randn(33, 8, requires_grad=True)
    hidden, targets = torch.randn(*shape, 8, requires_grad=True), torch.zeros(shape, dtype=torch.int64)

    def loss_of(hidden, weight, targets):
        return linear_policy_loss(hidden, weight, targets, torch.ones(targets.shape))[0]

    loss = torch.compile(loss_of, backend="eager", fullgraph=True, dynamic=True)(hidden, weight, targets)
    assert torch.equal(loss, loss_of(hidden, weight, targets))
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16, torch.float64], ids=str)
def test_without_width_the_policy_is_that_of_the_bias(dtype):
    hidden, weight = torch.randn(3, 0, dtype=dtype, requires_grad=True), torch.randn(5, 0, dtype=dtype, requires_grad=True)
    bias, targets = torch.randn(5, requires_grad=True), torch.tensor([0, 4, 2])
    out = linear_logprobs(hidden, weight, targets, bias=bias)
    d_hidden, d_weight, d_bias = torch.autograd.grad(out.logprobs.sum(), (hidden, weight, bias))
    log_p = bias.double().log_softmax(0)
    bound = contract(bias.abs().max().item())
    assert (out.logprobs.double() - log_p[targets]).abs().max() <= bound
    assert (d_bias.double() - torch.tensor([1.0, 0, 1, 0, 1]) + 3 * log_p.exp()).abs().max() <= 8 * bound
    assert d_hidden.shape == (3, 0)
    assert d_weight.shape == (5, 0)
    for name in ("native", "triton"):
        with pytest.raises(ValueError, match=f"backend: '{name}' given, it cannot run this"):
            linear_logprobs(hidden, weight, targets, bias=bias, backend=name)


def test_a_vocabulary_without_a_word_is_refused():
    with pytest.raises(ValueError, match=r"weight: shape \(0, 8\) given, accepted is \[V, D\] with D = 8, .* at least one row"):
        linear_logprobs(torch.randn(0, 8), torch.randn(0, 8), torch.zeros(0, dtype=torch.int64))
