"""The row kernel of divergences in C++, on a CPU: rows of fp32 products of both sides, whatever the dtype that they are of."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bupo_kernels.backends import compiled
from bupo_kernels.backends.base import Problem
from bupo_kernels.backends.compiled import ISAS, address, isas
from bupo_kernels.backends.cpu_arguments import ReadoutArguments
from bupo_kernels.backends.divergences import DivergenceRows, Side, Upstream, largest
from bupo_kernels.backends.native_rows import why_not_native


class NativeDivergence(DivergenceRows):
    """The row kernel of csrc/cpu. One row of both sides is swept while it is in the second cache."""

    strategies = ISAS

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        if problem.device.type != "cpu":
            return f"device: {problem.device.type} given, accepted is cpu: there is no CUDA kernel of a divergence"
        if problem.dtype == torch.float64:
            return f"dtype: {problem.dtype} given, accepted are fp32, bf16 and fp16"
        # The kernel reads fp32 products, whatever the dtype and width of what they are of.
        return why_not_native(replace(problem, dtype=torch.float32, width=problem.width or 1), strategy)

    def rows(
        self, student: Side, teacher: Side, beta: float, upstream: Upstream | None, with_entropy: bool, strategy: str | None
    ) -> tuple[Tensor, Tensor]:
        rows, columns = student.products.shape
        divergence, entropy = (student.products.new_empty(rows) for _ in range(2))
        readouts = [ReadoutArguments.of(side.readout, side.bias, side.products) for side in (student, teacher)]
        arguments = []
        for side, readout in zip((student, teacher), readouts, strict=True):
            if side.dz is not None and side.dz.data_ptr() != side.products.data_ptr():
                raise ValueError("memory of a kernel: a gradient apart given, accepted is one over its products")
            products = address(side.products, torch.float32, columns)
            arguments += [products, side.products.stride(0), side.dz is not None, *readout.passed(columns, rows)]
        gs = [g if g is None else g.float().contiguous() for g in (upstream or (None, None))]
        compiled.kernels(strategy or isas()[0]).row_divergence(
            *arguments,
            rows,
            columns,
            beta,
            *(address(g, torch.float32, rows) for g in gs),
            address(divergence, torch.float32, rows),
            address(entropy, torch.float32, rows),
            torch.get_num_threads(),
        )
        return divergence.clamp_(0, largest(beta)), entropy.clamp_(0, math.log(columns))
