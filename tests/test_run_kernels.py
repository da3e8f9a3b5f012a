"""The kernels of a run are those that it was begun with, or it says so."""

import pytest
import torch

from bupo.distributed import World
from bupo.kernels import keep_to_kernels, kernels_in_use
from bupo_kernels.selfcheck import decision
from bupo_kernels.selfcheck.card import Card

CARD = Card("NVIDIA H100 80GB HBM3", "9.0", 132, "580.65 13000", "13.0", "2.11.0", "3.6.0", "abc")
PASSED = {"triton bfloat16": True, "native float32": False}
CHOSEN = {"card": CARD.key, "name": CARD.name, "passed": PASSED, "tiles": {}, "slower": {}}
CPU, GPU = World(0, 1, torch.device("cpu")), World(0, 1, torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch, tmp_path):
    monkeypatch.setenv("BUPO_CACHE", str(tmp_path))
    monkeypatch.setattr(Card, "of", staticmethod(lambda device: CARD))
    monkeypatch.setattr(decision, "_decided", {})
    monkeypatch.setattr(decision, "_tuned", {})


def test_a_run_that_goes_on_takes_what_it_was_begun_with(capsys):
    keep_to_kernels(CHOSEN, GPU)
    assert decision.decide(decision.Variant("triton", "bfloat16"), GPU.device).passed
    assert decision.why_not(decision.Variant("native", "float32"), GPU.device) == "the run was begun without it"
    assert kernels_in_use(GPU) == CHOSEN
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("chosen", "world", "line"),
    [
        (
            {**CHOSEN, "card": "x", "name": "NVIDIA A100"},
            GPU,
            "kernels were chosen on NVIDIA A100, and this is NVIDIA H100 80GB HBM3",
        ),
        (CHOSEN, CPU, "the run was begun on NVIDIA H100 80GB HBM3, and goes on on cpu"),
        (None, GPU, "the run was begun on a CPU, and goes on on cuda"),
    ],
)
def test_where_that_cannot_be_it_says_so(chosen, world, line, capsys):
    keep_to_kernels(chosen, world)
    assert capsys.readouterr().out.startswith(f"not the same bit for bit from here on: {line}")
    assert decision._decided == {}


def test_on_a_cpu_nothing_is_decided(capsys):
    assert kernels_in_use(CPU) is None
    keep_to_kernels(None, CPU)
    assert capsys.readouterr().out == ""
