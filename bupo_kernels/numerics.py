"""The numerics contract: how far results may be from float64 on the same inputs, on which machine. Tests, the self-check and the
documentation have their bounds from here.

A CPU, and a GPU's fp32 units, round each addition to nearest, and errors cancel. The accumulator of a tensor core drops what does
not fit after every block of k, so each block loses up to an ulp towards zero, and what is lost adds up: a logit of D terms is
sums of D/16 blocks. (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ Comput. Sci. 2021. An A100 adds its blocks of
16 in two halves of 8, with a guard bit less than a Hopper.) Nothing on a CPU shows this but an emulation, which the tests have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bupo_kernels import reference

CONTRACT = 2e-6  # of a log-prob, where products round to nearest: what exp, log and the sums of the statistics lose
BLOCK = 16  # terms that a tensor core adds before it truncates
CPU = torch.device("cpu")


def truncation(device: torch.device) -> int:
    """Return ``c`` of the contract for products on ``device``: 0 where they round to nearest, 1 on tensor cores of Hopper and
    newer, 2 on those of Ampere and Ada and on hardware that nobody has described."""
    if device.type == "cpu":
        return 0
    return 1 if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0) else 2


def contract(
    largest: Any,  # float, or [...]
    width: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    truncation: int = 0,
) -> Any:
    """Return the bound on the error of a log-prob, ``|Δlogprob| ≤ (2e-6 + c · D/16 · 2⁻²⁴) · (1 + max|z|)``.

    Args:
        largest: max|z|, the absolute value of the largest logit; a number, or one a row.
        width: D, the number of terms of a logit. It does not matter without ``truncation``.
        dtype: of the statistics. In float64, which no tensor core truncates, it is as many of that dtype's eps.
        truncation: ``c``, as :func:`truncation` gives it.
    """
    single, own = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    accumulator = truncation * width / BLOCK * single / 2 if own == single else 0.0
    return (CONTRACT * own / single + accumulator) * (1 + largest)


def beside_dense(largest: Tensor, width: int, dense_error: Tensor, *, truncation: int) -> Tensor:  # [n], [] or [n] -> [n]
    """Return the bound on the error of a log-prob beside that of dense logits from the same device, with fp32 sums and float64
    statistics. It is the contract, and at most twice the dense error unless rounding to nearest explains more."""
    return torch.minimum(contract(largest, width, truncation=truncation), torch.maximum(contract(largest), 2 * dense_error))


def entropy_factor(vocab: int) -> float:
    """Return how many times the error of its log-probs an entropy can be off: it is Σ p (−log p), whose p move with log p."""
    return 2 * (1 + math.log(vocab))


class Bounded(NamedTuple):
    """The exact value of a gradient, and how far each of its elements may be from that."""

    exact: Tensor
    bound: Tensor


def logit_gradients(
    log_p: Tensor,  # [n, c] float64: of some columns
    entropy: Tensor,  # [n, 1] float64
    on_target: Tensor,  # [n, c] bool: whether the column is the target of the row
    upstream: Sequence[Tensor],  # [n, 1] float64 each: of logprobs, entropy and logsumexp
    *,
    roundoff: float,  # of storing dz
    logit_error: float | Tensor,  # or [n, 1]
    of_e: float = 0.0,
    half_step: float | Tensor = 0.0,  # half the smallest step of a stored dz: half_fp16_step(...)
) -> Bounded:
    """Return dz, the gradient of ``Σ upstream · (logprobs, entropy, logsumexp)`` with respect to the logits of some columns, and
    how far a stored dz may be from it. :func:`gradients` has the error model."""
    g_lp, g_h, g_lse = upstream
    p, spread, one = log_p.exp(), log_p + entropy, on_target.to(log_p.dtype)
    dz = g_lp * (one - p) - g_h * p * spread + g_lse * p
    b = 8 * logit_error
    relative = b + of_e * (1 - one)  # the target's value does not come from E
    error = roundoff * dz.abs() + p * relative * (g_lp.abs() + g_lse.abs() + g_h.abs() * (spread.abs() + 1))
    error += p * b * g_h.abs() * (1 + entropy)  # of H
    return Bounded(dz, error + half_step)


def half_fp16_step(upstream: Sequence[Tensor], vocab: int) -> Tensor:
    """Return half the smallest step of dz in fp16. Its scale depends on the largest dz that the ``upstream`` gradients of all rows
    of a call, of logprobs, entropy and logsumexp, make possible."""
    g_lp, g_h, g_lse = (g.double().abs() for g in upstream)
    return 2.0**-36 * (g_lp + g_lse + g_h * (2 * math.log(vocab) + 1)).max()


def product(d: Bounded, other: Tensor, dtype: torch.dtype) -> Bounded:  # [m, k], [k, n] float64 -> [m, n]
    """Return ``d @ other`` as an fp32 sum gives it that is rounded to ``dtype`` once."""
    rounded, single = torch.finfo(dtype), torch.finfo(torch.float32).eps
    exact, magnitude = d.exact @ other, other.abs()
    spent = d.bound @ magnitude + d.exact.shape[1] * single * (d.exact.abs() @ magnitude)
    smallest_step = rounded.smallest_normal * rounded.eps
    return Bounded(exact, spent * (1 + rounded.eps) + rounded.eps / 2 * exact.abs() + smallest_step)


def gradients(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    counts: Tensor,  # [N] bool: the rows that are active
    upstream: Sequence[Tensor | None],  # [N] each: of logprobs, entropy and logsumexp
    options: Mapping[str, Any],  # of reference.logits
    *,
    stored: torch.dtype,  # of dz
    logit_error: float,  # of log p, from that of the logits: contract(...)
    roundoff: float | None = None,  # of storing dz; None for half an eps
    of_e: float = 0.0,  # error of log p off the target where dz comes from a cache
) -> dict[str, Bounded]:
    """Return exact "hidden", "weight" and "bias" gradients of ``Σ upstream · (logprobs, entropy, logsumexp)`` with a bound for each
    element, from the dtype of ``hidden``, to which they are rounded.

    The error model, with u the roundoff of the dtype that dz is stored in and b eight times ``logit_error``:

    * dz is stored once in that dtype: u · |dz|, and under fp16, which is scaled so that the largest possible |dz| of the call is
      above 2^11, at least half of its smallest step, 2^-25 / 2^11 of that largest
    * p and log p come from fp32 logits: b, a few times; from a cached E: the roundoff of bf16 in p and in log p
    * dH = dz @ W and dW = dzᵀ @ H are fp32 sums: one eps of fp32 for each term, of Σ |dz| |W|
    * and are rounded once: u · |dH|
    """
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    dtype, hidden, weight = hidden.dtype, hidden.double(), weight.double()
    z = reference.logits(hidden, weight, **options)
    g = [(torch.zeros_like(z[:, 0]) if g is None else g.double() * counts).unsqueeze(1) for g in upstream]
    log_p = z.log_softmax(1)
    dz, error = logit_gradients(
        log_p,
        -(log_p.exp() * log_p).sum(1, keepdim=True),
        torch.zeros_like(z, dtype=torch.bool).scatter_(1, targets.where(counts, 0).unsqueeze(1), True),
        g,
        roundoff=torch.finfo(stored).eps / 2 if roundoff is None else roundoff,
        logit_error=logit_error,
        of_e=of_e,
        half_step=half_fp16_step(g, len(weight)) if stored == torch.float16 else 0.0,
    )

    return _of_operands(Bounded(dz, error), z, hidden, weight, options, logit_error, dtype)


def _of_operands(
    d: Bounded,  # [n, V] of the logits
    z: Tensor,  # [n, V]
    hidden: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    options: Mapping[str, Any],
    logit_error: float,
    dtype: torch.dtype,
) -> dict[str, Bounded]:
    """Return "hidden", "weight" and "bias" gradients, rounded to ``dtype``, that follow from those of the logits."""
    dz, error = d
    slope = torch.full_like(z, options.get("logit_scale", 1.0))
    temperature = options.get("temperature", 1.0)
    temperature = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    if (softcap := options.get("softcap")) is not None:
        tanh = z * temperature / softcap
        slope = slope * (1 - tanh**2)
        error = error + 8 * logit_error * dz.abs()  # of the slope itself
    slope = slope / temperature
    dz, error = dz * slope, error * slope.abs()
    by_row, by_column, ones = Bounded(dz, error), Bounded(dz.T, error.T), dz.new_ones(len(dz), 1)
    return {
        "hidden": product(by_row, weight, dtype),
        "weight": product(by_column, hidden, dtype),
        "bias": Bounded(*(x.squeeze(1) for x in product(by_column, ones, dtype))),
    }


class Side(NamedTuple):
    """One of the two policies of a divergence."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    options: Mapping[str, Any]  # of reference.logits
    stored: torch.dtype  # of dz


def divergence_gradients(
    student: Side,
    teacher: Side,
    beta: float,
    upstream: Sequence[Tensor],  # [N] each: of divergence and entropy; 0 on rows that are not active
    logit_error: float,  # of log p, from that of the logits: contract(...)
) -> tuple[dict[str, Bounded], dict[str, Bounded]]:
    """Return what :func:`gradients` does of ``Σ upstream · (divergence, entropy)``, for student and teacher.

    The error model is the one there. A dz is the difference of two probabilities, or a probability times a difference of log-probs
    less its mean, D: each of these has the error b.
    """
    found, logits = [], []
    for side in (student, teacher):
        options: dict[str, Any] = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in side.options.items()}
        z = reference.logits(side.hidden.detach().double(), side.weight.detach().double(), **options)
        logits.append((z.requires_grad_(), options))
    (z, _), (u, _) = logits
    g_d, g_h = (g.double() for g in upstream)
    with torch.enable_grad():
        divergence, entropy = reference.divergence_of_logits(z, u, beta)
        exact = torch.autograd.grad((g_d * divergence + g_h * entropy).sum(), (z, u))
    log_p, log_q = z.detach().log_softmax(1), u.detach().log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    g_d, g_h, entropy = (x.detach().abs().unsqueeze(1) for x in (g_d, g_h, entropy))
    spread = 1 + (log_p - log_q).abs().nan_to_num(posinf=0) + divergence.detach().unsqueeze(1)
    of_entropy = p * g_h * (2 + entropy + (log_p.nan_to_num(neginf=0) + entropy).abs())
    weights = (p + q if beta == 0 else p, p + q if beta == 1 else q)
    for side, dz, (logit, options), weight, more in zip(
        (student, teacher), exact, logits, weights, (of_entropy, torch.zeros_like(p)), strict=True
    ):
        error = torch.finfo(side.stored).eps / 2 * dz.abs() + 8 * logit_error * (g_d * weight * spread + more)
        operands = side.hidden.detach().double(), side.weight.detach().double()
        found.append(_of_operands(Bounded(dz, error), logit.detach(), *operands, options, logit_error, side.hidden.dtype))
    return found[0], found[1]
