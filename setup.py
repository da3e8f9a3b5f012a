"""Metadata lives in pyproject.toml. Here ninja builds the one native module, ``bupo_kernels._C``, from ``csrc/``, without torch.

What this machine cannot build is left out and a line says so; what was asked for and cannot be built is an error.

    BUPO_BUILD_CUDA=0|1|auto   the CUDA kernels; auto, the default, builds them where there are a GPU and an nvcc
    BUPO_CUDA_ARCHS="80;90"    for these architectures; without it for those of CUDA_ARCHS that nvcc knows
    BUPO_SANITIZE=address,…    for tests: the C++ with these sanitizers
    CUDA_HOME CXX CXXFLAGS LDFLAGS   as everywhere
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

CSRC = Path("csrc")

# csrc/cpu/isa_<name>.cpp is compiled with these flags, if the compiler takes the statement with them for this architecture.
# Everything else is for the oldest CPU of the platform, and asks at run time which of these files the machine can enter. What the
# architecture is the compiler says, not `platform.machine()`: a Mac with ARM runs Pythons for x86, and a compiler may be for
# another machine.
X86, ARM = ("__x86_64__", "immintrin.h"), ("__aarch64__", "arm_neon.h")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
ISAS = {
    "portable": ((), None, ""),
    "avx2": (
        ("-mavx2", "-mfma", "-mf16c"),
        X86,
        "auto x = _mm256_setzero_ps(); x = _mm256_fmadd_ps(x, x, x); (void)_mm256_cvtps_ph(x, 0);",
    ),
    "avx512": (AVX512, X86, "auto x = _mm512_setzero_ps(); x = _mm512_fmadd_ps(x, x, x);"),
    "avx512_bf16": (
        (*AVX512, "-mavx512bf16"),
        X86,
        "auto x = _mm512_cvtne2ps_pbh(_mm512_setzero_ps(), _mm512_setzero_ps()); (void)x;",
    ),
    "amx": ((*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), X86, "_tile_dpbf16ps(0, 1, 2);"),
    "neon": ((), ARM, "auto x = vdupq_n_f32(0); x = vfmaq_f32(x, x, x);"),
    "neon_bf16": (
        ("-march=armv8.2-a+bf16",),
        ARM,
        "auto x = vdupq_n_f32(0); auto y = vreinterpretq_bf16_f32(x); x = vbfmmlaq_f32(x, y, y);",
    ),
}
ISA_PROBE = """#if !defined({}) || !defined(__LP64__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error another architecture
#endif
#include <{}>
void probe() {{ {} }}
"""

# What every C++ source needs: Python's headers, C++17, and the vector extensions of GCC and Clang.
CXX_PROBE = """#include <Python.h>
#include <string_view>
typedef float vector __attribute__((vector_size(32)));
template <class T> T twice(T x) { if constexpr (sizeof(T) == 32) return x + x; else return x; }
vector probe(vector x) { return twice(x); }
"""

# GCC's threads are those of torch's wheels. Two runtimes would wait for each other's threads to stop spinning.
OPENMP_PROBE = """#ifdef __clang__
#error another runtime
#endif
#include <omp.h>
int probe() { return omp_get_max_threads(); }
"""

CUDA_ARCHS = ("80", "90", "100")  # row kernels have no use for what an `a` adds
CUDA_PROBE = "#include <cuda_runtime.h>\n__global__ void probe(float* x) { x[threadIdx.x] = 1; }\n"


class Impossible(Exception):
    """This machine cannot build something, and why."""


class Wishes(NamedTuple):
    """The wishes of the environment."""

    cuda: bool = True  # where it is possible
    cuda_asked_by: str = ""  # the variable for which it is an error where it is not
    archs: tuple[str, ...] = ()  # (): those of CUDA_ARCHS that nvcc knows
    sanitizers: tuple[str, ...] = ()

    @staticmethod
    def of(environment: Mapping[str, str]) -> Wishes:
        cuda, archs, sanitizers = (environment.get(f"BUPO_{name}", "") for name in ("BUILD_CUDA", "CUDA_ARCHS", "SANITIZE"))
        if cuda not in ("", "0", "1", "auto"):
            raise SetupError(f"BUPO_BUILD_CUDA: {cuda!r} given, accepted are 0, 1 and auto")
        listed = tuple(dict.fromkeys(filter(None, re.split(r"[;,\s]", archs))))
        if wrong := [arch for arch in listed if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
            raise SetupError(f"BUPO_CUDA_ARCHS: {wrong[0]!r} given, accepted is a list like 80;90;100")
        if not re.fullmatch(r"([a-z]+(,[a-z]+)*)?", sanitizers):
            raise SetupError(f"BUPO_SANITIZE: {sanitizers!r} given, accepted is a list like address,undefined")
        # Who names architectures wants kernels for them.
        asked_by = "" if cuda == "0" else "BUPO_CUDA_ARCHS" if listed else "BUPO_BUILD_CUDA" if cuda == "1" else ""
        return Wishes(cuda != "0", asked_by, listed, tuple(filter(None, sanitizers.split(","))))


class Cuda(NamedTuple):
    nvcc: list[str]
    version: str
    archs: list[str]
    include: list[str]
    libraries: list[str]  # flags of the linker


def find_cxx(environment: Mapping[str, str]) -> list[str]:
    """Return the C++ compiler. Raise :class:`Impossible` where none can compile ``csrc``."""
    if os.name == "nt":
        raise Impossible("they need the vector extensions of GCC and Clang, and on Windows Python modules are built with MSVC")
    asked = shlex.split(environment.get("CXX", ""))
    candidates = [asked] if asked else [["c++"], ["g++"], ["clang++"]]
    cxx = next((command for command in candidates if shutil.which(command[0], path=environment.get("PATH"))), None)
    if cxx is None and asked:
        raise SetupError(f"CXX: {environment['CXX']!r} given, accepted is a C++ compiler on the path")
    if cxx is None:
        raise Impossible("no C++ compiler on the path (c++, g++ or clang++)")
    includes = [f"-I{sysconfig.get_path(kind)}" for kind in ("include", "platinclude")]
    if error := complaint([*cxx, "-std=c++17", "-fPIC", *includes], CXX_PROBE):
        raise Impossible(f"{shlex.join(cxx)} cannot compile them: {error}")
    return cxx


def find_isas(cxx: list[str]) -> list[str]:
    """Return those of ISAS that ``cxx`` compiles for its target."""

    def compiles(flags: tuple[str, ...], architecture: tuple[str, str] | None, statement: str) -> bool:
        return architecture is None or complaint([*cxx, *flags], ISA_PROBE.format(*architecture, statement)) is None

    with ThreadPoolExecutor() as pool:
        return [name for name, built in zip(ISAS, pool.map(lambda isa: compiles(*isa), ISAS.values()), strict=True) if built]


def find_cuda(environment: Mapping[str, str], wishes: Wishes, cxx: list[str]) -> tuple[Cuda, list[str]]:
    """Return nvcc and what it can build, and which of CUDA_ARCHS it cannot. Raise :class:`Impossible` where it cannot be used."""
    home = environment.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc", path=environment.get("PATH"))
    if nvcc is None:
        raise Impossible(f"no bin/nvcc in CUDA_HOME, {home}" if home else "no nvcc on the path or in CUDA_HOME")
    command = [nvcc, "-ccbin", cxx[0]] if len(cxx) == 1 else [nvcc]
    archs, missing = choose_archs(wishes.archs, lambda arch: dry_run(command, arch) is not None)
    release = re.search(r"release ([\d.]+)", output([nvcc, "--version"]) or "")
    version = release[1] if release else "?"
    driver = driver_release(environment)
    if not wishes.cuda_asked_by and driver and 0 < major(driver) < major(version):
        needed = f"a driver for CUDA {major(version)}.0 or newer"  # minor versions go together
        raise Impossible(f"the runtime of nvcc {version} needs {needed}, and nvidia-smi says that the one here is for {driver}")
    if missing and (wishes.archs or not archs):
        raise Impossible(f"nvcc {version} knows no {' and no '.join('sm_' + arch for arch in missing)}")

    # A dry run prints what nvcc, which may be a wrapper of a wrapper, takes for its own folders.
    own = dict(re.findall(r"^#\$ (\w+)=(.*)$", dry_run(command, archs[0]), re.MULTILINE))
    top = Path(own.get("TOP", Path(nvcc).parent.parent))
    include = [flag for name in ("INCLUDES", "SYSTEM_INCLUDES") for flag in shlex.split(own.get(name, ""))]
    folders = [Path(flag.removeprefix("-L")) for flag in shlex.split(own.get("LIBRARIES", ""))]
    folders += [top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))]
    runtime = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if runtime is None:
        raise Impossible(f"no libcudart_static.a beside {nvcc}")
    if error := complaint([*command, "-std=c++17", *gencode(archs)], CUDA_PROBE, ".cu"):
        raise Impossible(f"nvcc {version} compiles nothing with {shlex.join(cxx)}: {error}")
    # Linked in and hidden: nothing of CUDA is needed to import the module, nor mixed with the runtime that torch brings.
    libraries = [f"-L{os.path.normpath(runtime)}", "-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
    return Cuda(command, version, archs, include, libraries), missing


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Return whether this machine has a GPU of NVIDIA's that its driver knows."""
    asked = shutil.which("nvidia-smi", path=environment.get("PATH"))
    return asked is not None and "GPU" in (output([asked, "-L"]) or "")


def driver_release(environment: Mapping[str, str]) -> str | None:
    """Return the CUDA release that the driver of this machine is for; None where nvidia-smi does not say."""
    asked = shutil.which("nvidia-smi", path=environment.get("PATH"))
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d[\d.]*)", output([asked]) or "") if asked else None
    return found[1] if found else None


def major(release: str) -> int:
    """Return the first number of a release; 0 where there is none."""
    first = release.partition(".")[0]
    return int(first) if first.isdigit() else 0


def choose_archs(asked: tuple[str, ...], known) -> tuple[list[str], list[str]]:
    """Return the architectures to build, ascending, and those that nvcc does not know."""
    by_age = sorted(asked or CUDA_ARCHS, key=lambda arch: (int(re.match(r"\d+", arch)[0]), arch))
    return [arch for arch in by_age if known(arch)], [arch for arch in by_age if not known(arch)]


def gencode(archs: list[str]) -> list[str]:
    """Ask for machine code for each, and PTX of the newest that later GPUs can translate: not that of an `a` or `f`
    architecture."""
    general = [arch for arch in archs if arch.isdigit()]
    flags = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags += [f"arch=compute_{arch},code=compute_{arch}" for arch in general[-1:]]
    return [part for flag in flags for part in ("-gencode", flag)]


def dry_run(nvcc: list[str], arch: str) -> str | None:
    """Return what nvcc would do for ``arch``; None if it does not know it."""
    return output([*nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull, *gencode([arch])])


def output(command: list[str]) -> str | None:
    """Return what ``command`` prints; None if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.stdout if done.returncode == 0 else None


def complaint(compiler: list[str], source: str, suffix: str = ".cpp") -> str | None:
    """Return why ``source`` does not compile, in the compiler's words; None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe" + suffix)
        path.write_text(source, encoding="utf-8")
        command = [*compiler, "-c", str(path), "-o", str(path.with_suffix(".o"))]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[0]).replace(str(path), "probe")


class Build(NamedTuple):
    """The parts that are built, and the tools they are built with."""

    cxx: list[str]
    isas: list[str]
    cuda: Cuda | None = None
    wishes: Wishes = Wishes()
    threads: tuple[str, ...] = ("-pthread",)  # flags of compiler and linker


def sanitize_flags(build: Build) -> list[str]:
    if not build.wishes.sanitizers:
        return []
    names = ",".join(build.wishes.sanitizers)
    return [f"-fsanitize={names}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


def cxx_flags(build: Build) -> list[str]:
    """Return the flags of every C++ source."""
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", *build.threads, "-Wall", f"-I{CSRC}"]
    # GCC warns of its own AVX-512 headers, and that instruction sets differ in how wide vectors are passed: between files none is.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi", "-Wno-unknown-warning-option"]
    flags += sanitize_flags(build) or ["-O3", "-DNDEBUG"]
    return [*flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def nvcc_flags(build: Build) -> list[str]:
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-pthread", f"-I{CSRC}"]
    return [*flags, *gencode(build.cuda.archs)]


def link_flags(build: Build) -> list[str]:
    module = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    libraries = build.cuda.libraries if build.cuda else []
    return [*module, *build.threads, *sanitize_flags(build), *shlex.split(os.environ.get("LDFLAGS", "")), *libraries]


def sources(build: Build) -> dict[Path, list[str]]:
    """Return everything that is compiled, and the flags that each file has for itself."""
    of_isas = [f"-DBUPO_ISA_{isa.upper()}" for isa in build.isas if isa != "portable"]
    of_cuda = ["-DBUPO_WITH_CUDA", *build.cuda.include] if build.cuda else []
    found = {CSRC / "bindings.cpp": [*of_isas, *of_cuda]}
    for path in sorted(CSRC.glob("cpu/*.cpp")):
        isa = path.stem.removeprefix("isa_")
        if isa == path.stem:
            found[path] = of_isas
        elif isa not in ISAS:
            raise SetupError(f"{path}: there are flags for {', '.join(ISAS)}, none for {isa}")
        elif isa in build.isas:
            found[path] = list(ISAS[isa][0])
    if build.cuda:
        of_files = {".cpp": of_cuda, ".cu": []}
        found |= {path: of_files[path.suffix] for path in sorted(CSRC.glob("cuda/*.c*")) if path.suffix in of_files}
    return found


def ninja_file(build: Build, include: list[str], temp: Path, target: Path) -> str:
    def words(flags: list[str]) -> str:
        return shlex.join(flags).replace("$", "$$")

    def path(name: Path) -> str:
        return re.sub(r"[$ :]", r"$\g<0>", str(name))

    compilers = {".cpp": ("cxx", [*build.cxx, *cxx_flags(build), *include])}
    if build.cuda:
        compilers[".cu"] = ("nvcc", [*build.cuda.nvcc, *nvcc_flags(build)])
    lines = [f"builddir = {path(temp)}"]
    for rule, command in compilers.values():
        lines += [f"rule {rule}", f"  command = {words(command)} $flags -MD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {rule} $in"]
    lines += ["rule link", f"  command = {words(build.cxx)} $in {words(link_flags(build))} -o $out", "  description = link $out"]
    objects = []
    for source, flags in sources(build).items():
        objects.append(path(temp / f"{source}.o"))
        lines += [f"build {objects[-1]}: {compilers[source.suffix][0]} {path(source)}", f"  flags = {words(flags)}"]
    return "\n".join([*lines, f"build {path(target)}: link {' '.join(objects)}", ""])


def build_info(build: Build, left_out: list[str]) -> str:
    """Return the header from which `_C.build_info()` has its facts."""
    facts = {
        "compiler": (output([*build.cxx, "--version"]) or "?").splitlines()[0],
        "isas": " ".join(build.isas),
        "cuda_version": build.cuda.version if build.cuda else "",
        "cuda_archs": " ".join(build.cuda.archs) if build.cuda else "",
        "sanitizers": " ".join(build.wishes.sanitizers),
        "left_out": "; ".join(left_out),
    }
    rows = "".join(f"    {{{json.dumps(name)}, {json.dumps(value)}}},\n" for name, value in facts.items())
    return f"// Written by setup.py.\nconstexpr const char* build_info[][2] = {{\n{rows}}};\n"


class BuildModule(build_ext):
    left_out = False

    def run(self) -> None:
        super().run()
        if self.inplace and self.left_out:  # what an earlier build put there is not what was said
            self.target.unlink(missing_ok=True)

    @property
    def target(self) -> Path:
        return Path(self.get_ext_fullpath(self.extensions[0].name))

    def build_extensions(self) -> None:
        wishes = Wishes.of(os.environ)
        try:
            cxx = find_cxx(os.environ)
        except Impossible as reason:
            for asked_by in filter(None, [wishes.cuda_asked_by, wishes.sanitizers and "BUPO_SANITIZE"]):
                raise SetupError(f"{asked_by}: {os.environ[asked_by]!r} given, but nothing can be compiled: {reason}") from None
            say(f"pure Python, without the C++ kernels: {reason}")
            self.left_out = True
            self.target.unlink(missing_ok=True)
            return

        left_out, cuda = [], None
        try:
            if wishes.cuda and not wishes.cuda_asked_by and not has_gpu(os.environ):
                raise Impossible("nvidia-smi lists no device here")
            if wishes.cuda and (any(CSRC.glob("cuda/*.cu")) or wishes.cuda_asked_by):
                cuda, unknown = find_cuda(os.environ, wishes, cxx)
                left_out += [f"nvcc {cuda.version} knows no sm_{arch}" for arch in unknown]
        except Impossible as reason:
            if wishes.cuda_asked_by:
                raise SetupError(f"{wishes.cuda_asked_by}: {os.environ[wishes.cuda_asked_by]!r} given, but {reason}") from None
            left_out += [str(reason)]
        for reason in left_out:
            say(f"CUDA kernels left out: {reason}")

        left_out += [] if wishes.cuda else ["BUPO_BUILD_CUDA=0"]
        threads = ("-pthread",) if complaint([*cxx, "-fopenmp"], OPENMP_PROBE) else ("-pthread", "-fopenmp")
        temp, build = Path(self.build_temp), Build(cxx, find_isas(cxx), cuda, wishes, threads)
        temp.mkdir(parents=True, exist_ok=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        header, text = temp / "build_info.h", build_info(build, left_out)
        if not header.exists() or header.read_text(encoding="utf-8") != text:  # or else bindings.cpp is compiled again
            header.write_text(text, encoding="utf-8")
        file = temp / "build.ninja"
        file.write_text(ninja_file(build, includes(temp), temp, self.target), encoding="utf-8")
        jobs = self.parallel if isinstance(self.parallel, int) and self.parallel > 1 else cpus()
        if subprocess.run([find_ninja(), "-f", file, f"-j{jobs}"]).returncode:
            raise CompileError("the native module does not compile; what the compiler said is above")


def includes(temp: Path) -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise SetupError("pybind11 is missing: pip install pybind11, or build without --no-build-isolation") from None
    folders = dict.fromkeys([pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")])
    return [f"-I{temp}", *(part for folder in folders for part in ("-isystem", folder))]


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    except ImportError:
        if found := shutil.which("ninja"):
            return found
        raise SetupError("ninja is missing: pip install ninja, or build without --no-build-isolation") from None


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(line: str) -> None:
    print(f"bupo-kernels: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # optional: an editable install does not miss the file where it was left out.
    setup(ext_modules=[Extension("bupo_kernels._C", sources=[], optional=True)], cmdclass={"build_ext": BuildModule})
