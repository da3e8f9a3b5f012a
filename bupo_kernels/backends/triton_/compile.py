"""Ahead-of-time compilation of every default configuration, without a GPU, and a table of the resources: ``make kernels``.

The launches are the real ones, on small tensors, with a driver that only knows the target and a ``run`` that compiles instead of
launching, so that each specialisation is compiled as a GPU would get it. ``faults`` says what no kernel may have. What is compiled
lies in Triton's cache as if the launches had been made: ``precompile`` fills it for the GPU that is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bupo_kernels.backends import sass
from bupo_kernels.backends.algebra import Coefficients, Statistics
from bupo_kernels.backends.base import Cache, Operands, Readout
from bupo_kernels.backends.divergences import Side, Upstream
from bupo_kernels.backends.lens_loop import Comparison, Running
from bupo_kernels.backends.triton_ import config, counts
from bupo_kernels.backends.triton_.copies import HiddenRows, weight_slice
from bupo_kernels.backends.triton_.divergence_rows import divergence_rows
from bupo_kernels.backends.triton_.gathers import gathered_dots, gathered_sums
from bupo_kernels.backends.triton_.gradient_cached import gradient_cached
from bupo_kernels.backends.triton_.gradient_recompute import gradient_recompute
from bupo_kernels.backends.triton_.lens import lens_comparison, lens_sums
from bupo_kernels.backends.triton_.linear_statistics import linear_statistics
from bupo_kernels.backends.triton_.merge import merge
from bupo_kernels.backends.triton_.product import Launch

TARGETS = {  # name -> what Triton calls it
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 103, 120, 121)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Those that run the code of another one, within limits of their own: one dtype says that they do.
TWINS = ("sm_86", "sm_89", "sm_103", "sm_121")
DTYPE_NAMES = ("bfloat16", "float16", "float32")

# How many instructions kernels have with this Triton for each unit: of the cases, dtypes and targets, the one that has the most.
MEASURED_WITH = "3.6."
UNITS = ("mma.sync", "wgmma", "tcgen05", "mfma")
BUDGETS = {
    "linear_statistics, 16 bit": (1720, 2192, 1504, 1122),
    "linear_statistics, 16 bit, E stored": (2184, 2544, 1728, 1414),
    "gradient_recompute, 16 bit": (2488, 2376, 1424, 1107),
    "linear_statistics, 16 bit, all options": (3600, 3168, 3168, 2365),
    "gradient_recompute, 16 bit, all options": (4288, 2264, 2328, 1556),
    "gradient_cached, 16 bit": (824, 816, 816, 272),
    "linear_statistics, fp32": (1640, 1184, 1728, 1028),
    "gradient_recompute, fp32": (1664, 1216, 1688, 853),
    "linear_statistics, fp32, all options": (2496, 2080, 2528, 1574),
    "gradient_recompute, fp32, all options": (2848, 2496, 2896, 1524),
    "merge, fp32": (432, 432, 416, 419),
    "divergence_rows, 16 bit, forward KL": (1064, 1088, 1064, 983),
    "divergence_rows, 16 bit, forward KL, all options": (2528, 2552, 2432, 1980),
    "divergence_rows, 16 bit, JSD": (1848, 1872, 1784, 1353),
    "divergence_rows, 16 bit, JSD, all options": (3304, 3328, 3152, 2343),
    "divergence_rows, fp32, forward KL": (1072, 1096, 1064, 943),
    "divergence_rows, fp32, forward KL, all options": (2536, 2560, 2424, 1944),
    "divergence_rows, fp32, JSD": (1840, 1864, 1776, 1315),
    "divergence_rows, fp32, JSD, all options": (3304, 3336, 3168, 2300),
    "gathered_dots, 16 bit": (232, 240, 232, 145),
    "gathered_sums, 16 bit": (264, 280, 272, 287),
    "gathered_dots, 16 bit, ragged width": (664, 680, 608, 496),
    "gathered_sums, 16 bit, ragged width": (344, 352, 352, 216),
    "gathered_dots, fp32": (304, 304, 328, 182),
    "gathered_sums, fp32": (224, 240, 240, 221),
    "gathered_dots, fp32, ragged width": (624, 640, 552, 479),
    "gathered_sums, fp32, ragged width": (320, 328, 328, 200),
    "lens_sums, fp32": (272, 272, 256, 256),
    "lens_sums, fp32, final policy": (560, 568, 528, 537),
    "lens_sums, fp32, all pairs": (280, 288, 272, 262),
    "lens_comparison, fp32, rank": (400, 408, 152, 132),
    "lens_comparison, fp32, jsd": (584, 584, 536, 328),
}

SPECIALISED_BUDGETS = {
    "linear_statistics": 2416,
    "linear_statistics, E stored": 2736,
    "gradient_recompute": 2272,
}

# The cases whose instructions between two products counts.py has, for predictions.
COUNTED = ("bfloat16", "float16", "bfloat16, E stored", "float16, E stored")

MATRIX_INSTRUCTION = {
    "cuda": re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*?(m\d+n\d+k\d+|kind::\w+)"),
    "hip": re.compile(r"(v_mfma)_(\w+)"),
}
# What the code of a kernel that is warp-specialised begins with: 8 warps of epilogue and 4 others, and room for two accumulators of
# 128 x 256, one of which is read while the other is written.
THREADS = re.compile(r"\.reqntid (\d+)")
TENSOR_MEMORY = re.compile(r"tcgen05\.alloc[\w.:]* \[%?\w+\], (\d+);")
SPECIALISED = (384, 512)
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
    bound: int  # bytes: what config.shared_bytes says of it
    programs: int  # that a multiprocessor is to run at a time
    threads: int  # of a program
    instructions: int
    warnings: str  # of ptxas, that wgmma is serialised; "" without
    instruction: str  # that the tensor cores run; "" without
    tensor_memory: int = 0  # columns, where there is any
    between: int | None = None  # instructions between two tiles' products; None where that is not counted

    def __str__(self) -> str:
        return _row(
            *(self.target, self.kernel, self.case, self.config),
            *(self.registers, self.stack, self.spills, f"{self.shared / 1024:.0f} KiB", self.instructions),
            *("" if self.between is None else self.between, self.instruction),
        )


def _row(target: str, kernel: str, case: str, configuration: str, *numbers: object) -> str:
    registers, stack, spills, shared, instructions, between, instruction = numbers
    what = f"{target:<7} {kernel:<18} {case:<34} {configuration:<33}"
    return f"{what} {registers:>4} {stack:>5} {spills:>6} {shared:>7} {instructions:>7} {between:>7}  {instruction}"


HEADER = _row("target", "kernel", "case", "configuration", "regs", "stack", "spills", "shared", "instr.", "between", "tensor cores")


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
        tile = " x ".join(str(kwargs[block]) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_V", "BLOCK_D") if block in kwargs)
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


ROWS, COLUMNS = 64, 1024  # of the launches
LENS_BYTES = 512  # for its sums
GATHERED_BYTES = 8192  # a tile of 8 x 256 fp32, whose sums pass between warps
RAGGED = 1061  # a vocabulary that is no multiple of 16: Triton tells kernels apart by that


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="cpu")


def _operands(dtype: torch.dtype, *, width: int = 512, vocab: int = COLUMNS, all_options: bool = False) -> Operands:
    hidden, weight = _zeros(ROWS, width, dtype=dtype), _zeros(vocab, width, dtype=dtype)
    bias = _zeros(vocab) if all_options else None
    temperature = torch.ones(ROWS, dtype=torch.float32, device="cpu") if all_options else 0.7
    readout = Readout(temperature, 1.0, 30.0 if all_options else None)
    return Operands(hidden, weight, bias, _zeros(ROWS, dtype=torch.int64), readout)


def _coefficients(with_entropy: bool) -> Coefficients:
    floats = _zeros(ROWS)
    return Coefficients(floats, floats, floats if with_entropy else None, floats, _zeros(ROWS, dtype=torch.int64))


def _cache() -> Cache:
    e, exponents = config.padded(RAGGED), config.exponents_per_row(RAGGED)
    return Cache(_zeros(ROWS, e, dtype=torch.bfloat16), _zeros(ROWS, exponents, dtype=torch.int32))


class Case(NamedTuple):
    """A kernel that is to be compiled."""

    name: str
    launch: Callable[[], object]
    bound: int = 0  # bytes: what config.shared_bytes says of it
    programs: int = 1  # that a multiprocessor is to run at a time


def _products(target: config.Target, operands: Operands, with_entropy: bool, tuning: bool) -> Iterator[Case]:
    """Yield the cases of the kernels with a product: what runs by default, before the self-check and after it, or, for ``tuning``,
    what else may."""
    width, dtype, softcap = operands.hidden.shape[-1], operands.hidden.dtype, operands.readout.softcap is not None
    rows, active_rows = torch.arange(ROWS, dtype=torch.int64, device="cpu"), _zeros(1, dtype=torch.int64)
    hidden = HiddenRows(operands, rows, config.read_width(width, dtype, target))[:]
    vocab = len(operands.weight)
    every, some = (weight_slice(operands.weight, slice(0, columns), hidden.shape[1]) for columns in (vocab, COLUMNS))
    for kernel, stored in ((config.STATISTICS, False), (config.STATISTICS, True), (config.GRADIENT, False)):
        if stored and config.why_not_cached(dtype, softcap):
            continue
        flags = {"softcap": softcap, "cache": stored}
        default = config.chosen(kernel, dtype, target, width=width, **flags)
        proven = replace(target, proven=DTYPE_NAMES)
        tiles = dict.fromkeys((default, config.chosen(kernel, dtype, proven, width=width, **flags)))
        for tile in config.candidates(kernel, dtype, target, **flags)[1:] if tuning else tiles:
            tuned = replace(target, tiles=((config.key_of(kernel, dtype, width=width, **flags), tile),))
            launch = Launch(operands, rows, hidden, tuned)
            run: Callable[[], object]
            if kernel == config.GRADIENT:
                dz = _zeros(ROWS, COLUMNS, dtype=dtype)
                run = partial(gradient_recompute, launch, some, _coefficients(with_entropy), dz)
            else:
                cache = _cache() if stored else None
                partials = _zeros(-(-vocab // config.partial_columns(vocab, tile)), 4, ROWS)
                run = partial(linear_statistics, launch, every, active_rows, partials, with_entropy=with_entropy, cache=cache)
            bound = config.shared_bytes(kernel, tile, dtype, target, cache=stored)
            yield Case(", E stored" * stored + ", warp-specialised" * tile.specialised, run, bound, tile.programs)


def _others(target: config.Target, dtype: torch.dtype, with_entropy: bool) -> Iterator[Case]:
    """Yield the cases of the kernels without a product."""
    rows = torch.arange(ROWS, dtype=torch.int64, device="cpu")
    for width in (512, 509):  # a row that ends within a line, too
        matrix, ending = _zeros(ROWS, width, dtype=dtype), "" if width % 16 == 0 else ", ragged width"
        yield Case(ending, partial(gathered_dots, matrix, rows, matrix, rows, _zeros(ROWS)), GATHERED_BYTES)
        yield Case(ending, partial(gathered_sums, _zeros(ROWS), matrix, rows, rows, matrix, rows[1:]), GATHERED_BYTES)
    # With fp16, whose dz waits for its scale, it is the kernel of fp32.
    for beta, name in ((0.0, "forward KL"), (0.5, "JSD")) if dtype != torch.float16 else ():
        for all_options in (False, True):
            student, teacher = (_rows_of_policy(dtype, all_options) for _ in range(2))
            upstream = Upstream(_zeros(ROWS), _zeros(ROWS) if with_entropy and all_options else None)
            run = partial(divergence_rows, student, teacher, beta, upstream, _zeros(ROWS), _zeros(ROWS))
            yield Case(f", {name}" + ", all options" * all_options, run, 1024)  # for its sums
    if dtype == torch.float32:
        count = _zeros(1, dtype=torch.int64)
        merging = partial(merge, _zeros(4, 4, ROWS), count, rows, _zeros(4, ROWS), with_entropy=with_entropy)
        yield Case("", merging, 512)  # for its sums
        yield from _lens()
        return
    columns = config.statistics_config(dtype, target, width=512, softcap=False, cache=True).columns
    dz, coefficients = _zeros(ROWS, COLUMNS, dtype=dtype), _coefficients(with_entropy)
    yield Case("", partial(gradient_cached, _cache(), columns, rows, coefficients, dz, slice(0, COLUMNS)))


def _lens() -> Iterator[Case]:
    """Yield the cases of the kernels of a lens, which read fp32 products whatever was multiplied."""
    z, by_row = _zeros(2, ROWS, COLUMNS), _zeros(2, ROWS)
    statistics, ids = Statistics(by_row, by_row, by_row, by_row), _zeros(2, ROWS, dtype=torch.int64)
    cross, top, top_ids = _zeros(ROWS, 2, 2), _zeros(2, ROWS, 0), _zeros(2, ROWS, 0, dtype=torch.int64)
    for name, found, pairs in (("", None, False), (", final policy", cross, False), (", all pairs", cross, True)):
        running = Running(statistics, None, found, pairs, None, top, top_ids)
        yield Case(name, partial(lens_sums, z, z if pairs else None, statistics, by_row, running), LENS_BYTES)
    for name, comparison in ((", rank", Comparison(ids, None)), (", jsd", Comparison(None, by_row))):
        yield Case(name, partial(lens_comparison, z, statistics, by_row, comparison), LENS_BYTES)


def _rows_of_policy(dtype: torch.dtype, all_options: bool) -> Side:
    operands = _operands(dtype, all_options=all_options)
    products = _zeros(ROWS, COLUMNS)
    rows = operands.readout.rows(operands.coordinates(torch.arange(ROWS, dtype=torch.int64, device="cpu")), torch.float32)
    dz = products.view(dtype)[:, :COLUMNS]
    return Side(products, dz, operands.bias, rows)


@dataclass(frozen=True)
class Work:
    """The cases of a target that are to be compiled."""

    name: str
    gpu: GPUTarget
    target: config.Target
    dtypes: tuple[str, ...]
    everything: bool = False  # without entropy too, and for ragged vocabularies
    tuning: bool = False  # the tiles that may be tuned for, instead of the defaults

    def cases(self) -> Iterator[Case]:
        """Yield what is to be compiled, always in the same order."""
        for with_entropy, name in itertools.product((True, False) if self.everything else (True,), self.dtypes):
            dtype, ending = getattr(torch, name), "" if with_entropy else ", no entropy"
            kinds = {
                "": _operands(dtype),
                ", all options": _operands(dtype, all_options=True),
            }
            if self.target.uses_tma:  # elsewhere rows are made as wide as those of the first
                kinds |= {", ragged width": _operands(dtype, width=520)}
            if self.everything:
                kinds |= {
                    ", ragged vocabulary": _operands(dtype, vocab=RAGGED),
                    ", all options, ragged vocabulary": _operands(dtype, vocab=RAGGED, all_options=True),
                }
                if self.target.uses_tma:
                    kinds |= {
                        ", all options, ragged width": _operands(dtype, width=520, all_options=True),
                        ", both ragged": _operands(dtype, width=520, vocab=RAGGED),
                    }
            for kind, operands in kinds.items():
                for case in _products(self.target, operands, with_entropy, self.tuning):
                    yield case._replace(name=name + kind + case.name + ending)
            if not self.tuning:
                for case in _others(self.target, dtype, with_entropy):
                    yield case._replace(name=name + case.name + ending)

    def compile(self, case: int, *, inspect: bool) -> Compiled | None:
        """Compile one of the cases into Triton's cache, and return its row of the table if it is to be looked at."""
        name, launch, bound, programs = next(itertools.islice(self.cases(), case, None))
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
            bound=bound,
            programs=programs,
            threads=max(map(int, THREADS.findall(assembly)), default=self.gpu.warp_size * binary.metadata.num_warps),
            instruction=", ".join(found),
            tensor_memory=sum(map(int, TENSOR_MEMORY.findall(assembly))),
            between=_between_products(binary.asm["cubin"]) if self._counts(name) and found else None,
            **read,
        )

    def _counts(self, case: str) -> bool:
        """Tell whether the instructions of a case between two products are counted. A twin has those of another target, and the
        nvdisasm that Triton brings does not read all of them."""
        return case in COUNTED and self.gpu.backend == "cuda" and self.name not in TWINS


def work_for(name: str, *, brief: bool = False, tuning: bool = False) -> Work:
    """Return all that runs by default on a target. ``brief`` leaves out float16, whose code is that of bfloat16 but for the
    names of instructions, and takes bfloat16 alone where a target has the code of another."""
    gpu = TARGETS[name]
    version = config.version_of(triton.__version__)
    target = config.Target(gpu.backend, gpu.arch if gpu.backend == "cuda" else 0, processors=132, triton=version)
    of_brief = DTYPE_NAMES[:1] if name in TWINS else (DTYPE_NAMES[0], DTYPE_NAMES[2])
    return Work(name, gpu, target, of_brief if brief else DTYPE_NAMES, tuning=tuning)


def compile_all(works: Sequence[Work], jobs: int, *, inspect: bool = True) -> Iterator[Compiled | None]:
    """Compile the cases of all ``works`` in as many processes, and yield the rows of the table in order."""
    each = [(work, case) for work in works for case in range(sum(1 for _ in work.cases()))]
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


def _between_products(cubin: bytes) -> int | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return sass.Code.of(sass.disassemble(path)).between_products()


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


def faults(row: Compiled, *, tuning: bool = False) -> list[str]:
    """Return what is wrong with a compiled kernel, in sentences; [] where all is well. For ``tuning`` a tile may be slow."""
    target = work_for(row.target).target
    found = []
    if row.shared > target.shared:
        found.append(f"it asks for {row.shared} bytes of shared memory, and a block may have {target.shared}")
    if row.shared > row.bound:
        found.append(f"it asks for {row.shared} bytes of shared memory, and config.shared_bytes says {row.bound}")
    if row.programs > 1:
        registers = -(-row.registers // 8) * 8 * row.threads
        for taken, there, what in (
            (row.shared + config.RESERVED, target.shared_of_processor, "bytes of shared memory"),
            (registers, config.REGISTERS, "registers"),
        ):
            if row.programs * taken > there:
                found.append(f"{row.programs} of it take {row.programs * taken} {what}, and a multiprocessor has {there}")
    if row.kernel in (config.STATISTICS, config.GRADIENT) and target.matrix_unit not in row.instruction:
        found.append(f"its products run as {row.instruction or 'sums'}, and {target.matrix_unit} is there for them")
    if tuning:
        return found
    if row.spills or row.stack:
        found.append(f"it has spilled: {row.stack} bytes of stack, and {row.spills} moved")
    if row.case.endswith("warp-specialised") and (row.threads, row.tensor_memory) != SPECIALISED:
        found.append(
            f"it is not warp-specialised: it has {row.threads} threads and {row.tensor_memory} columns of tensor memory, "
            f"and that takes {SPECIALISED[0]} and {SPECIALISED[1]}"
        )
    if row.warnings:
        found.append(f"ptxas serialises its products: {row.warnings}")
    if triton.__version__.startswith(MEASURED_WITH) and row.instructions > (budget := instruction_budget(row)):
        found.append(f"it has {row.instructions} instructions, and the budget is {budget}")
    if triton.__version__.startswith(MEASURED_WITH) and row.between is not None:
        rows, columns, _, warps = map(int, re.findall(r"\d+", row.config)[:4])
        logits = rows * columns // (32 * warps)
        predicted = logits * counts.between_products(row.kernel, target, cache=row.case.endswith("E stored"))
        if abs(row.between - predicted) > 0.02 * predicted:
            found.append(f"it has {row.between} instructions between products, and counts.py says {predicted:.0f}")
    return found


def instruction_budget(row: Compiled) -> int:
    """Return how many instructions a default kernel may have: 5 % more than it had. Another tile has other numbers."""
    unit = work_for(row.target).target.matrix_unit
    dtype, _, case = row.case.partition(", ")
    kind = case
    if not row.kernel.startswith("gathered"):  # those with a product read rows that were made wide enough
        kind = case.removesuffix("ragged width").removesuffix(", ").replace("ragged width, ", "")
    if kind.endswith("warp-specialised"):
        return SPECIALISED_BUDGETS[(row.kernel + ", " + kind).removesuffix(", warp-specialised")] * 21 // 20
    name = ", ".join(part for part in (row.kernel, "fp32" if dtype == "float32" else "16 bit", kind) if part)
    return BUDGETS[name][UNITS.index(unit)] * 21 // 20


def local_work(device: torch.device) -> Work:
    """Return what the first calls on a GPU of this machine launch."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"device: {device} given, accepted is a GPU of this machine, and there is none or no driver for it")
    from bupo_kernels.backends.triton_ import target_of

    with torch.cuda.device(device):
        gpu = triton.runtime.driver.active.get_current_target()
    return Work("local", gpu, target_of(device), DTYPE_NAMES, everything=True)


def precompile(device: torch.device, jobs: int | None = None) -> int:
    """Compile into Triton's cache what the first calls on a GPU launch, and return how many kernels that were. 16 cores take
    seconds for what one call after the other waits minutes for."""
    return fill(local_work(device), jobs)


def fill(work: Work, jobs: int | None = None) -> int:
    """Compile ``work`` into Triton's cache, and return how many kernels that were. The processes are those of a child that knows
    nothing of the caller's program and has no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from {Work.__module__} import _fill; _fill()"]
    done = subprocess.run(command, input=pickle.dumps((work, jobs)), env=environment, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"the kernels for {work.gpu} cannot be compiled:\n{done.stderr.decode(errors='replace')}")
    return int(done.stdout)


def _fill() -> None:
    work, jobs = pickle.load(sys.stdin.buffer)
    print(sum(1 for _ in compile_all([work], jobs or _cores(), inspect=False)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every default kernel configuration ahead of time and print its resources."
    )
    names = ", ".join(TARGETS)
    parser.add_argument("--target", nargs="*", default=list(TARGETS), metavar="TARGET", help=f"local, or of {names}; default: all")
    parser.add_argument("--jobs", type=int, default=_cores(), help="processes; default: one a core")
    parser.add_argument("--brief", action="store_true", help="no float16, and bfloat16 alone for " + ", ".join(TWINS))
    parser.add_argument("--candidates", action="store_true", help="the tiles that may be tuned for, instead of the defaults")
    parser.add_argument("--fill", action="store_true", help="Triton's cache, and print no table; as local always does")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    options = parser.parse_args()
    if config.interpreted():
        parser.error("TRITON_INTERPRET: 1 given, accepted is unset: the interpreter compiles nothing")
    if options.jobs < 1:
        parser.error(f"--jobs: {options.jobs} given, accepted are 1 and more")
    for name in set(options.target) - {*TARGETS, "local"}:
        parser.error(f"--target: {name} given, accepted are {names} and local")
    if "local" in options.target:
        if not torch.cuda.is_available():
            parser.error(f"--target: local given, accepted here are {names}: there is no GPU, or no driver for it")
        works = [local_work(torch.device("cuda", torch.cuda.current_device()))]
    else:
        works = [work_for(name, brief=options.brief, tuning=options.candidates) for name in options.target]
    start = time.perf_counter()
    if options.fill or "local" in options.target:
        count = sum(1 for _ in compile_all(works, options.jobs, inspect=False))
        print(f"{count} kernels in Triton's cache after {time.perf_counter() - start:.1f} s")
        return 0
    if not options.json:
        print(f"Triton {triton.__version__}\n{HEADER}")
    wrong = 0
    for row in compile_all(works, options.jobs):
        if row is not None:
            found = faults(row, tuning=options.candidates)
            wrong += bool(found)
            print(json.dumps(asdict(row)) if options.json else row, flush=True)
            for fault in found:
                print(f"{row.target}, {row.kernel}, {row.case}: {fault}", file=sys.stderr, flush=True)
    if not options.json:
        print(f"{wrong} kernels with faults, after {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
