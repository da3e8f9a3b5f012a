"""bf16 and fp16 on a CPU: statistics and gradients from packed panels of hidden vectors, in C++ (csrc/cpu).

The forward multiplies every row of W with all rows of a block and folds the products while they are in a core's first cache. It
keeps those of as many rows as the budget holds. The backward makes dz of them, a slice of the vocabulary at a time, as both
operands that the products with W and h take: 6 N·V·D FLOP in all, and 8 of rows whose products are formed again. dz is
rounded to bf16 where the CPU multiplies bf16, else it stays fp32; everything else is fp32. fp16 is never multiplied as bf16, which
has too few bits: it takes the fastest instruction set whose panels are of fp32, AVX-512 where the CPU has AMX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.base import Backend, Cache, Memory, Operands, Problem, Tile, TilePlan, row_blocks
from bupo_kernels.backends.compiled import ISAS, MULTIPLY_BF16, address, dtype_name, isas, kernels, present, words
from bupo_kernels.backends.cpu_arguments import PANEL, CoefficientArguments, ReadoutArguments, padded, up
from bupo_kernels.backends.native_rows import kept_rows, why_not_native

# Rows whose packed panels are at hand together, and columns of dz. A slice's W, turned over, should stay in the second cache.
MOST_ROWS, MOST_COLUMNS = 8192, 2048
SMALLEST = Tile(PANEL, PANEL)
# Rows of a chunk of a one-pass loss: the sum of dW is read and written for each, 8 bytes an element for 2 FLOP a row that it saves.
LEAST_CHUNK = 256


class CpuPanels(Backend):
    """Fused C++ kernels for bf16 and fp16 on a CPU."""

    strategies = ISAS

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        if reason := why_not_native(problem, strategy):
            return reason
        accepted = isas_for(problem.dtype)
        if strategy is not None and strategy not in accepted:
            return f"instruction set: {strategy} given, which multiplies bf16; accepted for fp16 are {', '.join(accepted)}"
        least, threads = least_budget(problem, strategy or accepted[0]), torch.get_num_threads()
        if least > problem.memory_budget:
            return f"memory_budget: {problem.memory_budget} bytes given, accepted are at least {least} with {threads} threads"
        return None

    def plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        isa = strategy or isas_for(problem.dtype)[0]
        rows, columns = up(max(problem.active_rows, 1)), up(min(problem.vocab, MOST_COLUMNS))
        problem.require_budget(memory(problem, SMALLEST, isa).working)
        cached = self.cached_rows(problem, strategy)
        kept = 4 * _kept_words(problem, cached)
        rows, budget = min(rows, MOST_ROWS), problem.memory_budget - kept
        while rows > PANEL and memory(problem, Tile(rows, columns), isa, cached).working > budget:
            rows = up(rows // 2)
        while columns > PANEL and memory(problem, Tile(rows, columns), isa, cached).working > budget:
            columns = up(columns // 2)
        tile = Tile(rows, columns)
        name = ("cached" if cached else "recompute") if problem.needs_grad else "statistics only"
        return TilePlan(problem, name, tile, memory(problem, tile, isa, cached).beside(kept), cached, isa=isa)

    def one_pass_plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        """Plan as many rows at a time as leave their products, where the budget holds the sum of dW over several such chunks too;
        else all at once, of which what is kept is as much as a forward keeps for its backward."""
        plan, summed = self.plan(problem, strategy), 4 * problem.vocab * problem.width * problem.grad_weight
        whole = max(problem.active_rows, 1)
        if not problem.needs_grad:
            return plan._replace(chunk_rows=whole)
        in_parts = 0 < plan.cached_rows < whole and summed <= problem.memory_budget
        for chunks in range(2, whole // LEAST_CHUNK + 1) if in_parts else ():
            chunk = up(-(-whole // chunks))
            of_chunk = self.plan(replace(problem, rows=chunk, active_rows=chunk), strategy)
            # Of a shard there is dH of one more chunk, which the ranks add while this one is at hand.
            of_hidden = of_chunk.memory.accumulator * (1 + problem.sharded)
            used = Memory(of_chunk.memory.working + of_hidden, 0, summed)
            if of_chunk.cached_rows == chunk and used.working <= problem.memory_budget:
                return of_chunk._replace(
                    problem=problem, strategy="one pass", memory=used, cached_rows=problem.active_rows, chunk_rows=chunk
                )
        used = Memory(plan.memory.working, 0, plan.memory.accumulator)
        return plan._replace(strategy=f"one pass, {plan.strategy}", memory=used, chunk_rows=whole)

    def cached_rows(self, problem: Problem, strategy: str | None) -> int:
        """Return how many rows leave their products, in whole panels of them: what is left of the budget holds a tile of one. What
        follows from these is what follows from products that are formed again, bit for bit."""
        least = memory(replace(problem, active_rows=0), SMALLEST, strategy or isas_for(problem.dtype)[0]).working
        if not problem.needs_grad or 4 * least > problem.memory_budget:
            return 0
        return kept_rows(problem, 4 * up(problem.vocab), 4 * up(problem.width) * problem.grad_hidden)

    def empty_cache(self, problem: Problem, rows: int) -> Cache:
        """Return memory for the blocks of so many ``rows``, as csrc/cpu/kernels.h has them in ``Kept``; nothing is subtracted."""
        if rows == 0:
            return super().empty_cache(problem, 0)
        products = torch.empty(_kept_words(problem, rows), dtype=torch.float32, device=problem.device)
        return Cache(products, torch.empty(rows, 0, dtype=torch.float32, device=problem.device))

    def row_statistics(
        self, operands: Operands, rows: Tensor, plan: TilePlan, *, with_entropy: bool, keep: bool
    ) -> tuple[Statistics, Cache]:
        problem, threads = plan.problem, torch.get_num_threads()
        packing = Packing(operands, rows, plan.tile, plan.isa, for_weight=False)
        cached = min(plan.cached_rows, len(rows)) if plan.chunk_rows else plan.cached_rows
        kept = Kept(self.empty_cache(problem, cached if keep else 0))
        present(kept.cache.values)
        out = torch.empty(4, len(rows), dtype=torch.float32, device=rows.device)
        ids, weight = operands.targets.flatten()[rows].int(), _dense_rows(operands.weight)
        most = min(plan.tile.rows, len(rows))
        workspace = words(packing.kernels.statistics_bytes(most, problem.vocab, problem.width, threads) // 4)
        for i, block in enumerate(packing.slices):
            hidden, n = packing.block(i), block.stop - block.start
            targets = padded(ids[block], -1)
            packing.kernels.linear_statistics(
                address(hidden.by_width),
                n,
                *_matrix(weight),
                *hidden.readout.passed(problem.vocab, n),
                address(targets, torch.int32, up(n)),
                address(out[:, block], torch.float32, n),
                out.stride(0),
                *kept.passed(block.start),
                address(workspace),
                threads,
            )
        return Statistics(*out), kept.cache

    def gradient_tiles(
        self,
        operands: Operands,
        rows: Tensor,  # [n]
        coefficients: Coefficients,  # [n] each
        plan: TilePlan,
        cache: Cache,
        cache_rows: Tensor | None,
    ) -> Iterator[PackedTile]:
        if len(rows) == 0:
            return
        problem = plan.problem
        kept, cached = Kept(cache), cache.count(cache_rows)
        packing = Packing(operands, rows, plan.tile, plan.isa, for_weight=problem.grad_weight, cached=cached)
        all_arguments = [CoefficientArguments.of(coefficients.rows(block)) for block in packing.slices]
        sources = [
            None if cache_rows is None or block.start >= cached else padded(cache_rows[block].int(), -1) for block in packing.slices
        ]
        threads, width = torch.get_num_threads(), problem.width
        k, most, columns = packing.kernels, min(plan.tile.rows, len(rows)), plan.tile.columns
        left, right = words(k.packed_words(columns, up(most))), words(k.packed_words(most, columns))
        workspace = words(max(k.workspace_bytes(width, threads), k.workspace_bytes(columns, threads)) // 4)
        blocks = [words(up(block.stop - block.start) * up(width)) if problem.grad_hidden else None for block in packing.slices]
        for start in range(0, problem.vocab, columns):
            here = slice(start, min(start + columns, problem.vocab))
            weight = _dense_rows(operands.weight[here])
            sums = torch.empty(len(weight), dtype=torch.float32, device=rows.device) if problem.grad_bias else None
            for i, block in enumerate(packing.slices):
                hidden = packing.block(i)
                readout = hidden.readout._replace(bias=None if packing.bias is None else packing.bias[here])
                arguments, n = all_arguments[i].at(start), block.stop - block.start
                k.linear_gradient(
                    address(hidden.by_width),
                    n,
                    *_matrix(weight),
                    *readout.passed(len(weight), n),
                    *arguments.passed(n),
                    *((0, 0, 0) if sources[i] is None else kept.passed(0, start)),
                    address(sources[i], torch.int32, up(n)),
                    address(left),
                    address(right),
                    address(sums, torch.float32, len(weight)),
                    address(workspace),
                    threads,
                )
                yield PackedTile(
                    here, block, left, right, sums, weight, hidden, blocks[i], here.stop == problem.vocab, workspace, k
                )


def isas_for(dtype: torch.dtype) -> tuple[str, ...]:
    """Return those of :func:`compiled.isas` whose panels hold ``dtype``, bf16 or fp16, exactly."""
    return tuple(isa for isa in isas() if dtype == torch.bfloat16 or isa not in MULTIPLY_BF16)


def least_budget(problem: Problem, isa: str) -> int:
    """Return twice what a call with few rows takes: more rows take more, and the choice must not depend on how many there are."""
    return 2 * memory(replace(problem, active_rows=PANEL), SMALLEST, isa).working


def memory(problem: Problem, tile: Tile, isa: str, cached: int = 0) -> Memory:
    """Return what a call allocates with this tile beside what it keeps of the ``cached`` rows; a test holds it against what the
    allocator saw."""
    k, threads, width = kernels(isa), torch.get_num_threads(), problem.width
    active = max(problem.active_rows, 1)
    rows = min(tile.rows, active)
    gathered = rows * width * problem.dtype.itemsize
    per_row = (active + tile.rows) * (8 * 8 + 12 * 4) + 4 * problem.vocab * problem.grad_bias
    packed = 4 * k.packed_words(rows, width)
    forward = per_row + gathered + packed + k.statistics_bytes(rows, problem.vocab, width, threads)
    backward = 0
    if problem.needs_grad:
        panels = k.packed_words(tile.columns, up(rows)) + k.packed_words(rows, tile.columns)  # dz, twice
        panels += k.packed_words(width, up(rows)) * problem.grad_weight
        workspace = max(k.workspace_bytes(width, threads), k.workspace_bytes(tile.columns, threads))
        backward = 2 * per_row + gathered + packed * (cached < active) + 4 * panels + workspace
        in_parts = 0 < cached < active
        blocks = (-(-active // rows) * up(rows) + PANEL * in_parts) * up(width) * 4
        backward += blocks * problem.grad_hidden
        if (problem.active_rows > tile.rows or in_parts) and problem.grad_weight:
            backward += 4 * tile.columns * width  # fp32 sum of the slice's dW over blocks of rows
    accumulator = problem.active_rows * width * 4 if problem.grad_hidden else 0
    return Memory(forward, backward, accumulator)


def _kept_words(problem: Problem, rows: int) -> int:
    """Return the words of the products that are kept of so many rows."""
    return up(rows) * up(problem.vocab)


class Kept:
    """The products that a forward keeps, as csrc/cpu/kernels.h takes them."""

    def __init__(self, cache: Cache):
        self.cache, self.panels = cache, up(len(cache.offsets)) // PANEL

    def passed(self, first_row: int, first_column: int = 0) -> tuple[int, int, int]:
        """Return them as the kernels' parameters, from a row and a column on that begin panels."""
        panel = first_row // PANEL
        if panel >= self.panels:
            return 0, 0, 0
        word = (first_column // PANEL * self.panels + panel) * PANEL**2
        return address(self.cache.values[word:], torch.float32), self.panels - panel, self.panels


class Hidden(NamedTuple):
    """The hidden vectors of a block of rows, packed for the products that need them."""

    rows: slice
    by_width: Tensor | None  # for h Wᵀ
    by_rows: Tensor | None  # for dzᵀ h
    readout: ReadoutArguments


class Packing:
    """The blocks of some rows of ``operands``, packed one at a time: the last one asked for stays in memory. Products of the first
    ``cached`` rows are there."""

    def __init__(self, operands: Operands, rows: Tensor, tile: Tile, isa: str, for_weight: bool, cached: int = 0):
        self.operands, self.rows, self.kernels, self.for_weight = operands, rows, kernels(isa), for_weight
        self.cached, self.slices = cached, row_blocks(len(rows), cached, tile.rows)
        self.bias = None if operands.bias is None else operands.bias.float().contiguous()
        self._last: Hidden | None = None

    def block(self, i: int) -> Hidden:
        rows = self.slices[i]
        if self._last is None or self._last.rows != rows:
            self._last = None
            self._last = self._pack(rows)
        return self._last

    def _pack(self, rows: slice) -> Hidden:
        operands, k, threads = self.operands, self.kernels, torch.get_num_threads()
        index = operands.coordinates(self.rows[rows])
        hidden = operands.hidden[index]  # [r, D], a contiguous copy
        n, width = hidden.shape
        by_width, by_rows = None, None
        if rows.start >= self.cached:
            by_width = words(k.packed_words(n, width))
            k.pack_rows(*_matrix(hidden), address(by_width), threads)
        if self.for_weight:
            by_rows = words(k.packed_words(width, up(n)))
            k.pack_columns(*_matrix(hidden), address(by_rows), threads)
        return Hidden(rows, by_width, by_rows, ReadoutArguments.of(operands.readout.rows(index, torch.float32), self.bias, hidden))


def _dense_rows(weight: Tensor) -> Tensor:  # [c, D]
    """Return ``weight`` with each row side by side, whatever the stride between them. One that lies by columns is copied, in memory
    that :func:`memory` does not state."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int, int, str]:  # [c, D], rows side by side
    return address(x, length=x.shape[1]), x.stride(0), *x.shape, dtype_name(x)


class PackedTile(NamedTuple):
    """A tile of dz as the kernels pack it, once for each of its two products."""

    columns: slice
    rows: slice
    left: Tensor  # dzᵀ
    right: Tensor  # dz
    sums: Tensor | None  # [c]
    weight: Tensor  # [c, D]
    hidden: Hidden
    blocks: Tensor | None  # sums of dH over the slices so far
    last: bool  # of the slices
    workspace: Tensor
    kernels: Any  # of the instruction set, as compiled.kernels gives them

    def add_to_hidden(self, total: Tensor, first: bool) -> None:  # [r, D]; written with the last slice
        threads = torch.get_num_threads()
        self.kernels.hidden_gradient(
            address(self.right),
            len(total),
            *_matrix(self.weight),
            address(self.blocks),
            not first,
            address(self.workspace),
            threads,
        )
        if self.last:
            out = address(total, torch.float32)
            self.kernels.unpack_hidden(address(self.blocks), *total.shape, out, total.stride(0), threads)

    def add_to_weight(self, total: Tensor, first: bool) -> None:  # [c, D]
        self.kernels.weight_gradient(
            address(self.left),
            len(total),
            address(self.hidden.by_rows),
            self.rows.stop - self.rows.start,
            total.shape[1],
            address(total, length=total.shape[1]),
            total.stride(0),
            dtype_name(total),
            not first,
            address(self.workspace),
            torch.get_num_threads(),
        )

    def column_sums(self, dtype: torch.dtype) -> Tensor:  # [c]
        assert self.sums is not None
        return self.sums
