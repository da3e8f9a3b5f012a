"""This library in TRL: its trainers score tokens with it, and BuPO (arXiv 2512.19673) is one of them. Tested with TRL 1.16.

:func:`patch_trl` before a trainer runs is all it takes; it reaches every trainer that scores tokens through TRL's fused head, which
are GRPO, RLOO, KTO, DPO, SFT and the experimental asynchronous GRPO, and ``DistillationTrainer``, which compares the heads of two
models. It does not reach the experimental asynchronous distillation, whose head is its own. :class:`BuPOTrainer` works with and
without it.

Any release of TRL is accepted whose functions, of those that are replaced, are there, take the same arguments and give the same
values; another is refused, and the function named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bupo_kernels.dispatch import log, log_once
from bupo_kernels.functional import linear_divergence
from bupo_kernels.integrations.features import require, require_values, small_input
from bupo_kernels.internal_policy import internal_policy
from bupo_kernels.request import Request, gathered

try:
    import trl
    from accelerate.utils import is_peft_model
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils
except ImportError as error:
    raise ImportError(f"trl: accepted are releases from 1.16 (pip install 'trl>=1.16'); its import says: {error}") from error

TRL = f"trl {trl.__version__} (tested is 1.16)"
HEAD = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs")
require(TRL, "trl.trainer.utils._ChunkedLogProbFunction", utils, ())
require(TRL, "trl.trainer.utils._ChunkedLogProbFunction.forward", utils._ChunkedLogProbFunction, ("ctx", *HEAD))
# What BuPOTrainer overrides.
require(TRL, "GRPOTrainer._generate_and_score_completions", GRPOTrainer, ("self", "inputs"))
require(TRL, "GRPOTrainer._get_per_token_logps_and_entropies", GRPOTrainer, ("self", "model"))

DIVERGENCE = "_chunked_divergence_loss"
ZERO = "a head sharded by DeepSpeed ZeRO-3, which is gone by the backward unless gathered again, as TRL's does"
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TRLS_OWN = utils._ChunkedLogProbFunction
_originals: list[tuple[object, str, object]] = []  # owner, name, what was there


def patch_trl() -> None:
    """Let TRL's trainers, also those that exist already, use this library's head. Once is enough, :func:`unpatch_trl` undoes it.

    Log-probs and entropy come from :func:`bupo_kernels.linear_logprobs`: fp32 statistics taken from fp32 products, positions
    without a label never reach the head on any device, and a head that FSDP2 shards as a unit of its own (a ``DTensor``) gets the
    averaged gradient, where TRL's gets that of its own rank only. Temperature, softcap, logit scale, bias, autocast and
    ``cast_lm_head_to_fp32`` mean what they mean there.

    The other outputs cost next to nothing, but for ``log_sum_sq_probs`` (DPO with ``use_weighting``: one more pass over the head).
    ``is_top1`` counts every label of maximal logit, TRL's only the first id of such.

    ``DistillationTrainer`` gets its divergence from :func:`bupo_kernels.linear_divergence`, whose gradients are taken in one pass
    over the tokens that count, for a sharded head averaged over the ranks as well.

    TRL's own function still runs, which a warning says once, where DeepSpeed ZeRO-3 shards the head, and where ``mean_logits`` are
    asked for under a softcap (DPO and KTO of Gemma 2).

    Raises ``ImportError`` where TRL's head does not work as that of the tested release.
    """
    if _originals:
        return
    _check_head()
    module = _distillation()
    if module is not None:
        _check_divergence(module)
    replacements = {
        "_ChunkedLogProbFunction": SimpleNamespace(apply=_per_token),
        "_use_triton": lambda device: True,  # where this is so, TRL leaves out positions without a label
        "DTensor": (),  # of which nothing is an instance: shards arrive here, not a copy whose gradient is never reduced
    }
    replaced = [(utils, name, replacement) for name, replacement in replacements.items()]
    if module is not None:
        replaced.append((module, DIVERGENCE, _told_of_zero(getattr(module, DIVERGENCE))))
    for owner, name, replacement in replaced:
        _originals.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, replacement)
    log.info(
        "patch_trl: %s of trl.trainer replaced; its trainers use bupo_kernels.linear_logprobs and linear_divergence",
        ", ".join(name for _, name, _ in replaced),
    )


def unpatch_trl() -> None:
    """Undo :func:`patch_trl`; without one nothing happens."""
    while _originals:
        owner, name, original = _originals.pop()
        delattr(owner, name) if original is None else setattr(owner, name, original)


def _check_head() -> None:
    """Raise ImportError unless TRL's fused head looks up the names that :func:`patch_trl` replaces, and gives the same values."""
    require(TRL, "trl.trainer.utils.add_fused_lm_head", utils, ("model",))
    require(TRL, "trl.trainer.utils._use_triton", utils, ("device",))
    codes, names = [utils.add_fused_lm_head.__code__], set()
    while codes:  # the code of the forward that it makes is one of its constants
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    for name in ("_ChunkedLogProbFunction", "_use_triton", "DTensor"):
        if name not in names or not hasattr(utils, name):
            raise ImportError(f"{TRL}: add_fused_lm_head does not look up {name}, accepted is one that does")
    for softcap, outputs in ((None, OUTPUTS), (0.9, tuple(name for name in OUTPUTS if name != "mean_logits"))):
        given = (*small_input().values(), 0.7, 4, softcap, 1.3, outputs)
        require_values(TRL, "_ChunkedLogProbFunction", OUTPUTS, _TRLS_OWN.apply, _per_token, *given)


def _distillation() -> ModuleType | None:
    """Return the module of ``DistillationTrainer``, or None where there is none, or one that needs logits."""
    try:
        from trl.trainer import distillation_trainer
    except ImportError:
        return None
    return distillation_trainer if hasattr(distillation_trainer, "ChunkedDivergenceFunction") else None


def _check_divergence(module: ModuleType) -> None:
    """Raise ImportError unless ``DistillationTrainer`` calls the function that :func:`patch_trl` replaces, and that takes the same
    arguments and gives the same values as :func:`_divergence_loss`."""
    require(TRL, f"trl.trainer.distillation_trainer.{DIVERGENCE}", module, tuple(inspect.signature(_divergence_loss).parameters))
    if not any(
        DIVERGENCE in method.__code__.co_names for method in vars(module.DistillationTrainer).values() if inspect.isfunction(method)
    ):
        raise ImportError(f"{TRL}: DistillationTrainer does not look up {DIVERGENCE}, accepted is one that does")
    numbers = small_input()
    hidden, weight, bias = numbers["hidden"].view(1, 3, 5), numbers["weight"], numbers["bias"]
    mask = torch.tensor([[1, 0, 1]], dtype=torch.int64, device="cpu")
    for beta, softcap in ((0.0, None), (0.3, 0.9), (1.0, None)):
        given = (hidden, hidden.flip(1), weight, weight.flip(0), mask, beta, 5, bias, bias / 2, 1.3, 0.8, softcap, None, 0.7)
        names = ("loss", "entropy_sum", "n_valid")
        require_values(TRL, DIVERGENCE, names, getattr(module, DIVERGENCE), _divergence_loss, *given)


def _divergence_loss(
    student_hidden_states: Tensor,  # [B, K, H]
    teacher_hidden_states: Tensor,  # [B, K, H']
    student_lm_head_weight: Tensor,  # [V, H]
    teacher_lm_head_weight: Tensor,  # [V, H']
    completion_mask: Tensor,  # [B, K]
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,  # [V]
    teacher_lm_head_bias: Tensor | None = None,  # [V]
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what TRL's ``_chunked_divergence_loss`` does: the loss, the sum of the student's entropies, which is detached, and the
    number of positions that count. The teacher is a constant."""
    valid = completion_mask != 0
    student_weight, teacher_weight = student_lm_head_weight, teacher_lm_head_weight.detach()
    if not torch.is_autocast_enabled(student_hidden_states.device.type):  # the states decide, as in TRL
        student_weight = student_weight.to(student_hidden_states.dtype)
        teacher_weight = teacher_weight.to(teacher_hidden_states.dtype)
    found = linear_divergence(
        student_hidden_states,
        student_weight,
        teacher_hidden_states.detach(),
        teacher_weight,
        kind="gjsd",
        beta=beta,
        mask=valid,
        reduction="sum",
        temperature=temperature,
        bias=student_lm_head_bias,
        logit_scale=student_logit_scale,
        softcap=student_final_logit_softcapping,
        teacher_bias=None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach(),
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_final_logit_softcapping,
    )
    assert found.entropy is not None  # it is returned by default
    count = valid.sum()
    items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    items = items.to(count.device) if isinstance(items, Tensor) else items
    return found.divergence / items, found.entropy.detach().sum(), count


def _told_of_zero(theirs: Callable) -> Callable:
    """Return :func:`_divergence_loss`, but ``theirs``, with a warning, for heads that DeepSpeed ZeRO-3 shards."""

    def divergence_loss(*arguments: Any, **options: Any) -> Any:
        if any(hasattr(x, "ds_id") for x in (*arguments, *options.values())):
            log_once(f"patch_trl: TRL's own head runs for {ZERO}")
            return theirs(*arguments, **options)
        return _divergence_loss(*arguments, **options)

    return divergence_loss


def _per_token(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return what TRL's ``ChunkedLogProbFunction.apply`` does: log-probs, entropy, log Σp², mean logit and whether the label is top
    1, ``[N]`` each, None where not in ``outputs``; the first two have a gradient."""
    if reason := _left_to_trl(weight, softcap, outputs):
        log_once(f"patch_trl: TRL's own head runs for {reason}")
        weight, bias = gathered("weight", weight, hidden), gathered("bias", bias, hidden)
        return _TRLS_OWN.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)  # as TRL does: the states decide
    call = Request.of(
        *(hidden, weight, targets),
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        return_entropy="entropy" in outputs,
    )
    found = call.statistics()
    log_sum_sq_probs = mean_logits = is_top1 = None
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if "log_sum_sq_probs" in outputs:
            squared = replace(call, temperature=temperature / 2, return_entropy=False)  # e^(2z)
            log_sum_sq_probs = squared.statistics().log_s - 2 * found.log_s
        if "mean_logits" in outputs:  # the mean of a product is the product with the mean
            dtype = found.logprobs.dtype
            mean_logits = call.hidden.to(dtype) @ call.weight.mean(0, dtype=dtype)
            if call.bias is not None:
                mean_logits += call.bias.mean(dtype=dtype)
            mean_logits *= logit_scale / temperature
        if "is_top1" in outputs:
            is_top1 = found.logprobs >= -found.log_s  # z_y = m
    return found.logprobs, found.entropy, log_sum_sq_probs, mean_logits, is_top1


def _left_to_trl(weight: Tensor, softcap: float | None, outputs: tuple[str, ...]) -> str | None:
    """Return the case that is left to TRL's own function, or None."""
    if hasattr(weight, "ds_id"):
        return ZERO
    if softcap is not None and "mean_logits" in outputs:
        return "mean_logits under a softcap, which is not the product with the mean"
    return None


@dataclass(kw_only=True)
class BuPOConfig(GRPOConfig):
    """A :class:`trl.GRPOConfig` with the internal policy of the first steps; every field is given by name."""

    layer: int = field(metadata={"help": "Layer whose policy is optimised first, from 1 to the number of layers."})
    internal_steps: int = field(
        metadata={
            "help": "For how many optimizer steps (`global_step`) that is; the rest are plain GRPO. The end must fall on that of a "
            "generation, which lasts steps_per_generation * num_iterations / gradient_accumulation_steps optimizer steps."
        }
    )
    module: Literal["layer", "attention", "ffn"] = field(
        default="layer", metadata={"help": "What of that layer is read: the residual stream, or the output of a module."}
    )
    final_norm: bool = field(
        default=False, metadata={"help": "Whether the model's final norm is applied before the head. The paper does not."}
    )


class BuPOTrainer(GRPOTrainer):
    """A :class:`trl.GRPOTrainer` that optimises an internal policy in its first ``internal_steps`` optimizer steps.

    A generation that began before the optimizer step ``internal_steps`` is scored (old, new and, with ``beta``, reference
    log-probs; entropy) by the policy that :class:`BuPOConfig` names, any later one by the model's own. Samples are always drawn
    from the model's own policy, and evaluation is of that too. The metric ``internal`` is 1.0 in the first phase.

    Layers above ``layer``, and the final norm where it is not applied, get no gradient in the first phase and stay as they are. The
    phase follows from ``state.global_step``, so that a run resumes on either side of the switch: an optimizer makes the state that
    a checkpoint of the first phase lacks once it is needed. That holds for optimizers that transformers saves as they are, in one
    process and under DDP; accelerate's FSDP, which restores them through torch.distributed.checkpoint, has not been tried.

    Raises:
        TypeError: ``args`` is no :class:`BuPOConfig`.
        ValueError: naming the argument: ``layer``, ``module`` or the type of the model, as
            :func:`bupo_kernels.internal_policy`; a PEFT model; ``internal_steps`` that end within a generation; settings that
            compare with the log-probs of the sampler, which are of another policy (``vllm_importance_sampling_correction``,
            ``off_policy_mask_threshold``); DDP that does not look for parameters without gradient.
    """

    _tag_names = ["trl", "grpo", "bupo"]  # noqa: RUF012 (as TRL declares it)
    _name = "BuPO"
    _paper = {  # noqa: RUF012
        "title": "Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies",
        "id": "2512.19673",
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: BuPOConfig | None = None, *arguments: Any, **options: Any
    ) -> None:
        args = _checked(args)
        self._internal = False
        super().__init__(model, reward_funcs, args, *arguments, **options)
        if is_peft_model(self.model):
            raise ValueError("model: with a PEFT adapter, accepted are models without")
        # Entering the context checks the layer, the module and the model.
        with self._policy(self.model):
            pass
        finds_unused = args.ddp_find_unused_parameters
        if finds_unused is None:
            finds_unused = not args.gradient_checkpointing  # what transformers makes of it
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or any(isinstance(p, DTensor) for p in self.model.parameters())
        if args.world_size > 1 and not sharded and not finds_unused:
            raise ValueError(
                f"ddp_find_unused_parameters: {args.ddp_find_unused_parameters} given with gradient_checkpointing="
                f"{args.gradient_checkpointing}, accepted is True: layers above the internal policy's get no gradient"
            )

    def _policy(self, model: Any) -> AbstractContextManager[nn.Module]:
        args = self.args
        return internal_policy(self.accelerator.unwrap_model(model), args.layer, args.module, args.final_norm)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.model.training:
            self._internal = self.state.global_step < self.args.internal_steps
            self._metrics["train"]["internal"].append(float(self._internal))
        return super()._generate_and_score_completions(inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **options: Any) -> Any:
        if not (self._internal and self.model.training):
            return super()._get_per_token_logps_and_entropies(model, *arguments, **options)
        with self._policy(model):
            return super()._get_per_token_logps_and_entropies(model, *arguments, **options)


def _checked(args: object) -> BuPOConfig:
    """Return ``args``. Raise where it is no :class:`BuPOConfig`, or one whose settings do not go together."""
    if not isinstance(args, BuPOConfig):
        raise TypeError(f"args: {type(args).__name__} given, accepted is a BuPOConfig")
    if args.internal_steps < 0:
        raise ValueError(f"internal_steps: {args.internal_steps} given, accepted are 0 and more")
    accumulated, generation = args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations
    if args.internal_steps * accumulated % generation:
        raise ValueError(
            f"internal_steps: {args.internal_steps} given, accepted are ends of a generation: with gradient_accumulation_steps="
            f"{accumulated} one lasts {generation / accumulated:g} optimizer steps (steps_per_generation * num_iterations / "
            "gradient_accumulation_steps)"
        )
    # The next two settings compare with the log-probs of the sampler, which are of the model's own policy.
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise ValueError("vllm_importance_sampling_correction: True given, accepted is False with an internal policy")
    if args.off_policy_mask_threshold is not None:
        given = args.off_policy_mask_threshold
        raise ValueError(f"off_policy_mask_threshold: {given} given, accepted is None with an internal policy")
    return args
