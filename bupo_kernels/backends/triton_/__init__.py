"""Fused kernels for GPUs: a tile of logits is multiplied, folded into the row's statistics or turned into its gradient, and gone.

``linear_statistics.py`` streams W once and leaves partials per vocabulary split or tile, ``merge.py`` folds them in order.
``gradient_recompute.py`` forms dz of a vocabulary slice again, ``gradient_cached.py`` has it from the E that the forward kept; the
products of dz with W and H are the library's. ``gathers.py`` has what a call on supports takes instead, and ``divergence_rows.py``
what is done to rows of two policies, all of whose products are the library's. ``tiling.py`` says which rows take which way,
``config.py`` has every number. Under ``TRITON_INTERPRET=1`` all of it runs on the CPU, which is how it is tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bupo_kernels.backends import machine
from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.base import Backend, Cache, Operands, Problem, TilePlan
from bupo_kernels.backends.divergences import DivergenceRows, Side, Upstream, largest
from bupo_kernels.backends.gathers import Gathers, Segments
from bupo_kernels.backends.gradients import MatrixTile, RowsTile, whole_rows
from bupo_kernels.backends.lens_loop import Comparison, LensRows, LensTile, Running
from bupo_kernels.backends.machine import Gpu, Seconds
from bupo_kernels.backends.torch_ import to_logits_
from bupo_kernels.backends.torch_lens import fold_maxima, multiply_pairs
from bupo_kernels.backends.triton_ import config, counts, tiling
from bupo_kernels.backends.triton_.copies import HiddenRows, reads_in_place, weight_slice
from bupo_kernels.selfcheck import decision
from bupo_kernels.selfcheck.card import Card
from bupo_kernels.selfcheck.decision import Variant

log = logging.getLogger("bupo_kernels")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


_targets: dict[torch.device, config.Target] = {}


def target_of(device: torch.device) -> config.Target:
    """Return the GPU as configurations depend on it: the same in every call of a process."""
    if (known := _targets.get(device)) is not None:
        return known
    target = _target(device)
    if config.specialises(config.STATISTICS, torch.bfloat16, target, softcap=False):
        target = replace(target, proven=_proven(device))
    if not decision.only_asked():
        _targets[device] = target
    return target


def _proven(device: torch.device) -> tuple[str, ...]:
    variants = (Variant("triton", dtype, specialised=True) for dtype in config.SPECIALISED_NAMES)
    return tuple(variant.dtype for variant in variants if decision.decide(variant, device).passed)


@contextmanager
def with_target(device: torch.device, **changes: Any) -> Iterator[None]:
    """Have another :class:`config.Target` on ``device``, to measure or to check it. No backward may follow of a forward that was
    within it, nor the other way round."""
    before = _targets.get(device)
    _targets[device] = replace(before or _target(device), **changes)
    try:
        yield
    finally:
        if before is None:
            del _targets[device]
        else:
            _targets[device] = before


def _target(device: torch.device) -> config.Target:
    if config.interpreted():
        return config.Target("cuda", 80, processors=3)  # several work items for each of few programs
    properties = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else "cuda"
    arch = 0 if kind == "hip" else 10 * properties.major + properties.minor
    shared = config.shared_memory(kind, arch)
    if kind == "cuda":  # not every build of torch has this property
        shared = getattr(properties, "shared_memory_per_block_optin", shared)
    # Elsewhere nothing depends on it.
    triton = config.version_of(Card.of(device).triton_version) if arch // 10 == 10 else (0, 0)
    return config.Target(kind, arch, properties.multi_processor_count, shared, _tiles(device), triton)


def _like(gpu: Gpu) -> config.Target:
    """Return the GPU as if it were there, with the Triton that kernels are counted with, and had passed every self-check."""
    return config.Target("cuda", gpu.arch, gpu.processors, triton=(3, 6), proven=config.SPECIALISED_NAMES)


def _target_for(problem: Problem) -> config.Target:
    return target_of(problem.device) if problem.gpu is None else _like(problem.gpu)


def _tiles(device: torch.device) -> tuple[tuple[str, config.KernelConfig], ...]:
    try:
        return config.tiles_from(decision.tuned(device).tiles)
    except ValueError as error:
        log.warning("what `bupo tune` has on record is not taken: %s", error)
        return ()


class Triton(Backend):
    """The kernels of this folder."""

    strategies = ("recompute", "cached")

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        if reason := _why_not_triton(problem):
            return reason
        target = _target_for(problem)
        if strategy == "cached" and (why := config.why_not_cached(problem.dtype, problem.softcap)):
            return why
        return config.why_not_fitting(problem.dtype, target, problem.softcap)

    def why_not_default(self, problem: Problem) -> str | None:
        if problem.gpu is not None:
            return None
        if config.interpreted():
            return "the interpreter is for tests; backend='triton' asks for it"
        variant = Variant.of("triton", problem.dtype, problem.softcap)
        return decision.why_not(variant, problem.device, config.widths_of(problem.width))

    def predicted_forward(self, problem: Problem, gpu: Gpu) -> float | None:
        if problem.dtype.itemsize != 2 or problem.softcap:
            return None  # nobody has counted what these have between products
        return self._kernel_seconds(config.STATISTICS, problem, gpu, stored=0)[0]

    def predicted(self, plan: TilePlan, gpu: Gpu) -> Seconds | None:
        problem = plan.problem
        if problem.dtype.itemsize != 2 or problem.softcap:
            return None
        cached = min(plan.cached_rows, problem.active_rows)
        shape, of_cache = problem.shape, problem.shape._replace(rows=cached)
        forward, measured = self._kernel_seconds(config.STATISTICS, problem, gpu, stored=cached)
        backward = 0.0
        if problem.needs_grad:
            again = replace(problem, active_rows=problem.active_rows - cached)
            backward, too = self._kernel_seconds(config.GRADIENT, again, gpu, stored=again.active_rows)
            measured = measured or (too and again.active_rows > 0)
            backward += machine.moved(gpu, (2 + 2) * of_cache.logits)  # E is read, and dz written
            backward += machine.gradients_of_dz(gpu, shape, problem.grad_hidden + problem.grad_weight, sum(plan.bytes_of_sums))
        return Seconds(forward + backward, 0.0, measured) if plan.chunk_rows else Seconds(forward, backward, measured)

    def _kernel_seconds(self, kernel: str, problem: Problem, gpu: Gpu, stored: int) -> tuple[float, bool]:
        """Return the seconds of a kernel with a product, which leaves so many ``stored`` rows of E or dz, and whether they follow
        from what `bupo tune` measured here."""
        shape, cache = problem.shape, kernel == config.STATISTICS and stored > 0
        flags = {"softcap": False, "cache": cache}
        target = _like(gpu)
        if problem.gpu is None and machine.present(problem.device) == gpu:
            target = target_of(problem.device)
            rate = decision.tuned(problem.device).rates.get(config.key_of(kernel, problem.dtype, width=problem.width, **flags))
            if rate is not None:
                return 2 * shape.logits * shape.width / rate, True
        tile = config.chosen(kernel, problem.dtype, target, width=problem.width, **flags)
        seconds = machine.fused_product(
            *(gpu, shape),
            tile=(tile.rows, tile.columns),
            warps=tile.warps,
            blocks=2 if tile.specialised else tile.programs,  # a second accumulator is as good as a second block
            instructions=counts.between_products(kernel, target, cache=cache, specialised=tile.specialised),
            main_loop=machine.MAIN_LOOP[target.matrix_unit],
        )
        return seconds + machine.moved(gpu, 2 * stored * shape.vocab), False

    def plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        return tiling.tile_plan(problem, strategy, _target_for(problem))

    def one_pass_plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        return tiling.one_pass_plan(problem, strategy, _target_for(problem))

    def cached_rows(self, problem: Problem, strategy: str | None) -> int:
        return tiling.cached_rows(problem, strategy)

    def empty_cache(self, problem: Problem, rows: int) -> Cache:
        e, exponents = tiling.cache_widths(problem) if rows != 0 else (0, 0)
        return Cache(
            torch.empty(rows, e, dtype=torch.bfloat16, device=problem.device),
            torch.empty(rows, exponents, dtype=torch.int32, device=problem.device),
        )

    def gradient_dtype(self, problem: Problem) -> torch.dtype:
        return problem.dtype

    def statistics(self, operands: Operands, active: Tensor, plan: TilePlan, with_entropy: bool) -> tuple[Statistics, Cache]:
        result = Statistics.empty(len(active), torch.float32, active.device)
        cache = self.empty_cache(plan.problem, plan.cached_rows)
        if len(active):
            rows, count = _in_front(active)
            _stream(operands, rows, count, rows, plan, with_entropy, cache, result, ascending=False)
        return Statistics(*result), cache

    def row_statistics(
        self, operands: Operands, rows: Tensor, plan: TilePlan, *, with_entropy: bool, keep: bool
    ) -> tuple[Statistics, Cache]:
        n = len(rows)
        result = Statistics.empty(n, torch.float32, rows.device)
        cache = self.empty_cache(plan.problem, n if keep else 0)
        if n:
            count = torch.full((1,), n, dtype=torch.int64, device=rows.device)
            positions = torch.arange(n, dtype=torch.int64, device=rows.device)
            _stream(operands, rows, count, positions, plan, with_entropy, cache, result, ascending=True)
        return Statistics(*result), cache

    def gradient_tiles(
        self,
        operands: Operands,
        rows: Tensor,  # [n]
        coefficients: Coefficients,  # [n] each
        plan: TilePlan,
        cache: Cache,
        cache_rows: Tensor | None,  # [n]
    ) -> Iterator[MatrixTile | RowsTile]:
        from bupo_kernels.backends.triton_.gradient_cached import gradient_cached
        from bupo_kernels.backends.triton_.gradient_recompute import gradient_recompute
        from bupo_kernels.backends.triton_.product import Launch

        problem, n = plan.problem, len(rows)
        vocab, width = problem.vocab, problem.width
        if n == 0:
            return
        target = target_of(rows.device)
        read = tiling.reads(problem, target)
        if cache_rows is not None:
            exponent_columns = config.statistics_config(problem.dtype, target, width=width, softcap=False, cache=True).columns
        hidden_rows = HiddenRows(operands, rows, read.width, ascending=not plan.in_place)
        if plan.in_place:
            assert cache_rows is not None
            dz = cache.values[:n].view(self.gradient_dtype(problem))
            gradient_cached(cache, exponent_columns, cache_rows, coefficients, dz, slice(0, vocab))
            hidden = hidden_rows[:][:, :width] if problem.grad_weight else None
            yield from whole_rows(dz[:, :vocab], operands.weight, hidden, plan.tile.columns)
            return
        from_cache = cache.count(cache_rows)
        columns_of_dz = min(plan.tile.columns, config.padded(vocab))
        dz = torch.empty(min(plan.tile.rows, n), columns_of_dz, dtype=self.gradient_dtype(problem), device=rows.device)
        blocks = [slice(first, min(first + plan.tile.rows, n)) for first in range(0, n, plan.tile.rows)]
        hidden = launch = None
        for start in range(0, vocab, plan.tile.columns):
            columns = slice(start, min(start + plan.tile.columns, vocab))
            weight = weight_slice(operands.weight, columns, read.width) if from_cache < n else None
            for block in blocks:
                split = min(max(from_cache, block.start), block.stop)  # before it from E, from it on recomputed
                if hidden is None and (weight is not None or problem.grad_weight):
                    hidden = hidden_rows[block]
                if cache_rows is not None and split > block.start:
                    part = slice(block.start, split)
                    gradient_cached(cache, exponent_columns, cache_rows[part], coefficients.rows(part), dz, columns)
                if hidden is not None and weight is not None and split < block.stop:
                    part = slice(split, block.stop)
                    if launch is None:
                        launch = Launch(operands, rows[part], hidden[split - block.start :], target)
                    gradient_recompute(launch, weight, coefficients.rows(part), dz[split - block.start :])
                tile = dz[: block.stop - block.start, : columns.stop - columns.start]
                yield MatrixTile(columns, block, tile, operands.weight[columns], None if hidden is None else hidden[:, :width])
                if len(blocks) > 1:  # a single block's is gathered but once
                    hidden = launch = None
            del weight  # before the next slice is copied


def _why_not_triton(problem: Problem) -> str | None:
    """Return the reason no kernel of this folder can run ``problem``, or None."""
    if not _installed() and problem.gpu is None:
        return "triton: not installed"
    if problem.device.type != "cuda" and not (config.interpreted() and problem.device.type == "cpu"):
        return f"device: {problem.device.type} given, accepted is cuda, or cpu with TRITON_INTERPRET=1 set from the start"
    if problem.dtype == torch.float64:
        return "dtype: torch.float64 given, accepted are fp32, bf16 and fp16"
    if problem.width == 0:
        return "hidden: of width 0 given, accepted is 1 and more"
    target = _target_for(problem)
    if target.kind == "cuda" and target.arch < 80:
        return f"device: compute capability {target.arch / 10} given, accepted is 8.0 and newer"
    return None


class _Unproven:
    """The kernels that no self-check knows yet: ``backend="auto"`` passes them over, and they run where they are asked for."""

    strategies: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[str]  # what they are, with the verb that goes with it

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return _why_not_triton(problem)

    def why_not_default(self, problem: Problem) -> str | None:
        if config.interpreted():
            return "the interpreter is for tests; backend='triton' asks for it"
        return f"{self.kernels} in no self-check, and nobody has run them on a GPU yet; backend='triton' asks for them"


class TritonGathers(_Unproven, Gathers):
    """The products of a call on supports."""

    kernels = "the products on a support are"

    def dots(self, left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor, budget: int, strategy: str | None) -> Tensor:
        from bupo_kernels.backends.triton_.gathers import gathered_dots

        found = torch.empty(len(left_rows), dtype=torch.float32, device=left.device)
        if len(found):
            gathered_dots(left, left_rows, right, right_rows, found)
        return found

    def sums(self, segments: Segments, out: Tensor, places: Tensor, budget: int, strategy: str | None) -> None:
        from bupo_kernels.backends.triton_.gathers import gathered_sums

        if len(places):
            gathered_sums(*segments, out, places)


class TritonDivergence(_Unproven, DivergenceRows):
    """The row kernel of a divergence."""

    kernels = "the rows of a divergence are"

    def rows(
        self, student: Side, teacher: Side, beta: float, upstream: Upstream | None, with_entropy: bool, strategy: str | None
    ) -> tuple[Tensor, Tensor]:
        from bupo_kernels.backends.triton_.divergence_rows import divergence_rows

        count, columns = student.products.shape
        divergence, entropy = (student.products.new_empty(count) for _ in range(2))
        if count:
            divergence_rows(student, teacher, beta, upstream, divergence, entropy)
        return divergence.clamp_(0, largest(beta)), entropy.clamp_(0, math.log(columns))


class TritonLens(_Unproven, LensRows):
    """The row kernels of a lens, on products of the library; the top k, the maxima and c of all pairs are the library's too."""

    kernels = "the rows of a lens are"
    reads_quantised = True
    multiplies = True

    def keeps(self, pairs: bool) -> bool:
        return not pairs

    def needs_scratch(self, pairs: bool) -> bool:
        return pairs

    def fold(self, tile: LensTile, running: Running, with_entropy: bool, strategy: str | None) -> None:
        from bupo_kernels.backends.triton_.lens import lens_sums

        z = to_logits_(tile.z, tile.bias, tile.readout)
        before = Statistics(*(x.clone(memory_format=torch.contiguous_format) for x in running.statistics))
        m = fold_maxima(z, tile, running)
        lens_sums(z, tile.scratch if running.pairs else None, before, m, running)
        if running.pairs and tile.scratch is not None:
            shrink, moved = (before.m - m).exp(), torch.where(before.s > 0, before.m - m, 0)
            multiply_pairs(running, before.s, tile.scratch, z, shrink, moved)
        running.statistics.m.copy_(m)

    def compare(
        self, tile: LensTile, statistics: Statistics, log_s: Tensor, found: Comparison, strategy: str | None
    ) -> None:  # [P, r] each
        from bupo_kernels.backends.triton_.lens import lens_comparison

        z = tile.z if tile.formed else to_logits_(tile.z, tile.bias, tile.readout)
        lens_comparison(z, statistics, log_s, found)


def _in_front(active: Tensor) -> tuple[Tensor, Tensor]:  # [N] bool -> [N] int64, [1] int64
    """Return the positions of the active rows, in order and then zeros, and how many there are: without asking the device."""
    n = len(active)
    rank = active.cumsum(0)
    slot = torch.where(active, rank - 1, n)  # all others share a slot past the end
    positions = torch.zeros(n + 1, dtype=torch.int64, device=active.device)
    positions.scatter_(0, slot, torch.arange(n, dtype=torch.int64, device=active.device))
    return positions[:n], rank[-1:]


def _stream(
    operands: Operands,
    rows: Tensor,  # [n]
    count: Tensor,  # [1]
    positions: Tensor,  # [n]
    plan: TilePlan,
    with_entropy: bool,
    cache: Cache,
    result: Tensor,  # [4, n]
    *,
    ascending: bool,
) -> None:
    """Take the first ``count`` of ``rows`` through both kernels, into ``result`` at their ``positions``, chunk by chunk;
    of those past the ``count`` no program does a thing."""
    from bupo_kernels.backends.triton_.linear_statistics import linear_statistics
    from bupo_kernels.backends.triton_.merge import merge
    from bupo_kernels.backends.triton_.product import Launch

    target, device = target_of(rows.device), rows.device
    n, vocab, problem = len(rows), len(operands.weight), plan.problem
    tile = config.statistics_config(problem.dtype, target, width=problem.width, softcap=problem.softcap, cache=not cache.is_empty)
    columns = config.partial_columns(vocab, tile)
    read = tiling.reads(problem, target)
    hidden_rows = HiddenRows(operands, rows, read.width, ascending=ascending)
    in_place = not read.copies_weight and reads_in_place(operands.weight)
    step = vocab if in_place else read.columns
    counts = (count - torch.arange(0, n, read.rows, dtype=torch.int64, device=device)).clamp(0, read.rows)
    for chunk, first_row in enumerate(range(0, n, read.rows)):
        part = slice(first_row, min(first_row + read.rows, n))
        launch = Launch(operands, rows[part], hidden_rows[part], target)
        partials = torch.empty(-(-vocab // columns), 4, len(launch.rows), dtype=torch.float32, device=device)
        active = counts[chunk : chunk + 1]
        for start in range(0, vocab, step):
            weight = weight_slice(operands.weight, slice(start, min(start + step, vocab)), read.width)
            linear_statistics(
                launch,
                weight,
                active,
                partials[start // columns : -(-weight.columns.stop // columns)],
                with_entropy=with_entropy,
                cache=None if cache.is_empty else cache,
                first_row=first_row,
            )
            del weight  # before the next slice is copied
        merge(partials, active, positions[part], result, with_entropy=with_entropy)
        del launch, partials
