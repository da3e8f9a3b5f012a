"""What the loop is made of: data, rewards, advantages, schedule, rollouts, evaluation."""

import json
import math

import pytest
import torch
from models import tiny_model
from torch import nn

from bupo.advantages import group_advantages
from bupo.config import Bupo, ConfigError, Data, TrainConfig
from bupo.data import Example, PromptOrder, load_examples, stream_seed
from bupo.demo import character_tokenizer
from bupo.evaluation import evaluate, pass_at_k
from bupo.rewards import exact_match, load_reward, score
from bupo.rollout import IGNORE, Sample, collate, generate
from bupo.schedule import FINAL, OptimisedPolicy, policy_at

CHARACTERS = "0123456789+="


@pytest.fixture(scope="module")
def policy() -> tuple[nn.Module, object]:
    tokenizer = character_tokenizer(CHARACTERS)
    return tiny_model(vocab=len(tokenizer)), tokenizer


# ---- data


def test_examples_are_read_and_other_columns_ignored(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2", "level": 3}\n\n{"prompt": "1+2=", "answer": "3"}\n')
    assert load_examples(path, "data.train") == [Example("1+1=", "2"), Example("1+2=", "3")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"\n', "line 2 is not JSON"),
        ('{"prompt": "a"}\n', "line 1 has no 'answer'"),
        ('{"prompt": "", "answer": "b"}\n', "line 1 has no 'prompt'"),
        ('["a", "b"]\n', "line 1 has no 'prompt'"),
        ('{"prompt": "a", "answer": 3}\n', "line 1 has no 'answer', accepted is a non-empty string"),
        ("\n", "is empty, accepted is at least one example"),
    ],
)
def test_bad_rows_are_named_by_key_and_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_examples(path, "data.train")
    assert str(error.value).startswith("data.train: ")


def test_every_epoch_shows_each_example_once_in_another_order():
    examples = [Example(str(i), str(i)) for i in range(10)]
    order = PromptOrder(examples, batch=4, seed=3)
    seen = [example for step in range(1, 11) for example in order.at(step)]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch, key=lambda e: int(e.prompt)) == examples for epoch in epochs)
    assert len({tuple(e.prompt for e in epoch) for epoch in epochs}) == 4
    assert order.at(7) == PromptOrder(examples, batch=4, seed=3).at(7)
    assert order.at(7) != PromptOrder(examples, batch=4, seed=4).at(7)


def test_a_batch_may_be_larger_than_the_data():
    batch = PromptOrder([Example("a", "a"), Example("b", "b")], batch=5, seed=0).at(2)
    assert len(batch) == 5
    assert {example.prompt for example in batch} == {"a", "b"}


# ---- rewards and advantages


def test_rewards_are_found_by_import_path():
    assert load_reward("bupo.rewards:exact_match") is exact_match
    assert (exact_match(" 12\n", "12"), exact_match("120", "12")) == (1.0, 0.0)


@pytest.mark.parametrize("path", ["exact_match", "bupo.nothing:here", "bupo.rewards:nothing", "math:pi", ":x"])
def test_a_reward_that_is_not_there_is_named(path):
    with pytest.raises(ConfigError, match="reward: "):
        load_reward(path)


def test_a_reward_that_is_not_finite_stops_the_run_and_shows_the_response():
    sample = Sample("1+1=", "7", [2], [3], True)
    with pytest.raises(ValueError, match="reward: nan returned for the response '7'"):
        score(lambda response, answer: math.nan, [sample], [Example("1+1=", "2")])


def test_advantages_are_standardised_within_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 4.0]])
    advantages = group_advantages(rewards)
    assert advantages[0].tolist() == pytest.approx([0.8660254, -0.8660254, -0.8660254, 0.8660254], rel=1e-5)
    assert (advantages[1] == 0).all()  # exactly, so that its tokens cost nothing
    assert advantages.sum(1).abs().max() < 1e-6
    assert group_advantages(rewards, divide_by_std=False)[2].tolist() == [-1.0, -1.0, -1.0, 3.0]


def test_a_group_of_one_has_no_advantage():
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.zeros(4, 1))


# ---- schedule


def test_the_phase_depends_on_the_step_alone():
    paths = {"model": "m", "output_dir": "o", "data": Data(train="t", heldout="h")}
    config = TrainConfig(**paths, steps=10, bupo=Bupo(layer=2, internal_steps=3, module="ffn"))
    internal = OptimisedPolicy(2, "ffn", False)
    assert [policy_at(step, config) for step in range(1, 6)] == [internal] * 3 + [FINAL] * 2
    assert internal.phase == "ffn 2"
    assert policy_at(1, config.model_copy(update={"policy": "grpo"})) == FINAL


# ---- rollouts


def test_generation_stops_at_the_end_of_sequence_and_keeps_it(policy):
    model, tokenizer = policy
    samples = generate(model, tokenizer, ["1+1=", "99+99="] * 40, max_new_tokens=6, temperature=1.0, seed=1)
    assert {sample.finished for sample in samples} == {True, False}
    for sample in samples:
        assert sample.prompt_ids == tokenizer(sample.prompt).input_ids
        assert sample.finished == (sample.response_ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in sample.response_ids[:-1]
        assert sample.finished or len(sample.response_ids) == 6


def test_samples_depend_on_the_seed_and_greedy_ones_do_not(policy):
    model, tokenizer = policy
    prompts = ["1+1=", "12+3="] * 8

    def responses(temperature, seed, batch=None):
        return [
            s.response_ids
            for s in generate(model, tokenizer, prompts, max_new_tokens=5, temperature=temperature, seed=seed, batch=batch)
        ]

    assert responses(1.0, 1) == responses(1.0, 1) != responses(1.0, 2)
    assert responses(0, 1) == responses(0, 2) == responses(0, 1, batch=3)


def test_settings_of_the_checkpoint_do_not_bend_the_policy(policy):
    model, tokenizer = policy
    own = model.generation_config

    def responses():
        return [s.response_ids for s in generate(model, tokenizer, ["1+1="] * 20, max_new_tokens=5, temperature=1.0, seed=1)]

    plain = responses()
    model.generation_config = bent = type(own)(repetition_penalty=5.0, min_p=0.9)
    try:
        assert responses() == plain
        assert model.generation_config is bent
    finally:
        model.generation_config = own


def test_streams_of_random_numbers_differ():
    seeds = {
        stream_seed(seed, stream, index) for seed in (0, 1, 2**32 - 1) for stream in ("order", "rollout") for index in range(50)
    }
    assert len(seeds) == 300


def test_left_padded_generation_is_what_the_right_padded_batch_scores(policy):
    """The tokens that greedy decoding chose are the most likely ones under the log-probs that training computes."""
    from bupo_kernels import policy_logprobs

    model, tokenizer = policy
    samples = generate(model, tokenizer, ["1+1=", "99+99=", "5"], max_new_tokens=4, temperature=0, seed=0)
    batch = collate(samples, torch.zeros(3), tokenizer.pad_token_id, model.device)
    logits = model(batch.input_ids).logits
    assert torch.equal(logits.argmax(-1)[batch.mask], batch.targets[batch.mask])
    expected = logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    assert (policy_logprobs(model, batch.input_ids, batch.targets).logprobs - expected)[batch.mask].abs().max() < 1e-5


def test_collate_targets_exactly_the_response_tokens():
    samples = [Sample("", "", [5, 6, 7], [8, 1], True), Sample("", "", [5], [9, 9, 9], False)]
    batch = collate(samples, torch.tensor([0.5, -1.0]), 0, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 9, 9, 0]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 8, 1, IGNORE], [9, 9, 9, IGNORE, IGNORE]]
    assert batch.advantages.tolist() == [[0.5] * 5, [-1.0] * 5]
    first, second = batch.split(1)
    assert first.input_ids.tolist() == [[5, 6, 7, 8]]  # the last token predicts nothing
    assert second.input_ids.tolist() == [[5, 9, 9]]
    assert len(batch[torch.tensor([False, True])]) == 1


# ---- evaluation


def test_pass_at_k_is_unbiased():
    assert pass_at_k(16, 4, 4) == pytest.approx(0.728, abs=5e-4)
    assert (pass_at_k(8, 0, 8), pass_at_k(8, 1, 8), pass_at_k(5, 2, 1)) == (0.0, 1.0, pytest.approx(0.4))
    with pytest.raises(ValueError, match="k: 9 given"):
        pass_at_k(8, 1, 9)


def test_evaluation_counts_what_the_reward_says(policy):
    model, tokenizer = policy
    examples = [Example(f"{i}+{i}=", str(2 * i)) for i in range(6)]
    settings = {"samples": 3, "temperature": 1.0, "max_new_tokens": 3, "seed": 0, "batch": 4}
    all_right = evaluate(model, tokenizer, examples, lambda response, answer: 1.0, **settings)
    assert (all_right.greedy, all_right.avg_at_k, all_right.pass_at_k, all_right.k, all_right.problems) == (1, 1, 1, 3, 6)
    some = evaluate(model, tokenizer, examples, lambda response, answer: float(answer in ("0", "2")), **settings)
    assert (some.greedy, some.avg_at_k, some.pass_at_k) == (pytest.approx(1 / 3),) * 3
    assert "greedy 33.3%, avg@3 33.3%, pass@3 33.3% on 6 problems" in str(some)
    json.dumps(some.as_dict())
