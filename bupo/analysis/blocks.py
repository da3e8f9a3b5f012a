"""The seven points of a decoder's block, read by hooks: no modelling code is copied or edited.

A block reads the residual stream ``H^{l-1}`` and adds to it twice: ``H^l = H^{l-1} + A^l + F^l`` (BuPO, arXiv 2512.19673,
equation 4). ``A^l`` and ``F^l`` are here the *added* terms: the output of attention or FFN, or that of the norm behind it (Gemma 2
and 3, OLMo 2, GLM 4), times Granite's residual multiplier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bupo_kernels import FusedLMHead
from bupo_kernels.integrations.readout import Unmeasured, measure_readout

FEED_FORWARD = ("mlp", "feed_forward")  # The families call it one or the other; attention is self_attn in all.


class UnsupportedModel(ValueError):
    """A model that cannot be looked into; the message names its type, what it has, and what is accepted."""


class BlockStates(NamedTuple):
    """The states that one block reads and writes, ``[B, S, D]`` each in the model's dtype."""

    number: int  # l, from 1
    previous: Tensor  # H^{l-1}
    attention_input: Tensor  # what attention reads: LN1(H^{l-1})
    attention: Tensor  # A^l
    attention_residual: Tensor  # H^{l-1} + A^l
    ffn_input: Tensor  # what the FFN reads: LN2(H^{l-1} + A^l); in a parallel block (Cohere) LN1(H^{l-1})
    ffn: Tensor  # F^l
    layer: Tensor  # H^l


@contextmanager
def residual_points(model: PreTrainedModel, receive: Callable[[BlockStates], None]) -> Iterator[None]:
    """Hand the states of block after block to ``receive`` in every forward of ``model`` within the context, and keep nothing.

    The last block's ``layer`` is the raw ``H^L``, which the head reads behind the final norm. However the context ends, the hooks
    are gone.

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
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch the dropout of ``model`` off within the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of ``model`` with ``layers`` and final ``norm``. Raises :class:`UnsupportedModel` where there is none."""
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


def readout_options(model: PreTrainedModel) -> dict[str, float]:
    """Measure the readout of ``model``, by options of :func:`bupo_kernels.logit_lens`: ``logit_scale`` and ``softcap``.

    Raises :class:`UnsupportedModel` where it is something else. A model that cannot be measured is taken to have neither.
    """
    head = model.get_output_embeddings()
    try:
        return measure_readout(model, head, head).options
    except Unmeasured:
        return {}
    except ValueError as error:
        raise UnsupportedModel(str(error)) from None


@torch.no_grad()
def check_readout(model: PreTrainedModel, input_ids: Tensor) -> None:  # [1, S] int64
    """Raise :class:`UnsupportedModel` unless the logits of ``model`` at the last position are those of its head and its readout.

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
        if ((mine.flatten() - own).abs() > bound).any():  # what is not finite is no matter of the readout, and refused later
            raise UnsupportedModel(
                f"model: of type {_type(model)!r}, whose logits are not those of its head: logsumexp or log-prob "
                f"{own.item():.6g}, read off {mine.item():.6g}; accepted are models whose logits are "
                "softcap(logit_scale · h Wᵀ)"
            )


def _watch(block: nn.Module, number: int, model_type: str, receive: Callable[[BlockStates], None], undo: ExitStack) -> None:
    """Put hooks on ``block`` that hand its states to ``receive``, and their removal into ``undo``."""
    feed_forward = next(getattr(block, name) for name in FEED_FORWARD if hasattr(block, name))
    modules: dict[str, nn.Module] = {"attention": block.get_submodule("self_attn"), "ffn": feed_forward}
    states: dict[str, Tensor] = {}

    def enter(_, arguments: tuple, options: dict) -> None:
        states.clear()
        states["previous"] = _input(arguments, options)

    def replace_by_norm(_, arguments: tuple, output: Tensor | tuple) -> None:
        for name in modules:
            if arguments and arguments[0] is states.get(name):
                states[name] = _output(output)

    def leave(_, __, output: Tensor | tuple) -> None:
        multiplier = getattr(block, "residual_multiplier", 1.0)
        for name in modules:
            states[name] = states[name] if multiplier == 1 else states[name] * multiplier
        middle = states["previous"] + states["attention"]
        whole = BlockStates(number, **states, attention_residual=middle, layer=_output(output))
        states.clear()
        _check_sum(whole, model_type)
        receive(whole)

    def watch_module(name: str, module: nn.Module) -> None:
        def before(_, arguments: tuple, options: dict) -> None:
            states[f"{name}_input"] = _input(arguments, options)

        def after(_, __, output: Tensor | tuple) -> None:
            states[name] = _output(output)

        undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(after).remove)

    undo.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    undo.callback(block.register_forward_hook(leave).remove)
    for name, module in modules.items():
        watch_module(name, module)
    for child in block.children():
        if not any(child is module for module in modules.values()):
            undo.callback(child.register_forward_hook(replace_by_norm).remove)


def _check_sum(states: BlockStates, model_type: str) -> None:
    """Raise :class:`UnsupportedModel` where the terms miss their sum by more than twice what two roundings may do to it."""
    parts = [x.float() if x.dtype.itemsize < 4 else x for x in (states.previous, states.attention, states.ffn, states.layer)]
    previous, attention, ffn, layer = parts
    allowed = (previous.abs() + attention.abs()).add_(ffn.abs()).mul_(2 * torch.finfo(states.layer.dtype).eps)
    wrong = (previous + attention).add_(ffn).sub_(layer).abs_()
    if bool((wrong > allowed).any()):
        raise UnsupportedModel(
            f"model: of type {model_type!r}, in whose layer {states.number} H^(l-1) + A^l + F^l differs from H^l by "
            f"{wrong.max().item():.3g}; accepted are blocks that add the output of self_attn and of the FFN to the residual stream"
        )


def _input(arguments: tuple, options: dict) -> Tensor:
    return arguments[0] if arguments else options["hidden_states"]


def _output(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _type(model: PreTrainedModel) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)
