"""The numerics contract against an emulation of the accumulators that it is written for."""

import math
import re
from pathlib import Path

import pytest
import torch
from test_gpu import FLAT, PEAKED, large_case
from torch import Tensor

from bupo_kernels.numerics import BLOCK, CONTRACT, contract, truncation

ROOT = Path(__file__).parents[1]


def toward_zero(x: Tensor) -> Tensor:  # float64 -> fp32, as float64
    nearest = x.float()
    too_large = nearest.double().abs() > x.abs()
    return torch.where(too_large, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest).double()


def truncated_product(hidden: Tensor, weight: Tensor, block: int) -> Tensor:  # [n, D], [V, D] -> [n, V]
    """The product as a tensor core forms it: the sum of each block is exact, the accumulator loses what does not fit. (Alignment
    within a block, which loses more, is left out.)"""
    total = hidden.new_zeros(len(hidden), len(weight), dtype=torch.float64)
    for k in range(0, hidden.shape[1], block):
        total = toward_zero(total + hidden[:, k : k + block].double() @ weight[:, k : k + block].double().T)
    return total


def share_of_contract(width: int, scale: float, block: int, c: int) -> float:
    """The largest error of log-probs that come from truncated products, beside the contract with this ``c``."""
    case = large_case(48, 600, width, torch.bfloat16, "cpu", scale, ignored=False)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    exact = hidden.double() @ weight.double().T
    found, want = (
        z.log_softmax(1).gather(1, case.targets[:, None]).squeeze(1) for z in (truncated_product(hidden, weight, block), exact)
    )
    return ((found - want).abs() / contract(exact.abs().amax(1), width, truncation=c)).max().item()


@pytest.mark.parametrize("scale", [FLAT, PEAKED])
@pytest.mark.parametrize(("c", "block"), [(1, BLOCK), (2, BLOCK // 2)], ids=["Hopper", "Ampere"])
def test_a_truncating_accumulator_breaks_the_contract_of_a_cpu_and_keeps_that_of_its_gpu(c, block, scale):
    assert share_of_contract(4096, scale, block, 0) > 1
    for width in (512, 4096):
        assert share_of_contract(width, scale, block, c) < 0.6  # room for the statistics, and for alignment within a block


def test_rounding_to_nearest_keeps_the_contract_of_a_cpu():
    case = large_case(48, 600, 4096, torch.bfloat16, "cpu", PEAKED, ignored=False)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    exact = hidden.double() @ weight.double().T
    error = ((hidden.float() @ weight.float().T).double() - exact).abs().amax(1)
    assert (2 * error <= contract(exact.abs().amax(1))).all()


def test_the_contract_depends_on_the_hardware(monkeypatch):
    capability = {"value": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["value"])
    found = {}
    for value in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        capability["value"] = value
        found[value] = truncation(torch.device("cuda"))
    assert found == {(8, 0): 2, (8, 9): 2, (9, 0): 1, (10, 0): 1, (12, 0): 1}
    assert [truncation(torch.device(name)) for name in ("cpu", "xpu", "mps")] == [0, 2, 2]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert truncation(torch.device("cuda")) == 2


def test_the_contract_is_the_formula_that_the_readme_states():
    assert contract(9.0, 4096) == pytest.approx(CONTRACT * 10)
    assert contract(9.0, 4096, truncation=2) == pytest.approx((2e-6 + 2 * 4096 / 16 * 2**-24) * 10)
    assert contract(9.0, 4096, dtype=torch.float64, truncation=2) == pytest.approx(2e-6 * 2**-29 * 10)
    assert contract(torch.tensor([0.0, 1.0]), 16, truncation=1).tolist() == pytest.approx([2e-6 + 2**-24, 4e-6 + 2**-23])
    formula = re.compile(r"2e-6 \+ c · D/16 · 2⁻²⁴")
    for path in ("README.md", "bupo_kernels/functional.py"):
        assert formula.search((ROOT / path).read_text(encoding="utf-8")), path
    assert not math.isnan(CONTRACT)
