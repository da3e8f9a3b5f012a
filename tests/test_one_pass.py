"""The one-pass loss where products are of 16 bit: dz lies over what the forward kept, dH is one product a chunk, and tiles follow
from the bytes that the sums of dH and dW move."""

import itertools
import math
from pathlib import Path

import pytest
import tensor_cores
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import OPTIONS, assert_stored_gradients, case_with, covering, device_of, leaves, random_case
from test_fallback import META, Recorder
from test_numerics import toward_zero

from bupo_kernels import PolicyObjective, dispatch, explain, linear_policy_loss, numerics, reference
from bupo_kernels.backends import gradients
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Operands, Problem, Readout, Tile, bytes_of_sums
from bupo_kernels.backends.gradients import GradientSums, bytes_of_sum, in_place_order
from bupo_kernels.backends.triton_ import config, tiling

BF16, FP16 = torch.bfloat16, torch.float16
GIB = 2**30
ROWS, VOCAB = 32768, 151936
HOPPER = config.Target("cuda", 90, 132)
DOCS = (Path(__file__).parents[1] / "docs" / "gpu-kernels.md").read_text()


@pytest.fixture
def products(monkeypatch):
    return tensor_cores.mocked(monkeypatch)


def problem(width=4096, budget=GIB, rows=ROWS, vocab=VOCAB, device="cuda:0", **facts) -> Problem:
    sizes = {"rows": rows, "active_rows": rows, "vocab": vocab, "width": width, "dtype": BF16, "device": torch.device(device)}
    gradients = {"grad_hidden": True, "grad_weight": True, "grad_bias": False}
    return Problem(**sizes | gradients | {"softcap": False, "memory_budget": budget} | facts)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(gradients, "keeps_fp32_sums", lambda device: True)


@given(st.lists(st.booleans(), max_size=60))
def test_rows_that_stay_are_themselves_or_come_from_past_the_last(kept):
    order = in_place_order(torch.tensor(kept, dtype=torch.bool)).tolist()
    assert sorted(order) == [row for row, stays in enumerate(kept) if stays]
    for place, row in enumerate(order):
        assert row == place or (row >= len(order) and not kept[place])


def clipped_loss(case, dropped, backend, budget=None):
    """A loss of which ``dropped`` rows [N] bool have no gradient, since the clip decides; its value and its upstream gradients."""
    exact = reference.linear_logprobs(case.hidden.detach().double(), case.weight.detach().double(), case.targets, **double(case))[0]
    advantages = 1 + torch.rand(len(exact))
    old = torch.where(dropped, exact - 1.0, exact)  # a ratio of e, beyond the upper bound
    loss, _ = linear_policy_loss(
        *(case.hidden, case.weight, case.targets, advantages),
        old_logprobs=old.float(),
        objective=PolicyObjective(),
        backend=backend,
        memory_budget=budget,
        **case.options,
    )
    return loss, -advantages.where(~dropped, 0) / len(exact)


def double(case):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}


DROPPED = {
    "none": slice(0),
    "first": slice(0, 20),
    "last": slice(40, 70),
    "scattered": slice(1, 70, 3),
    "most": slice(3, 69),
    "all": slice(0, 70),
}


@pytest.mark.parametrize(
    ("dropped", "backend", "dtype", "budget"),
    covering(list(itertools.product(DROPPED, ("torch", "triton"), (BF16, FP16), (None, 150_000))), unpacked=True),
)
def test_rows_that_a_clip_decides_leave_and_the_others_have_their_gradients(products, dtype, backend, dropped, budget):
    if backend == "triton":
        pytest.importorskip("triton")
    case = random_case(70, 700, 64, dtype=dtype, device=device_of(backend), scale=2.0)
    leave = torch.zeros(70, dtype=torch.bool).index_fill(0, torch.arange(70)[DROPPED[dropped]], True)
    loss, upstream = clipped_loss(case, leave, backend, budget)
    got = torch.autograd.grad(loss, leaves(case))
    assert_stored_gradients(got, case, [upstream, None, None], "triton:cached" if backend == "triton" else "triton")
    assert (got[0][leave] == 0).all()
    plan = explain(case.hidden, case.weight, objective=PolicyObjective(), backend=backend, memory_budget=budget).tile_plan
    assert (plan.chunk_rows < 70) == (budget is not None)
    of_chunks = [int((~part).sum()) for part in leave.split(plan.chunk_rows)]
    assert [a for _, a, b in products if b[0] == 700] == [(rows, 700) for rows in of_chunks if rows]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_option_gives_16_bit_gradients_over_the_logits_that_were_kept(products, options, dtype):
    case = case_with(options, 60, 333, 24, dtype=dtype)
    mask = case.options.pop("mask", None)
    if mask is not None:
        case.targets[~mask] = -100
    counts = case.targets >= 0
    advantages = torch.randn(60)
    for budget in (None, 80_000):
        loss, _ = linear_policy_loss(
            *(case.hidden, case.weight, case.targets, advantages),
            objective=PolicyObjective(ratio="none", clip=None, entropy_coefficient=0.01),
            backend="torch",
            memory_budget=budget,
            **case.options,
        )
        upstream = [-advantages / counts.sum(), torch.full((60,), -0.01) / counts.sum(), None]
        assert_stored_gradients(torch.autograd.grad(loss, leaves(case)), case, upstream, "triton")
    of_hidden = [a for _, a, b in products if b[0] == 333]
    assert sum(rows for rows, _ in of_hidden) == 2 * int(counts.sum())
    assert len(of_hidden) > 2  # one of the whole, and several chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16], ids=str)
def test_a_cpu_takes_its_products_while_a_tile_is_in_cache(dtype):
    case = random_case(40, 5000, 16, dtype=dtype)
    assert not explain(case.hidden, case.weight, objective=PolicyObjective(), backend="torch").tile_plan.in_place


@pytest.mark.parametrize("budget", [GIB, 4 * 10**6, 2 * 10**6], ids=["one chunk", "chunks", "small chunks"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_measured_memory_of_a_chunk_is_what_the_plan_states_and_within_the_budget(monkeypatch, on_hopper, backend, budget):
    """By torch's meta kernels; Triton's fill what is there already, and are left out."""
    n, vocab, width = 900, 3000, 64
    asked, meta = problem(width, budget, n, vocab, "meta"), {"device": META}
    if backend == "triton":
        pytest.importorskip("triton")
        from bupo_kernels.backends.triton_ import gradient_cached

        monkeypatch.setattr(gradient_cached, "gradient_cached", lambda *_: None)
    implementation = {"torch": dispatch.TORCH, "triton": dispatch.TRITON}[backend]
    plan = implementation.one_pass_plan(asked, None)
    assert plan.memory.forward <= budget
    chunk = plan.chunk_rows
    assert (chunk < n) == (budget < GIB)
    hidden, weight = torch.empty(n, width, dtype=BF16, **meta), torch.empty(vocab, width, dtype=BF16, **meta)
    targets, numbers = torch.empty(n, dtype=torch.int64, **meta), [torch.empty(chunk, **meta) for _ in range(4)]
    operands, rows = Operands(hidden, weight, None, targets, Readout(0.7, 1.0, None)), torch.empty(chunk, dtype=torch.int64, **meta)
    with Recorder() as taken:
        sums = GradientSums(hidden, weight, None, needed=(True, True, False), dtype=torch.float32, parts=chunk < n)
        if backend == "torch":
            _, cache = implementation.row_statistics(operands, rows, plan, with_entropy=True, keep=True)
        else:
            cache = implementation.empty_cache(asked, chunk)
        coefficients = Coefficients(*numbers, rows)
        tiles = implementation.gradient_tiles(operands, rows, coefficients, plan, cache, rows)
        del cache
        sums.add(tiles, rows, step=plan.tile.rows)
    beyond = taken.peak - 2 * (n + vocab) * width - plan.memory.accumulator
    assert 0.6 * plan.memory.forward < beyond <= plan.memory.forward


def test_the_sum_of_a_product_over_the_whole_vocabulary_is_within_the_error_model():
    """Of dz of a peaked and a flat row, as a tensor core that truncates sums it: dH is off by less than its rounding to 16 bit."""
    vocab, width, generator = 151936, 16, torch.Generator().manual_seed(0)
    logits = torch.randn(8, vocab, generator=generator, dtype=torch.float64)
    logits[4:] *= 6.0
    p, weight = logits.softmax(1), torch.randn(vocab, width, generator=generator).to(BF16).double()
    target = torch.randint(0, vocab, (8,), generator=generator)
    dz = (torch.nn.functional.one_hot(target, vocab) - p).to(BF16).double()
    for block in (numerics.BLOCK, numerics.BLOCK // 2):  # Hopper, Ampere
        total = torch.zeros(8, width, dtype=torch.float64)
        pieces = torch.einsum("rkb,kbd->krd", dz.view(8, -1, block), weight.view(-1, block, width))
        for piece in pieces:
            total = toward_zero(total + piece)
        exact, bound = numerics.product(numerics.Bounded(dz, torch.zeros_like(dz)), weight, BF16)
        assert ((total - exact).abs() <= bound).all()
        lost = (total - exact).norm(dim=1) / exact.norm(dim=1)
        assert lost.max() < torch.finfo(BF16).eps / 2


def test_a_sum_writes_its_first_product_and_reads_and_writes_for_each_further_one():
    assert bytes_of_sum(10, 1, BF16) == 10 * (4 + 4)
    assert bytes_of_sum(10, 3, BF16) == 10 * (4 + 2 * 16 + 4)
    assert bytes_of_sum(10, 3, torch.float32) == 10 * (4 + 2 * 8 + 4)
    assert bytes_of_sum(10, 3, torch.float64) == 10 * (8 + 2 * 16 + 8)


def test_sums_count_a_pass_for_each_slice_and_for_each_block_of_rows(on_hopper):
    some = problem(rows=10, vocab=100, width=7)
    assert bytes_of_sums(some, Tile(4, 30)) == (bytes_of_sum(70, 4, BF16), bytes_of_sum(700, 3, BF16))
    assert bytes_of_sums(some, Tile(2, 100), 4) == (bytes_of_sum(70, 1, BF16), bytes_of_sum(700, 5, BF16))
    frozen = problem(rows=10, vocab=100, width=7, grad_weight=False)
    assert bytes_of_sums(frozen, Tile(4, 30)) == (bytes_of_sum(70, 4, BF16), 0)


WIDTHS, BUDGETS = (1024, 2560, 4096), (1, 5)
# What was planned before: for the one-pass loss chunks of so many rows in slices of 2048; for two passes slices of all rows.
CHUNKS = {(1, 1024): 2048, (1, 2560): 2048, (1, 4096): 2048, (5, 1024): 16384, (5, 2560): 8192, (5, 4096): 8192}
SLICES = {1: 8192, 5: 16384}


def gb(moved: tuple[int, int]) -> str:
    return " + ".join(f"{x / 1e9:.0f}" for x in moved)


def sums_of(tile_plan) -> tuple[int, int]:
    return tile_plan.bytes_of_sums


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_sums_move_what_the_documentation_predicts_and_less_than_before(on_hopper, budget, width):
    asked = problem(width, budget * GIB)
    chunk = CHUNKS[budget, width]
    before = bytes_of_sums(asked, Tile(chunk, 2048), chunk), bytes_of_sums(asked, Tile(ROWS, SLICES[budget]))
    one_pass, two_passes = tiling.one_pass_plan(asked, None, HOPPER), tiling.tile_plan(asked, "recompute", HOPPER)
    after = sums_of(one_pass), sums_of(two_passes)
    assert sum(after[0]) < sum(before[0]) / 2
    assert sum(after[1]) <= sum(before[1])
    tile = two_passes.tile
    row = (
        f"| {width} | {budget} GiB | {chunk:,} → {one_pass.chunk_rows:,} | {gb(before[0])} → {gb(after[0])} "
        f"| {ROWS:,} × {SLICES[budget]:,} → {tile.rows:,} × {tile.columns:,} | {gb(before[1])} → {gb(after[1])} |"
    )
    assert row in DOCS, row


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("budget", [GIB // 4, GIB, 5 * GIB])
@pytest.mark.parametrize("strategy", ["recompute", "cached"])
def test_slices_are_those_whose_sums_move_least_whatever_the_number_of_rows(on_hopper, budget, width, strategy):
    tiles = [tiling.largest_tile(problem(width, budget, rows), strategy, HOPPER) for rows in (1, 700, 8192, ROWS)]
    assert len({tile.columns for tile in tiles}) == 1
    many = problem(width, budget, tiling.MANY_ROWS)
    cached = tiling.cached_rows(many, strategy)

    def moved(columns: int) -> float:
        fit = [
            rows
            for rows in (2**k for k in range(18))
            if tiling.memory(many, Tile(rows, columns), cached, HOPPER).backward <= budget
        ]
        return sum(bytes_of_sums(many, Tile(max(fit), columns))) if fit else math.inf

    others = [moved(columns) for columns in range(config.COLUMN_UNIT, config.MOST_COLUMNS + 1, 4 * config.COLUMN_UNIT)]
    chosen = tiling.largest_tile(many, strategy, HOPPER)
    assert sum(bytes_of_sums(many, chosen)) <= 1.25 * min(others)


def test_blocks_of_rows_are_of_one_height(on_hopper):
    one_pass = tiling.one_pass_plan(problem(4096, 5 * GIB), None, HOPPER)
    assert -(-ROWS // one_pass.chunk_rows) * one_pass.chunk_rows - ROWS < 8
    two_passes = tiling.tile_plan(problem(1024, GIB), "recompute", HOPPER)
    assert two_passes.tile.rows < ROWS
    assert -(-ROWS // two_passes.tile.rows) * two_passes.tile.rows - ROWS < 8


@pytest.mark.parametrize("backend", [dispatch.TORCH, dispatch.NATIVE_CUDA], ids=["torch", "native"])
def test_a_tile_of_a_librarys_product_loses_rows_before_columns(on_hopper, backend):
    tiles = [backend.plan(problem(budget=budget), None).tile for budget in (5 * GIB, GIB, GIB // 2)]
    assert [tile.columns for tile in tiles] == 3 * [8192]
    assert ROWS > tiles[0].rows > tiles[1].rows > tiles[2].rows


def test_explain_states_what_sums_move_on_a_gpu(on_hopper):
    plan = dispatch.Plan("triton", dispatch.TRITON, tiling.one_pass_plan(problem(1024, 5 * GIB), None, HOPPER))
    of_hidden, of_weight = plan.tile_plan.bytes_of_sums
    assert f"sums      {of_hidden / 2**20:.2f} MiB moved for dH, {of_weight / 2**20:.2f} for dW\n" in str(plan)
    assert of_hidden == bytes_of_sum(ROWS * 1024, 1, BF16)
    assert of_weight == bytes_of_sum(VOCAB * 1024, 2, BF16)
    assert "sums  " not in str(explain(torch.randn(5, 8), torch.randn(9, 8).requires_grad_(), backend="torch"))
