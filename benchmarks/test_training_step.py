"""The old-log-prob + update part of a step against the naive logit lens on the same tokens: ``make bench``.

Naive is what the paper's released code does: every forward runs all layers and keeps their outputs, and two heads, of the
internal and of the final policy, give logits of every token, in both phases. Both sides take turns in one process, from the same
weights, both with activation checkpointing or both without. Memory is the most that torch held beyond weights and optimizer state;
the gradients are in it. docs/training-step.md counts what to expect.
"""

import statistics
import time
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo.attention import training_attention
from bupo.batching import MicroBatch, pack
from bupo.config import TrainConfig, parse_config
from bupo.distributed import World
from bupo.model import METHODS, make_optimizer
from bupo.rollout import Sample
from bupo.schedule import FINAL, OptimisedPolicy
from bupo.trainer import update, with_old_logprobs
from bupo_kernels import FusedLMHead
from tests.problems import peak_bytes

VOCAB, LAYER, ROUNDS = 32000, 4, 5
# Sequences, tokens of each, half of them prompt; whether activations are recomputed (the default of verl); whether the
# targets must be met. 1,024 tokens are few beside the gradients (351 MiB in phase 2) that both sides hold, as are logits beside
# activations that are kept.
CASES = [((4, 256), False, False), ((4, 256), True, False), ((8, 512), True, True)]
TARGETS = {"phase 1": (3.5, 1 / 3), "phase 2": (1.2, 1 / 2)}  # times the naive tokens/s, share of its peak memory


def config(layer: int | None, checkpointing: bool) -> TrainConfig:
    return parse_config(
        {
            "model": "none",
            "output_dir": "none",
            "data": {"train": "none"},
            "policy": "bupo" if layer else "grpo",
            "bupo": {"layer": layer or 1, "internal_steps": 1},
            "hardware": {"device": "cpu", "checkpoint_activations": checkpointing},
        }
    )


def make_model(checkpointing: bool) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        )
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class Ours:
    """The functions of the trainer, on one packed micro-batch."""

    def __init__(self, batch: MicroBatch, layer: int | None, checkpointing: bool) -> None:
        self.batch, self.config = batch, config(layer, checkpointing)
        self.policy = FINAL if layer is None else OptimisedPolicy(layer)
        self.model = make_model(checkpointing)
        FusedLMHead.adopt(self.model.lm_head)
        for name, function in METHODS.items():
            setattr(self.model, name, MethodType(function, self.model))
        self.optimizer = make_optimizer(self.model, self.config.optimizer)
        self.world = World(0, 1, torch.device("cpu"))

    def step(self) -> float:
        with training_attention(self.model, "per-sequence"):
            batch = with_old_logprobs(self.model, self.batch, self.policy, self.config)
            return update(self.model, self.optimizer, [batch], self.policy, self.config, self.world).loss


class Naive:
    """The same in plain torch, sequences as the rows of a batch (they are of one length: no padding)."""

    def __init__(self, batch: MicroBatch, layer: int | None, checkpointing: bool) -> None:
        rows = lambda x: x.view(len(batch.lengths), -1)  # noqa: E731
        self.layer, self.how = layer, config(layer, checkpointing)
        self.input_ids, self.targets, self.coefficients = map(rows, (batch.input_ids, batch.targets, batch.coefficients))
        self.mask = rows(batch.mask)
        self.model = make_model(checkpointing)
        self.optimizer = make_optimizer(self.model, self.how.optimizer)

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the internal policy and of the final one, ``[B, S, V]``."""
        out = self.model.model(self.input_ids, output_hidden_states=True, use_cache=False)
        return self.model.lm_head(out.hidden_states[self.layer or LAYER]), self.model.lm_head(out.last_hidden_state)

    def logprobs(self, entropy: bool = False) -> torch.Tensor:
        internal, final = self.logits()
        if entropy:
            logprobs = final.log_softmax(-1)
            _ = -(logprobs.exp() * logprobs).sum(-1)
        logits = internal if self.layer else final
        return logits.log_softmax(-1).gather(-1, self.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)

    def step(self) -> float:
        how = self.how.objective
        with torch.no_grad():
            old = self.logprobs(entropy=True)
        ratio = (self.logprobs() - old).exp()
        terms = torch.maximum(-self.coefficients * ratio, -self.coefficients * ratio.clamp(1 - how.clip_low, 1 + how.clip_high))
        terms = torch.where(self.coefficients < 0, terms.minimum(-self.coefficients * how.dual_clip), terms)
        loss = (terms * self.mask).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.how.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def random_batch(sequences: int, length: int) -> MicroBatch:
    """``length`` tokens of each sequence go through the layers, and half of them have a target."""
    ids = torch.randint(VOCAB, (sequences, length + 1)).tolist()
    half = length // 2 + 1
    samples = [Sample(prompt_ids=row[:half], response_ids=row[half:], logprobs=None, finished=True) for row in ids]
    advantages = [1.0 if i % 2 else -0.5 for i in range(sequences)]
    return pack(samples, [a / (sequences * (length // 2)) for a in advantages], torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "checkpointing", "must"),
    CASES,
    ids=[f"{n} x {length}, {'recomputed' if c else 'kept'}" for (n, length), c, _ in CASES],
)
@pytest.mark.parametrize("phase", TARGETS)
def test_step(benchmark, capsys, phase, shape, checkpointing, must):
    layer = LAYER if phase == "phase 1" else None
    sides = {"naive": Naive, "ours": Ours}
    sides = {name: side(random_batch(*shape), layer, checkpointing) for name, side in sides.items()}
    seconds, losses = {name: [] for name in sides}, {name: [] for name in sides}

    def one_of_each() -> None:
        for name, side in sides.items():
            started = time.perf_counter()
            losses[name].append(side.step())
            seconds[name].append(time.perf_counter() - started)

    benchmark.group = "old log-probs and update"
    benchmark.pedantic(one_of_each, warmup_rounds=1, rounds=ROUNDS)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    peaks = {name: peak_bytes(side.step) for name, side in sides.items()}
    faster, share = medians["naive"] / medians["ours"], peaks["ours"] / peaks["naive"]
    least, most = TARGETS[phase]

    speeds = {name: shape[0] * shape[1] / median for name, median in medians.items()}
    for name in sides:
        benchmark.extra_info[name] = {"tokens_per_second": speeds[name], "peak_mib": peaks[name] / 2**20}
    with capsys.disabled():
        print(
            f"\n{phase}, {shape[0]} x {shape[1]} tokens, activations {'recomputed' if checkpointing else 'kept'}: "
            f"{speeds['naive']:,.0f} -> {speeds['ours']:,.0f} tokens/s ({faster:.2f}x, {_verdict(faster >= least)} {least}x), "
            f"{peaks['naive'] / 2**20:,.0f} -> {peaks['ours'] / 2**20:,.0f} MiB ({share:.2f}, {_verdict(share <= most)} {most:.2f})"
        )
    assert losses["ours"] == pytest.approx(losses["naive"], rel=1e-3)
    if must:
        assert faster >= least
        assert share <= most


def _verdict(met: bool) -> str:
    return "reaches" if met else "MISSES"
