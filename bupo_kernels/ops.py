"""The ops as torch sees them: registered, with shapes for tracing and a gradient, opaque to compilers.

One op and its backward for every backend. Which backend runs is decided inside, from sizes that are then plain numbers, so that a
traced graph holds one node whatever N is. In the forward nothing waits for the device; the backward waits for it to say how many
rows have a gradient, since the products that follow are of that many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor

from bupo_kernels import derivatives
from bupo_kernels.backends import algebra
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.gradients import GradientSums
from bupo_kernels.backends.problem import Operands, Problem, Readout
from bupo_kernels.backends.quantised import is_plain
from bupo_kernels.dispatch import choose, make_plan


def counting_rows(targets: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:  # [...] -> [...] bool
    counts = targets != ignore_index
    return counts if mask is None else counts & mask


def rows_to_plan_for(counts: Tensor) -> int:
    """How many count; off the CPU all of them, since asking would wait for the device."""
    return int(counts.sum()) if counts.device.type == "cpu" else counts.numel()


def problem_of(hidden, weight, active_rows, softcap, grads, memory_budget) -> Problem:
    return Problem(
        rows=math.prod(hidden.shape[:-1]),  # numel() would make a number of a traced size
        active_rows=active_rows,
        vocab=weight.shape[0],
        width=weight.shape[1],
        dtype=hidden.dtype,
        device=hidden.device,
        grad_hidden=grads[0],
        grad_weight=grads[1],
        grad_bias=grads[2],
        softcap=softcap is not None,
        memory_budget=memory_budget,
        quantised=not is_plain(weight),
    )


def check_rows(targets: Tensor, counts: Tensor, vocab: int, ignore_index: int, temperature: Tensor | None) -> None:
    """Values of tensors can only be checked where they are at hand. Off the CPU a violation is a device-side assert."""
    outside = counts & ((targets < 0) | (targets >= vocab))
    impossible = None if temperature is None else counts & ~(temperature.isfinite() & (temperature > 0))
    accepted = f"accepted are ids in [0, {vocab}) and ignore_index ({ignore_index})"
    if targets.device.type != "cpu":
        torch._assert_async(~outside.any(), f"targets: {accepted}")
        if impossible is not None:
            torch._assert_async(~impossible.any(), "temperature: accepted are positive numbers on rows that count")
        return
    if outside.any():
        raise ValueError(f"targets: {targets[outside][0].item()} given, {accepted}")
    if impossible is not None and impossible.any():
        given = temperature[impossible][0].item()
        raise ValueError(f"temperature: {given} given, accepted are positive numbers on rows that count")


@functools.cache
def run_as_it_is(op: torch.library.CustomOpDef, kind: type) -> None:
    """Gives ``op`` its operands also where one is of a class that answers for each op itself, and would refuse this one."""
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        run = torch.compiler.disable(op._init_fn)
        op.register_torch_dispatch(kind, lambda _, func, types, arguments, named: run(*arguments, **(named or {})))


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Kernels are launched on the current device; and autocast, which has chosen the operands' dtype, would round products."""
    with torch.autocast(device.type, enabled=False), torch.cuda.device(device if device.type == "cuda" else -1):
        yield


def operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap) -> Operands:
    readout = Readout(temperature if row_temperature is None else row_temperature, logit_scale, softcap)
    return Operands(hidden, weight, None if bias is None else bias.contiguous(), targets, readout)


def of_product(
    coefficients: Coefficients, operands: Operands, rows: Tensor, dtype: torch.dtype
) -> tuple[Coefficients, Tensor | None]:
    """From the gradient of the logits to that of the product, to be held in ``dtype``; and what undoes its scale, or None."""
    readout = operands.readout
    if not readout.is_identity:
        temperature = readout.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.flatten()[rows].to(coefficients.m.dtype)
        coefficients = coefficients.scaled(readout.logit_scale / temperature)
    if dtype != torch.float16 or len(rows) == 0:
        return coefficients, None
    # fp16 reaches from 6e-8 to 6e4: a power of two puts the largest dz there is at 2^12 or below, and the sums undo it.
    # Rows that are not finite stay so at any scale, and leave it to the others.
    largest = coefficients.bound().nan_to_num(0, posinf=0).amax()
    scale = torch.exp2(12 - largest.log2().ceil().clamp(-100, 100))
    return coefficients.scaled(scale), 1 / scale


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
    ignore_index: int,
    with_entropy: bool,
    backend: str,
    memory_budget: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy or [0], logsumexp) of the shape of ``targets``; then, for the backward, m and log s [N], the cached E and
    its exponents (both [0] without)."""
    counts = counting_rows(targets, mask, ignore_index)
    check_rows(targets, counts, weight.shape[0], ignore_index, row_temperature)
    grads = grad_hidden, grad_weight, grad_bias
    plan = make_plan(problem_of(hidden, weight, rows_to_plan_for(counts), softcap, grads, memory_budget), backend)
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    with on(hidden.device):
        statistics, cache = plan.module.statistics(operands, counts.flatten(), plan.problem, plan.schedule, with_entropy)
    results = algebra.finish(statistics, weight.shape[0], with_entropy)
    nothing = statistics.m.new_empty(0)
    e, exponents = cache if cache is not None else (nothing.to(torch.bfloat16), nothing.to(torch.int32))

    def shaped(statistic: Tensor) -> Tensor:  # not a view: FSDP hooks module outputs, and an in-place change would lose the hook
        return statistic.view(targets.shape).clone()

    return (
        shaped(results.logprob),
        shaped(results.entropy) if with_entropy else nothing,
        shaped(results.logsumexp),
        statistics.m.clone(),  # a row of one tensor with the others, which need not live on
        results.log_s,
        e,
        exponents,
    )


@linear_statistics.register_fake
def _(hidden, weight, bias, targets, mask, row_temperature, temperature, logit_scale, softcap, ignore_index, with_entropy, backend, memory_budget, *grads):  # fmt: skip # noqa: E501
    problem = problem_of(hidden, weight, 0, softcap, grads, memory_budget)
    _, module, strategy, _ = choose(problem, backend)
    dtype, rows = problem.statistics_dtype, problem.rows
    cached = module.cached_rows(problem, strategy)
    widths = module.cache_widths(problem) if cached != 0 else None

    def of(*shape, dtype=dtype):
        return hidden.new_empty(shape, dtype=dtype)

    return (
        of(*targets.shape),
        of(*targets.shape) if with_entropy else of(0),
        of(*targets.shape),
        of(rows),
        of(rows),
        of(cached, widths[0], dtype=torch.bfloat16) if widths else of(0, dtype=torch.bfloat16),
        of(cached, widths[1], dtype=torch.int32) if widths else of(0, dtype=torch.int32),
    )


def traced_gradients(hidden, weight, bias, need) -> tuple[Tensor, ...]:
    """What ``GradientSums.result`` gives, as far as tracing goes."""
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias), need, strict=True)
    )


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
    m: Tensor,
    log_s: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    e: Tensor,
    exponents: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    backend: str,
    memory_budget: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, db), each [0] where it is not needed. ``grad_…`` are what the forward planned for, ``need_…`` what is wanted now."""
    counts = m != -math.inf  # a NaN counts
    grads = grad_hidden, grad_weight, grad_bias
    plan = make_plan(problem_of(hidden, weight, rows_to_plan_for(counts), softcap, grads, memory_budget), backend)
    dtype = plan.problem.statistics_dtype
    upstream = [g if g is None else g.flatten().to(dtype) for g in (g_logprob, g_entropy, g_logsumexp)]

    # A row all of whose upstream gradients are exactly zero adds exactly nothing: it leaves before any product. But where a loss
    # weighs a row of NaN with 0 it is NaN, and so are its gradients.
    used = ~log_s.isfinite()
    for g in upstream:
        if g is not None:
            used |= g != 0
    rows = (used & counts).nonzero().squeeze(1)
    upstream = [g if g is None else g[rows] for g in upstream]
    of_rows = [x.flatten()[rows] for x in (m, log_s, logprob)]
    entropy = entropy.flatten()[rows] if entropy.numel() else None
    coefficients = algebra.coefficients(*upstream, *of_rows, entropy, targets.flatten()[rows])
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    coefficients, unscale = of_product(coefficients, operands, rows, plan.module.gradient_dtype(plan.problem))
    # E lies in the order in which rows counted.
    cache = (e, exponents, (counts.cumsum(0) - 1)[rows]) if e.numel() else None
    with on(hidden.device):
        sums = GradientSums(hidden, weight, bias, need=(need_hidden, need_weight, need_bias), dtype=dtype, parts=False)
        tiles = plan.module.gradient_tiles(operands, rows, coefficients, plan.problem, plan.schedule, cache)
        sums.add(tiles, rows, unscale=unscale, step=plan.schedule.tile.rows)
    return sums.result()


@linear_statistics_backward.register_fake
def _(g_logprob, g_entropy, g_logsumexp, hidden, weight, bias, *rest):
    return traced_gradients(hidden, weight, bias, rest[-3:])


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, _, row_temperature, temperature, logit_scale, softcap, _, _, *rest = inputs
    logprob, entropy, _, *kept = output
    ctx.save_for_backward(hidden, weight, bias, targets, row_temperature, *kept, logprob, entropy)
    ctx.numbers = (temperature, logit_scale, softcap, *rest)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_logprob, g_entropy, g_logsumexp, *_):
    hidden, weight, bias, targets, row_temperature, m, log_s, e, exponents, logprob, entropy = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    upstream = [g_logprob, g_entropy if entropy.numel() else None, g_logsumexp]
    if all(g is None for g in upstream):
        return (None,) * 16
    found = linear_statistics_backward(
        *upstream, hidden, weight, bias, targets, row_temperature, m, log_s, logprob, entropy, e, exponents, *ctx.numbers, *need
    )
    return *(g if needed else None for g, needed in zip(found, need, strict=True)), *(None,) * 13


def _backward_of_backward(ctx, *_):
    raise derivatives.of_a_gradient("linear_logprobs, linear_cross_entropy or a loss over sequences")


linear_statistics.register_autograd(_backward, setup_context=_setup_context)
linear_statistics_backward.register_autograd(_backward_of_backward)
