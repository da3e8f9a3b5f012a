"""verl's engines, two gloo ranks on the CPU: its fused head on this library, and BuPO, against verl without and plain forwards."""

import contextlib
import importlib.metadata
import logging
import os
import re
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import tiny_model
from ranks import on_ranks
from torch.distributed.tensor import DTensor

from bupo_kernels import policy_logprobs

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed (pip install 'bupo-kernels[verl]')", allow_module_level=True)

ENTROPY = 0.3  # coefficient of the bonus: its gradient goes through the head too
TEMPERATURE = 0.7
LENGTHS = ((5, 6), (7, 4), (3, 6), (4, 5))  # of prompts and responses; each rank has as many, in micro-batches of two
UNFUSED = [{"tied": tied, "backend": None, "packed": packed} for tied in (False, True) for packed in (False, True)]
FUSED = [case | {"backend": "torch"} for case in UNFUSED] + [UNFUSED[1] | {"backend": "triton"}]
BUPO = [
    {"tied": tied, "backend": backend, "packed": packed, "checkpointing": checkpointing, "bupo": policy}
    for tied, backend, packed, checkpointing, policy in (
        (False, "torch", True, True, {"layer": 2}),
        (True, None, False, False, {"layer": 2}),
        (False, None, True, True, {"layer": 3, "module": "attention"}),
        (True, "triton", True, True, {"layer": 2, "module": "ffn", "final_norm": True}),
    )
]
BF16, HYBRID = (
    {"mixed_precision": None},
    {"fsdp_size": 1},
)  # verl's default; replicated over one mesh dimension, sharded over another
OTHERS = [
    {"tied": False, "backend": "torch", "packed": True, "engine": BF16},
    {"tied": False, "backend": "torch", "packed": True, "engine": HYBRID},
    {"tied": False, "backend": "torch", "packed": True, "engine": BF16, "checkpointing": True, "bupo": {"layer": 2}},
]
CASES = UNFUSED + FUSED + BUPO + OTHERS


def the_sequences(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(2, 61, (p + r,), generator=generator) for p, r in LENGTHS]


def the_advantages(rank: int) -> list[float]:
    return torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(100 + rank)).tolist()


def cpu_platform() -> None:
    """verl on a CPU: what its engines ask of a device."""
    from verl.plugin.platform import PlatformBase, PlatformRegistry

    nothing = dict.fromkeys(PlatformBase.__abstractmethods__, lambda *_, **__: None)
    ask = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved", "empty_cache", "synchronize")
    module = types.SimpleNamespace(**dict.fromkeys(ask, lambda *_, **__: 0), is_available=lambda: True, mem_get_info=lambda: (1, 1))
    module.get_rng_state, module.set_rng_state = torch.get_rng_state, torch.set_rng_state
    answers = {
        "device_name": "cpu",
        "vendor_name": "cpu",
        "device_module": module,
        "is_available": lambda self: True,
        "current_device": lambda self: torch.device("cpu"),
        "communication_backend_name": lambda self: "gloo",
    }
    PlatformRegistry.register("cpu")(type("PlatformCPU", (PlatformBase,), nothing | answers))


def make_engine(folder: str, case: dict, **settings):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    from bupo_kernels.integrations.verl import BuPOEngineConfig

    model = HFModelConfig(
        path=f"{folder}/{case.get('model', 'tied' if case['tied'] else 'untied')}",
        load_tokenizer=False,
        use_remove_padding=case["packed"],
        use_fused_kernels=case["backend"] is not None,
        fused_kernel_options={"impl_backend": case["backend"]},
        override_config={"attn_implementation": case.get("attention", "sdpa")},
        enable_gradient_checkpointing=case.get("checkpointing", False),
        **settings.get("model", {}),
    )
    config = FSDPEngineConfig if case.get("bupo") is None else partial(BuPOEngineConfig, internal_steps=1, **case["bupo"])
    sizes = {"micro_batch_size_per_gpu": 2, "infer_micro_batch_size_per_gpu": 4, "use_dynamic_bsz": False}
    numbers = {"mixed_precision": {"param_dtype": "fp32"}, "model_dtype": "fp32", "use_torch_compile": False}
    engine = EngineRegistry.new(
        "language_model",
        "fsdp2",
        model_config=model,
        engine_config=config(**({"strategy": "fsdp2", **sizes, **numbers} | case.get("engine", {}) | settings.get("engine", {}))),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, lr_warmup_steps=0, total_training_steps=4),
        checkpoint_config=CheckpointConfig(**settings.get("checkpoint", {})),
    )
    engine.initialize()
    return engine


def make_batch(case: dict):
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    rank = dist.get_rank() // case.get("sequence_parallel", 1)  # the ranks of one Ulysses group have the same batch
    sequences = the_sequences(rank)
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    fields = {
        "input_ids": sequences,
        "position_ids": [torch.arange(len(s)) for s in sequences],
        "attention_mask": [torch.ones(len(s)) for s in sequences],
        "prompts": [s[:p] for s, (p, _) in zip(sequences, LENGTHS, strict=True)],
        "responses": [s[p:] for s, (p, _) in zip(sequences, LENGTHS, strict=True)],
        "response_mask": [torch.ones(r) for _, r in LENGTHS],
        "loss_mask": [torch.cat([torch.zeros(p), torch.ones(r)]) for p, r in LENGTHS],
        "advantages": [torch.full((r,), a) for (_, r), a in zip(LENGTHS, the_advantages(rank), strict=True)],
    }
    data = TensorDict({name: nested(values) for name, values in fields.items()}, batch_size=[len(LENGTHS)])
    tensordict_utils.assign_non_tensor(
        data,
        use_remove_padding=case["packed"],
        use_fused_kernels=case["backend"] is not None,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        temperature=TEMPERATURE,
        calculate_entropy=True,
        global_batch_size=len(LENGTHS) * dist.get_world_size() // case.get("sequence_parallel", 1),
        pad_token_id=0,
        max_prompt_len=7,
        max_response_len=6,
    )
    if "vl" in case.get("model", ""):  # of the text, of time, height and width
        positions = data["position_ids"].values().expand(4, -1)
        data["position_ids"] = torch.nested.nested_tensor_from_jagged(positions, data["input_ids"].offsets(), jagged_dim=2)
    return data


def look_and_learn(engine, case: dict, look: bool = True, extra: str | None = None, update: bool = False) -> dict:
    """The old log-probs, and the gradients of an update that is a little off-policy; the update itself, if asked for."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import no_padding_2_padding

    data = make_batch(case)
    seen, old = {}, data["response_mask"]
    if look:
        with engine.eval_mode():
            seen = engine.infer_batch(data.copy())["model_output"]
        seen = {name: no_padding_2_padding(seen[name], data) for name in ("log_probs", "entropy")}
        old = [row[:r] + 0.1 for row, (_, r) in zip(seen["log_probs"], LENGTHS, strict=True)]
        old = torch.nested.as_nested_tensor(old, layout=torch.jagged)
    data["old_log_probs"] = old
    if extra is not None:
        data[extra] = data["response_mask"]
    sizes = {"rollout_n": 1, "ppo_mini_batch_size": 4 * dist.get_world_size(), "ppo_micro_batch_size_per_gpu": 2}
    actor = FSDPActorConfig(strategy="fsdp2", **sizes, entropy_coeff=ENTROPY, optim=engine.optimizer_config)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, partial(ppo_loss, config=actor))
        gradients = {name: whole(p.grad) for name, p in engine.module.named_parameters()}
        if update:
            engine.optimizer_step()
    return {**seen, "gradients": gradients}


def whole(tensor):
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def own_forward(model_class):
    """verl replaces the forward of the class for as long as the process lives."""
    before = model_class.forward
    try:
        yield
    finally:
        model_class.forward = before


def weights(engine) -> dict:
    return {name: whole(p.detach()) for name, p in engine.module.named_parameters()}


def resume(folder: str, case: dict) -> list[dict]:
    """The weights at the start, after a step in phase 1, after one in phase 2, and after that one when the run was resumed."""
    engine = make_engine(folder, case)
    seen = [weights(engine)]
    for step in (1, 2):
        look_and_learn(engine, case, update=True)
        engine.lr_scheduler_step()
        seen.append({name: weight.clone() for name, weight in weights(engine).items()})
        if step == 1:
            engine.save_checkpoint(f"{folder}/checkpoint", global_step=1)
    engine = make_engine(folder, case)
    engine.load_checkpoint(f"{folder}/checkpoint", del_local_after_load=False)
    look_and_learn(engine, case, update=True)
    return [*seen, weights(engine)]


def refusals(folder: str) -> dict:
    """What is said to settings and updates that do not go together with an internal policy."""
    case = BUPO[0]
    said = {}

    def ask(name: str, function, *arguments, **named) -> None:
        with pytest.raises(ValueError, match=f"^{name}: ") as refused:
            function(*arguments, **named)
        said[name] = str(refused.value)

    ask("layer", make_engine, folder, case | {"bupo": {"layer": 5}})
    ask("strategy", make_engine, folder, case, engine={"strategy": "fsdp"})
    ask("lora_rank", make_engine, folder, case, model={"lora_rank": 4})
    ask("enable_activation_offload", make_engine, folder, case, model={"enable_activation_offload": True})
    for name in ("save_contents", "load_contents"):
        ask(name, make_engine, folder, case, checkpoint={name: ["model", "optimizer"]})
    engine = make_engine(folder, case)
    ask("old_log_probs", look_and_learn, engine, case, look=False)
    for name in ("rollout_is_weights", "ref_log_prob"):
        ask(name, look_and_learn, engine, case, extra=name)
    return said


def rank_cases(folder: str) -> None:
    os.environ.update(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")
    cpu_platform()
    from transformers import Qwen3ForCausalLM
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    found = {"plugin": FusedLinearForPPO.forward.__module__, "cases": []}
    dist.init_process_group("gloo")
    for case in CASES:
        with own_forward(Qwen3ForCausalLM):
            engine = make_engine(folder, case)
            phases = [look_and_learn(engine, case)]
            if "bupo" in case:
                engine.lr_scheduler_step()
                phases.append(look_and_learn(engine, case))
            found["cases"].append({"engine": type(engine).__name__, "phases": phases})
    with own_forward(Qwen3ForCausalLM):
        found["resumed"] = resume(folder, BUPO[0])
        found["refusals"] = refusals(folder)
        found["reference"] = type(make_engine(folder, UNFUSED[0])).__name__
    torch.save(found, f"{folder}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> list[dict]:
    """What each rank found, in processes where this package is installed as far as verl can see: by its entry point."""
    folder = tmp_path_factory.mktemp("verl")
    for tied in (False, True):
        tiny_model(tied=tied).save_pretrained(folder / ("tied" if tied else "untied"))
    installed = folder / "bupo_kernels_of_this_test-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: bupo-kernels-of-this-test\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[verl.plugins]\nbupo = bupo_kernels.integrations.verl\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        on_ranks("test_verl:rank_cases", 2, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def alone(tied: bool, policy: dict) -> tuple[list, dict]:
    """Log-probs and entropies of each rank's responses, and the gradients of the update, by plain forwards in float64."""
    model = tiny_model(tied=tied).double()
    seen, loss = [], 0
    for rank in range(2):
        for ids, (p, r), advantage in zip(the_sequences(rank), LENGTHS, the_advantages(rank), strict=True):
            out = policy_logprobs(model, ids[None, :-1], ids[None, 1:], temperature=TEMPERATURE, **policy)
            logprobs, entropy = out.logprobs[0, p - 1 :], out.entropy[0, p - 1 :]
            ratio = (logprobs - logprobs.detach() - 0.1).exp()  # old log-probs are 0.1 above: clipped nowhere
            loss = loss - (advantage * ratio + ENTROPY * entropy).sum() / sum(2 * r for _, r in LENGTHS)
            seen.append({"log_probs": logprobs.detach(), "entropy": entropy.detach()})
    loss.backward()
    return [seen[:4], seen[4:]], {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found: dict, expected: dict, rel: float) -> None:
    largest = max(g.abs().max() for g in expected.values() if g is not None).item()
    for name, want in expected.items():
        assert (found[name] is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(
                found[name].double(), want.double(), atol=rel * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def described(case: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items())


def test_verl_loads_the_plugin_by_its_entry_point(on_two_ranks):
    assert [found["plugin"] for found in on_two_ranks] == ["bupo_kernels.integrations.verl"] * 2


@pytest.mark.parametrize("case", FUSED, ids=described)
def test_a_fused_update_has_the_gradients_of_one_without(case, on_two_ranks):
    numbers = CASES.index(case), CASES.index(case | {"backend": None})
    fused, unfused = (on_two_ranks[0]["cases"][n]["phases"][0]["gradients"] for n in numbers)
    assert len(unfused) == (46 if case["tied"] else 47)
    assert_same_gradients(fused, unfused, 1e-6)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: described(CASES[n]))
def test_old_logprobs_and_update_are_those_of_the_policy_of_the_phase(number, on_two_ranks):
    case, found = CASES[number], [rank["cases"][number] for rank in on_two_ranks]
    assert found[0]["engine"] == ("BuPOEngine" if "bupo" in case else "FSDPEngineWithLMHead")
    for phase in range(len(found[0]["phases"])):
        seen, gradients = alone(case["tied"], case.get("bupo", {}) if phase == 0 else {})
        error = 0.05 if case.get("engine") == BF16 else 3e-6  # of the engine's arithmetic; the comparison is with float64
        for rank in range(2):
            for name in ("log_probs", "entropy"):
                for got, want in zip(found[rank]["phases"][phase][name], (s[name] for s in seen[rank]), strict=True):
                    torch.testing.assert_close(got[: len(want)].double(), want, atol=error, rtol=0)
        assert_same_gradients(found[0]["phases"][phase]["gradients"], gradients, error)


def test_only_the_layers_of_the_policy_the_embedding_and_the_head_are_trained_in_phase_1_and_everything_after(on_two_ranks):
    start, first, second, _ = on_two_ranks[0]["resumed"]
    moved = {name for name in start if not torch.equal(start[name], first[name])}
    assert moved == {name for name in start if not re.match(r"model\.(layers\.[23]\.|norm)", name)}
    assert {name for name in start if not torch.equal(first[name], second[name])} == set(start)


def test_a_run_that_was_saved_in_phase_1_resumes_in_phase_2_as_if_it_had_not_been(on_two_ranks):
    *_, second, resumed = on_two_ranks[0]["resumed"]
    for name in second:
        assert torch.equal(resumed[name], second[name]), name


def test_what_does_not_go_together_with_an_internal_policy_is_refused(on_two_ranks):
    accepted = {
        "layer": "accepted are 1 to 4",
        "strategy": "'fsdp' given, accepted is 'fsdp2'",
        "lora_rank": "4 given, accepted is 0",
        "enable_activation_offload": "True given, accepted is False",
        "save_contents": "accepted is with 'extra'",
        "load_contents": "accepted is with 'extra'",
        "old_log_probs": "bypass_mode must be False",
        "rollout_is_weights": "rollout_is: null",
        "ref_log_prob": "use_kl_loss: False",
    }
    said = on_two_ranks[0]["refusals"]
    assert said.keys() == accepted.keys()
    for name, sentence in accepted.items():
        assert sentence in said[name], said[name]


def test_a_reference_beside_a_bupo_actor_is_verls_own_engine(on_two_ranks):
    assert on_two_ranks[0]["reference"] == "FSDPEngineWithLMHead"


@pytest.fixture
def plugin():
    from bupo_kernels.integrations import verl

    verl.patch_verl()
    yield verl
    verl.unpatch_verl()


def heads():
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy

    return FusedLinearForPPO.forward, linear_cross_entropy.linear_cross_entropy


def test_patched_heads_answer_as_verls_own(plugin):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    ids = torch.randint(31, (2, 5), dtype=torch.int32)

    def answers(head):
        outputs = head(hidden, weight, ids, 0.7)
        return [*outputs, *torch.autograd.grad(outputs[0].sum() - 0.3 * outputs[1].square().sum(), (hidden, weight))]

    ours = [answers(FusedLinearForPPO().forward), answers(heads()[1])]
    plugin.unpatch_verl()
    for got in ours:
        for x, want in zip(got, answers(FusedLinearForPPO().forward), strict=True):
            torch.testing.assert_close(x, want, atol=1e-6 * want.abs().max().item(), rtol=1e-6)


def test_a_head_whose_vocabulary_is_sharded_stays_verls_own(plugin, monkeypatch):
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

    monkeypatch.setattr(LinearCrossEntropy, "apply", lambda *arguments: arguments)
    assert heads()[1](1, 2, 3, 1.0, "none", "group") == (1, 2, 3, 1.0, "none", "group")
    assert heads()[1](1, 2, 3, 1.0, "mean") == (1, 2, 3, 1.0, "mean", None)


def test_unpatch_restores_heads_and_engines(plugin):
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    engines = {key: dict(value) for key, value in EngineRegistry._engines["language_model"].items()}
    plugin.BuPOEngineConfig(layer=2, internal_steps=1)
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is plugin.BuPOEngine
    plugin.unpatch_verl()
    assert EngineRegistry._engines["language_model"] == engines
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is FSDPEngineWithLMHead
    forward, function = heads()
    assert forward.__module__ == "verl.utils.experimental.torch_functional"
    assert function.__self__ is LinearCrossEntropy


class OtherArguments:
    def forward(self, hidden_states, vocab_weights, input_ids, mask, temperature=1.0): ...


class OtherValues(torch.nn.Module):
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logp = (hidden_states @ vocab_weights.T).log_softmax(-1)  # the temperature is forgotten
        return logp.gather(-1, input_ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def fails(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
    raise RuntimeError("needs a GPU")


HEAD = "verl.utils.experimental.torch_functional.FusedLinearForPPO"


@pytest.mark.parametrize(
    ("name", "instead", "says"),
    [
        ("verl.utils.fsdp_utils._select_fsdp2_wrap_targets", None, r"has no fsdp_utils\._select_fsdp2_wrap_targets,"),
        ("verl.utils.kernel.linear_cross_entropy.LinearCrossEntropy", None, r"has no linear_cross_entropy\.LinearCrossEntropy"),
        (HEAD, OtherArguments, r"FusedLinearForPPO\.forward takes \(self, hidden_states, vocab_weights, input_ids, mask,"),
        (HEAD, OtherValues, "log_probs of FusedLinearForPPO is .* on a small input, accepted is"),
        (HEAD + ".forward", fails, "FusedLinearForPPO raises RuntimeError on a small input: needs a GPU"),
    ],
)
def test_a_verl_that_lacks_what_is_replaced_is_refused_by_name_and_left_alone_by_the_plugin(
    name, instead, says, plugin, monkeypatch, caplog
):
    plugin.unpatch_verl()
    monkeypatch.setattr("verl.__version__", "1.0.0")
    monkeypatch.delattr(name) if instead is None else monkeypatch.setattr(name, instead)
    own = heads()
    with pytest.raises(ImportError, match=r"^verl 1\.0\.0 \(tested is 0\.9\.1\).*" + says) as refused:
        plugin.patch_verl()
    with caplog.at_level(logging.INFO, "bupo_kernels"):
        importlib.reload(plugin)
        assert f"nothing of verl is replaced: {refused.value}" in caplog.text
        assert heads() == own
        monkeypatch.undo()
        caplog.clear()
        importlib.reload(plugin)
        plugin.patch_verl()
        assert caplog.text.count("use_fused_kernels runs bupo_kernels.linear_logprobs") == 1
        assert heads() != own


@pytest.mark.parametrize(
    ("setting", "accepted"),
    [
        ({"layer": 0}, "layer: 0 given, accepted are integers from 1"),
        ({"internal_steps": 1.5}, "internal_steps: 1.5 given, accepted are integers from 1"),
        ({"module": "mlp"}, "module: 'mlp' given, accepted are 'layer', 'attention', 'ffn'"),
        ({"forward_only": True}, "forward_only: True given, accepted is False"),
        ({"forward_prefetch": True}, "forward_prefetch: True given, accepted is False"),
        ({"use_no_sync_for_gradient_accumulation": True}, "use_no_sync_for_gradient_accumulation: True given, accepted is False"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_name(setting, accepted, plugin):
    with pytest.raises(ValueError, match=f"^{re.escape(accepted)}"):
        plugin.BuPOEngineConfig(**({"layer": 2, "internal_steps": 3} | setting))


def settings_of(config, prefix: str = "") -> set[str]:
    if not isinstance(config, dict):
        return {prefix}
    return set().union(*(settings_of(value, f"{prefix}.{key}") for key, value in config.items()))


def test_the_example_is_a_configuration_of_verl_and_but_for_bupo_names_settings_that_verl_has(plugin):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    with initialize_config_dir(str(Path(__file__).parents[1] / "examples"), version_base=None):
        config = compose("verl_bupo", ["actor_rollout_ref.actor.fsdp_config.layer=7"])
    with initialize_config_dir(str(Path(plugin.verl.__file__).parent / "trainer" / "config"), version_base=None):
        verls = compose("ppo_trainer")
    example, own = (settings_of(OmegaConf.to_container(x)) for x in (config, verls))
    added = {name for name in example - own if not any(name.startswith(f"{known}.") for known in own)}  # below {} anything goes
    assert added == {f".actor_rollout_ref.actor.fsdp_config.{name}" for name in ("layer", "internal_steps", "module", "final_norm")}

    validate_config(config, use_reference_policy=False, use_critic=False)
    engine = omega_conf_to_dataclass(config.actor_rollout_ref.actor).engine
    assert type(engine) is plugin.BuPOEngineConfig
    assert (engine.strategy, engine.layer, engine.internal_steps) == ("fsdp2", 7, 20)
    assert config.actor_rollout_ref.ref.fsdp_config._target_ == "verl.workers.config.FSDPEngineConfig"
    assert config.actor_rollout_ref.model.use_fused_kernels
