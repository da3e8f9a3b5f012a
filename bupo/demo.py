"""The demo: a model of about a million parameters learns two-digit sums, first from examples, then from reward.

It writes what a run needs (prompts, a warm checkpoint, a configuration), runs the very code of ``bupo train``, and then that of
``bupo analyze`` on the trained model.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bupo.analysis.command import analyze_command
from bupo.attention import packed_options, training_attention
from bupo.batching import pack, tokens
from bupo.config import check_new_folder, load_config
from bupo.distributed import World
from bupo.evaluation import Accuracy
from bupo.output import progress_bar
from bupo.rewards import exact_match
from bupo.rollout import Sample, Sampling, make_rollout
from bupo.trainer import train
from bupo_kernels import FusedLMHead, policy_logprobs

HELDOUT = 512  # held-out sums, of the 10,000 of two numbers below 100
ANSWER_TOKENS = 4  # three digits and the end of the sequence
WARM_ACCURACY = 0.45  # the share of right samples that ends the warm-up, by when it is about a half
WARM_STEPS = 1500  # steps after which a healthy warm-up is long done

CONFIG: dict[str, Any] = {
    "bupo": {"layer": 3, "internal_steps": 15},
    "steps": 80,
    "reward": {"function": "bupo.rewards:exact_match"},
    # Continuous batching, the default, takes half a second to set up, which is longer than to sample these few tokens.
    "rollout": {"engine": "generate", "prompts": 64, "samples": 8, "max_new_tokens": ANSWER_TOKENS},
    "optimizer": {"learning_rate": 1e-4, "mini_batch": 32},
    "evaluation": {"samples": 8, "every": 20},
}


def demo(folder: Path, policy: str = "bupo", seed: int = 0) -> tuple[Accuracy, Accuracy]:
    """Prepare ``folder``, train in ``folder/run`` and analyze the model in ``folder/analysis``; return held-out accuracy before and
    after.

    Raises :class:`ConfigError` when ``folder`` is not new or empty.
    """
    config = prepare(folder, policy, seed)
    print(f"\nbupo train {config}", flush=True)
    accuracies = train(load_config(config))
    model, analysis = folder / "run" / "model", folder / "analysis"
    same = f"--prompts 64 --samples {CONFIG['rollout']['samples']} --set hardware.precision=float32 rollout.engine=generate"
    same += f" rollout.max_new_tokens={ANSWER_TOKENS}"
    print(f"\nbupo analyze {model} --data {folder / 'heldout.jsonl'} --out {analysis} --suggest {same}", flush=True)
    analyze_command(load_config(config, [f"model={model}"]), analysis, suggest_layer=True)
    return accuracies[0], accuracies[-1]


def prepare(folder: Path, policy: str, seed: int, accuracy: float = WARM_ACCURACY) -> Path:
    """Write prompts, the warm checkpoint and the configuration of a demo run; return the configuration's path.

    The warm-up ends when a share ``accuracy`` of samples is right.
    """
    check_new_folder(folder, "--output")
    folder.mkdir(parents=True, exist_ok=True)
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(sums)
    examples = {"heldout": sums[:HELDOUT], "train": sums[HELDOUT:]}
    for name, rows in examples.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    tokenizer = character_tokenizer("0123456789+=")
    model = small_model(tokenizer, seed)
    print(f"warm-up: {model.num_parameters() / 1e6:.2f} M parameters, until {accuracy:.0%} of samples are right", flush=True)
    warm_up(model, tokenizer, examples["train"], seed, accuracy)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "warm")

    config = {
        "model": str(folder / "warm"),
        "output_dir": str(folder / "run"),
        "data": {name: str(folder / f"{name}.jsonl") for name in examples} | {"max_prompt_tokens": 8},
        "policy": policy,
        "seed": seed,
        **CONFIG,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def character_tokenizer(characters: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per character, and ``<pad>`` and ``<eos>``."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def small_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 of random weights, with four layers and 1.2 M parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def warm_up(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, sums: list[dict[str, str]], seed: int, enough: float
) -> None:
    """Train the model on solved ``sums`` until a share ``enough`` of its samples is right."""
    FusedLMHead.adopt(model.lm_head)
    rng = random.Random(seed)
    solutions = [solution(tokenizer, row) for row in sums]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    with progress_bar() as progress:
        task = progress.add_task("warm-up", total=enough)
        for step in range(1, WARM_STEPS + 1):
            batch = pack(sorted(rng.sample(solutions, 128), key=tokens), [0.0] * 128, model.device)
            with training_attention(model, "per-sequence"):
                options = packed_options(batch, "per-sequence")
                answers = policy_logprobs(model, batch.input_ids, batch.targets, return_entropy=False, **options)
            loss = -answers.logprobs.sum() / batch.mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                accuracy = sampled_accuracy(model, tokenizer, rng.sample(sums, 256), seed, step)
                progress.update(task, completed=accuracy)
                progress.console.print(
                    f"warm-up step {step}  loss {loss.item():.3f}  sampled accuracy {accuracy:.1%}", highlight=False
                )
                if accuracy >= enough:
                    return
    raise RuntimeError(f"warm-up: {accuracy:.1%} of samples right after {WARM_STEPS} steps, expected {enough:.0%}")


def solution(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Sample:
    """Return a sum with its answer as the response."""
    prompt, answer = (tokenizer(row[name], add_special_tokens=False).input_ids for name in ("prompt", "answer"))
    return Sample(prompt, [*answer, tokenizer.eos_token_id], None, finished=True)


def sampled_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, sums: list[dict[str, str]], seed: int, step: int
) -> float:
    """Return the share of sampled responses to ``sums`` that are right."""
    world, sampling = World(0, 1, model.device), Sampling(ANSWER_TOKENS, 1.0, seed, "warm-up")
    rollout = make_rollout("generate", model, tokenizer, sampling, world, sequences=len(sums))
    samples = rollout.generate([tokenizer(row["prompt"], add_special_tokens=False).input_ids for row in sums], 1, step)
    responses = (tokenizer.decode(sample.response_ids, skip_special_tokens=True) for sample in samples)
    return sum(exact_match(response, row["answer"]) for response, row in zip(responses, sums, strict=True)) / len(sums)
