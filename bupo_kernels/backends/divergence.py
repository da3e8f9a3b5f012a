"""``KL(p ‖ q)`` of two policies that share an unembedding, streamed over slices of the vocabulary; a statistic, no gradient.

With ``m = max z^p``, ``s = Σ e^(z^p−m)`` and ``u = Σ e^(z^p−m) (z^p − z^q)``: ``KL = u/s − (m + ln s) + lse(z^q)``.
Both logits of a slice are at hand together, so W is read once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bupo_kernels.backends.gradients import accumulate_
from bupo_kernels.backends.problem import Readout
from bupo_kernels.backends.torch_chunked import CPU_TILE, DEVICE_TILE, to_logits_


def divergence(
    hidden: Tensor,  # [n, D]
    reference: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    readout: Readout,  # of these rows: a tensor of temperatures is [n, 1]
) -> Tensor:  # [n]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows, columns = CPU_TILE if hidden.device.type == "cpu" else DEVICE_TILE
    result = hidden.new_empty(len(hidden), dtype=dtype)
    for first in range(0, len(hidden), rows):
        block = slice(first, first + rows)
        by_row = isinstance(readout.temperature, Tensor)
        at = replace(readout, temperature=readout.temperature[block]) if by_row else readout
        result[block] = _divergence(hidden[block], reference[block], weight, bias, at, columns, dtype)
    return result


def _divergence(hidden, reference, weight, bias, readout, columns: int, dtype: torch.dtype) -> Tensor:
    n = len(hidden)
    zeros = hidden.new_zeros(n, dtype=dtype)
    (m, s, u), (m_q, s_q) = (zeros - torch.inf, zeros, zeros), (zeros - torch.inf, zeros)
    for start in range(0, len(weight), columns):
        w = weight[start : start + columns]
        b = None if bias is None else bias[start : start + columns].to(dtype)
        z, z_q = (hidden.new_empty(n, len(w), dtype=dtype) for _ in range(2))
        for x, logits in ((hidden, z), (reference, z_q)):
            accumulate_(logits, x, w.T, first=True)
            to_logits_(logits, b, readout)
        higher, higher_q = torch.maximum(m, z.amax(1)), torch.maximum(m_q, z_q.amax(1))
        e, kept = (z - higher.unsqueeze(1)).exp_(), (m - higher).exp()
        u = kept * u + (e * z.sub_(z_q)).sum(1)
        s = kept * s + e.sum(1)
        s_q = (m_q - higher_q).exp() * s_q + z_q.sub_(higher_q.unsqueeze(1)).exp_().sum(1)
        m, m_q = higher, higher_q
    return (u / s - ((m - m_q) + (s.log() - s_q.log()))).clamp_(min=0)
