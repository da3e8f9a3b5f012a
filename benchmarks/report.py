"""What the results say: docs/benchmarks.md with its pictures, and the marked places of README.md: ``python -m benchmarks.report``.

A marked place is ``<!-- benchmarks:NAME -->…<!-- /benchmarks -->``. NAME is "speed" or "step" (the headlines of each machine),
"demo" (the table of its accuracies), or a number of results/recorded.json. That file is kept by hand, the others by the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

if not __package__:  # run as a file: those beside it would hide the packages of their names, such as kernels
    sys.path[0] = str(Path(__file__).parent.parent)

from bupo.analysis.figures import write_figure
from bupo.output import replace_file
from bupo.plots import BLUE, GREEN, PURPLE, SKY, VERMILION

ROOT = Path(__file__).parent.parent
ORANGE, GREY = "#E69F00", "#999999"
Row = dict[str, Any]
Results = dict[str, dict[str, Any]]  # name of the file -> section -> what was measured

ORDER = ("floor", "naive", "ours", "peer")
KERNEL = ("group", "model", "layers", "rows", "vocab", "width", "dtype", "active", "distribution")  # these tell tables apart
STEP = ("model", "phase", "layer", "layers", "sequences", "length", "dtype", "checkpointing")
NAIVE_STEP, OUR_STEP = "naive logit lens", "bupo"
KINDS = {"flat": "none", "peaked": "full"}  # distribution -> how its points are filled
MEASURES = {"max |Δlogprob|": ("logprobs",), "relative error of dH or dW, the larger": ("hidden", "weight")}  # label -> errors
LEAST_ERROR, LEAST_MIB = 1e-9, 0.01  # what is less, such as 0, is drawn there: the axes are logarithmic
STEP_COLORS = {
    NAIVE_STEP: "black",
    f"{NAIVE_STEP}, truncated": GREY,
    "naive, one head": GREY,
    f"{OUR_STEP}, not truncated": SKY,
    OUR_STEP: BLUE,
}
AXES = {"rows": "rows N", "vocab": "vocabulary V", "width": "width D", "active": "share of active rows", "layer": "layer l"}

MARKED = re.compile(r"(<!-- benchmarks:(\S+) -->)(.*?)(<!-- /benchmarks -->)", re.DOTALL)
UNIT = r"%|[kMGT]i?B\b|tokens/s|[MGT]FLOP/s|(?:ms|s|seconds|minutes|hours|times)\b|[x×](?!\s?\d|\w)"
MEASURED = re.compile(rf"(?<![\w.])\d[\d.,]*\s?(?:{UNIT})")
CELL = re.compile(r"\|[\s*~<>≤≥±−-]*(\d[\d.,]*)")
# What looks like a measurement in README.md and is none, and why.
ALLOWED = {"256 MiB by default": "a setting"}

INTRODUCTION = """\
<!-- Written by `python -m benchmarks.report` from benchmarks/results/*.json. -->

# Benchmarks

Repeat them with `make bench` on a CPU, `make gpu` on a machine with a GPU, `bupo bench` for a training step of a model of yours;
`python -m benchmarks.report` then writes this page.

* The contenders take turns, round by round, on random inputs that are fresh in each. Times are medians of the rounds.
* **× floor** is the time in units of the library's bare products in the same round: as many as the call cannot do without, over the
  active rows. **TFLOP/s** are useful ones: the FLOPs of those products by the time, whatever a contender computes beyond them.
* **Peak** is what the allocator held beyond the inputs, results not counted; **stated** is the bound that a contender promises.
* Errors are against float64. **Flat**: logits as of an early layer, entropy near ln V. **Peaked**: as of a last layer.
  **Δ gradient** is the relative (Frobenius) error of dH or of dW, whichever is larger.
* **–** is what does not apply or was not measured. What could not be measured is there with the reason."""
IN_SHORT = """\
Of every model and call: in bfloat16, with all rows active, the most rows (tokens) that naive logits took too; the fastest of each
kind that computes the same. × floor, useful TFLOP/s, peak memory."""
NOTHING = "Nothing is measured yet."


def read_results(folder: Path) -> Results:
    """Every JSON file of ``folder`` by its name without the ending; empty where there is no folder.

    Raises ``ValueError`` for a file that is no JSON object of objects.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is no file of results ({error}), accepted are JSON objects of sections") from None
        if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
            raise ValueError(f"{path}: is no file of results, accepted are JSON objects of sections")
        found[path.stem] = content
    return found


def machines(results: Results) -> Results:
    """Those with a section of :data:`SECTIONS`."""
    return {name: sections for name, sections in results.items() if any(_rows(sections, section) for section in SECTIONS)}


def page(results: Results) -> str:
    """docs/benchmarks.md."""
    measured = machines(results)
    paragraphs = [INTRODUCTION, *(_in_short(measured) if measured else [NOTHING])]
    for name, sections in measured.items():
        about = next(sections[section].get("machine", {}) for section in SECTIONS if _rows(sections, section))
        paragraphs += [f"## {_device(name, sections)}", _facts(about)]
        pictures = figures({name: sections})
        for section, (title, tables) in SECTIONS.items():
            if not (rows := _rows(sections, section)):
                continue
            own = sections[section].get("machine", {})
            paragraphs += [f"### {title}", _when(sections[section])]
            paragraphs += [_facts(own)] if _setting(own) != _setting(about) else []
            paragraphs += [f"![{_alt(stem)}](benchmarks/{stem}.svg)" for stem in pictures if stem.startswith(f"{name}-{section}")]
            paragraphs += tables(rows, sections[section])
    return "\n\n".join(paragraphs) + "\n"


def _in_short(measured: Results) -> list[str]:
    speed, step = speed_of_all(measured, every_model=True), step_of_all(measured)
    return ["## In short", IN_SHORT, *([speed] if speed else []), *(["### Training step", step] if step else [])]


def blocks(results: Results) -> dict[str, str]:
    """What stands in the marked places, by name."""
    measured, recorded = machines(results), results.get("recorded", {})
    headlines = {"speed": speed_of_all(measured, every_model=False), "step": step_of_all(measured)}
    found = {name: f"\n\n{text or NOTHING}\n\n" for name, text in headlines.items()}
    if demo := recorded.get("demo"):
        names = list(demo["rows"][0])
        body = [[row[name] if name == "seed" else f"{100 * row[name]:.1f} %" for name in names] for row in demo["rows"]]
        found["demo"] = f"\n\n{_table(names, body)}\n\n"
    return found | {name: f"{number['value']:g} {number['unit']}" for name, number in recorded.get("numbers", {}).items()}


def fill(text: str, texts: dict[str, str]) -> str:
    """``text`` with ``texts`` in its marked places, and otherwise as it was.

    Raises ``ValueError`` for a name that is not in ``texts``, and for a place that is not closed.
    """

    def replaced(found: re.Match) -> str:
        if found[2] not in texts:
            raise ValueError(f"<!-- benchmarks:{found[2]} -->: nothing of that name is recorded, accepted are {', '.join(texts)}")
        return found[1] + texts[found[2]] + found[4]

    filled = MARKED.sub(replaced, text)
    opened, closed = (len(re.findall(marker, text)) for marker in ("<!-- benchmarks:", "<!-- /benchmarks -->"))
    if not opened == closed == len(MARKED.findall(text)):
        raise ValueError(f"{opened} places are opened by <!-- benchmarks:NAME --> and {closed} closed by <!-- /benchmarks -->")
    return filled


def unbacked(text: str) -> list[str]:
    """The measured numbers of a README that stand outside its marked places, :data:`ALLOWED` and code.

    Measured is a number with a unit of measurement, or one that a cell of a table begins with.
    """
    for pattern in (MARKED, re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE), re.compile(r"`[^`\n]*`")):
        text = pattern.sub(" ", text)
    for phrase in ALLOWED:
        text = re.sub(r"\s+".join(map(re.escape, phrase.split())), " ", text)
    tables = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("|"))
    return [match[0] for match in MEASURED.finditer(text)] + [match[1] for match in CELL.finditer(tables)]


def generate(results: Path, root: Path) -> tuple[dict[Path, str], dict[Path, Callable[[], Figure]]]:
    """Texts, and what draws the pictures, by where they belong in the checkout ``root``. Raises ``ValueError`` as what it calls."""
    found, readme, folder = read_results(results), root / "README.md", root / "docs" / "benchmarks"
    try:
        filled = fill(readme.read_text(encoding="utf-8"), blocks(found))
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from None
    texts = {folder.with_suffix(".md"): page(found), readme: filled}
    return texts, {folder / f"{name}.svg": draw for name, draw in figures(found).items()}


def outdated(results: Path, root: Path) -> list[str]:
    """A line for every file of ``root`` that is not as the results would have it, and for every number that they do not back."""
    texts, pictures = generate(results, root)
    wrong = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    wrong += [path for path in pictures if not path.exists()]
    lines = [f"{path}: is out of date, run python -m benchmarks.report" for path in wrong]
    lines += [f"{path}: is drawn from no result, run python -m benchmarks.report" for path in _left_over(root, pictures)]
    text = (root / "README.md").read_text(encoding="utf-8")
    return lines + [f"{root / 'README.md'}: {number!r} is backed by no result" for number in unbacked(text)]


def write(results: Path, root: Path) -> list[Path]:
    """Writes texts and pictures, removes pictures of results that are gone, and returns what was written."""
    texts, pictures = generate(results, root)
    (root / "docs" / "benchmarks").mkdir(parents=True, exist_ok=True)
    for path, draw in pictures.items():
        partial_path = path.with_name(path.name + ".partial")
        write_figure(draw(), partial_path, "svg")
        os.replace(partial_path, path)
    for path in _left_over(root, pictures):
        path.unlink()
    for path, text in texts.items():
        replace_file(path, text)
    return [*texts, *pictures]


def _left_over(root: Path, pictures: Iterable[Path]) -> list[Path]:
    return sorted(set((root / "docs" / "benchmarks").glob("*.svg")) - set(pictures))


# Words


def digits(number: float | None, count: int = 3) -> str:
    """``number`` with so many significant digits; "–" for None."""
    if number is None:
        return "–"
    if number == 0:
        return "0"
    rounded = float(f"{number:.{count - 1}e}")
    power = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, count - 1 - power)}f}" if power >= -3 else _tiny(rounded)


def _rounded(number: float) -> float:
    """To what is printed."""
    return float(f"{number:.2e}")


def _tiny(number: float | None) -> str:
    return "–" if number is None else "0" if number == 0 else f"{number:.1e}"


def _times(number: float | None) -> str:
    return "–" if number is None else f"{digits(number)}x"


def _mib(number: float | None) -> str:
    return digits(number and number / 2**20)


def _gib(number: float | None) -> str:
    return digits(number and number / 2**30)


def _whole(number: object) -> str:
    """Of a size or a setting; text stays."""
    if isinstance(number, float):
        return f"{number:g}"
    return "–" if number is None else f"{number:,}" if isinstance(number, int) else str(number)


def _cell(value: object) -> str:
    """In one line and without what Markdown would take for its own."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], text_columns: Iterable[int] = (0,)) -> str:
    rule = ["---" if place in text_columns else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (header, rule, *rows))


# The results


def _rows(sections: dict[str, Any], section: str) -> list[Row]:
    return sections.get(section, {}).get("rows") or []


def _tables(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple, list[Row]]:
    """``rows`` that agree in ``keys``, in the order of their first."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def _ran(rows: Iterable[Row], measure: str = "ms") -> list[Row]:
    return [row for row in rows if row.get("reason") is None and row.get(measure) is not None]


def _fastest(rows: Iterable[Row], measure: str = "ms") -> Row | None:
    return min(_ran(rows, measure), key=lambda row: row[measure], default=None)


def _errors(row: Row, distribution: str, *names: str) -> float | None:
    """The largest of those that were measured."""
    measured = (row.get("errors") or {}).get(distribution) or {}
    return max((measured[name] for name in names if measured.get(name) is not None), default=None)


def _device(name: str, sections: dict[str, Any]) -> str:
    about = next((sections[section]["machine"] for section in SECTIONS if sections.get(section, {}).get("machine")), {})
    threads = about.get("threads")
    return about.get("device", name) + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def _setting(about: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name not in ("commit", "date")}


def _facts(about: dict[str, Any]) -> str:
    versions = [f"{name} {number}" for name, number in (about.get("versions") or {}).items() if number]
    facts = [
        f"driver {about['driver']}" if about.get("driver") else None,
        f"CUDA {about['cuda']}" if about.get("cuda") and about.get("driver") else None,
        *versions,
        " ".join(about.get("instruction_sets") or []),
    ]
    return ", ".join(filter(None, facts)) + "." if any(facts) else "Of this machine nothing is recorded."


def _rates(section: dict[str, Any], dtype: str | None = None) -> str:
    """The machine's own, of one dtype or of all."""
    rates = section.get("rates") or {}
    products = {name: rate for name, rate in (rates.get("gemm_tflops") or {}).items() if dtype in (None, name)}
    found = [f"{name} GEMM {digits(rate)} TFLOP/s" for name, rate in products.items()]
    if rates.get("copy_gb_per_s"):
        found.append(f"copy {digits(rates['copy_gb_per_s'])} GB/s")
    return "The machine's own rates: " + (", ".join(found) or "not measured")


def _when(section: dict[str, Any]) -> str:
    about = section.get("machine", {})
    date = (about.get("date") or "date unknown")[:10]
    return f"{_rates(section)}; commit {about.get('commit') or 'unknown'}, {date}."


def _case(row: Row) -> str:
    layers = f"{row['layers']} layers of " if (row.get("layers") or 1) > 1 else ""
    active = row.get("active") or 1.0
    shares = "" if active == 1 else f", {active:.0%} of them active"
    return f"{row.get('model')}, {layers}{_whole(row.get('rows'))} rows{shares}"


def kernel_tables(rows: list[Row], section: dict[str, Any]) -> Iterator[str]:
    header = ["", "computes", "ms", "× floor", "TFLOP/s", "peak MiB", "stated MiB"]
    header += ["Δlogprob flat", "peaked", "Δ gradient flat", "peaked", "remark"]
    for (group,), of_group in _tables(rows, ("group",)).items():
        tables = _tables(of_group, KERNEL).values()
        yield f"<details>\n<summary>{_cell(group)}: {len(tables)} table{'s' * (len(tables) > 1)}</summary>"
        for contenders in tables:
            of = contenders[0]
            shape = f"V = {_whole(of.get('vocab'))}, D = {_whole(of.get('width'))}, {of.get('dtype')}"
            timed = f", timed on {of['distribution']} logits" if of.get("distribution") else ""
            yield f"**{_case(of)}**, {shape}{timed}. {_rates(section, of.get('dtype'))}."
            yield _table(header, [_kernel_row(row) for row in sorted(contenders, key=_place)], (0, 1, 11))
            yield from losses(contenders)
        yield "</details>"


def _place(row: Row) -> tuple:
    who = row.get("who")
    time = row.get("ms") if row.get("reason") is None else None
    return ORDER.index(who) if who in ORDER else len(ORDER), time is None, time or 0, row["name"]


def _kernel_row(row: Row) -> list[str]:
    name = f"**{row['name']}**" if row.get("who") == "ours" else row["name"]
    if row.get("reason") is not None:
        return [name, row.get("computes") or "–", *["–"] * 9, f"not measured: {row['reason']}"]
    speed = [digits(row.get("ms")), digits(row.get("times_floor")), digits(row.get("useful_tflops"))]
    errors = [_errors(row, kind, *names) for names in MEASURES.values() for kind in KINDS]
    memory = [_mib(row.get("peak_bytes")), _mib(row.get("stated_bytes"))]
    return [name, row.get("computes") or "–", *speed, *memory, *map(_tiny, errors), row.get("remark") or ""]


def losses(contenders: list[Row]) -> Iterator[str]:
    """A sentence for each thing that another computes faster than this library's fastest, with what it costs the other.

    ``contenders`` are the rows of one table. Who computes more counts as well.
    """
    for computes, ours, naive, peers in _comparable(contenders):
        own, other = _fastest(ours), _fastest([*naive, *peers])
        if own is None or other is None:
            continue
        relative = own.get("times_floor") is not None and other.get("times_floor") is not None
        mine, theirs = (row["times_floor" if relative else "ms"] for row in (own, other))
        if _rounded(mine) <= _rounded(theirs):
            continue
        costs = [
            f"{digits(mine)}x the floor against {digits(theirs)}x" if relative else f"{digits(mine)} ms against {digits(theirs)} ms"
        ]
        costs += [f"peak {_mib(own.get('peak_bytes'))} against {_mib(other.get('peak_bytes'))} MiB"]
        for kind in KINDS:
            errors = [_errors(row, kind, "logprobs") for row in (own, other)]
            costs += [] if None in errors else [f"max |Δlogprob| {kind} {_tiny(errors[0])} against {_tiny(errors[1])}"]
        costs += [f"{row['name']}: {row['remark']}" for row in (own, other) if row.get("remark")]
        yield f"**Slower here:** {_cell(own['name'])} ({computes}) than {_cell(other['name'])}: {_cell('; '.join(costs))}."


def _comparable(table: list[Row]) -> Iterator[tuple[str, list[Row], list[Row], list[Row]]]:
    """What this library computes, and its rows and the naive ones and the peers' that compute that, or more."""
    for computes in dict.fromkeys(row.get("computes") or "" for row in table if row.get("who") == "ours"):
        able = [row for row in table if set((row.get("computes") or "").split(", ")) >= set(computes.split(", "))]
        ours, naive, peers = ([row for row in able if row.get("who") == who] for who in ("ours", "naive", "peer"))
        yield computes, [row for row in ours if (row.get("computes") or "") == computes], naive, peers


def main_model(rows: list[Row]) -> str | None:
    """The one with the most tables in which anything ran; None where nothing did."""
    of_models = _tables(_ran(rows), ("model",))
    return max(of_models, key=lambda model: len(_tables(of_models[model], KERNEL)), default=(None,))[0]


def headline(rows: list[Row]) -> list[Row]:
    """The table that stands for the others: as :data:`IN_SHORT` says where there is one like that, else what is nearest."""

    def weight(table: list[Row]) -> tuple:
        of, ran = table[0], {row.get("who") for row in _ran(table)}
        size = (of.get("rows") or 0) * (of.get("layers") or 1)
        return "ours" in ran, of.get("dtype") == "bfloat16", of.get("active") or 0, "naive" in ran, size

    return max(_tables(rows, KERNEL).values(), key=weight)


def speed_of_all(measured: Results, every_model: bool) -> str:
    """A table a machine: of every model, or of its :func:`main_model`; empty where nothing is."""
    found = []
    for name, sections in measured.items():
        rows = _rows(sections, "kernels")
        model = main_model(rows)
        of_cases = _tables((row for row in rows if every_model or row.get("model") == model), ("model", "group"))
        if body := [line for of_case in of_cases.values() for line in _speed_rows(headline(of_case))]:
            table = _table(["", "computes", "this library", "naive", "fastest peer"], body, range(5))
            found.append(f"**{_device(name, sections)}**. {_rates(sections['kernels'])}.\n\n{table}")
    return "\n\n".join(found)


def _speed_rows(table: list[Row]) -> Iterator[list[str]]:
    what = f"{table[0]['group']}: {_case(table[0])}, {table[0].get('dtype')}"
    for computes, *kinds in _comparable(table):
        yield [what, computes or "–", *map(_speed, kinds)]


def _speed(rows: list[Row]) -> str:
    """Of the fastest."""
    if row := _fastest(rows):
        memory = f"{_mib(row.get('peak_bytes'))} MiB"
        return f"{row['name']}: {_times(row.get('times_floor'))}, {digits(row.get('useful_tflops'))} TFLOP/s, {memory}"
    reasons = list(dict.fromkeys(row["reason"] for row in rows if row.get("reason")))
    return "–" if not reasons else f"not measured: {reasons[0]}" if len(reasons) == 1 else "none ran"


def _tokens(row: Row) -> int:
    return (row.get("sequences") or 0) * (row.get("length") or 0)


def _step_case(row: Row) -> str:
    where = "" if row.get("layer") is None else f", layer {row['layer']} of {row.get('layers')}"
    return f"phase {row.get('phase')}{where}, {row.get('sequences')} x {_whole(row.get('length'))} tokens"


def step_tables(rows: list[Row], section: dict[str, Any]) -> Iterator[str]:
    header = ["", "", "tokens/s", "× naive", "peak GiB", "of naive", "loss", "Δ gradient", "remark"]
    for (model, dtype, recomputed), of_model in _tables(rows, ("model", "dtype", "checkpointing")).items():
        steps = _tables(of_model, STEP).values()
        yield f"**{_cell(model)}**, {dtype}, activations {'recomputed' if recomputed else 'kept'}. {_rates(section, dtype)}."
        yield _table(header, [line for sides in steps for line in _step_rows(sides)], (0, 1, 8))
        for sides in steps:
            yield from step_losses(sides)


def _step_rows(sides: list[Row]) -> Iterator[list[str]]:
    naive = _side(sides, NAIVE_STEP) or {}
    for row in sides:
        yield [
            _step_case(row),
            f"**{row['name']}**" if row["name"] == OUR_STEP else row["name"],
            digits(row.get("tokens_per_second")),
            _times(_ratio(row.get("tokens_per_second"), naive.get("tokens_per_second"))),
            _gib(row.get("peak_bytes")),
            digits(_ratio(row.get("peak_bytes"), naive.get("peak_bytes"))),
            "–" if row.get("loss") is None else f"{row['loss']:.4g}",
            _tiny(row.get("gradient_difference")),
            "" if row.get("reason") is None else f"not measured: {row['reason']}",
        ]


def _side(sides: list[Row], name: str) -> Row | None:
    return next((row for row in _ran(sides, "seconds") if row["name"] == name), None)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def step_losses(sides: list[Row]) -> Iterator[str]:
    """A sentence where another side of the same step took less time than this library."""
    own, other = _side(sides, OUR_STEP), _fastest((row for row in sides if row["name"] != OUR_STEP), "seconds")
    if own and other and _rounded(own["seconds"]) > _rounded(other["seconds"]):
        times = f"{digits(own['seconds'])} s against {digits(other['seconds'])} s"
        memory = f"peak {_gib(own.get('peak_bytes'))} against {_gib(other.get('peak_bytes'))} GiB"
        yield f"**Slower here:** {_step_case(own)}: {OUR_STEP} than {_cell(other['name'])}: {times}; {memory}."


def step_headlines(rows: list[Row]) -> Iterator[list[Row]]:
    """Of every model and phase the step of the most tokens that both sides took, the first where several are."""
    for of in _tables(rows, ("model", "phase")).values():
        yield max(_tables(of, STEP).values(), key=lambda sides: (_side(sides, NAIVE_STEP) is not None, _tokens(sides[0])))


def step_of_all(measured: Results) -> str:
    """A table a machine; empty where nothing is."""
    found = []
    for name, sections in measured.items():
        if body := [_step_line(sides) for sides in step_headlines(_rows(sections, "step"))]:
            line = f"**{_device(name, sections)}**. {_rates(sections['step'])}. Memory is beyond weights and optimizer state."
            found.append(f"{line}\n\n{_table(['', NAIVE_STEP, OUR_STEP, 'times as fast', 'of its memory'], body, range(5))}")
    return "\n\n".join(found)


def _step_line(sides: list[Row]) -> list[str]:
    of, naive, own = sides[0], _side(sides, NAIVE_STEP) or {}, _side(sides, OUR_STEP) or {}
    what = f"{of.get('model')}, {_step_case(of)}, {of.get('dtype')}" + ("" if of.get("checkpointing") else ", activations kept")
    return [
        what,
        *(_step_speed(sides, name) for name in (NAIVE_STEP, OUR_STEP)),
        _times(_ratio(own.get("tokens_per_second"), naive.get("tokens_per_second"))),
        digits(_ratio(own.get("peak_bytes"), naive.get("peak_bytes"))),
    ]


def _step_speed(sides: list[Row], name: str) -> str:
    if row := _side(sides, name):
        return f"{digits(row.get('tokens_per_second'))} tokens/s, {_gib(row.get('peak_bytes'))} GiB"
    return next((f"not measured: {row['reason']}" for row in sides if row["name"] == name and row.get("reason")), "–")


def formula(row: Row) -> str:
    """The fitted line in words: FLOPs as ``explain`` counts them at the fitted rate, and what is there whatever their number."""
    fit, fixed = row.get("fit") or {}, row.get("fixed") or {}
    if fit.get("tflops") is None or fit.get("fixed_ms") is None:
        return "no fit"
    sizes = [{"active": 1.0, **fixed, row.get("axis"): point["value"]} for point in row.get("points") or []]
    flops = "FLOPs"
    if sizes and all(isinstance(size.get(name), (int, float)) for size in sizes for name in ("rows", "vocab", "width")):
        products = [size["rows"] * size["active"] * size["vocab"] * size["width"] for size in sizes]
        factors = [point["flops"] / product for point, product in zip(row["points"], products, strict=True)]
        factor = round(factors[-1])
        if all(abs(each - factor) <= 0.01 * factor for each in factors):
            flops = f"{factor}·{'active·' if row.get('axis') == 'active' else ''}N·V·D"
    return f"{digits(fit['fixed_ms'])} ms + {flops} / {digits(fit['tflops'])} TFLOP/s"


def scaling_table(rows: list[Row], section: dict[str, Any]) -> Iterator[str]:
    header = ["against", "from, to", "call", "dtype", "fixed", "fitted line", "r²"]
    yield _table(header, map(_scaling_row, rows), range(6))


def _scaling_row(row: Row) -> list[str]:
    values = [point["value"] for point in row.get("points") or []]
    fixed = [f"{name} {_whole(value)}" for name, value in (row.get("fixed") or {}).items()]
    quality = (row.get("fit") or {}).get("r2")
    return [
        AXES.get(row["axis"], row["axis"]),
        f"{_whole(min(values))}, {_whole(max(values))}" if values else "–",
        row["contender"],
        row.get("dtype") or "–",
        ", ".join(fixed),
        formula(row),
        "–" if quality is None else f"{quality:.4f}",
    ]


SECTIONS = {
    "kernels": ("Kernels", kernel_tables),
    "step": ("Training step", step_tables),
    "scaling": ("Scaling", scaling_table),
}


# Pictures


def figures(results: Results) -> dict[str, Callable[[], Figure]]:
    """What draws each picture, by its name; kernels only of the :func:`main_model` with the most active rows."""
    found: dict[str, Callable[[], Figure]] = {}
    for name, sections in machines(results).items():
        device = _device(name, sections)
        ran = _ran(_rows(sections, "kernels"))
        model = main_model(ran)
        for (dtype,), rows in _tables((row for row in ran if row.get("model") == model), ("dtype",)).items():
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
        for (model,), rows in _tables(_rows(sections, "step"), ("model",)).items():
            if _ran(rows, "seconds"):
                found[f"{name}-step-{_slug(model)}"] = partial(_draw_step, rows, f"{device}\n{model}")
        if rows := [row for row in _rows(sections, "scaling") if _ran(row.get("points") or [])]:
            found[f"{name}-scaling"] = partial(_draw_scaling, rows, device)
    return found


def _measures(rows: list[Row]) -> dict[str, tuple[str, ...]]:
    """Those of :data:`MEASURES` that any of the rows has."""
    return {
        label: names
        for label, names in MEASURES.items()
        if any(_errors(row, kind, *names) is not None for row in rows for kind in KINDS)
    }


def _slug(text: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")


def _alt(stem: str) -> str:
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
    order = [row["name"] for row in sorted(rows, key=lambda row: _place(row)[0])]
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
    for (name,), line in _tables((row for row in rows if row["group"] == group), ("name",)).items():
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
    tables = [headline(of_group) for of_group in _tables(rows, ("group",)).values()]
    table = max(tables, key=lambda table: len(_measures(table)))
    measures, shown = _measures(table), sorted(table, key=_place, reverse=True)
    figure = Figure(figsize=(8.4, 1.6 + 0.27 * len(shown)), layout="constrained")
    what = f"errors against float64, {table[0]['group']}, {_whole(table[0].get('rows'))} rows"
    figure.suptitle(f"{title}: {what}", fontsize=10, parse_math=False)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (label, names) in zip(panels, measures.items(), strict=True):
        for place, row in enumerate(shown):
            emphasis = row.get("who") == "ours"
            for kind, filled in KINDS.items():
                if (error := _errors(row, kind, *names)) is not None:
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
    of_case = _tables(rows, [key for key in STEP if key != "layer"])
    cases = [of for of in of_case.values() if any(sides[0] in of for sides in step_headlines(rows))]
    steps = [sides for of in cases for sides in _tables(of, ("layer",)).values()]
    names = list(dict.fromkeys(row["name"] for sides in steps for row in sides))
    colors = dict(zip(names, cycle((VERMILION, GREEN, PURPLE, ORANGE)), strict=False)) | STEP_COLORS
    figure = Figure(figsize=(8.4, 1.4 + sum(0.25 * len(sides) + 0.3 for sides in steps)), layout="constrained")
    figure.suptitle(f"{title}: a training step", fontsize=10, parse_math=False)
    panels = figure.subplots(1, 2, sharey=True)
    handles, labels, place = {}, {}, 0
    for sides in steps:
        labels[place + (len(sides) - 1) / 2] = _step_case(sides[0]).replace(", ", "\n")
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
    of_axes = _tables(rows, ("axis",))
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
            _ticks_at(axes, {point["value"] for row in of_axis for point in _ran(row["points"])})
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
    points = sorted(_ran(row["points"]), key=lambda point: point["value"])
    places, medians = [point["value"] for point in points], [point["ms"] for point in points]
    bars = _bars(medians, [point.get("ms_of_rounds") or [] for point in points])
    handle = axes.errorbar(places, medians, bars, fmt="o", markersize=4, elinewidth=0.9, color=color)
    fit = row.get("fit") or {}
    if fit.get("tflops") and fit.get("fixed_ms") is not None:
        fitted = [fit["fixed_ms"] + point["flops"] / fit["tflops"] / 1e9 for point in points]
        axes.plot(places, fitted, color=color, linewidth=1.2)
    return handle


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where ``--check`` finds something or the results cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n\n")[0])
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of the JSON files (default: %(default)s)")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="checkout whose README.md and docs/ these are (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; name what is out of date and exit with 1")
    given = parser.parse_args(arguments)
    try:
        found = outdated(given.results, given.root) if given.check else write(given.results, given.root)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(*found, sep="\n", file=sys.stderr if given.check else sys.stdout)
    return int(given.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
