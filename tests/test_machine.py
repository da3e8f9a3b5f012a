"""The model of the machine: predicted times of plans for GPUs that are not there, and benchmarks/predicted.md."""

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks import predicted
from bupo_kernels import PolicyObjective, dispatch, explain
from bupo_kernels.backends import compiled, machine, native_rows, triton_
from bupo_kernels.backends.machine import GPUS, Shape
from bupo_kernels.backends.triton_ import config
from bupo_kernels.selfcheck.records import Record

BF16 = torch.bfloat16
NAMES = [gpu.name for gpu in GPUS]
SIZE = Shape(rows=32768, vocab=151936, width=4096, item=2)


def operands(rows=SIZE.rows, vocab=SIZE.vocab, width=SIZE.width, dtype=BF16, gradients=(True, True)):
    """Return operands of any size in no memory: what is planned for is not looked at."""
    hidden, weight = (torch.empty(1, 1, dtype=dtype).expand(n, width) for n in (rows, vocab))
    return hidden.detach().requires_grad_(gradients[0]), weight.detach().requires_grad_(gradients[1])


@pytest.fixture
def bare(monkeypatch):
    """A machine without a GPU, Triton or CUDA kernels."""
    monkeypatch.setattr(triton_, "_installed", lambda: False)
    monkeypatch.setattr(compiled, "cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", [None, PolicyObjective()], ids=["two passes", "one pass"])
def test_a_plan_for_a_gpu_that_is_not_there_predicts_times_and_says_so(bare, name, objective):
    plan = explain(*operands(), device=name, objective=objective)
    gpu, found = machine.named(name), plan.prediction
    assert plan.backend == "triton"
    assert f"bfloat16 on {name}" in str(plan)
    for what in ("time", "naive", "floor"):
        (line,) = re.findall(rf"^{what} +\d+\.\d\d ms forward, \d+\.\d\d with the backward.*$", str(plan), re.MULTILINE)
        assert line.endswith("not measured" if what == "time" else "predicted")
    assert (f"which {name} has not" in str(plan)) == (found.naive_bytes > gpu.memory)
    # The floor is 2·N·V·D FLOP for each of three products; everything else comes on top.
    assert found.floor.total == pytest.approx(3 * 2 * math.prod(SIZE[:3]) / gpu.sustained)
    assert found.floor.total < min(found.naive.total, found.ours.total)
    assert (found.ours.backward == 0) == (objective is not None)


def test_a_gpu_without_rates_is_refused_with_the_names_of_those_that_have_them():
    with pytest.raises(ValueError, match=r"device: 'H1000' given, accepted are H100, H200, B200, A100, L40S, RTX 4090, RTX 5090"):
        explain(*operands(2, 10, 8), device="H1000")


def test_a_plan_has_the_tiles_of_the_gpu_that_it_is_for(bare):
    for gpu in GPUS:
        proven = config.Target("cuda", gpu.arch, gpu.processors, triton=(3, 6), proven=("bfloat16",))
        tile = config.statistics_config(BF16, proven, width=4096, softcap=False)
        assert explain(*operands(gradients=(False, False)), device=gpu.name).tile_plan.kernels[0].startswith(f"statistics {tile}")
    kernels = {explain(*operands(), device=name).tile_plan.kernels for name in ("H100", "B200", "RTX 4090")}
    assert len(kernels) == 3
    assert all("weight read in place" in kernels_of_one[-1] for kernels_of_one in kernels)


def test_every_backend_can_be_planned_for(bare):
    for backend in ("triton:recompute", "triton:cached", "native", "torch"):
        plan = explain(*operands(), device="A100", backend=backend, memory_budget=2**33)
        assert plan.prediction.ours.total > plan.prediction.floor.total, backend
    assert native_rows.why_not_native(dataclasses.replace(plan.problem, gpu=None), None).startswith(
        "the CUDA kernels were not built"
    )


def test_what_nobody_has_counted_is_not_predicted():
    text = str(explain(*operands(dtype=torch.float32), device="A100"))
    assert "time      of these kernels is not predicted" in text
    assert "floor" in text
    assert "not predicted" in str(explain(*operands(), softcap=30.0, device="A100"))


def test_a_cpu_has_no_predicted_times():
    plan = explain(torch.zeros(3, 4), torch.zeros(5, 4))
    assert plan.prediction is None
    assert "floor" not in str(plan)


def test_a_frozen_operand_saves_its_product(bare):
    both, frozen = (
        explain(*operands(gradients=(True, needed)), device="H100", backend="triton:recompute", memory_budget=2**34)
        for needed in (True, False)
    )
    one = machine.product(machine.named("H100"), SIZE)
    sums = machine.moved(machine.named("H100"), sum(both.tile_plan.bytes_of_sums) - sum(frozen.tile_plan.bytes_of_sums))
    assert both.prediction.floor.total - frozen.prediction.floor.total == pytest.approx(one)
    assert both.prediction.ours.total - frozen.prediction.ours.total == pytest.approx(one + sums)


def test_e_in_memory_saves_the_product_of_the_backward(bare):
    again, kept = (
        explain(*operands(), device="H100", backend=f"triton:{strategy}", memory_budget=2**36).prediction.ours
        for strategy in ("recompute", "cached")
    )
    assert again.total - kept.total > 0.5 * machine.product(machine.named("H100"), SIZE)


@pytest.mark.parametrize("gpu", GPUS, ids=NAMES)
def test_the_rates_of_a_gpu_agree_with_each_other(gpu):
    """Its peak is a whole number of FLOP, a power of two, for each multiprocessor and cycle."""
    per_clock = gpu.flops_per_clock
    assert per_clock == pytest.approx(2 ** round(math.log2(per_clock)), rel=0.02)
    assert 0.5 * gpu.clock < gpu.sustained_clock < gpu.clock
    assert gpu.fp32 == pytest.approx(gpu.processors * 256 * gpu.clock, rel=0.1) or gpu.arch == 80  # which has half the lanes


def fused(gpu, **changed):
    tile = {"tile": (128, 256), "warps": 8, "blocks": 1, "instructions": 10.0, "main_loop": 0.92}
    return machine.fused_product(gpu, SIZE, **(tile | changed))


def test_a_fused_product_waits_for_what_is_between_its_products():
    gpu = machine.named("H100")
    tiles, item = SIZE.logits / (128 * 256) / gpu.processors, 1 / gpu.sustained_clock
    loop = 16 * SIZE.width / 0.92  # cycles of 2 · 128 · 256 · D FLOP at 4096 a cycle
    assert fused(gpu) == pytest.approx(tiles * item * (loop + 10 * 128 * 8 / 4 + machine.FILL_CYCLES), rel=0.02)
    assert fused(gpu, instructions=20.0) - fused(gpu) == pytest.approx(tiles * item * 10 * 128 * 2, rel=0.02)
    # Of two blocks one has products while the other has none, and tensor cores never wait.
    assert fused(gpu, blocks=2) == pytest.approx(tiles * item * loop, rel=0.02)


def test_small_tiles_are_bound_by_their_operands():
    """A tile of 64 x 64 asks L2 for 128 bytes a cycle and multiprocessor at full rate, and there are 39 at boost clock."""
    gpu = machine.named("H100")
    pulled = (64 + 64) * SIZE.width * 2 * SIZE.logits / (64 * 64)
    bound = pulled / (gpu.l2_bytes_per_clock * gpu.clock)
    assert fused(gpu, tile=(64, 64), blocks=4) == pytest.approx(bound, rel=0.01)
    assert bound > 1.5 * machine.product(gpu, SIZE)


def test_a_smaller_budget_costs_passes_over_the_sums(bare):
    options = {"device": "A100", "backend": "triton:recompute"}
    small, large = (explain(*operands(), **options, memory_budget=budget) for budget in (2**28, 2**34))
    more = sum(small.tile_plan.bytes_of_sums) - sum(large.tile_plan.bytes_of_sums)
    assert more > 0
    difference = small.prediction.ours.total - large.prediction.ours.total
    assert difference == pytest.approx(machine.moved(machine.named("A100"), more))


def test_the_default_budget_is_that_of_the_gpu_planned_for(bare):
    budgets = {name: explain(*operands(), device=name).problem.memory_budget for name in NAMES}
    assert budgets == {gpu.name: max(gpu.memory // 16, 2**30) for gpu in GPUS}
    assert explain(*operands(), device="H100", memory_budget=2**31).problem.memory_budget == 2**31


def properties_of(gpu, processors=None):
    return SimpleNamespace(name=gpu.model, multi_processor_count=processors or gpu.processors)


@pytest.fixture
def there(monkeypatch):
    """An H100 that is there, as far as plans look."""
    gpu = machine.named("H100")
    machine.present.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties_of(gpu))
    yield gpu
    machine.present.cache_clear()


def test_the_gpu_that_is_there_is_known_by_its_name_and_size(there, monkeypatch):
    cuda = torch.device("cuda", 0)
    assert machine.present(cuda) == there
    assert machine.present(torch.device("cpu")) is None
    for other in (properties_of(there, processors=16), SimpleNamespace(name="NVIDIA H100 PCIe", multi_processor_count=114)):
        machine.present.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, other=other: other)
        assert machine.present(cuda) is None


def test_what_bupo_tune_has_measured_replaces_the_prediction(there, monkeypatch):
    target = config.Target("cuda", there.arch, there.processors)
    problem = dataclasses.replace(predicted.problem(there, 4096, gradients=True), gpu=None)
    monkeypatch.setattr(triton_, "target_of", lambda device: target)
    monkeypatch.setattr(dispatch, "choose", lambda problem, backend: ("triton", dispatch.TRITON, "recompute", {}))
    flags = {"softcap": False, "cache": False}
    keys = [config.key_of(kernel, BF16, width=4096, **flags) for kernel in (config.STATISTICS, config.GRADIENT)]
    texts, times = [], []
    for rates in ({}, {keys[0]: 500e12}, dict.fromkeys(keys, 500e12)):
        monkeypatch.setattr(triton_.decision, "tuned", lambda device, rates=rates: Record(rates=rates))
        plan = dispatch.make_plan(problem)
        texts.append(str(plan))
        times.append(plan.prediction.ours)
    assert ["measured them" in text for text in texts] == [False, True, True]
    assert ["not measured" in text for text in texts] == [True, False, False]
    measured = 2 * math.prod(SIZE[:3]) / 500e12
    assert [time.forward for time in times[1:]] == pytest.approx([measured, measured])
    assert times[1].backward == times[0].backward
    # The product of dz itself; those with it are predicted still, with what it takes to sum dH.
    of_dz = machine.gradients_of_dz(there, SIZE, 2, sum(plan.tile_plan.bytes_of_sums))
    assert times[2].backward == pytest.approx(measured + of_dz)


def test_predicted_md_is_what_the_model_says(capsys):
    assert predicted.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_of_other_numbers_is_out_of_date(tmp_path, capsys):
    path = tmp_path / "predicted.md"
    assert predicted.main(["--out", str(path)]) == 0
    path.write_text(path.read_text(encoding="utf-8").replace("not measured |", "0.1 / 0.2 / 0.1 |", 1), encoding="utf-8")
    assert predicted.main(["--out", str(path), "--check"]) == 1
    assert "is out of date, run python -m benchmarks.predicted" in capsys.readouterr().err


def test_what_was_measured_stands_beside_its_prediction():
    def row(who, ms, **other):
        size = {"rows": SIZE.rows, "vocab": SIZE.vocab, "width": SIZE.width, "dtype": "bfloat16"}
        return {"group": "forward", **size, "who": who, "ms": ms, **other}

    rows = [row("ours", 70.0), row("ours", 66.0), row("naive", 90.0), row("floor", 58.0), row("ours", 30.0, active=0.5)]
    rows += [row("ours", 1.0, group="lens"), row("ours", 2.0, rows=7), row("ours", 3.0, reason="no memory")]
    results = {"nvidia-h100": {"kernels": {"machine": {"device": machine.named("H100").model}, "rows": rows}}}
    assert predicted.measured(results, machine.named("H100"), 4096, "forward") == "66.0 / 90.0 / 58.0"
    assert predicted.measured(results, machine.named("H200"), 4096, "forward") == "not measured"
    assert predicted.measured(results, machine.named("H100"), 1024, "forward") == "not measured"
