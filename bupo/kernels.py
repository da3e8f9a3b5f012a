"""The kernels that a run computes with: written into its checkpoints, and taken again when it goes on.

On a GPU `backend="auto"` takes what passed the self-check, in the tiles that `bupo tune` found. Other kernels agree within the
numerics contract, but not in the last bit.
"""

from __future__ import annotations

from typing import Any

from bupo.distributed import World
from bupo_kernels.selfcheck import decision


def kernels_in_use(world: World) -> dict[str, Any] | None:
    """Return what has been decided about this rank's GPU, as JSON; None on a CPU, where nothing is."""
    return decision.decisions(world.device) if world.device.type == "cuda" else None


def keep_to_kernels(chosen: dict[str, Any] | None, world: World) -> None:
    """Take the kernels that were ``chosen`` before. Print a line where that cannot be, and the run is not the same bit for bit."""
    reason = None
    if (chosen is None) != (world.device.type == "cpu"):
        reason = f"the run was begun on {'a CPU' if chosen is None else chosen['name']}, and goes on on {world.device.type}"
    elif chosen is not None:
        reason = decision.pin(world.device, chosen)
    reasons = [reason for reason in world.gather([reason]) if reason]
    if reasons and world.main:
        print(f"not the same bit for bit from here on: {reasons[0]}")
