"""Two gloo ranks against one process: the same losses, gradients and weights, whatever is sharded, checkpointed or left to do."""

import contextlib
import io
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from models import LARGEST, tiny_model
from problems import contract, covering, divergence_factor, model_error, policy_error, wanted
from ranks import on_ranks
from test_batching import random_samples

from bupo import cli
from bupo.attention import training_attention
from bupo.config import Hardware, Optimizer, parse_config
from bupo.distributed import full, process_group, sharded_units, unsharded
from bupo.errors import ConfigError
from bupo.model import load_model, make_optimizer
from bupo.schedule import FINAL, OptimisedPolicy
from bupo.trainer import look, look_at_layers, make_mini_batches, of_highest_entropies, update, with_old_logprobs
from bupo_kernels import policy_logprobs

CONFIG = tiny_model().config
CASES = [
    {"tied": tied, "layer": layer, "module": module, "checkpointing": checkpointing}
    for tied, (layer, module), checkpointing in itertools.product(
        (False, True), ((None, "layer"), (2, "layer"), (3, "attention"), (2, "ffn")), (False, True)
    )
]


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
    ids=str,
)
def test_an_environment_that_describes_no_world_is_refused_with_what_it_holds(monkeypatch, environment):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = ", ".join(f"{name}={value}" for name, value in environment.items())
    with (
        pytest.raises(ConfigError, match=f"^environment: {shown} given, accepted are RANK, below WORLD_SIZE, and LOCAL_RANK"),
        process_group(Hardware(device="cpu")),
    ):
        pass


# One rank has a sequence, the other none; and what FSDP2 does beside sharding.
OTHERS = [
    {**CASES[2], "active": 1},
    {**CASES[10], "active": 1},
    {**CASES[0], "upper": 0.0},
    {**CASES[10], "upper": 0.1},
    {**CASES[2], "oisd": {"layer": 2}},
    {**CASES[0], "objective": {"top_entropy_quantile": 0.2}},
    {**CASES[0], "hardware": {"offload": True}},
    {**CASES[0], "hardware": {"precision": "bfloat16"}},
    {**CASES[11], "hardware": {"precision": "bfloat16", "offload": True}},
]


def config_of(case: dict):
    return parse_config(
        {
            "model": "unused",
            "output_dir": "unused",
            "data": {"train": "unused", "max_prompt_tokens": 20},
            "policy": "oisd" if "oisd" in case else "grpo",
            "oisd": case.get("oisd"),
            "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 20},
            "objective": {"advantage": "rloo", "aggregation": "sequence-mean-token-mean", **case.get("objective", {})},
            "optimizer": {
                "mini_batch": 2,
                "learning_rate": 0.001,
                "max_grad_norm": 1e9,
                "upper_layers": case.get("upper", 1.0),
                "upper_from": 2,
            },
            "hardware": {"max_tokens_per_device": 40, "checkpoint_activations": case["checkpointing"], **case.get("hardware", {})},
        }
    )


def two_updates(folder: str, case: dict, world) -> dict:
    """What two mini-batches do to a model: losses, what was seen, the gradient of the first and the weights after both."""
    config = config_of(case)
    model = load_model(f"{folder}/{'tied' if case['tied'] else 'untied'}", config.hardware, world)
    optimizer = make_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:  # 1e-8 would make a whole step of the roundoff of a gradient near zero
        group["eps"] = 1e-3
    policy = FINAL if case["layer"] is None else OptimisedPolicy(case["layer"], case["module"])
    samples = random_samples(16)
    generator = torch.Generator().manual_seed(0)
    rewards, advantages = torch.zeros(4, 4), torch.randn(4, 4, generator=generator)
    advantages[1] = 0  # a group that was all right
    rewards[2, 1] = torch.nan  # a reward that failed
    advantages.view(-1)[case.get("active", 16) :] = 0
    gradients = {}

    def keep_gradients(*_):
        if not gradients:
            gradients.update({name: p.grad for name, p in model.named_parameters()})
            gradients.update({name: g if g is None else full(g).clone() for name, g in gradients.items()})

    optimizer.register_step_pre_hook(keep_gradients)
    with training_attention(model, "per-sequence"):
        hardware = config.hardware.model_copy(update={"max_tokens_per_device": 1000})
        all_of_them = config.model_copy(update={"hardware": hardware})
        seen, looked_at = look(model, samples, policy, 16, 1, all_of_them, world)
        seen |= look_at_layers(model, looked_at, 1000, 1, all_of_them, world)
        mini_batches = make_mini_batches(samples, rewards, advantages, config, world)
        mini_batches = [[with_old_logprobs(model, batch, policy, config) for batch in batches] for batches in mini_batches]
        mini_batches = [of_highest_entropies(batches, config, world) for batches in mini_batches if batches]
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
def on_two_ranks(folder, request) -> dict[str, dict]:
    cases = wanted(request, "case")
    on_ranks("test_distributed:rank_updates", 2, str(folder), json.dumps(cases))
    return dict(zip(map(str, cases), torch.load(folder / "results.pt", weights_only=True), strict=True))


def compare(alone: dict, together: dict, dtype: torch.dtype = torch.float32) -> None:
    # Of both. Statistics are means of log-probs and of what has up to so many times their error; so has the log of a ratio, as the
    # difference of two. No divergence of these models reaches 1.
    statistics = 2 * policy_error(CONFIG, 40, LARGEST, dtype=dtype) * divergence_factor(1.0)
    rel = 2 * model_error(CONFIG, 40, backward=True, dtype=dtype)
    for name, value in alone["seen"].items():
        # A perplexity is the exponential of a mean of log-probs.
        assert together["seen"][name] == (value if value is None else pytest.approx(value, rel=statistics, abs=statistics)), name
    for one, two in zip(alone["updates"], together["updates"], strict=True):
        assert one["tokens"] == two["tokens"]
        for name in ("loss", "kl_old", "ratio_max"):
            assert two[name] == pytest.approx(one[name], rel=statistics, abs=statistics), name
        assert two["jsd"] == (None if one["jsd"] is None else pytest.approx(one["jsd"], abs=statistics * one["tokens"]))
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=rel)
    largest = max(g.abs().max() for g in alone["gradients"].values() if g is not None)
    for name, gradient in alone["gradients"].items():
        other = together["gradients"][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(other, gradient, atol=rel * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", covering(CASES, 1), ids=lambda case: " ".join(map(str, case.values())))
def test_two_ranks_do_what_one_process_does(case, folder, on_two_ranks):
    with process_group(Hardware(device="cpu")) as world:
        alone = two_updates(str(folder), case, world)
    compare(alone, on_two_ranks[str(case)])


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: str({k: v for k, v in case.items() if k not in CASES[0]}))
def test_so_do_they_with_unequal_work_with_offload_and_in_bfloat16(case, folder, on_two_ranks):
    plain = {key: value for key, value in case.items() if key != "hardware"}
    with process_group(Hardware(device="cpu")) as world:
        alone = two_updates(str(folder), plain, world)
    together = on_two_ranks[str(case)]
    assert len(together["updates"]) == (1 if "active" in case else 2)
    low = case.get("hardware", {}).get("precision") == "bfloat16"
    if case.get("upper") == 0:
        trained = {name for name, gradient in together["gradients"].items() if gradient is not None}
        assert not any(part in name for name in trained for part in ("layers.2.", "layers.3."))
        assert "model.norm.weight" not in trained
        assert any("layers.1." in name for name in trained)
    compare(alone, together, torch.bfloat16 if low else torch.float32)
    if low:
        (weights, old), same = (alone["weights"], together["weights"]), together["updates"][0]
        assert all(w.dtype == torch.float32 for w in old.values())  # masters
        assert any((w != w.bfloat16().float()).any() for w in old.values())
        assert same["ratio_max"] == pytest.approx(1, abs=2 * contract(LARGEST))  # old log-probs reach the loss unrounded
        assert weights.keys() == old.keys()


def rank_unshards(folder: str) -> None:
    with process_group(Hardware(device="cpu")) as world:
        hardware = Hardware(device="cpu", precision="bfloat16")
        model = load_model(f"{folder}/untied", hardware, world)
        units = sharded_units(model)
        assert len(units) == 5  # four layers and the root
        with unsharded(model):
            for _ in range(world.rank + 1):  # ranks may do different work
                model(torch.ones(1, 3, dtype=torch.long), use_cache=False)
            assert not any(hasattr(p, "full_tensor") for p in model.parameters())
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        assert world.sum(torch.tensor([1.0])).item() == 2
        assert world.max(torch.tensor([float(world.rank)])).item() == 1
        assert world.gather([world.rank] * (world.rank + 1)) == [0, 1, 1]
        assert world.gather(list(world.share(range(5)))) == [0, 1, 2, 3, 4]
        assert world.from_main(f"rank {world.rank}") == "rank 0"


def test_unsharded_weights_are_whole_on_every_rank_and_then_shards_again(folder):
    on_ranks("test_distributed:rank_unshards", 2, str(folder))


def test_one_process_in_float32_is_not_sharded(folder):
    with process_group(Hardware(device="cpu")) as world:
        assert sharded_units(load_model(str(folder / "tied"), Hardware(device="cpu"), world)) == []
        sharded = load_model(str(folder / "tied"), Hardware(device="cpu", precision="bfloat16"), world)
        assert len(sharded_units(sharded)) == 5
        assert sharded.get_output_embeddings().weight is sharded.get_input_embeddings().weight


def test_optimizer_state_is_there_for_every_parameter_from_the_start_and_changes_nothing(folder):
    with process_group(Hardware(device="cpu")) as world:
        trajectories = []
        for eager in (True, False):
            model = load_model(str(folder / "untied"), Hardware(device="cpu"), world)
            optimizer = make_optimizer(model, Optimizer(learning_rate=0.01))
            assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in model.parameters())
            if not eager:
                optimizer.state.clear()
            for layer in (2, 4):
                ids = torch.arange(2, 12).view(1, 10)
                policy_logprobs(model, ids[:, :-1], ids[:, 1:], layer=layer).logprobs.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            trajectories.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *trajectories))


# ---- ranks that do not fail alike


def rank_fails_alone(folder: str) -> None:
    """Whatever one rank alone raises, all raise, and it alone says why."""
    with process_group(Hardware(device="cpu")) as world:
        with world.agree():
            pass
        for failing in ([1], [0, 1]):
            errors = []
            for kind in (ConfigError, RuntimeError):
                with pytest.raises(Exception) as raised, world.agree():  # noqa: PT011, PT012 (which of them is what is asked)
                    if world.rank in failing:
                        raise kind("data.train: it is not here")
                errors.append(raised.value)
            assert str(errors[0]) == ("rank 1: " if failing == [1] else "") + "data.train: it is not here"
            assert (type(errors[0]), errors[0].speaker) == (ConfigError, failing[0])
            assert type(errors[1]) is (RuntimeError if world.rank in failing else ConfigError)
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                assert cli._refuse("train", errors[0]) == 2
            assert said.getvalue() == (f"bupo train: {errors[0]}\n" if world.rank == failing[0] else "")
        with pytest.raises(ConfigError, match=f"rank 1: model: {folder}/nowhere cannot be used") as raised:
            load_model(f"{folder}/{'nowhere' if world.rank else 'tied'}", Hardware(device="cpu"), world)
        assert raised.value.speaker == 1
        with pytest.raises(ConfigError, match=f"rank 0: model: {folder}/empty cannot be used: .*no file named"):
            load_model(f"{folder}/empty", Hardware(device="cpu"), world)  # rank 0 alone reads the weights


def test_what_one_rank_alone_meets_all_fail_of_and_it_says_why(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_bytes((folder / "tied" / "config.json").read_bytes())
    on_ranks("test_distributed:rank_fails_alone", 2, str(folder))


def rank_command(config: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["train", config.format(os.environ["RANK"])])
    print(json.dumps([code, said.getvalue()]))


def test_a_configuration_that_one_rank_lacks_ends_all_before_there_is_a_process_group(tmp_path):
    tree = {"model": "nowhere", "output_dir": "nowhere", "policy": "grpo", "data": {"train": "nowhere"}}
    (tmp_path / "0.yaml").write_text(json.dumps(tree | {"hardware": {"device": "cpu"}}))
    printed = on_ranks("test_distributed:rank_command", 2, str(tmp_path / "{}.yaml"))
    line = f"bupo train: rank 1: config: {tmp_path / '1.yaml'} is not a file, accepted is a YAML file\n"
    assert [json.loads(text.splitlines()[-1]) for text in printed] == [[2, ""], [2, line]]
