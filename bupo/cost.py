"""What a run costs, from the model's config and the run's alone: parameters, FLOPs of a step, memory of a device. No weights.

A FLOP is a multiplication or an addition; a product of ``[m, k]`` and ``[k, n]`` is ``2mkn``. Only products are counted.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from bupo.config import TrainConfig
from bupo.errors import ConfigError
from bupo.model import pretrained, unusable
from bupo_kernels.dispatch import default_memory_budget
from bupo_kernels.internal_policy import MODEL_TYPES

# Dense TFLOP/s of one device: bfloat16 with fp32 sums on its matrix units, and float32 outside them (what torch does unless it is
# allowed TF32, which matrix units take at half the rate of bfloat16). The first name found in the device's, as words, is its own.
PEAK_TFLOPS = {
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 66.9),
    "H200 NVL": (835.5, 60.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "H800": (989.4, 66.9),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "RTX A6000": (154.8, 38.7),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 6000 Ada": (364.2, 91.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI300X": (1307.4, 163.4),
    "MI325X": (1307.4, 163.4),
}


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """FLOP/s of one device of that name (as ``torch.cuda.get_device_name`` has it) at best; None where it is not known.

    Args:
        precision: ``"bfloat16"`` or ``"float32"``.
        tf32: whether float32 products may be taken in TF32.
    """
    bfloat16, float32 = next((peaks for name, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), (None, None))
    if bfloat16 is None:
        return None
    return 1e12 * (bfloat16 if precision == "bfloat16" else bfloat16 / 2 if tf32 else float32)


def load_architecture(config: TrainConfig) -> PretrainedConfig:
    """The model's own config: of the local folder or file ``config.model``, else ``config.architecture``, else of the hub (or its
    cache).

    Raises :class:`ConfigError`.
    """
    source, key = config.model, "model"
    if config.architecture is not None and not Path(config.model).exists():
        source, key = config.architecture, "architecture"
        if not source.is_file():
            raise ConfigError(f"architecture: {source} is not a file, accepted is a model's config.json")
    try:
        return AutoConfig.from_pretrained(**pretrained(str(source)))
    except Exception as error:  # of as many kinds as there are ways to damage a file
        raise unusable(source, error, key) from error


def check_fits(architecture: PretrainedConfig, config: TrainConfig) -> None:
    """Raises :class:`ConfigError` when the run asks for what this model is not: its type, its layers, its length."""
    if architecture.model_type not in MODEL_TYPES:
        raise ConfigError(f"model: {config.model} is of type {architecture.model_type!r}, accepted are {', '.join(MODEL_TYPES)}")
    depth = architecture.num_hidden_layers
    asked = {"optimizer.upper_from": config.optimizer.upper_from}
    if config.policy == "bupo":
        asked["bupo.layer"] = config.bupo.layer
    for key, layer in asked.items():
        if layer is not None and layer > depth:
            raise ConfigError(f"{key}: {layer} given, accepted are 1 to {depth} (the layers of {config.model})")
    (prompt, response), longest = config.lengths, architecture.max_position_embeddings
    if prompt + response > longest:
        raise ConfigError(
            f"rollout.max_new_tokens: {response} given with data.max_prompt_tokens: {prompt}, accepted are together at most "
            f"{longest} (the positions of {config.model})"
        )


@dataclass(frozen=True)
class Parameters:
    """Of each part of a model."""

    embedding: int
    layer: int  # of one
    layers: int  # how many there are
    final_norm: int
    head: int  # 0 if tied to the embedding

    @property
    def total(self) -> int:
        return self.embedding + self.layer * self.layers + self.final_norm + self.head


class _Shape(NamedTuple):
    """Sizes of a decoder of one of :data:`MODEL_TYPES`."""

    layers: int
    width: int
    heads: int
    queries: int  # width of all heads' queries together
    keys: int  # the same of keys, and of values
    ffn: int
    vocab: int

    @property
    def attention(self) -> int:
        """Elements of the matrices of one layer's attention."""
        return 2 * self.width * (self.queries + self.keys)

    @property
    def feed_forward(self) -> int:
        return 3 * self.width * self.ffn


def _shape(architecture: PretrainedConfig) -> _Shape:
    heads = architecture.num_attention_heads
    head_dim = getattr(architecture, "head_dim", None) or architecture.hidden_size // heads
    return _Shape(
        layers=architecture.num_hidden_layers,
        width=architecture.hidden_size,
        heads=heads,
        queries=heads * head_dim,
        keys=architecture.num_key_value_heads * head_dim,
        ffn=architecture.intermediate_size,
        vocab=architecture.vocab_size,
    )


def parameters(architecture: PretrainedConfig) -> Parameters:
    """Counts for a model of one of the types of :data:`bupo_kernels.internal_policy.MODEL_TYPES`."""
    s, kind = _shape(architecture), architecture.model_type
    biases = 0
    if kind == "qwen2":
        biases += s.queries + 2 * s.keys
    elif getattr(architecture, "attention_bias", False) and kind in ("llama", "qwen3"):
        biases += s.queries + 2 * s.keys + s.width
    if getattr(architecture, "mlp_bias", False) and kind == "llama":
        biases += 2 * s.ffn + s.width
    norms = 2 * s.width + (2 * s.queries // s.heads if kind == "qwen3" else 0)
    return Parameters(
        embedding=s.vocab * s.width,
        layer=s.attention + s.feed_forward + biases + norms,
        layers=s.layers,
        final_norm=s.width,
        head=0 if architecture.tie_word_embeddings else s.vocab * s.width,
    )


class Work(NamedTuple):
    """What goes through a model in one pass. Sums over batches and devices, element by element, are work again."""

    tokens: float  # through the layers
    pairs: float  # of a query and a key that attention takes together
    head_rows: float  # through the unembedding


def work_of(lengths: Iterable[tuple[float, float]]) -> Work:
    """Of sequences with so many prompt and response tokens. Attention is causal and each sequence by itself; the last token is only
    a target (or, in a rollout, sampled and not read).

    With mean lengths in place of each sequence's own the pairs come out too low, by the variance of the lengths.
    """
    sequences = [(prompt + response - 1, response) for prompt, response in lengths]
    return Work(
        tokens=sum(length for length, _ in sequences),
        pairs=sum(length * (length + 1) / 2 for length, _ in sequences),
        head_rows=sum(response for _, response in sequences),
    )


@dataclass(frozen=True)
class Flops:
    """``model`` is what the mathematics needs and MFU counts; ``hardware`` adds what the backward computes a second time."""

    layers: float = 0.0  # products with the weights of the layers
    attention: float = 0.0  # products of queries and keys, and with values
    head: float = 0.0
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        return self.layers + self.attention + self.head

    @property
    def hardware(self) -> float:
        return self.model + self.recomputed

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(getattr(self, f.name) * factor for f in fields(self)))


def pass_flops(
    architecture: PretrainedConfig,
    work: Work,
    *,
    layer: int | None = None,
    module: str = "layer",
    backward: bool = False,
    checkpointing: bool = False,
    trained_layers: int | None = None,
) -> Flops:
    """A forward, and with ``backward`` a training pass, of the policy of ``layer`` (None: the model's own).

    Only layers 1..``layer`` run, the attention policy without the FFN of its layer. The backward takes twice the products of the
    forward: one for the input, one for the weight; the head's are taken in one pass with its forward, three products in all.
    Recomputed are, always, the products of queries and keys (as flash attention does), and with ``checkpointing`` the layers, each
    up to the last product of its FFN, which nothing in the backward needs.

    Args:
        trained_layers: the layers above have frozen weights, whose gradients cost nothing; None: all are trained.
    """
    s = _shape(architecture)
    depth = s.layers if layer is None else layer
    elements = [s.attention + s.feed_forward] * depth
    if layer is not None and module == "attention":
        elements[-1] = s.attention
    forward = 2 * work.tokens * sum(elements)
    attention = 4 * work.pairs * s.queries * depth
    head = 2 * work.head_rows * s.vocab * s.width
    if not backward:
        return Flops(forward, attention, head)
    of_weights = 2 * work.tokens * sum(elements[:trained_layers])
    recomputed = attention / 2
    if checkpointing:
        feed_forwards = depth - (layer is not None and module == "attention")
        recomputed += forward + attention - 2 * work.tokens * feed_forwards * s.width * s.ffn
    return Flops(2 * forward + of_weights, 3 * attention, 3 * head, recomputed)


def training_flops(
    architecture: PretrainedConfig, config: TrainConfig, work: Work, layer: int | None = None, module: str = "layer"
) -> Flops:
    """Of old log-probs and update together, for what really went through the model: the sequences that have a gradient."""
    forward = pass_flops(architecture, work, layer=layer, module=module)
    return forward + pass_flops(architecture, work, layer=layer, module=module, **_backward(config))


def reference_flops(
    architecture: PretrainedConfig, work: Work, *, layer: int | None = None, backward: bool = False, checkpointing: bool = False
) -> Flops:
    """The same pass as the paper's released code makes it: always all layers, and two heads, each over every token."""
    once = pass_flops(architecture, work._replace(head_rows=work.tokens), layer=layer)
    everything = pass_flops(architecture, work._replace(head_rows=2 * work.tokens))
    if not backward:
        return everything
    trained = pass_flops(
        architecture, work._replace(head_rows=work.tokens), layer=layer, backward=True, checkpointing=checkpointing
    )
    return everything + trained + once * -1


@dataclass(frozen=True)
class Step:
    """FLOPs of a step, all devices together."""

    prefill: Flops
    decode: Flops
    look: Flops  # both policies on some of the samples, for the metrics
    old_logprobs: Flops
    update: Flops

    @property
    def training(self) -> Flops:
        return self.old_logprobs + self.update

    @property
    def total(self) -> Flops:
        return self.prefill + self.decode + self.look + self.training


def mean_lengths(config: TrainConfig) -> tuple[float, float]:
    """What an estimate assumes of prompts and responses where nothing is known: half of what the configuration allows."""
    prompt, response = config.lengths
    return prompt / 2, response / 2


def step_flops(
    architecture: PretrainedConfig,
    config: TrainConfig,
    world_size: int = 1,
    *,
    internal: bool,
    lengths: tuple[float, float] | None = None,
) -> Step:
    """An estimate in which every sequence is of the mean length, and has a gradient.

    Args:
        internal: of phase 1 (``policy: bupo``), else of phase 2.
        lengths: mean numbers of prompt and response tokens; None: :func:`mean_lengths`.
    """
    prompt, response = lengths or mean_lengths(config)
    sequences = config.rollout.prompts * config.rollout.samples
    prefill, each = work_of([(prompt, 1)]), work_of([(prompt, response)])
    decode = Work(*(whole - before for whole, before in zip(each, prefill, strict=True)))
    policy = _policy(config) if internal else {}
    forward, own = pass_flops(architecture, each, **policy), pass_flops(architecture, each)
    update = pass_flops(architecture, each, **policy, **_backward(config))
    # Internal: both once for the entropies, and once more for their divergence.
    looked_at = min(sequences, world_size * config.look_tokens / each.tokens)
    look = (own + forward) * 2 if internal else own
    return Step(
        pass_flops(architecture, prefill) * sequences,
        pass_flops(architecture, decode) * sequences,
        look * looked_at,
        forward * sequences,
        update * sequences,
    )


def _policy(config: TrainConfig) -> dict[str, Any]:
    return {"layer": config.bupo.layer, "module": config.bupo.module}


def _backward(config: TrainConfig) -> dict[str, Any]:
    frozen = config.optimizer.upper_layers == 0
    return {
        "backward": True,
        "checkpointing": config.hardware.checkpoint_activations,
        "trained_layers": config.optimizer.upper_from if frozen else None,
    }


def activation_bytes(
    architecture: PretrainedConfig, tokens: int, *, itemsize: int, checkpointing: bool = False, layers: int | None = None
) -> int:
    """What autograd keeps of ``layers`` (None: all) decoder layers for the backward of a packed micro-batch, in bytes.

    For a token and layer, ``b`` bytes a number, ``D, Q, K, I`` the widths of residual stream, queries, keys and FFN:
    two norms ``2 D (4 + 2b)``: input in fp32, normed, scaled; queries, keys, values and attention's output, twice, ``b (3Q + 2K)``,
    and ``4`` for each head; norms of queries and keys, where there are any, ``(4 + b)(Q + K)``; FFN ``4 b I``: gate before and
    after its activation, up, and their product. With ``checkpointing`` each layer's input, ``b D``, and one whole layer and half as
    much again for the gradients in flight.
    """
    s, b = _shape(architecture), itemsize
    layers = s.layers if layers is None else layers
    qk_norms = (4 + b) * (s.queries + s.keys) * (architecture.model_type == "qwen3")
    layer = 2 * s.width * (4 + 2 * b) + b * (3 * s.queries + 2 * s.keys) + 4 * s.heads + qk_norms + 4 * b * s.ffn
    return int(tokens * (layers * b * s.width + 1.5 * layer if checkpointing else layers * layer))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Temporaries that are small against these, and what the caching allocator wastes, are left out."""

    weights: int  # fp32 masters, this device's shard
    optimizer: int  # AdamW's two moments of them
    gradients: int  # of them, fp32
    gathered: int  # embedding, final norm and head whole, and two layers, in the compute dtype
    activations: int
    head: int  # working memory of the loss, gradients of the head's input and weight
    reduction: int  # gradients of embedding and head on the way to their shards, when activations are gone
    model: int  # in rollouts: the whole model in the compute dtype
    cache: int  # keys and values of as many sequences of full length as are generated at a time
    decoding: int  # logits of a forward and, in continuous batching, its mask and one layer's keys and values for every head
    host: int  # CPU memory of each device with `hardware.offload`, for what is then 0 above

    @property
    def training(self) -> int:
        held = self.weights + self.optimizer + self.gradients + self.gathered
        return held + max(self.activations + self.head, self.reduction)

    @property
    def rollout(self) -> int:
        return self.weights + self.optimizer + self.model + self.cache + self.decoding


def memory(architecture: PretrainedConfig, config: TrainConfig, world_size: int, *, internal: bool = False) -> Memory:
    """An estimate, for phase 2, or for phase 1 if ``internal``; of the ``vllm`` engine only what it leaves to the trainer."""
    s, p, hardware, rollout = _shape(architecture), parameters(architecture), config.hardware, config.rollout
    b, sharded = 2 if hardware.precision == "bfloat16" else 4, not is_plain(config, world_size)
    layers = config.bupo.layer if internal else s.layers
    root, one_head = p.embedding + p.head + p.final_norm, s.vocab * s.width
    frozen_above = config.optimizer.upper_from if config.optimizer.upper_layers == 0 else s.layers
    trained = p.embedding + p.head + p.layer * frozen_above + p.final_norm * (frozen_above == s.layers)
    with_gradient = p.embedding + p.head + p.layer * min(layers, frozen_above) if internal else trained
    shards = {
        "weights": 4 * math.ceil(p.total / world_size),
        "optimizer": 8 * math.ceil(trained / world_size),
        "gradients": 4 * math.ceil(with_gradient / world_size),
    }
    host = sum(shards.values()) if hardware.offload else 0
    if hardware.offload:
        shards = dict.fromkeys(shards, 0)

    tokens = hardware.max_tokens_per_device
    budget = default_memory_budget(torch.device("cpu" if hardware.device == "cpu" else "cuda"))
    logits = tokens * s.vocab * (4 + b)  # and their gradients, of every row at once: more is never needed
    in_fp32 = one_head * 4 if b < 4 else 0  # dW is summed in fp32
    sequences = min(rollout.sequences, math.ceil(rollout.prompts * rollout.samples / world_size))
    kept, decoded, per_head = sequences * sum(config.lengths), sequences, 0
    if rollout.engine == "continuous":
        decoded = max(sequences, 1024)
        per_head = kept * b * (decoded + 2 * s.queries)
    vllm = rollout.engine == "vllm"
    return Memory(
        **shards,
        gathered=b * (root + 2 * p.layer) * sharded,
        activations=activation_bytes(
            architecture, tokens, itemsize=b, checkpointing=hardware.checkpoint_activations, layers=layers
        ),
        head=min(budget, logits) + one_head * b + in_fp32 + tokens * s.width * (4 + 3 * b),
        reduction=root * (4 + max(b, math.ceil(4 / world_size))) if sharded else one_head * 4,  # in fp32, from b bytes, to shards
        model=b * p.total * (sharded and not vllm),
        cache=0 if vllm else kept * 2 * s.keys * s.layers * b,
        decoding=0 if vllm else decoded * s.vocab * (b + 4) + per_head,
        host=host,
    )


def is_plain(config: TrainConfig, world_size: int) -> bool:
    """Whether the model is not sharded: see :func:`bupo.distributed.shard`."""
    return world_size == 1 and config.hardware.precision == "float32" and not config.hardware.offload


def describe(
    architecture: PretrainedConfig, config: TrainConfig, world_size: int, lengths: tuple[float, float] | None = None
) -> str:
    """What ``bupo train --dry-run`` prints; ``lengths`` as in :func:`step_flops`."""
    p, hardware = parameters(architecture), config.hardware
    prompt, response = lengths or mean_lengths(config)
    sequences = config.rollout.prompts * config.rollout.samples
    head = "head tied to it" if p.head == 0 else f"head {_billions(p.head)}"
    recomputed = "activations recomputed" if hardware.checkpoint_activations else "activations kept"
    assumed = "" if lengths else " (assumed: half of the longest)"
    lines = [
        f"model    {config.model}: {architecture.model_type}, {p.layers} layers, {_billions(p.total)} parameters "
        f"({_billions(p.layer)} a layer, embedding {_billions(p.embedding)}, {head})",
        f"devices  {world_size}, {hardware.precision}, {recomputed}, "
        f"micro-batches of up to {hardware.max_tokens_per_device:,} tokens",
        f"step     {sequences:,} sequences of {prompt:,.0f} prompt and {response:,.0f} response tokens{assumed}: "
        f"{sequences * (prompt + response):,.0f} tokens",
    ]
    phases = {f"phase 1: {config.bupo.module} {config.bupo.layer}": True} if config.policy == "bupo" else {}
    phases |= {"phase 2: the model": False} if phases else {"the model": False}
    of_memory = [memory(architecture, config, world_size, internal=internal) for internal in phases.values()]
    of_step = [step_flops(architecture, config, world_size, internal=internal, lengths=lengths) for internal in phases.values()]
    work = work_of([(prompt, response)])
    backward = {"backward": True, "checkpointing": hardware.checkpoint_activations}
    reference = []
    for internal in phases.values():
        layer = {"layer": config.bupo.layer} if internal else {}
        passes = (reference_flops(architecture, work, **layer, **how) for how in ({}, backward))
        reference.append(sum(flops.hardware for flops in passes) * sequences)
    return "\n".join([*lines, "", _memory_table(phases, of_memory, config), "", _flops_table(phases, of_step, reference, config)])


_PARTS = {
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
_ONLY_ROLLOUT, _NOT_ROLLOUT = ("model", "cache", "decoding"), ("gradients", "gathered", "activations", "head", "reduction")


def _memory_table(phases: Iterable[str], of_memory: list[Memory], config: TrainConfig) -> str:
    gib = lambda size: f"{size / 2**30:.2f}"  # noqa: E731
    rows = []
    for title, name in _PARTS.items():
        sizes = [getattr(memory, name) for memory in of_memory]
        training = ["" if name in _ONLY_ROLLOUT else gib(size) for size in sizes]
        rows.append([title, *training, "" if name in _NOT_ROLLOUT else gib(sizes[-1])])
    rows.append(["peak", *(gib(memory.training) for memory in of_memory), gib(of_memory[-1].rollout)])
    table = _table(["memory per device, GiB", *phases, "rollouts"], rows)
    if host := of_memory[-1].host:
        table += f"\nand {gib(host)} GiB of CPU memory for each device"
    if config.rollout.engine == "vllm":
        table += f"\nvLLM takes {config.rollout.vllm_memory:.0%} of the device's memory for itself"
    return table


def _flops_table(phases: Iterable[str], of_step: list[Step], reference: list[float], config: TrainConfig) -> str:
    titles = {
        "rollouts: prompts": "prefill",
        "rollouts: responses": "decode",
        "metrics of both policies": "look",
        "old log-probs": "old_logprobs",
        "update": "update",
    }
    ratio = len(of_step) > 1
    rows = []

    def add(title: str, values: list[float]) -> None:
        rows.append([title, *(f"{value / 1e12:,.1f}" for value in values), *([f"{values[0] / values[1]:.2f}"] if ratio else [])])

    for title, name in titles.items():
        add(title, [getattr(step, name).hardware for step in of_step])
    add("all", [step.total.hardware for step in of_step])
    training = [step.training.hardware for step in of_step]
    add("old log-probs and update", training)
    add("  the reference's, two heads", reference)
    saved = [f"{theirs / ours:.2f}x" for theirs, ours in zip(reference, training, strict=True)]
    rows.append(["  against ours", *saved, *([""] if ratio else [])])
    return _table(["TFLOP per step, all devices", *phases, *(["ratio"] if ratio else [])], rows)


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _table(header: list[str], rows: list[list[str]]) -> str:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=200, no_color=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
