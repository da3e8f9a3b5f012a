"""Problem -> Plan: which backend runs a call, how, what it costs, and why the others do not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from bupo_kernels.backends.base import Backend, Candidate, Problem, TilePlan, TooSmall
from bupo_kernels.backends.cpu_bf16 import CpuBf16
from bupo_kernels.backends.gathers import Gathers, TorchGathers
from bupo_kernels.backends.native_gathers import NativeGathers
from bupo_kernels.backends.native_rows import NativeCpu, NativeCuda
from bupo_kernels.backends.torch_ import Torch
from bupo_kernels.backends.triton_ import Triton, TritonGathers

TRITON, CPU_BF16, NATIVE_CPU, NATIVE_CUDA, TORCH = Triton(), CpuBf16(), NativeCpu(), NativeCuda(), Torch()


def _native(problem: Problem) -> Backend:
    if problem.device.type != "cpu":
        return NATIVE_CUDA
    return CPU_BF16 if problem.dtype == torch.bfloat16 else NATIVE_CPU


# The names a caller may ask for, in order of preference, and the backend that each stands for with a problem.
BACKENDS: dict[str, Callable[[Problem], Backend]] = {
    "triton": lambda problem: TRITON,
    "native": _native,
    "torch": lambda problem: TORCH,
}
STRATEGIES = {"triton": Triton.strategies, "native": NativeCpu.strategies, "torch": Torch.strategies}


def _names(strategies: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return "auto", *(n for name, own in strategies.items() for n in (name, *(f"{name}:{s}" for s in own)))


NAMES = _names(STRATEGIES)

# The same for a call on supports.
GATHERS: dict[str, Gathers] = {"triton": TritonGathers(), "native": NativeGathers(), "torch": TorchGathers()}

Chosen = TypeVar("Chosen", bound=Candidate)

log = logging.getLogger("bupo_kernels")


def default_memory_budget(device: torch.device) -> int:
    """Return a number of bytes that is small against what the model itself takes there."""
    return 256 * 2**20 if device.type == "cpu" else 2**30


@dataclass(frozen=True)
class Plan:
    """The plan of a call: what it will do, and why not otherwise; ``print`` it. FLOPs count multiply and add; the backward's are an
    upper bound, reached when no row's upstream gradients are all zero."""

    backend: str
    implementation: Backend = field(repr=False)
    tile_plan: TilePlan
    why_not: dict[str, str] = field(default_factory=dict)  # backend -> reason, for those that cannot run this or were passed over

    @property
    def problem(self) -> Problem:
        return self.tile_plan.problem

    @property
    def flops_forward(self) -> int:
        product = 2 * self.problem.active_rows * self.problem.vocab * self.problem.width
        return product + (self._flops_gradients if self.tile_plan.chunk_rows else 0)

    @property
    def flops_backward(self) -> int:
        return 0 if self.tile_plan.chunk_rows else self._flops_gradients

    @property
    def _flops_gradients(self) -> int:
        p = self.problem
        recomputed = max(p.active_rows - self.tile_plan.cached_rows, 0)
        products = (p.grad_hidden + p.grad_weight) * p.active_rows + (recomputed if p.needs_grad else 0)
        return 2 * products * p.vocab * p.width

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """The fewest bytes that forward and backward must move: operands are read once per product, gradients and the cache (of 2
        bytes a logit) written once."""
        p = self.problem
        rows, vocab, e = p.active_rows * p.width * p.dtype.itemsize, p.vocab * p.width * p.dtype.itemsize, 2 * p.vocab
        cached = min(self.tile_plan.cached_rows, p.active_rows)
        if not p.needs_grad:
            return rows + vocab, 0
        if self.tile_plan.chunk_rows:
            chunks = max(-(-p.active_rows // self.tile_plan.chunk_rows), 1)
            return (1 + p.grad_hidden + p.grad_weight) * (rows + chunks * vocab), 0
        recompute = (rows + vocab) if cached < p.active_rows else 0
        return rows + vocab + cached * e, recompute + cached * e + (p.grad_hidden + p.grad_weight) * (rows + vocab)

    def __str__(self) -> str:
        problem, tiles, mib = self.problem, self.tile_plan, 2**20
        memory, moved, rate = tiles.memory, self.bytes_moved, _predicted_rate(self.implementation, problem)
        frozen = [name for name, needed in (("hidden", problem.grad_hidden), ("weight", problem.grad_weight)) if not needed]
        lines = [
            f"problem   {problem.active_rows} of {problem.rows} rows x {problem.vocab} columns x {problem.width}, "
            f"{str(problem.dtype).removeprefix('torch.')} on {problem.device.type}"
            + (f", no gradient for {' and '.join(frozen)}" if frozen else ""),
            f"backend   {self.backend}: {tiles.strategy}{f' with {tiles.isa}' if tiles.isa else ''}, "
            f"tiles of {tiles.tile.rows} x {tiles.tile.columns}"
            + (f", E of {tiles.cached_rows} rows kept" if tiles.cached_rows and not tiles.chunk_rows else "")
            + (f", {tiles.chunk_rows} rows at a time" if tiles.chunk_rows else ""),
            *(f"kernel    {kernel}" for kernel in tiles.kernels),
            *([f"predicted {rate}, forward; not measured"] if rate else []),
            f"forward   {self.flops_forward / 1e9:.3f} GFLOP, at least {moved[0] / mib:.2f} MiB moved, "
            f"{memory.forward / mib:.2f} MiB of working memory",
            f"backward  {self.flops_backward / 1e9:.3f} GFLOP, at least {moved[1] / mib:.2f} MiB moved, "
            f"{memory.backward / mib:.2f} MiB of working memory"
            + (
                f" + {memory.accumulator / mib:.2f} MiB to sum {'dW' if tiles.chunk_rows else 'dH'} in fp32"
                if memory.accumulator
                else ""
            ),
            f"budget    {problem.memory_budget / mib:.2f} MiB of working memory",
        ]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.why_not.items()])


def choose(problem: Problem, backend: str = "auto") -> tuple[str, Backend, str | None, dict[str, str]]:
    """Return name, backend, strategy (or None) and the reasons against the others. It does not look at the number of rows.

    Raise ``ValueError`` when ``backend`` is unknown or cannot run the problem, with its reason.
    """
    return _choose(problem, backend, NAMES, {name: stands_for(problem) for name, stands_for in BACKENDS.items()})


def choose_gathers(problem: Problem, backend: str = "auto") -> tuple[str, Gathers, str | None, dict[str, str]]:
    """Return what :func:`choose` does, for a call on supports."""
    return _choose(problem, backend, _names({name: gathers.strategies for name, gathers in GATHERS.items()}), GATHERS)


def _choose(
    problem: Problem, backend: str, accepted: tuple[str, ...], candidates: Mapping[str, Chosen]
) -> tuple[str, Chosen, str | None, dict[str, str]]:
    if backend not in accepted:
        raise ValueError(f"backend: {backend!r} given, accepted are {', '.join(map(repr, accepted))}")
    asked, _, given = backend.partition(":")
    strategy = given or None
    reasons = {name: reason for name, candidate in candidates.items() if (reason := _why_not(candidate, problem, strategy))}
    if asked == "auto":
        passed_over = {}
        for name, candidate in candidates.items():
            reason = reasons.get(name) or candidate.why_not_default(problem)  # which may take the seconds of a self-check
            if reason is None:
                asked = name
                break
            passed_over[name] = reason
        if passed_over and problem.device.type != "cpu":
            instead = " and ".join(f"{name} ({reason})" for name, reason in passed_over.items())
            rate = _predicted_rate(candidates[asked], problem)
            cost = f"; predicted at {rate}" if rate else ""
            log_once(f"{asked} runs on {problem.device.type} instead of {instead}{cost}")
        later = dict.fromkeys(list(candidates)[len(passed_over) + 1 :], f"it can, but {asked} comes first")
        reasons = passed_over | later | reasons
    elif asked in reasons:
        raise ValueError(f"backend: {backend!r} given, it cannot run this: {reasons[asked]}")
    return asked, candidates[asked], strategy, {name: reason for name, reason in reasons.items() if name != asked}


def _predicted_rate(backend: Candidate, problem: Problem) -> str | None:
    share = backend.predicted_share(problem)
    return None if share is None else f"{share:.2f} of the rate of bare 16-bit products on an H100"


def _why_not(backend: Candidate, problem: Problem, strategy: str | None) -> str | None:
    if problem.quantised and not backend.reads_quantised:
        return "weight: a quantised one given, accepted is a plain Tensor"
    return backend.why_not(problem, strategy)


@functools.cache
def log_once(message: str) -> None:
    log.warning(message)


def make_plan(problem: Problem, backend: str = "auto", one_pass: bool = False) -> Plan:
    """Return the plan for ``problem`` on ``backend`` ("name" or "name:strategy"), or on the first of :data:`BACKENDS` that can run
    it (on a CPU: within the budget). ``one_pass`` is for a loss whose gradients are taken in the forward.

    Raise ``ValueError`` when ``backend`` is unknown or cannot run the problem, or the budget is too small for it.
    """
    name, chosen, strategy, reasons = choose(problem, backend)
    try:
        return Plan(name, chosen, _tile_plan(chosen, problem, strategy, one_pass), reasons)
    except TooSmall as error:
        # Elsewhere than on a CPU a choice must not depend on the number of rows: tracing does not know it, and E has its shape.
        if backend != "auto" or chosen is TORCH or problem.device.type != "cpu":
            raise
        log_once(f"torch runs instead of {name}, for which the budget is too small: {error}")
        return Plan("torch", TORCH, _tile_plan(TORCH, problem, None, one_pass), reasons | {name: str(error)})


def _tile_plan(backend: Backend, problem: Problem, strategy: str | None, one_pass: bool) -> TilePlan:
    return (backend.one_pass_plan if one_pass else backend.plan)(problem, strategy)
