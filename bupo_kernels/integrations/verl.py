"""This library in verl: the fused head runs it, and BuPO is an engine that a configuration chooses. Tested with verl 0.9.1.

**The head.** Importing this module calls :func:`patch_verl`. As the entry point ``verl.plugins`` of this package it is imported by
verl in every process, so that ``actor_rollout_ref.model.use_fused_kernels: True``, with any ``impl_backend``, is all there is to
write. It then also works where verl's own raises, ``strategy: fsdp2`` with an untied head: verl makes that an FSDP2 unit of its
own, which nothing gathers, because its fused forward reads the weight and does not call the head. Here it is in the root unit,
gathered for the whole forward and backward, as tied heads are.

**BuPO** (arXiv 2512.19673) replaces the engine of the actor::

    actor_rollout_ref:
      actor:
        strategy: fsdp2
        fsdp_config:
          _target_: bupo_kernels.integrations.verl.BuPOEngineConfig
          layer: 6
          internal_steps: 30

For the first ``internal_steps`` trainer steps the old log-probs and the update are those of the policy of ``layer``; after them
those of the whole model, which generates all along. See ``examples/verl_bupo.yaml``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from bupo_kernels.dispatch import log
from bupo_kernels.functional import linear_logprobs
from bupo_kernels.integrations.features import require, require_values, small_input
from bupo_kernels.internal_policy import MODULES, internal_policy

try:
    import verl
except ImportError as error:
    raise ImportError(f"verl: accepted are releases from 0.9.1 (pip install 'verl>=0.9.1'); its import says: {error}") from error

_originals: list[tuple[object, str, object]] = []  # owner, name, what was there


def patch_verl() -> None:
    """Let verl's fused heads run :func:`bupo_kernels.linear_logprobs`; a second call changes nothing.

    Raises ``ImportError`` where verl's heads are missing, take other arguments or give other values than those of the tested
    release, whatever the release.
    """
    if _originals:
        return
    from verl.utils import fsdp_utils
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy

    own, kernel = _release(), linear_cross_entropy
    fused = ("hidden_states", "vocab_weights", "input_ids", "temperature")
    require(own, "FusedLinearForPPO.forward", FusedLinearForPPO, ("self", *fused))
    require(own, "linear_cross_entropy.linear_cross_entropy", kernel, ())
    require(own, "linear_cross_entropy.LinearCrossEntropy", kernel, ())
    arguments = ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
    require(own, "LinearCrossEntropy.forward", kernel.LinearCrossEntropy, ("ctx", *arguments))
    require(own, "fsdp_utils._select_fsdp2_wrap_targets", fsdp_utils, ("model",))
    hidden, weight, _, targets = small_input().values()
    given = (hidden[None], weight, targets[None], 0.7)
    require_values(own, "FusedLinearForPPO", ("log_probs", "entropy"), FusedLinearForPPO(), _linear_cross_entropy, *given)

    # verl looks up all three when it calls them, except that Megatron's models import the second once.
    replaced = (
        (FusedLinearForPPO, "forward", _fused_linear_for_ppo),
        (linear_cross_entropy, "linear_cross_entropy", _linear_cross_entropy),
        (fsdp_utils, "_select_fsdp2_wrap_targets", partial(_fsdp2_units, fsdp_utils._select_fsdp2_wrap_targets)),
    )
    _originals.extend([(owner, name, getattr(owner, name)) for owner, name, _ in replaced])
    for owner, name, ours in replaced:
        setattr(owner, name, ours)
    names = "FusedLinearForPPO.forward, linear_cross_entropy and the FSDP2 unit of the head are replaced"
    log.info("verl %s: %s; use_fused_kernels runs bupo_kernels.linear_logprobs", verl.__version__, names)


def unpatch_verl() -> None:
    """Undo :func:`patch_verl`, and take back the engine that a :class:`BuPOEngineConfig` registered."""
    while _originals:
        setattr(*_originals.pop())
    if (registered := globals().get("BuPOEngine")) is not None:
        from verl.workers.engine import EngineRegistry

        for engines in EngineRegistry._engines["language_model"].values():
            for key in [key for key, engine in engines.items() if engine is registered]:
                del engines[key]


def _release() -> str:
    """Return the name and release of the peer, as messages begin with it."""
    return f"verl {verl.__version__} (tested is 0.9.1)"


def _linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D], or a DTensor of it
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies, each ``[...]`` fp32, in place of the function of this name in ``verl.utils.kernel``.

    A process group means a weight of which each rank holds some rows (Megatron): verl's own function still takes such calls, and
    those with a reduction.
    """
    if dist_process_group is not None or reduction != "none":
        from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

        return LinearCrossEntropy.apply(hidden, weight, labels, temperature, reduction, dist_process_group)
    out = linear_logprobs(hidden, weight, labels.long(), temperature=temperature)
    assert out.entropy is not None
    return out.logprobs, out.entropy


def _fused_linear_for_ppo(
    self: nn.Module, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the same in place of ``FusedLinearForPPO.forward``."""
    return _linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


def _fsdp2_units(verls_own: Callable[..., list[nn.Module]], model: nn.Module, layer_classes: object) -> list[nn.Module]:
    """Return the modules that verl makes FSDP2 units, without the head where a fused forward reads its weight."""
    units = verls_own(model, layer_classes)
    if getattr(model, "_verl_fused_kernels_backend", None) is None:
        return units
    heads = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"]  # as verl finds them
    return [unit for unit in units if unit not in heads]


def __getattr__(name: str) -> Any:
    # The bases of these two import verl's engines, which processes that load the plugin but train nothing should not wait for.
    if name not in ("BuPOEngine", "BuPOEngineConfig"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _define_engine()
    return globals()[name]


def _define_engine() -> None:
    """Define :class:`BuPOEngine` and :class:`BuPOEngineConfig` in this module."""
    global BuPOEngine, BuPOEngineConfig
    from verl.utils.device import get_device_name, get_vendor
    from verl.workers.config import FSDPEngineConfig
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead, FSDPTurboEngineWithLMHead

    arguments = ("self", "data", "loss_function", "forward_only")
    require(_release(), "FSDPEngineWithLMHead.forward_backward_batch", FSDPEngineWithLMHead, arguments)

    backends = {"fsdp": FSDPEngineWithLMHead, "fsdp2": FSDPEngineWithLMHead, "fsdp_turbo": FSDPTurboEngineWithLMHead}

    @dataclass
    class BuPOEngineConfig(FSDPEngineConfig):
        """The ``fsdp_config`` of an actor in verl, with the policy that it optimises first.

        Args:
            layer: 1-based, as in :func:`bupo_kernels.internal_policy`, which also takes ``module`` and ``final_norm``.
            internal_steps: how many trainer steps (each one ``update_actor``, whatever its mini-batches) optimise that policy. The
                learning-rate scheduler counts them, and verl's checkpoints carry it: a resumed run continues its phase.

        Raises ``ValueError`` naming the setting, what was given and what is accepted, also for settings of verl that do not go
        together with a model that is run in part.
        """

        layer: int = 0
        internal_steps: int = 0
        module: str = "layer"
        final_norm: bool = False
        use_no_sync_for_gradient_accumulation: bool = False  # as in verl's YAML

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, value in (("layer", self.layer), ("internal_steps", self.internal_steps)):
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name}: {value!r} given, accepted are integers from 1")
            if self.module not in MODULES:
                raise ValueError(f"module: {self.module!r} given, accepted are {', '.join(map(repr, MODULES))}")
            # The first makes a reference of the engine. The second gathers the layer after the last that runs. With the third
            # torch 2.13 looks, in backwards of bf16 micro-batches that are not reduced, for the gathered parameters of layers that
            # have never run.
            for name in ("forward_only", "forward_prefetch", "use_no_sync_for_gradient_accumulation"):
                if getattr(self, name):
                    raise ValueError(f"{name}: True given, accepted is False in the configuration of a BuPO actor")
            # verl looks for an engine of this device and vendor before its own.
            device = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
            vendor = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
            if EngineRegistry._engines["language_model"]["fsdp2"].get((device, vendor)) is not BuPOEngine:
                EngineRegistry.register("language_model", list(backends), device, vendor)(BuPOEngine)

    class BuPOEngine(FSDPEngineWithLMHead):
        """The FSDP2 engine of verl, whose model is an internal policy of itself for the first trainer steps.

        With another configuration than :class:`BuPOEngineConfig` (the reference in the process of an actor), this makes verl's own.
        """

        _old_logprobs_step: int | None = None  # the step whose old log-probs this engine has computed

        def __new__(cls, model_config: Any, engine_config: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(engine_config, BuPOEngineConfig):
                return super().__new__(cls)
            return backends[engine_config.strategy](model_config, engine_config, *arguments, **named)

        def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any):
            for name, value, accepted in (
                ("strategy", engine_config.strategy, "fsdp2"),
                ("lora_rank", model_config.lora_rank, 0),
                ("enable_activation_offload", model_config.enable_activation_offload, False),
            ):
                if value != accepted:
                    raise ValueError(f"{name}: {value!r} given, accepted is {accepted!r} with a BuPOEngineConfig")
            for name in ("save_contents", "load_contents"):
                if "extra" not in checkpoint_config[name]:
                    raise ValueError(f"{name}: {checkpoint_config[name]} given, accepted is with 'extra', where the step is")
            super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

        def initialize(self) -> None:
            super().initialize()
            with self._internal_policy():  # refuses an unknown model or layer now, and not at the first step
                log.info("verl: BuPO optimises layer %s for %s steps", self.engine_config.layer, self.engine_config.internal_steps)

        def _internal_policy(self) -> AbstractContextManager[nn.Module]:
            config = self.engine_config
            return internal_policy(self.module, config.layer, config.module, config.final_norm)

        def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
            step = self.lr_scheduler.last_epoch  # advanced by verl once a trainer step, after its last mini-batch
            if step >= self.engine_config.internal_steps:
                return super().forward_backward_batch(data, loss_function, forward_only)
            if forward_only:
                self._old_logprobs_step = step
            else:
                self._check_update(data, step)
            # The backward is within the context too, since checkpointed activations are computed again there.
            with self._internal_policy():
                return super().forward_backward_batch(data, loss_function, forward_only)

        def _check_update(self, data: Any, step: int) -> None:
            """Raise ValueError where an update of the internal policy would be mixed with log-probs of the whole model."""
            if self._old_logprobs_step != step:
                raise ValueError(
                    "old_log_probs: not computed by this engine in this step, accepted is its own internal policy's "
                    "(algorithm.rollout_correction.bypass_mode must be False)"
                )
            for field, setting in (
                ("rollout_is_weights", "algorithm.rollout_correction.rollout_is: null"),
                ("ref_log_prob", "actor.use_kl_loss: False and algorithm.use_kl_in_reward: False"),
            ):
                if field in data:
                    raise ValueError(f"{field}: of the whole model given, accepted is an update without ({setting})")


try:
    patch_verl()
except (ImportError, AttributeError) as refused:  # verl imports this as a plugin, and would not say that it failed
    log.warning("nothing of verl is replaced: %s", refused)
