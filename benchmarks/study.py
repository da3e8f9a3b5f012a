"""The study: BuPO beside GRPO and its rivals, on two tasks that fit two cores; every run of it, resumable.

``python -m benchmarks.study`` makes the runs of :func:`plan` that have no record yet, one after the other, each a ``bupo`` process
of its own, adds a record of each to ``benchmarks/results/study.json``, and writes ``docs/study.md`` and its pictures from these.
Interrupted at any point, the same command goes on. Data are functions of the seed, and so is everything else.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__" and __package__ is None:
    sys.path[0] = str(Path(__file__).parent.parent)

from bupo.config import override
from bupo.errors import ConfigError
from bupo.output import replace_file
from bupo.packaged import require_packaged

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "study.json"
WORK = ROOT / "build" / "study"


@dataclass(frozen=True)
class Task:
    """A task with a first model, and how long it is trained."""

    title: str
    layers: int  # of the model
    layer: int  # of the internal policy, and the last with the full learning rate in the rivals
    internal_steps: int
    seeds: int  # how many compare the methods
    sweep_layers: tuple[int, ...] = ()
    sweep_steps: tuple[int, ...] = ()
    sweep_seeds: int = 0
    settings: tuple[str, ...] = ()  # what differs from the demo's configuration
    minutes: float = 1.0  # a guess of what a run takes, until there are records


TASKS = {
    "sums": Task(
        "two-digit sums, Qwen3 of 1.2 M parameters, warmed up until a fifth of its samples are right",
        layers=4,
        layer=3,
        internal_steps=15,
        seeds=5,
        sweep_layers=(1, 2, 3),
        sweep_steps=(10, 25, 50, 75),
        sweep_seeds=1,  # a cliff as the paper's, of tens of points, would stand out of the spread of seeds; twelve runs a seed
        settings=("steps=100", "evaluation.every=0", "telemetry.lens_every=0", "telemetry.tensorboard=false"),
        minutes=1.5,
    ),
    "sequences": Task(
        "arithmetic sequences, SmolLM2-135M-Instruct",
        layers=30,
        layer=29,
        internal_steps=3,
        seeds=3,
        settings=(
            "steps=20",
            "evaluation.every=0",
            "evaluation.samples=8",
            "evaluation.k=[1]",
            "checkpoints.every=10",
            "telemetry.lens_every=0",
            "telemetry.tensorboard=false",
        ),
        minutes=7.0,
    ),
}
WARM_ACCURACY = 0.2  # of the sums; the demo's is higher, and leaves the methods too little to differ in

# The settings of each method, of the layer and the number of internal steps.
METHODS: dict[str, Callable[[int, int], tuple[str, ...]]] = {
    "GRPO": lambda layer, steps: ("policy=grpo",),
    "BuPO": lambda layer, steps: ("policy=bupo", f"bupo.layer={layer}", f"bupo.internal_steps={steps}"),
    "frozen": lambda layer, steps: ("policy=grpo", f"optimizer.upper_from={layer}", "optimizer.upper_layers=0"),
    "layer-wise rate": lambda layer, steps: ("policy=grpo", f"optimizer.upper_from={layer}", "optimizer.upper_layers=0.1"),
    "OISD": lambda layer, steps: ("policy=oisd", f"oisd.layer={layer}"),
}
FLOWS = {"smollm2": True, "gemma3-270m": False}  # models whose entropy flow is read, and whether they take chats


@dataclass(frozen=True)
class Run:
    """One run of the study: a training, or the reading of a model's layers (``kind`` "flow")."""

    kind: str  # of TASKS, or "flow"
    method: str  # of METHODS; of a flow "raw" or "normed"
    seed: int
    layer: int = 0
    internal_steps: int = 0
    model: str = ""  # of a flow

    @property
    def name(self) -> str:
        """The name of its record and of its folder."""
        if self.kind == "flow":
            return f"flow-{self.model}-{self.method}"
        place = f"-layer{self.layer}-steps{self.internal_steps}" if self.method == "BuPO" else ""
        return f"{self.kind}-{self.method.replace(' ', '-')}{place}-seed{self.seed}"

    @property
    def settings(self) -> tuple[str, ...]:
        """What is given to ``bupo train`` beside the task's configuration."""
        return (*TASKS[self.kind].settings, *METHODS[self.method](self.layer, self.internal_steps), f"seed={self.seed}")


def plan() -> list[Run]:
    """Return all runs of the study, the most telling first; no run is there twice."""
    runs = [Run("flow", method, 0, model=model) for model in FLOWS for method in ("raw", "normed")]
    for seed in range(max(task.seeds for task in TASKS.values())):
        for kind, task in TASKS.items():
            if seed < task.seeds:
                runs += [Run(kind, method, seed, task.layer, task.internal_steps) for method in METHODS]
    for kind, task in TASKS.items():
        for seed in range(task.sweep_seeds):
            runs += [Run(kind, "BuPO", seed, layer, steps) for layer in task.sweep_layers for steps in task.sweep_steps]
    return list(dict.fromkeys(runs))


# ---- making runs


def bupo(*arguments: object, log: Path) -> None:
    """Run a ``bupo`` command with its output at the end of ``log``. Raises ``RuntimeError`` with the last lines where it fails."""
    words = [str(argument) for argument in arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ bupo {shlex.join(words)}\n")
        file.flush()
        code = subprocess.run([sys.executable, "-m", "bupo", *words], stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        ending = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        raise RuntimeError("\n".join([f"bupo {shlex.join(words)}: exit code {code}; the end of {log}:", *ending]))


def start_of(run: Run, work: Path) -> Path:
    """Make, unless it is there, what all runs of a task and seed begin with; return the configuration in it."""
    from bupo import demo, demo_llm

    folder = work / f"{run.kind}-start-{run.seed}"
    done = folder / "config.yaml"
    if done.exists():
        return done
    shutil.rmtree(folder, ignore_errors=True)
    if run.kind == "sums":
        return demo.prepare(folder, "bupo", run.seed, WARM_ACCURACY)  # which writes the configuration last
    folder.mkdir(parents=True)
    return demo_llm.write_config(done, converted("smollm2", work), folder, demo_llm.write_data(folder, run.seed), "bupo", run.seed)


def converted(model: str, work: Path) -> Path:
    """Return the folder of a packaged model, which is made unless it is there."""
    if not (work / model).is_dir():
        bupo("export", model, work / model, log=work / f"{model}.log")
    return work / model


def make(run: Run, work: Path) -> dict[str, Any]:
    """Make a run, or go on with it, in a folder of its own, which is removed; return its record."""
    started = time.monotonic()
    folder = work / run.name
    found = read_flow(run, work, folder) if run.kind == "flow" else train(run, work, folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".yaml").unlink(missing_ok=True)
    return {**vars(run), **found, "seconds": round(time.monotonic() - started, 1)} | where()


def train(run: Run, work: Path, folder: Path) -> dict[str, Any]:
    """Return the settings, accuracies and rewards of a training run."""
    tree = yaml.safe_load(start_of(run, work).read_text(encoding="utf-8"))
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(override(tree, [f"output_dir={folder}", *run.settings]), sort_keys=False), encoding="utf-8")
    bupo("train", config, log=work / "logs" / f"{run.name}.log")
    accuracies, steps = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("accuracy", "metrics")
    )
    average = f"avg@{accuracies[0]['samples']}"
    evaluated = [{"step": row["step"], "greedy": row["greedy"], "average": row[average]} for row in accuracies]
    return {
        "settings": list(run.settings),
        "problems": accuracies[0]["problems"],
        "samples": accuracies[0]["samples"],
        "accuracy": evaluated,
        "reward": [None if row["reward"] is None else round(row["reward"], 4) for row in steps],
        "entropy": [None if row["entropy_final"] is None else round(row["entropy_final"], 4) for row in steps],
    }


def read_flow(run: Run, work: Path, folder: Path) -> dict[str, Any]:
    """Return the entropies of a real model's layers, in nats, raw or through the final norm, and the rms of its residual stream."""
    from bupo.analysis.statistics import read_statistics
    from bupo.demo_llm import ANALYSIS_TOKENS, QUESTIONS

    model, data = converted(run.model, work), work / f"questions-{run.model}.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}] if FLOWS[run.model] else text} for text in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["rollout.engine=generate", f"rollout.max_new_tokens={ANALYSIS_TOKENS}"]
    norm = ["--norm", "final"] if run.method == "normed" else []
    given = ["--data", data, "--out", folder, "--prompts", len(QUESTIONS), "--examples", 0, *norm, "--set", *settings]
    bupo("analyze", model, *given, log=work / "logs" / f"{run.name}.log")
    statistics = read_statistics(folder)
    curves = {
        f"{point} {statistic}": {"layers": curve.layers.tolist(), "mean": [round(float(x), 4) for x in curve.mean]}
        for (point, statistic), curve in statistics.curves.items()
        if statistic in ("entropy", "rms", "kl_to_final", "delta_entropy")
    }
    return {"depth": statistics.summary["layers"], "tokens": statistics.summary["tokens"], "curves": curves}


def where() -> dict[str, Any]:
    """Return on which machine, and of which code, a record is."""
    import torch

    from bupo.measurement import machine

    found = machine(torch.device("cpu"))
    return {"machine": {key: found[key] for key in ("device", "threads", "commit", "date")}}


# ---- records


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records by the names of their runs; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_record(path: Path, name: str, record: dict[str, Any]) -> None:
    """Add a record to the file, one a line, which is whole at any moment; several processes may add theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        records = read_records(path) | {name: record}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records.items())
        replace_file(path, "{\n" + lines + "\n}\n")


def minutes_left(todo: Sequence[Run], records: dict[str, dict[str, Any]]) -> float:
    """Return the minutes that the runs will take: as records of their kind took, and before there are any, as was guessed."""

    def of(kind: str) -> float:
        taken = [record["seconds"] / 60 for record in records.values() if record["kind"] == kind]
        return sum(taken) / len(taken) if taken else TASKS[kind].minutes if kind in TASKS else 4.0

    return sum(of(run.kind) for run in todo)


def make_all(runs: Sequence[Run], path: Path, work: Path, minutes: float | None) -> int:
    """Make the runs that have no record, and begin none after ``minutes``; return how many have none."""
    started = time.monotonic()
    for number, run in enumerate(runs, 1):
        records = read_records(path)
        if run.name in records:
            continue
        todo = [other for other in runs if other.name not in records]
        spent = (time.monotonic() - started) / 60
        if minutes is not None and spent >= minutes:
            print(f"{len(todo)} of {len(runs)} runs are left: --minutes {minutes:g} are over; the same command goes on", flush=True)
            return len(todo)
        left = timedelta(minutes=round(minutes_left(todo, records)))
        print(f"{time.strftime('%H:%M')}  run {number} of {len(runs)}  {run.name}  ({len(todo)} left, about {left})", flush=True)
        add_record(path, run.name, record := make(run, work))
        last = record["accuracy"][-1] if "accuracy" in record else None
        print(
            f"       {record['seconds']:.0f} s" + (f"  greedy {last['greedy']:.1%}  average {last['average']:.1%}" if last else "")
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, 1 where a run failed, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin no run after that; the same command goes on (default: no end)"
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="file of the records (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="folder of unfinished runs (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=["flow", *TASKS], help="these kinds of runs (default: all)")
    parser.add_argument("--list", action="store_true", help="print the runs, those with a record marked, and stop")
    parser.add_argument("--page", action="store_true", help="make no run; write docs/study.md and its pictures")
    given = parser.parse_args(arguments)
    runs = [run for run in plan() if given.only is None or run.kind in given.only]
    if given.list:
        records = read_records(given.records)
        print(*(f"{'done' if run.name in records else '    '}  {run.name}" for run in runs), sep="\n")
        return 0
    if not given.page:
        try:
            for model in {run.model or "smollm2" for run in runs if run.kind != "sums"}:
                require_packaged(model)
            make_all(runs, given.records, given.work.absolute(), given.minutes)
        except ConfigError as error:
            print(f"study: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nstudy: interrupted; the same command goes on from there", file=sys.stderr)
            return 130
    from benchmarks.study_page import write_page

    print(*write_page(read_records(given.records), ROOT), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
