"""Checks of a peer before anything of it is replaced: of the functions themselves, not of its release."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def require(peer: str, function: str, owner: object, expected: Sequence[str]) -> None:
    """Raise ImportError unless ``owner`` has that ``function``, and its first arguments have the names ``expected``.

    ``peer`` is the name and release that the sentence begins with.
    """
    name = function.rpartition(".")[2]
    if not hasattr(owner, name):
        raise ImportError(f"{peer} has no {function}, accepted is one that takes ({', '.join(expected)})")
    found = list(inspect.signature(getattr(owner, name)).parameters)
    if found[: len(expected)] != list(expected):
        raise ImportError(f"{peer}: {function} takes ({', '.join(found)}), accepted is one that takes ({', '.join(expected)})")


@torch.no_grad()
def require_values(peer: str, function: str, names: Sequence[str], theirs: Callable, ours: Callable, *given: object) -> None:
    """Raise ImportError unless ``theirs``, the ``function`` of the peer, answers ``given`` with the values of ``ours``, up to the
    rounding of 32 bits. ``names`` are those of the values."""
    with torch.autocast("cpu", enabled=False):
        expected = ours(*given)
        try:
            found = dict(zip(names, theirs(*given), strict=True))
        except Exception as error:
            raise ImportError(f"{peer}: {function} raises {type(error).__name__} on a small input: {error}") from error
    for (name, got), want in zip(found.items(), expected, strict=True):
        if (got is None) != (want is None) or (want is not None and not torch.allclose(got.float(), want.float(), 1e-4, 1e-5)):
            raise ImportError(f"{peer}: {name} of {function} is {got} on a small input, accepted is {want}")


def small_input() -> dict[str, Tensor]:
    """Return operands for one small call: ``hidden[3, 5]``, ``weight[7, 5]``, ``bias[7]``, ``targets[3]``, fp32 on the CPU."""
    numbers = torch.arange(35, dtype=torch.float32, device="cpu")
    return {
        "hidden": numbers[:15].view(3, 5).sin(),
        "weight": numbers.view(7, 5).cos(),
        "bias": numbers[:7] / 7,
        "targets": torch.tensor([0, 6, 3], dtype=torch.int64, device="cpu"),
    }
