"""What a run leaves behind, and what it shows while it runs."""

from __future__ import annotations

import json
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from bupo.config import TrainConfig, dump_config
from bupo.data import Example
from bupo.evaluation import Accuracy
from bupo.plots import draw_run
from bupo.rollout import Sample


def progress_bar() -> Progress:
    """A bar with the time left, on a terminal; nothing where output is a file."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)


class RunFolder:
    """The folder of a run, as a context manager.

    ========================  ==================================================================
    ``config.yaml``           the resolved configuration
    ``metrics.jsonl``         one line per step, written as it happens
    ``accuracy.jsonl``        held-out accuracy, one line per evaluation
    ``episodes.txt``          groups of sampled responses with reward and advantage, to read
    ``run.png``               reward, entropies and the phase boundary (also drawn when a run is interrupted)
    ``checkpoint/``           the trained model and its tokenizer, for ``from_pretrained``
    ========================  ==================================================================
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path, self.steps = config.output_dir, config.steps
        self.config = config
        self.metrics: list[dict] = []
        self.accuracies: list[dict] = []
        self.progress = progress_bar()

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        self.started = time.perf_counter()
        self.progress.start()
        self.task = self.progress.add_task("training", total=self.steps)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.say(f"{len(self.metrics)} of {self.steps} steps in {time.perf_counter() - self.started:.0f} s")
        self.progress.stop()
        if self.metrics:
            draw_run(self.metrics, self.accuracies, self.path / "run.png")

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, soft_wrap=True)

    def log_step(self, metrics: dict) -> None:
        self.metrics.append(metrics)
        self._append("metrics.jsonl", metrics)
        self.progress.update(self.task, completed=metrics["step"])
        self.say(
            f"step {metrics['step']:>{len(str(self.steps))}}/{self.steps}  {metrics['phase']:<11}  reward {metrics['reward']:.3f}  "
            f"loss {metrics['loss']:+.4f}  entropy {metrics['entropy']:.3f} (final {metrics['entropy_final']:.3f})  "
            f"clipped {metrics['clip_share']:.1%}  grad {metrics['grad_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tok/s"
        )

    def log_accuracy(self, step: int, accuracy: Accuracy) -> None:
        self.accuracies.append({"step": step, **accuracy.as_dict()})
        self._append("accuracy.jsonl", self.accuracies[-1])
        self.say(f"held-out after step {step}: {accuracy}")

    def log_episodes(
        self, step: int, phase: str, group: list[Sample], asked: list[Example], rewards: Tensor, advantages: Tensor
    ) -> None:
        """One prompt's group of responses, as text."""
        lines = [f"step {step} ({phase})  prompt {group[0].prompt!r}  answer {asked[0].answer!r}"]
        for sample, reward, advantage in zip(group, rewards.tolist(), advantages.tolist(), strict=True):
            ending = "" if sample.finished else "  (cut off)"
            lines.append(f"  reward {reward:.2f}  advantage {advantage:+.2f}  {sample.response!r}{ending}")
        with (self.path / "episodes.txt").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")

    def _append(self, name: str, row: dict) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
