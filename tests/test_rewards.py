"""Rewards: graders, and the pool of processes that computes them whatever they do."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bupo import rewards
from bupo.config import Reward
from bupo.errors import ConfigError
from bupo.rewards import (
    Columns,
    Question,
    RewardPool,
    boxed_string,
    exact_match,
    first_number,
    last_boxed,
    load_reward,
    math_answer,
    math_verify,
    normalise_math,
)

# ---- graders


def boxed(answer: str) -> str:
    return rf"So it is $\boxed{{{answer}}}$."


def test_exact_match_ignores_white_space_around():
    assert (exact_match(" 12\n", "12"), exact_match("120", "12"), exact_match("1 2", "12")) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [(" 40, 47", "40", 1.0), ("40", "40", 1.0), (" 4 0", "40", 0.0), ("no: 41", "40", 0.0), ("", "40", 0.0), ("-7", "7", 0.0)],
)
def test_the_first_number_of_a_response_is_its_answer(response, answer, reward):
    assert first_number(response, answer) == reward


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and then \boxed{2}.", "2"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed{1}, as it must be in \boxed", None),
        (r"\boxed 5", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, content):
    assert last_boxed(text) == content


RIGHT_AS_STRINGS = [
    ("0.5", "1/2"),
    (r"\frac{1}{4}", "1/4"),
    (r"\dfrac12", "1/2"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    ("x=5", "5"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\left(1, 2\right)", "(1,2)"),
    (r"5\text{ cm}", "5"),
    (r"\$5", "5"),
    (r"50\%", "50"),
    (".5", r"\frac{1}{2}"),
    (r"10,\!080", "10,080"),
    (r"\text{Yes}", r"\text{Yes}"),
]
WRONG_AS_STRINGS = [
    ("0.25", "1/4"),
    ("5.0", "5"),
    ("1{,}000", "1000"),
    ("2,1", "1,2"),
    ("yes", "Yes"),
    (r"\text{Yes}", "Yes"),
    ("abc=5", "5"),
    ("a=b=5", "5"),
    ("01/2", "1/2"),
    (r"\frac{1}2", "1/2"),
    ("", "5"),
]


@pytest.mark.parametrize(("given", "answer"), RIGHT_AS_STRINGS)
def test_boxed_string_accepts_the_spellings_of_the_reference(given, answer):
    assert boxed_string(boxed(given), answer) == boxed_string(boxed(answer), given) == 1.0


@pytest.mark.parametrize(("given", "answer"), WRONG_AS_STRINGS)
def test_boxed_string_rejects_what_the_reference_rejects(given, answer):
    assert boxed_string(boxed(given), answer) == boxed_string(boxed(answer), given) == 0.0


def test_boxed_string_wants_a_box():
    assert (boxed_string("5", "5"), boxed_string(r"\boxed{5", "5"), boxed_string(r"\fbox{5}", "5")) == (0.0, 0.0, 0.0)


integers = st.integers(-(10**6), 10**6).map(str)
atoms = st.one_of(
    integers,
    st.tuples(integers, integers).map(lambda n: rf"\frac{{{n[0]}}}{{{n[1]}}}"),
    integers.map(lambda n: rf"\sqrt{{{n}}}"),
    st.sampled_from(["x", r"\pi", "0.5", ".25", r"\text{Yes}", r"\frac12", r"\sqrt2", "1/2"]),
)
answers = st.lists(st.one_of(atoms, st.sampled_from([",", " ", "+", r"\!", "^2", r"^\circ", r"\%", "\n"])), min_size=1).map("".join)


@given(answers)
def test_normalisation_of_answers_is_idempotent(answer):
    once = normalise_math(answer)
    assert normalise_math(once) == once


@given(st.integers(-999, 999), st.integers(1, 999))
def test_every_spelling_of_a_fraction_is_the_same(top, bottom):
    spellings = [
        f"{top}/{bottom}",
        f" {top} / {bottom}",
        *(rf"\{name}{{{top}}}{{{bottom}}}" for name in ("frac", "dfrac", "tfrac")),
    ]
    if 0 <= top < 10:
        spellings += [rf"\frac{top}{{{bottom}}}"] + [rf"\frac{top}{bottom}"] * (bottom < 10)
    assert len(set(map(normalise_math, spellings))) == 1


RIGHT = [
    ("0.25", "1/4"),
    ("5.0", "5"),
    ("1{,}000", "1000"),
    ("2,1", "1,2"),
    ("yes", "Yes"),
    (r"\text{Yes}", "Yes"),
    (r"\textbf{No}.", "No"),
    (r"\mathrm{ TRUE }", "True"),
    ("Evelyn", r"\text{Evelyn}"),
    (r"\text{(C)}", "C"),
    ("0.333333", r"\frac{1}{3}"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\{-2,1+\sqrt5,1-\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"),
    (r"\begin{bmatrix} -\frac13 \\ \dfrac53 \end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 5/3 \end{pmatrix}"),
    (r"\left(3,4\right]", "(3,4]"),
    ("3 < x \\le 4", "(3,4]"),
    ("[-2,7]", r"x \in [-2,7]"),
    ("(3,\\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("9/5", r"1\frac{4}{5}"),
    ("y=3+2x", "y = 2x + 3"),
    ("-5x+7y-4=0", "5x - 7y + 4 = 0"),
    ("52_{8}", "52_8"),
    ("32348", r"\$32,\!348"),
    ("864", r"864 \mbox{ inches}^2"),
    ("-5i+6", "6 - 5i"),
    (r"6.72\times 10^{-5}", ".0000672"),
    ("2(k+1)", "2k+2"),
    (r"2^{\aleph_0}", r"2^{\aleph_0}"),
    (r"\$5\$", "5"),
    ("5", "$5$"),
]
WRONG = [
    ("No", "Yes"),
    (r"\text{No}", "Yes"),
    ("", "Yes"),
    ("esY", "Yes"),
    ("Carla", r"\text{Evelyn}"),
    ("D", r"\text{(C)}"),
    ("6", "5"),
    ("", "5"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("1,2,3", "1,2"),
    ("1", "1,2"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\begin{pmatrix} -1/3 \\ 4/3 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 5/3 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("[3,4)", "(3,4]"),
    ("3 \\le x < 4", "(3,4]"),
    ("[-2,8]", r"x \in [-2,7]"),
    ("4/5", r"1\frac{4}{5}"),
    ("y=2x+4", "y = 2x + 3"),
    ("52_9", "52_8"),
    ("0.000067", ".0000672"),
    ("1.0142286426", "1.0142286126"),
    ("0.0", r"\frac{1}{10000000}"),
    ("0.00000014", r"\frac{1}{10000000}"),
    ("3^{-273}", "3^{-243}"),
    ("g'(0) = 2", "g'(0) = 0"),
    (r"\{\mathbf{8}\}", r"\{\mathbf{0}\}"),
    ("98 01", "9801"),
    ("q-p", "p - q"),
    ("6+5i", "6 - 5i"),
    (r"-\infty", r"\infty"),
]


@pytest.mark.parametrize(("given", "answer"), RIGHT)
def test_math_verify_accepts_what_is_equal(given, answer):
    pytest.importorskip("math_verify")
    assert math_verify(boxed(given), answer) == 1.0


@pytest.mark.parametrize(("given", "answer"), WRONG)
def test_math_verify_rejects_what_is_not_equal(given, answer):
    pytest.importorskip("math_verify")
    assert math_verify(boxed(given), answer) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{8}, no, \boxed{7}", 1.0),
        (r"\boxed{7}, no, \boxed{8}", 0.0),
        (r"It is 7, so \boxed{", 0.0),
        ("7", 1.0),
        ("The final answer is $14/2$.", 1.0),
        ("The final answer is 8.", 0.0),
        ("", 0.0),
    ],
)
def test_math_verify_reads_the_last_box_or_else_the_text(response, reward):
    pytest.importorskip("math_verify")
    assert math_verify(response, "7") == reward


LENIENT = [
    (r"So \boxed 42.", "42", 1.0),
    (r"$x = \boxed 1 + y$, $2$", "1+y", 1.0),
    (r"$\boxed \frac{1}{2}$", "0.5", 1.0),
    (r"\(\boxed 42\)", "42", 1.0),
    (r"\boxed {42}", "42", 1.0),
    (r"\fbox{42}", "42", 1.0),
    (r"\boxed{41}, no: \fbox{42}", "42", 1.0),
    (r"\boxed{42}, no: \boxed{41}", "42", 0.0),
    (r"\boxed{5}, as it must be in \boxed.", "5", 1.0),
    (r"\boxed{5}, that is \boxed{", "5", 0.0),
    (r"\boxed{1}, \boxed{2}", "1", 0.0),
    (r"\boxed{12^{\text{th}}}", "12", 1.0),
    (r"\boxed{21st}", "21^{\\mathrm{st}}", 1.0),
    (r"\boxed{12^{\text{th}}}", "13", 0.0),
    (r"\boxed{1\,000}", "1000", 1.0),
    (r"\boxed{1\,234\,567}", "1,234,567", 1.0),
    (r"\boxed{1\,0}", "1000", 0.0),
    (r"\boxed{½}", "1/2", 1.0),
    (r"\boxed{3½}", "3.5", 1.0),
    (r"\boxed{⅓}", "0.5", 0.0),
    (r"\boxed{−5}", "-5", 1.0),
    (r"\boxed{\textbf{(C)} 5}", "5", 1.0),
    (r"\boxed{\textbf{(C)}\ 5}", "C", 1.0),
    (r"\boxed{(C)}", r"\textbf{(C)} 5", 1.0),
    (r"\boxed{\textbf{(C)} 5}", r"\textbf{(D)} 5", 0.0),
    (r"\boxed{\textbf{(C)} 5}", "6", 0.0),
    (r"\boxed{\textbf{(C)} 5}", "D", 0.0),
    (r"\boxed{evelyn}", r"\text{Evelyn}", 1.0),
    (r"\boxed{0.1}", "0.1", 1.0),
    (r"\boxed{1/0}", "0", 0.0),
    (r"\boxed{5 third}", "5", 0.0),
    (r"\boxed{}", "5", 0.0),
    ("12 ", "12", 1.0),
    ("12", "13", 0.0),
    ("", "5", 0.0),
]


@pytest.mark.parametrize(("response", "answer", "reward"), LENIENT)
@pytest.mark.parametrize("installed", [True, False])
def test_the_lenient_grader_sees_through_the_spelling(monkeypatch, response, answer, reward, installed):
    if installed:
        pytest.importorskip("math_verify")
    monkeypatch.setattr(rewards, "MATH_VERIFY", installed)
    assert math_answer(response, answer) == reward


@pytest.mark.parametrize(("response", "answer"), [(r"\boxed 42", "42"), (r"\boxed {42}", "42"), (r"\boxed{½}", "1/2")])
def test_the_references_grader_stays_as_strict_as_the_reference(response, answer):
    assert boxed_string(response, answer) == 0.0


def test_the_lenient_grader_accepts_what_the_others_accept_and_rejects_what_none_does():
    pytest.importorskip("math_verify")
    for written, answer in [*RIGHT, *RIGHT_AS_STRINGS]:
        assert math_answer(boxed(written), answer) == 1.0, (written, answer)
    for written, answer in WRONG:
        assert math_answer(boxed(written), answer) == boxed_string(boxed(written), answer), (written, answer)


def test_the_default_says_what_it_lacks_without_math_verify(monkeypatch, caplog):
    monkeypatch.setattr(rewards, "MATH_VERIFY", False)
    monkeypatch.setattr(RewardPool, "score", lambda *_: [])  # no processes
    for function, count in ((rewards.DEFAULT, 1), ("bupo.rewards:exact_match", 0)):
        caplog.clear()
        with RewardPool(function, timeout=1, workers=1):
            assert len(caplog.records) == count
    assert Reward().function == rewards.DEFAULT


def test_math_verify_sets_no_alarms(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.delattr(signal, "alarm")
    assert math_verify(boxed("0.25"), "1/4") == 1.0


def test_rewards_are_light_to_import():
    code = "import sys, bupo.rewards; print({'torch', 'numpy', 'transformers', 'math_verify', 'sympy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_the_package_of_a_reward_is_missed_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"^reward.function: 'bupo.rewards:math_verify' .*\(ModuleNotFoundError: "):
        load_reward("bupo.rewards:math_verify")


def test_rewards_are_found_by_import_path():
    assert load_reward("bupo.rewards:exact_match") is exact_match


@pytest.mark.parametrize("path", ["exact_match", "bupo.nothing:here", "bupo.rewards:nothing", "math:pi", ":x", "math:"])
def test_a_reward_that_is_not_there_is_named(path):
    with pytest.raises(ConfigError, match=f"^reward.function: '{path}' .*accepted is .*function"):
        load_reward(path)


# ---- the pool

MODULE = r"""
import os, re, signal, subprocess, sys, time

def length(response, answer):
    return len(response)

def same(response, answer):
    return response == answer

def pid(response, answer):
    return os.getpid()

class Spiteful:
    def __float__(self):
        raise RuntimeError("no")

def misbehave(response, answer):
    if response == "loop":
        while True: pass
    if response == "stubborn":
        for number in (signal.SIGTERM, signal.SIGIO, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
        while True:
            try: time.sleep(100)
            except BaseException: pass
    if response == "backtrack":  # inside C, the interpreter locked
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "throw": raise ValueError("several\nlines")
    if response == "leave": sys.exit(3)
    if response == "exit": os._exit(3)
    if response == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if response == "print":
        for stream in (sys.stdout, sys.stderr):
            print('["reward", 7.0]\n' * 1000, file=stream, flush=True)
        os.write(1, b"\xff\x00\n")
        os.system("echo noise")
        return 0.5
    if response == "read": return float(sys.stdin.read() == "")
    if response == "child":
        sleeper = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 100"])
        with open(answer, "w") as file: file.write(str(sleeper.pid))
        while True: pass
    values = {"nan": float("nan"), "inf": float("-inf"), "none": None, "text": "1.0", "huge": 10**400, "complex": 1j}
    values |= {"list": [1.0, 2.0], "empty": [], "dictionary": {"accuracy": 1.0}, "unscored": {"score": None}}
    return Spiteful() if response == "spite" else values.get(response, 1.0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A current folder with reward functions in it, which is not on sys.path."""
    path = tmp_path_factory.mktemp("rewards")
    (path / "user_rewards.py").write_text(MODULE)
    (path / "slow_rewards.py").write_text("import time\ntime.sleep(1)\ndef one(response, answer):\n    return 1\n")
    (path / "broken_rewards.py").write_text("raise OSError('no\\nway')")
    (path / "leaving_rewards.py").write_text("import sys\nsys.exit('bye')")
    (path / "dying_rewards.py").write_text("import os\nos._exit(7)")
    before = os.getcwd()
    os.chdir(path)
    yield path
    os.chdir(before)


@pytest.fixture(scope="module")
def misbehaving(folder):
    with RewardPool("user_rewards:misbehave", timeout=0.6, workers=2) as pool:
        yield pool


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


def test_rewards_come_in_order_and_fast(folder):
    with RewardPool("user_rewards:length", timeout=5, workers=2) as pool:
        start = time.monotonic()
        assert pool.score([("x" * (i % 700), "") for i in range(1000)]) == [i % 700 for i in range(1000)]
        assert time.monotonic() - start < 2  # 0.06 s on two idle cores
        assert pool.score([]) == []
        assert pool.score([("x" * 3_000_000, ""), ("", "")]) == [3_000_000, 0]
        assert all(type(reward) is float for reward in pool.score([("ab", "")]))
    assert (pool.failures, pool.last_failure) == ({}, None)


@pytest.mark.parametrize(
    ("response", "reason", "detail"),
    [
        ("loop", "timeout", "no answer within 0.6 s"),
        ("stubborn", "timeout", "no answer within 0.6 s"),
        ("backtrack", "timeout", "no answer within 0.6 s"),
        ("throw", "exception", "ValueError: several lines"),
        ("leave", "exception", "SystemExit: 3"),
        ("exit", "died", "exit code 3"),
        ("crash", "died", "exit code -11"),
        ("nan", "not finite", r"nan \(float\) returned"),
        ("inf", "not finite", r"-inf \(float\) returned"),
        ("none", "not finite", r"None \(NoneType\) returned"),
        ("text", "not finite", r"'1.0' \(str\) returned"),
        ("huge", "not finite", "1000"),
        ("complex", "not finite", "complex"),
        ("spite", "not finite", "Spiteful"),
        ("list", "not finite", r"\[1.0, 2.0\] \(list\) returned"),
        ("empty", "not finite", r"\[\] \(list\) returned"),
        ("dictionary", "not finite", r"\(dict\) returned, accepted are .* a dictionary with one as its score"),
        ("unscored", "not finite", r"\(dict\) returned"),
    ],
)
def test_a_failure_costs_its_own_sample_and_is_counted(misbehaving, response, reason, detail):
    misbehaving.failures.clear()
    rewards = misbehaving.score([("good", "")] * 3 + [(response, "the answer")] + [("good", "")] * 3)
    assert math.isnan(rewards.pop(3))
    assert rewards == [1.0] * 6
    assert misbehaving.failures == {reason: 1}
    with pytest.raises(AssertionError, match=f"^{reason}: .*{detail}.*; response '{response}', answer 'the answer'$"):
        raise AssertionError(misbehaving.last_failure)


def test_many_failures_at_once_cost_only_themselves(misbehaving):
    misbehaving.failures.clear()
    bad = ["exit", "nan", "throw", "loop", "exit", "crash"]
    rewards = misbehaving.score([(response, "") for pair in zip(bad, ["good"] * 6, strict=True) for response in pair])
    assert [math.isnan(reward) for reward in rewards] == [True, False] * 6
    assert misbehaving.failures == {"died": 3, "not finite": 1, "exception": 1, "timeout": 1}


def test_what_a_reward_prints_and_reads_does_not_matter(folder, capfd):
    with RewardPool("user_rewards:misbehave", timeout=5, workers=1) as pool:
        assert pool.score([("print", ""), ("good", ""), ("print", ""), ("read", "")]) == [0.5, 1.0, 0.5, 1.0]
    assert capfd.readouterr().out == ""


@given(st.lists(st.text(st.characters(categories=("L", "N", "P", "Z", "C")), max_size=20), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_any_text_reaches_the_reward(same, texts):
    texts = [*texts, "\n", "\u2028", "\ud800", '"', ""]
    assert same.score([(text, text) for text in texts]) == [1.0] * len(texts)
    assert same.score([(text + "x", text) for text in texts]) == [0.0] * len(texts)


@pytest.fixture(scope="module")
def same(folder):
    with RewardPool("user_rewards:same", timeout=5, workers=1) as pool:
        yield pool


def test_what_a_reward_started_ends_with_it(misbehaving, tmp_path):
    misbehaving.score([("child", str(tmp_path / "pid"))])
    assert gone(int((tmp_path / "pid").read_text()))


def test_the_time_of_the_import_does_not_count(folder):
    with RewardPool("slow_rewards:one", timeout=0.6, workers=1) as pool:
        assert pool.score([("", "")] * 3) == [1.0] * 3
    assert not pool.failures


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("user_rewards.length", "accepted is module:function$"),
        ("user_rewards:nothing", "AttributeError"),
        ("no_such_rewards:f", "ModuleNotFoundError"),
        ("user_rewards:os", "is a module, accepted is a function"),
        ("broken_rewards:f", r"\(OSError: no way\)$"),
        ("leaving_rewards:f", r"\(SystemExit: bye\)$"),
        ("dying_rewards:f", r"\(while it was imported: the process ended \(exit code 7\)\)$"),
        ("slow_rewards:one", r"\(while it was imported: no answer within 0.2 s\)$"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_named_before_training(folder, monkeypatch, function, reason):
    if function == "slow_rewards:one":
        monkeypatch.setattr(RewardPool, "start_timeout", 0.2)
    with pytest.raises(ConfigError, match=f"^reward.function: '{function}' .*{reason}"), RewardPool(function, timeout=5, workers=2):
        pass


CONVENTIONS = r"""
import asyncio
seen = []

def trl(prompts, completions, completion_ids, solution, level=0, **columns):
    (prompt,), (completion,), (ids,), (solution,) = prompts, completions, completion_ids, solution
    chat = isinstance(prompt, list)
    assert prompt == ([{"role": "user", "content": "1+1"}] if chat else "1+1") and columns == {"answer": ["2"], "other": [None]}
    content = completion[0]["content"] if chat and completion[0]["role"] == "assistant" else completion
    return [float(content == solution) + len(ids) + 10 * level[0]]

def trl_small(completions, answer): return [float(c == a) for c, a in zip(completions, answer, strict=True)]
def trl_none(completions, **_): return [None for _ in completions]
def trl_default(completions, level=(7,)): return list(level)
def trl_state(completions, trainer_state): return [0.0]
def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth) + 10 * extra_info.get("index", 0), "source": data_source}
def verl_small(solution_str, ground_truth): return solution_str == ground_truth
def verl_batch(data_sources, solution_strs, ground_truths, extra_infos): return [0.0] * len(solution_strs)
def verl_batch_small(solution_strs, ground_truths): return [0.0] * len(solution_strs)
def verl_more(solution_str, ground_truth, sandbox): return 0.0
def openrlhf(queries, prompts, labels): return [0.0]
def nothing(): return 0.0
def scored(response, answer): return {"score": response == answer}

async def later(response, answer):  # what it keeps lives in the loop of the first call
    if not seen: seen.append(asyncio.Lock())
    async with seen[0]:
        await asyncio.sleep(0.001)
    return float(response == answer)

class Grader:
    async def __call__(self, completions, **columns): return [float(len(completions[0]))]
grader = Grader()
"""


@pytest.fixture(scope="module")
def conventions(folder):
    (folder / "written_for_others.py").write_text(CONVENTIONS)


ROW = {"prompt": "1+1", "solution": "2", "level": 3, "other": None}
CHAT_ROW = ROW | {"prompt": [{"role": "user", "content": "1+1"}]}


@pytest.mark.usefixtures("conventions")
@pytest.mark.parametrize(
    ("function", "columns", "row", "reward"),
    [
        ("trl", Columns(["solution"], None), ROW, 1.0 + 4 + 30),
        ("trl", Columns(["solution"], None), CHAT_ROW, 1.0 + 4 + 30),
        ("trl_small", Columns([], []), {"prompt": "1+1"}, 1.0),
        ("trl_default", Columns([], ["level"]), {"prompt": "1+1"}, 7.0),
        ("trl_default", Columns([], ["level"]), {"prompt": "1+1", "level": 3}, 3.0),
        ("grader", Columns([], None), {"prompt": "1+1"}, 1.0),
        ("verl", Columns([], ["extra_info"]), {"prompt": "1+1", "extra_info": {"index": 3}}, 31.0),
        ("verl", Columns([], ["extra_info"]), {"prompt": "1+1", "extra_info": None}, 1.0),
        ("verl_small", Columns([], ["extra_info"]), {}, 1.0),
        ("scored", None, {}, 1.0),
        ("later", None, {}, 1.0),
    ],
)
def test_rewards_of_other_trainers_are_called_as_those_call_them(function, columns, row, reward):
    with RewardPool(f"written_for_others:{function}", timeout=5, workers=1) as pool:
        asked = [Question("2", "2", (5, 6, 7, 8), "sums", row)] * 2
        assert (pool.score(asked), pool.columns, pool.last_failure) == ([reward] * 2, columns, None)


@pytest.mark.usefixtures("conventions")
def test_no_reward_from_trl_is_a_failure_that_is_counted():
    with RewardPool("written_for_others:trl_none", timeout=5, workers=1) as pool:
        assert math.isnan(*pool.score([Question("2", "2", (5,), "sums", ROW)]))
        assert pool.failures == {"not finite": 1}


@pytest.mark.usefixtures("conventions")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nothing", r"takes \(\), accepted are \(response, answer\), TRL's \(prompts, completions, \*\*columns\), and verl's"),
        ("openrlhf", r"takes \(queries, prompts, labels\), accepted are \(response, answer\), TRL's"),
        ("verl_batch", r"takes \(data_sources, solution_strs, ground_truths, extra_infos\), accepted are"),
        (
            "verl_batch_small",
            r"takes \(solution_strs, ground_truths\), whole batches by ground_truths, solution_strs; accepted are",
        ),
        ("verl_more", r"takes \(solution_str, ground_truth, sandbox\), accepted are verl's rewards without sandbox"),
        ("trl_state", r"takes \(completions, trainer_state\), accepted are TRL's rewards without trainer_state"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_by_its_signature_at_the_start(function, reason):
    with (
        pytest.raises(ConfigError, match=f"^reward.function: 'written_for_others:{function}' {reason}"),
        RewardPool(f"written_for_others:{function}", timeout=5, workers=1),
    ):
        pass


def test_modules_are_found_where_this_process_finds_them(tmp_path, monkeypatch):
    (tmp_path / "elsewhere_rewards.py").write_text("def two(response, answer):\n    return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with RewardPool("elsewhere_rewards:two", timeout=5, workers=1) as pool:
        assert pool.score([("", "")]) == [2.0]


def test_the_pool_works_in_any_thread_and_outlives_it(folder):
    pool, rewards = RewardPool("user_rewards:pid", timeout=5, workers=1), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: rewards.extend(pool.score([("", "")])))
        thread.start()
        thread.join()
    rewards += pool.score([("", "")])
    pool.close()
    assert len(rewards) == 3
    assert len(set(rewards)) == 1  # one process all along


def test_leaving_the_context_ends_the_processes(folder):
    with RewardPool("user_rewards:pid", timeout=5, workers=2) as pool:
        pids = {int(pid) for pid in pool.score([("", "")] * 50)}
        assert len(pids) == 2
    assert all(gone(pid, 0.1) for pid in pids)


def test_a_process_that_died_between_calls_is_replaced_at_no_cost(folder):
    with RewardPool("user_rewards:pid", timeout=5, workers=1) as pool:
        (first,) = pool.score([("", "")])
        os.kill(int(first), signal.SIGKILL)
        os.waitid(os.P_PID, int(first), os.WEXITED | os.WNOWAIT)
        (second,) = pool.score([("", "")])
        assert second not in (first, math.nan)
        assert not math.isnan(second)
        assert not pool.failures


def test_a_process_may_rest_longer_than_it_may_work(folder):
    with RewardPool("user_rewards:pid", timeout=0.5, workers=2) as pool:
        before = set(pool.score([("", "")] * 50))
        assert len(before) == 2
        time.sleep(0.6)
        assert before >= set(pool.score([("", "")]))
        assert before == set(pool.score([("", "")] * 50))


def test_a_process_that_does_not_listen_is_replaced(folder):
    with RewardPool("user_rewards:length", timeout=0.6, workers=1) as pool:
        os.kill(pool._pool[0].process.pid, signal.SIGSTOP)
        rewards = pool.score([("x" * 3_000_000, ""), ("ab", "")])  # the first is more than the socket holds
        assert math.isnan(rewards[0])
        assert rewards[1] == 2
        assert pool.failures == {"died": 1}
        assert "takes no question (TimeoutError)" in pool.last_failure


def test_signals_to_the_whole_job_leave_the_processes_to_the_parent(folder):
    with RewardPool("user_rewards:pid", timeout=5, workers=1) as pool:
        (pid,) = pool.score([("", "")])
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(int(pid), number)
        assert pool.score([("", "")] * 5) == [pid] * 5


@pytest.fixture
def _interrupts():
    """A job that a shell starts in the background ignores SIGINT, and so does all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_an_interrupt_ends_the_processes_and_the_pool_can_be_used_again(folder):
    with RewardPool("user_rewards:misbehave", timeout=60, workers=2) as pool:
        pids = [worker.process.pid for worker in pool._pool]
        timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.score([("loop", "")] * 4)
        assert all(gone(pid, 0.1) for pid in pids)
        assert pool.score([("good", "")]) == [1.0]
        assert not pool.failures


PARENT = """
    import os, sys
    from bupo.rewards import RewardPool

    with open("runs.txt", "a") as file:
        file.write("run\\n")
    pool = RewardPool("user_rewards:" + sys.argv[1], timeout=1000, workers=1)
    with pool:
        print(pool._pool[0].process.pid, flush=True)
        pool.score([(sys.argv[2], "")])
        print("scored", flush=True)
        sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
@pytest.mark.parametrize(("response", "idle"), [("good", True), ("loop", False), ("stubborn", False), ("backtrack", False)])
def test_processes_end_when_the_parent_is_killed(folder, response, idle):
    """Also when the reward holds the interpreter's lock. The parent's own script, without a guard of __main__, runs only once."""
    (folder / "runs.txt").unlink(missing_ok=True)
    (folder / "parent.py").write_text(textwrap.dedent(PARENT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "parent.py", "misbehave", response]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        try:
            if idle:
                assert parent.stdout.readline() == "scored\n"
            else:
                time.sleep(0.3)
            assert not gone(pid, 0.05)
            parent.kill()
            assert gone(pid)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert (folder / "runs.txt").read_text() == "run\n"


def test_math_verify_that_never_ends_costs_its_sample(folder):
    pytest.importorskip("math_verify")
    with RewardPool("bupo.rewards:math_verify", timeout=1.5, workers=1) as pool:
        first, second = pool.score([(boxed("9^{9^{9^9}}"), "5"), (boxed("0.25"), "1/4")])
    assert math.isnan(first)
    assert (second, pool.failures) == (1.0, {"timeout": 1})
