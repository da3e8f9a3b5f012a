"""The run folder: what is written and shown, what a resumed run finds, telemetry, pictures."""

import importlib.util
import json
import math
import os
import random
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from matplotlib.image import imread

from bupo import monitor
from bupo.config import Bupo, Data, Telemetry, TrainConfig, load_config
from bupo.data import Example
from bupo.distributed import World
from bupo.errors import ConfigError
from bupo.monitor import RunFolder, step_line
from bupo.output import progress_bar, replace_file
from bupo.plots import draw_run

pytestmark = pytest.mark.usefixtures("pictures_only_where_they_matter")

MAIN, OTHER = World(0, 2, torch.device("cpu")), World(1, 2, torch.device("cpu"))


@dataclass(frozen=True)
class FakeAccuracy:
    greedy: float

    def as_dict(self):
        row = {"greedy": self.greedy, "greedy_low": self.greedy - 0.1, "greedy_high": self.greedy + 0.1, "avg@8": 0.5}
        return row | {"sources": {"aime": {"greedy": 0.25}}}

    def __str__(self):
        return f"greedy {self.greedy:.1%} [/bold] :smile:"


def configured(path, telemetry=Telemetry(tensorboard=False), **changes):  # noqa: B008
    paths = {"model": "m", "output_dir": path, "data": Data(train="t")}
    return TrainConfig(**paths, steps=10, bupo=Bupo(layer=2, internal_steps=3), telemetry=telemetry, **changes)


def metrics(step, **changes):
    row = {"step": step, "phase": "layer 2" if step <= 3 else "final", "layers": 2 if step <= 3 else 4, "reward": 0.1 * step}
    row |= {"reward_failures": 0, "response_tokens": 812.4, "finished": 0.9, "loss": -0.0123, "entropy": 3.2, "entropy_final": 0.71}
    row |= {"kl": 1.25 if step <= 3 else None, "clip_share": 0.003, "grad_norm": 0.52, "sampler_gap": 0.0012, "mfu": None}
    row |= {"tokens_per_second": 12345.6, "memory_gib": 71.4, "seconds_rollout": 8.1, "seconds_old": 1.2, "seconds_update": 3.0}
    return row | {"seconds": 12.5, "perplexity": None, "switched": None} | changes


def episodes(run, step):
    example = Example("2+2=\nstep 99 (\n", (5, 6), "4", "sums")
    samples = [SimpleNamespace(finished=True), SimpleNamespace(finished=False)]
    responses = ["4", "\nstep 98 (layer 2)  prompt\u2028\x85" + "é∑" * step]
    run.log_episodes(step, "layer 2", example, responses, samples, [1.0, math.nan], [0.71, 0.0])


def trained(path, steps, resumed=0, **changes):
    with RunFolder(configured(path, **changes), MAIN, resumed) as run:
        for step in steps:
            run.log_step(metrics(step))
            episodes(run, step)
            run.log_accuracy(step, FakeAccuracy(step / 20))
    return run


def interrupted(folder, step):
    with suppress(KeyboardInterrupt), folder as run:
        run.log_step(metrics(step))
        raise KeyboardInterrupt


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_in(path):
    return [row["step"] for row in rows(path)]


# ---- what is written and shown


def test_a_run_leaves_its_files_and_they_read_back(tmp_path, capsys):
    run = trained(tmp_path / "run", range(1, 5))
    assert sorted(os.listdir(tmp_path / "run")) == ["accuracy.jsonl", "config.yaml", "episodes.txt", "metrics.jsonl", "run.png"]
    assert load_config(tmp_path / "run" / "config.yaml") == run.config
    assert rows(tmp_path / "run" / "metrics.jsonl") == [metrics(step) for step in range(1, 5)]
    first = rows(tmp_path / "run" / "accuracy.jsonl")[0]
    assert (first["step"], first["greedy"], first["sources"]) == (1, 0.05, {"aime": {"greedy": 0.25}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "held-out after step 1: greedy 5.0% [/bold] :smile:"  # shown as it is
    assert lines[-1] == "4 of 10 steps, 0:00:00"
    assert len([line for line in lines if line.startswith("step ")]) == 4


def test_metrics_are_there_as_soon_as_they_are_logged(tmp_path):
    with RunFolder(configured(tmp_path), MAIN) as run:
        run.log_step(metrics(1))
        assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_numbers_that_are_not_finite_become_null(tmp_path, capsys):
    with RunFolder(configured(tmp_path), MAIN) as run:
        run.log_step(metrics(1, loss=math.nan, grad_norm=math.inf, reward=None))
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["loss"], row["grad_norm"], row["reward"]) == (None, None, None)
    assert "loss +nan" in capsys.readouterr().out  # but nobody should miss it


def test_the_line_of_a_step_is_legible_and_leaves_out_what_is_not_there():
    line = step_line(metrics(2, mfu=0.38), 300)
    assert line == (
        "step   2/300  layer 2  reward 0.200  len 812  loss -0.0123  entropy 3.20 (0.71)  kl 1.25  clip 0.3%  grad 0.52  "
        "gap 0.0012  12,346 tok/s  MFU 38%  71 GiB  12.5 s (8.1+1.2+3.0)"
    )
    later = step_line(metrics(12, reward_failures=3), 300)
    assert later.startswith("step  12/300  final    reward 1.200 (3 failed)  len 812  loss -0.0123  entropy 3.20  clip")
    assert "MFU" not in later
    assert len(step_line(metrics(12, mfu=0.38), 300)) <= 160
    assert step_line({"step": 1, "phase": "final"}, 9).rstrip() == "step 1/9  final"
    assert "len 812  of 7.9 ids  loss" in step_line(metrics(2, support_size=7.93), 300)


def test_why_phase_1_ended_is_said(tmp_path, capsys):
    with RunFolder(configured(tmp_path), MAIN) as run:
        run.log_step(metrics(3, switched="KL 1.25 above 1.0"))
    assert "phase 1 ends after step 3: KL 1.25 above 1.0\n" in capsys.readouterr().out


def test_episodes_are_text_to_read(tmp_path):
    with RunFolder(configured(tmp_path), MAIN) as run:
        episodes(run, 1)
    assert (tmp_path / "episodes.txt").read_text(encoding="utf-8") == (
        "step 1 (layer 2)  prompt '2+2=\\nstep 99 (\\n'  answer '4'\n"
        "  reward 1.00  advantage +0.71  '4'\n"
        "  reward failed  advantage +0.00  '\\nstep 98 (layer 2)  prompt\\u2028\\x85é∑'  (cut off)\n\n"
    )


def test_on_other_ranks_every_method_does_nothing(tmp_path, capsys):
    with RunFolder(configured(tmp_path / "run"), OTHER) as run:
        run.say("hello")
        run.log_step(metrics(1))
        run.log_accuracy(1, FakeAccuracy(0.5))
        episodes(run, 1)
        run.show_progress("evaluation", 1, 2)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_an_interrupted_run_leaves_its_picture(tmp_path):
    interrupted(RunFolder(configured(tmp_path), MAIN), 1)
    assert (tmp_path / "run.png").exists()


def test_pictures_are_drawn_once_a_minute_at_most_and_at_the_end(tmp_path, monkeypatch):
    drawn, now = [], iter(range(0, 1000, 25))  # a look at the clock every 25 seconds
    monkeypatch.setattr(monitor, "draw_run", lambda metrics, accuracies, path: drawn.append(len(metrics)))
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    trained(tmp_path, range(1, 8))
    assert drawn == [3, 6, 7]


def test_what_is_seen_of_the_layers_is_logged_and_has_a_picture(tmp_path, tensorboard):
    with RunFolder(configured(tmp_path, Telemetry(tensorboard=True)), MAIN) as run:
        run.log_step(metrics(1, lens_entropy=[4.0, 3.5], lens_kl=[math.nan, 0.5]))
        run.log_step(metrics(2))
    first, second = rows(tmp_path / "metrics.jsonl")
    assert (first["lens_entropy"], first["lens_kl"]) == ([4.0, 3.5], [None, 0.5])
    assert "lens_kl" not in second
    scalars = {(name, value) for name, value, _ in tensorboard[0].scalars if "lens" in name}
    assert scalars == {("train/lens_entropy/00", 4.0), ("train/lens_entropy/01", 3.5), ("train/lens_kl/01", 0.5)}
    assert {"layers.png", "layers.svg", "run.png"} <= set(os.listdir(tmp_path))


# ---- resuming


def test_a_resumed_run_continues_its_files(tmp_path, capsys):
    trained(tmp_path / "whole", range(1, 8))
    trained(tmp_path / "run", range(1, 6))
    capsys.readouterr()
    run = trained(tmp_path / "run", range(4, 8), resumed=3)
    for name in ("metrics.jsonl", "accuracy.jsonl", "episodes.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["step"] for row in run.metrics] == [row["step"] for row in run.accuracies] == list(range(1, 8))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step  4/10")
    assert lines[-1] == "7 of 10 steps, 0:00:00 since step 3"


def test_wherever_a_kill_cuts_the_files_a_resumed_run_finds_whole_rows(tmp_path):
    trained(tmp_path / "run", range(1, 5))
    whole = {name: (tmp_path / "run" / name).read_bytes() for name in ("metrics.jsonl", "accuracy.jsonl", "episodes.txt")}
    text = whole["episodes.txt"].decode()
    expected = text[: text.index("step 3 (layer 2)  prompt '2+2")].encode()
    cut = random.Random(0)
    for _ in range(40):
        for name, content in whole.items():
            end = content.index(b"\n", content.index(b"step 3" if name == "episodes.txt" else b'"step": 2')) + 1
            (tmp_path / "run" / name).write_bytes(
                content[: cut.randint(end if name != "episodes.txt" else len(expected), len(content))]
            )
        with RunFolder(configured(tmp_path / "run"), MAIN, 2) as run:
            assert (len(run.metrics), len(run.accuracies)) == (2, 2)
        assert steps_in(tmp_path / "run" / "metrics.jsonl") == [1, 2]
        assert steps_in(tmp_path / "run" / "accuracy.jsonl") == [1, 2]
        assert (tmp_path / "run" / "episodes.txt").read_bytes() == expected


def test_half_a_step_number_is_not_another_step(tmp_path):
    trained(tmp_path, [1, 2])
    whole = (tmp_path / "episodes.txt").read_bytes()
    (tmp_path / "episodes.txt").write_bytes(whole + b"step 1")  # of step 12
    trained(tmp_path, [], resumed=2)
    assert (tmp_path / "episodes.txt").read_bytes() == whole


def test_a_run_killed_before_its_first_checkpoint_starts_its_files_again(tmp_path):
    with RunFolder(configured(tmp_path), MAIN) as run:
        run.log_accuracy(0, FakeAccuracy(0.5))
        run.log_step(metrics(1))
        episodes(run, 1)
    with RunFolder(configured(tmp_path), MAIN) as run:
        assert (run.metrics, [row["step"] for row in run.accuracies]) == ([], [0])
        run.log_accuracy(0, FakeAccuracy(0.4))  # evaluated again, in place of the first
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "episodes.txt").read_text() == ""
    assert [(row["step"], row["greedy"]) for row in rows(tmp_path / "accuracy.jsonl")] == [(0, 0.4)]


def test_what_cannot_be_read_is_dropped_and_said(tmp_path, capsys):
    trained(tmp_path, range(1, 4))
    good = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "phase": "la\n[1]\n{"phase": "final"}\n\0\0\xff\n' + good.encode())
    capsys.readouterr()
    trained(tmp_path, [], resumed=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(good.splitlines(keepends=True)[:2])
    assert "metrics.jsonl: 4 unreadable line(s) dropped\n" in capsys.readouterr().out


def test_what_changed_in_the_configuration_is_said(tmp_path, capsys):
    trained(tmp_path, [])
    capsys.readouterr()
    changed = configured(tmp_path).model_copy(update={"steps": 12, "bupo": None, "policy": "grpo"})
    with RunFolder(changed, MAIN):
        pass
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("config: ")]
    assert {"config: steps was 10, is 12", 'config: policy was "bupo", is "grpo"', "config: bupo.layer was 2, is absent"} <= set(
        said
    )
    assert not any("optimizer" in line for line in said)
    assert load_config(tmp_path / "config.yaml") == changed
    (tmp_path / "config.yaml").write_text("a: [1")
    with RunFolder(changed, MAIN):
        pass
    assert "config: " in (said := capsys.readouterr().out)
    assert "was unreadable" in said


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


# ---- progress


def test_the_time_left_is_known_where_steps_take_minutes():
    now = [0.0]
    progress = progress_bar()
    progress.get_time = lambda: now[0]
    task = progress.add_task("training", total=10, completed=3)
    for step in (4, 5, 6):
        now[0] += 400.0
        progress.update(task, completed=step)
    assert progress.tasks[0].time_remaining == 1600


def test_a_part_of_a_step_has_a_bar_until_it_is_done(tmp_path):
    with RunFolder(configured(tmp_path), MAIN, 3) as run:
        run.show_progress("evaluation", 5, 20)
        training, part = run.progress.tasks
        assert (training.completed, training.total, part.completed, part.total) == (3, 10, 5, 20)
        run.show_progress("evaluation", 20, 20)
        assert [task.description for task in run.progress.tasks] == ["training"]
        run.show_progress("evaluation", 0, 0)
        assert len(run.progress.tasks) == 1


# ---- telemetry


class FakeWriter:
    made: ClassVar = []

    def __init__(self, folder, **options):
        self.folder, self.options, self.scalars, self.closed = folder, options, [], False
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass


@pytest.fixture
def tensorboard(monkeypatch):
    monkeypatch.setattr(FakeWriter, "made", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeWriter))
    return FakeWriter.made


def test_tensorboard_gets_the_numbers_and_a_resumed_run_hides_what_it_does_again(tmp_path, tensorboard):
    trained(tmp_path, [1, 2], telemetry=Telemetry())
    trained(tmp_path, [2], telemetry=Telemetry(tensorboard=True), resumed=1)
    first, second = tensorboard
    assert (first.folder, first.options, second.options) == (str(tmp_path / "tensorboard"), {}, {"purge_step": 2})
    assert first.closed
    assert second.closed
    expected = {("train/reward", 0.1, 1), ("train/kl", 1.25, 2), ("heldout/greedy", 0.05, 1), ("heldout/aime/greedy", 0.25, 2)}
    assert expected <= set(first.scalars)
    names = {name for name, _, _ in first.scalars}
    assert not names & {"train/step", "train/phase", "train/mfu", "train/switched", "heldout/step", "heldout/sources"}


def test_tensorboard_is_optional_unless_it_is_asked_for(tmp_path, monkeypatch, tensorboard):
    trained(tmp_path / "off", [1], telemetry=Telemetry(tensorboard=False))
    assert tensorboard == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trained(tmp_path / "absent", [1], telemetry=Telemetry())
    for world in (MAIN, OTHER):  # the same on every rank, so that none waits for another
        with pytest.raises(ConfigError, match=r"telemetry.tensorboard: true given, accepted with tensorboard installed"):
            RunFolder(configured(tmp_path / "wanted", Telemetry(tensorboard=True)), world)
    assert not (tmp_path / "wanted").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_itself_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(name):
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]

    trained(tmp_path, range(1, 6), telemetry=Telemetry(tensorboard=True))
    assert scalars("train/reward") == [(step, pytest.approx(0.1 * step)) for step in range(1, 6)]
    with RunFolder(configured(tmp_path, Telemetry(tensorboard=True)), MAIN, 3) as run:
        run.log_step(metrics(4, reward=0.9))
    assert scalars("train/reward") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]
    assert scalars("heldout/avg@8")[0] == (1, 0.5)


class FakeWandb:
    class Error(Exception):
        pass

    def __init__(self, refuses=False):
        self.refuses, self.started, self.logged, self.metrics, self.finished = refuses, [], [], [], []

    def init(self, **options):
        if self.refuses:
            raise self.Error("api_key not configured\n(no-tty)")
        self.started.append(options)
        run = SimpleNamespace(log=self.logged.append, finish=lambda exit_code: self.finished.append(exit_code))
        run.define_metric = lambda *names, **options: self.metrics.append((names, options))
        return run


def test_weights_and_biases_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    telemetry = Telemetry(tensorboard=False, wandb="sums")
    trained(tmp_path / "run", [1, 2], telemetry=telemetry)
    interrupted(RunFolder(configured(tmp_path / "run", telemetry), MAIN, 1), 2)
    trained(tmp_path / "other", [1], telemetry=telemetry)
    first, second, third = fake.started
    assert (first["project"], first["name"], first["resume"], first["dir"]) == ("sums", "run", "allow", str(tmp_path / "run"))
    assert first["config"]["bupo"]["layer"] == 2
    assert first["id"] == second["id"] != third["id"]
    assert fake.finished == [0, 1, 0]
    assert fake.metrics[0] == (("*",), {"step_metric": "step"})
    assert fake.logged[0]["step"] == 1
    assert fake.logged[0]["train/reward"] == 0.1
    assert fake.logged[1]["heldout/aime/greedy"] == 0.25
    yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


def test_weights_and_biases_that_cannot_be_used_is_named_before_anything_is_written(tmp_path, monkeypatch):
    config = configured(tmp_path / "run", Telemetry(tensorboard=False, wandb="sums"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    for world in (MAIN, OTHER):
        with pytest.raises(ConfigError, match=r"telemetry.wandb: 'sums' given, accepted with wandb installed"):
            RunFolder(config, world)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses=True))
    with pytest.raises(ConfigError, match=r"telemetry.wandb: 'sums' given, .* said: api_key not configured \(no-tty\)$"):
        RunFolder(config, MAIN).__enter__()
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_telemetry_is_of_rank_zero_alone(tmp_path, monkeypatch, tensorboard):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    with RunFolder(configured(tmp_path, Telemetry(wandb="sums")), OTHER) as run:
        run.log_step(metrics(1))
    assert fake.started == tensorboard == []


# ---- pictures


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("table", "accuracies"),
    [
        ([metrics(1)], []),
        ([{"step": 1, "phase": "final", "reward": None}], []),
        (
            [metrics(step, perplexity=1.1 if step == 2 else None, entropy=None) for step in range(1, 7)],
            [{"step": 0, "greedy": 0.1}],
        ),
        ([metrics(step, entropy=0.0, entropy_final=0.0, kl=None) for step in range(1, 4)], [{"step": 3, "greedy": None}]),
    ],
    ids=["one step", "nothing measured", "gaps", "entropy 0"],
)
def test_a_picture_is_drawn_whatever_is_missing(tmp_path, table, accuracies):
    accuracies = [{**row, "greedy_low": row["greedy"], "greedy_high": row["greedy"]} for row in accuracies]
    draw_run(table, accuracies, tmp_path / "run.png")
    assert os.listdir(tmp_path) == ["run.png"]
    assert imread(tmp_path / "run.png").std() > 0.01


def test_the_picture_has_a_third_panel_where_guards_were_measured(tmp_path):
    for name, kl in (("two", None), ("three", 1.0)):
        draw_run([metrics(step, kl=kl) for step in range(1, 6)], [], tmp_path / name)
    assert imread(tmp_path / "three", format="png").shape[0] > imread(tmp_path / "two", format="png").shape[0]
