"""The section of :mod:`benchmarks.support`: log-probs on the supports that a sampler kept, beside the full op and masked logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.drawing import Pictures
from benchmarks.records import Record, tables_of
from benchmarks.text import MIB, digits, table, times, whole

TITLE = "Supports that a sampler kept"
HEADER = ("call", "dtype", "contender", "ms:", "µs a row:", "times as long:", "peak MiB:")
SHORT_HEADER = ("", "on supports", "full op (another policy)", "masked full logits")
SHORT_NOTE = ""


def paragraphs(section: Record) -> Iterator[str]:
    """Yield what each head's supports are, and a table of its calls."""
    for (model,), rows in tables_of(section["rows"], ("model",)).items():
        yield f"**{model}**: {_sizes(rows[0])}, in units of the fastest on supports."
        yield table(HEADER, (_cells(row, rows) for row in rows))


def in_short(rows: list[Record], every_model: bool) -> Iterator[list[str]]:
    """Yield a line for each head and dtype, of forward and backward together."""
    both = [row for row in rows if row["call"] == "forward+backward"]
    for (model, dtype), of_head in tables_of(both, ("model", "dtype")).items():
        own = _own(of_head)
        others = [row for row in of_head if not _is_own(row)]
        first = f"{model}, {dtype}, {_sizes(of_head[0])}"
        yield [first, _short(own), *(f"{_short(row)}, {times(row['ms'] / own['ms'])}" for row in others)]


def pictures(rows: list[Record], device: str) -> Pictures:
    """Yield nothing: the tables are short."""
    yield from ()


def _is_own(row: Record) -> bool:
    return row["name"].startswith("on supports")


def _own(rows: list[Record]) -> Record:
    return min(filter(_is_own, rows), key=lambda row: row["ms"])


def _sizes(row: Record) -> str:
    return f"{whole(row['rows'])} rows with {digits(row['ids'] / row['rows'])} of {whole(row['vocab'])} ids on average"


def _short(row: Record) -> str:
    return f"{digits(1e3 * row['ms'] / row['rows'])} µs a row, {digits(row['peak_bytes'] / MIB)} MiB"


def _cells(row: Record, rows: list[Record]) -> list[Any]:
    same = [other for other in rows if (other["call"], other["dtype"]) == (row["call"], row["dtype"])]
    per_row, ratio = digits(1e3 * row["ms"] / row["rows"]), times(row["ms"] / _own(same)["ms"])
    return [row["call"], row["dtype"], row["name"], digits(row["ms"]), per_row, ratio, digits(row["peak_bytes"] / MIB)]
