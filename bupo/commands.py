"""The commands `bupo evaluate` and `bupo export`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig

from bupo.analysis.collect import model_fingerprint
from bupo.architecture import check_fits, load_architecture
from bupo.checkpoint import Checkpoints
from bupo.config import BASE, Hardware, TrainConfig, check_new_folder, load_config
from bupo.data import load_examples
from bupo.distributed import process_group
from bupo.errors import ConfigError
from bupo.evaluation import PARTIAL, Accuracy, evaluate_model
from bupo.model import convert, export, export_type, load_model, load_tokenizer
from bupo.packaged import MODELS, packaged_gguf
from bupo.rewards import RewardPool
from bupo.rollout import configured_decode, configured_rollout


def evaluate_command(config: TrainConfig, out: Path | None) -> Accuracy:
    """Print and return the accuracy of ``config.model`` on ``data.heldout``; write it into ``out``, where a begun one goes on.

    Raises :class:`ConfigError`, also when there is no accuracy because every reward failed.
    """
    with process_group(config.hardware) as world, ExitStack() as closing:
        with world.agree():
            if out is not None and not (out / PARTIAL).is_dir():
                check_new_folder(out, "--out")
            pool = closing.enter_context(RewardPool(**config.reward.model_dump()))
            check_fits(architecture := load_architecture(config), config)
            tokenizer = load_tokenizer(config.model)
            vocab = architecture.vocab_size
            examples = load_examples(config.heldout, config.data, tokenizer, "--data", columns=pool.columns, vocab=vocab)
        model = load_model(config.model, config.hardware, world)
        plan = {"model": model_fingerprint(model), "reward": config.reward.function, "precision": config.hardware.precision}
        plan |= config.rollout.model_dump(include={"engine", "max_new_tokens"}) | {"temperature": config.evaluation.temperature}
        with world.agree():
            rollout = configured_rollout(config, model, tokenizer, world, config.evaluation.temperature)
        decode = configured_decode(config, tokenizer, rollout)
        samples, ks = config.evaluation.samples, config.evaluation.k
        accuracy = evaluate_model(
            rollout, decode, examples, pool, world, samples=samples, ks=ks, seed=config.seed, out=out, plan=plan
        )
        if accuracy.reward_failures == len(examples) * (accuracy.samples + 1):
            failure = next(filter(None, world.gather([pool.last_failure])))
            with world.agree():
                raise ConfigError(f"reward.function: {config.reward.function!r} failed for every response: {failure}")
        return accuracy


def convert_command(name: str, output: Path, dtype: str | None = None) -> None:
    """Write a GGUF file, or one of :data:`bupo.packaged.MODELS`, as a Hugging Face checkpoint. Raises :class:`ConfigError`."""
    chosen = torch.float32 if dtype in (None, "auto") else getattr(torch, dtype)
    with TemporaryDirectory() as folder:
        convert(packaged_gguf(name, Path(folder)) if name in MODELS else name, output, chosen)


def export_command(run: Path, output: Path, step: int | None, dtype: str | None = None) -> int:
    """Write a checkpoint of ``run`` as a Hugging Face checkpoint; return its step. Raises :class:`ConfigError`.

    Everything comes from the run's folder, wherever that is. Without ``step`` it is the newest checkpoint that can be read.
    """
    check_new_folder(output, "DIR")
    config, hardware = load_config(run / "config.yaml"), Hardware(device="cpu")
    with process_group(hardware) as world:
        checkpoints = Checkpoints(run / "checkpoints", config.checkpoints.keep, world)
        steps = checkpoints.steps()
        with world.agree():
            if not steps:
                raise ConfigError(f"RUN: {run} has no checkpoint")
            if step is not None and step not in steps:
                raise ConfigError(f"--step: {step} given, accepted are {', '.join(map(str, steps))}")
        source = str(run / BASE) if (run / BASE).is_dir() else config.model  # earlier versions made no such folder
        model = load_model(source, hardware, world, weights=False)

        def put_back(step: int) -> int:
            return checkpoints.load_model(step, model)

        step = checkpoints.newest(put_back) if step is None else put_back(step)
        export_dtype = export_type(AutoConfig.from_pretrained(source), dtype or config.checkpoints.export_dtype)
        export(model, load_tokenizer(source), output, world, export_dtype)
    return step
