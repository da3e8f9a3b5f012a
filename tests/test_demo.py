"""The demo learns. Slow (minutes), so it is not part of `make test`: `make test-demo`, which CI runs too."""

import json

import pytest

from bupo.cli import main


@pytest.mark.slow
def test_bupo_raises_held_out_greedy_accuracy_by_twelve_points(tmp_path):
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    accuracies = [json.loads(line) for line in (tmp_path / "demo" / "run" / "accuracy.jsonl").read_text().splitlines()]
    assert accuracies[-1]["greedy"] >= accuracies[0]["greedy"] + 0.12
    analysis = tmp_path / "demo" / "analysis"
    assert json.loads((analysis / "summary.json").read_text())["perplexity"] < 2  # of 14 words
    assert all((analysis / name).stat().st_size for name in ("report.html", "statistics.parquet", "entropy_flow.png"))
    assert (tmp_path / "demo" / "run" / "layers.png").exists()
