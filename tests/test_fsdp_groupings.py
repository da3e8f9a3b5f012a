"""A fused head under every FSDP2 grouping that trainers use, and under DDP: two ranks against plain torch on one."""

import importlib.util
import itertools
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from models import in_float64, tiny_model, token_batch
from problems import covering, model_error, wanted
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from bupo.config import Hardware
from bupo.distributed import process_group
from bupo_kernels import internal_policy, policy_logprobs
from bupo_kernels.integrations.transformers import apply_fused_head


def norm_and_head(model, tied):
    return [model.model.norm, *([model.model.embed_tokens] if tied else []), model.lm_head]


GROUPINGS = {  # units beside the layers and the root, each with its reshard_after_forward; that of the root
    "root": (lambda model, tied: [], None),
    "head alone": (lambda model, tied: [(model.lm_head, True), (model.model.embed_tokens, True)], None),  # verl, if untied
    "norm and head": (  # accelerate 1.15
        lambda model, tied: [*([] if tied else [(model.model.embed_tokens, True)]), (norm_and_head(model, tied), False)],
        None,
    ),
    "norm and head, resharded": (lambda model, tied: [(norm_and_head(model, tied), True)], True),
    "head alone, resharded": (lambda model, tied: [] if tied else [(model.lm_head, True)], True),
    "sharded by transformers": (None, None),
}
SHARDED = [
    (grouping, tied, checkpointing, torch.float64, call, layer)
    for grouping, tied, checkpointing, call, layer in itertools.product(
        GROUPINGS, (False, True), (False, True), ("method", "forward"), (None, 2)
    )
    if not (tied and grouping == "head alone")  # FSDP2 refuses a parameter in two units
]
# In float64 a gradient that is not reduced has nowhere to hide; in float32 kernels run that keep operands of their own.
SHARDED += [(grouping, False, False, torch.float32, "forward", layer) for grouping in GROUPINGS for layer in (None, 2)]
DDP = [("ddp", tied, True, torch.float64, "forward", layer) for tied in (False, True) for layer in (None, 2)]
CASES = SHARDED + DDP
CONFIG = tiny_model().config
HAVE_ACCELERATE = importlib.util.find_spec("accelerate") is not None


def upstream() -> torch.Tensor:
    return torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(1))


def weighted(logprobs, entropy, weights):
    return (logprobs * weights[0]).sum() + (entropy * weights[1]).sum()


def by_module(model, ids, targets, layer):
    """What a patched forward does: backbone, then the head as a module."""
    with nullcontext() if layer is None else internal_policy(model, layer):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden, targets)


class Policy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets, layer):
        return by_module(self.model, ids, targets, layer)


def model_of(tied, dtype):
    return in_float64(tiny_model(tied=tied)) if dtype == torch.float64 else tiny_model(tied=tied)


def sharded(folder, grouping, tied, checkpointing, dtype):
    if grouping == "sharded by transformers":
        from transformers.distributed import DistributedConfig

        plan = DistributedConfig(fsdp_size=2)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{tied}", dtype=dtype, distributed_config=plan)
        model = in_float64(model) if dtype == torch.float64 else model
        enable_checkpointing(model, checkpointing)
        apply_fused_head(model)
    else:
        model = apply_fused_head(model_of(tied, dtype))
        enable_checkpointing(model, checkpointing)
        units, reshard = GROUPINGS[grouping]
        mesh = dist.init_device_mesh("cpu", (2,))
        for unit, reshard_unit in (*((layer, True) for layer in model.model.layers), *units(model, tied)):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_unit)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    model.policy_logprobs = MethodType(policy_logprobs, model)
    register_fsdp_forward_method(model, "policy_logprobs")
    model.forward = MethodType(by_module, model)
    return model.train()


def enable_checkpointing(model, checkpointing):
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})


def replicated(tied, dtype, layer):
    model = apply_fused_head(model_of(tied, dtype))
    enable_checkpointing(model, True)
    return DistributedDataParallel(Policy(model.train()), find_unused_parameters=layer is not None)


def rank_gradients(folder: str, chosen: str) -> None:
    torch.manual_seed(0)
    found = {}
    with process_group(Hardware(device="cpu")) as world:
        ids, targets = token_batch(4)
        mine = slice(2 * world.rank, 2 * world.rank + 2)
        made = None
        for case in (CASES[int(number)] for number in chosen.split()):
            grouping, tied, _, dtype, call, layer = case
            if grouping == "sharded by transformers" and not HAVE_ACCELERATE:
                continue
            if grouping == "ddp":
                model = replicated(tied, dtype, layer)
                inner = model.module.model
            elif made != (made := case[:4]):
                model = inner = sharded(folder, *made)
            if call == "method":
                out = model.policy_logprobs(ids[mine], targets[mine], layer=layer)
            else:
                out = model(ids[mine], targets[mine], layer)
            weighted(out.logprobs, out.entropy, upstream()[:, mine]).backward()
            found[case] = {name: shard(p.grad) for name, p in inner.named_parameters()}
            model.zero_grad()
        torch.save(found, f"{folder}/{world.rank}.pt")


def shard(gradient):
    """This rank's part: gathering all of them here would take a third of the time."""
    return gradient.to_local().clone() if isinstance(gradient, DTensor) else gradient


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("groupings")
    for tied in (False, True):
        tiny_model(tied=tied).save_pretrained(folder / str(tied))
    chosen = " ".join(str(CASES.index(case)) for case in wanted(request, "case"))
    on_ranks("test_fsdp_groupings:rank_gradients", 2, str(folder), chosen)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """Gradients of a mean over two ranks, from the logits of unmodified models in float64."""
    found = {}
    for tied, layer in itertools.product((False, True), (None, 2)):
        model = model_of(tied, torch.float64)
        torch.manual_seed(0)
        ids, targets = token_batch(4)
        out = model(ids, output_hidden_states=True, use_cache=False)
        logits = out.logits if layer is None else out.hidden_states[layer] @ model.lm_head.weight.T
        log_p = logits.log_softmax(-1)
        logprobs = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        active = targets != -100
        (weighted(logprobs[active], entropy[active], upstream().double()[:, active]) / 2).backward()
        found[tied, layer] = {name: p.grad for name, p in model.named_parameters()}
    return found


@pytest.mark.parametrize("case", covering(CASES, 1), ids=lambda case: "-".join(map(str, case)))
def test_two_ranks_have_the_gradients_of_plain_torch_on_one(case, on_two_ranks, alone):
    grouping, tied, _, dtype, _, layer = case
    if grouping == "sharded by transformers" and not HAVE_ACCELERATE:
        pytest.skip("transformers shards with accelerate (pip install accelerate)")
    want, (one, other) = alone[tied, layer], (found[case] for found in on_two_ranks)
    assert one.keys() == other.keys() == want.keys()
    assert sum(gradient is None for gradient in want.values()) == (0 if layer is None else 2 * 11 + 1)  # two layers and the norm
    largest = max(gradient.abs().max() for gradient in want.values() if gradient is not None)
    for name, gradient in want.items():
        if gradient is None:
            assert one[name] is other[name] is None, name
            continue
        atol = 2 * model_error(CONFIG, 11, backward=True, dtype=dtype) * largest
        whole = [one[name], other[name]] if grouping == "ddp" else [torch.cat([one[name], other[name]])]
        for got in whole:
            torch.testing.assert_close(got.double(), gradient, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
