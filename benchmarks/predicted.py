"""What the model of the machine says of this library, naive logits and the bare products: ``python -m benchmarks.predicted``.

It writes benchmarks/predicted.md, for every GPU whose rates ``bupo_kernels/backends/machine.py`` has, with what was measured
beside it once results/ has a file of that GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.records import Record, Results, fastest, machines, read_results
from benchmarks.text import GIB, digits, table, times
from bupo.output import replace_file
from bupo_kernels.backends.base import Problem
from bupo_kernels.backends.machine import GPUS, Gpu, Seconds, named
from bupo_kernels.dispatch import Columns, Plan, default_memory_budget, make_plan

HERE = Path(__file__).parent
PAGE = HERE / "predicted.md"
ROWS, VOCAB, WIDTHS = 32768, 151936, (1024, 2560, 4096)
PREDICTED = ("forward", "forward+backward", "one-pass loss")  # of contenders.GROUPS

# What several ranks of H100 SXM have in one box, none of it measured here. NVLink 4 moves 450 GB/s each way; nccl-tests are said to
# reach 0.8 of it and more in long all-reduces on eight GPUs. A small collective is taken to last LATENCY.
LINK_RATE, LINK_SHARE, LATENCY = 450e9, 0.8, 20e-6
# Collectives of a call: headers and statistics, in the backward two headers and dH; of a one-pass loss, in each chunk.
COLLECTIVES = {"forward": 2, "forward+backward": 5, "one-pass loss": 3}
ON_RANKS = f"""\
## A vocabulary on several ranks

`group=` on H100 SXM GPUs in one box: N = {ROWS:,}, bfloat16, even shards. NVLink moves {LINK_RATE / 1e9:.0f} GB/s each way, of
which collectives are taken to reach {LINK_SHARE}, after {1e6 * LATENCY:.0f} µs each. **Sent** is the time of all of them as if
nothing hid it; in a one-pass loss the products of a chunk hide the sum of dH of the chunk before. With as large a budget a shard
keeps E of more rows, and forms fewer products again: so a speed-up can be above the number of ranks."""
INTRODUCTION = f"""\
<!-- Written by `python -m benchmarks.predicted` from bupo_kernels/backends/machine.py and benchmarks/results/*.json. -->

# Predicted times

**Nothing here is measured, but for the last column.** Times follow from counts (FLOPs, bytes, instructions between two products,
operands from L2) and the public rates of each GPU; [machine.py](../bupo_kernels/backends/machine.py) has all of them, with their
sources and with what is assumed. `print(explain(hidden, weight, device="H100"))` says the same of other sizes, on any machine.

N = {ROWS:,}, V = {VOCAB:,}, bfloat16, every row active, the default budget; milliseconds. **naive** materialises logits in torch
(`F.linear`, log-softmax in fp32, autograd); **floor** is the bare products of the library; **native** is what the CUDA row kernels
would take in the place of Triton. Memory is in GiB, beyond operands, results and gradients; in brackets where the GPU has less.
**measured** is this library / naive / floor."""


def problem(gpu: Gpu, width: int, *, gradients: bool) -> Problem:
    """Return the problem of the table."""
    device = torch.device("cuda")
    return Problem(
        *(ROWS, ROWS, VOCAB, width, torch.bfloat16, device),
        grad_hidden=gradients,
        grad_weight=gradients,
        grad_bias=False,
        softcap=False,
        memory_budget=default_memory_budget(device, gpu),
        gpu=gpu,
    )


def plan(gpu: Gpu, width: int, group: str, backend: str = "auto") -> Plan:
    """Return the plan of a row of the ``group``'s table."""
    return make_plan(problem(gpu, width, gradients=group != "forward"), backend, one_pass=group == "one-pass loss")


def page(results: Results) -> str:
    """Return benchmarks/predicted.md."""
    header = ["GPU", "D:", "this library", "ms:", "× floor:", "native:", "naive:", "floor:", "memory:", "naive's:", "measured"]
    found = [f"## {group.capitalize()}\n\n{table(header, _rows(group, results))}" for group in PREDICTED]
    of_ranks = ["", "V:", "D:", "ranks:", "ms:", "sent:", "share:", "speed-up:", "bytes a row, forward:", "backward:"]
    found.append(f"{ON_RANKS}\n\n{table(of_ranks, _rows_on_ranks())}")
    return "\n\n".join([INTRODUCTION, *found]) + "\n"


def _rows(group: str, results: Results) -> Iterator[list[str]]:
    for gpu in GPUS:
        for width in WIDTHS:
            taken, native = plan(gpu, width, group), plan(gpu, width, group, "native").prediction
            found, memory = taken.prediction, taken.tile_plan.memory
            assert found is not None
            assert native is not None
            ours = _time(found.ours, group)
            used = [memory.working + memory.accumulator, found.naive_bytes]
            yield [
                *(gpu.name, str(width), f"{taken.backend}: {taken.tile_plan.strategy}"),
                *(_ms(ours), times(ours / _time(found.floor, group))),
                *(_ms(_time(seconds, group)) for seconds in (native.ours, found.naive, found.floor)),
                *(digits(n, GIB) if n <= gpu.memory else f"({digits(n, GIB)})" for n in used),
                measured(results, gpu, width, group),
            ]


def _rows_on_ranks() -> Iterator[list[str]]:
    gpu = named("H100")
    for group, (vocab, width) in itertools.product(PREDICTED, ((151936, 4096), (262144, 8192))):
        alone = None
        for ranks in (1, 2, 4, 8):
            here = -(-vocab // ranks)
            of_ranks = replace(problem(gpu, width, gradients=group != "forward"), vocab=here, sharded=ranks > 1)
            found = make_plan(of_ranks, "auto", one_pass=group == "one-pass loss")
            found = replace(found, columns=Columns(0, here, vocab, ranks) if ranks > 1 else None)
            assert found.prediction is not None
            products, sent = _time(found.prediction.ours, group), sent_seconds(found, group)
            alone = products if alone is None else alone
            total = products + sent
            yield [
                *(group, f"{vocab:,}", f"{width:,}", str(ranks), _ms(total), _ms(sent) if sent else "0"),
                *(f"{sent / total:.1%}", times(alone / total), *(f"{x:,.0f}" for x in found.wire)),
            ]


def sent_seconds(found: Plan, group: str) -> float:
    """Return the seconds of the collectives of a plan, one after the other, of a call with that many bytes a row."""
    if found.columns is None:
        return 0.0
    rows, chunk = found.problem.active_rows, found.tile_plan.chunk_rows
    forward, backward = found.wire
    count = COLLECTIVES[group] * (-(-rows // chunk) if chunk else 1)
    return rows * (forward + backward) / (LINK_SHARE * LINK_RATE) + count * LATENCY


def _time(seconds: Seconds | None, group: str) -> float:
    assert seconds is not None  # 16-bit operands without a softcap are counted on every GPU
    return seconds.forward if group == "forward" else seconds.total


def _ms(seconds: float) -> str:
    return digits(1e3 * seconds)


def measured(results: Results, gpu: Gpu, width: int, group: str) -> str:
    """Return the least milliseconds that this library, naive logits and the floor took in the same table of results."""
    asked = {"group": group, "rows": ROWS, "vocab": VOCAB, "width": width, "dtype": "bfloat16", "active": 1.0, "layers": 1}
    rows: list[Record] = []
    for machine in machines(results):
        section = machine.sections.get("kernels", Record())
        if section["machine"]["device"] == gpu.model:
            rows += [row for row in section["rows"] if all(row[name] == value for name, value in asked.items())]
    best = [fastest(row for row in rows if row["who"] == who) for who in ("ours", "naive", "floor")]
    return " / ".join("–" if row is None else digits(row["ms"]) for row in best) if any(best) else "not measured"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 where ``--check`` finds the page out of date or the results cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    given = parser.parse_args(arguments)
    try:
        text = page(read_results(given.results))
        current = given.out.exists() and given.out.read_text(encoding="utf-8") == text
        if not given.check:
            replace_file(given.out, text)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if given.check and not current:
        print(f"{given.out}: is out of date, run python -m benchmarks.predicted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
