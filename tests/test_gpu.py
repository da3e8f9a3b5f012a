"""The Triton and CUDA kernels on a GPU, at real sizes, against float64 on it. ``make gpu`` runs these; without a GPU they skip.

The oracle is dense float64, in blocks of rows: statistics and dH for a few dozen rows of a call, dW for a few dozen columns (over
all rows). The tolerances are those of ``bupo_kernels.numerics``, for a selection of rows and columns. A test says by the marker
``size`` how large its problem is: smaller ones come first, and what does not fit into the memory of the GPU is skipped. T-numbers
are the failures that users of other libraries met; see docs/reliability.md.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from gpu_sizes import CHOSEN, GIB, ORACLE_ROWS, ORACLE_SLICE, ORACLE_WIDTH, size_of, why_too_large
from lenses import OF_ANY_BACKEND, OUTPUTS, assert_agrees, random_lens
from problems import Case, assert_stored_gradients, assert_values, case_with, leaves
from torch import Tensor

from benchmarks.contenders import GROUPS
from benchmarks.inputs import Case as BenchmarkCase
from benchmarks.kernels import measure
from bupo_kernels import LensStatistics, PolicyObjective, explain, linear_logprobs, linear_policy_loss, numerics
from bupo_kernels.backends import compiled
from bupo_kernels.backends.gradients import accumulate_
from bupo_kernels.numerics import Bounded
from bupo_kernels.selfcheck.problems import error_of_e, roundoff

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL_OF_E = 96 * GIB  # a budget that holds E of every row, and slices as wide as they get
STRATEGIES = ["triton:recompute", "triton:cached"]
WITH_NATIVE = [*STRATEGIES, pytest.param("native", marks=pytest.mark.skipif(compiled.cuda() is None, reason="no CUDA build"))]
FLAT, PEAKED = 1.0, 8.0  # standard deviations of the logits: an early layer, a late one


@pytest.fixture(autouse=True)
def _memory(request):
    """Skip what does not fit; leave none that is held."""
    if (size := size_of(request.node)) and (reason := why_too_large(size, torch.cuda.mem_get_info()[0])):
        pytest.skip(reason)
    yield
    torch.cuda.empty_cache()


def large_case(rows: int, vocab: int, width: int, dtype, device="cuda", scale: float = FLAT, ignored: bool = True) -> Case:
    """Random operands made on the device. Every other row prefers its target (when peaked, to saturation); first and last row have
    the first and the last token; one row in seven does not count, if ``ignored``."""
    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "device": device}
    targets = torch.randint(0, vocab, (rows,), **random)
    targets[-1], targets[0] = vocab - 1, 0
    weight = torch.randn(vocab, width, dtype=dtype, **random).div_(width**0.5)
    hidden = torch.randn(rows, width, dtype=dtype, **random).mul_(scale)
    hidden[::2] += 6 * scale * weight[targets[::2]]
    if ignored:
        targets[3::7] = -100
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets)


def random_upstream(rows: int, device) -> list[Tensor]:  # of logprobs, entropy and logsumexp; one row in three has none
    generator = torch.Generator(device).manual_seed(1)
    upstream = [torch.randn(rows, generator=generator, device=device) for _ in range(3)]
    for g in upstream:
        g[2::3] = 0
    return upstream


def run(case: Case, upstream, **options) -> list[Tensor]:
    """logprobs, entropy, logsumexp, dH, dW."""
    out = linear_logprobs(case.hidden, case.weight, case.targets, **options)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, (case.hidden, case.weight), upstream)]


def some(always: list[int], size: int, device) -> Tensor:
    """Up to :data:`CHOSEN` of the indices below ``size``, ascending, ``always`` among them."""
    generator = torch.Generator(device).manual_seed(2)
    others = torch.randint(0, size, (CHOSEN - len(always),), generator=generator, device=device)
    return torch.cat([torch.tensor(always, device=device), others]).unique()


def float64_product(hidden: Tensor, weight: Tensor) -> Tensor:  # [n, D], [V, D] -> [n, V]
    return torch.cat([hidden.double() @ part.double().T for part in weight.split(ORACLE_SLICE)], 1)


def dense_product(hidden: Tensor, weight: Tensor) -> Tensor:  # [n, D], [V, D] -> [n, V] fp32
    """Logits as the library has them with fp32 sums: on tensor cores where operands are 16-bit and there are any."""
    products = hidden.new_empty(len(hidden), len(weight), dtype=FP32)
    accumulate_(products, hidden, weight.T, first=True)
    return products


class Exact(NamedTuple):
    """float64; [n] each, and the logits of some columns."""

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    largest: Tensor  # max |z| of the row
    z: Tensor  # [n, c]


@torch.no_grad()
def exact(case: Case, rows: Tensor, columns: Tensor, product: Callable = float64_product) -> Exact:  # [n], [c]
    """Statistics in float64, whatever the ``product``."""
    blocks = []
    for block in rows.split(ORACLE_ROWS):
        z = product(case.hidden[block], case.weight).double()
        logsumexp = z.logsumexp(1)
        chosen = z.gather(1, case.targets[block].clamp(min=0).unsqueeze(1)).squeeze(1)
        log_p = z - logsumexp.unsqueeze(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        blocks.append((chosen - logsumexp, entropy, logsumexp, z.abs().amax(1), z[:, columns]))
    return Exact(*map(torch.cat, zip(*blocks, strict=True)))


def contract_at(case: Case, largest):  # float, or [n]
    """Bound the error of a log-prob, from max |z|: by the contract of the device where the case lies."""
    return numerics.contract(largest, case.hidden.shape[1], truncation=numerics.truncation(case.hidden.device))


def exact_dz(case: Case, truth: Exact, rows: Tensor, columns: Tensor, upstream, backend: str, cached: bool) -> Bounded:  # [n], [c]
    """dz [n, c] of some rows and columns in float64, and how far one may be from it that ``backend`` stores, maybe from E."""
    targets, dtype = case.targets[rows], case.hidden.dtype
    every = [g.double() * (case.targets != -100) for g in upstream]
    return numerics.logit_gradients(
        truth.z - truth.logsumexp.unsqueeze(1),
        truth.entropy.unsqueeze(1),
        columns == targets.unsqueeze(1),
        [g[rows].unsqueeze(1) for g in every],
        roundoff=roundoff(dtype, backend),
        logit_error=contract_at(case, truth.largest.unsqueeze(1)),
        of_e=error_of_e("triton:cached") if cached else 0.0,
        half_step=numerics.half_fp16_step(every, len(case.weight)) if dtype == FP16 else 0.0,
    )


def assert_statistics(ours: list[Tensor], case: Case, rows: Tensor) -> None:
    """Each log-prob is within the contract of the device and, unless rounding to nearest explains what it is off by, off by no more
    than twice what the dense product's are; logsumexp and entropy so many times that."""
    counts = case.targets[rows] != -100
    truth, dense = (exact(case, rows, rows[:0], product) for product in (float64_product, dense_product))
    log_vocab = math.log(len(case.weight))
    largest, width, truncation = truth.largest, case.hidden.shape[1], numerics.truncation(case.hidden.device)
    factors = {"logprob": 1, "entropy": numerics.entropy_factor(len(case.weight)), "logsumexp": 1}
    bounds = {}
    for (name, factor), value in zip(factors.items(), ours, strict=True):
        value, want = value[rows], getattr(truth, name)
        assert value.dtype == FP32
        assert (value[~counts] == 0).all()
        error = (value.double() - want).abs()[counts]
        of_dense = (getattr(dense, name) - want).abs().max()
        bound = factor * numerics.beside_dense(largest, width, of_dense / factor, truncation=truncation)[counts]
        bounds[name] = bound
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.3f} of its bound, {error.max():.2e} absolute"
    logprobs, entropy, logsumexp = (x[rows][counts] for x in ours)
    assert (logprobs <= 0).all()  # T04
    assert ((entropy >= 0) & (entropy <= log_vocab * (1 + 1e-6))).all()
    assert (logsumexp >= (truth.logprob + truth.logsumexp)[counts] - bounds["logsumexp"]).all()


def assert_gradient(got: Tensor, d: Bounded, other: Tensor, relative: float, name: str) -> None:  # [m, D]; [m, k], [k, D]
    """``d @ other``, each element within what the error of d, an fp32 sum and one rounding leave, and all in norm within
    ``relative``: the elementwise bound lets every error point the same way, which over many rows or columns they do not."""
    dtype, step = got.dtype, torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    squares = torch.zeros(2, dtype=torch.float64, device=got.device)
    for part, of_other in zip(got.split(ORACLE_WIDTH, 1), other.detach().split(ORACLE_WIDTH, 1), strict=True):
        want, bound = numerics.product(d, of_other.double(), dtype)
        off = (part.double() - want).abs()
        assert (off <= bound).all(), f"{name}: {(off / bound).max():.2f} of its elementwise bound"
        squares += torch.stack([off.square().sum(), want.square().sum()])
    off, want = squares.sqrt().tolist()
    in_norm = relative * want + step * got.numel() ** 0.5
    assert off <= in_norm, f"{name}: {off / want:.2e} off in norm, {in_norm / want:.2e} accepted"


def apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The norms of ``a - b`` and of ``b``, in float64."""
    squares = torch.zeros(2, dtype=torch.float64, device=a.device)
    for x, y in zip(*(t.detach().flatten().split(2**24) for t in (a, b)), strict=True):
        x, y = x.double(), y.double()
        squares += torch.stack([(x - y).square().sum(), y.square().sum()])
    off, norm = squares.sqrt().tolist()
    return off, norm


def check(rows: int, vocab: int, width: int, dtype, device, backend: str, scale: float = FLAT, budget: int | None = None) -> None:
    """Statistics and gradients of one call, on rows and columns that include the first and the last."""
    case, upstream = large_case(rows, vocab, width, dtype, device, scale), random_upstream(rows, device)
    options = {"backend": backend, "memory_budget": budget}
    cached = explain(case.hidden, case.weight, case.targets, **options).tile_plan.cached_rows > 0
    *statistics, d_hidden, d_weight = run(case, upstream, **options)
    assert torch.isfinite(torch.stack(statistics)).all()
    assert d_hidden.dtype == d_weight.dtype == dtype
    assert (d_hidden[(upstream[0] == 0) | (case.targets == -100)] == 0).all()

    chosen = some([0, rows - 1], rows, device)
    assert_statistics(statistics, case, chosen)

    everything = torch.arange(vocab, device=device)
    truth = exact(case, chosen, everything)
    dz = exact_dz(case, truth, chosen, everything, upstream, backend, cached)
    # Roundings of dz and of the result, that of E, and what the logits make of p.
    of_logits = 8 * contract_at(case, truth.largest.max().item())
    relative = torch.finfo(dtype).eps + torch.finfo(BF16).eps / 2 * cached + of_logits
    assert_gradient(d_hidden[chosen], dz, case.weight, relative, "dH")
    del truth, dz

    columns, everything = some([0, vocab - 1], vocab, device), torch.arange(rows, device=device)
    dz = exact_dz(case, exact(case, everything, columns), everything, columns, upstream, backend, cached)
    assert_gradient(d_weight[columns], Bounded(dz.exact.T, dz.bound.T), case.hidden, relative, "dW")


# ---- real sizes: Qwen (151936), Llama (128256), Megatron's padded-less 152063, Gemma (262144)

SIZES = [
    (1, 151936, 1024, BF16, "triton", FLAT, None),
    (1, 262144, 5120, BF16, "triton:recompute", PEAKED, None),
    (2, 152063, 2560, FP16, "triton:cached", FLAT, None),
    (17, 128256, 4096, BF16, "triton:recompute", FLAT, None),
    (64, 151936, 5120, FP32, "triton", PEAKED, None),
    (127, 152063, 1024, FP32, "triton", FLAT, None),
    (129, 262144, 2560, BF16, "triton:cached", PEAKED, None),
    (255, 128256, 1024, FP16, "triton:recompute", PEAKED, None),
    (256, 151936, 4096, BF16, "triton", PEAKED, None),
    (1000, 152063, 4096, BF16, "triton:cached", FLAT, None),
    (1000, 152063, 4096, FP16, "triton:recompute", FLAT, None),
    (1024, 151936, 2560, FP32, "triton", FLAT, None),
    (2048, 128256, 5120, BF16, "triton:cached", FLAT, None),
    (2048, 262144, 1024, FP32, "triton", PEAKED, None),
    (2049, 262144, 1024, FP16, "triton:cached", PEAKED, 2 * GIB),
    (4096, 151936, 2560, BF16, "triton:recompute", FLAT, None),
    (4096, 151936, 2560, BF16, "triton:cached", PEAKED, None),  # E of some rows, the others recomputed
    (4096, 128256, 2560, FP16, "triton:cached", FLAT, ALL_OF_E),
    (8191, 152063, 1024, BF16, "triton:recompute", PEAKED, GIB // 2),
    (8192, 151936, 4096, BF16, "triton:cached", FLAT, ALL_OF_E),
    (16384, 128256, 4096, BF16, "triton:recompute", PEAKED, None),
    (16384, 262144, 1024, BF16, "triton:cached", FLAT, ALL_OF_E),
    (32768, 151936, 2560, BF16, "triton", FLAT, None),
    (65536, 128256, 1024, BF16, "triton:recompute", FLAT, None),
    (65536, 151936, 1024, FP16, "triton:cached", FLAT, ALL_OF_E),
    (64, 151936, 5120, FP32, "native", PEAKED, None),
    (1000, 152063, 4096, BF16, "native", FLAT, None),
    (4096, 128256, 2560, BF16, "native", PEAKED, None),
    (300, 50257, 1001, BF16, "native", FLAT, None),
    (64, 151936, 5120, FP32, "torch", PEAKED, None),
    (1000, 152063, 4096, BF16, "torch", FLAT, None),
    (4096, 128256, 2560, FP16, "torch", PEAKED, None),
    # what TMA and vectorised loads cannot take: a width that is no multiple of anything, and tiny vocabularies (T01)
    (300, 50257, 1001, BF16, "triton:recompute", FLAT, None),
    (300, 50257, 1001, BF16, "triton:cached", FLAT, None),
    (300, 517, 1030, FP32, "triton", FLAT, None),
    (300, 1, 1024, BF16, "triton:recompute", FLAT, None),
]


def name_of(value) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


TELLING = (1000, 152063, 4096)  # of every backend and strategy


@pytest.mark.size
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "dtype", "backend", "scale", "budget"),
    [pytest.param(*case, marks=[pytest.mark.telling] if case[:3] == TELLING else []) for case in SIZES],
    ids=name_of,
)
def test_values_and_gradients_at_real_sizes(rows, vocab, width, dtype, backend, scale, budget):
    if backend == "native" and compiled.cuda() is None:
        pytest.skip("no CUDA build")
    check(rows, vocab, width, dtype, "cuda", backend, scale, budget)


def check_options(options: dict, rows: int, vocab: int, width: int, dtype, device, backend: str) -> None:
    case = case_with(options, rows, vocab, width, dtype, device)
    out = linear_logprobs(case.hidden, case.weight, case.targets, backend=backend, **case.options)
    assert_values(out, case)
    upstream = random_upstream(rows, device)
    assert_stored_gradients(torch.autograd.grad(out, leaves(case), upstream), case, upstream, backend)


OPTIONS = [{"bias": True}, {"temperature": "rows", "mask": True}, {"softcap": 3.0, "logit_scale": 1.7}]


@pytest.mark.size(200, 50257, 512)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_T30_options_reach_values_and_gradients(options, dtype):
    check_options(options, 200, 50257, 512, dtype, "cuda", "triton:recompute")


def check_views(device, backend: str, vocab: int, width: int) -> None:
    base = large_case(60, vocab, width, BF16, device, ignored=False)
    views = {
        "shifted tokens": (base.hidden.view(6, 10, -1)[:, :-1], base.weight, base.targets.view(6, 10)[:, 1:]),
        "transposed": (base.hidden.view(6, 10, -1).transpose(0, 1), base.weight, base.targets.view(6, 10).T),
        "odd addresses": (base.hidden[:, 1:-1], base.weight[:, 1:-1], base.targets),
        "weight by columns": (base.hidden, base.weight.T.contiguous().T, base.targets),
        "every other row": (base.hidden[::2], base.weight[::2], base.targets[::2] // 2),
    }
    for name, (hidden, weight, targets) in views.items():
        size = targets.numel()
        flat = Case(hidden.reshape(size, -1), weight, targets.reshape(size))
        ours = linear_logprobs(hidden, weight, targets, backend=backend)
        assert ours.logprobs.shape == targets.shape, name
        assert_statistics([x.detach().flatten() for x in ours], flat, torch.arange(size, device=device))
        copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (hidden, weight)]
        upstream = [torch.ones_like(targets, dtype=FP32)] * 3
        got = torch.autograd.grad(ours, (hidden, weight), upstream)
        want = torch.autograd.grad(linear_logprobs(*copies, targets, backend=backend), copies, upstream)
        for a, b in zip(got, want, strict=True):  # two roundings of dz and two of the result, at most
            off, norm = apart(a, b)
            assert off <= 2 * torch.finfo(BF16).eps * norm, name


@pytest.mark.size(60, 32003, 1024)
@pytest.mark.parametrize("backend", WITH_NATIVE)
def test_T09_views_are_read_where_they_lie(backend):
    check_views("cuda", backend, 32003, 1024)


# ---- T13: offsets beyond int32

OVERFLOWS = {
    "N·V in E": (16384, 151936, 512, "triton:cached", ALL_OF_E),
    "N·slice in dz": (140000, 20000, 512, "triton:recompute", ALL_OF_E),
    "V·D": (256, 151936, 16384, "triton:recompute", None),
    "V·D by pointers": (256, 151936, 16390, "triton:recompute", None),
    "N·D": (430000, 1000, 5120, "triton:recompute", ALL_OF_E),
    "N·D by pointers": (430000, 1000, 5110, "triton:recompute", ALL_OF_E),
}


@pytest.mark.size
@pytest.mark.parametrize(("rows", "vocab", "width", "backend", "budget"), OVERFLOWS.values(), ids=OVERFLOWS)
def test_T13_offsets_beyond_int32(rows, vocab, width, backend, budget):
    slice_of_dz = min(vocab, 16384) if backend == "triton:recompute" else vocab
    assert max(rows * slice_of_dz, vocab * width, rows * width) > 2**31
    check(rows, vocab, width, BF16, "cuda", backend, FLAT, budget)


# ---- accuracy


def check_against_dense(rows: int, vocab: int, width: int, dtype, device, scale: float) -> None:
    case = large_case(rows, vocab, width, dtype, device, scale, ignored=False)
    ours = linear_logprobs(case.hidden.detach(), case.weight.detach(), case.targets, backend="triton")
    index = torch.arange(rows, device=device)
    truth, dense = (exact(case, index, index[:0], product) for product in (float64_product, dense_product))
    # Ours is also stored in fp32, and formed from fp32 m and ln s: four roundings of that size.
    fp32 = 4 * torch.finfo(FP32).eps / 2
    for name, value in (("logprob", ours.logprobs), ("logsumexp", ours.logsumexp)):
        want = getattr(truth, name)
        error = (value.double() - want).square().mean().sqrt()
        of_dense = (getattr(dense, name) - want).square().mean().sqrt()
        stored = fp32 * (1 + want.abs() + truth.largest).square().mean().sqrt()
        assert error <= 2 * of_dense + stored, f"{name}: off by {error:.2e}, fp32 dense logits by {of_dense:.2e}"


@pytest.mark.size(64, 151936)
@pytest.mark.parametrize("scale", [FLAT, PEAKED, 100.0])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
@pytest.mark.parametrize("width", [1024, 5120])
def test_T05_error_is_no_more_than_twice_that_of_fp32_dense_logits(width, dtype, scale):
    check_against_dense(64, 151936, width, dtype, "cuda", scale)


def weight_gradient_errors(counts, vocab: int, width: int, device, backend: str, budget) -> list[float]:
    """Of dW in norm, relative, for each number of rows."""
    errors = []
    for rows in counts:
        case, upstream = large_case(rows, vocab, width, BF16, device), random_upstream(rows, device)
        columns = some([0, vocab - 1], vocab, device)
        index = torch.arange(rows, device=device)
        dz = exact_dz(case, exact(case, index, columns), index, columns, upstream, backend, cached=False)
        want = dz.exact.T @ case.hidden.detach().double()
        got = run(case, upstream, backend=backend, memory_budget=budget)[-1][columns]
        errors.append(((got.double() - want).norm() / want.norm()).item())
    return errors


@pytest.mark.size(65536, 128256, 1024)
@pytest.mark.parametrize("backend", WITH_NATIVE)
def test_T06_weight_gradient_error_is_flat_in_the_number_of_rows(backend):
    errors = weight_gradient_errors((1024, 8192, 65536), 128256, 1024, "cuda", backend, None)
    # One rounding has an error of 0.21 eps in the mean. Those of dz, E and result are up to three, weighing more or less as the
    # columns are targets or not: between that and √3 of it at any N, where a bf16 sum over blocks of rows would add one for each.
    assert max(errors) <= torch.finfo(BF16).eps / 2, errors
    assert max(errors) <= 3**0.5 * min(errors), errors


# ---- T21: bits


@pytest.mark.skipif(compiled.cuda() is None, reason="no CUDA build")
@pytest.mark.size(3000, 128256, 1024, backend="native", one_pass=True)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@pytest.mark.parametrize("budget", [None, ALL_OF_E], ids=["chunks", "all rows at once"])
def test_fused_rows_of_a_policy_loss_are_those_of_triton(dtype, budget):
    case = large_case(3000, 128256, 1024, dtype, ignored=False)
    advantages, old = torch.randn(3000, device="cuda"), torch.full((3000,), -11.0, device="cuda")
    objective = PolicyObjective(entropy_coefficient=0.01)
    results = []
    for backend in ("native", "triton"):
        loss, metrics = linear_policy_loss(
            *(case.hidden, case.weight, case.targets, advantages),
            old_logprobs=old,
            objective=objective,
            backend=backend,
            memory_budget=budget,
        )
        results.append((loss, metrics.entropy, *torch.autograd.grad(loss, leaves(case))))
    # Gradients: two roundings of dz, of E and of the result. Ratios and dz of each are off by what eight log-probs may be.
    index = torch.arange(3000, device="cuda")
    of_logits = 2 * 8 * contract_at(case, exact(case, index, index[:0]).largest.max().item())
    for ours, want in zip(*results, strict=True):
        off, norm = apart(ours, want)
        assert off <= (3 * torch.finfo(dtype).eps + of_logits) * norm + of_logits


def check_repeatability(rows: int, vocab: int, width: int, dtype, device, backend: str) -> None:
    case, upstream = large_case(rows, vocab, width, dtype, device), random_upstream(rows, device)
    first, second = (run(case, upstream, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.size(3000, 151936, 1024)
@pytest.mark.parametrize(("dtype", "backend"), [(BF16, "triton:recompute"), (BF16, "triton:cached"), (FP32, "triton")])
def test_T21_repeated_calls_agree_bit_for_bit(dtype, backend):
    check_repeatability(3000, 151936, 1024, dtype, "cuda", backend)


def check_batch_invariance(rows: int, vocab: int, width: int, dtype, device, backend: str, grad: bool) -> None:
    case = large_case(rows, vocab, width, dtype, device)
    hidden, weight = case.hidden.detach().requires_grad_(grad), case.weight.detach().requires_grad_(grad)
    whole = linear_logprobs(hidden, weight, case.targets, backend=backend)
    middle = rows // 2
    for part in ([0], [middle], range(middle, rows), range(1, rows, 2), range(rows - 1, -1, -1)):
        index = torch.tensor(list(part), device=device)
        alone = linear_logprobs(hidden[index], weight, case.targets[index], backend=backend)
        for name, a, b in zip(alone._fields, whole, alone, strict=True):
            assert torch.equal(a[index], b), f"{name} of {len(index)} of {rows} rows"


@pytest.mark.size(5000, 151936, 1024)
@pytest.mark.parametrize("grad", [False, True], ids=["values only", "with gradient"])
@pytest.mark.parametrize(("dtype", "backend"), [(BF16, "triton"), (BF16, "triton:cached"), (FP16, "triton"), (FP32, "triton")])
def test_T21_a_row_does_not_depend_on_the_others(dtype, backend, grad):
    # So many rows that "triton" with a gradient recomputes them all, and of so few that it keeps E of all.
    check_batch_invariance(5000, 151936, 1024, dtype, "cuda", backend, grad)


# ---- T22 to T24: the machinery around the kernels


@pytest.mark.smallest
@pytest.mark.size(200, 1000, 64)
@pytest.mark.parametrize("backend", ["torch", *WITH_NATIVE])
def test_every_backend_runs_the_smallest_problem(backend):
    check(200, 1000, 64, BF16, "cuda", backend)


@pytest.mark.size(200, 1000)
@pytest.mark.parametrize("backend", STRATEGIES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
@pytest.mark.parametrize("width", [64, 65], ids=["TMA", "pointers"])
def test_T22_every_kernel_compiles_and_runs_with_the_installed_triton(width, dtype, backend):
    if dtype == FP32 and backend == "triton:cached":
        pytest.skip("E is kept for 16-bit operands only")
    check(200, 1000, width, dtype, "cuda", backend)


@pytest.mark.size(500, 32000, 1024)
@pytest.mark.parametrize("backend", WITH_NATIVE)
def test_T23_work_goes_to_the_current_stream(backend):
    case, upstream = large_case(500, 32000, 1024, BF16), random_upstream(500, "cuda")
    want = run(case, upstream, backend=backend)
    late = Case(torch.zeros_like(case.hidden), torch.zeros_like(case.weight), case.targets)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whoever reads on another stream reads zeros
        late.hidden.copy_(case.hidden.detach())
        late.weight.copy_(case.weight.detach())
        late.hidden.requires_grad_(), late.weight.requires_grad_()
        got = run(late, upstream, backend=backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.size(500, 32000, 1024)
@pytest.mark.parametrize("backend", STRATEGIES)
def test_T23_other_threads_may_call(backend):
    case, upstream = large_case(500, 32000, 1024, BF16), random_upstream(500, "cuda")
    want, results = run(case, upstream, backend=backend), []

    def work():
        results.append(run(case, upstream, backend=backend))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(a, b) for got in results for a, b in zip(got, want, strict=True))


@pytest.mark.size(500, 32000, 1024)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", WITH_NATIVE)
def test_T23_a_device_that_is_not_the_current_one(backend):
    assert torch.cuda.current_device() == 0
    check(500, 32000, 1024, BF16, "cuda:1", backend)


@pytest.mark.size(500, 32000, 512)
@pytest.mark.parametrize("backend", ["triton", *STRATEGIES])
@pytest.mark.parametrize("options", [{}, {"mask": True, "temperature": "rows", "bias": True}], ids=["plain", "options"])
def test_T24_the_forward_never_waits_for_the_device(backend, options):
    case = case_with(options, 500, 32000, 512, BF16, "cuda")
    call = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, "backend": backend, **case.options}
    want = linear_logprobs(**call)  # compiles, which may wait
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = linear_logprobs(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.size(500, 32000, 1024)
@pytest.mark.parametrize("backend", ["triton", *STRATEGIES])
def test_T24_the_forward_can_be_captured_and_replayed_with_new_inputs(backend):
    first, second = (large_case(500, 32000, 1024, BF16, scale=scale) for scale in (FLAT, PEAKED))
    second.targets[5:50] = -100  # also another number of rows that count
    hidden, weight, targets = first.hidden.detach().clone().requires_grad_(), first.weight, first.targets.clone()

    def call(h, y):
        return [x.detach() for x in linear_logprobs(h, weight, y, backend=backend)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(hidden, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(hidden, targets)
    for case in (second, first):
        hidden.detach().copy_(case.hidden.detach())
        targets.copy_(case.targets)
        graph.replay()
        want = call(case.hidden, case.targets)
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


def check_compiled(vocab: int, width: int, device, backend: str) -> None:
    def head(hidden, weight, targets):
        return linear_logprobs(hidden * 2, weight, targets, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, dynamic=True)
    for rows in (100, 257, 1000):
        case, upstream = large_case(rows, vocab, width, BF16, device), random_upstream(rows, device)
        results = []
        for function in (head, compiled):
            out = function(case.hidden, case.weight, case.targets)
            results.append([*out, *torch.autograd.grad(out, (case.hidden, case.weight), upstream)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), f"{rows} rows"


@pytest.mark.size(1000, 32000, 1024)
@pytest.mark.parametrize("backend", ["triton", *STRATEGIES])
def test_T15_compiled_with_a_dynamic_number_of_rows_is_bitwise_eager(backend):
    check_compiled(32000, 1024, "cuda", backend)


# ---- the rest of the contract


@pytest.mark.size(1000, 32000, 1024)
@pytest.mark.parametrize("backend", STRATEGIES)
def test_T10_backward_twice_gives_the_same_gradients_and_leaves_operands_alone(backend):
    case, upstream = large_case(1000, 32000, 1024, BF16), random_upstream(1000, "cuda")
    before = case.hidden.detach().clone(), case.weight.detach().clone()
    out = linear_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    operands = case.hidden, case.weight
    first = torch.autograd.grad(out, operands, upstream, retain_graph=True)
    second = torch.autograd.grad(out, operands, upstream)
    assert all(torch.equal(a, b) for a, b in zip((*first, *operands), (*second, *before), strict=True))


@pytest.mark.size(500, 32000, 1024)
@pytest.mark.parametrize("backend", STRATEGIES)
def test_T14_autocast_computes_what_the_cast_operands_give(backend):
    case, upstream = large_case(500, 32000, 1024, FP32), random_upstream(500, "cuda")
    with torch.autocast("cuda", dtype=BF16):
        inside = run(case, upstream, backend=backend)
    cast = Case(case.hidden.detach().to(BF16).requires_grad_(), case.weight.detach().to(BF16).requires_grad_(), case.targets)
    outside = run(cast, upstream, backend=backend)
    assert all(x.dtype == FP32 for x in inside)
    assert all(torch.equal(a, b.float()) for a, b in zip(inside, outside, strict=True))


def check_lens(vocab: int, width: int, dtype, device) -> None:
    lens = random_lens((0.2, 1.0, 8.0), (257,), vocab, width, dtype=dtype)
    on_device = replace(lens, **{name: getattr(lens, name).to(device) for name in ("states", "weight", "targets", "final")})
    for outputs in (OUTPUTS, OF_ANY_BACKEND):
        top_k = 5 * (outputs is OUTPUTS)
        found = on_device.run(outputs, top_k)
        found = LensStatistics(*(x if x is None else x.cpu() for x in found))
        assert_agrees(found, lens, outputs, top_k, numerics.truncation(torch.device(device)))


@pytest.mark.size(3 * 257, 32001, 512)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=name_of)
def test_the_lens_is_that_of_float64(dtype):
    check_lens(32001, 512, dtype, "cuda")


BAD_TARGET = """
import torch
from bupo_kernels import linear_logprobs
hidden, weight = torch.randn(8, 64, device="cuda"), torch.randn(100, 64, device="cuda")
good = torch.arange(8, device="cuda")
linear_logprobs(hidden, weight, good, backend="triton")
torch.cuda.synchronize()
print("good targets passed", flush=True)
linear_logprobs(hidden, weight, good + 93, backend="triton")
torch.cuda.synchronize()
"""


def test_T11_a_target_out_of_range_is_a_device_side_assert():
    # In a process of its own: a failed assertion ends the context.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", BAD_TARGET], env=environment, capture_output=True, text=True, timeout=120)
    assert "good targets passed" in done.stdout, done.stderr
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    assert "illegal memory access" not in done.stderr


# ---- T28: memory


def peak_beyond(before: int) -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


MEMORY = [
    (32768, 151936, 2560, BF16, "triton:recompute", None),
    (32768, 151936, 2560, BF16, "triton:cached", 32 * GIB),
    (8192, 151936, 4096, BF16, "triton:cached", None),
    (32768, 128256, 1024, FP16, "triton:recompute", GIB // 2),
    (4096, 151936, 2560, FP32, "triton:recompute", None),
]


@pytest.mark.size
@pytest.mark.parametrize(("rows", "vocab", "width", "dtype", "backend", "budget"), MEMORY, ids=name_of)
def test_T28_peak_memory_is_what_explain_states(rows, vocab, width, dtype, backend, budget):
    case = large_case(rows, vocab, width, dtype, ignored=False)
    options = {"backend": backend, "memory_budget": budget}
    # What is stated is the most a call can need: as many rows as possible, but not all, so that those of H are gathered.
    upstream = [torch.ones(rows, device="cuda").index_fill(0, torch.tensor([rows // 2], device="cuda"), 0) for _ in range(3)]
    stated = explain(case.hidden, case.weight, case.targets, **options).tile_plan.memory
    warm = large_case(64, 5000, width, dtype, ignored=False)  # the library's own workspace lives on
    run(warm, [g[:64] for g in upstream], backend=backend)
    del warm
    torch.cuda.synchronize()

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = linear_logprobs(case.hidden, case.weight, case.targets, **options)
    results = sum(x.nbytes for x in out)
    forward = peak_beyond(before) - results
    torch.cuda.reset_peak_memory_stats()
    got = torch.autograd.grad(out, (case.hidden, case.weight), upstream)
    backward = peak_beyond(before) - results - sum(x.nbytes for x in got)
    mib = 2**20
    for name, measured, bound in (
        ("forward", forward, stated.forward),
        ("backward", backward, stated.backward + stated.accumulator),
    ):
        assert 0.95 * bound <= measured <= bound, f"{name}: {measured / mib:.1f} MiB measured, {bound / mib:.1f} MiB stated"


# ---- T29: launches


def launches(call) -> list[str]:
    """Names of the kernels that ran on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return [event.name for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.size(4096, 151936, 1024)
def test_T29_the_forward_is_one_pass_and_its_launches_do_not_depend_on_the_number_of_rows():
    names = []
    for rows in (64, 4096):
        case = large_case(rows, 151936, 1024, BF16)
        hidden, weight = case.hidden.detach(), case.weight.detach()
        names.append(launches(lambda h=hidden, w=weight, y=case.targets: linear_logprobs(h, w, y, backend="triton")))
    if not any(names):
        pytest.skip("the profiler reports no kernels on this machine")
    for launched in names:
        assert sum("linear_statistics_kernel" in name for name in launched) == 1
        assert sum("merge_kernel" in name for name in launched) == 1
    assert len(names[0]) == len(names[1]), names


def check_one_pass(rows: int, vocab: int, width: int, device, budget) -> None:
    """Against the same objective in two passes, from E of all rows: the same kernels on the same tiles."""
    case = large_case(rows, vocab, width, BF16, device, PEAKED)
    advantages = random_upstream(rows, device)[0]
    objective = PolicyObjective(entropy_coefficient=0.01)
    loss, metrics = linear_policy_loss(
        case.hidden, case.weight, case.targets, advantages, objective=objective, backend="triton", memory_budget=budget
    )
    got = torch.autograd.grad(loss, (case.hidden, case.weight))
    out = linear_logprobs(case.hidden, case.weight, case.targets, backend="triton:cached", memory_budget=ALL_OF_E)
    counts = case.targets != -100
    weighted = counts / counts.sum()
    want = torch.autograd.grad((weighted * (-advantages * out.logprobs - 0.01 * out.entropy)).sum(), (case.hidden, case.weight))
    assert metrics.active_rows == counts.sum()
    # Chunks of rows round their dz as it is stored, as the two passes do; their sums come in another order.
    for a, b in zip(got, want, strict=True):
        off, norm = apart(a, b)
        assert off <= torch.finfo(BF16).eps * norm


def check_clipped(rows: int, vocab: int, width: int, device, budget) -> None:
    """Rows on which a clip decides leave, and dz of later ones takes their place: against two passes, where these weigh nothing."""
    case = large_case(rows, vocab, width, BF16, device, PEAKED, ignored=False)
    out = linear_logprobs(case.hidden, case.weight, case.targets, backend="triton:cached", memory_budget=ALL_OF_E)
    leave = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device) < 0.3
    old = torch.where(leave, out.logprobs.detach() - 1, out.logprobs.detach())
    loss, metrics = linear_policy_loss(
        *(case.hidden, case.weight, case.targets, torch.ones(rows, device=device)),
        old_logprobs=old,
        backend="triton",
        memory_budget=budget,
    )
    got = torch.autograd.grad(loss, (case.hidden, case.weight))
    want = torch.autograd.grad((-out.logprobs[~leave]).sum() / rows, (case.hidden, case.weight))
    assert abs(metrics.clipped_high - leave.float().mean()) < 1e-6
    assert (got[0][leave] == 0).all()
    for a, b in zip(got, want, strict=True):
        off, norm = apart(a, b)
        assert off <= torch.finfo(BF16).eps * norm


@pytest.mark.size(8192, 151936, 2560, budget=ALL_OF_E, one_pass=True)
@pytest.mark.parametrize("budget", [None, ALL_OF_E], ids=["chunks", "all rows at once"])
def test_rows_that_leave_a_chunk_change_no_other(budget):
    check_clipped(8192, 151936, 2560, "cuda", budget)


@pytest.mark.size(32768, 151936, 2560, one_pass=True)
def test_T28_peak_memory_of_a_one_pass_loss_is_what_explain_states():
    case = large_case(32768, 151936, 2560, BF16, ignored=False)
    advantages = torch.ones(32768, device="cuda")
    stated = explain(case.hidden, case.weight, case.targets, objective=PolicyObjective(), backend="triton").tile_plan.memory
    warm = large_case(64, 5000, 2560, BF16, ignored=False)  # the library's own workspace lives on
    linear_policy_loss(warm.hidden, warm.weight, warm.targets, advantages[:64], backend="triton")
    del warm
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = linear_policy_loss(case.hidden, case.weight, case.targets, advantages, backend="triton")
    results = case.hidden.nbytes + case.weight.nbytes
    measured, bound = peak_beyond(before) - results, stated.forward + stated.accumulator
    del loss
    assert 0.9 * bound <= measured <= bound + 40 * 8 * 32768, f"{measured / 2**20:.1f} MiB measured, {bound / 2**20:.1f} stated"


@pytest.mark.size(8192, 151936, 2560, budget=ALL_OF_E, one_pass=True)
@pytest.mark.parametrize("budget", [None, ALL_OF_E], ids=["chunks", "all rows at once"])
def test_a_policy_loss_in_one_pass_has_the_gradients_of_two(budget):
    check_one_pass(8192, 151936, 2560, "cuda", budget)


@pytest.mark.parametrize("group", GROUPS)
def test_the_benchmark_takes_every_way_of_this_library(group):
    case = BenchmarkCase.of("tiny", 96, layers=3 if group == "lens" else 1)
    rows = measure(group, case, torch.device("cuda"), 2, chosen=lambda contender: contender.who == "ours")
    without_build = compiled.cuda() is None
    for row in rows:
        if without_build and "native" in row["name"]:
            continue
        assert row["reason"] is None, row
        assert len(row["ms_of_rounds"]) == 2
        found = [error for of in row["errors"].values() for error in of.values() if error is not None]
        assert max(found, default=0) < 0.02, row  # 16-bit gradients
