"""Two gloo ranks against one process: the same losses, gradients and weights, whatever is sharded, checkpointed or left to do."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from models import tiny_model
from ranks import on_ranks
from test_batching import random_samples

from bupo.attention import training_attention
from bupo.config import Hardware, parse_config
from bupo.distributed import full, process_group
from bupo.model import load_model, make_optimizer
from bupo.schedule import FINAL, OptimisedPolicy
from bupo.trainer import look, make_mini_batches, update, with_old_logprobs

CASES = [
    {"tied": tied, "layer": layer, "module": module, "checkpointing": checkpointing}
    for tied, (layer, module), checkpointing in itertools.product(
        (False, True), ((None, "layer"), (2, "layer"), (3, "attention"), (2, "ffn")), (False, True)
    )
]


def config_of(case: dict, **hardware):
    return parse_config(
        {
            "model": "unused",
            "output_dir": "unused",
            "data": {"train": "unused", "max_prompt_tokens": 20},
            "policy": "grpo",
            "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 20},
            "objective": {"advantage": "rloo", "aggregation": "sequence-mean-token-mean"},
            "optimizer": {"mini_batch": 2, "learning_rate": 0.001, "max_grad_norm": 1e9},
            "hardware": {"max_tokens_per_device": 40, "checkpoint_activations": case["checkpointing"], **hardware},
        }
    )


def two_updates(folder: str, case: dict, world, **hardware) -> dict:
    """What two mini-batches do to a model: losses, what was seen, the gradient of the first and the weights after both."""
    config = config_of(case, **hardware)
    model = load_model(f"{folder}/{'tied' if case['tied'] else 'untied'}", config.hardware, world)
    optimizer = make_optimizer(model, config.optimizer)
    policy = FINAL if case["layer"] is None else OptimisedPolicy(case["layer"], case["module"])
    samples = random_samples(16)
    generator = torch.Generator().manual_seed(0)
    rewards, advantages = torch.zeros(4, 4), torch.randn(4, 4, generator=generator)
    advantages[1] = 0  # a group that was all right
    rewards[2, 1] = torch.nan  # a reward that failed
    gradients = {}

    def keep_gradients(*_):
        if not gradients:
            gradients.update({name: p.grad for name, p in model.named_parameters()})
            gradients.update({name: g if g is None else full(g).clone() for name, g in gradients.items()})

    optimizer.register_step_pre_hook(keep_gradients)
    with training_attention(model, "per-sequence"):
        seen = look(model, samples, policy, 1, config, world)
        mini_batches = make_mini_batches(samples, rewards, advantages, config, world)
        mini_batches = [[with_old_logprobs(model, batch, policy, config) for batch in batches] for batches in mini_batches]
        updates = [update(model, optimizer, batches, policy, config, world) for batches in mini_batches]
    weights = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    return {"updates": [u._asdict() for u in updates], "seen": seen, "gradients": gradients, "weights": weights}


def rank_updates(folder: str, cases: str) -> None:
    results = []
    with process_group(Hardware(device="cpu")) as world:
        for case in json.loads(cases):
            results.append(two_updates(folder, case, world))
        if world.main:
            torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for tied in (False, True):
        tiny_model(tied=tied).save_pretrained(folder / ("tied" if tied else "untied"))
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(folder) -> list[dict]:
    on_ranks("test_distributed:rank_updates", 2, str(folder), json.dumps(CASES))
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: " ".join(map(str, CASES[n].values())))
def test_two_ranks_do_what_one_process_does(number, folder, on_two_ranks):
    with process_group(Hardware(device="cpu")) as world:
        alone = two_updates(str(folder), CASES[number], world)
    together = on_two_ranks[number]
    for one, two in zip(alone["updates"], together["updates"], strict=True):
        assert one["tokens"] == two["tokens"]
        for name in ("loss", "clipped", "kl_old", "ratio_max", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name
    for name, gradient in alone["gradients"].items():
        other = together["gradients"][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
