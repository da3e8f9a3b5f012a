"""C++ for CPUs (csrc/): fused bf16 kernels, and for fp32 the library's GEMM with row kernels around it.

``packed.py`` has the fused path, ``rows.py`` what is done to rows of products that a library left in memory, in the loop of
``torch_chunked``. The instruction set is the best that was built and that this CPU has; ``backend="native:avx2"`` asks for another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bupo_kernels.backends import torch_chunked
from bupo_kernels.backends.algebra import Coefficients, of_all_rows
from bupo_kernels.backends.compiled import ISAS, isas
from bupo_kernels.backends.native import packed
from bupo_kernels.backends.native.rows import NativeRows
from bupo_kernels.backends.problem import Operands, Problem, Schedule

STRATEGIES = ISAS


def why_not(problem: Problem, strategy: str | None) -> str | None:
    """The reason this backend cannot run ``problem``, or None."""
    if not isas():
        return "the C++ kernels were not built; `bupo env` says why"
    if problem.device.type != "cpu":
        return f"device: {problem.device.type} given, accepted is cpu"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype: {problem.dtype} given, accepted are fp32 and bf16"
    if problem.width == 0 or problem.vocab >= 2**31:
        return f"weight: [{problem.vocab}, {problem.width}] given, accepted are fewer than 2^31 rows that are not empty"
    if strategy is not None and strategy not in isas():
        return f"instruction set: {strategy} given, which this CPU or this build does not have; it has {', '.join(isas())}"
    if not _fused(problem):
        return None
    least, threads = packed.least_budget(problem, strategy or isas()[0]), torch.get_num_threads()
    if least > problem.memory_budget:
        return f"memory_budget: {problem.memory_budget} bytes given, accepted are at least {least} with {threads} threads"
    return None


def why_not_default(problem: Problem) -> str | None:
    """The reason it is not chosen unasked, or None."""
    return None


def _fused(problem: Problem) -> bool:
    return problem.dtype == torch.bfloat16


def schedule(problem: Problem, strategy: str | None) -> Schedule:
    isa = strategy or isas()[0]
    return packed.schedule(problem, isa) if _fused(problem) else torch_chunked.schedule(problem, None)._replace(isa=isa)


def one_pass_schedule(problem: Problem, strategy: str | None) -> Schedule:
    isa = strategy or isas()[0]
    if not _fused(problem):
        return torch_chunked.one_pass_schedule(problem, None)._replace(isa=isa)
    return packed.one_pass_schedule(problem, isa)


def cached_rows(problem: Problem, strategy: str | None) -> int:
    return 0


def row_statistics(operands: Operands, rows: Tensor, problem: Problem, plan: Schedule, with_entropy: bool, keep: bool = False):
    """:class:`Statistics` of the rows [n], and, to ``keep``, their logits for :func:`gradient_tiles`."""
    if _fused(problem):
        return packed.row_statistics(operands, rows, problem, plan), None
    return torch_chunked.row_statistics(operands, rows, problem, plan, with_entropy, keep, NativeRows(plan.isa))


def statistics(operands: Operands, counts: Tensor, problem: Problem, plan: Schedule, with_entropy: bool):  # [N] bool
    """:class:`Statistics` of the rows that count; finite logits are assumed."""
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
    if _fused(problem):
        return packed.gradient_tiles(operands, rows, coefficients, problem, plan)
    return torch_chunked.gradient_tiles(operands, rows, coefficients, problem, plan, cache, NativeRows(plan.isa))
