"""What `bupo.cost` states against models built from the same configs: counted, and run under torch's FLOP counter and allocator."""

import itertools
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, tiny_model
from problems import covering
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from bupo.architecture import check_fits, load_architecture
from bupo.attention import training_attention
from bupo.config import TrainConfig, load_config, parse_config
from bupo.cost import (
    Work,
    activation_bytes,
    looks_of,
    memory,
    optimised_policy,
    parameters,
    pass_flops,
    reference_flops,
    run_hours,
    step_flops,
    step_seconds,
    training_flops,
    work_of,
)
from bupo.distributed import as_forward, process_group, shard
from bupo.dry_run import describe
from bupo.errors import ConfigError
from bupo.measurement import peak_bytes
from bupo.peaks import peak_flops
from bupo_kernels import policy_logprobs, policy_loss, self_distillation_loss
from bupo_kernels.backends.machine import named

ROOT = Path(__file__).parent.parent
PAPER = {"qwen3-4b": 4.02, "qwen3-8b": 8.19, "octothinker-3b": 3.21, "octothinker-8b": 8.03}  # billions of parameters, as published


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the configurations name files of the repository


def run_config(**changes) -> TrainConfig:
    """A run of 8 sequences of at most 10 + 20 tokens, ``{"section.key": value}`` changed."""
    tree = {
        "model": "none",
        "output_dir": "none",
        "data": {"train": "none", "max_prompt_tokens": 10},
        "bupo": {"layer": 2, "internal_steps": 1},
        "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 20},
        "optimizer": {"mini_batch": 4},
        "hardware": {"max_tokens_per_device": 30},
    }
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return parse_config(tree)


def counted(call) -> int:
    call()  # the first one verifies the model on a few tokens, and tells the counter of the ops
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family, tied):
    model = tiny_model(family, tied=tied)
    found = parameters(model.config)
    assert found.total == model.num_parameters()
    assert found.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert found.head == (0 if tied else model.lm_head.weight.numel())


@pytest.mark.parametrize(("family", "biases"), [("llama", ["attention_bias", "mlp_bias"]), ("qwen3", ["attention_bias"])])
def test_biases_are_counted(family, biases):
    config = tiny_model(family).config
    for name in biases:
        setattr(config, name, True)
    assert parameters(config).total == FAMILIES[family][1](config).num_parameters()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_as_many_parameters_as_published(name, in_root):
    architecture = load_architecture(load_config(Path(f"configs/{name}.yaml")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    assert parameters(architecture).total == model.num_parameters()
    assert round(parameters(architecture).total / 1e9, 2) == PAPER[name]


POLICIES = {
    "own": {},
    "layer": {"layer": 2},
    "attention": {"layer": 2, "module": "attention"},
    "ffn": {"layer": 2, "module": "ffn"},
}


@pytest.mark.parametrize(("family", "policy"), covering(list(itertools.product(FAMILIES, POLICIES)), 1, unpacked=True))
def test_flops_are_what_torch_counts(family, policy):
    # Eager attention: it is all torch can count on a CPU, of every pair, and with nothing computed twice.
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ids, targets = torch.randint(2, 61, (1, 24)), torch.randint(2, 61, (1, 24))
    work, policy = Work(tokens=24, pairs=24**2, head_rows=24), POLICIES[policy]

    assert counted(lambda: policy_logprobs(model, ids, targets, **policy)) == pass_flops(model.config, work, **policy).model
    found = counted(lambda: policy_loss(model, ids, targets, torch.ones(1, 1), **policy)[0].backward())
    assert found == pass_flops(model.config, work, **policy, backward=True).model


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_recomputed_activations_are_counted_as_hardware_flops_only(policy):
    model = tiny_model().train()
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, targets, work = torch.randint(2, 61, (1, 24)), torch.randint(2, 61, (1, 24)), Work(24, 24**2, 24)
    found = counted(lambda: policy_loss(model, ids, targets, torch.ones(1, 1), **policy)[0].backward())
    stated, forward = (
        pass_flops(model.config, work, **policy, backward=backward, checkpointing=True) for backward in (True, False)
    )
    assert found == stated.hardware - forward.attention / 2  # which flash attention would compute again
    assert stated.model == pass_flops(model.config, work, **policy, backward=True).model
    assert forward.recomputed == 0


def test_a_layer_that_learns_from_the_model_costs_four_products_of_the_head_more():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids, targets, work = torch.randint(2, 61, (1, 24)), torch.randint(2, 61, (1, 24)), Work(24, 24**2, 24)
    plain, taught = run_config(policy="grpo"), run_config(**{"policy": "oisd", "oisd.layer": 2})
    found = counted(lambda: self_distillation_loss(model, ids, targets, torch.ones(1, 1), layer=2).loss.backward())
    own, stated = (training_flops(model.config, config, work) for config in (plain, taught))
    forward = pass_flops(model.config, work)
    assert stated.hardware - own.hardware == 4 * forward.head
    assert stated.model - own.model == 3 * forward.head
    assert found == stated.hardware - forward.hardware - forward.attention / 2  # without old log-probs; as above
    held = [memory(model.config, config, 1) for config in (plain, taught)]
    assert held[1].head > held[0].head
    assert held[1].activations == held[0].activations
    assert (
        step_flops(model.config, taught, internal=False).update.head
        == 2 * step_flops(model.config, plain, internal=False).update.head
    )


@pytest.mark.parametrize("policy", [{}, {"layer": 3}], ids=["own", "layer 3"])
def test_frozen_upper_layers_cost_no_weight_gradients(policy):
    model = tiny_model()
    model.set_attn_implementation("eager")
    for layer in model.model.layers[2:]:
        layer.requires_grad_(False)
    ids, targets, work = torch.randint(2, 61, (1, 24)), torch.randint(2, 61, (1, 24)), Work(24, 24**2, 24)
    found = counted(lambda: policy_loss(model, ids, targets, torch.ones(1, 1), **policy)[0].backward())
    assert found == pass_flops(model.config, work, **policy, backward=True, trained_layers=2).model


def test_work_is_counted_sequence_by_sequence():
    pairs = sum(1 for length in (3 + 4 - 1, 5 + 2 - 1) for query in range(length) for key in range(length) if key <= query)
    assert work_of([(3, 4), (5, 2)]) == Work(tokens=12, pairs=pairs, head_rows=6)
    assert work_of([]) == Work(0, 0, 0)


def test_a_rollout_costs_what_decoding_with_a_cache_costs():
    model = tiny_model()
    model.set_attn_implementation("eager")
    cache, ids = DynamicCache(), torch.randint(2, 61, (1, 15))
    prompt, response = 10, 6
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)

        def decode():
            for i in range(prompt, prompt + response - 1):
                model(ids[:, [i]], past_key_values=cache)
            cache.crop(1 - response)

        found = counted(decode)
    step = step_flops(model.config, run_config(), internal=False, lengths=(prompt, response))
    assert step.decode.model == 8 * found
    assert step.prefill == pass_flops(model.config, Work(10, 55, 1)) * 8


def test_a_step_of_phase_1_costs_layers_1_to_l():
    architecture, config = tiny_model().config, run_config()
    internal, own = (step_flops(architecture, config, internal=phase) for phase in (True, False))
    for name in ("old_logprobs", "update"):
        assert getattr(internal, name).layers == getattr(own, name).layers * 2 / 4
        assert getattr(internal, name).head == getattr(own, name).head
    assert (internal.prefill, internal.decode) == (own.prefill, own.decode)
    assert own.old_logprobs == pass_flops(architecture, work_of([(5, 10)])) * 8  # half of 10 and of 20 tokens
    assert own.update.model == 3 * own.old_logprobs.model
    assert internal.training == training_flops(architecture, config, work_of([(5, 10)]), 2) * 8


def test_a_step_follows_the_configuration():
    architecture = tiny_model().config
    plain = step_flops(architecture, run_config(), internal=False)
    twice = step_flops(architecture, run_config(**{"rollout.samples": 4}), internal=False)
    assert twice.training == plain.training * 2
    recomputed = step_flops(architecture, run_config(**{"hardware.checkpoint_activations": True}), internal=False)
    assert recomputed.update.hardware > plain.update.hardware
    assert recomputed.update.model == plain.update.model
    frozen = step_flops(architecture, run_config(**{"optimizer.upper_layers": 0, "optimizer.upper_from": 2}), internal=False)
    assert frozen.update.layers == plain.update.layers * 5 / 6  # half of a third
    scaled = step_flops(architecture, run_config(**{"optimizer.upper_layers": 0.1, "optimizer.upper_from": 2}), internal=False)
    assert scaled.update == plain.update
    # All of the samples are looked at where nothing bounds it: a forward, and a head for each policy.
    unbounded = run_config(**{"telemetry.look_share": 1, "telemetry.lens_every": 0, "hardware.max_tokens_per_device": 1000})
    own, internal = (step_flops(architecture, unbounded, internal=phase) for phase in (False, True))
    assert own.look == own.old_logprobs
    assert (internal.look.layers, internal.look.head) == (own.look.layers, 2 * own.look.head)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([(64, 2, 61), (256, 12, 5000), (640, 18, 262_144), (4096, 36, 151_936)]),
    st.sampled_from([1, 2, 8, 64]),
    st.integers(1, 64),
    st.integers(2, 8),
    st.sampled_from([1, 8]),
    st.booleans(),
)
def test_looks_take_at_most_a_tenth_of_any_step_of_any_model(size, prompts, response, samples, devices, internal):
    width, depth, vocab = size
    architecture = tiny_model().config.__class__(
        hidden_size=width, num_hidden_layers=depth, vocab_size=vocab, intermediate_size=3 * width, num_attention_heads=4
    )
    overrides = {"rollout.prompts": prompts, "rollout.samples": samples, "optimizer.mini_batch": 1, "bupo.layer": 1}
    config = run_config(**overrides, **{"hardware.max_tokens_per_device": 4096})
    lengths, policy = [(20, response)] * prompts * samples, optimised_policy(config, internal)
    looks = looks_of(architecture, config, lengths, devices, policy)
    step = step_flops(architecture, config, devices, internal=internal, lengths=(20, response))
    rollout = (step.prefill + step.decode).model / devices  # updates, where there are some, come on top
    work, heads = work_of([(20, response)]), 1 + internal
    one = pass_flops(architecture, work._replace(head_rows=heads * response)).model
    token = 2 * vocab * width * (depth + 2)
    spent = 0.0
    for number in range(1, 3 * looks.every + 21):
        if looks.due(number):
            with_lens = looks.lens_due(number)
            spent += one * (looks.samples_with_lens if with_lens else looks.samples) + with_lens * token * looks.lens_tokens
        assert spent <= 0.1 * (spent + number * rollout) * (1 + 1e-9)
    assert spent > 0
    assert looks.lens_tokens > 0


# GFLOP a token of the reference's phase 1, counted from its code, and of the same without what it throws away. Activations are
# recomputed, to the last product; heads are over all tokens; attention is left out.
PUBLISHED = {
    "qwen3-4b": {"old": (8.8, 2.0), "update": (14.0, 7.2), "sum": (22.8, 9.2)},
    "qwen3-8b": {"sum": (42.2, 16.6)},
    "octothinker-3b": {"sum": (32.3, 30.3)},
    "octothinker-8b": {"sum": (74.8, 71.8)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_reference_costs_what_its_code_was_counted_to(name, in_root):
    config = load_config(Path(f"configs/{name}.yaml"))
    architecture, layer, token = load_architecture(config), config.bupo.layer, Work(tokens=1, pairs=0, head_rows=1)
    last = 2 * layer * architecture.hidden_size * architecture.intermediate_size  # products that need not be taken again
    backward = {"backward": True, "checkpointing": True}
    found = {
        "old": [count(architecture, token, layer=layer).hardware for count in (reference_flops, pass_flops)],
        "update": [count(architecture, token, layer=layer, **backward).hardware + last for count in (reference_flops, pass_flops)],
    }
    found["sum"] = [old + update for old, update in zip(found["old"], found["update"], strict=True)]
    for part, expected in PUBLISHED[name].items():
        assert [flops / 1e9 for flops in found[part]] == pytest.approx(expected, rel=0.01)


def small_model(family: str, vocab: int = 64, dtype: torch.dtype = torch.float32):
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        tie_word_embeddings=False,
    )
    return model_class(config).to(dtype).train()


@pytest.mark.parametrize(
    ("family", "dtype"), covering(list(itertools.product(("llama", "qwen3"), (torch.float32, torch.bfloat16))), 1, unpacked=True)
)
def test_activations_take_what_the_formula_says(family, dtype):
    model, tokens = small_model(family, dtype=dtype), 256
    ids, targets = torch.randint(64, (1, tokens)), torch.randint(64, (1, tokens))
    packed = {"position_ids": torch.arange(tokens)[None] % 128, "model_options": {"sequence_lengths": (128, 128)}}

    def loss(layer):
        return policy_loss(model, ids, targets, torch.ones(1, 1), layer=layer, **packed)[0]

    def stated(**options) -> int:
        return activation_bytes(model.config, tokens, itemsize=dtype.itemsize, **options)

    with training_attention(model, "per-sequence"):
        # The difference of two depths is of layers alone.
        found = peak_bytes(lambda: loss(5)) - peak_bytes(lambda: loss(2))
        assert stated(layers=5) - stated(layers=2) == pytest.approx(found, rel=0.05)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = peak_bytes(lambda: loss(5)) - peak_bytes(lambda: loss(2))
        assert stated(layers=5, checkpointing=True) - stated(layers=2, checkpointing=True) == pytest.approx(found, rel=0.05)
        loss(5).backward()  # from here on gradients are there, and not counted
        found = peak_bytes(lambda: loss(5).backward())
        assert 0.8 < stated(layers=5, checkpointing=True) / found < 1.35


BF16 = {"hardware.precision": "bfloat16"}


def test_states_are_sharded_and_copies_are_not():
    architecture = tiny_model().config
    total = parameters(architecture).total
    one, eight = (memory(architecture, run_config(**BF16), size) for size in (1, 8))
    assert (one.weights, one.optimizer, one.gradients) == (4 * total, 8 * total, 4 * total)
    for name in ("weights", "optimizer", "gradients"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8, rel=0.001)
    for name in ("gathered", "activations", "head", "model"):
        assert getattr(eight, name) == getattr(one, name)
    assert one.model == 2 * total
    assert 0 < one.gathered < one.model


def test_one_process_in_float32_has_one_copy_of_the_model():
    found = memory(tiny_model().config, run_config(), 1)
    assert (found.gathered, found.model) == (0, 0)
    assert memory(tiny_model().config, run_config(), 2).gathered > 0
    assert memory(tiny_model().config, run_config(**{"hardware.offload": True}), 1).gathered > 0


def test_offload_moves_states_to_the_host():
    architecture = tiny_model().config
    there, here = (memory(architecture, run_config(**BF16, **{"hardware.offload": offload}), 2) for offload in (True, False))
    assert (there.weights, there.optimizer, there.gradients) == (0, 0, 0)
    assert there.host == here.weights + here.optimizer + here.gradients
    assert here.host == 0
    assert there.training == here.training - there.host


def test_phase_1_and_frozen_layers_hold_less():
    architecture = tiny_model().config
    layer = parameters(architecture).layer
    internal, own = (memory(architecture, run_config(), 1, internal=phase) for phase in (True, False))
    assert own.gradients - internal.gradients == 4 * (2 * layer + 32)  # and the final norm's
    assert internal.activations * 2 == own.activations
    assert (internal.weights, internal.optimizer, internal.rollout) == (own.weights, own.optimizer, own.rollout)
    frozen = memory(architecture, run_config(**{"optimizer.upper_layers": 0, "optimizer.upper_from": 2}), 1)
    assert own.optimizer - frozen.optimizer == 8 * (2 * layer + 32)
    assert frozen.gradients == internal.gradients
    assert frozen.weights == own.weights


def test_the_cache_is_of_the_sequences_generated_at_a_time():
    model, cache = tiny_model(), DynamicCache()
    model(torch.zeros(3, 30, dtype=torch.int64), past_key_values=cache)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

    def stated(size: int = 1, **changes) -> int:
        return memory(model.config, run_config(**changes), size).cache

    assert stated(**{"rollout.sequences": 3}) == held
    assert stated() == held / 3 * 8  # there are no more than 8 in all
    assert stated(size=4) == held / 3 * 2
    assert stated(**BF16) == stated() / 2
    assert stated(**{"rollout.engine": "vllm"}) == 0


@pytest.mark.parametrize(("vocab", "tokens"), [(512, 512), (20000, 32)], ids=["activations decide", "the reduction decides"])
def test_a_sharded_training_pass_takes_what_is_stated(vocab, tokens):
    model = small_model("qwen3", vocab)
    changes = {"hardware.max_tokens_per_device": tokens, "hardware.checkpoint_activations": True, "hardware.device": "cpu", **BF16}
    config = run_config(**changes)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, targets = torch.randint(vocab, (1, tokens)), torch.randint(vocab, (1, tokens))
    with process_group(config.hardware) as world:
        shard(model, world, config.hardware)

        def step():
            as_forward(policy_loss, model, ids, targets, torch.ones(1, 1))[0].backward()

        step()  # from here on gradients are there, and the root is gathered
        measured = peak_bytes(step)
    stated = memory(model.config, config, 1)
    root = 2 * (2 * vocab * 192 + 192)
    beyond = stated.training - stated.weights - stated.optimizer - stated.gradients - root
    assert 0.8 < beyond / measured < 1.5


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tflops"),
    [
        ("NVIDIA H200", "bfloat16", False, 989.4),
        ("NVIDIA H100 80GB HBM3", "bfloat16", False, 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", False, 756),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", False, 312),
        ("NVIDIA A100-SXM4-80GB", "float32", False, 19.5),
        ("NVIDIA A100-SXM4-80GB", "float32", True, 156),
        ("NVIDIA A10", "bfloat16", False, 125),
        ("NVIDIA L40S", "bfloat16", False, 362),
        ("NVIDIA B200", "bfloat16", False, 2250),
        ("NVIDIA GeForce RTX 5090", "float32", False, 104.8),
        ("NVIDIA RTX A4000", "bfloat16", False, None),  # is no A40
        ("Intel(R) Xeon(R) Processor", "float32", False, None),
    ],
)
def test_peaks_are_found_by_name(name, precision, tf32, tflops):
    assert peak_flops(name, precision, tf32=tf32) == (None if tflops is None else tflops * 1e12)


def test_a_local_model_comes_before_a_given_architecture(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "model")
    other = {"architecture": str(ROOT / "configs/architectures/qwen3-4b.json")}
    assert load_architecture(run_config(model=str(tmp_path / "model"), **other)).model_type == "llama"
    assert load_architecture(run_config(model=str(tmp_path / "nothing"), **other)).model_type == "qwen3"


def test_an_architecture_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"architecture: .*config\.json is not a file, accepted is a model's config.json"):
        load_architecture(run_config(architecture=str(path)))
    for text in ("{", "[]", '{"model_type": "no such type"}', "{}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"architecture: .*config\.json cannot be used: \S"):
            load_architecture(run_config(architecture=str(path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model: .*empty cannot be used"):
        load_architecture(run_config(model=str(tmp_path / "empty")))


def test_a_run_that_asks_for_what_the_model_is_not_is_refused():
    architecture = tiny_model().config  # 4 layers, 128 positions
    check_fits(architecture, run_config(**{"bupo.layer": 4, "optimizer.upper_from": 4}))
    check_fits(architecture, run_config(**{"bupo.layer": 5, "policy": "grpo"}))
    refused = {
        r"bupo.layer: 5 given, accepted are 1 to 4 \(the layers of none\)": {"bupo.layer": 5},
        r"optimizer.upper_from: 5 given, accepted are 1 to 4": {"optimizer.upper_from": 5},
        r"oisd.layer: 4 given, accepted are 1 to 3 \(below the last layer of none\)": {"policy": "oisd", "oisd.layer": 4},
        r"rollout.max_new_tokens: 119 given with data.max_prompt_tokens: 10, accepted are together at most 128": {
            "rollout.max_new_tokens": 119,
            "hardware.max_tokens_per_device": 129,
        },
    }
    for message, changes in refused.items():
        with pytest.raises(ConfigError, match=message):
            check_fits(architecture, run_config(**changes))
    architecture.model_type = "gpt2"
    with pytest.raises(ConfigError, match="model: none is of type 'gpt2', accepted are llama, mistral, qwen2, qwen3"):
        check_fits(architecture, run_config())


SETTINGS = {
    "qwen3-4b": (6, 30, 8192),
    "qwen3-8b": (6, 20, 8192),
    "octothinker-3b": (27, 20, 3072),
    "octothinker-8b": (31, 20, 3072),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_papers_runs_fit_8_gpus_of_80_gb(name, in_root):
    config = load_config(Path(f"configs/{name}.yaml"))
    assert (config.bupo.layer, config.bupo.internal_steps, config.rollout.max_new_tokens) == SETTINGS[name]
    architecture = load_architecture(config)
    check_fits(architecture, config)
    found = memory(architecture, config, 8)
    assert max(found.training, found.rollout) < 70 * 2**30
    text = describe(architecture, config, 8)
    assert f"{PAPER[name]:.2f} B parameters" in text
    assert f"phase 1: layer {config.bupo.layer}" in text
    peak = next(line.split() for line in text.splitlines() if line.startswith("peak"))
    assert peak[-2:] == [f"{size / 2**30:.2f}" for size in (found.training, found.rollout)]
    step = step_flops(architecture, config, 8, internal=False)
    assert f"{step.total.hardware / 1e12:,.1f}" in text


def test_the_description_follows_the_run():
    architecture = tiny_model().config
    grpo = describe(architecture, run_config(policy="grpo"), 1)
    assert "phase" not in grpo
    assert "ratio" not in grpo
    assert "half of the longest" in grpo
    oisd = describe(architecture, run_config(**{"policy": "oisd", "oisd.layer": 3}), 1)
    assert "the model and layer 3" in oisd
    assert "the reference's" in grpo
    assert "the reference's" not in oisd  # BuPO's released code does not do it
    told = describe(architecture, run_config(), 1, lengths=(7, 9))
    assert "7 prompt and 9 response tokens: 128 tokens" in told
    vllm = describe(architecture, run_config(**{"rollout.engine": "vllm", "hardware.offload": True}), 2)
    assert "vLLM takes 50% of the device's memory" in vllm
    assert "GiB of CPU memory for each device" in vllm


def test_the_least_time_of_a_step_is_that_of_its_products_or_of_what_decoding_reads():
    architecture, card = tiny_model().config, named("H100")
    config = run_config(**{"hardware.precision": "bfloat16", "rollout.sequences": 2})
    step = step_flops(architecture, config, internal=True)
    seconds = step_seconds(architecture, config, 1, card, internal=True)
    assert seconds.training == pytest.approx((step.look + step.training).hardware / card.sustained)
    # 8 responses of 10 tokens, 2 at a time: 40 times all weights, and keys and values of 2 sequences of 5 + 5 tokens, 2 bytes each
    read = 40 * 2 * (parameters(architecture).total + 2 * 10 * 4 * 2 * 16)
    assert seconds.rollout == pytest.approx(step.prefill.hardware / card.sustained + read / (0.9 * card.memory_rate))
    slow = replace(card, sustained=1.0)  # no product hides behind the memory
    products = step_seconds(architecture, config, 2, slow, internal=True)
    assert products.rollout == pytest.approx((step.prefill + step.decode).hardware / 2)
    hours = run_hours(architecture, config, 1, card)
    first, second = (step_seconds(architecture, config, 1, card, internal=internal).total for internal in (True, False))
    assert hours == pytest.approx((first + (config.steps - 1) * second) / 3600)
    assert f"at least {hours:.1f} hours" in describe(architecture, config, 1, gpu=card)


def test_the_slurm_example_is_valid_bash():
    subprocess.run(["bash", "-n", ROOT / "examples/slurm.sh"], check=True)
