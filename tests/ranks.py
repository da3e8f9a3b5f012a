"""Processes of a test that have nothing to import: each forks from one that holds torch, transformers and the trainer, unused."""

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

# An import takes four seconds of a core, and three more that of torch._dynamo, which calls of an op need; a fork milliseconds.
# What forks has computed nothing, so no pool of threads is lost.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bupo.trainer", "transformers.models.qwen3.modeling_qwen3", "torch._dynamo", "problems"])


def start(function: str, arguments: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Starts ``module:function`` of the tests with string arguments, on one thread; what it prints is appended to ``output``."""
    process = FORKS.Process(target=_run, args=(function, arguments, str(output), {**os.environ, **(environment or {})}))
    process.start()
    return process


def _run(function: str, arguments: Sequence[str], output: str, environment: Mapping[str, str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    finally:
        time.sleep(0.1)  # At the end gloo's threads get their time, whatever made the group: as in bupo.distributed.process_group.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(function: str, size: int, *arguments: str, timeout: float = 120) -> list[str]:
    """Runs ``module:function`` of the tests with string arguments on ``size`` ranks, as torchrun does; returns what each printed.

    All ranks are killed when one fails or time is up, which fails the test with the output of the first that failed.
    """
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(size)]
        ranks = [
            start(function, arguments, output, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, output in enumerate(outputs)
        ]
        try:
            deadline = time.monotonic() + timeout
            while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
                assert time.monotonic() < deadline, f"ranks: still running after {timeout} s"
                time.sleep(0.01)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        printed = [output.read_text() if output.exists() else "" for output in outputs]
    # Of ranks that end together the first that failed says why; the others were killed, or lost their peer.
    failed = sorted((rank.exitcode < 0, number) for number, rank in enumerate(ranks) if rank.exitcode)
    assert not failed, f"rank {failed[0][1]}: {printed[failed[0][1]][-4000:]}"
    return printed
