"""Request: the checked arguments of any call, in the one place that names them all.

An option that is new goes into :class:`Request`; from there it reaches the ops as a tensor, as a number of the readout, or in
:class:`engine.Settings`, and the backends by what ``engine.py`` makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from bupo_kernels import derivatives, engine, ops, vocab_parallel
from bupo_kernels import divergence as divergences
from bupo_kernels import support as supports
from bupo_kernels.backends.base import Operands
from bupo_kernels.backends.divergences import FORWARD_KL, REVERSE_KL, Top
from bupo_kernels.backends.machine import Gpu
from bupo_kernels.backends.quantised import PLAIN, SLICED, called, is_plain, rows_of
from bupo_kernels.dispatch import Plan, default_memory_budget, make_plan
from bupo_kernels.divergence import DivergencePlan
from bupo_kernels.engine import Settings
from bupo_kernels.flops import tell_flop_counter
from bupo_kernels.support import Support, SupportPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class RowStatistics(NamedTuple):
    """The streamed statistics of N rows; 0 on those that are not active."""

    logprobs: Tensor  # [...]
    entropy: Tensor | None  # [...]
    logsumexp: Tensor  # [...]
    saved: Tensor  # [3 or 4, N]; see engine.Forward

    @property
    def log_s(self) -> Tensor:  # [N]
        """``ln Σ e^(z−m)`` with m the largest logit, so that the log-prob of that one is ``−log_s``; no gradient."""
        return self.saved[1]


@dataclass(frozen=True)
class Request:
    """The arguments of a call, as :func:`bupo_kernels.linear_logprobs` describes them. :meth:`of` makes one, and checks it."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [...] int64
    bias: Tensor | None = None  # [V]
    temperature: float | Tensor = 1.0  # or [...]
    logit_scale: float = 1.0
    softcap: float | None = None
    mask: Tensor | None = None  # [...] bool
    ignore_index: int = -100
    return_entropy: bool = True
    backend: str = "auto"
    memory_budget: int = 0  # bytes
    support: Support | None = None
    group: str | None = None  # the name of the ranks that have the other columns

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, targets: Tensor, *, memory_budget: int | None = None, **options: Any) -> Request:
        """Return the request of a call: checked with the messages that users see, gathered, cast as autocast would, with defaults.

        Raise ``TypeError`` and ``ValueError`` naming the argument, ``NotImplementedError`` for a derivative that is not there.
        """
        if not torch.compiler.is_compiling():
            tell_flop_counter()
        if unknown := [name for name in options if name not in OPTIONS]:
            raise TypeError(f"{unknown[0]}: given, accepted are {', '.join(OPTIONS)}")
        if options.get("group") is None:
            return Request._checked(hidden, weight, targets, memory_budget, options)
        options["group"] = vocab_parallel.name_of(options["group"], weight)
        with vocab_parallel.telling(options["group"], hidden):
            return Request._checked(hidden, weight, targets, memory_budget, options)

    @staticmethod
    def _checked(hidden: Tensor, weight: Tensor, targets: Tensor, memory_budget: int | None, options: dict[str, Any]) -> Request:
        derivatives.refuse({"hidden": hidden, "weight": weight, "bias": options.get("bias")})
        group = options.get("group")
        options["bias"] = gathered("bias", options.get("bias"), hidden, group)
        if memory_budget is not None:
            _check_number("memory_budget", memory_budget, "None and positive numbers of bytes")
        if options.get("support") is not None:
            options["support"] = _support_of(options["support"])
            if group is not None:
                raise ValueError("support: given with a group, accepted is one of the two")
        request = Request(hidden, gathered("weight", weight, hidden, group), targets, **options)
        _check_tensors(request)
        _check_numbers(request)
        hidden, weight = _autocast(request.hidden, request.weight)
        if hidden.dtype != weight.dtype and is_plain(weight):
            raise TypeError(
                f"weight: {weight.dtype} given, accepted is the dtype of hidden, {hidden.dtype}; or call under autocast"
            )
        budget = default_memory_budget(hidden.device) if memory_budget is None else int(memory_budget)
        return replace(request, hidden=hidden, weight=weight, memory_budget=budget)

    def telling(self) -> AbstractContextManager[None]:
        """Check within this what is checked of a request that stands. The other ranks of its group then hear of it where it raises
        on one."""
        return nullcontext() if self.group is None else vocab_parallel.telling(self.group, self.hidden.device)

    def active(self) -> Tensor:  # [...] bool
        """Return which rows count."""
        return engine.active_rows(self.targets, self.mask, self.ignore_index)

    def check_values(self, active: Tensor | None = None, **by_row: Tensor | None) -> None:  # [...] bool, [...] each
        """Raise ``ValueError`` naming the first number of the operands, or of what comes ``by_row``, that is not finite, and
        whatever makes of a support no set that its row's target is in. Only ``active`` rows are looked at, those that count if not
        given."""
        active = self.active() if active is None else active
        check_finite({"weight": self.weight, "bias": self.bias}, {"hidden": self.hidden, **by_row}, active)
        if self.support is not None:
            supports.check_sets(self.support, self.targets, active, len(self.weight))

    def settled(self) -> Tensor:  # [...] bool
        """Return which rows have a log-prob and an entropy of 0 whatever their logits: none, but for a support of the target
        alone."""
        if self.support is None:
            return torch.zeros_like(self.targets, dtype=torch.bool)
        return self.support.settled(self.targets.flatten()).view(self.targets.shape)

    @property
    def row_temperature(self) -> Tensor | None:  # [...]
        return self.temperature if isinstance(self.temperature, Tensor) else None

    @property
    def numbers(self) -> tuple[float, float, float | None]:
        """The readout's numbers as the ops take them: temperature, logit_scale, softcap."""
        temperature = 1.0 if isinstance(self.temperature, Tensor) else float(self.temperature)
        return temperature, float(self.logit_scale), None if self.softcap is None else float(self.softcap)

    def operands(self) -> Operands:
        """Return the operands as a backend takes them."""
        return ops.operands_of(self.hidden, self.weight, self.bias, self.targets, self.row_temperature, *self.numbers)

    def settings(self, objective: str = "") -> Settings:
        """Return what is neither tensor nor readout. Gradients are planned for those operands that require one."""
        grad_hidden, grad_weight, grad_bias = (derivatives.requires_grad(x) for x in (self.hidden, self.weight, self.bias))
        return Settings(
            self.ignore_index,
            self.return_entropy,
            self.backend,
            self.memory_budget,
            planned=(grad_hidden, grad_weight, grad_bias),
            objective=objective,
            group=self.group or "",
        )

    def plan(self, one_pass: bool = False, gpu: Gpu | None = None) -> Plan | SupportPlan:
        """Return the plan for the rows that are active, which are counted and checked for it. For a ``gpu`` it is as if they were
        there."""
        operands, active, settings = self.operands(), self.active(), self.settings()
        if self.group is None:
            engine.check_rows(operands, active, self.ignore_index)
        if self.support is not None:
            if gpu is not None:
                raise ValueError(f"gpu: {gpu.name} given, accepted with a support is None: nothing is predicted of it")
            supports.check(self.support, len(self.weight))
            ids = int(self.support.sizes[active.flatten()].sum())
            return supports.plan_for(operands, ids, int(active.sum()), settings)
        with self.telling():
            problem = engine.problem_of(operands, int(active.sum()), settings)
            if gpu is not None:
                problem = replace(problem, device=torch.device("cuda"), gpu=gpu, aligned=True)
            plan = make_plan(problem, self.backend, one_pass)
        if self.group is None:
            return plan
        shard = engine.shard_of(operands, active, settings, "explain", plan.tile_plan.chunk_rows, wait=True)
        engine.check_rows(operands, active, self.ignore_index, shard)
        tiles = plan.tile_plan._replace(chunk_rows=int(shard.chunk))
        return replace(plan, tile_plan=tiles, columns=shard.columns())

    def statistics(self) -> RowStatistics:
        """Stream the statistics of all rows, or take them on their supports."""
        tensors = self.hidden, self.weight, self.bias, self.targets, self.mask, self.row_temperature
        rest = *self.numbers, self.settings().encode()
        if self.support is None:
            logprobs, entropy, logsumexp, saved, *_ = ops.linear_statistics(*tensors, *rest)
        else:
            logprobs, entropy, logsumexp, saved, *_ = ops.support_statistics(*tensors, *self.support, *rest)
        return RowStatistics(logprobs, entropy if self.return_entropy else None, logsumexp, saved)


OPTIONS = tuple(field.name for field in fields(Request))[3:]

KINDS = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "jsd": 0.5, "gjsd": None}
REDUCTIONS = ("none", "mean", "sum")
OF_TEACHER = ("temperature", "logit_scale", "softcap", "bias")  # options that the teacher may have of its own


@dataclass(frozen=True)
class DivergenceRequest:
    """The arguments of :func:`bupo_kernels.linear_divergence`, as that describes them: a request for each of the two policies, and
    what compares them. :meth:`of` makes one, and checks it."""

    student: Request
    teacher: Request | Top
    beta: float
    active: Tensor  # [...] bool: which rows count and have a weight other than 0
    weights: Tensor | None  # [...], None for 1

    @staticmethod
    def of(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        *,
        kind: str = "forward_kl",
        beta: float = 0.5,
        teacher_top: tuple[Tensor, Tensor] | None = None,
        row_weights: Tensor | None = None,
        **options: Any,
    ) -> DivergenceRequest:
        """Return the request of a call, whose ``options`` are those of both sides. Raise as :meth:`Request.of` does."""
        name, options = vocab_parallel.group_of(options, student_weight)
        with vocab_parallel.telling(name, student_hidden):
            operands = student_hidden, student_weight, teacher_hidden, teacher_weight
            return DivergenceRequest._checked(*operands, kind, beta, teacher_top, row_weights, options)

    @staticmethod
    def _checked(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        kind: str,
        beta: float,
        teacher_top: tuple[Tensor, Tensor] | None,
        row_weights: Tensor | None,
        options: dict[str, Any],
    ) -> DivergenceRequest:
        if kind not in KINDS:
            raise ValueError(f"kind: {kind!r} given, accepted are {', '.join(map(repr, KINDS))}")
        _check_number("beta", beta, "numbers from 0 (forward KL) to 1 (reverse KL)", positive=False)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: {beta} given, accepted are numbers from 0 (forward KL) to 1 (reverse KL)")
        if kind != "gjsd" and beta != 0.5:
            raise ValueError(f"beta: {beta} given with kind={kind!r}, accepted with kind='gjsd'")
        of_teacher = {name: options.pop(f"teacher_{name}", None) for name in OF_TEACHER}
        of_teacher = {name: value for name, value in of_teacher.items() if value is not None}
        student = _request_of("student", student_hidden, student_weight, options)
        teacher: Request | Top
        if teacher_top is None:
            teacher = _teacher_of(student, teacher_hidden, teacher_weight, options, of_teacher)
        else:
            beside = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "support": student.support}
            beside |= {f"teacher_{name}": value for name, value in of_teacher.items()}
            if given := [name for name, value in beside.items() if value is not None]:
                raise TypeError(f"{given[0]}: given with teacher_top, accepted is one of the two")
            teacher = _top_of(teacher_top, student)
        active, weights = student.active(), None
        if row_weights is not None:
            weights = check_rows_of("row_weights", row_weights, student.targets, broadcast=True)
            active = active & (weights != 0)
        number = KINDS[kind]
        found = DivergenceRequest(student, teacher, float(beta if number is None else number), active, weights)
        return found if weights is None else replace(found, weights=weights.to(found.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results."""
        return torch.promote_types(self.student.hidden.dtype, torch.float32)

    def check_values(self) -> None:
        """Raise as :meth:`Request.check_values` does, for both sides."""
        _of_side("student", partial(self.student.check_values, self.active))
        if isinstance(self.teacher, Request):
            _of_side("teacher", partial(self.teacher.check_values, self.active))
            return
        # A log-prob may be −inf.
        above = self.teacher.logprobs.isnan() | (self.teacher.logprobs > 0)
        if (above := above & self.active.unsqueeze(-1)).any():
            given = self.teacher.logprobs[above][0].item()
            raise ValueError(f"teacher_top: a log-prob of {given} given, accepted are numbers of 0 and below")

    def _arguments(self) -> tuple[Any, ...]:
        """Return the arguments that the ops of dense divergences have in common."""
        student, teacher = self.student, self.teacher
        operands: tuple[Tensor | None, ...] = None, None, None
        top: tuple[Tensor | None, Tensor | None] = None, None
        numbers: tuple[float, float, float | None] = 1.0, 1.0, None
        row_temperature, encoded = None, student.settings().encode()
        if isinstance(teacher, Top):
            top = teacher
        else:
            operands, row_temperature = (teacher.hidden, teacher.weight, teacher.bias), teacher.row_temperature
            numbers, encoded = teacher.numbers, teacher.settings().encode()
        return (
            *(student.hidden, student.weight, student.bias, *operands),
            *(self.active, student.row_temperature, row_temperature, *top),
            *(*student.numbers, *numbers),
            *(student.settings().encode(), encoded, self.beta),
        )

    def values(self) -> tuple[Tensor, Tensor]:  # [...] each
        """Return the divergence and the student's entropy of each row, both differentiable; 0 on rows that are not active."""
        support = self.student.support
        if support is None or isinstance(self.teacher, Top):
            divergence, entropy = ops.linear_divergence(*self._arguments())
            return divergence, entropy
        z, u = (
            ops.support_logits(
                *(side.hidden, side.weight, side.bias, self.active, side.row_temperature),
                *support,
                *side.numbers,
                side.settings().encode(),
            )
            for side in (self.student, self.teacher)
        )
        found = supports.divergence(z, u, support, self.active.flatten(), self.beta)
        divergence, entropy = (x.to(self.dtype).view(self.active.shape) for x in found)
        return divergence, entropy

    def total(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [...] -> [], [...], [...]
        """Return the sum of divergences times ``weights``, and divergence and entropy of the rows, which have no gradient."""
        if self.student.support is None:
            total, divergence, entropy, *_ = ops.linear_divergence_sum(*self._arguments(), weights)
            return total, divergence, entropy
        divergence, entropy = self.values()
        return (weights * divergence).sum(), divergence.detach(), entropy.detach()

    def plan(self, one_pass: bool) -> DivergencePlan:
        """Return the plan for the rows that are active, which are counted and checked for it."""
        if self.student.support is not None:
            raise ValueError("support: given, accepted is None: what is planned is a divergence of whole policies")
        student, teacher = (
            divergences.Policy(side.operands(), side.settings()) if isinstance(side, Request) else side
            for side in (self.student, self.teacher)
        )
        assert isinstance(student, divergences.Policy)
        plan, shard = divergences.planned(student, teacher, int(self.active.sum()), self.beta, one_pass)
        divergences.check(student, teacher, self.active, shard)
        return plan


def _teacher_of(student: Request, hidden: Any, weight: Tensor | None, options: dict[str, Any], own: dict[str, Any]) -> Request:
    """Return the request of a teacher with the options ``own`` and, of those not given, the student's where they belong to it."""
    if not isinstance(hidden, Tensor):
        what = "None" if hidden is None else type(hidden).__name__
        raise TypeError(f"teacher_hidden: {what} given, accepted is a Tensor, or teacher_top instead")
    if hidden.shape[:-1] != student.hidden.shape[:-1] or hidden.device != student.hidden.device:
        raise ValueError(
            f"teacher_hidden: shape {tuple(hidden.shape)} on {hidden.device} given, accepted is [..., D] with "
            f"{tuple(student.hidden.shape[:-1])}, as in student_hidden, on {student.hidden.device}"
        )
    shared: dict[str, Any] = {"temperature": student.temperature}
    if weight is None:
        # Nothing flows to the student's head by way of its teacher.
        weight, bias = student.weight.detach(), student.bias
        shared |= {"logit_scale": student.logit_scale, "softcap": student.softcap}
        shared["bias"] = bias if bias is None else bias.detach()
    rest = {name: x for name, x in options.items() if name not in OF_TEACHER}
    teacher = _request_of("teacher", hidden, weight, rest | shared | own)
    if len(teacher.weight) != len(student.weight):
        raise ValueError(
            f"teacher_weight: {len(teacher.weight)} rows given, accepted are the {len(student.weight)} of student_weight; "
            "weight[:n] leaves padding out"
        )
    if (teacher.hidden.dtype == torch.float64) != (student.hidden.dtype == torch.float64):
        raise TypeError(
            f"teacher_hidden: {teacher.hidden.dtype} given with a student of {student.hidden.dtype}, accepted is float64 for both "
            "or for none"
        )
    return teacher


def _top_of(given: Any, student: Request) -> Top:
    """Return a caller's top of a teacher. Raise unless it is a pair of ids and their log-probs."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not all(isinstance(x, Tensor) for x in given):
        raise TypeError(f"teacher_top: {type(given).__name__} given, accepted is a pair (ids, logprobs) of Tensors")
    ids, logprobs = given
    check_constant("teacher_top", logprobs)
    check_plain("teacher_top", ids)
    leading, device = tuple(student.hidden.shape[:-1]), student.hidden.device
    accepted = f"({', '.join(map(str, leading))}, k) on {device} for both"
    for name, x in (("ids", ids), ("logprobs", logprobs)):
        if x.dim() != len(leading) + 1 or x.shape[:-1] != student.hidden.shape[:-1] or x.shape != ids.shape or x.device != device:
            raise ValueError(f"teacher_top: {name} of shape {tuple(x.shape)} on {x.device} given, accepted is {accepted}")
    if ids.dtype != torch.int64 or not logprobs.is_floating_point():
        raise TypeError(
            f"teacher_top: ids of {ids.dtype} and logprobs of {logprobs.dtype} given, accepted are torch.int64 and floating point"
        )
    return Top(ids, logprobs.detach())


def _request_of(side: str, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Request:
    """Return the request of one of the two policies. What its errors name is what the caller knows it as."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{side}_hidden: {type(hidden).__name__} given, accepted is a Tensor")

    def make() -> Request:
        targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        return Request.of(hidden, weight, targets, **options)

    return _of_side(side, make)


def _of_side(side: str, call: Callable[[], Any]) -> Any:
    """Return what ``call`` does, which asks something of one of two policies; its errors name the argument of that side."""
    try:
        return call()
    except (TypeError, ValueError, NotImplementedError) as error:
        name, colon, rest = str(error).partition(":")
        if name in ("hidden", "weight") or (side == "teacher" and name in OF_TEACHER):
            raise type(error)(f"{side}_{name}{colon}{rest}") from None
        raise


def gathered(name: str, parameter: Any, hidden: Tensor, group: str | None = None) -> Any:
    """Return a sharded parameter whole, with a gradient that is averaged over the ranks of its mesh, of as many dimensions as that
    has, and sharded again: what FSDP does to those it gathers itself. Under autocast it is in the dtype it will be used in. Over
    the ranks of a ``group`` it stays sharded."""
    if hasattr(parameter, "ds_id") and not parameter.numel():
        raise ValueError(
            f"{name}: partitioned by DeepSpeed ZeRO-3, accepted is a gathered one; call the head as a module, head(hidden, ...), "
            f"within the forward of the engine, or call this within deepspeed.zero.GatheredParameters([{name}])"
        )
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if partial := [placement for placement in parameter.placements if placement.is_partial()]:
        raise TypeError(f"{name}: a DTensor of {partial[0]} given, accepted are Shard and Replicate")
    if torch.is_autocast_enabled(hidden.device.type) and parameter.dtype != torch.float64:
        parameter = parameter.to(torch.get_autocast_dtype(hidden.device.type))
    if group is not None:
        return vocab_parallel.shard_of(name, parameter, group)
    from torch.distributed.tensor import Partial  # half a second, which only those who shard should wait

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight
    dtype = torch.get_autocast_dtype(hidden.device.type)
    hidden, weight = (x if x.dtype == torch.float64 or not is_plain(x) else x.to(dtype) for x in (hidden, weight))
    return hidden, weight


def check_rows_of(name: str, values: Any, targets: Tensor, broadcast: bool = False) -> Tensor:
    """Return ``values``, a constant, in the shape of ``targets``; to ``broadcast``, it may be one per sequence, [..., 1]."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: {type(values).__name__} given, accepted is a Tensor")
    check_constant(name, values)
    accepted = f"floating point of {tuple(targets.shape)} on {targets.device}"
    fits = values.shape == targets.shape or (broadcast and values.shape == (*targets.shape[:-1], 1))
    if not fits or not values.is_floating_point() or values.device != targets.device:
        raise ValueError(f"{name}: {values.dtype} of shape {tuple(values.shape)} on {values.device} given, accepted is {accepted}")
    return values.detach().expand(targets.shape)


def check_constant(name: str, value: Any) -> None:
    """Raise ``ValueError`` for an argument that requires a gradient where none flows to it."""
    if isinstance(value, Tensor):
        check_plain(name, value)
        derivatives.refuse({name: value})
        if derivatives.requires_grad(value):
            raise ValueError(f"{name}: requires a gradient, accepted is a tensor that does not; detach it")


def check_finite(whole: dict[str, Tensor | None], by_row: dict[str, Tensor | None], active: Tensor) -> None:
    """Raise ``ValueError`` naming the first number that is not finite; in ``by_row``, [...] or [..., D], where the row is
    active."""
    for name, x in (whole | by_row).items():
        if x is None:
            continue
        bad = ~x.isfinite()
        if name in by_row:
            bad &= active if x.dim() == active.dim() else active.unsqueeze(-1)
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            value = x[index].item()
            raise ValueError(f"{name}: {value} at index {index} given, accepted are finite numbers")


def _support_of(given: Any) -> Support:
    """Return a caller's support. Raise ``TypeError`` unless it is a pair of tensors of ids."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        what = f"{type(given).__name__} of {len(given)}" if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(f"support: {what} given, accepted is a pair (ids, offsets) of Tensors")
    for name, x in zip(Support._fields, given, strict=True):
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"support: {name} of {kind} given, accepted is a Tensor of torch.int64")
        check_plain("support", x)
    return Support(*given)


def _check_support(support: Support, request: Request) -> None:
    rows = math.prod(request.targets.shape)
    for name, x in support._asdict().items():
        if x.device != request.hidden.device:
            raise ValueError(f"support: {name} on {x.device} given, accepted is the device of hidden, {request.hidden.device}")
    if support.ids.dim() != 1:
        raise ValueError(f"support: ids of shape {tuple(support.ids.shape)} given, accepted is [M], those of all rows")
    if support.offsets.shape != (rows + 1,):
        accepted = f"({rows + 1},), one more than there are rows in targets"
        raise ValueError(f"support: offsets of shape {tuple(support.offsets.shape)} given, accepted is {accepted}")
    if not is_plain(request.weight):
        raise TypeError(f"weight: {called(request.weight)} given, accepted with a support is {PLAIN}")


def check_plain(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` where the numbers of ``x`` neither lie in memory nor, for a weight, can be dequantised a slice of rows at
    a time."""
    if isinstance(x, (UninitializedParameter, UninitializedBuffer)):
        raise TypeError(f"{name}: {type(x).__name__} given, accepted is one with a shape; run its module once, or materialize() it")
    if x.device.type == "meta":
        raise ValueError(f"{name}: on meta, accepted are devices with memory; for shapes alone use torch's FakeTensorMode")
    if is_plain(x):
        return
    if name != "weight":
        raise TypeError(f"{name}: {called(x)} given, accepted is {PLAIN}")
    if torch.compiler.is_compiling():
        raise TypeError(f"weight: {called(x)} given, accepted within torch.compile is {PLAIN}")
    if derivatives.requires_grad(x):
        raise TypeError(f"weight: {called(x)} that requires a gradient given, accepted is {PLAIN}, or {SLICED}")
    rows_of(x, slice(0, 1))
    ops.accept(type(x))


def _check_number(name: str, value: Any, accepted: str, positive: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {type(value).__name__} given, accepted are {accepted}")
    if not (0 if positive else -math.inf) < value < math.inf:
        raise ValueError(f"{name}: {value} given, accepted are {accepted}")


def _check_numbers(request: Request) -> None:
    if not isinstance(request.temperature, Tensor):
        _check_number("temperature", request.temperature, "positive numbers, or a tensor with one per row")
    if request.softcap is not None:
        _check_number("softcap", request.softcap, "None and positive numbers")
    _check_number("logit_scale", request.logit_scale, "finite numbers", positive=False)


def _check_tensors(request: Request) -> None:
    hidden, weight, bias, temperature = request.hidden, request.weight, request.bias, request.temperature
    for name in ("hidden", "weight", "targets", "bias", "mask"):
        tensor = getattr(request, name)
        if tensor is None and name in ("bias", "mask"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__} given, accepted is a Tensor")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name}: a DTensor given, accepted is a plain Tensor (weight and bias may be DTensors)")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}, accepted is the device of hidden, {hidden.device}")
        check_plain(name, tensor)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES and is_plain(tensor):
            raise TypeError(f"{name}: {called(tensor)} given, accepted are {', '.join(map(str, DTYPES))}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)} given, accepted is [..., D] with at least one leading dimension")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or (weight.shape[0] == 0 and request.group is None):
        accepted = f"[V, D] with D = {hidden.shape[-1]}, as in hidden, and at least one row"
        raise ValueError(f"weight: shape {tuple(weight.shape)} given, accepted is {accepted}")
    if request.targets.dtype != torch.int64:
        raise TypeError(f"targets: {request.targets.dtype} given, accepted is torch.int64")
    leading, mask = hidden.shape[:-1], request.mask
    if request.targets.shape != leading:
        raise ValueError(f"targets: shape {tuple(request.targets.shape)} given, accepted is {tuple(leading)}, as in hidden")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != leading):
        raise ValueError(f"mask: {mask.dtype} of shape {tuple(mask.shape)} given, accepted is torch.bool of {tuple(leading)}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != weight.shape[:1]):
        raise ValueError(
            f"bias: {bias.dtype} of shape {tuple(bias.shape)} given, accepted is floating point of ({weight.shape[0]},)"
        )
    if request.support is not None:
        _check_support(request.support, request)
    check_constant("temperature", temperature)
    if isinstance(temperature, Tensor) and not (
        temperature.shape == leading and temperature.is_floating_point() and temperature.device == hidden.device
    ):
        raise ValueError(
            f"temperature: {temperature.dtype} of shape {tuple(temperature.shape)} on {temperature.device} given, accepted "
            f"is a number, or floating point of {tuple(leading)} on {hidden.device}"
        )
