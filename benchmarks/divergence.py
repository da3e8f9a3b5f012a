"""Cost of the divergence of a student from a frozen teacher: ``python -m benchmarks.divergence --out benchmarks/results``.

The student's hidden states and head are trained; the teacher has a head of its own, of the same size. What is timed is the mean
over all rows, forward and backward, beside the bare products that it cannot do without (one of each side, dH and dW), and beside
logits that are materialised, in torch. Liger's fused JSD (0.8) stands there too, where it is installed and there is a GPU. All take
turns, round by round, on one random problem; ours must give what materialised logits do.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES
from bupo.measurement import machine, peak_bytes, rates, results_path, timed, write_section
from bupo_kernels import linear_divergence
from bupo_kernels.backends.gradients import accumulate_

# Vocabulary, width and rows of a student's and of its teacher's head.
SHAPES = {"SmolLM2-135M": (49152, 576, 512), "Qwen3-0.6B": (151936, 1024, 256), "tiny": (500, 32, 64)}
KINDS = ("forward_kl", "reverse_kl", "jsd")
FLOOR, NAIVE, LIGER = "bare products", "materialised logits", "liger"
MIB = 2**20

Gradients = tuple[Tensor, ...]  # the loss, dH and dW


class Problem:
    """A random student and its teacher."""

    def __init__(self, vocab: int, width: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        self.hidden, self.weight = random(rows, width), random(vocab, width, scale=width**-0.5)
        # The teacher is near its student, as in a distillation that has begun.
        self.teacher_hidden = self.hidden + 0.5 * random(rows, width)
        self.teacher_weight = self.weight + 0.3 * random(vocab, width, scale=width**-0.5)
        self.trained = self.hidden.requires_grad_(), self.weight.requires_grad_()

    def _graded(self, loss: Tensor) -> Gradients:
        return loss.detach(), *torch.autograd.grad(loss, self.trained)

    def ours(self, backend: str, kind: str) -> Gradients:
        teacher = self.teacher_hidden, self.teacher_weight
        found = linear_divergence(*self.trained, *teacher, kind=kind, reduction="mean", backend=backend)
        return self._graded(found.divergence)

    def naive(self, kind: str) -> Gradients:
        # The backward of torch's product of 16-bit operands takes minutes on a CPU.
        operands = (*self.trained, self.teacher_hidden, self.teacher_weight)
        hidden, weight, *teacher = (x.float() if x.device.type == "cpu" else x for x in operands)
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        log_q = (teacher[0] @ teacher[1].T).float().log_softmax(-1)

        def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
            return (log_a.exp() * (log_a - log_b)).sum(-1).mean()

        if kind != "jsd":
            return self._graded(kl(log_q, log_p) if kind == "forward_kl" else kl(log_p, log_q))
        middle = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log().item()
        return self._graded((kl(log_q, middle) + kl(log_p, middle)) / 2)

    def liger(self, kind: str) -> Gradients:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind]
        return self._graded(LigerFusedLinearJSD(beta)(*self.trained, self.teacher_hidden, self.teacher_weight, None))

    @torch.no_grad()
    def products(self) -> None:
        """Multiply what no contender can do without, in chunks of rows whose logits take no more than the memory of one."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        on_cpu = self.hidden.device.type == "cpu"
        operands = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        hidden, weight, *teacher = (x.to(wide) if on_cpu else x for x in operands)
        z = torch.empty(len(hidden), len(weight), dtype=wide, device=hidden.device)
        accumulate_(z, teacher[0], teacher[1].T, first=True)
        accumulate_(z, hidden, weight.T, first=True)
        dz = z.to(hidden.dtype)
        accumulate_(torch.empty_like(hidden, dtype=wide), dz, weight, first=True)
        accumulate_(torch.empty_like(weight, dtype=wide), dz.T, hidden, first=True)


def measure(model: str, dtype: str, rounds: int, device: torch.device, rows: int | None = None) -> list[dict[str, Any]]:
    """Return a row of results for each kind and contender. Raise ``RuntimeError`` where two that compute the same differ."""
    vocab, width, default_rows = SHAPES[model]
    rows = rows or default_rows
    problem = Problem(vocab, width, rows, getattr(torch, dtype), device)
    has_liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    found = []
    for kind in KINDS:
        backends = ("native", "torch") if device.type == "cpu" else ("torch",)
        runs: dict[str, Callable[[], Gradients | None]] = {FLOOR: problem.products}
        runs |= {f"linear_divergence, {backend}": partial(problem.ours, backend, kind) for backend in backends}
        runs |= {NAIVE: partial(problem.naive, kind)} | ({LIGER: partial(problem.liger, kind)} if has_liger else {})
        truth, peaks = problem.naive(kind), {}
        for name, run in runs.items():
            results: list[Gradients | None] = []
            peak = peak_bytes(lambda run=run, results=results: results.append(run()), device)  # type: ignore[misc]
            own = results[0]
            peaks[name] = max(peak - sum(x.nbytes for x in own or ()), 0)
            tolerance = 1e-4 if dtype == "float32" else 0.05  # materialised logits and dz may be of 16 bit
            worst = 0.0 if own is None or name == LIGER else max(_distance(a, b) for a, b in zip(own, truth, strict=True))
            if worst > tolerance:
                raise RuntimeError(f"{name}, {kind}, {dtype}: differs by {worst:.1e} from materialised logits")
        del truth, results, own
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(1e3 * timed(run, device)[0])
        about = {"model": model, "vocab": vocab, "width": width, "rows": rows, "dtype": dtype, "call": kind}
        for name, ms in times.items():
            ratio = statistics.median(a / b for a, b in zip(ms, times[FLOOR], strict=True))
            row = {"name": name, "ms": statistics.median(ms), "ms_of_rounds": ms, "times_floor": ratio, "peak_bytes": peaks[name]}
            found.append(about | row)
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines, heading = [], None
    for row in rows:
        if (row["model"], row["dtype"], row["call"]) != heading:
            heading = row["model"], row["dtype"], row["call"]
            sizes = f"{row['rows']} rows of {row['vocab']} x {row['width']}, both sides"
            lines += ["", f"{', '.join(heading)}: {sizes}", f"{'':<28}{'ms':>10}{'x floor':>10}{'peak MiB':>10}"]
        lines.append(f"{row['name']:<28}{row['ms']:10.1f}{row['times_floor']:10.2f}{row['peak_bytes'] / MIB:10.1f}")
    return "\n".join(lines[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.divergence", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(SHAPES)[:2], choices=SHAPES, help="whose head; default the first two")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="of each head; default 512 and 256")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for <device>.json, of which this replaces the section divergence"
    )
    parser.add_argument("--commit", help="of the code, where there is no git")
    options = parser.parse_args(arguments)
    for name in ("rounds", "rows"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name}: {number} given, accepted are 1 and more")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.divergence: --device: cuda given, accepted here is cpu (no CUDA GPU)", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    section: dict[str, Any] = {"machine": machine(device, options.commit), "rates": rates(device), "rows": []}
    for dtype, model in itertools.product(options.dtypes, options.models):
        section["rows"] += measure(model, dtype, options.rounds, device, options.rows)
        print(f"measured {model}, {dtype}", file=sys.stderr, flush=True)
        if options.out:  # what is measured is kept, should there be no time for the rest
            write_section(results_path(options.out, section["machine"]), "divergence", section)
    print(table(section["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
