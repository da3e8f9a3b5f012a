"""Instructions that a thread runs between two tiles' products, counted in the machine code of the default tiles for regular 16-bit
operands with Triton 3.6; what ``machine.py`` predicts with. ``make kernels`` counts them again, and accepts no other numbers."""

from __future__ import annotations

from bupo_kernels.backends.triton_.config import GRADIENT, STATISTICS, Target

# (kernel, whether it stores E) -> matrix unit, or "TMA" where operands go from TMA through registers -> instructions for a logit.
BETWEEN_PRODUCTS = {
    (STATISTICS, False): {"wgmma": 1238 / 128, "tcgen05": 1110 / 128, "mma.sync": 864 / 64, "TMA": 864 / 64},
    (STATISTICS, True): {"wgmma": 1469 / 128, "tcgen05": 852 / 64, "mma.sync": 1143 / 64, "TMA": 1083 / 64},
    (GRADIENT, False): {"wgmma": 1537 / 128, "tcgen05": 838 / 64, "mma.sync": 1156 / 64, "TMA": 983 / 64},
}


def between_products(kernel: str, target: Target, *, cache: bool = False) -> float:
    """Return how many instructions ``kernel`` has for each logit of a thread, between one tile's last product and the next one's
    first."""
    return BETWEEN_PRODUCTS[kernel, cache]["TMA" if target.tma_to_registers else target.matrix_unit]
