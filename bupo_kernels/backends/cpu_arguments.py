"""What the C++ kernels for CPUs take per row and column (csrc/cpu/kernels.h), as tensors and as the addresses of these."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Readout
from bupo_kernels.backends.compiled import address

PANEL = 32  # rows to whose multiple per-row arguments are padded


def up(count: int) -> int:
    """Return ``count`` rounded up to whole panels."""
    return -(-count // PANEL) * PANEL


def padded(x: Tensor, value: float = 0) -> Tensor:  # [n] -> [n'], contiguous
    """Return ``x`` with a ``value`` in every place up to whole panels."""
    return F.pad(x, (0, up(len(x)) - len(x)), value=value).contiguous()


class ReadoutArguments(NamedTuple):
    """The readout as csrc/cpu/kernels.h takes it: ``z = g((x + bias) · inner) · outer``, with g tanh under a softcap."""

    bias: Tensor | None  # [c] fp32
    outer: Tensor | None  # [n'] fp32
    inner: float
    softcap: bool

    @staticmethod
    def of(readout: Readout, bias: Tensor | None, rows: Tensor) -> ReadoutArguments:
        """Return the arguments for a ``readout`` whose temperature is a number or a column [n, 1], on as many rows, and on the
        device, as ``rows`` [n, ...] is."""
        scale, temperature, cap = readout.logit_scale, readout.temperature, readout.softcap
        bias = None if bias is None else bias.float().contiguous()
        inner, numerator = (1.0, scale) if cap is None else (scale / cap, cap)
        if isinstance(temperature, Tensor):
            outer = numerator / temperature.reshape(-1).float()
        elif cap is None:
            return ReadoutArguments(bias, None, scale / temperature, False)
        else:
            outer = rows.new_full((len(rows),), numerator / temperature, dtype=torch.float32)
        return ReadoutArguments(bias, padded(outer, 1), inner, cap is not None)

    def passed(self, columns: int, rows: int) -> tuple[int, int, float, bool]:
        """Return them as the kernels' parameters, checked for so many columns and rows."""
        bias, outer = address(self.bias, torch.float32, columns), address(self.outer, torch.float32, up(rows))
        return bias, outer, self.inner, self.softcap


class CoefficientArguments(NamedTuple):
    """The coefficients of dz as csrc/cpu/kernels.h takes them, [n'] each."""

    m: Tensor
    constant: Tensor
    slope: Tensor | None
    on_target: Tensor
    targets: Tensor  # int32, less the first column at hand

    @staticmethod
    def of(coefficients: Coefficients) -> CoefficientArguments:
        """Return the arguments for a tile that begins with column 0."""
        m, constant, slope, on_target, targets = coefficients
        return CoefficientArguments(
            padded(m.float()),
            padded(constant.float()),
            None if slope is None else padded(slope.float()),
            padded(on_target.float()),
            padded(targets.int(), -1),
        )

    def at(self, first_column: int) -> CoefficientArguments:
        """Return the arguments for a tile that begins with ``first_column``; where there is padding, its target stays below 0."""
        return self._replace(targets=self.targets - first_column)

    def passed(self, rows: int) -> tuple[int, ...]:
        """Return them as the kernels' parameters, checked for so many rows."""
        numbers, length = (self.m, self.constant, self.slope, self.on_target), up(rows)
        return *(address(x, torch.float32, length) for x in numbers), address(self.targets, torch.int32, length)
