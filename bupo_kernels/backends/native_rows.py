"""Row kernels in C++ and CUDA (csrc/): what is done, in the tile loop, to rows of products that the library left in memory.

On a CPU they run with the best instruction set that was built and that it has; ``backend="native:avx2"`` asks for another. On a GPU
one more kernel takes whole rows from products to a policy loss and its dz. bf16 and fp16 on a CPU have kernels of their own, in
``cpu_panels.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bupo_kernels.backends import compiled
from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.base import Cache, Memory, Operands, PolicyRows, Problem, Readout, Tile, TilePlan
from bupo_kernels.backends.compiled import ISAS, address, dtype_name, isas
from bupo_kernels.backends.cpu_arguments import PANEL, CoefficientArguments, ReadoutArguments, padded, up
from bupo_kernels.backends.gradients import MatrixTile, accumulate_, in_place_order
from bupo_kernels.backends.tile_loop import CPU_TILE, Block, RowKernels, TileLoop, largest_tile, memory, recomputing_plan
from bupo_kernels.selfcheck import decision
from bupo_kernels.selfcheck.decision import Variant

# A bound of what a row has in statistics, coefficients and selections of them, in a forward and a backward.
BYTES_OF_STATISTICS = 256


def why_not_native(problem: Problem, strategy: str | None) -> str | None:
    """Return the reason nothing in csrc can run ``problem``, or None."""
    device = problem.device.type
    if device not in ("cpu", "cuda"):
        return f"device: {device} given, accepted are cpu and cuda"
    if device == "cpu" and not isas():
        return "the C++ kernels were not built; `bupo env` says why"
    if device == "cuda" and problem.gpu is None and (why := compiled.why_not_cuda()):
        return why
    if problem.dtype == torch.float64 or (problem.dtype == torch.float16 and device == "cuda"):
        return f"dtype: {problem.dtype} given, accepted are fp32{' and bf16' if device == 'cuda' else ', bf16 and fp16'}"
    if problem.width == 0 or problem.vocab >= 2**29:
        return f"weight: [{problem.vocab}, {problem.width}] given, accepted are fewer than 2^29 rows that are not empty"
    if strategy is not None and device != "cpu":
        return f"instruction set: {strategy} given, accepted is none on {device}"
    if strategy is not None and strategy not in isas():
        return f"instruction set: {strategy} given, which this CPU or this build does not have; it has {', '.join(isas())}"
    return None


def kept_rows(problem: Problem, bytes_a_row: int, beside: int = 0) -> int:
    """Return how many rows, the first that are active, can leave so many bytes each: all of the call, or whole panels of them that
    three quarters of the budget hold. Of these goes what statistics and ``beside`` take of every row. (While torch traces, rows of
    the call are all that is known.)"""
    room = 3 * problem.memory_budget // 4 - (BYTES_OF_STATISTICS + beside) * problem.rows
    return torch.sym_max(torch.sym_min(problem.rows, room // (PANEL * bytes_a_row) * PANEL), 0)


class NativeCpu(TileLoop):
    """fp32 on a CPU: the library's product, and row kernels in C++. A forward leaves the logits of as many rows as the budget has
    room for."""

    strategies = ISAS

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return why_not_native(problem, strategy)

    def plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        isa, cached = strategy or isas()[0], self.cached_rows(problem, strategy)
        if not cached:
            return recomputing_plan(problem)._replace(isa=isa)
        columns = _kept_columns(problem)
        kept = 4 * cached * _kept_elements(problem, columns)
        left = problem.memory_budget - kept
        rows = max(min(CPU_TILE[0], problem.active_rows), 1)
        while rows > 1 and memory(problem, Tile(rows, columns), cached).working > left:
            rows = (rows + 1) // 2
        tile = Tile(rows, columns)
        return TilePlan(problem, "cached", tile, memory(problem, tile, cached).beside(kept), cached, isa=isa)

    def one_pass_plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        return super().one_pass_plan(problem, strategy)._replace(isa=strategy or isas()[0])

    def row_kernels(self, plan: TilePlan) -> RowKernels:
        return CpuRows(plan.isa)

    def cached_rows(self, problem: Problem, strategy: str | None) -> int:
        """Return how many rows leave their logits: three quarters of the budget may hold them. What follows from these is what
        follows from products that are formed again, bit for bit."""
        if not problem.needs_grad:
            return 0
        columns = _kept_columns(problem)
        if 4 * memory(replace(problem, active_rows=0), Tile(1, columns)).working > problem.memory_budget:
            return 0
        return kept_rows(problem, 4 * _kept_elements(problem, columns))

    def empty_cache(self, problem: Problem, rows: int) -> Cache:
        if rows == 0:
            return super().empty_cache(problem, 0)
        logits = torch.empty(rows * problem.vocab, dtype=torch.float32, device=problem.device)
        slices = _kept_elements(problem, _kept_columns(problem)) - problem.vocab
        return Cache(logits, torch.empty(rows, slices, dtype=torch.float32, device=problem.device))


def _kept_columns(problem: Problem) -> int:
    """Return the columns of a slice of logits that are kept, whatever the number of rows."""
    return largest_tile(replace(problem, active_rows=0, memory_budget=problem.memory_budget // 4)).columns


def _kept_elements(problem: Problem, columns: int) -> int:
    """Return the fp32 numbers that are kept of a row: its logits, and one for each slice of so many ``columns`` of these."""
    return problem.vocab + -(-problem.vocab // columns)


class NativeCuda(TileLoop):
    """fp32 and bf16 on a GPU: the library's product with an fp32 result, and row kernels in CUDA."""

    strategies = ISAS
    passes = 1.4  # one reads the products; what they are written in is not all hidden behind the product
    passes_of_gradient = 1.9  # the same, and 16-bit dz is written, half a pass
    writes_over = False  # blocks of threads read logits where others have written dz

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return why_not_native(problem, strategy)

    def why_not_default(self, problem: Problem) -> str | None:
        if problem.gpu is not None:
            return None
        return decision.why_not(Variant.of("native", problem.dtype), problem.device)

    def one_pass_plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        """Plan as many whole rows at a time as the budget allows: fp32 products and dz; in fp32 dz, which is where they were, and
        dz again without the rows that have none. Of a shard no row is whole: there it is the plan of any tile loop."""
        if problem.sharded:
            return super().one_pass_plan(problem, strategy)
        item = problem.dtype.itemsize
        per_row = problem.vocab * (4 + item * problem.needs_grad) + problem.width * (2 * item + 4) + 200
        problem.require_budget(per_row)
        chunk = max(min(problem.memory_budget // per_row, problem.active_rows), 1)
        in_parts = problem.active_rows > chunk and problem.grad_weight and item < 4
        memory = Memory(chunk * per_row, 0, 4 * problem.vocab * problem.width if in_parts else 0)
        tile = Tile(chunk, problem.vocab)
        return TilePlan(problem, "one pass, rows fused", tile, memory, problem.active_rows, chunk_rows=chunk, fused_rows=True)

    def row_kernels(self, plan: TilePlan) -> RowKernels:
        return CudaRows(_cuda())

    def policy_rows(
        self,
        operands: Operands,
        rows: Tensor,  # [n]
        objective: object,
        inputs: Mapping[str, Tensor | None],  # [n] each
        plan: TilePlan,
    ) -> PolicyRows:
        found, dz, hidden = CudaRows(_cuda()).policy_loss(operands, operands.coordinates(rows), objective, inputs, plan.problem)
        values = found["loss"], found["logprob"], found["entropy"]
        if not plan.problem.needs_grad:
            return PolicyRows(*values, None, None)
        sixteen_bit = dz.dtype.itemsize == 2
        has_gradient = in_place_order(found["used"]) if sixteen_bit else found["used"].nonzero().squeeze(1)
        n = len(has_gradient)

        def tiles() -> Iterator[MatrixTile]:
            some = dz, hidden
            if sixteen_bit and n < len(dz):
                moved = (has_gradient >= n).nonzero().squeeze(1)
                dz[moved] = dz[has_gradient[moved]]
                some = dz[:n], hidden[has_gradient]
            elif n < len(dz):
                some = dz[has_gradient], hidden[has_gradient]
            if n:
                yield MatrixTile(slice(0, plan.problem.vocab), slice(0, n), some[0], operands.weight, some[1])

        return PolicyRows(*values, has_gradient, tiles())


def _cuda() -> ModuleType:
    module = compiled.cuda()
    assert module is not None  # why_not has asked
    return module


class CpuRows:
    """The :class:`RowKernels` of :class:`NativeCpu`, with the instruction set ``isa``."""

    def __init__(self, isa: str):
        self.kernels = compiled.kernels(isa)

    def fold(self, block: Block, targets: Tensor, running: Statistics, with_entropy: bool) -> float:  # [r], [r] each
        """Leave logits, from which nothing is subtracted."""
        products, columns, rows, ids = block.tile, block.columns, len(targets), padded(targets.int(), -1)
        readout = ReadoutArguments.of(block.readout, block.bias, targets)
        m, s, t, z_y = (address(x, torch.float32, rows) for x in running)
        if s - m != t - s or s - m != z_y - t:
            raise ValueError("memory of a kernel: statistics apart given, accepted are rows of one tensor")
        self.kernels.row_statistics(
            address(products, torch.float32),
            products.stride(0),
            *products.shape,
            columns.start,
            *readout.passed(products.shape[1], rows),
            address(ids, torch.int32, up(rows)),
            m,
            (s - m) // 4,
            torch.get_num_threads(),
        )
        return 0.0

    def gradient(self, block: Block, coefficients: Coefficients) -> Tensor:  # [r] each -> [r, c]
        logits, dz, arguments = block.tile, block.scratch, CoefficientArguments.of(coefficients).at(block.columns.start)
        readout = ReadoutArguments.of(block.readout, block.bias, logits)
        rows, columns = logits.shape
        self.kernels.row_gradient(
            address(logits, torch.float32),
            logits.stride(0),
            rows,
            columns,
            *readout.passed(columns, rows),
            block.maxima is not None,
            *arguments.passed(rows),
            address(dz.view(-1), torch.float32, rows * columns),
            torch.get_num_threads(),
        )
        return dz


class CudaRows:
    """The :class:`RowKernels` of :class:`NativeCuda`. ``module`` is ``_C.cuda``."""

    def __init__(self, module: ModuleType):
        self.module = module

    def fold(self, block: Block, targets: Tensor, running: Statistics, with_entropy: bool) -> float:  # [r], [r] each
        """Leave the products as they are."""
        _alive, arguments = self._products(block.tile, block.columns.start, block.readout, block.bias)
        first = block.columns.start == 0
        self.module.row_statistics(**arguments, first=first, **_addresses({"targets": targets, **running._asdict()}, block.tile))
        return 0.0

    def gradient(self, block: Block, coefficients: Coefficients) -> Tensor:  # [r] each -> [r, c]
        _alive, arguments = self._products(block.tile, block.columns.start, block.readout, block.bias)
        dz = block.scratch
        self.module.row_gradient(
            **arguments,
            **_addresses(coefficients._asdict(), dz),
            n=len(dz),
            gradient=address(dz, device=dz.device.type),
            gradient_dtype=dtype_name(dz),
            gradient_stride=dz.stride(0),
        )
        return dz

    def policy_loss(
        self,
        operands: Operands,
        index: tuple[Tensor, ...],  # coordinates of the rows
        objective: object,  # read by field name
        inputs: Mapping[str, Tensor | None],  # [r] each
        problem: Problem,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return loss (weighted), logprob, entropy and used of whole rows, [r] each; their dz [r, V]; their hidden vectors [r,
        D]."""
        hidden = operands.hidden[index]
        products = hidden.new_empty(len(hidden), problem.vocab, dtype=torch.float32)
        accumulate_(products, hidden, operands.weight.T, first=True)
        bias = None if operands.bias is None else operands.bias.float()
        _alive, arguments = self._products(products, 0, operands.readout.rows(index, torch.float32), bias)
        del arguments["first_column"]
        apart = problem.needs_grad and problem.product_dtype != products.dtype
        dz = torch.empty_like(products, dtype=problem.product_dtype) if apart else products
        found = {name: products.new_empty(len(products)) for name in ("loss", "logprob", "entropy")}
        found["used"] = products.new_empty(len(products), dtype=torch.bool)
        self.module.row_policy_loss(
            **arguments,
            **_addresses(inputs, products),
            **_addresses(found, products),
            objective=objective,
            gradient=address(dz, device=dz.device.type) if problem.needs_grad else 0,
            gradient_dtype=dtype_name(dz),
            gradient_stride=dz.stride(0),
        )
        return found, dz, hidden

    @staticmethod
    def _products(
        products: Tensor, first_column: int, readout: Readout, bias: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """Return what must live until the launch, and the arguments that all kernels share."""
        temperature, device = readout.temperature, products.device.type
        per_row = temperature.reshape(-1).float().contiguous() if isinstance(temperature, Tensor) else None
        arguments = {
            "products": address(products, device=device),
            "dtype": dtype_name(products),
            "rows": len(products),
            "columns": products.shape[1],
            "stride": products.stride(0),
            "first_column": first_column,
            "bias": address(bias, torch.float32, products.shape[1], device),
            "row_temperature": address(per_row, torch.float32, len(products), device),
            "temperature": 1.0 if per_row is not None else temperature,
            "logit_scale": readout.logit_scale,
            "softcap": readout.softcap,
            "stream": torch.cuda.current_stream(products.device).cuda_stream if products.is_cuda else 0,
        }
        return (per_row, bias), arguments


def _addresses(tensors: Mapping[str, Tensor | None], matrix: Tensor) -> dict[str, int]:
    """Return the addresses of what comes per row of the ``matrix``: fp32, but for two."""
    dtypes = {"targets": torch.int64, "used": torch.bool}
    rows, device = len(matrix), matrix.device.type
    return {name: address(x, dtypes.get(name, torch.float32), rows, device) for name, x in tensors.items()}
