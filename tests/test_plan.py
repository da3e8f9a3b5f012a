"""Plans: what explain states and prints, bad input is named, a budget that is too small is refused."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from problems import random_case

from bupo_kernels import dispatch, explain, linear_cross_entropy, linear_logprobs
from bupo_kernels.backends import compiled


def test_working_memory_does_not_grow_with_the_vocabulary():
    stated = [explain(torch.randn(256, 8), torch.randn(vocab, 8)).tile_plan.memory.forward for vocab in (4000, 64000)]
    assert stated[0] == stated[1]


def test_a_budget_too_small_for_any_tile_names_what_would_do():
    case = random_case(10, 50, 8)
    with pytest.raises(ValueError, match=r"memory_budget: 100 bytes given, accepted are at least \d+") as refused:
        linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=100)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert torch.isfinite(linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=least).logprobs).all()


@pytest.mark.skipif(not compiled.isas(), reason="no C++ build")
def test_auto_goes_to_torch_where_the_native_kernels_need_more_than_the_budget(monkeypatch):
    def needs_more(problem, strategy):
        problem.require_budget(problem.rows * 2**20)

    monkeypatch.setattr(dispatch.NATIVE_CPU, "plan", needs_more)
    case, budget = random_case(20, 50, 8), 10 * 2**20
    with pytest.raises(ValueError, match=f"memory_budget: {budget} bytes given") as refused:
        explain(case.hidden, case.weight, case.targets, backend="native", memory_budget=budget)
    plan = explain(case.hidden, case.weight, case.targets, memory_budget=budget)
    assert plan.backend == "torch"
    assert plan.why_not["native"] == str(refused.value)
    out = linear_logprobs(case.hidden, case.weight, case.targets, memory_budget=budget)
    out.logprobs.sum().backward()
    assert case.hidden.grad.isfinite().all()


@pytest.mark.parametrize(("gib", "expected"), [(0, 1), (8, 1), (24, 1.5), (80, 5), (141, 141 / 16)])
def test_the_default_budget_of_a_gpu_is_a_sixteenth_of_its_memory_and_a_gib_at_least(monkeypatch, gib, expected):
    monkeypatch.setattr(dispatch, "device_memory", lambda device: gib * 2**30)
    assert dispatch.default_memory_budget(torch.device("cuda", 1)) == expected * 2**30
    assert dispatch.default_memory_budget(torch.device("cpu")) == 2**28


def test_a_device_is_asked_for_its_memory_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or SimpleNamespace(total_memory=7))
    dispatch.device_memory.cache_clear()
    assert [dispatch.device_memory(torch.device("cuda", 3)) for _ in range(3)] == [7, 7, 7]
    assert asked == [torch.device("cuda", 3)]
    dispatch.device_memory.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.device_memory(torch.device("cuda", 3)) == dispatch.device_memory(torch.device("mps")) == 0
    dispatch.device_memory.cache_clear()


def test_the_default_budget_is_a_constant_of_a_traced_graph(monkeypatch):
    def no_compiler_traces_this(device):
        return int(time.get_clock_info("time").adjustable) * 0 + 2**36

    monkeypatch.setattr(dispatch, "device_memory", no_compiler_traces_this)
    device = torch.device("cuda", 0)
    compiled = torch.compile(lambda x: x + dispatch.default_memory_budget(device), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1, dtype=torch.int64)) == 2**32


def test_slice_borders_do_not_depend_on_the_number_of_rows():
    tiles = [explain(torch.randn(rows, 64), torch.randn(70000, 64)).tile_plan.tile for rows in (1, 100, 2000)]
    assert len({tile.columns for tile in tiles}) == 1


def test_explain_prints_problem_backend_cost_and_budget():
    case = random_case(512, 1000, 64)
    case.hidden.requires_grad_(False)
    text = str(explain(case.hidden, case.weight, case.targets.index_fill(0, torch.arange(12), -100), backend="torch"))
    assert "500 of 512 rows x 1000 columns x 64, float32 on cpu, no gradient for hidden" in text
    assert "backend   torch: recompute, tiles of 500 x 1000" in text
    assert f"forward   {2 * 500 * 1000 * 64 / 1e9:.3f} GFLOP" in text
    assert f"backward  {4 * 500 * 1000 * 64 / 1e9:.3f} GFLOP" in text
    assert "budget    256.00 MiB" in text


def test_explain_needs_no_targets_and_prints_what_its_docstring_shows():
    text = str(explain(torch.randn(512, 64), torch.randn(1000, 64, requires_grad=True), backend="torch"))
    for line in text.splitlines()[:3]:
        assert line in explain.__doc__
    with pytest.raises(TypeError, match="hidden: list given"):
        explain([1.0], torch.randn(3, 4))


H, W, Y = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([0, 5, 19])
BAD = {
    "hidden is a list": (TypeError, "hidden: list given", {"hidden": [1.0]}),
    "integer hidden": (TypeError, "hidden: torch.int64 given", {"hidden": torch.ones(3, 8, dtype=torch.int64)}),
    "no leading dimension": (ValueError, r"hidden: shape \(8,\) given", {"hidden": H[0], "targets": Y[0]}),
    "other width": (ValueError, r"weight: shape \(20, 7\) given, accepted is \[V, D\] with D = 8", {"weight": W[:, :7]}),
    "empty vocabulary": (ValueError, r"weight: shape \(0, 8\) given", {"weight": W[:0]}),
    "other dtype": (TypeError, "weight: torch.bfloat16 given, accepted is the dtype of hidden", {"weight": W.bfloat16()}),
    "targets of another shape": (ValueError, r"targets: shape \(2,\) given, accepted is \(3,\)", {"targets": Y[:2]}),
    "targets of another dtype": (TypeError, "targets: torch.int32 given", {"targets": Y.int()}),
    "mask of integers": (ValueError, "mask: torch.int64 of shape", {"mask": torch.ones(3, dtype=torch.int64)}),
    "mask of another shape": (ValueError, "mask: torch.bool of shape", {"mask": torch.ones(2, dtype=torch.bool)}),
    "bias of another size": (ValueError, r"bias: torch.float32 of shape \(19,\)", {"bias": torch.ones(19)}),
    "temperature 0": (ValueError, "temperature: 0 given, accepted are positive", {"temperature": 0}),
    "temperature of text": (TypeError, "temperature: str given", {"temperature": "warm"}),
    "temperature 0 on a row": (ValueError, "temperature: 0.0 given", {"temperature": torch.tensor([1.0, 0.0, 1.0])}),
    "infinite softcap": (ValueError, "softcap: inf given", {"softcap": float("inf")}),
    "logit scale NaN": (ValueError, "logit_scale: nan given, accepted are finite", {"logit_scale": float("nan")}),
    "logit scale with a gradient": (TypeError, "logit_scale: Tensor given", {"logit_scale": torch.ones(())}),
    "budget of text": (TypeError, "memory_budget: str given", {"memory_budget": "1GB"}),
    "temperature NaN": (ValueError, "temperature: nan given", {"temperature": float("nan")}),
    "temperature of another shape": (ValueError, r"temperature: torch.float32 of shape \(2,\)", {"temperature": torch.ones(2)}),
    "temperature with a gradient": (ValueError, "temperature: requires", {"temperature": torch.ones(3, requires_grad=True)}),
    "softcap below 0": (ValueError, "softcap: -1 given", {"softcap": -1}),
    "unknown backend": (ValueError, "backend: 'cuda' given, accepted are 'auto', 'triton', 'triton:rec", {"backend": "cuda"}),
    "budget of 0": (ValueError, "memory_budget: 0 given", {"memory_budget": 0}),
    "unknown option": (TypeError, "softmax", {"softmax": True}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument_what_was_given_and_what_is_accepted(error, message, change):
    arguments = {"hidden": H, "weight": W, "targets": Y, **change}
    for op in (linear_logprobs, linear_cross_entropy, explain):
        with pytest.raises(error, match=message):
            op(**arguments)


def test_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="reduction: 'avg' given, accepted are 'mean', 'sum', 'none'"):
        linear_cross_entropy(H, W, Y, reduction="avg")
