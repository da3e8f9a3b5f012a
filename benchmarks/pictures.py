"""Pictures of the results, drawn for :mod:`benchmarks.report`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from benchmarks.rows import (
    AXES,
    KINDS,
    MEASURES,
    NAIVE_STEP,
    OUR_STEP,
    STEP,
    Results,
    Row,
    device_of,
    digits,
    formula,
    headline,
    machines,
    main_model,
    order_of,
    rows_of,
    step_case,
    step_headlines,
    tables_of,
    that_ran,
    whole,
    worst_error,
)
from bupo.plots import BLUE, GREEN, PURPLE, SKY, VERMILION

ORANGE, GREY = "#E69F00", "#999999"
LEAST_ERROR, LEAST_MIB = 1e-9, 0.01  # what is less, such as 0, is drawn there: the axes are logarithmic
STEP_COLORS = {
    NAIVE_STEP: "black",
    f"{NAIVE_STEP}, truncated": GREY,
    "naive, one head": GREY,
    f"{OUR_STEP}, not truncated": SKY,
    OUR_STEP: BLUE,
}


def figures(results: Results) -> dict[str, Callable[[], Figure]]:
    """What draws each picture, by its name; kernels only of the :func:`main_model` with the most active rows."""
    found: dict[str, Callable[[], Figure]] = {}
    for name, sections in machines(results).items():
        device = device_of(name, sections)
        ran = that_ran(rows_of(sections, "kernels"))
        model = main_model(ran)
        for (dtype,), rows in tables_of((row for row in ran if row.get("model") == model), ("dtype",)).items():
            most = max(row.get("active") or 1.0 for row in rows)
            rows = [row for row in rows if (row.get("active") or 1.0) == most]
            title = f"{device}\n{model}, {dtype}" + ("" if most == 1 else f", {most:.0%} of the rows active")
            contenders = [row for row in rows if row.get("who") != "floor"]
            floors = {(row["group"], row["rows"]): row.get("ms_of_rounds") or [] for row in rows if row.get("who") == "floor"}
            styles, stem = _styles(contenders), f"{name}-kernels-{_slug(dtype)}"
            for what, measure, draw in (
                ("time", "times_floor", partial(_draw_time, floors)),
                ("memory", "peak_bytes", _draw_memory),
            ):
                drawn = [row for row in contenders if row.get(measure) is not None]
                if len({row["rows"] for row in drawn}) > 1:
                    found[f"{stem}-{what}"] = partial(draw, drawn, title, styles)
            if drawn := [row for row in contenders if _measures([row])]:
                found[f"{stem}-errors"] = partial(_draw_errors, drawn, title)
        for (model,), rows in tables_of(rows_of(sections, "step"), ("model",)).items():
            if that_ran(rows, "seconds"):
                found[f"{name}-step-{_slug(model)}"] = partial(_draw_step, rows, f"{device}\n{model}")
        if rows := [row for row in rows_of(sections, "scaling") if that_ran(row.get("points") or [])]:
            found[f"{name}-scaling"] = partial(_draw_scaling, rows, device)
    return found


def _measures(rows: list[Row]) -> dict[str, tuple[str, ...]]:
    """Those of :data:`MEASURES` that any of the rows has."""
    return {
        label: names
        for label, names in MEASURES.items()
        if any(worst_error(row, kind, *names) is not None for row in rows for kind in KINDS)
    }


def _slug(text: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")


def alternative_text(stem: str) -> str:
    what = {"time": "time in units of the floor", "memory": "peak memory", "errors": "errors against float64", "scaling": "scaling"}
    return what.get(stem.rpartition("-")[2], "speed and memory of a training step")


def _styles(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Of lines by contender: this library's stand out, and peers have one colour a library."""
    dashes = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
    colors = {"ours": BLUE, "naive": "black"}
    others, members, styles = cycle((VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)), Counter(), {}
    for name, who in {row["name"]: row.get("who") for row in rows}.items():
        family = who if who in colors else name.split()[0]
        color = colors.get(family) or colors.setdefault(family, next(others))
        place, emphasis = members[family] % len(dashes), who == "ours"
        members[family] += 1
        style = {"color": color, "linestyle": dashes[place], "marker": "osD^vP"[place], "zorder": 4 if emphasis else 3}
        styles[name] = style | {"linewidth": 2.4 if emphasis else 1.1, "markersize": 4.5 if emphasis else 3.5}
    return styles


def _panels(rows: list[Row], title: str, label: str) -> tuple[Figure, dict[str, Axes]]:
    """A figure over the rows, and the panel of each group; :func:`_finish` it when all is drawn."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    columns = min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    names = {row["name"] for row in rows}
    figure = Figure(figsize=(4.2 * columns + 0.4, 2.9 * lines + 0.9 + 0.1 * len(names)), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    places = figure.subplots(lines, columns, squeeze=False).flat
    panels = dict(zip(groups, places, strict=False))
    for group, axes in panels.items():
        axes.set_title(group, fontsize=9, loc="left")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.set(xlabel="rows", ylabel=label)
    for axes in places:  # what zip has left
        figure.delaxes(axes)
    return figure, panels


def _finish(figure: Figure, rows: list[Row], panels: Iterable[Axes]) -> Figure:
    """Ticks, and a legend of the contenders in the tables' order."""
    order = [row["name"] for row in sorted(rows, key=lambda row: order_of(row)[0])]
    handles: dict[str, Any] = {}
    for axes in panels:
        _plain_ticks(axes)
        _ticks_at(axes, {row["rows"] for row in rows})
        of_panel, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, of_panel, strict=True))
    names = sorted(handles, key=lambda name: order.index(name) if name in order else -1)
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5, 7) if high < 15 * low else (2, 5)))
    axes.yaxis.set_minor_formatter("{x:,g}" if high < 300 * low else NullFormatter())


def _ticks_at(axes: Axes, values: Iterable[float]) -> None:
    """At most seven of the measured sizes, the least and the greatest among them."""
    values = sorted(values)
    step = math.ceil((len(values) - 1) / 6) or 1
    shown = sorted({*values[::-1][::step]})
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FixedFormatter([_short(value) for value in shown]))


def _short(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}Ki"
    return f"{value / 1000:.3g}k" if value >= 10000 else f"{value:g}"


def _by_contender(rows: list[Row], group: str) -> Iterator[tuple[str, list[Row]]]:
    """The lines of a panel, along the rows."""
    for (name,), line in tables_of((row for row in rows if row["group"] == group), ("name",)).items():
        yield name, sorted(line, key=lambda row: row["rows"])


def _draw_time(floors: dict[tuple[str, int], list[float]], rows: list[Row], title: str, styles: dict[str, dict]) -> Figure:
    """``floors``: milliseconds of the floor's rounds, by group and rows."""
    figure, panels = _panels(rows, f"{title}: time in units of the bare products (bars: range of the rounds)", "× floor")
    for group, axes in panels.items():
        axes.axhline(1, color="grey", linewidth=1.2, label="floor: bare GEMM")
        for name, line in _by_contender(rows, group):
            ratios = [row["times_floor"] for row in line]
            bars = _bars(ratios, [_ratios(row.get("ms_of_rounds") or [], floors.get((group, row["rows"]), [])) for row in line])
            axes.errorbar([row["rows"] for row in line], ratios, bars, label=name, elinewidth=0.8, **styles[name])
    return _finish(figure, rows, panels.values())


def _ratios(rounds: list[float], of_floor: list[float]) -> list[float]:
    """× floor of each round; empty where the rounds are not those of the floor."""
    return [a / b for a, b in zip(rounds, of_floor, strict=True)] if len(rounds) == len(of_floor) else []


def _bars(medians: list[float], rounds: list[list[float]]) -> list[list[float]]:
    """Down to the least and up to the greatest of the rounds, as ``errorbar`` has it."""
    down = [max(0, median - min(of, default=median)) for median, of in zip(medians, rounds, strict=True)]
    up = [max(0, max(of, default=median) - median) for median, of in zip(medians, rounds, strict=True)]
    return [down, up]


def _draw_memory(rows: list[Row], title: str, styles: dict[str, dict]) -> Figure:
    figure, panels = _panels(rows, f"{title}: peak memory beyond inputs and results", "MiB")
    for group, axes in panels.items():
        for name, line in _by_contender(rows, group):
            sizes = [max(row["peak_bytes"] / 2**20, LEAST_MIB) for row in line]
            axes.plot([row["rows"] for row in line], sizes, label=name, **styles[name])
    return _finish(figure, rows, panels.values())


def _draw_errors(rows: list[Row], title: str) -> Figure:
    """Of a group with gradients if there is one, at its headline."""
    tables = [headline(of_group) for of_group in tables_of(rows, ("group",)).values()]
    table = max(tables, key=lambda table: len(_measures(table)))
    measures, shown = _measures(table), sorted(table, key=order_of, reverse=True)
    figure = Figure(figsize=(8.4, 1.6 + 0.27 * len(shown)), layout="constrained")
    what = f"errors against float64, {table[0]['group']}, {whole(table[0].get('rows'))} rows"
    figure.suptitle(f"{title}: {what}", fontsize=10, parse_math=False)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (label, names) in zip(panels, measures.items(), strict=True):
        for place, row in enumerate(shown):
            emphasis = row.get("who") == "ours"
            for kind, filled in KINDS.items():
                if (error := worst_error(row, kind, *names)) is not None:
                    color, size = (BLUE, 8) if emphasis else ("black", 6)
                    axes.plot(max(error, LEAST_ERROR), place, "o", color=color, fillstyle=filled, markersize=size)
        low, high = axes.dataLim.intervalx
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(low) - 0.1), 10 ** math.ceil(math.log10(high) + 0.1))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8.5)
    for tick, row in zip(panels[0].get_yticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if row.get("who") == "ours" else "normal")
    handles = [panels[0].plot([], [], "o", color="grey", fillstyle=filled)[0] for filled in KINDS.values()]
    figure.legend(handles, list(KINDS), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _draw_step(rows: list[Row], title: str) -> Figure:
    """Every layer of the headlines' phases, tokens and contexts, a group of bars each."""
    of_case = tables_of(rows, [key for key in STEP if key != "layer"])
    cases = [of for of in of_case.values() if any(sides[0] in of for sides in step_headlines(rows))]
    steps = [sides for of in cases for sides in tables_of(of, ("layer",)).values()]
    names = list(dict.fromkeys(row["name"] for sides in steps for row in sides))
    colors = dict(zip(names, cycle((VERMILION, GREEN, PURPLE, ORANGE)), strict=False)) | STEP_COLORS
    figure = Figure(figsize=(8.4, 1.4 + sum(0.25 * len(sides) + 0.3 for sides in steps)), layout="constrained")
    figure.suptitle(f"{title}: a training step", fontsize=10, parse_math=False)
    panels = figure.subplots(1, 2, sharey=True)
    handles, labels, place = {}, {}, 0
    for sides in steps:
        labels[place + (len(sides) - 1) / 2] = step_case(sides[0]).replace(", ", "\n")
        for row in sides:
            for axes, measure, unit in zip(panels, ("tokens_per_second", "peak_bytes"), (1, 2**30), strict=True):
                ran = row.get("reason") is None and row.get(measure) is not None
                value = row[measure] / unit if ran else 0
                handles[row["name"]] = axes.barh(place, value, color=colors[row["name"]], height=0.85)
                axes.annotate(f" {digits(value)}" if ran else " not measured", (value, place), va="center", fontsize=8)
            place += 1
        place += 1
    panels[0].set_yticks(list(labels), list(labels.values()), fontsize=8.5)
    panels[0].invert_yaxis()
    for axes, label in zip(panels, ("tokens/s", "peak GiB beyond weights and optimizer state"), strict=True):
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1.18 * axes.dataLim.xmax or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,g}")
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _draw_scaling(rows: list[Row], title: str) -> Figure:
    of_axes = tables_of(rows, ("axis",))
    names = list(dict.fromkeys(_call(row) for row in rows))
    colors = dict(zip(names, cycle((BLUE, VERMILION, GREEN, PURPLE, ORANGE, "black")), strict=False))
    columns, lines = min(2, len(of_axes)), math.ceil(len(of_axes) / 2)
    height = 1 + (2.5 + 0.16 * max(map(len, of_axes.values()))) * lines + 0.1 * len(names)
    figure = Figure(figsize=(4.4 * columns + 0.2, height), layout="constrained")
    figure.suptitle(f"{title}:\nmedians with the range of the rounds, and fitted lines", fontsize=10, parse_math=False)
    places = figure.subplots(lines, columns, squeeze=False).flat
    handles = {}
    for (axis,), of_axis in of_axes.items():
        axes = next(places)
        for number, row in enumerate(of_axis):
            color, height = colors[_call(row)], 5 + 11 * (len(of_axis) - 1 - number)
            handles[_call(row)] = _draw_fit(axes, row, color)
            axes.annotate(formula(row), (0, 1), (2, height), "axes fraction", "offset points", fontsize=8.5, color=color)
        axes.set(xlabel=AXES.get(axis, axis), ylabel="ms")
        axes.grid(alpha=0.3)
        if axis in ("rows", "vocab", "width"):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _plain_ticks(axes)
            _ticks_at(axes, {point["value"] for row in of_axis for point in that_ran(row["points"])})
        else:
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=axis == "layer"))
    for axes in places:  # what the loop has left
        figure.delaxes(axes)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _call(row: Row) -> str:
    return f"{row['contender']}, {row['dtype']}" if row.get("dtype") else row["contender"]


def _draw_fit(axes: Axes, row: Row, color: str) -> Any:
    """Returns what stands for it in a legend."""
    points = sorted(that_ran(row["points"]), key=lambda point: point["value"])
    places, medians = [point["value"] for point in points], [point["ms"] for point in points]
    bars = _bars(medians, [point.get("ms_of_rounds") or [] for point in points])
    handle = axes.errorbar(places, medians, bars, fmt="o", markersize=4, elinewidth=0.9, color=color)
    fit = row.get("fit") or {}
    if fit.get("tflops") and fit.get("fixed_ms") is not None:
        fitted = [fit["fixed_ms"] + point["flops"] / fit["tflops"] / 1e9 for point in points]
        axes.plot(places, fitted, color=color, linewidth=1.2)
    return handle
