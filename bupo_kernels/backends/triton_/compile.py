"""Ahead-of-time compilation of every default configuration, without a GPU, and a table of the resources: ``make kernels``.

The launches are the real ones, on small tensors, with a driver that only knows the target and a ``run`` that compiles instead of
launching, so that each specialisation is compiled as a GPU would get it. A stack frame means spilled registers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Cache, Operands, Readout
from bupo_kernels.backends.triton_ import config
from bupo_kernels.backends.triton_.gradient_cached import gradient_cached
from bupo_kernels.backends.triton_.gradient_recompute import gradient_recompute
from bupo_kernels.backends.triton_.linear_statistics import linear_statistics
from bupo_kernels.backends.triton_.merge import merge
from bupo_kernels.backends.triton_.product import Launch

TARGETS = {  # name -> what Triton calls it
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTION = {
    "cuda": re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*?(m\d+n\d+k\d+|kind::\w+)"),
    "hip": re.compile(r"(v_mfma)_(\w+)"),
}


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and its resources, a row of the table."""

    target: str
    kernel: str
    case: str
    config: str
    registers: int
    spills: int  # bytes of the stack frame (NVIDIA: there is nothing else on it), or registers (AMD)
    shared: int  # bytes
    instruction: str  # that the tensor cores run; "" without

    def __str__(self) -> str:
        row = f"{self.target:<7} {self.kernel:<18} {self.case:<28} {self.config:<30} {self.registers:>4} {self.spills:>6}"
        return f"{row} {self.shared / 1024:>4.0f} KiB  {self.instruction}"


HEADER = f"{'target':<7} {'kernel':<18} {'case':<28} {'configuration':<30} {'regs':>4} {'spills':>6} {'shared':>8}  tensor cores"


class _Driver:
    """The part of a driver that compiling needs."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target  # Triton holds compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _compiling(target: str) -> Iterator[list[tuple[str, str, Any]]]:
    """Compile launches for ``target`` within the context instead of running them. The list receives (kernel, configuration, binary)
    of each."""
    launch = triton.runtime.jit.JITFunction.run
    compiled: list[tuple[str, str, Any]] = []

    def compile_only(kernel: Any, *args: Any, **kwargs: Any) -> None:
        tile = " x ".join(str(kwargs[block]) for block in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if block in kwargs)
        configuration = f"{tile}, {kwargs['num_warps']} warps" + (
            f", {kwargs['num_stages']} stages" if "num_stages" in kwargs else ""
        )
        binary = launch(kernel, *args, **{**kwargs, "warmup": True})
        compiled.append((kernel.__name__.removesuffix("_kernel"), configuration, binary))

    before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    triton.runtime.driver.set_active(_Driver(target))
    try:
        with mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only):
            yield compiled
    finally:
        if before is not None:
            triton.runtime.driver.set_active(before)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="cpu")


def _operands(dtype: torch.dtype, *, width: int = 512, all_options: bool = False, shift: int = 0) -> Operands:
    """Return 64 rows and 1024 columns, which start ``shift`` elements into their memory."""
    rows, vocab = 64, 1024
    hidden = _zeros(rows * width + 16, dtype=dtype)[shift : rows * width + shift].view(rows, width)
    weight = _zeros(vocab * width + 16, dtype=dtype)[shift : vocab * width + shift].view(vocab, width)
    bias = _zeros(vocab) if all_options else None
    temperature = torch.ones(rows, dtype=torch.float32, device="cpu") if all_options else 0.7
    readout = Readout(temperature, 1.0, 30.0 if all_options else None)
    return Operands(hidden, weight, bias, _zeros(rows, dtype=torch.int64), readout)


def cases(name: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (case, launch) of every kernel and configuration that runs by default."""
    gpu = TARGETS[name]
    target = config.Target(gpu.backend, gpu.arch if gpu.backend == "cuda" else 0, processors=132)
    rows, active_rows, floats = torch.arange(64, dtype=torch.int64, device="cpu"), _zeros(1, dtype=torch.int64) + 64, _zeros(64)
    coefficients = Coefficients(floats, floats, floats, floats, rows)
    cache = Cache(_zeros(64, 1024, dtype=torch.bfloat16), _zeros(64, 16, dtype=torch.int32))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kinds = {
            "": _operands(dtype),
            ", all options": _operands(dtype, all_options=True),
            ", ragged width": _operands(dtype, width=520),
            ", odd strides": _operands(dtype, width=509, shift=1),
            ", odd, all options": _operands(dtype, width=509, shift=1, all_options=True),
        }
        for kind, operands in kinds.items():
            case, launch = str(dtype).removeprefix("torch.") + kind, Launch(operands, rows, target)
            statistics = partial(linear_statistics, launch, active_rows, with_entropy=True)
            yield case, statistics
            if config.why_not_cached(dtype, softcap=operands.readout.softcap is not None) is None:
                yield f"{case}, E stored", partial(statistics, cache=cache)
            dz = _zeros(64, 1024, dtype=dtype)
            yield case, partial(gradient_recompute, launch, coefficients, dz, slice(0, 1024))

    partials, merged = _zeros(4, 4, 64), _zeros(4, 64)
    yield "float32", partial(merge, partials, active_rows, rows, merged, with_entropy=True)
    columns = config.statistics_config(torch.bfloat16, target, regular=True, softcap=False, cache=True).columns
    dz = _zeros(64, 1024, dtype=torch.bfloat16)
    yield "bfloat16", partial(gradient_cached, cache, columns, rows, coefficients, dz, slice(0, 1024))


def compile_all(targets: Iterable[str] = TARGETS) -> Iterator[Compiled]:
    """Compile every case for each of the ``targets``, and yield the rows of the table."""
    for target in targets:
        for case, launch in cases(target):
            with _compiling(target) as compiled:
                launch()
            ((kernel, configuration, binary),) = compiled
            yield Compiled(target, kernel, case, configuration, *_resources(binary, TARGETS[target].backend))


def _resources(binary: Any, backend: str) -> tuple[int, int, int, str]:
    """Return registers, spills, shared bytes and matrix instruction."""
    if backend == "hip":
        text, fields = binary.asm["amdgcn"], (r"\.vgpr_count", r"\.vgpr_spill_count")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        fields = r"\bREG", r"\bSTACK"
    registers, spills = (int(re.findall(rf"{field}: *(\d+)", text)[0]) for field in fields)
    assembly = binary.asm["amdgcn" if backend == "hip" else "ptx"]
    found = sorted({" ".join(parts) for parts in MATRIX_INSTRUCTION[backend].findall(assembly)})
    return registers, spills, binary.metadata.shared, ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every default kernel configuration ahead of time and print its resources."
    )
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=TARGETS, help="default: all of them")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    options = parser.parse_args()
    if config.interpreted():
        parser.error("TRITON_INTERPRET: 1 given, accepted is unset: the interpreter compiles nothing")
    if not options.json:
        print(f"Triton {triton.__version__}\n{HEADER}")
    for compiled in compile_all(options.target):
        print(json.dumps(asdict(compiled)) if options.json else compiled, flush=True)


if __name__ == "__main__":
    main()
