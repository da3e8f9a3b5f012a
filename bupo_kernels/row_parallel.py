"""Batches whose rows lie on several ranks, each with rows of its own: what the part of each in a loss is a part of.

Ranks of a data, context or Ulysses sequence parallel group take parts of one loss. That is a sum, and of the others a rank needs
only how much there is to divide by, and which entropies are the highest: a few numbers of each, gathered, from which every rank
makes the same, in the order of the ranks. Gradients need nothing: those of the parts add up.

A rank that cannot go on must not leave the others waiting. So every message has the same length, whatever it is for, and a flag: a
rank that raises sends a last one, and where that arrives all raise; off the CPU, where it would be a wait for the device, it is a
device-side assert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

LENGTH = 16  # the numbers of a message, in float64: counts are exact to 2⁵³
RAISED = "row_group: rank {} raises an error, so this call has no result here either; what it is, that rank says"


class _RaisedElsewhere(RuntimeError):
    """The error of a rank that has read that another raised one; those that wait have read it too."""


class Rows:
    """The ranks that have the rows of a batch, each its own; without a ``group`` this one alone, which has nobody to ask."""

    def __init__(self, group: Any = None, like: Any = None) -> None:
        """Take the ranks of ``group``, whose messages lie on the device of the tensor ``like``.

        Raises ``TypeError`` naming ``row_group`` for anything but None and a process group that this rank is in.
        """
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"row_group: {type(group).__name__} given, accepted are None and a ProcessGroup that this rank is in")
        self.group: dist.ProcessGroup | None = group
        self.device = like.device if isinstance(like, Tensor) else torch.device("cpu")

    def tell(self) -> None:
        """Send the ranks that wait for a message of this one, or will, that it raises."""
        message = torch.zeros(LENGTH + 1, dtype=torch.float64, device=self.device)
        message[LENGTH:].fill_(1)
        self._exchanged(message)

    def gathered(self, numbers: Tensor) -> Tensor:  # [k], k up to LENGTH -> [ranks, k] float64
        """Return the numbers that each rank gives, in the order of the ranks."""
        message = numbers.detach().double()
        if self.group is None:
            return message.unsqueeze(0)
        found = self._exchanged(F.pad(message, (0, LENGTH + 1 - len(message))))
        failed = found[:, LENGTH] != 0
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(~failed.any(), RAISED.format("another"))
        elif failed.any():
            raise _RaisedElsewhere(RAISED.format(int(failed.nonzero()[0])))
        return found[:, : len(message)]

    def sum(self, number: Tensor) -> Tensor:  # [] -> []
        """Return the sum of what each rank gives, in the dtype of ``number``."""
        return number if self.group is None else self.gathered(number.view(1)).sum().to(number.dtype)

    def joined(self, values: Tensor) -> Tensor:  # [n] -> [all]
        """Return the values of all ranks, which may have different numbers of them: −inf stands where one has fewer than another.
        This waits for the device."""
        if self.group is None:
            return values
        longest = int(self.gathered(torch.tensor([len(values)], dtype=torch.float64, device=self.device)).amax())
        return self._exchanged(F.pad(values.detach(), (0, longest - len(values)), value=-torch.inf)).flatten()

    def _exchanged(self, message: Tensor) -> Tensor:  # [k] -> [ranks, k]
        assert self.group is not None
        ranks = dist.get_world_size(self.group)
        received = message.new_empty(ranks * len(message))
        dist.all_gather_into_tensor(received, message, group=self.group)
        return received.view(ranks, len(message))


def together(call: Callable[P, R]) -> Callable[P, R]:
    """Return a ``call`` that raises on all ranks of its ``row_group`` where it raises on one, if it ends with a message of each.
    While torch traces there is nobody to tell."""

    @wraps(call)
    def of_all(*arguments: P.args, **options: P.kwargs) -> R:
        if options.get("row_group") is None or torch.compiler.is_compiling():
            return call(*arguments, **options)
        rows = Rows(options["row_group"], next((x for x in (*arguments, *options.values()) if isinstance(x, Tensor)), None))
        try:
            return call(*arguments, **options)
        except _RaisedElsewhere:
            raise
        except Exception:
            rows.tell()
            raise

    return of_all
