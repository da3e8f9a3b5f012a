"""The oracle: plain torch that materialises the logits, in any dtype up to float64, for the tests and the self-check."""

import math
from typing import Any

import torch
from torch import Tensor


def logits(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [...]
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # [..., V]
    """Return ``z_j = softcap(logit_scale · (h·W_j + b_j)) / temperature``, in the dtype of the operands."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...]
    *,
    mask: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    support: tuple[Tensor, Tensor] | None = None,  # ids [M], offsets [N + 1]
    dtype: torch.dtype = torch.float64,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-prob, entropy and logsumexp, each ``[...]`` in ``dtype``; 0 on rows that are not active.

    The operands are cast to ``dtype`` first, so that in float64 every later rounding is negligible; gradients are
    autograd's.
    """
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    z = logits(hidden.to(dtype), weight.to(dtype), **options)
    active = targets != ignore_index
    if mask is not None:
        active = active & mask
    if support is not None:
        by_row = _on_support(z.flatten(0, -2), targets.flatten(), *support)
        logprob, entropy, lse = (torch.where(active, x.view(targets.shape), 0) for x in by_row)
        return logprob, entropy, lse
    logprobs = z.log_softmax(-1)
    chosen = logprobs.gather(-1, targets.where(active, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    zero = torch.zeros((), dtype=dtype, device=z.device)
    return torch.where(active, chosen, zero), torch.where(active, entropy, zero), torch.where(active, z.logsumexp(-1), zero)


def _on_support(z: Tensor, targets: Tensor, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N, V], [N], …
    """Return log-prob, entropy and logsumexp, [N] each, of the logits whose ids each row has."""
    found = []
    for row, target, start, stop in zip(z, targets, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        own = ids[start:stop]
        log_p, lse = row[own].log_softmax(0), row[own].logsumexp(0)
        hits = log_p[own == target]
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum()
        values = hits[0] if len(hits) else -torch.inf - lse, entropy, lse
        found.append(torch.stack([torch.nan * x if start == stop else x for x in values]))
    whole = torch.stack(found) if found else z.new_zeros(0, 3)
    return whole[:, 0], whole[:, 1], whole[:, 2]


def linear_divergence(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [..., D']
    teacher_weight: Tensor,  # [V, D']
    beta: float,
    *,
    of_student: dict | None = None,
    of_teacher: dict | None = None,
    mask: Tensor | None = None,  # [...]
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return ``β KL(q ‖ M) + (1−β) KL(p ‖ M)`` with ``M = β q + (1−β) p`` of student's p and teacher's q, the forward KL for a
    ``beta`` of 0 and the reverse for 1; and the entropy of p; each ``[...]`` in ``dtype``, 0 on rows that are not active.

    ``of_student`` and ``of_teacher`` are the options of :func:`logits`. The operands are cast to ``dtype`` first; gradients are
    autograd's.
    """
    policies = []
    for hidden, weight, given in ((student_hidden, student_weight, of_student), (teacher_hidden, teacher_weight, of_teacher)):
        options: dict[str, Any] = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in (given or {}).items()}
        policies.append(logits(hidden.to(dtype), weight.to(dtype), **options))
    divergence, entropy = divergence_of_logits(policies[0], policies[1], beta)
    if mask is not None:
        divergence, entropy = (torch.where(mask, x, 0) for x in (divergence, entropy))
    return divergence, entropy


def divergence_of_logits(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:  # [..., V] each -> [...]
    """Return the divergence of :func:`linear_divergence` and the student's entropy."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    entropy = -_kl(log_p, torch.zeros_like(log_p))
    if beta in (0, 1):
        return _kl(log_q, log_p) if beta == 0 else _kl(log_p, log_q), entropy
    mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * _kl(log_q, mixture) + (1 - beta) * _kl(log_p, mixture), entropy


def divergence_from_top(
    student: Tensor,  # [..., V] logits
    ids: Tensor,  # [..., k]
    logprobs: Tensor,  # [..., k]
    beta: float,
) -> Tensor:  # [...]
    """Return the divergence of two policies of k + 1 outcomes: ``ids``, and all others together."""
    log_p = student.log_softmax(-1)
    others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    if ids.shape[-1] == student.shape[-1]:  # there is no other
        return divergence_of_logits(log_p.gather(-1, ids), logprobs.to(log_p.dtype), beta)[0]
    left = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=0).log()
    return divergence_of_logits(
        torch.cat([log_p.gather(-1, ids), others], -1), torch.cat([logprobs.to(log_p.dtype), left.to(log_p.dtype)], -1), beta
    )[0]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:  # [..., V] each -> [...]
    """Return the sum of ``p (ln p − ln q)`` where p is not 0."""
    there = log_p != -torch.inf
    return (log_p.exp() * torch.where(there, log_p - log_q, 0)).sum(-1)
