"""What torch's FLOP counter (``torch.utils.flop_counter``) shall think of the ops, which it cannot look into.

It sees shapes and not which rows are active, so these are the products of every row: an upper bound, as in ``explain``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bupo_kernels.engine import Flags, Settings

Shape = Sequence[int]


def tell_flop_counter() -> None:
    """Register the formulas, if the counter is there at all: importing it would import Triton."""
    counter = sys.modules.get("torch.utils.flop_counter")
    ops = torch.ops.bupo_kernels
    if counter is None or ops.linear_statistics in counter.flop_registry:
        return
    counter.register_flop_formula(ops.linear_statistics)(_statistics)
    counter.register_flop_formula(ops.linear_statistics_backward)(_backward)
    counter.register_flop_formula(ops.linear_policy_loss)(_policy_loss)
    counter.register_flop_formula(ops.linear_divergence)(_divergence)
    counter.register_flop_formula(ops.linear_divergence_backward)(_divergence_backward)
    counter.register_flop_formula(ops.linear_divergence_sum)(_divergence_sum)
    counter.register_flop_formula(ops.support_statistics)(_on_support)
    counter.register_flop_formula(ops.support_statistics_backward)(_on_support_backward)
    counter.register_flop_formula(ops.support_logits)(_logits_on_support)
    counter.register_flop_formula(ops.support_logits_backward)(_logits_on_support_backward)


def _products(hidden: Shape, weight: Shape, gradients: Flags = (False, False, False)) -> int:
    grad_hidden, grad_weight, _ = gradients
    return (1 + grad_hidden + grad_weight) * 2 * math.prod(hidden) * weight[0]


def _statistics(hidden: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _products(hidden, weight)


def _backward(g_logprob: Shape, g_entropy: Shape, g_logsumexp: Shape, hidden: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Count the product too, of rows that have left nothing in the cache."""
    _bias, _targets, _temperature, _saved, _values, offsets, *_rest = rest
    kept = min(offsets[0], math.prod(hidden[:-1])) * hidden[-1]
    return _products(hidden, weight, Settings.decode(rest[-1]).needed) - 2 * kept * weight[0]


def _policy_loss(hidden: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return _products(hidden, weight, Settings.decode(rest[-1]).planned)


def _divergence(*arguments: Any, **_: Any) -> int:
    return sum(_products(*operands) for operands, _settings in _sides(arguments))


def _divergence_backward(
    g_divergence: Shape, g_entropy: Shape, divergence: Shape, entropy: Shape, *arguments: Any, **_: Any
) -> int:
    """Count the products of both sides too, which the backward forms again."""
    return sum(_products(*operands, settings.needed) for operands, settings in _sides(arguments))


def _divergence_sum(*arguments: Any, **_: Any) -> int:
    return sum(_products(*operands, settings.planned) for operands, settings in _sides(arguments))


def _sides(arguments: Sequence[Any]) -> list[tuple[tuple[Shape, Shape], Settings]]:
    """Return hidden states and weight of student and teacher, with their settings, from the arguments of a divergence's op. A
    teacher that is known by its top has none."""
    student, teacher = (Settings.decode(x) for x in arguments if isinstance(x, str))
    sides = [((arguments[0], arguments[1]), student), ((arguments[3], arguments[4]), teacher)]
    return [side for side in sides if side[0][0] is not None]


def _on_support(
    hidden: Shape, weight: Shape, bias: Shape, targets: Shape, mask: Shape, temperature: Shape, ids: Shape, *_: Any, **__: Any
) -> int:
    return 2 * ids[0] * weight[1]


def _logits_on_support(
    hidden: Shape, weight: Shape, bias: Shape, active: Shape, temperature: Shape, ids: Shape, *_: Any, **__: Any
) -> int:
    return 2 * ids[0] * weight[1]


def _logits_on_support_backward(upstream: Shape, logits: Shape, hidden: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    grad_hidden, grad_weight, _grad_bias = Settings.decode(rest[-1]).needed
    return (grad_hidden + grad_weight) * 2 * logits[0] * weight[1]


def _on_support_backward(
    g_logprob: Shape, g_entropy: Shape, g_logsumexp: Shape, hidden: Shape, weight: Shape, *rest: Any, **_: Any
) -> int:
    _bias, _targets, _temperature, ids, *_rest = rest
    grad_hidden, grad_weight, _grad_bias = Settings.decode(rest[-1]).needed
    return (grad_hidden + grad_weight) * 2 * ids[0] * weight[1]
