"""A fused head whose vocabulary torch or transformers has put on two ranks, against the same model on one, in float64."""

import itertools

import pytest
import torch
import torch.distributed as dist
from models import in_float64, tiny_model, token_batch
from problems import first_of
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from bupo.config import Hardware
from bupo.distributed import process_group
from bupo_kernels import FusedLMHead, policy_loss
from bupo_kernels.integrations.transformers import apply_fused_head, remove_fused_head

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # float64
V, D = 29, 6


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def questions(hidden, targets, advantages) -> dict:
    """What a head is asked, each by position and by name where both are possible."""
    return {
        "by position": lambda head: head(hidden, targets).logprobs.sum(),
        "by name": lambda head: (lambda out: (out.logprobs - out.entropy).sum())(head(hidden, targets=targets, temperature=0.7)),
        "loss": lambda head: head(hidden, targets, advantages)[0],
    }


class Model(nn.Module):
    """As in torchtitan: rows that are split over the sequence come to a head that is split over the vocabulary."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.output = head

    def forward(self, call):
        return call(self.output)


def rank_torch() -> None:
    with process_group(Hardware(device="cpu")) as world:
        mesh = dist.init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("dp", "tp"))
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, 6, D, generator=generator, dtype=torch.float64)
        targets, advantages = torch.randint(V, (4, 6), generator=generator), torch.randn(4, 6, generator=generator)
        weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((V, D), (V,)))
        share = 4 // mesh["dp"].size()
        rows = slice(share * mesh.get_local_rank("dp"), share * (mesh.get_local_rank("dp") + 1))
        half = slice(3 * mesh.get_local_rank("tp"), 3 * (mesh.get_local_rank("tp") + 1))

        def head_of(kind=nn.Linear):
            head = kind(D, V, dtype=torch.float64)
            head.weight.data.copy_(weight)
            head.bias.data.copy_(bias)
            return head

        for fused, by_sequence, sharded in itertools.product(("before", "after", "made"), (False, True), (False, True)):
            style = ColwiseParallel(
                input_layouts=Shard(1) if by_sequence else Replicate(),
                output_layouts=Shard(-1) if by_sequence else Replicate(),
                use_local_output=not by_sequence,
            )
            model = Model(head_of(FusedLMHead if fused == "made" else nn.Linear))
            if fused == "before":
                FusedLMHead.adopt(model.output)
            parallelize_module(model, mesh["tp"], {"output": style})
            if fused == "after":
                FusedLMHead.adopt(model.output)
            if sharded:
                fully_shard(model, mesh=mesh["dp"])
            given = hidden[rows][:, half if by_sequence else slice(None)].clone().requires_grad_()
            asked = questions(given, targets[rows], advantages[rows])
            alone = hidden[rows].clone().requires_grad_()
            for name, of_alone in questions(alone, targets[rows], advantages[rows]).items():
                plain = head_of(FusedLMHead)
                want = torch.autograd.grad(of_alone(plain), (alone, plain.weight, plain.bias))
                model.zero_grad()
                given.grad = None
                model(asked[name]).backward()
                found = model.output.weight.grad, model.output.bias.grad
                case = f"{fused} {by_sequence} {sharded} {name}"
                torch.testing.assert_close(given.grad, want[0][:, half if by_sequence else slice(None)], **TOLERANCE, msg=case)
                for got, expected in zip(found, want[1:], strict=True):
                    assert isinstance(got, DTensor)
                    mean = world.sum(expected.clone()) / world.size if sharded else expected
                    torch.testing.assert_close(whole(got), mean, **TOLERANCE, msg=lambda m, c=case: f"{c}: {m}")
            logits = model(lambda head, given=given: head(given))
            assert isinstance(logits, DTensor) == by_sequence
            torch.testing.assert_close(whole(logits), nn.functional.linear(alone, weight, bias), **TOLERANCE)
        print("held")


@pytest.mark.parametrize("size", first_of([2, 4]))
def test_a_head_that_torch_has_split_answers_for_the_whole_vocabulary(size):
    assert [out.split()[-1] for out in on_ranks("test_parallel_heads:rank_torch", size)] == ["held"] * size


def around_forward(head: nn.Module) -> tuple:
    return vars(head).get("forward"), list(head._forward_pre_hooks.values()), list(head._forward_hooks.values())


def part_of(x: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the shape of a ``shard`` that is no DTensor: those of transformers before 5.17."""
    for dim, size in enumerate(shard.shape):
        if size != x.shape[dim]:
            return x.tensor_split([-(-x.shape[dim] // 2)], dim)[dist.get_rank()]
    return x


def rank_transformers(folder: str) -> None:
    with process_group(Hardware(device="cpu")):
        for tied, layer in itertools.product((False, True), (None, 2)):
            plain = apply_fused_head(in_float64(tiny_model(tied=tied)))
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/{tied}", dtype=torch.float64, tp_plan="auto")
            model = in_float64(model)
            torch.manual_seed(0)
            ids, targets = token_batch()
            logits = model(ids).logits
            around = around_forward(model.lm_head)
            apply_fused_head(apply_fused_head(model))
            assert torch.equal(model(ids).logits, logits)
            advantages = torch.randn(targets.shape)
            losses = [policy_loss(m, ids, targets, advantages, layer=layer, temperature=0.7) for m in (model, plain)]
            for loss, _ in losses:
                loss.backward()
            case = f"{tied} {layer}"
            for got, want in zip(losses[0][1], losses[1][1], strict=True):
                torch.testing.assert_close(got, want, **TOLERANCE, equal_nan=True, msg=lambda m, c=case: f"{c}: {m}")
            assert around_forward(model.lm_head) == (None, [], [])
            gradients = {name: p.grad for name, p in plain.named_parameters()}
            for name, p in model.named_parameters():
                assert (p.grad is None) == (gradients[name] is None), name
                if p.grad is not None:
                    want = gradients[name] if isinstance(p, DTensor) else part_of(gradients[name], p)
                    torch.testing.assert_close(whole(p.grad), want, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
            remove_fused_head(model)
            assert type(model.lm_head) is nn.Linear
            assert around_forward(model.lm_head) == around
            assert torch.equal(model(ids).logits, logits)
        print("held")


def test_a_model_that_transformers_has_split_has_the_losses_and_gradients_of_a_whole_one(tmp_path):
    for tied in (False, True):
        tiny_model(tied=tied).save_pretrained(tmp_path / str(tied))
    assert [out.split()[-1] for out in on_ranks("test_parallel_heads:rank_transformers", 2, str(tmp_path))] == ["held"] * 2


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_heads_that_are_split_otherwise_are_refused_with_the_reason(one_process):
    with pytest.raises(
        ValueError, match=r"linear: tensor parallelism has split its head into Shard\(dim=1\), accepted is Shard\(dim=0"
    ):
        FusedLMHead.adopt(parallelize_module(nn.Linear(D, V), one_process, RowwiseParallel()))
    model = tiny_model()
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    model = tensor_parallel.apply_tensor_parallelism(model, one_process, {"lm_head.weight": "colwise"})
    tensor_parallel.ColwiseParallel(input_layouts=Shard(1)).install_forward(model.lm_head, one_process)
    with pytest.raises(
        ValueError, match=r"tensor parallelism of its head takes hidden states of Shard\(dim=1\), accepted is Replicate"
    ):
        apply_fused_head(model)
