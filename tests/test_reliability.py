"""What users of comparable kernels met, one number each; docs/reliability.md says what it was and where what is not here lives."""

import logging
import math
import os
import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from models import LARGEST, tiny_model, token_batch
from problems import (
    CONTRACT,
    OPTIONS,
    assert_stored_gradients,
    assert_values,
    case_with,
    contract,
    covering,
    dense_fp32_error,
    device_of,
    first_of,
    gradients,
    largest_logit,
    leaves,
    policy_error,
    products,
    random_case,
    roundoff,
    with_cached,
)
from ranks import on_ranks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bupo.measurement import peak_bytes
from bupo_kernels import (
    FusedLMHead,
    dispatch,
    explain,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    policy_logprobs,
    reference,
)
from bupo_kernels.backends import gradients as library_products
from bupo_kernels.backends import triton_
from bupo_kernels.backends.base import Operands, Problem, Readout
from bupo_kernels.backends.triton_ import config

FIELDS = ("logprobs", "entropy", "logsumexp")
MIB = 2**20
EPS = torch.finfo(torch.float32).eps
SOME_MIB = 2 * (1 + torch.get_num_threads()) * MIB  # each thread of the native kernels has panels of its own

# Cut even small problems into several tiles. Triton's smallest is 256 columns wide, which torch's is not.
SMALL_BUDGET = {"torch": 48 * 1024, "native": 48 * 1024, "triton": 160 * 1024, "triton:cached": 160 * 1024}


def all_of(case, backend, **options):
    return linear_logprobs(case.hidden, case.weight, case.targets, backend=backend, **{**case.options, **options})


def weighted(statistics, upstream):
    return sum((g * x).sum() for g, x in zip(upstream, statistics, strict=True) if g is not None)


# ---- values


@given(
    rows=st.integers(0, 40),
    vocab=st.integers(1, 700),
    width=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    budget=st.sampled_from(["small", None]),
    seed=st.integers(0, 2**16),
)
def test_T01_any_shape_stays_within_the_contract(backend, rows, vocab, width, scale, budget, seed):
    case = random_case(rows, vocab, width, scale=scale, seed=seed, device=device_of(backend))
    budget = None if budget is None else 2 * SMALL_BUDGET[backend]
    ours = all_of(case, backend, memory_budget=budget)
    assert ours.logprobs.shape == (rows,)
    assert_values(ours, case)


@pytest.mark.parametrize("vocab", [1, 125, 256, 257, 517, 2049, 50257, 129920, 151936, 152063, 152064])
def test_T01_columns_past_the_vocabulary_count_nothing(backend, vocab):
    # Every logit is −150, so that a column past the end, taken for a logit of 0, would outweigh all that exist.
    if vocab > 5000 and backend == "triton" and config.interpreted():
        pytest.skip("seconds in the interpreter for each; on a GPU it runs")
    device = device_of(backend)
    weight = torch.full((vocab, 3), -50.0, device=device, requires_grad=True)
    hidden = torch.ones(2, 3, device=device, requires_grad=True)
    ours = linear_logprobs(hidden, weight, torch.tensor([0, vocab - 1], device=device), backend=backend)
    bound = CONTRACT * 151
    assert (ours.logprobs + math.log(vocab)).abs().max() <= bound
    assert (ours.entropy - math.log(vocab)).abs().max() <= bound
    assert (ours.logsumexp + 150 - math.log(vocab)).abs().max() <= bound
    d_weight = gradients(ours.logprobs.sum(), weight)[0]
    expected = torch.full((vocab,), -2 / vocab, dtype=torch.float64, device=device)
    expected[0] += 1
    expected[-1] += 1
    assert (d_weight[:, 0] - expected).abs().max() <= 2 * bound * (2 / vocab if vocab > 2 else 1) + 2**-22


@pytest.mark.parametrize("offset", [6e4, -6e4, -150.0, 1e4])
def test_T02_a_common_offset_of_all_logits_changes_nothing_but_logsumexp(backend, offset):
    # Integers and a constant last coordinate: the products are exact in fp32, so nothing may be lost to the offset.
    device = device_of(backend)
    hidden = torch.randint(-4, 5, (9, 6)).float().to(device)
    weight = torch.randint(-2, 3, (203, 6)).float().to(device)
    ones, constant = torch.ones(9, 1, device=device), torch.full((203, 1), offset, device=device)
    targets = torch.randint(0, 203, (9,)).to(device)
    plain = linear_logprobs(hidden, weight, targets, backend=backend)
    moved = linear_logprobs(torch.cat([hidden, ones], 1), torch.cat([weight, constant], 1), targets, backend=backend)
    assert torch.equal(plain.logprobs, moved.logprobs)
    assert torch.equal(plain.entropy, moved.entropy)
    assert (moved.logsumexp - plain.logsumexp - offset).abs().max() <= 2**-24 * 2 * abs(offset)


def test_T02_logits_of_both_extremes_in_one_row(backend):
    device = device_of(backend)
    weight = torch.tensor([[6e4], [-6e4], [0.0], [5.9e4]], device=device, requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [0.0]], device=device, requires_grad=True)
    ours = linear_logprobs(hidden, weight, torch.tensor([0, 0, 3], device=device), backend=backend)
    assert ours.logprobs.tolist() == pytest.approx([0.0, -1.2e5, -math.log(4)], rel=8 * EPS)
    assert ours.entropy.tolist() == pytest.approx([0.0, 0.0, math.log(4)], rel=8 * EPS)
    found = gradients(ours.logprobs.sum() + ours.entropy.sum(), hidden, weight)
    assert all(torch.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize("vocab", first_of([5003, 70001]))
def test_T03_uniform_rows_reach_the_largest_entropy_and_their_gradient_sums_to_zero(backend, vocab):
    # 70001 columns are 11.2 nat, where a filter on p would drop every column.
    if vocab > 5003 and backend == "triton" and config.interpreted():
        pytest.skip("ten seconds in the interpreter; on a GPU it runs")
    if backend == "triton" and config.interpreted():
        vocab //= 5
    device = device_of(backend)
    targets = torch.tensor([0, 1, vocab - 2, vocab - 1], device=device)
    weight = torch.randn(vocab, 2).to(device).requires_grad_()
    ours = linear_logprobs(torch.zeros(4, 2, device=device), weight, targets, backend=backend)
    assert ours.entropy.tolist() == pytest.approx([math.log(vocab)] * 4, rel=8 * EPS)
    (of_entropy,) = gradients(ours.entropy.sum(), weight)
    assert (of_entropy == 0).all()
    ones = torch.cat([torch.randn(4, 1) / 100, torch.ones(4, 1)], 1).to(device)  # the last column of dW is dz, summed over rows
    near = (torch.cat([torch.randn(vocab, 1), torch.zeros(vocab, 1)], 1)).to(device).requires_grad_()
    (d_weight,) = gradients(linear_logprobs(ones, near, targets, backend=backend).logprobs.sum(), near)
    assert abs(d_weight[:, -1].double().sum().item()) <= len(ones) * contract(5.0)  # of each p, which add up to 1 in each row
    assert (d_weight[:, -1] != 0).all()


@with_cached
def test_T03_no_gradient_is_filtered_where_every_probability_is_small(backend):
    case = random_case(6, 3001, 16, scale=1e-2, dtype=torch.bfloat16, device=device_of(backend))
    upstream = [torch.ones(6, device=case.hidden.device), None, None]
    got = gradients(weighted(all_of(case, backend), upstream), *leaves(case))
    assert_stored_gradients(got, case, upstream, backend)
    assert (got[1] != 0).any(1).all()


def test_T03_saturated_target_keeps_the_relative_accuracy_of_its_gradient(backend):
    # 1 − p_y is 3e-4, which 16-bit probabilities could not resolve; fp32 sums leave it an error of 2^-24 / 3e-4.
    device = device_of(backend)
    weight = torch.tensor([[8.0], [0.0]], device=device, requires_grad=True)
    out = linear_logprobs(torch.ones(1, 1, device=device), weight, torch.tensor([0], device=device), backend=backend)
    (d_weight,) = gradients(out.logprobs.sum(), weight)
    rest = math.exp(-8) / (1 + math.exp(-8))
    assert d_weight.flatten().tolist() == pytest.approx([rest, -rest], rel=2**-24 / rest)


@given(
    rows=st.integers(1, 20),
    vocab=st.integers(1, 600),
    width=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 1e3, 6e4]),
    seed=st.integers(0, 2**16),
)
def test_T04_logprob_never_positive_and_entropy_in_its_range_at_any_scale(backend, rows, vocab, width, scale, seed):
    case = random_case(rows, vocab, width, scale=scale, seed=seed, device=device_of(backend))
    ours = all_of(case, backend)
    assert (ours.logprobs <= 0).all()
    assert (ours.entropy >= 0).all()
    assert (ours.entropy <= torch.tensor(math.log(vocab))).all()
    assert torch.isfinite(torch.stack(ours)).all()
    # Sums of huge cancelling terms are inexact in fp32, whoever forms them.
    error = (ours.logprobs - reference.linear_logprobs(case.hidden, case.weight, case.targets)[0]).abs().max()
    bound = CONTRACT * (1 + largest_logit(case))
    assert error <= max(bound, 2 * dense_fp32_error(case).max())
    z_y = (case.hidden.double() * case.weight.double()[case.targets]).sum(1)
    assert (ours.logsumexp >= z_y - bound).all()


@with_cached
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", first_of([[5, 2999, 40], [64, 500, 64], [200, 33, 17]]), ids=str)
def test_T05_sixteen_bit_inputs_are_closer_to_float64_than_rounded_logits(backend, dtype, shape):
    case = random_case(*shape, scale=20.0, dtype=dtype, device=device_of(backend))
    exact = reference.linear_logprobs(case.hidden, case.weight, case.targets)[0]
    rounded = (case.hidden @ case.weight.T).float().log_softmax(-1).gather(1, case.targets[:, None]).squeeze(1)
    error, eager = ((x - exact).abs().max() for x in (all_of(case, backend).logprobs, rounded))
    assert error <= CONTRACT * (1 + largest_logit(case))
    assert error * 100 < eager


@with_cached
def test_T06_weight_gradient_error_does_not_grow_with_the_number_of_rows(backend):
    errors = []
    interpreted = backend.startswith("triton") and config.interpreted()  # which takes seconds for a thousand rows
    for rows in (64, 1024 if interpreted else 4096):
        case = random_case(rows, 50, 32, dtype=torch.bfloat16, device=device_of(backend))
        (got,) = gradients(all_of(case, backend, memory_budget=SOME_MIB).logprobs.sum(), case.weight)
        exact_weight = case.weight.detach().double().requires_grad_()
        exact = reference.linear_logprobs(case.hidden.detach(), exact_weight, case.targets)[0]
        (want,) = gradients(exact.sum(), exact_weight)
        errors.append(((got.double() - want).norm() / want.norm()).item())
    # One roundoff for each rounding on the way (dW; dz; E), whatever the number of rows and of tiles.
    stored = {"torch": 0, "native": 1, "triton": 1, "triton:cached": 2}[backend]
    assert max(errors) <= torch.finfo(torch.bfloat16).eps / 2 + stored * roundoff(torch.bfloat16, backend)


# ---- gradients


@with_cached
@pytest.mark.parametrize("used", [*((name,) for name in FIELDS), FIELDS[:2], FIELDS], ids="+".join)
def test_T07_each_statistic_has_its_gradient_alone_and_together(backend, used):
    case = random_case(11, 297, 16, scale=2.0, dtype=torch.bfloat16, device=device_of(backend))
    upstream = [torch.randn(11).to(case.hidden.device) if name in used else None for name in FIELDS]
    got = gradients(weighted(all_of(case, backend), upstream), *leaves(case))
    assert_stored_gradients(got, case, upstream, backend)
    assert all(gradient.any() for gradient in got)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_T08_frozen_operands_cost_no_gradient_product(backend, frozen):
    case = random_case(20, 64, 16, device=device_of(backend))
    getattr(case, frozen).requires_grad_(False)
    out = all_of(case, backend)
    got = []
    made = products(lambda: got.extend(gradients(out.logprobs.sum(), *leaves(case))))
    recomputed = {"torch": 1, "triton": 1, "native": 0}[backend]
    by_library = 1 + recomputed * (backend != "triton")  # there it is in the kernel
    assert sum(2 * m * k * n for m, k, n in made) == by_library * 2 * 20 * 64 * 16
    plan = explain(case.hidden, case.weight, case.targets, backend=backend)
    assert plan.flops_backward == (1 + recomputed) * 2 * 20 * 64 * 16
    assert_stored_gradients(got, case, [torch.ones_like(out.logprobs), None, None], backend)


def test_T08_bias_alone_can_be_trained(backend):
    case = case_with({"bias": True}, 20, 64, 16, dtype=torch.float32, device=device_of(backend))
    case.hidden.requires_grad_(False)
    case.weight.requires_grad_(False)
    out = all_of(case, backend)
    got = gradients(out.logprobs.sum(), case.options["bias"])
    assert_stored_gradients(got, case, [torch.ones_like(out.logprobs), None, None], backend)


@with_cached
def test_T08_no_grad_records_nothing(backend):
    case = random_case(5, 20, 4, dtype=torch.bfloat16, device=device_of(backend))
    with torch.no_grad():
        out = all_of(case, backend)
        plan = explain(case.hidden, case.weight, case.targets, backend=backend)
    assert not out.logprobs.requires_grad
    assert plan.flops_backward == plan.tile_plan.cached_rows == 0
    assert_values(out, case)


@with_cached
def test_T08_entropy_can_be_left_out(backend):
    case = random_case(5, 20, 4, dtype=torch.bfloat16, device=device_of(backend))
    whole, out = all_of(case, backend), all_of(case, backend, return_entropy=False)
    assert out.entropy is None
    assert torch.equal(out.logprobs, whole.logprobs)
    for a, b in zip(*(gradients(x.logprobs.sum(), *leaves(case)) for x in (out, whole)), strict=True):
        assert torch.equal(a, b)


VIEWS = {
    "shifted": lambda x: x[..., 0][:, :-1],
    "transposed": lambda x: x[..., 1].transpose(0, 1),
    "strided": lambda x: x[::2, ::3, :, 0],
    "expanded": lambda x: x[:1, ..., 0].expand(4, 12, 6),
    "three leading dimensions": lambda x: x[..., 0].unflatten(1, (3, 4)),
}


@with_cached
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_T09_any_view_of_hidden_gives_the_result_of_its_copy(backend, view):
    device = device_of(backend)
    base = torch.randn(4, 12, 6, 2).to(device, torch.bfloat16)
    weight = torch.randn(50, 6).to(device, torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 50, (4, 12)).to(device)
    leaf, copied = base.clone().requires_grad_(), base.clone().requires_grad_()
    y = targets.flatten()[: view(base)[..., 0].numel()].view(view(base).shape[:-1])
    a = linear_logprobs(view(leaf), weight, y, backend=backend)
    b = linear_logprobs(view(copied).contiguous(), weight, y, backend=backend)
    assert torch.equal(a.logprobs, b.logprobs)
    assert torch.equal(a.entropy, b.entropy)
    found = [gradients(out.logprobs.sum(), x, weight) for out, x in ((a, leaf), (b, copied))]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert found[0][0].any()


def test_T09_weight_may_be_a_view(backend):
    device = device_of(backend)
    case = random_case(6, 40, 8, device=device)
    wide = torch.randn(8, 90).to(device).requires_grad_()
    found = []
    for weight in (wide.T[5:45], wide.T[5:45].contiguous()):
        case.weight = weight
        out = linear_logprobs(case.hidden, weight, case.targets, backend=backend)
        assert_values(out, case)
        assert_stored_gradients(
            gradients(out.logprobs.sum(), case.hidden, weight), case, [torch.ones_like(out.logprobs), None, None], backend
        )
        found.append(gradients(out.logprobs.sum(), wide)[0])
    assert (found[0][:, :5] == 0).all()
    assert (found[0][:, 45:] == 0).all()
    assert (found[0] - found[1]).norm() <= 8 * CONTRACT * (1 + largest_logit(case)) * found[1].norm()


def test_T10_backward_twice_gives_the_same_gradients_and_leaves_saved_tensors_alone(backend):
    case = random_case(13, 129, 24, softcap=5.0, temperature=0.9, device=device_of(backend))
    before = case.hidden.detach().clone(), case.weight.detach().clone()
    loss = weighted(all_of(case, backend), [1, 1, 1])
    first, second = (gradients(loss, case.hidden, case.weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(case.hidden, before[0])
    assert torch.equal(case.weight, before[1])


@with_cached
def test_T10_micro_batches_add_up_in_grad(backend):
    case = random_case(30, 129, 24, dtype=torch.bfloat16, device=device_of(backend))
    parts = [slice(0, 11), slice(11, 30)]

    def loss(part):
        out = linear_logprobs(case.hidden[part], case.weight, case.targets[part], backend=backend)
        return out.logprobs.sum() + out.entropy.sum()

    alone = [gradients(loss(part), case.hidden, case.weight) for part in parts]
    for part in parts:
        loss(part).backward()
    for operand, a, b in zip((case.hidden, case.weight), *alone, strict=True):
        assert torch.equal(operand.grad, a + b)


# ---- rows that do not count, and targets


@with_cached
@pytest.mark.parametrize("ignored", [(0, 9), (3,), tuple(range(1, 10)), tuple(range(9)), ()], ids=str)
def test_T11_masked_rows_are_zero_and_have_no_gradient(backend, ignored):
    case = random_case(10, 51, 8, dtype=torch.bfloat16, device=device_of(backend))
    case.targets[list(ignored)] = -100
    mask = torch.ones(10, dtype=torch.bool)
    mask[4] = False
    case.options = {"mask": mask.to(case.hidden.device)}
    out = all_of(case, backend)
    assert_values(out, case)
    upstream = [torch.ones_like(x) for x in out]
    got = gradients(weighted(out, upstream), *leaves(case))
    assert_stored_gradients(got, case, upstream, backend)
    for row in {4, *ignored}:
        assert all(statistic[row] == 0 for statistic in out)
        assert (got[0][row] == 0).all()


@with_cached
def test_T11_masked_rows_may_hold_anything(backend):
    case = random_case(6, 33, 8, dtype=torch.bfloat16, device=device_of(backend))
    hidden = case.hidden.detach().clone()
    hidden[2] = float("nan")
    case.targets[2] = -100
    out = linear_logprobs(hidden.requires_grad_(), case.weight, case.targets, backend=backend)
    found = gradients(sum(x.sum() for x in out), hidden, case.weight)
    assert torch.isfinite(torch.stack(out)).all()
    assert all(torch.isfinite(gradient).all() for gradient in found)


@with_cached
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (2, 0), (2, 3)], ids=str)
def test_T11_no_row_at_all_gives_zeros_and_zero_gradients(backend, shape):
    device = device_of(backend)
    hidden, weight = (torch.randn(*s, 8).to(device, torch.bfloat16).requires_grad_() for s in (shape, (33,)))
    targets = torch.full(shape, -100, device=device)
    out = linear_logprobs(hidden, weight, targets, backend=backend)
    d_hidden, d_weight = gradients(sum(x.sum() for x in out), hidden, weight)
    assert all((statistic == 0).all() and statistic.shape == shape for statistic in out)
    assert (d_hidden == 0).all()
    assert (d_weight == 0).all()
    assert linear_cross_entropy(hidden, weight, targets, backend=backend).item() == 0


def test_T11_ignore_index_may_be_any_number_even_a_token(backend):
    case = random_case(5, 20, 4, device=device_of(backend))
    case.targets = torch.tensor([7, 1, 7, 2, 3]).to(case.hidden.device)
    out = all_of(case, backend, ignore_index=7)
    assert (out.logprobs == 0).tolist() == [True, False, True, False, False]
    assert (all_of(case, backend).logprobs != 0).all()


@pytest.mark.parametrize(("target", "named"), [(20, "20"), (-1, "-1"), (-101, "-101"), (2**40, "1099511627776")])
def test_T11_labels_out_of_range_are_named_before_anything_runs(backend, target, named):
    # On the CPU, where the values are at hand; on a GPU a device-side assert stops the call.
    targets = torch.tensor([0, target, 19])
    for op in (linear_logprobs, linear_cross_entropy, explain):
        with pytest.raises(ValueError, match=rf"targets: {named} given, accepted are ids in \[0, 20\) and ignore_index"):
            op(torch.randn(3, 8), torch.randn(20, 8), targets, backend=backend if device_of(backend) == "cpu" else "torch")


def test_T12_packed_sequences_do_not_see_one_another(backend):
    model, (ids, targets) = tiny_model(), token_batch(rows=2)
    model, ids, targets = (x.to(device_of(backend)) for x in (model, ids, targets))
    apart = policy_logprobs(model, ids, targets, layer=2, backend=backend).logprobs
    positions = torch.arange(11, device=ids.device).repeat(2)[None]
    packed = policy_logprobs(model, ids.view(1, -1), targets.view(1, -1), position_ids=positions, layer=2, backend=backend).logprobs
    assert (packed.view(2, 11) - apart).abs().max() <= 2 * policy_error(model.config, 22, LARGEST)
    assert (apart[:, -1] == 0).all()
    assert (apart[:, :-1] < 0).all()
    with pytest.raises(ValueError, match="position_ids: given with attention_mask"):
        policy_logprobs(model, ids, targets, position_ids=positions, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("arch", [80, 90], ids=["pointers", "TMA"])
def test_T13_rows_past_two_to_the_31_elements_have_64_bit_offsets(monkeypatch, tmp_path, arch):
    pytest.importorskip("triton")
    if not config.interpreted():
        pytest.skip("a GPU has tests of this with real sizes")
    monkeypatch.setattr(triton_, "target_of", lambda device: config.Target("cuda", arch, 3))
    # In a sparse file there is nothing of this memory but the pages that are touched.
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2**32 + 128, dtype=torch.bfloat16)
    case = random_case(3, 3, 64, dtype=torch.bfloat16)
    hidden, weight = (memory.as_strided((3, 64), (2**31, 1), start) for start in (0, 64))
    hidden.copy_(case.hidden.detach())
    weight.copy_(case.weight.detach())
    far, near = (linear_logprobs(h, w, case.targets, backend="triton") for h, w in ((hidden, weight), (case.hidden, case.weight)))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


# ---- inside torch: autocast, compilation, sharding, shared weights


@with_cached
def test_T14_autocast_computes_what_the_cast_operands_give(backend):
    device = device_of(backend)
    case = random_case(12, 70, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = all_of(case, backend)
        found = gradients(inside.logprobs.sum(), case.hidden, case.weight)
    cast = linear_logprobs(case.hidden.bfloat16(), case.weight.bfloat16(), case.targets, backend=backend)
    assert all(statistic.dtype == torch.float32 for statistic in inside)
    assert all(torch.equal(a, b) for a, b in zip(inside, cast, strict=True))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for a, b in zip(found, gradients(cast.logprobs.sum(), case.hidden, case.weight), strict=True):
        assert torch.equal(a, b)


@with_cached
def test_T14_autocast_takes_mixed_operands(backend):
    device = device_of(backend)
    case = random_case(12, 70, 16, device=device)
    low = case.hidden.bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = linear_logprobs(low, case.weight, case.targets, backend=backend)
    same = linear_logprobs(low, case.weight.bfloat16(), case.targets, backend=backend)
    assert torch.equal(mixed.logprobs, same.logprobs)


@pytest.mark.parametrize("backend", first_of(["native", "torch", "triton", "triton:cached"]), indirect=True)
def test_T15_compiled_calls_of_any_length_are_eager_ones_bit_for_bit(backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def call(hidden, weight, targets):
        return linear_logprobs(hidden, weight, targets, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=graphs)
    counted = []
    for rows in (9, 5, 17, 130):
        case = random_case(rows, 61, 16, dtype=torch.bfloat16, device=device_of(backend))
        case.targets[::3] = -100
        runs = []
        for function in (compiled, call):
            out = function(case.hidden, case.weight, case.targets)
            runs.append([*out, *torch.autograd.grad(weighted(out, [1, 2, 3]), leaves(case))])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        assert runs[0][0].any()
        counted.append(graphs.frame_count)
    assert counted[1:] == counted[1:2] * 3  # no new graph after the second length


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_T16_a_sharded_weight_gets_a_sharded_gradient_inside_its_module_and_outside(one_process):
    case = random_case(9, 50, 16)
    head = FusedLMHead(16, 50, bias=False)
    plain = linear_logprobs(case.hidden, head.weight, case.targets).logprobs
    (want,) = gradients(plain.sum(), head.weight)
    fully_shard(head, mesh=dist.init_device_mesh("cpu", (1,)))
    assert isinstance(head.weight, DTensor)
    for call in (head, lambda hidden, targets: linear_logprobs(hidden, head.weight, targets)):
        head.weight.grad = None
        fused = call(case.hidden, case.targets).logprobs
        assert torch.equal(fused, plain)
        fused.sum().backward()
        assert isinstance(head.weight.grad, DTensor)
        assert torch.equal(head.weight.grad.to_local(), want)
        head.reshard()
    with pytest.raises(TypeError, match="hidden: a DTensor given, accepted is a plain Tensor"):
        linear_logprobs(head.weight, head.weight, case.targets)


def rank_of_two(folder: str) -> None:
    """Half of the rows, with a weight that is sharded: this rank's shard of the gradients of two ops."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    case = random_case(12, 50, 16)
    weight = distribute_tensor(case.weight.detach(), dist.init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    mine = slice(6 * rank, 6 * rank + 6)
    hidden, targets = case.hidden[mine], case.targets[mine]
    linear_logprobs(hidden, weight, targets).logprobs.sum().backward()
    shards = [weight.grad.to_local().clone()]
    weight.grad = None
    linear_policy_loss(hidden, weight, targets, torch.ones(6), denominator=12)[0].backward()
    torch.save([*shards, weight.grad.to_local()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_T16_ranks_with_rows_of_their_own_get_the_averaged_gradient_of_a_sharded_weight(tmp_path):
    on_ranks("test_reliability:rank_of_two", 2, str(tmp_path))
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    case = random_case(12, 50, 16)
    losses = (
        linear_logprobs(case.hidden, case.weight, case.targets).logprobs.sum(),
        linear_policy_loss(case.hidden, case.weight, case.targets, torch.ones(12))[0],
    )
    for op, loss in enumerate(losses):
        got = torch.cat([by_rank[rank][op] for rank in range(2)])
        want = gradients(loss, case.weight)[0] / 2
        assert (got - want).norm() <= 8 * CONTRACT * want.norm()


class LowRankLinear(nn.Linear):
    """As adapter libraries do it: a Linear whose product is not ``hidden @ weight.T``."""

    def forward(self, hidden):
        return super().forward(hidden) + hidden.sum(-1, keepdim=True)


def test_T18_a_head_that_is_more_than_its_weight_is_refused():
    with pytest.raises(TypeError, match=r"linear: LowRankLinear given, accepted is a plain nn.Linear"):
        FusedLMHead.adopt(LowRankLinear(4, 8))
    model, (ids, targets) = tiny_model(), token_batch()
    model.lm_head = LowRankLinear(32, 61, bias=False)
    with pytest.raises(TypeError, match=r"model: its head is a LowRankLinear, accepted are nn.Linear"):
        policy_logprobs(model, ids, targets, layer=2)


def test_T19_a_tied_weight_gets_one_gradient_of_both_uses(backend):
    device = device_of(backend)
    embedding, head = nn.Embedding(61, 16, device=device), FusedLMHead(16, 61, bias=False, device=device)
    head.weight = embedding.weight
    ids, targets = torch.randint(0, 61, (2, 12)).to(device)
    accumulated, called = [], []
    head.weight.register_post_accumulate_grad_hook(lambda _: accumulated.append(1))  # what DDP listens to
    head.register_forward_hook(lambda *_: called.append(1))
    head(embedding(ids).tanh(), targets, backend=backend).logprobs.sum().backward()
    exact = embedding.weight.detach().double().requires_grad_()
    (want,) = gradients(reference.linear_logprobs(exact[ids].tanh(), exact, targets)[0].sum(), exact)
    # tanh and its slope are fp32 here: an eps of theirs for each of at most 13 terms of an element.
    assert (head.weight.grad - want).norm() <= 13 * 8 * CONTRACT * want.norm()
    assert accumulated == called == [1]


# ---- repeatability


@with_cached
def test_T21_repeated_calls_agree_bit_for_bit(backend):
    case = random_case(31, 999, 40, dtype=torch.bfloat16, device=device_of(backend))
    runs = []
    for _ in range(2):
        out = all_of(case, backend, memory_budget=64 * 1024 if backend == "torch" else SOME_MIB)
        runs.append([*out, *gradients(out.logprobs.sum() + out.entropy.sum(), case.hidden, case.weight)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("strategy", ["triton", "triton:cached"])
def test_T21_a_row_does_not_depend_on_the_other_rows_nor_on_its_place(strategy):
    # Not promised by the torch backend: its library chooses other products for other heights.
    pytest.importorskip("triton")
    case = random_case(140, 600, 40, dtype=torch.bfloat16, device=device_of(strategy))
    case.targets[::7] = -100
    if config.interpreted():
        # Its products are numpy's, whose sums take another order at another place: small integers leave them no choice.
        case.hidden, case.weight = ((x.detach() * 4).round().requires_grad_() for x in (case.hidden, case.weight * 4))
        case.options = {"temperature": 16.0}
    whole = torch.stack(all_of(case, strategy))
    order = torch.randperm(140)
    for rows in (order, order[:1], order[:33], torch.arange(139, 140), torch.arange(60)):
        index = rows.to(case.hidden.device)
        some = linear_logprobs(case.hidden[index], case.weight, case.targets[index], backend=strategy, **case.options)
        assert torch.equal(torch.stack(some), whole[:, index])


# ---- devices and dispatch


class ForbidWaiting(TorchDispatchMode):
    """Raises where a value would have to come from the device."""

    WAITS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::unique_dim"})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.WAITS:
            raise RuntimeError(f"waits: {function._schema.name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", ["recompute", "cached"])
@pytest.mark.parametrize("options", [{}, {"temperature": "rows", "bias": True}], ids=["plain", "per row and bias"])
def test_T24_the_triton_forward_never_waits_for_a_value(strategy, options):
    pytest.importorskip("triton")
    device = device_of("triton")
    case = case_with(options, 23, 301, 48, dtype=torch.bfloat16, device=device)
    counts = torch.arange(23, device=device) % 3 != 0
    problem = Problem(23, 23, 301, 48, torch.bfloat16, torch.device(device), True, True, False, False, 256 * MIB)
    operands = Operands(
        case.hidden.detach().view(23, 48),
        case.weight.detach(),
        None if "bias" not in case.options else case.options["bias"].detach(),
        case.targets,
        Readout(case.options.get("temperature", 1.0), 1.0, None),
    )
    plan = dispatch.TRITON.plan(problem, strategy)
    with ForbidWaiting():
        statistics, _ = dispatch.TRITON.statistics(operands, counts, plan, True)
    assert ((statistics.m > -math.inf) == counts).all()
    with ForbidWaiting(), pytest.raises(RuntimeError, match="waits: aten::nonzero"):  # where waiting is no loss
        dispatch.TORCH.statistics(operands, counts, dispatch.TORCH.plan(problem, None), True)


WITHOUT_TRITON = """
import sys
{forbid}
import bupo_kernels, torch
assert "triton" not in sys.modules or sys.modules["triton"] is None
assert not torch.cuda.is_initialized()
hidden = torch.randn(5, 8, requires_grad=True)
operands = hidden, torch.randn(20, 8), torch.arange(5)
bupo_kernels.linear_logprobs(*operands).logprobs.sum().backward()
assert hidden.grad.any()
plan = bupo_kernels.explain(*operands)
assert plan.backend in ("native", "torch")
{check}
"""


@pytest.mark.parametrize(
    ("forbid", "check"),
    [
        ("sys.modules['triton'] = None", "assert plan.why_not['triton'] == 'triton: not installed'"),
        pytest.param("", "assert 'device: cpu given, accepted is cuda' in plan.why_not['triton']", marks=pytest.mark.broad),
    ],
    ids=["not installed", "installed"],
)
def test_T25_neither_triton_nor_cuda_is_needed_or_touched(forbid, check):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    script = WITHOUT_TRITON.format(forbid=forbid, check=check)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_T26_explain_says_why_each_other_backend_does_not_run():
    case = random_case(4, 20, 8)
    plan = explain(case.hidden, case.weight, case.targets)
    assert {plan.backend, *plan.why_not} == set(dispatch.BACKENDS)
    for name, reason in plan.why_not.items():
        assert reason
        assert f"not {name}: {reason}" in str(plan).splitlines()


def test_T26_a_backend_that_was_asked_for_is_never_replaced(monkeypatch):
    pytest.importorskip("triton")
    device = device_of("triton")
    case = random_case(4, 20, 8, dtype=torch.bfloat16, device=device, softcap=3.0)
    with pytest.raises(ValueError, match=r"backend: 'triton:cached' given, it cannot run this: softcap: given, accepted is none"):
        all_of(case, "triton:cached")
    case = random_case(4, 20, 8, device=device)
    with pytest.raises(ValueError, match=r"'triton:cached' given, it cannot run this: dtype: torch.float32 given"):
        all_of(case, "triton:cached")
    case = random_case(4, 20, 8, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"backend: 'triton' given, it cannot run this: dtype: torch.float64 given"):
        all_of(case, "triton")


def test_T26_a_downgrade_is_logged_once_with_its_cost(monkeypatch, caplog):
    monkeypatch.setattr(dispatch.TRITON, "why_not", lambda problem, strategy: None)
    monkeypatch.setattr(dispatch.TRITON, "why_not_default", lambda problem: "not today")
    monkeypatch.setattr(dispatch.NATIVE_CUDA, "why_not", lambda problem, strategy: "it rains")
    monkeypatch.setattr(library_products, "keeps_fp32_sums", lambda device: True)
    monkeypatch.setattr(dispatch.machine, "present", lambda device: None)  # whatever GPU runs the tests
    dispatch.log_once.cache_clear()
    problem = Problem(4, 4, 20, 4096, torch.bfloat16, torch.device("cuda"), True, True, False, False, MIB)
    with caplog.at_level(logging.WARNING, "bupo_kernels"):
        for _ in range(3):
            assert dispatch.choose(problem)[0] == "torch"
    dispatch.log_once.cache_clear()
    assert [record.message for record in caplog.records] == [
        "torch runs on cuda instead of triton (not today) and native (it rains); predicted at 0.40 of the rate of bare "
        "products on H100"
    ]


# ---- memory


EVERY_SIZE = product(
    [2 * MIB, None],
    [{}, {"softcap": 5.0}, {"mask": True}, {"upstream": True}],
    [(512, 20000, 64), (4096, 500, 16), (3, 50000, 200), (3000, 64, 1024)],
    [torch.float32, torch.bfloat16, torch.float64],
)


@pytest.mark.parametrize("case", covering([*EVERY_SIZE]), ids=str)
def test_T28_measured_memory_is_what_explain_states_and_within_the_budget(case):
    # Not of Triton: its interpreter allocates copies that a launch on a GPU does not make.
    budget, options, (rows, vocab, width), dtype = case
    case = random_case(rows, vocab, width, dtype=dtype)
    options = {**options, "memory_budget": budget}
    if options.get("mask"):
        options["mask"] = torch.arange(rows) % 8 != 0
    upstream = torch.ones(rows)
    if options.pop("upstream", False):
        upstream[::8] = 0
    plan = explain(case.hidden, case.weight, case.targets, **options)
    kept = []
    forward = peak_bytes(lambda: kept.append(linear_logprobs(case.hidden, case.weight, case.targets, **options)))
    loss = sum((statistic * upstream).sum() for statistic in kept[0])
    backward = peak_bytes(lambda: kept.append(gradients(loss, case.hidden, case.weight)))

    # Outputs (three statistics) and gradients come on top of working memory, and so do the row coordinates kept for backward.
    results = sum(statistic.nbytes for statistic in kept[0])
    operands = case.hidden.nbytes + case.weight.nbytes
    # What is stated is no guess either: of everything but the numbers of each row, of which not every call has all, two thirds.
    of_rows = 2 * (8 * 8 + 12 * 4) * rows
    assert 0.67 * (plan.tile_plan.memory.forward - of_rows) <= forward <= plan.tile_plan.memory.forward + results
    backward += sum(x.nbytes for x in plan.implementation.empty_cache(plan.problem, plan.tile_plan.cached_rows))
    assert backward <= plan.tile_plan.memory.backward + plan.tile_plan.memory.accumulator + operands
    assert backward >= 0.67 * (plan.tile_plan.memory.backward + plan.tile_plan.memory.accumulator)
    assert max(plan.tile_plan.memory.forward, plan.tile_plan.memory.backward) <= plan.problem.memory_budget


# ---- options


EVERY_BACKEND = [
    (backend, dtype, options)
    for backend in ("torch", "triton", "triton:cached")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for options in OPTIONS
    if backend != "triton:cached" or (dtype != torch.float32 and "softcap" not in OPTIONS[options])
]


@pytest.mark.parametrize("case", covering(EVERY_BACKEND), ids=str)
def test_T30_values_and_gradients_match_the_oracle_under_every_option(case):
    backend, dtype, options = case
    if backend != "torch":
        pytest.importorskip("triton")
    case = case_with(OPTIONS[options], 23, 301, 48, dtype=dtype, device=device_of(backend), scale=3.0)
    ours = all_of(case, backend, memory_budget=SMALL_BUDGET[backend] * 2)
    assert_values(ours, case)
    upstream = [torch.randn(23).to(case.hidden.device) for _ in FIELDS]
    got = gradients(weighted(ours, upstream), *leaves(case))
    assert_stored_gradients(got, case, upstream, backend)


@with_cached
@pytest.mark.parametrize("temperature", [1e-3, 1e3, "rows of both"], ids=str)
def test_T30_tiny_and_huge_temperatures_stay_within_the_contract(backend, temperature):
    if temperature == "rows of both":
        temperature = torch.tensor([1e-3, 1.0, 1e3, 0.3] * 3).to(device_of(backend))
    case = random_case(12, 301, 24, dtype=torch.bfloat16, device=device_of(backend), temperature=temperature)
    out = all_of(case, backend)
    assert_values(out, case)
    upstream = [torch.randn(12).to(case.hidden.device) for _ in FIELDS]
    assert_stored_gradients(gradients(weighted(out, upstream), *leaves(case)), case, upstream, backend)


def test_T30_a_temperature_changed_after_the_forward_is_noticed(backend):
    case = random_case(5, 20, 4, device=device_of(backend), temperature=torch.ones(5, device=device_of(backend)))
    out = all_of(case, backend)
    case.options["temperature"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs.sum().backward()


@pytest.mark.parametrize("lost", [0, 1, 2], ids=FIELDS)
def test_T32_tolerances_are_tight_enough_to_notice_what_others_let_pass(lost):
    # The error model must accept the op and refuse what a rounded logit gives, in values and in gradients.
    case = random_case(33, 301, 24, scale=20.0, dtype=torch.bfloat16)
    upstream = [None] * 3
    upstream[lost] = torch.ones(33)
    ours = all_of(case, "torch")
    assert_values(ours, case)
    assert_stored_gradients(gradients(weighted(ours, upstream), *leaves(case)), case, upstream, "torch")
    z = (case.hidden @ case.weight.T).float()
    log_p = z.log_softmax(1)
    chosen = log_p.gather(1, case.targets[:, None]).squeeze(1)
    rounded = type(ours)(chosen, -(log_p.exp() * log_p).sum(1), z.logsumexp(1))
    with pytest.raises(AssertionError):
        assert_values(rounded, case)
    with pytest.raises(AssertionError, match="over its bound"):
        assert_stored_gradients(gradients(weighted(rounded, upstream), *leaves(case)), case, upstream, "torch")


@with_cached
def test_T32_every_row_of_dH_points_where_the_oracles_does(backend):
    case = random_case(40, 301, 48, scale=3.0, dtype=torch.bfloat16, device=device_of(backend))
    (got,) = gradients(all_of(case, backend).logprobs.sum(), case.hidden)
    exact = case.hidden.detach().double().requires_grad_()
    (want,) = gradients(reference.linear_logprobs(exact, case.weight.detach(), case.targets)[0].sum(), exact)
    error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
    cosine = nn.functional.cosine_similarity(got.double(), want, dim=1)
    # Three roundings to bf16 at most; an error of norm ε turns a vector by at most asin ε.
    most = torch.finfo(torch.bfloat16).eps / 2 + 2 * roundoff(torch.bfloat16, backend)
    assert error.max() <= most
    assert cosine.min() >= math.sqrt(1 - most**2)


def test_numbers_are_in_order():
    found = [int(name[6:8]) for name in globals() if name.startswith("test_T")]
    assert all(a <= b for a, b in pairwise(found))
