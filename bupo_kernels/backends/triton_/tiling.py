"""Which rows of the backward are recomputed and which come from E, in what tiles, at what cost in memory: pure functions.

* *recompute*, 8 N·V·D FLOP with the forward: dz of a vocabulary slice is formed again, ``dW[slice]`` is finished in one product
  over all rows where there is room for them, dH is summed over the slices in fp32.
* *cached*, 6 N·V·D: the forward keeps E for as many rows as half of the budget holds; the other rows are recomputed.
* *one pass*, 6 N·V·D, of a loss: dz of a chunk of rows is written over its E, and dH is one product over the whole vocabulary; dW
  is summed over the chunks in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from bupo_kernels.backends.base import Memory, Problem, Tile, TilePlan, bytes_of_sums
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
    """The rows of H and W that the kernels with a product read, and the pieces in which they are copied (``copies.py``)."""

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
    partials = max(
        _partials(problem.dtype, problem.width, problem.vocab, problem.softcap, cache, target) for cache in (False, *stored)
    )
    rows = problem.memory_budget // 8 // (copies * width * item + 16 * partials) // ROW_UNIT * ROW_UNIT
    columns = problem.memory_budget // 4 // (width * item) // split * split
    copies_weight = width != problem.width or not problem.aligned
    return Reads(width, max(rows, ROW_UNIT), min(max(columns, split), problem.vocab), copies_weight)


@functools.lru_cache(256)  # every tile that is tried for a plan asks, and none changes it
def _partials(dtype: torch.dtype, width: int, vocab: int, softcap: bool, cache: bool, target: Target) -> int:
    """Return how many partials a row has."""
    tile = config.statistics_config(dtype, target, width=width, softcap=softcap, cache=cache)
    return -(-vocab // config.partial_columns(vocab, tile))


# Rows that are gathered together are whole blocks of any kernel: one that stores E writes whole blocks.
ROW_UNIT = max(config.ACCEPTED["rows"])


def tile_plan(problem: Problem, strategy: str | None, target: Target) -> TilePlan:
    """Plan the tiles of the backward whose sums move the fewest bytes. Raise ``ValueError`` when the budget does not hold the
    smallest tile."""
    cached = cached_rows(problem, strategy)
    least = memory(problem, SMALLEST, 0, target).working
    if problem.needs_grad and (cached or strategy == "cached"):
        least = 2 * (least + _bytes_of_e(problem))  # E takes up to half
    problem.require_budget(least)
    tile = largest_tile(problem, strategy, target)
    name = "statistics only" if not problem.needs_grad else "cached and recompute" if cached else "recompute"
    if cached and cached >= problem.rows:
        name = "cached"
    return TilePlan(problem, name, tile, memory(problem, tile, cached, target), cached, _kernels(problem, target, cached))


def one_pass_plan(problem: Problem, strategy: str | None, target: Target) -> TilePlan:
    """Plan chunks of as many rows as the budget allows, with their E; where E cannot be had, all rows at once and recomputed."""
    if not problem.needs_grad or strategy == "recompute" or config.why_not_cached(problem.dtype, problem.softcap):
        return tile_plan(problem, "recompute", target)._replace(chunk_rows=max(problem.active_rows, 1))
    # A product of dW leaves so many columns in fp32, in no more than an eighth of the budget.
    columns = min(config.padded(problem.vocab), PRODUCT_ROWS)
    while columns > config.COLUMN_UNIT and 8 * 4 * columns * problem.width > problem.memory_budget:
        columns = _half(columns)

    def spent(rows: int) -> int:
        used = memory(replace(problem, rows=rows, active_rows=rows), Tile(rows, columns), rows, target, in_place=True)
        return used.working + used.accumulator

    problem.require_budget(spent(1))
    rows = _even(problem.active_rows, lambda rows: spent(rows) <= problem.memory_budget)
    in_parts = problem.active_rows > rows and problem.grad_weight
    used = Memory(spent(rows), 0, problem.vocab * problem.width * 4 if in_parts else 0)
    kernels = _kernels(problem, target, cached=rows)
    name, tile = "one pass, dz over E", Tile(rows, columns)
    return TilePlan(problem, name, tile, used, problem.active_rows, kernels, chunk_rows=rows, in_place=True)


SMALLEST = Tile(1, config.COLUMN_UNIT)
MANY_ROWS = 2**15  # slices that are best for these are what a call of any number of rows has


def largest_tile(problem: Problem, strategy: str | None, target: Target) -> Tile:
    """Return the tile of the backward: slices as :func:`slice_columns` has them, of all rows or, where the budget does not hold
    them, of blocks of one height. Where it only just holds what all rows have beside tiles, slices are narrowed in the end."""
    cached = cached_rows(problem, strategy)
    columns = slice_columns(replace(problem, rows=0, active_rows=0), strategy, target)

    def fits(rows: int) -> bool:
        return memory(problem, Tile(rows, columns), cached, target).backward <= problem.memory_budget

    while columns > config.COLUMN_UNIT and not fits(1):
        columns = _half(columns)
    return Tile(_even(problem.planned_rows, fits), columns)


@functools.lru_cache(256)  # every call of an op asks
def slice_columns(problem: Problem, strategy: str | None, target: Target) -> int:
    """Return the columns of a slice with which the sums of dH and dW move the fewest bytes in a call of many rows.

    A slice is a pass over the sum of dH, and each of its blocks of rows one over its part of dW: wide slices leave room for few
    rows. The rows of the call, which are 0 in ``problem``, have no say, so that each row's dH is summed in the same order with any
    others.
    """
    # What many rows have beside tiles is to leave most of a small budget.
    beside = memory(replace(problem, rows=1, active_rows=1), Tile(0, 0), 0, target).backward
    count = min(MANY_ROWS, max(problem.memory_budget // (4 * beside), 1)) if beside else 1
    many = replace(problem, rows=count, active_rows=count)
    cached = cached_rows(many, strategy)

    def moved(columns: int) -> int:
        rows = _most(lambda rows: memory(many, Tile(rows, columns), cached, target).backward <= many.memory_budget, count)
        return sum(bytes_of_sums(many, Tile(rows, columns)))

    slices = range(-(-problem.vocab // config.MOST_COLUMNS), config.padded(problem.vocab) // config.COLUMN_UNIT + 1)
    return min((config.padded(-(-problem.vocab // count)) for count in slices), key=moved)


def _half(columns: int) -> int:
    return max(columns // 2 // config.COLUMN_UNIT, 1) * config.COLUMN_UNIT


def _even(rows: int, fits: Callable[[int], bool]) -> int:
    """Return the rows of a block, where there are as few blocks as are of rows that ``fit``, and all of one height."""
    blocks = -(-rows // _most(fits, rows))
    return -(-rows // max(blocks, 1)) or 1


def _most(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 1 to ``most`` that ``fits``, of which smaller ones do too; 1 where none does."""
    least = 1
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _kernels(problem: Problem, target: Target, cached: int) -> tuple[str, ...]:
    forward = config.statistics_config(problem.dtype, target, width=problem.width, softcap=problem.softcap, cache=cached > 0)
    read = reads(problem, target)
    of_weight = f"copied {read.columns} columns at a time, {_why_copied(read, problem)}" if read.copies_weight else "read in place"
    lines = [f"statistics {forward}, partials of {config.partial_columns(problem.vocab, forward)} columns"]
    if problem.needs_grad:
        backward = config.gradient_config(problem.dtype, target, width=problem.width, softcap=problem.softcap)
        lines.append(f"gradient {backward}")
    return (*lines, f"hidden gathered {min(read.rows, problem.rows)} rows at a time, weight {of_weight}")


def _why_copied(read: Reads, problem: Problem) -> str:
    return f"{read.width} elements wide" if read.width != problem.width else "since its rows do not begin on multiples of 16 bytes"


def memory(problem: Problem, tile: Tile, cached: int, target: Target, *, in_place: bool = False) -> Memory:
    """Return what a call allocates; the gpu tests hold it against the allocator."""
    rows, item, read = problem.rows, problem.dtype.itemsize, reads(problem, target)
    cache = cached * _bytes_of_e(problem)
    partials = _partials(problem.dtype, problem.width, problem.vocab, problem.softcap, cached > 0, target)
    of_row = read.width * item + (problem.width * item if read.width != problem.width else 0)  # gathered, and made wider
    of_column = read.width * item * read.copies_weight
    # A row has masks, position, coordinates and target (int64), scale, four statistics and their merged values.
    forward = cache + rows * (6 * 8 + 16 * 4) + min(read.rows, rows) * (16 * partials + of_row) + read.columns * of_column
    backward = accumulator = 0
    if problem.needs_grad:
        sixteen_bit = item < 4
        backward = cache + rows * (10 * 8 + 26 * 4) + tile.rows * tile.columns * item * (not in_place)
        recomputes = cached < rows
        backward += tile.rows * of_row * (recomputes or problem.grad_weight) + tile.columns * of_column * recomputes
        if in_place:  # a product of dW, added to a sum of the whole; that of dH is made where it is to be
            backward += tile.columns * problem.width * 4 * problem.grad_weight
        else:
            backward += tile.columns * problem.width * 4 * problem.grad_weight * sixteen_bit  # dW of the slice
            product_rows = min(PRODUCT_ROWS, max(tile.rows, tile.columns))
            backward += product_rows * problem.width * 4 * sixteen_bit * (problem.grad_hidden or problem.grad_weight)
        backward += tile.columns * 4 * 2 * problem.grad_bias
        accumulator = rows * problem.width * 4 if problem.grad_hidden and sixteen_bit else 0
        if in_place and problem.sharded:  # the ranks add the sum of one chunk while the next one is at hand
            accumulator += rows * problem.width * 4 * problem.grad_hidden
    return Memory(forward, backward, accumulator)
