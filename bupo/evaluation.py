"""Held-out accuracy: greedy, avg@k and unbiased pass@k."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import comb

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.data import Example
from bupo.rewards import Reward, score
from bupo.rollout import generate

SOLVED = 0.5  # a response counts as right when its reward is above this


@dataclass(frozen=True)
class Accuracy:
    greedy: float  # share of problems that the most likely response solves
    avg_at_k: float  # mean share of right responses among k samples
    pass_at_k: float  # chance that at least one of k samples is right
    k: int
    problems: int

    def __str__(self) -> str:
        sampled = f"avg@{self.k} {self.avg_at_k:.1%}, pass@{self.k} {self.pass_at_k:.1%}"
        return f"greedy {self.greedy:.1%}, {sampled} on {self.problems} problems"

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """``1 − C(n−c, k) / C(n, k)``: the unbiased estimate, from n samples of which c are right, that one of k is right."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"n: {n}, correct: {correct}, k: {k} given, accepted are 0 <= correct <= n and 1 <= k <= n")
    return 1 - comb(n - correct, k) / comb(n, k)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    reward: Reward,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch: int,
) -> Accuracy:
    """Accuracy of the model's final policy on ``examples``; the same ``seed`` gives the same samples."""

    def right(prompts: list[Example], temperature: float) -> list[bool]:
        responses = generate(
            model,
            tokenizer,
            [example.prompt for example in prompts],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch=batch,
        )
        return (score(reward, responses, prompts) > SOLVED).tolist()

    greedy = right(examples, 0)
    sampled = right([example for example in examples for _ in range(samples)], temperature)
    correct = [sum(sampled[i : i + samples]) for i in range(0, len(sampled), samples)]
    return Accuracy(
        greedy=sum(greedy) / len(examples),
        avg_at_k=sum(correct) / len(sampled),
        pass_at_k=sum(pass_at_k(samples, c, samples) for c in correct) / len(examples),
        k=samples,
        problems=len(examples),
    )
