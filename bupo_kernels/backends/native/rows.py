"""What is done to the rows of a tile of products that a library left in memory, in C++: :class:`torch_chunked.TorchRows`' twin."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.compiled import address, kernels
from bupo_kernels.backends.problem import Readout
from bupo_kernels.backends.torch_chunked import Block

PANEL = 32  # rows to whose multiple per-row arguments are padded


def padded(x: Tensor, value: float = 0) -> Tensor:  # [n] -> [n'], contiguous
    return F.pad(x, (0, -len(x) % PANEL), value=value)


class ReadoutArguments(NamedTuple):
    """``z = g((x + bias) · inner) · outer``, as in csrc/cpu/kernels.h."""

    bias: Tensor | None  # [c] fp32
    outer: Tensor | None  # [n'] fp32
    inner: float
    softcap: bool

    @staticmethod
    def of(readout: Readout, bias: Tensor | None, rows: int) -> ReadoutArguments:
        """``readout`` has temperatures as a column [n, 1], or a number."""
        scale, temperature, cap = readout.logit_scale, readout.temperature, readout.softcap
        bias = None if bias is None else bias.float().contiguous()
        per_row = isinstance(temperature, Tensor)
        if cap is None and not per_row:
            return ReadoutArguments(bias, None, scale / temperature, False)
        inner, numerator = (1.0, scale) if cap is None else (scale / cap, cap)
        outer = numerator / temperature.reshape(-1).float() if per_row else torch.full((rows,), numerator / temperature)
        return ReadoutArguments(bias, padded(outer, 1), inner, cap is not None)

    @property
    def passed(self) -> tuple:
        return address(self.bias), address(self.outer), self.inner, self.softcap


class CoefficientArguments(NamedTuple):
    """[n'] each."""

    m: Tensor
    constant: Tensor
    slope: Tensor | None
    on_target: Tensor
    targets: Tensor  # int32, less the first column at hand

    @staticmethod
    def of(coefficients: Coefficients, first_column: int) -> CoefficientArguments:
        *numbers, targets = coefficients
        return CoefficientArguments(
            *(x if x is None else padded(x.float()) for x in numbers), padded((targets - first_column).int(), -1)
        )

    @property
    def passed(self) -> tuple:
        return tuple(map(address, self))


class NativeRows:
    """On a CPU, fp32."""

    def __init__(self, isa: str):
        self.kernels = kernels(isa)

    def fold(self, block: Block, y: Tensor, running: Statistics, with_entropy: bool) -> float:  # [r], [r] each
        """The tile into the statistics of its rows; leaves it as logits."""
        products, columns, targets = block.tile, block.columns, padded(y.int(), -1)
        readout = ReadoutArguments.of(block.readout, block.bias, len(y))
        self.kernels.row_statistics(
            address(products),
            products.stride(0),
            *products.shape,
            columns.start,
            *readout.passed,
            address(targets),
            address(running.m),
            running.s.data_ptr() // 4 - running.m.data_ptr() // 4,
            torch.get_num_threads(),
        )
        return 0.0  # nothing is subtracted from what is kept

    def gradient(self, block: Block, of: Coefficients) -> Tensor:  # [r] each -> [r, c]
        logits, dz, arguments = block.tile, block.scratch, CoefficientArguments.of(of, block.columns.start)
        readout = ReadoutArguments.of(block.readout, block.bias, len(logits))
        self.kernels.row_gradient(
            address(logits),
            logits.stride(0),
            0,
            *logits.shape,
            *readout.passed,
            block.maxima is not None,
            *arguments.passed,
            address(dz),
            torch.get_num_threads(),
        )
        return dz
