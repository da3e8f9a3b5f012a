"""Faces of the ops as ``nn.Module``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import MethodType
from typing import ClassVar

import torch
from torch import Tensor, nn

from bupo_kernels.functional import LinearLogprobs, linear_logprobs, linear_policy_loss
from bupo_kernels.lens import LensStatistics, linear_divergence, logit_lens
from bupo_kernels.policy_losses import PolicyMetrics


class FusedLMHead(nn.Linear):
    """The unembedding of a language model, which can answer with statistics instead of logits.

    A plain ``nn.Linear`` in every other respect: the same parameters under the same state-dict keys, and ``head(hidden)``
    still gives logits, so generation and saving work unchanged. The weight is only ever read inside :meth:`forward`, which is
    what sharded training needs (FSDP2 gathers a module's parameters around its forward).

    ``readout`` holds what the model goes on to do with these logits, as ``logit_scale`` and ``softcap``: statistics are those of
    the model's logits. Either of the two, given in a call, stands in its place and is not applied on top.
    """

    readout: ClassVar[dict[str, float]] = {}  # an instance may have its own

    @classmethod
    def adopt(cls, linear: nn.Linear) -> FusedLMHead:
        """Turns ``linear`` into a :class:`FusedLMHead` in place and returns it; its parameters, ties and hooks stay.

        Raises ``TypeError`` unless ``linear`` is an ``nn.Linear`` itself: a subclass (LoRA, quantised) may not compute
        ``hidden @ weight.T``; ``ValueError`` for one whose ``forward`` somebody has replaced, who would not hand targets on.
        """
        if type(linear) is cls:
            return linear
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear: {type(linear).__name__} given, accepted is a plain nn.Linear")
        check_forward("linear", linear)
        change_class(linear, cls)
        return linear

    def forward(
        self,
        hidden: Tensor | Sequence[Tensor],
        targets: Tensor | None = None,
        advantages: Tensor | None = None,
        *,
        reference: Tensor | None = None,
        outputs: Sequence[str] | None = None,
        **options,
    ) -> Tensor | LinearLogprobs | LensStatistics | tuple[Tensor, PolicyMetrics]:
        """Logits ``[..., V]`` of ``hidden[..., D]``; given ``targets[...]``, :class:`LinearLogprobs`, with the options of
        :func:`bupo_kernels.linear_logprobs`; given ``advantages`` too, what :func:`bupo_kernels.linear_policy_loss` returns, with
        its options; given ``reference[..., D]`` alone, :func:`bupo_kernels.linear_divergence` from it; given ``outputs``,
        :func:`bupo_kernels.logit_lens` of ``hidden``, those of several layers (``bias`` is always the module's own)."""
        if targets is not None or advantages is not None or reference is not None or outputs is not None:
            options = getattr(self, "readout", {}) | options  # internal_policy lends this forward to a plain nn.Linear
            if not torch.compiler.is_compiling():
                _check_caller(self)
        if outputs is not None:
            if reference is not None or advantages is not None:
                raise TypeError("outputs: given with reference or advantages, accepted only without them")
            return logit_lens(hidden, self.weight, targets, outputs=outputs, bias=self.bias, **options)
        if reference is not None and (targets is not None or advantages is not None):
            raise TypeError("reference: given with targets or advantages, accepted only without them")
        if reference is not None:
            return linear_divergence(hidden, reference, self.weight, bias=self.bias, **options)
        if targets is None and advantages is not None:
            raise TypeError("advantages: given without targets, accepted only with them")
        if targets is None:
            if options:
                raise TypeError(f"{', '.join(options)}: given without targets, accepted only with them")
            return nn.functional.linear(hidden, self.weight, self.bias)
        if advantages is not None:
            return linear_policy_loss(hidden, self.weight, targets, advantages, bias=self.bias, **options)
        return linear_logprobs(hidden, self.weight, targets, bias=self.bias, **options)


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """``module`` becomes a ``kind``, also where the ``forward`` of its old class is held on the instance: accelerate's hooks (of a
    ``device_map``, of offloading) call it from there, and leave it there when they are taken off."""
    for name in ("forward", "_old_forward"):
        if _is_of_its_class(module, vars(module).get(name)):
            vars(module)[name] = MethodType(kind.forward, module)
    module.__class__ = kind


def check_forward(argument: str, module: nn.Module) -> None:
    """Raises ValueError where ``module`` has a ``forward`` of its own that :func:`change_class` would not reach."""
    forward = vars(module).get("forward")
    hooked = vars(module).get("_old_forward") if "_hf_hook" in vars(module) else forward  # accelerate's calls that one
    if forward is not None and not _is_of_its_class(module, hooked):
        name = getattr(forward, "__qualname__", None) or type(forward).__qualname__
        raise ValueError(
            f"{argument}: the forward of its {type(module).__name__} has been replaced ({name}) by one that calls what it was "
            "before, accepted is its class's own, or accelerate's; fuse the head first, and replace its forward then, by one that "
            "hands all arguments on"
        )


def _is_of_its_class(module: nn.Module, method) -> bool:
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is type(module).forward


def _check_caller(head: nn.Module) -> None:
    """Raises ValueError where an adapter that was put around ``head`` asks for statistics, which it would go on with as logits.

    ``head`` does not know of it, so the stack is looked at: the first module up there that is not ``head`` is who has called it.
    """
    frame, caller = sys._getframe(2), None
    for _ in range(12):  # a hook or two between the forward of an adapter and this one
        caller = frame.f_locals.get("self")
        if frame.f_back is None or (isinstance(caller, nn.Module) and caller is not head):
            break
        frame = frame.f_back
    if not isinstance(caller, nn.Module) or vars(caller).get("_modules", {}).get("base_layer") is not head:
        return
    if not any(getattr(caller, name, False) for name in ("takes_statistics", "disable_adapters", "merged")):
        kind = type(caller)
        raise ValueError(
            f"model: a {kind.__module__}.{kind.__name__} was put around its head after that was fused, accepted are heads fused "
            "with their adapters; call apply_fused_head(model) again after LoRA, and leave the head out of what others target"
        )
