"""Which policy is optimised at which step: the BuPO switch (arXiv 2512.19673, equation 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bupo.config import TrainConfig


@dataclass(frozen=True)
class OptimisedPolicy:
    """The policy whose log-probs, ratio, loss and entropy a step uses. ``layer=None`` is the model's own."""

    layer: int | None = None
    module: str = "layer"
    final_norm: bool = False

    @property
    def phase(self) -> str:
        return "final" if self.layer is None else f"{self.module} {self.layer}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for :func:`bupo_kernels.policy_logprobs`."""
        return {"layer": self.layer, "module": self.module, "final_norm": self.final_norm}


FINAL = OptimisedPolicy()


def policy_at(step: int, config: TrainConfig) -> OptimisedPolicy:
    """A function of the rollout step alone (counted from 1), so that every rank and every resumed run agrees."""
    if config.policy == "bupo" and step <= config.bupo.internal_steps:
        return OptimisedPolicy(config.bupo.layer, config.bupo.module, config.bupo.final_norm)
    return FINAL
