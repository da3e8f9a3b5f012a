"""On-policy internal self-distillation (OISD, arXiv 2605.29089): a layer of a model learns from the model's own policy, in RL.

With ``H^l`` the residual stream after layer ``l`` and ``p^l = softmax(norm(H^l) E_uᵀ)`` its policy, by way of the final norm, the
loss of a step is

    ``L = L_GRPO + λ · Σ w A JSD(p^l ‖ stopgrad(p^L)) + μ · Σ w A JSD(a^l ‖ stopgrad(a^L))``

over response tokens of advantage ``A`` and weight ``w``, the same as in ``L_GRPO``. What was done well is drawn towards the model's
own policy ``p^L``, what was done badly is pushed away from it; JSD lies in ``[0, ln 2]``, so that neither runs off. ``a^l`` is the
distribution of the attention of layer ``l`` over the tokens before. The paper has λ = 1 and μ = 0.1, both constant.

The paper's text was not at hand: the sum, its weights and the norm are as its readers state them. That ``A`` and ``w`` are those of
the policy loss, and that ``a^l`` is the mean of its layer's heads (those of two layers do not correspond), is a choice made here.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bupo_kernels.functional import weights_of
from bupo_kernels.internal_policy import backbone_of, policy_states, read_head
from bupo_kernels.policy_losses import PolicyMetrics, PolicyObjective, active_tokens
from bupo_kernels.structure import stack_of


class SelfDistillation(NamedTuple):
    """The loss of a step of OISD, and what it is made of; all but the loss is detached."""

    loss: Tensor  # [], of the policy and of both divergences
    metrics: PolicyMetrics  # of the policy's part
    divergence: Tensor  # [B, S], JSD(p^l ‖ p^L) in nats, 0 on tokens without weight
    attention: Tensor | None  # [B, S], JSD(a^l ‖ a^L) in nats, 0 on tokens without weight; None without its weight


def self_distillation_loss(
    model: nn.Module,
    input_ids: Tensor,  # [B, S] int64
    targets: Tensor,  # [B, S] int64
    advantages: Tensor,  # [B, S] or [B, 1]
    *,
    layer: int,
    divergence_weight: float = 1.0,
    attention_weight: float = 0.0,
    final_norm: bool = True,
    attention_mask: Tensor | None = None,  # [B, S]
    position_ids: Tensor | None = None,  # [B, S]
    model_options: dict | None = None,
    old_logprobs: Tensor | None = None,  # [B, S]
    reference_logprobs: Tensor | None = None,  # [B, S]
    sampler_logprobs: Tensor | None = None,  # [B, S]
    objective: PolicyObjective = PolicyObjective(),  # noqa: B008 (frozen)
    denominator: float | Tensor | None = None,
    lengths: Tensor | None = None,  # [n] int64
    entropy_bound: float | Tensor | None = None,
    **options: Any,
) -> SelfDistillation:
    """Return the loss of an RL step on the model's own policy with that of a layer which learns from it, in one forward.

    Args:
        model, input_ids, targets, attention_mask, position_ids, model_options: as in :func:`bupo_kernels.policy_logprobs`.
        layer: the layer that learns, from 1, below the last one.
        divergence_weight: λ, 0 and above.
        attention_weight: μ, 0 and above. With another than 0 the model must run with ``attn_implementation="eager"``, which keeps
            the attention of every head, ``[B, heads, S, S]``.
        final_norm: whether the layer's policy has the final norm, as in the paper.
        options: those of :func:`bupo_kernels.linear_logprobs` but for ``return_entropy``, for both policies.

    All others are as in :func:`bupo_kernels.linear_policy_loss`.

    Returns:
        :class:`SelfDistillation`. The model's own policy is a constant in the divergences: of these, gradients reach layers
        1..``layer``, the embedding, the final norm and the head, by way of the layer's policy alone.

    Cost: that of :func:`bupo_kernels.policy_loss` on all layers, and the head again as in :func:`bupo_kernels.linear_divergence`, 8
    N·V·D FLOP for tokens whose advantage is not 0; others cost nothing there.

    Raises ``ValueError`` naming the argument, and as the functions named above do.
    """
    backbone, depth = backbone_of(model)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < depth:
        raise ValueError(f"layer: {layer!r} given, accepted are 1 to {depth - 1} (layers count from 1, the last one teaches)")
    for name, value in (("divergence_weight", divergence_weight), ("attention_weight", attention_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: {value!r} given, accepted are 0 and above")
    if attention_weight and backbone.config._attn_implementation != "eager":
        given = backbone.config._attn_implementation
        raise ValueError(f"attention_weight: {attention_weight} given with attn_implementation={given!r}, accepted is 'eager'")
    watched: list[Any] = [stack_of(backbone)[number - 1] for number in (layer, depth)] if attention_weight else []
    if any(not hasattr(block, "self_attn") for block in watched):
        kind = type(backbone).__name__
        raise ValueError(f"attention_weight: {attention_weight} given with {kind}, accepted are models whose layers have self_attn")

    attentions: list[Tensor] = []

    def keep_attention(_: nn.Module, __: tuple, output: tuple) -> None:
        attentions.append(output[1])

    with ExitStack() as undo:
        for block in watched:
            undo.callback(block.self_attn.register_forward_hook(keep_attention).remove)
        states = policy_states(
            model,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            layer=layer,
            final_norm=final_norm,
            model_options=model_options,
        )
    student, final = states.internal, states.final
    if attention_weight and student.requires_grad and not attentions[0].requires_grad:
        raise ValueError("model: checkpoints activations with use_reentrant=True, accepted is use_reentrant=False")

    ignored, mask = options.get("ignore_index", -100), options.get("mask")
    active = active_tokens(targets, (targets != ignored) if mask is None else mask & (targets != ignored), sampler_logprobs)
    dtype = torch.promote_types(final.dtype, torch.float32)
    weights = weights_of(objective, active, denominator, dtype, options.get("row_group"))
    weights = weights * torch.where(active, advantages.to(dtype), 0)
    loss, metrics = read_head(
        model,
        final,
        targets=targets,
        advantages=advantages,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        sampler_logprobs=sampler_logprobs,
        objective=objective,
        denominator=denominator,
        lengths=lengths,
        entropy_bound=entropy_bound,
        **options,
    )
    for_both = {name: value for name, value in options.items() if name not in ("mask", "ignore_index", "row_group")}
    found = read_head(
        model,
        student,
        teacher_hidden=final.detach(),
        kind="jsd",
        mask=active,
        row_weights=divergence_weight * weights,
        reduction="sum",
        return_entropy=False,
        **for_both,
    )
    loss = loss + found.divergence
    attention = None
    if attention_weight:
        below, above = attentions
        per_token = attention_divergence(below, above, active & (weights != 0))
        loss = loss + attention_weight * (weights * per_token).sum()
        attention = per_token.detach()
    return SelfDistillation(loss, metrics, found.per_row, attention)


def attention_divergence(
    student: Tensor,  # [B, heads, S, S]
    teacher: Tensor,  # [B, heads, S, S]
    mask: Tensor,  # [B, S] bool
) -> Tensor:  # [B, S]
    """Return ``JSD(a ‖ stopgrad(b))`` of each token in ``mask``, in nats, of the means ``a`` and ``b`` over the heads of two
    layers' attention, probabilities over the last dimension; 0 elsewhere. It is differentiable in ``student``."""
    a, b = (x.transpose(1, 2)[mask].mean(1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher.detach()))
    middle = torch.where(a + b > 0, (a + b) / 2, 1)
    # Keys that are masked have probability 0 for good: they add nothing, and get a finite derivative, which the softmax drops.
    terms = [x * (torch.where(x > 0, x, 1) / middle).log() for x in (a, b)]
    values = (terms[0] + terms[1]).sum(-1) / 2
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
