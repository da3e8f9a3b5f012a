"""The oracle: plain torch that materialises the logits, in any dtype up to float64, for the tests and the self-check."""

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
