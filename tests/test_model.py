"""Folders of models that cannot be used as they are: named in a line, or read right, and never filled up with random numbers."""

import json
from pathlib import Path

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from bupo.analysis.command import _load_for_reading
from bupo.architecture import load_architecture
from bupo.cli import main
from bupo.config import Hardware, parse_config
from bupo.demo import character_tokenizer
from bupo.distributed import World
from bupo.errors import ConfigError
from bupo.model import load_model, load_tokenizer

ALONE = World(0, 1, torch.device("cpu"))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 9912\n"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(tmp_path, request) -> Path:
    tiny_model(tied=request.param).save_pretrained(tmp_path)
    return tmp_path


def config_of(folder: Path):
    tree = {"model": str(folder), "output_dir": "unused", "policy": "grpo", "data": {"train": "unused"}}
    return parse_config(tree)


LOADERS = {
    "train, evaluate": lambda folder: load_model(str(folder), Hardware(device="cpu"), ALONE),
    "analyze": lambda folder: _load_for_reading(config_of(folder), str(folder), ALONE),
}


@pytest.fixture(params=LOADERS.values(), ids=LOADERS)
def load(request):
    return request.param


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without_the_mlp_of_layer_2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def another_width(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))


WEIGHTS = "model.safetensors"
UNUSABLE = {
    "weights are missing": (
        lambda folder: rewrite(folder, without_the_mlp_of_layer_2),
        "it lacks model.layers.1.mlp.down_proj.weight and 2 other weights",
    ),
    "weights are left over": (
        lambda folder: rewrite(folder, lambda w: {**w, "model.layers.4.mlp.up_proj.weight": torch.zeros(2)}),
        "it has model.layers.4.mlp.up_proj.weight, which its config knows nothing of",
    ),
    "an unknown prefix": (
        lambda folder: rewrite(folder, lambda w: {f"actor.{name}": weight for name, weight in w.items()}),
        "it lacks .*; it has actor.*, which its config knows nothing of",
    ),
    "another shape": (another_width, r"model.layers.0.mlp.down_proj.weight is \(32, 48\) there and \(32, 40\) by its config"),
    "a pointer of Git LFS": (
        lambda folder: (folder / WEIGHTS).write_text(POINTER),
        r"model.safetensors is a pointer of Git LFS, not the file itself \(git lfs pull\)",
    ),
    "cut off": (lambda folder: cut(folder / WEIGHTS, 60_000), "model.safetensors is damaged: "),
    "cut off in its header": (lambda folder: cut(folder / WEIGHTS, 5), "model.safetensors is damaged: "),
    "not there": (lambda folder: (folder / WEIGHTS).unlink(), ".*no file named"),
    "config is a pointer": (lambda folder: (folder / "config.json").write_text(POINTER), "config.json is a pointer of Git LFS"),
    "config is of another kind": (lambda folder: (folder / "config.json").write_text("[]"), ""),
}


@pytest.mark.parametrize(("damage", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_model_that_cannot_be_used_is_named_with_the_reason_in_a_line(folder, load, damage, reason):
    damage(folder)
    with pytest.raises(ConfigError, match=f"^model: {folder} cannot be used: {reason}") as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_a_head_and_an_embedding_that_should_be_tied_and_differ_are_refused(tmp_path, load):
    """transformers would untie them, on the rank that reads them alone."""
    tiny_model(tied=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"] + 1})
    with pytest.raises(ConfigError, match="its config has tie_word_embeddings, but its head and its embedding differ"):
        load(tmp_path)
    rewrite(tmp_path, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})
    assert weights_equal(load(tmp_path), tiny_model(tied=True))


def test_so_are_they_behind_a_wrapper(tmp_path, load):
    tiny_model(tied=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda w: {f"module.{k}": x for k, x in {**w, "lm_head.weight": w["model.embed_tokens.weight"] + 1}.items()})
    with pytest.raises(ConfigError, match=r"it has (lm_head|model.embed_tokens).weight, which its config knows nothing of"):
        load(tmp_path)


def weights_equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_what_a_wrapper_put_in_front_of_names_is_taken_off_with_a_line(folder, load, capsys, file):
    whole = load(folder)

    def wrapped(name: str) -> str:
        return "module._orig_mod." + name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")

    rewrite(folder, lambda weights: {wrapped(name): weight for name, weight in weights.items()})
    if file == "bin":
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
    capsys.readouterr()
    assert weights_equal(load(folder), whole)
    prefixes = "_checkpoint_wrapped_module., _orig_mod., module."
    assert capsys.readouterr().out == f"model: {folder}: {prefixes} taken off the names of its weights\n"


def test_what_is_missing_behind_a_wrapper_is_named_by_its_own_name(folder, load):
    weights = without_the_mlp_of_layer_2(load_file(folder / WEIGHTS))
    rewrite(folder, lambda _: {f"_orig_mod.{name}": weight for name, weight in weights.items()})
    with pytest.raises(ConfigError, match=r"it lacks model.layers.1.mlp.\w+.weight and 2 other weights$"):
        load(folder)


def test_a_rank_that_reads_no_weights_ends_responses_where_the_first_does(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[1, 5]).save_pretrained(tmp_path)
    for weights in (True, False):
        model = load_model(str(tmp_path), Hardware(device="cpu"), ALONE, weights=weights)
        assert model.generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, name):
    character_tokenizer("01").save_pretrained(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ConfigError, match=f"{name} is a pointer of Git LFS"):
        load_tokenizer(str(tmp_path))


def test_a_config_that_cannot_be_read_is_named_before_anything_else(tmp_path):
    AutoConfig.for_model("qwen3").save_pretrained(tmp_path)
    cut(tmp_path / "config.json", 40)
    with pytest.raises(ConfigError, match=f"^model: {tmp_path} cannot be used: "):
        load_architecture(config_of(tmp_path))


def test_the_commands_say_it_and_exit_with_two(tmp_path, capsys):
    for part in (tiny_model(vocab=14), character_tokenizer("0123456789+=")):
        part.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    rewrite(tmp_path / "model", without_the_mlp_of_layer_2)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    words = ["--data", str(tmp_path / "sums.jsonl"), "--out", str(tmp_path / "out")]
    small = ["--set", "rollout.max_new_tokens=3", "data.max_prompt_tokens=6", "rollout.samples=2"]
    for command in ("evaluate", "analyze"):
        assert main([command, str(tmp_path / "model"), *words, *small]) == 2
        error = capsys.readouterr().err
        assert "it lacks model.layers.1.mlp.down_proj.weight and 2 other weights" in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
