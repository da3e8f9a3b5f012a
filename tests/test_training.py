"""Whole runs on a tiny model: the folder they leave, the parameters they move, and the command line around them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo.cli import main
from bupo.config import ConfigError, dump_config, load_config
from bupo.demo import character_tokenizer
from bupo.rollout import Sample, collate
from bupo.schedule import FINAL, OptimisedPolicy
from bupo.trainer import load_model, statistics, train, update


def parity(response: str, answer: str) -> float:
    """A reward that random responses earn half of the time, so that groups have advantages."""
    return float(len(response) % 2 == 0 or response > "5")


@pytest.fixture
def config_file(tmp_path):
    """A run of three steps, the first on the policy of layer 2, ready to train."""
    tokenizer = character_tokenizer("0123456789+=")
    model = tiny_model(vocab=len(tokenizer), tied=True)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    rows = "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in range(4) for b in range(4))
    (tmp_path / "sums.jsonl").write_text(rows)
    tree = {
        "model": str(tmp_path / "start"),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "sums.jsonl"), "heldout": str(tmp_path / "sums.jsonl")},
        "bupo": {"layer": 2, "internal_steps": 1},
        "reward": f"{__name__}:parity",
        "steps": 3,
        "episodes_every": 2,
        "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 3},
        "optimizer": {"learning_rate": 0.01, "mini_batch": 2, "micro_batch": 5},
        "evaluation": {"samples": 2, "every": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def metrics_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def moved(start, end) -> set[str]:
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (start, end))
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- whole runs


def test_a_run_leaves_everything_a_reader_needs(config_file, tmp_path, capsys):
    assert main(["train", str(config_file)]) == 0
    run, printed = tmp_path / "run", capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == [
        "accuracy.jsonl",
        "checkpoint",
        "config.yaml",
        "episodes.txt",
        "metrics.jsonl",
        "run.png",
    ]
    rows = metrics_of(run)
    assert [(row["step"], row["phase"]) for row in rows] == [(1, "layer 2"), (2, "final"), (3, "final")]
    assert rows[0]["entropy"] != rows[0]["entropy_final"]
    assert rows[1]["entropy"] == rows[1]["entropy_final"]
    for row, line in zip(rows, [line for line in printed.splitlines() if line.startswith("step ")], strict=True):
        for word in (row["phase"], "reward", "loss", "entropy", "final", "clipped", "grad", "tok/s"):
            assert word in line
    assert [json.loads(line)["step"] for line in (run / "accuracy.jsonl").read_text().splitlines()] == [0, 2, 3]
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")
    episodes = (run / "episodes.txt").read_text()
    assert "step 1 (layer 2)" in episodes
    assert "step 2 (final)" in episodes
    assert episodes.count("advantage") == 2 * 4
    assert load_config(run / "config.yaml", [f"output_dir={tmp_path / 'again'}"]).steps == 3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "checkpoint"), AutoTokenizer.from_pretrained(run / "checkpoint")
    assert model.config.num_hidden_layers == 4
    assert tokenizer.decode(tokenizer("1+2=").input_ids) == "1+2="


def test_the_same_seed_gives_the_same_run(config_file, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(load_config(config_file, [f"output_dir={tmp_path / name}", f"seed={seed}"]))
        runs.append([{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics_of(tmp_path / name)])
    assert runs[0] == runs[1] != runs[2]
    assert moved(tmp_path / "a" / "checkpoint", tmp_path / "b" / "checkpoint") == set()


def test_phase_one_moves_the_embedding_and_the_layers_up_to_the_policys_only(config_file, tmp_path):
    train(load_config(config_file, ["bupo.internal_steps=3"]))
    names = moved(tmp_path / "start", tmp_path / "run" / "checkpoint")
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    assert {name for name in names if ".layers." not in name} == {"model.embed_tokens.weight", "lm_head.weight"}  # tied


def test_the_baseline_moves_every_layer(config_file, tmp_path):
    train(load_config(config_file, ["policy=grpo"]))
    names = moved(tmp_path / "start", tmp_path / "run" / "checkpoint")
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1", "2", "3"}
    assert "model.norm.weight" in names


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
    assert not (tmp_path / "run" / "checkpoint").exists()


# ---- one update


@pytest.fixture
def batch_and_model(config_file):
    config = load_config(config_file)
    model, _ = load_model(config)
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        return torch.randint(2, 14, (int(torch.randint(low, high, (), generator=generator)),), generator=generator).tolist()

    samples = [Sample("", "", ids(2, 6), ids(1, 5), True) for _ in range(12)]
    advantages = torch.randn(12, generator=generator)
    advantages[3:6] = 0
    return config, model, collate(samples, advantages, 0, model.device)


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients of its step."""

    def step(self):
        self.gradients = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]


@pytest.mark.parametrize("policy", [FINAL, OptimisedPolicy(2), OptimisedPolicy(3, "ffn", True)], ids=lambda p: p.phase)
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean"])
def test_an_update_has_loss_and_gradient_of_the_whole_batch_at_once(batch_and_model, policy, aggregation):
    config, model, batch = batch_and_model
    tree = config.model_dump()
    clips = {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.2}
    tree["objective"] |= {"aggregation": aggregation, **clips}
    tree["optimizer"]["max_grad_norm"] = 1e9
    tree["rollout"]["temperature"] = 0.7
    config = type(config).model_validate(tree)
    old, entropy = statistics(model, batch, policy, config)
    assert ((old != 0) == batch.mask).all()
    assert (entropy[batch.mask] > 0).all()
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    batch = replace(batch, old_logprobs=(old + noise) * batch.mask)
    optimizer = Recorder(model.parameters(), lr=0.0)
    result = update(model, optimizer, batch, policy, config)

    # The plain formula, all sequences and logits at once.
    if policy == FINAL:
        hidden = model.base_model(batch.input_ids, use_cache=False).last_hidden_state
    elif policy.module == "layer":
        hidden = model.base_model(batch.input_ids, output_hidden_states=True, use_cache=False).hidden_states[policy.layer]
    else:
        seen = []
        hook = model.base_model.layers[policy.layer - 1].mlp.register_forward_hook(lambda _, __, out: seen.append(out))
        model.base_model(batch.input_ids, use_cache=False)
        hook.remove()
        hidden = model.base_model.norm(seen[0])
    logits = hidden @ model.lm_head.weight.T / 0.7
    logprobs = logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    ratio, advantages = (logprobs - batch.old_logprobs).exp(), batch.advantages
    clipped = torch.minimum(ratio * advantages, ratio.clamp(1 - clips["clip_low"], 1 + clips["clip_high"]) * advantages)
    clipped = torch.where(advantages < 0, torch.maximum(clipped, clips["dual_clip"] * advantages), clipped)
    if aggregation == "token-mean":
        loss = -clipped[batch.mask].mean()
    else:
        loss = -torch.stack([row[kept].mean() for row, kept in zip(clipped, batch.mask, strict=True)]).mean()
    model.zero_grad()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), abs=1e-6)
    assert result.clipped == pytest.approx(((clipped != ratio * advantages) & batch.mask).sum().item())
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for ours, parameter in zip(optimizer.gradients, model.parameters(), strict=True):
        if parameter.grad is None:
            assert ours is None
        else:
            assert (ours - parameter.grad).norm() <= 1e-5 * norm


def test_a_mini_batch_without_advantages_makes_no_step(batch_and_model):
    config, model, batch = batch_and_model
    old, _ = statistics(model, batch, FINAL, config)
    idle = replace(batch, old_logprobs=old, advantages=torch.zeros_like(batch.advantages))
    assert update(model, None, idle, FINAL, config) == (0.0, 0.0, 0.0)


# ---- configuration and command line

BAD_OVERRIDES = {
    "unknown key": (
        "optimizer.lerning_rate=1",
        "optimizer.lerning_rate: unknown key, did you mean learning_rate? accepted are learning_rate,",
    ),
    "unknown section": ("optimiser.betas=1", "optimiser: unknown key, did you mean optimizer?"),
    "missing model": (
        "model=/no/such/place",
        "model: /no/such/place has no config.json, accepted is the folder of a Hugging Face checkpoint",
    ),
    "missing data": ("data.train=/no/such.jsonl", "data.train: /no/such.jsonl is not a file, accepted is a JSONL file"),
    "layer out of range": ("bupo.layer=5", "bupo.layer: 5 given, accepted are 1 to 4"),
    "layer 0": ("bupo.layer=0", "bupo.layer: 0 given, accepted is greater than 0"),
    "s_inter past the end": ("bupo.internal_steps=4", "bupo.internal_steps: 4 given, accepted are 0 to 3 (steps)"),
    "negative batch": ("rollout.prompts=-4", "rollout.prompts: -4 given, accepted is greater than 0"),
    "group of one": ("rollout.samples=1", "rollout.samples: 1 given, accepted is greater than or equal to 2"),
    "mini batch that does not divide": (
        "optimizer.mini_batch=3",
        "optimizer.mini_batch: 3 given, accepted are divisors of rollout.prompts (4)",
    ),
    "unknown module": ("bupo.module=mlp", "bupo.module: 'mlp' given, accepted is 'layer', 'attention' or 'ffn'"),
    "unknown policy": ("policy=ppo", "policy: 'ppo' given, accepted is 'bupo' or 'grpo'"),
    "not a number": ("steps=many", "steps: 'many' given, accepted is a valid integer"),
    "infinite": ("optimizer.learning_rate=.inf", "optimizer.learning_rate: inf given, accepted is a finite number"),
    "no such reward": (
        "reward=bupo.rewards:nothing",
        "reward: 'bupo.rewards:nothing' given, accepted is an importable module:function",
    ),
    "no such device": ("device=abacus", "device: 'abacus' given, accepted is"),
    "output below a file": ("output_dir={tmp}/sums.jsonl/run", "output_dir: {tmp}/sums.jsonl is a file, accepted is a new"),
    "a decay of one": ("optimizer.betas=[1.0, 0.9]", "optimizer.betas.0: 1.0 given, accepted is less than 1"),
    "a flag for a number": ("steps=true", "steps: True given, accepted is not true or false"),
    "not an override": ("steps", "override: 'steps' given, accepted is key.path=value"),
    "key below a value": ("steps.many=1", "steps.many: steps is a single value"),
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
    assert "it is of type gpt2, accepted are llama, mistral, qwen2, qwen3" in capsys.readouterr().err
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


def test_the_installed_command_finds_a_reward_in_the_current_folder(config_file, tmp_path):
    (tmp_path / "my_rewards.py").write_text("def none(response, answer):\n    return 0.0\n")
    (tmp_path / "broken_rewards.py").write_text("def none(response, answer:\n")
    command = [Path(sys.executable).with_name("bupo"), "train", str(config_file), "steps=1"]
    broken = subprocess.run([*command, "reward=broken_rewards:none"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (broken.returncode, broken.stderr.count("\n")) == (2, 1)
    assert "broken_rewards:none" in broken.stderr
    assert "SyntaxError" in broken.stderr
    subprocess.run([*command, "reward=my_rewards:none"], cwd=tmp_path, check=True, capture_output=True)
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
    assert config.optimizer.learning_rate == 1e-3
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


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
