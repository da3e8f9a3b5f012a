"""The fused head in any model of Hugging Face transformers, under LoRA, FSDP2, DDP and DeepSpeed too."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn

from bupo_kernels.modules import FusedLMHead

log = logging.getLogger("bupo_kernels")

STATISTICS = ("targets", "advantages", "reference", "outputs")  # what makes a call of the head ask for more than logits
# Of configs whose models go on with the logits after their head.
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def apply_fused_head(model: nn.Module) -> nn.Module:
    """Turns the output embedding of ``model`` into a :class:`FusedLMHead`, in place, and returns ``model``.

    ``model.get_output_embeddings()(hidden, targets, ...)`` then answers as :meth:`FusedLMHead.forward` does, and logits, generation
    and saving are what they were: only classes change, so parameters, state-dict keys, ties and hooks stay. To be called before
    or after ``fully_shard`` (also transformers' own, ``DistributedConfig(fsdp_size=...)``), before DDP and DeepSpeed wrap the
    model. The head is to be called within the forward of what they wrap: they gather and reduce its weight there.

    Adapters that peft has put on the head before (LoRA, ``modules_to_save``): statistics are those of the adapted logits, whatever
    is active, merged or disabled at the time of the call. An active LoRA costs a copy of the weight, r columns wider, and a
    gradient of that size, also where the weight is frozen.

    A model that scales or caps its logits after its head (Gemma, Cohere, Granite) is told in a warning: statistics of those
    logits need ``logit_scale`` or ``softcap`` in the call.

    Raises:
        ImportError: a release of transformers other than 5.
        TypeError: no model of transformers; a head that is not an ``nn.Linear`` with a floating-point weight (quantised, or an
            adapter other than LoRA and ``modules_to_save``).
        ValueError: no output embedding; a head split by tensor parallelism; a LoRA beyond ``scaling · B A`` (DoRA, bias).
    """
    changed = [f"{kind} -> {type(module).__name__}" for module, kind in _fuse(_modules(model))]
    if changed:
        log.info("output embedding of %s: %s", type(model).__name__, ", ".join(changed))
        config = model.config.get_text_config(decoder=True)
        for name in AFTER_THE_HEAD:
            if getattr(config, name, None) not in (None, 1):
                log.warning(
                    "%s=%s: logits change after the head; give it logit_scale or softcap with targets", name, getattr(config, name)
                )
    return model


def remove_fused_head(model: nn.Module) -> nn.Module:
    """Undoes :func:`apply_fused_head`, in place, and returns ``model``; one without a fused head stays as it is."""
    for module in _parts(_head(model)):
        kind = type(module)
        if issubclass(kind, (FusedLMHead, _FusedLoRA)):
            module.__class__ = _like(kind, nn.Linear if issubclass(kind, FusedLMHead) else _plain(kind).__bases__[1])
    return model


class _FusedLoRA:
    """Before the class of a LoRA ``Linear`` of peft, whose ``base_layer`` is a :class:`FusedLMHead`: statistics of its logits."""

    def forward(self, hidden: Tensor, *arguments, **options):
        if not arguments and not any(name in options for name in STATISTICS):
            return super().forward(hidden, **options)
        active = [] if self.disable_adapters or self.merged else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return super().forward(hidden, *arguments, **options)
        if options.get("outputs") is not None:
            raise ValueError("outputs: given with an active LoRA on the head, accepted once it is merged (merge_adapter())")
        _check_lora(self)  # adapters can be added at any time
        # W h + s B A h = [W B] [h; s A h]: exact, dropout and 16-bit weights included, which rounding W + s B A is not.
        weights = [self.base_layer.weight, *(self.lora_B[name].weight.to(self.base_layer.weight.dtype) for name in active)]
        if options.get("reference") is not None:
            options["reference"] = self._extended(options["reference"], active)
        return torch.func.functional_call(
            self.base_layer, {"weight": torch.cat(weights, 1)}, (self._extended(hidden, active), *arguments), options
        )

    def _extended(self, hidden: Tensor, active: Sequence[str]) -> Tensor:  # [..., D] -> [..., D + r]
        parts = [hidden]
        for name in active:
            inner = self.lora_A[name](self.lora_dropout[name](hidden.to(self.lora_A[name].weight.dtype)))
            parts.append((inner * self.scaling[name]).to(hidden.dtype))
        return torch.cat(parts, -1)


def _modules(model: nn.Module) -> list[nn.Module]:
    """What has to change its class, checked."""
    if (release := version("transformers")).split(".")[0] != "5":
        raise ImportError(f"transformers {release} is installed, accepted is 5 (pip install 'transformers>=5,<6')")
    modules = _parts(_head(model))
    if (size := getattr(model, "tp_size", None)) not in (None, 1):
        raise ValueError(f"model: split over {size} ranks by tensor parallelism, accepted is a model whose head is whole")
    for module in modules:
        _check_lora(module) if _is_lora(module) else _check_linear(module)
    return modules


def _fuse(modules: list[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    for module in modules:
        kind = type(module)
        if not issubclass(kind, (FusedLMHead, _FusedLoRA)):
            module.__class__ = _like(kind, _fused_lora(_plain(kind)) if _is_lora(module) else FusedLMHead)
            yield module, kind.__name__


def _head(model: nn.Module) -> nn.Module:
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"model: {type(model).__name__} given, accepted is a model of transformers, before others wrap it")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: {type(model).__name__} given, accepted is a language model: this one has no output embedding")
    return head


def _parts(head: nn.Module) -> list[nn.Module]:
    """The linears of an output embedding and the LoRA layers around them."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return [part for module in (head.original_module, *head.modules_to_save.values()) for part in _parts(module)]
    return [head.base_layer, head] if _is_lora(head) else [head]


def _is_lora(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters"))


def _check_lora(layer: nn.Module) -> None:
    beyond = [name for name in ("lora_variant", "use_dora") if any(dict(getattr(layer, name, {})).values())]
    beyond += ["lora_bias"] if any(module.bias is not None for module in layer.lora_B.values()) else []
    if beyond or not layer.lora_A:
        raise ValueError(
            f"model: its head has an adapter with {', '.join(beyond) or 'no lora_A'}, accepted is plain LoRA; "
            "call merge_and_unload(), or leave the head out of target_modules"
        )


def _check_linear(linear: nn.Module) -> None:
    if _plain(type(linear)) not in (nn.Linear, FusedLMHead):
        remedy = "leave it out of target_modules" if hasattr(linear, "base_layer") else "do not quantise or replace it"
        raise TypeError(f"model: its head is a {type(linear).__name__}, accepted are nn.Linear and LoRA on it; {remedy}")
    weight = linear.weight
    sharded = hasattr(weight, "full_tensor")
    if not weight.is_floating_point() or not (sharded or type(weight) is nn.Parameter):
        raise TypeError(
            f"model: the weight of its head is a {type(weight).__name__} of {weight.dtype}, accepted is a Parameter of floating "
            "point; leave the head out of what is quantised"
        )
    if sharded and not getattr(linear, "_is_fsdp_managed_module", False):
        raise ValueError("model: the weight of its head is a DTensor, accepted are those that FSDP2 gathers, and whole weights")


def _plain(kind: type) -> type:
    """``kind`` without what FSDP2 puts before the class of a unit."""
    return kind.__bases__[1] if kind.__bases__[0].__name__ == "FSDPModule" else kind


def _like(kind: type, plain: type) -> type:
    """``plain``, and before it what FSDP2 has put before ``kind``."""
    return plain if _plain(kind) is kind else _fsdp_class(kind.__bases__[0], plain, kind.__deepcopy__)


@functools.cache
def _fsdp_class(mixin: type, plain: type, deepcopy) -> type:
    return type(f"FSDP{plain.__name__}", (mixin, plain), {"__deepcopy__": deepcopy})


@functools.cache
def _fused_lora(kind: type) -> type:
    return type(f"Fused{kind.__name__}", (_FusedLoRA, kind), {})
