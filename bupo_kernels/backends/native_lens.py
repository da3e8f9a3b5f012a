"""The row kernels of a lens in C++ (csrc/cpu), for any dtype but float64 on a CPU. Where it multiplies bf16, bf16 operands have the
product of packed panels that ``cpu_panels.py`` has; all others have the library's, in fp32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import Statistics
from bupo_kernels.backends.base import Problem
from bupo_kernels.backends.compiled import ISAS, MULTIPLY_BF16, address, dtype_name, isas, kernels, words
from bupo_kernels.backends.cpu_arguments import ReadoutArguments, padded, up
from bupo_kernels.backends.lens_loop import Comparison, LensRows, LensTile, Running
from bupo_kernels.backends.native_rows import why_not_native


class NativeLens(LensRows):
    """Row kernels that read a tile once, of all policies on a token together, and leave its logits."""

    strategies = ISAS
    reads_quantised = True

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        if problem.device.type != "cpu":
            return f"device: {problem.device.type} given, accepted for these outputs of a lens is cpu"
        if problem.dtype == torch.float64:
            return f"dtype: {problem.dtype} given, accepted are fp32, bf16 and fp16"
        return why_not_native(replace(problem, dtype=torch.float32), strategy)

    def why_not_default(self, problem: Problem) -> str | None:
        return "torch.compile cannot trace it" if torch.compiler.is_compiling() else None

    def packs(self, dtype: torch.dtype, strategy: str | None) -> bool:
        return dtype == torch.bfloat16 and (strategy or isas()[0]) in MULTIPLY_BF16

    def pack_hidden(self, hidden: Tensor, strategy: str | None) -> Tensor:  # [n, D] -> [words]
        return self._packed(hidden, "pack_left", strategy)

    def pack_weight(self, weight: Tensor, strategy: str | None) -> Tensor:  # [c, D] -> [words]
        return self._packed(weight, "pack_rows", strategy)

    @staticmethod
    def _packed(matrix: Tensor, how: str, strategy: str | None) -> Tensor:  # [n, D] -> [words]
        k, (rows, width) = kernels(strategy or isas()[0]), matrix.shape
        matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
        packed = words(k.packed_words(rows, width))
        source = address(matrix, torch.bfloat16, width)
        getattr(k, how)(source, matrix.stride(0), rows, width, dtype_name(matrix), address(packed), torch.get_num_threads())
        return packed

    def workspace_bytes(self, strategy: str | None) -> int:
        return kernels(strategy or isas()[0]).workspace_bytes(0, torch.get_num_threads())

    def multiply(self, out: Tensor, hidden: Tensor, weight: Tensor, width: int, strategy: str | None) -> None:  # [n, c]
        k, (rows, columns) = kernels(strategy or isas()[0]), out.shape
        workspace = words(self.workspace_bytes(strategy) // 4)
        k.linear_products(
            address(hidden, torch.int32, k.packed_words(rows, width)),
            rows,
            address(weight, torch.int32, k.packed_words(columns, width)),
            columns,
            width,
            address(out, torch.float32, columns),
            out.stride(0),
            address(workspace),
            torch.get_num_threads(),
        )

    def keeps(self, pairs: bool) -> bool:
        return True

    def needs_scratch(self, pairs: bool) -> bool:
        return pairs

    def fold(self, tile: LensTile, running: Running, with_entropy: bool, strategy: str | None) -> None:
        policies, tokens, columns = tile.z.shape
        readout, ids = ReadoutArguments.of(tile.readout, tile.bias, tile.targets), padded(tile.targets.int(), -1)
        k = running.top_z.shape[2]
        kernels(strategy or isas()[0]).lens_statistics(
            address(tile.z, torch.float32, columns),
            address(tile.scratch, torch.float32, columns),
            policies,
            tokens,
            columns,
            tile.columns.start,
            *readout.passed(columns, tokens),
            address(ids, torch.int32, up(tokens)),
            *_statistics(running.statistics, tokens),
            _by_policy(running.argmax, torch.int64, running.statistics, tokens),
            address(running.cross, torch.float32, policies),
            running.pairs,
            address(running.top_z, torch.float32, k) if k else 0,
            address(running.top_ids, torch.int64, k) if k else 0,
            k,
            torch.get_num_threads(),
        )

    def compare(
        self, tile: LensTile, statistics: Statistics, log_s: Tensor, found: Comparison, strategy: str | None
    ) -> None:  # [P, r] each
        policies, tokens, columns = tile.z.shape
        readout = ReadoutArguments.of(tile.readout, tile.bias, tile.targets)
        kernels(strategy or isas()[0]).lens_comparison(
            address(tile.z, torch.float32, columns),
            policies,
            tokens,
            columns,
            *readout.passed(columns, tokens),
            tile.formed,
            *_statistics(statistics, tokens),
            _by_policy(log_s, torch.float32, statistics, tokens),
            _by_policy(found.rank, torch.int64, statistics, tokens),
            _by_policy(found.jsd, torch.float32, statistics, tokens),
            torch.get_num_threads(),
        )


def _statistics(statistics: Statistics, tokens: int) -> tuple[int, int, int]:  # [P, r] each
    """Return the address of the maxima, how far apart the four statistics are, and how far apart policies are."""
    m, s, t, z_y = (address(x, torch.float32, tokens) for x in statistics)
    if s - m != t - s or s - m != z_y - t or len({x.stride(0) for x in statistics}) > 1:
        raise ValueError("memory of a kernel: statistics apart given, accepted are parts of one tensor")
    return m, (s - m) // 4, statistics.m.stride(0)


def _by_policy(x: Tensor | None, dtype: torch.dtype, statistics: Statistics, tokens: int) -> int:  # [P, r]
    """Return the address of what lies as the statistics do."""
    if x is not None and x.shape[0] > 1 and x.stride(0) != statistics.m.stride(0):
        raise ValueError(f"memory of a kernel: policies {x.stride(0)} apart given, accepted is {statistics.m.stride(0)}")
    return address(x, dtype, tokens)
