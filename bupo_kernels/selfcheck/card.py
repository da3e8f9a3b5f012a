"""Card: the device, the software on it and the kernels, all that a verdict and tuned tiles are good for."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bupo_kernels.backends.compiled import driver_version

PACKAGE = Path(__file__).parents[1]
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Card:
    """The facts of a device that results and speed depend on. Two of one model in a machine are one card; a slice of one (MIG),
    which has fewer multiprocessors, is another."""

    name: str
    capability: str  # "9.0"; of AMD the architecture, "gfx942"
    processors: int
    driver: str
    runtime: str  # CUDA's or ROCm's version
    torch_version: str
    triton_version: str  # "" where it is not installed
    sources: str  # hash of the kernels

    @staticmethod
    @functools.cache  # every call of an op asks
    def of(device: torch.device) -> Card:
        """Return the card that ``device`` is. Nothing runs on it."""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            capability = f"{properties.major}.{properties.minor}"
            if torch.version.hip:
                capability = properties.gcnArchName
            name, processors = properties.name, properties.multi_processor_count
            driver, runtime = _driver(), torch.version.hip or torch.version.cuda or ""
        else:
            name, capability, driver, runtime = platform.machine(), device.type, "", ""
            processors = os.cpu_count() or 1
        return Card(name, capability, processors, driver, runtime, torch.__version__, _triton(), _sources())

    @functools.cached_property
    def key(self) -> str:
        """The name of its record's file."""
        facts = "\n".join(f"{name}={value}" for name, value in asdict(self).items())
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


@functools.cache
def _driver() -> str:
    """Return the driver's version, from the first line of what it says where it is Linux's, and the CUDA version it is for."""
    try:
        first = NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        first = ""
    return f"{first} {driver_version()}".strip()


@functools.cache
def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return ""
    try:
        found = version("triton")
    except PackageNotFoundError:  # AMD's and Intel's wheels have other names
        found = "unknown"
    return " ".join(filter(None, (found, os.environ.get("TRITON_PTXAS_PATH", ""))))


@functools.cache
def _sources() -> str:
    """Return a hash of all that computes: the backends, the ops' engine, and what was compiled."""
    digest = hashlib.sha256()
    compiled = sorted(path for path in PACKAGE.glob("_C*") if path.suffix in (".so", ".pyd"))
    for path in [*sorted((PACKAGE / "backends").rglob("*.py")), PACKAGE / "engine.py", *compiled]:
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
