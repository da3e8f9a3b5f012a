"""What is done to rows of products that a library left in memory, in C++ and CUDA: twins of :class:`torch_chunked.TorchRows`."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.compiled import address, kernels
from bupo_kernels.backends.gradients import accumulate_
from bupo_kernels.backends.problem import Operands, Problem, Readout
from bupo_kernels.backends.torch_chunked import Block

PANEL = 32  # rows to whose multiple per-row arguments are padded


def up(count: int) -> int:
    return -(-count // PANEL) * PANEL


def padded(x: Tensor, value: float = 0) -> Tensor:  # [n] -> [n'], contiguous
    return F.pad(x, (0, up(len(x)) - len(x)), value=value).contiguous()


class ReadoutArguments(NamedTuple):
    """``z = g((x + bias) · inner) · outer``, as in csrc/cpu/kernels.h."""

    bias: Tensor | None  # [c] fp32
    outer: Tensor | None  # [n'] fp32
    inner: float
    softcap: bool

    @staticmethod
    def of(readout: Readout, bias: Tensor | None, rows: Tensor) -> ReadoutArguments:
        """``readout`` has temperatures as a column [n, 1], or a number; of ``rows`` [n, ...] the length and the device count."""
        scale, temperature, cap = readout.logit_scale, readout.temperature, readout.softcap
        bias = None if bias is None else bias.float().contiguous()
        per_row = isinstance(temperature, Tensor)
        if cap is None and not per_row:
            return ReadoutArguments(bias, None, scale / temperature, False)
        inner, numerator = (1.0, scale) if cap is None else (scale / cap, cap)
        if per_row:
            outer = numerator / temperature.reshape(-1).float()
        else:
            outer = rows.new_full((len(rows),), numerator / temperature, dtype=torch.float32)
        return ReadoutArguments(bias, padded(outer, 1), inner, cap is not None)

    def passed(self, columns: int, rows: int) -> tuple:
        bias, outer = address(self.bias, torch.float32, columns), address(self.outer, torch.float32, up(rows))
        return bias, outer, self.inner, self.softcap


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

    def passed(self, rows: int) -> tuple:
        *numbers, targets = self
        length = up(rows)
        return *(address(x, torch.float32, length) for x in numbers), address(targets, torch.int32, length)


class CpuRows:
    """fp32, with the instruction set ``isa``."""

    def __init__(self, isa: str):
        self.kernels = kernels(isa)

    @staticmethod
    def dtypes(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
        return torch.float32, torch.float32

    def fold(self, block: Block, y: Tensor, running: Statistics, with_entropy: bool) -> float:  # [r], [r] each
        """The tile into the statistics of its rows; leaves it as logits."""
        products, columns, targets = block.tile, block.columns, padded(y.int(), -1)
        readout = ReadoutArguments.of(block.readout, block.bias, y)
        m, s, t, z_y = (address(x, torch.float32, len(y)) for x in running)
        if s - m != t - s or s - m != z_y - t:
            raise ValueError("memory of a kernel: statistics apart given, accepted are rows of one tensor")
        self.kernels.row_statistics(
            address(products, torch.float32),
            products.stride(0),
            *products.shape,
            columns.start,
            *readout.passed(products.shape[1], len(y)),
            address(targets, torch.int32, up(len(y))),
            m,
            (s - m) // 4,
            torch.get_num_threads(),
        )
        return 0.0  # nothing is subtracted from what is kept

    def gradient(self, block: Block, of: Coefficients) -> Tensor:  # [r] each -> [r, c]
        logits, dz, arguments = block.tile, block.scratch, CoefficientArguments.of(of, block.columns.start)
        readout = ReadoutArguments.of(block.readout, block.bias, logits)
        rows, columns = logits.shape
        self.kernels.row_gradient(
            address(logits, torch.float32),
            logits.stride(0),
            rows,
            columns,
            *readout.passed(columns, rows),
            block.maxima is not None,
            *arguments.passed(rows),
            address(dz.view(-1), torch.float32, rows * columns),
            torch.get_num_threads(),
        )
        return dz


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class CudaRows:
    """fp32 products of fp32 or bf16 operands, dz in the operands' dtype. ``module`` is ``_C.cuda``."""

    def __init__(self, module: ModuleType):
        self.module = module

    @staticmethod
    def dtypes(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
        return problem.dtype, problem.dtype

    def fold(self, block: Block, y: Tensor, running: Statistics, with_entropy: bool) -> float:  # [r], [r] each
        """The tile into the statistics of its rows; leaves it as it is."""
        _alive, arguments = self._products(block.tile, block.columns.start, block.readout, block.bias)
        first = block.columns.start == 0
        self.module.row_statistics(**arguments, first=first, **_of_rows({"targets": y, **running._asdict()}, block.tile))
        return 0.0  # nothing is subtracted from what is kept

    def gradient(self, block: Block, of: Coefficients) -> Tensor:  # [r] each -> [r, c]
        _alive, arguments = self._products(block.tile, block.columns.start, block.readout, block.bias)
        dz = block.scratch
        self.module.row_gradient(
            **arguments,
            **_of_rows(of._asdict(), dz),
            n=len(dz),
            gradient=address(dz, device=dz.device.type),
            gradient_dtype=_name(dz),
            gradient_stride=dz.stride(0),
        )
        return dz

    def policy_loss(
        self,
        operands: Operands,
        index: tuple[Tensor, ...],  # coordinates of the rows
        objective: object,  # read by field name
        inputs: dict[str, Tensor | None],  # [r] each
        problem: Problem,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Of whole rows: loss (weighted), logprob, entropy and used, [r] each; dz [r, V] and the hidden vectors [r, D]."""
        hidden = operands.hidden[index]
        products = hidden.new_empty(len(hidden), problem.vocab, dtype=torch.float32)
        accumulate_(products, hidden, operands.weight.T, first=True)
        bias = None if operands.bias is None else operands.bias.float()
        _alive, arguments = self._products(products, 0, operands.readout.rows(index, torch.float32), bias)
        del arguments["first_column"]
        dz = torch.empty_like(products, dtype=problem.dtype) if problem.needs_grad and problem.dtype != products.dtype else products
        found = {name: products.new_empty(len(products)) for name in ("loss", "logprob", "entropy")}
        found["used"] = products.new_empty(len(products), dtype=torch.bool)
        self.module.row_policy_loss(
            **arguments,
            **_of_rows(inputs, products),
            **_of_rows(found, products),
            objective=objective,
            gradient=address(dz, device=dz.device.type) if problem.needs_grad else 0,
            gradient_dtype=_name(dz),
            gradient_stride=dz.stride(0),
        )
        return found, dz, hidden

    @staticmethod
    def _products(products: Tensor, first_column: int, readout: Readout, bias: Tensor | None) -> tuple[tuple, dict]:
        """What must live until the launch, and the arguments that all kernels share."""
        temperature, device = readout.temperature, products.device.type
        per_row = temperature.reshape(-1).float().contiguous() if isinstance(temperature, Tensor) else None
        arguments = {
            "products": address(products, device=device),
            "dtype": _name(products),
            "rows": len(products),
            "columns": products.shape[1],
            "stride": products.stride(0),
            "first_column": first_column,
            "bias": address(bias, torch.float32, products.shape[1], device),
            "row_temperature": address(per_row, torch.float32, len(products), device),
            "temperature": 1.0 if per_row is not None else temperature,
            "logit_scale": readout.logit_scale,
            "softcap": readout.softcap,
            "stream": torch.cuda.current_stream(products.device).cuda_stream if products.is_cuda else 0,
        }
        return (per_row, bias), arguments


def _of_rows(tensors: dict[str, Tensor | None], matrix: Tensor) -> dict[str, int]:
    """Addresses of what comes per row of the ``matrix``: fp32, but for two."""
    dtypes = {"targets": torch.int64, "used": torch.bool}
    rows, device = len(matrix), matrix.device.type
    return {name: address(x, dtypes.get(name, torch.float32), rows, device) for name, x in tensors.items()}
