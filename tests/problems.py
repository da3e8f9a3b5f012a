"""Inputs, the error model and the memory measurement that the tests of the ops share."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bupo_kernels import numerics, reference
from bupo_kernels.numerics import CONTRACT, contract, entropy_factor
from bupo_kernels.selfcheck.problems import error_of_e, roundoff

# ---- the error model: where every tolerance comes from, on any CPU

SIGMAS = 4


def chain_error(*sums: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound the relative error of a chain of sums, of so many terms each, whatever the order in which a machine adds them.

    Each addition rounds by up to u, half an eps, of the partial sum, evenly: a variance of u²/3. Partial sums of terms of both
    signs have on average half the square of the whole. Over n terms, and over the sums of a chain, the errors add like the steps of
    a random walk: u √(n/6). Four standard deviations of that. A product, or a function of one value, is a sum of one term.
    """
    return SIGMAS * torch.finfo(dtype).eps / 2 * math.sqrt(sum(sums) / 6)


def model_error(config, positions: int, *, backward: bool = False, dtype: torch.dtype = torch.float32) -> float:
    """Bound the error of a model's hidden states and logits, with ``backward`` of its gradients, relative to the largest of them.

    A layer is a chain of two norms, products of D (q, k and v; gate and up), attention over a head's width and ``positions``, the
    product with what heads give and that with what the FFN does, and of some eight functions of one value; after the last one come
    a norm and the head. 16-bit operands are summed in fp32 and rounded once. A backward takes each sum twice more. Each layer
    normalises its input, so relative errors pass through it as they are.
    """
    ends = 2 * [config.hidden_size]
    attention = [config.head_dim, positions, config.num_attention_heads * config.head_dim]
    sums = ends + config.num_hidden_layers * [*ends, *ends, *attention, config.intermediate_size, *8 * [1]]
    if dtype.itemsize == 2:
        sums = len(sums) * [1]
    return chain_error(*sums * (3 if backward else 1), dtype=dtype)


def head_error(largest: float, width: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound how far a log-prob of an op may be from that of dense logits, which reach ``largest`` and are sums over the ``width``
    of a head in ``dtype``; twice what these lose, once for the target's own logit and once for the logsumexp."""
    return contract(largest, dtype=dtype) + 2 * chain_error(width, dtype=dtype) * (1 + largest)


def policy_error(config, positions: int, largest: float, *, dtype: torch.dtype = torch.float32) -> float:
    """Bound the error of a log-prob that a model gives whose logits reach ``largest``: the contract's, and twice that of a logit,
    once for the target's own and once for the logsumexp."""
    return contract(largest, dtype=dtype) + 2 * model_error(config, positions, dtype=dtype) * (1 + largest)


def divergence_factor(kl: float) -> float:
    """Return how many times the error of log-probs a KL divergence of ``kl`` can be off: it is Σ p (log p − log q), both terms
    move, and p moves with log p; Σ p |log p − log q| ≤ kl + √(2 kl) by Pinsker's inequality."""
    return 2 + kl + math.sqrt(2 * kl)


# ----

# For tests whose operands are 16-bit and have no softcap: what keeps E runs them too.
with_cached = pytest.mark.parametrize("backend", ["torch", "native", "triton", "triton:cached"], indirect=True)


def examples(count: int) -> settings:
    """Hypothesis's settings of a test: ``count`` examples in ``make test-all``, and a quarter of them in ``make test``."""
    return settings(max_examples=max(count * settings().max_examples // 40, 3))


def covering(cases: Sequence[Sequence], together: int = 2, *, unpacked: bool = False) -> list:
    """Parameters of a test that takes a whole product of options: ``make test-all`` runs every case, ``make test`` so many of them
    that each pair of values, or so many ``together``, stands in one, and values of which there are fewer take turns. Cases of one
    length, or dicts of the same keys; ``unpacked`` for as many parameters."""

    values = [[f"{i}: {x}" for i, x in enumerate(case.values() if isinstance(case, dict) else case)] for case in cases]
    groups = [set(itertools.combinations(of_case, together)) for of_case in values]
    left, chosen, uses = set().union(*groups), set(), Counter()
    while left:
        chosen.add(best := max(range(len(cases)), key=lambda i: (len(groups[i] & left), -sum(uses[x] for x in values[i]))))
        left -= groups[best]
        uses.update(values[best])
    marks = [() if i in chosen else pytest.mark.broad for i in range(len(cases))]
    return [pytest.param(*(case if unpacked else (case,)), marks=mark) for case, mark in zip(cases, marks, strict=True)]


def first_of(values: Iterable) -> list:
    """Parameters of a test that take the same way: the first of them in ``make test``, all in ``make test-all``."""
    first, *others = values
    return [first, *(pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.broad) for x in others)]


def wanted(request: pytest.FixtureRequest, parameter: str) -> list:
    """Values of ``parameter`` for which tests of this module are to run: what a fixture of the module has to prepare."""
    cases = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [params[parameter] for params in cases if parameter in params]


def device_of(backend: str) -> str:
    """Where a backend of the ``backend`` fixture runs: without a GPU Triton is interpreted on the CPU."""
    return "cuda" if backend.startswith("triton") and torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """Random operands; ``options`` go to the op and to the oracle alike."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    options: dict = field(default_factory=dict)

    @property
    def oracle_options(self) -> dict:
        return {k: v for k, v in self.options.items() if k not in ("backend", "memory_budget")}


def random_case(
    rows: int, vocab: int, width: int, *, scale: float = 1.0, dtype=torch.float32, device="cpu", seed: int = 0, **options
) -> Case:
    """Logits of standard deviation ``scale`` (before temperature and the like); the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, width, generator=generator) * scale).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    return Case(hidden, weight, targets, options)


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "temperature per row": {"temperature": "rows"},
    "logit scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "everything": {"bias": True, "temperature": "rows", "logit_scale": 1.7, "softcap": 3.0, "mask": True},
}


def case_with(options: dict, rows=7, vocab=37, width=5, dtype=torch.float64, device="cpu", **kwargs) -> Case:
    """A random case with one of :data:`OPTIONS`, its tensors filled in."""
    case = random_case(rows, vocab, width, dtype=dtype, device=device, **kwargs)
    options = dict(options)
    if options.get("bias"):
        options["bias"] = torch.randn(vocab).to(device, dtype).requires_grad_()
    if options.get("temperature") == "rows":
        options["temperature"] = (torch.rand(rows) + 0.5).to(device, torch.promote_types(dtype, torch.float32))
    if options.get("mask"):
        options["mask"] = (torch.rand(rows) > 0.3).to(device)
    case.options = options
    return case


def largest_logit(case: Case) -> float:
    options = {k: v for k, v in case.oracle_options.items() if k in ("bias", "temperature", "logit_scale", "softcap")}
    options = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in options.items()}
    return float(reference.logits(case.hidden.detach().double(), case.weight.detach().double(), **options).abs().max())


def contract_of(case: Case) -> float:
    """Bound the error of a log-prob of the case, on the device where it lies."""
    return contract(largest_logit(case), case.hidden.shape[1], truncation=numerics.truncation(case.hidden.device))


def dense_fp32_error(case: Case) -> Tensor:
    """Per row, the error that rounding the logits to fp32 alone makes: fp32 dense product, float64 statistics."""
    with torch.no_grad():
        rounded = (case.hidden.float() @ case.weight.float().T).double()
        exact = case.hidden.double() @ case.weight.double().T
        chosen = [z.log_softmax(-1).gather(1, case.targets[:, None]) for z in (rounded, exact)]
    return (chosen[0] - chosen[1]).abs().squeeze(1)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def assert_same_gradients(got: Sequence[Tensor], want: Sequence[Tensor], case: Case) -> None:
    """Equal up to one rounding to the dtype (of each side) and a few times the contract's bound in every dz."""
    bound = CONTRACT * (1 + largest_logit(case))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= (2 * torch.finfo(a.dtype).eps + 8 * bound) * b.double().norm()


def leaves(case: Case) -> tuple[Tensor, ...]:
    operands = case.hidden, case.weight, case.options.get("bias")
    return tuple(x for x in operands if x is not None and x.requires_grad)


def assert_values(ours, case: Case) -> None:
    """Within the contract of the float64 oracle, whatever the logits."""
    if case.targets.numel() == 0:
        return
    exact = reference.linear_logprobs(case.hidden.detach(), case.weight.detach(), case.targets, **case.oracle_options)
    bound = contract_of(case)
    factors = {"logprobs": 1, "entropy": entropy_factor(len(case.weight)), "logsumexp": 1}
    for (name, factor), truth in zip(factors.items(), exact, strict=True):
        value = getattr(ours, name)
        assert value.dtype == torch.float32
        assert (value - truth).abs().max() <= bound * factor, name


def assert_stored_gradients(got: Sequence[Tensor], case: Case, upstream: Sequence[Tensor | None], backend: str) -> None:
    """dH, dW and db (those of :func:`leaves`) of ``Σ upstream · (logprobs, entropy, logsumexp)``, each element within its bound
    by :func:`bupo_kernels.numerics.gradients`. The torch backend on a CPU stores dz in fp32, and so does the native one of fp16
    operands; the others in the operands' dtype."""
    with torch.no_grad():
        options = {k: v for k, v in case.oracle_options.items() if k not in ("mask", "ignore_index")}
        counts = case.targets != case.options.get("ignore_index", -100)
        if (mask := case.options.get("mask")) is not None:
            counts = counts & mask
        dtype = case.hidden.dtype
        wide = backend == "torch" or (backend == "native" and dtype == torch.float16)
        stored = torch.float32 if wide and case.hidden.device.type == "cpu" else dtype
        found = numerics.gradients(
            *(case.hidden, case.weight, case.targets, counts, upstream, options),
            stored=stored,
            roundoff=roundoff(stored, backend),
            of_e=error_of_e(backend),
            logit_error=contract_of(case),
        )
    operands = {"hidden": case.hidden, "weight": case.weight, "bias": case.options.get("bias")}
    named = [(name, x) for name, x in operands.items() if x is not None and x.requires_grad]
    for (name, operand), gradient in zip(named, got, strict=True):
        assert gradient.dtype == operand.dtype
        assert gradient.shape == operand.shape
        exact, bound = found[name]
        excess = (gradient.double() - exact).abs() - bound
        assert not (excess > 0).any(), f"{name}: over its bound by {excess.max().item():.2e}"


def products(call: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes (m, k, n) of every matrix product that torch makes in ``call``."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        call()
    first = {"aten::mm": 0, "aten::addmm_": 1}  # which argument is the left operand
    found = [e.input_shapes[first[e.name] :][:2] for e in record.events() if e.name in first]
    return [(a[0], a[1], b[1]) for a, b in found]
