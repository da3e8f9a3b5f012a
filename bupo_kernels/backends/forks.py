"""Forks of a process whose torch, or whose kernels here, have run on several threads.

The one thread of the child inherits a pool of OpenMP threads that the fork has not copied, and waits for them for ever: in torch's
own ops as much as in csrc/cpu, which run on the same pool. So a thread that forks gives up its pool first, and the next parallel
loop, in the child as in the parent, makes a new one. Runtimes other than libgomp do this themselves.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

HARD = 2  # omp_pause_hard


@functools.cache
def _libgomps() -> tuple[str, ...]:
    """Return the paths where libgomp may be, loaded or not: a wheel may have its own, under a name of its own."""
    site_packages = Path(torch.__file__).parents[1]
    bundled = (path for folder in ("torch/lib", "torch.libs") for path in site_packages.glob(f"{folder}/libgomp*"))
    return "libgomp.so.1", *map(str, bundled)


def give_up_threads() -> None:
    """Let each libgomp in use end the pool of this thread."""
    for library in _libgomps():
        try:
            runtime = ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
        except OSError:  # not in use here
            continue
        runtime.omp_pause_resource_all(HARD)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=give_up_threads)
