"""The benchmark of a vocabulary on several ranks: what it measures, what it writes, and what the page says of it."""

import json

from benchmarks import report, vocab_parallel
from benchmarks.records import read_results


def test_every_contender_is_measured_and_the_page_has_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vocab_parallel, "rates", lambda device: {})  # which takes longer than all else
    assert vocab_parallel.main(["--models", "tiny", "--dtypes", "float32", "--rounds", "1", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["vocab_parallel"]["rows"]
    names = [vocab_parallel.WHOLE, vocab_parallel.SHARDS, vocab_parallel.ALONE, vocab_parallel.COLLECTIVES]
    assert [row["name"] for row in rows] == 3 * names
    assert all(len(row["ms_of_rounds"]) == 1 and row["ms"] > 0 for row in rows)
    assert all(row["of_shards"] == 1 for row in rows if row["name"] == vocab_parallel.SHARDS)
    assert "tiny, float32, one-pass loss: 16 rows of 501 x 32" in capsys.readouterr().out
    page = report.page(read_results(tmp_path))
    assert all(page.count(f"| {name} |") == 3 for name in names)
