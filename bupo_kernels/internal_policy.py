"""Internal layer, attention and FFN policies of a Hugging Face decoder (BuPO, arXiv 2512.19673, equations 5 and 6).

With ``A^l`` and ``F^l`` the terms that attention and FFN add in layer ``l`` and ``H^l`` the residual stream after it, the policies
are ``softmax(H^l E_uᵀ)``, ``softmax(A^l E_uᵀ)`` and ``softmax(F^l E_uᵀ)``, of logits that are scaled and capped as the model's own.
Layers count from 1. The decoders of transformers ≥ 5 run the layers of a stack one after the other and then a final norm; a stack
that shows its first layers only, and hooks on the last of them and on that norm are therefore enough: no modelling code is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bupo_kernels.functional import LinearDivergence, LinearLogprobs
from bupo_kernels.lens import LensStatistics
from bupo_kernels.modules import FusedLMHead
from bupo_kernels.policy_losses import PolicyMetrics
from bupo_kernels.structure import (
    MODULES,
    Stack,
    Structure,
    Term,
    accepts,
    check_packing,
    decoder_of,
    readout_of,
    stack_of,
    tensor_of,
    truncated,
    with_structure,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def internal_policy(model: nn.Module, layer: int, module: str = "layer", final_norm: bool = False) -> Iterator[nn.Module]:
    """Make ``model`` its own internal policy within the context: it runs layers 1..``layer`` only, and its head is given ``H^l``
    (``A^l``, ``F^l``) instead of the normed last hidden state.

    Args:
        model: a causal language model of transformers ≥ 5 whose decoder is a stack of layers and a final norm; tied or untied,
            with or without (non-reentrant) gradient checkpointing. Whether it is one is verified on the model itself, once for each
            layer and module: on a few tokens, layers 1..``layer`` alone must give what ``output_hidden_states`` has of ``layer``.
            Where FSDP2 or ZeRO-3 shard the weights that happens in the first forward within the context.
        layer: 1-based, up to the number of layers L. ``layer=L`` with ``module="layer"`` is the model's own policy, final
            norm included whatever ``final_norm`` says.
        module: ``"layer"`` reads the residual stream, ``"attention"`` and ``"ffn"`` the term that this module adds to it in layer
            ``layer``: its output, or, where a norm or a factor follows it (Gemma 2, OLMo 2, Granite), what that makes of it. The
            attention policy does not run the FFN of its layer where that can be left out.
        final_norm: whether the model's final norm is applied before the head. The paper does not, nor is it done here by default.

    Gradients: layers above ``layer``, and the final norm where it is not applied, get none (``grad`` stays None). Auxiliary losses
    of the routers of a mixture of experts are no part of a policy, and of nothing that is computed here.

    Neither ``model.config`` nor the parameters change: a checkpoint saved at any time, also inside the context, is of the
    full depth, and an exception leaves nothing behind. A KV cache must not live across the border of the context.

    Raises:
        ValueError: a model of another structure, with the difference that was measured; ``layer`` out of range, unknown
            ``module``, a context within another, and (from the forward of a module policy) reentrant activation checkpointing,
            which would lose its gradient.
    """
    backbone, depth = backbone_of(model)
    layer = _checked_policy(depth, layer, module, final_norm)
    if module == "layer" and layer == depth:
        yield model
        return
    layers = stack_of(backbone)
    block = layers[layer - 1]
    captured: list[Tensor] = []
    differentiable = True

    def return_term(_: nn.Module, __: tuple, block_output: Tensor | tuple) -> Tensor | tuple:
        nonlocal differentiable
        inner = captured.pop().view_as(tensor_of(block_output))
        differentiable = inner.requires_grad
        check_gradient(block, (tensor_of(block_output),))
        return (inner, *block_output[1:]) if isinstance(block_output, tuple) else inner

    def check_gradient(_: nn.Module, states: tuple[Tensor]) -> None:
        # Releases of transformers differ in whether a block's hooks run within its checkpoint. Where they do, the gradient shows
        # at the block; where not, at the norm.
        if states[0].requires_grad and not differentiable:
            raise ValueError("model: checkpoints activations with use_reentrant=True, accepted is use_reentrant=False")

    def install(found: Structure, undo: ExitStack) -> None:
        norm = backbone.get_submodule(found.norm)
        if module != "layer":
            _capture_term(block, _term(found, layer, module), captured, undo)
            # First of the block's hooks, since FSDP2's gather the block for the backward of the output that they see.
            undo.callback(block.register_forward_hook(return_term, prepend=True).remove)
            undo.callback(norm.register_forward_pre_hook(check_gradient).remove)
        if not final_norm:
            # The norm is still called, though its output is dropped: FSDP2 gathers a head that shares its unit around that call.
            undo.callback(norm.register_forward_hook(lambda _, inputs, __: inputs[0]).remove)
        if module == "attention" and (unread := found.terms[layer]["ffn"]).replaceable:
            undo.enter_context(_attribute(block.get_submodule(unread.path[0]), "forward", torch.clone))
        undo.enter_context(truncated(layers, layer))

    with with_structure(backbone, layer, module, install):
        yield model


def _term(found: Structure, layer: int, module: str) -> Term:
    """Return the term of ``module``. Raises ValueError where the layer has none."""
    terms = found.terms[layer]
    if module not in terms:
        raise ValueError(f"module: {module!r} given, accepted are 'layer' and 'ffn': layer {layer} of this model has no attention")
    return terms[module]


def _capture_term(block: nn.Module, term: Term, captured: list[Tensor], undo: ExitStack) -> None:
    """Have the ``term`` appended to ``captured`` whenever ``block`` runs."""
    seen: list[Tensor] = []  # the output of the last of the term's modules so far

    def begin(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
        seen[:] = [tensor_of(output)]
        finish(1)

    def go_on(place: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            if seen and inputs and inputs[0] is seen[0]:
                seen[:] = [output]
                finish(place + 1)

        return hook

    def finish(place: int) -> None:
        if place == len(term.path):
            # Not the tensor itself, into which a block may write the other term.
            captured.append(seen[0].clone() if term.factor == 1 else seen[0] * term.factor)

    first, *others = map(block.get_submodule, term.path)
    undo.callback(first.register_forward_hook(begin).remove)
    for place, module in enumerate(others, 1):
        undo.callback(module.register_forward_hook(go_on(place)).remove)


@contextmanager
def _attribute(owner: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set ``owner.name`` to ``value`` within the context; after it an attribute of the instance is back, one of the class shows."""
    absent = object()
    before = vars(owner).get(name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is absent else setattr(owner, name, before)


def policy_logprobs(
    model: nn.Module,
    input_ids: Tensor,  # [B, S] int64
    targets: Tensor,  # [B, S] int64
    *,
    attention_mask: Tensor | None = None,  # [B, S]
    position_ids: Tensor | None = None,  # [B, S]
    layer: int | None = None,
    module: str = "layer",
    final_norm: bool = False,
    model_options: dict | None = None,
    **options,
) -> LinearLogprobs:
    """Return log-prob, entropy and logsumexp of ``targets`` under the policy of ``layer``, or under the model's own.

    Args:
        model: as in :func:`internal_policy`.
        input_ids: ``[B, S]``.
        targets: ``[B, S]``; ``targets[b, i]`` is the token that follows position ``i`` (already shifted). Positions with
            ``ignore_index`` do not reach the head and cost no product there.
        attention_mask: ``[B, S]``, 1 = real token, for padded batches. Right padding needs none: nothing real looks at it.
            Positions are counted over the real tokens.
        position_ids: ``[B, S]``, restarting at 0 for every sequence of a packed batch. Not together with
            ``attention_mask``, which would let packed sequences see one another.
        layer, module, final_norm: the policy, as in :func:`internal_policy`; ``layer=None`` is the model's own.
        model_options: further arguments of the backbone's forward, e.g. those that a packed attention needs.
        options: those of :func:`bupo_kernels.linear_logprobs`. A ``support`` is that of the sampler, which draws from the model's
            own policy: an internal one is renormalised on the ids that this had kept, of which it may hold little probability.

    Returns:
        :class:`LinearLogprobs`, each field ``[B, S]`` fp32; gradients reach the head, the embedding and layers 1..``layer``.

    Raises:
        ValueError, TypeError: naming the argument, as the functions above do.
    """
    hidden = _hidden_states(model, layer, module, final_norm, input_ids, attention_mask, position_ids, model_options)
    return read_head(model, hidden, targets=targets, **options)


def policy_loss(
    model: nn.Module,
    input_ids: Tensor,  # [B, S] int64
    targets: Tensor,  # [B, S] int64
    advantages: Tensor,  # [B, S] or [B, 1]
    *,
    attention_mask: Tensor | None = None,  # [B, S]
    position_ids: Tensor | None = None,  # [B, S]
    layer: int | None = None,
    module: str = "layer",
    final_norm: bool = False,
    model_options: dict | None = None,
    **options,
) -> tuple[Tensor, PolicyMetrics]:
    """Return loss and metrics of an RL step on the policy of ``layer``, or on the model's own, with its head in one pass.

    Arguments as in :func:`policy_logprobs`; ``options`` and what is returned as in :func:`bupo_kernels.linear_policy_loss`. With
    the default objective and ``layer`` given it is InterGRPO of BuPO (arXiv 2512.19673, equation 9).
    """
    hidden = _hidden_states(model, layer, module, final_norm, input_ids, attention_mask, position_ids, model_options)
    return read_head(model, hidden, targets=targets, advantages=advantages, **options)


def policy_divergence(
    model: nn.Module,
    input_ids: Tensor,  # [B, S] int64
    mask: Tensor,  # [B, S] bool
    *,
    attention_mask: Tensor | None = None,  # [B, S]
    position_ids: Tensor | None = None,  # [B, S]
    layer: int,
    module: str = "layer",
    final_norm: bool = False,
    model_options: dict | None = None,
    kind: str = "reverse_kl",
    **options,
) -> LinearDivergence:
    """Return the divergence of the policy of ``layer``, the student, from the model's own, its teacher, where ``mask`` is True: by
    default ``KL(π^l ‖ π)``, ``[B, S]`` in nats.

    The model's own policy is a constant: gradients reach the head, the embedding and layers 1..``layer`` by way of the student
    alone.

    Arguments as in :func:`policy_logprobs`; ``kind``, ``options`` and what is returned as in
    :func:`bupo_kernels.linear_divergence`.
    """
    inputs = (input_ids, attention_mask, position_ids, model_options)
    with torch.no_grad():
        final = _hidden_states(model, None, "layer", False, *inputs)
    hidden = _hidden_states(model, layer, module, final_norm, *inputs)
    return read_head(model, hidden, teacher_hidden=final, mask=mask, kind=kind, **options)


@torch.no_grad()
def policy_lens(
    model: nn.Module,
    input_ids: Tensor,  # [B, S] int64
    targets: Tensor,  # [B, S] int64
    *,
    attention_mask: Tensor | None = None,  # [B, S]
    position_ids: Tensor | None = None,  # [B, S]
    model_options: dict | None = None,
    **options,
) -> LensStatistics:
    """Return the logit lens of a whole model, in one forward: of the policies of ``H^0`` (the embedding), ``H^1`` … ``H^L`` (raw,
    before the final norm), and last of the model's own; L + 2 in all.

    Arguments as in :func:`policy_logprobs`; ``options`` and what is returned, with ``[B, S]`` for each policy, as in
    :func:`bupo_kernels.logit_lens`. The ``final`` policy is the model's own. There is no gradient.
    """
    states = policy_states(model, input_ids, attention_mask=attention_mask, position_ids=position_ids, model_options=model_options)
    return read_head(
        model, [*states.residual, states.final], targets=targets, **{"outputs": ("entropy",), "final": states.final, **options}
    )


class PolicyStates(NamedTuple):
    """The hidden states of one forward of a whole model, each ``[B, S, D]``, with a gradient where those are enabled."""

    residual: list[Tensor]  # H^0 (the embedding), H^1 … H^L, before the final norm
    internal: Tensor  # what the head reads under the policy that was asked for
    final: Tensor  # what it reads under the model's own


def policy_states(
    model: nn.Module,
    input_ids: Tensor,  # [B, S] int64
    *,
    attention_mask: Tensor | None = None,  # [B, S]
    position_ids: Tensor | None = None,  # [B, S]
    layer: int | None = None,
    module: str = "layer",
    final_norm: bool = False,
    model_options: dict | None = None,
) -> PolicyStates:
    """Return what the policy of ``layer``, the model's own and those of all layers read, in one forward of all layers.

    Where both policies are looked at, that is cheaper than a forward for each. Arguments and errors as in
    :func:`policy_logprobs`; :func:`read_head` turns states into statistics.
    """
    backbone, depth = backbone_of(model)
    layer = _checked_policy(depth, layer, module, final_norm)
    own = module == "layer" and layer == depth
    residual: list[Tensor] = []
    captured: list[Tensor] = []

    def capture(_: nn.Module, arguments: tuple, named: dict) -> None:
        residual.append(arguments[0] if arguments else named["hidden_states"])

    def norm_the_policy(norm: nn.Module, _: tuple, __: Tensor) -> None:
        # Here its weight is whole, which FSDP2 may shard again behind it.
        captured[:] = [norm.forward(captured[0] if module != "layer" else residual[layer])]

    def install(found: Structure, undo: ExitStack) -> None:
        if position_ids is not None:
            check_packing(backbone, found, position_ids)
        layers, norm = stack_of(backbone), backbone.get_submodule(found.norm)
        for part in (*layers, norm):
            undo.callback(part.register_forward_pre_hook(capture, with_kwargs=True).remove)
        if module != "layer":
            _capture_term(layers[layer - 1], _term(found, layer, module), captured, undo)
        if final_norm and not own:
            undo.callback(norm.register_forward_hook(norm_the_policy).remove)

    with with_structure(backbone, layer, module, install):
        inputs = _inputs(backbone, input_ids, attention_mask, position_ids, model_options)
        final = backbone(**inputs).last_hidden_state
    internal = captured[0].view_as(final) if captured else residual[layer]
    return PolicyStates(residual, final if own else internal, final)


def _inputs(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    model_options: dict | None,
) -> dict[str, Any]:
    """Return the arguments of the backbone's forward, with positions that skip the padding."""
    if attention_mask is not None and position_ids is not None:
        raise ValueError("position_ids: given with attention_mask, accepted is one of the two (packed or padded, not both)")
    has_positions = accepts(backbone, "position_ids")
    if position_ids is not None and not has_positions:
        raise ValueError(f"position_ids: given, accepted is None: {type(backbone).__name__} counts positions by itself")
    if attention_mask is not None and has_positions:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return {name: value for name, value in named.items() if value is not None} | {"use_cache": False} | (model_options or {})


def _hidden_states(
    model: PreTrainedModel,
    layer: int | None,
    module: str,
    final_norm: bool,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    model_options: dict | None,
) -> Tensor:  # [B, S, D]
    """Return the hidden states that the head of this policy reads."""
    backbone, depth = backbone_of(model)
    layer = _checked_policy(depth, layer, module, final_norm)
    with ExitStack() as undo:
        if position_ids is not None:

            def install(found: Structure, _: ExitStack) -> None:
                check_packing(backbone, found, position_ids)

            undo.enter_context(with_structure(backbone, layer, module, install))
        undo.enter_context(internal_policy(model, layer, module, final_norm))
        return backbone(**_inputs(backbone, input_ids, attention_mask, position_ids, model_options)).last_hidden_state


def read_head(model: PreTrainedModel, hidden: Tensor | list[Tensor], **question: Any) -> Any:
    """Return the answer of the model's head, as :meth:`FusedLMHead.forward`, called as a module: FSDP gathers its weight there."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and not hasattr(head, "base_layer") and "readout" not in vars(head):
        question = readout_of(model, head) | question
    if type(head) is nn.Linear:
        return MethodType(FusedLMHead.forward, head)(hidden, **question)
    if not any(isinstance(part, FusedLMHead) for part in head.modules()):  # peft wraps it
        raise TypeError(f"model: its head is a {type(head).__name__}, accepted are nn.Linear and FusedLMHead")
    answer = head(hidden, **question)
    # An adapter that hands on no more than hidden answers with logits.
    if isinstance(answer, Tensor) and isinstance(hidden, Tensor) and answer.dim() == hidden.dim():
        raise TypeError(
            f"model: its head is a {type(head).__name__}, which answers with logits; accepted are LoRA and modules_to_save"
        )
    return answer


def backbone_of(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """Return the decoder of ``model`` and how many layers it has. Raise ValueError where it has none, or is truncated."""
    backbone = decoder_of(model)
    layers = stack_of(backbone)
    if isinstance(layers, Stack):
        raise ValueError("model: already an internal policy, accepted is one such context at a time")
    return backbone, len(layers)


def _checked_policy(depth: int, layer: int | None, module: str, final_norm: bool) -> int:
    """Return the number of the layer of a policy, which for None, the model's own, is the last."""
    if layer is None:
        if module != "layer" or final_norm:
            raise ValueError("layer: None given with module or final_norm, accepted is a layer number")
        return depth
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= depth:
        raise ValueError(
            f"layer: {layer!r} given, accepted are 1 to {depth} (layers count from 1, {depth} is the model's own policy)"
        )
    if module not in MODULES:
        raise ValueError(f"module: {module!r} given, accepted are {', '.join(map(repr, MODULES))}")
    return layer
