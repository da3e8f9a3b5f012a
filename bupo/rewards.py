"""Verifiable rewards: functions of (response, answer) -> float, named in the configuration by import path."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bupo.config import ConfigError
from bupo.data import Example
from bupo.rollout import Sample

Reward = Callable[[str, str], float]


def exact_match(response: str, answer: str) -> float:
    """1.0 when the response is the answer, white space around it apart."""
    return float(response.strip() == answer.strip())


def score(reward: Reward, samples: list[Sample], asked: list[Example]) -> Tensor:  # [B]
    """The reward of each sample. Raises ``ValueError`` when one is not a finite number."""
    rewards = [float(reward(sample.response, example.answer)) for sample, example in zip(samples, asked, strict=True)]
    for value, sample in zip(rewards, samples, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"reward: {value} returned for the response {sample.response!r}, accepted are finite numbers")
    return torch.tensor(rewards)


def load_reward(path: str) -> Reward:
    """The function ``module:function`` names. Raises :class:`ConfigError` when there is none."""
    module_name, colon, function_name = path.partition(":")
    if not colon:
        raise ConfigError(f"reward: {path!r} given, accepted is module:function")
    try:
        reward = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"reward: {path!r} given, accepted is an importable module:function ({reason})") from error
    if not callable(reward):
        raise ConfigError(f"reward: {path!r} is a {type(reward).__name__}, accepted is a function of (response, answer)")
    return reward
