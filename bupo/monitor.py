"""The folder that a run leaves behind, and the lines it shows while it runs."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from bupo.analysis.figures import draw_training
from bupo.config import TrainConfig, dump_config
from bupo.data import Example
from bupo.distributed import World
from bupo.errors import ConfigError
from bupo.evaluation import Accuracy
from bupo.output import progress_bar, replace_file
from bupo.plots import draw_run
from bupo.rollout import Sample

PICTURES_EVERY = 60.0  # seconds, at least: to draw takes one or more, and an evaluation may take less

# The parts of a step's line, each shown where all of its metrics are there.
PARTS = (
    ("reward {:.3f}", "reward"),
    ("({:d} failed)", "reward_failures"),
    ("len {:.0f}", "response_tokens"),
    ("of {:.1f} ids", "support_size"),
    ("loss {:+.4f}", "loss"),
    ("entropy {:.2f}", "entropy"),
    ("({:.2f})", "entropy_final"),
    ("kl {:.3g}", "kl"),
    ("jsd {:.3g}", "jsd"),
    ("of attention {:.3g}", "jsd_attention"),
    ("ppl {:.3f}", "perplexity"),
    ("clip {:.1%}", "clip_share"),
    ("grad {:.2f}", "grad_norm"),
    ("gap {:.4f}", "sampler_gap"),
    ("{:,.0f} tok/s", "tokens_per_second"),
    ("MFU {:.0%}", "mfu"),
    ("{:.0f} GiB", "memory_gib"),
    ("{:.1f} s", "seconds"),
    ("({:.1f}+{:.1f}+{:.1f})", "seconds_rollout", "seconds_old", "seconds_update"),
)


def step_line(metrics: dict[str, Any], steps: int) -> str:
    """Return the console's line for a step, without metrics that are absent, None or not worth a word.

    Behind the optimised policy's entropy stands, in brackets, the final policy's; behind the seconds those of rollout, old, update.
    """
    shown = dict(metrics)
    if not shown.get("reward_failures"):
        shown["reward_failures"] = None
    if shown["phase"] == "final":  # the two entropies are the same
        shown["entropy_final"] = None
    values = [(text, [shown.get(name) for name in names]) for text, *names in PARTS]
    parts = [text.format(*numbers) for text, numbers in values if None not in numbers]
    joined = "  ".join(parts).replace("  (", " (")
    return f"step {shown['step']:>{len(str(steps))}}/{steps}  {shown['phase']:<7}  {joined}"


class RunFolder:
    """The folder of a run, as a context manager. Rank 0 writes and prints; on the others every method does nothing.

    ========================  ==================================================================
    ``config.yaml``           the resolved configuration, with absolute paths
    ``base/``                 config and tokenizer of the model it started from
    ``metrics.jsonl``         one line per step, written as it happens
    ``accuracy.jsonl``        held-out accuracy, one line per evaluation
    ``episodes.txt``          groups of sampled responses with reward and advantage, to read
    ``run.png``               reward, entropies and the phase boundary, drawn at evaluations, once a minute at most, and at the end
    ``layers.png``, ``.svg``  entropy of every layer's policy and its KL to the final one, over the steps
    ``tensorboard/``          the same numbers for TensorBoard
    ``wandb/``, ``wandb.id``  what Weights & Biases keeps here, and the name by which a resumed run finds its own
    ========================  ==================================================================

    A run that continues after step ``resumed_step`` finds its files cut there: what was written later is written again.
    Raises :class:`ConfigError`, on every rank and before anything is written, when the configured telemetry is not installed.
    """

    def __init__(self, config: TrainConfig, world: World, resumed_step: int = 0) -> None:
        self.path, self.steps = config.output_dir, config.steps
        self.config, self.world, self.main, self.resumed_step = config, world, world.main, resumed_step
        self.metrics: list[dict] = []
        self.accuracies: list[dict] = []
        self.progress = progress_bar(world.main)
        self.sinks: list[Callable[[int, dict[str, float]], None]] = []
        self.closing = ExitStack()
        self.summary_writer, self.wandb = _summary_writer(config.telemetry.tensorboard), _wandb(config.telemetry.wandb)

    def __enter__(self) -> RunFolder:
        if not self.main:
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        exists = (self.path / "config.yaml").exists() or self.resumed_step > 0
        self._connect(exists)
        if exists:
            self._cut()
        replace_file(self.path / "config.yaml", dump_config(self.config))
        self.started = self.drawn = time.perf_counter()
        self.progress.start()
        self.task = self.progress.add_task("training", total=self.steps, completed=self.resumed_step)
        self.parts: dict[str, Any] = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.main:
            return
        step = self.metrics[-1]["step"] if self.metrics else self.resumed_step
        taken = timedelta(seconds=round(time.perf_counter() - self.started))
        since = f" since step {self.resumed_step}" if self.resumed_step else ""
        self.progress.stop()
        self.say(f"{step} of {self.steps} steps, {taken}{since}")
        self.closing.__exit__(kind, error, trace)
        self._draw()

    def say(self, line: str) -> None:
        """Print a line as it is, above the progress bar."""
        if self.main:
            self.progress.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def show_progress(self, what: str, done: int, total: int) -> None:
        """Show a second bar for ``what``, a part of a step, until it is done."""
        if not self.main:
            return
        if what not in self.parts:
            self.parts[what] = self.progress.add_task(what)
        self.progress.update(self.parts[what], completed=done, total=total)
        if done >= total:
            self.progress.remove_task(self.parts.pop(what))

    def log_step(self, metrics: dict[str, Any]) -> None:
        """Write and show the metrics of a step, ``step`` and ``phase`` among them; numbers that are not finite become null."""
        if not self.main:
            return
        row = {name: _finite(value) for name, value in metrics.items()}
        self.metrics.append(row)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.progress.update(self.task, completed=row["step"])
        self.say(step_line(metrics, self.steps))
        if row.get("switched"):
            self.say(f"phase 1 ends after step {row['step']}: {row['switched']}")
        self._publish("train", row["step"], row)

    def log_accuracy(self, step: int, accuracy: Accuracy) -> None:
        """Write and show held-out accuracy after ``step``, in place of one that was logged there before."""
        if not self.main:
            return
        self.accuracies = [row for row in self.accuracies if row["step"] != step] + [{"step": step, **accuracy.as_dict()}]
        replace_file(self.path / "accuracy.jsonl", "".join(json.dumps(row) + "\n" for row in self.accuracies))
        self.say(f"held-out after step {step}: {accuracy}")
        self._publish("heldout", step, self.accuracies[-1])
        if time.perf_counter() - self.drawn >= PICTURES_EVERY:
            self._draw()

    def has_accuracy(self, step: int) -> bool:
        """Return whether held-out accuracy after ``step`` has been logged. A collective."""
        return self.world.from_main(any(row["step"] == step for row in self.accuracies))

    def log_episodes(
        self,
        step: int,
        phase: str,
        example: Example,
        responses: list[str],
        samples: list[Sample],
        rewards: list[float],
        advantages: list[float],
    ) -> None:
        """Write one prompt's group of responses, as text."""
        if not self.main:
            return
        # The file can be cut at a step since only this line begins at the margin: repr keeps whatever a text holds on one line.
        lines = [f"step {step} ({phase})  prompt {example.prompt!r}  answer {example.answer!r}"]
        for response, sample, reward, advantage in zip(responses, samples, rewards, advantages, strict=True):
            ending = "" if sample.finished else "  (cut off)"
            score = "failed" if math.isnan(reward) else f"{reward:.2f}"
            lines.append(f"  reward {score}  advantage {advantage:+.2f}  {response!r}{ending}")
        with (self.path / "episodes.txt").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")

    def _cut(self) -> None:
        """Remove the entries after ``resumed_step`` from the files, and read the rest."""
        for change in _changes(self.path / "config.yaml", self.config):
            self.say(f"config: {change}")
        for name, rows in (("metrics.jsonl", self.metrics), ("accuracy.jsonl", self.accuracies)):
            path = self.path / name
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            parsed = [(line, _row(line)) for line in lines]
            done = [(line, row) for line, row in parsed if row is not None and row["step"] <= self.resumed_step]
            rows += [row for _, row in done]
            if unreadable := sum(row is None for _, row in parsed):
                self.say(f"{name}: {unreadable} unreadable line(s) dropped")
            if lines:
                replace_file(path, "".join(line + "\n" for line, _ in done))
        path = self.path / "episodes.txt"
        if path.exists():
            groups = re.split(r"^(?=\S)", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
            steps = [re.match(r"step (\d+) \(", group) for group in groups]
            numbered = zip(groups, steps, strict=True)
            replace_file(path, "".join(group for group, step in numbered if step and int(step[1]) <= self.resumed_step))

    def _connect(self, exists: bool) -> None:
        """Open TensorBoard and Weights & Biases, which both continue what was there."""
        if self.wandb is not None:
            # The run has a random name, kept in the folder: one made from the path would continue whatever run was there before.
            path, project = self.path / "wandb.id", self.config.telemetry.wandb
            name = path.read_text(encoding="utf-8") if path.exists() else uuid.uuid4().hex
            try:
                run = self.wandb.init(
                    resume="allow",
                    project=project,
                    id=name,
                    name=self.path.name,
                    dir=str(self.path),
                    config=self.config.model_dump(mode="json"),
                )
            except self.wandb.Error as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"telemetry.wandb: {project!r} given, but Weights & Biases said: {reason}") from None
            replace_file(path, name)
            self.closing.push(lambda kind, error, trace: run.finish(exit_code=int(kind is not None)))
            # wandb's own counter cannot go back, so that it would drop the rows of steps that are done again.
            run.define_metric("*", step_metric="step")
            self.sinks.append(lambda step, scalars: run.log({**scalars, "step": step}))
        if self.summary_writer is not None:
            # TensorBoard hides what an earlier process wrote from purge_step on.
            purge = {"purge_step": self.resumed_step + 1} if exists else {}
            writer = self.closing.enter_context(self.summary_writer(str(self.path / "tensorboard"), **purge))

            def to_tensorboard(step: int, scalars: dict[str, float]) -> None:
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            self.sinks.append(to_tensorboard)

    def _publish(self, prefix: str, step: int, row: dict[str, Any]) -> None:
        scalars = _scalars(prefix, row)
        for sink in self.sinks:
            sink(step, scalars)

    def _draw(self) -> None:
        if self.metrics:
            draw_run(self.metrics, self.accuracies, self.path / "run.png")
            draw_training(self.metrics, self.path / "layers.png")
            self.drawn = time.perf_counter()


def _finite(value: Any) -> Any:
    """Return the value, or a list's values, with None instead of numbers that JSON does not know."""
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer(wanted: bool | None) -> type | None:
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted:
            raise ConfigError(f"telemetry.tensorboard: true given, accepted with tensorboard installed ({error})") from None
        return None
    return SummaryWriter


def _wandb(project: str | None) -> Any:
    if project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"telemetry.wandb: {project!r} given, accepted with wandb installed ({error})") from None
    return wandb


def _row(line: str) -> dict | None:
    """Return the JSON object with a step that the line is, or None if it is none."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def _changes(path: Path, config: TrainConfig) -> list[str]:
    """Return the differences between the configuration in ``path`` and ``config``, each as a line."""
    if not path.exists():
        return []
    try:
        before = _flat("", yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError):
        return [f"{path} was unreadable"]
    now = _flat("", yaml.safe_load(dump_config(config)))

    def value(tree: dict, key: str) -> str:
        return json.dumps(tree[key]) if key in tree else "absent"

    keys = dict.fromkeys([*now, *before])
    return [f"{key} was {value(before, key)}, is {value(now, key)}" for key in keys if value(before, key) != value(now, key)]


def _flat(prefix: str, tree: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, below in tree.items() for k, v in _flat(f"{prefix}.{name}" if prefix else str(name), below).items()}


def _scalars(prefix: str, row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row as ``prefix/name``, those of a list as ``prefix/name/00`` …, those of a data source as
    ``prefix/source/name``."""
    scalars = {f"{prefix}/{name}": value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
    for name, values in row.items():
        if isinstance(values, list):
            scalars |= {f"{prefix}/{name}/{i:02}": value for i, value in enumerate(values) if value is not None}
    for source, numbers in row.get("sources", {}).items():
        scalars |= _scalars(f"{prefix}/{source}", numbers)
    return scalars
