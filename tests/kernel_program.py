"""tests/csrc/check_kernels.cpp, built with any compiler and run on any machine, an emulated one too: ``make test-arm``.

It links the kernels of csrc/cpu, as setup.py compiles them, and with ``--emulated`` those of AMX and AVX-512-BF16 on emulated
instructions (tests/emulation/x86_emulation.h), which every machine can run.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM, EMULATED = ROOT / "tests" / "csrc" / "check_kernels.cpp", ("emulated_amx", "emulated_avx512_bf16")
FLAGS = ["-std=c++17", "-ffp-contract=fast", "-pthread", "-Wall", "-Wno-psabi", "-Wno-unknown-warning-option", "-I", ROOT / "csrc"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC of its own headers, as setup.py says


def setup_py():
    """setup.py, imported, which runs nothing."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(cxx: list[str], isas: list[str], folder: Path, flags: list[str], emulated: bool = False) -> Path:
    """Builds the program with these instruction sets of setup.py, and those that are emulated; returns it."""
    known = setup_py().ISAS
    defines = [f"-DBUPO_ISA_{isa.upper()}" for isa in isas if isa != "portable"] + ["-DBUPO_EMULATED"] * emulated
    sources = {ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp": list(known[isa][0]) for isa in isas}
    sources |= {ROOT / "csrc" / "cpu" / name: defines for name in ("isa.cpp", "threads.cpp")} | {PROGRAM: defines}
    sources |= {PROGRAM.parent / f"isa_{isa}.cpp": [] for isa in EMULATED if emulated}
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run([*cxx, *FLAGS, *flags, *sources[source], "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "check_kernels"
    run([*cxx, *flags, "-pthread", *objects, "-o", program])
    return program


def run(command: list) -> str:
    """Runs a command; returns what it printed. Raises ``RuntimeError`` with that where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cxx", default="c++", help="the compiler, and flags for its target")
    parser.add_argument("--flags", default="-O2", help="flags of every source, and of the linker")
    parser.add_argument("--run", default="", help="what runs the program: an emulator of the target, say")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "kernel_program")
    parser.add_argument("--emulated", action="store_true", help="AMX and AVX-512-BF16 on emulated instructions too")
    parser.add_argument("isas", nargs="*", help="those that must run; without them all that the machine has")
    options = parser.parse_args()
    cxx, start = shlex.split(options.cxx), time.monotonic()
    isas = setup_py().find_isas(cxx)
    try:
        program = build(cxx, isas, options.folder, shlex.split(options.flags), options.emulated)
        print(f"built for {', '.join(isas)} in {time.monotonic() - start:.0f} s", flush=True)
        start = time.monotonic()
        print(run([*shlex.split(options.run), program, *options.isas]), end="")
    except RuntimeError as failure:
        print(failure)
        return 1
    print(f"in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
