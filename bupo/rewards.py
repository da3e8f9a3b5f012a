"""Verifiable rewards: functions of (response, answer) -> float, named by import path and run in processes that can be killed.

This module must stay light, without torch and numpy, because worker processes import it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from bupo.errors import ConfigError

MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
DEFAULT = "bupo.rewards:math_answer"

Reward = Callable[..., Any]  # called with (response, answer), or as TRL or verl would: see convention


class Question(NamedTuple):
    """A response, and everything that a reward may be told about it."""

    response: str
    answer: str
    ids: Sequence[int] = ()  # the tokens of the response
    source: str = ""  # as in :class:`bupo.data.Example`
    row: dict[str, Any] | None = None  # as in :class:`bupo.data.Example`: the columns that the reward asks for


class Columns(NamedTuple):
    """The columns of the data that a reward is called with."""

    required: Sequence[str]
    optional: Sequence[str] | None  # None for all there are


def exact_match(response: str, answer: str) -> float:
    """Return 1.0 when the response is the answer, white space around it apart."""
    return float(response.strip() == answer.strip())


def first_number(response: str, answer: str) -> float:
    """Return 1.0 when the first whole number of the response is the answer, whatever follows it."""
    found = re.search(r"-?\d+", response)
    return float(found is not None and found[0] == answer.strip())


def boxed_string(response: str, answer: str) -> float:
    r"""Return 1.0 when the last ``\boxed{}`` is the answer's string after the normalisation of the MATH benchmark.

    This is the reference's grader. It compares strings: 0.25 is not 1/4, and ``\text{Yes}`` is not Yes.
    """
    boxed = last_boxed(response)
    return float(boxed is not None and normalise_math(boxed) == normalise_math(answer))


def math_verify(response: str, answer: str) -> float:
    r"""Return 1.0 when the response's answer equals ``answer`` as mathematics, by the package math-verify.

    The response's answer is its last ``\boxed{}``; without any ``\boxed``, what math-verify finds in the whole text.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off, but the pool has its own
    given = last_boxed(response) if r"\boxed" in response else response
    if given is None:
        return 0.0
    if (word := _word(answer)) in ("yes", "no", "true", "false"):
        return float(_word(given) == word)
    if given.split() == answer.split():
        return 1.0
    bases, given_bases = (re.findall(r"[0-9A-Z]_\{?(\d+)\}?", text) for text in (answer, given))
    if bases and given_bases and bases != given_bases:  # math-verify drops the bases of numerals
        return 0.0
    # Its fallback to strings, which cuts some of them short, is off.
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    gold = parse(rf"\boxed{{{answer}}}", **options)
    target = parse(response if given is response else rf"\boxed{{{given}}}", **options)
    if not gold or not target:
        return 0.0
    if getattr(gold[0], "is_Relational", False) and not gold[0].free_symbols:
        return float(gold == target)  # math-verify would compare solutions, and no relation without symbols has any
    decimals = _decimals(answer, gold[0])
    precision = {"float_rounding": decimals, "numeric_precision": decimals + 9}
    return float(verify(gold, target, **precision, allow_set_relation_comp=True, timeout_seconds=None))


def math_answer(response: str, answer: str) -> float:
    r"""Return 1.0 when the response's answer is ``answer``, however the two are written; the lenient grader.

    The response's answer is what its last box holds, be it ``\boxed{42}``, ``\boxed {42}``, ``\boxed 42`` or ``\fbox{42}``; without
    a box it is the whole text. Equal are the same strings in the spelling of :func:`boxed_string`, the same numbers, a choice such
    as ``\textbf{(C)} 5`` and its letter or its value, and, where math-verify is installed, what :func:`math_verify` finds equal.
    """
    given = _last_box(response)
    if given is None:
        return 0.0
    found, wanted = _plain(given), _plain(answer)
    choice, right_choice = _choice(found), _choice(wanted)
    if choice and right_choice:
        return float(choice[0] == right_choice[0])
    pairs = [(one, other) for one in (found, *choice) for other in (wanted, *right_choice)]
    if any(_same(one, other) for one, other in pairs):
        return 1.0
    if not MATH_VERIFY:
        return 0.0
    if given is response:
        return math_verify(response, wanted)
    return max(math_verify(rf"\boxed{{{one}}}", other) for one, other in pairs)


_WRAP = r"\\(?:text\w*|math\w+|mbox|operatorname)\s*"  # braces around what it wraps follow
_ORDINAL = "(?:st|nd|rd|th)"
_ORDINALS = (  # the ways to write the ending of an ordinal number
    rf"\^\s*\{{\s*{_WRAP}\{{{_ORDINAL}\}}\s*\}}",
    rf"(?:\^\s*)?{_WRAP}\{{{_ORDINAL}\}}",
    rf"\^\s*\{{{_ORDINAL}\}}",
    rf"{_ORDINAL}(?![a-zA-Z])",
)


def _last_box(text: str) -> str | None:
    r"""Return what the last box of any form holds; ``text`` itself without one, None where the braces of the last do not close."""
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))):
        before, rest = text[: box.start()], text[box.end() :]
        if rest.startswith("{"):
            return _braced(rest)
        # It goes to the end of the formula that it stands in, or else holds one word. If only mentioned, it holds nothing.
        in_formula = before.replace(r"\$", "").count("$") % 2
        content = re.split(r"[$\n]" if in_formula else r"\\[)\]]|[\s$]", rest, maxsplit=1)[0].strip().rstrip(".,;:!?")
        if any(map(str.isalnum, content)):
            return content
    return text


def _plain(answer: str) -> str:
    r"""Return ``answer`` without typesetting: dollars around it, spaces that group digits, the ending of an ordinal number."""
    text = "".join(map(_spelled_out, answer)).strip()
    text = re.sub(r"^\$([^$]*)\$$", r"\1", text).strip()
    text = re.sub(r"(?<=\d)(?:\\[,;:!]|\{,\}|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))", "", text)
    return re.sub(rf"(?<=\d)\s*(?:{'|'.join(_ORDINALS)})", "", text)


def _spelled_out(character: str) -> str:
    """Return a fraction that is one character as LaTeX, a minus sign as a hyphen, any other character as it is."""
    if unicodedata.decomposition(character).startswith("<fraction>"):
        top, _, bottom = unicodedata.normalize("NFKC", character).partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}" if bottom else character
    return "-" if character == "\u2212" else character


def _choice(answer: str) -> tuple[str, ...]:
    r"""Return the letter, and the value if there is one, of an answer such as ``\textbf{(C)} 5``; nothing for any other."""
    space = r"(?:[\s~:]|\\[,;:! ]|\\q?quad\b)*"
    found = re.fullmatch(rf"(?:{_WRAP}\{{\s*\(?([A-Z])\)?[.:]?\s*\}}|\(([A-Z])\)){space}(.*)", answer, re.DOTALL)
    return tuple(filter(None, found.groups())) if found else ()


def _same(given: str, answer: str) -> bool:
    """Return whether the two are one string, one number, or one word."""
    if normalise_math(given) == normalise_math(answer):
        return True
    number, word = _number(given), _unwrapped(given)
    if number is not None:
        return number == _number(answer)
    return word == _unwrapped(answer) or (len(word) > 2 and word.isalpha() and word.casefold() == _word(answer))


def _number(text: str) -> Fraction | None:
    """Return the value of an integer, a decimal, a fraction or a mixed number; None for any other text."""
    text = re.sub(r",(?=\d{3}(?!\d))", "", text) if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
    text = normalise_math(text)
    mixed = re.fullmatch(r"([+-]?)(\d*)\\frac\{(\d+)\}\{(\d+)\}", text)
    plain = re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?|[+-]?\d+/\d+", text)
    with contextlib.suppress(ValueError, ZeroDivisionError):  # there are more digits than Python reads, or a denominator of 0
        if mixed:
            sign, whole, top, bottom = mixed.groups()
            return int(f"{sign}1") * (int(whole or 0) + Fraction(int(top), int(bottom)))
        return Fraction(text) if plain else None
    return None


def last_boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{}`` holds; None without one, or when its braces do not close."""
    _, found, rest = text.rpartition(r"\boxed")
    return _braced(rest) if found and rest.startswith("{") else None


def _braced(text: str) -> str | None:
    """Return what the braces hold that ``text`` begins with; None when they do not close."""
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[1 : brace.start()]
    return None


_REMOVED_OR_REWRITTEN = (
    ("\n", ""),
    (r"\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
)


def normalise_math(text: str) -> str:
    """Return the answer in the spelling of Hendrycks' MATH benchmark, without formatting, degrees, dollars, percents and units."""
    for old, new in _REMOVED_OR_REWRITTEN:
        text = text.replace(old, new)
    text = text.partition(r"\text{ ")[0].replace(r"\%", "")  # a text that begins with a space is a unit
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    text = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", text)  # x=5
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])(?:([^{])|(?=\{))", lambda m: rf"\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else ""), text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return re.sub(r"^(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)$", r"\\frac{\1}{\2}", text)


def _word(text: str) -> str:
    """Return ``text`` unwrapped and in lower case."""
    return _unwrapped(text).casefold()


def _unwrapped(text: str) -> str:
    r"""Return ``text`` without ``\text{}`` and its like, and without dollars, full stops and spaces around it."""
    while (plain := re.sub(rf"{_WRAP}\{{([^{{}}]*)\}}", r"\1", text)) != text:
        text = plain
    return text.strip("$. \t\n")


def _decimals(answer: str, gold: Any) -> int:
    """Return how many decimals to compare: six, or as many as the answer has, and more below 1, so that 1e-9 is not 0."""
    written = max((len(digits) for digits in re.findall(r"\.(\d+)", answer)), default=0)
    try:
        size = abs(float(gold))
    except (TypeError, ValueError, OverflowError):  # it is no number
        size = 0
    return max(6, written, 5 - math.floor(math.log10(size)) if 0 < size < 1 else 0)


def load_reward(path: str) -> Reward:
    """Return the function that ``module:function`` names. Raises :class:`ConfigError` when there is none."""
    module_name, colon, function_name = path.partition(":")
    if not colon:
        raise ConfigError(f"reward.function: {path!r} given, accepted is module:function")
    try:
        reward = getattr(importlib.import_module(module_name), function_name)
        if reward is math_verify or (reward is math_answer and MATH_VERIFY):
            importlib.import_module("math_verify")  # in the first call it would count against the timeout
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"reward.function: {path!r} given, accepted is an importable module:function ({reason})") from error
    if not callable(reward):
        raise ConfigError(f"reward.function: {path!r} is a {type(reward).__name__}, accepted is a function of (response, answer)")
    return reward


_TRL = ("prompts", "completions", "completion_ids")
_ONLY_TRL = {"trainer_state", "log_extra", "log_metric", "environments"}  # what only TRL itself can give a reward
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")


def convention(path: str, reward: Reward) -> tuple[Callable[[Question], Any], Columns | None]:
    """Return a function that calls ``reward`` with a question, and the columns it asks for; None for (response, answer).

    The names of its parameters decide: TRL's rewards are called with lists of one, columns of the data among them, verl's with the
    answer as their ``ground_truth``. Raises :class:`ConfigError` for any other signature.
    """
    accepted = (
        "accepted are (response, answer), TRL's (prompts, completions, **columns), "
        "and verl's (data_source, solution_str, ground_truth, extra_info)"
    )
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # a function written in C has none to look at
        return lambda question: reward(*question[:2]), None
    parameters = {name: p for name, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    def call(arguments: dict[str, Any]) -> Any:
        return reward(**{name: value for name, value in arguments.items() if takes_all or name in parameters})

    def as_trl(question: Question) -> list[Any]:
        columns = {"answer": question.answer, **(question.row or {})}
        prompt, response = columns.pop("prompt", ""), question.response
        completion = [{"role": "assistant", "content": response}] if isinstance(prompt, list) else response
        given = dict(zip(_TRL, (prompt, completion, question.ids), strict=True))
        return call({name: [value] for name, value in (columns | given).items()})

    def as_verl(question: Question) -> Any:
        extra_info = (question.row or {}).get("extra_info") or {}
        return call(dict(zip(_VERL, (question.source, question.response, question.answer, extra_info), strict=True)))

    given = f"reward.function: {path!r} takes {signature}"
    if parameters.keys() & {"completions", "completion_ids"}:
        if unknown := sorted(needed & _ONLY_TRL):
            raise ConfigError(f"{given}, accepted are TRL's rewards without {', '.join(unknown)}")
        optional = None if takes_all else sorted(parameters.keys() - needed - {*_TRL})
        return as_trl, Columns(sorted(needed - {*_TRL, "answer"}), optional)
    if "solution_str" in parameters:
        if unknown := sorted(needed - {*_VERL}):
            raise ConfigError(f"{given}, accepted are verl's rewards without {', '.join(unknown)}")
        return as_verl, Columns((), ("extra_info",))
    try:
        signature.bind("", "")
    except TypeError:
        raise ConfigError(f"{given}, {accepted}") from None
    if plural := sorted(parameters.keys() & {"solution_strs", "ground_truths", "queries", "prompts"}):
        raise ConfigError(f"{given}, whole batches by {', '.join(plural)}; {accepted}")
    return lambda question: reward(*question[:2]), None


class RewardPool:
    """The processes that compute rewards, each killed when a call takes too long. Any thread may use the pool, one at a time.

    A call that fails costs its own sample and nothing else: the reward is nan, ``failures`` counts it by reason ("timeout",
    "exception", "not finite", "died") and ``last_failure`` describes it in a line.

    Args:
        function: ``module:function``, imported once by each process, found as here or in the current folder.
        timeout: the seconds that a call may take, without the import.

    Attributes:
        columns: the columns of the data that the function is called with (:attr:`Question.row`); None before the processes have
            started, and for a function of (response, answer).
    """

    start_timeout = 60.0  # seconds that the import may take

    def __init__(self, function: str, *, timeout: float, workers: int) -> None:
        self.function, self.timeout, self.workers = function, timeout, workers
        self.failures: Counter[str] = Counter()
        self.last_failure: str | None = None
        self.columns: Columns | None = None
        self._pool: list[_Worker] = []

    def __enter__(self) -> RewardPool:
        """Start the processes. Raises :class:`ConfigError` when they cannot import the function."""
        if self.function == DEFAULT and not MATH_VERIFY:
            logging.getLogger("bupo").warning(
                "reward.function: %s compares strings and numbers only: math-verify is not installed (pip install math-verify)",
                DEFAULT,
            )
        self.score([])
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; the next call of :meth:`score` starts new ones."""
        while self._pool:
            self._pool.pop().kill()

    def score(self, questions: Sequence[Question | tuple[str, str]]) -> list[float]:
        """Return the reward of each question, or (response, answer), in order; nan where it failed."""
        rewards = [math.nan] * len(questions)
        pending = deque(enumerate(questions))
        try:
            for worker in self._heard(0):
                self._hear(worker, rewards)  # it was idle, so that this is its end
            self._fill()
            while pending or any(worker.busy for worker in self._pool):
                if pending:
                    self._fill()
                for worker in [worker for worker in self._pool if not worker.busy][: len(pending)]:
                    self._ask(worker, *pending.popleft())
                deadline = min((worker.deadline for worker in self._pool if worker.busy), default=0.0)
                heard = self._heard(max(0.0, deadline - time.monotonic()))
                for worker in heard:
                    self._hear(worker, rewards)
                for worker in [worker for worker in self._pool if worker.busy and worker not in heard]:
                    if time.monotonic() > worker.deadline:
                        self._lose(worker, "timeout", f"no answer within {self._limit(worker):g} s")
        except BaseException:  # even after KeyboardInterrupt the next call must not hear answers to these questions
            self.close()
            raise
        return rewards

    def _fill(self) -> None:
        while len(self._pool) < self.workers:
            self._pool.append(_Worker(self.function, self.start_timeout))

    def _heard(self, timeout: float) -> list[_Worker]:
        """Wait until a worker has something to say, for ``timeout`` seconds at most; return all that have."""
        sockets = wait([worker.socket for worker in self._pool], timeout)
        return [worker for worker in self._pool if worker.socket in sockets]

    def _limit(self, worker: _Worker) -> float:
        return self.timeout if worker.question else self.start_timeout

    def _ask(self, worker: _Worker, index: int, question: Sequence[Any]) -> None:
        try:
            worker.ask(index, question[:2] if self.columns is None else question, self.timeout)
        except OSError as error:
            self._lose(worker, "died", f"the process takes no question ({type(error).__name__})")

    def _hear(self, worker: _Worker, rewards: list[float]) -> None:
        try:
            kind, value = worker.hear()
        except (OSError, ValueError, TypeError):
            self._lose(worker, "died", "the process ended")
            return
        if kind == "error":
            raise ConfigError(value)
        if kind == "ready":
            self.columns = value and Columns(*value)
        elif kind == "reward":
            rewards[worker.index] = value
        else:
            self._count(kind, value, worker.question)
        worker.busy = False

    def _lose(self, worker: _Worker, reason: str, detail: str) -> None:
        """End a worker, which :meth:`_fill` replaces, and count its question, if it had one, as failed."""
        self._pool.remove(worker)
        worker.kill()
        detail = f"{detail} (exit code {worker.process.returncode})" if reason == "died" else detail
        if worker.busy and not worker.question:
            reason = f"while it was imported: {detail}"
            raise ConfigError(f"reward.function: {self.function!r} given, accepted is an importable module:function ({reason})")
        if worker.busy:
            self._count(reason, detail, worker.question)

    def _count(self, reason: str, detail: str, question: Sequence[Any]) -> None:
        self.failures[reason] += 1
        self.last_failure = f"{reason}: {detail}; response {question[0]!r:.200}, answer {question[1]!r:.80}"


# A process of multiprocessing would run the parent's __main__ again, and talk through pickles.
_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from bupo.rewards import _work; _work(sys.argv[1], int(sys.argv[2]))"


class _Worker:
    """A process, and what it is busy with until the deadline: a question, or without one the import."""

    def __init__(self, function: str, timeout: float) -> None:
        self.socket, other = socket.socketpair()
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOT, function, str(other.fileno()), *map(str, sys.path), os.getcwd()],
                bufsize=0,
                stdin=subprocess.PIPE,  # nothing is written to it; when it closes, this process has ended
                stdout=2,  # what a reward prints is seen, but not among this process' output
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C does not reach it, and its own processes can be killed with it
            )
        self.busy = True
        self.index = 0  # the question's place among those of a call of `score`
        self.question: Sequence[Any] = ()
        self.deadline = time.monotonic() + timeout

    def ask(self, index: int, question: Sequence[Any], timeout: float) -> None:
        """Send the process a question. Raises ``OSError`` when it does not take it."""
        self.busy, self.index, self.question, self.deadline = True, index, question, time.monotonic() + timeout
        self.socket.settimeout(timeout)
        self.socket.sendall(json.dumps(question, default=int).encode() + b"\n")  # token ids may be numpy's

    def hear(self) -> list[Any]:
        """Return a message, which is short enough to come whole. Raises ``ValueError`` or ``OSError`` if the process has ended."""
        return json.loads(self.socket.recv(1 << 16))

    def kill(self) -> None:
        """Kill the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.socket.close()
        if self.process.stdin:
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # a process that waits for a broken disk cannot be killed, and is left alone


def _work(function: str, descriptor: int) -> None:
    """Answer questions on the socket until the other end closes: the life of a worker process."""
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # schedulers send them to every process of a job, but the parent decides
        signal.signal(number, lambda *_: None)  # the processes that a reward starts would inherit SIG_IGN
    with socket.socket(fileno=descriptor) as connection:
        connection.set_inheritable(False)

        def send(kind: str, value: Any) -> None:
            connection.sendall(json.dumps([kind, value]).encode() + b"\n")

        try:
            call, columns = convention(function, load_reward(function))
        except ConfigError as error:
            return send("error", str(error)[:1000])
        send("ready", columns)
        for question in connection.makefile("rb"):
            send(*_outcome(call, Question(*json.loads(question))))


def _outcome(call: Callable[[Question], Any], question: Question) -> tuple[str, float | str]:
    """Return ("reward", its value), or the reason why there is none and a description."""
    try:
        value = call(question)
        if inspect.isawaitable(value):
            value = _event_loop().run_until_complete(value)
    except (Exception, SystemExit) as error:
        return "exception", " ".join(f"{type(error).__name__}: {error}".split())[:500]
    number = value
    if isinstance(value, dict):
        number = value.get("score")
    elif isinstance(value, (list, tuple)) and len(value) == 1:
        number = value[0]
    try:
        if math.isfinite(number):
            return "reward", float(number)
    except Exception:  # the value's class may raise anything
        pass
    accepted = "accepted are finite numbers, a list of one, or a dictionary with one as its score"
    return "not finite", f"{value!r:.100} ({type(value).__name__}) returned, {accepted}"


@cache
def _event_loop() -> Any:
    """Return the event loop of rewards that are coroutines: one per process, to which the things they keep open belong."""
    import asyncio

    return asyncio.new_event_loop()


def _die_with_parent() -> None:
    """Have the kernel kill this process when the parent ends, however it ends and whatever this process is doing (Linux).

    PR_SET_PDEATHSIG would not do: its parent is a thread, and a pool may outlive the thread that started it.
    """
    import fcntl

    lifeline = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
