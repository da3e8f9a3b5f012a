"""Killed at any moment and resumed, a run goes on as if nothing had happened."""

import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from ranks import on_ranks, start
from test_training import metrics_of, moved, prepare_run, what_repeats
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from bupo.checkpoint import require_space, space_needed
from bupo.cli import main
from bupo.config import ConfigError, load_config
from bupo.trainer import train

STEPS, INTERNAL = 8, 4
OVERRIDES = [
    f"steps={STEPS}",
    f"bupo.internal_steps={INTERNAL}",
    "bupo.guards.perplexity=1000",
    "checkpoints.every=1",
    "rollout.engine=continuous",
    "rollout.max_new_tokens=6",
    "optimizer.learning_rate=0.001",
    "evaluation.every=0",
    "data.heldout={}/sums.jsonl",
]


def overrides(folder: Path, run: str) -> list[str]:
    return [*(text.format(folder) for text in OVERRIDES), f"output_dir={folder / run}"]


def command_train(*arguments: str) -> None:
    sys.exit(main(["train", *arguments]))


def start_training(folder: Path, run: str) -> BaseProcess:
    return start("test_resume:command_train", [str(folder / "config.yaml"), *overrides(folder, run)], folder / f"{run}.log")


def end_of(process: BaseProcess, timeout: float = 200) -> int | None:
    process.join(timeout)
    return process.exitcode


def wait_for_steps(process: BaseProcess, run: Path, count: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < count:
        assert process.exitcode is None, run.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.01)


def test_a_run_killed_in_each_phase_and_at_the_boundary_ends_bit_for_bit_as_if_it_had_not_been(tmp_path):
    prepare_run(tmp_path)
    assert end_of(start_training(tmp_path, "whole")) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    chance = random.Random(0)
    for steps in (2, INTERNAL, INTERNAL + 2):
        process = start_training(tmp_path, "killed")
        wait_for_steps(process, tmp_path / "killed", steps)
        time.sleep(chance.uniform(0, 0.3))  # anywhere: in a rollout, in an update, while a checkpoint is written
        process.kill()
        process.join()
    process = start_training(tmp_path, "killed")
    wait_for_steps(process, tmp_path / "killed", STEPS - 1)
    process.terminate()  # SIGTERM, a notice: the step is finished, a checkpoint written
    assert end_of(process, 100) == 0
    assert end_of(start_training(tmp_path, "killed")) == 0, (tmp_path / "killed.log").read_text()[-3000:]

    whole, killed = (what_repeats(metrics_of(tmp_path / run)) for run in ("whole", "killed"))
    assert [row["step"] for row in killed] == list(range(1, STEPS + 1))
    assert killed == whole
    assert [row["phase"] for row in whole] == ["layer 2"] * INTERNAL + ["final"] * (STEPS - INTERNAL)
    assert moved(tmp_path / "whole" / "model", tmp_path / "killed" / "model") == set()
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2  # keep: 2, and nothing half-written


def rank_train(config: str, *given: str) -> None:
    train(load_config(Path(config), given))


def test_a_checkpoint_of_two_ranks_is_that_of_one_and_goes_on_on_one(tmp_path):
    path = prepare_run(tmp_path)
    given = ["steps=2", "evaluation.every=0", "bupo.internal_steps=2"]
    on_ranks("test_resume:rank_train", 2, str(path), *given)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    assert moved(tmp_path / "run" / "model", tmp_path / "exported") == set()
    assert moved(tmp_path / "start", tmp_path / "exported") != set()
    assert main(["train", str(path), "steps=4", *given[1:]]) == 0
    rows = metrics_of(tmp_path / "run")
    assert [(row["step"], row["phase"]) for row in rows] == [(1, "layer 2"), (2, "layer 2"), (3, "final"), (4, "final")]
    assert moved(tmp_path / "exported", tmp_path / "run" / "model") != set()


def test_what_was_left_of_an_unfinished_checkpoint_is_not_one(tmp_path):
    path = prepare_run(tmp_path)
    train(load_config(path, ["steps=1"]))
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000002.partial").mkdir()
    (folder / "step-000002.partial" / "state.json").write_text("{")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    train(load_config(path, ["steps=2", "checkpoints.every=1"]))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-000001", "step-000002"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before_it(tmp_path, monkeypatch):
    path = prepare_run(tmp_path)
    train(load_config(path, ["steps=1"]))

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bupo.checkpoint._random_state", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(load_config(path, ["steps=2", "checkpoints.every=1"]))
    monkeypatch.undo()
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    train(load_config(path, ["steps=2"]))
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]


def test_a_run_is_not_continued_where_that_is_not_wanted_or_not_possible(tmp_path, capsys):
    path = prepare_run(tmp_path)
    assert main(["train", str(path), "steps=2"]) == 0
    assert main(["train", str(path), "steps=2", "checkpoints.resume=never"]) == 2
    assert "run is not empty, accepted is a new or empty folder" in capsys.readouterr().err
    assert main(["train", str(path), "steps=1"]) == 2
    assert "steps: 1 given, accepted are 2 and more" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "1"]) == 2
    assert "--step: 1 given, accepted are 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_continued_run_says_what_was_changed(tmp_path, capsys):
    path = prepare_run(tmp_path)
    assert main(["train", str(path), "steps=1"]) == 0
    assert main(["train", str(path), "steps=2", "optimizer.learning_rate=0.02"]) == 0
    out = capsys.readouterr().out
    assert "config: steps was 1, is 2" in out
    assert "config: optimizer.learning_rate was 0.01, is 0.02" in out


def test_a_disk_without_room_is_refused_before_training(tmp_path, monkeypatch, capsys):
    path = prepare_run(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert main(["train", str(path)]) == 2
    assert "output_dir: " in (error := capsys.readouterr().err)
    assert "GiB free, accepted are at least" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="free"):
        require_space(tmp_path, 1001)


def test_a_checkpoint_holds_three_numbers_a_parameter_from_the_first_step_on(tmp_path):
    """Weights and two moments, of every parameter, also of those that phase 1 does not train: what the room is asked for."""
    path = prepare_run(tmp_path)
    train(load_config(path, ["steps=1"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    reader = FileSystemReader(tmp_path / "run" / "checkpoints" / "step-000001")
    saved = {name: entry for name, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")}
    moments = sum(entry.size.numel() for name, entry in saved.items() if "exp_avg" in name)
    assert moments == 2 * model.num_parameters()
    assert space_needed(model.num_parameters(), keep=2) == model.num_parameters() * 4 * 10
