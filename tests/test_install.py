"""Installing: what ``setup.py`` makes of a machine, with stand-ins for compilers where the machine has to be another one."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METADATA = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile")
NO_COMPILER = "bupo-kernels: pure Python, without the C++ kernels: no C++ compiler on the path (c++, g++ or clang++)"


@pytest.fixture(scope="module")
def setup_py():
    """Imported, which runs nothing."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clean(**variables) -> dict[str, str]:
    """The environment without what asks for another build, and with these."""
    ours = re.compile(r"BUPO_|CUDA_HOME$|CXX|LDFLAGS$|LD_PRELOAD$|PYTHONPATH$")
    return {name: value for name, value in os.environ.items() if not ours.match(name)} | variables


def run(command: list, folder: Path, **variables) -> tuple[int, str]:
    done = subprocess.run(command, cwd=folder, env=clean(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


# What the environment asks for


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (True, "", (), ())),
        ({"BUPO_BUILD_CUDA": ""}, (True, "", (), ())),
        ({"BUPO_BUILD_CUDA": "auto"}, (True, "", (), ())),
        ({"BUPO_BUILD_CUDA": "0"}, (False, "", (), ())),
        ({"BUPO_BUILD_CUDA": "1"}, (True, "BUPO_BUILD_CUDA", (), ())),
        ({"BUPO_CUDA_ARCHS": "80;90a"}, (True, "BUPO_CUDA_ARCHS", ("80", "90a"), ())),
        ({"BUPO_CUDA_ARCHS": " 120f, 80 80"}, (True, "BUPO_CUDA_ARCHS", ("120f", "80"), ())),
        ({"BUPO_CUDA_ARCHS": "90a", "BUPO_BUILD_CUDA": "0"}, (False, "", ("90a",), ())),
        ({"BUPO_SANITIZE": "address,undefined"}, (True, "", (), ("address", "undefined"))),
    ],
)
def test_wishes(setup_py, variables, expected):
    assert setup_py.Wishes.of(variables) == expected


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("BUPO_BUILD_CUDA", "yes", "0, 1 and auto"),
        ("BUPO_CUDA_ARCHS", "9.0", "a list like 80;90;100"),
        ("BUPO_CUDA_ARCHS", "sm_90", "a list like 80;90;100"),
        ("BUPO_SANITIZE", "address -O2", "a list like address,undefined"),
    ],
)
def test_other_values_are_refused(setup_py, name, value, accepted):
    with pytest.raises(setup_py.SetupError, match=re.escape(f"{name}: {value!r} given, accepted")) as refused:
        setup_py.Wishes.of({name: value})
    assert accepted in str(refused.value)


# Compilers


def test_no_compiler_is_no_error_but_a_wrong_one_is(setup_py):
    with pytest.raises(setup_py.Impossible, match="no C"):
        setup_py.find_cxx({"PATH": "/nonexistent"})
    with pytest.raises(setup_py.SetupError, match=r"CXX: 'nope -m64' given, accepted is a C\+\+ compiler on the path"):
        setup_py.find_cxx({"PATH": os.environ["PATH"], "CXX": "nope -m64"})


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_compiler_that_cannot_compile_the_kernels_is_said_to(setup_py, tmp_path):
    compiler = script(tmp_path / "c++", 'echo "probe.cpp:1: fatal error: Python.h: No such file or directory"; exit 1')
    with pytest.raises(setup_py.Impossible, match=r"c\+\+ cannot compile them: .*Python\.h: No such file"):
        setup_py.find_cxx({"PATH": str(compiler.parent)} | {"CXX": str(compiler)})


def test_only_instruction_sets_that_the_compiler_takes(setup_py, tmp_path):
    def compiler(target: str, refuses: str) -> list[str]:
        """One for the architecture of a macro; it is told the source behind -c."""
        finds = f'while [ "$1" != -c ]; do case "$1" in {refuses}) exit 1;; esac; shift; done; grep -q "defined({target})" "$2"'
        return [str(script(tmp_path / target / refuses.strip("*") / "c++", finds))]

    assert setup_py.find_isas(compiler("__x86_64__", "-")) == ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    assert setup_py.find_isas(compiler("__x86_64__", "*avx512bf16*")) == ["portable", "avx2", "avx512"]
    assert setup_py.find_isas(compiler("__aarch64__", "-")) == ["portable", "neon", "neon_bf16"]
    assert setup_py.find_isas(compiler("__aarch64__", "*bf16*")) == ["portable", "neon"]
    assert setup_py.find_isas(compiler("__riscv", "-")) == ["portable"]


def test_a_compiler_for_another_machine_says_what_that_one_has(setup_py):
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    assert setup_py.find_isas(["aarch64-linux-gnu-g++"]) == ["portable", "neon", "neon_bf16"]


def test_flags_of_each_file(setup_py, monkeypatch):
    monkeypatch.chdir(ROOT)
    every = setup_py.sources(setup_py.Build(["c++"], list(setup_py.ISAS)))
    flags = {path.as_posix(): flags for path, flags in every.items()}
    assert flags["csrc/cpu/isa_portable.cpp"] == []
    assert flags["csrc/cpu/isa_avx2.cpp"] == ["-mavx2", "-mfma", "-mf16c"]
    assert {"-mavx512f", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"} <= set(flags["csrc/cpu/isa_amx.cpp"])
    assert not any("bf16" in flag for flag in flags["csrc/cpu/isa_avx512.cpp"])
    assert flags["csrc/cpu/isa_neon.cpp"] == []
    assert flags["csrc/cpu/isa_neon_bf16.cpp"] == ["-march=armv8.2-a+bf16"]
    defines = [f"-DBUPO_ISA_{name}" for name in ("AVX2", "AVX512", "AVX512_BF16", "AMX", "NEON", "NEON_BF16")]
    assert flags["csrc/cpu/isa.cpp"] == flags["csrc/bindings.cpp"] == defines
    assert not any(path.startswith("csrc/cuda") for path in flags)

    few = setup_py.sources(setup_py.Build(["c++"], ["portable", "avx2"]))
    assert {path.name for path in few if path.name.startswith("isa_")} == {"isa_portable.cpp", "isa_avx2.cpp"}
    assert few[Path("csrc/cpu/isa.cpp")] == ["-DBUPO_ISA_AVX2"]


def test_a_file_for_an_unknown_instruction_set_is_an_error(setup_py, monkeypatch, tmp_path):
    script(tmp_path / "csrc/cpu/isa_sve.cpp", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(setup_py.SetupError, match=r"isa_sve.cpp: there are flags for portable, .* none for sve"):
        setup_py.sources(setup_py.Build(["c++"], ["portable"]))


# CUDA


def test_architectures_are_those_nvcc_knows(setup_py):
    assert setup_py.choose_archs((), {"80", "90", "90a"}.__contains__) == (["80", "90"], ["100"])
    assert setup_py.choose_archs(("120", "86", "90a"), {"86", "90a", "120"}.__contains__) == (["86", "90a", "120"], [])


def test_later_gpus_get_ptx_of_the_newest_that_they_can_translate(setup_py):
    flags = " ".join(setup_py.gencode(["80", "86", "90a", "100a"]))
    assert flags.count("-gencode") == 5
    assert "arch=compute_90a,code=sm_90a" in flags
    assert "arch=compute_86,code=compute_86" in flags
    assert "code=compute_" not in " ".join(setup_py.gencode(["90a"]))


@pytest.fixture
def toolkit(tmp_path):
    """CUDA 12.4, or what of it matters here: knows no sm_100."""
    says = f"""case "$*" in
*--version*) echo "Cuda compilation tools, release 12.4, V12.4.131";;
*100*) echo "nvcc fatal : Unsupported gpu architecture 'compute_100'"; exit 1;;
*--dryrun*) echo '#$ TOP={tmp_path}'; echo '#$ INCLUDES="-I{tmp_path}/include" ';;
*) if [ -n "$NVCC_FAILS" ]; then echo "host_config.h: error: unsupported GNU version"; exit 1; fi
esac"""
    script(tmp_path / "bin" / "nvcc", says)
    script(tmp_path / "lib64" / "libcudart_static.a", "")
    return tmp_path


def test_cuda_is_found_with_its_folders(setup_py, toolkit):
    for environment in ({"CUDA_HOME": str(toolkit)}, {"PATH": f"{toolkit / 'bin'}"}):
        cuda, unknown = setup_py.find_cuda(environment, setup_py.Wishes(), ["c++"])
        assert (cuda.version, cuda.archs, unknown) == ("12.4", ["80", "90"], ["100"])
        assert cuda.nvcc == [str(toolkit / "bin" / "nvcc"), "-ccbin", "c++"]
        assert cuda.include == [f"-I{toolkit}/include"]
        assert cuda.libraries[:2] == [f"-L{toolkit}/lib64", "-lcudart_static"]


def test_why_cuda_is_impossible(setup_py, toolkit, monkeypatch):
    def reason(environment, wishes=setup_py.Wishes()):  # noqa: B008
        with pytest.raises(setup_py.Impossible) as found:
            setup_py.find_cuda(environment, wishes, ["c++"])
        return str(found.value)

    there = {"CUDA_HOME": str(toolkit)}
    assert reason({"PATH": "/nonexistent"}) == "no nvcc on the path or in CUDA_HOME"
    assert reason({"CUDA_HOME": "/nonexistent"}) == "no bin/nvcc in CUDA_HOME, /nonexistent"
    assert reason(there, setup_py.Wishes(archs=("80", "100"))) == "nvcc 12.4 knows no sm_100"
    monkeypatch.setenv("NVCC_FAILS", "1")
    assert reason(there) == "nvcc 12.4 compiles nothing with c++: host_config.h: error: unsupported GNU version"
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    assert reason(there) == f"no libcudart_static.a beside {toolkit / 'bin' / 'nvcc'}"


@pytest.mark.parametrize(
    ("says", "builds"),
    [
        ("| NVIDIA-SMI 470.256.02   Driver Version: 470.256.02   CUDA Version: 11.4     |", False),
        ("| NVIDIA-SMI 525.60.13    Driver Version: 525.60.13    CUDA Version: 12.0     |", True),  # of 12 are all good for 12.4
        ("| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0     |", True),
        ("| NVIDIA-SMI 595.10   KMD Version: 595.10   CUDA UMD Version: 11.8     |", False),
        ("NVIDIA-SMI has failed", True),
    ],
)
def test_an_nvcc_whose_runtime_is_too_new_for_the_driver_builds_nothing_unasked(setup_py, toolkit, says, builds):
    script(toolkit / "bin" / "nvidia-smi", f"echo '{says}'")
    environment = {"CUDA_HOME": str(toolkit), "PATH": str(toolkit / "bin")}
    if builds:
        assert setup_py.find_cuda(environment, setup_py.Wishes(), ["c++"])[0].version == "12.4"
    else:
        with pytest.raises(setup_py.Impossible, match=r"nvcc 12.4 needs a driver for CUDA 12.0 or newer, .* is for 11\.\d$"):
            setup_py.find_cuda(environment, setup_py.Wishes(), ["c++"])
    # It may be for another machine.
    asked = setup_py.Wishes(cuda_asked_by="BUPO_BUILD_CUDA")
    assert setup_py.find_cuda(environment, asked, ["c++"])[0].version == "12.4"


# Building, with ninja and a compiler, a module of a few lines

BINDINGS = """#include <Python.h>
#include "build_info.h"
#include "part.h"
static PyObject* isas(PyObject*, PyObject*) { return PyUnicode_FromString(build_info[1][1]); }
static PyMethodDef methods[] = {{"isas", isas, METH_NOARGS, 0}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", 0, -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { part(); return PyModule_Create(&definition); }
"""


@pytest.fixture
def project(setup_py, tmp_path):
    """In a folder whose name has to be quoted."""
    pytest.importorskip("pybind11")
    try:
        setup_py.find_cxx(clean())
    except setup_py.Impossible as reason:
        pytest.skip(str(reason))
    folder = tmp_path / "a $folder"
    for name, text in {
        "csrc/bindings.cpp": BINDINGS,
        "csrc/part.h": "void part();",
        "csrc/cpu/part.cpp": '#include "part.h"\nvoid part() {}',
        "csrc/cpu/isa_portable.cpp": "",
        "csrc/cuda/empty.txt": "",
        "bupo_kernels/__init__.py": "",
    }.items():
        script(folder / name, "").write_text(text, encoding="utf-8")
    for name in METADATA:
        shutil.copy(ROOT / name, folder)
    return folder


def build(project: Path, **variables) -> tuple[int, str]:
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], project, **variables)


def modules(project: Path) -> list[Path]:
    return [*project.glob("bupo_kernels/_C*"), *project.glob("build/lib*/bupo_kernels/_C*")]


@pytest.mark.broad
def test_only_what_changed_is_compiled_again(project):
    code, text = build(project)
    assert code == 0, text
    assert "csrc/cpu/isa_portable.cpp" in text
    found = run([sys.executable, "-c", "from bupo_kernels import _C; print(_C.isas())"], project)
    assert found[1].split()[0] == "portable", found
    assert "no work to do" in build(project)[1]
    (project / "csrc/part.h").write_text("void part();  // another")
    code, text = build(project)
    assert code == 0, text
    assert "bindings.cpp" in text
    assert "part.cpp" in text
    assert "isa_portable.cpp" not in text


@pytest.mark.broad
def test_kernels_that_do_not_compile_are_an_error(project):
    (project / "csrc/cpu/part.cpp").write_text("void part() { sum }", encoding="utf-8")
    code, text = build(project)
    assert code != 0
    assert "'sum'" in text.replace("‘", "'").replace("’", "'")
    assert "error: the native module does not compile" in text


def test_what_was_asked_for_and_is_impossible_is_an_error(project):
    code, text = build(project, CUDA_HOME="/nonexistent", BUPO_BUILD_CUDA="1")
    assert code != 0
    assert "error: BUPO_BUILD_CUDA: '1' given, but no bin/nvcc in CUDA_HOME, /nonexistent\n" in text
    code, text = build(project, PATH="/nonexistent", BUPO_SANITIZE="address")
    assert code != 0
    assert "error: BUPO_SANITIZE: 'address' given, but nothing can be compiled: no C++ compiler" in text
    assert not modules(project)


@pytest.mark.broad  # three builds
def test_what_was_not_asked_for_is_left_out_with_a_line(project):
    script(project / "csrc/cuda/kernel.cu", "")
    for gpus, reason in ((0, "nvidia-smi lists no device here"), (1, "no bin/nvcc in CUDA_HOME, /nonexistent\n")):
        script(project / "bin" / "nvidia-smi", "echo GPU 0: NVIDIA H100\n" * gpus)
        path = os.pathsep.join([str(project / "bin"), os.environ["PATH"]])
        code, text = build(project, CUDA_HOME="/nonexistent", PATH=path)
        assert code == 0, text
        assert text.count("bupo-kernels: ") == 1
        assert f"bupo-kernels: CUDA kernels left out: {reason}" in text
    assert len(modules(project)) == 2
    code, text = build(project, PATH="/nonexistent")
    assert code == 0, text
    assert text.count("bupo-kernels: ") == 1
    assert NO_COMPILER in text
    assert not modules(project), "the module of an earlier build is still there"


# Packages of the real thing


@pytest.fixture
def checkout(tmp_path):
    """The files that git has, or would have."""
    folder = tmp_path / "checkout"
    for name in ("bupo", "bupo_kernels", "csrc", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for name in METADATA:
        shutil.copy(ROOT / name, folder)
    return folder


def backend_hook(checkout: Path, hook: str, **variables) -> tuple[Path, str]:
    """What pip calls, but with what is installed here; the package and what was printed."""
    code, text = run([sys.executable, "-c", f"import setuptools.build_meta as b; b.{hook}('dist')"], checkout, **variables)
    assert code == 0, text
    (package,) = (checkout / "dist").iterdir()
    return package, text


# Neither compiler nor nvcc (no PATH), no Triton, no GPU.
BARE = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]  # of the tests
sys.modules["triton"] = None
import torch, bupo_kernels
assert bupo_kernels.__file__.startswith(sys.argv[1]), bupo_kernels.__file__
hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(50, 16)
policy = bupo_kernels.linear_logprobs(hidden, weight, torch.arange(5))
(policy.logprobs + policy.entropy).sum().backward()
assert torch.allclose(policy.logprobs, (hidden @ weight.T).log_softmax(-1)[range(5), range(5)], atol=1e-4)
assert hidden.grad.abs().sum() > 0
assert not torch.cuda.is_initialized()
"""


def run_bare(wheel: Path, script: str) -> str:
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {"PATH": "/nonexistent", "CUDA_VISIBLE_DEVICES": "", "HOME": str(wheel.parent)}
    done = subprocess.run([sys.executable, "-I", "-c", script, str(site)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_pure_python_is_built_and_runs(checkout):
    wheel, text = backend_hook(checkout, "build_wheel", PATH="/nonexistent")
    assert text.count("bupo-kernels: ") == 1
    assert NO_COMPILER in text
    names = zipfile.ZipFile(wheel).namelist()
    assert "bupo_kernels/dispatch.py" in names
    assert not [name for name in names if "_C." in name or name.startswith("csrc")]
    run_bare(wheel, BARE + "assert not hasattr(bupo_kernels, '_C')")


@pytest.mark.slow
def test_the_sdist_builds_a_wheel_that_runs_without_a_compiler(checkout):
    """With an environment of its own for the build, as pip and `python -m build` do; needs PyPI. About a minute."""
    sdist, _ = backend_hook(checkout, "build_sdist")
    shutil.unpack_archive(sdist, checkout.parent)
    source = checkout.parent / sdist.name.removesuffix(".tar.gz")
    for path in checkout.glob("csrc/**/*.*"):
        assert (source / path.relative_to(checkout)).is_file(), f"{path.relative_to(checkout)} is not in the sdist"
    folder = checkout.parent / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source]
    code, text = run(command, checkout.parent, BUPO_BUILD_CUDA="0")
    assert code == 0, text
    (wheel,) = folder.glob("*.whl")
    printed = run_bare(wheel, BARE + "from bupo_kernels import _C; print(_C.build_info()['isas'], _C.cpu.isas())")
    assert printed.startswith("portable"), printed
    for path in source.glob("build/temp*/csrc/cpu/isa_*.o"):
        own = path.name.split(".")[0].removeprefix("isa_")
        weak = re.findall(r" [WVu] (.*)", subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout)
        # The linker keeps one of several definitions, for every file: it might be one that other machines cannot run.
        shared = [name for name in weak if f"::{own}::" not in name and not name.startswith("DW.ref")]
        assert not shared, f"{path.name} shares {shared}"


def test_the_module_is_the_one_asked_for(setup_py):
    """Where it can be built it was, and it can be imported: it never goes missing in silence. ``make sanitize`` runs this too."""
    try:
        setup_py.find_cxx(os.environ)
    except setup_py.Impossible as reason:
        pytest.skip(str(reason))
    module = importlib.import_module("bupo_kernels._C")
    assert module.build_info()["sanitizers"].split() == list(setup_py.Wishes.of(os.environ).sanitizers)
