"""Calls with 1, 2, 3 and 7 threads, whatever the number of cores: each within its bound of float64, and bit for bit the same where
docs/cpu-kernels.md promises that; with fewer tasks than threads; and in the memory that `explain` states for that many."""

import pytest
import torch
from problems import (
    assert_stored_gradients,
    assert_values,
    case_with,
    gradients,
    leaves,
    random_case,
)
from test_divergence import assert_near, bound_of, expected
from test_native import same, threads

from bupo.measurement import peak_bytes
from bupo_kernels import PolicyObjective, explain, linear_divergence, linear_logprobs, linear_policy_loss
from bupo_kernels.backends import compiled, cpu_panels
from bupo_kernels.backends.compiled import MULTIPLY_BF16, isas

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
THREADS = (1, 2, 3, 7)

pytestmark = pytest.mark.skipif(compiled.built is None, reason="the C++ kernels were not built")
all_dtypes = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
both_16_bit = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


def of_every_count(call, counts=THREADS):
    """Return what ``call`` gives with each number of threads."""
    found = []
    for count in counts:
        with threads(count):
            found.append(call())
    return found


def stores_dz_as(dtype):
    """Return the backend whose error model is that of ``native`` here."""
    return "native" if dtype == BF16 and isas()[0] in MULTIPLY_BF16 else "torch"


def run(case, upstream, **options):
    """Values, and gradients of ``Σ upstream · (logprobs, entropy, logsumexp)``."""
    out = linear_logprobs(case.hidden, case.weight, case.targets, **case.options, **options)
    return out, gradients(sum((g * x).sum() for g, x in zip(upstream, out, strict=True)), *leaves(case))


# Whole panels, sets and splits for every thread, and their last ones not full; one row; one panel of columns; D of one panel.
SIZES = [(70, 2500, 520), (1, 4500, 40), (200, 20, 40), (200, 700, 20)]


@all_dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_log_probs_are_right_and_in_16_bit_the_same_with_any_number_of_threads(dtype, size):
    case = case_with({"bias": True, "temperature": "rows"}, *size, dtype=dtype)
    upstream = [torch.randn(size[0]) for _ in range(3)]
    found = of_every_count(lambda: run(case, upstream, backend="native"))
    for out, got in found:
        assert_values(out, case)
        assert_stored_gradients(got, case, upstream, stores_dz_as(dtype))
        if dtype != FP32:  # whose products are the library's, which may add in another order
            assert same(out, found[0][0])
            assert same(got, found[0][1])


@all_dtypes
def test_a_one_pass_loss_is_right_and_in_16_bit_the_same_with_any_number_of_threads(dtype):
    case, advantages = case_with({"bias": True}, 90, 2301, 72, dtype=dtype, scale=2.0), torch.randn(90)

    def loss():
        value, _ = linear_policy_loss(
            *(case.hidden, case.weight, case.targets, advantages), objective=PolicyObjective(), backend="native", **case.options
        )
        return value, gradients(value, *leaves(case))

    found = of_every_count(loss)
    for value, got in found:
        assert_stored_gradients(got, case, [-advantages / 90, None, None], stores_dz_as(dtype))
        if dtype != FP32:
            assert torch.equal(value, found[0][0])
            assert same(got, found[0][1])


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_divergence_is_the_same_with_any_number_of_threads(kind):
    # Whole numbers, whose products are exact in whatever order the library adds.
    student, teacher = (random_case(21, 700, 9, seed=seed) for seed in (0, 1))
    for case in (student, teacher):
        for name in ("hidden", "weight"):
            setattr(case, name, (2 * getattr(case, name).detach()).round().requires_grad_())

    def divergence():
        found = linear_divergence(
            *(student.hidden, student.weight, teacher.hidden, teacher.weight), kind=kind, reduction="none", backend="native"
        )
        return found.divergence, found.entropy

    found = of_every_count(divergence)
    assert_near(found[0][0], expected(student, teacher, kind)[0], bound_of(student, teacher))
    assert all(same(other, found[0]) for other in found[1:])


@both_16_bit
def test_where_threads_take_of_a_tight_budget_tiles_shrink_and_log_probs_stay(dtype):
    """Sums of dH and dW are taken tile by tile: their order is that of the tiles, and with them what rounding leaves."""
    case = random_case(300, 2200, 40, dtype=dtype)
    upstream = [torch.randn(300) for _ in range(3)]
    with threads(7):
        budget = cpu_panels.least_budget(explain(case.hidden, case.weight, case.targets).problem, cpu_panels.isas_for(dtype)[0])
    tiles, found = [], []
    for count in THREADS:
        with threads(count):
            tiles.append(explain(case.hidden, case.weight, case.targets, memory_budget=budget, backend="native").tile_plan.tile)
            found.append(run(case, upstream, memory_budget=budget, backend="native"))
    assert len(set(tiles)) > 1  # else the test could not fail
    for tile, (out, got) in zip(tiles, found, strict=True):
        assert same(out, found[0][0])
        assert_stored_gradients(got, case, upstream, stores_dz_as(dtype))
        assert tile != tiles[0] or same(got, found[0][1])


@both_16_bit
def test_the_panels_of_every_thread_are_in_the_memory_that_is_stated(dtype):
    case, stated = random_case(64, 9000, 512, dtype=dtype), []
    for count in THREADS:
        with threads(count):
            memory = explain(case.hidden, case.weight, case.targets).tile_plan.memory
            kept = []
            forward = peak_bytes(lambda: kept.append(linear_logprobs(case.hidden, case.weight, case.targets).logprobs))  # noqa: B023
            backward = peak_bytes(lambda: kept.append(gradients(kept[0].sum(), *leaves(case))))  # noqa: B023
        results = case.hidden.nbytes + case.weight.nbytes
        assert 0.67 * memory.forward <= forward <= memory.forward + 3 * 4 * 64
        assert 0.67 * (memory.backward + memory.accumulator) <= backward <= memory.backward + memory.accumulator + results
        stated.append(memory)
    k = compiled.kernels(cpu_panels.isas_for(dtype)[0])
    assert stated[3].forward - stated[0].forward == k.workspace_bytes(512, 7) - k.workspace_bytes(512, 1)
    assert 2**19 < k.workspace_bytes(512, 1) <= (768 + 128) * 1024


@both_16_bit
def test_the_number_of_threads_may_change_between_forward_and_backward(dtype):
    case = random_case(70, 2100, 64, dtype=dtype)
    upstream = [torch.randn(70) for _ in range(3)]
    want = run(case, upstream, backend="native")[1]
    with threads(7):
        out = linear_logprobs(case.hidden, case.weight, case.targets, backend="native")
    with threads(2):
        got = gradients(sum((g * x).sum() for g, x in zip(upstream, out, strict=True)), *leaves(case))
    assert same(got, want)
