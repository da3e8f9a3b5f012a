"""The examples run as they are. Those of peers run with the peers' tests: ``make test-trl``, ``make test-verl``."""

import runpy
from pathlib import Path

import pytest
from ranks import on_ranks

import bupo_kernels

EXAMPLES = Path(__file__).parent.parent / "examples"
RESULTS = {
    "LensStatistics",
    "LinearDivergence",
    "LinearLogprobs",
    "Plan",
    "PolicyMetrics",
    "SelfDistillation",
}  # what the functions return


def test_every_public_function_has_an_example():
    assert {path.stem for path in (EXAMPLES / "api").glob("*.py")} == set(bupo_kernels.__all__) - RESULTS


@pytest.mark.parametrize("path", sorted((EXAMPLES / "api").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_of_the_reference_runs(path):
    runpy.run_path(str(path), run_name="__main__")


def run_vocab_parallel() -> None:
    losses = runpy.run_path(str(EXAMPLES / "vocab_parallel.py"))["main"]()
    assert losses[-1] < losses[0] / 10


def test_a_head_on_two_ranks_learns():
    printed, _ = on_ranks("test_examples:run_vocab_parallel", 2)
    assert "501 of 1001 are here" in printed


@pytest.mark.broad
def test_the_plain_loop_learns(capsys):
    rewards = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"](steps=30)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert "layer 2" in capsys.readouterr().out
