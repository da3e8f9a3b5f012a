"""The ops as functions: the public face of policies from hidden states.

For a row with hidden vector ``h``, unembedding ``W`` and target ``y`` the logits are
``z_j = softcap(logit_scale · (h·W_j + b_j)) / temperature`` and

* logprob ``z_y − lse``, with ``lse = ln Σ_j e^(z_j)``
* entropy ``−Σ_j p_j ln p_j`` in nats, with ``p = softmax(z)`` (BuPO, arXiv 2512.19673, equation 7)

With ``h = H^l``, the residual stream after layer ``l``, this is the paper's internal layer policy (equation 5).

Numerics, the same for every op here. Products accumulate in fp32 and every statistic is taken from that accumulator, never from a
rounded logit; 16-bit inputs are exact. Against float64 on the same inputs
``|Δlogprob| ≤ (2e-6 + c · D/16 · 2⁻²⁴) · (1 + max|z|)``, with c = 0 on a CPU, 1 on the tensor cores of Hopper and newer, 2 on those
before, which truncate their fp32 sum after every 16 (8) terms (:func:`bupo_kernels.numerics.contract`). dH and dW are summed in
fp32 and rounded once, to the dtype of their tensor. The gradient of a logit is rounded once to a 16-bit input's dtype where tensor
cores multiply that (on a CPU AMX and AVX512-BF16, bf16 alone), on every backend (fp16: scaled by a power of two first), and stays
fp32 elsewhere. ``triton`` with its ``cached`` strategy takes p from a bf16 value: another 2⁻⁸ relative in p and 0.004 nat in log p,
never on the target. float64 inputs are computed in float64 throughout. fp32 products follow torch's own precision setting
(``torch.set_float32_matmul_precision``); the bound is for its default, ``"highest"``.

Under ``torch.compile`` a call is one node, whatever the number of rows, and gives bit for bit what it gives without. Off the CPU
``triton`` never waits for the device in the forward; ``native`` and ``torch`` wait once, to be told how many rows count, and in a
CUDA graph take all of them. A target or a temperature out of range is then a device-side assert. (:func:`logit_lens`, which has no
gradient, does wait, and is traced as the plain torch it is.)

A logit of −inf, by a ``bias`` of −inf or a product that overflows, is a column that cannot be chosen: its probability and its
gradient are exactly 0, and ``0 · ln 0 = 0`` in entropies and divergences. A target there has log-prob −inf and the finite gradient
p − onehot; a row that has no other logits has no policy: NaN. (Under a softcap the logit is −softcap, as the formula says: no
column is ruled out.) NaN, and +inf, in a row that counts makes all of the row's results and gradients NaN, and with them all of dW.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bupo_kernels import engine, ops, vocab_parallel
from bupo_kernels.backends import machine
from bupo_kernels.dispatch import Plan, default_memory_budget
from bupo_kernels.divergence import DivergencePlan
from bupo_kernels.policy_losses import (
    PolicyMetrics,
    PolicyObjective,
    active_tokens,
    batch_denominator,
    policy_metrics,
    policy_terms,
    token_weights,
    top_entropy_bound,
)
from bupo_kernels.request import REDUCTIONS, DivergenceRequest, Request, check_constant, check_rows_of
from bupo_kernels.row_parallel import Rows, together
from bupo_kernels.support import SupportPlan


class LinearLogprobs(NamedTuple):
    """Statistics of ``softmax(h Wᵀ)``, fp32 (float64 for float64 inputs), in the shape of ``targets``; 0.0 on masked rows."""

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
    support: tuple[Tensor, Tensor] | None = None,  # ids [M], offsets [N + 1], int64
    return_entropy: bool = True,
    group: torch.distributed.ProcessGroup | str | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
    check: bool = False,
) -> LinearLogprobs:
    """Return per-token log-prob, entropy and logsumexp of ``softmax(h Wᵀ)``, without ``[..., V]`` logits.

    Args:
        hidden: ``[..., D]``, fp32, bf16, fp16 or float64; any view, also a non-contiguous one.
        weight: the unembedding, ``[V, D]``, dtype of ``hidden``. Under autocast both are cast to its dtype, as
            ``F.linear`` would. A ``DTensor`` (FSDP2, HSDP) is gathered over its mesh, and its gradient averaged over the ranks of
            that, each of which brings rows of its own. A frozen weight that is quantised, of any dtype and class of which
            ``weight[a:b].dequantize()`` gives numbers (torchao's int8 and float8), stands for these: the ``torch`` backend reads
            it a slice at a time, outside of ``torch.compile``. A view of its first rows, ``weight[:n]``, leaves the padding of a
            vocabulary out, and costs n columns instead of V; autograd copies its gradient into one of all V rows.
        targets: ``[...]``, int64 ids in ``[0, V)``. A target equal to ``ignore_index`` masks its row.
        bias: ``[V]``, floating point. −inf rules a column out.
        temperature: positive; a float, or one value per row in the shape of ``targets``. No gradient flows to it.
        logit_scale: factor on the product, before the softcap (Cohere, Granite).
        softcap: if given, ``softcap · tanh(· / softcap)``, before the temperature (Gemma).
        mask: ``[...]`` bool, True = the row counts. Masked rows cost nothing: no product is formed for them.
        support: the ids that each row can have, as samplers with top-p, top-k or min-p keep them: with ``N`` rows, numbered
            through, row i has ``ids[offsets[i]:offsets[i + 1]]``, in any order. The policy is renormalised on them,
            ``p_j = e^(z_j) / Σ e^(z_k)`` over the row's ids, as if all other logits were −inf, and every result is of that policy.
            The work is that of M logits instead of N·V; see below.
        group: the ranks that the vocabulary lies on, a ``torch.distributed.ProcessGroup``. ``weight``, ``[V_r, D]``, and ``bias``,
            ``[V_r]``, are then those of this rank's columns, any number of them and also none; shards lie side by side in the order
            of the ranks, and ``V`` is the sum of their ``V_r``. All else is the same on every rank: hidden states, ``targets`` in
            ``[0, V)``, options. A ``DTensor`` that is ``Shard(0)`` over these ranks stands for its shard, and its gradient is
            sharded like it; with one, the name of its mesh's dimension is accepted too, and over the other dimensions it is
            gathered as without a group. See below.
        return_entropy: False skips the entropy; the field is then None.
        backend: ``"auto"``, ``"triton"``, ``"native"`` (C++ and CUDA) or ``"torch"``, or one with its strategy:
            ``"triton:recompute"``, ``"triton:cached"``, or an instruction set, as in ``"native:avx2"``; :func:`explain` says which
            would run, and why not the others.
        memory_budget: upper bound in bytes on working memory, what is kept for the backward included; 256 MiB by default on
            the CPU, elsewhere a sixteenth of the device's memory and at least 1 GiB. Outputs and gradients come on top, and for
            16-bit inputs one fp32 sum of dH; :func:`explain` states each. With a ``support`` it bounds the rows of ``hidden`` and
            ``weight`` that are copied; the logits and what they become take up to 72 bytes an id, of which 4 are kept for the
            backward.
        check: look for NaN and inf in the inputs first (this waits for the device), and name the first; with a ``support``, also
            for a row that counts and has no id, has an id twice, or has a target that is none of its ids.

    With a ``support`` a target that is none of its row's ids has log-prob −inf, and the gradient −p of the ids that are there, as
    with logits masked by −inf. A row of one id has log-prob and entropy 0, of which there is no gradient, and which cost nothing in
    the backward; its logsumexp is still that logit, and costs the forward one dot product. A row without an id has no policy: NaN,
    and no gradient. An id that stands twice in a row counts as two, of which the first is the target. Masked rows may have any ids,
    or none. dW is dense, and each of its rows is summed in one order: repeatable bit for bit, on a GPU too. It runs on ``native``
    on a CPU (but in float64), on ``torch`` anywhere, and on ``triton`` where that is asked for; a quantised weight is refused.

    With a ``group`` each rank streams its own columns, on any backend. One all-gather of four numbers a row (16 bytes; 32 of
    float64) makes the statistics those of all columns: they are merged in the order of the ranks, so that results are the same on
    every rank, and from run to run, bit for bit. In the backward one all-reduce sums dH over the ranks, in fp32 (float64), before
    it is rounded; gradients of ``weight`` and ``bias`` are this rank's, and nothing is sent for them. Upstream gradients are the
    same on all ranks, as of a loss that each takes of the results. Padding is left out by ``weight[:n]`` on the rank that has it,
    or by a bias of −inf. All ranks make the same calls in the same order. Before each they tell each other its sizes and options:
    what they differ in raises ``ValueError`` on all, and where one raises the others raise ``RuntimeError`` and name it, here or in
    the backward. Off the CPU, where that would be to wait for the device, it is a device-side assert (but for a one-pass loss,
    which waits). While ``torch.compile`` traces, a rank that raises cannot tell. It cannot be combined with a ``support``.

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
    request = Request.of(
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
        support=support,
        group=group,
        backend=backend,
        memory_budget=memory_budget,
    )
    if check:
        with request.telling():
            request.check_values()
    return logprobs_of(request)


def logprobs_of(request: Request) -> LinearLogprobs:
    """Return what :func:`linear_logprobs` does."""
    found = request.statistics()
    return LinearLogprobs(found.logprobs, found.entropy, found.logsumexp)


@together
def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64
    *,
    reduction: str = "mean",
    row_group: Any = None,
    check: bool = False,
    **options: Any,
) -> Tensor:
    """Return the cross entropy ``−logprob`` of ``softmax(h Wᵀ)``, without logits.

    Args:
        reduction: ``"mean"`` over the rows that count (0.0 when none does, where ``F.cross_entropy`` gives NaN), ``"sum"``,
            or ``"none"`` for the shape of ``targets`` with 0.0 on masked rows.
        row_group: for ``"mean"``, the ranks that have the rows of a batch, as in :func:`linear_policy_loss`: this is then the part
            of this rank in the mean over the rows of all.
        check: as in :func:`linear_logprobs`.
        options: those of :func:`linear_logprobs`, except ``return_entropy``.

    Returns:
        fp32 (float64 for float64 inputs), a scalar or ``[...]``. Gradients, numerics and errors as in
        :func:`linear_logprobs`.
    """
    request = Request.of(hidden, weight, targets, return_entropy=False, **options)
    with request.telling():
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: {reduction!r} given, accepted are 'mean', 'sum', 'none'")
        rows = _rows_of_mean(row_group, hidden, reduction)
        if check:
            request.check_values()
    losses = -logprobs_of(request).logprobs
    if reduction == "none":
        return losses
    return losses.sum() / (rows.sum(request.active().sum()).clamp(min=1) if reduction == "mean" else 1)


def _rows_of_mean(row_group: Any, hidden: Any, reduction: str) -> Rows:
    """Return the ranks over whose rows a mean is taken. Raise where none is."""
    if row_group is not None and reduction != "mean":
        raise ValueError(f"row_group: given with reduction={reduction!r}, accepted with 'mean'")
    return Rows(row_group, hidden)


@together
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
    lengths: Tensor | None = None,  # [n] int64
    entropy_bound: float | Tensor | None = None,
    row_group: Any = None,
    check: bool = False,
    **options: Any,
) -> tuple[Tensor, PolicyMetrics]:
    """Return the loss of an RL step on ``softmax(h Wᵀ)``, with its gradients taken while each chunk of logits is at hand.

    6·N·V·D FLOP forward and backward instead of 8, and memory for one chunk of rows. Objectives that need the log-probs of a whole
    sequence (``objective.needs_sequence``) or the entropies of the whole batch (``objective.needs_batch``) before any gradient take
    two passes, as :func:`linear_logprobs` would; so does the
    ``triton`` backend in fp32 or with a softcap. :func:`explain` with ``objective=`` says which. With a ``support`` the logits are
    few enough to be kept: there it is always a forward and a backward, of 6·M·D FLOP, and rows that have their target as their
    only id cost nothing in either.

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
        lengths: how many tokens each sequence of a packed batch has, of all tokens of ``targets``, numbered through; then these are
            the sequences. For ratios and importance weights of sequences; of the aggregations only ``"token-mean"`` goes with it.
        entropy_bound: the entropy at which ``objective.top_entropy_quantile`` divides the whole batch
            (:func:`bupo_kernels.policy_losses.top_entropy_bound`), so that it can span micro-batches and ranks; None takes that of
            the call. A token counts at the bound and above.
        row_group: the ``ProcessGroup`` of the ranks that have the rows of the batch, each its own: of data, context or Ulysses
            sequence parallelism. What is not given of denominator and entropy bound is then that of all their rows, and so are the
            metrics; the loss is this rank's part: losses and gradients of the ranks add up to those of one that has all rows.
            Where gradients are averaged instead (FSDP2, DDP, a DTensor weight), multiply the loss by the number of ranks. Every
            rank calls this, one without rows too, and where one raises all do. Sequences, where the objective or its aggregation
            is over them, lie whole on a rank; of token ratios with ``"token-mean"`` any rank may have any rows.
        check: as in :func:`linear_logprobs`, for the other inputs too.
        options: those of :func:`linear_logprobs`, except ``return_entropy``.

    Returns:
        The loss, a scalar in fp32 (float64 for float64 inputs), and detached :class:`PolicyMetrics` over the rows that were
        computed: those that count, without the ones of zero advantage where neither KL nor entropy bonus asks for them. Such rows
        cost no product at all, and rows on which a clip decides none for their gradient.

    Gradients of ``hidden``, ``weight`` and ``bias``, as in :func:`linear_logprobs`; scaled by the upstream gradient in the
    backward, which may run more than once, though not with ``create_graph``. Numerics and errors as there. Paper: with the hidden
    states of layer l and ``clip="ppo"`` this is InterGRPO of BuPO (arXiv 2512.19673, equation 9).
    """
    request = Request.of(hidden, weight, targets, return_entropy=True, **options)
    with request.telling():
        if not isinstance(objective, PolicyObjective):
            raise TypeError(f"objective: {type(objective).__name__} given, accepted is a PolicyObjective")
        advantages = check_rows_of("advantages", advantages, targets, broadcast=True)
        given = {"old_logprobs": old_logprobs, "reference_logprobs": reference_logprobs, "sampler_logprobs": sampler_logprobs}
        given = {name: x if x is None else check_rows_of(name, x, targets) for name, x in given.items()}
        check_constant("denominator", denominator)
        objective.require_inputs(reference_logprobs=reference_logprobs, sampler_logprobs=sampler_logprobs)
        check_constant("entropy_bound", entropy_bound)
        if entropy_bound is not None and not objective.needs_batch:
            raise ValueError("entropy_bound: given, accepted is None with an objective whose top_entropy_quantile is 1")
        _check_lengths(lengths, targets, objective)
        over_sequences = objective.aggregation != "token-mean" or (objective.needs_sequence and lengths is None)
        if targets.dim() == 1 and over_sequences:
            raise ValueError(f"hidden: shape {tuple(hidden.shape)} given, accepted is [..., S, D] for an objective over sequences")
        active = active_tokens(advantages, request.active(), sampler_logprobs)
        if check:
            constants = {name: x for name, x in given.items() if name != "sampler_logprobs"}
            request.check_values(active, **constants, advantages=advantages)
        # This is a message to the row group, and raises where one of it does: the ranks of the other columns hear of that too.
        weights = weights_of(objective, active, denominator, torch.promote_types(request.hidden.dtype, torch.float32), row_group)

    packed: dict[str, Any] = {"lengths": lengths, "entropy_bound": entropy_bound}
    if objective.needs_sequence or objective.needs_batch or request.support is not None:
        if not objective.needs_sequence:
            active = engine.rows_that_matter(objective, active, weights, advantages)
        found = logprobs_of(replace(request, mask=active & ~request.settled()))
        assert found.entropy is not None
        logprob, entropy = found.logprobs.detach(), found.entropy.detach()
        if objective.needs_batch and entropy_bound is None:
            packed["entropy_bound"] = top_entropy_bound(entropy, active, objective.top_entropy_quantile, row_group)
        terms = policy_terms(objective, logprob, entropy, advantages, mask=active, **given, **packed)
        # This has the value Σ w · loss, and its gradient: what is added to the loss is exactly zero, of a log-prob of −inf too.
        through = torch.where(terms.d_logprob == 0, 0, terms.d_logprob * (found.logprobs - logprob))
        through = through + terms.d_entropy * (found.entropy - entropy)
        loss = (weights.to(through.dtype) * (terms.loss + through)).sum()
    else:
        loss, logprob, entropy, *_ = ops.linear_policy_loss(
            *(request.hidden, request.weight, request.bias, request.targets, active, request.row_temperature),
            *(advantages, *given.values(), weights),
            *request.numbers,
            request.settings(objective.encoded).encode(),
        )
        active = engine.rows_that_matter(objective, active, weights, advantages)
        terms = policy_terms(objective, logprob, entropy, advantages, mask=active, **given)
    old, sampler = given["old_logprobs"], given["sampler_logprobs"]
    return loss, policy_metrics(terms, logprob, entropy, old, sampler, mask=active, row_group=row_group)


def weights_of(
    objective: PolicyObjective,
    active: Tensor,  # [...] bool
    denominator: float | Tensor | None,
    dtype: torch.dtype,
    row_group: Any = None,
) -> Tensor:  # [...]
    """Return the weight of each token's loss in the whole, of a ``row_group`` where one is given; a sequence is the last
    dimension."""
    sequences = active.reshape(math.prod(active.shape[:-1]), active.shape[-1])  # of no token either, where -1 would be any number
    aggregation, longest = objective.aggregation, objective.max_length
    if denominator is None:
        denominator = batch_denominator(sequences, aggregation, row_group).clamp(min=1)
    return token_weights(sequences, aggregation, denominator=denominator, max_length=longest, dtype=dtype).view(active.shape)


def _check_lengths(lengths: Tensor | None, targets: Tensor, objective: PolicyObjective) -> None:
    """Raise for lengths that are not those of the sequences packed in ``targets``."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64 or lengths.dim() != 1:
        given = f"{lengths.dtype} of shape {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: {given} given, accepted is an int64 tensor of one dimension")
    if lengths.device != targets.device:
        raise ValueError(f"lengths: on {lengths.device} given, accepted is the device of targets ({targets.device})")
    if objective.aggregation != "token-mean":
        raise ValueError(f"lengths: given, accepted is None with aggregation={objective.aggregation!r}")
    total, accepted = targets.numel(), "lengths of 0 and above that add up to the number of targets"
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        if (lengths < 0).any() or lengths.sum() != total:
            raise ValueError(f"lengths: {lengths.tolist()} given, accepted are {accepted} ({total})")
    else:
        torch._assert_async(((lengths >= 0).all() & (lengths.sum() == total)), f"lengths: accepted are {accepted}")


class LinearDivergence(NamedTuple):
    """The divergence of a student's policy from its teacher's, fp32 (float64 for float64 inputs), and what rows have of it; 0.0 on
    masked rows and on those of weight 0."""

    divergence: Tensor  # [...], each times its row's weight; or [], their sum or mean. In nats, differentiable
    entropy: Tensor | None  # [...] of the student, nats, in [0, ln V]; differentiable where divergence is [...]
    per_row: Tensor  # [...], without weights, at least 0; no gradient


@together
def linear_divergence(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D']
    teacher_weight: Tensor | None = None,  # [V, D']
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    teacher_top: tuple[Tensor, Tensor] | None = None,  # ids [..., k] int64, logprobs [..., k]
    row_weights: Tensor | None = None,  # [...] or [..., 1]
    reduction: str = "none",
    denominator: float | Tensor | None = None,
    teacher_bias: Tensor | None = None,  # [V]
    teacher_temperature: float | Tensor | None = None,  # or [...]
    teacher_logit_scale: float | None = None,
    teacher_softcap: float | None = None,
    row_group: Any = None,
    check: bool = False,
    **options: Any,
) -> LinearDivergence:
    """Return how far a student's policy ``p = softmax(h Wᵀ)`` is from its teacher's, ``q = softmax(h' W'ᵀ)``, without logits of all
    rows at once.

    Args:
        student_hidden, student_weight: as ``hidden`` and ``weight`` of :func:`linear_logprobs`.
        teacher_hidden: ``[..., D']``, of any width, for the same rows; fp32, bf16 or fp16, whatever the student's (float64 for
            both or for none).
        teacher_weight: the teacher's unembedding, ``[V, D']`` over the same vocabulary. None: the student's, as a constant. No
            gradient then flows to it through the teacher; for one, give it here too.
        kind: ``"forward_kl"``, ``KL(q ‖ p)``; ``"reverse_kl"``, ``KL(p ‖ q)``; ``"jsd"``, Jensen and Shannon's,
            ``½ KL(q ‖ M) + ½ KL(p ‖ M)`` with ``M = ½ (p + q)``, in [0, ln 2]; or ``"gjsd"``, generalised:
            ``β KL(q ‖ M) + (1−β) KL(p ‖ M)`` with ``M = β q + (1−β) p`` (GKD, arXiv 2306.13649, equation 1).
        beta: β of ``"gjsd"``. As in TRL, 0 is the forward KL and 1 the reverse (the limits of ``gjsd / β`` and ``gjsd / (1−β)``).
        teacher_top: in place of ``teacher_hidden``, what is left of a teacher that runs elsewhere: k ids for each row, each once,
            and their log-probs in its whole policy. All other ids are one bucket, of the probability 1 − Σ e^logprobs, and so they
            are for the student: the divergence is that of two policies of k + 1 outcomes, never above that of the whole ones.
            The student's part of the bucket is summed over its ids, and is exact however little of it is left. −inf is accepted.
            It runs on ``torch``, with one product fewer.
        row_weights: factors of the rows' divergences, of either sign, in the shape of the rows or one per sequence, ``[..., 1]``; a
            constant. Rows of weight 0 cost nothing.
        reduction: ``"none"``: the values of rows, times their weights. ``"sum"``, or ``"mean"`` over the rows that ``mask`` leaves
            (0.0 when there are none).
        denominator: replaces that number of rows in ``"mean"``, so that it can span micro-batches and ranks.
        row_group: for ``"mean"`` without a ``denominator``, the ranks that have the rows of a batch, as in
            :func:`linear_policy_loss`: ``divergence`` is then the part of this rank in the mean over the rows of all.
        teacher_temperature: the student's, if not given: both policies are softened alike.
        teacher_logit_scale, teacher_softcap, teacher_bias: those of the teacher's head. If not given: the student's where the head
            is the student's, and none where ``teacher_weight`` is given.
        check: look for NaN and inf in the inputs of both first, as in :func:`linear_logprobs`.
        options: ``bias``, ``temperature``, ``logit_scale`` and ``softcap`` of the student, ``mask``, ``return_entropy``,
            ``group``, ``backend`` and ``memory_budget``, as in :func:`linear_logprobs`; and its ``support``, on which both policies
            are renormalised: 2·M·(D + D') FLOP.

    Returns:
        :class:`LinearDivergence`. ``divergence`` is differentiable with respect to hidden states, weight and bias of the student,
        and to those of the teacher that require a gradient; of values of rows ``entropy`` is too. A KL is inf where the policy that
        it averages over gives some probability to what the other rules out; the forward KL has the finite gradient p − q there.

    Cost: of a sum or mean, whose gradients are taken in the forward, 2·N·V·(D + D') FLOP and as much again as its products for
    each trained operand: 6·N·V·D + 2·N·V·D' for a student with a frozen teacher. Values of rows form the products of both again
    in the backward, of the rows whose upstream gradient is not zero. ``memory_budget`` holds the logits of both sides of as many
    rows as it has room for, at least one; :func:`explain` says how many.

    With a ``group``, each rank of which has some of the rows of both weights and biases, those of one id on one rank
    (:func:`linear_logprobs`), all pass the same rows, ids of ``teacher_top`` that count all columns, and the same upstream
    gradients; and all get the same results and gradients of hidden states, bit for bit. It runs on ``torch``. In each pass over the
    logits a rank tells the others of every row 6 numbers for a KL, 7 for Jensen and Shannon's, k + 3 for a top of k, of 4 bytes (8
    of float64): maxima and sums before the divergence, and what its columns add to it before the gradients. The gradients of hidden
    states, of 4·D (4·D') bytes a row, are summed over the ranks once, before they are rounded; all else stays where it is.

    Numerics: as :func:`linear_logprobs`. With ε the bound on a log-prob's error there, a divergence D is within
    ``ε (2 + D + √(2 D))`` of float64 on the same inputs. Differentiable once, in reverse mode. Errors as there.
    """
    group, options = vocab_parallel.group_of(options, student_weight)
    with vocab_parallel.telling(group, student_hidden):
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: {reduction!r} given, accepted are {', '.join(map(repr, REDUCTIONS))}")
        if denominator is not None and reduction != "mean":
            raise ValueError(f"denominator: given with reduction={reduction!r}, accepted with 'mean'")
        check_constant("denominator", denominator)
        rows = _rows_of_mean(row_group, student_hidden, reduction)
        if row_group is not None and denominator is not None:
            raise ValueError("row_group: given with a denominator, accepted is one of the two")
        request = DivergenceRequest.of(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            kind=kind,
            beta=beta,
            row_weights=row_weights,
            teacher_top=teacher_top,
            teacher_bias=teacher_bias,
            teacher_temperature=teacher_temperature,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
            **options,
        )
        if check:
            request.check_values()
    weights = request.weights
    if reduction == "none":
        per_row, entropy = request.values()
        divergence = per_row if weights is None else torch.where(request.active, weights * per_row, 0)
    else:
        if weights is None:
            weights = torch.ones(request.active.shape, dtype=request.dtype, device=request.active.device)
        if reduction == "mean" and row_group is None:
            weights = weights / (request.student.active().sum().clamp(min=1) if denominator is None else denominator)
        divergence, per_row, entropy = request.total(weights)
        if row_group is not None:
            divergence = divergence / rows.sum(request.student.active().sum()).clamp(min=1)
    return LinearDivergence(divergence, entropy if request.student.return_entropy else None, per_row.detach())


def explain(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor | None = None,  # [...] int64
    *,
    objective: PolicyObjective | None = None,
    device: str | None = None,
    **options: Any,
) -> Plan | SupportPlan | DivergencePlan:
    """Return the plan that :func:`linear_logprobs` would follow for the same arguments, or, given an ``objective``,
    :func:`linear_policy_loss` with no row of zero advantage, or, given ``teacher_hidden`` or ``teacher_top``,
    :func:`linear_divergence`; no product is formed. ``print`` it.

    With a ``group`` the plan is of the columns that are here; ``plan.columns`` (of a divergence ``plan.columns_here``) says
    which, ``plan.wire`` how many bytes of a row this rank receives, and sends. Every rank calls this then, for they ask each other.

    Without ``targets`` every row counts. Which gradients are planned follows ``requires_grad`` of the operands and
    ``torch.is_grad_enabled()``. Under autocast the copies that it casts come on top of the stated bytes. Raises what
    :func:`linear_logprobs` would.

    ``device`` plans for a GPU that need not be there, with Triton and the CUDA kernels, as if both had passed their self-check,
    and for operands as if they were contiguous, whatever their strides (``expand`` makes some of any size in no memory):
    ``"H100"``, ``"H200"``, ``"B200"``, ``"A100"``, ``"L40S"``, ``"RTX 4090"`` or ``"RTX 5090"``. For these, and for a GPU that is
    there and is one of them, the plan predicts times: its own, those of naive logits in torch (materialised, log-softmax,
    backward) and those of the bare products, from counts and the public rates of the GPU (``bupo_kernels/backends/machine.py``).
    Where ``bupo tune`` has measured kernels on the GPU that is there, its measurements take the place of their predictions.

    Example:
        >>> print(explain(torch.randn(512, 64), torch.randn(1000, 64, requires_grad=True), backend="torch"))
        problem   512 of 512 rows x 1000 columns x 64, float32 on cpu, no gradient for hidden
        backend   torch: recompute, tiles of 512 x 1000
        forward   0.066 GFLOP, at least 0.37 MiB moved, 4.12 MiB of working memory
        ...
    """
    if options.get("teacher_hidden") is not None or options.get("teacher_top") is not None:
        if given := [name for name, x in (("targets", targets), ("objective", objective), ("device", device)) if x is not None]:
            raise TypeError(f"{given[0]}: given with a teacher, accepted is None")
        one_pass = options.pop("reduction", "none") != "none"
        return DivergenceRequest.of(hidden, weight, **options).plan(one_pass)
    if targets is None and isinstance(hidden, Tensor):
        targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    gpu = None if device is None else machine.named(device)
    if gpu is not None and options.get("memory_budget") is None:
        options["memory_budget"] = default_memory_budget(torch.device("cuda"), gpu)
    request = Request.of(hidden, weight, targets, **options)
    one_pass = objective is not None and not (objective.needs_sequence or objective.needs_batch)
    return request.plan(one_pass, gpu)
