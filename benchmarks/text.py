"""How numbers and tables are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.records import Record

MIB, GIB = 2**20, 2**30


def digits(number: float | None, unit: float = 1) -> str:
    """Return ``number / unit`` with three significant digits; "–" for None."""
    if not number:
        return "–" if number is None else "0"
    rounded = float(f"{number / unit:.2e}")
    power = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, 2 - power)}f}" if power >= -3 else tiny(rounded)


def tiny(number: float | None) -> str:
    """Return an error, of which the power matters; "–" for None."""
    return f"{number:.1e}" if number else "–" if number is None else "0"


def whole(number: object) -> str:
    """Return a size or a setting with all its digits; text as it is, "–" for None."""
    if isinstance(number, float):
        return f"{number:g}"
    return f"{number:,}" if isinstance(number, int) else "–" if number is None else str(number)


def times(number: float | None) -> str:
    """Return a ratio as "1.23x"; "–" for None."""
    return "–" if number is None else f"{digits(number)}x"


def rates(section: Record, dtype: str | None = None) -> str:
    """Return the machine's own rates, of one dtype or of all."""
    products, copy = section["rates"]["gemm_tflops"], section["rates"]["copy_gb_per_s"]
    found = [f"{name} GEMM {digits(rate)} TFLOP/s" for name, rate in products.items() if dtype in (None, name)]
    found += [f"copy {digits(copy)} GB/s"] if copy else []
    return "The machine's own rates: " + (", ".join(found) or "not measured")


def not_measured(row: Record) -> str:
    """Return why a row was not measured; empty for one that was."""
    return "" if row["reason"] is None else f"not measured: {row['reason']}"


def slower(own: Record, other: Record, measure: str) -> bool:
    """Return whether this library took longer, as it is printed."""
    return float(f"{own[measure]:.2e}") > float(f"{other[measure]:.2e}")


def cell(value: object) -> str:
    """Return ``value`` in one line and without what Markdown would take for its own."""
    return " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of Markdown. A heading that ends in ":" is that of numbers, which are aligned to the right."""
    rule = ["---:" if name.endswith(":") else "---" for name in header]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in ([name.rstrip(":") for name in header], rule, *rows))
