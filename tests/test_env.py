"""``bupo env`` says what is so."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import bupo_kernels
from bupo import env
from bupo.cli import main
from bupo_kernels import PolicyObjective, explain

INFO = {
    "compiler": "c++ 12.2.0",
    "isas": "portable avx2 amx",
    "cuda_version": "13.0",
    "cuda_archs": "80 90",
    "sanitizers": "",
    "left_out": "",
}


def built(monkeypatch, **facts):
    """As on a machine where that was built, and whose CPU has AVX2."""
    module = SimpleNamespace(build_info=lambda: INFO | facts, cpu=SimpleNamespace(isas=lambda: ["avx2", "portable"]))
    monkeypatch.setitem(sys.modules, "bupo_kernels._C", module)
    return env.describe(env.environment())


def test_it_prints_versions_devices_builds_and_backends(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in text
    assert "liger-kernel" in text
    assert "\ncpu " in text
    for line in ("\nC++ kernels   ", "\nCUDA kernels  ", "\ndevice  dtype     no gradients", "\ncpu     bfloat16  "):
        assert line in text


def test_json_is_the_same_for_programs(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["bupo-kernels"]
    assert len([call for call in found["calls"] if call["device"] == "cpu"]) == len(env.DTYPES) * len(env.CALLS)
    assert env.describe(found) == env.describe(env.environment())


@pytest.mark.parametrize("dtype", env.DTYPES, ids=str)
def test_backends_are_those_that_real_calls_use(dtype):
    calls = {
        call["call"]: call for call in env.environment()["calls"] if (call["device"], call["dtype"]) == ("cpu", str(dtype)[6:])
    }
    for kind, (gradients, one_pass) in env.CALLS.items():
        operands = [torch.empty(n, env.WIDTH, dtype=dtype, requires_grad=gradients) for n in (env.ROWS, env.VOCAB)]
        plan = explain(*operands, objective=PolicyObjective() if one_pass else None)
        expected = (plan.backend, plan.tile_plan.strategy, plan.why_not)
        assert (calls[kind]["backend"], calls[kind]["strategy"], calls[kind]["why_not"]) == expected


def test_why_not_names_backend_and_device(monkeypatch):
    found = env.environment()
    for call in found["calls"]:
        call["why_not"] = {"other": "it rains"} if call["dtype"] == "float16" else {}
    assert "\nnot other on cpu in float16: it rains" in env.describe(found)
    for call in found["calls"]:
        call["why_not"] = {"other": "it rains"}
    assert env.describe(found).count("it rains") == len({call["device"] for call in found["calls"]})


def test_builds(monkeypatch):
    text = built(monkeypatch)
    assert "C++ kernels   portable avx2 amx; this CPU runs avx2 (c++ 12.2.0)" in text
    assert "CUDA kernels  sm_80 sm_90 (nvcc 13.0)\n" in text
    text = built(monkeypatch, cuda_archs="", left_out="no CUDA kernels: no nvcc on the path or in CUDA_HOME", sanitizers="address")
    assert (
        "CUDA kernels  not built (no CUDA kernels: no nvcc on the path or in CUDA_HOME): put nvcc on the path, set "
        "BUPO_BUILD_CUDA=1, then install" in text
    )
    assert "(c++ 12.2.0, with the sanitizers address)" in text
    assert "no CUDA kernels for sm_100" in built(monkeypatch, left_out="no CUDA kernels for sm_100: nvcc 12.4 does not know it")


def test_without_the_module_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.delattr(bupo_kernels, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "bupo_kernels._C", None)
    assert main(["env"]) == 0
    assert "C++ kernels   not built: make a C++17 compiler available, then install bupo-kernels again" in capsys.readouterr().out


def test_a_module_that_does_not_load_is_not_taken_for_none(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: f")

    monkeypatch.setattr(env.importlib, "import_module", broken)
    text = env.describe(env.environment())
    assert "C++ kernels   built, but the module cannot be imported: undefined symbol: f" in text


def test_a_gpu_is_described_by_capability_and_memory(monkeypatch):
    found = env.environment()
    found["devices"]["cuda:0"] = {"name": "NVIDIA H200", "capability": "9.0", "memory": 139 * 2**30}
    text = env.describe(found)
    assert "cuda:0  NVIDIA H200, capability 9.0, 139.0 GiB" in text
    assert "no GPU" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_context_is_made():
    assert "no GPU" in env.describe(env.environment())
    assert not torch.cuda.is_initialized()
