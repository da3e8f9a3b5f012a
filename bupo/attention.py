"""Attention within each sequence of a packed batch: no mask, and no work between one sequence and another.

On ``sdpa`` transformers itself makes a block-diagonal mask of ``[T, T]`` and the products of all T² pairs. Here the T tokens are
cut at the borders that the caller names, and neighbours of equal length run as one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from bupo.batching import MicroBatch

NAME = "bupo_per_sequence"


def per_sequence_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, kv_heads, T, d]
    value: Tensor,  # [1, kv_heads, T, d]
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequence_lengths: Sequence[int] | None = None,
    **_,
) -> tuple[Tensor, None]:  # [1, T, heads, d]
    """Return causal attention within each of the sequences of ``sequence_lengths``, which add up to T.

    With a ``sliding_window`` a token attends to that many tokens at most, itself among them. Raises ``ValueError`` without
    ``sequence_lengths``, or with others than the batch holds.
    """
    if sequence_lengths is None or sum(sequence_lengths) != query.shape[2] or len(query) != 1:
        given = None if sequence_lengths is None else sum(sequence_lengths)
        raise ValueError(f"sequence_lengths: sum {given} given, accepted is the sum {query.shape[2]}, of a batch of one packed row")
    parts, start = [], 0
    for length, group in groupby(sequence_lengths):
        count = len(list(group))
        stop = start + count * length
        # [1, heads, count · length, d] -> [count, heads, length, d], a view
        q, k, v = (x[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        window = None  # [length, length]: what each token attends to, where that is not simply all before it
        if sliding_window is not None and length > sliding_window:
            window = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        out = F.scaled_dot_product_attention(
            *(q, k, v, window, dropout), is_causal=window is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))  # [count · length, heads, d]
        start = stop
    return torch.cat(parts).unsqueeze(0), None


AttentionInterface.register(NAME, per_sequence_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def training_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Have the model's layers use ``implementation``, one of ``hardware.attention``, within the context."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME if implementation == "per-sequence" else implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before


def packed_options(batch: MicroBatch, implementation: str) -> dict[str, Any]:
    """Return the arguments of :func:`bupo_kernels.policy_logprobs` that keep the sequences of a packed batch apart."""
    lengths = {"model_options": {"sequence_lengths": batch.lengths}} if implementation == "per-sequence" else {}
    return {"position_ids": batch.position_ids, **lengths}
