"""The boundary layer, where the FFNs stop widening the policy (BuPO, arXiv 2512.19673, §5.3), and how sure that is.

The paper reads ΔH_FFN > 0 as exploration, ≈ 0 as integration, < 0 as convergence, in this order from the bottom up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SEGMENTS = ("exploration", "integration", "convergence")
DELTA_ENTROPY = ("delta_entropy", "delta_entropy_low", "delta_entropy_high")

# Nats. e^H is how many tokens a policy is spread over, as if evenly; 0.01 changes that by 1 %, which nobody would call widening or
# narrowing. It is also more than the arithmetic can be off: 4e-6 · (1 + max|z|), with logits of up to some 2,000.
TOLERANCE = 0.01


def find_boundary(
    mean: np.ndarray,  # [L] of ΔH_FFN, layers 1 to L
    low: np.ndarray,  # [L] 95 % interval of the mean
    high: np.ndarray,  # [L]
    resampled: np.ndarray,  # [resamples, L] means of ΔH_FFN
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Find the last layer whose ΔH_FFN is positive beyond its interval (``low > 0``), and the segments, as plain numbers for JSON.

    ====================== ========================================================================================================
    ``layer``              from 1; None where no layer is positive, or where one response gives no interval
    ``confidence``         share of the bootstrap resamples in which the same comes out, also when that is None; each resample has
                           its own means, with the distance of ``low`` from the mean that the whole sample has
    ``low``, ``high``      95 % of the resamples with a boundary layer have it between these
    ``shares``             of the resamples, by layer (as text), and ``"none"``
    ``delta_entropy``,     ΔH_FFN of ``layer`` and its interval
    ``delta_entropy_low``,
    ``delta_entropy_high``
    ``signs``              of each layer: 1 or -1 where the interval lies above or below 0 and ``|mean| > tolerance``, else 0
    ``segments``           name, first and last layer of exploration, integration and convergence: the two borders with which
                           the signs agree best; those that are empty are left out
    ``exceptions``         layers whose sign is not that of their segment
    ``tolerance``          nats
    ``note``               why there is no layer, else ""
    ====================== ========================================================================================================
    """
    answer = no_boundary("", tolerance)
    if np.isnan(low).any():
        return answer | {"note": "one response gives no confidence interval, at least two are needed"}

    found = _last_positive(low[None])[0]
    others = _last_positive(resampled - (mean - low))
    layers, counts = np.unique(others, return_counts=True)
    shares = {str(layer) if layer else "none": float(n / len(others)) for layer, n in zip(layers.tolist(), counts, strict=True)}
    answer |= {"confidence": shares.get(str(found) if found else "none", 0.0), "shares": shares}
    if (others > 0).any():
        ends = np.percentile(others[others > 0], [2.5, 97.5], method="inverted_cdf")
        answer |= dict(zip(("low", "high"), map(int, ends), strict=True))
    if found:
        answer |= {name: float(values[found - 1]) for name, values in zip(DELTA_ENTROPY, (mean, low, high), strict=True)}
        answer["layer"] = int(found)
    else:
        answer["note"] = "no layer has a ΔH of its FFN that is positive beyond its confidence interval"

    clear = np.abs(mean) > tolerance
    signs = np.where(clear & (low > 0), 1, np.where(clear & (high < 0), -1, 0))
    first, second = _borders(signs)
    expected = np.repeat([1, 0, -1], [first, second - first, len(signs) - second])
    spans = zip(SEGMENTS, (0, first, second), (first, second, len(signs)), strict=True)
    answer["signs"] = signs.tolist()
    answer["segments"] = [{"name": name, "first": start + 1, "last": stop} for name, start, stop in spans if stop > start]
    answer["exceptions"] = (np.nonzero(signs != expected)[0] + 1).tolist()
    return answer


def no_boundary(note: str, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Return the answer of :func:`find_boundary` where nothing was found, for the reason ``note``."""
    answer: dict[str, Any] = dict.fromkeys(("layer", "confidence", "low", "high", "shares", *DELTA_ENTROPY))
    return answer | {
        "confidence": 0.0,
        "shares": {},
        "signs": [],
        "segments": [],
        "exceptions": [],
        "tolerance": tolerance,
        "note": note,
    }


def describe(boundary: dict[str, Any]) -> str:
    """Return one line on what :func:`find_boundary` found."""
    segments = ", ".join(f"{part['name']} {part['first']} to {part['last']}" for part in boundary["segments"])
    if boundary["layer"] is None:
        return f"boundary layer: none, {boundary['note']}" + (f" ({segments})" if segments else "")
    return f"boundary layer {boundary['layer']} ({boundary['confidence']:.0%} of resamples, {_between(boundary)}); {segments}"


def suggest(summary: dict[str, Any]) -> str:
    """Return YAML for ``bupo train``: the layer to train and, as comments, how sure that is; comments alone where there is none."""
    boundary, depth = summary["boundary"], summary["layers"]
    layer, share = boundary["layer"], f"{boundary['confidence']:.0%} of the bootstrap resamples"
    if layer is None:
        sure = f" ({share} agree)" if boundary["shares"] else ""
        return f"# No layer is suggested: {boundary['note']}{sure}."
    low, high = boundary["delta_entropy_low"], boundary["delta_entropy_high"]
    numbers = f"ΔH of its FFN {boundary['delta_entropy']:+.3g} nats, 95 % interval [{low:+.3g}, {high:+.3g}]"
    sure = f"{share} have the same, {_between(boundary)}"
    if layer == depth:
        return (
            f"# No layer is suggested: the last with a positive ΔH is layer {layer}, the model's last ({numbers}).\n"
            f"# Its policy is the model's own, and to train it is plain GRPO. {sure}."
        )
    small = abs(boundary["delta_entropy"]) <= boundary["tolerance"]
    doubt = f"\n# That is less than {boundary['tolerance']:g} nats: no clear widening." if small else ""
    return f"# Boundary layer {layer} of {depth}: {numbers}.\n# {sure}.{doubt}\nbupo:\n  layer: {layer}"


def _between(boundary: dict[str, Any]) -> str:
    low, high = boundary["low"], boundary["high"]
    return f"95 % have layer {low}" if low == high else f"95 % have one of layers {low} to {high}"


def _last_positive(values: np.ndarray) -> np.ndarray:  # [resamples, L] -> [resamples] int, from 1; 0 where none is
    return np.where(values > 0, np.arange(1, values.shape[1] + 1), 0).max(1)


def _borders(signs: np.ndarray) -> tuple[int, int]:  # [L] -> how many layers lie below the first border, and below the second
    """Return the borders with the least squared difference of the signs from 1, 0, -1; of equals the shortest integration."""
    best = min(
        (
            ((signs[:first] - 1) ** 2).sum() + (signs[first:second] ** 2).sum() + ((signs[second:] + 1) ** 2).sum(),
            second - first,
            -first,
        )
        for first in range(len(signs) + 1)
        for second in range(first, len(signs) + 1)
    )
    return int(-best[2]), int(best[1] - best[2])
