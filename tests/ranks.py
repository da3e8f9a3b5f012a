"""Several processes as one job, as torchrun starts them, without its half second of rendezvous for each test."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(function: str, size: int, *arguments: str, timeout: float = 120) -> list[str]:
    """Runs ``module:function`` of the tests with string arguments on ``size`` ranks, one thread each; returns what each printed.

    All ranks are killed when one fails or time is up, which fails the test with the output of the first that failed.
    """
    module, name = function.split(":")
    # At the end gloo's threads get their time, whatever made the group: as in bupo.distributed.process_group.
    code = f"import sys, time, {module}; {module}.{name}(*sys.argv[1:]); time.sleep(0.1)"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env=os.environ | common | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [
        f"rank {rank}: {output[-4000:]}" for rank, (p, output) in enumerate(zip(processes, outputs, strict=True)) if p.returncode
    ]
    assert not failed, failed[0]
    return outputs
