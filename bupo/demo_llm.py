"""The demo on a real language model, without a model hub: what its layers hold, then BuPO and GRPO on a task it solves at times.

The task is to go on with an arithmetic sequence: ``12, 19, 26, 33,`` and the model should say 40. SmolLM2-135M-Instruct does so in
a fifth of its samples. Every part is a command of its own, which is printed, and runs as a process of its own.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bupo.config import check_new_folder
from bupo.output import claim
from bupo.tables import columns

HELDOUT = 128  # held-out sequences, of the 1,089 there are
START, STEP = range(1, 100), range(2, 13)  # of a sequence
ANSWER_TOKENS = 4  # a space and up to three digits

CONFIG: dict[str, Any] = {
    "bupo": {"layer": 29, "internal_steps": 5},  # the last layer but one, as the paper has it for its Llama models
    "steps": 20,
    "reward": {"function": "bupo.rewards:first_number"},
    "rollout": {"engine": "generate", "prompts": 8, "samples": 8, "max_new_tokens": ANSWER_TOKENS},
    "optimizer": {"learning_rate": 1e-5, "mini_batch": 8},
    "evaluation": {"samples": 4, "k": [1, 4], "every": 10},
    "checkpoints": {"every": 10, "keep": 1},
}
ANALYSIS_TOKENS = 24  # of each response that the analysis reads

# What the analysis asks, through the model's chat template.
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "What do bees make?",
    "How many days are in a week?",
    "What is the opposite of hot?",
    "Write a short poem about rain.",
    "Who wrote Hamlet?",
    "What is 2 + 2?",
    "Translate 'good morning' into Spanish.",
    "What is photosynthesis?",
    "Name a large river in Africa.",
    "What does a doctor do?",
    "How do I boil an egg?",
    "What is the largest planet?",
    "Give me a name for a cat.",
    "What comes after Tuesday?",
    "Why do leaves fall in autumn?",
    "What is a prime number?",
    "List two kinds of fruit.",
    "What is the past tense of 'go'?",
    "Who was the first person on the moon?",
    "What do you call frozen water?",
    "How many legs does a spider have?",
    "Write a sentence with the word 'lamp'.",
    "What is the main language of Brazil?",
    "What is gravity?",
    "Name an instrument with strings.",
    "What should I wear when it snows?",
    "How many minutes are in two hours?",
    "What is the heart for?",
    "Tell me a short joke.",
)


def demo_llm(folder: Path, name: str, policies: Sequence[str] = ("bupo", "grpo"), seed: int = 0) -> str:
    """Convert, analyze and train the packaged model ``name`` in ``folder``; return a table of held-out accuracy before and after.

    A demo that was interrupted in ``folder`` goes on. Raises :class:`ConfigError` for another folder that is not new or empty, and
    ``SystemExit`` with the exit code of a command that failed, which has said why.
    """
    if not (folder / "demo.json").exists():
        check_new_folder(folder, "--output")
    claim(folder, "demo.json", {"model": name, "seed": seed}, "demo")
    files = write_data(folder, seed)
    model, analysis = folder / "start", folder / "analysis"
    if not model.is_dir():
        run_command("export", name, model)
    if not (analysis / "report.html").exists():
        settings = ("rollout.engine=generate", f"rollout.max_new_tokens={ANALYSIS_TOKENS}", f"seed={seed}")
        given = ("--data", files["questions"], "--out", analysis, "--prompts", len(QUESTIONS), "--suggest")
        run_command("analyze", model, *given, "--set", *settings)
    accuracies = {}
    for policy in policies:
        run = folder / policy
        config = write_config(run.with_suffix(".yaml"), model, run, files, policy, seed)
        if not (run / "model").is_dir():
            run_command("train", config)
        lines = (run / "accuracy.jsonl").read_text(encoding="utf-8").splitlines()
        accuracies[policy] = [json.loads(line) for line in lines]
    return accuracy_table(accuracies)


def sequences(seed: int) -> list[dict[str, str]]:
    """Return all sequences of the task as prompt and answer, in an order that is the seed's."""
    terms = [[start + step * i for i in range(5)] for start in START for step in STEP]
    random.Random(seed).shuffle(terms)
    return [{"prompt": ", ".join(map(str, shown)) + ",", "answer": str(answer)} for *shown, answer in terms]


def write_data(folder: Path, seed: int) -> dict[str, Path]:
    """Write the prompts of training, of evaluation and of the analysis; return their files."""
    rows = sequences(seed)
    chats = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    files = {}
    contents: dict[str, list] = {"heldout": rows[:HELDOUT], "train": rows[HELDOUT:], "questions": chats}
    for name, content in contents.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return files


def write_config(path: Path, model: Path, run: Path, files: dict[str, Path], policy: str, seed: int) -> Path:
    """Write the configuration of a training run; return its path."""
    config = {
        "model": str(model),
        "output_dir": str(run),
        "data": {name: str(files[name]) for name in ("train", "heldout")} | {"max_prompt_tokens": 32},
        "policy": policy,
        "seed": seed,
        **CONFIG,
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def run_command(*arguments: object) -> None:
    """Print and run a ``bupo`` command; raise ``SystemExit`` with its exit code where that is not 0."""
    words = [str(argument) for argument in arguments]
    print(f"\nbupo {shlex.join(words)}", flush=True)
    if code := subprocess.run([sys.executable, "-m", "bupo", *words], check=False).returncode:
        raise SystemExit(code)


def accuracy_table(accuracies: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table of the first and last accuracy of each policy's run, with 95 % intervals over problems."""

    def shown(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.1%} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"

    first = next(iter(accuracies.values()))[0]
    names = ("greedy", f"avg@{first['samples']}")
    title = f"held-out accuracy, {first['problems']} problems"
    rows = [[title, *names], ["before", *(shown(first, name) for name in names)]]
    rows += [[f"after, {policy}", *(shown(found[-1], name) for name in names)] for policy, found in accuracies.items()]
    return "\n".join(columns(rows))
