"""The words in which a call is put to a backend, and in which the backend answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TooSmall(ValueError):
    """A memory budget in which a backend cannot run so many rows."""


@dataclass(frozen=True)
class Problem:
    """All that a plan depends on. Sizes in elements, ``memory_budget`` in bytes."""

    rows: int  # token positions of the call
    active_rows: int  # those that are not masked out
    vocab: int
    width: int  # D, the size of a hidden vector
    dtype: torch.dtype  # of the operands of the products
    device: torch.device
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool
    softcap: bool
    memory_budget: int
    quantised: bool = False  # the weight: its rows are dequantised a slice at a time

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def needs_grad(self) -> bool:
        return self.grad_hidden or self.grad_weight or self.grad_bias

    @property
    def planned_rows(self) -> int:
        """What memory is planned for. Off the CPU a call must not wait for the device to tell how many rows are active."""
        return self.active_rows if self.device.type == "cpu" else self.rows

    def require_budget(self, least: int) -> None:
        if least > self.memory_budget:
            raise TooSmall(f"memory_budget: {self.memory_budget} bytes given, accepted are at least {least} for this many rows")


@dataclass(frozen=True)
class Readout:
    """How a product becomes a logit: ``z = softcap(logit_scale · (h·W_j + b_j)) / temperature``."""

    temperature: float | Tensor  # or [...], of the shape of the targets
    logit_scale: float
    softcap: float | None

    def rows(self, index: tuple[Tensor, ...], dtype: torch.dtype) -> Readout:
        """The same for a selection of the rows, ``temperature`` as a column [n, 1]."""
        if not isinstance(self.temperature, Tensor):
            return self
        return Readout(self.temperature[index].to(dtype).unsqueeze(1), self.logit_scale, self.softcap)

    @property
    def is_identity(self) -> bool:
        """Whether, softcap apart, logits are the products themselves."""
        return not isinstance(self.temperature, Tensor) and self.logit_scale == self.temperature


class Operands(NamedTuple):
    hidden: Tensor  # [..., D], any view
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V], contiguous
    targets: Tensor  # [...] int64
    readout: Readout

    def coordinates(self, rows: Tensor) -> tuple[Tensor, ...]:  # [n] -> [n] for each leading dimension
        """Rows numbered through, as coordinates in the leading dimensions of ``hidden``."""
        coordinates = []
        for size in reversed(self.targets.shape[1:]):  # torch.unravel_index would copy the shape to the device, and wait
            coordinates.append(rows % size)
            rows = rows // size
        return (rows, *reversed(coordinates))


class Tile(NamedTuple):
    rows: int
    columns: int


class Memory(NamedTuple):
    """Bytes a call needs beyond its inputs, its outputs and their gradients."""

    forward: int  # working memory of the forward
    backward: int  # working memory of the backward
    accumulator: int  # fp32 twin of dH (of dW, where a loss in one pass takes several chunks), where it cannot be summed in place

    @property
    def working(self) -> int:
        return max(self.forward, self.backward)


class Schedule(NamedTuple):
    """How a backend will run a problem."""

    strategy: str
    tile: Tile  # of the gradient, and in torch of the forward too
    memory: Memory
    cached_rows: int = 0  # rows whose E the forward keeps, so that the backward need not form their product again
    kernels: tuple[str, ...] = ()  # configurations, to be printed
    chunk_rows: int = 0  # of a one-pass loss: rows whose logits, or E, are at hand together
    isa: str = ""  # instruction set of the native kernels
    fused_rows: bool = False  # of a one-pass loss: one kernel takes whole rows from products to loss and dz
