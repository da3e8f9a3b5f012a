"""The picture of a run, and how figures become files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from bupo.output import replacing

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, SKY, GREEN, VERMILION, PURPLE, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442"

LEAST = 1e-4  # In nats; entropies may have a logarithmic axis, on which 0 has no place.
GUARDS = (("kl", "KL(internal ‖ final), nats", BLUE), ("perplexity", "perplexity of the final policy", PURPLE))


def draw_run(metrics: list[dict], accuracies: list[dict], path: Path) -> None:
    """Draw reward with held-out accuracy, both entropies and, where they were measured, KL and perplexity, over the steps.

    Phase 1 is shaded. Values that are absent or None are passed over. The file appears whole or not at all.
    """

    def draw(axes: Axes, rows: list[dict], name: str, label: str, color: str, least: float = -np.inf, **style) -> None:
        rows = [row for row in rows if row.get(name) is not None]
        if rows:
            marker = "." if len(rows) < 50 else None
            steps, values = [row["step"] for row in rows], [max(row[name], least) for row in rows]
            axes.plot(steps, values, color=color, linewidth=1.2, marker=marker, label=label, **style)

    internal = [row for row in metrics if row["phase"] != "final"]
    guards = [guard for guard in GUARDS if any(row.get(guard[0]) is not None for row in metrics)]
    figure = Figure(figsize=(9, 8.5 if guards else 6), layout="constrained")
    panels = figure.subplots(3 if guards else 2, sharex=True)
    for axes in panels:
        if internal:
            boundary, label = internal[-1]["step"] + 0.5, f"phase 1: {internal[0]['phase']}"
            axes.axvspan(0, boundary, color=YELLOW, alpha=0.2, linewidth=0, label=label if axes is panels[0] else None)
            axes.axvline(boundary, color="grey", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)

    reward, entropy = panels[:2]
    draw(reward, metrics, "reward", "reward of the samples", SKY)
    if heldout := [row for row in accuracies if row.get("greedy") is not None]:
        steps, low, greedy, high = ([row[name] for row in heldout] for name in ("step", "greedy_low", "greedy", "greedy_high"))
        bars = np.maximum([np.subtract(greedy, low), np.subtract(high, greedy)], 0)
        reward.errorbar(steps, greedy, bars, fmt="o-", markersize=4, capsize=3, color=VERMILION, label="held-out, greedy (95 %)")
    reward.set_ylabel("reward, accuracy")

    draw(entropy, internal, "entropy", "internal policy", GREEN, LEAST)
    final = [row if row["phase"] != "final" else {**row, "entropy_final": row.get("entropy")} for row in metrics]
    draw(entropy, final, "entropy_final", "final policy", "black", LEAST)
    entropy.set_ylabel("entropy (nats per token)")
    low, high = entropy.dataLim.intervaly
    if high > 5 * low:  # An inner layer's entropy may be many times the final policy's.
        entropy.set_yscale("log")
        entropy.yaxis.set_major_formatter("{x:g}")
        entropy.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axes in (reward, entropy):
        if handles := axes.get_legend_handles_labels()[0]:
            axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False)

    for place, (name, label, color) in enumerate(guards):
        axes = panels[2].twinx() if place else panels[2]
        draw(axes, metrics, name, label, color, linestyle="--" if place else "-")
        axes.set_ylabel(label, color=color)
    last = max(row["step"] for row in [*metrics, *accuracies])
    panels[-1].set(xlabel="step", xlim=(-0.02 * last, 1.02 * last + 0.1))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path, "png")


def write_figure(figure: Figure, file: Path | BinaryIO, kind: str) -> None:
    """Write ``figure`` as the ``kind`` "png" or "svg"; the same figure gives the same bytes."""
    with rc_context({"svg.hashsalt": "bupo"}):
        figure.savefig(file, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)


def svg_of(figure: Figure) -> bytes:
    """Return what :func:`write_figure` would write as SVG."""
    file = BytesIO()
    write_figure(figure, file, "svg")
    return file.getvalue()


def save_figure(figure: Figure, path: Path, kind: str) -> Path:
    """Write ``figure`` to ``path``, whole or not at all, as the ``kind`` "png" or "svg"; return ``path``."""
    with replacing(path) as partial:
        write_figure(figure, partial, kind)
    return path
