"""The boundary layer and the segments of curves that are known, and what is suggested."""

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bupo.analysis.boundary import SEGMENTS, describe, find_boundary, suggest


def found(means, noise=0.05, seed=0, resamples=2000):
    """Of means whose estimates have this standard error, layer by layer independently."""
    means = np.array(means, dtype=float)
    resampled = means + noise * np.random.default_rng(seed).standard_normal((resamples, len(means)))
    return find_boundary(means, *np.percentile(resampled, [2.5, 97.5], axis=0), resampled)


def summary_of(boundary, layers):
    return {"boundary": boundary, "layers": layers}


PAPER = [2.0, 3.0, 1.5, 1.0, 0.6, 0.4] + [0.0] * 20 + [-1.0, -2.0, -1.5, -3.0, -2.5, -2.0, -4.0, -6.0, -8.0, -9.0]


def test_the_papers_curve_of_qwen3_4b_gives_the_papers_segments():
    boundary = found(PAPER, noise=0.02, seed=3)
    assert boundary["segments"] == [
        {"name": "exploration", "first": 1, "last": 6},
        {"name": "integration", "first": 7, "last": 26},
        {"name": "convergence", "first": 27, "last": 36},
    ]
    assert boundary["signs"] == [1] * 6 + [0] * 20 + [-1] * 10
    assert boundary["exceptions"] == []
    assert boundary["layer"] == 6
    assert boundary["low"] == 6
    assert (boundary["delta_entropy"], boundary["tolerance"]) == (0.4, 0.01)
    assert boundary["delta_entropy_low"] == pytest.approx(0.4 - 1.96 * 0.02, abs=0.003)


def test_a_clear_boundary_is_sure_and_a_layer_at_the_border_is_half_sure():
    clear = found([1.0, 0.5, -1.0, -1.0])
    assert (clear["layer"], clear["confidence"], clear["shares"]) == (2, 1.0, {"2": 1.0})
    # Layer 3's interval begins just above 0: in half of the resamples it does not.
    border = found([1.0, 0.5, 1.97 * 0.05, -1.0])
    assert border["layer"] == 3
    assert 0.4 < border["confidence"] < 0.6
    assert (border["low"], border["high"]) == (2, 3)
    assert sum(border["shares"].values()) == pytest.approx(1)


def test_no_positive_layer_gives_none_and_says_so():
    boundary = found([-1.0, -0.5, 0.0, -2.0])
    assert boundary["layer"] is None
    assert boundary["confidence"] > 0.9
    assert "no layer" in describe(boundary)
    text = suggest(summary_of(boundary, 4))
    assert text.startswith("# No layer is suggested: no layer has a ΔH of its FFN that is positive")
    assert yaml.safe_load(text) is None


def test_one_response_gives_no_boundary():
    means = np.array([1.0, -1.0])
    nothing = np.full(2, np.nan)
    boundary = find_boundary(means, nothing, nothing, np.tile(means, (10, 1)))
    assert (boundary["layer"], boundary["segments"]) == (None, [])
    assert "one response" in suggest(summary_of(boundary, 2))


def test_a_difference_below_the_tolerance_is_integration_but_can_be_the_boundary():
    boundary = found([0.5, 0.005, -0.5], noise=0.0005)
    assert boundary["signs"] == [1, 0, -1]
    assert boundary["layer"] == 2
    assert "less than 0.01 nats" in suggest(summary_of(boundary, 3))


def test_single_layers_against_the_trend_are_exceptions():
    boundary = found([1, 1, -1, 1, 0, 0, 0, 1, 0, 0, -1, -1, 0, -1])
    assert [part["last"] for part in boundary["segments"]] == [2, 10, 14]
    assert boundary["exceptions"] == [3, 4, 8, 13]
    assert boundary["layer"] == 8


def test_empty_segments_are_left_out():
    assert [part["name"] for part in found([1, 1, -1])["segments"]] == ["exploration", "convergence"]
    assert found([0, 0, 0], noise=0.001)["segments"] == [{"name": "integration", "first": 1, "last": 3}]


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=12))
def test_segments_cover_all_layers_once_and_no_other_borders_agree_better(means):
    boundary = found(means, noise=0.001, resamples=50)
    signs, segments = np.array(boundary["signs"]), boundary["segments"]
    assert [layer for part in segments for layer in range(part["first"], part["last"] + 1)] == list(range(1, len(means) + 1))
    names = [part["name"] for part in segments]
    assert names == [name for name in SEGMENTS if name in names]

    def misfit(first, second):
        return sum((signs - np.repeat([1, 0, -1], [first, second - first, len(signs) - second])) ** 2)

    ends = {part["name"]: part["last"] for part in segments}
    first = ends.get("exploration", 0)
    ours = misfit(first, ends.get("integration", first))
    assert ours == min(misfit(a, b) for a in range(len(means) + 1) for b in range(a, len(means) + 1))


def test_the_suggestion_is_yaml_that_sets_the_layer_and_says_how_sure_it_is():
    boundary = found([1.0, 0.5, -1.0, -1.0])
    text = suggest(summary_of(boundary, 4))
    assert yaml.safe_load(text) == {"bupo": {"layer": 2}}
    assert "Boundary layer 2 of 4" in text
    assert "+0.5 nats, 95 % interval [+0.4" in text
    assert "100% of the bootstrap resamples" in text
    assert "boundary layer 2 (100% of resamples" in describe(boundary)


def test_the_last_layer_is_the_models_own_policy_and_not_suggested():
    text = suggest(summary_of(found([1.0, 0.5, 0.2]), 3))
    assert yaml.safe_load(text) is None
    assert "layer 3, the model's last" in text
    assert "plain GRPO" in text
