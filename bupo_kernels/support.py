"""Log-prob, entropy and logsumexp on supports: a policy that gives each row a few ids alone, those that its sampler kept.

With the support S of a row the policy is ``p_j = e^(z_j) / Σ_(k ∈ S) e^(z_k)`` for j in S and 0 elsewhere: that of logits of −inf
outside S. The logits of all rows are as many numbers as there are ids, so all that is not a product of vectors is done on them at
once, in float64: statistics segment by segment, and dz. Those two products are what a backend has (``backends/gathers.py``).

An *entry* is an id in the support of a row. Entries that add exactly nothing to a gradient (those of rows without upstream
gradient, and of rows with one id, whose log-prob and entropy are constants) are left out of its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends import algebra
from bupo_kernels.backends.algebra import LEAST_EXPONENT, Statistics
from bupo_kernels.backends.base import Operands, Problem, Readout, is_captured
from bupo_kernels.backends.compiled import present
from bupo_kernels.backends.divergences import Policies, Sums, compare, entropy_of, value_of
from bupo_kernels.backends.gathers import Gathers, Segments
from bupo_kernels.backends.torch_ import to_logits_
from bupo_kernels.dispatch import GATHERS, choose_among
from bupo_kernels.engine import Settings, active_rows, check_rows, on, problem_of

BYTES_PER_ID = 72  # of what a call has at hand for each entry: its logit, its row, dz, and these sorted by id


class Support(NamedTuple):
    """The supports of N rows, one after the other: row i has ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: Tensor  # [M] int64
    offsets: Tensor  # [N + 1] int64

    @property
    def sizes(self) -> Tensor:  # [N]
        """The number of ids of each row."""
        return self.offsets.diff()

    def rows(self) -> Tensor:  # [M]
        """Return the row of each entry."""
        numbers = torch.arange(len(self.offsets) - 1, dtype=torch.int64, device=self.ids.device)
        return numbers.repeat_interleave(self.sizes, output_size=len(self.ids))

    def is_target(self, targets: Tensor, rows: Tensor) -> Tensor:  # [N], [M] -> [M] bool
        """Return which entries are the target of their row, the first one of each that has it."""
        numbers = torch.arange(len(rows), dtype=torch.int64, device=rows.device)
        hits = _wide(torch.where(self.ids == targets[rows], -numbers, -len(rows)))
        return numbers == -_reduce(hits, self.offsets, "max")[rows]

    def settled(self, targets: Tensor) -> Tensor:  # [N] -> [N] bool
        """Return which rows have their target and no other id: their log-prob and entropy are 0, whatever the logit."""
        if len(self.ids) == 0:
            return torch.zeros_like(targets, dtype=torch.bool)
        first = self.ids[self.offsets[:-1].clamp(max=len(self.ids) - 1)]
        return (self.sizes == 1) & (first == targets)


@dataclass(frozen=True)
class SupportPlan:
    """The plan of a call on supports; ``print`` it. FLOPs count multiply and add; the backward's are an upper bound, reached when
    every entry has a gradient."""

    backend: str
    implementation: Gathers = field(repr=False)
    strategy: str | None
    problem: Problem
    ids: int  # entries of all rows
    why_not: dict[str, str] = field(default_factory=dict)  # backend -> reason, for those that cannot run this or were passed over

    @property
    def flops_forward(self) -> int:
        return 2 * self.ids * self.problem.width

    @property
    def flops_backward(self) -> int:
        return (self.problem.grad_hidden + self.problem.grad_weight) * self.flops_forward

    def __str__(self) -> str:
        problem, mib = self.problem, 2**20
        lines = [
            f"problem   {self.ids} of {problem.vocab} ids in all, {problem.active_rows} of {problem.rows} rows x {problem.width}, "
            f"{str(problem.dtype).removeprefix('torch.')} on {problem.device.type}",
            f"backend   {self.backend}: gathers" + (f" with {self.strategy}" if self.strategy else ""),
            f"forward   {self.flops_forward / 1e9:.3f} GFLOP",
            f"backward  {self.flops_backward / 1e9:.3f} GFLOP",
            f"budget    {problem.memory_budget / mib:.2f} MiB for rows that are copied, and {BYTES_PER_ID} bytes an id, "
            f"{BYTES_PER_ID * self.ids / mib:.2f} MiB",
        ]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.why_not.items()])


def plan_for(operands: Operands, ids: int, active_rows: int, settings: Settings) -> SupportPlan:
    """Return the plan of a call. Raise ``ValueError`` when the backend asked for is unknown or cannot run it, with its reason."""
    problem = problem_of(operands, active_rows, settings)
    name, gathers, strategy, why_not = choose_among(GATHERS, problem, settings.backend)
    return SupportPlan(name, gathers, strategy, problem, ids, why_not)


def check(support: Support, vocab: int) -> None:
    """Raise ``ValueError`` for offsets and ids that lead out of their memory, where values are at hand. Off the CPU it is a
    device-side assert."""
    ids, offsets = support
    ascending = f"accepted are numbers that ascend from 0 to {len(ids)}, the number of ids"
    in_range = f"accepted are ids in [0, {vocab})"
    good_offsets = (offsets[0] == 0) & (offsets[-1] == len(ids)) & (support.sizes >= 0).all()
    outside = (ids < 0) | (ids >= vocab)
    if ids.device.type != "cpu":
        torch._assert_async(good_offsets, f"support: offsets: {ascending}")
        torch._assert_async(~outside.any(), f"support: {in_range}")
        return
    if not good_offsets:
        given = offsets.tolist() if len(offsets) <= 8 else [*offsets[:3].tolist(), "...", *offsets[-3:].tolist()]
        raise ValueError(f"support: offsets {given} given, {ascending}")
    if outside.any():
        raise ValueError(f"support: {ids[outside][0].item()} given, {in_range}")


def check_sets(support: Support, targets: Tensor, active: Tensor, vocab: int) -> None:  # [...], [...] bool
    """Raise ``ValueError`` where an active row has no id, one id twice, or a target that is none of them. It waits for the
    device."""
    check(support, vocab)
    ids, offsets = support
    targets, active, rows = targets.flatten(), active.flatten(), support.rows()
    if (empty := active & (support.sizes == 0)).any():
        raise ValueError(f"support: no id for row {_first(empty)} given, accepted is at least one for each row that counts")
    keys = (rows * vocab + ids)[active[rows]].sort().values
    if (twice := keys[1:] == keys[:-1]).any():
        row, id_ = divmod(int(keys[1:][twice][0]), vocab)
        raise ValueError(f"support: id {id_} twice for row {row} given, accepted is each id once in a row")
    found = torch.zeros_like(active).index_fill_(0, rows[ids == targets[rows]], True)
    if (missing := active & ~found).any():
        row = _first(missing)
        given = ids[offsets[row] : offsets[row + 1]][:8].tolist()
        raise ValueError(f"targets: {targets[row].item()} for row {row} given, accepted is an id of its support: {given}")


def _first(which: Tensor) -> int:
    return int(which.nonzero()[0])


class Forward(NamedTuple):
    """The results of a forward for N rows, and what it leaves for the backward."""

    logprob: Tensor  # [N]
    entropy: Tensor | None  # [N]
    logsumexp: Tensor  # [N]
    saved: Tensor  # [3, N] m, log s, logprob; [4, N] with the entropy
    logits: Tensor  # [M]; [0] where no gradient is planned


def statistics(operands: Operands, support: Support, mask: Tensor | None, settings: Settings) -> Forward:
    """Return log-prob, entropy and logsumexp of all rows, 0 on those that are not active and NaN on those without an id."""
    active = active_rows(operands.targets, mask, settings.ignore_index)
    check_rows(operands, active, settings.ignore_index)
    check(support, operands.weight.shape[0])
    plan = plan_for(operands, len(support.ids), active.numel(), settings)
    rows, active = support.rows(), active.flatten()
    z = _logits(operands, support, rows, active, plan)
    streamed = algebra.of_active_rows(_statistics(z, rows, support, operands.targets.flatten()), active)
    found = algebra.finish(streamed, max(len(support.ids), 1), settings.with_entropy)
    greatest = support.sizes.clamp(min=1).log()
    entropy = None if found.entropy is None else torch.minimum(found.entropy, greatest).to(z.dtype)
    m, log_s, logprob, logsumexp = (x.to(z.dtype) for x in (streamed.m, found.log_s, found.logprob, found.logsumexp))
    saved = torch.stack([m, log_s, logprob, *([] if entropy is None else [entropy])])
    return Forward(logprob, entropy, logsumexp, saved, z if plan.problem.needs_grad else z.new_empty(0))


def _logits(operands: Operands, support: Support, rows: Tensor, active: Tensor, plan: SupportPlan) -> Tensor:  # [M], [N] -> [M]
    """Return the logit of each entry of an active row, which ``rows`` names, and −inf for the others."""
    z = torch.full((len(rows),), -torch.inf, dtype=plan.problem.statistics_dtype, device=rows.device)
    entries = torch.arange(len(rows), dtype=torch.int64, device=rows.device)
    if not is_captured(rows.device):  # where nothing may wait to be told which rows are active
        entries = entries[active[rows]]
    rows, ids = rows[entries], support.ids[entries]
    bias = None if operands.bias is None else operands.bias[ids].unsqueeze(1)
    readout = operands.readout.rows(operands.coordinates(rows), z.dtype)
    with on(z.device):
        hidden, weight, budget = _rows_of(operands.hidden), _rows_of(operands.weight), plan.problem.memory_budget
        products = plan.implementation.dots(hidden, rows, weight, ids, budget, plan.strategy)
    z[entries] = to_logits_(products.unsqueeze(1), bias, readout).squeeze(1)
    return z


def logits(operands: Operands, support: Support, active: Tensor, settings: Settings) -> Tensor:  # [...] bool -> [M]
    """Return the logit of each entry, −inf on rows that are not active."""
    check_rows(operands, active, settings.ignore_index)
    check(support, operands.weight.shape[0])
    plan = plan_for(operands, len(support.ids), active.numel(), settings)
    return _logits(operands, support, support.rows(), active.flatten(), plan)


def gradients_of_logits(
    operands: Operands,
    support: Support,
    upstream: Tensor,  # [M]
    logits: Tensor,  # [M]
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW and db from the gradients of :func:`logits`; [0] for those not needed."""
    rows = support.rows()
    dz = _of_products(upstream.clone(), logits, operands.readout.rows(operands.coordinates(rows), logits.dtype))
    return _sums(operands, support, rows, dz, settings)


def divergence(
    z: Tensor,  # [M] of the student
    u: Tensor,  # [M] of the teacher
    support: Support,
    active: Tensor,  # [N] bool
    beta: float,
) -> tuple[Tensor, Tensor]:  # [N] each
    """Return the divergence of two policies on one support and the entropy of the first, in float64: 0 on rows that are not active
    and NaN on those without an id. Both are differentiable by the logits."""
    rows = support.rows()

    def total(x: Tensor) -> Tensor:
        return _reduce(x, support.offsets, "sum")

    def log_policy(logits: Tensor) -> Tensor:
        wide = _wide(logits.detach())
        m = _reduce(wide, support.offsets, "max").clamp(min=algebra.lowest(torch.float32))
        shifted = wide - m[rows]
        return shifted - total(shifted.exp()).log()[rows]

    sums = Sums(total, lambda of_rows: of_rows[rows])
    log_p, log_q = log_policy(z), log_policy(u)
    policies = Policies(log_p, log_q, log_p.exp(), log_q.exp())
    parts, by_z, by_u = compare(policies, beta, sums, gradients=(True, True))
    value = value_of(parts, beta)
    entropy, of_entropy = entropy_of(log_p, policies.p, sums, gradient=True)

    def through(by: Tensor | None, logits: Tensor) -> Tensor:
        """Return exactly 0 for each row, with the derivative ``by``."""
        assert by is not None
        return total(torch.where((by == 0) | ~active[rows], 0, by.detach() * (logits - logits.detach())))

    def finished(x: Tensor, *ways: Tensor) -> Tensor:
        return torch.where(active, sum(ways, x.masked_fill(support.sizes == 0, torch.nan)), 0)

    return finished(value, through(by_z, z), through(by_u, u)), finished(entropy, through(of_entropy, z))


def _rows_of(x: Tensor) -> Tensor:  # [..., D] -> [n, D]
    """Return the vectors of ``x`` one below the other, each with its elements side by side: a view, or else a copy."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()


def _statistics(z: Tensor, rows: Tensor, support: Support, targets: Tensor) -> Statistics:  # [M], [M], [N]
    """Return the statistics of all rows in float64: the sum of a row that has most of the vocabulary is one after the other."""
    z = _wide(z)
    m = _reduce(z, support.offsets, "max").clamp(min=algebra.lowest(torch.float32))
    shifted = z - m[rows]
    e = shifted.exp()
    s = _reduce(e, support.offsets, "sum")
    t = _reduce(e.mul_(shifted.clamp_(min=LEAST_EXPONENT)), support.offsets, "sum")  # 0 · −inf is left out
    z_y = _reduce(torch.where(support.is_target(targets, rows), z, -torch.inf), support.offsets, "max")
    return Statistics(m, s, t, z_y)


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in float64, or in the widest dtype that its device has."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _reduce(values: Tensor, offsets: Tensor, how: str) -> Tensor:  # [M], [N + 1] -> [N]
    initial = -torch.inf if how == "max" else 0.0
    if len(values) == 0:  # torch refuses to reduce nothing
        return values.new_full((len(offsets) - 1,), initial)
    return torch.segment_reduce(values, how, offsets=offsets, unsafe=True, initial=initial)


def gradients(
    operands: Operands,
    support: Support,
    upstream: Sequence[Tensor | None],  # [...] each: of logprob, entropy, logsumexp
    saved: Tensor,  # [3 or 4, N]
    logits: Tensor,  # [M]
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW and db from what :func:`statistics` left; [0] for those not needed."""
    rows = support.rows()
    return _sums(operands, support, rows, _gradient_of_products(operands, support, rows, upstream, saved, logits), settings)


def _sums(
    operands: Operands,
    support: Support,
    rows: Tensor,  # [M]
    dz: Tensor,  # [M] of the products
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW and db; [0] for those not needed."""
    plan = plan_for(operands, len(support.ids), operands.targets.numel(), settings)
    hidden, weight, bias = operands.hidden, operands.weight, operands.bias
    need_hidden, need_weight, need_bias = settings.needed
    found = [hidden.new_empty(0) for _ in range(3)]
    everything = torch.arange(operands.targets.numel(), dtype=torch.int64, device=rows.device)
    with on(hidden.device):
        entries = (dz != 0).nonzero().squeeze(1)  # a NaN counts
        dz, rows, ids = dz[entries], rows[entries], support.ids[entries]
        if need_hidden:
            found[0] = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            _sum(plan, dz, weight, ids, _segments(rows, everything), found[0], everything)
        if need_weight or (need_bias and bias is not None):
            ids, order = ids.sort(stable=True)
            places, counts = ids.unique_consecutive(return_counts=True)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            dz, rows = dz[order], rows[order]
            if need_weight:
                found[1] = present(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)).zero_()
                _sum(plan, dz, hidden, rows, offsets, found[1], places)
            if need_bias and bias is not None:
                found[2] = torch.zeros_like(bias)
                found[2][places] = _reduce(_wide(dz), offsets, "sum").to(bias.dtype)
    return found[0], found[1], found[2]


def _gradient_of_products(
    operands: Operands,
    support: Support,
    rows: Tensor,  # [M]
    upstream: Sequence[Tensor | None],
    saved: Tensor,
    logits: Tensor,
) -> Tensor:  # [M]
    """Return the gradient of each entry's product, 0 on rows that are not active."""
    m, log_s, logprob, *entropy = saved
    g_logprob, g_entropy, g_logsumexp = (g if g is None else g.flatten().to(saved.dtype) for g in upstream)
    targets, readout = operands.targets.flatten(), operands.readout.rows(operands.coordinates(rows), logits.dtype)
    of_rows = algebra.coefficients(g_logprob, g_entropy, g_logsumexp, m, log_s, logprob, entropy[0] if entropy else None, targets)
    x = logits - m[rows]
    dz = x.exp()
    if of_rows.slope is None:
        dz.mul_(of_rows.constant[rows])
    else:
        dz.mul_(of_rows.constant[rows] - of_rows.slope[rows] * x.clamp_(min=LEAST_EXPONENT))
    dz = torch.where(support.is_target(targets, rows), of_rows.on_target[rows], dz)
    return torch.where((m != -torch.inf)[rows], _of_products(dz, logits, readout), 0)


def _of_products(dz: Tensor, logits: Tensor, readout: Readout) -> Tensor:  # [M], [M] -> [M]
    """Turn the gradient of logits into that of the products, in place."""
    temperature = readout.temperature.squeeze(1) if isinstance(readout.temperature, Tensor) else readout.temperature
    if readout.softcap is not None:
        dz.mul_(1 - (logits * (temperature / readout.softcap)).square_())  # 1 − tanh²
    return dz.mul_(readout.logit_scale / temperature)


def _segments(rows: Tensor, numbers: Tensor) -> Tensor:  # [m] ascending, [N] -> [N + 1]
    """Return where the entries of each of the rows begin, and where the last one's end."""
    return torch.nn.functional.pad(torch.searchsorted(rows, numbers), (0, 1), value=len(rows))


def _sum(plan: SupportPlan, dz: Tensor, source: Tensor, index: Tensor, offsets: Tensor, out: Tensor, places: Tensor) -> None:
    out = out.view(out.shape[:-1].numel(), out.shape[-1])
    budget = plan.problem.memory_budget
    plan.implementation.sums(Segments(dz, _rows_of(source), index, offsets), out, places, budget, plan.strategy)
