"""The page of the study, ``docs/study.md``, and its pictures, from the records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.drawing import ORANGE, figure_of
from benchmarks.readme import fill
from benchmarks.study import METHODS, TASKS, Run, plan
from benchmarks.text import table
from bupo.output import replace_file
from bupo.plots import BLUE, GREEN, PURPLE, SKY, VERMILION, write_figure

Records = dict[str, dict[str, Any]]
NOTHING = "No run of this part is there yet."
COLOURS = dict(zip(METHODS, (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY), strict=False))
# The 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Interval(NamedTuple):
    """A mean with its 95 % interval by Student's t; NaN bounds where there is one value."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        bounds = "one seed" if math.isnan(self.low) else f"{100 * self.low:+.1f}, {100 * self.high:+.1f}"
        return f"{100 * self.mean:+.1f} [{bounds}]"


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """Return the mean difference over the seeds that both have: a seed's runs share data, first weights and prompts."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Interval(mean, math.nan, math.nan)
    half = STUDENT[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)


def final(records: Records, runs: Iterable[Run], measure: str = "average") -> dict[int, float]:
    """Return the last held-out accuracy of the runs that have a record, by seed."""
    return {run.seed: records[run.name]["accuracy"][-1][measure] for run in runs if run.name in records}


def of_method(kind: str, method: str) -> list[Run]:
    """Return the runs that compare a method on a task, one a seed."""
    task = TASKS[kind]
    return [Run(kind, method, seed, task.layer, task.internal_steps) for seed in range(task.seeds)]


def method_table(records: Records, kind: str) -> str:
    """Return what each method reached on a task, and its paired difference from GRPO."""
    base, rows = of_method(kind, "GRPO"), []
    for method in METHODS:
        runs = of_method(kind, method)
        found = {measure: final(records, runs, measure) for measure in ("greedy", "average")}
        if not found["average"]:
            continue
        first = statistics.fmean(records[run.name]["accuracy"][0]["average"] for run in runs if run.name in records)
        means = [f"{100 * statistics.fmean(values.values()):.1f}" for values in found.values()]
        against = [str(paired(values, final(records, base, measure))) for measure, values in found.items()]
        rows.append([method, len(found["average"]), f"{100 * first:.1f}", *means, *(against if method != "GRPO" else ["", ""])])
    header = ["method", "seeds:", "before, samples:", "greedy:", "samples:", "greedy − GRPO:", "samples − GRPO:"]
    return table(header, rows) if rows else NOTHING


def resolution(records: Records, kind: str) -> str:
    """Return what difference from GRPO the seeds that are there could tell from none."""
    base, halves = final(records, of_method(kind, "GRPO")), []
    for method in list(METHODS)[1:]:
        found = paired(final(records, of_method(kind, method)), base)
        halves += [found.high - found.mean] if found and not math.isnan(found.low) else []
    if not halves:
        return ""
    worst = f"between {100 * min(halves):.1f} and {100 * max(halves):.1f}" if len(halves) > 1 else f"{100 * halves[0]:.1f}"
    return f"Half the width of these intervals, the least difference in samples that could be told from none, is {worst} points."


def run_table(records: Records, kind: str) -> str:
    """Return every run of a task."""
    rows = []
    for run in (run for run in plan() if run.kind == kind and run.name in records):
        record = records[run.name]
        first, last = record["accuracy"][0], record["accuracy"][-1]
        place = [run.layer, run.internal_steps] if run.method == "BuPO" else ["", ""]
        numbers = [f"{100 * row[name]:.1f}" for row in (first, last) for name in ("greedy", "average")]
        rows.append([run.method, *place, run.seed, *numbers, f"{record['seconds']:.0f}"])
    header = [
        "method",
        "layer:",
        "internal steps:",
        "seed:",
        "greedy before:",
        "samples before:",
        "greedy:",
        "samples:",
        "seconds:",
    ]
    return table(header, rows) if rows else NOTHING


def sweep_table(records: Records, kind: str) -> str:
    """Return the mean over seeds of the samples that are right, for every layer and number of internal steps."""
    task, rows = TASKS[kind], []
    for layer in task.sweep_layers:
        cells = []
        for steps in task.sweep_steps:
            found = list(final(records, _cell(kind, layer, steps)).values())
            cells.append(f"{100 * statistics.fmean(found):.1f} ({', '.join(f'{100 * x:.0f}' for x in found)})" if found else "–")
        rows.append([layer, *cells])
    there = any(cell != "–" for row in rows for cell in row[1:])
    return table(["layer", *(f"{steps} steps:" for steps in task.sweep_steps)], rows) if there else NOTHING


def _cell(kind: str, layer: int, steps: int) -> list[Run]:
    return [Run(kind, "BuPO", seed, layer, steps) for seed in range(TASKS[kind].sweep_seeds)]


def flow_table(records: Records) -> str:
    """Return, of each model and reading, the entropy at some depths, where its greatest fall is, and the KL to the final policy."""
    rows = []
    for record in _flows(records):
        entropy = record["curves"]["layer entropy"]
        mean, depth = dict(zip(entropy["layers"], entropy["mean"], strict=True)), record["depth"]
        falls = {layer: mean[layer - 1] - mean[layer] for layer in mean if layer - 1 in mean}
        steepest = max(falls, key=lambda layer: falls[layer])
        parts = [f"{mean[round(share * depth)]:.2f}" for share in (0.25, 0.5, 0.75)]
        divergence = record["curves"]["layer kl_to_final"]["mean"]
        rows.append(
            [record["model"], record["method"], *parts, f"{mean[depth]:.2f}", f"{falls[steepest]:.2f} at {steepest} of {depth}"]
        )
        rows[-1].append(f"{divergence[len(divergence) // 2]:.1f}")
    header = ["model", "layers read", "at 1/4:", "1/2:", "3/4:", "last layer:", "greatest fall:", "KL to π at 1/2:"]
    return table(header, rows) if rows else NOTHING


def _flows(records: Records) -> list[dict[str, Any]]:
    return [records[run.name] for run in plan() if run.kind == "flow" and run.name in records]


# ---- pictures


def draw_methods(records: Records, kind: str) -> Figure:
    """Draw reward over the steps, a line a run with the mean of each method, and every final accuracy, seeds joined."""
    figure = figure_of(TASKS[kind].title, 9, 3.6)
    reward, last = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = [method for method in METHODS if final(records, of_method(kind, method))]
    for method in shown:
        curves = [records[run.name]["reward"] for run in of_method(kind, method) if run.name in records]
        rows = np.array([[math.nan if value is None else value for value in curve] for curve in curves])
        steps = np.arange(1, rows.shape[1] + 1)
        reward.plot(steps, rows.T, color=COLOURS[method], alpha=0.2, linewidth=0.7)
        reward.plot(steps, np.ma.masked_invalid(rows).mean(0), color=COLOURS[method], linewidth=1.6, label=method)
    reward.set(xlabel="step", ylabel="reward of the samples")
    reward.legend(frameon=False, fontsize=8)
    values = [final(records, of_method(kind, method)) for method in shown]
    for seed in sorted(set().union(*values)):
        points = [100 * found[seed] if seed in found else math.nan for found in values]
        last.plot(range(len(shown)), points, color="grey", linewidth=0.6, marker="o", markersize=4)
    last.set_xticks(range(len(shown)), shown, fontsize=8)
    last.set_ylabel("held-out samples that are right, %")
    for axes in (reward, last):
        axes.grid(alpha=0.3)
    return figure


def draw_sweep(records: Records, kind: str) -> Figure:
    """Draw the final accuracy against the number of internal steps, a colour a layer and a point a run; GRPO is 0 steps."""
    task, figure = TASKS[kind], figure_of(f"BuPO: layer and number of internal steps, {TASKS[kind].title}", 8, 3.8)
    axes = figure.subplots()
    base = list(final(records, of_method(kind, "GRPO")[: task.sweep_seeds]).values())
    for layer, colour in zip(task.sweep_layers, (SKY, BLUE, VERMILION, GREEN, PURPLE), strict=False):
        found = {0: base} | {steps: list(final(records, _cell(kind, layer, steps)).values()) for steps in task.sweep_steps}
        points = [(steps, 100 * value) for steps, values in found.items() for value in values]
        means = [(steps, 100 * statistics.fmean(values)) for steps, values in found.items() if values]
        axes.scatter(*zip(*points, strict=True), color=colour, s=14) if points else None
        axes.plot(*zip(*means, strict=True), color=colour, label=f"layer {layer} of {task.layers}") if means else None
    axes.set(xlabel="internal steps (0: GRPO)", ylabel="held-out samples that are right, %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def draw_flow(records: Records) -> Figure:
    """Draw entropy after attention, FFN and layer of each model, raw and through the final norm."""
    flows = _flows(records)
    figure = figure_of(
        "Entropy of the internal policies, nats", 4.6 * max(1, math.ceil(len(flows) / 2)), 6.2 if len(flows) > 1 else 3.4
    )
    panels = figure.subplots(min(2, len(flows)), math.ceil(len(flows) / 2), squeeze=False)
    for axes, record in zip(panels.T.flatten(), flows, strict=False):
        for point, colour in (("attention", BLUE), ("ffn", VERMILION), ("layer", "black")):
            curve = record["curves"][f"{point} entropy"]
            axes.plot(curve["layers"], curve["mean"], color=colour, marker=".", linewidth=1.2, label=point)
        axes.set_title(f"{record['model']}, {record['method']}", fontsize=9)
        axes.set(xlabel="layer", ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def pictures(records: Records) -> dict[str, Callable[[], Figure]]:
    """Return what draws each picture that there are records for, by its name."""
    found: dict[str, Callable[[], Figure]] = {}
    for kind, task in TASKS.items():
        if final(records, of_method(kind, "GRPO")):
            found[f"methods-{kind}"] = lambda kind=kind: draw_methods(records, kind)  # type: ignore[misc]
        if any(final(records, _cell(kind, layer, steps)) for layer in task.sweep_layers for steps in task.sweep_steps):
            found[f"sweep-{kind}"] = lambda kind=kind: draw_sweep(records, kind)  # type: ignore[misc]
    if _flows(records):
        found["flow"] = lambda: draw_flow(records)
    return found


# ---- page


def blocks(records: Records) -> dict[str, str]:
    """Return what stands in the marked places of the page."""
    runs, drawn = plan(), pictures(records)
    done = sum(run.name in records for run in runs)
    hours = sum(record["seconds"] for record in records.values()) / 3600
    machines = sorted({f"{record['machine']['device']}, {record['machine']['threads']} thread(s)" for record in records.values()})
    commits = sorted({str(record["machine"]["commit"]) for record in records.values()})
    state = f"{done} of {len(runs)} runs are there; they took {hours:.1f} hours"
    state += f" on {'; '.join(machines)}; commits {', '.join(commits)}." if records else "."

    def picture(name: str) -> str:
        return f"\n\n![{name}](study/{name}.svg)" if name in drawn else ""

    places = {"state": state, "flow": flow_table(records) + picture("flow")}
    for kind in TASKS:
        sentence = resolution(records, kind)
        places[f"methods-{kind}"] = (
            method_table(records, kind) + (f"\n\n{sentence}" if sentence else "") + picture(f"methods-{kind}")
        )
        places[f"runs-{kind}"] = run_table(records, kind)
        if TASKS[kind].sweep_seeds:
            places[f"sweep-{kind}"] = sweep_table(records, kind) + picture(f"sweep-{kind}")
    return {name: f"\n\n{text}\n\n" for name, text in places.items()}


def page(records: Records, root: Path) -> str:
    """Return ``docs/study.md`` with its marked places filled."""
    return fill((root / "docs" / "study.md").read_text(encoding="utf-8"), blocks(records))


def write_page(records: Records, root: Path) -> Sequence[Path]:
    """Write the page and its pictures; return what was written."""
    folder, text, written = root / "docs" / "study", page(records, root), []
    for name, draw in pictures(records).items():
        folder.mkdir(exist_ok=True)
        write_figure(draw(), svg := BytesIO(), "svg")
        replace_file(folder / f"{name}.svg", svg.getvalue().decode())
        written.append(folder / f"{name}.svg")
    replace_file(root / "docs" / "study.md", text)
    return [*written, root / "docs" / "study.md"]
