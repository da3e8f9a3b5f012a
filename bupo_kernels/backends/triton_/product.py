"""What the kernels with a product share: a tile of logits, the order in which tiles are visited, and the arguments of a launch.

``linear_statistics.py`` and ``gradient_recompute.py`` get their logits here, from operands that lie as ``copies.py`` has them: rows
of H side by side, and rows of W that begin on multiples of 16 bytes. Both come by TMA where the GPU has it, and elsewhere through
pointers, by asynchronous copies that need no mask.

Triton compiles a kernel anew for each pattern of arguments that are 1 or a multiple of 16, and no call may wait for that in the
middle of a run. So ``do_not_specialize`` names what changes from call to call: numbers of rows, and vectors that may begin in the
middle of others. What it does not name is the model's (V, D, strides), or always a multiple of 16 (first columns, the strides of E
and dz).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bupo_kernels.backends.base import Operands
from bupo_kernels.backends.triton_.config import COLUMN_UNIT, KernelConfig, Target, interpreted, precision
from bupo_kernels.backends.triton_.copies import WeightSlice

# The interpreter stores bf16 as integers and multiplies them as such; on the GPU this is False and compiled away.
INTERPRETED = tl.constexpr(interpreted())

LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) rounded to fp32 …
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)  # … and what the rounding left out
LN2 = tl.constexpr(0.6931471805599453)

# The maximum of no logits, and the least exponent, as in algebra.py.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LEAST_EXPONENT = tl.constexpr(-1e4)  # of e and of 2: both powers are 0 in fp32
LEAST_SCALE = tl.constexpr(1.1754943508222875e-38)  # stands for 0, as −inf past V remains −inf with it

# Columns. A split is a multiple, and thus whole blocks; the kernel is told how many, since a number of columns that is not compiled
# in would not be known to be a multiple of 16.
SPLIT_UNIT = tl.constexpr(COLUMN_UNIT)


@triton.jit
def in_order(item, row_blocks, columns, GROUP: tl.constexpr):
    """Return the (row block, column unit) of an item. ``GROUP`` row blocks are visited for one column unit before the next, so that
    programs running side by side read the same columns of W while they are in L2."""
    per_group = GROUP * columns
    first = (item // per_group) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + (item % per_group) % size, (item % per_group) // size


@triton.jit
def tanh_and_slope(x):
    """Return ``(tanh(x), 1 − tanh²(x))`` to a few fp32 ulp on both ends, where ``(1 − e) / (1 + e)`` alone cancels for small x and
    ``1 − tanh²`` for large. The polynomial is Cephes' ``tanhf`` for |x| < 0.625."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    odd = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
    small = x + x * square * (odd * square - 3.33332819422e-1)
    tanh = tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def product_tile(
    hidden,  # [n, D]: TMA descriptor, or base pointer
    hidden_stride,  # between rows
    first_row,
    n,
    weight,  # [some columns of the vocabulary, D]: TMA descriptor, or base pointer
    weight_stride,  # between rows
    weight_first,  # the first of these columns
    first_column,
    V,
    D,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return ``h·W_j`` of a tile, ``[BLOCK_N, BLOCK_V]`` fp32. Rows past n and columns past V repeat the last (pointers) or hold 0
    (TMA, which also reads 0 past D)."""
    if not TMA:
        depth = tl.arange(0, BLOCK_D)
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
        columns = (tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1) - weight_first).to(tl.int64)
        hidden_pointers = hidden + (rows * hidden_stride)[:, None] + depth[None, :]
        weight_pointers = weight + (columns * weight_stride)[None, :] + depth[:, None]
    product = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        if TMA:
            h = hidden.load([first_row, start])
            w = weight.load([first_column - weight_first, start]).T
        else:
            h = tl.load(hidden_pointers)
            w = tl.load(weight_pointers)
            hidden_pointers += BLOCK_D
            weight_pointers += BLOCK_D
        if INTERPRETED:
            h, w = h.to(tl.float32), w.to(tl.float32)
        product = tl.dot(h, w, product, input_precision=PRECISION)
    return product


@triton.jit
def positive_scale(scale, row_scale, rows, within, ROW_SCALE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return what the logits of each row are a multiple of, [BLOCK_N]: a positive number."""
    if ROW_SCALE:
        of_rows = tl.maximum(tl.load(row_scale + rows, mask=within, other=1.0), LEAST_SCALE)
    else:
        of_rows = tl.full((BLOCK_N,), scale, tl.float32)
    return of_rows


@triton.jit
def readout(
    product,  # [BLOCK_N, BLOCK_V]
    bias,  # base of [V], or None
    first_column,
    V,
    inner,  # logit_scale / softcap; without a softcap not used
    SIGN: tl.constexpr,  # of logit_scale; 1 with a softcap
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return what the logits of a tile are a positive multiple of, −inf past V, and the slope of the softcap (1 without one).
    A maximum needs no multiple, and an exponent of 2 takes it together with log2(e).
    """
    if HAS_BIAS:
        columns = first_column + tl.arange(0, BLOCK_V)
        product += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    slope = 1.0
    if HAS_SOFTCAP:
        product, slope = tanh_and_slope(product * inner)
    if SIGN != 1:
        product *= SIGN
    if first_column + BLOCK_V > V:
        product = tl.where((first_column + tl.arange(0, BLOCK_V) < V)[None, :], product, float("-inf"))
    return product, slope


@triton.jit
def any_target(y, first_column, BLOCK_V: tl.constexpr):
    """Tell whether a tile has the target of one of its rows, as most have not."""
    return tl.max(((y >= first_column) & (y < first_column + BLOCK_V)).to(tl.int32), 0) != 0


@triton.jit
def store_tile(
    tile,  # [BLOCK_N, BLOCK_V]
    target,  # [rows, whole blocks of columns]: TMA descriptor, or base pointer
    stride,
    rows,  # [BLOCK_N] int64
    stored,  # [BLOCK_N]: which rows to write; TMA writes all that lie within the descriptor
    first_column,
    TMA: tl.constexpr,
):
    """Write a tile into a matrix."""
    if TMA:
        target.store([tl.min(rows).to(tl.int32), first_column], tile)
    else:
        columns = first_column + tl.arange(0, tile.shape[1])
        tl.store(target + (rows * stride)[:, None] + columns[None, :], tile, mask=stored[:, None])


# Triton's key for a kernel on disk tells the globals of a function it calls only if that one's own key was asked for before, so the
# keys would depend on which kernel a process launches first. (The interpreter has no keys.)
for helper in (in_order, tanh_and_slope, product_tile, positive_scale, readout, any_target, store_tile):
    getattr(helper, "cache_key", None)


class Launch:
    """The arguments that both kernels with a product take, for some rows of a call."""

    def __init__(self, operands: Operands, rows: Tensor, hidden: Tensor, target: Target):  # [n] int64, [n, D]: numbers, and hidden
        _, _, bias, targets, readout = operands
        self.rows, self.hidden, self.target = rows, hidden, target
        self.vocab, self.bias, self.readout = operands.weight.shape[0], bias, readout
        self.targets = targets.flatten()[rows]
        # Kernels multiply products by the sign, so that what is left of the scale is positive.
        scale = readout.logit_scale
        self.sign = 1 if readout.softcap is not None else (scale > 0) - (scale < 0)
        numerator = (abs(scale) or 1.0) if readout.softcap is None else readout.softcap
        self.row_scale, self.scale = None, 1.0
        if isinstance(readout.temperature, Tensor):
            self.row_scale = numerator / readout.temperature.flatten()[rows].float()
        else:
            self.scale = max(numerator / readout.temperature, LEAST_SCALE.value)

    @property
    def precision(self) -> str:
        """The precision of the products, after torch's own setting."""
        return precision(self.hidden.dtype, self.target, torch.backends.cuda.matmul.fp32_precision == "tf32")

    def arguments(self, weight: WeightSlice, config: KernelConfig) -> dict[str, Any]:
        """Return the arguments of a launch over some columns with ``config``, by name."""
        readout = self.readout
        return {
            "hidden": self._read(self.hidden, config.rows, config.depth),
            "targets": self.targets,
            "hidden_stride": self.hidden.stride(0),
            "weight": self._read(weight.values, config.columns, config.depth),
            "weight_stride": weight.values.stride(0),
            "weight_first": weight.columns.start,
            "bias": self.bias,
            "row_scale": self.row_scale,
            "scale": self.scale,
            "inner": 0.0 if readout.softcap is None else readout.logit_scale / readout.softcap,
            "V": self.vocab,
            "D": self.hidden.shape[1],
            "SIGN": self.sign,
            "ROW_SCALE": self.row_scale is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": readout.softcap is not None,
            "TMA": self.target.uses_tma,
            "PRECISION": self.precision,
            "SPECIALISED": config.specialised,
            "GROUP": config.group,
            "BLOCK_N": config.rows,
            "BLOCK_V": config.columns,
            "BLOCK_D": config.depth,
            "num_warps": config.warps,
            "num_stages": config.stages,
            "enable_fp_fusion": True,  # given, since Triton 3.10 will no longer assume it
        }

    def programs(self, config: KernelConfig, column_units: int) -> tuple[int]:
        """Return a persistent grid: the programs that the multiprocessors run at a time, or fewer where there is less to do."""
        return (min(self.target.processors * config.programs, triton.cdiv(len(self.rows), config.rows) * column_units),)

    def tile_of(self, matrix: Tensor, config: KernelConfig) -> Tensor | TensorDescriptor:
        """Return ``matrix`` as the ``target`` of ``store_tile``."""
        return self._read(matrix, config.rows, config.columns)

    def _read(self, matrix: Tensor, *block: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, list(block)) if self.target.uses_tma else matrix
