"""Candidate tiles for each Triton kernel that multiplies: ``python -m benchmarks.tune --out benchmarks/results``.

Every candidate runs once in each round, so that all of them see the same clocks, on operands new to the round. Medians over the
rounds. Prints a table last and writes <out>/<device>-tune.json. What does not run is a row with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Case, Inputs
from bupo.measurement import finite, machine, rates, results_path, timed, write_section
from bupo_kernels import linear_logprobs
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Operands, Readout
from bupo_kernels.backends.triton_ import config, target_of

CASES = [Case.of("Qwen3-4B", 32768), Case.of("Qwen3-8B", 32768)]
TINY = [Case.of("tiny", 96)]
ALL_OF_E = 96 * 2**30  # bytes: E of every row
CANDIDATES = [
    config.KernelConfig(128, 128, 64, 8, 3),
    config.KernelConfig(128, 128, 64, 8, 4),
    config.KernelConfig(128, 128, 64, 8, 4, group=16),
    config.KernelConfig(128, 256, 64, 8, 3),
    config.KernelConfig(128, 256, 64, 8, 3, group=16),
    config.KernelConfig(128, 256, 32, 8, 6),
    config.KernelConfig(128, 256, 64, 16, 3),
    config.KernelConfig(256, 128, 64, 8, 3),
    config.KernelConfig(256, 128, 64, 8, 4),
    config.KernelConfig(256, 128, 64, 8, 4, group=4),
    config.KernelConfig(256, 128, 64, 8, 4, group=16),
    config.KernelConfig(256, 128, 32, 8, 6),
]


@contextmanager
def configured(function: str, modules: list[str], candidate: config.KernelConfig | None) -> Iterator[None]:
    """Have ``function`` of config.py return ``candidate`` to the modules that use it; for None, what it returns by itself."""
    root = "bupo_kernels.backends.triton_"
    found = [importlib.import_module(f"{root}.{name}") for name in modules]
    originals = [getattr(module, function) for module in found]
    try:
        for module in found if candidate is not None else []:
            setattr(module, function, lambda *_, **__: candidate)
        yield
    finally:
        for module, original in zip(found, originals, strict=True):
            setattr(module, function, original)


def statistics_kernel(x: Inputs, keep_e: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.set_grad_enabled(keep_e):
            backend, budget = ("triton:cached", ALL_OF_E) if keep_e else ("triton", None)
            return linear_logprobs(*x.leaves, x.targets, backend=backend, memory_budget=budget).logprobs.detach()

    return call


def recompute_kernel(x: Inputs, columns: int) -> Callable[[], Tensor]:
    """Return a call that forms one slice of dz, without the products that follow."""
    from bupo_kernels.backends.triton_.gradient_recompute import gradient_recompute
    from bupo_kernels.backends.triton_.product import Launch

    rows, device = x.case.rows, x.device
    operands = Operands(x.hidden.detach(), x.weight.detach(), None, x.targets, Readout(1.0, 1.0, None))
    launch = Launch(operands, torch.arange(rows, device=device), target_of(device))
    numbers = torch.rand(3, rows, device=device)
    coefficients = Coefficients(torch.full((rows,), 6.0, device=device), *numbers, x.targets)
    dz = torch.empty(rows, config.padded(columns), dtype=x.hidden.dtype, device=device)

    def call() -> Tensor:
        gradient_recompute(launch, coefficients, dz, slice(0, columns))
        return dz[:, :columns]

    return call


def tune(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kernel and candidate, its own first; ``difference`` is the largest from its result, None for NaN."""
    x = Inputs(case, device)
    columns = min(config.MOST_COLUMNS, case.vocab)
    kernels = {
        "statistics": (statistics_kernel(x, False), case.vocab, "statistics_config", ["config", "linear_statistics"]),
        "statistics, keeping E": (statistics_kernel(x, True), case.vocab, "statistics_config", ["config", "linear_statistics"]),
        "recompute": (recompute_kernel(x, columns), columns, "gradient_config", ["config", "gradient_recompute"]),
    }
    found = []
    for kernel, (call, of_columns, function, modules) in kernels.items():
        result = call()
        want = result.clone()
        ms: dict[config.KernelConfig | None, list[float]] = {candidate: [] for candidate in (None, *CANDIDATES)}
        about = {}
        for candidate in ms:
            try:
                result.fill_(torch.nan)  # "recompute" writes where it wrote before
                with configured(function, modules, candidate):
                    difference = (call().float() - want.float()).abs().max().item()
                about[candidate] = {"reason": None, "difference": finite(difference)}
            except Exception as error:  # out of shared memory, registers, or a compiler that gives up
                about[candidate] = {"reason": f"{type(error).__name__}: {str(error).strip()[:160]}".splitlines()[0]}
        for _ in range(rounds):
            x.refresh("flat")
            for candidate, of_rounds in ms.items():
                if about[candidate]["reason"] is None:
                    with configured(function, modules, candidate):
                        of_rounds.append(1e3 * timed(call, device)[0])
        flops = 2 * case.rows * of_columns * case.width
        for candidate, of_rounds in ms.items():
            name = "default" if candidate is None else f"{candidate}, group {candidate.group}"
            row = {"rows": case.rows, "vocab": case.vocab, "width": case.width, "kernel": kernel, "config": name} | about[candidate]
            if of_rounds:
                median = statistics.median(of_rounds)
                row |= {"ms": median, "ms_of_rounds": of_rounds, "tflops": flops / median / 1e9}
            found.append(row)
        if device.type != "cpu":
            torch.cuda.empty_cache()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines, previous = [], None
    for row in rows:
        heading = f"{row['kernel']}, {row['rows']} x {row['vocab']} x {row['width']}"
        if heading != previous:
            previous = heading
            lines += ["", f"{heading:<52}{'ms':>9}{'TFLOP/s':>9}{'|d|':>10}"]
        if row["reason"]:
            lines += [f"{row['config']:<52}  {row['reason']}"]
        else:
            difference = "not finite" if row["difference"] is None else f"{row['difference']:.1e}"
            lines += [f"{row['config']:<52}{row['ms']:9.2f}{row['tflops']:9.0f}{difference:>10}"]
    return "\n".join(lines[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for <device>-tune.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run, with TRITON_INTERPRET=1 --tiny")
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} given, accepted are 1 and more")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.tune: --device: cuda given, accepted here is cpu, a dry run (no CUDA GPU)", file=sys.stderr)
        return 2
    if options.device == "cpu" and not (config.interpreted() and options.tiny):
        parser.error("--device: cpu given, accepted is cuda, or cpu with TRITON_INTERPRET=1 in the environment and --tiny")

    device, rows = torch.device(options.device), []
    about = machine(device, options.commit) | {"interpreted": config.interpreted()}
    of_machine = rates(device)
    for case in TINY if options.tiny else CASES:
        rows += tune(case, device, options.rounds)
        print(f"measured {case.model}", file=sys.stderr, flush=True)
    print(table(rows))
    if options.out:
        path = results_path(options.out, about)
        path = path.with_name(f"{path.stem}-tune.json")
        write_section(path, "tune", {"machine": about, "rates": of_machine, "rows": rows})
        print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
