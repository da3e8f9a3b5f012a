"""Weights on meshes of several dimensions, and rows that are spread over ranks: gloo ranks against one process in float64."""

import itertools
from functools import partial

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
from bupo_kernels import PolicyObjective, linear_cross_entropy, linear_divergence, linear_logprobs, linear_policy_loss, reference

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


def rank_stays_sharded() -> None:
    """Rows of its own for each rank of one dimension of the mesh, columns of its own along the other: both at once."""
    with process_group(Hardware(device="cpu")):
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        case = random_case(13, 29, 6, dtype=torch.float64)
        bias, advantages = torch.randn(29, dtype=torch.float64), torch.randn(13, dtype=torch.float64)
        leaves = case.hidden, case.weight, bias.requires_grad_()

        def loss_of(hidden, weight, rows, **options):
            objective = PolicyObjective(entropy_coefficient=0.1)
            return linear_policy_loss(hidden, weight, case.targets[rows], advantages[rows], objective=objective, **options)[0]

        want = torch.autograd.grad(loss_of(*leaves[:2], slice(None), bias=bias), leaves)
        mine = slice(0, 4) if mesh.get_local_rank("dp") == 0 else slice(4, 13)
        hidden = case.hidden.detach()[mine].requires_grad_()
        of_bias = placed(Replicate(), Shard(0))(bias, mesh)
        options = {"bias": of_bias, "row_group": mesh.get_group("dp"), "group": "tp"}
        for name, group, given in (
            ("replicated", "tp", r"a DTensor of Replicate\(\)"),
            ("sharded over vocabulary and width", "tp", r"a DTensor of Shard\(dim=1\)"),
            ("FSDP2 over tensor parallelism", "dp", r"a DTensor of _StridedShard\(dim=0, sf=2\)"),
            ("HSDP", dist.group.WORLD, "a DTensor on a mesh without such a dimension"),
        ):
            with pytest.raises(TypeError, match=f"weight: {given} given, accepted with this group is Shard"):
                linear_logprobs(hidden, MESHES[name](case.weight, mesh), case.targets[mine], group=group)
        for name in ("FSDP2 over tensor parallelism", "sharded over both", "HSDP"):
            weight = MESHES[name](case.weight, mesh)
            got = torch.autograd.grad(loss_of(hidden, weight, rows=mine, **options), (hidden, weight, of_bias))
            assert got[1].placements == weight.placements, name
            parts = got[0], 2 * got[1].full_tensor(), 2 * got[2].full_tensor()
            for x, y in zip(parts, (want[0][mine], *want[1:]), strict=True):
                torch.testing.assert_close(x, y, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        for failing in range(4):  # its error goes along a row of the mesh, and from there along the columns
            wrong, expected = {}, (RuntimeError, "group: rank [01] raises an error")
            if dist.get_rank() == failing:
                wrong, expected = {"softcap": -1.0}, (ValueError, "softcap: -1.0 given")
            with pytest.raises(expected[0], match=expected[1]):
                loss_of(hidden, weight, rows=mine, **options, **wrong)
        print("held")


def test_a_weight_stays_sharded_over_the_group_and_is_gathered_over_the_other_dimension():
    assert [out.split()[-1] for out in on_ranks("test_meshes:rank_stays_sharded", 4)] == ["held"] * 4


# ---- rows that are spread over ranks

SEQUENCES = ((0, 2), (2, 2), (2, 5))  # of each of three ranks; one has none
OBJECTIVES = {
    "every token alike": PolicyObjective(entropy_coefficient=0.01),
    "every sequence alike": PolicyObjective(ratio="sequence", aggregation="sequence-mean-token-mean", kl="k3", kl_coefficient=0.1),
    "highest entropies": PolicyObjective(top_entropy_quantile=0.3),
    "importance": PolicyObjective(importance="token", importance_cap=1.2),
}


def policy_case(dtype: torch.dtype, ignored: slice) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, a weight and what comes by token, of five sequences of four tokens; of some no token counts."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = 2 * random(5, 4, 6), random(17, 6)
    targets = torch.randint(17, (5, 4), generator=generator)
    targets[torch.rand(5, 4, generator=generator) < 0.2] = -100
    targets[ignored] = -100
    logprobs, _, _ = reference.linear_logprobs(hidden, weight, targets)
    by_token = {name: (logprobs + 0.1 * random(5, 4)).to(dtype) for name in ("old", "reference", "sampler")}
    by_token = {f"{name}_logprobs": x for name, x in by_token.items()}
    return hidden, weight, {"targets": targets, "advantages": random(5, 4), **by_token}


def calls(by_token: dict, rows: slice, dtype: torch.dtype) -> dict:
    """What takes a row group: functions of hidden states and a weight that return a loss and metrics, or None."""
    some = {name: x[rows] for name, x in by_token.items()}

    def policy(hidden, weight, objective, **options):
        return linear_policy_loss(hidden, weight, **some, objective=objective, **options)

    def cross_entropy(hidden, weight, **options):
        return linear_cross_entropy(hidden, weight, some["targets"], **options), None

    def divergence(hidden, weight, **options):
        mask = some["targets"] != -100
        options |= {"mask": mask, "kind": "reverse_kl", "row_weights": some["advantages"], "reduction": "mean"}
        return linear_divergence(hidden, weight, 0.5 * hidden.detach(), **options)[0], None

    found = {name: partial(policy, objective=objective) for name, objective in OBJECTIVES.items()}
    return found | {"cross entropy": cross_entropy, "divergence": divergence}


def rank_losses() -> None:
    """Losses and gradients of parts add up to those of the whole, metrics of a part are those of the whole."""
    with process_group(Hardware(device="cpu")) as world:
        mine = slice(*SEQUENCES[world.rank])
        for dtype, ignored in itertools.product((torch.float64, torch.float32), (slice(0), slice(2, 5), slice(5))):
            hidden, weight, by_token = policy_case(dtype, ignored)
            of_all, of_part = (calls(by_token, rows, dtype) for rows in (slice(None), mine))
            close = partial(torch.testing.assert_close, **(TOLERANCE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}))
            for name, whole in of_all.items():
                leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                loss, metrics = whole(*leaves)
                part, of_rank = of_part[name](leaves[0][mine], leaves[1], row_group=dist.group.WORLD)
                want, got = (torch.autograd.grad(x, leaves) for x in (loss, part))
                for x, y in zip((part.detach(), *got), (loss.detach(), *want), strict=True):
                    close(world.sum(x), y, msg=lambda m, n=name: f"{n}: {m}")
                for field, x, y in zip(metrics._fields, of_rank, metrics, strict=True) if metrics is not None else ():
                    close(x, y, equal_nan=True, msg=lambda m, n=name, f=field: f"{n}: {f}: {m}")
        print("held")


def test_parts_of_ranks_add_up_to_the_loss_and_the_gradients_of_one_that_has_all_rows():
    assert [out.split()[-1] for out in on_ranks("test_meshes:rank_losses", 3)] == ["held"] * 3


def rank_raises() -> None:
    """Where one rank raises, before its first message or between two, the others do not wait for it."""
    with process_group(Hardware(device="cpu")) as world:
        hidden, weight, by_token = policy_case(torch.float64, slice(0))
        mine = slice(*SEQUENCES[world.rank])
        options = {name: x[mine] for name, x in by_token.items()} | {"row_group": dist.group.WORLD}
        for failing in (0, 1, 2):
            early = {"softcap": -1.0} if world.rank == failing else {}
            late = {"objective": OBJECTIVES["highest entropies"]}
            for wrong, kind, says in (
                (early, ValueError, "softcap: -1.0 given"),
                (late, ZeroDivisionError, "of this rank alone"),
            ):
                with pytest.MonkeyPatch.context() as patch:
                    if wrong is late and world.rank == failing:
                        patch.setattr("bupo_kernels.functional.logprobs_of", _fails)
                    expected = (
                        (kind, says) if world.rank == failing else (RuntimeError, f"row_group: rank {failing} raises an error")
                    )
                    with pytest.raises(expected[0], match=expected[1]):
                        linear_policy_loss(hidden[mine], weight, **options, **wrong)
        linear_policy_loss(hidden[mine], weight, **options)  # and they still understand each other
        print("held")


def _fails(request):
    raise ZeroDivisionError("of this rank alone")


def test_ranks_do_not_wait_for_one_that_raises():
    assert [out.split()[-1] for out in on_ranks("test_meshes:rank_raises", 3, timeout=60)] == ["held"] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(linear_policy_loss, advantages=torch.ones(2)), "row_group: str given, accepted are None and a ProcessGroup that"),
        (partial(linear_cross_entropy, reduction="mean"), "row_group: str given, accepted are None and a ProcessGroup that"),
    ],
)
def test_row_groups_that_cannot_be_are_refused_by_name(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), row_group="dp")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_row_group_where_nothing_is_divided_is_refused(one_process):
    operands = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="row_group: given with reduction='sum', accepted with 'mean'"):
        linear_cross_entropy(*operands, torch.zeros(2, dtype=torch.int64), reduction="sum", row_group=one_process)
    with pytest.raises(ValueError, match="row_group: given with a denominator, accepted is one of the two"):
        linear_divergence(*operands, operands[0], reduction="mean", denominator=3, row_group=one_process)


def test_a_loss_of_a_row_group_is_traced_whole(one_process):
    hidden, weight, by_token = policy_case(torch.float32, slice(0))

    def loss(hidden, weight):
        return linear_policy_loss(hidden, weight, **by_token, row_group=one_process)

    (want, metrics), (got, traced) = loss(hidden, weight), torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert torch.equal(got, want)
    torch.testing.assert_close(traced, metrics, rtol=0, atol=0, equal_nan=True)
