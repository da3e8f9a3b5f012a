"""How much `bupo analyze` reads where nothing is asked for: less on a CPU, where the same would take hours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from bupo_kernels.backends.compiled import isas

# The instruction sets whose products of bfloat16 are faster than those of float32.
FAST_BF16 = ("amx", "avx512_bf16")


class Defaults(NamedTuple):
    """The defaults of a device."""

    prompts: int
    max_new_tokens: int
    max_tokens: int  # of a batch: on a CPU, where one takes minutes, an interruption loses less
    precision: str
    fit_steps: int  # of translators; the tuned lens takes 250
    note: str = ""  # what is worth a line


def device_defaults(given: Mapping[str, Any]) -> Defaults:
    """Return the defaults for the device that ``given``, the keys of ``--set``, ask for, or that there is."""
    hardware = given.get("hardware")
    chosen = hardware if isinstance(hardware, Mapping) else {}
    device = chosen.get("device", "auto")
    if str(device).startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return Defaults(64, 256, 2048, "float32", 250)
    if (isa := next(iter(isas()), None)) not in FAST_BF16:
        return Defaults(16, 64, 512, "float32", 40)
    asked = "precision" in chosen
    note = f"in bfloat16, which this CPU ({isa}) multiplies faster; --set hardware.precision=float32 for the other"
    return Defaults(16, 64, 512, "bfloat16", 40, "" if asked else note)
