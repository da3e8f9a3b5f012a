"""What this machine has, what was built on it, and which backend a call would use: ``bupo env``."""

from __future__ import annotations

import importlib
import logging
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bupo.tables import columns
from bupo_kernels.backends.base import Problem
from bupo_kernels.dispatch import default_memory_budget, make_plan
from bupo_kernels.selfcheck.decision import only_records

PACKAGES = ("bupo-kernels", "torch", "triton", "transformers", "liger-kernel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS, VOCAB, WIDTH = 512, 32000, 1024
# For each kind of call, whether operands need gradients and whether these are taken in the forward.
CALLS = {"no gradients": (False, False), "with gradients": (True, False), "policy loss": (True, True)}

BUILD_AGAIN = "then install bupo-kernels again (pip install -v says what is left out, and why)"


def environment() -> dict[str, Any]:
    """Return versions, devices, what was built and the backends of calls, as JSON would have it.

    No CUDA context is made where there is no GPU.
    """
    devices = {"cpu": cpu()} | {f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)}
    return {
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        "devices": devices,
        "built": _built(),
        "calls": [
            _call(torch.device(device), dtype, kind)
            for device in dict.fromkeys(name.partition(":")[0] for name in devices)
            for dtype in DTYPES
            for kind in CALLS
        ],
    }


def describe(found: dict[str, Any]) -> str:
    """Put into words what :func:`environment` returned."""
    built, calls = found["built"], found["calls"]
    lines = [*columns([[name, number or "not installed"] for name, number in found["versions"].items()]), ""]
    lines += columns([[name, _describe_device(facts)] for name, facts in found["devices"].items()])
    lines += ["no GPU"] if len(found["devices"]) == 1 else []
    lines += ["", *columns([["C++ kernels", _describe_cpu_build(built)], ["CUDA kernels", _describe_cuda_build(built)]])]

    lines += ["", f'backend="auto" with {ROWS} tokens, {VOCAB} columns and a width of {WIDTH}', ""]
    table = [["device", "dtype", *CALLS]]
    for (device, dtype), cells in groupby(calls, key=lambda call: (call["device"], call["dtype"])):
        table.append([device, dtype, *(f"{call['backend']}: {call['strategy']}" for call in cells)])
    lines += [*columns(table), ""]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for call in calls:
        for backend, reason in call["why_not"].items():
            reasons.setdefault((backend, call["device"], reason), []).append(call["dtype"])
    for (backend, device, reason), dtypes in reasons.items():
        concerned = dict.fromkeys(dtypes)
        where = device if len(concerned) == len(DTYPES) else f"{device} in {', '.join(concerned)}"
        lines.append(f"not {backend} on {where}: {reason}")
    return "\n".join(lines)


def installed(package: str) -> str | None:
    """Return the version of ``package``, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Return the ``name`` of the CPU, the ``threads`` of torch, and those ``instruction_sets`` that matter here."""
    name, flags = platform.processor() or platform.machine(), []
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    if model := re.search(r"^model name\s*: (.*)$", text, re.MULTILINE):
        name = model[1]
    if listed := re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE):
        wanted = r"avx2|fma|avx512(f|bw|dq|vl|_bf16|_fp16)|amx_\w+|neon|asimd\w*|sve\w*|bf16|i8mm"
        flags = [flag for flag in listed[1].split() if re.fullmatch(wanted, flag)]
    flags = flags or [torch.backends.cpu.get_cpu_capability()]
    return {"name": name, "threads": torch.get_num_threads(), "instruction_sets": flags}


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": getattr(properties, "gcnArchName", None) if torch.version.hip else f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
    }


def _built() -> dict[str, Any] | None:
    """Return what ``setup.py`` wrote into the native module and which of its instruction sets this CPU runs; None without one."""
    try:
        module = importlib.import_module("bupo_kernels._C")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        return {"error": str(error)}
    facts = module.build_info()
    listed = {name: facts[name].split() for name in ("isas", "cuda_archs", "sanitizers")}
    return facts | listed | {"usable_isas": module.cpu.isas()}


def _describe_device(facts: dict[str, Any]) -> str:
    if "memory" in facts:
        return f"{facts['name']}, capability {facts['capability']}, {facts['memory'] / 2**30:.1f} GiB"
    return f"{facts['name']}, {facts['threads']} threads, {' '.join(facts['instruction_sets'])}"


def _describe_cpu_build(built: dict[str, Any] | None) -> str:
    if built is None:
        return f"not built: make a C++17 compiler available, {BUILD_AGAIN}"
    if "error" in built:
        return f"built, but the module cannot be imported: {built['error']}"
    sanitizers = f", with the sanitizers {' and '.join(built['sanitizers'])}" if built["sanitizers"] else ""
    return f"{' '.join(built['isas'])}; this CPU runs {built['usable_isas'][0]} ({built['compiler']}{sanitizers})"


def _describe_cuda_build(built: dict[str, Any] | None) -> str:
    if built is not None and "error" in built:
        return "as above"
    if built is None or not built["cuda_archs"]:
        why = f" ({built['left_out']})" if built and built["left_out"] else ""
        return f"not built{why}: put nvcc on the path, set BUPO_BUILD_CUDA=1, {BUILD_AGAIN}"
    partly = f"; {built['left_out']}" if built["left_out"] else ""
    return f"{' '.join('sm_' + arch for arch in built['cuda_archs'])} (nvcc {built['cuda_version']}){partly}"


def _call(device: torch.device, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    gradients, one_pass = CALLS[kind]
    problem = Problem(
        rows=ROWS,
        active_rows=ROWS,
        vocab=VOCAB,
        width=WIDTH,
        dtype=dtype,
        device=device,
        grad_hidden=gradients,
        grad_weight=gradients,
        grad_bias=False,
        softcap=False,
        memory_budget=default_memory_budget(device),
    )
    log = logging.getLogger("bupo_kernels")
    level = log.level
    log.setLevel(logging.ERROR)  # A backend passed over is logged once, and here it is printed.
    try:
        with only_records():
            plan = make_plan(problem, one_pass=one_pass)
    finally:
        log.setLevel(level)
    names = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "call": kind}
    return names | {"backend": plan.backend, "strategy": plan.tile_plan.strategy, "why_not": dict(plan.why_not)}
