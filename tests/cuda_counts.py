"""What nvcc makes of the CUDA row kernels, counted without a GPU: ``python tests/cuda_counts.py``, a part of ``make kernels``.

A logit's instructions are those of the shortest way once around the loop that takes ``group`` logits a thread: rows on 16 bytes, no
bias, the target elsewhere. Where this machine has no nvcc, or nothing that disassembles, it says so and counts nothing.
"""

from __future__ import annotations

import functools
import itertools
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bupo_kernels.backends import sass
from bupo_kernels.backends.sass import Code

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = runpy.run_path(str(ROOT / "setup.py"))["CUDA_ARCHS"]
GROUP = int(re.findall(r"constexpr int group = (\d+);", (ROOT / "csrc" / "cuda" / "rows.h").read_text(encoding="utf-8"))[0])
FORMS = ("identity", "affine", "softcap")  # in the order of Form in rows.cuh
BYTES = {"fp32": 4, "bf16": 2}

# Instructions for a logit with this nvcc, of the architecture that has the most; 5 % more are accepted. A kernel that sweeps a row
# twice has two numbers. (kernel, products, gradient) -> by form.
MEASURED_WITH = "13.0"
BUDGETS: dict[tuple[str, str, str], dict[str, tuple[float, ...]]] = {
    ("row_gradient", "bf16", "bf16"): {"affine": (17.1,), "softcap": (37.5,)},
    ("row_gradient", "fp32", "bf16"): {"affine": (16.6,), "softcap": (36.6,)},
    ("row_gradient", "fp32", "fp32"): {"affine": (18.0,), "softcap": (38.4,)},
    ("row_policy_loss", "bf16", "bf16"): {"affine": (19.1, 17.1), "softcap": (35.3, 37.5)},
    ("row_policy_loss", "fp32", "bf16"): {"affine": (18.3, 16.6), "softcap": (34.2, 36.8)},
    ("row_policy_loss", "fp32", "fp32"): {"affine": (18.6, 18.4), "softcap": (34.9, 38.6)},
    ("row_statistics", "bf16", ""): {"affine": (19.2,), "identity": (18.1,), "softcap": (35.5,)},
    ("row_statistics", "fp32", ""): {"affine": (18.4,), "identity": (16.9,), "softcap": (34.2,)},
}

ENTRY = re.compile(r"\d+(row_[a-z_]+)_kernelI(f|NS0_4bf16E)(f|NS0_4bf16E|S\d*_)?LNS0_4FormE(\d)E")


@dataclass(frozen=True)
class Counted:
    """A kernel as it was compiled, a row of the table."""

    kernel: str
    products: str  # dtype
    gradient: str  # dtype; "" where the kernel writes none
    form: str
    arch: str
    registers: int
    local: int  # bytes of stack and spills, and instructions that would reach them
    loops: tuple[tuple[float, int, int], ...]  # of each: instructions for a logit, loads and stores of 16 bytes for a group

    @property
    def loads(self) -> int:
        """The loads of 16 bytes that bring a group."""
        return GROUP * BYTES[self.products] // 16

    @property
    def stores(self) -> int:
        """The stores of 16 bytes that take the gradient of a group."""
        return GROUP * BYTES[self.gradient] // 16 if self.gradient else 0

    def __str__(self) -> str:
        what = f"{self.products}{' to ' + self.gradient if self.gradient else ''}, {self.form}"
        each = " + ".join(f"{instructions:.1f}" for instructions, _, _ in self.loops)
        words = " + ".join(f"{loads} in {stores} out" for _, loads, stores in self.loops)
        return f"sm_{self.arch:<5} {self.kernel:<17} {what:<24} {self.registers:>5} {self.local:>6} {each:>14}  {words}"


COLUMNS = f"{'target':<8} {'kernel':<17} {'products, readout':<24} {'regs':>5} {'local':>6}"
HEADER = f"{COLUMNS} {'instr./logit':>14}  words of 16 bytes a group"


def why_not() -> str | None:
    """Return the reason nothing can be counted here, or None."""
    if shutil.which("nvcc") is None:
        return "no nvcc on the path"
    return None if sass.disassembler() else "no nvdisasm, neither on the path nor with Triton"


def count(source: Path, arch: str) -> list[Counted]:
    """Compile ``source`` for an architecture, and return its kernels. Raise ``RuntimeError`` where a tool fails."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        log = _run("nvcc", "-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", cubin, source)
        code = sass.disassemble(cubin)
    resources = {
        name: (int(registers), sum(map(int, frame)))
        for name, *frame, registers in re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+).*?Used (\d+) registers", log, re.S
        )
    }
    found = []
    for name, body in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-----|\Z)", code, re.S | re.M):
        entry = ENTRY.search(name)
        if entry is None:
            raise RuntimeError(f"{source.name}: kernel {name} given, accepted are templates of dtypes and a form")
        products, gradient = ("fp32" if part == "f" else "bf16" if part else "" for part in entry.group(2, 3))
        registers, local = resources[name]
        local += len(re.findall(r"\b(?:LDL|STL)\b", body))
        found.append(Counted(entry[1], products, gradient, FORMS[int(entry[4])], arch, registers, local, _loops(body)))
    return sorted(found, key=lambda row: (row.products, row.gradient, row.form))


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr or done.stdout}")
    return done.stdout + done.stderr


def _loops(body: str) -> tuple[tuple[float, int, int], ...]:
    """Return the loops that take a group of logits: (instructions for a logit, loads and stores of 16 bytes). A loop that is there
    more than once, as with a bias and without, counts as its shortest."""
    code, found = Code.of(body), dict[bool, tuple[float, int, int]]()  # by whether it writes
    for first, last in code.loops:
        if any((first, last) != (head, end) and first <= head and end <= last for head, end in code.loops):
            continue  # not an innermost loop
        way = [code.opcodes[at] for at in code.shortest([first], {last}, range(first, last + 1))]
        words = {kind: [i for i, opcode in enumerate(way) if re.match(rf"{kind}\.E.*\.128", opcode)] for kind in ("LDG", "STG")}
        loads, stores = len(words["LDG"]), len(words["STG"])
        used = next((i for i, opcode in enumerate(way) if opcode.startswith("MUFU")), len(way))
        loop = len(way) / GROUP, loads, stores
        if loads > 1 and words["LDG"][1] < used:  # or else each word is waited for by itself
            found[stores > 0] = min(loop, found.get(stores > 0, loop))
    return tuple(found[writes] for writes in sorted(found))


def faults(row: Counted) -> list[str]:
    """Return what is wrong with a kernel, in sentences; [] where all is well."""
    found = []
    if row.local:
        found.append(f"it reaches for local memory ({row.local})")
    want = [(row.loads, 0)] * (row.kernel != "row_gradient") + [(row.loads, row.stores)] * bool(row.gradient)
    if (words := [loop[1:] for loop in row.loops]) != want:
        return [*found, f"its loops move {words} words of 16 bytes in and out for {GROUP} logits, accepted are {want}"]
    for loop, most in zip(row.loops, BUDGETS[row.kernel, row.products, row.gradient][row.form], strict=True):
        if loop[0] > 1.05 * most and release() == MEASURED_WITH:
            found.append(f"it has {loop[0]:.1f} instructions for a logit, and the budget is {most}")
    return found


@functools.cache
def release() -> str:
    """Return nvcc's release."""
    return re.findall(r"release ([\d.]+)", _run("nvcc", "--version"))[0]


def count_all(sources: list[Path] = SOURCES, archs: tuple[str, ...] = ARCHS) -> Iterator[Counted]:
    """Yield all kernels of the ``sources`` for each of the architectures."""
    each = list(itertools.product(sources, archs))
    with ThreadPoolExecutor() as pool:
        for rows in pool.map(lambda one: count(*one), each):
            yield from rows


def main() -> int:
    """Print the table, and what is wrong. Return the exit code."""
    if reason := why_not():
        print(f"CUDA row kernels are not counted: {reason}")
        return 0
    print(HEADER)
    wrong = 0
    for row in count_all():
        print(row, flush=True)
        for fault in faults(row):
            wrong += 1
            print(f"sm_{row.arch}, {row.kernel}, {row.products} {row.gradient} {row.form}: {fault}", file=sys.stderr, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
