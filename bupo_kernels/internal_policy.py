"""Internal layer, attention and FFN policies of a Hugging Face decoder (BuPO, arXiv 2512.19673, equations 5 and 6).

With ``A^l`` and ``F^l`` the outputs of attention and FFN in layer ``l`` and ``H^l`` the residual stream after it, the policies are
``softmax(H^l E_uᵀ)``, ``softmax(A^l E_uᵀ)`` and ``softmax(F^l E_uᵀ)``. Layers count from 1. The decoders of transformers ≥ 5 all
loop over ``self.layers[: self.config.num_hidden_layers]`` and then call ``self.norm``; a truncated *copy* of the config and hooks
on the last block and on that norm are therefore enough, and no modelling code is copied or edited.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bupo_kernels.functional import LinearDivergence, LinearLogprobs
from bupo_kernels.lens import LensStatistics
from bupo_kernels.modules import FusedLMHead
from bupo_kernels.policy_losses import PolicyMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MODULES = ("layer", "attention", "ffn")


@contextmanager
def internal_policy(model: nn.Module, layer: int, module: str = "layer", final_norm: bool = False) -> Iterator[nn.Module]:
    """Make ``model`` its own internal policy within the context: it runs layers 1..``layer`` only, and its head is given ``H^l``
    (``A^l``, ``F^l``) instead of the normed last hidden state.

    Args:
        model: a causal language model of transformers ≥ 5 of type llama, mistral, qwen2 or qwen3; tied or untied,
            with or without (non-reentrant) gradient checkpointing.
        layer: 1-based, up to the number of layers L. ``layer=L`` with ``module="layer"`` is the model's own policy, final
            norm included whatever ``final_norm`` says.
        module: ``"layer"`` reads the residual stream, ``"attention"`` and ``"ffn"`` the output of that module in layer
            ``layer``. The attention policy does not run the FFN of its layer.
        final_norm: whether the model's final norm is applied before the head. The paper does not, nor is it done here by default.

    Gradients: layers above ``layer``, and the final norm where it is not applied, get none (``grad`` stays None).

    The depth is never written into ``model.config``: a checkpoint saved at any time, also inside the context, carries the
    full depth, and an exception leaves nothing behind. A KV cache must not live across the border of the context.

    Raises:
        ValueError: unknown model type, ``layer`` out of range, unknown ``module``, a context within another, and (from the
            forward of a module policy) reentrant activation checkpointing, which would lose its gradient.
    """
    backbone = _backbone(model)
    config, depth = backbone.config, backbone.config.num_hidden_layers
    if backbone.config is not model.config:
        raise ValueError("model: already an internal policy, accepted is one such context at a time")
    _checked_policy(backbone, layer, module, final_norm)
    if module == "layer" and layer == depth:
        yield model
        return

    block = backbone.layers[layer - 1]
    truncated = copy.copy(config)
    truncated.num_hidden_layers = layer
    captured: list[Tensor] = []
    differentiable = True

    def return_module_output(_: nn.Module, __: tuple, block_output: Tensor | tuple) -> Tensor | tuple:
        nonlocal differentiable
        inner = captured.pop()
        differentiable = inner.requires_grad
        check_gradient(block, (_tensor(block_output),))
        return (inner, *block_output[1:]) if isinstance(block_output, tuple) else inner

    def check_gradient(_: nn.Module, states: tuple[Tensor]) -> None:
        # Releases of transformers differ in whether a block's hooks run within its checkpoint. Where they do, the gradient shows
        # at the block; where not, at the norm.
        if states[0].requires_grad and not differentiable:
            raise ValueError("model: checkpoints activations with use_reentrant=True, accepted is use_reentrant=False")

    def save_whole(*arguments: Any, **options: Any) -> None:
        backbone.config = config
        try:
            type(backbone).save_pretrained(backbone, *arguments, **options)
        finally:
            backbone.config = truncated

    with ExitStack() as undo:
        if module != "layer":
            source = block.self_attn if module == "attention" else block.mlp
            undo.callback(source.register_forward_hook(lambda _, __, output: captured.append(_tensor(output))).remove)
            # First of the block's hooks, since FSDP2's gather the block for the backward of the output that they see.
            undo.callback(block.register_forward_hook(return_module_output, prepend=True).remove)
            undo.callback(backbone.norm.register_forward_pre_hook(check_gradient).remove)
        if not final_norm:
            # The norm is still called, though its output is dropped: FSDP2 gathers a head that shares its unit around that call.
            undo.callback(backbone.norm.register_forward_hook(lambda _, inputs, __: inputs[0]).remove)
        if module == "attention":
            undo.enter_context(_attribute(block.mlp, "forward", lambda hidden: hidden))  # its result is never read
        undo.enter_context(_attribute(backbone, "save_pretrained", save_whole))
        undo.enter_context(_attribute(backbone, "config", truncated))
        yield model


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
    inputs = _inputs(input_ids, attention_mask, position_ids, model_options)
    return read_head(model, _hidden_states(model, inputs, layer, module, final_norm), targets=targets, **options)


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
    inputs = _inputs(input_ids, attention_mask, position_ids, model_options)
    return read_head(
        model, _hidden_states(model, inputs, layer, module, final_norm), targets=targets, advantages=advantages, **options
    )


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
    inputs = _inputs(input_ids, attention_mask, position_ids, model_options)
    with torch.no_grad():
        final = _hidden_states(model, inputs, None, "layer", False)
    hidden = _hidden_states(model, inputs, layer, module, final_norm)
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
    inputs = _inputs(input_ids, attention_mask, position_ids, model_options)
    backbone = _backbone(model)
    layer = _checked_policy(backbone, layer, module, final_norm)
    own = module == "layer" and layer == len(backbone.layers)
    residual: list[Tensor] = []
    captured: list[Tensor] = []

    def capture(_: nn.Module, arguments: tuple, named: dict) -> None:
        residual.append(arguments[0] if arguments else named["hidden_states"])

    def norm_the_policy(norm: nn.Module, _: tuple, __: Tensor) -> None:
        # Here its weight is whole, which FSDP2 may shard again behind it.
        captured[:] = [norm.forward(captured[0] if module != "layer" else residual[layer])]

    with ExitStack() as undo:
        for part in (*backbone.layers, backbone.norm):
            undo.callback(part.register_forward_pre_hook(capture, with_kwargs=True).remove)
        if module != "layer":
            block = backbone.layers[layer - 1]
            source = block.self_attn if module == "attention" else block.mlp
            undo.callback(source.register_forward_hook(lambda _, __, output: captured.append(_tensor(output))).remove)
        if final_norm and not own:
            undo.callback(backbone.norm.register_forward_hook(norm_the_policy).remove)
        final = backbone(**inputs).last_hidden_state
    return PolicyStates(residual, final if own else captured[0] if captured else residual[layer], final)


def _inputs(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, model_options: dict | None
) -> dict[str, Any]:
    """Return the arguments of the backbone's forward, with positions that skip the padding."""
    if attention_mask is not None and position_ids is not None:
        raise ValueError("position_ids: given with attention_mask, accepted is one of the two (packed or padded, not both)")
    if attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    return named | (model_options or {})


def _hidden_states(
    model: PreTrainedModel, inputs: dict[str, Any], layer: int | None, module: str, final_norm: bool
) -> Tensor:  # [B, S, D]
    """Return the hidden states that the head of this policy reads."""
    backbone = _backbone(model)
    layer = _checked_policy(backbone, layer, module, final_norm)
    with internal_policy(model, layer, module, final_norm):
        return backbone(**inputs).last_hidden_state


def read_head(model: PreTrainedModel, hidden: Tensor | list[Tensor], **question: Any) -> Any:
    """Return the answer of the model's head, as :meth:`FusedLMHead.forward`, called as a module: FSDP gathers its weight there."""
    head = model.get_output_embeddings()
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


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the decoder of ``model``. Raise ValueError unless it is one of :data:`MODEL_TYPES`."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in MODEL_TYPES or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"model: of type {model_type!r}, accepted are causal language models of type {', '.join(MODEL_TYPES)}")
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model  # peft wraps the model


def _checked_policy(backbone: PreTrainedModel, layer: int | None, module: str, final_norm: bool) -> int:
    """Return the number of the layer of a policy, which for None, the model's own, is the last."""
    depth = int(backbone.config.num_hidden_layers)
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


def _tensor(output: Tensor | tuple) -> Tensor:
    """Return the hidden states in the output of a block, which releases of transformers give alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
