"""How much of a step the looks at policies may take, and on what they are taken then: arithmetic on predicted FLOPs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Looks:
    """The looks of a run: every so many steps on so many samples, and on so many tokens of these at all layers."""

    every: int  # steps from one look at both policies to the next
    samples: int  # on each device, at a look at both policies
    samples_with_lens: int  # on each device, where all layers are looked at too
    lens_tokens: int  # response tokens of these on each device, at each look at all layers; 0: none
    lens_every: int  # steps from one look at all layers to the next, where both policies are looked at
    share: float  # the most that looks take of the FLOPs of rollouts and looks together, up to any step

    @property
    def samples_per_step(self) -> float:
        """The mean number of samples that are looked at, on each device."""
        if not self.lens_tokens:
            return self.samples / self.every
        return (self.samples + (self.samples_with_lens - self.samples) * self.every / self.lens_every) / self.every

    @property
    def lens_tokens_per_step(self) -> float:
        """The mean number of tokens that are looked at at all layers, on each device."""
        return self.lens_tokens / self.lens_every if self.lens_tokens else 0.0

    def due(self, step: int) -> bool:
        """Return whether both policies are looked at in ``step``, counted from 1."""
        return step % self.every == 0

    def lens_due(self, step: int) -> bool:
        """Return whether all layers are looked at in ``step``: at the first look, then once in every ``lens_every`` steps."""
        if not self.lens_tokens or not self.due(step):
            return False
        return step == self.every or step // self.lens_every > (step - self.every) // self.lens_every

    def __str__(self) -> str:
        when = "every step" if self.every == 1 else f"every {self.every} steps"
        lens = ""
        if self.lens_tokens:
            lens = f"; once in {self.lens_every} on {self.samples_with_lens:,}, and {self.lens_tokens:,} tokens at all layers"
        return f"{when} on {self.samples:,} samples per device{lens}; at most {self.share:.1%} of a step without updates"


def plan_looks(
    rollout: float,
    look: float,
    lens: float,
    *,
    share: float,
    most_samples: int,
    most_tokens: int,
    lens_every: int,
    each_step: bool = False,
) -> Looks:
    """Return what can be looked at within ``share`` of the FLOPs of each step.

    What a look costs beyond one step's room is saved up in the steps before it. The room is a share of rollouts and looks alone:
    whether a step has updates depends on its rewards, and what is looked at must not.

    Args:
        rollout: FLOPs of a step's rollouts on one device.
        look: FLOPs of a look at both policies on one sample.
        lens: FLOPs of a look at all layers on one response token of a sample that is looked at anyway.
        share: the most that looks may take of a step, 0 to 1; with 1 nothing bounds them but the next two.
        most_samples: of a look at both policies, on one device.
        most_tokens: of a look at all layers, on one device.
        lens_every: steps from one look at all layers to the next; 0: never.
        each_step: take a look in every step though it may cost more than the share, as a guard needs it.

    Raises:
        ValueError: a share of 0, or nothing to look at.
    """
    if not 0 < share <= 1 or most_samples < 1:
        raise ValueError(f"share, most_samples: {share}, {most_samples} given, accepted are above 0 up to 1, and 1 or more")
    room = math.inf if share == 1 else share / (1 - share) * rollout
    smallest = look + lens * (lens_every > 0 and most_tokens > 0)
    every = 1 if each_step else max(1, math.ceil(smallest / room))
    saved = every * room

    def samples_for(flops: float) -> int:
        return most_samples if flops == math.inf else min(most_samples, max(1, int(flops / look)))

    samples, with_lens = samples_for(saved), samples_for(min(saved / 2, saved - lens))
    tokens = 0
    if lens_every and most_tokens:
        left = saved - with_lens * look
        tokens = most_tokens if left == math.inf else min(most_tokens, max(0, int(left / lens)))

    largest = max(samples * look, (with_lens * look + tokens * lens) if tokens else 0.0)
    return Looks(
        every=every,
        samples=samples,
        samples_with_lens=with_lens if tokens else samples,
        lens_tokens=tokens,
        lens_every=max(lens_every, every) if tokens else 0,
        share=largest / (every * rollout + largest),
    )
