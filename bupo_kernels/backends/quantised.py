"""Quantised weights, those of torchao for example: tensors of a class of their own, of which a slice of rows can be dequantised.
The ``torch`` backend reads a weight slice by slice, so that never more of a frozen one is held as numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Classes of torch itself that stand for the tensor within, whatever the op.
TRANSPARENT = ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor")
PLAIN = "a Tensor whose numbers lie in memory (strided)"
SLICED = "one that is frozen and of which weight[a:b].dequantize() is such a Tensor"


def is_plain(x: Tensor) -> bool:
    """Tell whether the numbers of ``x`` lie in memory: not in other layouts, nor where a class answers for each op itself."""
    kind = type(x)
    own = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if own and not (kind.__module__.startswith("torch.") and kind.__name__ in TRANSPARENT):
        return False
    return x.layout == torch.strided and not x.is_nested and not x.is_quantized


def called(x: Tensor) -> str:
    """Return a name of ``x`` for a message: its dtype, and whatever is unusual about it."""
    layout = str(x.layout).removeprefix("torch.") + " " if x.layout != torch.strided else "nested " if x.is_nested else ""
    kind = "" if type(x) in (Tensor, nn.Parameter) and not layout else f"{layout}{type(x).__name__} of "
    return f"{kind}{x.dtype}"


def rows_of(weight: Tensor, rows: slice) -> Tensor:  # [V, D] -> [r, D]
    """Return some rows of ``weight``, dequantised where need be. Raise TypeError where the class of ``weight`` cannot do that."""
    if is_plain(weight):
        return weight[rows]
    try:
        found = weight[rows]
        found = found if is_plain(found) else found.dequantize()
    except Exception as error:  # of any class, and any kind
        raise TypeError(
            f"weight: {called(weight)} given, accepted is {PLAIN}, or {SLICED}: {type(error).__name__}: {error}"
        ) from error
    expected = (len(range(*rows.indices(weight.shape[0]))), weight.shape[1])
    if not isinstance(found, Tensor) or not is_plain(found) or not found.is_floating_point() or found.shape != expected:
        given = called(found) if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"weight: {called(weight)} given, of which a slice is {given}, accepted is {PLAIN}, or {SLICED}")
    return found
