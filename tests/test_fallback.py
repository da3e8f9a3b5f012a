"""The torch backend on a device whose library multiplies 16-bit operands into fp32: its numbers with such products mocked on the
CPU, its sequence of ops with torch's meta kernels."""

import pytest
import tensor_cores
import torch
from problems import (
    OPTIONS,
    assert_stored_gradients,
    assert_values,
    case_with,
    contract_of,
    leaves,
    random_case,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bupo_kernels import (
    LensStatistics,
    PolicyObjective,
    dispatch,
    linear_logprobs,
    linear_policy_loss,
    logit_lens,
    numerics,
)
from bupo_kernels.backends import base, gradients, machine
from bupo_kernels.backends.algebra import Coefficients
from bupo_kernels.backends.base import Operands, Problem, Readout
from bupo_kernels.backends.gradients import GradientSums

BF16, FP16 = torch.bfloat16, torch.float16
CUDA, META = torch.device("cuda", 0), torch.device("meta")


@pytest.fixture
def products(monkeypatch):
    return tensor_cores.mocked(monkeypatch)


def assert_16_bit_gradients(got, case, upstream) -> None:
    assert_stored_gradients(got, case, upstream, "triton")  # which stores dz in the dtype of the operands, as this does here


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("budget", [None, 60_000], ids=["whole", "slices and blocks of rows"])
def test_statistics_and_gradients_are_those_of_16_bit_products(products, dtype, options, budget):
    case = case_with(options, rows=70, vocab=300, width=24, dtype=dtype)
    out = linear_logprobs(case.hidden, case.weight, case.targets, backend="torch", memory_budget=budget, **case.options)
    assert_values(out, case)
    upstream = [torch.randn(70) for _ in range(3)]
    assert_16_bit_gradients(torch.autograd.grad(out, leaves(case), upstream), case, upstream)
    assert {of for of, *_ in products} == {dtype}
    if budget is None:
        n = int(case.options["mask"].sum()) if "mask" in case.options else 70
        assert [(a[0], b[1]) for _, a, b in products] == [(n, 300), (n, 300), (n, 24), (300, 24)]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_one_pass_loss_agrees_with_two_passes(products, dtype):
    case = random_case(50, 200, 16, dtype=dtype, scale=3.0)
    advantages = torch.randn(50)
    found = []
    for budget in (None, 50_000):
        loss, _ = linear_policy_loss(
            *(case.hidden, case.weight, case.targets, advantages),
            objective=PolicyObjective(ratio="none", clip=None),
            backend="torch",
            memory_budget=budget,
        )
        found.append(torch.autograd.grad(loss, leaves(case)))
    for got in found:
        assert_16_bit_gradients(got, case, (-advantages / 50, None, None))
    assert {of for of, *_ in products} == {dtype}


def test_the_lens_takes_them_too(products):
    states, weight = torch.randn(3, 9, 16).to(BF16), torch.randn(40, 16).to(BF16)
    found = logit_lens([*states], weight, torch.arange(9), outputs=("entropy", "rank", "kl_to_final"), final=states[-1])
    assert isinstance(found, LensStatistics)
    assert {of for of, *_ in products} == {BF16}


def test_fp32_operands_are_multiplied_as_before(products):
    case = random_case(5, 30, 8)
    linear_logprobs(case.hidden, case.weight, case.targets, backend="torch").logprobs.sum().backward()
    assert products == []


def test_which_devices_keep_fp32_sums(monkeypatch):
    keeps = gradients.keeps_fp32_sums.__wrapped__
    assert not keeps(torch.device("cpu"))
    assert not keeps(torch.device("mps"))
    asked, there = [], {"CUDA"}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: asked.append(name) or key in there)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert keeps(CUDA) is expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert keeps(CUDA)
    assert not keeps(torch.device("xpu"))
    there.add("XPU")
    assert keeps(torch.device("xpu"))
    assert set(asked) == {"aten::mm.dtype"}


class Recorder(TorchDispatchMode):
    """Keeps what is called with the dtypes and shapes of its tensors, and the most memory that lived at once."""

    def __init__(self):
        super().__init__()
        self.calls, self.living, self.peak = [], {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        self.calls.append((str(func), [x.dtype for x in tensors], [x.shape for x in tensors]))
        found = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(x.untyped_storage()).cdata for x in tensors}
        for x in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(x, torch.Tensor):
                storage = StorageWeakRef(x.untyped_storage())
                if storage.cdata not in given:
                    self.living[storage.cdata] = storage, x.untyped_storage().nbytes()
        self.living = {key: (storage, size) for key, (storage, size) in self.living.items() if not storage.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return found


def problem(device=CUDA, budget=2**30, **facts) -> Problem:
    shape = {"rows": 64, "active_rows": 64, "vocab": 512, "width": 32, "dtype": BF16, "device": device} | facts
    return Problem(**shape, grad_hidden=True, grad_weight=True, grad_bias=False, softcap=False, memory_budget=budget)


@pytest.mark.parametrize("budget", [2**30, 3 * 10**6, 10**6], ids=["whole", "in slices", "in tiles"])
def test_no_16_bit_operand_is_made_fp32_and_the_plan_knows_the_memory(monkeypatch, budget):
    """Every product is ``mm.dtype``, of bf16 operands, with dtypes and shapes that torch's own meta kernels accept."""
    monkeypatch.setattr(gradients, "keeps_fp32_sums", lambda device: True)
    n, vocab, width = 300, 3000, 64
    asked, meta = problem(META, budget, rows=n, active_rows=n, vocab=vocab, width=width), {"device": META}
    plan = dispatch.TORCH.plan(asked, None)
    assert (plan.tile.rows < n or plan.tile.columns < vocab) == (budget < 2**30)
    hidden, weight = torch.empty(n, width, dtype=BF16, **meta), torch.empty(vocab, width, dtype=BF16, **meta)
    rows, numbers = torch.empty(n, dtype=torch.int64, **meta), [torch.empty(n, **meta) for _ in range(4)]
    operands = Operands(hidden, weight, None, rows, Readout(0.7, 1.0, None))
    with Recorder() as forward:
        dispatch.TORCH.row_statistics(operands, rows, plan, with_entropy=True, keep=False)
    with Recorder() as backward:
        cache = dispatch.TORCH.empty_cache(asked, 0)
        tiles = dispatch.TORCH.gradient_tiles(operands, rows, Coefficients(*numbers, rows), plan, cache, None)
        sums = GradientSums(hidden, weight, None, needed=(True, True, False), dtype=torch.float32, parts=False)
        sums.add(tiles, rows, step=plan.tile.rows)
    results = 2 * (n + vocab) * width
    assert 0.3 * plan.memory.forward < forward.peak <= plan.memory.forward
    assert 0.3 * plan.memory.backward < backward.peak - results <= plan.memory.backward + plan.memory.accumulator

    calls = forward.calls + backward.calls
    made = [(name, dtypes) for name, dtypes, _ in calls if name.startswith(("aten.mm", "aten.addmm", "aten.bmm"))]
    assert len(made) >= 4
    for name, dtypes in made:
        assert name in ("aten.mm.dtype", "aten.mm.dtype_out")
        assert dtypes == [BF16, BF16]
    upcast = [shapes[0] for name, dtypes, shapes in calls if name == "aten._to_copy.default" and dtypes == [BF16]]
    assert [shape for shape in upcast if shape[-1] == width] == []


def test_the_plan_and_its_prediction_know_the_products(monkeypatch):
    def share(backend, asked):
        found, gpu = dispatch.predicted_share(backend, asked)
        assert gpu.name == "H100"
        return found

    monkeypatch.setattr(machine, "present", lambda device: None)  # whatever GPU runs the tests
    wide = {}
    for keeps in (True, False):
        monkeypatch.setattr(gradients, "keeps_fp32_sums", lambda device, keeps=keeps: keeps)
        asked = problem(rows=32768, active_rows=32768, vocab=151936, width=4096)
        plan = dispatch.TORCH.plan(asked, None)
        wide[keeps] = plan.memory, share(dispatch.TORCH, asked), dispatch.TORCH.gradient_dtype(asked)
        if keeps:
            assert 0.84 < share(dispatch.NATIVE_CUDA, asked) < 0.88
    assert (wide[True][2], wide[False][2]) == (BF16, torch.float32)
    assert 0.38 < wide[True][1] < 0.42  # gpu-audit.md: 145 ms against 58
    assert 0.06 < wide[False][1] < 0.08  # and 886
    assert dispatch.predicted_share(dispatch.TORCH, problem(device=torch.device("cpu"))) is None
    assert 0.86 < share(dispatch.TRITON, asked) < 0.89


def test_a_captured_graph_waits_for_nothing(monkeypatch):
    """Which rows count is not asked, and all are taken; the results are the same."""
    case = case_with({"mask": True}, rows=40, vocab=90, width=16, dtype=BF16)
    want = linear_logprobs(case.hidden, case.weight, case.targets, backend="torch", **case.options)
    monkeypatch.setattr(base, "is_captured", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("waits for the device"))
    found = linear_logprobs(case.hidden, case.weight, case.targets, backend="torch", **case.options)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * contract_of(case) * numerics.entropy_factor(90))
        assert (a[~case.options["mask"]] == 0).all()
