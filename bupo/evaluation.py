"""Accuracy on held-out problems: greedy, avg@n and unbiased pass@k, with intervals, per data source."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bupo.config import check_new_folder
from bupo.data import Example, question, stream_seed
from bupo.distributed import Termination, World
from bupo.errors import ConfigError
from bupo.output import FolderLock, claim, progress_bar, replace_file
from bupo.rewards import RewardPool
from bupo.rollout import Rollout, Sample, Stopped

SOLVED = 0.5  # a response is right when its reward is above this
RESPONSES = 2048  # responses sampled at a time per device, which bounds the memory of token ids and log-probs
RESAMPLES = 2000  # resamples of the bootstrap
PARTIAL = "partial"  # the folder, within that of the results, of an unfinished evaluation


class Estimate(NamedTuple):
    """A mean over problems with its 95 % bootstrap interval (see :func:`intervals`)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Accuracy:
    """The share of ``problems`` that a policy solves; a response is right when its reward is above :data:`SOLVED`."""

    problems: int
    samples: int  # n, per problem
    estimates: dict[str, Estimate]  # "greedy" (if asked for), "avg@n", "pass@k" for every k asked for
    response_tokens: float  # mean over the sampled responses
    finished: float  # share of the sampled responses that are not cut off
    reward_failures: int  # responses whose reward failed, greedy ones included; they count as wrong
    sources: dict[str, Accuracy] = field(default_factory=dict)  # the accuracy on each data source

    @property
    def greedy(self) -> float | None:
        """The share of problems that the greedy response solves; None without such responses."""
        return self.estimates["greedy"].value if "greedy" in self.estimates else None

    def __str__(self) -> str:
        """Return a line with greedy, avg@n and pass@k of the greatest k."""
        passes = [name for name in self.estimates if name.startswith("pass@")]
        shown = [name for name in self.estimates if name not in passes] + passes[-1:]
        failures = f", {self.reward_failures} rewards failed" if self.reward_failures else ""
        return f"{', '.join(f'{name} {self.estimates[name]}' for name in shown)} on {self.problems} problems{failures}"

    def as_dict(self) -> dict:
        """Return it for JSON: an estimate is three numbers, such as ``greedy``, ``greedy_low`` and ``greedy_high``."""
        numbers: dict[str, Any] = {}
        for name, estimate in self.estimates.items():
            numbers |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        for name in ("problems", "samples", "response_tokens", "finished", "reward_failures"):
            numbers[name] = getattr(self, name)
        return numbers | ({"sources": {name: source.as_dict() for name, source in self.sources.items()}} if self.sources else {})

    def table(self) -> Table:
        """Return a table with a row for each data source and one for all problems."""
        table = Table(caption="in brackets: 95 % bootstrap intervals over problems", caption_justify="left")
        table.add_column("source", overflow="fold")
        for name in ("problems", *self.estimates, "tokens", "finished", "failed"):
            table.add_column(name, justify="right")
        for name, row in {**self.sources, "all": self}.items():
            if row is self:
                table.add_section()
            numbers = (f"{row.response_tokens:,.0f}", f"{row.finished:.1%}", str(row.reward_failures))
            table.add_row(escape(name), str(row.problems), *map(str, row.estimates.values()), *numbers)
        return table


@dataclass(frozen=True)
class Response:
    """A response of an evaluation, as ``bupo evaluate --out`` writes it."""

    problem: int  # the index of the example
    source: str
    prompt: str
    answer: str
    response: str
    reward: float | None  # None if it failed
    tokens: int
    finished: bool
    greedy: bool
    prompt_ids: Sequence[int]  # the text does not determine the tokens, and a reader of the file needs those
    response_ids: Sequence[int]

    @property
    def right(self) -> bool:
        return self.reward is not None and self.reward > SOLVED


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return ``1 − C(n−c, k) / C(n, k)``, the unbiased estimate, from n samples with c right, of the chance that one of k is."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"n: {n}, correct: {correct}, k: {k} given, accepted are 0 <= correct <= n and 1 <= k <= n")
    return 1 - comb(n - correct, k) / comb(n, k)


def intervals(values: np.ndarray, seed: int) -> list[Estimate]:  # [problems, columns] -> one estimate per column
    """Return the mean of each column and its 95 % percentile bootstrap interval over the rows.

    The problems are resampled, each with all of its responses, so the interval covers the choice of the problems and the sampling
    of the responses. It knows no problem but these: for one problem it is the value itself, for a few it is too narrow, and where
    all are right (or all wrong) it has no width.
    """
    generator, size = np.random.default_rng(seed), len(values)
    means = np.stack([values[generator.integers(size, size=size)].mean(0) for _ in range(RESAMPLES)])  # [resamples, columns]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return [Estimate(*map(float, column)) for column in zip(values.mean(0), low, high, strict=True)]


def evaluate(
    rollout: Rollout,
    decode: Callable[[Sequence[int]], str],
    examples: Sequence[Example],
    pool: RewardPool,
    world: World,
    *,
    samples: int,
    ks: Sequence[int],
    seed: int,
    greedy: bool = True,
    progress: Callable[[int, int], None] | None = None,
    collect: Callable[[int, list[Response]], None] | None = None,
    finished: Mapping[int, list[Response]] | None = None,
    termination: Termination | None = None,
) -> Accuracy:
    """Return the accuracy of the policy behind ``rollout`` on ``examples``.

    A collective: every rank has the same arguments and result. The same ``seed`` gives the same samples on the same number of
    devices.

    Args:
        rollout: its temperature and length are those of the samples; the greedy response is generated besides.
        decode: turns the token ids of a response into text.
        samples: n, the responses sampled per problem.
        ks: every k of pass@k, each at most n.
        progress: called with the number of this rank's problems that are done, and of all of them.
        collect: called with the number of a part, which is some of the problems, and all ranks' responses to it.
        finished: the parts that an earlier call has collected, which are not done again. Rank 0's count.
        termination: when it is requested, responses are given up within a second and :class:`Stopped` is raised on every rank.
    """
    if not examples or not ks or not all(1 <= k <= samples for k in ks):
        raise ValueError(f"examples: {len(examples)}, ks: {list(ks)} given, accepted are at least 1 and 1 to samples ({samples})")

    def told() -> bool:
        return termination is not None and termination.received

    def respond(policy: Rollout, problems: Sequence[int], n: int, greedy: bool) -> list[Response]:
        """Return ``n`` responses to each of the problems, scored."""
        asked = [i for i in problems for _ in range(n)]
        generated: list[Sample] = []
        with suppress(Stopped):
            generated = policy.generate([examples[i].prompt_ids for i in problems], n, 0)
        if termination is not None and termination.requested():  # every rank asks, whether it has given up or not
            raise Stopped
        texts = [decode(sample.response_ids) for sample in generated]
        replies = zip(asked, texts, generated, strict=True)
        rewards = pool.score([question(examples[i], text, sample.response_ids) for i, text, sample in replies])
        return [
            Response(
                problem=i,
                source=examples[i].source,
                prompt=examples[i].prompt,
                answer=examples[i].answer,
                response=text,
                reward=None if math.isnan(reward) else float(reward),
                tokens=len(sample.response_ids),
                finished=sample.finished,
                greedy=greedy,
                prompt_ids=examples[i].prompt_ids,
                response_ids=list(map(int, sample.response_ids)),
            )
            for i, text, reward, sample in zip(asked, texts, rewards, generated, strict=True)
        ]

    mine = world.share(range(len(examples)))
    width = max(1, RESPONSES // samples)
    # Generating is a collective: a rank with fewer problems, or none, takes part as often as the others.
    parts = math.ceil(math.ceil(len(examples) / world.size) / width)
    before = finished or {}
    done = world.from_main(sorted(before))
    outcomes = _outcomes(response for part in done for response in before[part]) if world.main else {}
    for part in range(parts):
        problems = mine[part * width : (part + 1) * width]
        if part not in done:
            policy = rollout.with_sampling(stream="evaluation", seed=stream_seed(seed, "evaluation", part), stop=told)
            responses = respond(policy.with_sampling(temperature=0.0), problems, 1, greedy=True) if greedy else []
            responses += respond(policy, problems, samples, greedy=False)
            responses.sort(key=lambda response: response.problem)  # a stable sort: the greedy one stays first
            outcomes |= _outcomes(responses)
            if collect:
                collect(part, world.gather(responses))
        if progress:
            progress(min((part + 1) * width, len(mine)), len(mine))
    outcomes = dict(world.gather(list(outcomes.items())))
    rows = np.array([outcomes[i] for i in range(len(examples))], dtype=np.float64)  # [problems, 5]
    source = np.array([example.source for example in examples])
    accuracy = partial(_accuracy, samples=samples, ks=ks, greedy=greedy, seed=seed)
    return replace(accuracy(rows), sources={name: accuracy(rows[source == name]) for name in dict.fromkeys(source.tolist())})


def _outcomes(responses: Iterable[Response]) -> dict[int, tuple[int, ...]]:
    """Return five counts for each problem: greedy right; samples right, their tokens, how many finished; failed rewards."""
    outcomes: dict[int, tuple[int, ...]] = defaultdict(lambda: (0, 0, 0, 0, 0))
    for r in responses:
        counts = (r.right, 0, 0, 0) if r.greedy else (0, r.right, r.tokens, r.finished)
        outcomes[r.problem] = tuple(a + b for a, b in zip(outcomes[r.problem], (*counts, r.reward is None), strict=True))
    return dict(outcomes)


def _accuracy(rows: np.ndarray, samples: int, ks: Sequence[int], greedy: bool, seed: int) -> Accuracy:  # rows [problems, 5]
    solved, correct, tokens, finished, failures = rows.T
    columns = {"greedy": solved} if greedy else {}
    columns[f"avg@{samples}"] = correct / samples
    for k in sorted(set(ks)):
        chance = np.array([pass_at_k(samples, c, k) for c in range(samples + 1)])
        columns[f"pass@{k}"] = chance[correct.astype(int)]
    estimates = intervals(np.stack(list(columns.values()), 1), seed)
    responses = len(rows) * samples
    return Accuracy(
        problems=len(rows),
        samples=samples,
        estimates=dict(zip(columns, estimates, strict=True)),
        response_tokens=float(tokens.sum() / responses),
        finished=float(finished.sum() / responses),
        reward_failures=int(failures.sum()),
    )


def evaluate_model(
    rollout: Rollout,
    decode: Callable[[Sequence[int]], str],
    examples: Sequence[Example],
    pool: RewardPool,
    world: World,
    *,
    samples: int,
    ks: Sequence[int],
    seed: int,
    greedy: bool = True,
    out: Path | None = None,
    plan: Mapping[str, Any] | None = None,
) -> Accuracy:
    """Run :func:`evaluate` as ``bupo evaluate`` does, with a progress bar, print a table and return the accuracy.

    The new folder ``out`` receives ``responses.jsonl`` and ``accuracy.json``, each whole or not at all. While it runs, its folder
    ``partial`` holds the responses so far, part by part, and a call that finds them there goes on after them.

    Args:
        plan: the settings that the responses depend on beside the other arguments; an evaluation with others is not gone on with.

    Raises:
        ConfigError: ``out`` is not new or empty, is in use, or has the part of another evaluation.
    """
    target = out if world.main else None  # the folder that this rank writes
    lock = FolderLock(target / PARTIAL, "--out") if target else None
    with lock or nullcontext():
        finished: dict[int, list[Response]] = {}
        with world.agree():
            if target and lock:
                if not (target / PARTIAL).is_dir():
                    check_new_folder(target, "--out")
                lock.take()
                texts = [(example.prompt_ids, example.prompt, example.answer, example.source) for example in examples]
                problems = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
                settings = {"samples": samples, "seed": seed, "greedy": greedy, "devices": world.size}
                settings["responses at a time"] = RESPONSES
                claim(target / PARTIAL, "plan.json", {"problems": problems, **(plan or {}), **settings}, "evaluation")
                for path in _parts(target):
                    rows = path.read_text(encoding="utf-8").splitlines()
                    try:
                        finished[int(path.stem.removeprefix("part-"))] = [Response(**json.loads(row)) for row in rows]
                    except (ValueError, TypeError):  # it is damaged, or of another version
                        raise ConfigError(f"--out: {path} cannot be read, accepted is a new folder") from None

        def write(part: int, responses: list[Response]) -> None:
            if target:
                lines = "".join(json.dumps(vars(response)) + "\n" for response in responses)
                replace_file(target / PARTIAL / f"part-{part:06}.jsonl", lines)

        with progress_bar(shown=world.main) as bar:
            task = bar.add_task("evaluation", total=None)
            accuracy = evaluate(
                rollout,
                decode,
                examples,
                pool,
                world,
                samples=samples,
                ks=ks,
                seed=seed,
                greedy=greedy,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                collect=write if out else None,
                finished=finished,
            )
        if target:
            replace_file(target / "responses.jsonl", "".join(path.read_text(encoding="utf-8") for path in _parts(target)))
            replace_file(target / "accuracy.json", json.dumps(accuracy.as_dict(), indent=2) + "\n")
            shutil.rmtree(target / PARTIAL)
    reasons = [reason for reason in world.gather([pool.last_failure]) if reason]
    if world.main:
        # rich does not know the width of a file, and would fold the table into 80 columns.
        Console(width=None if sys.stdout.isatty() else 200).print(accuracy.table())
        if reasons:
            print(f"the last reward that failed: {reasons[-1]}")
    return accuracy


def _parts(out: Path) -> list[Path]:
    """Return the files of an unfinished evaluation's parts, in order."""
    return sorted((out / PARTIAL).glob("part-*.jsonl"))
