"""Rows of results: what they hold, which belong together, and which stand for the others.

A file of results is ``{section: {"machine", "rates", "rows"}}`` (:mod:`bupo.measurement`), and its rows are, in the section

kernels
    ``group``, ``model``, ``vocab``, ``width``, ``rows``, ``layers``, ``dtype``, ``active`` (share of the rows that count),
    ``distribution`` (of the timed rounds), ``name``, ``who`` (:data:`ORDER`), ``computes``, ``remark``, ``reason`` (why it is not
    measured, or None); if it is: ``ms`` (median) and ``ms_of_rounds``, ``times_floor`` (median of the rounds' ratios),
    ``useful_tflops`` (of the floor's products over the rows that count), ``algorithm_products`` (of 2·N·V·D FLOP, that it takes),
    ``peak_bytes`` (beyond operands and results), ``stated_bytes``, ``errors`` (distribution -> ``logprobs``, ``entropy``: largest
    |Δ|; ``hidden``, ``weight``: relative Frobenius error of the gradients)
step
    what tells steps apart (:data:`STEP`), ``name``, ``reason``; ``seconds`` and ``seconds_of_rounds``, ``tokens_per_second``,
    ``peak_bytes`` (beyond weights and optimizer state), ``loss``, ``gradient_difference`` (from the first side, relative)
scaling
    ``axis``, ``contender``, ``dtype``, ``fixed``, ``points`` (``value``, ``ms``, ``ms_of_rounds``, ``flops``), ``fit``
    (``fixed_ms``, ``tflops``, ``r2``)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SECTIONS = ("kernels", "step", "scaling")
Row = dict[str, Any]
Results = dict[str, dict[str, Any]]  # name of the file -> section -> what was measured
ORDER = ("floor", "naive", "ours", "peer")
KERNEL = ("group", "model", "layers", "rows", "vocab", "width", "dtype", "active", "distribution")  # these tell tables apart
STEP = ("model", "phase", "layer", "layers", "sequences", "length", "dtype", "checkpointing")
NAIVE_STEP, OUR_STEP = "naive logit lens", "bupo"
KINDS = {"flat": "none", "peaked": "full"}  # distribution -> how its points are filled
MEASURES = {"max |Δlogprob|": ("logprobs",), "relative error of dH or dW, the larger": ("hidden", "weight")}  # label -> errors
AXES = {"rows": "rows N", "vocab": "vocabulary V", "width": "width D", "active": "share of active rows", "layer": "layer l"}


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
    """Those with rows in any of :data:`SECTIONS`."""
    return {name: sections for name, sections in results.items() if any(rows_of(sections, section) for section in SECTIONS)}


def rows_of(sections: dict[str, Any], section: str) -> list[Row]:
    return sections.get(section, {}).get("rows") or []


def tables_of(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple, list[Row]]:
    """``rows`` that agree in ``keys``, in the order of their first."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def that_ran(rows: Iterable[Row], measure: str = "ms") -> list[Row]:
    return [row for row in rows if row.get("reason") is None and row.get(measure) is not None]


def fastest(rows: Iterable[Row], measure: str = "ms") -> Row | None:
    return min(that_ran(rows, measure), key=lambda row: row[measure], default=None)


def worst_error(row: Row, distribution: str, *names: str) -> float | None:
    """The largest of those that were measured."""
    measured = (row.get("errors") or {}).get(distribution) or {}
    return max((measured[name] for name in names if measured.get(name) is not None), default=None)


def device_of(name: str, sections: dict[str, Any]) -> str:
    about = next((sections[section]["machine"] for section in SECTIONS if sections.get(section, {}).get("machine")), {})
    threads = about.get("threads")
    return about.get("device", name) + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def order_of(row: Row) -> tuple:
    who = row.get("who")
    time = row.get("ms") if row.get("reason") is None else None
    return ORDER.index(who) if who in ORDER else len(ORDER), time is None, time or 0, row["name"]


def main_model(rows: list[Row]) -> str | None:
    """The one with the most tables in which anything ran; None where nothing did."""
    of_models = tables_of(that_ran(rows), ("model",))
    return max(of_models, key=lambda model: len(tables_of(of_models[model], KERNEL)), default=(None,))[0]


def headline(rows: list[Row]) -> list[Row]:
    """The table that stands for the others: in bfloat16, with all rows active, the most rows that naive logits took too; where
    there is none like that, what is nearest."""

    def weight(table: list[Row]) -> tuple:
        of, ran = table[0], {row.get("who") for row in that_ran(table)}
        size = (of.get("rows") or 0) * (of.get("layers") or 1)
        return "ours" in ran, of.get("dtype") == "bfloat16", of.get("active") or 0, "naive" in ran, size

    return max(tables_of(rows, KERNEL).values(), key=weight)


def side_of(sides: list[Row], name: str) -> Row | None:
    return next((row for row in that_ran(sides, "seconds") if row["name"] == name), None)


def step_headlines(rows: list[Row]) -> Iterator[list[Row]]:
    """Of every model and phase the step of the most tokens that both sides took, the first where several are."""
    for of in tables_of(rows, ("model", "phase")).values():
        yield max(tables_of(of, STEP).values(), key=lambda sides: (side_of(sides, NAIVE_STEP) is not None, _tokens(sides[0])))


def _tokens(row: Row) -> int:
    return (row.get("sequences") or 0) * (row.get("length") or 0)


def step_case(row: Row) -> str:
    where = "" if row.get("layer") is None else f", layer {row['layer']} of {row.get('layers')}"
    return f"phase {row.get('phase')}{where}, {row.get('sequences')} x {whole(row.get('length'))} tokens"


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


def digits(number: float | None, count: int = 3) -> str:
    """``number`` with so many significant digits; "–" for None."""
    if number is None:
        return "–"
    if number == 0:
        return "0"
    rounded = float(f"{number:.{count - 1}e}")
    power = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, count - 1 - power)}f}" if power >= -3 else tiny(rounded)


def whole(number: object) -> str:
    """Of a size or a setting; text stays."""
    if isinstance(number, float):
        return f"{number:g}"
    return "–" if number is None else f"{number:,}" if isinstance(number, int) else str(number)


def tiny(number: float | None) -> str:
    return "–" if number is None else "0" if number == 0 else f"{number:.1e}"
