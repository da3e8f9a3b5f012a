"""Other libraries' signatures: spelt as theirs; values and gradients of plain float64 torch, and of the peers themselves."""

import ast
import importlib
import importlib.util
import inspect
import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import contract
from ranks import on_ranks
from torch import Tensor

from bupo.measurement import peak_bytes
from bupo_kernels.integrations import functional as adapters
from bupo_kernels.integrations.functional import (
    FusedLinearForPPO,
    LigerFusedLinearScaledCrossEntropyFunction,
    apple_linear_cross_entropy,
    liger_fused_linear_cross_entropy,
    torch_linear_cross_entropy,
    verl_linear_cross_entropy,
)

ROWS, VOCAB, WIDTH = 12, 23, 8
REDUCTIONS = ("mean", "sum", "none")
scaled = LigerFusedLinearScaledCrossEntropyFunction.apply


class Problem:
    """Operands in float64: leaves ``hidden [N, D]``, ``weight [V, D]``, ``bias [V]``, and ``targets [N]`` with two ignored."""

    def __init__(self, dtype=torch.float64, ignored=(0, 7)):
        self.hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
        self.weight = torch.randn(VOCAB, WIDTH).to(dtype).requires_grad_()
        self.bias = torch.randn(VOCAB).to(dtype).requires_grad_()
        self.targets = torch.randint(0, VOCAB, (ROWS,))
        self.targets[list(ignored)] = -100
        self.class_weights = torch.rand(VOCAB).to(dtype)

    @property
    def counts(self) -> Tensor:
        return self.targets != -100

    def logits(self, bias=None, softcap=None, temperature=1.0) -> Tensor:
        z = F.linear(self.hidden, self.weight, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z / temperature

    def logprobs_and_entropy(self, temperature=1.0) -> tuple[Tensor, Tensor]:
        """Of verl's torch backend, in plain torch; 0 on ignored rows."""
        log_p = self.logits(temperature=temperature).log_softmax(-1)
        chosen = log_p.gather(1, self.targets.clamp(min=0)[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        return tuple(x.masked_fill(~self.counts, 0) for x in (chosen, entropy))


def outputs_of(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def total(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum(x.sum() for x in outputs_of(results))


def assert_same(ours, theirs, problem: Problem, dtype: torch.dtype = torch.float64) -> None:
    """Values, and the gradients of a random combination of them, relative to the largest; None only in both. Either side is off by
    the contract in its log-probs, for statistics in ``dtype``, and by some times that in what is made of them."""
    tolerance = 2 * 8 * contract(problem.logits(problem.bias).abs().max().item(), dtype=dtype)
    ours, theirs = outputs_of(ours), outputs_of(theirs)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    upstream = [torch.randn(x.shape, dtype=torch.float64) for x in ours]
    leaves = problem.hidden, problem.weight, problem.bias
    found = []
    for outputs in (ours, theirs):
        loss = sum((x.double() * g).sum() for x, g in zip(outputs, upstream, strict=True))
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True))
    for a, b in itertools.chain(zip(ours, theirs, strict=True), zip(*found, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


# ---- signatures

SIGNATURES = {
    scaled: "(_input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False, "
    "selected_token_ids=None)",
    liger_fused_linear_cross_entropy: "(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, "
    "label_smoothing=0.0, reduction='mean', softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False, "
    "return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1)",
    verl_linear_cross_entropy: "(hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None)",
    FusedLinearForPPO.__init__: "(self, chunk_size=512, impl_backend='torch')",
    FusedLinearForPPO.forward: "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",
    apple_linear_cross_entropy: "(e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction='mean', shift=0, "
    "return_lse=False, filter_eps='auto', accum_e_fp32=False, accum_c_fp32=False, filter_e_grad=True, filter_c_grad=True, "
    "impl='cce', vocab_parallel_options=None)",
    torch_linear_cross_entropy: "(input, linear_weight, target, *, linear_bias=None, weight=None, reduction='mean', "
    "ignore_index=None, label_smoothing=0.0, options=None)",
}


def spelt(function, skip=()) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in skip]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signature_is_the_one_written_down(function):
    assert spelt(function) == SIGNATURES[function]


def installed(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported: {error}")


def verl_module(path: str):
    """One of verl's files that need torch only, without ``import verl``, which needs ray and tensordict."""
    if (package := importlib.util.find_spec("verl")) is None:
        pytest.skip("verl is not installed")
    spec = importlib.util.spec_from_file_location("of_verl", Path(package.origin).parent / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_signatures_of_liger_are_the_installed_ones():
    ops = installed("liger_kernel.ops")
    from liger_kernel.transformers import functional

    assert spelt(ops.LigerFusedLinearScaledCrossEntropyFunction.apply) == spelt(scaled)
    assert spelt(functional.liger_fused_linear_cross_entropy) == spelt(liger_fused_linear_cross_entropy)
    assert functional.CrossEntropyOutput.__match_args__ == adapters.CrossEntropyOutput.__match_args__


def test_signatures_of_verl_are_the_installed_ones():
    theirs = verl_module("utils/experimental/torch_functional.py").FusedLinearForPPO
    assert spelt(theirs.__init__) == spelt(FusedLinearForPPO.__init__)
    assert spelt(theirs.forward) == spelt(FusedLinearForPPO.forward)
    kernel = verl_module("utils/kernel/linear_cross_entropy.py").LinearCrossEntropy
    assert spelt(kernel.forward, skip=("ctx",)) == spelt(verl_linear_cross_entropy)


def test_signature_of_apple_is_the_installed_one():
    cce = installed("cut_cross_entropy")
    theirs = inspect.signature(cce.linear_cross_entropy).parameters
    ours = inspect.signature(apple_linear_cross_entropy).parameters
    if "bias" not in theirs:  # 25.1.1, by keyword
        assert [name for name in theirs if name not in ours] == []
    else:
        assert list(theirs) == list(ours)
        assert all(p.default == ours[name].default for name, p in theirs.items() if name != "impl")


def test_signature_of_torch_is_the_installed_one():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    assert spelt(F.linear_cross_entropy) == spelt(torch_linear_cross_entropy)


def test_the_adapters_import_no_peer():
    nodes = ast.walk(ast.parse(Path(adapters.__file__).read_text()))
    names = [
        n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    assert {name.partition(".")[0] for name in names} == {"__future__", "dataclasses", "torch", "bupo_kernels"}


# ---- Liger


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("ids", [None, [4, 0, 4, 22]])
def test_liger_scaled_cross_entropy_is_plain_torch(temperature, entropy, ids):
    p = Problem()
    ids = None if ids is None else torch.tensor(ids)
    ours = scaled(p.hidden, p.weight, p.targets, temperature, -100, 1, entropy, ids)
    logprobs, entropies = p.logprobs_and_entropy(temperature)
    theirs = [-logprobs] + [entropies] * entropy
    if ids is not None:
        theirs.append(p.logits(temperature=temperature).log_softmax(-1)[:, ids].masked_fill(~p.counts[:, None], 0))
    assert isinstance(ours, tuple) == (len(theirs) > 1)
    assert_same(ours, theirs, p)


def liger_in_plain_torch(
    p: Problem, reduction="mean", bias=None, ce_weight=None, scale=0.0, smoothing=0.0, softcap=None, token_scaling=False
):
    z = p.logits(bias, softcap)
    losses = F.cross_entropy(z, p.targets, weight=ce_weight, label_smoothing=smoothing, reduction="none")
    lse2 = scale * (z.logsumexp(1) ** 2).masked_fill(~p.counts, 0)
    if reduction == "mean":
        total = p.counts.sum() if ce_weight is None else ce_weight[p.targets[p.counts]].sum()
        losses, lse2 = losses / total, lse2 / p.counts.sum()
    losses = losses + lse2
    if token_scaling:
        chosen = z.softmax(1).gather(1, p.targets.clamp(min=0)[:, None]).squeeze(1).detach()
        losses, lse2 = losses * chosen, lse2 * chosen
    return (losses, lse2) if reduction == "none" else (losses.sum(), lse2.sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "smoothing": 0.2},
        {"ce_weight": True, "scale": 0.1},
        {"bias": True, "ce_weight": True, "smoothing": 0.3, "scale": 0.05, "token_scaling": True},
        {"softcap": 2.0, "scale": 0.1, "bias": True},
        {"smoothing": 1.0},
    ],
    ids=str,
)
def test_liger_cross_entropy_is_plain_torch(options, reduction):
    p = Problem()
    options = options | {k: v for k, v in (("bias", p.bias), ("ce_weight", p.class_weights)) if options.get(k)}
    theirs, z_loss = liger_in_plain_torch(p, reduction, **options)
    renamed = {"scale": "lse_square_scale", "smoothing": "label_smoothing", "token_scaling": "use_token_scaling"}
    given = {renamed.get(k, k): v for k, v in options.items()}
    assert_same(liger_fused_linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, **given), theirs, p)
    out = liger_fused_linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, return_z_loss=True, **given)
    torch.testing.assert_close((out.loss, out.z_loss), (theirs, z_loss.detach()))
    assert not out.z_loss.requires_grad
    assert (out.token_accuracy, out.predicted_tokens) == (None, None)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_liger_predictions_are_the_argmax(reduction):
    p = Problem()
    best = p.logits(p.bias).argmax(1)
    p.targets[3:6] = best[3:6]
    options = {"bias": p.bias, "return_token_accuracy": True, "return_predicted_tokens": True}
    out = liger_fused_linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, **options)
    assert out.predicted_tokens.tolist() == best.where(p.counts, -1).tolist()
    hits = ((best == p.targets) & p.counts).float()
    torch.testing.assert_close(out.token_accuracy, hits if reduction == "none" else hits.sum() / p.counts.sum())
    assert out.z_loss is None


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "label_smoothing": 0.2}, {"lse_square_scale": 0.1, "use_token_scaling": True}]
)
def test_liger_cross_entropy_is_ligers_own(options):
    """Its Triton kernel in the interpreter, where a class weight or a softcap does not run."""
    functional = installed("liger_kernel.transformers.functional")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton does not run in its interpreter")
    p = Problem(torch.float32)
    options = options | ({"bias": p.bias} if "bias" in options else {})
    asked = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    for reduction in REDUCTIONS:
        both = [
            f(p.hidden, p.weight, p.targets, reduction=reduction, **options, **asked)
            for f in (liger_fused_linear_cross_entropy, functional.liger_fused_linear_cross_entropy)
        ]
        assert_same(both[0].loss, both[1].loss, p, torch.float32)
        for name in ("z_loss", "token_accuracy", "predicted_tokens"):
            torch.testing.assert_close(getattr(both[0], name), getattr(both[1], name))


def test_liger_scaled_cross_entropy_is_ligers_own():
    ops = installed("liger_kernel.ops")
    p = Problem()
    arguments = p.hidden, p.weight, p.targets, 0.7, -100, 2, True, torch.tensor([3, 3, 1])
    theirs = ops.LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments)  # its statistics are fp32, of float64 logits
    assert_same(scaled(*arguments), theirs, p, torch.float32)


# ---- verl


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_verl_cross_entropy_gives_logprobs_not_losses_and_flat(reduction):
    p = Problem()
    logprobs, entropy = p.logprobs_and_entropy(0.7)
    want = {"none": logprobs, "sum": logprobs.sum(), "mean": logprobs.sum() / p.counts.sum()}[reduction]
    hidden, labels = p.hidden.view(3, 4, WIDTH), p.targets.view(3, 4)
    assert_same(verl_linear_cross_entropy(hidden, p.weight, labels, 0.7, reduction.upper()), (want, entropy), p)


@pytest.mark.parametrize("chunk_size", [512, 3])
def test_fused_linear_for_ppo_keeps_the_shape(chunk_size):
    p = Problem()
    head = FusedLinearForPPO(chunk_size, impl_backend="liger")
    theirs = [x.view(3, 4) for x in p.logprobs_and_entropy(0.7)]
    assert_same(head(p.hidden.view(3, 4, WIDTH), p.weight, p.targets.view(3, 4).int(), temperature=0.7), theirs, p)


def test_fused_linear_for_ppo_is_verls_own():
    theirs = verl_module("utils/experimental/torch_functional.py").FusedLinearForPPO()
    p = Problem(torch.float32, ignored=())
    arguments = p.hidden.view(3, 4, WIDTH), p.weight, p.targets.view(3, 4), 0.7
    assert_same(FusedLinearForPPO()(*arguments), theirs(*arguments), p, torch.float32)


# ---- Apple


@pytest.mark.parametrize("shift", [0, False, True, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_apple_cross_entropy_is_plain_torch(reduction, shift, softcap):
    p = Problem()
    hidden, targets = p.hidden.view(3, 4, WIDTH), p.targets.view(3, 4)
    z = p.logits(p.bias, softcap).view(3, 4, VOCAB)[:, : 4 - shift]
    y = targets[:, int(shift) :]
    loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction=reduction)
    loss = loss.view(3, 4 - shift) if reduction == "none" else loss
    lse = z.logsumexp(-1).masked_fill(y == -100, 0)
    arguments = {"softcap": softcap, "reduction": reduction, "shift": shift, "filter_eps": "high", "impl": "cce_exact"}
    assert_same(apple_linear_cross_entropy(hidden, p.weight, targets, p.bias, **arguments), loss, p)
    assert_same(apple_linear_cross_entropy(hidden, p.weight, targets, p.bias, **arguments, return_lse=True), (loss, lse), p)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shift", [False, True])
def test_apple_cross_entropy_is_apples_own(reduction, shift):
    cce = installed("cut_cross_entropy")
    p = Problem(torch.float32)
    arguments = {"ignore_index": -100, "softcap": 3.0, "reduction": reduction, "shift": shift}
    if "bias" in inspect.signature(cce.linear_cross_entropy).parameters:
        arguments |= {"bias": p.bias, "return_lse": True}
    operands = p.hidden.view(3, 4, WIDTH), p.weight, p.targets.view(3, 4)
    with torch.compiler.set_stance("force_eager"):
        theirs = cce.linear_cross_entropy(*operands, **arguments, impl="torch_compile")
    ours = apple_linear_cross_entropy(*operands, **arguments, impl=cce.LinearCrossEntropyImpl.TORCH_COMPILE)
    assert_same(ours, theirs, p, torch.float32)


# ---- torch


def of_torch(input, linear_weight, target, *, linear_bias=None, ignore_index=None, **options) -> Tensor:
    """torch's own function; where it has none, what it is defined to equal."""
    if hasattr(F, "linear_cross_entropy"):
        options |= {"linear_bias": linear_bias, "ignore_index": ignore_index}
        return F.linear_cross_entropy(input, linear_weight, target, **options)
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ignore_index=ignored, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_cross_entropy_is_torchs_own(reduction, smoothing, biased, weighted):
    p = Problem()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    options |= {"weight": p.class_weights if weighted else None, "linear_bias": p.bias if biased else None}
    operands = p.hidden, p.weight, p.targets
    assert_same(torch_linear_cross_entropy(*operands, **options), of_torch(*operands, **options), p)
    p.targets[p.targets == -100] = 5
    options["ignore_index"] = 5
    assert_same(torch_linear_cross_entropy(*operands, **options), of_torch(*operands, **options), p)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_cross_entropy_takes_a_single_row(reduction):
    p = Problem()
    operands = p.hidden[1], p.weight, p.targets[1]
    options = {"reduction": reduction, "label_smoothing": 0.1}
    assert_same(torch_linear_cross_entropy(*operands, **options), of_torch(*operands, **options), p)


def test_torch_options_are_accepted():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    p = Problem()
    operands = p.hidden, p.weight, p.targets
    ours = torch_linear_cross_entropy(*operands, options=torch.nn.LinearCrossEntropyOptions())
    assert_same(ours, of_torch(*operands), p)


# ---- all of them

CALLS = {
    "liger scaled": lambda h, w, y: scaled(h, w, y, 0.7, -100, 1, True, torch.tensor([1, 5])),
    "liger": lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y, label_smoothing=0.1, lse_square_scale=0.1),
    "verl": lambda h, w, y: verl_linear_cross_entropy(h, w, y, 0.7),
    "verl module": lambda h, w, y: FusedLinearForPPO()(h, w, y, 0.7),
    "apple": lambda h, w, y: apple_linear_cross_entropy(h, w, y, return_lse=True, softcap=5.0),
    "torch": lambda h, w, y: torch_linear_cross_entropy(h, w, y, label_smoothing=0.9, weight=torch.linspace(0.5, 2, len(w))),
}
each_adapter = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_adapter
def test_leading_dimensions_and_views_change_nothing(call):
    p = Problem()
    flat = outputs_of(call(p.hidden, p.weight, p.targets))
    columns = p.hidden.T.contiguous(), p.weight.T.contiguous(), p.targets.view(3, 4).T.contiguous()
    hidden, weight, targets = columns[0].T.unflatten(0, (3, 4)), columns[1].T, columns[2].T
    assert not any(x.is_contiguous() for x in (hidden, weight, targets))
    shaped = outputs_of(call(hidden, weight, targets))
    assert_same([x.reshape(y.shape) for x, y in zip(shaped, flat, strict=True)], flat, p)


@each_adapter
def test_fp32_is_near_float64(call):
    p = Problem(torch.float32)
    exact = call(p.hidden.double(), p.weight.double(), p.targets)
    assert_same(call(p.hidden, p.weight, p.targets), exact, p, torch.float32)


@each_adapter
def test_ignored_rows_may_hold_anything(call):
    p = Problem()
    clean = call(p.hidden, p.weight, p.targets)
    spoilt = p.hidden.masked_fill(~p.counts[:, None], float("nan"))
    dirty = call(spoilt, p.weight, p.targets)
    assert_same(dirty, clean, p)


@pytest.mark.parametrize(
    ("adapter", "value"),
    [
        (liger_fused_linear_cross_entropy, 0.0),
        (apple_linear_cross_entropy, float("nan")),
        (torch_linear_cross_entropy, float("nan")),
    ],
)
def test_mean_over_no_row_is_the_peers_and_its_gradient_zero(adapter, value):
    p = Problem(ignored=range(ROWS))
    for options in [{}] if adapter is apple_linear_cross_entropy else [{}, {"label_smoothing": 0.1}]:
        loss = adapter(p.hidden, p.weight, p.targets, **options)
        assert loss.item() == pytest.approx(value, nan_ok=True)
        for gradient in torch.autograd.grad(loss, [p.hidden, p.weight]):
            assert (gradient == 0).all()
    assert of_torch(p.hidden, p.weight, p.targets).isnan()


@each_adapter
def test_16_bit_operands_and_autocast_give_fp32_statistics_of_the_same_operands(call):
    p = Problem(torch.bfloat16)
    exact = call(p.hidden.double(), p.weight.double(), p.targets)
    ours = call(p.hidden, p.weight, p.targets)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(p.hidden.float(), p.weight.float(), p.targets)
    for results in (ours, cast):
        for a, b in zip(outputs_of(results), outputs_of(exact), strict=True):
            assert a.dtype == torch.float32
            largest = (p.hidden.double() @ p.weight.double().T).abs().max().item()
            assert (a - b).abs().max() <= 8 * contract(largest) * b.abs().max()


@each_adapter
def test_compiles_to_one_graph(call):
    p = Problem(torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert_same(compiled(p.hidden, p.weight, p.targets), call(p.hidden, p.weight, p.targets), p)


@each_adapter
def test_logits_are_never_whole(call, monkeypatch):
    monkeypatch.setattr("bupo_kernels.request.default_memory_budget", lambda device: 2**20)
    hidden, weight = torch.randn(512, WIDTH, requires_grad=True), torch.randn(8192, WIDTH, requires_grad=True)
    targets = torch.randint(0, 8192, (512,))
    logits = 4 * 512 * 8192
    assert peak_bytes(lambda: total(call(hidden, weight, targets)).backward()) < logits / 4


REFUSED = [
    (liger_fused_linear_cross_entropy, {"label_smoothing": 0.1, "softcap": 5.0}, "label_smoothing"),
    (liger_fused_linear_cross_entropy, {"label_smoothing": 1.5}, "label_smoothing"),
    (liger_fused_linear_cross_entropy, {"accum_dtype": torch.bfloat16}, "accum_dtype"),
    (liger_fused_linear_cross_entropy, {"chunk_mem_const": 0}, "chunk_mem_const"),
    (liger_fused_linear_cross_entropy, {"reduction": "batchmean"}, "reduction"),
    (liger_fused_linear_cross_entropy, {"ce_weight": torch.ones(VOCAB - 1)}, "ce_weight"),
    (scaled, {"m_tiles_per_cluster": True}, "m_tiles_per_cluster"),
    (scaled, {"selected_token_ids": torch.tensor([-1])}, "selected_token_ids"),
    (scaled, {"temperature": 0.0}, "temperature"),
    (verl_linear_cross_entropy, {"reduction": "max"}, "reduction"),
    (apple_linear_cross_entropy, {"shift": 12}, "shift"),
    (apple_linear_cross_entropy, {"shift": -1}, "shift"),
    (apple_linear_cross_entropy, {"filter_eps": "low"}, "filter_eps"),
    (apple_linear_cross_entropy, {"impl": "magic"}, "impl"),
    (apple_linear_cross_entropy, {"vocab_parallel_options": object()}, "vocab_parallel_options"),
    (apple_linear_cross_entropy, {"reduction": None}, "reduction"),
    (torch_linear_cross_entropy, {"options": {"chunks": 4}}, "options"),
    (torch_linear_cross_entropy, {"weight": torch.ones(VOCAB, requires_grad=True)}, "weight"),
]


@pytest.mark.parametrize(("function", "options", "name"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x)[:40]))
def test_options_that_cannot_be_honoured_are_refused_by_name(function, options, name):
    p = Problem(torch.float32)
    with pytest.raises(ValueError, match=f"^{name}: .* given.* accepted"):
        function(p.hidden, p.weight, p.targets, **options)


WORDS = {
    scaled: ("_input", "weight", "target"),
    liger_fused_linear_cross_entropy: ("input", "weight", "target"),
    verl_linear_cross_entropy: ("hidden", "weight", "labels"),
    FusedLinearForPPO(): ("hidden_states", "vocab_weights", "input_ids"),
    apple_linear_cross_entropy: ("e", "c", "targets"),
    torch_linear_cross_entropy: ("input", "linear_weight", "target"),
}


@pytest.mark.parametrize(("function", "names"), WORDS.items(), ids=list(CALLS))
def test_errors_name_the_argument_as_the_peer_does(function, names):
    p = Problem(torch.float32)
    with pytest.raises(TypeError, match=f"^{names[0]}: torch.int64 given"):
        function(p.hidden.long(), p.weight, p.targets)
    with pytest.raises(ValueError, match=f"^{names[1]}: shape"):
        function(p.hidden, p.weight[:, 1:], p.targets)
    with pytest.raises(ValueError, match=f"^{names[2]}: {VOCAB} given"):
        function(p.hidden, p.weight, p.targets.clone().fill_(VOCAB))


def test_class_probabilities_are_refused():
    p = Problem(torch.float32)
    with pytest.raises(TypeError, match=r"^target: torch\.float32 given"):
        torch_linear_cross_entropy(p.hidden, p.weight, torch.rand(ROWS, VOCAB))


def test_apples_older_positional_ignore_index_is_not_taken_for_a_bias():
    p = Problem(torch.float32)
    with pytest.raises(TypeError, match=r"^bias: int given"):
        apple_linear_cross_entropy(p.hidden, p.weight, p.targets, -100)


def test_options_about_memory_scale_the_working_memory(monkeypatch):
    budgets = []
    logprobs_of = adapters.logprobs_of
    monkeypatch.setattr(adapters, "logprobs_of", lambda request: budgets.append(request.memory_budget) or logprobs_of(request))
    p = Problem(torch.float32)
    operands = p.hidden, p.weight, p.targets
    FusedLinearForPPO()(*operands), FusedLinearForPPO(256)(*operands)
    liger_fused_linear_cross_entropy(*operands), liger_fused_linear_cross_entropy(*operands, chunk_mem_const=3)
    default = budgets[0]
    assert budgets == [default, default // 2, default, 3 * default]


# ---- sharded


def sharded_weight_rank():
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (2,))
    rows = slice(0, 5) if rank == 0 else slice(5, ROWS)
    for name, call in CALLS.items():
        torch.manual_seed(0)
        p = Problem()
        losses = [total(call(p.hidden[some], p.weight, p.targets[some])) for some in (slice(0, 5), slice(5, ROWS))]
        want = torch.autograd.grad(sum(losses) / 2, [p.hidden, p.weight])
        weight = distribute_tensor(p.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        got = torch.autograd.grad(total(call(p.hidden[rows], weight, p.targets[rows])), [p.hidden, weight])
        torch.testing.assert_close(got[1].full_tensor(), want[1], msg=f"{name}: weight")
        torch.testing.assert_close(got[0][rows], 2 * want[0][rows], msg=f"{name}: hidden")
    p = Problem(torch.float32)
    alone = dist.new_group([rank], use_local_synchronization=True)
    verl_linear_cross_entropy(p.hidden, p.weight, p.targets, 1.0, "none", alone)
    with pytest.raises(ValueError, match=r"^dist_process_group: 2 ranks given"):
        verl_linear_cross_entropy(p.hidden, p.weight, p.targets, 1.0, "none", dist.group.WORLD)
    print("held")


def test_a_sharded_weight_is_gathered_and_its_gradient_averaged():
    assert [out.split()[-1] for out in on_ranks("test_adapters:sharded_weight_rank", 2)] == ["held", "held"]
