"""Every default kernel configuration, compiled ahead of time for every target: no GPU is needed for any of this."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from problems import wanted

pytest.importorskip("triton")
from bupo_kernels.backends.triton_ import compile as ahead
from bupo_kernels.backends.triton_ import config

# What the tensor cores of each are driven with, and the bytes of shared memory that a block may have.
TARGETS = {
    "sm_80": ("mma.sync", 166912),
    "sm_86": ("mma.sync", 101376),
    "sm_89": ("mma.sync", 101376),
    "sm_90": ("wgmma", 232448),
    "sm_100": ("tcgen05", 232448),
    "sm_103": ("tcgen05", 232448),
    "sm_120": ("mma.sync", 101376),
    "sm_121": ("mma.sync", 101376),
    "gfx942": ("v_mfma", 65536),
}
PRODUCTS = ("linear_statistics", "gradient_recompute")


def run(*arguments, **changes):
    """A process of its own: here Triton may be in the interpreter, which compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes
    command = [sys.executable, "-m", "bupo_kernels.backends.triton_.compile", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, request):
    """The kernels of each target that a test is to look at. One command compiles all: each of its processes imports for seconds."""
    targets = dict.fromkeys(wanted(request, "target"))
    done = run("--json", "--brief", "--target", *targets, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {target: [kernel for kernel in rows if kernel["target"] == target] for target in targets}


@pytest.mark.broad
@pytest.mark.parametrize("target", TARGETS)
def test_no_configuration_spills_or_waits_or_asks_for_more_shared_memory_than_there_is(compiled, target):
    of_target = compiled[target]
    others = {"gradient_cached", "divergence_rows", "gathered_dots", "gathered_sums"}
    of_one_dtype = () if target in ahead.TWINS else ("merge", "lens_sums", "lens_comparison")
    assert {kernel["kernel"] for kernel in of_target} == {*PRODUCTS, *others, *of_one_dtype}
    assert [kernel for kernel in of_target if kernel["spills"] or kernel["stack"]] == []
    assert [kernel for kernel in of_target if kernel["warnings"]] == []
    assert [kernel for kernel in of_target if not kernel["shared"] <= kernel["bound"] <= TARGETS[target][1]] == []


@pytest.mark.broad
@pytest.mark.parametrize("target", ["sm_100", "sm_103"])
def test_on_blackwell_what_this_triton_specialises_is_compiled_in_both_forms(compiled, target):
    found = [kernel for kernel in compiled[target] if kernel["kernel"] in PRODUCTS]
    of_16_bit = [kernel for kernel in found if "16" in kernel["case"] and "all options" not in kernel["case"]]
    specialised = [kernel for kernel in of_16_bit if kernel["case"].endswith("warp-specialised")]
    others = [(kernel["kernel"], "E stored" in kernel["case"]) for kernel in of_16_bit if kernel not in specialised]
    version = config.version_of(ahead.triton.__version__)
    assert len(specialised) == sum(version in config.SPECIALISED_BY[other] for other in others) > 0
    assert {(kernel["threads"], kernel["tensor_memory"]) for kernel in of_16_bit if kernel["threads"] > 256} == {ahead.SPECIALISED}


@pytest.mark.broad
@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_the_tensor_cores_in_steps_that_do_not_depend_on_the_tile(compiled, target):
    products = [kernel for kernel in compiled[target] if kernel["kernel"] in PRODUCTS]
    assert len(products) >= 5 * (1 if target in ahead.TWINS else 2) - 1
    assert [kernel for kernel in products if not kernel["instruction"].startswith(TARGETS[target][0])] == []
    for dtype in ("bfloat16", "float32"):
        steps = {
            step
            for kernel in products
            if kernel["case"].split(",")[0] == dtype
            for step in re.findall(r"k\d+$|kind::\w+|_\d+x\d+x(\d+)", kernel["instruction"])
        }
        assert len(steps) <= 1


def row(**changes):
    """A row of the table that nothing is wrong with."""
    fine = {
        "target": "sm_90",
        "kernel": "merge",
        "case": "float32",
        "config": "128, 4 warps",
        "registers": 32,
        "stack": 0,
        "spills": 0,
        "shared": 0,
        "bound": 0,
        "programs": 1,
        "threads": 256,
        "instructions": 100,
        "warnings": "",
        "instruction": "",
    }
    return ahead.Compiled(**fine | changes)


STATISTICS = {
    "kernel": "linear_statistics",
    "case": "bfloat16",
    "config": "128 x 256 x 64, 8 warps, 4 stages",
    "instruction": "wgmma m64n256k16",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": 232449, "bound": 240000}, "232449 bytes of shared memory, and a block may have 232448"),
        ({"target": "sm_120", "shared": 101377, "bound": 240000}, "a block may have 101376"),
        ({"shared": 1025, "bound": 1024}, "config.shared_bytes says 1024"),
        ({"stack": 8}, "spilled: 8 bytes of stack, and 0 moved"),
        ({"programs": 2, "registers": 129}, "2 of it take 69632 registers, and a multiprocessor has 65536"),
        ({"target": "sm_89", "programs": 2, "shared": 50177, "bound": 60000}, "2 of it take 102402 bytes of shared memory"),
        ({"spills": 4}, "4 moved"),
        ({"warnings": "(C7510) Potential Performance Loss"}, "serialises its products"),
        ({"instructions": 10000}, "10000 instructions"),
        (
            {"target": "sm_100", "kernel": "linear_statistics", "case": "bfloat16, warp-specialised", "threads": 256}
            | {"instruction": "tcgen05.mma kind::f16", "tensor_memory": 256},
            "not warp-specialised: it has 256 threads and 256 columns",
        ),
        ({"kernel": "gradient_recompute", "instruction": "mma.sync m16n8k8"}, "run as mma.sync m16n8k8, and wgmma is there"),
        (STATISTICS | {"between": 1300}, "it has 1300 instructions between products, and counts.py says 1226"),
        (STATISTICS | {"between": 1200}, "it has 1200 instructions between products"),
    ],
)
def test_each_gate_can_fail(changes, message, monkeypatch):
    monkeypatch.setattr(ahead.triton, "__version__", "3.6.0")
    assert ahead.faults(row()) == []
    assert ahead.faults(row(target="sm_89", programs=2, registers=255, threads=128, shared=50176, bound=50176)) == []
    assert ahead.faults(row(**STATISTICS, between=1240)) == []
    (fault,) = ahead.faults(row(**changes))
    assert message in fault


def test_a_regression_of_five_percent_exceeds_the_budget(monkeypatch):
    monkeypatch.setattr(ahead.triton, "__version__", "3.6.0")
    for name, measured in ahead.BUDGETS.items():
        kernel, dtype, *kind = name.split(", ", 2)
        case = {"fp32": "float32", "16 bit": "float16"}[dtype] + "".join(f", {part}" for part in kind)
        for target, count in zip(("sm_121", "sm_90", "sm_100", "gfx942"), measured, strict=True):
            of = {"target": target, "kernel": kernel, "case": case, "instruction": TARGETS[target][0]}
            found = [ahead.faults(row(**of, instructions=n)) for n in (count, count * 21 // 20 + 1)]
            assert found[0] == []
            assert len(found[1]) == 1
    for name, measured in ahead.SPECIALISED_BUDGETS.items():
        kernel, _, kind = name.partition(", ")
        case = ", ".join(filter(None, ("float16", kind, "warp-specialised")))
        of = {"target": "sm_103", "kernel": kernel, "case": case, "instruction": "tcgen05"}
        block = dict(zip(("threads", "tensor_memory"), ahead.SPECIALISED, strict=True))
        found = [ahead.faults(row(**of, **block, instructions=n)) for n in (measured, measured * 21 // 20 + 1)]
        assert [len(faults) for faults in found] == [0, 1]
    monkeypatch.setattr(ahead.triton, "__version__", "3.9.0")  # another compiler, other numbers
    assert ahead.faults(row(instructions=10**6)) == []


def test_make_kernels_fails_where_a_gate_does_and_says_which(monkeypatch, capsys):
    monkeypatch.setattr(config, "interpreted", lambda: False)
    monkeypatch.setattr(sys, "argv", ["compile", "--target", "sm_90"])
    for rows, code in (([row()], 0), ([row(), row(spills=4)], 1)):
        monkeypatch.setattr(ahead, "compile_all", lambda works, jobs, rows=rows: iter(rows))
        assert ahead.main() == code
        printed = capsys.readouterr()
        assert printed.out.count("\nsm_90   merge") == len(rows)
        assert f"{code} kernels with faults" in printed.out
        assert ("sm_90, merge, float32: it has spilled" in printed.err) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "local"], "--target: local given, accepted here are sm_80, .*there is no GPU, or no driver for it"),
        (["--target", "sm_70"], "--target: sm_70 given, accepted are sm_80, "),
        (["--jobs", "0"], "--jobs: 0 given, accepted are 1 and more"),
    ],
)
def test_what_cannot_be_compiled_for_is_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(config, "interpreted", lambda: False)
    monkeypatch.setattr(ahead.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["compile", *arguments])
    with pytest.raises(SystemExit) as stopped:
        ahead.main()
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_precompiling_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(ahead.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device: cuda:0 given, accepted is a GPU of this machine"):
        ahead.precompile(ahead.torch.device("cuda", 0))


SERIALISE = """
import subprocess, sys
from triton.backends.nvidia.compiler import get_ptxas
from bupo_kernels.backends.triton_ import compile as ahead
from bupo_kernels.backends.triton_ import config
work = ahead.work_for("sm_90")
with ahead._compiling(work.gpu) as compiled:
    next(case.launch for case in work.cases() if case.name == "bfloat16")()
ptx = compiled[0][2].asm["ptx"]
for text in (ptx, "\\n".join(line for line in ptx.splitlines() if "wgmma.wait_group" not in line)):
    open(sys.argv[1], "w").write(text)
    tool = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", sys.argv[1], "-o", sys.argv[1] + ".cubin"]
    log = subprocess.run(tool, check=True, capture_output=True, text=True).stderr
    print(ahead.resources(log, open(sys.argv[1] + ".cubin", "rb").read()))
"""


@pytest.mark.broad
def test_a_product_that_ptxas_must_wait_for_is_noticed(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SERIALISE, str(tmp_path / "kernel.ptx")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    as_compiled, without_wait = map(eval, done.stdout.splitlines())
    assert as_compiled["warnings"] == ""
    assert as_compiled["registers"] > 100
    assert re.match(r"\(C75\d\d\)", without_wait["warnings"])
    assert ahead.faults(dataclasses.replace(row(), warnings=without_wait["warnings"])) != []
