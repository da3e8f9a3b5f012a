"""The study: its plan, its records and its page, without a single run."""

import json
import math
from dataclasses import replace

import pytest
import yaml

from benchmarks import study, study_page
from bupo import demo, demo_llm
from bupo.config import override, parse_config


def test_no_run_is_planned_twice_and_each_has_a_name_of_its_own():
    runs = study.plan()
    assert len({run.name for run in runs}) == len(runs)
    for kind, task in study.TASKS.items():
        for method in study.METHODS:
            assert {run.seed for run in study_page.of_method(kind, method)} == set(range(task.seeds))
            assert set(study_page.of_method(kind, method)) <= set(runs)


@pytest.mark.parametrize("run", [run for run in study.plan() if run.kind != "flow" and run.seed == 0], ids=lambda run: run.name)
def test_the_settings_of_a_run_are_a_configuration_that_holds(run, tmp_path):
    base = {"sums": demo.CONFIG, "sequences": demo_llm.CONFIG}[run.kind]
    tree = {"model": "m", "output_dir": "o", "data": {"train": "t", "heldout": "h", "max_prompt_tokens": 8}} | base
    config = parse_config(override(yaml.safe_load(yaml.safe_dump(tree)), run.settings))
    assert (config.policy == "bupo") == (run.method == "BuPO")
    if run.method == "BuPO":
        assert (config.bupo.layer, config.bupo.internal_steps) == (run.layer, run.internal_steps)
    assert (config.optimizer.upper_layers, config.optimizer.upper_from) == {
        "frozen": (0, run.layer),
        "layer-wise rate": (0.1, run.layer),
    }.get(run.method, (1, None))


def record_of(run: study.Run) -> dict:
    """A record in which a method's accuracy depends on its place among the methods and on the seed."""
    base = {**vars(run), "seconds": 30.0, "machine": {"device": "a", "threads": 1, "commit": "c"}}
    if run.kind == "flow":
        curve = {"layers": [0, 1, 2], "mean": [9.0, 5.0, 4.5]}
        points = ("attention entropy", "ffn entropy", "layer entropy", "layer kl_to_final")
        return base | {"depth": 2, "tokens": 7, "curves": dict.fromkeys(points, curve)}
    value = 0.5 + 0.1 * list(study.METHODS).index(run.method) + 0.01 * run.seed**2
    accuracies = [{"step": 0, "greedy": 0.25, "average": 0.2}, {"step": 9, "greedy": value, "average": value - 0.1 * run.seed}]
    return base | {"accuracy": accuracies, "reward": [0.1, None, 0.3], "problems": 8, "samples": 8}


def test_runs_with_a_record_are_skipped_and_none_begins_after_the_minutes(tmp_path, monkeypatch, capsys):
    made, path = [], tmp_path / "results" / "study.json"

    def make(run, work):
        if len(made) == 2:
            made.clear()
            raise KeyboardInterrupt
        made.append(run.name)
        return record_of(run)

    monkeypatch.setattr(study, "make", make)
    runs = [run for run in study.plan() if run.kind == "sums"][:4]
    with pytest.raises(KeyboardInterrupt):
        study.make_all(runs, path, tmp_path, None)
    assert list(study.read_records(path)) == [run.name for run in runs[:2]]
    assert study.make_all(runs, path, tmp_path, minutes=0) == 2
    assert study.make_all(runs, path, tmp_path, None) == 0
    assert made == [run.name for run in runs[2:]]
    assert study.make_all(runs, path, tmp_path, minutes=0) == 0
    assert len(path.read_text().splitlines()) == 2 + len(runs)
    assert "2 of 4 runs are left" in capsys.readouterr().out


def test_a_paired_interval_is_students_over_the_seeds_that_both_have():
    # Differences of 1, 2, 3: mean 2, deviation 1, and t of two degrees of freedom is 4.303.
    found = study_page.paired({0: 2.0, 1: 4.0, 2: 6.0, 5: 99.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found == pytest.approx((2.0, 2.0 - 4.303 / math.sqrt(3), 2.0 + 4.303 / math.sqrt(3)))
    assert "one seed" in str(study_page.paired({0: 1.0}, {0: 0.5}))
    assert study_page.paired({0: 1.0}, {1: 0.5}) is None


def test_the_page_shows_every_record_and_draws_its_pictures(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "study.md"
    page.write_text((study.ROOT / "docs" / "study.md").read_text(encoding="utf-8"), encoding="utf-8")
    study_page.write_page({}, tmp_path)
    assert page.read_text().count(study_page.NOTHING) == 6
    records = {run.name: record_of(run) for run in study.plan()}
    written = study_page.write_page(json.loads(json.dumps(records)), tmp_path)
    assert {path.name for path in written} == {
        "methods-sums.svg",
        "methods-sequences.svg",
        "sweep-sums.svg",
        "flow.svg",
        "study.md",
    }
    text = page.read_text()
    assert f"{len(records)} of {len(records)} runs are there" in text
    assert study_page.NOTHING not in text
    assert "| BuPO | 5 | 20.0 | 66.0 | 46.0 | +10.0 [+10.0, +10.0] | +10.0 [+10.0, +10.0] |" in text
    assert "+10.0 [+10.0, +10.0]" in study_page.method_table(records, "sequences")
    some = {name: record for name, record in records.items() if record["seed"] == 0}
    assert "one seed" in study_page.method_table(some, "sums")
    study_page.write_page(some, tmp_path)


def test_the_committed_page_is_what_its_records_say():
    records = study.read_records(study.RECORDS)
    assert study_page.page(records, study.ROOT) == (study.ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert set(records) <= {run.name for run in study.plan()}


def test_a_failed_run_says_which_command_failed_and_how(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)bupo train .*none.yaml: exit code 2.*is not a file"):
        study.bupo("train", tmp_path / "none.yaml", log=tmp_path / "log")
    assert replace(study.plan()[0], seed=1).name == study.plan()[0].name  # a flow has no seed
