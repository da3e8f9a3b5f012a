"""The schedule of a run: which policy is optimised at which step (BuPO, arXiv 2512.19673, equation 10), and the guards that end
phase 1 early."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bupo.config import TrainConfig


@dataclass(frozen=True)
class OptimisedPolicy:
    """The policy whose log-probs, ratio, loss and entropy a step uses; with ``layer=None`` the model's own."""

    layer: int | None = None
    module: str = "layer"
    final_norm: bool = False

    @property
    def phase(self) -> str:
        """The policy in words, as metrics and the console have it."""
        return "final" if self.layer is None else f"{self.module} {self.layer}"

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of :func:`bupo_kernels.policy_logprobs` that name the policy."""
        return {"layer": self.layer, "module": self.module, "final_norm": self.final_norm}


FINAL = OptimisedPolicy()


class Schedule:
    """The switch from the internal policy to the model's own: after ``bupo.internal_steps``, or when a guard trips.

    Every rank gives it the same sums over ranks, so that all decide alike; :meth:`state_dict` is JSON.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.internal = config.bupo if config.policy == "bupo" else None
        self.guards = config.guards
        self.ended_after: int | None = None  # the step at which a guard tripped
        self.rewards: list[float] = []  # the mean rewards of the steps of phase 1
        self.divergences: list[float] = []  # KL(internal ‖ final) in those steps

    def policy(self, step: int) -> OptimisedPolicy:
        """Return the policy that ``step``, counted from 1, optimises."""
        if self.internal is None or step > self.internal.internal_steps or self.ended_after is not None:
            return FINAL
        return OptimisedPolicy(self.internal.layer, self.internal.module, self.internal.final_norm)

    def needs_perplexity(self, step: int) -> bool:
        """Return whether a guard asks for the perplexity after ``step``."""
        return self.policy(step) != FINAL and self.guards.perplexity is not None

    def observe(
        self, step: int, reward: float, divergence: float | None, perplexity: float | None, tokens: int | None = None
    ) -> str | None:
        """Take down what a step of phase 1 was like; return why phase 1 ends with it, or None if it goes on.

        Args:
            reward: the mean reward; NaN where every reward failed.
            divergence: KL(internal ‖ final), in nats per token; None where the step was not looked at, which counts as no step of
                the guard's window. With that guard every step is looked at.
            perplexity: that of the final policy on held-out responses, relative to the first model's; None without that guard.
            tokens: how many response tokens the divergence was measured on, for the reason that is returned.
        """
        guards, reason = self.guards, None
        self.rewards += [] if math.isnan(reward) else [reward]
        self.divergences += [] if divergence is None else [divergence]
        if guards.perplexity is not None and perplexity is not None and perplexity > guards.perplexity:
            reason = f"perplexity {perplexity:.3f} times the first model's, guard {guards.perplexity}"
        if guards.kl is not None and self.divergences and (kl := _last_mean(self.divergences, guards.window)) > guards.kl:
            measured = "" if tokens is None else f", the last on {tokens:,} response tokens"
            reason = f"KL {kl:.3f} nats over {guards.window} steps{measured}, guard {guards.kl}"
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
    """Return the learning rate of ``step``, counted from 1: linear warm-up, then constant, or falling to 0 past the last step."""
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    left = 1 - (step - 1 - warmup) / (config.steps - warmup)  # the share of the steps after warm-up that is left, with this one
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return peak * shape[config.optimizer.schedule]
