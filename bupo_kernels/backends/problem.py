"""The words in which a call is put to a backend, and in which the backend answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """All that a plan depends on. Sizes in elements, ``memory_budget`` in bytes."""

    rows: int  # token positions of the call
    active_rows: int  # those that are not masked out
    vocab: int
    width: int  # D, the size of a hidden vector
    dtype: torch.dtype  # of the operands of the products
    device: str  # device type
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool
    softcap: bool
    memory_budget: int

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Readout:
    """How a product becomes a logit: ``z = softcap(logit_scale · (h·W_j + b_j)) / temperature``."""

    temperature: float | Tensor  # or [rows]
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


class Tile(NamedTuple):
    rows: int
    columns: int


class Memory(NamedTuple):
    """Bytes a call needs beyond its inputs, its outputs and their gradients."""

    forward: int  # working memory of the forward
    backward: int  # working memory of the backward
    accumulator: int  # fp32 twin of dH, where dH itself cannot serve as the accumulator
