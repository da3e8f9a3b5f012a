"""Weights on meshes of several dimensions, and rows that are spread over ranks: gloo ranks against one process in float64."""

import pytest
import torch
import torch.distributed as dist
from problems import random_case
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from bupo.config import Hardware
from bupo.distributed import process_group
from bupo_kernels import PolicyObjective, linear_logprobs, linear_policy_loss, reference

ROWS = ((0, 5), (5, 5), (5, 6), (6, 13))  # of each rank; one has none
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # float64


@pytest.fixture(scope="module", autouse=True)
def _needs_gloo():
    if not dist.is_gloo_available():
        pytest.skip("torch has no gloo")


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight.detach())
    return linear


def sharded_by_fsdp(weight, mesh):
    linear = linear_of(weight)
    fully_shard(linear, mesh=mesh)
    return linear.weight


def sharded_by_fsdp_over_tp(weight, mesh):
    model = parallelize_module(nn.Sequential(linear_of(weight)), mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model[0].weight


def placed(*placements):
    return lambda weight, mesh: distribute_tensor(weight.detach(), mesh, placements).requires_grad_()


MESHES = {
    "HSDP": sharded_by_fsdp,
    "FSDP2 over tensor parallelism": sharded_by_fsdp_over_tp,
    "sharded over both": placed(Shard(0), Shard(0)),
    "sharded over vocabulary and width": placed(Shard(0), Shard(1)),
    "replicated": placed(Replicate(), Replicate()),
}


def rank_gathers() -> None:
    """Each rank has rows of its own: the gradient of a weight is the mean over all of them, wherever its parts lie."""
    with process_group(Hardware(device="cpu")) as world:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        case = random_case(13, 29, 6, dtype=torch.float64)
        mine = slice(*ROWS[world.rank])
        upstream = torch.randn(13, dtype=torch.float64)
        logprobs, entropy, _ = reference.linear_logprobs(case.hidden, case.weight, case.targets)
        want = torch.autograd.grad((upstream * (logprobs - 0.3 * entropy)).sum(), (case.hidden, case.weight))
        hidden = case.hidden.detach()[mine].requires_grad_()
        for name, make in MESHES.items():
            weight = make(case.weight, mesh)
            out = linear_logprobs(hidden, weight, case.targets[mine])
            loss = (upstream[mine] * (out.logprobs - 0.3 * out.entropy)).sum()
            of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
            assert (of_weight.placements, of_weight.device_mesh) == (weight.placements, weight.device_mesh), name
            for got, truth in (
                (out.logprobs, logprobs[mine]),
                (of_hidden, want[0][mine]),
                (of_weight.full_tensor(), want[1] / world.size),
            ):
                torch.testing.assert_close(got, truth, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        print("held")


def test_a_weight_is_gathered_over_every_dimension_of_its_mesh_and_its_gradient_averaged():
    assert [out.split()[-1] for out in on_ranks("test_meshes:rank_gathers", 4)] == ["held"] * 4
