"""A model of the machine: the public rates of some GPUs, and what counted work takes at these rates.

Everything here is a prediction; no number of it was measured by this project. ``dispatch.py`` prints it with a plan (``explain``),
``benchmarks/predicted.md`` has it for every GPU of :data:`GPUS`. Backends count their own work (``Backend.predicted``) with the
functions of this file.

Rates that NVIDIA publishes are taken from the data sheets and architecture white papers of H100, H200, B200, A100 (80 GB SXM),
L40S, GeForce RTX 4090 and 5090: multiprocessors, boost clock, dense bf16 products with fp32 sums, fp32 outside of tensor cores,
memory. Assumed, because nobody publishes them:

* ``sustained``, the rate that long products of the library keep under the card's power limit. H100 and H200 700: Liger's and
  QuACK's kernels are said to run at 706 to 745 there, 794 is the best of many short ones. B200 1500 (best 1745), A100 250 (271);
  these three from the table of achievable matmul FLOPS in stas00/ml-engineering. L40S 230 (best 269), RTX 4090 150 (158 to 165),
  RTX 5090 190 (179 and 236 on two cards); these from zzc0721/torch-performance-test-data, issues 43, 78 and 200, pull request 15.
* ``l2_bytes_per_clock``: A100's 5120 are in its white paper; H100, H200 and B200 are taken to have no more, the others 2048.
* the shares of :data:`MEMORY_SHARE`, :data:`FP32_SHARE` and :data:`MAIN_LOOP`, and :data:`FILL_CYCLES`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

MEMORY_SHARE = 0.9  # of the memory's rate, in long reads and writes
FP32_SHARE = 0.76  # of the fp32 rate, in long products outside of tensor cores
# The rate of a Triton kernel's loop over D, as a share of the library's, by the matrix unit. Below Hopper, operands go through
# registers, and all warps wait for each other at each step.
MAIN_LOOP = {"wgmma": 0.92, "tcgen05": 0.92, "mma.sync": 0.80}
FILL_CYCLES = 900  # from a tile's end until operands of the next have come
SCHEDULERS = 4  # of a multiprocessor: each issues an instruction of one of its warps a cycle


@dataclass(frozen=True)
class Gpu:
    """The public rates of a GPU; see the head of this file for their sources."""

    name: str  # as ``explain(device=)`` takes it
    model: str  # as its driver calls it
    arch: int  # compute capability x 10
    processors: int  # multiprocessors
    clock: float  # boost, Hz
    peak: float  # dense bf16 products with fp32 sums, FLOP/s
    sustained: float  # what long ones keep, FLOP/s
    fp32: float  # outside of tensor cores, FLOP/s
    memory_rate: float  # bytes/s
    memory: int  # bytes
    l2_bytes_per_clock: int  # read, all multiprocessors together

    @property
    def flops_per_clock(self) -> float:
        """The bf16 FLOP of a multiprocessor in a cycle."""
        return self.peak / (self.processors * self.clock)

    @property
    def sustained_clock(self) -> float:
        """The clock, in Hz, at which tensor cores that never wait would run at the sustained rate."""
        return self.sustained / (self.processors * self.flops_per_clock)


GPUS = (
    Gpu("H100", "NVIDIA H100 80GB HBM3", 90, 132, 1.83e9, 989.4e12, 700e12, 66.9e12, 3.35e12, 81559 << 20, 5120),
    Gpu("H200", "NVIDIA H200", 90, 132, 1.83e9, 989.4e12, 700e12, 66.9e12, 4.8e12, 143771 << 20, 5120),
    Gpu("B200", "NVIDIA B200", 100, 148, 1.856e9, 2250e12, 1500e12, 75e12, 8e12, 183359 << 20, 5120),
    Gpu("A100", "NVIDIA A100-SXM4-80GB", 80, 108, 1.41e9, 312e12, 250e12, 19.5e12, 2.039e12, 81920 << 20, 5120),
    Gpu("L40S", "NVIDIA L40S", 89, 142, 2.52e9, 362e12, 230e12, 91.6e12, 0.864e12, 46068 << 20, 2048),
    Gpu("RTX 4090", "NVIDIA GeForce RTX 4090", 89, 128, 2.52e9, 165.2e12, 150e12, 82.6e12, 1.008e12, 24564 << 20, 2048),
    Gpu("RTX 5090", "NVIDIA GeForce RTX 5090", 120, 170, 2.407e9, 209.5e12, 190e12, 104.8e12, 1.792e12, 32607 << 20, 2048),
)


def named(name: str) -> Gpu:
    """Return the GPU of a ``name``. Raise ``ValueError`` for one whose rates are not here."""
    for gpu in GPUS:
        if gpu.name == name:
            return gpu
    raise ValueError(f"device: {name!r} given, accepted are {', '.join(gpu.name for gpu in GPUS)}")


@functools.cache
def present(device: torch.device) -> Gpu | None:
    """Return the GPU that ``device`` is; None where its rates are not here. A slice of one (MIG) is another."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return next((g for g in GPUS if (g.model, g.processors) == (properties.name, properties.multi_processor_count)), None)


class Seconds(NamedTuple):
    """The time of a call and of its backward. A one-pass loss has its gradients in the forward."""

    forward: float
    backward: float
    measured: bool = False  # whether `bupo tune` has measured kernels of it

    @property
    def total(self) -> float:
        return self.forward + self.backward


class Shape(NamedTuple):
    """The sizes of the logits: of the rows that count, the vocabulary, a hidden vector, and the bytes of an operand's element."""

    rows: int
    vocab: int
    width: int
    item: int

    @property
    def logits(self) -> int:
        return self.rows * self.vocab


def moved(gpu: Gpu, count: float) -> float:
    """Return the seconds in which the GPU's memory moves ``count`` bytes."""
    return count / (MEMORY_SHARE * gpu.memory_rate)


def product(gpu: Gpu, shape: Shape, *, upcast: bool = False) -> float:
    """Return the seconds of one library product of 2·N·V·D FLOP; in fp32 where the operands are, or are ``upcast`` to it."""
    rate = FP32_SHARE * gpu.fp32 if upcast or shape.item > 2 else gpu.sustained
    return 2 * shape.logits * shape.width / rate


def bare_products(gpu: Gpu, shape: Shape, gradients: int) -> Seconds:
    """Return the time of the products alone: of the forward, and of so many ``gradients`` (dH, dW)."""
    one = product(gpu, shape)
    return Seconds(one, gradients * one)


def naive(gpu: Gpu, shape: Shape, gradients: int) -> Seconds:
    """Return the time of naive logits in torch: ``F.linear``, a cast to fp32, log-softmax, gather, and what autograd makes of it.

    Bytes a logit: the forward writes the product, casts it (read, write) and log-softmax reads the cast and writes. The backward
    fills and scatters the gradient of the gather; that of log-softmax reads it twice, and the log-probs, and writes; the cast back
    reads and writes.
    """
    cast = shape.item + 4 if shape.item < 4 else 0
    of_forward, of_backward = shape.item + cast + 4 + 4, 4 + (2 * 4 + 4 + 4) + cast
    one = product(gpu, shape)
    backward = gradients * one + moved(gpu, of_backward * shape.logits) if gradients else 0.0
    return Seconds(one + moved(gpu, of_forward * shape.logits), backward)


def naive_bytes(shape: Shape, gradients: int) -> int:
    """Return the memory of naive logits: in the forward the product, its cast and log-probs; in the backward log-probs, their
    gradient and that of the cast, all in fp32."""
    cast = shape.item if shape.item < 4 else 0
    return shape.logits * max(cast + 4 + 4, 3 * 4 if gradients else 0)


def fused_product(
    gpu: Gpu,
    shape: Shape,
    *,
    tile: tuple[int, int],  # rows, columns
    warps: int,
    blocks: int,  # that run side by side on a multiprocessor
    instructions: float,  # of a thread for each of its logits, from one tile's last product to the next one's first
    main_loop: float,
) -> float:
    """Return the seconds of a kernel that multiplies tile by tile and works on each before it goes on.

    The loop over D of a tile takes as long as its products, at the ``main_loop`` share of the library's rate, or as its operands
    take from L2. Then tensor cores wait for the instructions between, and for the next operands, unless another block of the
    multiprocessor has products for them.
    """
    rows, columns = tile
    clock = gpu.sustained_clock
    of_products = 2 * rows * columns * shape.width / gpu.flops_per_clock / main_loop / clock
    # L2 is no part of what the power limit slows down most: it keeps the boost clock.
    of_operands = (rows + columns) * shape.width * shape.item * gpu.processors / (gpu.l2_bytes_per_clock * gpu.clock)
    loop = max(of_products, of_operands)
    between = rows * columns / (32 * warps) * instructions * warps / SCHEDULERS / clock
    alone = loop + between + FILL_CYCLES / clock
    of_tile = max(loop, between, alone / blocks)
    return -(-shape.rows // rows) * -(-shape.vocab // columns) * of_tile / gpu.processors


def gradients_of_dz(gpu: Gpu, shape: Shape, products: int, bytes_of_sums: int, *, upcast: bool = False) -> float:
    """Return the seconds of so many ``products`` of dz (dH, dW), and of what their sums move where they come in parts."""
    return products * product(gpu, shape, upcast=upcast) + moved(gpu, bytes_of_sums)
