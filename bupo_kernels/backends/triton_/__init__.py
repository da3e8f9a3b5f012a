"""Fused kernels for GPUs: a tile of logits is multiplied, folded into the row's statistics or turned into its gradient, and gone.

``linear_statistics.py`` streams W once and leaves partials per vocabulary split, ``merge.py`` folds them in order.
``gradient_recompute.py`` forms dz of a vocabulary slice again, ``gradient_cached.py`` has it from the E that the forward kept; the
products of dz with W and H are the library's. ``plan.py`` says which rows take which way, ``config.py`` has every number. Under
``TRITON_INTERPRET=1`` all of it runs on the CPU, which is how it is tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.gradients import GradientTile
from bupo_kernels.backends.problem import Operands, Problem, Schedule
from bupo_kernels.backends.triton_ import config, plan
from bupo_kernels.backends.triton_.plan import cache_widths, cached_rows

__all__ = (  # what dispatch asks of a backend
    "STRATEGIES",
    "cache_widths",
    "cached_rows",
    "gradient_dtype",
    "gradient_tiles",
    "one_pass_schedule",
    "row_statistics",
    "schedule",
    "statistics",
    "why_not",
    "why_not_default",
)

STRATEGIES = ("recompute", "cached")

# Compute capabilities (x 10) on which `make gpu` has passed and its result is committed. "auto" takes Triton only there: on any
# other GPU these kernels have been compiled and interpreted, but never run.
MEASURED: frozenset[int] = frozenset()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def target_of(device: torch.device) -> config.Target:
    if config.interpreted():
        return config.Target("cuda", 80, processors=3)  # several work items for each of few programs
    properties = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else "cuda"
    arch = 0 if kind == "hip" else 10 * properties.major + properties.minor
    return config.Target(kind, arch, properties.multi_processor_count)


def why_not(problem: Problem, strategy: str | None) -> str | None:
    """The reason this backend cannot run ``problem``, or None."""
    if not _installed():
        return "triton: not installed"
    if problem.device.type != "cuda" and not (config.interpreted() and problem.device.type == "cpu"):
        return f"device: {problem.device.type} given, accepted is cuda, or cpu with TRITON_INTERPRET=1 set from the start"
    if problem.dtype == torch.float64:
        return "dtype: torch.float64 given, accepted are fp32, bf16 and fp16"
    if problem.width == 0:
        return "hidden: of width 0 given, accepted is 1 and more"
    target = target_of(problem.device)
    if target.kind == "cuda" and target.arch < 80:
        return f"device: compute capability {target.arch / 10} given, accepted is 8.0 and newer"
    return config.why_not_cached(problem.dtype, problem.softcap) if strategy == "cached" else None


def why_not_default(problem: Problem) -> str | None:
    """The reason it is not chosen unasked, or None."""
    if config.interpreted():
        return "the interpreter is for tests; backend='triton' asks for it"
    target = target_of(problem.device)
    if target.arch in MEASURED:
        return None
    return f"never yet measured on a GPU like this ({target.kind} {target.arch / 10}); backend='triton' asks for it"


def schedule(problem: Problem, strategy: str | None) -> Schedule:
    return plan.make_schedule(problem, strategy, target_of(problem.device))


def one_pass_schedule(problem: Problem, strategy: str | None) -> Schedule:
    return plan.one_pass_schedule(problem, strategy, target_of(problem.device))


def gradient_dtype(problem: Problem) -> torch.dtype:
    """Of dz."""
    return problem.dtype


def _counting(counts: Tensor) -> tuple[Tensor, Tensor]:  # [N] bool -> [N] int64, [1] int64
    """Positions of the rows that count, in order and then zeros, and how many there are: without asking the device."""
    n = len(counts)
    rank = counts.cumsum(0)
    slot = torch.where(counts, rank - 1, n)  # all others share a slot past the end
    positions = torch.zeros(n + 1, dtype=torch.int64, device=counts.device)
    positions.scatter_(0, slot, torch.arange(n, dtype=torch.int64, device=counts.device))
    return positions[:n], rank[-1:]


def statistics(operands: Operands, counts: Tensor, problem: Problem, schedule: Schedule, with_entropy: bool):  # [N] bool
    """:class:`Statistics` of the rows that count, and E and its exponents for the first of them, or None."""
    result = Statistics.empty(len(counts), torch.float32, counts.device)
    cache = _empty_cache(schedule.cached_rows, problem)
    if len(counts):
        positions, count = _counting(counts)
        _stream(operands, positions, count, positions, with_entropy, cache, result)
    return Statistics(*result), cache


def row_statistics(operands: Operands, rows: Tensor, problem: Problem, schedule: Schedule, with_entropy: bool, keep: bool = False):
    """:class:`Statistics` of the rows [n], and, to ``keep``, their E and its exponents for :func:`gradient_tiles`."""
    n = len(rows)
    result = Statistics.empty(n, torch.float32, rows.device)
    cache = _empty_cache(n if keep else 0, problem)
    if n:
        count = torch.full((1,), n, dtype=torch.int64, device=rows.device)
        _stream(operands, rows, count, torch.arange(n, dtype=torch.int64, device=rows.device), with_entropy, cache, result)
    return Statistics(*result), cache


def _empty_cache(rows: int, problem: Problem) -> tuple[Tensor, Tensor] | None:
    if not rows:
        return None
    row, more = cache_widths(problem)
    e = torch.empty(rows, row, dtype=torch.bfloat16, device=problem.device)
    return e, torch.empty(rows, more, dtype=torch.int32, device=problem.device)


def _stream(operands, rows, count, positions, with_entropy, cache, result) -> None:
    """The first ``count`` of ``rows`` through both kernels, into ``result`` [4, n] at their ``positions``."""
    from bupo_kernels.backends.triton_.linear_statistics import linear_statistics
    from bupo_kernels.backends.triton_.merge import merge
    from bupo_kernels.backends.triton_.product import Launch

    launch = Launch(operands, rows, target_of(rows.device))
    partials = linear_statistics(launch, count, with_entropy=with_entropy, cache=cache)
    merge(partials, count, positions, result, with_entropy=with_entropy)


def gradient_tiles(
    operands: Operands,
    rows: Tensor,  # [n]
    coefficients: Coefficients,
    problem: Problem,
    schedule: Schedule,
    cache: tuple[Tensor, Tensor, Tensor] | None,  # E, its exponents, and where in them each row would be [n]
) -> Iterator[GradientTile]:
    from bupo_kernels.backends.triton_.gradient_cached import gradient_cached
    from bupo_kernels.backends.triton_.gradient_recompute import gradient_recompute
    from bupo_kernels.backends.triton_.product import Launch, regular

    n, vocab, width = len(rows), problem.vocab, problem.width
    if n == 0:
        return
    target = target_of(rows.device)
    from_cache, cache_rows = 0, None
    if cache is not None:
        e, exponents, cache_rows = cache
        from_cache = int((cache_rows < len(e)).sum())
        as_written = regular(operands.hidden, operands.weight)
        exponent_columns = config.statistics_config(problem.dtype, target, regular=as_written, softcap=False, cache=True).columns
    columns_of_dz = min(schedule.tile.columns, config.padded(vocab))
    dz = torch.empty(min(schedule.tile.rows, n), columns_of_dz, dtype=gradient_dtype(problem), device=rows.device)
    blocks = [slice(first, min(first + schedule.tile.rows, n)) for first in range(0, n, schedule.tile.rows)]
    splits = [min(max(from_cache, block.start), block.stop) for block in blocks]  # before it from E, from it on recomputed
    launches = [Launch(operands, rows[split : block.stop], target) for block, split in zip(blocks, splits, strict=True)]
    coordinates = operands.coordinates(rows)

    def hidden_rows(block: slice) -> Tensor | None:  # [r, D]
        if not problem.grad_weight:
            return None
        if n == problem.rows and operands.hidden.is_contiguous():
            return operands.hidden.view(n, width)[block]
        return operands.hidden[tuple(i[block] for i in coordinates)]

    all_hidden = hidden_rows(blocks[0]) if len(blocks) == 1 else None
    for start in range(0, vocab, schedule.tile.columns):
        columns = slice(start, min(start + schedule.tile.columns, vocab))
        for block, split, launch in zip(blocks, splits, launches, strict=True):
            if split > block.start:
                part = slice(block.start, split)
                gradient_cached((e, exponents), exponent_columns, cache_rows[part], coefficients.rows(part), dz, columns)
            if split < block.stop:
                part = slice(split, block.stop)
                gradient_recompute(launch, coefficients.rows(part), dz[split - block.start :], columns)
            tile = dz[: block.stop - block.start, : columns.stop - columns.start]
            hidden = hidden_rows(block) if all_hidden is None else all_hidden
            yield GradientTile(columns, block, tile, operands.weight[columns], hidden)
