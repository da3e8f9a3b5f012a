"""The native backend as it runs on a GPU, its row kernels emulated (tests/emulation) and the library's products on the CPU."""

from types import SimpleNamespace

import emulation
import pytest
import tensor_cores
import torch
from problems import (
    OPTIONS,
    assert_same_gradients,
    assert_stored_gradients,
    assert_values,
    case_with,
    chain_error,
    contract,
    gradients,
    largest_logit,
    leaves,
    random_case,
)
from test_one_pass import DROPPED, clipped_loss

from bupo_kernels import PolicyObjective, dispatch, explain, linear_logprobs, linear_policy_loss
from bupo_kernels.backends import compiled
from bupo_kernels.backends.base import Problem
from bupo_kernels.dispatch import choose
from bupo_kernels.selfcheck import decision

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OBJECTIVES = {
    "ppo": PolicyObjective(),
    "dapo with a bonus": PolicyObjective(clip_high=0.28, entropy_coefficient=0.01),
    "cispo": PolicyObjective(clip="cispo"),
    "kl": PolicyObjective(kl="k3", kl_coefficient=0.1, dual_clip=3.0),
    "importance": PolicyObjective(importance="token"),
    "reinforce": PolicyObjective(ratio="none", clip=None),
}


@pytest.fixture(scope="module")
def emulated():
    if reason := emulation.why_not():
        pytest.skip(reason)
    return emulation.emulated_cuda()


@pytest.fixture
def on_gpu(emulated, monkeypatch):
    """backend="native" takes the ways of a GPU; for the launches that it made."""
    calls = []

    class Counted:
        def __getattr__(self, name):
            return lambda **arguments: calls.append(name) or getattr(emulated, name)(**arguments)

    tensor_cores.mocked(monkeypatch)
    monkeypatch.setattr(compiled, "cuda", Counted)
    monkeypatch.setattr(dispatch.NATIVE_CUDA, "why_not_default", lambda problem: None)
    monkeypatch.setitem(dispatch.BACKENDS, "native", lambda problem: dispatch.NATIVE_CUDA)
    return calls


@DTYPES
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("budget", [None, 60_000], ids=["whole", "slices and blocks of rows"])
def test_statistics_and_gradients(on_gpu, dtype, options, budget):
    case = case_with(options, 21, 300, 16, dtype=dtype)
    ours = linear_logprobs(case.hidden, case.weight, case.targets, backend="native", memory_budget=budget, **case.options)
    assert_values(ours, case)
    upstream = [torch.randn(21) for _ in range(3)]
    got = gradients(sum((g * x).sum() for g, x in zip(upstream, ours, strict=True)), *leaves(case))
    assert_stored_gradients(got, case, upstream, "native")
    assert set(on_gpu) == {"row_statistics", "row_gradient"}
    assert (len(on_gpu) > 2) == (budget is not None)


@DTYPES
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("budget", [None, 40_000], ids=["one chunk", "several chunks"])
def test_fused_policy_loss_is_that_of_the_torch_backend(on_gpu, dtype, objective, budget):
    case = case_with({"bias": True, "temperature": "rows", "mask": True}, 21, 300, 16, dtype=dtype)
    per_token = {
        "old_logprobs": torch.full((21,), -5.7) + 0.3 * torch.randn(21),
        "reference_logprobs": torch.full((21,), -5.7) + 0.3 * torch.randn(21),
        "sampler_logprobs": torch.full((21,), -5.7) + 0.3 * torch.randn(21),
    }
    arguments = case.hidden, case.weight, case.targets, torch.randn(21)
    results = []
    for backend in ("native", "torch"):
        loss, metrics = linear_policy_loss(
            *arguments, objective=objective, backend=backend, memory_budget=budget, **per_token, **case.options
        )
        results.append((loss, metrics, gradients(loss, *leaves(case))))
    (ours, of_ours, got), (theirs, of_theirs, want) = results
    bound = 8 * contract(largest_logit(case))  # of ratios and divergences, some times that of each log-prob
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    for name, ours_, theirs_ in zip(of_ours._fields, of_ours, of_theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=bound, atol=bound, msg=name)
    assert_same_gradients(got, want, case)
    assert set(on_gpu) == {"row_policy_loss"}
    assert (len(on_gpu) > 1) == (budget is not None)


def test_rows_that_a_clip_decides_leave_before_the_gradient_products(on_gpu):
    case = random_case(12, 90, 8)
    far = torch.full((12,), -40.0)
    far[3] = linear_logprobs(case.hidden, case.weight, case.targets).logprobs[3].detach()
    loss, _ = linear_policy_loss(case.hidden, case.weight, case.targets, torch.ones(12), old_logprobs=far, backend="native")
    (d_hidden,) = gradients(loss, case.hidden)
    assert d_hidden.abs().sum(1).nonzero().flatten().tolist() == [3]


@DTYPES
@pytest.mark.parametrize("dropped", DROPPED)
def test_the_rows_that_stay_have_their_gradients(on_gpu, dtype, dropped):
    case = random_case(70, 300, 16, dtype=dtype)
    leave = torch.zeros(70, dtype=torch.bool).index_fill(0, torch.arange(70)[DROPPED[dropped]], True)
    loss, upstream = clipped_loss(case, leave, "native")
    assert_stored_gradients(torch.autograd.grad(loss, leaves(case)), case, [upstream, None, None], "native")


def test_without_gradients_no_dz_is_written(on_gpu):
    case = random_case(5, 60, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, _ = linear_policy_loss(case.hidden, case.weight, case.targets, torch.ones(5), backend="native")
        theirs, _ = linear_policy_loss(case.hidden, case.weight, case.targets, torch.ones(5), backend="torch")
    torch.testing.assert_close(ours, theirs, atol=chain_error(5), rtol=0)  # ratios of 1: a mean of the advantages
    plan = explain(case.hidden.detach(), case.weight.detach(), backend="native", objective=PolicyObjective())
    assert plan.tile_plan.fused_rows
    assert plan.flops_forward == 2 * 5 * 60 * 8


def test_a_gpu_takes_them_where_they_were_built_and_proven(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiled, "cuda", lambda: object())
    problem = Problem(4, 4, 20, 8, torch.bfloat16, torch.device("cuda"), True, True, False, False, 2**20)
    assert dispatch.NATIVE_CUDA.why_not(problem, None) is None
    monkeypatch.setattr(decision, "why_not", lambda variant, device: f"{variant.name} is wrong here")
    assert choose(problem)[3]["native"] == "native bfloat16 is wrong here"
    assert choose(problem, "native")[0] == "native"
    with pytest.raises(ValueError, match="instruction set: avx2 given, accepted is none on cuda"):
        choose(problem, "native:avx2")
    monkeypatch.setattr(compiled, "cuda", lambda: None)
    assert dispatch.NATIVE_CUDA.why_not(problem, None) == "the CUDA kernels were not built; `bupo env` says why"


@pytest.mark.parametrize(
    ("built", "driver", "runs"),
    [
        ("13.0", 12060, False),  # a torch for CUDA 12.6 runs there
        ("13.1", 13000, True),  # minor versions go together
        ("12.4", 12000, True),
        ("12.4", 13000, True),
        ("13.0", 0, True),  # nobody knows
        ("?", 12060, True),
        ("", 12060, True),
    ],
)
def test_a_runtime_that_is_too_new_for_the_driver_is_a_reason_and_no_exception(monkeypatch, built, driver, runs):
    module = SimpleNamespace(cuda=object(), build_info=lambda: {"cuda_version": built})
    monkeypatch.setattr(compiled, "built", module)
    compiled._cuda_major.cache_clear()
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(decision, "why_not", lambda variant, device, widths="": None)
    monkeypatch.setattr(dispatch.TRITON, "why_not", lambda problem, strategy: "it rains")
    problem = Problem(4, 4, 20, 8, torch.bfloat16, torch.device("cuda"), True, True, False, False, 2**20)
    name, _, _, reasons = choose(problem)
    compiled._cuda_major.cache_clear()
    assert name == ("native" if runs else "torch")
    if not runs:
        assert reasons["native"] == (
            "the CUDA kernels were built with CUDA 13, which needs a driver for CUDA 13.0 or newer, and the one here is for 12.6; "
            "a newer driver would do, or building them with nvcc 12"
        )
