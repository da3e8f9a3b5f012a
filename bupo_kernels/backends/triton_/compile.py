"""Compiles every default configuration ahead of time, without a GPU, and prints what came of it: ``make kernels``.

The launches are the real ones, on small tensors, with a driver that only knows the target and a ``run`` that compiles instead of
launching: what is compiled is, specialisation for specialisation, what a GPU would be sent. A stack frame means spilled registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.problem import Operands, Readout
from bupo_kernels.backends.triton_ import config
from bupo_kernels.backends.triton_.gradient_cached import gradient_cached
from bupo_kernels.backends.triton_.gradient_recompute import gradient_recompute
from bupo_kernels.backends.triton_.linear_statistics import linear_statistics
from bupo_kernels.backends.triton_.merge import merge
from bupo_kernels.backends.triton_.product import Launch

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a block may have; 8.6 and 8.9, which run what 8.0 does, have 101376.
SHARED_MEMORY = {80: 101376, 90: 232448, 100: 232448}
MATRIX_INSTRUCTION = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*?(m\d+n\d+k\d+|kind::\w+)")


@dataclass(frozen=True)
class Compiled:
    kernel: str
    case: str
    arch: int
    config: str
    registers: int
    stack: int  # bytes: of spilled registers, there is nothing else on it
    shared: int  # bytes
    instruction: str  # of the tensor cores; "" without

    def __str__(self) -> str:
        shared = f"{self.shared / 1024:.0f} KiB"
        row = f"sm_{self.arch:<4} {self.kernel:<18} {self.case:<28} {self.config:<30}"
        return f"{row} {self.registers:>4} {self.stack:>6} {shared:>8}  {self.instruction}"


HEADER = f"{'target':<7} {'kernel':<18} {'case':<28} {'configuration':<30} {'regs':>4} {'spills':>6} {'shared':>8}  tensor cores"


class _Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # what is compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(arch: int) -> Iterator[list]:
    """Launches inside are compiled for ``arch`` and not run; the list receives what came of them."""
    launch, compiled = triton.runtime.jit.JITFunction.run, []

    def compile_only(kernel, *args, **kwargs):
        compiled.append(launch(kernel, *args, **{**kwargs, "warmup": True}))

    before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        with mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only):
            yield compiled
    finally:
        if before is not None:
            triton.runtime.driver.set_active(before)


def _operands(dtype: torch.dtype, *, width: int = 512, bias=False, per_row=False, softcap=None, shift: int = 0) -> Operands:
    rows, vocab = 64, 1024
    hidden = torch.zeros(rows * width + 16, dtype=dtype)[shift : rows * width + shift].view(rows, width)
    weight = torch.zeros(vocab * width + 16, dtype=dtype)[shift : vocab * width + shift].view(vocab, width)
    temperature = torch.ones(rows) if per_row else 0.7
    return Operands(
        hidden,
        weight,
        torch.zeros(vocab) if bias else None,
        torch.zeros(rows, dtype=torch.int64),
        Readout(temperature, 1.0, softcap),
    )


def cases(arch: int) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
    """(kernel, case, configuration, launch) of everything that runs by default."""
    target = config.Target("cuda", arch, processors=132)
    rows = torch.arange(64)
    count, floats = torch.tensor([64]), torch.zeros(64)

    def product_kernels(case: str, operands: Operands) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
        dtype, softcap = operands.hidden.dtype, operands.readout.softcap is not None
        launch = Launch(operands, rows, target)
        kind = {"regular": launch.regular, "softcap": softcap}
        chosen = config.statistics_config(dtype, target, **kind)
        yield "linear_statistics", case, str(chosen), lambda: linear_statistics(launch, count, with_entropy=True)
        if config.why_not_cached(dtype, softcap) is None:
            cache = torch.zeros(64, 1024, dtype=torch.bfloat16), torch.zeros(64, 16, dtype=torch.int32)
            chosen = config.statistics_config(dtype, target, cache=True, **kind)
            yield (
                "linear_statistics",
                f"{case}, E kept",
                str(chosen),
                lambda: linear_statistics(launch, count, with_entropy=True, cache=cache),
            )
        dz = torch.zeros(64, 1024, dtype=dtype)
        coefficients = Coefficients(floats, floats, floats, floats, rows)
        chosen = config.gradient_config(dtype, target, **kind)
        yield "gradient_recompute", case, str(chosen), lambda: gradient_recompute(launch, coefficients, dz, slice(0, 1024))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield from product_kernels(name, _operands(dtype))
        yield from product_kernels(f"{name}, all options", _operands(dtype, bias=True, per_row=True, softcap=30.0))
        yield from product_kernels(f"{name}, ragged width", _operands(dtype, width=520))
        yield from product_kernels(f"{name}, odd strides", _operands(dtype, width=509, shift=1))
        yield from product_kernels(
            f"{name}, odd, all options", _operands(dtype, width=509, shift=1, bias=True, per_row=True, softcap=9.0)
        )
    plain = Launch(_operands(torch.bfloat16), rows, target)
    chosen = config.statistics_config(torch.bfloat16, target, regular=True, softcap=False, argmax=True)
    yield (
        "linear_statistics",
        "bfloat16, arg max",
        str(chosen),
        lambda: linear_statistics(plain, count, with_entropy=True, with_argmax=True),
    )
    partials, best = torch.zeros(4, 4, 64), torch.zeros(4, 64, dtype=torch.int64)
    statistics = torch.zeros(4, 64)
    yield "merge", "arg max", "128", lambda: merge(partials, best, count, rows, statistics, rows, with_entropy=True)
    e, exponents = torch.zeros(64, 1024, dtype=torch.bfloat16), torch.zeros(64, 16, dtype=torch.int32)
    columns = config.statistics_config(torch.bfloat16, target, regular=True, softcap=False, cache=True).columns
    coefficients, dz = Coefficients(floats, floats, floats, floats, rows), torch.zeros(64, 1024, dtype=torch.bfloat16)
    yield (
        "gradient_cached",
        "bfloat16",
        f"32 x {columns}",
        lambda: gradient_cached((e, exponents), columns, rows, coefficients, dz, slice(0, 1024)),
    )


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Compiled]:
    for arch in architectures:
        for kernel, case, chosen, launch in cases(arch):
            with _compiling(arch) as compiled:
                launch()
            (binary,) = compiled
            yield Compiled(kernel, case, arch, chosen, *_resources(binary, arch))


def _resources(binary, arch: int) -> tuple[int, int, int, str]:
    """Registers, stack bytes, shared bytes, matrix instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{field}:(\d+)", text)[1]) for field in ("REG", "STACK"))
    found = sorted({f"{kind} {shape}" for kind, shape in MATRIX_INSTRUCTION.findall(binary.asm["ptx"])})
    return registers, stack, binary.metadata.shared, ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every default kernel configuration ahead of time and print its resources."
    )
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES, help="compute capability x 10")
    architectures = tuple(parser.parse_args().arch)
    print(f"Triton {triton.__version__}\n{HEADER}")
    for compiled in compile_all(architectures):
        print(compiled, flush=True)


if __name__ == "__main__":
    if config.interpreted():
        raise SystemExit("TRITON_INTERPRET: 1 given, accepted is unset: the interpreter compiles nothing")
    main()
