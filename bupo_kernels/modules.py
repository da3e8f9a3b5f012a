"""The functions of this library as one module: the head of a language model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bupo_kernels.functional import LinearDivergence, LinearLogprobs, linear_divergence, linear_logprobs, linear_policy_loss
from bupo_kernels.lens import LensStatistics, logit_lens
from bupo_kernels.parallel_heads import check_parallel, is_parallel, take_parallel
from bupo_kernels.policy_losses import PolicyMetrics

# Arguments that ask the head for more than logits.
QUESTIONS = ("targets", "advantages", "teacher_hidden", "teacher_top", "outputs")
# The function that answers, by which of them are given. It is called with hidden and weight, and by name with these, bias and
# options.
ANSWERS: dict[tuple[str, ...], Callable[..., Any]] = {
    (): nn.functional.linear,
    ("targets",): linear_logprobs,
    ("targets", "advantages"): linear_policy_loss,
    ("teacher_hidden",): linear_divergence,
    ("teacher_top",): linear_divergence,
    ("outputs",): logit_lens,
    ("targets", "outputs"): logit_lens,
}
# An argument, and those that it excludes.
EXCLUDES = {
    "outputs": ("teacher_hidden", "teacher_top", "advantages"),
    "teacher_hidden": ("targets", "advantages", "teacher_top"),
    "teacher_top": ("targets", "advantages"),
}

Kind = TypeVar("Kind", bound=nn.Module)


class FusedLMHead(nn.Linear):
    """The unembedding of a language model, which can answer with statistics instead of logits.

    It is a plain ``nn.Linear`` in every other respect: the same parameters under the same state-dict keys, and ``head(hidden)``
    still gives logits, so generation and saving work unchanged. The weight is only ever read inside :meth:`forward`, which is
    what sharded training needs (FSDP2 gathers a module's parameters around its forward).

    Where a framework puts its vocabulary on several ranks (torch's ``ColwiseParallel``, before or after :meth:`adopt`, and
    transformers' ``tp_plan``), statistics are those of all of it, the same on every rank of the group, of the hidden states of all
    rows; logits are what the framework makes of them. Below FSDP2 too.

    ``readout`` holds what the model goes on to do with these logits, as ``logit_scale`` and ``softcap``: statistics are those of
    the model's logits. Either of the two, given in a call, stands in its place and is not applied on top.
    """

    readout: Mapping[str, float] = {}  # an instance may have its own

    @classmethod
    def adopt(cls, linear: nn.Linear) -> FusedLMHead:
        """Turn ``linear`` into a :class:`FusedLMHead` in place and return it; its parameters, ties and hooks stay.

        Raises ``TypeError`` unless ``linear`` is an ``nn.Linear`` itself: a subclass (LoRA, quantised) may not compute
        ``hidden @ weight.T``; ``ValueError`` for one whose ``forward`` somebody has replaced, who would not hand targets on.
        """
        if type(linear) is cls:
            return linear
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear: {type(linear).__name__} given, accepted is a plain nn.Linear")
        check_parallel("linear", linear)
        check_forward("linear", linear)
        take_parallel(linear)
        return change_class(linear, cls)

    def register_forward_pre_hook(self, hook: Callable, **options: Any) -> RemovableHandle:
        """Register a hook as any module does, but one of tensor parallelism for logits alone."""
        handle = super().register_forward_pre_hook(hook, **options)
        take_parallel(self)
        return handle

    def register_forward_hook(self, hook: Callable, **options: Any) -> RemovableHandle:
        """Register a hook as any module does, but one of tensor parallelism for logits alone."""
        handle = super().register_forward_hook(hook, **options)
        take_parallel(self)
        return handle

    @overload
    def forward(self, hidden: Tensor) -> Tensor: ...
    @overload
    def forward(self, hidden: Tensor, *, teacher_hidden: Tensor, **options: Any) -> LinearDivergence: ...
    @overload
    def forward(self, hidden: Tensor, *, teacher_top: tuple[Tensor, Tensor], **options: Any) -> LinearDivergence: ...
    @overload
    def forward(
        self, hidden: Tensor | Sequence[Tensor], targets: Tensor | None = None, *, outputs: Sequence[str], **options: Any
    ) -> LensStatistics: ...
    @overload
    def forward(self, hidden: Tensor, targets: Tensor, **options: Any) -> LinearLogprobs: ...
    @overload
    def forward(self, hidden: Tensor, targets: Tensor, advantages: Tensor, **options: Any) -> tuple[Tensor, PolicyMetrics]: ...
    def forward(
        self: nn.Linear,  # internal_policy lends this forward to a plain one
        hidden: Tensor | Sequence[Tensor],
        targets: Tensor | None = None,
        advantages: Tensor | None = None,
        *,
        teacher_hidden: Tensor | None = None,
        teacher_top: tuple[Tensor, Tensor] | None = None,
        outputs: Sequence[str] | None = None,
        **options: Any,
    ) -> Tensor | LinearDivergence | LinearLogprobs | LensStatistics | tuple[Tensor, PolicyMetrics]:
        """Answer a question about ``hidden[..., D]`` by the function that takes the arguments given, and its ``options``.

        * nothing else: logits, ``[..., V]``
        * ``targets[...]``: :func:`bupo_kernels.linear_logprobs`
        * ``targets`` and ``advantages``: :func:`bupo_kernels.linear_policy_loss`
        * ``teacher_hidden[..., D]``, or ``teacher_top``: :func:`bupo_kernels.linear_divergence` from the teacher that it is of
        * ``outputs``: :func:`bupo_kernels.logit_lens`, with or without ``targets``; ``hidden`` are those of several layers

        The ``bias`` is always the module's own. Raises ``TypeError`` for arguments that do not go together.
        """
        values = (targets, advantages, teacher_hidden, teacher_top, outputs)
        given = {name: value for name, value in zip(QUESTIONS, values, strict=True) if value is not None}
        answer = ANSWERS.get(tuple(given))
        if answer is None or (options and not given):
            raise TypeError(_refusal(given, options))
        around = vars(self).get("around")
        if given:
            options = getattr(self, "readout", {}) | options
            if not torch.compiler.is_compiling():
                _check_caller(self)
            if around is not None:
                hidden, options["group"] = around.operands(self, hidden)
        elif around is not None:
            return around.logits(self, hidden)
        return answer(hidden, self.weight, bias=self.bias, **given, **options)


def _refusal(given: Mapping[str, object], options: Mapping[str, object]) -> str:
    """Return why nothing answers a call of the head with these arguments."""
    for name, excluded in EXCLUDES.items():
        if name in given and any(other in given for other in excluded):
            return f"{name}: given with {' or '.join(excluded)}, accepted only without them"
    return f"{', '.join(given or options)}: given without targets, accepted only with them"


def change_class(module: nn.Module, kind: type[Kind]) -> Kind:
    """Make ``module`` a ``kind`` in place and return it, also where the ``forward`` of its old class is held on the instance:
    accelerate's hooks (of a ``device_map``, of offloading) call it from there, and leave it there when they are taken off."""
    for name in ("forward", "_old_forward"):
        if _is_of_its_class(module, vars(module).get(name)):
            vars(module)[name] = MethodType(kind.forward, module)
    module.__class__ = kind
    assert isinstance(module, kind)
    return module


def check_forward(argument: str, module: nn.Module) -> None:
    """Raise ValueError where ``module`` has a ``forward`` of its own that :func:`change_class` would not reach."""
    forward = vars(module).get("forward")
    if forward is not None and is_parallel(forward):
        return
    # The hooks of accelerate call the former.
    hooked = vars(module).get("_old_forward") if "_hf_hook" in vars(module) else forward
    if forward is not None and not _is_of_its_class(module, hooked):
        name = getattr(forward, "__qualname__", None) or type(forward).__qualname__
        raise ValueError(
            f"{argument}: the forward of its {type(module).__name__} has been replaced ({name}) by one that calls what it was "
            "before, accepted is its class's own, or accelerate's; fuse the head first, and replace its forward then, by one that "
            "hands all arguments on"
        )


def _is_of_its_class(module: nn.Module, method: object) -> bool:
    """Tell whether ``method`` is the forward that the class of ``module`` gives it."""
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is type(module).forward


def _check_caller(head: nn.Module) -> None:
    """Raise ValueError where an adapter that was put around ``head`` asks for statistics, which it would take for logits.

    ``head`` does not know of the adapter, so the stack is searched: the first module up there other than ``head`` is its caller.
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
