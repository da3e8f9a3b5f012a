"""C++ for CPUs and CUDA (csrc/): fused bf16 kernels on a CPU, and elsewhere the library's GEMM with row kernels around it.

``packed.py`` has the fused path, ``rows.py`` what is done to rows of products that a library left in memory, in the loop of
``torch_chunked``. On a CPU the instruction set is the best that was built and that this CPU has; ``backend="native:avx2"`` asks for
another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bupo_kernels.backends import compiled, torch_chunked
from bupo_kernels.backends.algebra import Coefficients, of_all_rows
from bupo_kernels.backends.compiled import ISAS, isas
from bupo_kernels.backends.gradients import GradientTile
from bupo_kernels.backends.native import packed
from bupo_kernels.backends.native.rows import CpuRows, CudaRows
from bupo_kernels.backends.problem import Memory, Operands, Problem, Schedule, Tile

STRATEGIES = ISAS

# Compute capabilities (x 10) on which `make gpu` has passed with the CUDA kernels and its result is committed: as in triton_.
MEASURED: frozenset[int] = frozenset()


def why_not(problem: Problem, strategy: str | None) -> str | None:
    """The reason this backend cannot run ``problem``, or None."""
    device = problem.device.type
    if device not in ("cpu", "cuda"):
        return f"device: {device} given, accepted are cpu and cuda"
    if device == "cpu" and not isas():
        return "the C++ kernels were not built; `bupo env` says why"
    if device == "cuda" and compiled.cuda() is None:
        return "the CUDA kernels were not built; `bupo env` says why"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype: {problem.dtype} given, accepted are fp32 and bf16"
    if problem.width == 0 or problem.vocab >= 2**29:
        return f"weight: [{problem.vocab}, {problem.width}] given, accepted are fewer than 2^29 rows that are not empty"
    if strategy is not None and device != "cpu":
        return f"instruction set: {strategy} given, accepted is none on {device}"
    if strategy is not None and strategy not in isas():
        return f"instruction set: {strategy} given, which this CPU or this build does not have; it has {', '.join(isas())}"
    if not _packed(problem):
        return None
    least, threads = packed.least_budget(problem, strategy or isas()[0]), torch.get_num_threads()
    if least > problem.memory_budget:
        return f"memory_budget: {problem.memory_budget} bytes given, accepted are at least {least} with {threads} threads"
    return None


def why_not_default(problem: Problem) -> str | None:
    """The reason it is not chosen unasked, or None."""
    if problem.device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(problem.device)
    if 10 * major + minor in MEASURED:
        return None
    return f"never yet measured on a GPU like this (cuda {major}.{minor}); backend='native' asks for it"


def _packed(problem: Problem) -> bool:
    return problem.dtype == torch.bfloat16 and problem.device.type == "cpu"


def _on_rows(problem: Problem, plan: Schedule) -> CpuRows | CudaRows:
    return CpuRows(plan.isa) if problem.device.type == "cpu" else CudaRows(compiled.cuda())


def _isa(problem: Problem, strategy: str | None) -> str:
    return (strategy or isas()[0]) if problem.device.type == "cpu" else ""


def schedule(problem: Problem, strategy: str | None) -> Schedule:
    isa = _isa(problem, strategy)
    return packed.schedule(problem, isa) if _packed(problem) else torch_chunked.schedule(problem, None)._replace(isa=isa)


def one_pass_schedule(problem: Problem, strategy: str | None) -> Schedule:
    isa = _isa(problem, strategy)
    if _packed(problem):
        return packed.one_pass_schedule(problem, isa)
    if problem.device.type == "cpu":
        return torch_chunked.one_pass_schedule(problem, None)._replace(isa=isa)
    return fused_rows_schedule(problem)


def fused_rows_schedule(problem: Problem) -> Schedule:
    """As many whole rows at a time as the budget allows: fp32 products and dz, and dz again without the rows that have none."""
    item = problem.dtype.itemsize
    per_row = problem.vocab * (4 + item * problem.needs_grad * (2 if item < 4 else 1)) + problem.width * (2 * item + 4) + 200
    problem.require_budget(per_row)
    chunk = max(min(problem.memory_budget // per_row, problem.active_rows), 1)
    several = problem.active_rows > chunk
    accumulator = 4 * problem.vocab * problem.width if several and problem.grad_weight and item < 4 else 0
    memory = Memory(chunk * per_row, 0, accumulator)
    tile = Tile(chunk, problem.vocab)
    return Schedule("one pass, rows fused", tile, memory, problem.active_rows, chunk_rows=chunk, fused_rows=True)


def cached_rows(problem: Problem, strategy: str | None) -> int:
    return 0


def row_statistics(operands: Operands, rows: Tensor, problem: Problem, plan: Schedule, with_entropy: bool, keep: bool = False):
    """:class:`Statistics` of the rows [n], and, to ``keep``, their logits for :func:`gradient_tiles`."""
    if _packed(problem):
        return packed.row_statistics(operands, rows, problem, plan), None
    return torch_chunked.row_statistics(operands, rows, problem, plan, with_entropy, keep, _on_rows(problem, plan))


def statistics(operands: Operands, counts: Tensor, problem: Problem, plan: Schedule, with_entropy: bool):  # [N] bool
    """:class:`Statistics` of the rows that count."""
    rows = counts.nonzero().squeeze(1)
    return of_all_rows(row_statistics(operands, rows, problem, plan, with_entropy)[0], rows, len(counts)), None


def gradient_dtype(problem: Problem) -> torch.dtype:
    """Of dz, as far as its scale is concerned: never fp16."""
    return torch.float32


def gradient_tiles(
    operands: Operands,
    rows: Tensor,  # [n]
    coefficients: Coefficients,
    problem: Problem,
    plan: Schedule,
    cache: tuple[Tensor, Tensor, Tensor] | None,
) -> Iterator:
    if _packed(problem):
        return packed.gradient_tiles(operands, rows, coefficients, problem, plan)
    return torch_chunked.gradient_tiles(operands, rows, coefficients, problem, plan, cache, _on_rows(problem, plan))


def policy_rows(
    operands: Operands, rows: Tensor, objective: object, inputs: dict[str, Tensor | None], problem: Problem, plan: Schedule
) -> tuple[dict[str, Tensor], Tensor | None, Iterator[GradientTile] | None]:
    """Of the rows [n] of a plan with ``fused_rows``: loss (times the weight), logprob and entropy; which of them have a gradient,
    and that of those (both None where none is wanted). ``objective`` is a ``PolicyObjective`` of tokens, ``inputs`` are
    [n] each."""
    found, dz, hidden = _on_rows(problem, plan).policy_loss(operands, operands.coordinates(rows), objective, inputs, problem)
    if not problem.needs_grad:
        return found, None, None
    used = found["used"].nonzero().squeeze(1)

    def tiles() -> Iterator[GradientTile]:
        if len(used):
            some = (dz, hidden) if len(used) == len(dz) else (dz[used], hidden[used])
            yield GradientTile(slice(0, problem.vocab), slice(0, len(used)), some[0], operands.weight, some[1])

    return found, used, tiles()
