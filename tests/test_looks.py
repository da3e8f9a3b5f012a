"""Which steps and how much of them is looked at, from predicted costs alone."""

import pytest

from bupo.looks import plan_looks

LIMITS = {"share": 0.1, "most_samples": 100, "most_tokens": 256, "lens_every": 10}


def test_a_look_that_fits_into_a_step_is_taken_in_each():
    looks = plan_looks(900.0, 10.0, 1.0, **LIMITS)  # 100 of 1000 may be looks
    assert (looks.every, looks.samples, looks.samples_with_lens, looks.lens_tokens) == (1, 10, 5, 50)
    assert [step for step in range(1, 31) if looks.lens_due(step)] == [1, 10, 20, 30]
    assert looks.share == pytest.approx(0.1)
    assert str(looks) == (
        "every step on 10 samples per device; once in 10 on 5, and 50 tokens at all layers; at most 10.0% of a step without updates"
    )


def test_a_look_that_costs_more_waits_until_enough_steps_have_paid_for_it():
    looks = plan_looks(90.0, 25.0, 2.0, **LIMITS)  # 10 of 100
    assert [step for step in range(1, 10) if looks.due(step)] == [3, 6, 9]
    assert (looks.samples, looks.lens_tokens) == (1, 2)
    assert [step for step in range(1, 34) if looks.lens_due(step)] == [3, 12, 21, 30]  # the first, then once in ten steps
    assert not any(plan_looks(90.0, 25.0, 2.0, **LIMITS | {"lens_every": 0}).lens_due(step) for step in range(30))


def test_a_guard_has_its_look_in_every_step_and_a_share_of_one_bounds_nothing():
    looks = plan_looks(90.0, 25.0, 2.0, **LIMITS, each_step=True)
    assert (looks.every, looks.samples, looks.lens_tokens) == (1, 1, 0)
    assert looks.share > 0.1
    assert "no tokens" not in str(looks)
    everything = plan_looks(90.0, 25.0, 2.0, **LIMITS | {"share": 1})
    assert (everything.every, everything.samples, everything.lens_tokens) == (1, 100, 256)
    with pytest.raises(ValueError, match="share, most_samples: 0, 1 given"):
        plan_looks(1.0, 1.0, 1.0, **LIMITS | {"share": 0, "most_samples": 1})


def test_means_over_steps_are_those_of_the_steps():
    looks = plan_looks(90.0, 20.0, 1.0, **LIMITS)
    steps = [step for step in range(1, 3001) if looks.due(step)]
    samples = sum(looks.samples_with_lens if looks.lens_due(step) else looks.samples for step in steps)
    tokens = sum(looks.lens_tokens for step in steps if looks.lens_due(step))
    # The first look is one at all layers, whenever it is.
    assert samples / 3000 == pytest.approx(looks.samples_per_step, rel=0.01)
    assert tokens / 3000 == pytest.approx(looks.lens_tokens_per_step, rel=0.01)
