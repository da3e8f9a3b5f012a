"""Cost of this library against the size of the problem: ``python -m benchmarks.scaling --out benchmarks/results``.

One size at a time is varied, the others stay: rows, vocabulary, width and share of active rows of the head, and the layer whose
policy a model is trained on. The points of an axis take turns, round by round, on inputs new to each; medians over the rounds. To
them a line is fitted, milliseconds = fixed + FLOPs / rate, with the FLOPs that ``explain`` states (of a model: ``bupo.cost``; its
fixed part is below zero where the head, which every point has, runs at a higher rate than the layers).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.inputs import DTYPES, FLAT, Case, Inputs
from bupo.cost import pass_flops, work_of
from bupo.measurement import machine, rates, results_path, timed, write_section
from bupo_kernels import PolicyObjective, explain, linear_logprobs, linear_policy_loss, policy_loss

AXES = ("rows", "vocab", "width", "active", "layer")
# What is varied, and what is fixed: of a Case, or of the model and its batch. A CPU of 1 TFLOP/s in bfloat16 takes about three
# minutes for five rounds; a GPU does about eighty times the FLOPs.
SIZES: dict[str, dict[str, tuple[tuple, dict[str, int]]]] = {
    "cpu": {
        "rows": ((128, 256, 512, 1024, 2048), {"vocab": 32000, "width": 1024}),
        "vocab": ((8192, 16384, 32768, 65536, 151936), {"rows": 1024, "width": 1024}),
        "width": ((256, 512, 1024, 2048, 4096), {"rows": 1024, "vocab": 32000}),
        "active": ((0.1, 0.25, 0.5, 0.75, 1.0), {"rows": 1024, "vocab": 32000, "width": 1024}),
        "layer": ((1, 6, 12, 18, 24), {"layers": 24, "vocab": 32000, "width": 512, "sequences": 4, "length": 256}),
    },
    "cuda": {
        "rows": ((1024, 4096, 16384, 32768, 65536), {"vocab": 151936, "width": 2560}),
        "vocab": ((8192, 16384, 32768, 65536, 151936, 262144), {"rows": 4096, "width": 2560}),
        "width": ((512, 1024, 2048, 4096, 8192), {"rows": 4096, "vocab": 151936}),
        "active": ((0.1, 0.25, 0.5, 0.75, 1.0), {"rows": 8192, "vocab": 151936, "width": 2560}),
        "layer": ((1, 7, 14, 21, 28), {"layers": 28, "vocab": 151936, "width": 1024, "sequences": 4, "length": 1024}),
    },
    "tiny": {
        "rows": ((8, 16, 32), {"vocab": 517, "width": 64}),
        "vocab": ((259, 517, 1031), {"rows": 16, "width": 64}),
        "width": ((32, 64, 128), {"rows": 16, "vocab": 517}),
        "active": ((0.25, 0.5, 1.0), {"rows": 32, "vocab": 517, "width": 64}),
        "layer": ((1, 2, 4), {"layers": 4, "vocab": 517, "width": 128, "sequences": 2, "length": 8}),
    },
}


@dataclass
class Run:
    """``call`` returns the log-probs or the loss, then gradients; the first lies within ``tolerance`` of ``expected``."""

    name: str
    flops: float
    call: Callable[[], tuple[Tensor, ...]]
    expected: Callable[[], Tensor]
    tolerance: float
    ms: list[float] = field(default_factory=list)  # of each round


@dataclass
class Point:
    value: float
    refresh: Callable[[], None]  # draws new inputs
    runs: list[Run]


def head_points(axis: str, values: tuple, fixed: dict[str, int], device: torch.device, dtype: str) -> Iterator[Point]:
    for value in values:
        x = Inputs(Case("", dtype=dtype, **fixed | {axis: value}), device)
        yield Point(value, lambda x=x: x.refresh("flat"), head_runs(x))


def head_runs(x: Inputs) -> list[Run]:
    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return (linear_logprobs(*x.leaves, x.targets).logprobs,)

    def with_backward() -> tuple[Tensor, ...]:
        out = linear_logprobs(*x.leaves, x.targets)
        gradients = torch.autograd.grad((out.logprobs, out.entropy), x.leaves, (x.g_logprob, x.g_entropy))
        return out.logprobs.detach(), *gradients

    def one_pass() -> tuple[Tensor, ...]:
        loss, _ = linear_policy_loss(*x.leaves, x.targets, x.advantages)
        return loss.detach(), *torch.autograd.grad(loss, x.leaves)

    def uniform() -> Tensor:
        return -math.log(x.case.vocab) * x.mask

    def loss() -> Tensor:
        return on_policy_loss(x.advantages, x.active_rows)

    with torch.no_grad():
        of_forward = explain(*x.leaves, x.targets)
    of_both = explain(*x.leaves, x.targets)
    of_loss = explain(*x.leaves, x.targets, objective=PolicyObjective())
    stated = [plan.flops_forward + plan.flops_backward for plan in (of_forward, of_both, of_loss)]
    near = 10 * FLAT  # 10 standard deviations of the target's logit
    return [
        Run("linear_logprobs, forward", stated[0], forward, uniform, near),
        Run("linear_logprobs, forward+backward", stated[1], with_backward, uniform, near),
        Run("linear_policy_loss, forward+backward", stated[2], one_pass, loss, 1e-4),
    ]


def layer_points(values: tuple, fixed: dict[str, int], device: torch.device, dtype: str) -> Iterator[Point]:
    """Yield points of a random Qwen3 with a tied head, in the proportions of Qwen3-0.6B, and token ids, every one of which has a
    target."""
    heads = fixed["width"] // 64
    architecture = Qwen3Config(
        vocab_size=fixed["vocab"],
        hidden_size=fixed["width"],
        intermediate_size=3 * fixed["width"],
        num_hidden_layers=fixed["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with device:
        model = Qwen3ForCausalLM(architecture).to(DTYPES[dtype]).train()
    shape = fixed["sequences"], fixed["length"]
    ids, targets = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
    advantages = torch.empty(shape, device=device)
    work = work_of([(1, fixed["length"])] * fixed["sequences"])

    def refresh() -> None:
        model.zero_grad(set_to_none=True)
        for tokens in (ids, targets):
            tokens.random_(fixed["vocab"])
        advantages.normal_()

    def call(layer: int) -> tuple[Tensor, ...]:
        loss, _ = policy_loss(model, ids, targets, advantages, layer=layer)
        loss.backward()
        return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)

    def expected() -> Tensor:
        return on_policy_loss(advantages, advantages.numel())

    for layer in values:
        flops = pass_flops(architecture, work, layer=layer, backward=True).hardware
        run = Run("policy_loss, forward+backward", flops, lambda layer=layer: call(layer), expected, 1e-4)
        yield Point(layer, refresh, [run])


def on_policy_loss(advantages: Tensor, tokens: int) -> Tensor:
    """Return a policy loss in which every ratio is 1."""
    return -advantages.sum() / tokens


def measure(points: list[Point], device: torch.device, rounds: int, until: float) -> None:
    """Add the milliseconds of each round to every run. The first round does not count, the second does, and no other begins
    after ``until`` (of ``time.monotonic``)."""
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > until:
            return
        for point in points:
            point.refresh()
            for run in point.runs:
                ms = once(run, device)
                run.ms += [ms] if number else []


def once(run: Run, device: torch.device) -> float:
    """Return the milliseconds of a call, whose results are looked at.

    Raises ``RuntimeError`` where they are not what must come out.
    """
    seconds, (values, *gradients) = timed(run.call, device)
    off = (values - run.expected()).abs().max().item()
    if not off <= run.tolerance:
        raise RuntimeError(f"{run.name}: off by {off:.3g}, at most {run.tolerance:.3g} can be")
    if not all(gradient.sum(dtype=torch.float32).isfinite() for gradient in gradients):
        raise RuntimeError(f"{run.name}: a gradient is not finite")
    return 1e3 * seconds


def fit(flops: list[float], ms: list[float]) -> dict[str, float | None]:
    """Return the line ``ms = fixed_ms + flops / rate`` of least squares; the rate in TFLOP/s is None where the cost does not
    grow."""
    slope, intercept = statistics.linear_regression(flops, ms)
    tflops = 1 / slope / 1e9 if slope > 0 else None
    return {"fixed_ms": intercept, "tflops": tflops, "r2": statistics.correlation(flops, ms) ** 2}


def rows_of(axis: str, dtype: str, fixed: dict[str, int], points: list[Point]) -> list[dict[str, Any]]:
    rows = []
    for runs in zip(*(point.runs for point in points), strict=True):
        found = [
            {"value": point.value, "ms": statistics.median(run.ms), "ms_of_rounds": run.ms, "flops": run.flops}
            for point, run in zip(points, runs, strict=True)
        ]
        line = fit([each["flops"] for each in found], [each["ms"] for each in found])
        rows.append({"axis": axis, "contender": runs[0].name, "dtype": dtype, "fixed": fixed, "points": found, "fit": line})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines, heading = [], None
    for row in rows:
        fixed = ", ".join(f"{name} {value}" for name, value in row["fixed"].items())
        if (row["axis"], fixed) != heading:
            heading = row["axis"], fixed
            values = "".join(f"{point['value']:>10}" for point in row["points"])
            lines += ["", f"{row['axis']}; {fixed}; {row['dtype']}"]
            lines += [f"{'milliseconds at':<40}{values} |{'fixed ms':>10}{'TFLOP/s':>10}{'r2':>8}"]
        times = "".join(f"{point['ms']:10.2f}" for point in row["points"])
        tflops = "-" if row["fit"]["tflops"] is None else f"{row['fit']['tflops']:.2f}"
        lines += [f"{row['contender']:<40}{times} |{row['fit']['fixed_ms']:10.2f}{tflops:>10}{row['fit']['r2']:8.4f}"]
    return "\n".join(lines[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--axes", nargs="+", default=AXES, choices=AXES, metavar="AXIS", help=f"of {', '.join(AXES)}; default all")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5, help="that count (default 5)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no round begins later, the first of each axis apart")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for <device>.json, of which this replaces the section scaling")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="sizes to try this program with")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} given, accepted are 1 and more")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.scaling: --device: cuda given, accepted here is cpu (no CUDA GPU)", file=sys.stderr)
        return 2

    device, started = torch.device(options.device), time.monotonic()
    section = {"machine": machine(device, options.commit), "rates": rates(device), "rows": []}
    failed = False
    for number, axis in enumerate(options.axes, 1):
        values, fixed = SIZES["tiny" if options.tiny else options.device][axis]
        try:
            if axis == "layer":
                points = list(layer_points(values, fixed, device, options.dtype))
            else:
                points = list(head_points(axis, values, fixed, device, options.dtype))
            measure(points, device, options.rounds, started + 60 * options.minutes * number / len(options.axes))
            section["rows"] += rows_of(axis, options.dtype, fixed, points)
            print(f"measured {axis}", file=sys.stderr, flush=True)
        except Exception as error:  # the other axes are still worth having
            print(f"benchmarks.scaling: {axis}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
        points = None  # frees the inputs before the next axis has its own
        if device.type != "cpu":
            torch.cuda.empty_cache()
    print(table(section["rows"]))
    if section["rows"] and options.out:
        path = results_path(options.out, section["machine"])
        write_section(path, "scaling", section)
        print(f"\nwritten to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
