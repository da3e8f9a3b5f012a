"""What a run would cost, as tables for people: ``bupo train --dry-run``."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from bupo.config import TrainConfig
from bupo.cost import (
    Memory,
    Step,
    looks_of,
    mean_lengths,
    memory,
    optimised_policy,
    parameters,
    reference_flops,
    step_flops,
    work_of,
)
from bupo.schedule import OptimisedPolicy
from bupo.tables import columns

# The entries of a Memory by their titles; some are there in training alone, some in rollouts alone.
MEMORY_PARTS = {
    "weights, fp32 shard": "weights",
    "AdamW moments": "optimizer",
    "gradients": "gradients",
    "gathered weights": "gathered",
    "activations": "activations",
    "head: loss and gradients": "head",
    "reduction (later)": "reduction",
    "whole model": "model",
    "keys and values": "cache",
    "logits, mask, one layer's heads": "decoding",
}
ONLY_TRAINING, ONLY_ROLLOUTS = ("gradients", "gathered", "activations", "head", "reduction"), ("model", "cache", "decoding")

STEP_PARTS = {
    "rollouts: prompts": "prefill",
    "rollouts: responses": "decode",
    "looks at policies": "look",
    "old log-probs": "old_logprobs",
    "update": "update",
}


def describe(
    architecture: PretrainedConfig, config: TrainConfig, world_size: int, lengths: tuple[float, float] | None = None
) -> str:
    """Return the model, the run and the tables of memory and FLOPs; ``lengths`` are those of :func:`bupo.cost.step_flops`."""
    counts, hardware = parameters(architecture), config.hardware
    prompt, response = lengths or mean_lengths(config)
    sequences = config.rollout.prompts * config.rollout.samples
    head = "head tied to it" if counts.head == 0 else f"head {_billions(counts.head)}"
    recomputed = "activations recomputed" if hardware.checkpoint_activations else "activations kept"
    assumed = "" if lengths else " (assumed: half of the longest)"
    lines = [
        f"model    {config.model}: {architecture.model_type}, {counts.layers} layers, {_billions(counts.total)} parameters "
        f"({_billions(counts.layer)} a layer, embedding {_billions(counts.embedding)}, {head})",
        f"devices  {world_size}, {hardware.precision}, {recomputed}, "
        f"micro-batches of up to {hardware.max_tokens_per_device:,} tokens",
        f"step     {sequences:,} sequences of {prompt:,.0f} prompt and {response:,.0f} response tokens{assumed}: "
        f"{sequences * (prompt + response):,.0f} tokens",
    ]
    internal = optimised_policy(config, internal=True)
    own = "the model" if config.distillation is None else f"the model and layer {config.distillation.layer}"
    phases = {f"phase 1: {internal.phase}": True, "phase 2: the model": False} if config.policy == "bupo" else {own: False}
    memories = [memory(architecture, config, world_size, internal=first) for first in phases.values()]
    steps = [step_flops(architecture, config, world_size, internal=first, lengths=lengths) for first in phases.values()]
    references = [
        sequences * _reference_training(architecture, config, (prompt, response), optimised_policy(config, internal=first))
        for first in phases.values()
    ]
    whole = [(prompt, response)] * sequences
    for title, first in phases.items():
        looks = looks_of(architecture, config, whole, world_size, optimised_policy(config, first))
        lines.append(f"looks    {title}: {looks}")
    lines += [
        "",
        *_memory_table(list(phases), memories, config),
        "",
        *_flops_table(list(phases), steps, references if config.distillation is None else []),
    ]
    return "\n".join(lines)


def _reference_training(
    architecture: PretrainedConfig, config: TrainConfig, lengths: tuple[float, float], policy: OptimisedPolicy
) -> float:
    """Return the FLOPs of the paper's released code for old log-probs and update of one sequence."""
    work, checkpointing = work_of([lengths]), config.hardware.checkpoint_activations
    old = reference_flops(architecture, work, layer=policy.layer)
    update = reference_flops(architecture, work, layer=policy.layer, backward=True, checkpointing=checkpointing)
    return old.hardware + update.hardware


def _memory_table(phases: list[str], memories: Sequence[Memory], config: TrainConfig) -> list[str]:
    rows = [["memory per device, GiB", *phases, "rollouts"]]
    for title, part in MEMORY_PARTS.items():
        sizes = [_gib(getattr(found, part)) for found in memories]
        training = [""] * len(phases) if part in ONLY_ROLLOUTS else sizes
        rows.append([title, *training, "" if part in ONLY_TRAINING else sizes[-1]])
    rows.append(["peak", *(_gib(found.training) for found in memories), _gib(memories[-1].rollout)])
    lines = columns(rows, numbers=True)
    if host := memories[-1].host:
        lines.append(f"and {_gib(host)} GiB of CPU memory for each device")
    if config.rollout.engine == "vllm":
        lines.append(f"vLLM takes {config.rollout.vllm_memory:.0%} of the device's memory for itself")
    return lines


def _flops_table(phases: list[str], steps: Sequence[Step], references: Sequence[float]) -> list[str]:
    training = [step.training.hardware for step in steps]
    flops = {title: [getattr(step, part).hardware for step in steps] for title, part in STEP_PARTS.items()}
    flops |= {"all": [step.total.hardware for step in steps], "old log-probs and update": training}
    if references:
        flops["  the reference's, two heads"] = list(references)
    rows = [["TFLOP per step, all devices", *phases, "ratio"]]
    rows += [[title, *(f"{x / 1e12:,.1f}" for x in values), f"{values[0] / values[-1]:.2f}"] for title, values in flops.items()]
    if references:
        rows.append(["  against ours", *(f"{theirs / ours:.2f}x" for theirs, ours in zip(references, training, strict=True)), ""])
    if len(phases) == 1:  # There is nothing to compare it with.
        rows = [row[:-1] for row in rows]
    return columns(rows, numbers=True)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
