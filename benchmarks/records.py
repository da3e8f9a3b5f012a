"""Files of results: what they hold, and which of their rows belong together.

A file of results is ``{section: {"machine", "rates", "rows"}}`` (:mod:`bupo.measurement`). What is null in a row may be left out.
The rows of the sections are

kernels
    ``group``, ``model``, ``vocab``, ``width``, ``rows``, ``layers``, ``dtype``, ``active`` (share of the rows that count),
    ``distribution`` (of the timed rounds), ``name``, ``who`` (:data:`ORDER`), ``computes``, ``remark``, ``reason`` (why it is not
    measured, or null); if it is: ``ms`` (median) and ``ms_of_rounds``, ``times_floor`` (median of the rounds' ratios),
    ``useful_tflops`` (of the floor's products over the active rows), ``algorithm_products`` (of 2·N·V·D FLOP, that it takes),
    ``peak_bytes`` (beyond operands and results), ``stated_bytes``, ``errors`` (distribution -> ``logprobs``, ``entropy``: largest
    |Δ|; ``hidden``, ``weight``: relative Frobenius error of the gradients)
step
    what tells steps apart (:data:`STEP`), ``name``, ``reason``; ``seconds`` and ``seconds_of_rounds``, ``tokens_per_second``,
    ``peak_bytes`` (beyond weights and optimizer state), ``loss``, ``gradient_difference`` (from the first side, relative)
scaling
    ``axis``, ``contender``, ``dtype``, ``fixed``, ``points`` (``value``, ``ms``, ``ms_of_rounds``, ``flops``), ``fit``
    (``fixed_ms``, ``tflops``, ``r2``)
support
    ``model``, ``vocab``, ``width``, ``rows``, ``ids`` (of all rows' supports), ``dtype``, ``call``, ``name``, ``ms`` and
    ``ms_of_rounds``, ``peak_bytes`` (beyond operands and results)
divergence
    ``model``, ``vocab``, ``width``, ``rows``, ``dtype``, ``call`` (the kind), ``name``, ``ms`` and ``ms_of_rounds``,
    ``times_floor`` (median of the rounds' ratios), ``peak_bytes`` (beyond operands and results)
lens
    ``model``, ``layers``, ``rows`` (of each layer), ``vocab``, ``width``, ``dtype``, ``name`` (of the outputs), ``ms`` and
    ``ms_of_rounds``, ``ratio`` (median time over that of the bare products)
vocab_parallel
    beside the rows ``ranks``; ``model``, ``vocab``, ``width``, ``rows``, ``dtype``, ``call``, ``name``, ``ms`` and
    ``ms_of_rounds``, ``of_shards`` (median of the rounds' ratios to the call on shards)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bupo.measurement import instruction_set

SECTIONS = ("kernels", "step", "scaling", "support", "divergence", "lens", "vocab_parallel")
ORDER = ("floor", "naive", "ours", "peer")
KERNEL = ("group", "model", "layers", "rows", "vocab", "width", "dtype", "active", "distribution")  # these tell tables apart
STEP = ("model", "phase", "layer", "layers", "sequences", "length", "dtype", "checkpointing")

Row = TypeVar("Row", bound=dict[str, Any])
Results = dict[str, dict[str, Any]]  # name of the file -> section -> what was measured


class Record(dict[str, Any]):
    """An object of results that has every field: one that was null or left out is as in :data:`DEFAULTS`, or None."""

    def __missing__(self, name: str) -> Any:
        return DEFAULTS.get(name)

    @staticmethod
    def of(value: Any) -> Any:
        """Return ``value`` with records in the place of dictionaries, at any depth."""
        if isinstance(value, dict):
            return Record((name, Record.of(field)) for name, field in value.items() if field is not None)
        return list(map(Record.of, value)) if isinstance(value, list) else value


OBJECTS = ("machine", "versions", "rates", "gemm_tflops", "errors", "fixed", "fit")
LISTS = ("rows", "points", "ms_of_rounds", "instruction_sets")
DEFAULTS = {"active": 1.0, "layers": 1} | {name: Record() for name in OBJECTS} | {name: [] for name in LISTS}


class Machine(NamedTuple):
    """A file of results: its name; the device in words, of a CPU with instruction set and threads; and those of :data:`SECTIONS`
    that have rows."""

    name: str
    device: str
    sections: dict[str, Record]


def read_results(folder: Path) -> Results:
    """Return the content of every JSON file of ``folder`` by its name without the ending; nothing where there is no folder.

    Raises ``ValueError`` for a file that is no JSON object of objects.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is no file of results ({error}), accepted are JSON objects of sections") from None
        if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
            raise ValueError(f"{path}: is no file of results, accepted are JSON objects of sections")
        results[path.stem] = content
    return results


def machines(results: Results) -> list[Machine]:
    """Return the files of results that have rows in any of :data:`SECTIONS`."""
    found = []
    for name, content in results.items():
        sections = {key: Record.of(content[key]) for key in SECTIONS if content.get(key, {}).get("rows")}
        if sections:
            machine = next((section["machine"] for section in sections.values() if section["machine"]), Record())
            threads = machine["threads"]
            words = [machine.get("device", name), instruction_set(machine["instruction_sets"])]
            words += [f"{threads} thread{'s' * (threads > 1)}" if threads else ""]
            found.append(Machine(name, ", ".join(filter(None, words)), sections))
    return found


def tables_of(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple, list[Row]]:
    """Return ``rows`` by their values of ``keys``, in the order of the first of each."""
    tables: dict[tuple, list[Row]] = {}
    for row in rows:
        tables.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return tables


def that_ran(rows: Iterable[Record], measure: str = "ms") -> list[Record]:
    """Return the rows that have the ``measure``."""
    return [row for row in rows if row.get("reason") is None and row.get(measure) is not None]


def fastest(rows: Iterable[Record], measure: str = "ms") -> Record | None:
    """Return the row with the least of the ``measure``, None where none ran."""
    return min(that_ran(rows, measure), key=lambda row: row[measure], default=None)
