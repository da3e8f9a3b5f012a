"""The section of :mod:`benchmarks.kernels`: contenders on one problem, and where another is faster than this library."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.drawing import GREY, ORANGE, Pictures, bars, figure_of, logarithmic, panels_of, slug, with_legend
from benchmarks.records import KERNEL, ORDER, Record, fastest, tables_of, that_ran
from benchmarks.text import MIB, cell, digits, not_measured, rates, slower, table, times, tiny, whole
from bupo.plots import BLUE, GREEN, PURPLE, SKY, VERMILION

TITLE = "Kernels"
HEADER = ("", "computes", "ms:", "× floor:", "TFLOP/s:", "peak MiB:", "stated MiB:")
HEADER += ("Δlogprob flat:", "peaked:", "Δ gradient flat:", "peaked:", "remark")
SHORT_HEADER, SHORT_NOTE = ("", "computes", "this library", "naive", "fastest peer"), ""
LOST_HEADER = ("", "computes", "this library", "the faster one", "why")
FLOOR = "times_floor", "x", " the floor"  # a measure, its unit and what it is of
KINDS = {"flat": "none", "peaked": "full"}  # distribution -> how its points are filled
MEASURES = {"max |Δlogprob|": ("logprobs",), "relative error of dH or dW, the larger": ("hidden", "weight")}  # label -> errors
LEAST_ERROR, LEAST_MIB = 1e-9, 0.01  # what is less, such as 0, is drawn there: the axes are logarithmic
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def worst_error(row: Record, distribution: str, names: Iterable[str]) -> float | None:
    """Return the largest of the named errors that were measured."""
    errors = row["errors"].get(distribution) or {}
    return max((errors[name] for name in names if errors.get(name) is not None), default=None)


def order_of(row: Record) -> tuple:
    """Return the key by which the rows of a table are sorted: by kind, then by time, those that did not run last."""
    kind = ORDER.index(row["who"]) if row["who"] in ORDER else len(ORDER)
    time = row["ms"] if row["reason"] is None else None
    return kind, time is None, time or 0, row["name"]


def main_model(rows: Iterable[Record]) -> str | None:
    """Return the model with the most tables in which anything ran, None where nothing did."""
    of_models = tables_of(that_ran(rows), ("model",))
    return max(of_models, key=lambda model: len(tables_of(of_models[model], KERNEL)), default=(None,))[0]


def headline(rows: list[Record]) -> list[Record]:
    """Return the table that stands for the others: in bfloat16, with all rows active, the most rows that naive logits took too;
    where there is none like that, what is nearest."""

    def weight(contenders: list[Record]) -> tuple:
        case, ran = contenders[0], {row["who"] for row in that_ran(contenders)}
        size = (case["rows"] or 0) * case["layers"]
        return "ours" in ran, case["dtype"] == "bfloat16", case["active"], "naive" in ran, size

    return max(tables_of(rows, KERNEL).values(), key=weight)


# ---- in words


def paragraphs(section: Record) -> Iterator[str]:
    """Yield a table of each problem, folded away by group, with :func:`losses`."""
    for (group,), rows in tables_of(section["rows"], ("group",)).items():
        tables = tables_of(rows, KERNEL).values()
        yield f"<details>\n<summary>{cell(group)}: {len(tables)} table{'s' * (len(tables) > 1)}</summary>"
        for contenders in tables:
            case = contenders[0]
            shape = f"V = {whole(case['vocab'])}, D = {whole(case['width'])}, {case['dtype']}"
            timed = f", timed on {case['distribution']} logits" if case["distribution"] else ""
            yield f"**{_case(case)}**, {shape}{timed}. {rates(section, case['dtype'])}."
            yield table(HEADER, map(_cells, sorted(contenders, key=order_of)))
            yield from losses(contenders)
        yield "</details>"


def _case(row: Record) -> str:
    layers = f"{row['layers']} layers of " if row["layers"] > 1 else ""
    share = "" if row["active"] == 1 else f", {row['active']:.0%} of them active"
    return f"{row['model']}, {layers}{whole(row['rows'])} rows{share}"


def _cells(row: Record) -> list[str]:
    name, computes = f"**{row['name']}**" if row["who"] == "ours" else row["name"], row["computes"] or "–"
    if row["reason"] is not None:
        return [name, computes, *["–"] * 9, not_measured(row)]
    speed = [digits(row[measure]) for measure in ("ms", "times_floor", "useful_tflops")]
    memory = [digits(row[measure], MIB) for measure in ("peak_bytes", "stated_bytes")]
    errors = [tiny(worst_error(row, kind, names)) for names in MEASURES.values() for kind in KINDS]
    return [name, computes, *speed, *memory, *errors, row["remark"] or ""]


def losses(contenders: list[Record]) -> Iterator[str]:
    """Yield a sentence for each thing that another of one table's ``contenders`` computes faster than this library's fastest, with
    what it costs the other. Who computes more counts as well."""
    for computes, own, other in _lost(contenders):
        measure, unit, floor = ("ms", " ms", "") if None in (own["times_floor"], other["times_floor"]) else FLOOR
        costs = [f"{digits(own[measure])}{unit}{floor} against {digits(other[measure])}{unit}"]
        costs += [f"peak {digits(own['peak_bytes'], MIB)} against {digits(other['peak_bytes'], MIB)} MiB"]
        for kind in KINDS:
            errors = [worst_error(row, kind, ["logprobs"]) for row in (own, other)]
            costs += [] if None in errors else [f"max |Δlogprob| {kind} {tiny(errors[0])} against {tiny(errors[1])}"]
        costs += [f"{row['name']}: {row['remark']}" for row in (own, other) if row["remark"]]
        yield f"**Slower here:** {cell(own['name'])} ({computes}) than {cell(other['name'])}: {cell('; '.join(costs))}."


def _lost(contenders: list[Record]) -> Iterator[tuple[str, Record, Record]]:
    """Yield what another of one table's ``contenders`` computes faster than this library, with the fastest of either."""
    for computes, ours, naive, peers in _comparable(contenders):
        own, other = fastest(ours), fastest([*naive, *peers])
        if own is None or other is None:
            continue
        measure = "ms" if None in (own["times_floor"], other["times_floor"]) else "times_floor"
        if slower(own, other, measure):
            yield computes, own, other


def lost(rows: list[Record]) -> Iterator[list[str]]:
    """Yield the lines below :data:`LOST_HEADER`: what another computes faster, in any table, and what explains it."""
    for contenders in tables_of(rows, KERNEL).values():
        case = contenders[0]
        for computes, own, other in _lost(contenders):
            speed = [f"{row['name']}: {digits(row['ms'])} ms, {times(row['times_floor'])}" for row in (own, other)]
            yield [f"{case['group']}: {_case(case)}, {case['dtype']}", computes, *speed, _why(own, other)]


def _why(own: Record, other: Record) -> str:
    """Return what the records have to explain that ``other`` is faster."""
    products, fewer = own["algorithm_products"], other["algorithm_products"]
    memory = f"{digits(other['peak_bytes'], MIB)} MiB against {digits(own['peak_bytes'], MIB)}"
    if products and fewer and products > fewer:
        why = f"{products:g} products against {fewer:g}: logits are formed again, which it keeps ({memory})"
    else:
        why = f"the same products at a lower rate, or what is beside them (it has {memory})"
    return "; ".join([why, *(f"{row['name']}: {row['remark']}" for row in (own, other) if row["remark"])])


def _comparable(contenders: list[Record]) -> Iterator[tuple[str, list[Record], list[Record], list[Record]]]:
    """Yield what this library computes, with its rows, and the naive ones and the peers' that compute that, or more."""
    for computes in dict.fromkeys(row["computes"] or "" for row in contenders if row["who"] == "ours"):
        able = [row for row in contenders if set((row["computes"] or "").split(", ")) >= set(computes.split(", "))]
        ours, naive, peers = ([row for row in able if row["who"] == who] for who in ("ours", "naive", "peer"))
        yield computes, [row for row in ours if (row["computes"] or "") == computes], naive, peers


def in_short(rows: list[Record], every_model: bool) -> Iterator[list[str]]:
    """Yield the lines below :data:`SHORT_HEADER`: the headlines of every model, or of the :func:`main_model`."""
    model = main_model(rows)
    shown = [row for row in rows if every_model or row["model"] == model]
    for contenders in map(headline, tables_of(shown, ("model", "group")).values()):
        case = contenders[0]
        for computes, *kinds in _comparable(contenders):
            yield [f"{case['group']}: {_case(case)}, {case['dtype']}", computes or "–", *map(_speed, kinds)]


def beside(rows: list[Record]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield, for every headline, what it is of, and × floor of this library's fastest, and of the naive one and the peer."""
    for contenders in map(headline, tables_of(rows, ("model", "group")).values()):
        case = contenders[0]
        for computes, *kinds in _comparable(contenders):
            best = [row and row["times_floor"] for row in map(fastest, kinds)]
            yield (f"{case['group']}: {_case(case)}, {case['dtype']}", computes or "–"), " / ".join(map(times, best))


def _speed(rows: list[Record]) -> str:
    """Return the numbers of the fastest, or why there are none."""
    if row := fastest(rows):
        memory = f"{digits(row['peak_bytes'], MIB)} MiB"
        return f"{row['name']}: {times(row['times_floor'])}, {digits(row['useful_tflops'])} TFLOP/s, {memory}"
    reasons = list(dict.fromkeys(not_measured(row) for row in rows if row["reason"]))
    return "–" if not reasons else reasons[0] if len(reasons) == 1 else "none ran"


# ---- in pictures


def pictures(rows: list[Record], device: str) -> Pictures:
    """Yield time, memory and errors of the :func:`main_model` by dtype, with the most active rows."""
    ran = that_ran(rows)
    model = main_model(ran)
    for (dtype,), of_dtype in tables_of((row for row in ran if row["model"] == model), ("dtype",)).items():
        most = max(row["active"] for row in of_dtype)
        title = f"{device}\n{model}, {dtype}" + ("" if most == 1 else f", {most:.0%} of the rows active")
        rows = [row for row in of_dtype if row["active"] == most]
        floors = {(row["group"], row["rows"]): row["ms_of_rounds"] for row in rows if row["who"] == "floor"}
        contenders = [row for row in rows if row["who"] != "floor"]
        styles = _styles(contenders)
        for what, measure in (("time", "times_floor"), ("memory", "peak_bytes")):
            shown = [row for row in contenders if row[measure] is not None]
            if len({row["rows"] for row in shown}) > 1:
                yield f"-{slug(dtype)}-{what}", partial(_draw_sizes, shown, title, styles, floors if what == "time" else None)
        if shown := [row for row in contenders if _measures([row])]:
            yield f"-{slug(dtype)}-errors", partial(_draw_errors, shown, title)


def _styles(rows: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Return the styles of lines by contender: this library's stand out, and peers have one colour a library."""
    colors, others = {"ours": BLUE, "naive": "black"}, cycle((VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY))
    members, styles = Counter[str](), {}
    for name, who in {row["name"]: row["who"] for row in rows}.items():
        family = who if who in colors else name.split()[0]
        color = colors.get(family) or colors.setdefault(family, next(others))
        place, (width, size, order) = members[family] % len(DASHES), (2.4, 4.5, 4) if who == "ours" else (1.1, 3.5, 3)
        members[family] += 1
        style = {"color": color, "linestyle": DASHES[place], "marker": "osD^vP"[place], "zorder": order}
        styles[name] = style | {"linewidth": width, "markersize": size}
    return styles


def _draw_sizes(rows: list[Record], title: str, styles: dict[str, dict[str, Any]], floors: dict[tuple, list] | None) -> Figure:
    """Draw a panel of each group, with a line of each contender over the rows: peak memory, or time in units of the floor, where
    ``floors`` has the milliseconds of the floor's rounds by group and rows."""
    memory, time = "peak memory beyond inputs and results", "time in units of the bare products (bars: range of the rounds)"
    groups, names = tables_of(rows, ("group",)), [row["name"] for row in sorted(rows, key=lambda row: order_of(row)[0])]
    height = 2.9 * math.ceil(len(groups) / 2) + 0.9 + 0.1 * len(set(names))
    figure, handles = figure_of(f"{title}: {memory if floors is None else time}", 4.2 * min(2, len(groups)) + 0.4, height), {}
    for axes, of_group in zip(panels_of(figure, [group for (group,) in groups]).values(), groups.values(), strict=True):
        axes.set(xlabel="rows", ylabel="MiB" if floors is None else "× floor", yscale="log")
        axes.set_title(of_group[0]["group"], fontsize=9, loc="left")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if floors is not None:
            handles["floor: bare GEMM"] = axes.axhline(1, color="grey", linewidth=1.2)
        for (name,), line in tables_of(of_group, ("name",)).items():
            line = sorted(line, key=lambda row: row["rows"])
            sizes = [row["rows"] for row in line]
            if floors is None:
                (handles[name],) = axes.plot(sizes, [max(row["peak_bytes"] / MIB, LEAST_MIB) for row in line], **styles[name])
            else:
                rounds = [(row["ms_of_rounds"], floors.get((row["group"], row["rows"]), [])) for row in line]
                ratios = [[a / b for a, b in zip(*pair, strict=True)] if len(pair[0]) == len(pair[1]) else [] for pair in rounds]
                medians = [row["times_floor"] for row in line]
                handles[name] = axes.errorbar(sizes, medians, bars(medians, ratios), label=name, elinewidth=0.8, **styles[name])
        logarithmic(axes, {row["rows"] for row in rows})
    return with_legend(figure, {name: handles[name] for name in ("floor: bare GEMM", *names) if name in handles})


def _measures(rows: list[Record]) -> dict[str, tuple[str, ...]]:
    """Return those of :data:`MEASURES` that any of the rows has."""

    def measured(names: tuple[str, ...]) -> bool:
        return any(worst_error(row, kind, names) is not None for row in rows for kind in KINDS)

    return {label: names for label, names in MEASURES.items() if measured(names)}


def _draw_errors(rows: list[Record], title: str) -> Figure:
    """Draw the errors of a group's headline, the group being the first with the most of :data:`MEASURES`."""
    table = max(map(headline, tables_of(rows, ("group",)).values()), key=lambda table: len(_measures(table)))
    measures, shown = _measures(table), sorted(table, key=order_of, reverse=True)
    title = f"{title}: errors against float64, {table[0]['group']}, {whole(table[0]['rows'])} rows"
    figure = figure_of(title, 8.4, 1.6 + 0.27 * len(shown))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (label, names) in zip(panels, measures.items(), strict=True):
        for place, row in enumerate(shown):
            color, size = (BLUE, 8) if row["who"] == "ours" else ("black", 6)
            for kind, filled in KINDS.items():
                if (error := worst_error(row, kind, names)) is not None:
                    axes.plot(max(error, LEAST_ERROR), place, "o", color=color, fillstyle=filled, markersize=size)
        low, high = axes.dataLim.intervalx
        axes.set(xlabel=label, xscale="log")
        axes.set_xlim(10 ** math.floor(math.log10(low) - 0.1), 10 ** math.ceil(math.log10(high) + 0.1))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8.5)
    for tick, row in zip(panels[0].get_yticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if row["who"] == "ours" else "normal")
    points = {kind: panels[0].plot([], [], "o", color="grey", fillstyle=filled)[0] for kind, filled in KINDS.items()}
    return with_legend(figure, points)
