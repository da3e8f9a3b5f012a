"""The compiled kernels, ``bupo_kernels._C``, where they were built for this machine."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

built: ModuleType | None
try:
    built = importlib.import_module("bupo_kernels._C")
except ModuleNotFoundError:  # any other ImportError of a module that is there stays an error
    built = None

# All instruction sets that setup.py knows, the fastest of each architecture first.
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon", "portable")
MULTIPLY_BF16 = (
    "amx",
    "avx512_bf16",
    "neon_bf16",
)  # of these, those whose panels are of bf16; the others' are of fp32, which hold fp16 too


@functools.cache
def isas() -> tuple[str, ...]:
    """Return the instruction sets that were built and that this CPU has, the fastest first; with ``BUPO_MAX_ISA`` in the
    environment from that one on, as on an older CPU.

    Raises ``ValueError`` where ``BUPO_MAX_ISA`` names none.
    """
    fastest = os.environ.get("BUPO_MAX_ISA", ISAS[0])
    if fastest not in ISAS:
        raise ValueError(f"BUPO_MAX_ISA: {fastest!r} given, accepted are {', '.join(ISAS)}")
    return () if built is None else tuple(isa for isa in built.cpu.isas() if ISAS.index(isa) >= ISAS.index(fastest))


@functools.cache
def kernels(isa: str) -> Any:
    """Return the functions of csrc/cpu/kernels.h for one of :func:`isas`."""
    assert built is not None
    return built.cpu.Kernels(isa)


def cuda() -> ModuleType | None:
    """Return the functions of csrc/cuda/rows.h, or None where they were not built."""
    return getattr(built, "cuda", None)


def driver_version() -> int:
    """Return the CUDA version that the driver is for, 1000 · major + 10 · minor; 0 where there is none, or torch does not say."""
    return getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()


def why_not_cuda() -> str | None:
    """Return the reason :func:`cuda` cannot run here, or None. The runtime that is linked in needs a driver of its own major
    version or newer (NVIDIA calls that minor version compatibility), whatever torch's needs."""
    if cuda() is None:
        return "the CUDA kernels were not built; `bupo env` says why"
    major, driver = _cuda_major(), driver_version()
    if 0 < driver < 1000 * major:
        return (
            f"the CUDA kernels were built with CUDA {major}, which needs a driver for CUDA {major}.0 or newer, and the one here is "
            f"for {driver // 1000}.{driver % 1000 // 10}; a newer driver would do, or building them with nvcc {driver // 1000}"
        )
    return None


@functools.cache  # every call of an op asks
def _cuda_major() -> int:
    """Return the major version of the CUDA that the kernels were built with; 0 where nobody knows."""
    release = "" if built is None else built.build_info()["cuda_version"]
    return int(release.partition(".")[0]) if release[:1].isdigit() else 0


def dtype_name(tensor: Tensor) -> str:
    """Return the name by which C++ knows the dtype of ``tensor``."""
    return str(tensor.dtype).removeprefix("torch.")


def address(tensor: Tensor | None, dtype: torch.dtype | None = None, length: int = 0, device: str = "cpu") -> int:
    """Return the address of ``tensor`` for C++, or 0 for None. A pointer does not know its memory, so whatever could make a kernel
    write past its end is checked here: that there are ``length`` numbers of ``dtype`` (None: of any) side by side, in the last
    dimension."""
    if tensor is None:
        return 0
    # The cheapest check comes first: a kernel has a dozen addresses.
    if dtype is not None and tensor.dtype is not dtype:
        raise TypeError(f"memory of a kernel: {tensor.dtype} given, accepted is {dtype}")
    if tensor.device.type != device:
        raise ValueError(f"memory of a kernel: on {tensor.device} given, accepted is {device}")
    if tensor.shape[-1] < length or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        given = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"memory of a kernel: {given} given, accepted are {length} or more side by side")
    return tensor.data_ptr()


def present(memory: Tensor) -> Tensor:
    """Return ``memory``, on a CPU with its pages in place: a large result is allocated anew by each call."""
    if built is not None and memory.device.type == "cpu":
        built.cpu.make_present(address(memory), memory.nbytes, torch.get_num_threads())
    return memory


def words(count: int) -> Tensor:
    """Return uninitialised memory of ``count`` words, 4 bytes each."""
    return torch.empty(count, dtype=torch.int32, device="cpu")
