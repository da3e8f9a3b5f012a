"""The section of ``bupo bench``: a training step, against the logit lens as the paper's released code has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.drawing import GREY, ORANGE, Pictures, figure_of, slug, with_legend
from benchmarks.records import STEP, Record, fastest, tables_of, that_ran
from benchmarks.text import GIB, cell, digits, not_measured, rates, slower, table, times, tiny, whole
from bupo.plots import BLUE, GREEN, PURPLE, SKY, VERMILION

TITLE = "Training step"
NAIVE, OURS = "naive logit lens", "bupo"
HEADER = ("", "", "tokens/s:", "× naive:", "peak GiB:", "of naive:", "loss:", "Δ gradient:", "remark")
SHORT_HEADER = ("", NAIVE, OURS, "times as fast", "of its memory")
SHORT_NOTE = " Memory is beyond weights and optimizer state."
COLORS = {NAIVE: "black", f"{NAIVE}, truncated": GREY, "naive, one head": GREY, f"{OURS}, not truncated": SKY, OURS: BLUE}


def side_of(sides: Iterable[Record], name: str) -> Record | None:
    """Return the side of a step that has this name, None where it did not run."""
    return next((row for row in that_ran(sides, "seconds") if row["name"] == name), None)


def headlines(rows: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield, of every model and phase, the step of the most tokens that both sides took, the first where several are."""

    def weight(sides: list[Record]) -> tuple[bool, int]:
        return side_of(sides, NAIVE) is not None, (sides[0]["sequences"] or 0) * (sides[0]["length"] or 0)

    for steps in tables_of(rows, ("model", "phase")).values():
        yield max(tables_of(steps, STEP).values(), key=weight)


# ---- in words


def paragraphs(section: Record) -> Iterator[str]:
    """Yield a table of each model, with :func:`losses`."""
    for (model, dtype, recomputed), rows in tables_of(section["rows"], ("model", "dtype", "checkpointing")).items():
        steps = tables_of(rows, STEP).values()
        yield f"**{cell(model)}**, {dtype}, activations {'recomputed' if recomputed else 'kept'}. {rates(section, dtype)}."
        yield table(HEADER, [_cells(row, side_of(sides, NAIVE)) for sides in steps for row in sides])
        for sides in steps:
            yield from losses(sides)


def _case(row: Record) -> str:
    layer = "" if row["layer"] is None else f", layer {row['layer']} of {row['layers']}"
    return f"phase {row['phase']}{layer}, {row['sequences']} x {whole(row['length'])} tokens"


def _cells(row: Record, naive: Record | None) -> list[str]:
    name = f"**{row['name']}**" if row["name"] == OURS else row["name"]
    speed, memory = digits(row["tokens_per_second"]), digits(row["peak_bytes"], GIB)
    faster, smaller = _against(row, naive)
    loss = "–" if row["loss"] is None else f"{row['loss']:.4g}"
    return [_case(row), name, speed, faster, memory, smaller, loss, tiny(row["gradient_difference"]), not_measured(row)]


def _against(row: Record | None, naive: Record | None) -> list[str]:
    """Return speed and memory in units of those of the naive side."""
    pairs = [(row[name], naive[name]) if row and naive else (None, None) for name in ("tokens_per_second", "peak_bytes")]
    speed, memory = (own / other if own is not None and other else None for own, other in pairs)
    return [times(speed), digits(memory)]


def losses(sides: list[Record]) -> Iterator[str]:
    """Yield a sentence where another side of the same step took less time than this library."""
    own, other = side_of(sides, OURS), fastest((row for row in sides if row["name"] != OURS), "seconds")
    if own and other and slower(own, other, "seconds"):
        seconds = f"{digits(own['seconds'])} s against {digits(other['seconds'])} s"
        memory = f"peak {digits(own['peak_bytes'], GIB)} against {digits(other['peak_bytes'], GIB)} GiB"
        yield f"**Slower here:** {_case(own)}: {OURS} than {cell(other['name'])}: {seconds}; {memory}."


def in_short(rows: list[Record], every_model: bool) -> Iterator[list[str]]:
    """Yield the lines below :data:`SHORT_HEADER`: the :func:`headlines`."""
    for sides in headlines(rows):
        case = sides[0]
        what = f"{case['model']}, {_case(case)}, {case['dtype']}" + ("" if case["checkpointing"] else ", activations kept")
        yield [what, _speed(sides, NAIVE), _speed(sides, OURS), *_against(side_of(sides, OURS), side_of(sides, NAIVE))]


def _speed(sides: list[Record], name: str) -> str:
    if row := side_of(sides, name):
        return f"{digits(row['tokens_per_second'])} tokens/s, {digits(row['peak_bytes'], GIB)} GiB"
    return next((not_measured(row) for row in sides if row["name"] == name and row["reason"]), "–")


# ---- in pictures


def pictures(rows: list[Record], device: str) -> Pictures:
    """Yield a picture of each model."""
    for (model,), of_model in tables_of(rows, ("model",)).items():
        if that_ran(of_model, "seconds"):
            yield f"-{slug(model)}", partial(_draw, of_model, f"{device}\n{model}: a training step")


def _draw(rows: list[Record], title: str) -> Figure:
    """Draw every layer of the headlines' phases, tokens and contexts, a group of bars each."""
    cases = tables_of(rows, [key for key in STEP if key != "layer"]).values()
    shown = [case for case in cases if any(sides[0] in case for sides in headlines(rows))]
    steps = [sides for case in shown for sides in tables_of(case, ("layer",)).values()]
    names = list(dict.fromkeys(row["name"] for sides in steps for row in sides))
    colors = dict(zip(names, cycle((VERMILION, GREEN, PURPLE, ORANGE)), strict=False)) | COLORS
    figure = figure_of(title, 8.4, 1.4 + sum(0.25 * len(sides) + 0.3 for sides in steps))
    panels = figure.subplots(1, 2, sharey=True)
    handles, labels, place = {}, {}, 0
    for sides in steps:
        labels[place + (len(sides) - 1) / 2] = _case(sides[0]).replace(", ", "\n")
        for row in sides:
            for axes, measure, unit in zip(panels, ("tokens_per_second", "peak_bytes"), (1, GIB), strict=True):
                ran = row["reason"] is None and row[measure] is not None
                value = row[measure] / unit if ran else 0
                handles[row["name"]] = axes.barh(place, value, color=colors[row["name"]], height=0.85)
                axes.annotate(f" {digits(value)}" if ran else " not measured", (value, place), va="center", fontsize=8)
            place += 1
        place += 1
    panels[0].set_yticks(list(labels), list(labels.values()), fontsize=8.5)
    panels[0].invert_yaxis()
    for axes, label in zip(panels, ("tokens/s", "peak GiB beyond weights and optimizer state"), strict=True):
        axes.set(xlabel=label, axisbelow=True, xlim=(0, 1.18 * axes.dataLim.xmax or 1))
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,g}")
    return with_legend(figure, {name: handles[name] for name in names})
