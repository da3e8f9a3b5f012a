"""The benchmark of divergences: what it measures, what it writes, and what the page says of it."""

import json

import pytest

from benchmarks import divergence, report
from benchmarks.records import read_results

pytestmark = pytest.mark.usefixtures("no_rates")


def test_every_contender_is_measured_and_the_page_has_them(tmp_path, capsys):
    assert divergence.main(["--device", "cpu", "--models", "tiny", "--rounds", "2", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["divergence"]["rows"]
    names = [divergence.FLOOR, "linear_divergence, native", "linear_divergence, torch", divergence.NAIVE]
    assert [row["name"] for row in rows] == 6 * names
    assert all(len(row["ms_of_rounds"]) == 2 and row["ms"] > 0 for row in rows)
    assert all(row["times_floor"] == 1 for row in rows if row["name"] == divergence.FLOOR)
    assert "tiny, bfloat16, jsd: 64 rows of 500 x 32" in capsys.readouterr().out
    page = report.page(read_results(tmp_path))
    assert all(page.count(f"| {name} |") == 6 for name in names)


def test_what_computes_the_same_must_give_the_same(monkeypatch):
    naive = divergence.Problem.naive
    monkeypatch.setattr(divergence.Problem, "naive", lambda self, kind: tuple(2 * x for x in naive(self, kind)))
    with pytest.raises(RuntimeError, match="linear_divergence, native, forward_kl, float32: differs by"):
        divergence.main(["--device", "cpu", "--models", "tiny", "--rounds", "1"])
