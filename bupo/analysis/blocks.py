"""The seven points of a decoder's block, seen by hooks: no modelling code is copied or edited.

A block reads the residual stream ``H^{l-1}`` and adds to it twice: ``H^l = H^{l-1} + A^l + F^l`` (BuPO, arXiv 2512.19673,
equation 4). ``A^l`` and ``F^l`` are here what is *added*: the output of attention or FFN, or that of the norm behind it (Gemma 2
and 3, OLMo 2, GLM 4), times Granite's residual multiplier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bupo_kernels import FusedLMHead

FEED_FORWARD = ("mlp", "feed_forward")  # what the families call it; attention is self_attn in all


class UnsupportedModel(ValueError):
    """Names the model's type, what it has, and what is accepted."""


class BlockStates(NamedTuple):
    """What one block reads and writes, ``[B, S, D]`` each in the model's dtype."""

    number: int  # l, from 1
    previous: Tensor  # H^{l-1}
    attention_input: Tensor  # what attention reads: LN1(H^{l-1})
    attention: Tensor  # A^l
    attention_residual: Tensor  # H^{l-1} + A^l
    ffn_input: Tensor  # what the FFN reads: LN2(H^{l-1} + A^l); in a parallel block (Cohere) LN1(H^{l-1})
    ffn: Tensor  # F^l
    layer: Tensor  # H^l


@contextmanager
def residual_points(model: nn.Module, receive: Callable[[BlockStates], None]) -> Iterator[None]:
    """Within the context every forward of ``model`` hands the states of block after block to ``receive``; nothing is kept.

    The last block's ``layer`` is the raw ``H^L``; what the head reads is that behind the final norm. The hooks are gone when the
    context ends, however it ends.

    Args:
        model: a causal language model of transformers ≥ 5 whose blocks have a ``self_attn`` and an ``mlp`` (or ``feed_forward``).

    Raises:
        UnsupportedModel: the model has no such blocks; or, from the forward, ``H^{l-1} + A^l + F^l`` is not ``H^l`` within the
            rounding of the dtype, so that these would not be the points of this block.
    """
    blocks = decoder_of(model).layers
    with ExitStack() as undo:
        for number, block in enumerate(blocks, 1):
            _watch(block, number, _type(model), receive, undo)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` without dropout within the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of ``model`` that has ``layers`` and the final ``norm``. Raises :class:`UnsupportedModel` where there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise UnsupportedModel(
            f"model: of type {_type(model)!r}, accepted are causal language models with `layers` and a final `norm`"
        )
    for block in blocks:
        if not hasattr(block, "self_attn") or not any(hasattr(block, name) for name in FEED_FORWARD):
            raise UnsupportedModel(
                f"model: of type {_type(model)!r}, whose blocks have {', '.join(name for name, _ in block.named_children())}; "
                f"accepted are blocks with self_attn and {' or '.join(FEED_FORWARD)}"
            )
    return decoder


def readout_options(model: nn.Module) -> dict[str, float]:
    """How ``model`` turns the head's product into logits, as options of :func:`bupo_kernels.logit_lens`."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return {"logit_scale": float(scale)} | ({} if softcap is None else {"softcap": float(softcap)})


@torch.no_grad()
def check_readout(model: nn.Module, input_ids: Tensor) -> None:  # [1, S] int64
    """Raises :class:`UnsupportedModel` unless the logits of ``model`` at the last position are those of its head and its readout.

    Its head becomes a :class:`FusedLMHead` in place (TypeError where it is no plain ``nn.Linear``).
    """
    head = FusedLMHead.adopt(model.get_output_embeddings())
    logits = model(input_ids, use_cache=False).logits[0, -1:].double()
    hidden = decoder_of(model)(input_ids, use_cache=False).last_hidden_state[:, -1:]  # [1, 1, D]: one layer, one row
    ours = head(hidden, logits.argmax(-1), outputs=("logsumexp", "logprobs"), **readout_options(model))
    theirs = logits.logsumexp(-1), logits.log_softmax(-1).amax(-1)
    # The model's own logits are rounded to its dtype; a factor or a cap too many or too few changes far more.
    bound = 8 * torch.finfo(hidden.dtype).eps * (1 + logits.abs().max())
    for mine, own in zip((ours.logsumexp, ours.logprobs), theirs, strict=True):
        if not ((mine.flatten() - own).abs() <= bound).all():
            raise UnsupportedModel(
                f"model: of type {_type(model)!r}, whose logits are not those of its head: logsumexp or log-prob "
                f"{own.item():.6g}, read off {mine.item():.6g}; accepted are models whose logits are "
                "softcap(logit_scale · h Wᵀ) with the factors in the config"
            )


def _watch(block: nn.Module, number: int, model_type: str, receive: Callable[[BlockStates], None], undo: ExitStack) -> None:
    modules = {"attention": block.self_attn, "ffn": next(getattr(block, name) for name in FEED_FORWARD if hasattr(block, name))}
    seen: dict[str, Tensor] = {}

    def enter(_, arguments: tuple, options: dict) -> None:
        seen.clear()
        seen["previous"] = _read(arguments, options)

    def stand_behind(_, arguments: tuple, output: Tensor | tuple) -> None:
        for name in modules:
            if arguments and arguments[0] is seen.get(name):
                seen[name] = _tensor(output)

    def leave(_, __, output: Tensor | tuple) -> None:
        multiplier = getattr(block, "residual_multiplier", 1.0)
        for name in modules:
            seen[name] = seen[name] if multiplier == 1 else seen[name] * multiplier
        states = BlockStates(number, **seen, attention_residual=seen["previous"] + seen["attention"], layer=_tensor(output))
        seen.clear()
        _check_sum(states, model_type)
        receive(states)

    def watch_module(name: str, module: nn.Module) -> None:
        def before(_, arguments: tuple, options: dict) -> None:
            seen[f"{name}_input"] = _read(arguments, options)

        def after(_, __, output: Tensor | tuple) -> None:
            seen[name] = _tensor(output)

        undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(after).remove)

    undo.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    undo.callback(block.register_forward_hook(leave).remove)
    for name, module in modules.items():
        watch_module(name, module)
    for child in block.children():
        if not any(child is module for module in modules.values()):
            undo.callback(child.register_forward_hook(stand_behind).remove)


def _check_sum(states: BlockStates, model_type: str) -> None:
    """Twice what two roundings may do to the sum."""
    parts = [x.float() if x.dtype.itemsize < 4 else x for x in (states.previous, states.attention, states.ffn, states.layer)]
    previous, attention, ffn, layer = parts
    allowed = (previous.abs() + attention.abs()).add_(ffn.abs()).mul_(2 * torch.finfo(states.layer.dtype).eps)
    wrong = (previous + attention).add_(ffn).sub_(layer).abs_()
    if bool((wrong > allowed).any()):
        raise UnsupportedModel(
            f"model: of type {model_type!r}, in whose layer {states.number} H^(l-1) + A^l + F^l differs from H^l by "
            f"{wrong.max().item():.3g}; accepted are blocks that add the output of self_attn and of the FFN to the residual stream"
        )


def _read(arguments: tuple, options: dict) -> Tensor:
    return arguments[0] if arguments else options["hidden_states"]


def _tensor(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)
