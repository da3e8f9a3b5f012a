"""Instructions that a thread runs between two tiles' products, counted in the machine code of the default tiles for 16-bit operands
with Triton 3.6; what ``machine.py`` predicts with. ``make kernels`` counts them again, and accepts no other numbers."""

from __future__ import annotations

from bupo_kernels.backends.triton_.config import GRADIENT, STATISTICS, Target

SPECIALISED = "warp-specialised"
# (kernel, whether it stores E) -> matrix unit, or SPECIALISED -> instructions for a logit. The last are those of the warps of the
# epilogue, and counted by hand, since there is no product on their way.
BETWEEN_PRODUCTS = {
    (STATISTICS, False): {SPECIALISED: 1030 / 128, "wgmma": 1226 / 128, "tcgen05": 680 / 64, "mma.sync": 864 / 64},
    (STATISTICS, True): {SPECIALISED: 1332 / 128, "wgmma": 1472 / 128, "tcgen05": 822 / 64, "mma.sync": 1122 / 64},
    (GRADIENT, False): {SPECIALISED: 981 / 128, "wgmma": 1470 / 128, "tcgen05": 768 / 64, "mma.sync": 1758 / 128},
}


def between_products(kernel: str, target: Target, *, cache: bool = False, specialised: bool = False) -> float:
    """Return how many instructions ``kernel`` has for each logit of a thread, between one tile's last product and the next one's
    first."""
    return BETWEEN_PRODUCTS[kernel, cache][SPECIALISED if specialised else target.matrix_unit]
