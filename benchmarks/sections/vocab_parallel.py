"""The section of :mod:`benchmarks.vocab_parallel`: shards of a vocabulary on several ranks, and what goes over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.drawing import Pictures
from benchmarks.records import Record, tables_of
from benchmarks.text import digits, table, whole

TITLE = "A vocabulary on several ranks"
HEADER = ("call", "dtype", "contender", "ms:", "of shards:")


def paragraphs(section: Record) -> Iterator[str]:
    """Yield the size of each head, and a table of its calls."""
    for (model,), rows in tables_of(section["rows"], ("model",)).items():
        sizes = f"{whole(rows[0]['rows'])} rows of {whole(rows[0]['vocab'])} x {whole(rows[0]['width'])}"
        yield f"**{model}**: {sizes} on {section['ranks']} ranks of one thread each, by gloo."
        yield table(HEADER, map(_cells, rows))


def pictures(rows: list[Record], device: str) -> Pictures:
    """Yield nothing: the tables are short."""
    yield from ()


def _cells(row: Record) -> list[Any]:
    return [row["call"], row["dtype"], row["name"], digits(row["ms"]), f"{row['of_shards']:.1%}"]
