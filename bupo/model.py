"""The model of a run: loaded, given a fused head, sharded; its optimizer; its export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from bupo.config import ConfigError, Hardware, Optimizer
from bupo.cost import pretrained
from bupo.distributed import World, shard, sharded_units
from bupo_kernels import FusedLMHead, policy_divergence, policy_lens, policy_logprobs, policy_loss
from bupo_kernels.internal_policy import MODEL_TYPES

METHODS = {f.__name__: f for f in (policy_logprobs, policy_loss, policy_divergence, policy_lens)}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises :class:`ConfigError`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**pretrained(name))
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise unusable(name, error) from None
    if tokenizer.eos_token_id is None:
        raise unusable(name, "its tokenizer has no end-of-sequence token")
    return tokenizer


def read_model(name: str, **options: Any) -> PreTrainedModel:
    """The model ``name`` with its weights; those of a GGUF file are unpacked, so that it is a model like any other."""
    source = pretrained(name)
    if "gguf_file" in source and hasattr(transformers, "GgufConfig"):  # without it, weights are always unpacked
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, **options)
    if "gguf_file" in source and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # or nothing could be saved
    return model


def load_model(name: str, hardware: Hardware, world: World) -> PreTrainedModel:
    """The model of a folder, a hub name or a GGUF file, with float32 masters, a :class:`FusedLMHead`, and :data:`METHODS` bound to
    it; sharded.

    Only rank 0 reads the weights; the others make room and are sent their shards. Raises :class:`ConfigError`.
    """
    options = {"attn_implementation": "sdpa" if hardware.attention == "per-sequence" else hardware.attention}
    try:
        architecture = AutoConfig.from_pretrained(**pretrained(name))
        # internal_policy would refuse these too, but only after the weights have been read.
        if architecture.model_type not in MODEL_TYPES:
            raise ValueError(f"of type {architecture.model_type!r}, accepted are {', '.join(MODEL_TYPES)}")
        # The old and the new log-probs of a ratio must come from one and the same network.
        architecture.attention_dropout = 0.0
        if world.main:
            model = read_model(name, config=architecture, dtype=torch.float32, **options)
        else:
            with no_init_weights():  # memory that is never written is never taken
                model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, **options)
            model.tie_weights()
        FusedLMHead.adopt(model.get_output_embeddings())
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise unusable(name, error) from None
    if world.main:
        require_finite(name, model)
    if hardware.liger:
        _apply_liger(model, world)
    make_trainable(model, hardware, METHODS)
    whole = model.state_dict() if world.main else {}
    shard(model, world, hardware, list(METHODS))
    if sharded_units(model) and world.size > 1:
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # In training mode activations are checkpointed; there is no dropout.
    return model.train()


def require_finite(name: str, model: PreTrainedModel) -> None:
    """Raises :class:`ConfigError` with the first of the model's tensors that holds a NaN or an infinity."""
    for tensor, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        # One pass and no copy: both ends are NaN where any element is.
        if not torch.stack(parameter.detach().aminmax()).isfinite().all():
            raise unusable(name, f"its tensor {tensor} holds NaN or infinity")


def make_trainable(model: PreTrainedModel, hardware: Hardware, methods: dict[str, Callable]) -> None:
    """Activations are checkpointed if ``hardware`` says so, and ``methods``, which run the model, are bound to it."""
    if hardware.checkpoint_activations:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the name since 5.23
        enable({"use_reentrant": False})
    for name, function in methods.items():
        setattr(model, name, MethodType(function, model))


def unusable(name: str, reason: object) -> ConfigError:
    return ConfigError(f"model: {name} cannot be used: {' '.join(str(reason).split())}")


def _apply_liger(model: PreTrainedModel, world: World) -> None:
    if world.device.type != "cuda":
        raise ConfigError(f"hardware.liger: true given on {world.device.type}, accepted only on a GPU")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise ConfigError(
            "hardware.liger: true given, accepted once liger-kernel is installed (pip install liger-kernel)"
        ) from None
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)  # the head is ours


def make_optimizer(model: PreTrainedModel, how: Optimizer) -> torch.optim.AdamW:
    """AdamW over two groups: embedding, head and layers up to ``upper_from``; and what is above it, its learning rate scaled.

    A scale of 0 freezes the upper part (``requires_grad`` is False, no gradient is formed). Every parameter has its state from
    the start, so that a checkpoint of phase 1, in which upper layers have no gradient, can be resumed like any other.
    """
    upper = set(_above(model, how.upper_from))
    for parameter in upper:
        parameter.requires_grad_(how.upper_layers > 0)
    lower = [parameter for parameter in model.parameters() if parameter not in upper]
    groups = [{"params": lower, "scale": 1.0}]
    if upper and how.upper_layers > 0:
        groups.append({"params": [p for p in model.parameters() if p in upper], "scale": how.upper_layers})
    optimizer = torch.optim.AdamW(groups, lr=how.learning_rate, betas=how.betas, weight_decay=how.weight_decay, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def _above(model: PreTrainedModel, layer: int | None) -> list[nn.Parameter]:
    if layer is None:
        return []
    backbone = model.base_model
    return [parameter for module in (*backbone.layers[layer:], backbone.norm) for parameter in module.parameters()]


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, world: World) -> None:
    """A Hugging Face checkpoint at ``path``, in place of one that is there, which appears whole or not at all; a collective."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world.main:
        partial = path.with_name(path.name + ".partial")
        model.save_pretrained(partial, state_dict=whole)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)  # a folder cannot be put over another
        os.replace(partial, path)
    world.barrier()
