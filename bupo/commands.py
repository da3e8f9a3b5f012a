"""What `bupo evaluate` and `bupo export` do, beside `bupo train`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bupo.checkpoint import Checkpoints
from bupo.config import ConfigError, Hardware, TrainConfig, check_new_folder, load_config
from bupo.cost import check_fits, load_architecture
from bupo.data import load_examples
from bupo.distributed import process_group
from bupo.evaluation import Accuracy, evaluate_model
from bupo.model import export, load_model, load_tokenizer
from bupo.rewards import RewardPool
from bupo.rollout import configured_rollout, text_of


def evaluate_command(config: TrainConfig, out: Path | None) -> Accuracy:
    """Accuracy of ``config.model`` on ``data.heldout``, printed, and written into ``out`` if given.

    Raises :class:`ConfigError`, also when there is no accuracy because every reward failed.
    """
    if out is not None:
        check_new_folder(out, "--out")
    with process_group(config.hardware) as world, RewardPool(**config.reward.model_dump()) as pool:
        check_fits(architecture := load_architecture(config), config)
        tokenizer = load_tokenizer(config.model)
        asked = {"columns": pool.columns, "vocab": architecture.vocab_size}
        examples = load_examples(config.heldout, config.data, tokenizer, "--data", **asked)
        model = load_model(config.model, config.hardware, world)
        rollout = configured_rollout(config, model, tokenizer, world, config.evaluation.temperature)
        numbers = {"samples": config.evaluation.samples, "ks": config.evaluation.k, "seed": config.seed}
        decode = partial(text_of, tokenizer=tokenizer, ends=rollout.ends, skip_special_tokens=config.rollout.skip_special_tokens)
        accuracy = evaluate_model(rollout, decode, examples, pool, world, **numbers, out=out)
        if accuracy.reward_failures == len(examples) * (accuracy.samples + 1):
            failure = next(filter(None, world.gather([pool.last_failure])))
            raise ConfigError(f"reward.function: {config.reward.function!r} failed for every response: {failure}")
        return accuracy


def export_command(run: Path, output: Path, step: int | None) -> int:
    """Writes a checkpoint of ``run`` as a Hugging Face checkpoint; returns its step. Raises :class:`ConfigError`."""
    check_new_folder(output, "DIR")
    config, hardware = load_config(run / "config.yaml"), Hardware(device="cpu")
    with process_group(hardware) as world:
        checkpoints = Checkpoints(run / "checkpoints", config.checkpoints.keep, world)
        steps = checkpoints.steps()
        if not steps:
            raise ConfigError(f"RUN: {run} has no checkpoint")
        step = max(steps) if step is None else step
        if step not in steps:
            raise ConfigError(f"--step: {step} given, accepted are {', '.join(map(str, steps))}")
        model = load_model(config.model, hardware, world)
        checkpoints.load_model(step, model)
        export(model, load_tokenizer(config.model), output, world)
    return step
