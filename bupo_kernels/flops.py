"""What torch's FLOP counter (``torch.utils.flop_counter``) shall think of the ops, which it cannot look into.

It sees shapes and not which rows count, so these are the products of every row: an upper bound, as in ``explain``.
"""

from __future__ import annotations

import math
import sys

import torch


def tell_flop_counter() -> None:
    """Registers the formulas, if the counter is there at all: importing it would import Triton."""
    counter = sys.modules.get("torch.utils.flop_counter")
    ops = torch.ops.bupo_kernels
    if counter is None or ops.linear_statistics in counter.flop_registry:
        return
    counter.register_flop_formula(ops.linear_statistics)(_statistics)
    counter.register_flop_formula(ops.linear_statistics_backward)(_backward)
    counter.register_flop_formula(ops.linear_policy_loss)(_policy_loss)


def _products(hidden_shape, weight_shape, products: int) -> int:
    return products * 2 * math.prod(hidden_shape) * weight_shape[0]


def _statistics(hidden_shape, weight_shape, *_, **__) -> int:
    return _products(hidden_shape, weight_shape, 1)


def _backward(g_logprob, g_entropy, g_logsumexp, hidden_shape, weight_shape, *rest, **__) -> int:
    *_, need_hidden, need_weight, _ = rest
    return _products(hidden_shape, weight_shape, 1 + need_hidden + need_weight)


def _policy_loss(hidden_shape, weight_shape, *rest, **__) -> int:
    *_, grad_hidden, grad_weight, _ = rest
    return _products(hidden_shape, weight_shape, 1 + grad_hidden + grad_weight)
