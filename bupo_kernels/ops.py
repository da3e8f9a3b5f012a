"""The ops as torch sees them: registered, with shapes for tracing and a gradient, opaque to compilers.

One op and its backward and one for the one-pass loss serve every backend, for log-probs and again for divergences; supports have
the first two. A traced graph holds
one node whatever the number of rows is. Tensors and the readout's numbers are arguments of their own, for torch to differentiate,
batch and trace; all else is one string of :class:`engine.Settings`. (Lists of tensors, which would be shorter, torch neither
batches nor differentiates.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from bupo_kernels import derivatives, engine
from bupo_kernels import divergence as divergences
from bupo_kernels import support as supports
from bupo_kernels.backends.base import Cache, Operands, Problem, Readout
from bupo_kernels.backends.divergences import Top
from bupo_kernels.dispatch import choose
from bupo_kernels.divergence import Policy
from bupo_kernels.engine import Flags, PolicyTokens, Settings
from bupo_kernels.support import Support

Context = Any  # torch.autograd.function.FunctionCtx, which does not declare what it is given


def operands_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Operands:
    """Return the operands of an op's arguments."""
    readout = Readout(temperature if row_temperature is None else row_temperature, logit_scale, softcap)
    return Operands(hidden, weight, None if bias is None else bias.contiguous(), targets, readout)


def accept(kind: type) -> None:
    """Have the ops take a weight of the class ``kind`` also where that answers for each op itself, and would refuse these."""
    for op in (
        *(linear_statistics, linear_statistics_backward, linear_policy_loss),
        *(linear_divergence, linear_divergence_backward, linear_divergence_sum),
    ):
        _run_as_it_is(op, kind)


@functools.cache
def _run_as_it_is(op: torch.library.CustomOpDef, kind: type) -> None:
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # type: ignore[attr-defined]
        run = torch.compiler.disable(op._init_fn)
        op.register_torch_dispatch(kind, lambda _, func, types, arguments, named: run(*arguments, **(named or {})))


@torch.library.custom_op("bupo_kernels::linear_statistics", mutates_args=())
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (read by torch's schema inference)
    targets: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    row_temperature: Optional[Tensor],  # noqa: UP045
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, entropy ([0] without) and logsumexp in the shape of ``targets``; then, for the backward, the statistics that
    it needs [3 or 4, N], and the two parts of the :class:`Cache`."""
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    found = engine.statistics(operands, mask, Settings.decode(settings))

    return *_in_shape(found, targets), found.saved, *found.cache


def _in_shape(found: engine.Forward | supports.Forward, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob, entropy ([0] without) and logsumexp in the shape of ``targets``."""

    def shaped(statistic: Tensor) -> Tensor:  # not a view: FSDP hooks module outputs, and an in-place change would lose the hook
        return statistic.view(targets.shape).clone()

    entropy = found.saved.new_empty(0) if found.entropy is None else shaped(found.entropy)
    return shaped(found.logprob), entropy, shaped(found.logsumexp)


@linear_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, _mask: Any, *rest: Any) -> tuple[Tensor, ...]:
    *readout, encoded = rest
    operands, settings = operands_of(hidden, weight, bias, targets, *readout), Settings.decode(encoded)
    problem = engine.problem_of(operands, 0, settings)
    _, backend, strategy, _ = choose(problem, settings.backend)
    cache = backend.empty_cache(problem, backend.cached_rows(problem, strategy))
    return *_traced_statistics(problem, targets, settings), *cache


def _traced_statistics(problem: Problem, targets: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, entropy, logsumexp and what is saved of them, as far as tracing goes."""

    def empty(*shape: int) -> Tensor:
        return targets.new_empty(shape, dtype=problem.statistics_dtype)

    entropy = empty(*targets.shape) if settings.with_entropy else empty(0)
    saved = empty(4 if settings.with_entropy else 3, problem.rows)
    return empty(*targets.shape), entropy, empty(*targets.shape), saved


@torch.library.custom_op("bupo_kernels::linear_statistics_backward", mutates_args=())
def linear_statistics_backward(
    g_logprob: Optional[Tensor],  # noqa: UP045
    g_entropy: Optional[Tensor],  # noqa: UP045
    g_logsumexp: Optional[Tensor],  # noqa: UP045
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    targets: Tensor,
    row_temperature: Optional[Tensor],  # noqa: UP045
    saved: Tensor,
    cache_values: Tensor,
    cache_offsets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW and db, each [0] where it is not needed."""
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    upstream = g_logprob, g_entropy, g_logsumexp
    return engine.gradients(operands, upstream, saved, Cache(cache_values, cache_offsets), Settings.decode(settings))


@linear_statistics_backward.register_fake
def _(_lp: Any, _h: Any, _lse: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _traced_gradients(hidden, weight, bias, Settings.decode(rest[-1]).needed)


def _traced_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Flags) -> tuple[Tensor, ...]:
    """Return what ``GradientSums.result`` gives, as far as tracing goes."""
    return tuple(
        hidden.new_empty(0) if x is None or not need else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x, need in zip((hidden, weight, bias), needed, strict=True)
    )


def _gradients_of_inputs(ctx: Context, found: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients ``found`` of the first inputs of an op, where they are needed, and None for each of the others."""
    wanted = ctx.needs_input_grad
    return *(g if need else None for g, need in zip(found, wanted, strict=False)), *(None for _ in wanted[len(found) :])


def _save_for_backward(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, _, row_temperature, *support, temperature, logit_scale, softcap, ctx.settings = inputs
    ctx.numbers = temperature, logit_scale, softcap
    _, _, _, *left = output
    ctx.save_for_backward(hidden, weight, bias, targets, row_temperature, *support, *left)
    ctx.mark_non_differentiable(*left)
    ctx.set_materialize_grads(False)


def _backward(ctx: Context, *upstream: Tensor | None, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    settings = Settings.decode(ctx.settings)
    g_logprob, g_entropy, g_logsumexp = upstream[:3]
    g_entropy = g_entropy if settings.with_entropy else None
    if g_logprob is None and g_entropy is None and g_logsumexp is None:
        return _gradients_of_inputs(ctx, ())
    settings = settings._replace(needed=ctx.needs_input_grad[:3])
    found = backward(g_logprob, g_entropy, g_logsumexp, *ctx.saved_tensors, *ctx.numbers, settings.encode())
    return _gradients_of_inputs(ctx, found)


def _backward_of_backward(ctx: Context, *_: Tensor | None) -> None:
    raise derivatives.of_a_gradient("linear_logprobs, linear_cross_entropy or a loss over sequences")


linear_statistics.register_autograd(partial(_backward, backward=linear_statistics_backward), setup_context=_save_for_backward)
linear_statistics_backward.register_autograd(_backward_of_backward)


@torch.library.custom_op("bupo_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    targets: Tensor,
    active: Tensor,
    row_temperature: Optional[Tensor],  # noqa: UP045
    advantages: Tensor,
    old_logprobs: Optional[Tensor],  # noqa: UP045
    reference_logprobs: Optional[Tensor],  # noqa: UP045
    sampler_logprobs: Optional[Tensor],  # noqa: UP045
    weights: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss; logprob and entropy of the rows that matter and 0 elsewhere, in the shape of ``targets``; and the gradients
    dH, dW, db of the loss itself, [0] where they are not planned."""
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    tokens = PolicyTokens(advantages, old_logprobs, reference_logprobs, sampler_logprobs, weights)
    loss, logprob, entropy, gradients = engine.policy_loss(operands, active, tokens, Settings.decode(settings))
    return loss, logprob.view(targets.shape), entropy.view(targets.shape), *gradients


@linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    of_rows = (hidden.new_empty(targets.shape, dtype=dtype) for _ in range(2))
    gradients = _traced_gradients(hidden, weight, bias, Settings.decode(rest[-1]).planned)
    return hidden.new_empty((), dtype=dtype), *of_rows, *gradients


def _save_gradients(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Context, g_loss: Tensor | None, *_: Tensor | None, op: str) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph: what was saved, made in the forward, is in no graph
        raise derivatives.of_a_gradient(op)
    if g_loss is None:
        return _gradients_of_inputs(ctx, ())
    # A copy the size of W is worth a look at the number, where there is one and that costs nothing (not on a device, not traced).
    here = not torch.compiler.is_compiling() and type(g_loss) is Tensor and g_loss.device.type == "cpu"
    is_one = here and not derivatives.is_batched(g_loss) and g_loss.item() == 1
    needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    return _gradients_of_inputs(ctx, tuple((g if is_one else (g * g_loss).to(g.dtype)) if need else None for g, need in needed))


linear_policy_loss.register_autograd(partial(_scale_gradients, op="linear_policy_loss"), setup_context=_save_gradients)


@torch.library.custom_op("bupo_kernels::support_statistics", mutates_args=())
def support_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    targets: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    row_temperature: Optional[Tensor],  # noqa: UP045
    ids: Tensor,
    offsets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what :func:`linear_statistics` does, on the support of each row; but for the cache, of which the logits [M] take the
    place."""
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    found = supports.statistics(operands, Support(ids, offsets), mask, Settings.decode(settings))
    return *_in_shape(found, targets), found.saved, found.logits


@support_statistics.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    _mask: Any,
    row_temperature: Tensor | None,
    ids: Tensor,
    _offsets: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, encoded = rest
    operands, settings = operands_of(hidden, weight, bias, targets, row_temperature, *numbers), Settings.decode(encoded)
    problem = engine.problem_of(operands, 0, settings)
    logits = ids.new_empty(ids.shape if problem.needs_grad else (0,), dtype=problem.statistics_dtype)
    return *_traced_statistics(problem, targets, settings), logits


@torch.library.custom_op("bupo_kernels::support_statistics_backward", mutates_args=())
def support_statistics_backward(
    g_logprob: Optional[Tensor],  # noqa: UP045
    g_entropy: Optional[Tensor],  # noqa: UP045
    g_logsumexp: Optional[Tensor],  # noqa: UP045
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    targets: Tensor,
    row_temperature: Optional[Tensor],  # noqa: UP045
    ids: Tensor,
    offsets: Tensor,
    saved: Tensor,
    logits: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW and db, each [0] where it is not needed."""
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    upstream = g_logprob, g_entropy, g_logsumexp
    return supports.gradients(operands, Support(ids, offsets), upstream, saved, logits, Settings.decode(settings))


@support_statistics_backward.register_fake
def _(_lp: Any, _h: Any, _lse: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _traced_gradients(hidden, weight, bias, Settings.decode(rest[-1]).needed)


support_statistics.register_autograd(partial(_backward, backward=support_statistics_backward), setup_context=_save_for_backward)
support_statistics_backward.register_autograd(_backward_of_backward)


@torch.library.custom_op("bupo_kernels::support_logits", mutates_args=())
def support_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    active: Tensor,
    row_temperature: Optional[Tensor],  # noqa: UP045
    ids: Tensor,
    offsets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    settings: str,
) -> Tensor:
    """Return the logits of the entries [M], −inf on rows that are not active."""
    targets = torch.zeros(active.shape, dtype=torch.int64, device=active.device)
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    return supports.logits(operands, Support(ids, offsets), active, Settings.decode(settings))


@support_logits.register_fake
def _(hidden: Tensor, _w: Any, _b: Any, _a: Any, _t: Any, ids: Tensor, *_: Any) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


@torch.library.custom_op("bupo_kernels::support_logits_backward", mutates_args=())
def support_logits_backward(
    upstream: Tensor,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    active: Tensor,
    row_temperature: Optional[Tensor],  # noqa: UP045
    ids: Tensor,
    offsets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW and db, each [0] where it is not needed."""
    targets = torch.zeros(active.shape, dtype=torch.int64, device=active.device)
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    return supports.gradients_of_logits(operands, Support(ids, offsets), upstream, logits, Settings.decode(settings))


@support_logits_backward.register_fake
def _(_g: Any, _z: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _traced_gradients(hidden, weight, bias, Settings.decode(rest[-1]).needed)


def _backward_of_divergence_backward(ctx: Context, *_: Tensor | None) -> None:
    raise derivatives.of_a_gradient("linear_divergence")


def _save_logits(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:7])
    *ctx.numbers, ctx.settings = inputs[7:]


def _backward_of_logits(ctx: Context, upstream: Tensor) -> tuple[Tensor | None, ...]:
    settings = Settings.decode(ctx.settings)._replace(needed=ctx.needs_input_grad[:3])
    return _gradients_of_inputs(ctx, support_logits_backward(upstream, *ctx.saved_tensors, *ctx.numbers, settings.encode()))


support_logits.register_autograd(_backward_of_logits, setup_context=_save_logits)
support_logits_backward.register_autograd(_backward_of_divergence_backward)


# What the ops of a divergence take of both sides: what they differentiate, what else there is for each row, and numbers.
_SIDES = "student", "teacher"
_OPERANDS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias"  # None for a teacher that is known by its top
)
_ROWS = "Tensor active, Tensor? student_row_temperature, Tensor? teacher_row_temperature, Tensor? top_ids, Tensor? top_logprobs"
_NUMBERS = ", ".join(
    f"float {side}_temperature, float {side}_logit_scale, float? {side}_softcap" for side in ("student", "teacher")
)
_CHOICES = "str student_settings, str teacher_settings, float beta"


class BothSides(NamedTuple):
    """The arguments of an op of a divergence, those of :data:`_OPERANDS` to :data:`_CHOICES`, as its room takes them."""

    student: Policy
    teacher: Policy | Top
    active: Tensor
    beta: float

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> BothSides:
        operands, (active, *temperatures, top_ids, top_logprobs), numbers, (*settings, beta) = _parted(arguments)
        targets = torch.zeros(active.shape, dtype=torch.int64, device=active.device)

        def policy(i: int) -> Policy:
            hidden, weight, bias = operands[3 * i : 3 * i + 3]
            of_side = operands_of(hidden, weight, bias, targets, temperatures[i], *numbers[3 * i : 3 * i + 3])
            return Policy(of_side, Settings.decode(settings[i]))

        return BothSides(policy(0), policy(1) if top_ids is None else Top(top_ids, top_logprobs), active, beta)


def _parted(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Return the arguments in the groups :data:`_OPERANDS`, :data:`_ROWS`, :data:`_NUMBERS` and :data:`_CHOICES`."""
    return arguments[:6], arguments[6:11], arguments[11:17], arguments[17:]


def _traced_divergence(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return divergence and entropy of rows, as far as tracing goes."""
    (hidden, *_), (active, *_), *_ = _parted(arguments)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return active.new_empty(active.shape, dtype=dtype), active.new_empty(active.shape, dtype=dtype)


def _traced_gradients_of_both(arguments: tuple[Any, ...], which: str) -> tuple[Tensor, ...]:
    """Return the gradients of both sides, as far as tracing goes; ``which`` are there is a field of the settings."""
    operands, _, _, (*settings, _) = _parted(arguments)
    found: list[Tensor] = []
    for i, encoded in enumerate(settings):
        hidden, weight, bias = operands[3 * i : 3 * i + 3]
        needed: Flags = getattr(Settings.decode(encoded), which)
        found += _traced_gradients(operands[0] if hidden is None else hidden, weight, bias, needed)
    return tuple(found)


def _linear_divergence(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the divergence and the student's entropy of each row in the shape of ``active``, 0 on rows that are not."""
    both = BothSides.of(arguments)
    divergence, entropy = divergences.values(*both)
    return divergence.view(both.active.shape), entropy.view(both.active.shape)


linear_divergence = torch.library.custom_op(
    "bupo_kernels::linear_divergence",
    _linear_divergence,
    mutates_args=(),
    schema=f"({_OPERANDS}, {_ROWS}, {_NUMBERS}, {_CHOICES}) -> (Tensor, Tensor)",
)
linear_divergence.register_fake(lambda *arguments: _traced_divergence(arguments))


def _linear_divergence_backward(
    g_divergence: Tensor | None, g_entropy: Tensor | None, divergence: Tensor, entropy: Tensor, *arguments: Any
) -> divergences.Six:
    """Return dH, dW and db of the student and of the teacher, each [0] where it is not needed."""
    return divergences.gradients(*BothSides.of(arguments), (g_divergence, g_entropy), (divergence, entropy))


_SIX = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
linear_divergence_backward = torch.library.custom_op(
    "bupo_kernels::linear_divergence_backward",
    _linear_divergence_backward,
    mutates_args=(),
    schema="(Tensor? g_divergence, Tensor? g_entropy, Tensor divergence, Tensor entropy, "
    f"{_OPERANDS}, {_ROWS}, {_NUMBERS}, {_CHOICES}) -> ({_SIX})",
)
linear_divergence_backward.register_fake(lambda _gd, _gh, _d, _h, *arguments: _traced_gradients_of_both(arguments, "needed"))


def _save_divergence(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, of_rows, *ctx.rest = _parted(inputs)
    ctx.save_for_backward(*output, *operands, *of_rows)
    ctx.set_materialize_grads(False)


def _backward_of_divergence(ctx: Context, g_divergence: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    numbers, (*settings, beta) = ctx.rest
    student, teacher = map(Settings.decode, settings)
    g_entropy = g_entropy if student.with_entropy else None
    if g_divergence is None and g_entropy is None:
        return _gradients_of_inputs(ctx, ())
    wanted = ctx.needs_input_grad
    encoded = student._replace(needed=wanted[:3]).encode(), teacher._replace(needed=wanted[3:6]).encode()
    found = linear_divergence_backward(g_divergence, g_entropy, *ctx.saved_tensors, *numbers, *encoded, beta)
    return _gradients_of_inputs(ctx, found)


linear_divergence.register_autograd(_backward_of_divergence, setup_context=_save_divergence)
linear_divergence_backward.register_autograd(_backward_of_divergence_backward)


def _linear_divergence_sum(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the sum of the divergences times the weights, the last argument; divergence and student's entropy of the rows of
    weight other than 0, in the shape of ``active``; and the gradients dH, dW, db of both sides of the sum itself, [0] where they
    are not planned."""
    *of_both, weights = arguments
    both = BothSides.of(tuple(of_both))
    total, found = divergences.weighted_sum(*both, weights)
    return total, found.divergence.view(both.active.shape), found.entropy.view(both.active.shape), *found.gradients


linear_divergence_sum = torch.library.custom_op(
    "bupo_kernels::linear_divergence_sum",
    _linear_divergence_sum,
    mutates_args=(),
    schema=f"({_OPERANDS}, {_ROWS}, {_NUMBERS}, {_CHOICES}, Tensor weights) -> (Tensor, Tensor, Tensor, {_SIX})",
)


@linear_divergence_sum.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    arguments = arguments[:-1]
    divergence, entropy = _traced_divergence(arguments)
    total = divergence.new_empty(())
    return total, divergence, entropy, *_traced_gradients_of_both(arguments, "planned")


linear_divergence_sum.register_autograd(partial(_scale_gradients, op="linear_divergence"), setup_context=_save_gradients)
