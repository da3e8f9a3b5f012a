"""The processes of a run as one: the process group, sharding with FSDP2, and the exchanges of a step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bupo.config import Hardware
from bupo.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them. Its methods are collectives: every rank calls them, in the same order."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over ranks, in place, and return them."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Take the maximum of ``values`` over ranks, in place, and return them."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of ``items``, contiguous; :meth:`gather` puts the parts together again."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[slice(*bounds)]

    def gather(self, items: list[T]) -> list[T]:
        """Return, on every rank, the lists of all ranks one after the other."""
        if self.size == 1:
            return items
        parts: list[list[T]] = [[]] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def from_main(self, value: T) -> T:
        """Return rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Have all ranks raise when the body, which each runs by itself, fails on one of them; one rank alone says why.

        Without it the others would wait for ever for the one that is gone, or carry its error into a collective.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.size == 1 and failure is not None:
            raise failure
        _raise_together(self.rank, failure, self.gather([None if failure is None else str(failure)]))

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values, operation)
        return values


@contextmanager
def process_group(hardware: Hardware) -> Iterator[World]:
    """Make the process group that ``torchrun`` describes in the environment, or that of one process; gloo on CPU, NCCL on GPU.

    Raises :class:`ConfigError` when the device is not there, or the environment describes no group.
    """
    rank, size, local_rank = _launched()
    timeout, failure = timedelta(seconds=hardware.timeout), None
    try:
        device = _device(hardware.device, local_rank if size > 1 else None)
    except ConfigError as error:
        failure = error
    store = _meet(rank, size, failure, timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
        if size > 1:
            # FSDP keeps gloo's threads alive. One that is still freeing a collective's tensors needs the interpreter, and would
            # end the process (SIGABRT) if that were finalizing. Nothing tells when they are done; it takes milliseconds.
            time.sleep(0.1)


def _launched() -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this machine, as torchrun puts them into the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1, 0
    if all(given.get(name, "").isdecimal() for name in names):
        rank, size, local_rank = (int(given[name]) for name in names)
        if rank < size:
            return rank, size, local_rank
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    accepted = "accepted are RANK, below WORLD_SIZE, and LOCAL_RANK, all as torchrun sets them, or none of them"
    raise ConfigError(f"environment: {shown} given, {accepted}")


_meetings = 0  # how often this process has met the other ranks


def _meet(rank: int, size: int, failure: ConfigError | None, timeout: timedelta) -> dist.Store:
    """Wait for every rank and return the store of their process group; if one has failed, raise on all, and one says why."""
    global _meetings
    _meetings += 1
    message = None if failure is None else str(failure)
    if size == 1:
        _raise_together(rank, failure, [message])
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    store = dist.PrefixStore(f"bupo/{_meetings}", store)
    store.set(f"said/{rank}", json.dumps(message))
    said = [json.loads(store.get(f"said/{other}")) for other in range(size)]
    if any(said):
        store.set(f"left/{rank}", "")
        if rank == 0:  # its process may be the one that keeps the store
            store.wait([f"left/{other}" for other in range(size)], timedelta(seconds=10))
    _raise_together(rank, failure, said)
    return store


def agree_on(error: ConfigError) -> ConfigError:
    """Return the error as all ranks know it, with a speaker: ``error`` itself, or another rank's if that comes first.

    An error raised before there was a process group is brought to the other ranks, which wait for this one there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if error.speaker is None and size > 1 and _meetings == 0:
        try:
            _meet(rank, size, error, timedelta(seconds=60))
        except ConfigError as agreed:
            return agreed
        except Exception:  # there is nobody to meet
            pass
    if error.speaker is None:
        error = ConfigError(f"rank {rank}: {error}" if size > 1 else str(error))
        error.speaker = rank
    return error


def _raise_together(rank: int, failure: Exception | None, said: list[str | None]) -> None:
    """Raise on every rank if any has said something; the first that has is the error's speaker."""
    speaker = next((other for other, line in enumerate(said) if line is not None), None)
    if speaker is None:
        return
    if failure is not None and not isinstance(failure, ConfigError):
        raise failure
    error = ConfigError(said[speaker] if len(set(said)) == 1 else f"rank {speaker}: {said[speaker]}")
    error.speaker = speaker
    raise error from failure


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and ":" in name:
        raise ConfigError(f"hardware.device: {name!r} given under torchrun, accepted are auto, cpu, cuda")
    device = torch.device(name if local_rank is None or name == "cpu" else f"{name}:{local_rank}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"hardware.device: {str(device)!r} given, accepted are auto, cpu, cuda, cuda:N ({reason})") from None
    return torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def shard(model: PreTrainedModel, world: World, hardware: Hardware) -> PreTrainedModel:
    """Shard ``model`` in place over the ranks: one FSDP2 unit a layer; embedding, final norm and head stay in the root unit.

    One process in float32 without offload keeps the plain model: there is nothing to gather and nothing to cast.
    """
    if world.size == 1 and hardware.precision == "float32" and not hardware.offload:
        return model.to(world.device)
    to_unit = partial(
        fully_shard,
        mesh=dist.device_mesh.init_device_mesh(world.device.type, (world.size,)),
        # Inputs are not cast: among them are the old log-probs, which bfloat16 would round.
        mp_policy=MixedPrecisionPolicy(getattr(torch, hardware.precision), reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if hardware.offload else OffloadPolicy(),
    )
    for layer in model.base_model.layers:
        to_unit(layer)
    to_unit(model)
    setattr(model, _RUN, MethodType(_run, model))
    register_fsdp_forward_method(model, _RUN)
    return model


_RUN = "_run_as_forward"  # the method of a sharded model that runs a function


def _run(model: nn.Module, function: Callable[..., R], *arguments: Any, **options: Any) -> R:
    return function(model, *arguments, **options)


def as_forward(function: Callable[Concatenate[nn.Module, P], R], model: nn.Module, *arguments: P.args, **options: P.kwargs) -> R:
    """Return ``function(model, *arguments, **options)``, run as a forward of ``model``, sharded or not.

    Any function that runs parts of the model, as :func:`bupo_kernels.policy_loss` does, must be called this way: FSDP gathers the
    weights of the root unit around a forward of the model, and around nothing else.
    """
    return getattr(model, _RUN, partial(_run, model))(function, *arguments, **options)


def sharded_units(model: nn.Module) -> list[FSDPModule]:
    """Return the modules of ``model`` that FSDP gathers each as one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold every weight whole on every rank within the context: no forward communicates, and ranks may do different work."""
    units = sharded_units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # FSDP's own default: the root stays
            unit.reshard()


class Termination:
    """A listener for SIGTERM, as a context manager: the step at hand is finished before the process ends."""

    def __init__(self, world: World) -> None:
        self.world, self.received = world, False

    def __enter__(self) -> Termination:
        self.before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def requested(self) -> bool:
        """Return whether any rank was told to stop. A collective."""
        return bool(self.world.max(torch.tensor(self.received, dtype=torch.int32, device=self.world.device)))

    def _receive(self, *_) -> None:
        self.received = True


def full(tensor: Tensor) -> Tensor:
    """Return a DTensor whole (a collective), any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
