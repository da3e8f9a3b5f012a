"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Return a line for each row with its cells in columns; with ``numbers`` all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [f"{cell:{'>' if numbers else '<'}{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(("   " if numbers else "  ").join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return lines
