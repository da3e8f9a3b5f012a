"""The oracle and the memory gates of the GPU tests, without a GPU: which tests a card runs, and what is let through."""

import inspect
from types import SimpleNamespace

import conftest
import pytest
import test_gpu
import torch
from gpu_sizes import GIB, Size, device_memory, oracle_bytes, size_of, why_too_large
from problems import device_of
from test_gpu import BF16, FP32, MEMORY, OVERFLOWS, SIZES, assert_statistics, check, exact, large_case
from test_numerics import truncated_product

from bupo.measurement import peak_bytes
from bupo_kernels import numerics
from bupo_kernels.backends import gradients

DEVICE = device_of("triton")
# GiB that are free on cards of so many GB: some report less, with ECC or a screen, and each process has a context.
FREE = {16: 15.0, 24: 21.8, 48: 44.0, 80: 78.0}
REAL = [Size(*case[:5], case[6]) for case in SIZES]
ALL = [*REAL, *(Size(*case[:3], BF16, *case[3:]) for case in OVERFLOWS.values()), *(Size(*case) for case in MEMORY)]


@pytest.fixture
def tensor_cores(monkeypatch):
    """Plans are those for a GPU that has them, also where torch could ask one and there is none."""
    monkeypatch.setattr(gradients, "keeps_fp32_sums", lambda device: device.type == "cuda")


def run_on(card: int) -> set[Size]:
    return {size for size in ALL if why_too_large(size, int(FREE[card] * GIB)) is None}


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("card", FREE)
def test_every_card_runs_each_backend_and_strategy_in_each_dtype_at_real_sizes(card):
    of_card = run_on(card) & set(REAL)
    assert {(size.backend, size.dtype) for size in of_card} == {(size.backend, size.dtype) for size in REAL}
    assert {size.vocab for size in of_card} == {size.vocab for size in REAL}
    assert max(size.rows for size in of_card) >= 32768
    assert any(size[:3] == test_gpu.TELLING for size in of_card)


@pytest.mark.usefixtures("tensor_cores")
def test_a_larger_card_runs_all_that_a_smaller_one_does_and_more():
    runs = [run_on(card) for card in FREE]
    assert runs[0] < runs[1] < runs[2] <= runs[3] == set(ALL)


@pytest.mark.usefixtures("tensor_cores")
def test_a_card_that_is_too_small_is_told_what_is_missing():
    size = Size(65536, 151936, 1024, torch.float16, "triton:cached", 96 * GIB)
    assert device_memory(size) > 2 * size.rows * size.vocab  # its E
    assert why_too_large(size, 15 * GIB) == f"needs {device_memory(size) / GIB:.1f} GiB of device memory, 15.0 are free"


@pytest.mark.parametrize(
    ("rows", "vocab", "width", "dtype"),
    [(400, 3000, 64, BF16), (300, 500, 2000, FP32), (40, 20000, 300, BF16), (3000, 200, 300, BF16)],
)
def test_the_oracle_takes_no_more_than_the_gate_allows_it(rows, vocab, width, dtype):
    size, budget = Size(rows, vocab, width, dtype, "torch"), 2**20  # so small that the oracle, and not the call, makes the peak
    held = 2 * (rows + vocab) * width * dtype.itemsize + 100 * rows
    peak = peak_bytes(lambda: check(rows, vocab, width, dtype, "cpu", "torch", budget=budget))
    upcast = 4 * vocab * width * (dtype != FP32)  # of the dense product, which a GPU need not upcast
    assert 0.3 * oracle_bytes(size) < peak - held < oracle_bytes(size) + upcast


FUNCTIONS = {name: f for name, f in vars(test_gpu).items() if name.startswith("test_") and inspect.isfunction(f)}


def marks_of(function, name: str) -> list:
    return [mark for mark in getattr(function, "pytestmark", []) if mark.name == name]


def test_every_test_on_a_gpu_says_its_size():
    unsized = {name for name, f in FUNCTIONS.items() if not marks_of(f, "size")}
    of_little = {"test_T11_a_target_out_of_range_is_a_device_side_assert", "test_the_benchmark_takes_every_way_of_this_library"}
    assert len(FUNCTIONS) > 20
    assert unsized == of_little


class Item:
    """As much of a collected test as is asked for its size."""

    def __init__(self, mark, **params):
        self.mark, self.callspec = mark and mark.mark, SimpleNamespace(params=params)

    def get_closest_marker(self, name):
        return self.mark


def test_the_marker_is_completed_by_the_parameters_of_a_test():
    assert size_of(Item(pytest.mark.size(3, 40, 5), backend="native", scale=8.0)) == Size(3, 40, 5, backend="native")
    assert size_of(Item(pytest.mark.size(3, 40), width=7, dtype=FP32)) == Size(3, 40, 7, FP32)
    assert size_of(Item(pytest.mark.size(3, 40, 5, budget=9), budget=None)).budget == 9
    assert size_of(Item(None)) is None


def test_small_problems_come_first_and_others_keep_their_place():
    items = [Item(pytest.mark.size(3, 40), width=7), Item(None), Item(pytest.mark.size(3, 40), width=5), Item(None)]
    found = list(items)
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: True), found)
    assert found == [items[1], items[3], items[2], items[0]]


def test_what_make_gpu_runs_first_is_of_every_backend_and_strategy():
    every = {"torch", "native", "triton:recompute", "triton:cached"}
    (smallest,) = (f for f in FUNCTIONS.values() if marks_of(f, "smallest"))
    assert {getattr(x, "values", (x,))[0] for x in marks_of(smallest, "parametrize")[0].args[1]} == every
    of_sizes = marks_of(test_gpu.test_values_and_gradients_at_real_sizes, "parametrize")[0].args[1]
    assert {case.values[4] for case in of_sizes if [mark.name for mark in case.marks] == ["telling"]} == every


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(FP32, "torch"), (BF16, "torch"), (BF16, "triton:recompute"), (BF16, "triton:cached"), (torch.float16, "triton:cached")],
    ids=str,
)
def test_statistics_and_gradients_that_are_right_pass(dtype, backend):
    if backend != "torch":
        pytest.importorskip("triton")
    check(60, 300, 600, dtype, DEVICE, backend, test_gpu.PEAKED)  # operands of two parts of the oracle's width


@pytest.mark.parametrize("of_norm", [False, True], ids=["one element", "all, a little"])
@pytest.mark.parametrize(("index", "name"), [(3, "dH"), (4, "dW")])
def test_a_gradient_that_is_off_by_more_than_its_roundings_does_not_pass(monkeypatch, index, name, of_norm):
    right = test_gpu.run

    def wrong(case, upstream, **options):
        found = right(case, upstream, **options)
        if of_norm:
            found[index] *= 1 + 4 * torch.finfo(BF16).eps
        else:  # in a row, or column, that is looked at
            found[index][0, -1] += 1
        return found

    monkeypatch.setattr(test_gpu, "run", wrong)
    with pytest.raises(AssertionError, match=f"{name}: .* (of its elementwise bound|off in norm)"):
        check(60, 300, 600, BF16, "cpu", "torch")


@pytest.fixture
def statistics():
    """A case, and its statistics from a product whose accumulator truncates."""
    case = large_case(40, 300, 4096, BF16, "cpu", test_gpu.PEAKED)
    rows = torch.arange(40)

    def truncating(hidden, weight):
        return truncated_product(hidden, weight, numerics.BLOCK // 2)

    found = exact(case, rows, rows[:0], truncating)
    counts = case.targets != -100
    return case, rows, truncating, [(x * counts).float() for x in found[:3]]


def holds(ours, case, rows) -> bool:
    try:
        assert_statistics(ours, case, rows)
    except AssertionError as error:
        if "of its bound" not in str(error):
            raise
        return False
    return True


def test_a_truncated_sum_is_let_through_on_a_gpu_whose_own_product_truncates_and_nowhere_else(statistics, monkeypatch):
    case, rows, truncating, ours = statistics
    assert not holds(ours, case, rows)  # a CPU rounds to nearest
    monkeypatch.setattr(numerics, "truncation", lambda device: 2)
    assert not holds(ours, case, rows)  # the dense product here loses less than half of that
    monkeypatch.setattr(test_gpu, "dense_product", truncating)
    assert holds(ours, case, rows)
    monkeypatch.setattr(numerics, "truncation", lambda device: 0)
    assert not holds(ours, case, rows)  # within twice the dense error, but not within the contract


def test_the_log_probs_of_a_dense_product_hold_and_those_of_rounded_logits_do_not(statistics):
    case, rows, *_ = statistics
    counts = case.targets != -100
    of_dense, of_bf16 = (
        [(x * counts).float() for x in exact(case, rows, rows[:0], product)[:3]]
        for product in (test_gpu.dense_product, lambda hidden, weight: hidden @ weight.T)
    )
    assert holds(of_dense, case, rows)
    assert not holds(of_bf16, case, rows)
