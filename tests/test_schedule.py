"""Which policy a step optimises, what ends phase 1 early, and the learning rate."""

import pytest

from bupo.config import TrainConfig, parse_config
from bupo.schedule import FINAL, OptimisedPolicy, Schedule, learning_rate


def config_of(internal_steps: int = 4, steps: int = 10, guards: dict | None = None, **optimizer) -> TrainConfig:
    return parse_config(
        {
            "model": "m",
            "output_dir": "o",
            "data": {"train": "t", "heldout": "h"},
            "steps": steps,
            "bupo": {"layer": 3, "internal_steps": internal_steps, "module": "ffn", "guards": guards or {}},
            "optimizer": optimizer,
        }
    )


def test_the_internal_policy_comes_first_and_the_final_one_from_then_on():
    schedule = Schedule(config_of())
    internal = OptimisedPolicy(3, "ffn", False)
    assert [schedule.policy(step) for step in (1, 4, 5, 10)] == [internal, internal, FINAL, FINAL]
    assert (internal.phase, FINAL.phase) == ("ffn 3", "final")
    baseline = Schedule(TrainConfig(**{**config_of().model_dump(), "policy": "grpo"}))
    assert baseline.policy(1) == FINAL


def test_without_guards_nothing_ends_phase_one():
    schedule = Schedule(config_of())
    assert all(schedule.observe(step, -step, 100.0 * step, None) is None for step in range(1, 5))
    assert schedule.policy(4) != FINAL


@pytest.mark.parametrize(
    ("guards", "seen", "ends"),
    [
        ({"perplexity": 1.2}, [(0, 0, 1.1), (0, 0, 1.2), (0, 0, 1.21)], "perplexity 1.210 times the first model's, guard 1.2"),
        ({"kl": 2.0, "window": 2}, [(0, 1.0, None), (0, 2.9, None), (0, 1.2, None)], "KL 2.050 nats over 2 steps, guard 2.0"),
        (
            {"reward_drop": 0.1, "window": 2},
            [(0.5, 0, None), (0.7, 0, None), (0.3, 0, None)],
            "reward 0.500, 0.100 below its best, guard 0.1",
        ),
    ],
)
def test_a_guard_ends_phase_one_after_the_step_that_trips_it(guards, seen, ends):
    if "reward_drop" in guards:
        seen[-1] = (0.2999, 0, None)  # just over the bound
        ends = "reward 0.500, 0.100 below its best, guard 0.1"
    schedule = Schedule(config_of(guards=guards))
    reasons = [schedule.observe(step, *numbers) for step, numbers in enumerate(seen, 1)]
    assert reasons == [None, None, ends]
    assert schedule.policy(4) == FINAL


def test_steps_that_were_not_looked_at_are_no_steps_of_the_kl_guards_window():
    schedule = Schedule(config_of(guards={"kl": 2.0, "window": 2}))
    assert [schedule.observe(step, 0, kl, None, 7) for step, kl in enumerate((1.0, None, 2.5), 1)] == [None, None, None]
    assert schedule.observe(4, 0, 2.6, None, 7) == "KL 2.550 nats over 2 steps, the last on 7 response tokens, guard 2.0"


def test_a_phase_that_has_ended_has_ended_after_a_resume_too():
    schedule = Schedule(config_of(guards={"kl": 1.0}))
    schedule.observe(1, 0.5, 0.9, None)
    schedule.observe(2, 0.5, 9.9, None)
    resumed = Schedule(config_of(guards={"kl": 1.0}))
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.policy(3) == FINAL
    assert resumed.divergences == [0.9, 9.9]


def test_perplexity_is_needed_in_phase_one_and_where_it_is_guarded_only():
    assert not Schedule(config_of()).needs_perplexity(1)
    guarded = Schedule(config_of(guards={"perplexity": 1.5}))
    assert guarded.needs_perplexity(4)
    assert not guarded.needs_perplexity(5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_learning_rate_rises_and_falls_with_the_step_alone(schedule, expected):
    config = config_of(steps=6, warmup_steps=2, schedule=schedule, learning_rate=2.0)
    assert [learning_rate(step, config) / 2 for step in range(1, 7)] == pytest.approx(expected)
