"""Accuracy from counted responses: estimates, intervals, sources, ranks, and what an evaluation writes."""

import json
import math
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bupo import evaluation
from bupo.data import Example
from bupo.distributed import World
from bupo.errors import ConfigError
from bupo.evaluation import Accuracy, Estimate, evaluate, evaluate_model, intervals, pass_at_k
from bupo.rollout import Stopped

ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class FakeSample:
    response_ids: list[int]
    finished: bool


@dataclass(frozen=True)
class FakeRollout:
    """Response j to the problem with prompt ids (i,) is ``j % (i + 2)``; the greedy one is ``i % 2``."""

    settings: dict
    calls: list = field(default_factory=list)

    def with_sampling(self, **changes):
        return replace(self, settings={**self.settings, **changes})

    def generate(self, prompts, n, step):
        self.calls.append((len(prompts), n, step, self.settings["temperature"], self.settings["stream"], self.settings["seed"]))
        greedy = self.settings["temperature"] == 0
        numbers = [(i % 2 if greedy else j % (i + 2)) for (i,) in prompts for j in range(n)]
        return [FakeSample([number] * (number + 1), finished=number != 2) for number in numbers]


class FakePool:
    """The reward is 1 for the response "0"; that of the response "3" fails."""

    last_failure = "TimeoutError: 3 took longer than 10 s"

    def __init__(self):
        self.failures = Counter()

    def score(self, pairs):
        rewards = [math.nan if response == "3" else float(response == "0") for response, *_ in pairs]
        self.failures["timeout"] += sum(map(math.isnan, rewards))
        return rewards


class ThreadWorld(World):
    """Ranks that are threads of one process."""

    def gather(self, items):
        self.parts[self.rank] = items
        self.wait.wait()
        together = [item for part in self.parts for item in part]
        self.wait.wait()
        return together

    def from_main(self, value):
        return self.gather([value])[0]

    def barrier(self):
        self.wait.wait()


def on_ranks(size, work):
    """What ``work(world, rollout)`` returns on each rank, and the rollouts."""
    worlds = [ThreadWorld(rank, size, torch.device("cpu")) for rank in range(size)]
    parts, wait = [None] * size, threading.Barrier(size, timeout=20)
    results, rollouts = [None] * size, [rollout() for _ in range(size)]
    for world in worlds:
        object.__setattr__(world, "parts", parts)
        object.__setattr__(world, "wait", wait)

    def run(rank):
        try:
            results[rank] = work(worlds[rank], rollouts[rank])
        except BaseException as error:
            results[rank] = error
            wait.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results, rollouts


def rollout():
    return FakeRollout({"temperature": 0.7, "stream": "rollout", "seed": 99})


def decode(ids):
    return str(ids[0])


def problems(number):
    return [Example(f"p{i}", (i,), "0", "odd" if i % 2 else "even") for i in range(number)]


def run(examples, world=ALONE, policy=None, **settings):
    settings = {"samples": 4, "ks": [1, 4], "seed": 5, **settings}
    return evaluate(policy or rollout(), decode, examples, FakePool(), world, **settings)


# ---- estimates


def test_pass_at_k_is_unbiased():
    assert pass_at_k(16, 4, 4) == pytest.approx(0.728, abs=5e-4)
    assert (pass_at_k(8, 0, 8), pass_at_k(8, 1, 8), pass_at_k(5, 2, 1)) == (0.0, 1.0, pytest.approx(0.4))
    assert pass_at_k(300, 1, 256) == pytest.approx(256 / 300)
    with pytest.raises(ValueError, match="k: 9 given"):
        pass_at_k(8, 1, 9)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(case):
    n, correct, k = case
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_intervals_hold_the_mean_and_stay_within_the_values(rows, seed):
    values = np.array(rows) / [1, 8]
    found = intervals(values, seed)
    assert [estimate.value for estimate in found] == pytest.approx(values.mean(0))
    for estimate, column in zip(found, values.T, strict=True):
        assert column.min() <= estimate.low <= estimate.value + 1e-12
        assert estimate.value - 1e-12 <= estimate.high <= column.max()
    assert found == intervals(values, seed)


def test_an_interval_is_that_of_the_normal_approximation_where_problems_are_many():
    values = (np.arange(1000) < 400).astype(float)[:, None]
    (found,) = intervals(values, 0)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 1000)
    assert found == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=0.003)
    assert intervals(values, 1) != [found]


def test_of_one_problem_the_interval_is_the_value():
    assert intervals(np.array([[0.25, 1.0]]), 3) == [Estimate(0.25, 0.25, 0.25), Estimate(1.0, 1.0, 1.0)]


# ---- evaluation


def test_evaluation_counts_what_the_reward_says():
    accuracy = run(problems(3))  # samples 0101, 0120, 0123 (of which 3 fails); greedy 0, 1, 0
    assert accuracy.problems == 3
    assert accuracy.greedy == pytest.approx(2 / 3)
    values = {name: estimate.value for name, estimate in accuracy.estimates.items()}
    expected = {"greedy": 2 / 3, "avg@4": (2 + 2 + 1) / 12, "pass@1": 5 / 12, "pass@4": 1.0}
    assert values == pytest.approx(expected)
    assert list(values) == list(expected)
    assert accuracy.reward_failures == 1
    assert accuracy.response_tokens == pytest.approx((1 + 2 + 1 + 2 + 1 + 2 + 3 + 1 + 1 + 2 + 3 + 4) / 12)
    assert accuracy.finished == pytest.approx(10 / 12)
    assert {name: (s.problems, s.greedy, s.reward_failures) for name, s in accuracy.sources.items()} == {
        "even": (2, 1.0, 1),
        "odd": (1, 0.0, 0),
    }
    assert accuracy.sources["even"].estimates["avg@4"].value == pytest.approx(3 / 8)


def test_greedy_and_sampled_responses_come_from_the_evaluation_stream():
    policy = rollout()
    run(problems(3), policy=policy)
    (one, four) = policy.calls
    assert one[:5] == (3, 1, 0, 0.0, "evaluation")
    assert four[:5] == (3, 4, 0, 0.7, "evaluation")
    seeds = [call[5] for call in policy.calls]
    again, other = rollout(), rollout()
    run(problems(3), policy=again)
    run(problems(3), policy=other, seed=6)
    assert [call[5] for call in again.calls] == seeds
    assert other.calls[1][5] != seeds[1]


def test_without_greedy_only_samples_are_generated():
    policy = rollout()
    accuracy = run(problems(3), policy=policy, greedy=False)
    assert [call[1] for call in policy.calls] == [4]
    assert accuracy.greedy is None
    assert "greedy" not in accuracy.as_dict()
    assert str(accuracy).startswith("avg@4 41.7% [")


def test_many_problems_are_generated_in_parts_with_seeds_of_their_own(monkeypatch):
    whole, told, collected = run(problems(7)), [], []
    monkeypatch.setattr(evaluation, "RESPONSES", 9)  # two problems at a time
    policy = rollout()
    parts = run(
        problems(7), policy=policy, progress=lambda *state: told.append(state), collect=lambda *part: collected.append(part)
    )
    assert [call[:2] for call in policy.calls] == [(2, 1), (2, 4)] * 3 + [(1, 1), (1, 4)]
    assert len({call[5] for call in policy.calls}) == 4
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert [(number, len(part)) for number, part in collected] == [(0, 10), (1, 10), (2, 10), (3, 5)]
    assert parts == whole


@pytest.mark.parametrize(("size", "number"), [(2, 7), (3, 7), (4, 2)])
def test_every_rank_returns_what_one_process_does_and_generates_as_often(monkeypatch, size, number):
    monkeypatch.setattr(evaluation, "RESPONSES", 4)  # one problem at a time
    collected = [[] for _ in range(size)]
    results, rollouts = on_ranks(
        size, lambda world, policy: run(problems(number), world, policy, collect=lambda _, part: collected[world.rank].extend(part))
    )
    assert results == [run(problems(number))] * size
    assert {len(policy.calls) for policy in rollouts} == {2 * math.ceil(number / size)}  # else the others would wait for ever
    assert all(sorted(part, key=lambda r: r.problem) == sorted(collected[0], key=lambda r: r.problem) for part in collected)
    assert Counter(response.problem for response in collected[0]) == dict.fromkeys(range(number), 5)


def test_a_failed_reward_is_wrong_and_recorded_as_null():
    collected = []
    run(problems(3), collect=lambda _, part: collected.extend(part))
    failed = [response for response in collected if response.response == "3"]
    assert [(r.problem, r.reward, r.right, r.source, r.prompt, r.answer, r.greedy) for r in failed] == [
        (2, None, False, "even", "p2", "0", False)
    ]
    assert [r.finished for r in collected] == [r.response != "2" for r in collected]
    assert [r.greedy for r in collected] == [True, *[False] * 4] * 3
    assert [r.tokens for r in collected] == [int(r.response) + 1 for r in collected]


def test_the_line_the_dictionary_and_the_table_say_the_same():
    accuracy = Accuracy(
        problems=512,
        samples=8,
        estimates={
            "greedy": Estimate(0.612, 0.57, 0.653),
            "avg@8": Estimate(0.581, 0.55, 0.61),
            "pass@1": Estimate(0.581, 0.55, 0.61),
        }
        | {"pass@8": Estimate(0.8, 0.77, 0.83)},
        response_tokens=1234.5,
        finished=0.9,
        reward_failures=0,
    )
    line = "greedy 61.2% [57.0, 65.3], avg@8 58.1% [55.0, 61.0], pass@8 80.0% [77.0, 83.0] on 512 problems"
    assert str(accuracy) == line
    assert str(replace(accuracy, reward_failures=3)) == line + ", 3 rewards failed"
    whole = replace(accuracy, sources={"aime": replace(accuracy, problems=30), "[/math]": accuracy})
    row = json.loads(json.dumps(whole.as_dict()))
    assert (row["greedy"], row["greedy_low"], row["greedy_high"], row["pass@8_low"], row["problems"]) == (
        0.612,
        0.57,
        0.653,
        0.77,
        512,
    )
    assert row["sources"]["aime"]["problems"] == 30
    assert "sources" not in row["sources"]["aime"]
    table = whole.table()
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == [
        *("source", "problems", "greedy", "avg@8", "pass@1", "pass@8", "tokens", "finished", "failed")
    ]
    assert cells[0] == ["aime", r"\[/math]", "all"]
    assert cells[1] == ["30", "512", "512"]
    assert cells[2] == ["61.2% [57.0, 65.3]"] * 3


@pytest.mark.parametrize(
    "changes", [{"examples": []}, {"ks": []}, {"ks": [5]}, {"ks": [0]}, {"samples": 0, "ks": [1]}], ids=lambda changes: str(changes)
)
def test_bad_arguments_are_named(changes):
    with pytest.raises(ValueError, match=r"examples: \d, ks: .* given, accepted"):
        run(**{"examples": problems(2), **changes})


# ---- bupo evaluate


def evaluated(out, world=ALONE, policy=None, **settings):
    settings = {"samples": 4, "ks": [1, 4], "seed": 5, **settings}
    examples = settings.pop("examples", problems(3))
    return evaluate_model(policy or rollout(), decode, examples, FakePool(), world, out=out, **settings)


def test_an_evaluation_prints_its_table_and_leaves_two_files(tmp_path, capsys):
    accuracy = evaluated(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["accuracy.json", "responses.jsonl"]
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text()) == accuracy.as_dict()
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 5
    assert rows[0] == {
        **{"problem": 0, "source": "even", "prompt": "p0", "answer": "0", "response": "0", "reward": 1.0, "tokens": 1},
        **{"finished": True, "greedy": True, "prompt_ids": [0], "response_ids": [0]},
    }
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("even", "odd", "all", "66.7% [", "bootstrap"))
    assert "the last reward that failed: TimeoutError: 3 took longer" in shown
    assert max(map(len, shown.splitlines())) > 80  # not folded into the 80 columns that rich gives a file


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated(None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_in_use_is_refused_before_anything_is_generated(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    policy = rollout()
    with pytest.raises(ConfigError, match=r"--out: .* is not empty"):
        evaluated(tmp_path, policy=policy)
    assert policy.calls == []


@dataclass(frozen=True)
class Breaking(FakeRollout):
    """Raises ``error`` at its fifth call."""

    error: BaseException = field(default_factory=KeyboardInterrupt)

    def generate(self, prompts, n, step):
        if len(self.calls) == 4:
            raise self.error
        return super().generate(prompts, n, step)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
def test_an_evaluation_that_is_interrupted_keeps_its_responses_and_goes_on_after_them(tmp_path, monkeypatch, error):
    monkeypatch.setattr(evaluation, "RESPONSES", 4)  # one problem at a time
    accuracy = evaluated(tmp_path / "whole")
    with pytest.raises(type(error)):
        evaluated(tmp_path / "out", policy=Breaking(rollout().settings, error=error))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["partial"]
    (tmp_path / "out" / "partial" / "part-000002.jsonl.partial").write_text("{")  # as of a process that was killed
    with pytest.raises(ConfigError, match=r"unfinished evaluation with another samples, accepted is the same, or a new folder"):
        evaluated(tmp_path / "out", samples=5)
    again = rollout()
    assert evaluated(tmp_path / "out", policy=again) == accuracy
    assert [call[:2] for call in again.calls] == [(1, 1), (1, 4)]  # the third problem only
    for name in ("responses.jsonl", "accuracy.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not (tmp_path / "out" / "partial").exists()


def test_responses_of_other_problems_of_another_model_or_on_other_devices_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESPONSES", 4)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, policy=Breaking(rollout().settings), plan={"model": "a"})
    for word, changes in (("model", {"plan": {"model": "b"}}), ("problems", {"plan": {"model": "a"}, "examples": problems(4)})):
        with pytest.raises(ConfigError, match=f"unfinished evaluation with another {word}"):
            evaluated(tmp_path, **changes)

    def refused(world, policy):
        with pytest.raises(ConfigError, match="unfinished evaluation with another devices"):
            evaluated(tmp_path, world, policy, plan={"model": "a"})

    assert on_ranks(2, refused)[0] == [None, None]
    (tmp_path / "partial" / "part-000000.jsonl").write_text('{"problem": 0}\n')
    with pytest.raises(ConfigError, match=r"part-000000.jsonl cannot be read, accepted is a new folder"):
        evaluated(tmp_path, plan={"model": "a"})


@pytest.mark.parametrize("when", ["within", "after"])
def test_on_sigterm_every_rank_gives_up_its_responses(monkeypatch, when):
    """The rank that was told, within its responses or after them, and the other at the ask that follows."""

    class Told:
        received = False

        def __init__(self, world):
            self.world = world

        def requested(self):
            return any(self.world.gather([self.received]))

    @dataclass(frozen=True)
    class Asking(FakeRollout):
        told: Told = None

        def generate(self, prompts, n, step):
            samples = super().generate(prompts, n, step)
            self.told.received = self.told.world.rank == 1 and len(self.calls) == 3
            if self.settings["stop"]() and when == "within":
                raise Stopped
            return samples

    monkeypatch.setattr(evaluation, "RESPONSES", 4)

    def work(world, policy):
        told = Told(world)
        with pytest.raises(Stopped):
            run(problems(6), world, Asking(policy.settings, policy.calls, told), termination=told)

    results, rollouts = on_ranks(2, work)
    assert results == [None, None]
    assert [len(policy.calls) for policy in rollouts] == [3, 3]
    assert run(problems(3), termination=Told(ALONE)) == run(problems(3))


def test_only_rank_zero_writes_and_prints(tmp_path, capsys):
    results, _ = on_ranks(3, lambda world, policy: evaluated(tmp_path / "out", world, policy))
    assert results == [evaluated(None)] * 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in rows] == [0] * 5 + [1] * 5 + [2] * 5
    assert capsys.readouterr().out.count("95 %") == 2  # one by the ranks, one by the single process
