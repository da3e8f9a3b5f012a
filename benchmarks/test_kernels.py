"""The tables of :mod:`benchmarks.kernels` as pytest-benchmark's groups: ``pytest benchmarks/test_kernels.py --benchmark-only``.

All contenders of a group are measured together, taking turns, when the first of its tests runs; each test then hands its
contender's times to pytest-benchmark, so that its options for sorting, saving and comparing apply. Contenders that do not run here
are skipped with the reason (``-rs``). Errors and memory are in the table behind the tests.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.inputs import Case, Inputs
from benchmarks.kernels import CASES, contenders, measure, of_group, title

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5
# The first of a kind each; python -m benchmarks.kernels takes more, and any other.
TABLES = [(group, of_group(group, case)) for case, groups in CASES[DEVICE.type][:3] for group in groups]


class Replay:
    """pytest-benchmark's timer: it stands still until a measured time has passed."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


replay = Replay()


@functools.cache
def table(group: str, case: Case, selected: frozenset[str]) -> dict[str, dict]:
    torch.manual_seed(0)
    return {row["name"]: row for row in measure(group, case, DEVICE, ROUNDS, chosen=lambda c: c.name in selected)}


@functools.cache
def names(group: str) -> list[str]:
    return [contender.name for contender in contenders(group, Inputs(Case.of("tiny", 8), torch.device("cpu")))]


def rows():
    for group, case in TABLES:
        for name in names(group):
            yield pytest.param(group, case, name, id=f"{group}, {case.model} {case.rows} {case.dtype} {case.active:g}: {name}")


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("group", "case", "name"), list(rows()))
def test_contender(request, benchmark, measured_rows, group, case, name):
    of_table = (item.callspec.params for item in request.session.items if item.originalname == request.node.originalname)
    selected = frozenset(found["name"] for found in of_table if (found["group"], found["case"]) == (group, case))
    row = table(group, case, selected)[name]
    measured_rows.append(row)
    if row["reason"] is not None:
        pytest.skip(row["reason"])
    benchmark.group = title(row)
    benchmark.extra_info |= {k: row[k] for k in ("times_floor", "useful_tflops", "peak_bytes", "stated_bytes", "errors", "remark")}
    rounds = iter(row["ms_of_rounds"])
    benchmark.pedantic(lambda: replay.passes(next(rounds) / 1e3), rounds=len(row["ms_of_rounds"]))
