"""The products of a call on supports in C++ (csrc/cpu): fp32, bf16 and fp16 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bupo_kernels.backends.base import Problem
from bupo_kernels.backends.compiled import ISAS, address, dtype_name, isas, kernels
from bupo_kernels.backends.gathers import Gathers, Segments
from bupo_kernels.backends.native_rows import why_not_native


class NativeGathers(Gathers):
    """The products of rows where they lie: nothing is copied but what a core has in its registers."""

    strategies = ISAS

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        if problem.device.type != "cpu":
            return f"device: {problem.device.type} given, accepted with a support is cpu"
        return why_not_native(problem, strategy)

    def dots(self, left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor, budget: int, strategy: str | None) -> Tensor:
        count, width = len(left_rows), left.shape[1]
        found = torch.empty(count, dtype=torch.float32, device=left.device)
        left_rows, right_rows = left_rows.contiguous(), right_rows.contiguous()
        kernels(strategy or isas()[0]).gathered_dots(
            *_rows(left),
            address(left_rows, torch.int64, count),
            *_rows(right),
            address(right_rows, torch.int64, count),
            count,
            width,
            dtype_name(left),
            address(found, torch.float32, count),
            torch.get_num_threads(),
        )
        return found

    def sums(self, segments: Segments, out: Tensor, places: Tensor, budget: int, strategy: str | None) -> None:
        source = segments.source
        factors, index, offsets, places = (x.contiguous() for x in (segments.factors, segments.rows, segments.offsets, places))
        kernels(strategy or isas()[0]).gathered_sums(
            address(factors, torch.float32, len(index)),
            *_rows(source),
            address(index, torch.int64, len(index)),
            address(offsets, torch.int64, len(places) + 1),
            len(places),
            source.shape[1],
            dtype_name(source),
            address(out.view(-1), source.dtype, out.numel()),
            address(places, torch.int64, len(places)),
            torch.get_num_threads(),
        )


def _rows(matrix: Tensor) -> tuple[int, int]:  # [n, D]
    return address(matrix, length=matrix.shape[1]), matrix.stride(0)
