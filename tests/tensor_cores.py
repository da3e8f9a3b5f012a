"""Tensor cores on a CPU: products of 16-bit operands with an fp32 result, as ``torch.mm(out_dtype=)`` forms them on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bupo_kernels.backends import gradients


def mocked(monkeypatch) -> list[tuple[torch.dtype, torch.Size, torch.Size]]:
    """Have the CPU take the ways of a device whose library keeps fp32 sums. Return a list that receives the products taken there:
    the dtype of the operands, and their shapes."""
    taken, plain = [], torch.mm

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return plain(a, b, out=out)
        assert a.dtype == b.dtype  # these as CUDA's asks
        assert (a.dtype.itemsize, out_dtype) == (2, torch.float32)
        assert out is None or out.dtype == out_dtype
        taken.append((a.dtype, a.shape, b.shape))
        return plain(a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(gradients, "keeps_fp32_sums", lambda device: True)
    return taken
