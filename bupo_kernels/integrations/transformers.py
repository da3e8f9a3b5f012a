"""The fused head in any model of Hugging Face transformers, also under LoRA, FSDP2, DDP and DeepSpeed."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bupo_kernels.integrations.readout import Unmeasured, measure_readout
from bupo_kernels.modules import QUESTIONS, FusedLMHead, change_class, check_forward
from bupo_kernels.parallel_heads import check_parallel, put_back, take_parallel

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoRALinear
    from transformers import PreTrainedModel
else:
    LoRALinear = object  # peft need not be installed

log = logging.getLogger("bupo_kernels")


def apply_fused_head(model: nn.Module) -> nn.Module:
    """Turn the output embedding of ``model`` into a :class:`FusedLMHead`, in place, and return ``model``.

    ``model.get_output_embeddings()(hidden, targets, ...)`` then answers as :meth:`FusedLMHead.forward` does, and logits, generation
    and saving are what they were: only classes change, so parameters, state-dict keys, ties and hooks stay. ``hidden`` is what the
    model hands its head: its last hidden state. Call this before or after ``fully_shard`` (also transformers' own,
    ``DistributedConfig(fsdp_size=...)``), and before DDP and DeepSpeed wrap the model. Call the head within the forward of what
    they wrap: they gather and reduce its weight there.

    A ``device_map``, casts, copies, pickling, ``torch.compile`` and resized token embeddings may come before it or after it, in any
    order. Call it again after an adapter was put on the head (statistics raise until then), and on a model that was loaded again.

    With adapters that peft has put on the head before (LoRA, ``modules_to_save``), statistics are those of the adapted logits,
    whatever is active, merged or disabled at the time of the call. An active LoRA costs a copy of the weight, r columns wider, and
    a gradient of that size, also where the weight is frozen.

    Where a model scales or caps its logits after its head (Gemma, Cohere, Granite), statistics are those of *its* logits: the scale
    and the cap are measured on the model's own forward, with stand-ins for its layers and its head, so that no weight is read,
    nothing gathered and nothing random drawn. ``logit_scale`` or ``softcap`` in a call replaces the measured one. Where the forward
    does not run that way, a warning says so, and scale and cap are left to the caller.

    Raises:
        ImportError: a release of transformers other than 5.
        TypeError: no model of transformers; a head that is not an ``nn.Linear`` with a floating-point weight (quantised, or an
            adapter other than LoRA and ``modules_to_save``), or one that is parametrized.
        ValueError: no output embedding; a head split by tensor parallelism; a LoRA beyond ``scaling · B A`` (DoRA, bias); a head
            whose ``forward`` was replaced by one that calls what it was before; and, with what was measured, models that do more to
            their logits than scale and cap them (Chameleon masks ids), or scale the hidden state before the head (T5, MiniCPM).
    """
    modules, head = _checked_modules(model), _head(model)
    options = _readout(model, head, modules)
    changed = [f"{kind} -> {type(module).__name__}" for module, kind in _fuse(modules)]
    for module in modules:
        if isinstance(module, FusedLMHead):
            vars(module).pop("readout", None)
            if options:
                module.readout = options
    base = _base(model)
    if not isinstance(vars(base).get("set_output_embeddings"), _SetFusedHead):
        vars(base)["set_output_embeddings"] = _SetFusedHead(base)
    if changed:
        readout = "".join(f"; {name}={value:g} after it" for name, value in options.items())
        log.info("output embedding of %s: %s%s", type(model).__name__, ", ".join(changed), readout)
    return model


def remove_fused_head(model: nn.Module) -> nn.Module:
    """Undo :func:`apply_fused_head`, in place, and return ``model``; one without a fused head stays as it is."""
    modules = _parts(_head(model))
    if any(map(is_parametrized, modules)):
        raise TypeError("model: its head is parametrized, accepted is one without; remove its parametrizations first")
    for module in modules:
        kind = type(module)
        if issubclass(kind, (FusedLMHead, _FusedLoRA)):
            change_class(module, _like(kind, nn.Linear if issubclass(kind, FusedLMHead) else _plain(kind).__bases__[1]))
            vars(module).pop("readout", None)
            put_back(module)
    if isinstance(vars(_base(model)).get("set_output_embeddings"), _SetFusedHead):
        del vars(_base(model))["set_output_embeddings"]
    return model


class _SetFusedHead:
    """The ``set_output_embeddings`` of a model with a fused head, held by the instance: it fuses the new head too, for example that
    of :meth:`resize_token_embeddings`. It does not keep the model alive, and is copied and pickled with it."""

    def __init__(self, model: PreTrainedModel):
        self.model: Callable[[], PreTrainedModel] = weakref.ref(model)

    def __call__(self, new_embeddings: nn.Module | None) -> None:
        model = self.model()
        if new_embeddings is not None:
            _check_parts(_parts(new_embeddings))
        type(model).set_output_embeddings(model, new_embeddings)
        if new_embeddings is not None:
            apply_fused_head(model)

    def __deepcopy__(self, memo: dict) -> _SetFusedHead:
        return _SetFusedHead(copy.deepcopy(self.model(), memo))

    def __reduce__(self) -> tuple:
        return _SetFusedHead, (self.model(),)


class _FusedLoRA(LoRALinear):
    """A base put before the class of a LoRA ``Linear`` of peft, whose ``base_layer`` is a :class:`FusedLMHead`: it answers with
    statistics of the adapted logits."""

    takes_statistics = True  # from its base layer, where other adapters take logits

    def forward(self, hidden: Tensor, *arguments: Tensor | None, **options: Any) -> Any:
        if not arguments and not any(name in options for name in QUESTIONS):
            return super().forward(hidden, **options)
        active = [] if self.disable_adapters or self.merged else [name for name in self.active_adapters if name in self.lora_A]
        if not active:  # peft's own unmerges what is disabled
            return (super().forward if self.disable_adapters else self.base_layer)(hidden, *arguments, **options)
        if options.get("outputs") is not None:
            raise ValueError("outputs: given with an active LoRA on the head, accepted once it is merged (merge_adapter())")
        _check_lora(self)  # adapters can be added at any time
        if self.base_layer.weight.is_meta:
            raise ValueError(
                "model: the weight of its head is offloaded and has an active LoRA, accepted is one on its device, or a merged one "
                "(merge_adapter())"
            )
        # W h + s B A h = [W B] [h; s A h]: exact, dropout and 16-bit weights included, which rounding W + s B A is not.
        weights = [self.base_layer.weight, *(self.lora_B[name].weight.to(self.base_layer.weight.dtype) for name in active)]
        if options.get("teacher_hidden") is not None and options.get("teacher_weight") is None:
            options["teacher_hidden"] = self._extended(options["teacher_hidden"], active, of_teacher=True)
        return torch.func.functional_call(
            self.base_layer, {"weight": torch.cat(weights, 1)}, (self._extended(hidden, active), *arguments), options
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        if _plain(kind) is not kind:  # sharded: whether that can be pickled is for FSDP2 to say
            return super().__reduce_ex__(protocol)
        # Its class is made at run time, so the function that makes it is pickled instead.
        return _new_fused_lora, (kind.__bases__[1],), super().__reduce_ex__(2)[2]

    def _extended(self, hidden: Tensor, active: Sequence[str], of_teacher: bool = False) -> Tensor:  # [..., D] -> [..., D + r]
        """Return ``hidden`` with the scaled products of each active adapter's A beside it. If it is ``of_teacher``, to which the
        adapters are constants, no gradient flows to them."""
        parts = [hidden]
        for name in active:
            a = self.lora_A[name].weight
            inner = nn.functional.linear(self.lora_dropout[name](hidden.to(a.dtype)), a.detach() if of_teacher else a)
            parts.append((inner * self.scaling[name]).to(hidden.dtype))
        return torch.cat(parts, -1)


def _checked_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules of the head whose classes change. Raise where the head cannot be fused."""
    if (release := version("transformers")).split(".")[0] != "5":
        raise ImportError(f"transformers {release} is installed, accepted is 5 (pip install 'transformers>=5,<6')")
    modules = _parts(_head(model))
    _check_parts(modules)
    return modules


def _check_parts(modules: list[nn.Module]) -> None:
    """Raise unless each module of a head is a linear or a LoRA that can be fused."""
    for module in modules:
        _check_lora(module) if _is_lora(module) else _check_linear(module)
        if _is_lora(module) and check_parallel("model", module.get_submodule("base_layer")):
            raise ValueError("model: its head has an adapter and is split by tensor parallelism, accepted is one of the two")
        if not isinstance(module, (FusedLMHead, _FusedLoRA)):
            check_forward("model", module)


def _readout(model: PreTrainedModel, head: nn.Module, modules: list[nn.Module]) -> dict[str, float]:
    """Return the scale and softcap that ``model`` applies to the logits of ``head``, as options of the ops."""
    linear = next(module for module in modules if isinstance(module, nn.Linear))
    try:
        readout = measure_readout(_base(model), head, linear)
    except Unmeasured as reason:
        log.warning(
            "%s: what it does to its head's logits could not be measured (%s); should it cap or scale them, give softcap or "
            "logit_scale with targets",
            *(type(model).__name__, reason),
        )
        return {}
    if readout.scale is None:
        log.warning(
            "%s: something stands between its last hidden state and its head; give the head, with targets, what that makes of it",
            type(model).__name__,
        )
    elif readout.scale != 1:
        raise ValueError(
            f"model: {type(model).__name__} multiplies its last hidden state by {readout.scale:.6g} before its head, accepted are "
            "models that hand it on as it is; call linear_logprobs on that product and the weight of the head"
        )
    return readout.options


def _base(model: PreTrainedModel) -> PreTrainedModel:
    """Return ``model`` without the wrappers of peft and ``torch.compile``."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _fuse(modules: list[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Change the class of each module that is not fused yet, and yield it with the name of its old class."""
    for module in modules:
        kind = type(module)
        if not issubclass(kind, (FusedLMHead, _FusedLoRA)):
            if isinstance(module, nn.Linear):
                take_parallel(module)
            change_class(module, _like(kind, _fused_lora(_plain(kind)) if _is_lora(module) else FusedLMHead))
            yield module, kind.__name__


def _head(model: PreTrainedModel) -> nn.Module:
    """Return the output embedding of ``model``. Raise where it is no model of transformers or has none."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"model: {type(model).__name__} given, accepted is a model of transformers, before others wrap it")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: {type(model).__name__} given, accepted is a language model: this one has no output embedding")
    return head


def _parts(head: LoRALinear) -> list[nn.Module]:
    """Return the linears of an output embedding, which may be wrapped, and the LoRA layers around them."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return [part for module in (head.original_module, *head.modules_to_save.values()) for part in _parts(module)]
    if hasattr(head, "_orig_mod"):  # torch.compile
        return _parts(head._orig_mod)
    return [head.base_layer, head] if _is_lora(head) else [head]


def _is_lora(module: nn.Module) -> bool:
    """Tell whether ``module`` is a LoRA layer, whatever its class: peft need not be imported for that."""
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters"))


def _check_lora(layer: LoRALinear) -> None:
    """Raise ValueError where ``layer`` adds anything but ``scaling · B A`` to its base layer."""
    beyond = [name for name in ("lora_variant", "use_dora") if any(dict(getattr(layer, name, {})).values())]
    parts = (*layer.lora_A.values(), *layer.lora_B.values())
    beyond += [type(layer).__name__] if not all(isinstance(part, nn.Linear) for part in parts) else []  # AdaLoRA
    beyond += ["target_parameters"] if hasattr(layer, "parameter_name") else []
    beyond += ["lora_bias"] if any(getattr(part, "bias", None) is not None for part in parts) else []
    if beyond or not layer.lora_A:
        raise ValueError(
            f"model: its head has an adapter with {', '.join(beyond) or 'no lora_A'}, accepted is plain LoRA; "
            "call merge_and_unload(), or leave the head out of target_modules"
        )


def _check_linear(linear: nn.Module) -> None:
    """Raise unless ``linear`` is an ``nn.Linear``, sharded or not, with a weight of floating point."""
    if is_parametrized(linear):
        if isinstance(linear, FusedLMHead):
            return
        raise TypeError(
            "model: its head is parametrized, accepted is one that is fused first; parametrize it after apply_fused_head"
        )
    if not isinstance(linear, nn.Linear) or _plain(type(linear)) not in (nn.Linear, FusedLMHead):
        remedy = "leave it out of target_modules" if hasattr(linear, "base_layer") else "do not quantise or replace it"
        kind = type(linear)
        name = f"{kind.__module__}.Linear" if kind.__name__ == "Linear" else kind.__name__  # peft has several
        raise TypeError(f"model: its head is a {name}, accepted are nn.Linear and LoRA on it; {remedy}")
    weight = linear.weight
    sharded = hasattr(weight, "full_tensor")
    if not weight.is_floating_point() or not (sharded or type(weight) is nn.Parameter):
        flat = type(weight) is Tensor  # FSDP1 with use_orig_params=False has views instead of parameters
        remedy = "call apply_fused_head before FSDP wraps the model" if flat else "leave the head out of what is quantised"
        raise TypeError(
            f"model: the weight of its head is a {type(weight).__name__} of {weight.dtype}, accepted is a Parameter of floating "
            f"point; {remedy}"
        )
    if not check_parallel("model", linear) and sharded and not getattr(linear, "_is_fsdp_managed_module", False):
        raise ValueError(
            "model: the weight of its head is a DTensor, accepted are those that FSDP2 gathers or ColwiseParallel calls, and whole "
            "weights"
        )


def _plain(kind: type) -> type:
    """Return ``kind`` without the mixin that FSDP2 puts before the class of a unit."""
    return kind.__bases__[1] if kind.__bases__[0].__name__ == "FSDPModule" else kind


def _like(kind: type, plain: type) -> type:
    """Return ``plain``, with the mixin of FSDP2 before it where ``kind`` has one."""
    return plain if _plain(kind) is kind else _fsdp_class(kind.__bases__[0], plain, vars(kind)["__deepcopy__"])


@functools.cache
def _fsdp_class(mixin: type, plain: type, deepcopy: Callable) -> type:
    return type(f"FSDP{plain.__name__}", (mixin, plain), {"__deepcopy__": deepcopy})


@functools.cache
def _fused_lora(kind: type) -> type:
    return type(f"Fused{kind.__name__}", (_FusedLoRA, kind), {})


def _new_fused_lora(kind: type) -> object:
    """Return an empty LoRA layer of the fused class of ``kind``, for pickle to fill."""
    return object.__new__(_fused_lora(kind))
