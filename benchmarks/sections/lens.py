"""The section of :mod:`benchmarks.lens`: the outputs of a logit lens, over the bare products."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.drawing import Pictures
from benchmarks.records import Record, tables_of
from benchmarks.text import digits, table, times, whole

TITLE = "Outputs of a logit lens"
HEADER = ("output", "dtype", "ms:", "× bare products:")
SHORT_HEADER = ("", "× bare products")
SHORT_NOTE = ""


def paragraphs(section: Record) -> Iterator[str]:
    """Yield the sizes of each model, and a table of the outputs."""
    for (model,), rows in tables_of(section["rows"], ("model",)).items():
        layers, count, vocab, width = (whole(rows[0][name]) for name in ("layers", "rows", "vocab", "width"))
        yield f"**{model}**: {layers} layers of {count} rows, V = {vocab}, D = {width}."
        yield table(HEADER, ([row["name"], row["dtype"], digits(row["ms"]), times(row["ratio"])] for row in rows))


def in_short(rows: list[Record], every_model: bool) -> Iterator[list[str]]:
    """Yield a line for each output."""
    for row in rows:
        yield [f"{row['model']}, {row['dtype']}, {row['name']}", times(row["ratio"])]


def pictures(rows: list[Record], device: str) -> Pictures:
    """Yield nothing: the tables are short."""
    yield from ()
