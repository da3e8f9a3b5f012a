"""Measuring: time and memory of a call, what the machine is and what it does at its best, and results kept as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bupo.env import cpu, installed
from bupo.output import replace_file

PACKAGES = ("bupo-kernels", "torch", "triton", "transformers", "numpy", "liger-kernel", "trl", "verl", "cut-cross-entropy")
ROOT = Path(__file__).parent.parent


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that ``call`` took, by the device's own events where it has them, and what it returned."""
    if device.type == "cpu":
        started = time.perf_counter()
        result = call()
        return time.perf_counter() - started, result
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3, result


def peak_bytes(call: Callable[[], object], device: torch.device = torch.device("cpu")) -> int:  # noqa: B008
    """Return the most bytes that torch held on ``device`` during ``call`` beyond those before it, results included."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13 would write two lines about every profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    held = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


def machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return what measured numbers are worth nothing without: device, driver, versions, commit and date.

    Args:
        commit: of the code, where there is no git to ask.
    """
    on_cpu = device.type == "cpu"
    facts = cpu() if on_cpu else {"name": torch.cuda.get_device_name(device), "threads": None, "instruction_sets": []}
    drivers = None if on_cpu else _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if commit is None and (ROOT / ".git").exists():  # What is installed may lie inside somebody else's repository.
        commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return {
        "device": facts["name"],
        "kind": device.type,
        "threads": facts["threads"],
        "instruction_sets": facts["instruction_sets"],
        "driver": drivers and drivers.splitlines()[0],  # There is a line for each GPU.
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def rates(device: torch.device) -> dict[str, Any]:
    """Measure the machine: TFLOP/s of the library's product of square matrices by dtype, GB/s of a copy, read plus written."""
    size, count = (2048, 2**25) if device.type == "cpu" else (8192, 2**28)

    def median(call: Callable[[], object]) -> float:
        call()
        return statistics.median(timed(call, device)[0] for _ in range(7))

    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median(partial(torch.mm, a, b.T, out=out))
        products[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds / 1e12
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return {"gemm_tflops": products, "copy_gb_per_s": 2 * source.nbytes / median(lambda: target.copy_(source)) / 1e9}


# Flags of CPUs that decide how fast they multiply, the fastest first, and what a machine with them is called.
MULTIPLIERS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX512",
    "avx2": "AVX2",
    "bf16": "NEON-BF16",
    "asimd": "NEON",
    "neon": "NEON",
}


def instruction_set(flags: Sequence[str]) -> str:
    """Return the best of the instruction sets that a machine's record lists; empty where it lists none that is known."""
    return next((name for flag, name in MULTIPLIERS.items() if flag in flags), "")


def results_path(folder: Path, about: dict[str, Any]) -> Path:
    """Return ``<folder>/<device>.json``: the device, of a CPU its best instruction set and the threads, as a file's name. Machines
    that a cloud rents under one name differ in what they multiply with, and their numbers must not mix."""
    name = " ".join([about["device"], instruction_set(about["instruction_sets"])])
    name += f" {about['threads']} threads" if about["threads"] else ""
    return folder / (re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") + ".json")


def write_section(path: Path, name: str, section: dict[str, Any]) -> None:
    """Put one section into a file of results; its other sections stay, and so does the whole file if this is interrupted.

    Raises ``ValueError`` where ``path`` is there and is no such file, or ``section`` holds a number that is not finite.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"{path}: is no file of results ({error}), accepted are JSON objects of sections, or a new file") from None
    text = json.dumps(found | {name: section}, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)


def finite(number: float) -> float | None:
    """Return ``number``, or None where it is not finite, which JSON has no word for."""
    return number if math.isfinite(number) else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
