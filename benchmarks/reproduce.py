"""The paper's runs, twice: as its text has them and as its scripts do, as configurations, with what they would take.

``python -m benchmarks.reproduce`` writes ``configs/paper/``, ``configs/scripts/`` and the tables of ``docs/reproduce.md``;
``--check`` writes nothing, and exits with 1 where one of them is not as it would be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

if __name__ == "__main__" and __package__ is None:
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.readme import fill
from benchmarks.text import table
from bupo.architecture import load_architecture
from bupo.config import TrainConfig, override, parse_config
from bupo.cost import memory, run_hours
from bupo.output import replace_file
from bupo_kernels.backends.machine import named

ROOT = Path(__file__).parent.parent
NAMES = ("qwen3-4b", "qwen3-8b", "octothinker-3b", "octothinker-8b")
DEVICES, CARD = 8, "H100"

VARIANTS = {
    "paper": "As the text of the BuPO paper (arXiv 2512.19673v3) has it, where it says something",
    "scripts": "As the scripts of github.com/Trae1ounG/BuPO (run_code/*.sh) set it",
}


class Item(NamedTuple):
    """A key of the configuration on which paper and scripts, or one of them and ``configs/``, differ."""

    key: str
    paper: dict[str, Any]  # values by a model's name, or for the first part of it; none where the text says nothing
    scripts: dict[str, Any]
    said: tuple[str, str]  # how the text, and how the scripts, put it
    why: str  # configs/*.yaml have what they have


ITEMS = (
    Item(
        "rollout.max_new_tokens",
        {"qwen3": 7168, "octothinker": 3072},
        {"qwen3": 8192, "octothinker": 3072},
        ("table 8: 7,168 (Qwen), 3,072 (Llama); appendix A.4: a context of 9,216", "8,192 (Qwen), 3,072 (Llama)"),
        "9,216 is 1,024 + 8,192: two of three places agree",
    ),
    Item(
        "optimizer.mini_batch",
        {"": 8},
        {"": 32},
        (
            "table 8: 16 updates a rollout, mini-batches of 32 of 128 prompts",
            "mini-batches of 32 of 128 prompts, one epoch: 4 updates",
        ),
        "no script makes 16; see below",
    ),
    Item(
        "objective.aggregation",
        {"": "sequence-mean-token-mean"},
        {"": "token-mean"},
        ("equations 3 and 9: mean over a response's tokens, then over responses", "mean over all tokens"),
        "what was run, most likely; long wrong answers weigh more",
    ),
    Item(
        "objective.dual_clip",
        {"": None},
        {"": 10.0},
        ("not in the text: none", "verl's lower bound for negative advantages, c = 10"),
        "it rarely decides: the ratio must be above 10",
    ),
    Item(
        "bupo.layer",
        {"qwen3": 6, "octothinker-3b": 27, "octothinker-8b": 31},
        {"qwen3": 6, "octothinker": 27},
        (
            "6 (Qwen), 27 and 31 (Llama 3B, 8B); table 3 says 26 and 30, counted from 0",
            "`k=5` (Qwen), `k=26` (Llama, both sizes), from 0",
        ),
        "the last layer but one of each Llama; the script for 8B trains layer 27 of 32",
    ),
    Item(
        "bupo.internal_steps",
        {"qwen3-4b": 30, "qwen3-8b": 20, "octothinker": 20},
        {"": 30},
        ("30 (Qwen3-4B), 20 (the others)", "30"),
        "table 2 has a cliff between 30 and 50 steps: the smaller number where it is not known",
    ),
    Item(
        "data.template",
        {"qwen3": "qwen3-nothinking", "octothinker": "octothinker"},
        {"qwen3": "qwen3-nothinking", "octothinker": "chat"},
        (
            "figures 8 to 10: a template of its own for OctoThinker",
            "it is defined (`orz_base`) and not used: the tokenizer's chat template",
        ),
        "a base model whose tokenizer has no chat template cannot be run the scripts' way",
    ),
    Item(
        "checkpoints.every",
        {},
        {"": 100},
        ("not in the text", "100"),
        "10 steps, as a node is lost sooner than that",
    ),
)

# The average accuracy on AMC, MATH500, AIME24 and AIME25 of table 1, and of table 10, as mean and deviation of three seeds.
EXPECTED = {
    "qwen3-4b": (47.44, 55.08, 58.51),
    "qwen3-8b": (48.49, 64.23, 66.36),
    "octothinker-3b": (1.68, 18.58, 19.59),
    "octothinker-8b": (3.75, 24.11, 27.79),
}


def value_of(values: dict[str, Any], name: str) -> tuple[Any, bool]:
    """Return the value for a model, by the longest beginning of its name, and whether there is one."""
    found = max((start for start in values if name.startswith(start)), key=len, default=None)
    return (None, False) if found is None else (values[found], True)


def base_tree(name: str) -> dict[str, Any]:
    """Return what ``configs/NAME.yaml`` holds."""
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))


def variant_tree(name: str, variant: str) -> dict[str, Any]:
    """Return the configuration of a model as :data:`VARIANTS` name it: that of ``configs/``, with what differs."""
    found = {item.key: value_of(getattr(item, variant), name) for item in ITEMS}
    given = [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, (value, there) in found.items() if there]
    return override(base_tree(name), [f"output_dir=runs/{name}-{variant}", *given])


def variant_text(name: str, variant: str) -> str:
    """Return the file of a variant, with what it changes in ``configs/NAME.yaml`` at its head."""
    before, now = (_flat(tree) for tree in (base_tree(name), variant_tree(name, variant)))
    changes = [f"#   {key}: {now[key]} ({before[key]} there)" for key in now if key != "output_dir" and now[key] != before.get(key)]
    head = [
        f"# {VARIANTS[variant]}; everything else is that of",
        f"# configs/{name}.yaml, which has the reasons. What differs from it:",
    ]
    head += changes or ["#   nothing"]
    head.append("# Written by `python -m benchmarks.reproduce`.")
    return "\n".join(head) + "\n" + yaml.safe_dump(variant_tree(name, variant), sort_keys=False)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def costs(config: TrainConfig) -> list[str]:
    """Return memory of a device in GiB, in phase 1, phase 2 and rollouts, and least hours, as ``--dry-run`` prints them."""
    architecture = load_architecture(config.model_copy(update={"architecture": ROOT / str(config.architecture)}))
    first, second = (memory(architecture, config, DEVICES, internal=internal) for internal in (True, False))
    sizes = [f"{size / 2**30:.2f}" for size in (first.training, second.training, second.rollout)]
    return [*sizes, f"{run_hours(architecture, config, DEVICES, named(CARD)):.1f}"]


def cost_table() -> str:
    """Return what the runs of all models and variants would take."""
    rows = []
    for name in NAMES:
        trees = {f"configs/{name}.yaml": base_tree(name)}
        trees |= {f"configs/{variant}/{name}.yaml": variant_tree(name, variant) for variant in VARIANTS}
        rows += [[f"`{path}`", *costs(parse_config(tree))] for path, tree in trees.items()]
    return table(["configuration", "phase 1, GiB:", "phase 2, GiB:", "rollouts, GiB:", "hours, at least:"], rows)


def difference_table() -> str:
    """Return what paper and scripts say of each of :data:`ITEMS`, and what ``configs/`` have."""
    rows = [[f"`{item.key}`", *item.said, _ours(item.key), item.why] for item in ITEMS]
    return table(["key", "paper", "scripts", "`configs/`", "why"], rows)


def _ours(key: str) -> str:
    values: dict[str, list[str]] = {}
    for name in NAMES:
        values.setdefault(str(_flat(base_tree(name)).get(key)), []).append(name)
    return next(iter(values)) if len(values) == 1 else "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())


def expected_table() -> str:
    """Return the accuracies that the paper reports."""
    rows = [[name, *(f"{value:.2f}" for value in values), f"{values[2] - values[1]:+.2f}"] for name, values in EXPECTED.items()]
    return table(["model", "before:", "GRPO:", "BuPO:", "BuPO over GRPO:"], rows)


def generate() -> dict[Path, str]:
    """Return the texts of the variants and of the page, by their paths."""
    page = ROOT / "docs" / "reproduce.md"
    places = {"differences": difference_table(), "costs": cost_table(), "expected": expected_table()}
    text = fill(page.read_text(encoding="utf-8"), {name: f"\n\n{found}\n\n" for name, found in places.items()})
    variants = {ROOT / "configs" / variant / f"{name}.yaml": variant_text(name, variant) for variant in VARIANTS for name in NAMES}
    return variants | {page: text}


def outdated(texts: dict[Path, str]) -> Iterable[Path]:
    """Return the files that are not as ``texts`` have them."""
    return [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 where ``--check`` finds a file that is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; name what is out of date and exit with 1")
    check = parser.parse_args(arguments).check
    texts = generate()
    stale = outdated(texts)
    for path in stale:
        print(f"{path}: is out of date, run python -m benchmarks.reproduce" if check else path)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, texts[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
