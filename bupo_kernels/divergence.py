"""Divergences of a student's policy from a teacher's, each of hidden states and an unembedding of its own.

A divergence compares two logits of one column, and Jensen and Shannon's the normalised probabilities too. So the rows of a chunk
have the logits of both sides at hand, whole, within the memory budget, and one kernel (``backends/divergences.py``) takes them from
products to values and, in place, to the gradients of the products. Of a chunk there is one product for each side, and one for each
trained operand. A sum over rows takes its gradients so in the forward. Values of rows, whose upstream gradients nobody knows there,
form the products of the rows that have one again in the backward.

A teacher that is known by the log-probs of its top ids alone (:class:`Top`) has no logits: there is one product, and all ids beyond
the top are one bucket.

Where the ranks of a group have each some of the columns, of both sides the same, a chunk has the logits of this rank's columns at
hand, and its kernel exchanges a few numbers a row with the other ranks. So all take the same chunks: those of the rank with the
smallest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends.base import Operands, Problem
from bupo_kernels.backends.divergences import DivergenceRows, Side, Top, Upstream
from bupo_kernels.backends.gradients import GradientSums, MatrixTile, RowsTile, accumulate_, whole_rows
from bupo_kernels.backends.quantised import rows_of
from bupo_kernels.backends.tile_loop import CPU_TILE, DEVICE_TILE, SMALL_TILE, row_elements
from bupo_kernels.dispatch import DIVERGENCES, Columns, choose_among
from bupo_kernels.engine import Flags, Settings, check_rows, on, problem_of
from bupo_kernels.vocab_parallel import Exchanges, Header, Shard, digest, ranks_of, telling

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # dH, dW, db of the student, and of the teacher
NOTHING: Flags = (False, False, False)


class Policy(NamedTuple):
    """One of the two sides of a call."""

    operands: Operands
    settings: Settings


Teacher = Policy | Top


@dataclass(frozen=True)
class DivergencePlan:
    """The plan of a call of :func:`bupo_kernels.linear_divergence`; ``print`` it. FLOPs count multiply and add; the backward's are
    an upper bound, reached when every row has an upstream gradient."""

    backend: str
    implementation: DivergenceRows = field(repr=False)
    strategy: str | None
    student: Problem
    teacher: Problem | int  # or the number of top ids that it is known by
    one_pass: bool  # whether the gradients are taken in the forward
    chunk_rows: int  # whose logits of both sides are at hand together
    columns: int  # of W whose dequantised or upcast rows are, and of dW
    working_memory: int  # bytes
    why_not: dict[str, str] = field(default_factory=dict)  # backend -> reason, for those that cannot run this or were passed over
    exchanged: tuple[int, ...] = ()  # the numbers a row that a rank tells the others of a group, in one exchange after the other
    columns_here: Columns | None = None  # of a vocabulary on several ranks; all else but the chunk is of those that are here

    @property
    def problem(self) -> Problem:
        """The student's problem, whose rows and columns are the teacher's too."""
        return self.student

    @property
    def flops_forward(self) -> int:
        return self._products + (self._gradients if self.one_pass else 0)

    @property
    def flops_backward(self) -> int:
        trained = any(side.needs_grad for side in self.sides)
        return self._products + self._gradients if trained and not self.one_pass else 0

    @property
    def sides(self) -> list[Problem]:
        """The problems of those that have logits."""
        return [side for side in (self.student, self.teacher) if isinstance(side, Problem)]

    @property
    def _products(self) -> int:
        return sum(_flops(side) for side in self.sides)

    @property
    def _gradients(self) -> int:
        return sum(_flops(side) * (side.grad_hidden + side.grad_weight) for side in self.sides)

    @property
    def wire(self) -> tuple[float, float]:
        """The bytes a row that this rank receives from others, and sends, in forward and backward: what each rank tells of a row,
        and twice its dH in the dtype of the sums, but for this rank's part, as rings of ranks have it."""
        if self.columns_here is None:
            return 0, 0
        size, ranks = self.student.statistics_dtype.itemsize, self.columns_here.ranks
        of_sums: float = sum(self.exchanged) * size * (ranks - 1)
        of_hidden = 2 * sum(side.width for side in self.sides if side.grad_hidden) * size * (ranks - 1) / ranks
        if self.one_pass:
            return of_sums + of_hidden, 0
        return of_sums, (of_sums + of_hidden) * any(side.needs_grad for side in self.sides)

    @property
    def accumulators(self) -> int:
        """The bytes of the fp32 twins of dW, where it is of 16 bit and chunks are several."""
        several = self.student.active_rows > self.chunk_rows
        return several * sum(
            side.vocab * side.width * side.statistics_dtype.itemsize
            for side in self.sides
            if side.grad_weight and side.dtype.itemsize < side.statistics_dtype.itemsize
        )

    def __str__(self) -> str:
        student, teacher, mib = self.student, self.teacher, 2**20
        of_teacher, trained = f"the top {teacher} of the teacher", ""
        if isinstance(teacher, Problem):
            of_teacher = f"{teacher.width} in {_name(teacher.dtype)} (teacher)"
            trained = f", {_trained(teacher, 'teacher')}"
        lines = [
            f"problem   {student.active_rows} of {student.rows} rows x {student.vocab} columns x {student.width} in "
            f"{_name(student.dtype)} (student) and {of_teacher}, on {student.device.type}",
            f"gradient  {_trained(student, 'student')}{trained}" + (", in the forward" if self.one_pass else ""),
            f"backend   {self.backend}: whole rows{f' with {self.strategy}' if self.strategy else ''}, {self.chunk_rows} at a time",
            f"forward   {self.flops_forward / 1e9:.3f} GFLOP",
            f"backward  {self.flops_backward / 1e9:.3f} GFLOP",
            f"memory    {self.working_memory / mib:.2f} MiB"
            + (f" + {self.accumulators / mib:.2f} MiB to sum dW in fp32" if self.accumulators else ""),
            f"budget    {student.memory_budget / mib:.2f} MiB of working memory",
        ]
        if self.columns_here is not None:
            lines[1:1] = self.columns_here.lines(self.wire)
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.why_not.items()])


def _flops(problem: Problem) -> int:
    return 2 * problem.active_rows * problem.vocab * problem.width


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trained(problem: Problem, side: str) -> str:
    names = [n for n, on in zip(("hidden", "weight", "bias"), _flags(problem), strict=True) if on]
    return f"{' and '.join(names) if names else 'none'} of the {side}"


def _flags(problem: Problem) -> tuple[bool, bool, bool]:
    return problem.grad_hidden, problem.grad_weight, problem.grad_bias


def plan_for(student: Policy, teacher: Teacher, active_rows: int, beta: float, one_pass: bool = False) -> DivergencePlan:
    """Return the plan of a call. Raise ``ValueError`` when the backend asked for is unknown or cannot run it, with its reason, or
    the budget does not hold the logits of one row."""
    sides = [side for side in (student, teacher) if isinstance(side, Policy)]
    # A shard may have no columns; it forms products all the same.
    problems = [
        replace(problem_of(side.operands, active_rows, side.settings), vocab=side.operands.weight.shape[0]) for side in sides
    ]
    unable, group = {}, student.settings.group
    for backend, rows in DIVERGENCES.items():
        unable[backend] = (rows.why_not_top() if isinstance(teacher, Top) else None) or (rows.why_not_shard() if group else None)
    name, kernel, strategy, why_not = choose_among(DIVERGENCES, problems[0], student.settings.backend, unable=unable)
    least, columns = _columns(problems)
    dtype, device, vocab = problems[0].statistics_dtype, problems[0].device, problems[0].vocab
    # Of a top there are ids and log-probs, and a dozen matrices of as many columns.
    per_row = sum(map(_bytes_of_row, problems)) + (16 * teacher.ids.shape[-1] * dtype.itemsize if isinstance(teacher, Top) else 0)
    exchanged: tuple[int, ...] = ()
    if group:
        exchanged = kernel.exchanged(teacher.ids.shape[-1] if isinstance(teacher, Top) else None, beta)
        per_row += 2 * (1 + ranks_of(group)) * max(exchanged) * dtype.itemsize

    def needed(rows: int) -> int:
        return least + rows * per_row + kernel.working_memory(rows, vocab, dtype, device, shard=bool(group))

    budget = problems[0].memory_budget
    problems[0].require_budget(needed(1))
    of_teacher = teacher.ids.shape[-1] if isinstance(teacher, Top) else problems[1]
    fewest, most = 1, max(active_rows, 1)
    while fewest < most:  # the largest number of rows that fits
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if needed(middle) <= budget else (fewest, middle - 1)
    size = needed(fewest)
    return DivergencePlan(name, kernel, strategy, problems[0], of_teacher, one_pass, fewest, columns, size, why_not, exchanged)


def planned(
    student: Policy, teacher: Teacher, active_rows: int, beta: float, one_pass: bool = False
) -> tuple[DivergencePlan, Shard | None]:
    """Return what :func:`plan_for` does and, where the ranks of a group have each some columns, what this rank has: there all of
    them call this, and take the chunks that fit on each."""
    sides = [side for side in (student, teacher) if isinstance(side, Policy)]
    with telling(student.settings.group or None, student.operands.hidden):
        plan = plan_for(student, teacher, active_rows, beta, one_pass)
    if not student.settings.group:
        return plan, None
    call: list[object] = ["linear_divergence", beta, plan.exchanged]
    for side in sides:
        hidden, (temperature, *readout) = side.operands.hidden, vars(side.operands.readout).values()
        numbers = "rows" if isinstance(temperature, Tensor) else temperature
        call += [hidden.dtype, hidden.shape[-1], side.settings.planned[0], numbers, readout]
    header = Header(
        columns=student.operands.weight.shape[0],
        rows=student.operands.targets.numel(),
        width=student.operands.hidden.shape[-1],
        active=active_rows,
        options=digest(str(call)),
        chunk=plan.chunk_rows,
    )
    shard = Shard.of(student.settings.group, header, student.operands.hidden.device, wait=True)
    return replace(plan, chunk_rows=int(shard.chunk), columns_here=shard.columns()), shard


def _bytes_of_row(problem: Problem) -> int:
    """Return the bytes that a row has at hand: its logits, over which its dz lies (in fp16 beside them), its hidden vector as it is
    and as it is multiplied, the sum of its dH, and statistics, coordinates and temperatures of it."""
    size, apart = problem.statistics_dtype.itemsize, problem.needs_grad and problem.product_dtype == torch.float16
    of_hidden = problem.width * (problem.dtype.itemsize + problem.product_dtype.itemsize + size * problem.grad_hidden)
    return row_elements(problem.vocab) * (size + 6 * apart) + of_hidden + 128


def _columns(problems: Sequence[Problem]) -> tuple[int, int]:
    """Return the bytes of the slices of W and dW that are at hand, and how many columns they have: as many as take an eighth of the
    budget, but not so few that products are slow."""
    first = problems[0]

    def needed(columns: int) -> int:
        # The next slice is made while the last is held; of a quantised one there is what its class needs to come by it.
        slices = [(2 * _sliced(x) + x.quantised + 2 * (x.grad_weight and x.dtype.itemsize < 4)) * x.width for x in problems]
        return columns * first.statistics_dtype.itemsize * max(slices)

    columns = max(min((CPU_TILE if first.device.type == "cpu" else DEVICE_TILE)[1], first.vocab), 1)
    while columns > SMALL_TILE and needed(columns) > first.memory_budget // 8:
        columns = (columns + 1) // 2
    return needed(columns), columns


def _sliced(problem: Problem) -> bool:
    """Tell whether W is multiplied a slice of rows at a time, upcast or dequantised."""
    return problem.quantised or problem.product_dtype != problem.dtype


class Found(NamedTuple):
    """The results of N rows, 0 on those that were not asked for, and the gradients of both sides, [0] where not needed."""

    divergence: Tensor  # [N]
    entropy: Tensor  # [N]
    gradients: Six


def values(student: Policy, teacher: Teacher, active: Tensor, beta: float) -> tuple[Tensor, Tensor]:  # [...] bool -> [N], [N]
    """Return divergence and student's entropy of all rows, 0 on those that are not active."""
    rows = active.flatten().nonzero().squeeze(1)
    found = _run(student, teacher, rows, beta, None, NOTHING, NOTHING, to_check=active)
    return found.divergence, found.entropy


def gradients(
    student: Policy,
    teacher: Teacher,
    active: Tensor,  # [...] bool
    beta: float,
    upstream: Sequence[Tensor | None],  # [...] each: of divergence and entropy
    found: Sequence[Tensor],  # [...] each: divergence and entropy, as values() gave them
) -> Six:
    """Return dH, dW and db of both sides; [0] for those not needed. Rows whose upstream gradients are exactly zero enter no
    product: but where a loss weighs a row of NaN with 0 it is NaN, and so are its gradients."""
    active, dtype = active.flatten(), found[0].dtype
    gs = [g if g is None else g.flatten().to(dtype) for g in upstream]
    has_gradient = torch.zeros_like(active)
    for g, value in zip(gs, found, strict=True):
        if g is not None:
            has_gradient |= (g != 0) | ~value.flatten().isfinite()
    rows = (has_gradient & active).nonzero().squeeze(1)
    g_divergence, g_entropy = (g if g is None else g[rows] for g in gs)
    if g_divergence is None:
        g_divergence = torch.zeros(len(rows), dtype=dtype, device=rows.device)
    of_rows = Upstream(g_divergence, g_entropy)
    of_teacher = teacher.settings.needed if isinstance(teacher, Policy) else NOTHING
    return _run(student, teacher, rows, beta, of_rows, student.settings.needed, of_teacher).gradients


def weighted_sum(
    student: Policy,
    teacher: Teacher,
    active: Tensor,  # [...] bool
    beta: float,
    weights: Tensor,  # [...]
) -> tuple[Tensor, Found]:
    """Return ``Σ weight · divergence`` over the active rows, and what they have; gradients are those of the sum, taken in the same
    pass. Rows of weight 0 are left out."""
    active = active & (weights != 0)
    rows = active.flatten().nonzero().squeeze(1)
    of_rows = weights.flatten()[rows]
    planned = student.settings.planned, teacher.settings.planned if isinstance(teacher, Policy) else NOTHING
    trained = any(planned[0] + planned[1])
    found = _run(student, teacher, rows, beta, Upstream(of_rows, None) if trained else None, *planned, to_check=active)
    return (of_rows * found.divergence[rows]).sum(), found


def check(student: Policy, teacher: Teacher, active: Tensor, shard: Shard | None = None) -> None:  # [...] bool
    """Raise ``ValueError`` for a temperature, or an id of a teacher's top, out of range, where values are at hand. Off the CPU it
    is a device-side assert."""
    for side in (student, teacher):
        if isinstance(side, Policy):
            check_rows(side.operands, active, side.settings.ignore_index, shard)
    if not isinstance(teacher, Top) or teacher.ids.numel() == 0:
        return
    vocab, counts = student.operands.weight.shape[0] if shard is None else int(shard.vocab), active.unsqueeze(-1)
    outside = counts & ((teacher.ids < 0) | (teacher.ids >= vocab))
    in_order = teacher.ids.sort(-1).values
    twice = counts & (in_order[..., 1:] == in_order[..., :-1])
    accepted = f"accepted are ids in [0, {vocab}), each once in a row"
    if teacher.ids.device.type != "cpu":
        torch._assert_async(~outside.any() & ~twice.any(), f"teacher_top: {accepted}")
    elif outside.any():
        raise ValueError(f"teacher_top: id {teacher.ids[outside][0].item()} given, {accepted}")
    elif twice.any():
        raise ValueError(f"teacher_top: id {in_order[..., 1:][twice][0].item()} given twice for a row, {accepted}")


def _run(
    student: Policy,
    teacher: Teacher,
    rows: Tensor,  # [n]
    beta: float,
    upstream: Upstream | None,  # [n] each
    *needed: Flags,  # of each side
    to_check: Tensor | None = None,  # [...] bool, the rows whose arguments nobody has looked at
) -> Found:
    """Return what ``rows`` have, chunk by chunk."""
    sides = [
        side._replace(settings=side.settings._replace(planned=flags))
        for side, flags in zip((student, teacher), needed, strict=True)
        if isinstance(side, Policy)
    ]
    plan, shard = planned(sides[0], sides[1] if isinstance(teacher, Policy) else teacher, len(rows), beta)
    exchange = None if shard is None else Exchanges(shard, plan.student.statistics_dtype, _shapes(plan, len(rows)))
    with on(rows.device), exchange or nullcontext():
        if to_check is not None:
            check(student, teacher, to_check, shard)
        return _chunks(sides, teacher, rows, beta, upstream, plan, exchange)


def _shapes(plan: DivergencePlan, rows: int) -> Iterator[tuple[int, int]]:
    """Yield the shapes of what ranks exchange of so many rows, in the order in which they do."""
    for start in range(0, rows, plan.chunk_rows):
        count = min(plan.chunk_rows, rows - start)
        yield from ((numbers, count) for numbers in plan.exchanged)
        yield from ((0, 0) for side in plan.sides if side.grad_hidden)  # before its dH is summed over the ranks


def _chunks(
    sides: Sequence[Policy],
    teacher: Teacher,
    rows: Tensor,  # [n]
    beta: float,
    upstream: Upstream | None,  # [n] each
    plan: DivergencePlan,
    exchange: Exchanges | None,
) -> Found:
    """Return what ``rows`` have, one chunk after the other."""
    chunk_rows, dtype = plan.chunk_rows, plan.student.statistics_dtype
    sums = [
        GradientSums(x.hidden, x.weight, x.bias, needed=settings.planned, dtype=dtype, parts=len(rows) > chunk_rows)
        for x, settings in sides
    ]
    divergence, entropy = (torch.zeros(plan.student.rows, dtype=dtype, device=rows.device) for _ in range(2))
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        some, of_chunk = rows[chunk], None if upstream is None else upstream.rows(chunk)
        top = teacher.of_rows(some, dtype) if isinstance(teacher, Top) else None
        divergence[some], entropy[some] = _chunk(sides, top, some, beta, of_chunk, plan, sums, exchange)
    nothing = [divergence.new_empty(0) for _ in range(3)]
    of_teacher = sums[1].result() if len(sums) > 1 else (nothing[0], nothing[1], nothing[2])
    return Found(divergence, entropy, (*sums[0].result(), *of_teacher))


def _chunk(
    sides: Sequence[Policy],
    top: Top | None,  # [n, k]
    rows: Tensor,  # [n]
    beta: float,
    upstream: Upstream | None,  # [n] each
    plan: DivergencePlan,
    sums: Sequence[GradientSums],
    exchange: Exchanges | None,
) -> tuple[Tensor, Tensor]:  # [n] each
    """Return divergence and entropy of some rows, and add their gradients to the ``sums`` of the ``sides`` that have logits."""
    both = [_products(side.operands, rows, problem, plan.columns) for side, problem in zip(sides, plan.sides, strict=True)]
    (student, _), kernel, with_entropy = both[0], plan.implementation, sides[0].settings.with_entropy
    if exchange is not None:
        found = kernel.shard_rows(student, both[1][0] if top is None else top, beta, upstream, exchange)
    elif top is not None:
        found = kernel.top_rows(student, top, beta, upstream, plan.strategy)
    else:
        found = kernel.rows(student, both[1][0], beta, upstream, with_entropy, plan.strategy)
    for side, problem, (own, hidden), total in zip(sides, plan.sides, both, sums, strict=True):
        if own.dz is not None:
            dz, unscale = _as_operand(own.dz, problem)
            tiles = _tiles(dz, side.operands.weight, hidden, problem, plan.columns)
            by_hidden = total.products(tiles, len(rows), unscale=unscale)
            if exchange is not None and by_hidden is not None:
                exchange.sum_(by_hidden)
            total.put(by_hidden, rows, len(rows))
    return found


def _products(operands: Operands, rows: Tensor, problem: Problem, columns: int) -> tuple[Side, Tensor]:
    """Return the products of ``rows``, with room for their gradient where one is wanted, and their hidden vectors [n, D]."""
    index, dtype, vocab = operands.coordinates(rows), problem.statistics_dtype, problem.vocab
    hidden = operands.hidden[index].to(problem.product_dtype)
    memory = torch.empty(len(rows), row_elements(vocab), dtype=dtype, device=rows.device)
    products, dz = memory[:, :vocab], None
    for part, weight in _slices(operands.weight, problem, columns):
        accumulate_(products[:, part], hidden, weight.T, first=True)
    if problem.needs_grad:  # fp16 is scaled by the largest dz there is, and waits for it
        of_dz = dtype if problem.product_dtype == torch.float16 else problem.product_dtype
        dz = memory.view(of_dz)[:, :vocab]
    bias = None if operands.bias is None else operands.bias.to(dtype)
    return Side(products, dz, bias, operands.readout.rows(index, dtype)), hidden


def _slices(weight: Tensor, problem: Problem, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield W as it is multiplied, [c, D], with its columns: all of it, or slices of what is upcast or dequantised."""
    step = columns if _sliced(problem) else max(problem.vocab, 1)
    for start in range(0, problem.vocab, step):
        part = slice(start, min(start + step, problem.vocab))
        yield part, rows_of(weight, part).to(problem.product_dtype)


def _as_operand(dz: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:  # [n, V] -> [n, V], []
    """Return dz as it is multiplied, and what undoes its scale. fp16 reaches from 6e-8 to 6e4: a power of two puts the largest dz
    there is at 2^12 or below. One that is not finite stays so at any scale, and leaves it to the others."""
    if problem.product_dtype != torch.float16 or problem.vocab == 0:
        return dz, None
    largest = torch.where(dz.isfinite(), dz, 0).abs().amax()
    scale = torch.exp2(12 - largest.log2().ceil().clamp(-100, 100))
    return dz.mul_(scale).to(torch.float16), 1 / scale


def _tiles(
    dz: Tensor,  # [n, V]
    weight: Tensor,
    hidden: Tensor,  # [n, D]
    problem: Problem,
    columns: int,
) -> Iterator[MatrixTile | RowsTile]:
    rows, wanted = slice(0, len(dz)), hidden if problem.grad_weight else None
    if not _sliced(problem):
        yield from whole_rows(dz, weight, wanted, columns if problem.dtype.itemsize < 4 else max(problem.vocab, 1))
        return
    for part, some in _slices(weight, problem, columns):
        yield MatrixTile(part, rows, dz[:, part], some, wanted)
