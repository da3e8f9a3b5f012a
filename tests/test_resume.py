"""Killed at any moment and resumed, a run goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from models import tiny_model
from problems import first_of
from ranks import on_ranks, start
from safetensors import safe_open
from test_training import metrics_of, moved, prepare_run, what_repeats
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo.checkpoint import Checkpoints, require_space, space_needed
from bupo.cli import main
from bupo.config import Optimizer, check_new_folder, load_config
from bupo.distributed import World
from bupo.errors import ConfigError
from bupo.evaluation import evaluate
from bupo.model import make_optimizer
from bupo.rollout import _Asking
from bupo.trainer import train

pytestmark = pytest.mark.usefixtures("pictures_only_where_they_matter")

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
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (tied: it is the embedding)
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
    assert main(["train", str(path), "steps=1", "data.heldout=[]"]) == 0
    assert main(["train", str(path), "steps=2", "data.heldout=[]", "optimizer.learning_rate=0.02"]) == 0
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


# ---- what a checkpoint says about itself


ALONE = World(0, 1, torch.device("cpu"))


def pieces(model=None, **how):
    model = model or tiny_model(tied=True)
    return model, make_optimizer(model, Optimizer(**how))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    """In that of step n the weights are n."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints, (model, optimizer) = Checkpoints(folder, 2, ALONE), pieces()
    with torch.no_grad():
        for step in (1, 2):
            for parameter in model.parameters():
                parameter.fill_(step)
            checkpoints.save(step, model, optimizer, {"schedule": {}})
    return folder


@pytest.fixture
def saved(two_checkpoints, tmp_path) -> Checkpoints:
    """Of its own for each test, which may damage them."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    return Checkpoints(tmp_path, 2, ALONE)


def put_back(checkpoints: Checkpoints, model, optimizer) -> int:
    step = checkpoints.newest(lambda step: checkpoints.load(step, model, optimizer))["step"]
    assert all((parameter == step).all() for parameter in model.parameters())
    return step


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = {
    "state.json is gone": lambda folder: (folder / "state.json").unlink(),
    "state.json is cut off": lambda folder: cut(folder / "state.json", 5),
    "state.json is something else": lambda folder: (folder / "state.json").write_text("[]"),
    "metadata is gone": lambda folder: (folder / ".metadata").unlink(),
    "metadata is cut off": lambda folder: cut(folder / ".metadata", 1000),
    "tensors are gone": lambda folder: (folder / "__0_0.distcp").unlink(),
    "tensors are cut off": lambda folder: cut(folder / "__0_0.distcp", 300_000),
    "tensors are zeros": lambda folder: (path := folder / "__0_0.distcp").write_bytes(bytes(path.stat().st_size)),
    "random states are gone": lambda folder: (folder / "random-0.pt").unlink(),
    "random states are cut off": lambda folder: cut(folder / "random-0.pt", 500),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(saved, capsys, damage):
    damage(saved.path(2))
    assert put_back(saved, *pieces()) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{saved.path(2)} is damaged (")
    assert line.endswith("): the one before it is taken")
    assert saved.steps() == [1]


def test_a_damaged_checkpoint_gives_way_to_a_new_one(saved):
    DAMAGES["tensors are zeros"](saved.path(2))
    model, optimizer = pieces()
    put_back(saved, model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2)
    saved.save(2, model, optimizer, {})
    assert put_back(Checkpoints(saved.folder, 2, ALONE), *pieces()) == 2


def test_a_damaged_checkpoint_is_none_of_those_to_keep(saved):
    saved.keep = 1
    DAMAGES["tensors are zeros"](saved.path(2))
    model, optimizer = pieces()
    put_back(saved, model, optimizer)
    saved.save(3, model, optimizer, {})
    assert saved.steps() == [3]
    assert saved.path(2).is_dir()


def test_where_every_checkpoint_is_damaged_it_is_said_in_a_line(saved, capsys):
    for step in (1, 2):
        DAMAGES["metadata is gone"](saved.path(step))
    with pytest.raises(ConfigError, match=f"output_dir: no checkpoint in {saved.folder} can be read, accepted is a new folder"):
        put_back(saved, *pieces())
    assert "there is none before it" in capsys.readouterr().out


def rope(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    return model


OTHERS = {
    "fewer layers": (lambda: tiny_model(tied=True, layers=3), "num_hidden_layers was 4, is 3"),
    "more layers": (lambda: tiny_model(tied=True, layers=5), "num_hidden_layers was 4, is 5"),
    "more tokens": (lambda: tiny_model(tied=True, vocab=62), "vocab_size was 61, is 62"),
    "another family": (lambda: tiny_model("llama", tied=True), "model_type was qwen3, is llama"),
    "untied": (lambda: tiny_model(tied=False), "tie_word_embeddings was True, is False"),
    "other positions": (lambda: rope(tiny_model(tied=True)), "rope_parameters was "),
}


@pytest.mark.parametrize(("model", "difference"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_loaded(saved, model, difference):
    model, optimizer = pieces(model())
    before = [parameter.clone() for parameter in model.parameters()]
    for load in (lambda: saved.load(2, model, optimizer), lambda: saved.load_model(2, model)):
        with pytest.raises(ConfigError, match=f"step-000002 is of another model, .* the one it was saved from: {difference}"):
            load()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("other", list(OTHERS)[:-1])  # other positions do not show in tensors
def test_so_is_one_of_before_it_said_what_it_is_by_its_tensors(saved, other):
    forget(saved.path(2))
    model, optimizer = pieces(OTHERS[other][0]())
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match="step-000002 is of "):
        saved.load(2, model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))


def forget(folder: Path) -> None:
    """What a version of bupo that did not say it yet would have written."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({key: state[key] for key in ("step", "world_size", "schedule")}))


def test_a_checkpoint_of_before_it_said_what_it_is_goes_on_and_one_of_a_later_format_is_refused(saved):
    forget(saved.path(2))
    assert put_back(saved, *pieces()) == 2
    state = json.loads((saved.path(2) / "state.json").read_text())
    (saved.path(2) / "state.json").write_text(json.dumps(state | {"format": 7}))
    with pytest.raises(ConfigError, match="is of format 7, accepted are up to 1: it comes from a newer bupo"):
        put_back(saved, *pieces())


def test_other_frozen_layers_are_refused_and_an_export_does_not_mind(saved):
    model, optimizer = pieces(upper_from=2, upper_layers=0.0)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"a run that trained 46 parameters, accepted are the same, here are {trained} "):
            put_back(saved, model, optimizer)
        forget(saved.path(2))
    assert saved.load_model(2, model) == 2


def test_what_a_configuration_says_of_the_optimizer_is_not_that_of_the_checkpoint(saved):
    model, optimizer = pieces(weight_decay=0.5, betas=(0.5, 0.6), upper_from=2, upper_layers=0.25)
    put_back(saved, model, optimizer)
    groups = [(group["weight_decay"], group["betas"], group["scale"]) for group in optimizer.param_groups]
    assert groups == [(0.5, (0.5, 0.6), 1.0), (0.5, (0.5, 0.6), 0.25)]


# ---- told to end


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(load_config(prepare_run(folder), ["checkpoints.every=1"]))
    return folder / "run"


def is_as_the(whole: Path, run: Path) -> None:
    for name in ("metrics.jsonl", "accuracy.jsonl"):
        rows = [what_repeats(map(json.loads, (folder / name).read_text().splitlines())) for folder in (run, whole)]
        assert rows[0] == rows[1]
    assert moved(run / "model", whole / "model") == set()


@pytest.mark.parametrize("told_at", first_of([2, 0]))
def test_sigterm_during_an_evaluation_is_heard_there_and_the_evaluation_made_when_the_run_goes_on(
    tmp_path, monkeypatch, capsys, told_at, whole
):
    path = prepare_run(tmp_path)
    ask, evaluations, asked = _Asking.__call__, [], []

    def told(self, ids, scores):
        if evaluations[-1] == told_at:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, ids, scores)

    def evaluate_step(*arguments, **options):
        evaluations.append((0, 2)[len(evaluations)])
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(_Asking, "__call__", told)
        patch.setattr("bupo.trainer.evaluate", evaluate_step)
        assert main(["train", str(path)]) == 0
    said = {0: "nothing was trained after step 0", 2: "a checkpoint of step 2 is written"}
    assert f"SIGTERM: {said[told_at]}; the same command goes on from there" in capsys.readouterr().out
    assert len(asked) == 1  # not another token
    assert [step.name for step in (tmp_path / "run" / "checkpoints").glob("*")] == (["step-000002"] if told_at else [])
    assert main(["train", str(path)]) == 0
    is_as_the(whole, tmp_path / "run")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_as_if_it_had_been_killed_there(tmp_path, capsys, whole):
    prepare_run(tmp_path)
    shutil.copytree(whole, tmp_path / "run")
    DAMAGES["tensors are cut off"](tmp_path / "run" / "checkpoints" / "step-000003")
    capsys.readouterr()
    assert main(["train", str(tmp_path / "run" / "config.yaml")]) == 0
    assert "step-000003 is damaged (EOFError: __0_0.distcp is cut off): the one before it is taken" in capsys.readouterr().out
    is_as_the(whole, tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(saved, tmp_path, monkeypatch, capsys):
    """dcp wraps what its threads raise into an exception of its own, which is no Exception."""

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem.torch.save", full_disk)
        with pytest.raises(BaseException, match="No space left") as raised:
            saved.save(3, *pieces(), {})
    assert not isinstance(raised.value, Exception)
    assert sorted(entry.name for entry in saved.folder.iterdir()) == ["step-000001", "step-000002"]
    assert put_back(saved, *pieces()) == 2
    path = tmp_path / "config.yaml"
    path.write_text("{model: x, output_dir: y, policy: grpo, data: {train: z}}")
    for error in (raised.value, OSError(28, "No space left on device")):

        def train_without_room(config, error=error):
            raise error

        monkeypatch.setattr("bupo.trainer.train", train_without_room)
        assert main(["train", str(path)]) == 1
        assert capsys.readouterr().err == "bupo train: the disk is full; what was written before is whole\n"


HOLD = """
import pathlib, sys, time
from bupo.output import FolderLock
with FolderLock(pathlib.Path(sys.argv[1]), "x") as lock:
    lock.take()
    print(1)
    time.sleep(99)
"""


def test_a_folder_that_another_job_writes_is_refused_until_that_job_has_ended_however_it_ends(tmp_path, capsys):
    path = prepare_run(tmp_path)
    paths = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    holder = subprocess.Popen([sys.executable, "-u", "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, env=paths)
    assert holder.stdout.readline() == b"1\n"
    (tmp_path / "run" / "config.yaml").write_text("steps: 1\n")  # as of a run
    before = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "run").rglob("*")}
    try:
        assert main(["train", str(path), "steps=1", "data.heldout=[]"]) == 2
        assert f"run is in use by process {holder.pid} on {socket.gethostname()} since 20" in capsys.readouterr().err
        assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "run").rglob("*")} == before
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / "run" / "lock").exists()  # of a process that is no more
    assert main(["train", str(path), "steps=1", "data.heldout=[]"]) == 0
    assert not (tmp_path / "run" / "lock").exists()


def test_what_a_job_leaves_that_was_killed_before_it_had_written_anything_does_not_refuse_the_next(tmp_path):
    for name in ("lock", "config.yaml.partial", "base.partial"):
        (tmp_path / name).write_text("")
        check_new_folder(tmp_path, "output_dir")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        check_new_folder(tmp_path, "output_dir")


# ---- the run folder and what is made of it


def test_a_run_folder_can_be_moved_exported_and_gone_on_with_without_the_model_it_started_from(tmp_path, monkeypatch, capsys):
    path = prepare_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = ["data.heldout=[]", "steps=1"]
    relative = ["model=start", "data.train=sums.jsonl", "output_dir=run"]
    assert main(["train", str(path), *given, *relative]) == 0
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert [Path(name) for name in (kept.model, kept.data.train, kept.output_dir)] == [
        tmp_path / name for name in ("start", "sums.jsonl", "run")
    ]
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "moved")
    shutil.rmtree(tmp_path / "start")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", "moved", "exported"]) == 0
    assert moved(tmp_path / "elsewhere" / "exported", tmp_path / "elsewhere" / "moved" / "model") == set()
    assert AutoTokenizer.from_pretrained("exported").get_vocab() == AutoTokenizer.from_pretrained("moved/model").get_vocab()
    assert main(["train", "moved/config.yaml", "steps=2"]) == 0
    assert [row["step"] for row in metrics_of(tmp_path / "elsewhere" / "moved")] == [1, 2]
    assert not (tmp_path / "run").exists()


def test_a_model_is_exported_in_the_type_it_came_in_or_in_another_on_request(tmp_path):
    path = prepare_run(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "start").bfloat16().save_pretrained(tmp_path / "start")
    assert main(["train", str(path), "data.heldout=[]", "steps=1"]) == 0
    (tmp_path / "half.partial").mkdir()  # left by an export that was killed
    (tmp_path / "half.partial" / "old.safetensors").write_text("")
    for name, words in (("half", ()), ("whole", ("--dtype", "float32"))):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / name), *words]) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("start", "run/model", "half", "whole")]
    assert [model.dtype for model in models] == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, masters in zip(models[2].parameters(), models[3].parameters(), strict=True):
        assert torch.equal(ours, masters.bfloat16())
    assert any((masters != masters.bfloat16()).any() for masters in models[3].parameters())
    assert not (tmp_path / "half" / "old.safetensors").exists()


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
