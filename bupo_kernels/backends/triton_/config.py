"""Every number that the Triton kernels run with, as pure functions of (kernel, dtype, architecture).

``make kernels`` compiles each of these for each target and prints registers, spills, shared memory and the matrix instruction;
the tests hold that nothing spills. No configuration here has been timed on a GPU yet: they follow from the cost model below.

A tile of rows x columns does rows · columns / (rows + columns) FLOP for each byte it pulls from L2 in 16 bit: 85 for 256 x 128,
51 for 256 x 64, 64 for 128 x 128. A Hopper at 700 TFLOP/s needs about 100 FLOP per byte from an L2 of 7 TB/s, so the widest tile
is taken whose epilogue fits the 255 registers of a thread, with every Triton from 3.6 to 3.9. A product in fp32 is three products
in TF32, and bound by arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Target:
    """The GPU that a kernel is compiled for, as far as configurations depend on it."""

    kind: str  # "cuda" or "hip"
    arch: int  # compute capability x 10, or 0 for hip
    processors: int  # persistent programs: one for each multiprocessor

    @property
    def has_tma(self) -> bool:
        return self.kind == "cuda" and self.arch >= 90


@dataclass(frozen=True)
class KernelConfig:
    """The tile of a kernel, and how its program runs."""

    rows: int  # BLOCK_N
    columns: int  # BLOCK_V
    depth: int  # BLOCK_D
    warps: int
    stages: int
    group: int = 8  # row blocks that visit columns of W one after the other, while these are in L2

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} x {self.depth}, {self.warps} warps, {self.stages} stages"


FP32 = KernelConfig(128, 64, 32, 8, 3)
FP32_SMALL = KernelConfig(64, 64, 32, 8, 3)
SMALL = KernelConfig(128, 64, 64, 8, 3)  # epilogues with many live values for each logit
IRREGULAR = KernelConfig(128, 64, 32, 8, 3)  # addresses that take a register each
AMPERE = KernelConfig(128, 128, 32, 8, 3)
HOPPER = KernelConfig(128, 128, 64, 8, 4)
HOPPER_STATISTICS = KernelConfig(256, 128, 64, 8, 4)
BLACKWELL_STATISTICS = KernelConfig(256, 64, 64, 8, 4)
BLACKWELL_SOFTCAP = KernelConfig(128, 64, 64, 4, 4)


def statistics_config(dtype: torch.dtype, target: Target, *, regular: bool, softcap: bool, cache: bool = False) -> KernelConfig:
    """Return the configuration of ``linear_statistics_kernel``. It does not depend on the number of rows, nor does any result.

    ``regular`` is that of ``product.regular``; ``cache`` says whether the epilogue also stores E (see ``linear_statistics.py``).
    """
    if dtype == torch.float32:
        return FP32 if regular and not (softcap and target.arch >= 100) else FP32_SMALL
    if not regular:
        return IRREGULAR
    if target.arch < 90:
        return AMPERE
    if target.arch < 100:
        return HOPPER if softcap or cache else HOPPER_STATISTICS
    if softcap:
        return BLACKWELL_SOFTCAP
    return HOPPER if cache else BLACKWELL_STATISTICS


def gradient_config(dtype: torch.dtype, target: Target, *, regular: bool, softcap: bool) -> KernelConfig:
    """Return the configuration of ``gradient_recompute_kernel``."""
    if dtype == torch.float32:
        return FP32
    if not regular:
        return IRREGULAR
    if softcap:
        return SMALL
    return HOPPER if target.arch >= 90 else AMPERE


def precision(dtype: torch.dtype, target: Target, allow_tf32: bool) -> str:
    """Return the precision of products. In fp32 they are three TF32 products, as exact as fp32 sums, where the GPU has TF32; a
    single one only on request."""
    if dtype != torch.float32:
        return "ieee"
    if target.kind == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


# Columns of a vocabulary split are whole blocks of any kernel; slices of the backward too.
COLUMN_UNIT = 256


def split_columns(vocab: int) -> int:
    """Return the width of a vocabulary split. V alone fixes it: about 128 splits, enough to occupy a GPU with a single block of
    rows, and for many rows still few partials (16 bytes each) against the columns they stand for."""
    return max(COLUMN_UNIT, -(-vocab // (128 * COLUMN_UNIT)) * COLUMN_UNIT)


# Below this width E takes more time to write and to read than the product that it saves: 2·V·D FLOP at 700 TFLOP/s and 4 bytes for
# each logit at 4 TB/s break even at D = 350.
CACHE_MIN_WIDTH = 512
CACHE_MIN_ROWS = 4096  # half of the budget must hold as many


def why_not_cached(dtype: torch.dtype, softcap: bool) -> str | None:
    """Return the reason why no row can leave E, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype: {dtype} given, accepted are 16-bit ones (E is kept in bf16)"
    if softcap:
        return "softcap: given, accepted is none (its slope cannot be had from E)"
    return None


def padded(vocab: int) -> int:
    """Return the columns of a row of E: whole blocks of every kernel."""
    return -(-vocab // COLUMN_UNIT) * COLUMN_UNIT


def exponents_per_row(vocab: int) -> int:
    """Return how many exponents a row of E has: one for each column block of the narrowest kernel."""
    return padded(vocab) // min(config.columns for config in (AMPERE, HOPPER, IRREGULAR))


# Columns of a slice in the backward. Wide slices read and write the fp32 sum of dH less often: a slice of S columns moves 2·4·N·D
# bytes of it for 2·N·S·D FLOP.
MOST_COLUMNS = 16384
FEWEST_COLUMNS = 2048  # before rows are split into blocks to meet the budget
FEWEST_ROWS = 512  # of such a block, before slices become narrower still
