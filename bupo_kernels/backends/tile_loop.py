"""The loop around a library's product: one ``[rows, columns]`` tile of logits at a time is multiplied, and handed to row kernels.

Slices of the vocabulary are the outer loop and blocks of rows the inner one, forward and backward, so W is read (and, where it is
upcast, converted) once a pass and ``dW[slice]`` is finished, and rounded, once. What is done to the rows of a tile is a matter of
:class:`RowKernels`, which ``torch_.py`` has in torch and ``native_rows.py`` in C++ and CUDA.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from bupo_kernels.backends import machine
from bupo_kernels.backends.algebra import Coefficients, Statistics, lowest
from bupo_kernels.backends.base import Backend, Cache, Memory, Operands, Problem, Readout, Tile, TilePlan, row_blocks
from bupo_kernels.backends.compiled import present
from bupo_kernels.backends.gradients import PRODUCT_ROWS, MatrixTile, RowsTile, accumulate_, whole_rows
from bupo_kernels.backends.machine import Gpu, Seconds
from bupo_kernels.backends.quantised import rows_of

# The largest tiles worth having (rows, columns). On a CPU two fp32 tiles of 512 x 2048 are 8 MiB, which stays in a shared L3 while
# the statistics sweep over what the GEMM has just written. Elsewhere they are large enough to fill a GPU, small against its memory,
# and high, since each block of rows is a pass over the sum of dW.
CPU_TILE = (512, 2048)
DEVICE_TILE = (16384, 8192)
SMALL_TILE = 64  # rows, columns: below this products are slow, so slices are cut so that this many rows fit


class Block(NamedTuple):
    """One tile of products and what it was made of. ``tile`` and ``scratch`` are overwritten by the next one."""

    columns: slice
    rows: slice
    weight: Tensor  # [c, D]
    hidden: Tensor  # [r, D]
    bias: Tensor | None  # [c]
    tile: Tensor  # [r, c]: products, or what a fold left of them in the cache
    scratch: Tensor  # [r, c]: for a fold of the dtype of the tile; for a gradient of that of dz
    readout: Readout  # of these rows
    maxima: Tensor | None  # [r]: what was subtracted from a tile that comes from the cache; None for products


class RowKernels(Protocol):
    """The two kernels that work on the rows of a tile."""

    def fold(
        self,
        block: Block,
        targets: Tensor,  # [r]
        running: Statistics,  # [r] each
        with_entropy: bool,
    ) -> Tensor | float:  # [r]
        """Fold the tile into the ``running`` statistics of its rows. Leave logits in it less what is returned, for the cache."""
        ...

    def gradient(self, block: Block, coefficients: Coefficients) -> Tensor:  # [r] each -> [r, c]
        """Return dz of the tile, in ``block.scratch``; the tile may be overwritten."""
        ...


class TileLoop(Backend):
    """A backend that forms tiles by the library's product and leaves their rows to its :class:`RowKernels`."""

    # Passes over a tile of fp32 products that are made on a GPU beside the products: in a forward, and to form dz.
    passes: ClassVar[float]
    passes_of_gradient: ClassVar[float]
    writes_over: ClassVar[bool] = True  # whether dz of 16 bit may be written over the logits that it is made of

    def predicted_forward(self, problem: Problem, gpu: Gpu) -> float:
        return self._of_products(problem, gpu) + machine.moved(gpu, 4 * self.passes * problem.shape.logits)

    def predicted(self, plan: TilePlan, gpu: Gpu) -> Seconds | None:
        problem = plan.problem
        forward, backward = self.predicted_forward(problem, gpu), 0.0
        if problem.needs_grad:
            backward = machine.moved(gpu, 4 * self.passes_of_gradient * problem.shape.logits)
            backward += 0.0 if plan.cached_rows else self._of_products(problem, gpu)
            backward += machine.gradients_of_dz(
                *(gpu, problem.shape, problem.grad_hidden + problem.grad_weight, sum(plan.bytes_of_sums)),
                upcast=problem.product_dtype != problem.dtype,
            )
        return Seconds(forward + backward, 0.0) if plan.chunk_rows else Seconds(forward, backward)

    def _of_products(self, problem: Problem, gpu: Gpu) -> float:
        return machine.product(gpu, problem.shape, upcast=problem.product_dtype != problem.dtype)

    @abstractmethod
    def row_kernels(self, plan: TilePlan) -> RowKernels:
        """Return the kernels that work on the rows of a tile."""

    def plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        return recomputing_plan(problem)

    def gradient_dtype(self, problem: Problem) -> torch.dtype:
        return problem.product_dtype

    def one_pass_plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        """Plan chunks of rows as high as the budget allows beside the tiles; their logits are kept, whole.

        Where dz is of 16 bit it lies over them, and tiles are of a quarter of the budget at most: no product is of one of them.
        """
        size, item = problem.statistics_dtype.itemsize, problem.product_dtype.itemsize
        in_place = self.writes_over and problem.needs_grad and item < size and not problem.quantised
        kept, share = (row_elements(problem.vocab), 4) if in_place else (problem.vocab, 2)
        problem.require_budget(share * max(memory(problem, Tile(1, 1)).working, size * (2 * kept + problem.width)))
        inner = recomputing_plan(replace(problem, memory_budget=problem.memory_budget // share))
        if not problem.needs_grad:
            return inner._replace(problem=problem, chunk_rows=max(problem.active_rows, 1))
        columns, working = inner.tile.columns, inner.memory.working
        # Each row of the chunk has its logits, their maxima, and the sum of its dH; in place also its h, for dW.
        # Of a shard there is the sum of one more chunk, which the ranks add while this one is at hand.
        per_row = size * (kept + -(-problem.vocab // columns) + problem.width * problem.grad_hidden * (1 + problem.sharded))
        per_row += item * problem.width * in_place
        chunk = max(min((problem.memory_budget - working) // per_row, problem.active_rows), 1)
        in_parts = problem.active_rows > chunk and problem.grad_weight and problem.dtype.itemsize < size
        used = Memory(working + chunk * per_row, 0, problem.vocab * problem.width * size if in_parts else 0)
        tile = Tile(min(inner.tile.rows, chunk), columns)
        return inner._replace(
            problem=problem,
            strategy="one pass, dz over logits" if in_place else "one pass",
            tile=tile,
            memory=used,
            cached_rows=problem.active_rows,
            chunk_rows=chunk,
            in_place=in_place,
        )

    def row_statistics(
        self, operands: Operands, rows: Tensor, plan: TilePlan, *, with_entropy: bool, keep: bool
    ) -> tuple[Statistics, Cache]:
        problem, kernels = plan.problem, self.row_kernels(plan)
        dtype = problem.statistics_dtype
        targets = operands.targets.flatten()[rows]
        statistics = Statistics(*Statistics.empty(len(rows), dtype, rows.device))
        statistics.m.fill_(lowest(dtype))
        statistics.s.zero_()
        cache = self.empty_cache(problem, 0)
        if keep and plan.chunk_rows:
            slices = -(-problem.vocab // plan.tile.columns)
            columns = row_elements(problem.vocab) if plan.in_place else problem.vocab
            logits = present(torch.empty(len(rows) * columns, dtype=dtype, device=rows.device))
            cache = Cache(logits, torch.empty(len(rows), slices, dtype=dtype, device=rows.device))
        elif keep:
            cache = self.empty_cache(problem, plan.cached_rows)
            present(cache.values)
        kept = min(len(cache.offsets), len(rows))
        for block in _products(operands, rows, plan, dtype, cache, kept):
            r = block.rows
            subtracted = kernels.fold(block, targets[r], Statistics(*(x[r] for x in statistics)), with_entropy)
            if r.stop <= kept:
                cache.offsets[r, block.columns.start // plan.tile.columns] = subtracted
        return statistics, cache

    def gradient_tiles(
        self,
        operands: Operands,
        rows: Tensor,  # [n]
        coefficients: Coefficients,  # [n] each
        plan: TilePlan,
        cache: Cache,
        cache_rows: Tensor | None,  # [n]
    ) -> Iterator[MatrixTile | RowsTile]:
        kernels, of_dz = self.row_kernels(plan), self.gradient_dtype(plan.problem)
        blocks = _from_cache(operands, rows, plan, of_dz, cache, cache_rows)
        if not plan.in_place:
            for block in blocks:
                dz = kernels.gradient(block, coefficients.rows(block.rows))
                yield MatrixTile(block.columns, block.rows, dz, block.weight, block.hidden)
            return
        # In its row dz of a slice lies where logits of it, or of slices before it, were: all read by then.
        whole = cache.values.view(of_dz).view(len(cache.offsets), -1)[: len(rows), : plan.problem.vocab]
        for block in blocks:
            kernels.gradient(block._replace(scratch=whole[block.rows, block.columns]), coefficients.rows(block.rows))
        hidden = operands.hidden[operands.coordinates(rows)] if plan.problem.grad_weight else None
        yield from whole_rows(whole, operands.weight, hidden, plan.tile.columns)


def _blocks(operands: Operands, rows: Tensor, plan: TilePlan, of_scratch: torch.dtype, cached: int) -> Iterator[Block]:
    """Yield all tiles, slice by slice, with memory for the products and not yet formed; none has rows on both sides of
    ``cached``."""
    hidden, weight, bias, _, readout = operands
    problem, tile, count, vocab = plan.problem, plan.tile, len(rows), weight.shape[0]
    if count == 0:
        return
    of_operands = problem.product_dtype
    tile_buffer, scratch_buffer = (
        torch.empty(tile.rows * tile.columns, dtype=dtype, device=hidden.device) for dtype in (problem.statistics_dtype, of_scratch)
    )
    coordinates, blocks = operands.coordinates(rows), row_blocks(count, cached, tile.rows)

    def gathered(block: slice) -> tuple[Tensor, Readout]:  # [r, D]
        index = tuple(i[block] for i in coordinates)
        return hidden[index].to(of_operands), readout.rows(index, problem.statistics_dtype)

    only = gathered(blocks[0]) if len(blocks) == 1 else None
    for start in range(0, vocab, tile.columns):
        columns = slice(start, min(start + tile.columns, vocab))
        w = rows_of(weight, columns).to(of_operands)
        b = None if bias is None else bias[columns].to(problem.statistics_dtype)
        for block in blocks:
            h, of_rows = only or gathered(block)
            shape = len(h), len(w)
            z, scratch = (x[: shape[0] * shape[1]].view(shape) for x in (tile_buffer, scratch_buffer))
            yield Block(columns, block, w, h, b, z, scratch, of_rows, None)


def _products(
    operands: Operands, rows: Tensor, plan: TilePlan, of_scratch: torch.dtype, cache: Cache, cached: int
) -> Iterator[Block]:
    """Yield all tiles of products; those of the first ``cached`` rows in the memory of the ``cache``."""
    for block in _blocks(operands, rows, plan, of_scratch, cached):
        if block.rows.stop <= cached:
            block = block._replace(tile=_slice_of(cache, block.columns, plan)[block.rows])
        accumulate_(block.tile, block.hidden, block.weight.T, first=True)
        yield block


def _from_cache(
    operands: Operands, rows: Tensor, plan: TilePlan, of_scratch: torch.dtype, cache: Cache, cache_rows: Tensor | None
) -> Iterator[Block]:
    """Yield all tiles: as the fold left them in the ``cache``, its first rows where they lie or a copy of some of them; and
    products of rows that are not there, which are the last ones."""
    cached, as_they_lie = 0 if cache_rows is None else len(cache_rows), False
    if cache_rows is not None and plan.chunk_rows:  # all are there, and nothing is to wait for a device
        as_they_lie = cached == len(cache.offsets)
    elif cache_rows is not None and cached:
        cached = cache.count(cache_rows)
        # They ascend: where the last is the one of its number, all before it are there.
        as_they_lie = cached > 0 and int(cache_rows[cached - 1]) == cached - 1
    for block in _blocks(operands, rows, plan, of_scratch, cached):
        if cache_rows is None or block.rows.start >= cached:
            accumulate_(block.tile, block.hidden, block.weight.T, first=True)
            yield block
            continue
        which: slice | Tensor = block.rows
        if as_they_lie:
            block = block._replace(tile=_slice_of(cache, block.columns, plan)[block.rows])
        else:
            which = cache_rows[block.rows]
            torch.index_select(_slice_of(cache, block.columns, plan), 0, which, out=block.tile)
        yield block._replace(maxima=cache.offsets[which, block.columns.start // plan.tile.columns])


def _slice_of(cache: Cache, columns: slice, plan: TilePlan) -> Tensor:  # [n, c]
    n = len(cache.offsets)
    if plan.in_place:
        return cache.values.view(n, -1)[:, columns]
    return cache.values[n * columns.start : n * columns.stop].view(n, columns.stop - columns.start)


def row_elements(vocab: int) -> int:
    """Return how far apart rows of logits are that dz is written over: 128 bytes of fp32 where dz of them begins on as many, and
    what a library reads of each row is aligned."""
    return -(-vocab // 32) * 32


def recomputing_plan(problem: Problem) -> TilePlan:
    """Return the plan of a forward and a backward that keep nothing for one another but statistics. Raise :class:`TooSmall` where
    the budget does not hold the smallest tile."""
    problem.require_budget(memory(problem, Tile(1, 1)).working)
    tile = largest_tile(problem)
    return TilePlan(problem, "recompute" if problem.needs_grad else "statistics only", tile, memory(problem, tile))


def largest_tile(problem: Problem) -> Tile:
    """Return the largest tile within the budget. Slice borders depend on V, D and the budget, not on the number of rows (but where
    the budget only just holds the statistics of that many rows)."""
    most_rows, most_columns = CPU_TILE if problem.device.type == "cpu" else DEVICE_TILE

    def fits(rows: int, columns: int, problem: Problem) -> bool:
        return memory(problem, Tile(rows, columns)).working <= problem.memory_budget

    columns = min(most_columns, problem.vocab)
    while columns > SMALL_TILE and not fits(SMALL_TILE, columns, replace(problem, active_rows=0)):
        columns = (columns + 1) // 2
    rows = max(min(most_rows, problem.active_rows), 1)
    while rows > 1 and not fits(rows, columns, problem):
        rows = (rows + 1) // 2
    while columns > 1 and not fits(rows, columns, problem):
        columns = (columns + 1) // 2
    return Tile(rows, columns)


def memory(problem: Problem, tile: Tile, cached: int = 0) -> Memory:
    """Return what a call allocates with this tile beside what it keeps of the ``cached`` rows; a test holds it against what the
    allocator saw."""
    size, item, of_product = (dtype.itemsize for dtype in (problem.statistics_dtype, problem.dtype, problem.product_dtype))
    narrow, upcast = item < size, item < of_product
    tile_bytes = tile.rows * tile.columns * size
    # The next block of rows (slice of W) is made while the last one is still held; so are rows of dH when they are put in place.
    row_block = tile.rows * problem.width * of_product
    # Of a quantised slice there are the numbers, and what its class needs to come by them.
    weight_slice = tile.columns * problem.width * size * (2 if problem.quantised else upcast)
    gathered = tile.rows * problem.width * item * upcast
    several_slices = problem.vocab > tile.columns
    several_tiles = several_slices or problem.active_rows > tile.rows or 0 < cached < problem.active_rows
    rows = problem.active_rows + tile.rows
    # A row has coordinates and targets in int64, running statistics, and in the backward coefficients, and a selection of all
    # these.
    forward = 2 * tile_bytes + (1 + several_tiles) * row_block + gathered + (1 + several_slices) * weight_slice
    forward += rows * (6 * 8 + 10 * size)
    backward = 0
    if problem.needs_grad:
        rounded = of_product < size  # dz is made in the dtype of the tile first, and products of it are, before they are added
        backward = (2 + problem.softcap) * tile_bytes + rounded * tile.rows * tile.columns * of_product
        backward += 2 * row_block + gathered + (1 + several_slices) * weight_slice
        backward += rounded * min(PRODUCT_ROWS, max(tile.rows, tile.columns)) * problem.width * size
        backward += rows * (10 * 8 + 26 * size)
        # fp32 sum of the slice's dW before it is rounded
        backward += tile.columns * problem.width * size * (2 if problem.quantised else narrow) * problem.grad_weight
        backward += tile.columns * size * 2 * problem.grad_bias
    accumulator = problem.active_rows * problem.width * size if problem.grad_hidden and narrow else 0
    return Memory(forward, backward, accumulator)
