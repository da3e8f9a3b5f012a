"""Refusals of derivatives that do not exist. The ops have first derivatives in reverse mode, and a statistic has none; asking for
another, in any of torch's ways, raises instead of giving zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

ACCEPTED = "accepted are first derivatives in reverse mode, by backward() or torch.autograd.grad() without create_graph"
INSTEAD = "for others form the logits, F.linear(hidden, weight), and leave the rest to torch"


def of_a_gradient(op: str) -> NotImplementedError:
    """Return the error for a second derivative of ``op``."""
    return NotImplementedError(f"{op}: a derivative of its gradient asked for, {ACCEPTED}; {INSTEAD}")


def _layers(x: Tensor) -> Iterator[Tensor]:
    """Yield ``x`` and the tensors that the transforms of torch.func have wrapped in it, from the outermost to the innermost."""
    yield x
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
        yield x


def is_batched(x: Tensor) -> bool:
    """Tell whether ``x`` is batched by torch.func.vmap, or by torch.autograd.grad with ``is_grads_batched``."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def requires_grad(x: Tensor | None) -> bool:
    """Tell whether a gradient of ``x`` is wanted, also where torch.func.vmap has wrapped it and ``x.requires_grad`` is False."""
    if x is None or not torch.is_grad_enabled():
        return False
    return x.requires_grad or (not torch.compiler.is_compiling() and any(layer.requires_grad for layer in _layers(x)))


def refuse(operands: dict[str, object], statistic: bool = False) -> None:
    """Raise ``NotImplementedError`` where operands are differentiated in forward mode or by a transform of torch.func. For a
    ``statistic``, which looks at the values of its operands, raise also where they are batched by one."""
    if torch.compiler.is_compiling():
        # A traced tensor does not tell whether the real one has a tangent, only the level tells whether it may have one.
        if forward_ad._current_level >= 0:
            raise NotImplementedError(f"hidden: forward-mode differentiation around torch.compile, {ACCEPTED}; {INSTEAD}")
        return
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack()
    if forward_ad._current_level < 0 and stack is None:
        return
    transformed = any(x.key() in (functorch.TransformType.Grad, functorch.TransformType.Jvp) for x in stack or ())
    for name, x in operands.items():
        if not isinstance(x, Tensor):
            continue
        for layer in _layers(x):
            if functorch.is_batchedtensor(layer):  # its tangents are within
                if statistic:
                    raise NotImplementedError(f"{name}: batched by torch.func.vmap, accepted is the batch as a leading dimension")
            elif forward_ad.unpack_dual(layer).tangent is not None:
                raise NotImplementedError(f"{name}: a tensor with a forward-mode tangent given, {ACCEPTED}; {INSTEAD}")
            if statistic and functorch.is_gradtrackingtensor(layer) and layer.requires_grad:
                raise NotImplementedError(f"{name}: differentiated by torch.func, accepted is detach() of it: there is no gradient")
        if transformed and requires_grad(x):
            raise NotImplementedError(f"{name}: differentiated by torch.func, {ACCEPTED}, and detach() of it; {INSTEAD}")
