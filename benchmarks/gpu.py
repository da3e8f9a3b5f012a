"""This library on a GPU against the bare GEMM of the same run: ``python -m benchmarks.gpu --out benchmarks/results``.

Every contender runs once in each round, so that all of them see the same clocks, on random operands new to the round. Medians over
the rounds; the share of the floor's rate is the median of the rounds' own ratios. The floor is the library's GEMMs of the same
shape, as many as the algorithm's FLOPs amount to. Prints a short table last and writes <out>/<device>.json with every row. What
cannot run is a row with the reason. ``--tune`` times candidate tiles for each kernel instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bupo_kernels import PolicyObjective, explain, linear_logprobs, linear_policy_loss
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.problem import Operands, Readout
from bupo_kernels.backends.triton_ import config, target_of

SHAPES = [(32768, 151936, 2560), (32768, 151936, 4096), (2048, 151936, 2560), (2048, 151936, 4096)]  # rows, vocabulary, width
TINY = [(96, 517, 64)]
MIB = 2**20
ALL_OF_E = 96 * 2**30  # bytes: E of every row, and the widest slices


@dataclass
class Inputs:
    hidden: Tensor  # [N, D] bf16
    weight: Tensor  # [V, D] bf16
    targets: Tensor  # [N]
    upstream: list[Tensor]  # [N] each: of log-prob and entropy

    @classmethod
    def of(cls, rows: int, vocab: int, width: int, device: str) -> Inputs:
        hidden, weight = (torch.empty(n, width, dtype=torch.bfloat16, device=device) for n in (rows, vocab))
        inputs = cls(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            torch.empty(rows, dtype=torch.int64, device=device),
            [torch.empty(rows, device=device) for _ in range(2)],
        )
        inputs.refresh()
        return inputs

    @torch.no_grad()
    def refresh(self) -> None:
        self.hidden.normal_()
        self.weight.normal_(std=self.hidden.shape[1] ** -0.5)
        self.targets.random_(len(self.weight))
        for g in self.upstream:
            g.normal_()

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


@dataclass
class Contender:
    """``prepare`` is not timed; what it returns goes to ``call``."""

    name: str
    products: float  # of 2·N·V·D FLOP each, that its algorithm needs
    call: Callable[[object], object]
    prepare: Callable[[], object] = lambda: None
    logprobs: Callable[[object], Tensor] | None = None  # from what ``call`` returns
    stated: int | None = None  # bytes of working memory, by explain
    reason: str | None = None  # why it does not run
    peak: int | None = None
    error: float | None = None
    milliseconds: list[float] = field(default_factory=list)

    @property
    def is_floor(self) -> bool:
        return self.name.startswith("GEMM")


# ---- what is compared


def floors(x: Inputs) -> Iterator[Contender]:
    hidden, weight = (leaf.detach() for leaf in x.leaves)

    def gemms(logits: int):
        def call(dz):
            for _ in range(logits):
                torch.mm(hidden, weight.T, out=dz)
            return torch.mm(dz, weight), torch.mm(dz.T, hidden)

        return call

    def buffer() -> Tensor:
        return torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)

    yield Contender("GEMM x 1", 1, lambda dz: torch.mm(hidden, weight.T, out=dz), buffer)
    yield Contender("GEMM x 2", 2, gemms(0), lambda: torch.mm(hidden, weight.T))
    yield Contender("GEMM x 3", 3, gemms(1), buffer)
    yield Contender("GEMM x 4", 4, gemms(2), buffer)


def gradient_of(x: Inputs, out, upstream: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, x.leaves, upstream, retain_graph=False)


def has_native(x: Inputs) -> bool:
    """Whether the C++ or CUDA kernels were built, and take this."""
    try:
        return bool(explain(*x.leaves, x.targets, backend="native"))
    except ValueError:
        return False


def ours(x: Inputs) -> Iterator[Contender]:
    def forward(backend: str, budget: int | None):
        out = linear_logprobs(*x.leaves, x.targets, backend=backend, memory_budget=budget)
        return out.logprobs, out.entropy

    def only_forward(_):
        with torch.no_grad():
            return forward("triton", None)

    half = [torch.where(torch.arange(len(g), device=g.device) % 2 == 0, g, 0) for g in x.upstream]

    def half_of_upstream() -> list[Tensor]:
        for g, all_of_it in zip(half, x.upstream, strict=True):
            g[::2] = all_of_it[::2]
        return half

    with torch.no_grad():
        stated = explain(*x.leaves, x.targets, backend="triton").schedule.memory
    yield Contender("forward", 1, only_forward, logprobs=lambda out: out[0], stated=stated.forward)
    ways = [("triton:recompute", 4, None), ("triton:cached", 3, ALL_OF_E), *([("native", 4, None)] if has_native(x) else [])]
    for backend, products, budget in ways:
        strategy = backend.removeprefix("triton:")
        memory = explain(*x.leaves, x.targets, backend=backend, memory_budget=budget).schedule.memory
        of_backward = memory.backward + memory.accumulator

        def full(_, backend=backend, budget=budget):
            return gradient_of(x, forward(backend, budget), x.upstream)

        def prepare(backend=backend, budget=budget):
            return forward(backend, budget)

        yield Contender(f"{strategy}: forward + backward", products, full, stated=max(memory.forward, of_backward))
        yield Contender(
            f"{strategy}: forward", 1, lambda _, p=prepare: p(), logprobs=lambda out: out[0].detach(), stated=memory.forward
        )
        yield Contender(f"{strategy}: backward", products - 1, lambda out: gradient_of(x, out, x.upstream), prepare)
        yield Contender(
            f"{strategy}: backward, half the rows",
            (products - 1) / 2,
            lambda out_and_half: gradient_of(x, *out_and_half),
            lambda p=prepare: (p(), half_of_upstream()),
        )


def one_pass(x: Inputs) -> Iterator[Contender]:
    """A policy loss with an entropy bonus: no row is clipped, each has a gradient of both statistics."""
    objective = PolicyObjective(entropy_coefficient=0.01)
    ways = [("triton", "1 GiB", None), ("triton", "all rows at once", ALL_OF_E)]
    for backend, name, budget in [*ways, *([("native", "native, 1 GiB", None)] if has_native(x) else [])]:
        memory = explain(*x.leaves, x.targets, objective=objective, backend=backend, memory_budget=budget).schedule.memory

        def full(_, backend=backend, budget=budget):
            loss, _ = linear_policy_loss(
                *x.leaves, x.targets, x.upstream[0], objective=objective, backend=backend, memory_budget=budget
            )
            return torch.autograd.grad(loss, x.leaves)

        yield Contender(f"one-pass policy loss, {name}", 3, full, stated=memory.forward + memory.accumulator)


def naive(x: Inputs) -> Iterator[Contender]:
    def forward():
        log_p = (x.hidden @ x.weight.T).float().log_softmax(-1)
        return log_p.gather(1, x.targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    def only_forward(_):
        with torch.no_grad():
            return forward()

    yield Contender("naive logits: forward", 1, only_forward, logprobs=lambda out: out[0])
    yield Contender("naive logits: forward + backward", 3, lambda _: gradient_of(x, forward(), x.upstream))


def torchs_own(x: Inputs) -> Iterator[Contender]:
    name = "F.linear_cross_entropy: forward + backward, no entropy"
    if not hasattr(F, "linear_cross_entropy"):
        yield Contender(name, 3, lambda _: None, reason=f"not in torch {torch.__version__}")
        return

    def full(_):
        return torch.autograd.grad(F.linear_cross_entropy(x.hidden, x.weight, x.targets), x.leaves)

    yield Contender(name, 3, full)


# ---- measurement


def timed(device: str, call: Callable[[], object]) -> tuple[float, object]:  # milliseconds
    if device == "cpu":
        start = time.perf_counter()
        result = call()
        return 1e3 * (time.perf_counter() - start), result
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), result


def tensors(results) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:160]}".splitlines()[0]


def try_once(contender: Contender, x: Inputs, device: str) -> None:
    """Compiles, notes peak memory and error, or the reason it does not run."""
    try:
        if contender.logprobs is not None:
            contender.error = error_of(contender.logprobs(contender.call(contender.prepare())), x)
        else:
            contender.call(contender.prepare())
        if device != "cpu":
            prepared = contender.prepare()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results = contender.call(prepared)
            torch.cuda.synchronize()
            contender.peak = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in tensors(results))
    except Exception as error:  # whatever it is belongs in the table
        contender.reason = reason_of(error)
    free(device)


def time_once(contender: Contender, device: str) -> None:
    try:
        prepared = contender.prepare()
        contender.milliseconds.append(timed(device, lambda: contender.call(prepared))[0])
    except Exception as error:  # fitted at first, and then no longer: memory fragments
        contender.reason = reason_of(error)


def free(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()


@torch.no_grad()
def error_of(logprobs: Tensor, x: Inputs) -> float:
    """max |Δlogprob| on 64 rows against float64 on the same operands."""
    rows = torch.linspace(0, len(x.hidden) - 1, 64, device=x.hidden.device).long()
    z = x.hidden[rows].double() @ x.weight.double().T
    exact = z.log_softmax(1).gather(1, x.targets[rows, None]).squeeze(1)
    return (logprobs[rows].double() - exact).abs().max().item()


def floor_of(contenders: list[Contender], row: Contender) -> list[float] | None:
    """Milliseconds of the floor of ``row``, round by round; of half the rows, a part of one GEMM's."""
    floor = next((c for c in contenders if c.is_floor and c.products == row.products and c.milliseconds), None)
    if floor is not None:
        return floor.milliseconds
    one = next((c for c in contenders if c.is_floor and c.products == 1 and c.milliseconds), None)
    return one and [row.products * ms for ms in one.milliseconds]


def measure(shape: tuple[int, int, int], device: str, rounds: int) -> list[dict]:
    x = Inputs.of(*shape, device)
    contenders = []
    for make in (floors, ours, one_pass, naive, torchs_own):
        try:
            contenders += make(x)
        except Exception as error:  # a plan that is refused, say
            contenders.append(Contender(make.__name__, 0, lambda _: None, reason=reason_of(error)))
    for contender in contenders:
        if contender.reason is None:
            try_once(contender, x, device)
    for _ in range(rounds):
        x.refresh()
        for contender in contenders:
            if contender.reason is None:
                time_once(contender, device)
    return [row_of(contender, contenders, shape) for contender in contenders]


def row_of(contender: Contender, contenders: list[Contender], shape: tuple[int, int, int]) -> dict:
    rows, vocab, width = shape
    row = {"rows": rows, "vocab": vocab, "width": width, "dtype": "bfloat16", "name": contender.name, "reason": contender.reason}
    if contender.reason is not None:
        return row
    flops = 2 * contender.products * rows * vocab * width
    milliseconds = statistics.median(contender.milliseconds)
    floor = floor_of(contenders, contender)
    return row | {
        "ms": milliseconds,
        "ms_of_rounds": contender.milliseconds,
        "of_floor": floor and statistics.median(f / ms for f, ms in zip(floor, contender.milliseconds, strict=True)),
        "tflops": flops / milliseconds / 1e9,
        "flops": flops,
        "peak_bytes": contender.peak,
        "stated_bytes": contender.stated,
        "max_logprob_error": contender.error,
    }


# ---- tuning

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
    """``function`` of config.py returns ``candidate`` to the modules that use it; None: what it returns by itself."""
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
    """One slice of dz, without the products that follow."""
    from bupo_kernels.backends.triton_.gradient_recompute import gradient_recompute
    from bupo_kernels.backends.triton_.product import Launch

    rows, device = len(x.hidden), x.hidden.device
    operands = Operands(x.hidden.detach(), x.weight.detach(), None, x.targets, Readout(1.0, 1.0, None))
    launch = Launch(operands, torch.arange(rows, device=device), target_of(device))
    numbers = torch.rand(3, rows, device=device)
    coefficients = Coefficients(torch.full((rows,), 6.0, device=device), *numbers, x.targets)
    dz = torch.empty(rows, config.padded(columns), dtype=x.hidden.dtype, device=device)

    def call() -> Tensor:
        gradient_recompute(launch, coefficients, dz, slice(0, columns))
        return dz[:, :columns]

    return call


def tune(shape: tuple[int, int, int], device: str, rounds: int) -> list[dict]:
    x = Inputs.of(*shape, device)
    rows, vocab, width = shape
    columns = min(config.MOST_COLUMNS, vocab)
    kernels = {
        "statistics": (statistics_kernel(x, False), vocab, "statistics_config", ["config", "linear_statistics"]),
        "statistics, keeping E": (statistics_kernel(x, True), vocab, "statistics_config", ["config", "linear_statistics"]),
        "recompute": (recompute_kernel(x, columns), columns, "gradient_config", ["config", "gradient_recompute"]),
    }
    found = []
    for kernel, (call, of_columns, function, modules) in kernels.items():
        flops = 2 * rows * of_columns * width
        want = call().clone()
        rounds_of = {None: [], **{candidate: [] for candidate in CANDIDATES}}
        about = {}
        for candidate in rounds_of:
            try:
                with configured(function, modules, candidate):
                    about[candidate] = {"difference": (call().float() - want.float()).abs().max().item(), "reason": None}
            except Exception as error:  # out of shared memory, registers, or a compiler that gives up
                about[candidate] = {"reason": reason_of(error)}
        for _ in range(rounds):
            for candidate, milliseconds in rounds_of.items():
                if about[candidate]["reason"] is None:
                    with configured(function, modules, candidate):
                        milliseconds.append(timed(device, call)[0])
        for candidate, milliseconds in rounds_of.items():
            name = "default" if candidate is None else f"{candidate}, group {candidate.group}"
            row = {"rows": rows, "vocab": vocab, "width": width, "kernel": kernel, "config": name, **about[candidate]}
            if milliseconds:
                row |= {"ms": statistics.median(milliseconds), "tflops": flops / statistics.median(milliseconds) / 1e9}
            found.append(row)
            free(device)
    return found


# ---- the report


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: str) -> dict:
    import triton

    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu, interpreted",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "copy_gb_per_s": copy_rate(device),
    }


def copy_rate(device: str) -> float:
    """GB/s, read plus written."""
    source = torch.randn(2**30 if device != "cpu" else 2**20, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = statistics.median(timed(device, lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * source.nbytes / milliseconds / 1e6


def shape_of(row: dict) -> str:
    return f"{row['rows']} x {row['vocab']} x {row['width']}"


def print_rows(rows: list[dict]) -> None:
    previous = None
    for row in rows:
        if shape_of(row) != previous:
            previous = shape_of(row)
            print(f"\n{previous:<52}{'ms':>9}{'x floor':>9}{'TFLOP/s':>9}{'MiB':>10}{'stated':>10}{'|dlogp|':>10}")
        if row["reason"]:
            print(f"{row['name']:<52}  {row['reason']}")
            continue
        cells = [f"{row['ms']:9.2f}", f"{row['of_floor']:9.2f}" if row["of_floor"] else " " * 9, f"{row['tflops']:9.0f}"]
        cells += [f"{b / MIB:10.0f}" if b is not None else " " * 10 for b in (row["peak_bytes"], row["stated_bytes"])]
        error = row["max_logprob_error"]
        print(f"{row['name']:<52}" + "".join(cells) + (f"{error:10.1e}" if error is not None else ""))


def print_candidates(rows: list[dict]) -> None:
    previous = None
    for row in rows:
        heading = f"{row['kernel']}, {shape_of(row)}"
        if heading != previous:
            previous = heading
            print(f"\n{heading:<52}{'ms':>9}{'TFLOP/s':>9}{'|d|':>10}")
        if row["reason"]:
            print(f"{row['config']:<52}  {row['reason']}")
        else:
            print(f"{row['config']:<52}{row['ms']:9.2f}{row['tflops']:9.0f}{row['difference']:10.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for <device>.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tune", action="store_true", help="time candidate tiles of each kernel instead")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run, with TRITON_INTERPRET=1 --tiny")
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA GPU here", file=sys.stderr)
        return 2

    about, rows = machine(arguments.device), []
    shapes = TINY if arguments.tiny else SHAPES[:2] if arguments.tune else SHAPES
    for shape in shapes:
        rows += (tune if arguments.tune else measure)(shape, arguments.device, arguments.rounds)
        print("measured", *shape, file=sys.stderr, flush=True)
        free(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = arguments.out / f"{slug}{'-tune' if arguments.tune else ''}.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(*(f"{key} {value}" for key, value in about.items()), sep=" | ")
    (print_candidates if arguments.tune else print_rows)(rows)
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
