"""Other libraries' fused heads by their own signatures, so that a patch or a benchmark is a rename.

| here | there |
|---|---|
| :class:`LigerFusedLinearScaledCrossEntropyFunction` | ``liger_kernel.ops`` 0.8.5 |
| :func:`liger_fused_linear_cross_entropy` | ``liger_kernel.transformers.functional`` 0.8.5 |
| :func:`verl_linear_cross_entropy` | ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`` 0.9.1 |
| :class:`FusedLinearForPPO` | ``verl.utils.experimental.torch_functional`` 0.9.1 |
| :func:`apple_linear_cross_entropy` | ``cut_cross_entropy.linear_cross_entropy`` of its repository |
| :func:`torch_linear_cross_entropy` | ``torch.nn.functional.linear_cross_entropy`` 2.13 |

Names, order, defaults and meaning of the arguments are theirs, and so are the shapes returned; the peer need not be installed. An
option that changes the result is honoured, or refused with a ``ValueError`` that names it. One that only tells a kernel how to find
the same result is checked and has no effect, except where it bounds memory.

The library's own ways hold for all of them (see :mod:`bupo_kernels.functional`): results are fp32 (float64 for float64 inputs) also
where theirs are rounded to 16 bits; gradients are exact, with no filter; the hidden states may have any leading dimensions and be
any view, the unembedding may be a ``DTensor`` of FSDP2; errors name the argument as the peer calls it. ``label_smoothing`` and
``selected_token_ids`` ask for a few columns more, whose part of a gradient is rounded on its own, and hold the hidden states in
fp32 beside the working memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bupo_kernels.dispatch import default_memory_budget
from bupo_kernels.functional import LinearLogprobs, logprobs_of
from bupo_kernels.lens import logit_lens
from bupo_kernels.request import Request

# ---- Liger


class LigerFusedLinearScaledCrossEntropyFunction:
    """Liger's function of per-token negative log-likelihood, entropy and log-probs of chosen ids, called by ``apply``."""

    @staticmethod
    def apply(
        _input: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        target: Tensor,  # [...]
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,  # [K]
    ) -> Tensor | tuple[Tensor, ...]:
        """Return ``nll [...]``, alone or in a tuple followed by ``entropy [...]`` and the log-probs ``[..., K]`` of
        ``selected_token_ids`` (int64, in their order), as asked for; each is differentiable, and 0 on ignored rows.

        Args:
            m_tiles_per_cluster: a setting of Liger's kernel, at least 1; no effect.
        """
        _check_count("m_tiles_per_cluster", m_tiles_per_cluster)
        options = {"temperature": temperature, "ignore_index": ignore_index, "return_entropy": return_entropy}
        call, out = _statistics({"hidden": "_input", "targets": "target"}, _input, weight, target, **options)
        outputs: tuple[Tensor, ...] = (-out.logprobs,)
        if out.entropy is not None:
            outputs += (out.entropy,)
        if selected_token_ids is not None:
            outputs += (_selected_logprobs(call, out.logsumexp, selected_token_ids),)
        return outputs if len(outputs) > 1 else outputs[0]


@dataclass
class CrossEntropyOutput:
    """The answer of :func:`liger_fused_linear_cross_entropy` when asked for more than the loss, with Liger's names."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    ce_weight: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Return the cross entropy plus ``lse_square_scale · logsumexp²``, as Liger does.

    Args:
        ce_weight: factor of each class. A mean is over the weights of the targets, that of the z-loss over the number of rows.
        label_smoothing: in [0, 1]; together with a ``softcap`` it is refused.
        accum_dtype: None or fp32. Sums are fp32 in either case.
        use_token_scaling: whether each row is multiplied by its detached probability.
        return_token_accuracy, return_predicted_tokens: cost another product, 2·N·V·D FLOP.
        chunk_mem_const: factor on the default working memory.

    Returns:
        The loss, ``[...]`` or a scalar, 0.0 when no row counts; or a :class:`CrossEntropyOutput` if any ``return_…`` is set: there
        ``z_loss`` (its part of ``loss``) and ``token_accuracy`` are reduced as the loss is (the accuracy of a sum is a mean),
        ``predicted_tokens`` is ``[...]`` int64, -1 on ignored rows. Only ``loss`` has a gradient.
    """
    _check_reduction(reduction)
    _check_smoothing(label_smoothing)
    if label_smoothing and softcap is not None:
        raise ValueError(f"label_smoothing: {label_smoothing} given with a softcap, accepted there is 0.0")
    if accum_dtype not in (None, torch.float32):
        raise ValueError(f"accum_dtype: {accum_dtype} given, accepted are None and torch.float32")
    _check_count("chunk_mem_const", chunk_mem_const)
    budget = None if chunk_mem_const == 1 else chunk_mem_const * default_memory_budget(input.device)
    call, out = _statistics(
        {"hidden": "input", "targets": "target"},
        *(input, weight, target),
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
        return_entropy=False,
        memory_budget=budget,
    )
    losses, weights = _cross_entropy(call, out, "ce_weight", ce_weight, label_smoothing)
    z_losses = lse_square_scale * out.logsumexp**2
    count = call.active().sum()
    if reduction == "mean":
        losses = losses / weights.sum().masked_fill(count == 0, 1)
        z_losses = z_losses / count.clamp(min=1)
    losses = losses + z_losses
    if use_token_scaling:
        scales = out.logprobs.detach().exp()
        losses, z_losses = losses * scales, z_losses * scales
    loss, z_loss = (losses, z_losses) if reduction == "none" else (losses.sum(), z_losses.sum())
    if not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss

    found = CrossEntropyOutput(loss, z_loss=z_loss.detach() if return_z_loss else None)
    if return_token_accuracy or return_predicted_tokens:
        argmax = logit_lens(
            *([call.hidden], call.weight, call.targets),
            bias=call.bias,
            softcap=softcap,
            ignore_index=ignore_index,
            memory_budget=budget,
            outputs=("argmax",),
        ).argmax
        assert argmax is not None
        predicted = argmax[0].masked_fill(~call.active(), -1)
        if return_predicted_tokens:
            found.predicted_tokens = predicted
        if return_token_accuracy:
            hits = ((predicted == call.targets) & call.active()).float()
            found.token_accuracy = hits if reduction == "none" else hits.sum() / count
    return found


# ---- verl


def verl_linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(logprobs, entropy)``: log-probs, not losses, flat ``[N]`` or reduced to a scalar; the entropy is always flat.

    Args:
        labels: int64. A row with -100, on which verl's kernel is undefined, is ignored: it gives 0 and is no part of a mean.
        dist_process_group: None, or a group of one rank: a vocabulary sharded over ranks is refused.
    """
    reduction = str(reduction).lower()
    _check_reduction(reduction)
    if dist_process_group is not None and (size := dist.get_world_size(dist_process_group)) > 1:
        raise ValueError(f"dist_process_group: {size} ranks given, accepted are None and a group of one, with the whole vocabulary")
    call, out = _statistics({"targets": "labels"}, hidden, weight, labels, temperature=temperature)
    assert out.entropy is not None
    return _reduced(out.logprobs.flatten(), call.active().sum().clamp(min=1), reduction), out.entropy.flatten()


class FusedLinearForPPO(nn.Module):
    """The head of verl's fused models: per-token log-prob and entropy.

    Args:
        chunk_size: rows at a time in verl; here working memory in proportion, the default for 512.
        impl_backend: ``"torch"`` or ``"liger"``; no effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        _check_count("chunk_size", chunk_size)
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend: {impl_backend!r} given, accepted are 'torch' and 'liger'")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # [..., D]
        vocab_weights: Tensor,  # [V, D]
        input_ids: Tensor,  # [...] of any integer dtype
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(log_probs [...], entropy [...])``, both 0 where ``input_ids`` is -100 (an error on verl's torch backend)."""
        budget = None if self.chunk_size == 512 else default_memory_budget(hidden_states.device) * self.chunk_size // 512
        names = {"hidden": "hidden_states", "weight": "vocab_weights", "targets": "input_ids", "memory_budget": "chunk_size"}
        options = {"temperature": temperature, "memory_budget": budget}
        _, out = _statistics(names, hidden_states, vocab_weights, input_ids.to(torch.int64), **options)
        assert out.entropy is not None
        return out.logprobs, out.entropy


# ---- Apple

APPLE_IMPLEMENTATIONS = (
    *("cce", "torch_compile", "cce_kahan_full_c", "cce_kahan_full_e"),
    *("cce_exact", "cce_kahan_full_c_full_e", "cce_kahan_full"),
)


def apple_linear_cross_entropy(
    e: Tensor,  # [..., D]
    c: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str = "cce",
    vocab_parallel_options: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the cross entropy, with the options of Apple's repository (PyPI's 25.1.1 has ``ignore_index`` in place of ``bias``).

    Args:
        shift: ``targets`` are those of ``shift`` tokens further on, as in ``e[..., :-shift, :]`` with ``targets[..., shift:]``.
        filter_eps: None, a number, ``"auto"`` or ``"high"``: a permission to drop small gradients, which is not used.
        accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad: no effect: gradients are always summed in fp32, and unfiltered.
        impl: a name of :data:`APPLE_IMPLEMENTATIONS` or Apple's ``LinearCrossEntropyImpl``; no effect.
        vocab_parallel_options: only None.

    Returns:
        The loss, NaN for a mean when no row counts, as Apple's. For ``"none"`` ``[..., T]``, ``[..., T - shift]`` with a shift, 0
        on ignored rows. With ``return_lse``, ``(loss, lse)``: ``lse`` has the shape that ``"none"`` gives, 0 on ignored rows, and
        its gradient counts.
    """
    _check_reduction(reduction)
    if not (filter_eps is None or isinstance(filter_eps, (int, float)) or filter_eps in ("auto", "high")):
        raise ValueError(f"filter_eps: {filter_eps!r} given, accepted are None, numbers, 'auto' and 'high'")
    impl = getattr(impl, "name", impl)
    if str(impl).lower() not in APPLE_IMPLEMENTATIONS:
        raise ValueError(f"impl: {impl!r} given, accepted are {', '.join(map(repr, APPLE_IMPLEMENTATIONS))}")
    if vocab_parallel_options is not None:
        given = type(vocab_parallel_options).__name__
        raise ValueError(f"vocab_parallel_options: {given} given, accepted is None: the whole vocabulary on each rank")
    if not isinstance(shift, int) or not 0 <= shift < max(targets.shape[-1], 1):
        raise ValueError(f"shift: {shift} given, accepted are integers in [0, {targets.shape[-1]}), the length of targets")
    if shift:
        e, targets = e[..., : -int(shift), :], targets[..., int(shift) :]
    options = {"bias": bias, "softcap": softcap, "ignore_index": ignore_index, "return_entropy": False}
    call, out = _statistics({"hidden": "e", "weight": "c"}, e, c, targets, **options)
    loss = _reduced(-out.logprobs, call.active().sum(), reduction)
    return (loss, out.logsumexp) if return_lse else loss


# ---- torch


def torch_linear_cross_entropy(
    input: Tensor,  # [..., D] or [D]
    linear_weight: Tensor,  # [V, D]
    target: Tensor,  # [...]
    *,
    linear_bias: Tensor | None = None,  # [V]
    weight: Tensor | None = None,  # [V]
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
) -> Tensor:
    """Return the cross entropy as ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, …)``.

    Args:
        target: int64 ids; class probabilities and a ``linear_weight`` of more than two dimensions are refused.
        weight: factor of each class. A mean is over the weights of the targets.
        ignore_index: None is -100.
        options: None or a ``torch.nn.LinearCrossEntropyOptions``; no effect.

    Returns:
        The loss, ``[...]`` or a scalar; the mean is NaN when no row counts, as torch's.
    """
    _check_reduction(reduction)
    _check_smoothing(label_smoothing)
    if options is not None and type(options).__name__ != "LinearCrossEntropyOptions":
        raise ValueError(f"options: {type(options).__name__} given, accepted are None and a torch.nn.LinearCrossEntropyOptions")
    single = input.dim() == 1
    if single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    call, out = _statistics(
        {"hidden": "input", "weight": "linear_weight", "targets": "target", "bias": "linear_bias"},
        *(input, linear_weight, target),
        bias=linear_bias,
        ignore_index=-100 if ignore_index is None else ignore_index,
        return_entropy=False,
    )
    losses, weights = _cross_entropy(call, out, "weight", weight, label_smoothing)
    if single and reduction == "none":
        return losses.squeeze(0)
    return _reduced(losses, weights.sum(), reduction)


# ---- shared


def _statistics(
    names: dict[str, str], hidden: Tensor, weight: Tensor, targets: Tensor, **options
) -> tuple[Request, LinearLogprobs]:
    """Return the call, its operands gathered and cast, and its results. Errors name an argument as the peer does, by ``names``."""
    try:
        call = Request.of(hidden, weight, targets, **options)
        return call, logprobs_of(call)
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in names:
            raise
        raise type(error)(f"{names[name]}:{rest}") from None


def _cross_entropy(
    call: Request, out: LinearLogprobs, name: str, class_weights: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row and its weight in a mean: both ``[...]``, 0 where the row is not active.

    The loss is ``−Σ_j w_j q_j (z_j − lse)`` with ``q = (1 − ε)·onehot + ε/V``. The part in ε asks only for
    ``Σ_j w_j z_j = h · Σ_j w_j W_j``.
    """
    active, dtype, vocab = call.active(), out.logprobs.dtype, call.weight.shape[0]
    losses, weights = -out.logprobs, active.to(dtype)
    if class_weights is not None:
        _check_class_weights(name, class_weights, call.weight)
        class_weights = class_weights.to(dtype)
        weights = weights * class_weights[call.targets.where(active, 0)]
        losses = losses * weights
    if label_smoothing:
        factors = torch.ones(vocab, dtype=dtype, device=call.weight.device) if class_weights is None else class_weights
        with torch.autocast(call.hidden.device.type, enabled=False):
            column = sum(f @ rows.to(dtype) for f, rows in zip(factors.split(8192), call.weight.split(8192), strict=True))
        total = _products(call, column.unsqueeze(0)).squeeze(-1)
        if call.bias is not None:
            total = total + (factors * call.bias.to(dtype)).sum()
        smooth = (factors.sum() * out.logsumexp - total).masked_fill(~active, 0) / vocab
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    return losses, weights


def _selected_logprobs(call: Request, logsumexp: Tensor, ids: Tensor) -> Tensor:  # [K] -> [..., K]
    """Return the log-probs of ``ids`` on each row, 0 where the row is not active."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"selected_token_ids: {given} given, accepted is torch.int64 of shape [K]")
    outside = (ids < 0) | (ids >= len(call.weight))
    # In a graph and on a device index_select itself refuses ids that are outside.
    if not torch.compiler.is_compiling() and ids.device.type == "cpu" and outside.any():
        raise ValueError(f"selected_token_ids: {ids[outside][0].item()} given, accepted are ids in [0, {len(call.weight)})")
    temperature = call.temperature.unsqueeze(-1) if isinstance(call.temperature, Tensor) else call.temperature
    logits = _products(call, call.weight.index_select(0, ids).to(logsumexp.dtype)) / temperature
    return (logits - logsumexp.unsqueeze(-1)).masked_fill(~call.active().unsqueeze(-1), 0)


def _products(call: Request, columns: Tensor) -> Tensor:  # [K, D] -> [..., K]
    """Return ``h · columns`` for each row, in the dtype of ``columns``; a row that is not active gives 0, whatever it holds."""
    hidden = call.hidden.masked_fill(~call.active().unsqueeze(-1), 0).to(columns.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden @ columns.T


def _reduced(values: Tensor, count: Tensor, reduction: str) -> Tensor:
    """Return ``values``, their sum, or their mean over ``count``."""
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / count


def _check_class_weights(name: str, class_weights: Tensor, weight: Tensor) -> None:
    accepted = f"floating point of ({len(weight)},) on {weight.device}, without a gradient"
    if not isinstance(class_weights, Tensor):
        raise TypeError(f"{name}: {type(class_weights).__name__} given, accepted is a Tensor")
    fits = class_weights.shape == weight.shape[:1] and class_weights.device == weight.device
    if not fits or not class_weights.is_floating_point() or class_weights.requires_grad:
        given = f"{class_weights.dtype} of shape {tuple(class_weights.shape)} on {class_weights.device}"
        raise ValueError(f"{name}: {given}{' with a gradient' * class_weights.requires_grad} given, accepted is {accepted}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: {reduction!r} given, accepted are 'mean', 'sum', 'none'")


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing} given, accepted are numbers in [0, 1]")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {value!r} given, accepted are integers from 1")
