"""``bupo tune``: which tiles of the Triton kernels are the fastest on this GPU, and whether its library's product is faster still.

Every candidate of ``triton_.config`` that fits the card runs once in each round, beside the default and beside what would run
without Triton (``torch.mm`` with an fp32 result, and row kernels), so that all see the same clocks; medians over the rounds.
Winners go on record for the widths they were measured for, never for a number of rows: no row's result may depend on the others.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bupo.errors import ConfigError
from bupo.measurement import finite, machine, results_path, timed, write_section
from bupo.tables import columns
from bupo_kernels import dispatch, linear_logprobs, numerics
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Backend, Operands, Problem, Readout
from bupo_kernels.backends.triton_ import config, in_tiles, target_of
from bupo_kernels.backends.triton_.config import KernelConfig
from bupo_kernels.selfcheck import records
from bupo_kernels.selfcheck.card import Card
from bupo_kernels.selfcheck.decision import Variant, slower_key

WIDTHS = (1024, 2560, 4096)  # one for each of the groups that share their tiles
GAIN = 0.02  # that a tile must win over the default: medians of rounds are not surer than that
WITHOUT_TRITON = "library's product, row kernels"


@dataclass(frozen=True)
class Inputs:
    """Random operands of one size: logits of standard deviation 1."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]

    @staticmethod
    def of(rows: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Draw operands."""
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype)
        weight = torch.randn(vocab, width, generator=generator, device=device).div_(width**0.5).to(dtype)
        return Inputs(hidden, weight, torch.randint(0, vocab, (rows,), generator=generator, device=device))

    @property
    def operands(self) -> Operands:
        return Operands(self.hidden, self.weight, None, self.targets, Readout(1.0, 1.0, None))


@dataclass
class Timing:
    """The times that one way to do the work of a kernel took, or why it was not timed."""

    name: str
    tile: KernelConfig | None  # None for what runs without Triton
    milliseconds: list[float] = field(default_factory=list)
    reason: str | None = None  # why it does not run, or may not

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds) if self.milliseconds else float("inf")


@dataclass(frozen=True)
class Work:
    """The work of one kernel: how Triton does it, and how it is done without."""

    kernel: str  # as in config.py
    cache: bool
    with_triton: Callable[[], Tensor]
    without: Callable[[], Tensor]
    flops: int
    tolerance: float  # of a tile's result beside the default's

    @property
    def name(self) -> str:
        return self.kernel + (", E stored" if self.cache else "")


def tune(
    device: torch.device, dtypes: Sequence[torch.dtype], widths: Sequence[int], *, vocab: int, rows: int, rounds: int
) -> Iterator[tuple[str, str, Work, list[Timing]]]:
    """Yield the keys that a record has for a tile and for Triton as a whole with these widths, the work, and the timings of each
    way to do that, the default's first."""
    for dtype in dtypes:
        for width in widths:
            inputs = Inputs.of(rows, vocab, width, dtype, device)
            for work in works(inputs):
                flags = {"regular": True, "softcap": False, "cache": work.cache}
                key = config.key_of(work.kernel, dtype, width=width, **flags)
                tiles = config.candidates(work.kernel, dtype, target_of(device), **flags)
                as_a_whole = slower_key(Variant.of("triton", dtype), config.widths_of(width))
                yield key, as_a_whole, work, time_tiles(work, key, tiles, device, rounds)


def works(inputs: Inputs) -> Iterator[Work]:
    """Yield the work of each kernel that has tiles."""
    (rows, width), vocab, dtype, device = inputs.hidden.shape, len(inputs.weight), inputs.hidden.dtype, inputs.hidden.device
    largest = 8.0  # of logits of standard deviation 1
    contract = 2 * numerics.contract(largest, width, truncation=numerics.truncation(device))

    def logprobs(backend: str, keep: bool = False) -> Callable[[], Tensor]:
        hidden = inputs.hidden.detach().requires_grad_(keep)
        budget = 4 * rows * config.padded(vocab) + 2**30 if keep else None

        def call() -> Tensor:
            with torch.set_grad_enabled(keep):
                found = linear_logprobs(hidden, inputs.weight, inputs.targets, backend=backend, memory_budget=budget)
            return found.logprobs.detach()

        return call

    other = _name_without_triton(problem_of(rows, vocab, width, dtype, device))
    flops = 2 * rows * vocab * width
    yield Work(config.STATISTICS, False, logprobs("triton:recompute"), logprobs(other), flops, contract)
    if config.why_not_cached(dtype, softcap=False) is None:
        yield Work(config.STATISTICS, True, logprobs("triton:cached", keep=True), logprobs(other), flops, contract)
    of_slice = min(config.MOST_COLUMNS, vocab)
    some = replace(inputs, weight=inputs.weight[:of_slice], targets=inputs.targets % of_slice)
    constant, slope, on_target = torch.rand(3, rows, device=device)
    coefficients = Coefficients(torch.full((rows,), 6.0, device=device), constant, slope, on_target, some.targets)
    rounded = 2 * torch.finfo(dtype).eps * float(torch.e**2)  # no logit is above 8, and of m is 6
    flops = 2 * rows * of_slice * width
    yield Work(config.GRADIENT, False, dz_of("triton", some, coefficients), dz_of(other, some, coefficients), flops, rounded)


def problem_of(rows: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the problem of a gradient of ``hidden``."""
    return Problem(
        *(rows, rows, vocab, width, dtype, device),
        grad_hidden=True,
        grad_weight=False,
        grad_bias=False,
        softcap=False,
        memory_budget=dispatch.default_memory_budget(device),
    )


def _name_without_triton(problem: Problem) -> str:
    return "native" if _backend("native", problem).why_not(problem, None) is None else "torch"


def _backend(name: str, problem: Problem) -> Backend:
    return dispatch.BACKENDS[name](problem)


def dz_of(name: str, inputs: Inputs, coefficients: Coefficients) -> Callable[[], Tensor]:
    """Return a call that forms dz of all columns, without the products that follow, and returns its last tile."""
    (n, width), device = inputs.hidden.shape, inputs.hidden.device
    problem = problem_of(n, len(inputs.weight), width, inputs.hidden.dtype, device)
    backend, rows = _backend(name, problem), torch.arange(n, device=device)
    plan = backend.plan(problem, None)

    def call() -> Tensor:
        tiles = backend.gradient_tiles(inputs.operands, rows, coefficients, plan, backend.empty_cache(problem, 0), None)
        last: Any = deque(tiles, maxlen=1).pop()
        return last.dz

    return call


def time_tiles(work: Work, key: str, tiles: Sequence[KernelConfig], device: torch.device, rounds: int) -> list[Timing]:
    """Return the timings of the ``tiles``, the first of which is the default, and of what runs without Triton."""
    ways = [Timing(f"{tile}, group {tile.group}", tile) for tile in tiles] + [Timing(WITHOUT_TRITON, None)]

    def run(way: Timing) -> Tensor:
        context = nullcontext() if way.tile is None else in_tiles(device, ((key, way.tile),))
        with context:
            seconds, found = timed(work.with_triton if way.tile else work.without, device)
        way.milliseconds.append(1e3 * seconds)
        return found

    want: Tensor | None = None
    for way in ways:  # the first call compiles, and says whether the tile may be taken
        try:
            found = run(way).float().clone()
        except Exception as error:  # out of shared memory, registers, or a compiler that gives up
            way.reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:120]
            continue
        if way.tile is not None:
            want = found if want is None else want
            off = finite((found - want).abs().max().item())
            if off is None or off > work.tolerance:
                way.reason = f"off by {off}, accepted is {work.tolerance:.1e}"
        way.milliseconds.clear()
    for _ in range(rounds):
        for way in ways:
            if way.reason is None:
                run(way)
    return ways


def fastest(ways: Sequence[Timing]) -> Timing:
    """Return the default, or the tile that is faster by more than :data:`GAIN`."""
    default, best = ways[0], min((way for way in ways if way.tile is not None), key=lambda way: way.median)
    return best if best.median < (1 - GAIN) * default.median else default


def describe(key: str, work: Work, ways: Sequence[Timing]) -> str:
    """Return a table of the timings, the fastest first."""
    table = [[key, "ms", "TFLOP/s", ""]]
    for way in sorted(ways, key=lambda way: way.median):
        if way.milliseconds:
            note = "the default" if way is ways[0] else ""
            table.append([way.name, f"{way.median:.2f}", f"{work.flops / way.median / 1e9:.0f}", note])
    table += [[way.name, "–", "–", way.reason] for way in ways if way.reason]
    return "\n".join(columns(table))


def tune_command(
    *,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    widths: Sequence[int],
    vocab: int,
    rows: int,
    rounds: int,
    out: Path | None,
    commit: str | None,
) -> int:
    """Measure, print a table for each kernel, and put winners on record. Return the exit code.

    Raises :class:`ConfigError` where Triton cannot run on ``device``.
    """
    for dtype in dtypes:
        problem = problem_of(rows, vocab, min(widths), dtype, device)
        if reason := _backend("triton", problem).why_not(problem, None):
            raise ConfigError(f"--device: {device} given, Triton cannot run there: {reason}")
    card, lines = Card.of(device), []
    record = records.read(card)
    # What is measured now takes the place of what was.
    tiles, slower, rates = dict(record.tiles), dict(record.slower), dict(record.rates)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tuning", total=len(dtypes) * len(widths) * 3)
        for key, as_a_whole, work, ways in tune(device, dtypes, widths, vocab=vocab, rows=rows, rounds=rounds):
            progress.advance(task)
            best, without = fastest(ways), ways[-1]
            print(describe(key, work, ways) + "\n", flush=True)
            tiles.pop(key, None)
            rates.pop(key, None)
            if best.milliseconds:
                rates[key] = 1e3 * work.flops / best.median
            if best is not ways[0] and best.tile is not None:
                tiles[key] = asdict(best.tile)
            if work.name == config.STATISTICS:
                slower.pop(as_a_whole, None)
                if without.median < (1 - GAIN) * best.median:
                    beside = f"{without.median:.2f} ms against {best.median:.2f}"
                    slower[as_a_whole] = f"slower than the {WITHOUT_TRITON} here, {beside} by `bupo tune`"
            lines += [{"key": key, **asdict(way), "median": finite(way.median)} for way in ways]
    path = records.write(card, replace(records.read(card), tiles=tiles, slower=slower, rates=rates))
    print(f"{len(tiles)} tiles other than the default are on record in {path or 'the memory of this process, and lost with it'}")
    for name, reason in slower.items():
        print(f"{name}: {reason}")
    if out is not None:
        facts = {"rows": rows, "vocab": vocab, "rounds": rounds}
        about = machine(device, commit)
        path = results_path(out, about)
        write_section(path.with_name(f"{path.stem}-tune.json"), "tune", {"machine": about, **facts, "ways": lines})
    return 0


def forget(device: torch.device) -> None:
    """Take out of the record what was tuned."""
    card = Card.of(device)
    records.write(card, replace(records.read(card), tiles={}, slower={}, rates={}))
    print(f"{card.name} has its default tiles again")
