"""The benchmark of supports: what it measures, what it writes, and what the page says of it."""

import json

import pytest

from benchmarks import report, support
from benchmarks.records import read_results

pytestmark = pytest.mark.usefixtures("no_rates")


def test_every_contender_is_measured_and_the_page_has_them(tmp_path, capsys):
    assert support.main(["--device", "cpu", "--models", "tiny", "--rounds", "2", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["support"]["rows"]
    names = ["on supports, native", "on supports, torch", "full op (another policy)", "masked full logits"]
    assert [row["name"] for row in rows] == 4 * names
    assert all(len(row["ms_of_rounds"]) == 2 and row["ms"] > 0 for row in rows)
    assert "tiny, bfloat16, forward+backward: 64 rows" in capsys.readouterr().out
    page, places = report.page(read_results(tmp_path)), report.blocks(read_results(tmp_path))
    assert all(page.count(f"| {name} |") == 4 for name in names)
    assert places["support"].count("tiny, ") == 2


def test_what_computes_the_same_must_give_the_same(monkeypatch):
    def wrong(self):
        logprobs, entropy = masked(self)
        return logprobs + 1, entropy

    masked = support.Problem.masked
    monkeypatch.setattr(support.Problem, "masked", wrong)
    with pytest.raises(RuntimeError, match="on supports, native, forward, float32: differs by"):
        support.main(["--device", "cpu", "--models", "tiny", "--rounds", "1"])


def test_a_sure_policy_has_the_sizes_that_are_known_of_one():
    sizes = sorted(support.sure_sizes(20000))
    assert 0.45 < sizes.count(1) / 20000 < 0.49
    assert 7 < sum(sizes) / 20000 < 9
    assert sizes[10000] == 2
    assert 70 < sizes[19800] < 95


def test_the_record_is_of_a_real_model():
    recorded = json.loads(support.DATA.read_text())
    sizes = sorted(recorded["sizes"])
    assert len(sizes) >= support.SHAPES["SmolLM2-135M"][2]
    assert sizes[0] == 1
    assert recorded["largest_gap_on_supports"] <= 1e-4 < recorded["mean_gap_on_all"]
