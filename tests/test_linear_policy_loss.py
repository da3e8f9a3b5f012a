"""linear_policy_loss against the float64 oracle: loss, gradients, metrics, exact savings, options."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    CONTRACT,
    assert_same_gradients,
    case_with,
    chain_error,
    covering,
    device_of,
    examples,
    first_of,
    gradients,
    largest_logit,
    products,
    random_case,
)
from torch.utils.flop_counter import FlopCounterMode

from bupo.measurement import peak_bytes
from bupo_kernels import FusedLMHead, PolicyObjective, engine, explain, linear_logprobs, linear_policy_loss, reference
from bupo_kernels.backends.gradients import in_place_order
from bupo_kernels.policy_losses import policy_metrics, policy_terms, token_weights, top_entropy_bound

OBJECTIVES = {
    "ppo": PolicyObjective(),
    "dapo": PolicyObjective(clip_high=0.28, dual_clip=3.0),
    "dr_grpo": PolicyObjective(aggregation="sequence-mean-token-sum-norm", max_length=16),
    "grpo with kl and entropy": PolicyObjective(
        aggregation="sequence-mean-token-mean", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.01
    ),
    "cispo": PolicyObjective(clip="cispo", clip_high=0.5),
    "sapo": PolicyObjective(clip="sapo", sapo_temperature_neg=1.5),
    "delta": PolicyObjective(clip=None, delta=2.0),
    "reinforce": PolicyObjective(ratio="none", clip=None, entropy_coefficient=0.02),
    "truncated importance": PolicyObjective(importance="token", importance_cap=1.5),
    "gspo": PolicyObjective(ratio="sequence", aggregation="sequence-mean-token-mean"),
    "sequence mask": PolicyObjective(importance="sequence", kl="k2", kl_coefficient=0.2),
    "gmpo": PolicyObjective(ratio="sequence", clip="gmpo", aggregation="sequence-mean-token-mean"),
    "luspo": PolicyObjective(ratio="sequence", aggregation="sequence-mean-token-sum"),
    "vespo": PolicyObjective(ratio="sequence", clip="vespo", importance="token"),
    "top entropy": PolicyObjective(top_entropy_quantile=0.2, kl="k3", kl_coefficient=0.1),
}


def batch_of(case, sequences: int, objective: PolicyObjective, spread: float = 0.3):
    """The case's rows as ``sequences`` of equal length, and what comes per row: log-probs near the policy's own."""
    rows, width = case.hidden.shape
    shape = (sequences, rows // sequences)
    exact = reference.linear_logprobs(case.hidden.detach(), case.weight.detach(), case.targets, **case.oracle_options)[0].detach()
    generator = torch.Generator().manual_seed(1)

    def near():
        return (
            (exact.cpu() + spread * torch.randn(rows, generator=generator, dtype=torch.float64)).view(shape).to(case.hidden.device)
        )

    advantages = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64).to(case.hidden.device)
    by_row = {"old_logprobs": near()}
    if objective.needs_reference:
        by_row["reference_logprobs"] = near()
    if objective.needs_sampler:
        by_row["sampler_logprobs"] = near()
    options = {k: v.view(shape) if isinstance(v, torch.Tensor) and k != "bias" else v for k, v in case.options.items()}
    return case.hidden.view(*shape, width), case.targets.view(shape), advantages, by_row, options


def oracle(hidden, weight, targets, advantages, by_row, options, objective, denominator=None):
    """Loss and metrics in float64; gradients by autograd through the dense log-probs and entropies."""
    logprob, entropy, _ = reference.linear_logprobs(hidden, weight, targets, **options)
    active = targets != -100
    if options.get("mask") is not None:
        active = active & options["mask"]
    if "sampler_logprobs" in by_row:
        active = active & by_row["sampler_logprobs"].isfinite()
    values = logprob.detach(), entropy.detach()
    advantages = advantages.expand(targets.shape)
    terms = policy_terms(objective, *values, advantages, mask=active, **by_row)
    weights = token_weights(active, objective.aggregation, denominator=denominator, max_length=objective.max_length)
    through = terms.d_logprob * (logprob - values[0]) + terms.d_entropy * (entropy - values[1])
    loss = (weights.double() * (terms.loss + through)).sum()
    if objective.kl_coefficient == 0 and not objective.needs_entropy and not objective.needs_sequence:
        active = active & (advantages != 0)
    metrics = policy_metrics(terms, *values, by_row.get("old_logprobs"), by_row.get("sampler_logprobs"), mask=active)
    return loss, metrics


def check(case, objective, sequences=3, backend="torch", budget=None):
    hidden, targets, advantages, by_row, options = batch_of(case, sequences, objective)
    leaves = [x for x in (case.hidden, case.weight, case.options.get("bias")) if x is not None and x.requires_grad]
    loss, metrics = linear_policy_loss(
        hidden, case.weight, targets, advantages, objective=objective, backend=backend, memory_budget=budget, **by_row, **options
    )
    want, known = oracle(hidden, case.weight, targets, advantages, by_row, options, objective)
    # An error of the contract's bound in a log-prob moves a term by at most a few times that, in proportion to its ratio.
    bound = CONTRACT * (1 + largest_logit(case))
    assert abs(loss - want) <= 20 * bound * (1 + abs(want))
    assert metrics.active_rows == known.active_rows
    for name, value, truth in zip(metrics._fields, metrics, known, strict=True):
        if not math.isnan(truth):
            assert abs(value - truth) <= 20 * bound * (1 + abs(truth)), name
    assert_same_gradients(gradients(loss, *leaves), gradients(want, *leaves), case)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "temperature": "rows", "logit_scale": 1.7, "softcap": 3.0, "mask": True}], ids=str
)
@pytest.mark.parametrize("budget", [None, 96 * 1024], ids=["all at once", "few rows at a time"])
def test_loss_metrics_and_gradients_match_the_oracle(objective, options, budget):
    check(case_with(options, 24, 301, 12, dtype=torch.float64), objective, budget=budget)


@pytest.mark.parametrize(
    ("objective", "backend"),
    covering([*itertools.product(OBJECTIVES, ("torch", "native", "triton"))], 1, unpacked=True),
    indirect=["backend"],
)
def test_fp32_on_every_backend_matches_the_oracle(objective, backend):
    check(random_case(24, 301, 12, device=device_of(backend)), OBJECTIVES[objective], backend=backend)


@pytest.mark.parametrize("clip", ["ppo", "gmpo"])
def test_packed_sequences_have_the_gradient_of_one_row_each(clip):
    objective, lengths = PolicyObjective(ratio="sequence", clip=clip), torch.tensor([3, 5, 1])
    real = torch.arange(5) < lengths[:, None]
    hidden, weight = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    targets, advantages = torch.randint(0, 50, (3, 5)), torch.randn(3, 1, dtype=torch.float64).expand(3, 5)
    old = -torch.rand(3, 5, dtype=torch.float64) - 3
    whole = linear_policy_loss(hidden, weight, targets, advantages, old_logprobs=old, objective=objective, mask=real)
    for shape in ((1, -1), (-1,)):
        row = [x[real].view(*shape, *x.shape[2:]) for x in (hidden, targets, advantages, old)]
        packed = linear_policy_loss(
            row[0], weight, row[1], row[2], old_logprobs=row[3], objective=objective, lengths=lengths, check=True
        )
        for ours, theirs in zip(packed[1], whole[1], strict=True):
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-10, nan_ok=True)
        (gradient,), (expected,) = (torch.autograd.grad(x[0], weight, retain_graph=True) for x in (packed, whole))
        assert torch.allclose(gradient, expected, rtol=1e-10)


def test_the_highest_entropies_by_their_bound_or_as_zero_advantages_are_one_gradient():
    case, objective = random_case(24, 301, 12, dtype=torch.float64), PolicyObjective(top_entropy_quantile=0.2)
    hidden, targets, advantages, by_row, options = batch_of(case, 3, objective)
    arguments = hidden, case.weight, targets
    entropy = linear_logprobs(*arguments, **options).entropy.detach()
    bound = top_entropy_bound(entropy, targets != -100, 0.2)
    alone = linear_policy_loss(*arguments, advantages, objective=objective, **by_row, **options)[0]
    in_parts = linear_policy_loss(*arguments, advantages, objective=objective, entropy_bound=bound, **by_row, **options)[0]
    chosen = advantages.expand(targets.shape) * (entropy >= bound)
    one_pass, metrics = linear_policy_loss(*arguments, chosen, objective=PolicyObjective(), **by_row, **options)
    assert metrics.active_rows == 5
    leaves = case.hidden, case.weight
    for other in (in_parts, one_pass):
        assert other.item() == pytest.approx(alone.item(), rel=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(other, leaves), torch.autograd.grad(alone, leaves, retain_graph=True), strict=True
        ):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("entropy_bound", {"entropy_bound": 1.0}, ValueError),
        ("lengths", {"lengths": [4, 4]}, TypeError),
        ("lengths", {"lengths": torch.tensor([4, 5])}, ValueError),
        ("lengths", {"lengths": torch.tensor([9, -1])}, ValueError),
        (
            "lengths",
            {"lengths": torch.tensor([4, 4]), "objective": PolicyObjective(aggregation="sequence-mean-token-mean")},
            ValueError,
        ),
    ],
    ids=str,
)
def test_what_a_packed_batch_does_not_take_is_named(name, changes, error):
    with pytest.raises(error, match=f"^{name}: "):
        linear_policy_loss(torch.zeros(8, 4), torch.zeros(9, 4), torch.zeros(8, dtype=torch.int64), torch.ones(8), **changes)


@given(
    sequences=st.integers(1, 4),
    length=st.integers(1, 9),
    vocab=st.integers(1, 300),
    width=st.integers(1, 30),
    objective=st.sampled_from(list(OBJECTIVES.values())),
    scale=st.sampled_from([0.0, 1.0, 10.0]),
    budget=st.sampled_from([64 * 1024, None]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_objective_matches_the_oracle(sequences, length, vocab, width, objective, scale, budget, seed):
    case = random_case(sequences * length, vocab, width, scale=scale, dtype=torch.float64, seed=seed)
    check(case, objective, sequences, budget=budget)


@given(offset=st.sampled_from([0.0, 1e-12, -1e-12, 1e-3, -1e-3]), bound=st.sampled_from([0.8, 1.2]), sign=st.sampled_from([-1, 1]))
def test_ratios_at_and_around_the_clip_borders_match_the_oracle(offset, bound, sign):
    case = random_case(6, 50, 8, dtype=torch.float64)
    exact = reference.linear_logprobs(case.hidden.detach(), case.weight.detach(), case.targets)[0]
    by_row = {"old_logprobs": exact - math.log(bound) - offset}
    advantages = torch.full((6,), float(sign), dtype=torch.float64)
    arguments = case.hidden, case.weight, case.targets, advantages
    loss, metrics = linear_policy_loss(*arguments, **by_row)
    decides = torch.tensor(sign * (bound - 1) * 1.0) > 0 and sign * offset > 0  # strictly beyond a bound that this sign has
    if offset:  # at the border itself either side may win by a rounding
        share = metrics.clipped_high if sign > 0 else metrics.clipped_low
        assert share == float(decides)
        assert (gradients(loss, case.hidden)[0] == 0).all() == bool(decides)


@examples(15)
@given(
    rows=st.integers(1, 150),
    vocab=st.integers(1, 700),
    width=st.sampled_from([5, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    budget=st.sampled_from([None, 700 * 1024]),
    entropy=st.sampled_from([0.0, 0.01]),
)
def test_in_16_bit_triton_does_in_one_pass_what_it_does_in_two_with_a_cache(rows, vocab, width, dtype, budget, entropy):
    pytest.importorskip("triton")
    device = device_of("triton")
    case = random_case(rows, vocab, width, dtype=dtype, device=device)
    objective = PolicyObjective(entropy_coefficient=entropy)
    hidden, targets, advantages, by_row, _ = batch_of(case, 1, objective)
    loss, _ = linear_policy_loss(
        hidden, case.weight, targets, advantages, objective=objective, backend="triton", memory_budget=budget, **by_row
    )
    out = linear_logprobs(hidden, case.weight, targets, backend="triton:cached")
    terms = policy_terms(objective, out.logprobs.detach(), out.entropy.detach(), advantages.expand(targets.shape), **by_row)
    weights = token_weights(targets >= 0, "token-mean", dtype=torch.float32)
    two_passes = (weights * terms.d_logprob * out.logprobs + weights * terms.d_entropy * out.entropy).sum()
    ours, theirs = (gradients(x, case.hidden, case.weight) for x in (loss, two_passes))
    whole = explain(hidden, case.weight, targets, objective=objective, backend="triton", memory_budget=budget)
    # Rows that a clip decides have others in their place.
    matter = engine.rows_that_matter(objective, targets >= 0, weights, advantages.expand(targets.shape)).flatten()
    kept = ((weights * terms.d_logprob != 0) | (weights * terms.d_entropy != 0)).flatten()[matter]
    in_order = torch.equal(in_place_order(kept), kept.nonzero().squeeze(1))
    if whole.tile_plan.chunk_rows >= rows and whole.tile_plan.tile.columns >= vocab and in_order:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    else:  # dW is summed in another order or over chunks, or dH over slices, each rounded as it is stored: an eps of each term
        for a, b in zip(ours, theirs, strict=True):
            assert (a.double() - b.double()).norm() <= 4 * torch.finfo(dtype).eps * b.double().norm()


# ---- exact savings


def products_of(arguments, **options):
    def call():
        loss, _ = linear_policy_loss(*arguments, **options)
        loss.backward()

    return sum(2 * m * k * n for m, k, n in products(call))


def test_one_pass_costs_three_products_and_explain_says_so():
    case = random_case(24, 300, 16)
    arguments = case.hidden, case.weight, case.targets, torch.randn(24)
    stated = explain(*arguments[:3], objective=PolicyObjective())
    assert products_of(arguments) == 3 * 2 * 24 * 300 * 16 == stated.flops_forward
    assert stated.flops_backward == 0
    assert ": one pass" in str(stated)
    assert explain(*arguments[:3], objective=OBJECTIVES["gspo"]).flops_backward == 2 * 2 * 24 * 300 * 16
    assert explain(*arguments[:3], objective=OBJECTIVES["gspo"], backend="torch").flops_backward == 3 * 2 * 24 * 300 * 16


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",)], ids=str)
def test_torchs_flop_counter_sees_the_products_of_every_row(frozen):
    case = random_case(24, 300, 16)
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    arguments = case.hidden, case.weight, case.targets
    for objective in (None, PolicyObjective()):
        with FlopCounterMode(display=False) as counter:
            if objective is None:
                linear_logprobs(*arguments).logprobs.sum().backward()
            else:
                linear_policy_loss(*arguments, torch.randn(24), objective=objective)[0].backward()
        plan = explain(*arguments, objective=objective)
        assert counter.get_total_flops() == plan.flops_forward + plan.flops_backward


def test_rows_of_zero_weight_cost_no_product():
    case = random_case(24, 300, 16)
    advantages = torch.ones(24)
    advantages[:8] = 0
    mask = torch.arange(24) < 20
    arguments = case.hidden, case.weight, case.targets, advantages
    assert products_of(arguments, mask=mask) == 3 * 2 * 12 * 300 * 16
    # An entropy bonus, or a penalty on KL, needs the rows without an advantage.
    assert products_of(arguments, mask=mask, objective=PolicyObjective(entropy_coefficient=0.1)) == 3 * 2 * 20 * 300 * 16
    _, metrics = linear_policy_loss(*arguments, mask=mask)
    assert metrics.active_rows == 12
    # They count in the denominator all the same.
    loss, _ = linear_policy_loss(*arguments, mask=mask)
    want, _ = oracle(
        case.hidden[None], case.weight, case.targets[None], advantages[None], {}, {"mask": mask[None]}, PolicyObjective()
    )
    assert abs(loss - want) <= chain_error(24)  # ratios of 1: a mean of advantages of at most 1


def test_clipped_rows_cost_no_gradient_product():
    case = random_case(24, 300, 16)
    exact = linear_logprobs(case.hidden, case.weight, case.targets).logprobs.detach()
    old = exact.clone()
    old[:6] -= 1.0  # a ratio of e, beyond the upper bound
    arguments = case.hidden, case.weight, case.targets, torch.ones(24)
    assert products_of(arguments, old_logprobs=old) == 2 * (24 + 2 * 18) * 300 * 16
    loss, metrics = linear_policy_loss(*arguments, old_logprobs=old)
    assert metrics.clipped_high == 0.25
    assert (gradients(loss, case.hidden)[0][:6] == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_operands_cost_no_gradient_product(frozen):
    case = random_case(24, 300, 16)
    getattr(case, frozen).requires_grad_(False)
    assert products_of((case.hidden, case.weight, case.targets, torch.randn(24))) == 2 * 2 * 24 * 300 * 16


def test_no_row_that_matters_gives_zero_and_zero_gradients():
    case = random_case(6, 30, 4)
    loss, metrics = linear_policy_loss(case.hidden, case.weight, case.targets, torch.zeros(6))
    assert loss == 0
    assert metrics.active_rows == 0
    assert all((g == 0).all() for g in gradients(loss, case.hidden, case.weight))


def test_without_gradients_only_the_loss_is_formed():
    case = random_case(24, 300, 16)
    with torch.no_grad():
        assert sum(2 * m * k * n for m, k, n in products(lambda: linear_policy_loss(*_plain(case)))) == 2 * 24 * 300 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 20000, 64), (3000, 500, 256)], ids=str)
@pytest.mark.parametrize("budget", [8 * 2**20, None], ids=str)
def test_measured_memory_is_what_explain_states_and_within_the_budget(dtype, shape, budget):
    rows, vocab, width = shape
    case = random_case(rows, vocab, width, dtype=dtype)
    plan = explain(case.hidden, case.weight, case.targets, objective=PolicyObjective(), memory_budget=budget)
    used = peak_bytes(lambda: linear_policy_loss(*_plain(case), memory_budget=budget))
    stated = plan.tile_plan.memory.forward + plan.tile_plan.memory.accumulator
    results = case.hidden.nbytes + case.weight.nbytes
    per_row = 40 * 8 * rows  # the loss terms of a row and its metrics, some forty numbers
    assert used <= stated + results + per_row
    assert used >= 0.6 * (stated + results)
    assert plan.tile_plan.memory.forward <= plan.problem.memory_budget


# ---- as part of a training step


def _plain(case):
    return case.hidden, case.weight, case.targets, torch.linspace(-1, 1, len(case.targets))


def test_an_upstream_factor_scales_the_gradients_and_backward_may_run_twice():
    case = random_case(12, 90, 8)
    loss, _ = linear_policy_loss(*_plain(case))
    once = gradients(loss, case.hidden, case.weight)
    kept = [g.clone() for g in once]
    once[1].mul_(5)  # what a caller does to a gradient is not seen by the next backward … or it is refused
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(loss, case.hidden, case.weight)
    loss, _ = linear_policy_loss(*_plain(case))
    for factor in (1, 3, 0.5):
        for a, b in zip(gradients(factor * loss, case.hidden, case.weight), kept, strict=True):
            assert torch.equal(a, factor * b)


def test_gradients_accumulate_over_backwards_and_micro_batches():
    case = random_case(12, 90, 8)
    hidden, weight, targets, advantages = _plain(case)
    whole, _ = linear_policy_loss(hidden, weight, targets, advantages)
    want = gradients(whole, weight)[0]
    for part in (slice(0, 5), slice(5, 12)):
        loss, _ = linear_policy_loss(hidden[part], weight, targets[part], advantages[part], denominator=12)
        loss.backward(retain_graph=True)
    assert (weight.grad - want).norm() <= 8 * CONTRACT * want.norm()
    loss.backward()
    loss_of_part = gradients(linear_policy_loss(hidden[5:], weight, targets[5:], advantages[5:], denominator=12)[0], weight)[0]
    assert (weight.grad - want - loss_of_part).norm() <= 8 * CONTRACT * want.norm()


def test_on_policy_is_a_ratio_of_one_with_its_gradient():
    case = random_case(12, 90, 8)
    loss, metrics = linear_policy_loss(*_plain(case))
    assert metrics.ratio_min == metrics.ratio_max == 1
    assert metrics.kl_old == 0
    advantages = _plain(case)[3]
    want = gradients(-(linear_logprobs(*_plain(case)[:3]).logprobs * advantages).mean(), case.hidden, case.weight)
    assert_same_gradients(gradients(loss, case.hidden, case.weight), want, case)


def test_a_non_finite_sampler_logprob_leaves_numerator_and_denominator():
    case = random_case(12, 90, 8)
    hidden, weight, targets, advantages = _plain(case)
    sampler = torch.full((12,), -4.0)
    sampler[3], sampler[7] = math.nan, -math.inf
    loss, metrics = linear_policy_loss(hidden, weight, targets, advantages, sampler_logprobs=sampler)
    kept = [i for i in range(12) if i not in (3, 7)]
    alone, _ = linear_policy_loss(hidden[kept], weight, targets[kept], advantages[kept])
    assert abs(loss - alone) <= chain_error(12)  # ratios of 1: a mean of advantages of at most 1
    assert metrics.active_rows == 10
    assert math.isfinite(metrics.sampler_gap)


def test_autocast_computes_what_the_cast_operands_give():
    case = random_case(12, 90, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = linear_policy_loss(*_plain(case))
    hidden, weight, *rest = _plain(case)
    assert torch.equal(inside, linear_policy_loss(hidden.bfloat16(), weight.bfloat16(), *rest)[0])
    assert all(g.dtype == torch.float32 for g in gradients(inside, case.hidden, case.weight))


@pytest.mark.parametrize("objective", first_of(["ppo", "gspo"]))
def test_compiled_calls_of_any_length_give_the_eager_gradients(objective):
    def step(hidden, weight, targets, advantages, old):
        return linear_policy_loss(hidden, weight, targets, advantages, old_logprobs=old, objective=OBJECTIVES[objective])[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 12):
        case = random_case(2 * length, 90, 8)
        hidden, targets, advantages, by_row, _ = batch_of(case, 2, OBJECTIVES[objective])
        arguments = hidden, case.weight, targets, advantages, by_row["old_logprobs"]
        ours, eager = compiled(*arguments), step(*arguments)
        assert torch.equal(ours, eager)
        # Not by `gradients`, which retains the graph: a compiled backward may run but once.
        found = (torch.autograd.grad(loss, (case.hidden, case.weight)) for loss in (ours, eager))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- bad input


def test_check_names_the_first_value_that_is_not_finite():
    case = random_case(6, 30, 4)
    hidden, weight, targets, advantages = _plain(case)
    for name, values in {
        "hidden": {"hidden": hidden.detach().index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(math.inf))},
        "weight": {"weight": weight.detach().index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(math.inf))},
        "advantages": {"advantages": advantages.index_fill(0, torch.tensor(4), math.inf)},
        "old_logprobs": {"old_logprobs": torch.zeros(6).index_fill(0, torch.tensor(4), math.inf)},
    }.items():
        arguments = {"hidden": hidden, "weight": weight, "targets": targets, "advantages": advantages, **values}
        with pytest.raises(ValueError, match=rf"{name}: inf at index \(4, ?1?\) given, accepted are finite numbers"):
            linear_policy_loss(**arguments, check=True)
        # Rows that do not count may hold anything.
        if name != "weight":
            linear_policy_loss(**arguments, check=True, mask=torch.arange(6) != 4)


ROWS = torch.zeros(6)
BAD = {
    "advantages of a list": (TypeError, "advantages: list given", {"advantages": [1.0]}),
    "advantages of another shape": (ValueError, r"advantages: torch.float32 of shape \(5,\)", {"advantages": torch.zeros(5)}),
    "old of another shape": (ValueError, r"old_logprobs: torch.float32 of shape \(6, 1\)", {"old_logprobs": torch.zeros(6, 1)}),
    "whole numbers": (ValueError, r"old_logprobs: torch.int64", {"old_logprobs": torch.zeros(6, dtype=torch.int64)}),
    "no objective": (TypeError, "objective: str given, accepted is a PolicyObjective", {"objective": "ppo"}),
    "no reference": (ValueError, "reference_logprobs: None given", {"objective": PolicyObjective(kl="k3", kl_coefficient=1.0)}),
    "no sampler": (ValueError, "sampler_logprobs: None given", {"objective": PolicyObjective(importance="token")}),
    "no sequences": (ValueError, r"hidden: shape \(6, 4\) given", {"objective": PolicyObjective(ratio="sequence")}),
    "target past the end": (ValueError, "targets: 30 given", {"targets": torch.full((6,), 30)}),
    "budget": (ValueError, r"memory_budget: 100 bytes given, accepted are at least \d+", {"memory_budget": 100}),
    "an option that is none": (TypeError, "return_entropy", {"return_entropy": True}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(error, message, change):
    case = random_case(6, 30, 4)
    arguments = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, "advantages": ROWS + 1, **change}
    with pytest.raises(error, match=message):
        linear_policy_loss(**arguments)


def test_an_objective_is_a_value():
    assert replace(PolicyObjective(), clip_high=0.28) == PolicyObjective(clip_high=0.28)


def test_the_head_takes_advantages_only_with_targets():
    head = FusedLMHead(4, 30)
    case = random_case(6, 30, 4)
    with pytest.raises(TypeError, match="advantages: given without targets"):
        head(case.hidden, advantages=ROWS)
    loss, _ = head(case.hidden, case.targets, ROWS + 1)
    assert torch.equal(loss, linear_policy_loss(case.hidden, head.weight, case.targets, ROWS + 1, bias=head.bias)[0])
