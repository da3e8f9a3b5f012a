"""The figures of an analysis, and of the layers over a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from bupo.analysis.statistics import Curve, Statistics
from bupo.output import replacing
from bupo.plots import BLUE, GREEN, LEAST, PURPLE, SKY, VERMILION, YELLOW, save_figure

MODULES = {"attention": ("attention", BLUE, "s"), "ffn": ("FFN", VERMILION, "^"), "layer": ("layer", "black", "o")}
SEGMENTS = {"exploration": YELLOW, "integration": "#999999", "convergence": SKY}
SQUARE = (6.6, 5.8)  # inches
OUTLINE = [withStroke(linewidth=3.5, foreground="black")]  # With it a white line shows on every colour of a map.


# What two models are compared in: point, statistic and what is written beside the axis.
DIFFERENCES = (
    ("layer", "entropy", "entropy of the layer (nats)"),
    ("layer", "kl_to_final", "KL to its own π (nats)"),
    ("layer", "logprob", "log-prob of the next token"),
    ("ffn", "delta_entropy", "ΔH FFN (nats)"),
    ("layer", "rms", "rms of H^l"),
)


def save_figures(figures: dict[str, Figure], svgs: dict[str, bytes], folder: Path) -> list[Path]:
    """Write ``figures`` into ``folder`` as PNG, and what was drawn of them as SVG; return the files, each whole or not there."""
    paths = []
    for name, figure in figures.items():
        paths += [save_figure(figure, folder / f"{name}.png", "png"), folder / f"{name}.svg"]
        with replacing(paths[-1]) as partial:
            partial.write_bytes(svgs[name])
    return paths


def statistics_figures(statistics: Statistics) -> dict[str, Figure]:
    """Return the figures by name; one whose statistic or matrix is absent is left out.

    ====================  =========================================================================================
    entropy_flow          entropy after attention, FFN and layer, layer after layer, with the standard deviation over tokens
    delta_entropy         ΔH of attention, FFN and layer with 95 % intervals, the segments and the boundary layer
    residual_cosine       cosine of each module's output, and of the layer's, with the residual stream it is added to
    residual_norm         rms of A^l, F^l and H^l: without the final norm it is an inverse temperature of the internal policy
    divergence_to_final   KL between the internal policy of every layer and the final one, both ways
    layer_divergence      KL between the internal policies of any two layers
    layer_cosine          cosine of the residual streams of any two layers
    ====================  =========================================================================================
    """
    drawings = {
        "entropy_flow": ("entropy", _entropy_flow),
        "delta_entropy": ("delta_entropy", _delta_entropy),
        "residual_cosine": ("cosine", _residual_cosine),
        "residual_norm": ("rms", _residual_norm),
        "divergence_to_final": ("kl_to_final", _divergence_to_final),
    }
    measured = {statistic for _, statistic in statistics.curves}
    figures = {name: draw(statistics) for name, (statistic, draw) in drawings.items() if statistic in measured}
    if "kl" in statistics.matrices:
        figures["layer_divergence"] = _layer_divergence(statistics)
    if "cosine" in statistics.matrices:
        figures["layer_cosine"] = _layer_cosine(statistics)
    return figures


def difference_figure(difference: Statistics) -> Figure | None:
    """Draw, layer by layer, what the second of two models has more of; return None where nothing of :data:`DIFFERENCES` is there.

    ``difference`` is from :func:`bupo.analysis.statistics.estimate_difference`.
    """
    curves = difference.curves
    shown = [(curves[point, statistic], label) for point, statistic, label in DIFFERENCES if (point, statistic) in curves]
    if not shown:
        return None
    figure, panels = _figure(
        difference, "difference", _policies_and_interval(difference), height=1.2 + 1.5 * len(shown), panels=len(shown)
    )
    for axes, (curve, label) in zip(np.atleast_1d(panels), shown, strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        _draw(axes, curve, None, BLUE, "o")
        axes.set_ylabel(label, fontsize=8)
    np.atleast_1d(panels)[-1].set_xlabel("layer (0: embedding)")
    return figure


def draw_training(metrics: list[dict], path: Path) -> list[Path]:
    """Write :func:`training_figure` at ``path`` with the endings .png and .svg; return the files, each whole or not there.

    None are written where nothing was measured.
    """
    figure = training_figure(metrics)
    return [] if figure is None else _save(figure, path.with_suffix(""))


def training_figure(metrics: list[dict]) -> Figure | None:
    """Draw entropy of every layer and its KL to the final policy over the steps of a run; return None where no row has either.

    Rows without ``lens_entropy`` or ``lens_kl`` (numbers of H^0..H^L, None where not finite) are passed over. The layer that
    phase 1 optimises and the end of phase 1 are marked.
    """
    panels = [
        ("lens_entropy", "entropy of the internal policies", "nats", "viridis", False),
        ("lens_kl", "KL(internal ‖ final)", "nats", "cividis", True),
    ]
    panels = [panel for panel in panels if any(row.get(panel[0]) is not None for row in metrics)]
    if not panels:
        return None
    figure = Figure(figsize=(8, 0.8 + 3 * len(panels)), layout="constrained")
    columns = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (name, title, unit, colors, logarithmic) in zip(columns, panels, strict=True):
        rows = {row["step"]: row[name] for row in sorted(metrics, key=lambda row: row["step"]) if row.get(name) is not None}
        values = np.array(list(rows.values()), dtype=float).T  # [L + 1, steps]
        steps = np.array(list(rows), dtype=float)
        reach = np.diff(steps) / 2 if len(steps) > 1 else np.array([0.5])
        first, last = steps[0] - reach[0], steps[-1] + reach[-1]
        edges = np.concatenate([[first], (steps[1:] + steps[:-1]) / 2, [last]])
        norm = _log_norm(values) if logarithmic else Normalize(0)
        mesh = axes.pcolormesh(edges, np.arange(len(values) + 1) - 0.5, values, cmap=colors, norm=norm, rasterized=True)
        _color_bar(figure, mesh, axes, unit)
        _mark_phases(axes, metrics, first, last)
        axes.set(ylabel="layer", xlim=(first, last))
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("step")
    if handles := axes.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), facecolor="#999999", framealpha=1)
    return figure


def model_name(summary: dict[str, Any]) -> str:
    """Return the name of the model of an analysis: of a folder or file that is there the last part."""
    path = Path(summary["model"])
    return path.name if path.exists() else summary["model"]


def sources(summary: Mapping[str, Any]) -> str:
    """Return what an analysis is of and how many, such as "1 text"."""
    count, read = summary["responses"], summary.get("read", "responses")
    return f"{count:,} {read if count != 1 else read.removesuffix('s')}"


def segment_label(segment: dict) -> str:
    """Return the words for a segment of ``summary["boundary"]``, such as "exploration 1–6"."""
    first, last = segment["first"], segment["last"]
    return f"{segment['name']} {first}–{last}" if last > first else f"{segment['name']} {first}"


def _mark_phases(axes: Axes, metrics: list[dict], first: float, last: float) -> None:
    internal = [row for row in metrics if row["phase"] != "final"]
    style: dict[str, Any] = {"color": "white", "linewidth": 1.5, "path_effects": OUTLINE}
    for phase in dict.fromkeys(row["phase"] for row in internal):
        steps, layer = [row["step"] for row in internal if row["phase"] == phase], phase.rpartition(" ")[2]
        if layer.isdigit():
            start, end = max(min(steps) - 0.5, first), min(max(steps) + 0.5, last)
            axes.plot([start, end], [int(layer)] * 2, linestyle="-", label=f"phase 1: {phase}", **style)
    if 0 < len(internal) < len(metrics):
        axes.axvline(max(row["step"] for row in internal) + 0.5, linestyle=":", label="end of phase 1", **style)


def _entropy_flow(statistics: Statistics) -> Figure:
    figure, axes = _figure(statistics, "entropy flow", f"{_policies(statistics)}\nbands: ± 1 standard deviation over tokens")
    ceiling = np.log(statistics.summary["vocab"])
    # The places of the points on the way from layer l − 1 to l, layer l being at l.
    places = {"attention": -2 / 3, "ffn": -1 / 3, "layer": 0, "final": 2 / 3}
    flow = {point: statistics.curves[point, "entropy"] for point in places if (point, "entropy") in statistics.curves}
    layers = np.concatenate([curve.layers + places[point] for point, curve in flow.items()])
    order = np.argsort(layers)
    axes.plot(layers[order], np.concatenate([curve.mean for curve in flow.values()])[order], color="grey", linewidth=0.6, zorder=1)
    for point, curve in flow.items():
        name, color, marker = MODULES.get(point, ("final policy π (normed)", PURPLE, "D"))
        place = curve.layers + places[point]
        axes.plot(place, curve.mean, marker, color=color, markersize=_marker_size(layers), label=name)
        if len(place) > 1:
            low, high = np.maximum(curve.mean - curve.std, 0), np.minimum(curve.mean + curve.std, ceiling)
            axes.fill_between(place, low, high, color=color, alpha=0.15, linewidth=0)
        else:
            axes.errorbar(place, curve.mean, curve.std, color=color, capsize=2, linewidth=1)
    axes.axhline(ceiling, color="black", linestyle=":", linewidth=1, label=f"uniform: ln V = {ceiling:.2f}")
    axes.set(xlabel="layer (0: embedding)", ylabel="entropy (nats)")
    _layer_ticks(axes.xaxis)
    _legend(figure, axes)
    return figure


def _delta_entropy(statistics: Statistics) -> Figure:
    figure, panels = _figure(statistics, "change of entropy", _policies_and_interval(statistics), height=6.8, panels=3)
    boundary = statistics.summary["boundary"]
    for axes, (module, (name, color, marker)) in zip(panels, MODULES.items(), strict=True):
        for segment in boundary["segments"]:
            axes.axvspan(segment["first"] - 0.5, segment["last"] + 0.5, color=SEGMENTS[segment["name"]], alpha=0.25, linewidth=0)
        if boundary["layer"] is not None:
            axes.axvline(boundary["layer"], color=GREEN, linestyle="--", linewidth=1.2)
        axes.axhline(0, color="black", linewidth=0.8)
        if (module, "delta_entropy") in statistics.curves:
            _draw(axes, statistics.curves[module, "delta_entropy"], None, color, marker)
        axes.set_ylabel(f"ΔH {name} (nats)")
    axes.set_xlabel("layer")
    handles: list[Artist] = [
        Patch(color=SEGMENTS[segment["name"]], alpha=0.25, label=segment_label(segment)) for segment in boundary["segments"]
    ]
    if boundary["layer"] is not None:
        label = f"boundary layer {boundary['layer']} (in {boundary['confidence']:.0%} of resamples)"
        handles.append(Line2D([], [], color=GREEN, linestyle="--", linewidth=1.2, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _residual_cosine(statistics: Statistics) -> Figure:
    figure, axes = _figure(statistics, "cosine of updates with the residual stream", _interval(statistics))
    labels = {"attention": "cos(A^l, H^(l−1))", "ffn": "cos(F^l, H^(l−1) + A^l)", "layer": "cos(H^l, H^(l−1))"}
    axes.axhline(0, color="black", linewidth=0.8)
    _draw_modules(axes, statistics, "cosine", labels)
    axes.set(xlabel="layer", ylabel="cosine")
    _legend(figure, axes)
    return figure


def _residual_norm(statistics: Statistics) -> Figure:
    figure, axes = _figure(statistics, "size of the residual stream and its updates", _interval(statistics))
    labels = {"attention": "attention output A^l", "ffn": "FFN output F^l", "layer": "residual stream H^l"}
    _draw_modules(axes, statistics, "rms", labels)
    axes.set(xlabel="layer (0: embedding)", ylabel="root mean square")
    axes.set_yscale("log")
    _log_ticks(axes)
    _legend(figure, axes)
    return figure


def _divergence_to_final(statistics: Statistics) -> Figure:
    figure, axes = _figure(statistics, "divergence from the final policy", _policies_and_interval(statistics))
    for statistic, label, color, marker in (
        ("kl_to_final", "KL(internal ‖ final)", BLUE, "o"),
        ("kl_from_final", "KL(final ‖ internal)", VERMILION, "^"),
    ):
        if ("layer", statistic) in statistics.curves:
            curve = statistics.curves["layer", statistic]
            floored = [np.maximum(values, LEAST) for values in (curve.mean, curve.std, curve.low, curve.high)]
            _draw(axes, Curve(curve.layers, *floored), label, color, marker)
    axes.set(xlabel="layer (0: embedding)", ylabel="KL (nats)")
    axes.set_yscale("log")
    _log_ticks(axes)
    _legend(figure, axes)
    return figure


def _layer_divergence(statistics: Statistics) -> Figure:
    values = statistics.matrices["kl"]
    names = [*map(str, range(len(values) - 1)), "π"]
    figure, axes = _figure(statistics, "divergence between layers", _policies(statistics), *SQUARE)
    _draw_matrix(figure, axes, values, names, "cividis", _log_norm(values), "KL(row ‖ column), nats")
    axes.set(xlabel="layer (0: embedding, π: final policy)", ylabel="layer")
    return figure


def _layer_cosine(statistics: Statistics) -> Figure:
    values = statistics.matrices["cosine"]
    figure, axes = _figure(statistics, "cosine between layers", "raw residual streams", *SQUARE)
    norm = Normalize(min(0, np.nanmin(values)), 1)
    _draw_matrix(figure, axes, values, list(map(str, range(len(values)))), "viridis", norm, "cosine")
    axes.set(xlabel="layer (0: embedding)", ylabel="layer")
    return figure


def _draw_matrix(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,  # [n, n]
    names: list[str],  # [n]
    colors: str,
    norm: Normalize,
    unit: str,
) -> None:
    # It is an image in the SVG too, where as many rectangles would be a megabyte.
    image = axes.imshow(values, origin="lower", interpolation="nearest", cmap=colors, norm=norm)
    _color_bar(figure, image, axes, unit)
    axes.grid(False)
    last = len(values) - 1
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100) if len(values) <= 14 * step)
    ticks = [*(tick for tick in range(0, last, step) if tick + 0.7 * step <= last), last]
    labels = [names[tick] for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)


def _figure(statistics: Statistics, title: str, method: str, width: float = 8, height: float = 4.4, panels: int = 1) -> tuple:
    """Return a figure with its title, and its axes, an array of them where there are several."""
    figure = Figure(figsize=(width, height), layout="constrained")
    summary = statistics.summary
    model = model_name(summary) if len(model_name(summary)) <= 48 else "…" + model_name(summary)[-47:]
    counted = f"mean over {summary['tokens']:,} tokens of {sources(summary)}"
    figure.suptitle(f"{model}: {title}\n{counted}; {method}", fontsize=10, parse_math=False)
    axes = figure.subplots(panels, sharex=True)
    for panel in np.atleast_1d(axes):
        panel.grid(alpha=0.3)
    return figure, axes


def _policies(statistics: Statistics) -> str:
    if statistics.summary.get("translators"):
        return "internal policies through translators and the final norm"
    return f"internal policies {'through' if statistics.summary['final_norm'] else 'without'} the final norm"


def _interval(statistics: Statistics) -> str:
    return "bands: 95 % interval, responses resampled" if statistics.summary["responses"] > 1 else "one response: no intervals"


def _policies_and_interval(statistics: Statistics) -> str:
    return f"{_policies(statistics)}\n{_interval(statistics)}"


def _draw_modules(axes: Axes, statistics: Statistics, statistic: str, labels: dict[str, str]) -> None:
    for module, (_, color, marker) in MODULES.items():
        if (module, statistic) in statistics.curves:
            _draw(axes, statistics.curves[module, statistic], labels[module], color, marker)


def _draw(axes: Axes, curve: Curve, label: str | None, color: str, marker: str) -> None:
    size = _marker_size(curve.layers)
    axes.plot(curve.layers, curve.mean, color=color, marker=marker, markersize=size, linewidth=1.2, label=label)
    axes.fill_between(curve.layers, curve.low, curve.high, color=color, alpha=0.25, linewidth=0)
    _layer_ticks(axes.xaxis)


def _marker_size(layers: np.ndarray) -> float:
    return 4 if len(layers) <= 150 else 2.5


def _layer_ticks(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(18, integer=True, steps=[1, 2, 4, 5, 10]))


def _log_ticks(axes: Axes) -> None:
    """Put plain numbers on a logarithmic y axis, 2 and 5 between the powers of ten where there is room for them."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}" if high < 1000 * low else NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _log_norm(values: np.ndarray) -> LogNorm:
    """Return colours from the least value above :data:`LEAST` to the greatest; all below, as on the diagonal, has the lowest."""
    shown = values[np.isfinite(values) & (values > LEAST)]
    return LogNorm(shown.min(), shown.max(), clip=True) if shown.size else LogNorm(LEAST, 1, clip=True)


def _color_bar(figure: Figure, image: ScalarMappable, axes: Axes, unit: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=unit)
    if isinstance(image.norm, LogNorm):
        _log_ticks(bar.ax)


def _save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``figure`` as ``stem``.png and ``stem``.svg; return both."""
    return [save_figure(figure, stem.with_name(f"{stem.name}.{kind}"), kind) for kind in ("png", "svg")]
