"""Advantages against formulas written out in Python floats, with failed samples."""

import math
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bupo.advantages import ESTIMATORS, estimate_advantages

NAN = math.nan
GROUPED = ("grpo", "rloo", "reinforce++-baseline")


def oracle(rewards, estimator, divide_by_std=True):
    """The docstring's table, one response at a time."""
    epsilon = 1e-6
    groups = [[r for r in group if not math.isnan(r)] for group in rewards]
    everything = [r for group in groups for r in group]
    against_group = [r - mean(group) for group in groups if len(group) > 1 for r in group]

    def advantage(reward, group):
        if math.isnan(reward) or len(everything if estimator == "reinforce++" else group) < 2:
            return 0.0
        if estimator == "rloo":
            return reward - (sum(group) - reward) / (len(group) - 1)
        if estimator == "reinforce++":
            return (reward - mean(everything)) / (stdev(everything) + epsilon)
        if estimator == "reinforce++-baseline":
            # About 0, their mean, with the divisor of an unbiased estimate.
            spread = math.sqrt(sum(a * a for a in against_group) / (len(against_group) - 1))
            return (reward - mean(group)) / (spread + epsilon)
        return (reward - mean(group)) / (stdev(group) + epsilon if divide_by_std else 1.0)

    return [[advantage(reward, group) for reward in row] for row, group in zip(rewards, groups, strict=True)]


def matrices(values):
    return st.tuples(st.integers(1, 5), st.integers(2, 6)).flatmap(
        lambda shape: st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
    )


REWARDS = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 0.7]), st.integers(-40, 40).map(lambda i: i / 8), st.just(NAN))


@given(matrices(REWARDS), st.sampled_from(ESTIMATORS), st.booleans())
def test_advantages_are_those_of_the_formula(rewards, estimator, divide_by_std):
    found = estimate_advantages(torch.tensor(rewards, dtype=torch.float64), estimator, divide_by_std)
    expected = torch.tensor(oracle(rewards, estimator, divide_by_std), dtype=torch.float64)
    # Rewards that differ at all differ by 0.1 or more here, so EPSILON never blows a rounding up.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(matrices(REWARDS), st.sampled_from(ESTIMATORS))
def test_failed_samples_are_as_if_they_had_not_been(rewards, estimator):
    rewards = torch.tensor(rewards)
    advantages = estimate_advantages(rewards, estimator)
    assert advantages.isfinite().all()
    assert (advantages[rewards.isnan()] == 0).all()
    padded = torch.cat([rewards, torch.full_like(rewards[:, :1], NAN)], 1)
    assert torch.equal(estimate_advantages(padded, estimator)[:, :-1], advantages)


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 9), st.sampled_from(ESTIMATORS), st.booleans(), st.booleans())
def test_equal_rewards_have_advantages_of_exactly_zero(reward, size, estimator, divide_by_std, one_failed):
    rewards = torch.full((1, size), reward)
    if one_failed:
        rewards[0, size // 2] = NAN
    assert (estimate_advantages(rewards, estimator, divide_by_std) == 0).all()


@pytest.mark.parametrize("estimator", GROUPED)
def test_a_group_of_equal_rewards_is_exactly_zero_beside_others(estimator):
    advantages = estimate_advantages(torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 1.0]]), estimator)
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).all()


def test_without_a_group_baseline_easy_prompts_gain_and_hard_ones_lose():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    std = math.sqrt(4 * 0.25 / 3) + 1e-6
    expected = torch.tensor([[0.5, 0.5], [-0.5, -0.5]], dtype=torch.float64) / std
    torch.testing.assert_close(estimate_advantages(rewards, "reinforce++"), expected, rtol=1e-12, atol=0)


def test_known_values():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    grpo = estimate_advantages(rewards, "grpo")
    assert grpo[0].tolist() == pytest.approx([0.8660254, -0.8660254, -0.8660254, 0.8660254], rel=2e-6)
    assert estimate_advantages(rewards, "grpo", divide_by_std=False)[1].tolist() == [-1.0, -1.0, -1.0, 3.0]
    assert estimate_advantages(rewards, "rloo")[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert estimate_advantages(rewards, "rloo")[1].tolist() == pytest.approx([-4 / 3] * 3 + [4.0])


@pytest.mark.parametrize("estimator", GROUPED)
def test_a_sample_that_is_left_alone_has_no_advantage_and_no_vote(estimator):
    alone = [NAN, 9.0, NAN]
    others = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    with_it = estimate_advantages(torch.tensor([alone, *others]), estimator)
    assert (with_it[0] == 0).all()
    assert torch.equal(with_it[1:], estimate_advantages(torch.tensor(others), estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_failures_is_all_zeros_and_the_dtype_stays(estimator, dtype):
    advantages = estimate_advantages(torch.full((2, 3), NAN, dtype=dtype), estimator)
    assert advantages.dtype == dtype
    assert torch.equal(advantages, torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_rewards_given_are_left_as_they_are(estimator):
    rewards = torch.tensor([[1.0, NAN, 0.0]], dtype=torch.float64)
    estimate_advantages(rewards, estimator)
    assert str(rewards.tolist()) == "[[1.0, nan, 0.0]]"


def test_a_batch_of_single_samples_has_advantages_with_reinforce_plus_plus_alone():
    rewards = torch.tensor([[0.0], [1.0], [1.0]])
    assert estimate_advantages(rewards, "reinforce++").sum().abs() < 1e-6
    for estimator in GROUPED:
        with pytest.raises(ValueError, match=r"rewards: shape \(3, 1\) given, accepted is \[P, G\] with G at least 2"):
            estimate_advantages(rewards, estimator)


@pytest.mark.parametrize(
    ("rewards", "estimator", "message"),
    [
        (torch.zeros(2, 2), "ppo", "estimator: 'ppo' given, accepted are grpo, rloo"),
        (torch.zeros(4), "grpo", r"rewards: shape \(4,\) given"),
        (torch.zeros(4, 0), "reinforce++", "with G at least 1"),
        (torch.tensor([[1.0, math.inf]]), "grpo", "rewards: infinite ones given"),
    ],
)
def test_bad_arguments_are_named(rewards, estimator, message):
    with pytest.raises(ValueError, match=message):
        estimate_advantages(rewards, estimator)
