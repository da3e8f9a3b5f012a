"""Problem -> Plan: which backend runs a call, how, what it costs, and why the others do not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch

from bupo_kernels.backends import machine
from bupo_kernels.backends.base import Backend, Candidate, Problem, TilePlan, TooSmall
from bupo_kernels.backends.cpu_panels import CpuPanels
from bupo_kernels.backends.divergences import DivergenceRows, TorchDivergence
from bupo_kernels.backends.gathers import Gathers, TorchGathers
from bupo_kernels.backends.lens_loop import LensRows
from bupo_kernels.backends.machine import Gpu, Seconds
from bupo_kernels.backends.native_divergences import NativeDivergence
from bupo_kernels.backends.native_gathers import NativeGathers
from bupo_kernels.backends.native_lens import NativeLens
from bupo_kernels.backends.native_rows import NativeCpu, NativeCuda
from bupo_kernels.backends.torch_ import Torch
from bupo_kernels.backends.torch_lens import TorchLens
from bupo_kernels.backends.triton_ import Triton, TritonDivergence, TritonGathers, TritonLens

TRITON, CPU_PANELS, NATIVE_CPU, NATIVE_CUDA, TORCH = Triton(), CpuPanels(), NativeCpu(), NativeCuda(), Torch()


def _native(problem: Problem) -> Backend:
    if problem.device.type != "cpu":
        return NATIVE_CUDA
    return CPU_PANELS if problem.dtype.itemsize == 2 else NATIVE_CPU


# The names a caller may ask for, in order of preference, and the backend that each stands for with a problem.
BACKENDS: dict[str, Callable[[Problem], Backend]] = {
    "triton": lambda problem: TRITON,
    "native": _native,
    "torch": lambda problem: TORCH,
}
STRATEGIES = {"triton": Triton.strategies, "native": NativeCpu.strategies, "torch": Torch.strategies}


def _names(strategies: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return "auto", *(n for name, own in strategies.items() for n in (name, *(f"{name}:{s}" for s in own)))


NAMES = _names(STRATEGIES)  # accepted of a call that neither has a support nor compares policies

# The same for a call on supports.
GATHERS: dict[str, Gathers] = {"triton": TritonGathers(), "native": NativeGathers(), "torch": TorchGathers()}

# The same for the rows of a divergence, and for what the ops above do not give of a lens.
DIVERGENCES: dict[str, DivergenceRows] = {"triton": TritonDivergence(), "native": NativeDivergence(), "torch": TorchDivergence()}
LENSES: dict[str, LensRows] = {"triton": TritonLens(), "native": NativeLens(), "torch": TorchLens()}

Chosen = TypeVar("Chosen", bound=Candidate)

SHARE_ROWS = 32768  # of the call for which a predicted share is stated

log = logging.getLogger("bupo_kernels")


def default_memory_budget(device: torch.device, gpu: Gpu | None = None) -> int:
    """Return a number of bytes that is small against what the model itself takes there: 256 MiB on a CPU; elsewhere a sixteenth of
    the memory of the device, or of the ``gpu`` that is planned for, and at least 1 GiB, which it also is for a device that is not
    there."""
    if device.type == "cpu":
        return 256 * 2**20
    return max(2**30, (device_memory(device) if gpu is None else gpu.memory) // 16)


# torch.compile takes the number, and does not trace how it is found. (torch.compiler.assume_constant_result, which sets this, would
# import the compiler.)
default_memory_budget._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that ``device`` has; 0 where it is not there, or does not say."""
    module = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    return module.get_device_properties(device).total_memory if module is not None and module.is_available() else 0


class Prediction(NamedTuple):
    """The times of a call that follow from counts and the public rates of a GPU (``backends/machine.py``)."""

    gpu: Gpu
    ours: Seconds | None  # None where nobody has counted the kernels
    naive: Seconds  # logits that are materialised, in torch
    naive_bytes: int  # that these take
    floor: Seconds  # the bare products


class Columns(NamedTuple):
    """The columns that are here of a vocabulary on several ranks."""

    first: int
    here: int
    everywhere: int
    ranks: int

    def lines(self, wire: tuple[float, float]) -> list[str]:
        """Return what a plan prints of them, with the bytes a row on the ``wire``."""
        return [
            f"columns   {self.here} of {self.everywhere} are here, from {self.first} on, and all on {self.ranks} ranks",
            f"wire      {wire[0]:.0f} bytes a row forward, {wire[1]:.0f} backward",
        ]


@dataclass(frozen=True)
class Plan:
    """The plan of a call: what it will do, and why not otherwise; ``print`` it. FLOPs count multiply and add; the backward's are an
    upper bound, reached when no row's upstream gradients are all zero."""

    backend: str
    implementation: Backend = field(repr=False)
    tile_plan: TilePlan
    why_not: dict[str, str] = field(default_factory=dict)  # backend -> reason, for those that cannot run this or were passed over
    columns: Columns | None = None  # of a vocabulary on several ranks; all else is of those that are here

    @property
    def problem(self) -> Problem:
        return self.tile_plan.problem

    @property
    def prediction(self) -> Prediction | None:
        """The predicted times; None where the rates of the device are not known, as of a CPU's."""
        problem = self.problem
        gpu, gradients = _gpu_of(problem), problem.grad_hidden + problem.grad_weight
        if gpu is None or problem.quantised or problem.dtype.itemsize > 4:
            return None
        return Prediction(
            gpu,
            self.implementation.predicted(self.tile_plan, gpu),
            machine.naive(gpu, problem.shape, gradients),
            machine.naive_bytes(problem.shape, gradients),
            machine.bare_products(gpu, problem.shape, gradients),
        )

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
        bytes a logit, on a CPU 4) written once."""
        p = self.problem
        rows, vocab = (count * p.width * p.dtype.itemsize for count in (p.active_rows, p.vocab))
        e = (4 if p.device.type == "cpu" else 2) * p.vocab
        cached = min(self.tile_plan.cached_rows, p.active_rows)
        if not p.needs_grad:
            return rows + vocab, 0
        if self.tile_plan.chunk_rows:
            chunks = max(-(-p.active_rows // self.tile_plan.chunk_rows), 1)
            return (1 + p.grad_hidden + p.grad_weight) * (rows + chunks * vocab), 0
        recompute = (rows + vocab) if cached < p.active_rows else 0
        return rows + vocab + cached * e, recompute + cached * e + (p.grad_hidden + p.grad_weight) * (rows + vocab)

    @property
    def wire(self) -> tuple[float, float]:
        """The bytes a row that this rank receives from others, and sends, in forward and backward: the four statistics of each
        rank, and twice its dH in the dtype of the sums, but for this rank's part, as rings of ranks have it."""
        if self.columns is None:
            return 0, 0
        problem, ranks = self.problem, self.columns.ranks
        of_statistics = 4 * problem.statistics_dtype.itemsize * (ranks - 1)
        of_hidden = 2 * problem.width * problem.statistics_dtype.itemsize * (ranks - 1) / ranks * problem.grad_hidden
        return (of_statistics + of_hidden, 0) if self.tile_plan.chunk_rows else (of_statistics, of_hidden)

    def __str__(self) -> str:
        problem, tiles, mib = self.problem, self.tile_plan, 2**20
        sums = tiles.bytes_of_sums if problem.device.type != "cpu" else (0, 0)
        memory, moved = tiles.memory, self.bytes_moved
        kept = "logits" if problem.device.type == "cpu" else "E"
        frozen = [name for name, needed in (("hidden", problem.grad_hidden), ("weight", problem.grad_weight)) if not needed]
        lines = [
            f"problem   {problem.active_rows} of {problem.rows} rows x {problem.vocab} columns x {problem.width}, "
            f"{str(problem.dtype).removeprefix('torch.')} on {problem.gpu.name if problem.gpu else problem.device.type}"
            + (f", no gradient for {' and '.join(frozen)}" if frozen else ""),
            *([] if self.columns is None else self.columns.lines(self.wire)),
            f"backend   {self.backend}: {tiles.strategy}{f' with {tiles.isa}' if tiles.isa else ''}, "
            f"tiles of {tiles.tile.rows} x {tiles.tile.columns}"
            + (f", {kept} of {tiles.cached_rows} rows kept" if tiles.cached_rows and not tiles.chunk_rows else "")
            + (f", {tiles.chunk_rows} rows at a time" if tiles.chunk_rows else ""),
            *(f"kernel    {kernel}" for kernel in tiles.kernels),
            *self._times(),
            f"forward   {self.flops_forward / 1e9:.3f} GFLOP, at least {moved[0] / mib:.2f} MiB moved, "
            f"{memory.forward / mib:.2f} MiB of working memory",
            f"backward  {self.flops_backward / 1e9:.3f} GFLOP, at least {moved[1] / mib:.2f} MiB moved, "
            f"{memory.backward / mib:.2f} MiB of working memory"
            + (
                f" + {memory.accumulator / mib:.2f} MiB to sum {'dW' if tiles.chunk_rows else 'dH'} in fp32"
                if memory.accumulator
                else ""
            ),
            *([f"sums      {sums[0] / mib:.2f} MiB moved for dH, {sums[1] / mib:.2f} for dW"] if any(sums) else []),
            f"budget    {problem.memory_budget / mib:.2f} MiB of working memory",
        ]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.why_not.items()])

    def _times(self) -> list[str]:
        found = self.prediction
        if found is None:
            return []
        gpu, ours = found.gpu, found.ours
        of_ours = ["time      of these kernels is not predicted: nobody has counted what they run between products"]
        if ours is not None:
            source = "predicted, with kernels as `bupo tune` measured them" if ours.measured else "predicted, not measured"
            of_ours = [f"time      {_milliseconds(ours)} on {gpu.name}; {source}"]
        fits = "" if found.naive_bytes <= gpu.memory else f", which {gpu.name} has not"
        return [
            *of_ours,
            f"naive     {_milliseconds(found.naive)}, with {found.naive_bytes / 2**30:.1f} GiB of logits{fits}; predicted",
            f"floor     {_milliseconds(found.floor)}, the bare products; predicted",
        ]


def choose(problem: Problem, backend: str = "auto") -> tuple[str, Backend, str | None, dict[str, str]]:
    """Return name, backend, strategy (or None) and the reasons against the others. It does not look at the number of rows.

    Raise ``ValueError`` when ``backend`` is unknown or cannot run the problem, with its reason.
    """
    return choose_among({name: stands_for(problem) for name, stands_for in BACKENDS.items()}, problem, backend, STRATEGIES)


def choose_among(
    candidates: Mapping[str, Chosen],
    problem: Problem,
    backend: str = "auto",
    strategies: Mapping[str, tuple[str, ...]] | None = None,
    *,
    unable: Mapping[str, str | None] | None = None,
) -> tuple[str, Chosen, str | None, dict[str, str]]:
    """Return what :func:`choose` does, of ``candidates`` in order of preference: those of :data:`GATHERS`, :data:`DIVERGENCES` or
    :data:`LENSES`.

    ``strategies`` are by name, those of the candidates if not given. ``unable`` has reasons against some that the problem does
    not tell.
    """
    accepted = _names(strategies or {name: candidate.strategies for name, candidate in candidates.items()})
    if backend not in accepted:
        raise ValueError(f"backend: {backend!r} given, accepted are {', '.join(map(repr, accepted))}")
    asked, _, given = backend.partition(":")
    strategy = given or None
    reasons = {}
    for name, candidate in candidates.items():
        if reason := (unable or {}).get(name) or _why_not(candidate, problem, strategy):
            reasons[name] = reason
    if asked == "auto":
        passed_over = {}
        for name, candidate in candidates.items():
            reason = reasons.get(name) or candidate.why_not_default(problem)  # which may take the seconds of a self-check
            if reason is None:
                asked = name
                break
            passed_over[name] = reason
        if passed_over and problem.device.type != "cpu" and problem.gpu is None:
            instead = " and ".join(f"{name} ({reason})" for name, reason in passed_over.items())
            rate = _predicted_rate(candidates[asked], problem)
            cost = f"; predicted at {rate}" if rate else ""
            log_once(f"{asked} runs on {problem.device.type} instead of {instead}{cost}")
        later = dict.fromkeys(list(candidates)[len(passed_over) + 1 :], f"it can, but {asked} comes first")
        reasons = passed_over | later | reasons
    elif asked in reasons:
        raise ValueError(f"backend: {backend!r} given, it cannot run this: {reasons[asked]}")
    return asked, candidates[asked], strategy, {name: reason for name, reason in reasons.items() if name != asked}


def _milliseconds(seconds: Seconds) -> str:
    return f"{1e3 * seconds.forward:.2f} ms forward, {1e3 * seconds.total:.2f} with the backward"


def _predicted_rate(backend: Candidate, problem: Problem) -> str | None:
    share = predicted_share(backend, problem)
    return None if share is None else f"{share[0]:.2f} of the rate of bare products on {share[1].name}"


def predicted_share(backend: Candidate, problem: Problem) -> tuple[float, Gpu] | None:
    """Return the share of the rate of bare products that a forward in 16 bit is expected to reach, and on which GPU: on the one
    that is there or planned for, or, where its rates are not known, on an H100. None where there is no such expectation."""
    if problem.device.type == "cpu" or problem.dtype.itemsize != 2:
        return None
    gpu = _gpu_of(problem) or machine.named("H100")
    seconds = backend.predicted_forward(replace(problem, active_rows=SHARE_ROWS), gpu)
    return None if seconds is None else (machine.product(gpu, problem.shape._replace(rows=SHARE_ROWS)) / seconds, gpu)


def _gpu_of(problem: Problem) -> Gpu | None:
    return problem.gpu or machine.present(problem.device)


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
