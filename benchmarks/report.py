"""What the results say: docs/benchmarks.md with its pictures, and the marked places of README.md: ``python -m benchmarks.report``.

A marked place is ``<!-- benchmarks:NAME -->…<!-- /benchmarks -->``. NAME is "speed" or "step" (the headlines of each machine),
"demo" (the table of its accuracies), or a number of results/recorded.json. That file is kept by hand, the others by the benchmarks.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

if not __package__:  # run as a file: those beside it would hide the packages of their names, such as kernels
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.pictures import alternative_text, figures
from benchmarks.rows import (
    AXES,
    KERNEL,
    KINDS,
    MEASURES,
    NAIVE_STEP,
    OUR_STEP,
    SECTIONS,
    STEP,
    Results,
    Row,
    device_of,
    digits,
    fastest,
    formula,
    headline,
    machines,
    main_model,
    order_of,
    read_results,
    rows_of,
    side_of,
    step_case,
    step_headlines,
    tables_of,
    tiny,
    whole,
    worst_error,
)
from bupo.output import replace_file
from bupo.plots import write_figure

ROOT = Path(__file__).parent.parent


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


def page(results: Results) -> str:
    """docs/benchmarks.md."""
    measured = machines(results)
    paragraphs = [INTRODUCTION, *(_in_short(measured) if measured else [NOTHING])]
    for name, sections in measured.items():
        about = next(sections[section].get("machine", {}) for section in SECTIONS if rows_of(sections, section))
        paragraphs += [f"## {device_of(name, sections)}", _facts(about)]
        pictures = figures({name: sections})
        for section, (title, tables) in TABLES.items():
            if not (rows := rows_of(sections, section)):
                continue
            own = sections[section].get("machine", {})
            paragraphs += [f"### {title}", _when(sections[section])]
            paragraphs += [_facts(own)] if _setting(own) != _setting(about) else []
            paragraphs += [
                f"![{alternative_text(stem)}](benchmarks/{stem}.svg)" for stem in pictures if stem.startswith(f"{name}-{section}")
            ]
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


def _rounded(number: float) -> float:
    """To what is printed."""
    return float(f"{number:.2e}")


def _times(number: float | None) -> str:
    return "–" if number is None else f"{digits(number)}x"


def _mib(number: float | None) -> str:
    return digits(number and number / 2**20)


def _gib(number: float | None) -> str:
    return digits(number and number / 2**30)


def _cell(value: object) -> str:
    """In one line and without what Markdown would take for its own."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], text_columns: Iterable[int] = (0,)) -> str:
    rule = ["---" if place in text_columns else "---:" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (header, rule, *rows))


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
    return f"{row.get('model')}, {layers}{whole(row.get('rows'))} rows{shares}"


def kernel_tables(rows: list[Row], section: dict[str, Any]) -> Iterator[str]:
    header = ["", "computes", "ms", "× floor", "TFLOP/s", "peak MiB", "stated MiB"]
    header += ["Δlogprob flat", "peaked", "Δ gradient flat", "peaked", "remark"]
    for (group,), of_group in tables_of(rows, ("group",)).items():
        tables = tables_of(of_group, KERNEL).values()
        yield f"<details>\n<summary>{_cell(group)}: {len(tables)} table{'s' * (len(tables) > 1)}</summary>"
        for contenders in tables:
            of = contenders[0]
            shape = f"V = {whole(of.get('vocab'))}, D = {whole(of.get('width'))}, {of.get('dtype')}"
            timed = f", timed on {of['distribution']} logits" if of.get("distribution") else ""
            yield f"**{_case(of)}**, {shape}{timed}. {_rates(section, of.get('dtype'))}."
            yield _table(header, [_kernel_row(row) for row in sorted(contenders, key=order_of)], (0, 1, 11))
            yield from losses(contenders)
        yield "</details>"


def _kernel_row(row: Row) -> list[str]:
    name = f"**{row['name']}**" if row.get("who") == "ours" else row["name"]
    if row.get("reason") is not None:
        return [name, row.get("computes") or "–", *["–"] * 9, f"not measured: {row['reason']}"]
    speed = [digits(row.get("ms")), digits(row.get("times_floor")), digits(row.get("useful_tflops"))]
    errors = [worst_error(row, kind, *names) for names in MEASURES.values() for kind in KINDS]
    memory = [_mib(row.get("peak_bytes")), _mib(row.get("stated_bytes"))]
    return [name, row.get("computes") or "–", *speed, *memory, *map(tiny, errors), row.get("remark") or ""]


def losses(contenders: list[Row]) -> Iterator[str]:
    """A sentence for each thing that another computes faster than this library's fastest, with what it costs the other.

    ``contenders`` are the rows of one table. Who computes more counts as well.
    """
    for computes, ours, naive, peers in _comparable(contenders):
        own, other = fastest(ours), fastest([*naive, *peers])
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
            errors = [worst_error(row, kind, "logprobs") for row in (own, other)]
            costs += [] if None in errors else [f"max |Δlogprob| {kind} {tiny(errors[0])} against {tiny(errors[1])}"]
        costs += [f"{row['name']}: {row['remark']}" for row in (own, other) if row.get("remark")]
        yield f"**Slower here:** {_cell(own['name'])} ({computes}) than {_cell(other['name'])}: {_cell('; '.join(costs))}."


def _comparable(table: list[Row]) -> Iterator[tuple[str, list[Row], list[Row], list[Row]]]:
    """What this library computes, and its rows and the naive ones and the peers' that compute that, or more."""
    for computes in dict.fromkeys(row.get("computes") or "" for row in table if row.get("who") == "ours"):
        able = [row for row in table if set((row.get("computes") or "").split(", ")) >= set(computes.split(", "))]
        ours, naive, peers = ([row for row in able if row.get("who") == who] for who in ("ours", "naive", "peer"))
        yield computes, [row for row in ours if (row.get("computes") or "") == computes], naive, peers


def speed_of_all(measured: Results, every_model: bool) -> str:
    """A table a machine: of every model, or of its :func:`main_model`; empty where nothing is."""
    found = []
    for name, sections in measured.items():
        rows = rows_of(sections, "kernels")
        model = main_model(rows)
        of_cases = tables_of((row for row in rows if every_model or row.get("model") == model), ("model", "group"))
        if body := [line for of_case in of_cases.values() for line in _speed_rows(headline(of_case))]:
            table = _table(["", "computes", "this library", "naive", "fastest peer"], body, range(5))
            found.append(f"**{device_of(name, sections)}**. {_rates(sections['kernels'])}.\n\n{table}")
    return "\n\n".join(found)


def _speed_rows(table: list[Row]) -> Iterator[list[str]]:
    what = f"{table[0]['group']}: {_case(table[0])}, {table[0].get('dtype')}"
    for computes, *kinds in _comparable(table):
        yield [what, computes or "–", *map(_speed, kinds)]


def _speed(rows: list[Row]) -> str:
    """Of the fastest."""
    if row := fastest(rows):
        memory = f"{_mib(row.get('peak_bytes'))} MiB"
        return f"{row['name']}: {_times(row.get('times_floor'))}, {digits(row.get('useful_tflops'))} TFLOP/s, {memory}"
    reasons = list(dict.fromkeys(row["reason"] for row in rows if row.get("reason")))
    return "–" if not reasons else f"not measured: {reasons[0]}" if len(reasons) == 1 else "none ran"


def step_tables(rows: list[Row], section: dict[str, Any]) -> Iterator[str]:
    header = ["", "", "tokens/s", "× naive", "peak GiB", "of naive", "loss", "Δ gradient", "remark"]
    for (model, dtype, recomputed), of_model in tables_of(rows, ("model", "dtype", "checkpointing")).items():
        steps = tables_of(of_model, STEP).values()
        yield f"**{_cell(model)}**, {dtype}, activations {'recomputed' if recomputed else 'kept'}. {_rates(section, dtype)}."
        yield _table(header, [line for sides in steps for line in _step_rows(sides)], (0, 1, 8))
        for sides in steps:
            yield from step_losses(sides)


def _step_rows(sides: list[Row]) -> Iterator[list[str]]:
    naive = side_of(sides, NAIVE_STEP) or {}
    for row in sides:
        yield [
            step_case(row),
            f"**{row['name']}**" if row["name"] == OUR_STEP else row["name"],
            digits(row.get("tokens_per_second")),
            _times(_ratio(row.get("tokens_per_second"), naive.get("tokens_per_second"))),
            _gib(row.get("peak_bytes")),
            digits(_ratio(row.get("peak_bytes"), naive.get("peak_bytes"))),
            "–" if row.get("loss") is None else f"{row['loss']:.4g}",
            tiny(row.get("gradient_difference")),
            "" if row.get("reason") is None else f"not measured: {row['reason']}",
        ]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def step_losses(sides: list[Row]) -> Iterator[str]:
    """A sentence where another side of the same step took less time than this library."""
    own, other = side_of(sides, OUR_STEP), fastest((row for row in sides if row["name"] != OUR_STEP), "seconds")
    if own and other and _rounded(own["seconds"]) > _rounded(other["seconds"]):
        times = f"{digits(own['seconds'])} s against {digits(other['seconds'])} s"
        memory = f"peak {_gib(own.get('peak_bytes'))} against {_gib(other.get('peak_bytes'))} GiB"
        yield f"**Slower here:** {step_case(own)}: {OUR_STEP} than {_cell(other['name'])}: {times}; {memory}."


def step_of_all(measured: Results) -> str:
    """A table a machine; empty where nothing is."""
    found = []
    for name, sections in measured.items():
        if body := [_step_line(sides) for sides in step_headlines(rows_of(sections, "step"))]:
            line = f"**{device_of(name, sections)}**. {_rates(sections['step'])}. Memory is beyond weights and optimizer state."
            found.append(f"{line}\n\n{_table(['', NAIVE_STEP, OUR_STEP, 'times as fast', 'of its memory'], body, range(5))}")
    return "\n\n".join(found)


def _step_line(sides: list[Row]) -> list[str]:
    of, naive, own = sides[0], side_of(sides, NAIVE_STEP) or {}, side_of(sides, OUR_STEP) or {}
    what = f"{of.get('model')}, {step_case(of)}, {of.get('dtype')}" + ("" if of.get("checkpointing") else ", activations kept")
    return [
        what,
        *(_step_speed(sides, name) for name in (NAIVE_STEP, OUR_STEP)),
        _times(_ratio(own.get("tokens_per_second"), naive.get("tokens_per_second"))),
        digits(_ratio(own.get("peak_bytes"), naive.get("peak_bytes"))),
    ]


def _step_speed(sides: list[Row], name: str) -> str:
    if row := side_of(sides, name):
        return f"{digits(row.get('tokens_per_second'))} tokens/s, {_gib(row.get('peak_bytes'))} GiB"
    return next((f"not measured: {row['reason']}" for row in sides if row["name"] == name and row.get("reason")), "–")


def scaling_table(rows: list[Row], section: dict[str, Any]) -> Iterator[str]:
    header = ["against", "from, to", "call", "dtype", "fixed", "fitted line", "r²"]
    yield _table(header, map(_scaling_row, rows), range(6))


def _scaling_row(row: Row) -> list[str]:
    values = [point["value"] for point in row.get("points") or []]
    fixed = [f"{name} {whole(value)}" for name, value in (row.get("fixed") or {}).items()]
    quality = (row.get("fit") or {}).get("r2")
    return [
        AXES.get(row["axis"], row["axis"]),
        f"{whole(min(values))}, {whole(max(values))}" if values else "–",
        row["contender"],
        row.get("dtype") or "–",
        ", ".join(fixed),
        formula(row),
        "–" if quality is None else f"{quality:.4f}",
    ]


TABLES = {
    "kernels": ("Kernels", kernel_tables),
    "step": ("Training step", step_tables),
    "scaling": ("Scaling", scaling_table),
}


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
