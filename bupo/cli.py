"""``bupo train | demo | env``."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from importlib.metadata import version
from pathlib import Path

from bupo.config import ConfigError, describe_config, load_config


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 bad input (one line on stderr, nothing written), 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ConfigError as error:
        print(f"bupo {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nbupo {options.command}: interrupted; what the run folder holds so far stays", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bupo",
        description="Bottom-up Policy Optimization (arXiv 2512.19673): train a language model from its inner layers up.",
    )
    parser.add_argument("--version", action="version", version=f"bupo {version('bupo-kernels')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train as a YAML file says",
        description="Trains as CONFIG says: internal-policy steps first (policy: bupo), then GRPO on the model's own policy.",
        epilog="keys of CONFIG, with defaults:\n\n" + describe_config(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    train.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="values that replace those of CONFIG, e.g. rollout.samples=16"
    )
    train.set_defaults(run=_train)

    demo = commands.add_parser(
        "demo",
        help="train a million-parameter model on sums, on this machine, in a few minutes",
        description="Builds a small Qwen3 and a character tokenizer, warms the model up on two-digit sums until about half of its "
        "samples are right, then runs `bupo train` on the reward of being right.",
    )
    demo.add_argument("--policy", choices=("bupo", "grpo"), default="bupo", help="bupo, or the GRPO baseline with the same budget")
    demo.add_argument("--seed", type=int, default=0, help="of the data split, the weights and the sampling (default 0)")
    demo.add_argument("--output", type=Path, help="new folder (default runs/demo-POLICY-seedSEED, numbered if taken)")
    demo.set_defaults(run=_demo)

    env = commands.add_parser(
        "env",
        help="versions, devices, what was built, and which backend runs what here",
        description="Prints versions, devices, what the native module was built for, and which backend each kind of call would use "
        "on this machine and why not the others. Nothing is computed.",
    )
    env.add_argument("--json", action="store_true", help="the same for a program to read")
    env.set_defaults(run=_env)
    return parser


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    sys.path.insert(0, "")  # so that a reward in the current folder is found, as under python -m
    _quiet_libraries()
    from bupo.trainer import train

    train(config)
    print(f"picture, metrics, episodes and checkpoint are in {config.output_dir}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"--seed: {options.seed} given, accepted are 0 to 2^32 - 1")
    folder = options.output or _free_folder(Path("runs") / f"demo-{options.policy}-seed{options.seed}")
    _quiet_libraries()
    from bupo.demo import demo

    before, after = demo(folder, options.policy, options.seed)
    print(f"before  {before}\nafter   {after}\npicture, metrics, episodes and checkpoint are in {folder / 'run'}")
    return 0


def _env(options: argparse.Namespace) -> int:
    from bupo.env import describe, environment

    found = environment()
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return 0


def _free_folder(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def _quiet_libraries() -> None:
    """Only this program's own progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
