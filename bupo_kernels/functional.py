"""The ops as functions, and the only door to the backends: check the arguments, make the plan, run it.

For a row with hidden vector ``h``, unembedding ``W`` and target ``y`` the logits are
``z_j = softcap(logit_scale · (h·W_j + b_j)) / temperature`` and

* logprob ``z_y − lse``, with ``lse = ln Σ_j e^(z_j)``
* entropy ``−Σ_j p_j ln p_j`` in nats, with ``p = softmax(z)`` (BuPO, arXiv 2512.19673, equation 7)

With ``h = H^l``, the residual stream after layer ``l``, this is the paper's internal layer policy (equation 5).

Numerics, the same for every op here. Products accumulate in fp32 and every statistic is taken from that accumulator, never
from a rounded logit; 16-bit inputs are exact. Against float64 on the same inputs ``|Δlogprob| ≤ 2e-6 · (1 + max|z|)``. dH and
dW are summed in fp32 and rounded once, to the dtype of their tensor. The gradient of a logit stays fp32 on the ``torch`` backend;
``triton`` rounds it once to a 16-bit input's dtype, for the tensor cores (fp16: scaled by a power of two first), and with its
``cached`` strategy takes p from a bf16 value: another 2⁻⁸ relative in p and 0.004 nat in log p, never on the target. float64
inputs are computed in float64 throughout. fp32 products follow torch's own precision setting
(``torch.set_float32_matmul_precision``); the bound is for its default, ``"highest"``.

Under ``torch.compile`` a call is one node, whatever the number of rows, and gives bit for bit what it gives without. Off the CPU
the forward never waits for the device; a target or a temperature out of range is then a device-side assert. (:func:`logit_lens`
and :func:`linear_divergence`, which have no gradient, do wait, and are traced as the plain torch they are.)

A logit of −inf, by a ``bias`` of −inf or a product that overflows, is a column that cannot be chosen: its probability and its
gradient are exactly 0, and ``0 · ln 0 = 0`` in entropies and divergences. A target there has log-prob −inf and the finite gradient
p − onehot; a row that has no other logits has no policy: NaN. (Under a softcap the logit is −softcap, as the formula says: no
column is ruled out.) NaN, and +inf, in a row that counts makes all of the row's results and gradients NaN, and with them all of dW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from bupo_kernels import derivatives, ops, policy_op
from bupo_kernels.backends import lens
from bupo_kernels.backends.problem import Operands, Readout
from bupo_kernels.backends.quantised import PLAIN, SLICED, called, is_plain, rows_of
from bupo_kernels.dispatch import Plan, default_memory_budget, make_plan
from bupo_kernels.flops import tell_flop_counter
from bupo_kernels.policy_losses import PolicyMetrics, PolicyObjective, active_tokens, policy_metrics, policy_terms, token_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LinearLogprobs(NamedTuple):
    """Statistics of ``softmax(h Wᵀ)``: fp32 (float64 for float64 inputs), shape of ``targets``, 0.0 on masked rows."""

    logprobs: Tensor  # [...], z_y − lse, never above 0
    entropy: Tensor | None  # [...], nats, in [0, ln V], differentiable
    logsumexp: Tensor  # [...], lse, differentiable


def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # [...] bool
    ignore_index: int = -100,
    return_entropy: bool = True,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> LinearLogprobs:
    """Per-token log-prob, entropy and logsumexp of ``softmax(h Wᵀ)``, without ``[..., V]`` logits.

    Args:
        hidden: ``[..., D]``, fp32, bf16, fp16 or float64; any view, also a non-contiguous one.
        weight: the unembedding, ``[V, D]``, dtype of ``hidden``. Under autocast both are cast to its dtype, as
            ``F.linear`` would. A ``DTensor`` sharded over one mesh dimension (FSDP2) is gathered, and its gradient averaged over
            the ranks, each of which brings rows of its own. A frozen weight that is quantised, of any dtype and class of which
            ``weight[a:b].dequantize()`` gives numbers (torchao's int8 and float8), stands for these: the ``torch`` backend reads
            it a slice at a time, outside of ``torch.compile``. A view of its first rows, ``weight[:n]``, leaves the padding of a
            vocabulary out, and costs n columns instead of V; autograd copies its gradient into one of all V rows.
        targets: ``[...]``, int64 ids in ``[0, V)``. A target equal to ``ignore_index`` masks its row.
        bias: ``[V]``, floating point. −inf rules a column out.
        temperature: positive; a float, or one value per row in the shape of ``targets``. No gradient flows to it.
        logit_scale: factor on the product, before the softcap (Cohere, Granite).
        softcap: if given, ``softcap · tanh(· / softcap)``, before the temperature (Gemma).
        mask: ``[...]`` bool, True = the row counts. Masked rows cost nothing: no product is formed for them.
        return_entropy: False skips the entropy; the field is then None.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``, or one with its strategy, ``"triton:recompute"`` or
            ``"triton:cached"``; :func:`explain` says which would run, and why not the others.
        memory_budget: upper bound in bytes on working memory, what is kept for the backward included; 256 MiB by default on
            the CPU, 1 GiB elsewhere. Outputs and gradients come on top, and for 16-bit inputs one fp32 sum of dH;
            :func:`explain` states each.

    Returns:
        :class:`LinearLogprobs`. All three are differentiable, alone or together, with respect to ``hidden``, ``weight`` and
        ``bias``; an operand that needs no gradient costs no gradient GEMM, and a row whose upstream gradients are all
        exactly zero is left out of the backward. Differentiable once, in reverse mode: what torch has beyond (a gradient with
        ``create_graph`` that is differentiated again, forward mode, ``torch.func.grad`` and the like) raises; ``torch.func.vmap``
        works, one call a sample.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
        NotImplementedError: for a derivative that is not implemented.
    """
    return prepare(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        mask=mask,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        backend=backend,
        memory_budget=memory_budget,
    ).run()


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64
    *,
    reduction: str = "mean",
    **options,
) -> Tensor:
    """Cross entropy ``−logprob`` of ``softmax(h Wᵀ)`` without logits.

    Args:
        reduction: ``"mean"`` over the rows that count (0.0 when none does, where ``F.cross_entropy`` gives NaN), ``"sum"``,
            or ``"none"`` for the shape of ``targets`` with 0.0 on masked rows.
        options: those of :func:`linear_logprobs`, except ``return_entropy``.

    Returns:
        fp32 (float64 for float64 inputs), a scalar or ``[...]``. Gradients, numerics and errors as in
        :func:`linear_logprobs`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: {reduction!r} given, accepted are 'mean', 'sum', 'none'")
    call = prepare(hidden, weight, targets, return_entropy=False, **options)
    losses = -call.run().logprobs
    if reduction == "none":
        return losses
    return losses.sum() / (call.counts().sum().clamp(min=1) if reduction == "mean" else 1)


def linear_policy_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64
    advantages: Tensor,  # [...] or broadcastable to it
    *,
    old_logprobs: Tensor | None = None,  # [...]
    reference_logprobs: Tensor | None = None,  # [...]
    sampler_logprobs: Tensor | None = None,  # [...]
    objective: PolicyObjective = PolicyObjective(),  # noqa: B008 (frozen)
    denominator: float | Tensor | None = None,
    check: bool = False,
    **options,
) -> tuple[Tensor, PolicyMetrics]:
    """The loss of an RL step on ``softmax(h Wᵀ)``, with its gradients taken while each chunk of logits is at hand.

    6·N·V·D FLOP forward and backward instead of 8, and memory for one chunk of rows. Objectives that need the log-probs of a whole
    sequence before any gradient (``objective.needs_sequence``) take two passes, as :func:`linear_logprobs` would; so does the
    ``triton`` backend in fp32 or with a softcap. :func:`explain` with ``objective=`` says which.

    Args:
        advantages: ``[...]``, or one per sequence, ``[..., 1]``. Like all that follow, a constant: one that requires a gradient is
            refused.
        old_logprobs: of the policy that is the ratio's denominator; None means on-policy: ratio 1, with its gradient.
        reference_logprobs: for ``objective.kl``.
        sampler_logprobs: of the engine that generated, for ``objective.importance`` and the metrics. A row whose value is not
            finite leaves numerator and denominator.
        objective: :class:`PolicyObjective`: ratio, clip, KL, entropy bonus, importance weights, aggregation. A sequence is the last
            of the leading dimensions.
        denominator: replaces the call's own in the aggregation, so that it can span micro-batches and ranks: how many tokens
            count, or for the sequence means how many sequences have one.
        check: look for NaN and inf in the inputs first (this waits for the device), and name the first.
        options: those of :func:`linear_logprobs`, except ``return_entropy``.

    Returns:
        The loss, a scalar in fp32 (float64 for float64 inputs), and detached :class:`PolicyMetrics` over the rows that were
        computed: those that count, without the ones of zero advantage where neither KL nor entropy bonus asks for them. Such rows
        cost no product at all, and rows on which a clip decides none for their gradient.

    Gradients of ``hidden``, ``weight`` and ``bias``, as in :func:`linear_logprobs`; scaled by the upstream gradient in the
    backward, which may run more than once, though not with ``create_graph``. Numerics and errors as there. Paper: with the hidden
    states of layer l and ``clip="ppo"`` this is InterGRPO of BuPO (arXiv 2512.19673, equation 9).
    """
    if not isinstance(objective, PolicyObjective):
        raise TypeError(f"objective: {type(objective).__name__} given, accepted is a PolicyObjective")
    call = prepare(hidden, weight, targets, return_entropy=True, **options)
    given = {"old_logprobs": old_logprobs, "reference_logprobs": reference_logprobs, "sampler_logprobs": sampler_logprobs}
    advantages = _check_rows_of("advantages", advantages, targets, broadcast=True)
    given = {name: x if x is None else _check_rows_of(name, x, targets) for name, x in given.items()}
    _check_constant("denominator", denominator)
    objective.require_inputs(reference_logprobs=reference_logprobs, sampler_logprobs=sampler_logprobs)
    if targets.dim() == 1 and (objective.needs_sequence or objective.aggregation != "token-mean"):
        raise ValueError(f"hidden: shape {tuple(hidden.shape)} given, accepted is [..., S, D] for an objective over sequences")
    active = active_tokens(advantages, call.counts(), sampler_logprobs)
    if check:
        checked = {k: v for k, v in given.items() if k != "sampler_logprobs"} | {"advantages": advantages}
        _check_finite({"weight": call.weight, "bias": call.bias}, {"hidden": call.hidden, **checked}, active)
    sequences = active.reshape(math.prod(active.shape[:-1]), active.shape[-1])  # of no token either, where -1 would be any number
    dtype = torch.promote_types(call.hidden.dtype, torch.float32)
    aggregation = {"denominator": denominator, "max_length": objective.max_length, "dtype": dtype}
    weights = token_weights(sequences, objective.aggregation, **aggregation).view(targets.shape)

    if objective.needs_sequence:
        out = replace(call, mask=active).run()
        values = out.logprobs.detach(), out.entropy.detach()
        terms = policy_terms(objective, *values, advantages, mask=active, **given)
        # Of value Σ w · loss, and of its gradient: what is added to the loss is exactly zero, of a log-prob of −inf too.
        through = torch.where(terms.d_logprob == 0, 0, terms.d_logprob * (out.logprobs - values[0]))
        through = through + terms.d_entropy * (out.entropy - values[1])
        loss = (weights.to(through.dtype) * (terms.loss + through)).sum()
    else:
        loss, *values, _, _, _ = policy_op.linear_policy_loss(
            *(call.hidden, call.weight, call.bias, call.targets, active, call.row_temperature, advantages),
            *(*given.values(), weights),
            *call.numbers,
            objective.encoded,
            call.backend,
            call.memory_budget,
            *call.grads,
        )
        active = policy_op.rows_that_matter(objective, active, weights, advantages)
        terms = policy_terms(objective, *values, advantages, mask=active, **given)
    metrics = policy_metrics(terms, *values, given["old_logprobs"], given["sampler_logprobs"], mask=active)
    return loss, metrics


LENS_OUTPUTS = (
    *("logsumexp", "logprobs", "entropy", "max_probability", "argmax", "rank"),
    *("kl_to_final", "kl_from_final", "jsd", "pairwise_kl"),
)
COMPILED_OUTPUTS = {"logsumexp", "logprobs", "entropy", "max_probability"}  # of every backend; the others stream in torch


class LensStatistics(NamedTuple):
    """Statistics of the L policies of a logit lens, None where not asked for: fp32 (float64 for float64 inputs), ids int64, and 0
    on masked rows. ``[...]`` is the shape of one layer's rows."""

    logsumexp: Tensor | None = None  # [L, ...]
    logprobs: Tensor | None = None  # [L, ...] of the targets, never above 0
    entropy: Tensor | None = None  # [L, ...] nats, in [0, ln V]
    max_probability: Tensor | None = None  # [L, ...]
    argmax: Tensor | None = None  # [L, ...] the lowest id where several logits are equal
    rank: Tensor | None = None  # [L, ...] of the target, from 0: how many logits are strictly greater; equal ones do not count
    top_ids: Tensor | None = None  # [L, ..., k] most probable first; among equal logits any order, and any of them at the end
    top_logprobs: Tensor | None = None  # [L, ..., k]
    kl_to_final: Tensor | None = None  # [L, ...] KL(π^l ‖ π), at least 0; inf where π alone rules a column out
    kl_from_final: Tensor | None = None  # [L, ...] KL(π ‖ π^l), at least 0
    jsd: Tensor | None = None  # [L, ...] ½ KL(π^l ‖ μ) + ½ KL(π ‖ μ) with μ = ½ (π^l + π), in [0, ln 2]
    pairwise_kl: Tensor | None = None  # [L, L, ...] [l, k] = KL(π^l ‖ π^k), at least 0


@torch.no_grad()
def logit_lens(
    hidden_states: Tensor | Sequence[Tensor],  # [L, ..., D], or L x [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor | None = None,  # [...] int64
    *,
    norm: Callable[[Tensor], Tensor] | None = None,  # [n, D] -> [n, D]
    final: Tensor | None = None,  # [..., D]
    top_k: int = 0,
    outputs: Sequence[str] = ("entropy",),
    **options,
) -> LensStatistics:
    """What the hidden states of L layers say through one unembedding, ``softmax(h Wᵀ)``, without ``[L, ..., V]`` logits.

    Args:
        hidden_states: of L layers, attention or FFN outputs of a model: a tensor, or a sequence of tensors, which may be any views.
        weight: the unembedding; as in :func:`linear_logprobs`.
        targets: ids in ``[0, V)``, needed for ``logprobs`` and ``rank``. One equal to ``ignore_index`` masks its row.
        norm: applied to every hidden state before the unembedding, e.g. the model's final norm. None reads them raw, as BuPO does.
        final: the final policy's hidden state as the head reads it (``norm`` is *not* applied to it), needed for ``kl_to_final``,
            ``kl_from_final`` and ``jsd``.
        top_k: how many of the most probable ids, with their log-probs; up to V.
        outputs: names of the fields of :class:`LensStatistics` wanted, except ``top_…``; others stay None and cost nothing.
        options: ``bias``, ``temperature``, ``logit_scale``, ``softcap``, ``mask``, ``ignore_index``, ``backend`` and
            ``memory_budget`` of :func:`linear_logprobs`. All policies share them.

    Returns:
        :class:`LensStatistics`; no gradient: they are constants in a loss.

    Cost: 2·L·N·V·D FLOP (L+1 with ``final``), and one pass over W for all layers of as many rows as the budget has room for, in
    most calls all. ``logsumexp``, ``logprobs``, ``entropy`` and ``max_probability`` alone run on any backend. Everything else
    streams in torch, on every device, with fp32 products (16-bit operands on a CPU are upcast); ``rank`` and ``jsd`` take a second
    pass, which doubles the work. ``pairwise_kl`` adds L/D of it.

    Numerics: as :func:`linear_logprobs`; a KL or ``jsd`` is within ``4e-6 · (1 + max|z|)`` of float64 on the same inputs.
    ``rank`` compares fp32 logits exactly: those within rounding of the target's may fall on either side.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if unknown := [name for name in outputs if name not in LENS_OUTPUTS]:
        raise ValueError(f"outputs: {unknown[0]!r} given, accepted are {', '.join(map(repr, LENS_OUTPUTS))}")
    if "return_entropy" in options:
        raise TypeError("return_entropy: given, accepted are names in outputs")
    for name, given, needed_by in (("targets", targets, ("logprobs", "rank")), ("final", final, lens.COMPARED)):
        if given is None and (asking := [output for output in outputs if output in needed_by]):
            raise ValueError(f"{name}: None given, which outputs={asking[0]!r} needs")
    states = list(hidden_states)
    if not states:
        raise ValueError("hidden_states: none given, accepted are those of at least one layer")
    compared = {f"hidden_states[{i}]": x for i, x in enumerate(states)} | ({} if final is None else {"final": final})
    derivatives.refuse(compared | {"weight": weight, "targets": targets}, statistic=True)
    _check_alike(compared)
    if states[0].dim() < 2:
        raise ValueError(f"hidden_states: layers of shape {tuple(states[0].shape)} given, accepted are [L, ..., D] or L x [..., D]")
    if norm is not None and not callable(norm):
        raise TypeError(f"norm: {type(norm).__name__} given, accepted are None and functions [n, D] -> [n, D]")
    if targets is None:
        targets = torch.zeros(states[0].shape[:-1], dtype=torch.int64, device=states[0].device)
    call = prepare(states[0], weight, targets, return_entropy="entropy" in outputs, **options)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= len(call.weight):
        raise ValueError(f"top_k: {top_k!r} given, accepted are 0 to {len(call.weight)}, the size of the vocabulary")
    compiled = not top_k and set(outputs) <= COMPILED_OUTPUTS
    if not compiled and call.backend not in ("auto", "torch"):
        beyond = "top_k" if top_k else next(name for name in outputs if name not in COMPILED_OUTPUTS)
        raise ValueError(f"backend: {call.backend!r} given, accepted for {beyond} are 'auto' and 'torch'")
    ops.check_rows(targets, counts := call.counts(), len(call.weight), call.ignore_index, call.row_temperature)
    readout = Readout(call.temperature, call.logit_scale, call.softcap)
    operands = Operands(call.hidden, call.weight, call.bias, targets, readout)
    rows = counts.flatten().nonzero().squeeze(1)
    if compiled:
        parts = _compiled_lens(states, call, lens.checked_norm(norm), operands, rows, outputs)
    else:
        with ops.on(weight.device):
            streamed = lens.Lens(states, final, norm, operands, len(rows), outputs, top_k, call.memory_budget)
            parts = [streamed.run(some) for some in rows.split(streamed.rows)]
    found = {}
    for name in parts[0]:
        place = 2 if name == "pairwise_kl" else 1
        found[name] = _on_all_rows(torch.cat([part[name] for part in parts], place), rows, counts, place)
    return LensStatistics(**found)


def _on_all_rows(values: Tensor, rows: Tensor, counts: Tensor, place: int) -> Tensor:
    """From the ``rows`` [n] of ``counts`` [...], at ``place`` in the shape of ``values``, to all of them, 0 on the others."""
    before, after = values.shape[:place], values.shape[place + 1 :]
    whole = values.new_zeros(*before, counts.numel(), *after).index_copy_(place, rows, values)
    return whole.view(*before, *counts.shape, *after)


def _compiled_lens(
    states: list[Tensor], call: Call, norm: Callable[[Tensor], Tensor], operands: Operands, rows: Tensor, outputs: tuple[str, ...]
) -> list[dict[str, Tensor]]:
    """[L, n] of each of the outputs for some of the rows after the other: those of all layers, below one another, are one call."""
    layers, weight = len(states), call.weight
    per_row = layers * (4 * weight.shape[1] * states[0].element_size() + 64)  # gathered, normed, stacked, cast; statistics
    at_once = max(call.memory_budget // 2 // per_row, 1)
    parts = []
    for some in rows.split(at_once):
        index = operands.coordinates(some)
        temperature = call.row_temperature
        stacked = replace(
            call,
            hidden=torch.stack([norm(state[index]) for state in states]).to(call.hidden.dtype),
            targets=call.targets[index].expand(layers, -1),
            mask=None,
            temperature=call.temperature if temperature is None else temperature[index].expand(layers, -1),
            memory_budget=max(call.memory_budget - len(some) * per_row, 1),
        )
        logprobs, entropy, logsumexp, _, log_s, *_ = stacked.statistics()
        # p of the maximum is e^(m−m) / s
        found = {"logprobs": logprobs, "entropy": entropy, "logsumexp": logsumexp, "max_probability": (-log_s).exp()}
        parts.append({name: found[name].view(layers, -1) for name in outputs})
    return parts


def _check_alike(named: dict[str, Tensor]) -> None:
    """All are floating-point tensors of the shape, device and, but for autocast, which casts them, dtype of the first."""
    (first_name, first), *_ = named.items()
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: {given} given, accepted is a Tensor of floating point")
        _check_plain(name, tensor)
        same_dtype = tensor.dtype == first.dtype or torch.is_autocast_enabled(first.device.type)
        if tensor.shape != first.shape or tensor.device != first.device or not same_dtype:
            raise ValueError(
                f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} given, accepted is {first.dtype} of "
                f"{tuple(first.shape)} on {first.device}, as {first_name}"
            )


def linear_divergence(
    hidden: Tensor,  # [..., D]
    reference: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    **options,
) -> Tensor:
    """``KL(softmax(h Wᵀ) ‖ softmax(r Wᵀ))`` of each row, in nats, without logits; a statistic: its gradient raises.

    Args:
        hidden, reference: ``[..., D]``, of the two policies, e.g. an internal layer's and the final one's.
        options: those of :func:`logit_lens`: ``mask``, ``bias``, ``temperature``, ``logit_scale``, ``softcap``, ``memory_budget``.

    Returns:
        ``[...]`` fp32 (float64 for float64 inputs), at least 0; 0 on masked rows. Numerics, cost, errors as in :func:`logit_lens`.
    """
    accepted = ("mask", "bias", "temperature", "logit_scale", "softcap", "memory_budget")
    if unknown := sorted(set(options) - set(accepted)):
        raise TypeError(f"{unknown[0]}: given, accepted are {', '.join(accepted)}")
    _check_alike({"hidden": hidden, "reference": reference})
    found = logit_lens([hidden], weight, final=reference, outputs=("kl_to_final",), **options).kl_to_final[0]
    # Not left without a graph, as those of a lens: a term of a loss that had no gradient would not be missed.
    return derivatives.Statistic.apply("linear_divergence", found, hidden, reference, weight, options.get("bias"))


def explain(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor | None = None,  # [...] int64
    *,
    objective: PolicyObjective | None = None,
    **options,
) -> Plan:
    """The plan :func:`linear_logprobs` would follow for the same arguments, or, given an ``objective``, :func:`linear_policy_loss`
    with no row of zero advantage; no product is formed. ``print`` it.

    Without ``targets`` every row counts. Which gradients are planned follows ``requires_grad`` of the operands and
    ``torch.is_grad_enabled()``. Under autocast the copies that it casts come on top of the stated bytes. Raises what
    :func:`linear_logprobs` would.

    Example:
        >>> print(explain(torch.randn(512, 64), torch.randn(1000, 64, requires_grad=True), backend="torch"))
        problem   512 of 512 rows x 1000 columns x 64, float32 on cpu, no gradient for hidden
        backend   torch: recompute, tiles of 512 x 1000
        forward   0.066 GFLOP, at least 0.37 MiB moved, 4.12 MiB of working memory
        ...
    """
    if targets is None and isinstance(hidden, Tensor):
        targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    return prepare(hidden, weight, targets, **options).plan(one_pass=objective is not None and not objective.needs_sequence)


@dataclass(frozen=True)
class Call:
    """A checked call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    mask: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    ignore_index: int
    return_entropy: bool
    backend: str
    memory_budget: int

    @property
    def grads(self) -> tuple[bool, bool, bool]:
        return tuple(map(derivatives.requires_grad, (self.hidden, self.weight, self.bias)))

    def counts(self) -> Tensor:
        return ops.counting_rows(self.targets, self.mask, self.ignore_index)

    @property
    def row_temperature(self) -> Tensor | None:
        return self.temperature if isinstance(self.temperature, Tensor) else None

    @property
    def numbers(self) -> tuple[float, float, float | None, int]:
        """As the ops take them: temperature, logit_scale, softcap, ignore_index."""
        temperature = 1.0 if self.row_temperature is not None else float(self.temperature)
        return temperature, float(self.logit_scale), None if self.softcap is None else float(self.softcap), self.ignore_index

    def plan(self, one_pass: bool = False) -> Plan:
        counts = self.counts()
        ops.check_rows(self.targets, counts, self.weight.shape[0], self.ignore_index, self.row_temperature)
        problem = ops.problem_of(self.hidden, self.weight, int(counts.sum()), self.softcap, self.grads, self.memory_budget)
        return make_plan(problem, self.backend, one_pass)

    def run(self) -> LinearLogprobs:
        logprobs, entropy, logsumexp, *_ = self.statistics()
        return LinearLogprobs(logprobs, entropy if self.return_entropy else None, logsumexp)

    def statistics(self) -> tuple[Tensor, ...]:
        return ops.linear_statistics(
            *(self.hidden, self.weight, self.bias, self.targets, self.mask, self.row_temperature),
            *self.numbers,
            self.return_entropy,
            self.backend,
            self.memory_budget,
            *self.grads,
        )


def prepare(
    hidden,
    weight,
    targets,
    *,
    bias=None,
    temperature=1.0,
    logit_scale=1.0,
    softcap=None,
    mask=None,
    ignore_index=-100,
    return_entropy=True,
    backend="auto",
    memory_budget=None,
) -> Call:
    """Everything before the computation: checks (with the messages users see), autocast, defaults."""
    if not torch.compiler.is_compiling():
        tell_flop_counter()
    derivatives.refuse({"hidden": hidden, "weight": weight, "bias": bias})
    weight, bias = (gathered(name, x, hidden) for name, x in (("weight", weight), ("bias", bias)))
    _check_tensors(hidden, weight, targets, bias, mask, temperature)
    if not isinstance(temperature, Tensor):
        _check_number("temperature", temperature, "positive numbers, or a tensor with one per row")
    if softcap is not None:
        _check_number("softcap", softcap, "None and positive numbers")
    _check_number("logit_scale", logit_scale, "finite numbers", positive=False)
    if memory_budget is not None:
        _check_number("memory_budget", memory_budget, "None and positive numbers of bytes")

    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = (x if x.dtype == torch.float64 or not is_plain(x) else x.to(dtype) for x in (hidden, weight))
    if hidden.dtype != weight.dtype and is_plain(weight):
        raise TypeError(f"weight: {weight.dtype} given, accepted is the dtype of hidden, {hidden.dtype}; or call under autocast")

    budget = default_memory_budget(hidden.device) if memory_budget is None else int(memory_budget)
    return Call(
        hidden, weight, bias, targets, mask, temperature, logit_scale, softcap, ignore_index, return_entropy, backend, budget
    )


def gathered(name: str, parameter, hidden: Tensor):
    """A sharded parameter whole, with a gradient that is averaged over the ranks and sharded again: what FSDP does to those it
    gathers itself. Under autocast in the dtype it will be used in."""
    if hasattr(parameter, "ds_id") and not parameter.numel():
        raise ValueError(
            f"{name}: partitioned by DeepSpeed ZeRO-3, accepted is a gathered one; call the head as a module, head(hidden, ...), "
            f"within the forward of the engine, or call this within deepspeed.zero.GatheredParameters([{name}])"
        )
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if parameter.device_mesh.ndim != 1:
        raise TypeError(f"{name}: a DTensor on a {parameter.device_mesh.ndim}-dimensional mesh given, accepted is one dimension")
    if parameter.placements[0].is_partial():
        raise TypeError(f"{name}: a DTensor of {parameter.placements[0]} given, accepted are Shard and Replicate")
    if torch.is_autocast_enabled(hidden.device.type) and parameter.dtype != torch.float64:
        parameter = parameter.to(torch.get_autocast_dtype(hidden.device.type))
    from torch.distributed.tensor import Partial  # half a second, which only those who shard should wait

    return parameter.full_tensor(grad_placements=[Partial("avg")])


def _check_rows_of(name: str, values, targets: Tensor, broadcast: bool = False) -> Tensor:
    """``values``, a constant, in the shape of ``targets``."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: {type(values).__name__} given, accepted is a Tensor")
    _check_constant(name, values)
    accepted = f"floating point of {tuple(targets.shape)} on {targets.device}"
    fits = values.shape == targets.shape or (broadcast and values.shape == (*targets.shape[:-1], 1))
    if not fits or not values.is_floating_point() or values.device != targets.device:
        raise ValueError(f"{name}: {values.dtype} of shape {tuple(values.shape)} on {values.device} given, accepted is {accepted}")
    return values.detach().expand(targets.shape)


def _check_constant(name: str, values) -> None:
    """Of an argument that no gradient flows to."""
    if isinstance(values, Tensor):
        _check_plain(name, values)
        derivatives.refuse({name: values})
        if derivatives.requires_grad(values):
            raise ValueError(f"{name}: requires a gradient, accepted is a tensor that does not; detach it")


def _check_finite(whole: dict[str, Tensor | None], by_row: dict[str, Tensor | None], active: Tensor) -> None:
    """``by_row``: [...] or [..., D], looked at where the row is active."""
    bad = {name: ~x.isfinite() for name, x in whole.items() if x is not None}
    for name, x in by_row.items():
        if x is not None:
            bad[name] = ~x.isfinite() & (active if x.dim() == active.dim() else active.unsqueeze(-1))
    for name, where in bad.items():
        if where.any():
            index = tuple(where.nonzero()[0].tolist())
            value = (whole.get(name) if name in whole else by_row[name])[index].item()
            raise ValueError(f"{name}: {value} at index {index} given, accepted are finite numbers")


def _check_plain(name: str, x: Tensor) -> None:
    """Of any tensor argument: its numbers lie in memory, or it is a weight that can be dequantised a slice of rows at a time."""
    if isinstance(x, UninitializedTensorMixin):
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
    for op in (ops.linear_statistics, ops.linear_statistics_backward, policy_op.linear_policy_loss):
        ops.run_as_it_is(op, type(x))


def _check_number(name: str, value, accepted: str, positive: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {type(value).__name__} given, accepted are {accepted}")
    if not (0 if positive else -math.inf) < value < math.inf:
        raise ValueError(f"{name}: {value} given, accepted are {accepted}")


def _check_tensors(hidden, weight, targets, bias, mask, temperature) -> None:
    named = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias, "mask": mask}
    for name, tensor in named.items():
        if tensor is None and name in ("bias", "mask"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__} given, accepted is a Tensor")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name}: a DTensor given, accepted is a plain Tensor (weight and bias may be DTensors)")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}, accepted is the device of hidden, {hidden.device}")
        _check_plain(name, tensor)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES and is_plain(tensor):
            raise TypeError(f"{name}: {called(tensor)} given, accepted are {', '.join(map(str, DTYPES))}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)} given, accepted is [..., D] with at least one leading dimension")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        accepted = f"[V, D] with D = {hidden.shape[-1]}, as in hidden, and at least one row"
        raise ValueError(f"weight: shape {tuple(weight.shape)} given, accepted is {accepted}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: {targets.dtype} given, accepted is torch.int64")
    leading = hidden.shape[:-1]
    if targets.shape != leading:
        raise ValueError(f"targets: shape {tuple(targets.shape)} given, accepted is {tuple(leading)}, as in hidden")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != leading):
        raise ValueError(f"mask: {mask.dtype} of shape {tuple(mask.shape)} given, accepted is torch.bool of {tuple(leading)}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != weight.shape[:1]):
        raise ValueError(
            f"bias: {bias.dtype} of shape {tuple(bias.shape)} given, accepted is floating point of ({weight.shape[0]},)"
        )
    _check_constant("temperature", temperature)
    if isinstance(temperature, Tensor) and not (
        temperature.shape == leading and temperature.is_floating_point() and temperature.device == hidden.device
    ):
        raise ValueError(
            f"temperature: {temperature.dtype} of shape {tuple(temperature.shape)} on {temperature.device} given, accepted "
            f"is a number, or floating point of {tuple(leading)} on {hidden.device}"
        )
