"""The one-pass policy loss as torch sees it: loss and gradients of a chunk of rows while its logits are at hand.

For each chunk: one product, statistics, the objective's terms and their derivative, then the two gradient products from the logits
(or E) that the chunk kept. 6·N·V·D FLOP instead of 8, and nothing is left for the backward but a scaling. Rows that cannot matter,
being masked or of zero weight, never enter; rows on which a clip decides leave before the gradient products.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from bupo_kernels import derivatives
from bupo_kernels.backends import algebra
from bupo_kernels.backends.gradients import GradientSums, GradientTile
from bupo_kernels.backends.problem import Operands, Problem
from bupo_kernels.dispatch import Plan, make_plan
from bupo_kernels.ops import check_rows, of_product, on, operands_of, problem_of, traced_gradients
from bupo_kernels.policy_losses import PolicyObjective, policy_terms


def rows_that_matter(objective: PolicyObjective, counts: Tensor, weights: Tensor, advantages: Tensor) -> Tensor:  # [...] bool
    """Those whose loss or gradient can differ from zero, as far as it can be told without their log-prob."""
    matter = counts & (weights != 0)
    if objective.kl_coefficient == 0 and not objective.needs_entropy:
        matter = matter & (advantages != 0)
    return matter


@torch.library.custom_op("bupo_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (read by torch's schema inference)
    targets: Tensor,
    counts: Tensor,
    row_temperature: Optional[Tensor],  # noqa: UP045
    advantages: Tensor,
    old_logprobs: Optional[Tensor],  # noqa: UP045
    reference_logprobs: Optional[Tensor],  # noqa: UP045
    sampler_logprobs: Optional[Tensor],  # noqa: UP045
    weights: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    ignore_index: int,
    objective: str,
    backend: str,
    memory_budget: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprob and entropy of the rows that matter and 0 elsewhere, dH, dW, db): gradients of the loss itself, [0] where not
    needed. ``counts``, ``weights`` and what comes per row are of the shape of ``targets``."""
    goal = PolicyObjective(**json.loads(objective))
    check_rows(targets, counts, weight.shape[0], ignore_index, row_temperature)
    matter = rows_that_matter(goal, counts, weights, advantages).flatten()
    rows = matter.nonzero().squeeze(1)
    need = grad_hidden, grad_weight, grad_bias
    problem = problem_of(hidden, weight, len(rows), softcap, need, memory_budget)
    plan = make_plan(problem, backend, one_pass=True)
    dtype, chunk = problem.statistics_dtype, plan.schedule.chunk_rows
    operands = operands_of(hidden, weight, bias, targets, row_temperature, temperature, logit_scale, softcap)
    per_token = {
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "reference_logprobs": reference_logprobs,
        "sampler_logprobs": sampler_logprobs,
        "weights": weights,
    }
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    logprob, entropy = (torch.zeros(targets.numel(), dtype=dtype, device=hidden.device) for _ in range(2))
    sums = GradientSums(hidden, weight, bias, need=need, dtype=dtype, parts=len(rows) > chunk)
    with on(hidden.device):
        for first in range(0, len(rows), chunk):
            r = rows[first : first + chunk]
            inputs = {name: x if x is None else x.flatten()[r].to(dtype) for name, x in per_token.items()}
            run = _fused_chunk if plan.schedule.fused_rows else _chunk
            part = run(goal, operands, r, inputs, problem, plan)
            loss += part.loss.sum()
            logprob[r], entropy[r] = part.logprob, part.entropy
            if part.tiles is not None:
                sums.add(part.tiles, part.rows, unscale=part.unscale, step=plan.schedule.tile.rows)
            del part  # with the logits that it kept
    return loss, logprob.view(targets.shape), entropy.view(targets.shape), *sums.result()


class _Part(NamedTuple):
    """What a chunk of n rows comes to."""

    loss: Tensor  # [n], times the weight
    logprob: Tensor
    entropy: Tensor
    rows: Tensor | None  # those with a gradient
    tiles: Iterator[GradientTile] | None  # of dz of these
    unscale: Tensor | None = None


def _chunk(goal: PolicyObjective, operands: Operands, r: Tensor, inputs: dict, problem: Problem, plan: Plan) -> _Part:
    module, keep = plan.module, problem.needs_grad and plan.schedule.cached_rows > 0
    statistics, kept = module.row_statistics(operands, r, problem, plan.schedule, with_entropy=True, keep=keep)
    found = algebra.finish(statistics, problem.vocab, with_entropy=True)
    w = inputs.pop("weights")
    terms = policy_terms(goal, found.logprob, found.entropy, **inputs)
    g_logprob, g_entropy = w * terms.d_logprob, w * terms.d_entropy if goal.needs_entropy else None
    used = g_logprob != 0 if g_entropy is None else (g_logprob != 0) | (g_entropy != 0)
    index = used.nonzero().squeeze(1) if problem.needs_grad else r[:0]
    if len(index) == 0:
        return _Part(w * terms.loss, found.logprob, found.entropy, None, None)
    g_logprob, g_entropy = g_logprob[index], g_entropy if g_entropy is None else g_entropy[index]
    of_rows = (x[index] for x in (statistics.m, found.log_s, found.logprob, found.entropy))
    r = r[index]
    coefficients = algebra.coefficients(g_logprob, g_entropy, None, *of_rows, operands.targets.flatten()[r])
    coefficients, unscale = of_product(coefficients, operands, r, module.gradient_dtype(problem))
    tiles = module.gradient_tiles(operands, r, coefficients, problem, plan.schedule, (*kept, index) if keep else None)
    return _Part(w * terms.loss, found.logprob, found.entropy, r, tiles, unscale)


def _fused_chunk(goal: PolicyObjective, operands: Operands, r: Tensor, inputs: dict, problem: Problem, plan: Plan) -> _Part:
    inputs["targets"] = operands.targets.flatten()[r]
    found, used, tiles = plan.module.policy_rows(operands, r, goal, inputs, problem, plan.schedule)
    return _Part(found["loss"], found["logprob"], found["entropy"], None if used is None else r[used], tiles)


@linear_policy_loss.register_fake
def _(hidden, weight, bias, targets, *rest):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gradients = traced_gradients(hidden, weight, bias, rest[-3:])
    return hidden.new_empty((), dtype=dtype), *(hidden.new_empty(targets.shape, dtype=dtype) for _ in range(2)), *gradients


def _setup_context(ctx, inputs, output):
    _, *rest = output
    ctx.save_for_backward(*rest[2:])
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_loss, *_):
    need = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # create_graph: what was saved, made in the forward, is in no graph
        raise derivatives.of_a_gradient("linear_policy_loss")
    if g_loss is None:
        return (None,) * 21
    # A copy the size of W is worth a look at the number, where there is one and that costs nothing (not on a device, not traced).
    here = not torch.compiler.is_compiling() and type(g_loss) is Tensor and g_loss.device.type == "cpu"
    one = here and not derivatives.is_batched(g_loss) and g_loss.item() == 1
    gradients = (g if one else (g * g_loss).to(g.dtype) for g in ctx.saved_tensors)
    return *(g if needed else None for g, needed in zip(gradients, need, strict=True)), *(None,) * 18


linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)
