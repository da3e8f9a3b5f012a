"""Cost of a vocabulary on several ranks: ``python -m benchmarks.vocab_parallel --out benchmarks/results``.

Ranks of one thread each, on this machine and by gloo, have the shards of a random head. They take a call on their shards with
``group=``; then the same without it, as if each shard were a vocabulary of its own, which is the work that is left where nothing is
sent; then the collectives of the call alone, of the same sizes; and one rank takes the whole vocabulary while the others wait. All
take turns, round by round. What shards give must be what the whole gives.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import DTYPES
from bupo.measurement import machine, rates, results_path, timed, write_section
from bupo_kernels import linear_logprobs, linear_policy_loss
from bupo_kernels.vocab_parallel import Header, Shard, tell

# Vocabulary, width and rows.
SHAPES = {"SmolLM2-135M": (49152, 576, 256), "Qwen3-0.6B": (151936, 1024, 64), "tiny": (501, 32, 16)}
CALLS = ("forward", "forward+backward", "one-pass loss")
WHOLE, SHARDS, ALONE, COLLECTIVES = "whole, on one rank", "shards", "shards, nothing sent", "collectives alone"
CPU = torch.device("cpu")


class Problem:
    """A random head, and what this rank has of it."""

    def __init__(self, vocab: int, width: int, rows: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
        self.whole = (torch.randn(vocab, width, generator=generator) * width**-0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)
        self.advantages = torch.randn(rows, generator=generator)
        columns = torch.arange(vocab).tensor_split(dist.get_world_size())[dist.get_rank()]
        self.columns = slice(int(columns[0]), int(columns[-1]) + 1)
        self.shard = self.whole.detach()[self.columns].clone().requires_grad_()

    def take(self, call: str, *, weight: Tensor, targets: Tensor, group: Any = None) -> tuple[Tensor, ...]:
        """Return the results of a call: log-probs, or the loss with dH and dW."""
        if call == "forward":
            with torch.no_grad():
                return (linear_logprobs(self.hidden, weight, targets, group=group).logprobs,)
        if call == "one-pass loss":
            loss, _ = linear_policy_loss(self.hidden, weight, targets, self.advantages, group=group)
        else:
            found = linear_logprobs(self.hidden, weight, targets, group=group)
            assert found.entropy is not None
            loss = (self.advantages * found.logprobs + 0.1 * found.entropy).mean()
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, weight))

    def collectives(self, call: str) -> None:
        """Send what the call sends."""
        group, rows = dist.group.WORLD.group_name, len(self.targets)
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        shard = Shard.of(group, Header(), CPU)
        shard.gathered(torch.zeros(4, rows, dtype=dtype))
        if call == "forward":
            return
        for _ in range(2):  # before the products of a backward, and after them; of a one-pass loss, before and after its chunk's
            tell(group, Header(), CPU)
        total = torch.zeros(self.hidden.shape, dtype=dtype)
        shard.start_sum(total)
        shard.wait_for(total)

    def runs(self, call: str) -> dict[str, Callable[[], object]]:
        on_shard = partial(self.take, call, weight=self.shard)
        return {
            WHOLE: partial(self.take, call, weight=self.whole, targets=self.targets) if dist.get_rank() == 0 else tuple,
            SHARDS: partial(on_shard, targets=self.targets, group=dist.group.WORLD),
            ALONE: partial(on_shard, targets=self.targets % len(self.shard)),
            COLLECTIVES: partial(self.collectives, call),
        }

    def check(self, call: str, tolerance: float) -> None:
        """Raise ``RuntimeError`` where shards do not give what the whole does."""
        got = self.take(call, weight=self.shard, targets=self.targets, group=dist.group.WORLD)
        want = self.take(call, weight=self.whole, targets=self.targets)
        want = (*want[:2], want[2][self.columns]) if len(want) == 3 else want
        worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True))
        if not worst <= tolerance:
            raise RuntimeError(f"{call}: shards differ by {worst:.1e} from the whole")


def measure(model: str, dtype: str, rounds: int, rows: int | None = None) -> list[dict[str, Any]]:
    """Return a row of results for each call and contender. All ranks run this."""
    vocab, width, default_rows = SHAPES[model]
    rows = rows or default_rows
    problem, found = Problem(vocab, width, rows, getattr(torch, dtype)), []
    for call in CALLS:
        problem.check(call, 1e-5 if dtype == "float32" else 0.02)
        runs = problem.runs(call)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(rounds + 1):
            for name, run in runs.items():
                dist.barrier()
                ms = 1e3 * timed(run, CPU)[0]
                if i:  # the first is to warm up
                    times[name].append(ms)
        about = {"model": model, "vocab": vocab, "width": width, "rows": rows, "dtype": dtype, "call": call}
        for name, ms in times.items():
            ratio = statistics.median(a / b for a, b in zip(ms, times[SHARDS], strict=True))
            found.append(about | {"name": name, "ms": statistics.median(ms), "ms_of_rounds": ms, "of_shards": ratio})
    return found


def rank_measures(rank: int, options: argparse.Namespace, port: int, folder: str) -> None:
    """Measure on one rank. The first leaves the rows of results in the ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.ranks)
    found = []
    for dtype, model in itertools.product(options.dtypes, options.models):
        found += measure(model, dtype, options.rounds, options.rows)
        if rank == 0:
            print(f"measured {model}, {dtype}", file=sys.stderr, flush=True)
            torch.save(found, Path(folder, "rows"))
    dist.destroy_process_group()


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines, heading = [], None
    for row in rows:
        if (row["model"], row["dtype"], row["call"]) != heading:
            heading = row["model"], row["dtype"], row["call"]
            sizes = f"{row['rows']} rows of {row['vocab']} x {row['width']}"
            lines += ["", f"{', '.join(heading)}: {sizes}", f"{'':<24}{'ms':>10}{'x shards':>10}"]
        lines.append(f"{row['name']:<24}{row['ms']:10.2f}{row['of_shards']:10.3f}")
    return "\n".join(lines[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocab_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES)[:2], choices=SHAPES, help="whose head; default the first two")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="of each head; default 256 and 64")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for <device>.json, of which this replaces the section vocab_parallel"
    )
    parser.add_argument("--commit", help="of the code, where there is no git")
    options = parser.parse_args(arguments)
    for name in ("ranks", "rounds", "rows"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name}: {number} given, accepted are 1 and more")
    section: dict[str, Any] = {"machine": machine(CPU, options.commit), "rates": rates(CPU), "ranks": options.ranks}
    multiprocessing.set_forkserver_preload(["benchmarks.inputs", "bupo_kernels"])
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        # These import torch once.
        start: Any = torch.multiprocessing.start_processes
        start(rank_measures, (options, port, folder), options.ranks, start_method="forkserver")
        section["rows"] = torch.load(Path(folder, "rows"))
    if options.out:
        write_section(results_path(options.out, section["machine"]), "vocab_parallel", section)
    print(table(section["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
