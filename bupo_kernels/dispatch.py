"""Problem -> Plan: which backend runs a call, how, what it costs, and why the others do not."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from types import ModuleType

import torch

from bupo_kernels.backends import native, torch_chunked, triton_
from bupo_kernels.backends.problem import Problem, Schedule, TooSmall

# In order of preference. A backend is a module, importable everywhere, with
#   STRATEGIES                          names for backend="name:strategy"
#   why_not(problem, strategy)          the reason it cannot run this, or None; does not look at the number of rows
#   why_not_default(problem)            the reason "auto" passes it over though it could, or None
#   schedule(problem, strategy)         tiles and memory; raises where the budget is too small
#   one_pass_schedule(problem, strategy)  the same for a loss whose gradients are taken in the forward
#   cached_rows(problem, strategy)      rows whose E is kept for the backward, each of cache_widths(problem)
#   statistics, row_statistics, gradient_dtype, gradient_tiles    the work itself
BACKENDS = {"triton": triton_, "native": native, "torch": torch_chunked}
# What a caller may ask for: "auto", a backend, or "backend:strategy".
NAMES = ("auto", *(n for b, module in BACKENDS.items() for n in (b, *(f"{b}:{s}" for s in module.STRATEGIES))))

log = logging.getLogger("bupo_kernels")


def default_memory_budget(device: torch.device) -> int:
    """Bytes: small against what the model itself takes there."""
    return 256 * 2**20 if device.type == "cpu" else 2**30


@dataclass(frozen=True)
class Plan:
    """What a call will do; ``print`` it. FLOPs count multiply and add; the backward's are an upper bound, reached when no
    row's upstream gradients are all zero."""

    problem: Problem
    backend: str
    module: ModuleType = field(repr=False)
    schedule: Schedule
    why_not: dict[str, str] = field(default_factory=dict)  # backend -> reason, for those that cannot run this or were passed over

    @property
    def flops_forward(self) -> int:
        product = 2 * self.problem.active_rows * self.problem.vocab * self.problem.width
        return product + (self._flops_gradients if self.schedule.chunk_rows else 0)

    @property
    def flops_backward(self) -> int:
        return 0 if self.schedule.chunk_rows else self._flops_gradients

    @property
    def _flops_gradients(self) -> int:
        p = self.problem
        recomputed = max(p.active_rows - self.schedule.cached_rows, 0)
        products = (p.grad_hidden + p.grad_weight) * p.active_rows + (recomputed if p.needs_grad else 0)
        return 2 * products * p.vocab * p.width

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """The fewest bytes that forward and backward must move: operands read once per product, gradients and E written once."""
        p = self.problem
        rows, vocab, e = p.active_rows * p.width * p.dtype.itemsize, p.vocab * p.width * p.dtype.itemsize, 2 * p.vocab
        cached = min(self.schedule.cached_rows, p.active_rows)
        if not p.needs_grad:
            return rows + vocab, 0
        if self.schedule.chunk_rows:
            chunks = max(-(-p.active_rows // self.schedule.chunk_rows), 1)
            return (1 + p.grad_hidden + p.grad_weight) * (rows + chunks * vocab), 0
        recompute = (rows + vocab) if cached < p.active_rows else 0
        return rows + vocab + cached * e, recompute + cached * e + (p.grad_hidden + p.grad_weight) * (rows + vocab)

    def __str__(self) -> str:
        p, s, mib = self.problem, self.schedule, 2**20
        memory, moved = s.memory, self.bytes_moved
        frozen = [name for name, needed in (("hidden", p.grad_hidden), ("weight", p.grad_weight)) if not needed]
        lines = [
            f"problem   {p.active_rows} of {p.rows} rows x {p.vocab} columns x {p.width}, "
            f"{str(p.dtype).removeprefix('torch.')} on {p.device.type}"
            + (f", no gradient for {' and '.join(frozen)}" if frozen else ""),
            f"backend   {self.backend}: {s.strategy}{f' with {s.isa}' if s.isa else ''}, tiles of {s.tile.rows} x {s.tile.columns}"
            + (f", E of {s.cached_rows} rows kept" if s.cached_rows and not s.chunk_rows else "")
            + (f", {s.chunk_rows} rows at a time" if s.chunk_rows else ""),
            *(f"kernel    {kernel}" for kernel in s.kernels),
            f"forward   {self.flops_forward / 1e9:.3f} GFLOP, at least {moved[0] / mib:.2f} MiB moved, "
            f"{memory.forward / mib:.2f} MiB of working memory",
            f"backward  {self.flops_backward / 1e9:.3f} GFLOP, at least {moved[1] / mib:.2f} MiB moved, "
            f"{memory.backward / mib:.2f} MiB of working memory"
            + (
                f" + {memory.accumulator / mib:.2f} MiB to sum {'dW' if s.chunk_rows else 'dH'} in fp32"
                if memory.accumulator
                else ""
            ),
            f"budget    {p.memory_budget / mib:.2f} MiB of working memory",
        ]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.why_not.items()])


def choose(problem: Problem, backend: str = "auto") -> tuple[str, ModuleType, str | None, dict[str, str]]:
    """(name, module, strategy or None, reasons against the others); does not look at the number of rows.

    Raises ``ValueError`` when ``backend`` is unknown or cannot run the problem, with its reason.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: {backend!r} given, accepted are {', '.join(map(repr, NAMES))}")
    asked, _, strategy = backend.partition(":")
    reasons = {name: reason for name, module in BACKENDS.items() if (reason := _why_not(module, problem, strategy or None))}
    if asked == "auto":
        for name, module in BACKENDS.items():
            if name not in reasons and (reason := module.why_not_default(problem)):
                reasons[name] = reason
        asked = next(name for name in BACKENDS if name not in reasons)
        place = list(BACKENDS).index(asked)
        if place and problem.device.type != "cpu":
            passed_over = " and ".join(f"{name} ({reasons[name]})" for name in list(BACKENDS)[:place])
            log_once(f"{asked} runs on {problem.device.type} instead of {passed_over}")
        for name in list(BACKENDS)[place + 1 :]:
            reasons.setdefault(name, f"it can, but {asked} comes first")
    elif asked in reasons:
        raise ValueError(f"backend: {backend!r} given, it cannot run this: {reasons[asked]}")
    return asked, BACKENDS[asked], strategy or None, {name: reason for name, reason in reasons.items() if name != asked}


def _why_not(module: ModuleType, problem: Problem, strategy: str | None) -> str | None:
    if problem.quantised and module is not torch_chunked:
        return "weight: a quantised one given, accepted is a plain Tensor"
    return module.why_not(problem, strategy)


@functools.cache
def log_once(message: str) -> None:
    log.warning(message)


def make_plan(problem: Problem, backend: str = "auto", one_pass: bool = False) -> Plan:
    """The plan for ``problem`` on ``backend`` ("name" or "name:strategy"), or on the first of :data:`BACKENDS` that can run it (on
    a CPU: within the budget). ``one_pass``: for a loss whose gradients are taken in the forward.

    Raises ``ValueError`` when ``backend`` is unknown or cannot run the problem, or the budget is too small for it.
    """
    name, module, strategy, reasons = choose(problem, backend)
    try:
        return Plan(problem, name, module, _schedule(module, problem, strategy, one_pass), reasons)
    except TooSmall as error:
        # Elsewhere than on a CPU a choice must not depend on the number of rows: tracing does not know it, and E has its shape.
        if backend != "auto" or module is torch_chunked or problem.device.type != "cpu":
            raise
        log_once(f"torch runs instead of {name}, for which the budget is too small: {error}")
        schedule = _schedule(torch_chunked, problem, None, one_pass)
        return Plan(problem, "torch", torch_chunked, schedule, reasons | {name: str(error)})


def _schedule(module: ModuleType, problem: Problem, strategy: str | None, one_pass: bool) -> Schedule:
    return (module.one_pass_schedule if one_pass else module.schedule)(problem, strategy)
