"""Heads whose vocabulary a framework has put on several ranks: torch's and transformers' ``ColwiseParallel`` of an ``nn.Linear``.

Both make ``head(hidden)`` answer with logits, by what they do around its forward: hidden states are brought to every rank of the
group, the logits of this rank's columns are gathered or left as they are, and gradients are summed. Statistics want none of that
but the hidden states: the ops reduce over the group themselves. So a :class:`FusedLMHead` takes what frameworks have put around
its forward into its own, where logits alone go through it.

* ``parallelize_module`` of torch (torchtitan) registers a hook before the forward, which drops all arguments but the first, and
  one after it, which takes a ``DTensor``. The weight is a ``DTensor``.
* transformers 5.17 and later put a function in the place of the forward. The weight is a ``DTensor``.
* transformers 5.10 registers hooks as torch does. The weight is this rank's part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class AroundLogits:
    """The functions that a framework runs around the logits of a head, and the group over which the vocabulary lies."""

    before: list[Callable] = field(default_factory=list)  # hooks, each of the module and its arguments
    after: list[Callable] = field(default_factory=list)
    forward: Callable | None = None  # in the place of them

    def logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V], or as the framework is told to leave them
        """Return what the head would without statistics."""
        if self.forward is not None:
            return self.forward(hidden)
        arguments = self._given(head, hidden)
        logits = nn.functional.linear(arguments[0], head.weight, head.bias)
        for hook in self.after:
            logits = hook(head, arguments, logits)
        return logits

    def operands(self, head: nn.Linear, hidden: Any) -> tuple[Any, Any]:
        """Return the hidden states of all rows, and the process group over which the vocabulary lies."""
        weight: Any = head.weight
        if not hasattr(weight, "full_tensor"):
            mesh: Any = head._hf_device_mesh
            return hidden, mesh.get_group()
        mesh = weight.device_mesh
        group = mesh.get_group(mesh.ndim - 1)  # FSDP2 puts its dimensions before that of tensor parallelism
        if self.forward is not None:
            return hidden, group
        (hidden,) = self._given(head, hidden)
        # The gradient of the ops is the sum over the group, on each of its ranks.
        return hidden.to_local(grad_placements=hidden.placements), group

    def _given(self, head: nn.Linear, hidden: Any) -> tuple:
        arguments: Any = (hidden,)
        for hook in self.before:
            arguments = hook(head, arguments)
            arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        return arguments


def is_parallel(hook: Callable) -> bool:
    """Tell whether a hook, or what stands in the place of a forward, is of a framework's tensor parallelism."""
    name = getattr(hook, "__qualname__", "")
    return name.startswith("distribute_module.<locals>.") or name.endswith(".install_forward.<locals>.tp_forward")


def check_parallel(argument: str, linear: nn.Module) -> bool:
    """Tell whether the vocabulary of ``linear`` lies on several ranks. Raise ``ValueError`` where it is split otherwise."""
    if not (hooks := _around(linear)):
        return "around" in vars(linear)
    weight: Any = linear.weight
    if hasattr(weight, "full_tensor"):
        if not (placement := weight.placements[-1]).is_shard(0):
            raise ValueError(f"{argument}: tensor parallelism has split its head into {placement!r}, accepted is Shard(dim=0)")
    elif "colwise" not in (plan := str(getattr(linear, "_hf_tp_plan", None))):
        raise ValueError(f"{argument}: tensor parallelism has split its head by the plan {plan!r}, accepted are those of colwise")
    for hook in hooks:
        style = inspect.getclosurevars(hook).nonlocals.get("self")
        layouts = getattr(style, "input_layouts", None)
        if layouts is not None and not layouts.is_replicate():
            raise ValueError(
                f"{argument}: the tensor parallelism of its head takes hidden states of {layouts!r}, accepted is Replicate(), as "
                "transformers' ColwiseParallel has it"
            )
    return True


def _around(linear: nn.Module) -> list[Callable]:
    """Return what tensor parallelism has put around the forward of ``linear``, and nobody has taken."""
    hooks = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values(), vars(linear).get("forward")]
    return [hook for hook in hooks if hook is not None and is_parallel(hook)]


def take_parallel(linear: nn.Module) -> None:
    """Take what tensor parallelism has put around the forward of ``linear`` into an :class:`AroundLogits` of it."""
    if not _around(linear):
        return
    around = vars(linear).setdefault("around", AroundLogits())
    for hooks, taken in ((linear._forward_pre_hooks, around.before), (linear._forward_hooks, around.after)):
        for key in [key for key, hook in hooks.items() if is_parallel(hook)]:
            taken.append(hooks.pop(key))
    if (forward := vars(linear).get("forward")) is not None and is_parallel(forward):
        around.forward = vars(linear).pop("forward")


def put_back(linear: nn.Module) -> None:
    """Undo :func:`take_parallel` of a linear that is plain again."""
    if (around := vars(linear).pop("around", None)) is None:
        return
    for hook in around.before:
        linear.register_forward_pre_hook(hook)
    for hook in around.after:
        linear.register_forward_hook(hook)
    if around.forward is not None:
        vars(linear)["forward"] = around.forward
