"""Which rows of the backward are recomputed and which come from E, in what tiles, at what cost in memory: pure functions.

* *recompute*, 8 N·V·D FLOP with the forward: dz of a vocabulary slice is formed again, ``dW[slice]`` is finished in one product
  over all rows, dH is summed over the slices in fp32.
* *cached*, 6 N·V·D: the forward keeps E for as many rows as half of the budget holds; the other rows are recomputed.
"""

from __future__ import annotations

import torch

from bupo_kernels.backends.gradients import PRODUCT_ROWS
from bupo_kernels.backends.problem import Memory, Problem, Schedule, Tile
from bupo_kernels.backends.triton_ import config
from bupo_kernels.backends.triton_.config import Target


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


def make_schedule(problem: Problem, strategy: str | None, target: Target) -> Schedule:
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
    return Schedule(strategies, tile, memory(problem, tile, cached), cached, _kernels(problem, target, cached))


def _kernels(problem: Problem, target: Target, cached: int) -> tuple[str, ...]:
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
