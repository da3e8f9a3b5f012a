"""Cost of the outputs of a logit lens: ``python -m benchmarks.lens --out benchmarks/results``.

Hidden states are random, the deviation of their logits from 0.05 in the first layer to 4 in the last. The floor is the library's
product of all layers' rows with the unembedding, in the dtype of both, 2,048 rows at a time so that its results fit into memory. It
takes turns with the calls, round by round, so that a ratio is of one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES
from bupo.measurement import machine, rates, results_path, timed, write_section
from bupo_kernels import LensStatistics, logit_lens

# Layers, rows, vocabulary and width: those of SmolLM2-135M on a page of text, and others.
SHAPES = {"SmolLM2-135M": (31, 235, 49152, 576), "Qwen3-0.6B": (28, 64, 151936, 1024), "tiny": (3, 16, 500, 32)}
BOTH_KL = ("kl_to_final", "kl_from_final")
CALLS: dict[str, tuple[tuple[str, ...], int]] = {  # outputs, and the top k
    "entropy": (("entropy",), 0),
    "KL both ways": (BOTH_KL, 0),
    "top 10": ((), 10),
    "KL both ways, top 10, argmax": ((*BOTH_KL, "argmax"), 10),
    "all pairs": (("pairwise_kl",), 0),
    "rank": (("rank",), 0),
    "JSD": (("jsd",), 0),
    "JSD, rank": (("jsd", "rank"), 0),
}
FLOOR, FLOOR_ROWS = "bare products", 2048


class Problem:
    """Random hidden states of several layers, and an unembedding."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device) -> None:
        layers, rows, vocab, width = SHAPES[model]
        generator = torch.Generator().manual_seed(0)
        deviations = torch.linspace(0.05, 4, layers).view(layers, 1, 1)
        states = torch.randn(layers, rows, width, generator=generator) * deviations
        weight = torch.randn(vocab, width, generator=generator) / width**0.5
        self.states, self.weight = states.to(device, dtype), weight.to(device, dtype)
        self.final = (3 * torch.randn(rows, width, generator=generator)).to(device, dtype)
        self.targets = torch.randint(0, vocab, (rows,), generator=generator).to(device)

    def run(self, call: str, backend: str) -> LensStatistics:
        outputs, top_k = CALLS[call]
        arguments = {"final": self.final, "outputs": outputs, "top_k": top_k, "backend": backend}
        return logit_lens(self.states, self.weight, self.targets, **arguments)

    def bare_products(self) -> Tensor:
        for rows in self.states.flatten(0, 1).split(FLOOR_ROWS):
            found = rows @ self.weight.T
        return found


def measure(model: str, dtype: str, backend: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row of results for the floor and for each call."""
    problem = Problem(model, getattr(torch, dtype), device)
    runs: dict[str, Callable[[], object]] = {FLOOR: problem.bare_products}
    runs |= {call: partial(problem.run, call, backend) for call in CALLS}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(1e3 * timed(run, device)[0])
    about = dict(zip(("layers", "rows", "vocab", "width"), SHAPES[model], strict=True)) | {"model": model, "dtype": dtype}
    floor = statistics.median(times[FLOOR])
    return [
        about | {"name": name, "ms": (ms := statistics.median(of_rounds)), "ms_of_rounds": of_rounds, "ratio": ms / floor}
        for name, of_rounds in times.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lens", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(SHAPES)[:1], choices=SHAPES, help="whose sizes; default the first")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--backend", default="auto", help="as in logit_lens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for <device>.json, of which this replaces the section lens")
    parser.add_argument("--commit", help="of the code, where there is no git")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} given, accepted are 1 and more")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.lens: --device: cuda given, accepted here is cpu (no CUDA GPU)", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    section: dict[str, Any] = {"machine": machine(device, options.commit), "rates": rates(device), "rows": []}
    for model in options.models:
        for dtype in options.dtypes:
            rows = measure(model, dtype, options.backend, options.rounds, device)
            section["rows"] += rows
            print(f"{model}, {dtype}, {options.backend}")
            print("\n".join(f"{row['name']:<32}{row['ms']:12.2f} ms{row['ratio']:8.2f}" for row in rows), flush=True)
            if options.out:  # what is measured is kept, should there be no time for the rest
                write_section(results_path(options.out, section["machine"]), "lens", section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
