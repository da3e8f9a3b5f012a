"""Ahead-of-time compilation of every default configuration, without a GPU, and a table of the resources: ``make kernels``.

The launches are the real ones, on small tensors, with a driver that only knows the target and a ``run`` that compiles instead of
launching, so that each specialisation is compiled as a GPU would get it. ``faults`` says what no kernel may have. What is compiled
lies in Triton's cache as if the launches had been made: ``precompile`` fills it for the GPU that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from multiprocessing import get_context
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
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 103, 120, 121)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Those that run the code of another one, within limits of their own: one dtype says that they do.
TWINS = ("sm_86", "sm_89", "sm_103", "sm_121")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MATRIX_INSTRUCTION = {
    "cuda": re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*?(m\d+n\d+k\d+|kind::\w+)"),
    "hip": re.compile(r"(v_mfma)_(\w+)"),
}
# What ptxas says of a kernel, and of a wait that it had to add to wgmma, which then no longer runs beside anything else.
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SERIALISED = re.compile(r"\(C75\d\d\)[^\n]*")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and its resources, a row of the table."""

    target: str
    kernel: str
    case: str
    config: str
    registers: int
    stack: int  # bytes
    spills: int  # bytes written and read (NVIDIA), or registers (AMD)
    shared: int  # bytes
    most_shared: int  # bytes that a block of the target may have
    bound: int  # bytes: what config.shared_bytes says of it
    instructions: int
    warnings: str  # of ptxas, that wgmma is serialised; "" without
    instruction: str  # that the tensor cores run; "" without

    def __str__(self) -> str:
        return _row(
            *(self.target, self.kernel, self.case, self.config),
            *(self.registers, self.stack, self.spills, f"{self.shared / 1024:.0f} KiB", self.instructions, self.instruction),
        )


def _row(target: str, kernel: str, case: str, configuration: str, *numbers: object) -> str:
    registers, stack, spills, shared, instructions, instruction = numbers
    what = f"{target:<7} {kernel:<18} {case:<34} {configuration:<33}"
    return f"{what} {registers:>4} {stack:>5} {spills:>6} {shared:>7} {instructions:>7}  {instruction}"


HEADER = _row("target", "kernel", "case", "configuration", "regs", "stack", "spills", "shared", "instr.", "tensor cores")


class _Driver:
    """The part of a driver that compiling needs."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton holds compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _compiling(target: GPUTarget) -> Iterator[list[tuple[str, str, Any]]]:
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


Case = tuple[str, Callable[[], object], int]  # its name, its launch, and what shared_bytes says of it


def cases(
    target: config.Target, *, dtypes: Sequence[torch.dtype] = DTYPES, entropies: Sequence[bool] = (True,), tuning: bool = False
) -> Iterator[Case]:
    """Yield every kernel and configuration that runs by default, or, for ``tuning``, all that may run instead."""
    rows, active_rows, floats = torch.arange(64, dtype=torch.int64, device="cpu"), _zeros(1, dtype=torch.int64) + 64, _zeros(64)
    cache = Cache(_zeros(64, 1024, dtype=torch.bfloat16), _zeros(64, 16, dtype=torch.int32))
    merged = _zeros(4, 64)
    for with_entropy in entropies:
        ending = "" if with_entropy else ", no entropy"
        coefficients = Coefficients(floats, floats, floats if with_entropy else None, floats, rows)
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            kinds = {
                "": _operands(dtype),
                ", all options": _operands(dtype, all_options=True),
                ", ragged width": _operands(dtype, width=520),
                ", odd strides": _operands(dtype, width=509, shift=1),
                ", odd, all options": _operands(dtype, width=509, shift=1, all_options=True),
            }
            dz = _zeros(64, 1024, dtype=dtype)
            for kind, operands in kinds.items():

                def statistics(launch: Launch, cache: Cache | None, with_entropy: bool = with_entropy) -> None:
                    linear_statistics(launch, active_rows, with_entropy=with_entropy, cache=cache)

                def recompute(launch: Launch, _: Cache | None, given: Coefficients = coefficients, dz: Tensor = dz) -> None:
                    gradient_recompute(launch, given, dz, slice(0, 1024))

                for kernel, call, stored in (
                    (config.STATISTICS, statistics, None),
                    (config.STATISTICS, statistics, cache),
                    (config.GRADIENT, recompute, None),
                ):
                    softcap = operands.readout.softcap is not None
                    if stored is not None and config.why_not_cached(dtype, softcap):
                        continue
                    regular = Launch(operands, rows, target).regular
                    about = {"regular": regular, "cache": stored is not None}
                    found = config.candidates(kernel, dtype, target, softcap=softcap, **about)
                    key = config.key_of(kernel, dtype, softcap=softcap, width=operands.hidden.shape[-1], **about)
                    for tile in found[1:] if tuning else found[:1]:
                        tuned = replace(target, tiles=((key, tile),))
                        run = partial(call, Launch(operands, rows, tuned), stored)
                        bound = config.shared_bytes(kernel, tile, dtype, target, **about)
                        yield name + kind + (", E stored" if stored is not None else "") + ending, run, bound
            if dtype == torch.float32 and not tuning:
                yield name + ending, partial(merge, _zeros(4, 4, 64), active_rows, rows, merged, with_entropy=with_entropy), 0
            elif not tuning:
                for kind, regular in (("", True), (", irregular", False)):
                    columns = config.statistics_config(dtype, target, width=512, regular=regular, softcap=False, cache=True).columns
                    run = partial(gradient_cached, cache, columns, rows, coefficients, dz, slice(0, 1024))
                    yield name + kind + ending, run, 0


@dataclass(frozen=True)
class Work:
    """The cases of a target that are to be compiled."""

    name: str
    gpu: GPUTarget
    target: config.Target
    dtypes: tuple[str, ...]
    entropies: tuple[bool, ...] = (True,)
    tuning: bool = False

    def cases(self) -> list[Case]:
        dtypes = [getattr(torch, dtype) for dtype in self.dtypes]
        return list(cases(self.target, dtypes=dtypes, entropies=self.entropies, tuning=self.tuning))

    def compile(self, case: int, *, inspect: bool) -> Compiled | None:
        """Compile one of the cases into Triton's cache, and return its row of the table if it is to be looked at."""
        name, launch, bound = self.cases()[case]
        with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(StringIO()) as log:
            # ptxas says nothing of a kernel that Triton finds in its cache.
            triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = inspect
            with _compiling(self.gpu) as compiled:
                launch()
        ((kernel, configuration, binary),) = compiled
        if not inspect:
            return None
        read = _resources_amd(binary.asm["amdgcn"]) if self.gpu.backend == "hip" else resources(log.getvalue(), binary.asm["cubin"])
        assembly = binary.asm["amdgcn" if self.gpu.backend == "hip" else "ptx"]
        found = sorted({" ".join(parts) for parts in MATRIX_INSTRUCTION[self.gpu.backend].findall(assembly)})
        return Compiled(
            target=self.name,
            kernel=kernel,
            case=name,
            config=configuration,
            shared=binary.metadata.shared,
            most_shared=self.target.shared,
            bound=bound,
            instruction=", ".join(found),
            **read,
        )


def work_for(name: str, *, brief: bool = False, tuning: bool = False) -> Work:
    """Return all that runs by default on a target. ``brief`` takes bfloat16 alone where a target has the code of another."""
    gpu = TARGETS[name]
    target = config.Target(gpu.backend, gpu.arch if gpu.backend == "cuda" else 0, processors=132)
    dtypes = DTYPES[:1] if brief and name in TWINS else DTYPES
    return Work(name, gpu, target, tuple(str(dtype).removeprefix("torch.") for dtype in dtypes), tuning=tuning)


def compile_all(works: Sequence[Work], jobs: int, *, inspect: bool = True) -> Iterator[Compiled | None]:
    """Compile the cases of all ``works`` in as many processes, and yield the rows of the table in order."""
    each = [(work, case) for work in works for case in range(len(work.cases()))]
    if jobs == 1:
        yield from (work.compile(case, inspect=inspect) for work, case in each)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(_compile, inspect=inspect), *zip(*each, strict=True))


def _compile(work: Work, case: int, *, inspect: bool) -> Compiled | None:
    torch.set_num_threads(1)
    return work.compile(case, inspect=inspect)


def resources(log: str, cubin: bytes) -> dict[str, Any]:
    """Return what a row of the table has of ptxas and its machine code."""
    stack, stores, loads = (int(number) for number in FRAME.findall(log)[0])
    return {
        "registers": int(REGISTERS.findall(log)[0]),
        "stack": stack,
        "spills": stores + loads,
        "instructions": code_bytes(cubin) // 16,
        "warnings": "; ".join(SERIALISED.findall(log)),
    }


def _resources_amd(assembly: str) -> dict[str, Any]:
    found = {
        name: int(re.findall(rf"{field}: *(\d+)", assembly)[0])
        for name, field in (
            ("registers", r"\.vgpr_count"),
            ("stack", r"\.private_segment_fixed_size"),
            ("spills", r"\.vgpr_spill_count"),
        )
    }
    return found | {"instructions": len(re.findall(r"^\t[a-z]\w+(?:\s|$)", assembly, re.MULTILINE)), "warnings": ""}


def code_bytes(cubin: bytes) -> int:
    """Return the size of the machine code in a cubin, an ELF file of 64 bits. An instruction has 16 bytes from 7.0 on; the last
    few only fill a line."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of a section: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    strings = sections[names][4]
    return sum(size for name, _, _, _, _, size in sections if cubin[strings + name :].startswith(b".text."))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every default kernel configuration ahead of time and print its resources."
    )
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=TARGETS, help="default: all of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one a core")
    parser.add_argument("--brief", action="store_true", help="bfloat16 alone for " + ", ".join(TWINS))
    parser.add_argument("--candidates", action="store_true", help="what `bupo tune` tries, instead of the defaults")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    options = parser.parse_args()
    if config.interpreted():
        parser.error("TRITON_INTERPRET: 1 given, accepted is unset: the interpreter compiles nothing")
    if not options.json:
        print(f"Triton {triton.__version__}\n{HEADER}")
    works = [work_for(name, brief=options.brief, tuning=options.candidates) for name in options.target]
    for compiled in compile_all(works, options.jobs):
        if compiled is not None:
            print(json.dumps(asdict(compiled)) if options.json else compiled, flush=True)


if __name__ == "__main__":
    main()
