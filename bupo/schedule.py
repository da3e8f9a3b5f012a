"""Which policy is optimised at which step (BuPO, arXiv 2512.19673, equation 10), and the guards that end phase 1 early."""

from __future__ import annotations

import math
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


class Schedule:
    """The switch from the internal policy to the model's own: after ``bupo.internal_steps``, or when a guard trips.

    All it is told are sums over ranks, so that every rank decides alike; :meth:`state_dict` is JSON.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.ended_after: int | None = None  # the step at which a guard tripped
        self.rewards: list[float] = []  # of the steps of phase 1
        self.divergences: list[float] = []

    def policy(self, step: int) -> OptimisedPolicy:
        """Of a step, counted from 1."""
        how = self.config.bupo
        if self.config.policy != "bupo" or step > how.internal_steps or self.ended_after is not None:
            return FINAL
        return OptimisedPolicy(how.layer, how.module, how.final_norm)

    def needs_perplexity(self, step: int) -> bool:
        return self.policy(step) != FINAL and self.config.bupo.guards.perplexity is not None

    def observe(self, step: int, reward: float, divergence: float, perplexity: float | None) -> str | None:
        """What a step of phase 1 was like: its mean reward, KL(internal ‖ final), and the final policy's perplexity on held-out
        responses relative to the first model's. Returns why phase 1 ends here, if it does."""
        guards = self.config.bupo.guards
        self.rewards += [] if math.isnan(reward) else [reward]  # of a step in which every reward failed there is none
        self.divergences.append(divergence)
        reason = None
        if guards.perplexity is not None and perplexity > guards.perplexity:
            reason = f"perplexity {perplexity:.3f} times the first model's, guard {guards.perplexity}"
        if guards.kl is not None and (kl := _last_mean(self.divergences, guards.window)) > guards.kl:
            reason = f"KL {kl:.3f} nats over {guards.window} steps, guard {guards.kl}"
        if guards.reward_drop is not None and len(self.rewards) >= guards.window:
            means = [_last_mean(self.rewards[: n + 1], guards.window) for n in range(guards.window - 1, len(self.rewards))]
            if max(means) - means[-1] > guards.reward_drop:
                reason = f"reward {means[-1]:.3f}, {max(means) - means[-1]:.3f} below its best, guard {guards.reward_drop}"
        if reason is not None:
            self.ended_after = step
        return reason

    def state_dict(self) -> dict[str, Any]:
        return {"ended_after": self.ended_after, "rewards": self.rewards, "divergences": self.divergences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ended_after, self.rewards, self.divergences = (state[key] for key in ("ended_after", "rewards", "divergences"))


def _last_mean(values: list[float], window: int) -> float:
    last = values[-window:]
    return sum(last) / len(last)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of a step, counted from 1: linear warm-up, then constant, or falling to 0 past the last step."""
    how = config.optimizer
    if step <= how.warmup_steps:
        return how.learning_rate * step / how.warmup_steps
    left = 1 - (step - 1 - how.warmup_steps) / (config.steps - how.warmup_steps)  # of the steps after warm-up, this one included
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return how.learning_rate * shape[how.schedule]
