"""The section of :mod:`benchmarks.divergence`: a student's divergence from its teacher, beside bare products and whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.drawing import Pictures
from benchmarks.records import Record, tables_of
from benchmarks.text import MIB, digits, table, times, whole

TITLE = "Divergences of a student from its teacher"
HEADER = ("kind", "dtype", "contender", "ms:", "× floor:", "peak MiB:")
SHORT_HEADER = ("", "kind", "linear_divergence", "materialised logits")
SHORT_NOTE = ""


def paragraphs(section: Record) -> Iterator[str]:
    """Yield the size of each head, and a table of its losses, forward and backward."""
    for (model,), rows in tables_of(section["rows"], ("model",)).items():
        what = "forward and backward, the student trained and the teacher frozen"
        yield f"**{model}**: the mean over {_sizes(rows[0])} of both sides, {what}."
        yield table(HEADER, map(_cells, rows))


def in_short(rows: list[Record], every_model: bool) -> Iterator[list[str]]:
    """Yield a line for each head, dtype and kind."""
    for (model, dtype, kind), of_kind in tables_of(rows, ("model", "dtype", "call")).items():
        own = min((row for row in of_kind if row["name"].startswith("linear_divergence")), key=lambda row: row["ms"])
        naive = next(row for row in of_kind if row["name"] == "materialised logits")
        yield [f"{model}, {dtype}, {_sizes(own)}", kind, _short(own), _short(naive)]


def pictures(rows: list[Record], device: str) -> Pictures:
    """Yield nothing: the tables are short."""
    yield from ()


def _sizes(row: Record) -> str:
    return f"{whole(row['rows'])} rows of {whole(row['vocab'])} x {whole(row['width'])}"


def _short(row: Record) -> str:
    return f"{times(row['times_floor'])} floor, {digits(row['peak_bytes'] / MIB)} MiB"


def _cells(row: Record) -> list[Any]:
    return [
        *(row["call"], row["dtype"], row["name"], digits(row["ms"]), times(row["times_floor"])),
        digits(row["peak_bytes"] / MIB),
    ]
