"""Statistics and gradients of ``softmax(h Wᵀ)`` in plain torch, one ``[rows, columns]`` tile of logits at a time.

Runs wherever torch runs. Vocabulary slices are the outer loop and row blocks the inner one, forward and backward, so W is
read (and, in 16 bit, upcast) once per pass and ``dW[slice]`` is finished, and rounded, once.

Every product is taken between operands of the statistics' dtype (fp32; float64 for float64 inputs): a 16-bit operand is
upcast tile by tile, which is exact, because torch has no portable 16-bit product that keeps its fp32 accumulator. On a GPU
this runs at the fp32 rate of the library GEMM and follows ``torch.backends.cuda.matmul``'s TF32 setting (off by default).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import LEAST_EXPONENT, Coefficients, Statistics, lowest, of_all_rows
from bupo_kernels.backends.compiled import present
from bupo_kernels.backends.gradients import GradientTile, accumulate_
from bupo_kernels.backends.problem import Memory, Operands, Problem, Readout, Schedule, Tile
from bupo_kernels.backends.quantised import rows_of

# Largest tile worth having (rows, columns). CPU: two fp32 tiles of 512 x 2048 are 8 MiB, which stays in a shared L3 while
# the statistics sweep over what the GEMM has just written. Elsewhere: large enough to fill a GPU, small against its memory.
CPU_TILE = (512, 2048)
DEVICE_TILE = (4096, 8192)
SMALL_TILE = 64  # rows, columns: below this products are slow, so slices are cut so that this many rows fit


STRATEGIES = ("recompute",)


def why_not(problem: Problem, strategy: str | None) -> str | None:
    """The reason this backend cannot run ``problem``, or None."""
    return None


def why_not_default(problem: Problem) -> str | None:
    """The reason it is not chosen unasked, or None."""
    return None


def schedule(problem: Problem, strategy: str | None) -> Schedule:
    """Raises ``ValueError`` when the budget holds not even the smallest tile."""
    problem.require_budget(memory(problem, Tile(1, 1)).working)
    chosen = tile(problem)
    return Schedule("recompute" if problem.needs_grad else "statistics only", chosen, memory(problem, chosen))


def one_pass_schedule(problem: Problem, strategy: str | None) -> Schedule:
    """Chunks of rows as high as the budget allows beside the tiles: their logits are kept, whole."""
    size = problem.statistics_dtype.itemsize
    problem.require_budget(2 * max(memory(problem, Tile(1, 1)).working, size * (2 * problem.vocab + problem.width)))
    inner = schedule(replace(problem, memory_budget=problem.memory_budget // 2), strategy)
    if not problem.needs_grad:
        return inner._replace(chunk_rows=max(problem.active_rows, 1))
    columns, working = inner.tile.columns, inner.memory.working
    # Logits, their maxima, and the sum of dH, for each row of the chunk.
    per_row = size * (problem.vocab + -(-problem.vocab // columns) + problem.width * problem.grad_hidden)
    chunk = max(min((problem.memory_budget - working) // per_row, problem.active_rows), 1)
    tile = Tile(min(inner.tile.rows, chunk), columns)
    several = problem.active_rows > chunk
    accumulator = problem.vocab * problem.width * size if several and problem.grad_weight and problem.dtype.itemsize < size else 0
    used = Memory(working + chunk * per_row, 0, accumulator)
    return Schedule("one pass", tile, used, cached_rows=problem.active_rows, chunk_rows=chunk)


def cached_rows(problem: Problem, strategy: str | None) -> int:
    return 0


def tile(problem: Problem) -> Tile:
    """The largest tile within the budget. Slice borders depend on V, D and the budget, not on the number of rows (but where the
    budget only just holds the statistics of that many rows)."""
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


def memory(problem: Problem, tile: Tile) -> Memory:
    """What a call allocates with this tile; a test holds it against what the allocator saw."""
    size = problem.statistics_dtype.itemsize
    upcast = problem.dtype.itemsize < size
    tile_bytes = tile.rows * tile.columns * size
    # The next block of rows (slice of W) is made while the last one is still held; so are rows of dH when they are put in place.
    row_block = tile.rows * problem.width * size
    # Of a quantised slice there are the numbers, and what its class needs to come by them.
    weight_slice = tile.columns * problem.width * size * (2 if problem.quantised else upcast)
    gathered = tile.rows * problem.width * problem.dtype.itemsize * upcast
    several_slices = problem.vocab > tile.columns
    several_tiles = several_slices or problem.active_rows > tile.rows
    rows = problem.active_rows + tile.rows
    # Per row: coordinates and targets in int64, running statistics, and in the backward their coefficients and a selection of all.
    forward = 2 * tile_bytes + (1 + several_tiles) * row_block + gathered + (1 + several_slices) * weight_slice
    forward += rows * (6 * 8 + 10 * size)
    backward = 0
    if problem.needs_grad:
        backward = (2 + problem.softcap) * tile_bytes + 2 * row_block + gathered + (1 + several_slices) * weight_slice
        backward += rows * (10 * 8 + 26 * size)
        backward += weight_slice * problem.grad_weight  # fp32 sum of the slice's dW before it is rounded
        backward += tile.columns * size * 2 * problem.grad_bias
    accumulator = problem.active_rows * problem.width * size if problem.grad_hidden and upcast else 0
    return Memory(forward, backward, accumulator)


def to_logits_(product: Tensor, bias: Tensor | None, readout: Readout) -> Tensor:  # [r, c], [c]
    """Turns a tile of products into logits in place."""
    if bias is not None:
        product.add_(bias)
    if readout.softcap is not None:
        return product.mul_(readout.logit_scale / readout.softcap).tanh_().mul_(readout.softcap / readout.temperature)
    return product if readout.is_identity else product.mul_(readout.logit_scale / readout.temperature)


class Block(NamedTuple):
    """One tile of products and what it was made of."""

    columns: slice
    rows: slice
    weight: Tensor  # [c, D]
    hidden: Tensor  # [r, D]
    bias: Tensor | None  # [c]
    tile: Tensor  # [r, c], products, or what a fold kept of them; overwritten by the next tile
    scratch: Tensor  # [r, c], overwritten by the next tile
    readout: Readout
    maxima: Tensor | None  # [r]: where the tile was kept, those of Kept


class Kept(NamedTuple):
    """The logits of the n rows of a chunk, as the fold of their statistics left them."""

    logits: Tensor  # [n · V], slice after slice
    maxima: Tensor  # [n, slices] that were subtracted
    index: Tensor | None = None  # [k]: those of the rows that are wanted; None for all

    def slice(self, columns: slice) -> Tensor:  # [n, c]
        n = len(self.maxima)
        return self.logits[n * columns.start : n * columns.stop].view(n, columns.stop - columns.start)


def _blocks(
    operands: Operands, rows: Tensor, problem: Problem, tile: Tile, on_rows, kept: Kept | None = None, form: bool = True
) -> Iterator[Block]:
    """All tiles, slice by slice. ``rows`` numbers the leading dimensions of ``hidden`` through, so any view of it will do.

    With ``kept`` they lie there: they are put there if they are to be formed, and taken from there otherwise.
    """
    hidden, weight, bias, _, readout = operands
    count, vocab = len(rows), weight.shape[0]
    if count == 0:
        return
    dtype, of_gradient = on_rows.dtypes(problem)  # of the operands, of dz
    size = tile.rows * tile.columns
    buffers = [torch.empty(size, dtype=d, device=hidden.device) for d in (problem.statistics_dtype, of_gradient)]
    coordinates = operands.coordinates(rows)
    for start in range(0, vocab, tile.columns):
        columns = slice(start, min(start + tile.columns, vocab))
        w = rows_of(weight, columns).to(dtype)
        b = None if bias is None else bias[columns].to(problem.statistics_dtype)
        for first in range(0, count, tile.rows):
            block = slice(first, min(first + tile.rows, count))
            index = tuple(i[block] for i in coordinates)
            h = hidden[index].to(dtype)
            products, scratch = (buffer[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0]) for buffer in buffers)
            maxima = None
            if kept is not None and kept.index is None:
                products = kept.slice(columns)[block]
            if form:
                accumulate_(products, h, w.T, first=True)
            else:
                if kept.index is not None:
                    torch.index_select(kept.slice(columns), 0, kept.index[block], out=products)
                maxima = kept.maxima[block if kept.index is None else kept.index[block], start // tile.columns]
            yield Block(columns, block, w, h, b, products, scratch, readout.rows(index, problem.statistics_dtype), maxima)


def target_column(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:  # [r] -> [r, 1], [r, 1]
    """Where each row's target lies within the slice (clamped), and whether it does."""
    column = (targets - columns.start).unsqueeze(1)
    width = columns.stop - columns.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def statistics(operands: Operands, counts: Tensor, problem: Problem, plan: Schedule, with_entropy: bool):  # [N] bool
    """:class:`Statistics` of the rows that count."""
    rows = counts.nonzero().squeeze(1)
    return of_all_rows(row_statistics(operands, rows, problem, plan, with_entropy)[0], rows, len(counts)), None


class TorchRows:
    """What is done to the rows of a tile. ``native`` has the same in C++ and CUDA."""

    @staticmethod
    def dtypes(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
        """Of the products' operands, and of dz. A 16-bit operand is upcast: torch has no portable product that keeps its sum."""
        return problem.statistics_dtype, problem.statistics_dtype

    @staticmethod
    def fold(block: Block, y: Tensor, running: Statistics, with_entropy: bool) -> Tensor:  # [r], [r] each -> [r]
        """The tile into the statistics of its rows; leaves logits less the maximum of their row in the tile, which is returned."""
        z, e, m, s = to_logits_(block.tile, block.bias, block.readout), block.scratch, running.m, running.s
        column, inside = target_column(y, block.columns)
        running.z_y.copy_(torch.where(inside, z.gather(1, column), running.z_y.unsqueeze(1)).squeeze(1))
        tile_m = z.amax(1).clamp_(min=lowest(z.dtype))
        torch.exp(z.sub_(tile_m.unsqueeze(1)), out=e)
        tile_s = e.sum(1)
        # Merge of two partials (m, s, t); slices arrive in ascending order, so the result is repeatable bit for bit.
        new_m = torch.maximum(m, tile_m)
        of_m, of_tile = (x.sub(new_m).clamp_(min=LEAST_EXPONENT) for x in (m, tile_m))
        a, b = of_m.exp(), of_tile.exp()
        if with_entropy:
            tile_t = e.mul_(z).nansum(1)  # 0 · −inf is left out; a NaN among the logits is in s
            running.t.copy_(a * (running.t + of_m * s) + b * (tile_t + of_tile * tile_s))
        s.copy_(a * s + b * tile_s)
        m.copy_(new_m)
        return tile_m

    @staticmethod
    def gradient(block: Block, of: Coefficients) -> Tensor:  # [r] each -> [r, c]
        z, dz, at = block.tile, block.scratch, block.readout
        z = to_logits_(z, block.bias, at) if block.maxima is None else z.add_(block.maxima.unsqueeze(1))
        if at.softcap is not None:
            softcap_slope = (z * (at.temperature / at.softcap)).square_().neg_().add_(1)  # 1 − tanh²
        torch.exp(z.sub_(of.m.unsqueeze(1)), out=dz)
        if of.slope is None:
            dz.mul_(of.constant.unsqueeze(1))
        else:
            z.clamp_(min=LEAST_EXPONENT)
            dz.mul_(torch.addcmul(of.constant.unsqueeze(1), z, of.slope.unsqueeze(1), value=-1, out=z))
        column, inside = target_column(of.targets, block.columns)
        dz.scatter_(1, column, torch.where(inside, of.on_target.unsqueeze(1), dz.gather(1, column)))
        return dz if at.softcap is None else dz.mul_(softcap_slope)


def row_statistics(
    operands: Operands, rows: Tensor, problem: Problem, plan: Schedule, with_entropy: bool, keep: bool = False, on_rows=TorchRows
):
    """:class:`Statistics` of the rows [n], and, to ``keep``, their logits for :func:`gradient_tiles`."""
    dtype, kept = problem.statistics_dtype, None
    y = operands.targets.flatten()[rows]
    statistics = Statistics(*Statistics.empty(len(rows), dtype, rows.device))
    statistics.m.fill_(lowest(dtype))
    statistics.s.zero_()
    if keep:
        slices = -(-problem.vocab // plan.tile.columns)
        kept = Kept(present(y.new_empty(len(rows) * problem.vocab, dtype=dtype)), y.new_empty(len(rows), slices, dtype=dtype))
    for block in _blocks(operands, rows, problem, plan.tile, on_rows, kept):
        r = block.rows
        maxima = on_rows.fold(block, y[r], Statistics(*(x[r] for x in statistics)), with_entropy)
        if keep:
            kept.maxima[r, block.columns.start // plan.tile.columns] = maxima
    return statistics, (kept.logits, kept.maxima) if keep else None


def gradient_dtype(problem: Problem) -> torch.dtype:
    """Of dz."""
    return problem.statistics_dtype


def gradient_tiles(
    operands: Operands,
    rows: Tensor,  # [n]
    coefficients: Coefficients,
    problem: Problem,
    plan: Schedule,
    cache: tuple[Tensor, Tensor, Tensor] | None,  # the two of Kept, overwritten, and where in them each row is [n]
    on_rows=TorchRows,
) -> Iterator[GradientTile]:
    kept = None
    if cache is not None:
        logits, maxima, index = cache
        kept = Kept(logits, maxima, None if len(index) == len(maxima) else index)
    for block in _blocks(operands, rows, problem, plan.tile, on_rows, kept, form=kept is None):
        dz = on_rows.gradient(block, coefficients.rows(block.rows))
        yield GradientTile(block.columns, block.rows, dz, block.weight, block.hidden)
