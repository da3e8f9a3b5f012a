"""Fused kernels for GPUs: a tile of logits is multiplied, folded into the row's statistics or turned into its gradient, and gone.

``linear_statistics.py`` streams W once and leaves partials per vocabulary split, ``merge.py`` folds them in order.
``gradient_recompute.py`` forms dz of a vocabulary slice again, ``gradient_cached.py`` has it from the E that the forward kept;
the products of dz with W and H are the library's. ``config.py`` has every number. Under ``TRITON_INTERPRET=1`` all of it runs on
the CPU, which is how it is tested without a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.gradients import PRODUCT_ROWS, GradientTile
from bupo_kernels.backends.problem import Memory, Operands, Problem, Schedule, Tile
from bupo_kernels.backends.triton_ import config

STRATEGIES = ("recompute", "cached")

# Compute capabilities (x 10) on which `make gpu` has passed and its result is committed. "auto" takes Triton only there: on any
# other GPU these kernels have been compiled and interpreted, but never run.
MEASURED: frozenset[int] = frozenset()


def target_of(device: torch.device) -> config.Target:
    if config.interpreted():
        return config.Target("cuda", 80, processors=3)  # several work items for each of few programs
    properties = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else "cuda"
    arch = 0 if kind == "hip" else 10 * properties.major + properties.minor
    return config.Target(kind, arch, properties.multi_processor_count)


def why_not(problem: Problem, strategy: str | None) -> str | None:
    """The reason this backend cannot run ``problem``, or None."""
    if importlib.util.find_spec("triton") is None:
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


def cached_rows(problem: Problem, strategy: str | None) -> int:
    """How many rows (the first that count) leave their E. Half of the budget may hold it; unasked, it must hold half of the rows,
    since the forward that writes E is tiled for that and not for speed."""
    if not problem.needs_grad or strategy == "recompute":
        return 0
    if strategy is None and (config.why_not_cached(problem.dtype, problem.softcap) or problem.width < config.CACHE_MIN_WIDTH):
        return 0
    row, more = cache_widths(problem)
    limit = problem.memory_budget // 2 // (2 * row + 4 * more)
    if strategy is None and limit * 2 < problem.rows:
        return 0
    return torch.sym_min(problem.rows, limit)


def cache_widths(problem: Problem) -> tuple[int, int]:
    """Elements of a row of E (bf16) and of its exponents (int32)."""
    return config.padded(problem.vocab), config.exponents_per_row(problem.vocab)


def schedule(problem: Problem, strategy: str | None) -> Schedule:
    """Slices of the backward as wide as the budget allows, of all rows if it can: then dW[slice] is one product.

    Raises ``ValueError`` when the budget does not hold the smallest tile.
    """
    cached = cached_rows(problem, strategy)
    if strategy == "cached" and problem.needs_grad and problem.rows and not cached:
        row, more = cache_widths(problem)
        least = 2 * (2 * row + 4 * more)
        raise ValueError(f"memory_budget: {problem.memory_budget} bytes given, accepted are at least {least} to keep one row of E")
    unit = config.COLUMN_UNIT
    smallest = memory(problem, Tile(1, unit), cached)
    least = max(smallest.forward, smallest.backward)
    if least > problem.memory_budget:
        raise ValueError(f"memory_budget: {problem.memory_budget} bytes given, accepted are at least {least} for this many rows")

    def fits(rows: int, columns: int) -> bool:
        return memory(problem, Tile(rows, columns), cached).backward <= problem.memory_budget

    rows, columns = max(problem.planned_rows, 1), min(config.padded(problem.vocab), config.MOST_COLUMNS)
    while columns > config.FEWEST_COLUMNS and not fits(rows, columns):
        columns = max(columns // 2 // unit, 1) * unit
    while rows > 1 and not fits(rows, columns):
        rows = (rows + 1) // 2
    while columns > unit and not fits(rows, columns):
        columns = max(columns // 2 // unit, 1) * unit
    tile = Tile(rows, columns)
    strategies = "statistics only" if not problem.needs_grad else "cached and recompute" if cached else "recompute"
    if cached and cached >= problem.rows:
        strategies = "cached"
    return Schedule(strategies, tile, memory(problem, tile, cached), cached, _kernels(problem, cached))


def _kernels(problem: Problem, cached: int) -> tuple[str, ...]:
    target = target_of(problem.device)
    kind = {"regular": True, "softcap": problem.softcap}
    forward = config.statistics_config(problem.dtype, target, cache=cached > 0, **kind)
    lines = [f"statistics {forward}, splits of {config.split_columns(problem.vocab)} columns"]
    if problem.needs_grad:
        lines.append(f"gradient {config.gradient_config(problem.dtype, target, **kind)}")
    return tuple(lines)


def memory(problem: Problem, tile: Tile, cached: int) -> Memory:
    """What a call allocates; the gpu tests hold it against the allocator."""
    rows, item = problem.rows, problem.dtype.itemsize
    row, more = cache_widths(problem)
    kept = cached * (2 * row + 4 * more)
    splits = -(-problem.vocab // config.split_columns(problem.vocab))
    # Per row: masks, positions, offsets and targets of the rows that count (int64), scale, four statistics and their merged values.
    forward = kept + rows * (16 * splits + 6 * 8 + 16 * 4)
    backward = accumulator = 0
    if problem.needs_grad:
        sixteen_bit = item < 4
        backward = kept + rows * (10 * 8 + 26 * 4) + tile.rows * tile.columns * item
        backward += tile.rows * problem.width * item * problem.grad_weight  # rows of H, where some have left
        backward += tile.columns * problem.width * 4 * problem.grad_weight * sixteen_bit  # dW of the slice
        product_rows = min(PRODUCT_ROWS, max(tile.rows, tile.columns))
        backward += product_rows * problem.width * 4 * sixteen_bit * (problem.grad_hidden or problem.grad_weight)
        backward += tile.columns * 4 * 2 * problem.grad_bias
        accumulator = rows * problem.width * 4 if problem.grad_hidden and sixteen_bit else 0
    return Memory(forward, backward, accumulator, kept)


def gradient_dtype(problem: Problem) -> torch.dtype:
    """Of dz."""
    return problem.dtype


def _counting(counts: Tensor) -> tuple[Tensor, Tensor]:  # [N] bool -> [N] int64, [1] int64
    """Positions of the rows that count, in order and then zeros, and how many there are: without asking the device."""
    n = len(counts)
    rank = counts.cumsum(0)
    slot = torch.where(counts, rank - 1, n)  # all others share a slot past the end
    positions = torch.zeros(n + 1, dtype=torch.int64, device=counts.device)
    positions.scatter_(0, slot, torch.arange(n, device=counts.device))
    positions[n:].zero_()
    return positions[:n], rank[-1:]


def statistics(operands: Operands, counts: Tensor, problem: Problem, plan: Schedule, with_entropy: bool):  # [N] bool
    """:class:`Statistics` of the rows that count, and the cache: E and its exponents, or None."""
    from bupo_kernels.backends.triton_.linear_statistics import linear_statistics
    from bupo_kernels.backends.triton_.merge import merge
    from bupo_kernels.backends.triton_.product import Launch

    result = torch.stack(Statistics.empty(len(counts), torch.float32, counts.device))
    cache = None
    if plan.cached_rows:
        row, more = cache_widths(problem)
        e = torch.empty(plan.cached_rows, row, dtype=torch.bfloat16, device=counts.device)
        cache = e, torch.empty(plan.cached_rows, more, dtype=torch.int32, device=counts.device)
    if len(counts):
        positions, count = _counting(counts)
        launch = Launch(operands, positions, target_of(counts.device))
        partials, _ = linear_statistics(launch, count, with_entropy=with_entropy, cache=cache)
        merge(partials, None, count, positions, result, with_entropy=with_entropy)
    return Statistics(*result), cache


def gradient_tiles(
    operands: Operands,
    rows: Tensor,  # [n]
    coefficients: Coefficients,
    problem: Problem,
    plan: Schedule,
    cache: tuple[Tensor, Tensor, Tensor] | None,  # E, its exponents, and which rows [N] counted in the forward
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
        e, exponents, counts = cache
        cache_rows = (counts.cumsum(0) - 1)[rows]  # E lies in the order in which rows counted
        from_cache = int((cache_rows < len(e)).sum())
        as_written = regular(operands.hidden, operands.weight)
        exponent_columns = config.statistics_config(problem.dtype, target, regular=as_written, softcap=False, cache=True).columns
    columns_of_dz = min(plan.tile.columns, config.padded(vocab))
    dz = torch.empty(min(plan.tile.rows, n), columns_of_dz, dtype=gradient_dtype(problem), device=rows.device)
    dense = operands.hidden.reshape(-1, width) if n == problem.rows and operands.hidden.is_contiguous() else None
    coordinates = operands.coordinates(rows)
    for start in range(0, vocab, plan.tile.columns):
        columns = slice(start, min(start + plan.tile.columns, vocab))
        for first in range(0, n, plan.tile.rows):
            block = slice(first, min(first + plan.tile.rows, n))
            split = min(max(from_cache, block.start), block.stop)
            if split > block.start:
                part = slice(block.start, split)
                gradient_cached((e, exponents), exponent_columns, cache_rows[part], coefficients.rows(part), dz, columns)
            if split < block.stop:
                part = slice(split, block.stop)
                launch = Launch(operands, rows[part], target)
                gradient_recompute(launch, coefficients.rows(part), dz[split - block.start :], columns)
            hidden = None
            if problem.grad_weight:
                hidden = dense[block] if dense is not None else operands.hidden[tuple(i[block] for i in coordinates)]
            tile = dz[: block.stop - block.start, : columns.stop - columns.start]
            yield GradientTile(columns, block, tile, operands.weight[columns], hidden)
