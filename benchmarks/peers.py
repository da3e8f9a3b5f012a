"""Other libraries' heads: what they compute, where they run, and what their algorithms take.

Said of the versions in :data:`VERSIONS`, whose sources were read; another one is a row that names the one it needs. Nothing is
imported before a contender is asked whether it runs.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import GROUPS, Contender, policy_loss_of
from benchmarks.inputs import IGNORED, Inputs
from bupo.env import installed

VERSIONS = {"liger-kernel": "0.8.5", "trl": "1.16.0", "verl": "0.9.1", "cut-cross-entropy": "25.1.1"}
LIGER, TRL = f"Liger {VERSIONS['liger-kernel']}", f"TRL {VERSIONS['trl']}"
VERL, APPLE = f"verl {VERSIONS['verl']}", f"Apple CCE {VERSIONS['cut-cross-entropy']}"

# Where this library is installed verl loads it as a plugin, which replaces the heads that are to be measured.
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"

# Group -> products, where the logits for the gradients are ...
KEPT = {"forward": 1, "forward+backward": 3, "one-pass loss": 3}
RECOMPUTED = {"forward": 1, "forward+backward": 4, "one-pass loss": 4}
RECOMPUTED_UNLESS_REDUCED = {"forward": 1, "forward+backward": 4, "one-pass loss": 3}


@dataclass(frozen=True)
class Head:
    """A peer in the groups that it is in."""

    name: str
    calls: dict[str, tuple[str, Callable[[Inputs], object]]]  # group -> what it computes, and how
    products: dict[str, int]  # by group, over the rows that it takes
    why_not: Callable[[Inputs], str | None]
    remark: str = ""
    of_gradients: str = ""  # the same, where there are any
    skips: bool = False  # the rows that do not count


def peers(group: str, x: Inputs) -> Iterator[Contender]:
    """Yield every peer of a group, whether or not it runs here: none has a lens.

    Heads that return entropies are in "one-pass loss" with a policy loss on their log-probs, the others with their cross entropy.
    """
    if group not in GROUPS:
        raise ValueError(f"group: {group!r} given, accepted are {', '.join(map(repr, GROUPS))}")
    for head in (*_torch(x), *_apple(group, x), *_liger(x), _trl(x), *_verl(x)):
        if group in head.calls:
            computes, call = head.calls[group]
            products = head.products[group] * (1 if head.skips else x.case.rows / x.active_rows)
            remark = "; ".join(filter(None, [head.remark, head.of_gradients if GROUPS[group] > 1 else ""]))
            yield Contender(head.name, "peer", group, computes, call, products, head.why_not, remark=remark)


def _of_losses(losses: Callable[[Inputs, str], Tensor]) -> dict[str, tuple[str, Callable[[Inputs], object]]]:
    """Return the calls of each group for a peer whose ``losses(inputs, reduction)`` are a cross entropy."""
    rows = "log-prob", lambda x: (-losses(x, "none"), None)
    return {"forward": rows, "forward+backward": rows, "one-pass loss": ("cross entropy", lambda x: losses(x, "mean"))}


def _of_statistics(
    statistics: Callable[[Inputs, bool], tuple[Tensor, Tensor | None]],
) -> dict[str, tuple[str, Callable[[Inputs], object]]]:
    """Return the calls of each group for a peer whose ``statistics(inputs, entropy)`` are log-probs and, if asked for,
    entropies."""
    rows = "log-prob, entropy", lambda x: statistics(x, True)
    loss = "policy loss", policy_loss_of(lambda x: statistics(x, False)[0])
    return {"forward": rows, "forward+backward": rows, "one-pass loss": loss}


def _operands(x: Inputs) -> tuple[Tensor, Tensor]:
    """Return operands that want no gradient where none is taken: Liger and Apple look at nothing else, and would work for one."""
    return x.leaves if torch.is_grad_enabled() else (x.hidden.detach(), x.weight.detach())


# ---- torch


def _torch(x: Inputs) -> Iterator[Head]:
    version = torch.__version__.partition("+")[0]

    def losses(x: Inputs, reduction: str, chunked: bool = False) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return F.linear_cross_entropy(*_operands(x), x.targets, reduction=reduction, options=options)

    def why_not(x: Inputs) -> str | None:
        return None if hasattr(F, "linear_cross_entropy") else f"not in torch {version}, needs pip install torch>=2.13"

    name = f"torch {version} linear_cross_entropy"
    remark = "plain linear and cross entropy" + _rounded(x, ", logits and log-probs")
    yield Head(name, _of_losses(losses), KEPT, why_not, remark)
    chunked = _of_losses(partial(losses, chunked=True))
    remark = "log-probs in bfloat16" if x.case.dtype == "bfloat16" else ""  # of float16 in float32
    yield Head(f"{name}, chunked", chunked, RECOMPUTED_UNLESS_REDUCED, why_not, remark)


# ---- Apple


def _apple(group: str, x: Inputs) -> Iterator[Head]:
    def losses(**options: object) -> dict[str, tuple[str, Callable[[Inputs], object]]]:
        def call(x: Inputs, reduction: str) -> Tensor:
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(*_operands(x), x.targets, reduction=reduction, **options)

        return _of_losses(call)

    def no_kernels(x: Inputs) -> str | None:
        if reason := _missing("cut_cross_entropy", "cut-cross-entropy") or _no_gpu(x):
            return reason
        return "its gradients need bfloat16 or float16" if GROUPS[group] > 1 and x.case.dtype == "float32" else None

    def not_compiled(x: Inputs) -> str | None:
        if reason := _missing("cut_cross_entropy", "cut-cross-entropy"):
            return reason
        no_compiler = x.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++"))
        return "torch.compile needs a C++ compiler" if no_compiler else None

    eps = math.log2(torch.finfo(x.hidden.dtype).eps / 32)  # cut_cross_entropy.utils._handle_eps
    remark, summed = _rounded(x, "products of the target's logit"), _rounded(x, "gradients summed")
    filtered = "; ".join(filter(None, [f"filters gradients below 2^{eps:.0f}", summed]))
    yield Head(APPLE, losses(impl="cce"), RECOMPUTED, no_kernels, remark, filtered, skips=True)
    if GROUPS[group] > 1:  # else it is the same
        unfiltered = losses(impl="cce", filter_eps=None)
        yield Head(f"{APPLE}, unfiltered", unfiltered, RECOMPUTED, no_kernels, remark, summed, skips=True)
    compiled = losses(impl="torch_compile")
    yield Head(f"{APPLE}, torch.compile", compiled, KEPT, not_compiled, _rounded(x, "logits"), skips=True)


# ---- Liger


def _liger(x: Inputs) -> Iterator[Head]:
    def losses(x: Inputs, reduction: str) -> Tensor:
        # Not from liger_kernel.ops, where LIGER_KERNEL_IMPL puts others in its place.
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        options = None, None, IGNORED, 0.0, 0.0, reduction  # no bias, class weights, z-loss, label smoothing
        return LigerFusedLinearCrossEntropyFunction.apply(*_operands(x), x.targets, *options)[0]

    def no_kernels(x: Inputs) -> str | None:
        return _missing("liger_kernel.ops", "liger-kernel") or _no_gpu(x)

    rounded = _rounded(x, "logits"), _rounded(x, "sums of dW")
    yield Head(f"{LIGER} Triton", _of_losses(losses), RECOMPUTED_UNLESS_REDUCED, no_kernels, *rounded)
    yield _liger_scaled(x)

    def grpo(x: Inputs) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        # Every row is a sequence of its own, as an advantage belongs to a sequence there, and all are one chunk. What it would
        # compile is a few operations on [N].
        n, (hidden, weight) = x.case.rows, x.leaves
        loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, chunk_size=n)
        return loss(hidden.view(n, 1, -1), weight, x.labels.view(n, 1), x.mask.view(n, 1), x.advantages)[0]

    def no_grpo(x: Inputs) -> str | None:
        return _missing("liger_kernel.chunked_loss", "liger-kernel")

    yield Head(f"{LIGER} GRPO", {"one-pass loss": ("policy loss", grpo)}, RECOMPUTED, no_grpo, _rounded(x, "logits"), _widened(x))


# The path that its scaled cross entropy takes -> what must import, the extra that installs it.
LIGER_SCALED = {
    "CuTe": ("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "[cutedsl]"),
    "cuTile": ("liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy", "[cutile]"),
    "torch": ("liger_kernel.ops.fused_linear_scaled_cross_entropy", ""),
}


def _liger_scaled(x: Inputs) -> Head:
    def statistics(x: Inputs, entropy: bool) -> tuple[Tensor, Tensor | None]:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

        found = LigerFusedLinearScaledCrossEntropyFunction.apply(*_operands(x), x.targets, 1.0, IGNORED, 1, entropy)
        return (-found[0], found[1]) if entropy else (-found, None)

    path = _path_of_liger_scaled(x.device)
    module, extra = LIGER_SCALED[path]

    def why_not(x: Inputs) -> str | None:
        if reason := _missing(module, "liger-kernel", extra):
            return reason
        return "bfloat16 only on Hopper" if path == "CuTe" and x.case.dtype != "bfloat16" else None

    remark = "logits staged in float16, entropy in bfloat16" if path == "CuTe" else _rounded(x, "logits and entropy")
    of_gradients = _rounded(x, "sums of dW") if path == "cuTile" else _both(x, "sums of dW")
    return Head(f"{LIGER} scaled CE, {path}", _of_statistics(statistics), RECOMPUTED, why_not, remark, of_gradients)


def _path_of_liger_scaled(device: torch.device) -> str:
    """Return the path that liger_kernel.ops.fused_linear_scaled_cross_entropy chooses, unless the variable names another."""
    if os.environ.get("LIGER_KERNEL_IMPL", "").strip().lower() == "cutile":
        return "cuTile"
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "CuTe" if nvidia and torch.cuda.get_device_capability(device) == (9, 0) else "torch"


# ---- TRL


def _trl(x: Inputs) -> Head:
    compact = x.device.type != "cpu"

    def statistics(x: Inputs, entropy: bool) -> tuple[Tensor, ...]:
        from trl.trainer import utils

        hidden, weight = _operands(x)
        # Rows as its add_fused_lm_head picks them and puts them back.
        hidden, targets = (hidden[x.mask], x.targets[x.mask]) if compact else (hidden, x.targets.clamp(min=0))
        outputs = ("log_probs", "entropy") if entropy else ("log_probs",)
        options = None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        found = utils._ChunkedLogProbFunction.apply(hidden, weight, *options)[: len(outputs)]
        if compact:
            return tuple(f.new_zeros(x.mask.shape).masked_scatter(x.mask, f) for f in found)
        return tuple(f.masked_fill(~x.mask, 0) for f in found)

    def why_not(x: Inputs) -> str | None:
        return _missing("trl.trainer.utils", "trl")

    wide = "" if compact else _widened(x)
    return Head(f"{TRL} chunked", _of_statistics(statistics), RECOMPUTED, why_not, _rounded(x, "logits"), wide, skips=compact)


# ---- verl


def _verl(x: Inputs) -> Iterator[Head]:
    """Yield both heads of verl, which compute every row, and entropies whether or not they are asked for."""

    def chunked(x: Inputs, entropy: bool) -> tuple[Tensor, Tensor]:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        return FusedLinearForPPO()(*_operands(x), x.labels)

    def kernel(x: Inputs, entropy: bool) -> tuple[Tensor, Tensor]:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(*_operands(x), x.labels, 1.0, "none")

    def no_chunked(x: Inputs) -> str | None:
        return _missing("verl.utils.experimental.torch_functional", "verl")

    def no_kernel(x: Inputs) -> str | None:
        if reason := _missing("verl.utils.kernel.kernels", "verl") or _no_gpu(x):
            return reason
        return f"its kernels need a width that is a multiple of 128, not {x.case.width}" if x.case.width % 128 else None

    rounded = _rounded(x, "logits and entropy"), _both(x, "sums of dW")
    yield Head(f"{VERL} torch", _of_statistics(chunked), RECOMPUTED, no_chunked, *rounded)
    yield Head(f"{VERL} Triton", _of_statistics(kernel), RECOMPUTED, no_kernel, "", _both(x, "sums of dH"))


# ---- shared


def _missing(module: str, package: str, extra: str = "") -> str | None:
    wanted = VERSIONS[package]
    needed = f"needs pip install {package}{extra}=={wanted}"
    try:
        import_module(module)
    except Exception as error:  # theirs may fail with any
        return f"{needed} ({' '.join(str(error).split())[:120]})"
    return None if (found := installed(package)) == wanted else f"{needed}, {found} is installed"


def _no_gpu(x: Inputs) -> str | None:
    return "its Triton kernels need a GPU" if x.device.type == "cpu" else None


def _rounded(x: Inputs, what: str) -> str:
    return "" if x.case.dtype == "float32" else f"{what} in {x.case.dtype}"


def _both(x: Inputs, summed: str) -> str:
    return "; ".join(filter(None, ["always both gradients", _rounded(x, summed)]))


def _widened(x: Inputs) -> str:
    return "" if x.case.dtype == "float32" else "fp32 gradient products"
