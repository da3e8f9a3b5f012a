"""Which rows of the backward are recomputed and which come from E, in what tiles, at what cost in memory: pure functions.

* *recompute*, 8 N·V·D FLOP with the forward: dz of a vocabulary slice is formed again, ``dW[slice]`` is finished in one product
  over all rows, dH is summed over the slices in fp32.
* *cached*, 6 N·V·D: the forward keeps E for as many rows as half of the budget holds; the other rows are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from bupo_kernels.backends.base import Memory, Problem, Tile, TilePlan
from bupo_kernels.backends.gradients import PRODUCT_ROWS
from bupo_kernels.backends.triton_ import config
from bupo_kernels.backends.triton_.config import Target


def cached_rows(problem: Problem, strategy: str | None) -> int:
    """Return how many rows (the first that are active) leave their E. Half of the budget may hold it.

    Unasked only where that holds many, since the forward that writes E is tiled for it and not for speed. Whether E is kept must
    not depend on how many rows the call has: the two forwards may differ in a last bit, and no row may depend on the others.
    """
    if not problem.needs_grad or strategy == "recompute":
        return 0
    if strategy is None and (config.why_not_cached(problem.dtype, problem.softcap) or problem.width < config.CACHE_MIN_WIDTH):
        return 0
    limit = problem.memory_budget // 2 // _bytes_of_e(problem)
    if strategy is None and limit < config.CACHE_MIN_ROWS:
        return 0
    return torch.sym_min(problem.rows, limit)


def cache_widths(problem: Problem) -> tuple[int, int]:
    """Return the number of elements in a row of E (bf16) and in one of its exponents (int32)."""
    return config.padded(problem.vocab), config.exponents_per_row(problem.vocab)


def _bytes_of_e(problem: Problem) -> int:
    """Return the bytes of a row of E, with its exponents."""
    e, exponents = cache_widths(problem)
    return 2 * e + 4 * exponents


class Reads(NamedTuple):
    """What the kernels with a product read of H and W, and in what pieces it is copied (``copies.py``)."""

    width: int  # of rows, D or more
    rows: int  # of H that a forward gathers, and takes through the kernels, at a time
    columns: int  # of W that a forward copies at a time, where it copies
    copies_weight: bool


def reads(problem: Problem, target: Target) -> Reads:
    """Plan what the forward copies: H within an eighth of the budget, with the partials of its rows, and W within a quarter.

    W is copied, where it has to be, for any number of rows. A copy moves 4 bytes for each element in 16 bit, at 3 TB/s the time of
    470 rows' products at 700 TFLOP/s; without asynchronous copies products take five times as long or more, so that a call of 120
    rows, a block, has it back. For fewer it costs what reading W twice does. Only that is why there could be two ways, and then a
    row's last bits would depend on how many others there are.
    """
    width, item = config.read_width(problem.width, problem.dtype, target), problem.dtype.itemsize
    copies = 1 if width == problem.width else 2  # rows are gathered, and then put into wider ones
    split = config.split_columns(problem.vocab)
    stored = () if config.why_not_cached(problem.dtype, problem.softcap) else (True,)
    partials = max(_partials(problem, target, cache) for cache in (False, *stored))
    rows = problem.memory_budget // 8 // (copies * width * item + 16 * partials) // ROW_UNIT * ROW_UNIT
    columns = problem.memory_budget // 4 // (width * item) // split * split
    copies_weight = width != problem.width or not problem.aligned
    return Reads(width, max(rows, ROW_UNIT), min(max(columns, split), problem.vocab), copies_weight)


def _partials(problem: Problem, target: Target, cache: bool) -> int:
    """Return how many partials a row has."""
    tile = config.statistics_config(problem.dtype, target, width=problem.width, softcap=problem.softcap, cache=cache)
    return -(-problem.vocab // config.partial_columns(problem.vocab, tile))


# Rows that are gathered together are whole blocks of any kernel: one that stores E writes whole blocks.
ROW_UNIT = max(config.ACCEPTED["rows"])


def tile_plan(problem: Problem, strategy: str | None, target: Target) -> TilePlan:
    """Plan slices of the backward as wide as the budget allows, of all rows if it can: then dW[slice] is one product.

    Raise ``ValueError`` when the budget does not hold the smallest tile.
    """
    cached = cached_rows(problem, strategy)
    least = memory(problem, SMALLEST, 0, target).working
    if problem.needs_grad and (cached or strategy == "cached"):
        least = 2 * (least + _bytes_of_e(problem))  # E takes up to half
    problem.require_budget(least)
    tile = _largest_tile(
        lambda tile: memory(problem, tile, cached, target).backward <= problem.memory_budget, problem.planned_rows, problem.vocab
    )
    name = "statistics only" if not problem.needs_grad else "cached and recompute" if cached else "recompute"
    if cached and cached >= problem.rows:
        name = "cached"
    return TilePlan(problem, name, tile, memory(problem, tile, cached, target), cached, _kernels(problem, target, cached))


def one_pass_plan(problem: Problem, strategy: str | None, target: Target) -> TilePlan:
    """Plan chunks of rows as high as the budget allows, with their E; where E cannot be had, all rows at once and recomputed."""
    if not problem.needs_grad or strategy == "recompute" or config.why_not_cached(problem.dtype, problem.softcap):
        return tile_plan(problem, "recompute", target)._replace(chunk_rows=max(problem.active_rows, 1))

    def spent(tile: Tile) -> int:
        used = memory(replace(problem, rows=tile.rows, active_rows=tile.rows), tile, tile.rows, target)
        return used.working + used.accumulator

    problem.require_budget(spent(SMALLEST))
    tile = _largest_tile(lambda tile: spent(tile) <= problem.memory_budget, problem.active_rows, problem.vocab)
    several = problem.active_rows > tile.rows
    accumulator = problem.vocab * problem.width * 4 if several and problem.grad_weight else 0
    kernels = _kernels(problem, target, cached=tile.rows)
    return TilePlan(
        problem, "one pass", tile, Memory(spent(tile), 0, accumulator), problem.active_rows, kernels, chunk_rows=tile.rows
    )


SMALLEST = Tile(1, config.COLUMN_UNIT)


def _largest_tile(fits: Callable[[Tile], bool], rows: int, vocab: int) -> Tile:
    """Return the largest tile that ``fits``. Slices are narrowed first, down to where dH is summed too often; then there are blocks
    of rows, down to where products get slow; then narrower slices, and in the end single rows."""
    rows, columns = max(rows, 1), min(config.padded(vocab), config.MOST_COLUMNS)
    for fewest_rows, fewest_columns in ((rows, config.FEWEST_COLUMNS), (config.FEWEST_ROWS, 0), (0, 1), (1, 0)):
        while fewest_columns and columns > max(fewest_columns, config.COLUMN_UNIT) and not fits(Tile(rows, columns)):
            columns = max(columns // 2 // config.COLUMN_UNIT, 1) * config.COLUMN_UNIT
        while fewest_rows and rows > fewest_rows and not fits(Tile(rows, columns)):
            rows = (rows + 1) // 2
    return Tile(rows, columns)


def _kernels(problem: Problem, target: Target, cached: int) -> tuple[str, ...]:
    forward = config.statistics_config(problem.dtype, target, width=problem.width, softcap=problem.softcap, cache=cached > 0)
    read = reads(problem, target)
    of_weight = f"copied {read.columns} columns at a time, {_why_copied(read, problem)}" if read.copies_weight else "read in place"
    lines = [f"statistics {forward}, partials of {config.partial_columns(problem.vocab, forward)} columns"]
    if problem.needs_grad:
        backward = config.gradient_config(problem.dtype, target, width=problem.width, softcap=problem.softcap)
        lines.append(f"gradient {backward}")
    return (*lines, f"hidden gathered {read.rows} rows at a time, weight {of_weight}")


def _why_copied(read: Reads, problem: Problem) -> str:
    return f"{read.width} elements wide" if read.width != problem.width else "since its rows do not begin on multiples of 16 bytes"


def memory(problem: Problem, tile: Tile, cached: int, target: Target) -> Memory:
    """Return what a call allocates; the gpu tests hold it against the allocator."""
    rows, item, read = problem.rows, problem.dtype.itemsize, reads(problem, target)
    cache = cached * _bytes_of_e(problem)
    partials = _partials(problem, target, cached > 0)
    of_row = read.width * item + (problem.width * item if read.width != problem.width else 0)  # gathered, and made wider
    of_column = read.width * item * read.copies_weight
    # A row has masks, position, coordinates and target (int64), scale, four statistics and their merged values.
    forward = cache + rows * (6 * 8 + 16 * 4) + min(read.rows, rows) * (16 * partials + of_row) + read.columns * of_column
    backward = accumulator = 0
    if problem.needs_grad:
        sixteen_bit = item < 4
        backward = cache + rows * (10 * 8 + 26 * 4) + tile.rows * tile.columns * item
        recomputes = cached < rows
        backward += tile.rows * of_row * (recomputes or problem.grad_weight) + tile.columns * of_column * recomputes
        backward += tile.columns * problem.width * 4 * problem.grad_weight * sixteen_bit  # dW of the slice
        product_rows = min(PRODUCT_ROWS, max(tile.rows, tile.columns))
        backward += product_rows * problem.width * 4 * sixteen_bit * (problem.grad_hidden or problem.grad_weight)
        backward += tile.columns * 4 * 2 * problem.grad_bias
        accumulator = rows * problem.width * 4 if problem.grad_hidden and sixteen_bit else 0
    return Memory(forward, backward, accumulator)
