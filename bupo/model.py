"""The model of a run: loaded, given a fused head, sharded; its optimizer; its export."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from bupo.config import Hardware, Optimizer, check_new_folder
from bupo.cost import MODEL_TYPES
from bupo.distributed import World, shard, sharded_units
from bupo.errors import ConfigError
from bupo.output import replacing
from bupo_kernels import FusedLMHead


def pretrained(name: str) -> dict[str, str]:
    """Return ``name``, a folder, a name on the hub or a GGUF file, as the arguments of ``from_pretrained``.

    Raises ``FileNotFoundError`` for a GGUF file that is not there.
    """
    path = Path(name)
    if path.suffix.lower() != ".gguf":
        return {"pretrained_model_name_or_path": name}
    if not path.is_file():
        raise FileNotFoundError("it does not exist")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model ``name``. Raises :class:`ConfigError`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**pretrained(name))
    except Exception as error:  # its kinds are as many as the formats and the ways to damage a file
        raise unusable(name, error) from error
    if tokenizer.eos_token_id is None:
        raise unusable(name, "its tokenizer has no end-of-sequence token")
    return tokenizer


def load_model(name: str, hardware: Hardware, world: World, *, weights: bool = True) -> PreTrainedModel:
    """Return the model of a folder, a hub name or a GGUF file, with float32 masters and a :class:`FusedLMHead`, sharded.

    Only rank 0 reads the weights; the others make room and are sent their shards. Without ``weights`` there is room only, for a
    checkpoint to fill. Raises :class:`ConfigError`.
    """
    with world.agree():
        model = _one_process_model(name, hardware, read=weights and world.main)
        if hardware.liger:
            _apply_liger(model, world)
    if hardware.checkpoint_activations:
        checkpoint_activations(model)
    whole = model.state_dict() if world.main else {}
    shard(model, world, hardware)
    if weights and sharded_units(model) and world.size > 1:
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # Activations are checkpointed in training mode only; there is no dropout.
    return model.train()


def _one_process_model(name: str, hardware: Hardware, read: bool) -> PreTrainedModel:
    options = {"attn_implementation": "sdpa" if hardware.attention == "per-sequence" else hardware.attention}
    try:
        architecture = AutoConfig.from_pretrained(**pretrained(name))
        # What these cost is counted for some types alone; their structure is verified when the weights are there.
        if architecture.model_type not in MODEL_TYPES:
            raise ValueError(f"of type {architecture.model_type!r}, accepted are {', '.join(MODEL_TYPES)}")
        # The old and the new log-probs of a ratio must come from one and the same network.
        architecture.attention_dropout = 0.0
        if read:
            model = read_model(name, config=architecture, dtype=torch.float32, **options)
        else:
            with no_init_weights():  # memory that is never written is never taken
                model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, **options)
            model.tie_weights()
            with contextlib.suppress(OSError):  # without a file it stays as from_config made it
                model.generation_config = GenerationConfig.from_pretrained(pretrained(name)["pretrained_model_name_or_path"])
        FusedLMHead.adopt(model.get_output_embeddings())
    except ConfigError:
        raise
    except Exception as error:
        raise unusable(name, error) from error
    if read:
        require_finite(name, model)
    return model


# The prefixes that torch.compile, DDP, FSDP1 and activation checkpointing give to the names of what they wrap.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_model(name: str, **options: Any) -> PreTrainedModel:
    """Return the model that ``from_pretrained`` makes, if every weight comes from the checkpoint and none is left over.

    transformers makes up what is missing, and only warns. Prefixes that a wrapper gave to names are taken off, and a line says so.
    The weights of a GGUF file are unpacked, so that it is a model like any other. Raises :class:`ConfigError`.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report is a table; the error raised here is a line
    try:
        source = pretrained(name)
        if "gguf_file" in source and hasattr(transformers, "GgufConfig"):  # without it, weights are always unpacked
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = AutoModelForCausalLM.from_pretrained(**source, **options)
        if "gguf_file" in source and getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)  # a model with one cannot be saved
        missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
        if any(map(WRAPPERS.search, unexpected)):
            missing, unexpected = _load_unwrapped(model, Path(name))
    except Exception as error:
        raise unusable(name, error) from error
    finally:
        transformers_logging.set_verbosity(level)
    mismatched = sorted((key, tuple(given), tuple(made)) for key, given, made in found["mismatched_keys"])
    wrong = [f"{key} is {given} there and {made} by its config" for key, given, made in mismatched]
    wrong += [f"it lacks {_some(missing)}"] if missing else []
    wrong += [f"it has {_some(unexpected)}, which its config knows nothing of"] if unexpected else []
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        wrong.append("its config has tie_word_embeddings, but its head and its embedding differ")
    if wrong:
        raise unusable(name, "; ".join(wrong[:3]))
    return model


def _load_unwrapped(model: PreTrainedModel, folder: Path) -> tuple[list[str], list[str]]:
    """Load the weights in ``folder`` by their names without :data:`WRAPPERS`; return the names missing and unexpected."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    for path in () if weights else sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(path, map_location="cpu", weights_only=True)
    plain = {WRAPPERS.sub("", key): weight for key, weight in weights.items()}
    prefixes = sorted({match for key in weights for match in WRAPPERS.findall(key)})
    print(f"model: {folder}: {', '.join(prefixes)} taken off the names of its weights")
    unexpected = model.load_state_dict(plain, strict=False).unexpected_keys
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled: dict[int, Tensor] = {}  # for tied weights one name is enough, and a second one must hold the same
    for key in plain.keys() & parameters.keys():
        if not torch.equal(filled.setdefault(id(parameters[key]), plain[key]), plain[key]):
            unexpected.append(key)
    return [key for key, parameter in parameters.items() if id(parameter) not in filled], unexpected


def _some(names: list[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} other weights" if len(names) > 1 else "")


def require_finite(name: str, model: PreTrainedModel) -> None:
    """Raise :class:`ConfigError` with the first of the model's tensors that holds a NaN or an infinity, if there is one."""
    for tensor, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        # This is one pass without a copy: both ends are NaN where any element is.
        if not torch.stack(parameter.detach().aminmax()).isfinite().all():
            raise unusable(name, f"its tensor {tensor} holds NaN or infinity")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have each layer of ``model`` run again in the backward instead of keeping its activations."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the name since 5.23
    enable({"use_reentrant": False})


def unusable(name: str | Path, reason: object, key: str = "model") -> ConfigError:
    """Return the error that the model ``name`` cannot be used, with a damaged file of it, else ``reason``, even an exception."""
    found = [fault for path in sorted(Path(name).glob("*")) if (fault := _fault(path))] if Path(name).is_dir() else []
    if found:
        reason = found[0]
    elif isinstance(reason, Exception) and not isinstance(reason, (OSError, ValueError)):
        reason = f"{type(reason).__name__}: {reason}"
    return ConfigError(f"{key}: {name} cannot be used: {' '.join(str(reason).split())}")


def _fault(path: Path) -> str | None:
    """Return what is wrong with a file of a model's folder, as far as the file alone shows it, or None."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
                return f"{path.name} is a pointer of Git LFS, not the file itself (git lfs pull)"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:
            return f"{path.name} is damaged: {error}"
    return None


def _apply_liger(model: PreTrainedModel, world: World) -> None:
    if world.device.type != "cuda":
        raise ConfigError(f"hardware.liger: true given on {world.device.type}, accepted only on a GPU")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise ConfigError(
            "hardware.liger: true given, accepted once liger-kernel is installed (pip install liger-kernel)"
        ) from None
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)  # bupo_kernels has the head


def make_optimizer(model: PreTrainedModel, config: Optimizer) -> torch.optim.AdamW:
    """Return AdamW over two groups: embedding, head and layers up to ``upper_from``; and what is above, its learning rate scaled.

    A scale of 0 freezes the upper part (``requires_grad`` is False, no gradient is formed). Every parameter has its state from
    the start, so that a checkpoint of phase 1, in which upper layers have no gradient, can be resumed like any other.
    """
    upper = set(_above(model, config.upper_from))
    for parameter in upper:
        parameter.requires_grad_(config.upper_layers > 0)
    lower = [parameter for parameter in model.parameters() if parameter not in upper]
    groups: list[dict[str, Any]] = [{"params": lower, "scale": 1.0}]
    if upper and config.upper_layers > 0:
        groups.append({"params": [p for p in model.parameters() if p in upper], "scale": config.upper_layers})
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)
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


def export_type(architecture: PretrainedConfig, asked: str) -> torch.dtype:
    """Return the type called ``asked``; "auto" is the one in which a model of this config is loaded by default."""
    dtype = asked if asked != "auto" else architecture.dtype or torch.float32
    return getattr(torch, str(dtype).removeprefix("torch."))


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, world: World, dtype: torch.dtype) -> None:
    """Write a Hugging Face checkpoint to ``path``, in place of what is there; it appears whole or not at all. A collective."""
    whole: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world.main:
        # Tied weights are written once, under the first name: sharded ones no longer look like one.
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in whole]
        weights = {name: whole[name].to(dtype) if whole[name].is_floating_point() else whole[name] for name in names}
        with replacing(path) as partial:
            model.save_pretrained(partial, state_dict=weights)
            masters, model.config.dtype = model.config.dtype, dtype
            model.config.save_pretrained(partial)  # once more, now with the type of the file
            model.config.dtype = masters
            tokenizer.save_pretrained(partial)
    world.barrier()


def convert(name: str | Path, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model ``name``, such as a GGUF file, with tokenizer and chat template as a folder for ``from_pretrained``.

    Packed weights are unpacked and rounded once, to ``dtype``; float32 holds them as they are. The folder ``path``, which must be
    new or empty, appears whole or not at all. Raises :class:`ConfigError`, also for weights that are missing or not finite.
    """
    check_new_folder(path, "DIR")
    tokenizer, model = load_tokenizer(str(name)), read_model(str(name), dtype=dtype)
    require_finite(str(name), model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def keep_base(name: str, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write config, generation config and tokenizer of the model ``name`` to ``path``, in place of what is there."""
    source = pretrained(name)
    with replacing(path) as partial:
        AutoConfig.from_pretrained(**source).save_pretrained(partial)
        with contextlib.suppress(OSError):  # not every model has one
            GenerationConfig.from_pretrained(source["pretrained_model_name_or_path"]).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
