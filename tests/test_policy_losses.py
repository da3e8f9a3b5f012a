"""The clipped objective and the token weights: values, derivative, clip borders, denominators."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bupo_kernels.policy_losses import clipped_policy_loss, token_weights

log_ratios = st.floats(-3, 3)
advantages = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])


def loss_of(log_ratio: float, advantage: float, **clips):
    logprob = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    token = clipped_policy_loss(logprob, torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage]), **clips)
    (gradient,) = torch.autograd.grad(token.loss.sum(), logprob)
    return token, gradient.item()


@given(log_ratios, advantages, st.sampled_from([None, 3.0]))
def test_loss_is_the_clipped_surrogate_and_its_gradient_vanishes_exactly_where_a_clip_decides(log_ratio, advantage, dual_clip):
    token, gradient = loss_of(log_ratio, advantage, clip_low=0.2, clip_high=0.3, dual_clip=dual_clip)
    ratio = token.ratio.item()
    surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
    if dual_clip is not None and advantage < 0:
        surrogate = max(surrogate, dual_clip * advantage)
    assert token.loss.item() == pytest.approx(-surrogate)
    assert gradient == pytest.approx(0.0 if token.clipped else -advantage * ratio)
    assert token.clipped.item() == (
        (advantage > 0 and ratio > 1.3) or (advantage < 0 and (ratio < 0.8 or (dual_clip is not None and ratio > dual_clip)))
    )


def test_an_unmoved_policy_has_ratio_one_and_the_policy_gradient():
    token, gradient = loss_of(0.0, 1.5)
    assert (token.ratio.item(), token.loss.item(), gradient) == (1.0, -1.5, -1.5)


def test_a_runaway_ratio_stays_finite():
    for log_ratio in (1e4, -1e4):
        token, gradient = loss_of(log_ratio, -1.0)
        assert torch.isfinite(token.loss).all()
        assert gradient == 0


def test_old_logprobs_and_advantages_are_constants():
    logprobs, old, advantage = (torch.randn(5, requires_grad=True) for _ in range(3))
    clipped_policy_loss(logprobs, old, advantage).loss.sum().backward()
    assert old.grad is None
    assert advantage.grad is None


@pytest.mark.parametrize("clips", [{"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}], ids=str)
def test_impossible_clips_are_named(clips):
    (name,) = clips
    with pytest.raises(ValueError, match=f"{name}: .* given, accepted are"):
        clipped_policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), **clips)


masks = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6).map(torch.tensor)


@given(masks, st.sampled_from(["token-mean", "sequence-mean"]))
def test_weights_sum_to_one_and_are_zero_off_the_mask(mask, aggregation):
    weights = token_weights(mask, aggregation)
    assert weights.sum().item() == pytest.approx(1.0 if mask.any() else 0.0)
    assert (weights[~mask] == 0).all()


@given(masks)
def test_aggregations_are_the_means_they_are_named_after(mask):
    losses = torch.randn(mask.shape)
    sequences = [row[kept].mean() for row, kept in zip(losses, mask, strict=True) if kept.any()]
    tokens = losses[mask]
    for aggregation, expected in (
        ("token-mean", tokens.sum() / max(len(tokens), 1)),
        ("sequence-mean", sum(sequences) / max(len(sequences), 1)),
    ):
        assert (token_weights(mask, aggregation) * losses).sum().item() == pytest.approx(float(expected), abs=1e-6)


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="aggregation: 'mean' given, accepted are 'token-mean', 'sequence-mean'"):
        token_weights(torch.ones(1, 1, dtype=torch.bool), "mean")
