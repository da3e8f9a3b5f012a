"""The section of :mod:`benchmarks.scaling`: time against the size of the problem, with fitted lines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.drawing import ORANGE, Pictures, bars, figure_of, logarithmic, panels_of, with_legend
from benchmarks.records import Record, tables_of, that_ran
from benchmarks.text import digits, table, whole
from bupo.plots import BLUE, GREEN, PURPLE, VERMILION

TITLE = "Scaling"
HEADER = ("against", "from, to", "call", "dtype", "fixed", "fitted line", "r²:")
AXES = {"rows": "rows N", "vocab": "vocabulary V", "width": "width D", "active": "share of active rows", "layer": "layer l"}


def formula(row: Record) -> str:
    """Return the fitted line: FLOPs as ``explain`` counts them at the fitted rate, and what is there whatever their number."""
    fit = row["fit"]
    if fit.get("tflops") is None or fit.get("fixed_ms") is None:
        return "no fit"
    sizes = [{"active": 1.0, **row["fixed"], row["axis"]: point["value"]} for point in row["points"]]
    products = [math.prod(size.get(name, math.nan) for name in ("rows", "active", "vocab", "width")) for size in sizes]
    factors = [point["flops"] / product for point, product in zip(row["points"], products, strict=True)]
    factor = f"{factors[-1]:.0f}"  # "nan" where a size is not known
    same = all(abs(each - float(factor)) <= 0.01 * float(factor) for each in factors)
    flops = f"{factor}·{'active·' if row['axis'] == 'active' else ''}N·V·D" if same else "FLOPs"
    return f"{digits(fit['fixed_ms'])} ms + {flops} / {digits(fit['tflops'])} TFLOP/s"


def paragraphs(section: Record) -> Iterator[str]:
    """Yield the table."""
    yield table(HEADER, map(_cells, section["rows"]))


def _cells(row: Record) -> list[str]:
    values, quality = [point["value"] for point in row["points"]], row["fit"]["r2"]
    axis, sizes = AXES.get(row["axis"], row["axis"]), f"{whole(min(values))}, {whole(max(values))}" if values else "–"
    fixed = ", ".join(f"{name} {whole(value)}" for name, value in row["fixed"].items())
    fitted = [formula(row), "–" if quality is None else f"{quality:.4f}"]
    return [axis, sizes, row["contender"], row["dtype"] or "–", fixed, *fitted]


def pictures(rows: list[Record], device: str) -> Pictures:
    """Yield the one picture."""
    if ran := [row for row in rows if that_ran(row["points"])]:
        yield "", partial(_draw, ran, f"{device}:\nmedians with the range of the rounds, and fitted lines")


def _draw(rows: list[Record], title: str) -> Figure:
    """Draw a panel of each axis, with the points and the fitted line of each call."""
    of_axes = tables_of(rows, ("axis",))
    handles: dict[str, Any] = {}
    colors = dict(zip(dict.fromkeys(map(_call, rows)), cycle((BLUE, VERMILION, GREEN, PURPLE, ORANGE, "black")), strict=False))
    height = 1 + (2.5 + 0.16 * max(map(len, of_axes.values()))) * math.ceil(len(of_axes) / 2) + 0.1 * len(colors)
    figure = figure_of(title, 4.4 * min(2, len(of_axes)) + 0.2, height)
    for (axis, axes), calls in zip(panels_of(figure, [axis for (axis,) in of_axes]).items(), of_axes.values(), strict=True):
        for number, row in enumerate(calls):
            color, above = colors[_call(row)], 5 + 11 * (len(calls) - 1 - number)
            handles[_call(row)] = _draw_fit(axes, row, color)
            axes.annotate(formula(row), (0, 1), (2, above), "axes fraction", "offset points", fontsize=8.5, color=color)
        axes.set(xlabel=AXES.get(axis, axis), ylabel="ms")
        axes.grid(alpha=0.3)
        if axis in ("rows", "vocab", "width"):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            logarithmic(axes, {point["value"] for row in calls for point in that_ran(row["points"])})
        else:
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=axis == "layer"))
    return with_legend(figure, handles)


def _call(row: Record) -> str:
    return ", ".join(filter(None, (row["contender"], row["dtype"])))


def _draw_fit(axes: Axes, row: Record, color: str) -> Any:
    """Draw points and fitted line, and return what stands for them in a legend."""
    points, fit = sorted(that_ran(row["points"]), key=lambda point: point["value"]), row["fit"]
    sizes, medians = [point["value"] for point in points], [point["ms"] for point in points]
    ranges = bars(medians, [point["ms_of_rounds"] for point in points])
    handle = axes.errorbar(sizes, medians, ranges, fmt="o", markersize=4, elinewidth=0.9, color=color)
    if fit["tflops"] and fit["fixed_ms"] is not None:
        axes.plot(sizes, [fit["fixed_ms"] + point["flops"] / fit["tflops"] / 1e9 for point in points], color=color, linewidth=1.2)
    return handle
