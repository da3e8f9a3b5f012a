"""The small problems of the self-check, and how their results are judged.

Every kernel that a call of a variant can come to runs: with and without entropy, with E kept and without, the one-pass loss; widths
that fill whole steps and one that does not; logits as flat as an early layer's and as peaked as a late one's; rows that do not
count among those that do. Memory that a kernel leaves unwritten holds NaN. What runs twice must agree bit for bit, as must a row
alone where the backend promises that. All is held against float64 on the same device, by :mod:`bupo_kernels.numerics`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bupo_kernels import numerics, reference
from bupo_kernels.backends.gradients import accumulate_
from bupo_kernels.backends.triton_ import config, with_target
from bupo_kernels.functional import explain, linear_logprobs, linear_policy_loss
from bupo_kernels.policy_losses import PolicyObjective
from bupo_kernels.selfcheck.decision import Variant
from bupo_kernels.selfcheck.records import Verdict

ROWS, VOCAB = 300, 4 * 256 + 37  # several blocks of rows and of columns, the last of either not full
WIDTHS = (512, 1024 + 64, 1001)
FLAT, PEAKED = 1.0, 8.0  # standard deviations of the logits: an early layer, a late one
RESULTS = ("logprobs", "entropy", "logsumexp", "dH", "dW", "db")
REINFORCE = PolicyObjective(ratio="none", clip=None)  # its gradient is that of the log-probs times their advantages


def roundoff(dtype: torch.dtype, backend: str) -> float:
    """Return the relative error of a tile that a kernel stores: half an eps; a whole one where Triton's interpreter stores bf16,
    which it truncates."""
    truncated = dtype == torch.bfloat16 and backend.startswith("triton") and config.interpreted()
    return torch.finfo(dtype).eps * (1 if truncated else 0.5)


def error_of_e(backend: str) -> float:
    """Return the error of log p off the target where it comes from a bf16 value that the forward kept, ``−ln(1 − u)``."""
    return roundoff(torch.bfloat16, backend) * (1 + 2**-6) if backend == "triton:cached" else 0.0


class Wrong(Exception):
    """A result that a correct kernel cannot give."""


def share_of_bound(name: str, found: Tensor, exact: Tensor, bound: Tensor) -> float:
    """Return the largest error of ``found`` as a share of its bound. Raise :class:`Wrong` where that is over 1, or is NaN."""
    share = float(((found.double() - exact).abs() / bound).max())
    if not share <= 1:
        raise Wrong(f"{name}: " + ("not a number" if math.isnan(share) else f"off by {share:.3g} times its bound"))
    return share


@dataclass(frozen=True)
class Case:
    """One problem: its operands, and the options of the call."""

    name: str
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    upstream: list[Tensor]  # [N] each: of logprobs, entropy and logsumexp
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> Tensor:  # [N] bool
        return self.targets != -100

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        bias = self.options.get("bias")
        return (self.hidden, self.weight) if bias is None else (self.hidden, self.weight, bias)


class Truth(NamedTuple):
    """The exact results of the rows of a case that count, and their bounds."""

    logprob: Tensor  # [n] each
    entropy: Tensor
    logsumexp: Tensor
    bound: Tensor


def check(variant: Variant, device: torch.device) -> Verdict:
    """Return the verdict on ``variant``, found in this process. An exception of a kernel, a compiler or a driver is one too; only
    :class:`torch.OutOfMemoryError`, which says nothing about a kernel, is raised."""
    started, reason = time.perf_counter(), ""
    shares: list[float] = []
    try:
        with _on_our_terms(device), _in_form(variant, device):
            for case in cases(variant, device):
                truth = _truth(case)
                for backend in ways(variant):
                    shares.append(_worst_of_case(case, truth, backend, variant))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Wrong as error:
        reason = str(error)
    except Exception as error:  # a GPU, its driver and two compilers can fail in ways that nobody has listed
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return Verdict(not reason, reason, max(shares, default=None), time.perf_counter() - started, time.time())


def cases(variant: Variant, device: torch.device) -> Iterator[Case]:
    """Yield the problems of a variant."""
    for width in WIDTHS:
        for scale in (FLAT, PEAKED):
            yield _case(variant, width, scale, device)


def _case(variant: Variant, width: int, scale: float, device: torch.device) -> Case:
    """Make random operands. Every other row prefers its target, when peaked to saturation; one row in seven does not count. The
    width that fills no whole step has a bias and a temperature a row."""
    generator = torch.Generator(device).manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator, dtype=torch.int64, device=device)
    targets[0], targets[-1] = 0, VOCAB - 1
    weight = normal(VOCAB, width).div_(width**0.5)
    hidden = normal(ROWS, width).mul_(scale)
    hidden[::2] += 6 * scale * weight[targets[::2]]
    targets[3::7] = -100
    upstream = [normal(ROWS) for _ in range(3)]
    for g in upstream:
        g[2::3] = 0
    options: dict[str, Any] = {"softcap": 30.0, "logit_scale": 1.7} if variant.softcap else {}
    if width % 8:
        options["bias"] = normal(VOCAB).requires_grad_()
        options["temperature"] = normal(ROWS).abs_() + 0.5
    dtype = variant.torch_dtype
    kind = f"D = {width}, {'flat' if scale == FLAT else 'peaked'}"
    return Case(kind, hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, upstream, options)


def ways(variant: Variant) -> list[str]:
    """Return how the variant may run: with E kept and without, where it has the choice."""
    if variant.backend != "triton" or config.why_not_cached(variant.torch_dtype, variant.softcap):
        return [variant.backend]
    return ["triton:recompute", "triton:cached"]


def _worst_of_case(case: Case, truth: Truth, backend: str, variant: Variant) -> float:
    """Return the largest error of a statistic as a share of the contract. Raise :class:`Wrong` where anything is wrong."""

    def name(what: str) -> str:
        return f"{what} of {backend} at {case.name}"

    options = {**case.options, "backend": backend}
    found, again = _run(case, options), _run(case, options)
    worst = _compare_statistics(name, case, found[:3], truth)
    _compare_gradients(name, case, case.upstream, found[3:], backend, truth)
    for what, one, other in zip(RESULTS, found, again, strict=False):
        if not torch.equal(one, other):
            raise Wrong(f"{name(what)}: differs from run to run")

    only = linear_logprobs(case.hidden, case.weight, case.targets, return_entropy=False, **options)
    worst = max(worst, _compare_statistics(name, case, [only.logprobs.detach(), None, only.logsumexp.detach()], truth))
    _compare_policy_loss(name, case, options, backend, truth)

    # Others leave products to the library, which chooses by the number of rows; so does the interpreter, to numpy's.
    if variant.backend == "triton" and not config.interpreted():
        for row in (0, ROWS // 2 + 1, ROWS - 1):
            alone = _some_rows(case, slice(row, row + 1))
            of_row = linear_logprobs(alone.hidden, alone.weight, alone.targets, **alone.options, backend=backend)
            for what, of_one, all_rows in zip(RESULTS, of_row, found, strict=False):
                if of_one is None or not torch.equal(of_one[0], all_rows[row]):
                    raise Wrong(f"{name(what)}: of a row alone, differs from that of the row among others")
    return worst


def _run(case: Case, options: dict[str, Any]) -> list[Tensor]:
    """Return logprobs, entropy and logsumexp, and the gradients of the case's leaves."""
    out = [x for x in linear_logprobs(case.hidden, case.weight, case.targets, **options) if x is not None]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, case.leaves, case.upstream)]


def _some_rows(case: Case, some: slice | Tensor) -> Case:
    options = {k: v[some] if k == "temperature" else v for k, v in case.options.items()}
    return Case(case.name, case.hidden[some], case.weight, case.targets[some], [g[some] for g in case.upstream], options)


@torch.no_grad()
def _truth(case: Case) -> Truth:
    """Return the exact statistics, with their bound beside what the library's own product of these operands loses."""
    some, device = _some_rows(case, case.counts), case.hidden.device
    options: dict[str, Any] = {k: v.double() if isinstance(v, Tensor) else v for k, v in some.options.items()}
    exact = reference.linear_logprobs(some.hidden, some.weight, some.targets, **options)
    products = torch.empty(len(some.hidden), VOCAB, dtype=torch.float32, device=device)
    accumulate_(products, some.hidden, some.weight.T, first=True)
    identity = torch.eye(VOCAB, dtype=torch.float64, device=device)
    dense = reference.linear_logprobs(products, identity, some.targets, **options)
    largest = reference.logits(some.hidden.double(), some.weight.double(), **options).abs().amax(1)
    logprob, entropy, logsumexp = ((a - b).abs().max() for a, b in zip(exact, dense, strict=True))
    off = torch.stack([logprob, entropy / numerics.entropy_factor(VOCAB), logsumexp]).max()
    return Truth(*exact, numerics.beside_dense(largest, case.hidden.shape[1], off, truncation=numerics.truncation(device)))


def _compare_statistics(
    name: Callable[[str], str],
    case: Case,
    found: Sequence[Tensor | None],  # [N] each
    truth: Truth,
) -> float:
    """Return the largest error as a share of the contract."""
    worst, factors = 0.0, (1.0, numerics.entropy_factor(VOCAB), 1.0)
    for what, factor, values, exact in zip(RESULTS, factors, found, truth, strict=False):
        if values is None:
            continue
        if not bool((values[~case.counts] == 0).all()):
            raise Wrong(f"{name(what)}: not 0 on rows that do not count")
        worst = max(worst, share_of_bound(name(what), values[case.counts], exact, factor * truth.bound))
    return worst


@torch.no_grad()
def _compare_gradients(
    name: Callable[[str], str],
    case: Case,
    upstream: Sequence[Tensor | None],  # [N] each
    found: Sequence[Tensor],
    backend: str,
    truth: Truth,
) -> None:
    plan = explain(case.hidden, case.weight, case.targets, **case.options, backend=backend)
    stored = plan.implementation.gradient_dtype(plan.problem)
    bounds = numerics.gradients(
        *(case.hidden, case.weight, case.targets, case.counts, upstream, case.options),
        stored=stored,
        roundoff=roundoff(stored, backend),
        of_e=error_of_e(backend),
        logit_error=float(truth.bound.max()),
    )
    for what, gradient, bounded in zip(RESULTS[3:], found, bounds.values(), strict=False):
        share_of_bound(name(what), gradient, *bounded)


def _compare_policy_loss(name: Callable[[str], str], case: Case, options: dict[str, Any], backend: str, truth: Truth) -> None:
    advantages, count = case.upstream[0], case.counts.sum()
    loss, _ = linear_policy_loss(case.hidden, case.weight, case.targets, advantages, objective=REINFORCE, **options)
    terms = advantages[case.counts].double() * truth.logprob
    spent = (advantages[case.counts].abs() * truth.bound).sum() / count + torch.finfo(torch.float32).eps * terms.abs().sum()
    share_of_bound(name("the loss"), loss.detach(), -terms.sum() / count, spent)
    found = torch.autograd.grad(loss, case.leaves)
    _compare_gradients(lambda what: name(f"{what} of the loss"), case, (-advantages / count, None, None), found, backend, truth)


def _in_form(variant: Variant, device: torch.device) -> AbstractContextManager[None]:
    """Have Triton's warp-specialised kernels run where they are what is checked, as if they had been already."""
    return with_target(device, proven=(variant.dtype,)) if variant.specialised else nullcontext()


@contextmanager
def _on_our_terms(device: torch.device) -> Iterator[None]:
    """Have torch fill new memory with NaN, which it does while it is to be deterministic; multiply fp32 as exactly as the contract
    asks; and do as if the caller were within no context of its own, as in another process."""
    settings = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # these two have settings that type checkers do not see
    matmul: Any = torch.backends.cuda.matmul
    filling, precision = memory.fill_uninitialized_memory, matmul.fp32_precision
    with ExitStack() as contexts:
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.enable_grad())
        contexts.enter_context(torch.autocast(device.type, enabled=False))
        contexts.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of ops that have no deterministic way, none of which is ours
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        if precision == "tf32":
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(settings[0], warn_only=settings[1])
            memory.fill_uninitialized_memory = filling
            if precision == "tf32":
                matmul.fp32_precision = precision
