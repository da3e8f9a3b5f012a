"""The floor, the peers and this library in one run: ``python -m benchmarks.kernels``, or ``pytest benchmarks --benchmark-only``.

Every contender is first checked against float64, on an early layer's flat policies and on a last layer's peaked ones, with whatever
memory it takes uninitialised filled with NaN. Then all take turns, round by round, so that they see the same clocks, on operands
drawn anew for the round; in every round each result is looked at again, and a contender that returns anything but what belongs to
these operands is out of the table, with the reason. Times are medians, × floor the median of the rounds' own ratios to the bare
products over the rows that count.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.contenders import GROUPS, Contender
from benchmarks.inputs import DISTRIBUTIONS, DTYPES, MODELS, Case, Exact, Inputs, untargeted
from benchmarks.ours import floor, naive, ours
from benchmarks.peers import peers
from benchmarks.records import KERNEL, read_results, tables_of
from bupo.measurement import machine, peak_bytes, rates, results_path, timed, write_section
from bupo.output import progress_bar

MIB = 2**20
LAYERS = 8  # of a lens
PATIENCE = 20.0  # seconds, for a run, and for all rounds but the first; a first run, which may compile, is waited for longer
SPOT_ROWS = 8  # looked at in every round
OVER = "the minutes given were over"

# What is measured unless asked otherwise, the most telling first: time may run out.
CASES = {
    "cpu": [
        (Case.of("Qwen3-0.6B", 512), tuple(GROUPS)),
        (Case.of("Qwen3-0.6B", 512, dtype="float32"), ("forward", "forward+backward")),
        (Case.of("Qwen3-0.6B", 512, active=0.5), ("forward+backward",)),
        (Case.of("Qwen3-0.6B", 256), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Qwen3-4B", 256), ("forward", "forward+backward")),
        (Case.of("Qwen3-8B", 256), ("forward",)),
        (Case.of("Llama-3.1-8B", 256), ("forward",)),
        (Case.of("Gemma-2-2B", 256), ("forward",)),
        (Case.of("Qwen3-0.6B", 1024), ("forward", "forward+backward")),
    ],
    "cuda": [
        (Case.of("Qwen3-8B", 32768), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Qwen3-4B", 32768), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Qwen3-8B", 32768, active=0.5), ("forward+backward", "one-pass loss")),
        (Case.of("Qwen3-8B", 2048), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Qwen3-4B", 4096), ("lens",)),
        (Case.of("Qwen3-4B", 2048), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Qwen3-4B", 256), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Llama-3.1-8B", 32768), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Gemma-2-2B", 32768), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Qwen3-0.6B", 32768), ("forward", "forward+backward", "one-pass loss")),
        (Case.of("Qwen3-4B", 65536), ("forward", "forward+backward", "one-pass loss")),
    ],
}


def contenders(group: str, x: Inputs) -> list[Contender]:
    """Return every row of a group's table, whether or not it runs here."""
    return [floor(group, x), *naive(group, x), *ours(group, x), *peers(group, x)]


# ---- one table


@dataclass
class Measured:
    """A contender and what was found out about it."""

    contender: Contender
    reason: str | None = None  # why it is not in the table
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    peak: int = 0
    tried: bool = False
    about: float = 0.0  # seconds of a run that is not counted
    seconds: dict[int, float] = field(default_factory=dict)  # round -> its time


def measure(
    group: str,
    case: Case,
    device: torch.device,
    rounds: int,
    *,
    distribution: str = "flat",
    patience: float = PATIENCE,
    chosen: Callable[[Contender], bool] = lambda contender: True,
    deadline: float = math.inf,
    tick: Callable[[str], None] = lambda what: None,
) -> list[dict]:
    """Return the rows of one table, as :mod:`benchmarks.records` reads them.

    Args:
        rounds: in each, every contender runs once.
        distribution: of the rounds, "flat" or "peaked"; errors are of both.
        patience: seconds; who takes longer for a run is out of the table, and who would for all rounds but the first runs in fewer.
        chosen: which contenders, besides the floor.
        deadline: of ``time.monotonic()``. Nobody new is tried behind it, and those who were run in one round.
        tick: told what is at hand.
    """
    torch.compiler.reset()  # it gives up after a few recompilations, silently in some
    x = Inputs(case, device)
    table = [Measured(c, c.why_not(x)) for c in contenders(group, x) if c.who == "floor" or chosen(c)]
    for of in DISTRIBUTIONS:
        x.refresh(of)
        exact = Exact.of(x)
        for row in running(table):
            if row.contender.who != "floor" and not row.tried and time.monotonic() > deadline:
                row.reason = OVER
                continue
            tick(f"{row.contender.name}: errors")
            with trying(row, device), filled_with_nan():
                check(row, x, exact, patience)
        del exact
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        x.refresh(distribution)
        spot = Spot(x)
        gc.collect()
        rows = list(running(table))
        first = number % max(len(rows), 1)
        for row in rows[first:] + rows[:first]:  # nobody always follows the same
            if number * row.about > patience:
                continue
            tick(f"{row.contender.name}: round {number + 1}")
            with trying(row, device):
                time_once(row, x, spot, number)
    return [as_json(row, table[0], x, distribution) for row in table]


def running(table: list[Measured]) -> Iterable[Measured]:
    return (row for row in table if row.reason is None)


@contextmanager
def trying(row: Measured, device: torch.device) -> Iterator[None]:
    """Make whatever goes wrong within the context the reason why the row has no numbers."""
    try:
        yield
    except Exception as error:  # of other people's code, too
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if device.type != "cpu":
        torch.cuda.empty_cache()


class Wrong(Exception):
    """Not what belongs to these operands."""


class Slow(Exception):
    """Not waited for."""


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Have ``torch.empty`` and the like give NaN instead of what memory held, so that what is never written shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def run(contender: Contender, x: Inputs) -> dict[str, Tensor | None]:
    """Run a contender once, as its group is run; return ``logprobs`` and ``entropy``, ``hidden`` and ``weight`` (gradients), or
    products."""
    if contender.who == "floor":
        return {f"product {i}": product for i, product in enumerate(contender.call(x))}
    if contender.group in ("forward", "lens"):
        with torch.no_grad():
            logprobs, entropy = contender.call(x)[:2]
        return {"logprobs": logprobs, "entropy": entropy}
    if contender.group == "one-pass loss":
        return dict(zip(("hidden", "weight"), torch.autograd.grad(contender.call(x), x.leaves), strict=True))
    logprobs, entropy = contender.call(x)[:2]
    outputs, upstream = [logprobs], [x.g_logprob.to(logprobs.dtype)]
    if entropy is not None and entropy.requires_grad:
        outputs, upstream = [*outputs, entropy], [*upstream, x.g_entropy.to(entropy.dtype)]
    found = {"logprobs": logprobs.detach(), "entropy": None if entropy is None else entropy.detach()}
    return found | dict(zip(("hidden", "weight"), torch.autograd.grad(outputs, x.leaves, upstream), strict=True))


def check(row: Measured, x: Inputs, exact: Exact, patience: float) -> None:
    """Note errors, and what was held at most beyond the operands and the results."""
    contender, kept, allowed = row.contender, [], patience if row.tried else 3 * patience
    contender.poison()
    start = time.monotonic()
    peak = peak_bytes(lambda: kept.append(run(contender, x)), x.device)
    took, row.tried = time.monotonic() - start, True
    if took > allowed and contender.who != "floor":
        raise Slow(f"{took:.0f} s for a run, of which {allowed:g} are waited for")
    (found,) = kept
    require_finite(found, x)
    if contender.who != "floor":
        row.peak = max(row.peak, peak - sum(value.nbytes for value in found.values() if value is not None))
        row.errors[x.distribution] = errors(contender, found, x, exact)


def errors(contender: Contender, found: dict[str, Tensor | None], x: Inputs, exact: Exact) -> dict[str, float | None]:
    """Return the largest |Δ| of log-probs and entropies (of a lens: of its last layer), relative Frobenius norms of the gradients'
    Δ."""
    wrong = {}
    for name, truth in (("logprobs", exact.logprobs), ("entropy", exact.entropy)):
        if (value := found.get(name)) is not None:
            value = value[-1] if contender.group == "lens" else value
            wrong[name] = (value.double() - truth).where(x.mask, 0).abs().max().item()
    if "hidden" in found:
        truths = exact.gradients(x, *x.coefficients(contender.computes))
        for name, at, truth in zip(("hidden", "weight"), (exact.rows, exact.columns), truths, strict=True):
            wrong[name] = ((found[name][at].double() - truth).norm() / truth.norm()).item()
    return {name: wrong.get(name) for name in ("logprobs", "entropy", "hidden", "weight")}


def require_finite(found: dict[str, Tensor | None], x: Inputs) -> None:
    for name, value in found.items():
        if value is not None and name in ("logprobs", "entropy"):
            value = value.where(x.mask, 0)
        if value is not None and not value.isfinite().all():
            raise Wrong(f"{name} not finite, with {x.distribution} policies")


class Spot:
    """A few rows of this round in fp32: enough to tell whether a result belongs to it."""

    @torch.no_grad()
    def __init__(self, x: Inputs) -> None:
        self.rows = x.spread(SPOT_ROWS)
        z = x.hidden[self.rows].float() @ x.weight.float().T
        self.log_p = z.log_softmax(1)
        self.logprobs = self.log_p.gather(1, x.labels[self.rows, None]).squeeze(1)
        # Logits rounded to bf16, several times over; another round's differ by far more.
        self.bound = 16 * torch.finfo(torch.bfloat16).eps * z.abs().max().item()
        self.gradients: dict[str, Tensor] = {}

    def check(self, contender: Contender, found: dict[str, Tensor | None], x: Inputs) -> None:
        require_finite(found, x)
        if found.get("logprobs") is not None:
            of_last = found["logprobs"][-1] if contender.group == "lens" else found["logprobs"]
            if (of_last[self.rows].float() - self.logprobs).abs().max() > self.bound:
                raise Wrong("log-probs that are not of the operands given")
        if "hidden" in found:
            truth = self.gradient(contender.computes, x)
            if (found["hidden"][self.rows].float() - truth).norm() > 0.75 * truth.norm():  # a stale one is off by 1.4
                raise Wrong("a gradient that is not of the operands given")

    @torch.no_grad()
    def gradient(self, computes: str, x: Inputs) -> Tensor:
        if computes not in self.gradients:
            g_lp, g_h = (g[self.rows] for g in x.coefficients(computes))
            entropy = -(self.log_p.exp() * self.log_p).sum(1)
            dz = untargeted(self.log_p, entropy, g_lp, g_h)
            dz.scatter_add_(1, x.labels[self.rows, None], g_lp[:, None])
            self.gradients[computes] = dz @ x.weight.float()
        return self.gradients[computes]


def time_once(row: Measured, x: Inputs, spot: Spot, number: int) -> None:
    if number == 0:  # compilers; the checks ran in another mode
        row.about, _ = timed(lambda: run(row.contender, x), x.device)
    row.contender.poison()
    if x.device.type != "cpu":  # what its results and working memory will be carved from
        torch.full((max(row.peak, MIB) // 4,), torch.nan, device=x.device)
    row.seconds[number], found = timed(lambda: run(row.contender, x), x.device)
    if row.contender.who == "floor":
        require_finite(found, x)
    else:
        spot.check(row.contender, found, x)


def as_json(row: Measured, of_floor: Measured, x: Inputs, distribution: str) -> dict:
    c, case = row.contender, x.case
    about = {"group": c.group, **vars(case), "distribution": distribution, "name": c.name, "who": c.who, "computes": c.computes}
    about |= {"remark": c.remark, "reason": row.reason}
    if row.reason is not None:
        return about
    median = statistics.median(row.seconds.values())
    ratios = [seconds / of_floor.seconds[number] for number, seconds in row.seconds.items() if number in of_floor.seconds]
    useful = 2 * GROUPS[c.group] * case.layers * x.active_rows * case.vocab * case.width
    return about | {
        "ms": 1e3 * median,
        "ms_of_rounds": [1e3 * seconds for seconds in row.seconds.values()],
        "times_floor": statistics.median(ratios) if ratios else None,
        "useful_tflops": useful / median / 1e12,
        "algorithm_products": c.products,
        "peak_bytes": row.peak,
        "stated_bytes": c.stated,
        "errors": row.errors if c.who != "floor" else {},
    }


# ---- on a terminal


def title(row: dict) -> str:
    layers = f"{row['layers']} layers x " if row["layers"] > 1 else ""
    active = f", {row['active']:.0%} of the rows count" if row["active"] < 1 else ""
    return (
        f"{row['group']}: {row['model']}, {layers}{row['rows']} x {row['vocab']} x {row['width']}, {row['dtype']}{active}, "
        f"{row['distribution']} policies"
    )


def print_rows(rows: list[dict], console: Console) -> None:
    for heading in dict.fromkeys(map(title, rows)):
        table = Table(title=heading, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
        table.add_column("")
        for name in ("ms", "× floor", "TFLOP/s", "MiB", "stated", "Δlogprob", "peaked", "Δgradient", "peaked"):
            table.add_column(name, justify="right")
        of_table = [row for row in rows if title(row) == heading]
        for row in of_table:
            if row["reason"] is None:
                table.add_row(row["name"], *cells(row))
        console.print(table)
        for row in of_table:
            if row["reason"] is not None:
                console.print(f"{row['name']}: not run: {row['reason']}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def cells(row: dict) -> list[str]:
    found = [row["errors"].get(of, {}) for of in DISTRIBUTIONS]
    gradient = [max((e[name] for name in ("hidden", "weight") if e.get(name) is not None), default=None) for e in found]
    numbers = [f"{row['ms']:.1f}", f"{row['times_floor']:.2f}" if row["times_floor"] else "", f"{row['useful_tflops']:.3g}"]
    numbers += ["" if row[name] is None else f"{row[name] / MIB:.0f}" for name in ("peak_bytes", "stated_bytes")]
    return numbers + ["" if e is None else f"{e:.1e}" for e in (*(e.get("logprobs") for e in found), *gradient)]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="shapes; with --rows and the like instead of the default cases")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="256 to 65536, say (default 256, or 32768 on a GPU)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(default bfloat16)")
    parser.add_argument("--active", nargs="+", type=float, metavar="SHARE", help="of the rows that count (default 1.0)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="(default: all)")
    parser.add_argument("--contenders", metavar="REGEX", default="", help="only those whose name it is found in, and the floor")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, default="flat", help="of the timed policies (default flat)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="SECONDS", help="for a run (default %(default)g)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the tables, in the section kernels of <device>.json")
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    return parser


def asked(options: argparse.Namespace) -> list[tuple[str, Case]]:
    given = [options.models, options.rows, options.dtypes, options.active]
    if not any(given):
        return [(group, case) for case, groups in CASES[options.device] for group in groups if group in options.groups]
    cases = [
        Case.of(model, rows, dtype=dtype, active=active)
        for model in options.models or ["Qwen3-0.6B" if options.device == "cpu" else "Qwen3-4B"]
        for rows in options.rows or [256 if options.device == "cpu" else 32768]
        for dtype in options.dtypes or ["bfloat16"]
        for active in options.active or [1.0]
    ]
    return [(group, case) for case in cases for group in options.groups]


def of_group(group: str, case: Case) -> Case:
    """Return the case of a group: a lens takes as many rows in all as the other groups do."""
    return Case(**vars(case) | {"layers": LAYERS, "rows": max(case.rows // LAYERS, 1)}) if group == "lens" else case


def main() -> int:
    p = parser()
    options = p.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        p.error("--device: cuda given, but torch sees no GPU here")
    if options.rounds < 1 or any(rows < 1 for rows in options.rows or []):
        p.error("--rounds, --rows: accepted are 1 and more")
    if any(not 0 < active <= 1 for active in options.active or []):
        p.error("--active: accepted are shares above 0 and up to 1")
    try:
        pattern = re.compile(options.contenders)
    except re.error as error:
        p.error(f"--contenders: {options.contenders!r} is no regular expression ({error})")

    device, deadline = torch.device(options.device), time.monotonic() + 60 * options.minutes
    about, of_machine, rows = machine(device, options.commit), rates(device), []
    console, path = Console(width=max(Console().width, 150)), options.out and results_path(options.out, about)

    def write() -> None:
        if path is not None:
            write_section(path, "kernels", {"machine": about, "rates": of_machine, "rows": with_earlier(path, about, rows)})

    todo = asked(options)
    with progress_bar(console.is_terminal) as bar:
        task = bar.add_task("", total=len(todo))
        for group, case in todo:
            case = of_group(group, case)
            if time.monotonic() > deadline:
                rows.append(not_run(group, case, options))
                continue
            torch.manual_seed(len(rows))
            rows += measure(
                group,
                case,
                device,
                options.rounds,
                distribution=options.distribution,
                patience=options.patience,
                chosen=lambda c: pattern.search(c.name) is not None,
                deadline=deadline,
                tick=lambda what, of=f"{group}, {case.model}, {case.rows}": bar.update(task, description=f"{of}: {what}"),
            )
            write()  # what is measured is kept, whatever happens later
            bar.advance(task)
            print(f"measured {group}, {case}", file=sys.stderr, flush=True)
    console.print(f"{about['device']}, {of_machine['copy_gb_per_s']:.0f} GB/s copied, TFLOP/s of square products:", end=" ")
    console.print(", ".join(f"{rate:.3g} {dtype}" for dtype, rate in of_machine["gemm_tflops"].items()), end="\n\n")
    print_rows(rows, console)
    write()
    if path is not None:
        console.print(f"written to {path}")
    return 0


def with_earlier(path: Path, about: dict, rows: list[dict]) -> list[dict]:
    """Return ``rows``, behind those of other tables that the same commit measured before with the same packages on the same
    machine."""
    found = read_results(path.parent).get(path.stem, {}).get("kernels", {})
    same = {name: value for name, value in found.get("machine", {}).items() if name != "date"}
    commit = about["commit"]
    if commit is None or commit.endswith("-dirty") or same != {name: value for name, value in about.items() if name != "date"}:
        return rows
    new = tables_of((row for row in rows if row["reason"] != OVER), KERNEL)
    earlier = tables_of((row for row in found["rows"] if row["reason"] != OVER), KERNEL)
    kept = [row for table, of_table in earlier.items() if table not in new for row in of_table]
    return kept + [row for row in rows if row["reason"] != OVER or tuple(row[name] for name in KERNEL) not in earlier]


def not_run(group: str, case: Case, options: argparse.Namespace) -> dict:
    about = {"group": group, **vars(case), "distribution": options.distribution, "name": "all", "who": "ours", "computes": ""}
    return about | {"remark": "", "reason": OVER}


if __name__ == "__main__":
    sys.exit(main())
