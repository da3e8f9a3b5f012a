"""Everything a run needs to go on: weights, AdamW, random states, position and phase, written whole or not at all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from transformers import PreTrainedModel

from bupo.config import ConfigError, TrainConfig, check_new_folder
from bupo.distributed import World

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: loads on any number of ranks


class Checkpoints:
    """``step-000030`` and so on in a folder, the newest ``keep`` of them. Its methods are collectives."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world

    def steps(self) -> list[int]:
        """Of the complete ones, ascending; as rank 0 sees the folder."""
        return self.world.from_main(self._steps())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def save(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """``state`` is JSON. A checkpoint of that step that is there already stays."""
        if step in self.steps():
            return
        partial = self.folder / f"step-{step:06}.partial"
        if self.world.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        try:
            self._write(partial, {"step": step, "world_size": self.world.size, **state}, model, optimizer)
        except BaseException:  # of a full disk dcp makes one that is no Exception
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.world.main:
            os.replace(partial, self.path(step))
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

    def load(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Puts weights and optimizer state back, and, on as many ranks as saved it, random states; returns the ``state``."""
        state = json.loads((self.path(step) / "state.json").read_text(encoding="utf-8"))
        weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=self.path(step))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=OPTIONS)
        if state["world_size"] == self.world.size:
            _restore(torch.load(self.path(step) / f"random-{self.world.rank}.pt", weights_only=True))
        return state

    def load_model(self, step: int, model: PreTrainedModel) -> None:
        """Puts the weights alone back."""
        weights = get_model_state_dict(model, options=OPTIONS)
        dcp.load({"model": weights}, checkpoint_id=self.path(step))
        set_model_state_dict(model, weights, options=OPTIONS)

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


def last_step(config: TrainConfig, checkpoints: Checkpoints) -> int:
    """The step of the newest checkpoint in the run folder, 0 if there is none. Raises :class:`ConfigError` for a folder that is no
    run's, or not to be continued."""
    folder = config.output_dir
    if config.checkpoints.resume == "never" or not (folder / "config.yaml").is_file():
        check_new_folder(folder, "output_dir")
    last = max(checkpoints.steps(), default=0)
    if last > config.steps:
        raise ConfigError(f"steps: {config.steps} given, accepted are {last} and more: {folder} holds a checkpoint of that step")
    return last


def require_space(folder: Path, needed: int) -> None:
    """Raises :class:`ConfigError` unless ``needed`` bytes are free where ``folder`` is, or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"output_dir: {folder} has {free / 2**30:.2f} GiB free, accepted are at least {needed / 2**30:.2f} GiB "
            "(checkpoints.keep and the one being written, and the exported model)"
        )


def space_needed(parameters: int, keep: int) -> int:
    """Bytes that a run writes at most: ``keep`` checkpoints and the one being written (weights, two moments), and the model."""
    return parameters * 4 * (3 * (keep + 1) + 1)


def _random_state() -> dict[str, Any]:
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002 (a reward or a library may use the global one)
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
