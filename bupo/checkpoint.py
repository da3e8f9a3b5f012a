"""Checkpoints, with everything a run needs to go on: weights, AdamW, random states, step and phase, whole or not at all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from transformers import PreTrainedModel

from bupo.config import TrainConfig, check_new_folder
from bupo.distributed import World
from bupo.errors import ConfigError

T = TypeVar("T")

FORMAT = 1  # the version of what a checkpoint says about itself; those without it are from before there was one
# The entries of a model's config that decide what its weights mean, though they would fit with others.
ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "sliding_window", "layer_types"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings"),
)
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: loads on any number of ranks


class Checkpoints:
    """The newest ``keep`` checkpoints in a folder, ``step-000030`` and so on. Its methods are collectives."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self.damaged: set[int] = set()  # the steps of those that could not be read, which count as absent

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending, as rank 0 sees the folder."""
        return self.world.from_main(self._steps())

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step:06}"

    def save(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``, with ``state``, which is JSON. One that is there already stays."""
        if step in self.steps():
            return
        partial = self.folder / f"step-{step:06}.partial"
        if self.world.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        try:
            about = {"step": step, "world_size": self.world.size, **_identity(model), **state}
            self._write(partial, about, model, optimizer)
        except BaseException:  # for a full disk dcp raises one that is no Exception
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.world.main:
            shutil.rmtree(self.path(step), ignore_errors=True)  # a damaged one may be there
            os.replace(partial, self.path(step))
            self.damaged.discard(step)
            _sync(self.folder)
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        self.world.barrier()

    def _write(self, folder: Path, state: dict[str, Any], model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        torch.save(_random_state(), folder / f"random-{self.world.rank}.pt")
        self.world.barrier()
        if self.world.main:
            (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            for path in (*folder.iterdir(), folder):  # on disk before the name says that it is
                _sync(path)

    def newest(self, load: Callable[[int], T]) -> T:
        """Return what ``load`` makes of the step of the newest checkpoint that can be read; print a line for each that cannot.

        Raises :class:`ConfigError` when there is none.
        """
        while steps := self.steps():
            try:
                return load(steps[-1])
            except Damaged as error:
                self.damaged.add(steps[-1])
                if self.world.main:
                    print(f"{error}: " + ("the one before it is taken" if steps[:-1] else "there is none before it"))
        with self.world.agree():
            raise ConfigError(f"output_dir: no checkpoint in {self.folder} can be read, accepted is a new folder, or a whole one")

    def load(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put weights and optimizer state back, and, on as many ranks as saved it, random states; return the ``state``.

        Raises :class:`ConfigError` when the checkpoint is of another model, and :class:`Damaged`, after which model and optimizer
        are of no use before another one is loaded. What a configuration says of the optimizer (decay, scale) is not put back.
        """
        state, random_state = self._read(step, model)
        weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
        self._read_tensors(step, {"model": weights, "optimizer": moments})
        configured = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=OPTIONS)
        for group, settings in zip(optimizer.param_groups, configured, strict=True):
            group.update(settings)
        if random_state is not None:
            _restore(random_state)
        return state

    def load_model(self, step: int, model: PreTrainedModel) -> int:
        """Put the weights alone back; return the step. Raises as :meth:`load` does."""
        self._read(step, model, trained=False)
        weights = get_model_state_dict(model, options=OPTIONS)
        self._read_tensors(step, {"model": weights})
        set_model_state_dict(model, weights, options=OPTIONS)
        return step

    def _read(self, step: int, model: PreTrainedModel, trained: bool = True) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the state, and this rank's random state if it is to be restored, of a checkpoint that is whole and ``model``'s."""
        folder, fault = self.path(step), None
        try:
            state, random_state = json.loads((folder / "state.json").read_text(encoding="utf-8")), None
            if trained and state["world_size"] == self.world.size:
                random_state = torch.load(folder / f"random-{self.world.rank}.pt", weights_only=True)
            metadata = FileSystemReader(folder).read_metadata()
            for entry in metadata.storage_data.values():
                if (folder / entry.relative_path).stat().st_size < entry.offset + entry.length:
                    raise EOFError(f"{entry.relative_path} is cut off")
        except Exception as error:  # its kinds are as many as the ways to damage a file
            fault = _in_one_line(error)
        if faults := [fault for fault in self.world.gather([fault]) if fault is not None]:
            raise Damaged(f"{folder} is damaged ({faults[0]})")
        with self.world.agree():
            self._compare(step, state, metadata, model, trained)
        return state, random_state

    def _compare(self, step: int, state: dict[str, Any], metadata: Metadata, model: PreTrainedModel, trained: bool) -> None:
        """Raise :class:`ConfigError` where the checkpoint is of another model or, if ``trained``, trained other parameters."""
        place = f"output_dir: {self.path(step)}"
        if (found := state.get("format", 0)) > FORMAT:
            raise ConfigError(f"{place} is of format {found}, accepted are up to {FORMAT}: it comes from a newer bupo")
        now = _identity(model)
        before = state.get("architecture", {})
        other = [
            f"{key} was {before[key]}, is {value}"
            for key, value in now["architecture"].items()
            if key in before and _differ(before[key], value)
        ]
        saved = {
            key.removeprefix("model."): tuple(entry.size)
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        made = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        needed = [name for name, _ in model.named_parameters()]  # tied weights under one name
        changed = [key for key in dict.fromkeys([*needed, *saved]) if saved.get(key) != made.get(key)]
        if changed and not other:
            other = [f"{changed[0]} was {saved.get(changed[0], 'absent')}, is {made.get(changed[0], 'absent')}"]
        if other:
            raise ConfigError(f"{place} is of another model, accepted is the one it was saved from: {other[0]}")
        moments = (re.fullmatch(r"optimizer\.state\.(.+)\.exp_avg", key) for key in metadata.state_dict_metadata)
        before = state.get("trained") or [match[1] for match in moments if match]  # without a format it does not say
        if trained and (different := sorted({*before} ^ {*now["trained"]})):
            raise ConfigError(
                f"{place} is of a run that trained {len(before)} parameters, accepted are the same, here are {len(now['trained'])} "
                f"({different[0]}, …): optimizer.upper_layers, optimizer.upper_from"
            )

    def _read_tensors(self, step: int, into: dict[str, Any]) -> None:
        try:
            dcp.load(into, checkpoint_id=self.path(step))
        except CheckpointException as error:  # raised on every rank
            reason = next(iter(error.failures.values()))[0]
            raise Damaged(f"{self.path(step)} is damaged ({_in_one_line(reason)})") from error

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        steps = {int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))}
        return sorted(steps - self.damaged)


class Damaged(ConfigError):
    """A checkpoint that cannot be read, with its name and the reason."""


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a checkpoint says about itself, as JSON gives it back."""
    config = model.config.to_dict()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    about = {"format": FORMAT, "architecture": {key: config[key] for key in ARCHITECTURE if key in config}, "trained": trained}
    return json.loads(json.dumps(about))


def _differ(before: Any, now: Any) -> bool:
    """Return whether two values of a config differ in meaning, but for entries that only one version of transformers writes."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_differ(before[key], now[key]) for key in before.keys() & now.keys())
    return before != now


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def last_step(config: TrainConfig, steps: Sequence[int]) -> int:
    """Return the newest of the ``steps`` that the run folder has checkpoints of, none of which is read yet, or 0.

    Raises :class:`ConfigError` for a folder that is no run's, or not to be continued.
    """
    folder = config.output_dir
    if config.checkpoints.resume == "never" or not (folder / "config.yaml").is_file():
        check_new_folder(folder, "output_dir")
    last = max(steps, default=0)
    if last > config.steps:
        raise ConfigError(f"steps: {config.steps} given, accepted are {last} and more: {folder} holds a checkpoint of that step")
    return last


def require_space(folder: Path, needed: int) -> None:
    """Raise :class:`ConfigError` unless ``needed`` bytes are free where ``folder`` is, or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"output_dir: {folder} has {free / 2**30:.2f} GiB free, accepted are at least {needed / 2**30:.2f} GiB "
            "(checkpoints.keep and the one being written, and the exported model)"
        )


def space_needed(parameters: int, keep: int) -> int:
    """Return the bytes that a run writes at most: ``keep`` checkpoints and one more (weights, two moments), and the model."""
    return parameters * 4 * (3 * (keep + 1) + 1)


def _random_state() -> dict[str, Any]:
    numpy_state = np.random.get_state()  # noqa: NPY002 (a reward or a library may use the global one)
    assert isinstance(numpy_state, tuple)  # it could be a dictionary if that were asked for
    numpy_name, numpy_keys, *numpy_rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (numpy_name, torch.from_numpy(numpy_keys.astype(np.int64)), *numpy_rest),
    }


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
