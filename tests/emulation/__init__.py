"""The CUDA kernels on the CPU: the source in ``csrc/cuda``, compiled for the host against ``cuda_emulation.h``."""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
CUDA, BUILT = HERE.parents[1] / "csrc" / "cuda", HERE.parents[1] / "build" / "emulation"
# glibc's fortified longjmp takes a jump from one stack to another for a mistake.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
]


def why_not() -> str | None:
    """The reason the emulation cannot be built here, or None."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None if compiler() else "no C++ compiler on the path"


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


@functools.cache
def emulated_cuda(source: Path = CUDA):
    """What ``bupo_kernels._C.cuda`` is on a machine with a GPU, but for pointers to the host; ``stream`` is ignored. It is compiled
    once, whatever the number of processes that want it, and again where the sources or the compiler have changed.

    ``run_threads("descending")`` reverses the order in which the threads of a block and the blocks run."""
    sources = sorted(path for folder in (HERE, source) for path in folder.iterdir() if path.is_file())
    digest = hashlib.sha256(repr([compiler(), FLAGS, sys.version]).encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    library = BUILT / digest.hexdigest()[:16] / ("emulated_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            build(source, library)
    spec = importlib.util.spec_from_file_location("emulated_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(source: Path, library: Path) -> None:
    import pybind11

    includes = [f"-I{HERE}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compiled(path: Path) -> str:
            target = Path(folder, path.name + ".o")
            run([compiler(), *FLAGS, *includes, "-x", "c++", "-c", path, "-o", target])
            return str(target)

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, [HERE / "module.cpp", *sorted(source.glob("*.cu"))]))
        whole = Path(folder, library.name)
        run([compiler(), "-shared", *objects, "-o", whole])
        whole.replace(library)


def run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
