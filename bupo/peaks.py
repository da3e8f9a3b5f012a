"""The peak FLOP/s of known GPUs, by the names that they give themselves."""

from __future__ import annotations

import re

from bupo_kernels.backends.machine import GPUS

# Dense TFLOP/s of one device: bfloat16 with fp32 sums on its matrix units, and float32 outside them (what torch does unless it is
# allowed TF32, which matrix units take at half the rate of bfloat16). A device has the first entry whose words are in its name, and
# else the one of bupo_kernels.backends.machine.GPUS.
PEAK_TFLOPS = {
    "GB200": (2500.0, 80.0),
    "GH200": (989.4, 66.9),
    "H200 NVL": (835.5, 60.0),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H800": (989.4, 66.9),
    "H20": (148.0, 44.0),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "RTX A6000": (154.8, 38.7),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 6000 Ada": (364.2, 91.1),
    "RTX 3090": (71.0, 35.6),
    "MI300X": (1307.4, 163.4),
    "MI325X": (1307.4, 163.4),
}


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Return the peak FLOP/s of one device, or None where it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` has it.
        precision: ``"bfloat16"`` or ``"float32"``.
        tf32: whether float32 products may be taken in TF32.
    """
    peaks = {name: (1e12 * bfloat16, 1e12 * float32) for name, (bfloat16, float32) in PEAK_TFLOPS.items()}
    for name, (bfloat16, float32) in (peaks | {gpu.name: (gpu.peak, gpu.fp32) for gpu in GPUS}).items():
        if re.search(rf"\b{name}\b", device_name):
            return bfloat16 if precision == "bfloat16" else bfloat16 / 2 if tf32 else float32
    return None
