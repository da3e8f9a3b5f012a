"""The work of the ops: problem, plan, and the loop over what a backend streams, for statistics, gradients and one-pass losses.

Which backend runs is decided here, from sizes that are plain numbers by then. In :func:`statistics` only a backend may wait for the
device; :func:`gradients` waits for it to say how many rows have a gradient, since the products that follow are of that many.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends import algebra
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Cache, Operands, PolicyRows, Problem, is_aligned
from bupo_kernels.backends.gradients import GradientSums, GradientTile, in_place_order
from bupo_kernels.backends.quantised import is_plain
from bupo_kernels.dispatch import Plan, make_plan
from bupo_kernels.policy_losses import PolicyObjective, policy_terms
from bupo_kernels.vocab_parallel import Header, Shard, is_at_hand, telling

Flags = tuple[bool, bool, bool]  # one each for hidden, weight and bias


class Settings(NamedTuple):
    """The choices of a call, beside its tensors and its readout. Torch's ops take it as one string: of its values none varies from
    step to step (those that may, as a temperature, are floats of the ops, since a traced graph is made anew for each new
    string)."""

    ignore_index: int
    with_entropy: bool
    backend: str
    memory_budget: int
    planned: Flags  # the gradients that the forward plans for
    needed: Flags = (False, False, False)  # those that a backward is asked for
    objective: str = ""  # of a policy loss, PolicyObjective.encoded
    group: str = ""  # the name of the ranks that have the other columns

    def encode(self) -> str:
        """Return the string for :meth:`decode`."""
        planned, needed = ("".join([f"{int(flag)}" for flag in flags]) for flags in (self.planned, self.needed))
        # int() makes a number of what torch.compile traces as a symbol.
        numbers = f"{int(self.ignore_index)} {int(self.with_entropy)} {int(self.memory_budget)}"
        return f"{numbers} {planned} {needed} {self.backend} {self.group} {self.objective}"

    @staticmethod
    @functools.lru_cache(1024)
    def decode(encoded: str) -> Settings:
        """Return the settings that were encoded."""
        ignore_index, with_entropy, memory_budget, planned, needed, backend, group, objective = encoded.split(" ", 7)
        planned_flags, needed_flags = ((x[0] == "1", x[1] == "1", x[2] == "1") for x in (planned, needed))
        numbers = int(ignore_index), with_entropy == "1", backend, int(memory_budget)
        return Settings(*numbers, planned_flags, needed_flags, objective, group)


def active_rows(targets: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:  # [...] -> [...] bool
    """Return which rows count: those that are neither masked nor of ``ignore_index``."""
    active = targets != ignore_index
    return active if mask is None else active & mask


def check_rows(operands: Operands, active: Tensor, ignore_index: int, shard: Shard | None = None) -> None:
    """Raise ``ValueError`` for a target or a temperature out of range, where values are at hand. Off the CPU it is a device-side
    assert."""
    targets, temperature = operands.targets, operands.readout.temperature
    vocab: int | Tensor = operands.weight.shape[0] if shard is None else shard.vocab
    outside = active & ((targets < 0) | (targets >= vocab))
    impossible = active & ~(temperature.isfinite() & (temperature > 0)) if isinstance(temperature, Tensor) else None
    bound = "V" if isinstance(vocab, Tensor) and not is_at_hand(vocab) else vocab
    accepted = f"accepted are ids in [0, {bound}) and ignore_index ({ignore_index})"
    if not is_at_hand(targets):
        torch._assert_async(~outside.any(), f"targets: {accepted}")
        if impossible is not None:
            torch._assert_async(~impossible.any(), "temperature: accepted are positive numbers on rows that count")
        return
    if outside.any():
        raise ValueError(f"targets: {targets[outside][0].item()} given, {accepted}")
    if isinstance(temperature, Tensor) and impossible is not None and impossible.any():
        given = temperature[impossible][0].item()
        raise ValueError(f"temperature: {given} given, accepted are positive numbers on rows that count")


def problem_of(operands: Operands, active_rows: int, settings: Settings) -> Problem:
    """Return the problem that a call poses, with so many ``active_rows``."""
    hidden, weight = operands.hidden, operands.weight
    grad_hidden, grad_weight, grad_bias = settings.planned
    return Problem(
        rows=math.prod(hidden.shape[:-1]),  # numel() would make a number of a traced size
        active_rows=active_rows,
        vocab=max(weight.shape[0], 1),  # a shard without columns, of which nothing runs, is planned as one of one
        width=weight.shape[1],
        dtype=hidden.dtype,
        device=hidden.device,
        grad_hidden=grad_hidden,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        softcap=operands.readout.softcap is not None,
        memory_budget=settings.memory_budget,
        quantised=not is_plain(weight),
        aligned=not is_plain(weight) or is_aligned(weight),
        sharded=settings.group != "",
    )


def plan_for(operands: Operands, active: Tensor, settings: Settings) -> Plan:
    """Return the plan of a forward, or of its backward. Off the CPU it is for all rows, since to count them would wait for the
    device."""
    count = int(active.sum()) if active.device.type == "cpu" else active.numel()
    return make_plan(problem_of(operands, count, settings), settings.backend)


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Launch kernels on ``device``, which may not be the current one; and multiply without autocast, which has chosen the operands'
    dtype and would round products."""
    with torch.autocast(device.type, enabled=False), torch.cuda.device(device if device.type == "cuda" else -1):
        yield


def shard_of(operands: Operands, active: Tensor, settings: Settings, call: str, chunk: int = 0, *, wait: bool = False) -> Shard:
    """Return what this rank has of the vocabulary, from what all ranks of the group tell of a ``call``; raise as
    :meth:`Shard.of` does."""
    options = settings.ignore_index, settings.with_entropy, settings.planned, settings.needed, settings.objective
    return Shard.of(settings.group, Header.of(operands, active, f"{call} {options}", chunk), operands.hidden.device, wait=wait)


def _streamed(
    operands: Operands, active: Tensor, settings: Settings, shard: Shard | None = None
) -> tuple[algebra.Statistics, Cache]:
    """Return the statistics of all rows over the columns that are here, and the cache of some of them."""
    check_rows(operands, active, settings.ignore_index, shard)
    if shard is not None:
        operands = shard.local(operands)
    plan = plan_for(operands, active, settings)
    if operands.weight.shape[0] == 0:
        nothing = algebra.Statistics.of_no_columns(active.numel(), plan.problem.statistics_dtype, active.device)
        return nothing, plan.implementation.empty_cache(plan.problem, plan.tile_plan.cached_rows)
    with on(operands.hidden.device):
        return plan.implementation.statistics(operands, active.flatten(), plan.tile_plan, settings.with_entropy)


class Forward(NamedTuple):
    """The results of a forward for N rows, and what it leaves for the backward."""

    logprob: Tensor  # [N]
    entropy: Tensor | None  # [N]
    logsumexp: Tensor  # [N]
    saved: Tensor  # [3, N] m, log s, logprob; [4, N] with the entropy
    cache: Cache


def statistics(operands: Operands, mask: Tensor | None, settings: Settings) -> Forward:
    """Return log-prob, entropy and logsumexp of all rows, 0 on those that are not active."""
    active = active_rows(operands.targets, mask, settings.ignore_index)
    if not settings.group:
        streamed, cache = _streamed(operands, active, settings)
        results = algebra.finish(streamed, operands.weight.shape[0], settings.with_entropy)
    else:
        shard = shard_of(operands, active, settings, "linear_logprobs")
        with shard.telling((4, active.numel()), torch.promote_types(operands.hidden.dtype, torch.float32)):
            streamed, cache = _streamed(operands, active, settings, shard)
        streamed = algebra.of_active_rows(shard.merged(streamed), active.flatten())
        results = algebra.finish(streamed, shard.vocab, settings.with_entropy)
    logprob, entropy, logsumexp, log_s = results
    saved = torch.stack([streamed.m, log_s, logprob, *([] if entropy is None else [entropy])])
    return Forward(logprob, entropy, logsumexp, saved, cache)


def gradients(
    operands: Operands,
    upstream: Sequence[Tensor | None],  # [...] each: of logprob, entropy, logsumexp
    saved: Tensor,  # [3 or 4, N]
    cache: Cache,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW and db from what :func:`statistics` left; [0] for those not needed."""
    active = saved[0] != -math.inf  # a NaN counts
    dtype = saved.dtype
    gs = [g if g is None else g.flatten().to(dtype) for g in upstream]

    # A row all of whose upstream gradients are exactly zero adds exactly nothing: it leaves before any product. But where a loss
    # weighs a row of NaN with 0 it is NaN, and so are its gradients.
    has_gradient = ~saved[1].isfinite()
    for g in gs:
        if g is not None:
            has_gradient |= g != 0
    has_gradient &= active
    rows = has_gradient.nonzero().squeeze(1)
    shard = None
    if settings.group:
        shard = shard_of(operands, has_gradient.view(operands.targets.shape), settings, "the backward of linear_logprobs")
        operands = shard.local(operands)
    m, log_s, logprob, *entropy = (x[rows] for x in saved)
    g_logprob, g_entropy, g_logsumexp = (g if g is None else g[rows] for g in gs)
    targets = operands.targets.flatten()[rows]
    coefficients = algebra.coefficients(
        g_logprob, g_entropy, g_logsumexp, m, log_s, logprob, entropy[0] if entropy else None, targets
    )
    with on(operands.hidden.device):
        with _together(shard if settings.needed[0] else None):
            plan = plan_for(operands, active, settings)
            coefficients, unscale = _product_coefficients(coefficients, operands, rows, plan)
            # The cache lies in the order of the active rows.
            cache_rows = None if cache.is_empty else (active.cumsum(0) - 1)[rows]
            sums = GradientSums(operands.hidden, operands.weight, operands.bias, needed=settings.needed, dtype=dtype, parts=False)
            tiles = _gradient_tiles(plan, operands, rows, coefficients, cache, cache_rows)
            rows_sum = sums.products(tiles, len(rows), unscale=unscale)
        if shard is not None and rows_sum is not None:
            shard.start_sum(rows_sum)
            shard.wait_for(rows_sum)
        sums.put(rows_sum, rows, plan.tile_plan.tile.rows)
    return sums.result()


def _gradient_tiles(
    plan: Plan, operands: Operands, rows: Tensor, coefficients: Coefficients, cache: Cache, cache_rows: Tensor | None
) -> Iterator[GradientTile]:
    if operands.weight.shape[0] == 0:
        return iter(())
    return plan.implementation.gradient_tiles(operands, rows, coefficients, plan.tile_plan, cache, cache_rows)


def _product_coefficients(
    coefficients: Coefficients, operands: Operands, rows: Tensor, plan: Plan
) -> tuple[Coefficients, Tensor | None]:
    """Return what gives the gradient of the product instead of that of the logits, in the dtype of dz; and what undoes its
    scale."""
    readout = operands.readout
    if not readout.is_identity:
        temperature = readout.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.flatten()[rows].to(coefficients.m.dtype)
        coefficients = coefficients.scaled(readout.logit_scale / temperature)
    if plan.implementation.gradient_dtype(plan.problem) != torch.float16 or len(rows) == 0:
        return coefficients, None
    # fp16 reaches from 6e-8 to 6e4: a power of two puts the largest dz there is at 2^12 or below, and the sums undo it.
    # Rows that are not finite stay so at any scale, and leave it to the others.
    largest = coefficients.bound().nan_to_num(0, posinf=0).amax()
    scale = torch.exp2(12 - largest.log2().ceil().clamp(-100, 100))
    return coefficients.scaled(scale), 1 / scale


def rows_that_matter(objective: PolicyObjective, active: Tensor, weights: Tensor, advantages: Tensor) -> Tensor:  # [...] bool
    """Return which rows' loss or gradient can differ from zero, as far as it can be told without their log-prob."""
    matter = active & (weights != 0)
    if objective.kl_coefficient == 0 and not objective.needs_entropy:
        matter = matter & (advantages != 0)
    return matter


class PolicyTokens(NamedTuple):
    """The inputs of a policy loss for each token, in the shape of the targets."""

    advantages: Tensor
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    weights: Tensor  # of its loss in the whole

    def of_rows(self, rows: Tensor, dtype: torch.dtype) -> PolicyTokens:  # [n] -> [n] each
        """Return what ``rows``, which number the targets through, take, in ``dtype``."""

        def some(x: Tensor) -> Tensor:
            return x.flatten()[rows].to(dtype)

        old, reference, sampler = (
            x if x is None else some(x) for x in (self.old_logprobs, self.reference_logprobs, self.sampler_logprobs)
        )
        return PolicyTokens(some(self.advantages), old, reference, sampler, some(self.weights))


def policy_loss(
    operands: Operands,
    active: Tensor,  # [...] bool
    tokens: PolicyTokens,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the loss; log-prob and entropy [N] of the rows that matter, 0 elsewhere; and dH, dW, db of the loss itself.

    Of each chunk of rows there is one product, statistics, the objective's terms and their derivative, then the two gradient
    products from the cache that the chunk left: 6·N·V·D FLOP instead of 8, and nothing is left for a backward but a scaling. Rows
    that cannot matter, being masked or of zero weight, never enter; rows on which a clip decides leave before the gradient
    products.
    """
    objective, device = PolicyObjective(**json.loads(settings.objective)), operands.hidden.device
    matter = rows_that_matter(objective, active, tokens.weights, tokens.advantages)
    all_rows = matter.flatten().nonzero().squeeze(1)
    with telling(settings.group, device) if settings.group else nullcontext():
        problem = problem_of(operands, len(all_rows), settings)
        plan = make_plan(problem, settings.backend, one_pass=True)
    dtype, chunk, shard = problem.statistics_dtype, plan.tile_plan.chunk_rows, None
    if settings.group:
        call = f"linear_policy_loss, in place: {plan.tile_plan.in_place}"  # which orders the rows of dH
        shard = shard_of(operands, matter, settings, call, chunk, wait=True)
        chunk = int(shard.chunk)
    parts = len(all_rows) > chunk
    with _together(shard):
        check_rows(operands, active, settings.ignore_index, shard)
        sums = GradientSums(operands.hidden, operands.weight, operands.bias, needed=settings.planned, dtype=dtype, parts=parts)
    if shard is not None:
        operands = shard.local(operands)
    loss = torch.zeros((), dtype=dtype, device=device)
    logprob, entropy = (torch.zeros(operands.targets.numel(), dtype=dtype, device=device) for _ in range(2))
    step, fused = plan.tile_plan.tile.rows, plan.tile_plan.fused_rows
    summing: tuple[Tensor, Tensor] | None = None  # rows of dH, and which, that the ranks add while the next chunk is at hand
    with on(device):
        for rows in all_rows.split(chunk) if len(all_rows) else ():
            streamed = None if fused else _chunk_statistics(operands, rows, plan, shard)
            with _together(shard):
                of_rows, rows_sum = tokens.of_rows(rows, dtype), None
                if streamed is None:
                    found, unscale = _fused_chunk(objective, operands, rows, of_rows, plan)
                else:
                    found, unscale = _chunk(objective, operands, rows, of_rows, plan, *streamed)
                del streamed
                loss += found.loss.sum()
                logprob[rows], entropy[rows] = found.logprob, found.entropy
                if found.tiles is not None:
                    positions = rows[found.has_gradient]
                    rows_sum = sums.products(found.tiles, len(positions), unscale=unscale)
                del found  # with the cache that its tiles hold
            if summing is not None and shard is not None:
                shard.wait_for(summing[0])
                sums.put(*summing, step)
                summing = None
            if rows_sum is not None and shard is not None:
                shard.start_sum(rows_sum)
                summing = rows_sum, positions
            elif rows_sum is not None:
                sums.put(rows_sum, positions, step)
        if summing is not None and shard is not None:
            shard.wait_for(summing[0])
            sums.put(*summing, step)
    return loss, logprob, entropy, sums.result()


def _together(shard: Shard | None) -> AbstractContextManager[None]:
    return nullcontext() if shard is None else shard.together()


def _chunk_statistics(
    operands: Operands, rows: Tensor, plan: Plan, shard: Shard | None
) -> tuple[algebra.Statistics, Cache, int | Tensor]:
    """Return the statistics of ``rows``, what they leave of the columns that are here, and how many columns there are."""
    keep = plan.problem.needs_grad and plan.tile_plan.cached_rows > 0
    stream = partial(plan.implementation.row_statistics, operands, rows, plan.tile_plan, with_entropy=True, keep=keep)
    if shard is None:
        return *stream(), plan.problem.vocab
    dtype = plan.problem.statistics_dtype
    with shard.telling((4, len(rows)), dtype):
        if len(operands.weight):
            streamed, cache = stream()
        else:
            streamed = algebra.Statistics.of_no_columns(len(rows), dtype, rows.device)
            cache = plan.implementation.empty_cache(plan.problem, 0)
    return shard.merged(streamed), cache, shard.vocab


def _fused_chunk(
    objective: PolicyObjective, operands: Operands, rows: Tensor, tokens: PolicyTokens, plan: Plan
) -> tuple[PolicyRows, None]:
    inputs = tokens._asdict() | {"targets": operands.targets.flatten()[rows]}
    return plan.implementation.policy_rows(operands, rows, objective, inputs, plan.tile_plan), None


def _chunk(
    objective: PolicyObjective,
    operands: Operands,
    rows: Tensor,
    tokens: PolicyTokens,
    plan: Plan,
    streamed: algebra.Statistics,
    cache: Cache,
    columns: int | Tensor,
) -> tuple[PolicyRows, Tensor | None]:
    """Return what a kernel from products to a policy loss would, and what undoes the scale of its dz; from the statistics over all
    ``columns``, and from what they left of those that are here."""
    problem = plan.problem
    logprob, entropy, _, log_s = algebra.finish(streamed, columns, with_entropy=True)
    assert entropy is not None
    terms = policy_terms(
        objective,
        logprob,
        entropy,
        tokens.advantages,
        old_logprobs=tokens.old_logprobs,
        reference_logprobs=tokens.reference_logprobs,
        sampler_logprobs=tokens.sampler_logprobs,
    )
    loss, g_logprob, g_entropy = (tokens.weights * x for x in (terms.loss, terms.d_logprob, terms.d_entropy))
    differs = (g_logprob != 0) | (g_entropy != 0) if objective.needs_entropy else g_logprob != 0
    differs &= problem.needs_grad
    has_gradient = in_place_order(differs) if plan.tile_plan.in_place else differs.nonzero().squeeze(1)
    if len(has_gradient) == 0:
        return PolicyRows(loss, logprob, entropy, None, None), None
    rows = rows[has_gradient]
    coefficients = algebra.coefficients(
        g_logprob[has_gradient],
        g_entropy[has_gradient] if objective.needs_entropy else None,
        None,
        streamed.m[has_gradient],
        log_s[has_gradient],
        logprob[has_gradient],
        entropy[has_gradient],
        operands.targets.flatten()[rows],
    )
    coefficients, unscale = _product_coefficients(coefficients, operands, rows, plan)
    cache_rows = None if cache.is_empty else has_gradient
    tiles = _gradient_tiles(plan, operands, rows, coefficients, cache, cache_rows)
    return PolicyRows(loss, logprob, entropy, has_gradient, tiles), unscale
