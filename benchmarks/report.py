"""What the results say: docs/benchmarks.md with its pictures, and the marked places of README.md: ``python -m benchmarks.report``.

The places are named "speed", "step" and "support" (the headlines of each machine), "demo" (the table of its accuracies), and as the
numbers of results/recorded.json. That file is kept by hand, the others by the benchmarks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

if not __package__:  # run as a file: those beside it would hide the packages of their names, such as kernels
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.readme import fill, unbacked
from benchmarks.records import STEP, Machine, Record, Results, machines, read_results, tables_of
from benchmarks.sections import divergence, kernels, lens, scaling, step, support, vocab_parallel
from benchmarks.text import rates, table
from bupo.output import replace_file
from bupo.plots import write_figure

ROOT = Path(__file__).parent.parent

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
## In short

Of every model and call: in bfloat16, with all rows active, the most rows (tokens) that naive logits took too; the fastest of each
kind that computes the same. × floor, useful TFLOP/s, peak memory."""
BESIDE = """\
### Machines side by side

× floor of the fastest of this library / of naive logits / of the peers, each machine in units of its own bare products."""
LOST = """\
## Where another is faster

What a naive program or a peer computes in less time than the fastest backend of this library, in any table of this page, and what
the records have to explain it: products that are formed again rather than kept, memory, what the other rounds."""
NOTHING = "Nothing is measured yet."
SECTIONS = {
    **{"kernels": kernels, "step": step, "scaling": scaling, "support": support, "divergence": divergence, "lens": lens},
    "vocab_parallel": vocab_parallel,
}
PLACES = {"speed": "kernels", "step": "step", "support": "support"}  # of README.md, and the section whose headlines stand there
PICTURES = {"time": "time in units of the floor", "memory": "peak memory", "errors": "errors against float64", "scaling": "scaling"}


def page(results: Results) -> str:
    """Return docs/benchmarks.md."""
    measured, pictures = machines(results), figures(results)
    speed, steps = (_in_short(measured, name, every_model=True) for name in ("kernels", "step"))
    paragraphs = [INTRODUCTION, IN_SHORT if measured else NOTHING, speed, steps and f"### Training step\n\n{steps}"]
    paragraphs += [_side_by_side(measured), _lost(measured)]
    for machine in measured:
        first = next(iter(machine.sections.values()))["machine"]
        paragraphs += [f"## {machine.device}", _setting(first)]
        for name, section in machine.sections.items():
            setting = _setting(section["machine"])
            paragraphs += [f"### {SECTIONS[name].TITLE}", _when(section), setting if setting != _setting(first) else ""]
            for stem in (stem for stem in pictures if stem.startswith(f"{machine.name}-{name}")):
                text = PICTURES.get(stem.rpartition("-")[2], "speed and memory of a training step")
                paragraphs.append(f"![{text}](benchmarks/{stem}.svg)")
            paragraphs += SECTIONS[name].paragraphs(section)
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def figures(results: Results) -> dict[str, Callable[[], Figure]]:
    """Return what draws each picture, by its name."""
    return {
        f"{machine.name}-{name}{ending}": draw
        for machine in machines(results)
        for name, section in machine.sections.items()
        for ending, draw in SECTIONS[name].pictures(section["rows"], machine.device)
    }


def _in_short(measured: list[Machine], name: str, every_model: bool) -> str:
    """Return a table a machine of the headlines of its section; empty where there are none."""
    section, found = SECTIONS[name], []
    for machine in measured:
        if name in machine.sections and (lines := list(section.in_short(machine.sections[name]["rows"], every_model))):
            note = f"{rates(machine.sections[name])}.{section.SHORT_NOTE}"
            found.append(f"**{machine.device}**. {note}\n\n{table(section.SHORT_HEADER, lines)}")
    return "\n\n".join(found)


def _side_by_side(measured: list[Machine]) -> str:
    """Return a table with a column for each machine; empty where there are fewer than two with a kernel section."""
    columns = {m.device: dict(kernels.beside(m.sections["kernels"]["rows"])) for m in measured if "kernels" in m.sections}
    if len(columns) < 2:
        return ""
    cases = dict.fromkeys(case for column in columns.values() for case in column)
    lines = [[*case, *(column.get(case, "–") for column in columns.values())] for case in cases]
    return f"{BESIDE}\n\n{table(['', 'computes', *columns], lines)}"


def _lost(measured: list[Machine]) -> str:
    """Return, for each machine, what another computes faster there; empty where nothing was compared."""
    found = []
    for machine in measured:
        of_kernels = machine.sections.get("kernels", Record())["rows"]
        steps = tables_of(machine.sections.get("step", Record())["rows"], STEP).values()
        lines, sentences = list(kernels.lost(of_kernels)), [line for sides in steps for line in step.losses(sides)]
        if lines or sentences:
            found += [f"**{machine.device}**", table(kernels.LOST_HEADER, lines) if lines else "", *sentences]
        elif of_kernels or steps:
            found.append(f"**{machine.device}**: nothing of what was measured.")
    return "\n\n".join(filter(None, [LOST, *found])) if found else ""


def _setting(machine: Record) -> str:
    """Return what a machine has installed, and can do."""
    driver, cuda = machine["driver"], machine["cuda"]
    facts = [f"driver {driver}", f"CUDA {cuda}" if cuda else ""] if driver else []
    facts += [f"{name} {number}" for name, number in machine["versions"].items() if number]
    facts += [" ".join(machine["instruction_sets"])]
    return ", ".join(filter(None, facts)) + "." if any(facts) else "Of this machine nothing is recorded."


def _when(section: Record) -> str:
    commit, date = (section["machine"].get(name) for name in ("commit", "date"))
    return f"{rates(section)}; commit {commit or 'unknown'}, {(date or 'date unknown')[:10]}."


def blocks(results: Results) -> dict[str, str]:
    """Return what stands in the marked places of README.md, by name."""
    measured, recorded = machines(results), results.get("recorded", {})
    tables = {place: _in_short(measured, name, every_model=False) for place, name in PLACES.items()}
    for place in ("demo", "demo-llm"):
        if place in recorded:
            first, *others = recorded[place]["rows"][0]
            body = [[row[first], *(_share(row[name]) for name in others)] for row in recorded[place]["rows"]]
            tables[place] = table([first, *(f"{name}:" for name in others)], body)
    numbers = {name: f"{number['value']:g} {number['unit']}" for name, number in recorded.get("numbers", {}).items()}
    return {name: f"\n\n{text or NOTHING}\n\n" for name, text in tables.items()} | numbers


def _share(share: float | list[float]) -> str:
    """Return a share, or one with the ends of its interval, in percent."""
    if isinstance(share, list):
        value, low, high = (100 * number for number in share)
        return f"{value:.1f} % [{low:.1f}, {high:.1f}]"
    return f"{100 * share:.1f} %"


def generate(results: Path, root: Path) -> tuple[dict[Path, str], dict[Path, Callable[[], Figure]]]:
    """Return texts, and what draws the pictures, by where they belong in the checkout ``root``.

    Raises ``ValueError`` for results that cannot be read and for places of README.md that cannot be filled.
    """
    found, readme, folder = read_results(results), root / "README.md", root / "docs" / "benchmarks"
    try:
        filled = fill(readme.read_text(encoding="utf-8"), blocks(found))
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from None
    texts = {folder.with_suffix(".md"): page(found), readme: filled}
    return texts, {folder / f"{name}.svg": draw for name, draw in figures(found).items()}


def outdated(results: Path, root: Path) -> list[str]:
    """Return a line for every file of ``root`` that is not as the results would have it, and every number they do not back."""
    texts, pictures = generate(results, root)
    wrong = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    wrong += [path for path in pictures if not path.exists()]
    lines = [f"{path}: is out of date, run python -m benchmarks.report" for path in wrong]
    lines += [f"{path}: is drawn from no result, run python -m benchmarks.report" for path in _left_over(root, pictures)]
    readme = root / "README.md"
    return lines + [f"{readme}: {number!r} is backed by no result" for number in unbacked(readme.read_text(encoding="utf-8"))]


def write(results: Path, root: Path) -> list[Path]:
    """Write texts and pictures, remove pictures of results that are gone, and return what was written."""
    texts, pictures = generate(results, root)
    (root / "docs" / "benchmarks").mkdir(parents=True, exist_ok=True)
    for path, draw in pictures.items():
        write_figure(draw(), svg := BytesIO(), "svg")
        replace_file(path, svg.getvalue().decode())
    for path in _left_over(root, pictures):
        path.unlink()
    for path, text in texts.items():
        replace_file(path, text)
    return [*texts, *pictures]


def _left_over(root: Path, pictures: dict[Path, Callable[[], Figure]]) -> list[Path]:
    return sorted(set((root / "docs" / "benchmarks").glob("*.svg")) - set(pictures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 where ``--check`` finds something or the results cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n\n")[0])
    folder, checkout = "folder of the JSON files (default: %(default)s)", "checkout of README.md and docs/ (default: %(default)s)"
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help=folder)
    parser.add_argument("--root", type=Path, default=ROOT, help=checkout)
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
