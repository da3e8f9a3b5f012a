"""The marked places of a README, and the numbers outside of them that no result backs.

A marked place is ``<!-- benchmarks:NAME -->…<!-- /benchmarks -->``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MARKED = re.compile(r"(<!-- benchmarks:(\S+) -->)(.*?)(<!-- /benchmarks -->)", re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
UNIT = r"%|[kMGT]i?B\b|tokens/s|[MGT]FLOP/s|(?:ms|s|seconds|minutes|hours|times)\b|[x×](?!\s?\d|\w)"
MEASURED = re.compile(rf"(?<![\w.])\d[\d.,]*\s?(?:{UNIT})")
CELL = re.compile(r"\|[\s*~<>≤≥±−-]*(\d[\d.,]*)")
# What looks like a measurement in README.md and is none, and why.
ALLOWED = {"256 MiB by default": "a setting", "or 1 GiB": "the least that another is"}


def fill(text: str, texts: Mapping[str, str]) -> str:
    """Return ``text`` with ``texts`` in its marked places, and otherwise as it was.

    Raises ``ValueError`` for a name that is not in ``texts``, and for a place that is not closed.
    """

    def filled(place: re.Match[str]) -> str:
        if place[2] not in texts:
            raise ValueError(f"<!-- benchmarks:{place[2]} -->: nothing of that name is recorded, accepted are {', '.join(texts)}")
        return place[1] + texts[place[2]] + place[4]

    result, places = MARKED.subn(filled, text)
    opened, closed = text.count("<!-- benchmarks:"), text.count("<!-- /benchmarks -->")
    if not opened == closed == places:
        raise ValueError(f"{opened} places are opened by <!-- benchmarks:NAME --> and {closed} closed by <!-- /benchmarks -->")
    return result


def unbacked(text: str) -> list[str]:
    """Return the measured numbers of a README that stand outside its marked places, :data:`ALLOWED` and code.

    Measured is a number with a unit of measurement, or one that a cell of a table begins with.
    """
    allowed = (re.compile(r"\s+".join(map(re.escape, phrase.split()))) for phrase in ALLOWED)
    for pattern in (MARKED, CODE, *allowed):
        text = pattern.sub(" ", text)
    tables = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("|"))
    return [match[0] for match in MEASURED.finditer(text)] + [match[1] for match in CELL.finditer(tables)]
