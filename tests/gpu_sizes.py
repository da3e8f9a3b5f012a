"""The memory that a test on a GPU needs, from the size of its problem: pure functions, so that it is known which tests a card of
16 GB runs. A test says its size by the marker ``size``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bupo_kernels.backends.base import Problem
from bupo_kernels.dispatch import NATIVE_CUDA, TORCH, TRITON, default_memory_budget

GIB = 2**30
OTHERS = GIB // 2  # code, cuBLAS's workspace
UNUSED = 0.1  # more, for what lies idle between the blocks of the allocator

# The oracle of test_gpu.py upcasts to float64:
ORACLE_ROWS = 256  # of the logits at a time,
ORACLE_SLICE = 16384  # rows of W,
ORACLE_WIDTH = 512  # columns of an operand of a gradient's product
CHOSEN = 48  # rows whose dH, and columns whose dW, are looked at


class Size(NamedTuple):
    """The size of a problem that gradients are taken of, and how it is run."""

    rows: int
    vocab: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    backend: str = "triton"
    budget: int | None = None
    one_pass: bool = False  # a policy loss

    @property
    def work(self) -> int:
        return self.rows * self.vocab * self.width


def size_of(item) -> Size | None:
    """What the marker ``size`` of a test says; what it leaves out are parameters of the test, by their names."""
    marker = item.get_closest_marker("size")
    if marker is None:
        return None
    given = dict(zip(Size._fields, marker.args, strict=False)) | marker.kwargs
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return Size(**{name: value for name, value in params.items() if name in Size._fields} | given)


def oracle_bytes(size: Size) -> int:
    """What ``assert_statistics`` and ``assert_gradient`` take at most, beyond what they are given."""
    longest = max(size.rows, size.vocab)
    block = 8 * min(ORACLE_ROWS, size.rows) * size.vocab
    upcast = 8 * (min(ORACLE_SLICE, size.vocab) + min(ORACLE_ROWS, size.rows)) * size.width
    gradient = 2 * 8 * longest * min(ORACLE_WIDTH, size.width)
    return max(5 * block + upcast, gradient) + 14 * 8 * CHOSEN * longest


def device_memory(size: Size, device: str = "cuda") -> int:
    """Bytes that a test of this size needs: operands and their gradients, and the more of what the call takes by its plan and of
    what the oracle takes."""
    name, _, strategy = size.backend.partition(":")
    backend = {"triton": TRITON, "native": NATIVE_CUDA, "torch": TORCH}[name]
    where = torch.device(device)
    budget = default_memory_budget(where) if size.budget is None else size.budget
    problem = Problem(size.rows, *size[:4], where, True, True, False, False, budget)
    plan = (backend.one_pass_plan if size.one_pass else backend.plan)(problem, strategy or None)
    operands = 2 * (size.rows + size.vocab) * size.width * size.dtype.itemsize
    call = plan.memory.working + plan.memory.accumulator
    return OTHERS + int((1 + UNUSED) * (operands + 100 * size.rows + max(call, oracle_bytes(size))))


def why_too_large(size: Size, free: int) -> str | None:
    """Why a test of this size is not run where so many bytes are free, or None."""
    needed = device_memory(size)
    return f"needs {needed / GIB:.1f} GiB of device memory, {free / GIB:.1f} are free" if needed > free else None
