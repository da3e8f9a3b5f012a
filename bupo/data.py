"""Prompts with verifiable answers, and the order in which training sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bupo.config import ConfigError


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


def load_examples(path: Path, key: str) -> list[Example]:
    """The examples of a JSONL file, ``{"prompt": "...", "answer": "..."}`` a line; other columns are ignored.

    Raises :class:`ConfigError` with the configuration ``key`` and the line number of the first bad row.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path} is not UTF-8: {error}") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}: {path} line {number} is not JSON: {error.msg}") from None
        for column in ("prompt", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column]:
                raise ConfigError(f"{key}: {path} line {number} has no {column!r}, accepted is a non-empty string")
        examples.append(Example(row["prompt"], row["answer"]))
    if not examples:
        raise ConfigError(f"{key}: {path} is empty, accepted is at least one example")
    return examples


class PromptOrder:
    """Shuffled epochs, one after the other. The batch is a function of the step alone: nothing to save, nothing to restore."""

    def __init__(self, examples: list[Example], batch: int, seed: int) -> None:
        self.examples, self.batch, self.seed = examples, batch, seed

    def at(self, step: int) -> list[Example]:
        """The examples of a step, counted from 1."""
        first, size = (step - 1) * self.batch, len(self.examples)
        epochs = range(first // size, (first + self.batch - 1) // size + 1)
        order = [i for epoch in epochs for i in self._permutation(epoch)]
        offset = first - epochs.start * size
        return [self.examples[i] for i in order[offset : offset + self.batch]]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
        return torch.randperm(len(self.examples), generator=generator).tolist()


STREAMS = ("order", "rollout", "evaluation", "warm-up", "guard", "look")


def stream_seed(seed: int, stream: str, *indices: int) -> int:
    """A seed of its own for one use (an epoch; a step and a rank) of one of a run's :data:`STREAMS` of random numbers.

    Hashed to 32 bits: torch's CPU generator reads no more of its seed, so that sums and shifts would collide.
    """
    return int(np.random.SeedSequence((seed, STREAMS.index(stream), *indices)).generate_state(1)[0])
