"""The examples run as they are. Those of peers run with the peers' tests: ``make test-trl``, ``make test-verl``."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.broad
def test_the_plain_loop_learns(capsys):
    rewards = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"](steps=30)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert "layer 2" in capsys.readouterr().out
