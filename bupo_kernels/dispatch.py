"""Problem -> Plan: which backend runs a call, how, what it costs, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass, field

from bupo_kernels.backends import torch_chunked
from bupo_kernels.backends.problem import Memory, Problem, Tile

# In order of preference. A backend is a module with why_not(problem), tile(problem) and memory(problem, tile).
BACKENDS = {"torch": torch_chunked}

DEFAULT_MEMORY_BUDGET = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Plan:
    """What a call will do; ``print`` it. FLOPs count multiply and add; the backward's are an upper bound, reached when no
    row's upstream gradients are all zero."""

    problem: Problem
    backend: str
    strategy: str
    tile: Tile
    memory: Memory  # bytes beyond inputs, outputs and gradients
    flops_forward: int
    flops_backward: int
    why_not: dict[str, str] = field(default_factory=dict)  # backend -> reason, for the backends that cannot run this

    def __str__(self) -> str:
        p, mib = self.problem, 2**20
        frozen = [name for name, needed in (("hidden", p.grad_hidden), ("weight", p.grad_weight)) if not needed]
        lines = [
            f"problem   {p.active_rows} of {p.rows} rows x {p.vocab} columns x {p.width}, "
            f"{str(p.dtype).removeprefix('torch.')} on {p.device}"
            + (f", no gradient for {' and '.join(frozen)}" if frozen else ""),
            f"backend   {self.backend}: {self.strategy}, tiles of {self.tile.rows} x {self.tile.columns}",
            f"forward   {self.flops_forward / 1e9:.3f} GFLOP, {self.memory.forward / mib:.2f} MiB of working memory",
            f"backward  {self.flops_backward / 1e9:.3f} GFLOP, {self.memory.backward / mib:.2f} MiB of working memory"
            + (f" + {self.memory.accumulator / mib:.2f} MiB to sum dH in fp32" if self.memory.accumulator else ""),
            f"budget    {p.memory_budget / mib:.2f} MiB of working memory",
        ]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.why_not.items()])


def make_plan(problem: Problem, backend: str = "auto") -> Plan:
    """The plan for ``problem`` on ``backend``, or on the first of :data:`BACKENDS` that can run it.

    Raises ``ValueError`` when ``backend`` is unknown or cannot run the problem, with each backend's reason.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} given, accepted are {', '.join(map(repr, ('auto', *BACKENDS)))}")
    candidates = BACKENDS if backend == "auto" else {backend: BACKENDS[backend]}
    reasons = {name: reason for name, module in BACKENDS.items() if (reason := module.why_not(problem)) is not None}
    runnable = [name for name in candidates if name not in reasons]
    if not runnable:
        raise ValueError("; ".join(reasons[name] if len(candidates) == 1 else f"{name}: {reasons[name]}" for name in candidates))
    chosen = BACKENDS[runnable[0]]
    tile = chosen.tile(problem)
    product = 2 * problem.active_rows * problem.vocab * problem.width  # one GEMM
    gradients = problem.grad_hidden + problem.grad_weight
    return Plan(
        problem=problem,
        backend=runnable[0],
        strategy="recompute" if gradients or problem.grad_bias else "statistics only",
        tile=tile,
        memory=chosen.memory(problem, tile),
        flops_forward=product,
        flops_backward=product * (1 + gradients) if gradients or problem.grad_bias else 0,
        why_not=reasons,
    )
