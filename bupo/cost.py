"""What a run costs, from the model's config and the run's alone: parameters, FLOPs of a step, memory of a device. No weights.

A FLOP is a multiplication or an addition; a product of ``[m, k]`` and ``[k, n]`` is ``2mkn``. Only products are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from bupo.config import TrainConfig
from bupo.looks import Looks, plan_looks
from bupo.schedule import FINAL, OptimisedPolicy
from bupo_kernels.dispatch import default_memory_budget


@dataclass(frozen=True)
class Parameters:
    """The numbers of parameters of the parts of a model."""

    embedding: int
    layer: int  # of one layer
    layers: int  # how many layers there are
    final_norm: int
    head: int  # 0 if tied to the embedding

    @property
    def total(self) -> int:
        return self.embedding + self.layer * self.layers + self.final_norm + self.head


class _Shape(NamedTuple):
    """The sizes of a decoder of one of :data:`bupo_kernels.internal_policy.MODEL_TYPES`."""

    layers: int
    width: int
    heads: int
    queries: int  # the width of all heads' queries together
    keys: int  # the width of all keys together, and of all values
    ffn: int
    vocab: int

    @property
    def attention(self) -> int:
        """The elements of the matrices of one layer's attention."""
        return 2 * self.width * (self.queries + self.keys)

    @property
    def feed_forward(self) -> int:
        """The elements of the matrices of one layer's FFN."""
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
    """Count the parameters of a model of one of the types of :data:`bupo_kernels.internal_policy.MODEL_TYPES`."""
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


def optimised_policy(config: TrainConfig, internal: bool) -> OptimisedPolicy:
    """Return the policy that phase 1 optimises if ``internal``, else the model's own."""
    return OptimisedPolicy(config.bupo.layer, config.bupo.module) if internal and config.bupo else FINAL


def _trained_layers(config: TrainConfig, depth: int) -> int:
    """Return how many of ``depth`` layers, from the bottom, have weights that are trained."""
    frozen_above = config.optimizer.upper_from if config.optimizer.upper_layers == 0 else None
    return depth if frozen_above is None else frozen_above


# ---- FLOPs


class Work(NamedTuple):
    """The work of a model in one pass. Sums over batches and devices, element by element, are work again."""

    tokens: float  # through the layers
    pairs: float  # of a query and a key that attention takes together
    head_rows: float  # through the unembedding


def work_of(lengths: Iterable[tuple[float, float]]) -> Work:
    """Return the work of sequences with so many prompt and response tokens.

    Attention is causal and each sequence by itself; the last token is only a target (or, in a rollout, sampled and not read). With
    mean lengths in place of each sequence's own the pairs come out too low, by the variance of the lengths.
    """
    sequences = [(prompt + response - 1, response) for prompt, response in lengths]
    return Work(
        tokens=sum(length for length, _ in sequences),
        pairs=sum(length * (length + 1) / 2 for length, _ in sequences),
        head_rows=sum(response for _, response in sequences),
    )


@dataclass(frozen=True)
class Flops:
    """FLOPs: ``model`` is what the mathematics needs and MFU counts; ``hardware`` adds what the backward computes a second time."""

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
    """Return the FLOPs of a forward, or with ``backward`` of a training pass, of the policy of ``layer`` (None: the model's own).

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
    weight_gradients = 2 * work.tokens * sum(elements[:trained_layers])
    recomputed = attention / 2
    if checkpointing:
        feed_forwards = depth - (layer is not None and module == "attention")
        recomputed += forward + attention - 2 * work.tokens * feed_forwards * s.width * s.ffn
    return Flops(2 * forward + weight_gradients, 3 * attention, 3 * head, recomputed)


def _update_flops(architecture: PretrainedConfig, config: TrainConfig, work: Work, layer: int | None, module: str) -> Flops:
    """Return the FLOPs of a training pass as the run makes it."""
    own = pass_flops(
        architecture,
        work,
        layer=layer,
        module=module,
        backward=True,
        checkpointing=config.hardware.checkpoint_activations,
        trained_layers=_trained_layers(config, architecture.num_hidden_layers),
    )
    if config.distillation is None or config.distillation.weight == 0:
        return own
    # The head of the layer that learns, three products again, and once more that of its teacher, which the loss has had.
    return own + Flops(head=own.head, recomputed=own.head / 3)


def training_flops(
    architecture: PretrainedConfig, config: TrainConfig, work: Work, layer: int | None = None, module: str = "layer"
) -> Flops:
    """Return the FLOPs of old log-probs and update together, for what really went through the model: sequences with a gradient."""
    old_logprobs = pass_flops(architecture, work, layer=layer, module=module)
    return old_logprobs + _update_flops(architecture, config, work, layer, module)


def reference_flops(
    architecture: PretrainedConfig, work: Work, *, layer: int | None = None, backward: bool = False, checkpointing: bool = False
) -> Flops:
    """Return the FLOPs of the same pass in the paper's released code: it always runs all layers, and two heads over every token."""
    one_head, two_heads = (work._replace(head_rows=heads * work.tokens) for heads in (1, 2))
    forward = pass_flops(architecture, two_heads)
    if not backward:
        return forward
    trained = pass_flops(architecture, one_head, layer=layer, backward=True, checkpointing=checkpointing)
    return forward + trained + pass_flops(architecture, one_head, layer=layer) * -1


@dataclass(frozen=True)
class Step:
    """The FLOPs of a step, all devices together."""

    prefill: Flops
    decode: Flops
    look: Flops  # looks at policies, for the metrics: the mean over steps
    old_logprobs: Flops
    update: Flops

    @property
    def training(self) -> Flops:
        return self.old_logprobs + self.update

    @property
    def total(self) -> Flops:
        return self.prefill + self.decode + self.look + self.training


def mean_lengths(config: TrainConfig) -> tuple[float, float]:
    """Return the lengths of prompts and responses that are assumed where none are known: half of what the configuration allows."""
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
    """Estimate the FLOPs of a step in which every sequence is of the mean length, and has a gradient.

    Args:
        internal: whether it is a step of phase 1 (``policy: bupo``), else of phase 2.
        lengths: mean numbers of prompt and response tokens; None: :func:`mean_lengths`.
    """
    prompt, response = lengths or mean_lengths(config)
    sequences = config.rollout.prompts * config.rollout.samples
    each = work_of([(prompt, response)])
    policy = optimised_policy(config, internal)
    prefill, decode = _rollout_flops(architecture, [(prompt, response)])
    looks = looks_of(architecture, config, [(prompt, response)] * sequences, world_size, policy)
    lens = Flops(head=_lens_flops(architecture) * looks.lens_tokens_per_step)
    return Step(
        prefill=prefill * sequences,
        decode=decode * sequences,
        look=(_look_flops(architecture, each, policy) * looks.samples_per_step + lens) * world_size,
        old_logprobs=pass_flops(architecture, each, layer=policy.layer, module=policy.module) * sequences,
        update=_update_flops(architecture, config, each, policy.layer, policy.module) * sequences,
    )


def _rollout_flops(architecture: PretrainedConfig, lengths: Sequence[tuple[float, float]]) -> tuple[Flops, Flops]:
    """Return the FLOPs of reading prompts, and of decoding responses, of these lengths."""
    prefill, whole = work_of([(prompt, 1) for prompt, _ in lengths]), work_of(lengths)
    decode = Work(*(both - before for both, before in zip(whole, prefill, strict=True)))
    return pass_flops(architecture, prefill), pass_flops(architecture, decode)


def looks_of(
    architecture: PretrainedConfig,
    config: TrainConfig,
    lengths: Sequence[tuple[float, float]],
    world_size: int,
    policy: OptimisedPolicy,
) -> Looks:
    """Return what is looked at in a step on ``policy``, whose sequences have so many prompt and response tokens."""
    telemetry, count = config.telemetry, len(lengths)
    whole = work_of(lengths)
    mean = Work(*(value / count for value in whole))
    rollout = sum((part.model for part in _rollout_flops(architecture, lengths)), 0.0)
    return plan_looks(
        rollout / world_size,
        _look_flops(architecture, mean, policy).model,
        _lens_flops(architecture),
        share=telemetry.look_share,
        most_samples=max(1, min(math.ceil(count / world_size), int(config.look_tokens / mean.tokens))),
        most_tokens=telemetry.lens_tokens,
        lens_every=telemetry.lens_every,
        each_step=policy != FINAL and config.guards.kl is not None,
    )


def _look_flops(architecture: PretrainedConfig, work: Work, policy: OptimisedPolicy) -> Flops:
    """Return the FLOPs of a look at ``policy`` and the model's own: one forward, and a head for each over the response tokens."""
    own = pass_flops(architecture, work)
    heads = 1 if policy == FINAL else 2  # on the ids that a sampler kept they cost next to nothing
    return Flops(own.layers, own.attention, own.head * heads)


def _lens_flops(architecture: PretrainedConfig) -> float:
    """Return the FLOPs of the heads of H^0 to H^L and of the model's own policy on one token."""
    s = _shape(architecture)
    return 2.0 * s.vocab * s.width * (s.layers + 2)


# ---- memory


def activation_bytes(
    architecture: PretrainedConfig, tokens: int, *, itemsize: int, checkpointing: bool = False, layers: int | None = None
) -> int:
    """Return the bytes that autograd keeps of ``layers`` (None: all) decoder layers for the backward of a packed micro-batch.

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
    optimizer: int  # AdamW's two moments, this device's shard
    gradients: int  # in fp32, this device's shard
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
    """Estimate the memory of phase 2, or of phase 1 if ``internal``; of the ``vllm`` engine only what it leaves to the trainer."""
    s, p, hardware, rollout = _shape(architecture), parameters(architecture), config.hardware, config.rollout
    b = 2 if hardware.precision == "bfloat16" else 4
    sharded = not is_plain(config, world_size)
    depth, trained = optimised_policy(config, internal).layer or s.layers, _trained_layers(config, s.layers)

    ends, root, one_head = p.embedding + p.head, p.embedding + p.head + p.final_norm, s.vocab * s.width
    optimised = ends + p.layer * trained + p.final_norm * (trained == s.layers)
    with_gradient = ends + p.layer * min(depth, trained) if internal else optimised
    weights, optimizer, gradients = (
        number_bytes * math.ceil(count / world_size) for number_bytes, count in ((4, p.total), (8, optimised), (4, with_gradient))
    )
    host = weights + optimizer + gradients if hardware.offload else 0
    if hardware.offload:
        weights = optimizer = gradients = 0

    tokens = hardware.max_tokens_per_device
    budget = default_memory_budget(torch.device("cpu" if hardware.device == "cpu" else "cuda"))
    logits = tokens * s.vocab * (4 + b)  # and their gradients, of every row at once: more is never needed
    in_fp32 = one_head * 4 if b < 4 else 0  # dW is summed in fp32
    states = tokens * s.width * (4 + 3 * b) * (1 if config.distillation is None else 2)  # that enter the head, and their gradients

    sequences = min(rollout.sequences, math.ceil(rollout.prompts * rollout.samples / world_size))
    cached_tokens, decoded_tokens, mask_and_heads = sequences * sum(config.lengths), sequences, 0
    if rollout.engine == "continuous":
        decoded_tokens = max(sequences, 1024)
        mask_and_heads = cached_tokens * b * (decoded_tokens + 2 * s.queries)
    vllm = rollout.engine == "vllm"
    return Memory(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        gathered=b * (root + 2 * p.layer) * sharded,
        activations=activation_bytes(architecture, tokens, itemsize=b, checkpointing=hardware.checkpoint_activations, layers=depth),
        head=min(budget, logits) + one_head * b + in_fp32 + states,
        reduction=root * (4 + max(b, math.ceil(4 / world_size))) if sharded else one_head * 4,  # in fp32, from b bytes, to shards
        model=b * p.total * (sharded and not vllm),
        cache=0 if vllm else cached_tokens * 2 * s.keys * s.layers * b,
        decoding=0 if vllm else decoded_tokens * s.vocab * (b + 4) + mask_and_heads,
        host=host,
    )


def is_plain(config: TrainConfig, world_size: int) -> bool:
    """Return whether the model is not sharded: see :func:`bupo.distributed.shard`."""
    return world_size == 1 and config.hardware.precision == "float32" and not config.hardware.offload
