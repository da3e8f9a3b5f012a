"""The self-check without a GPU: its problems on the CPU, records and decisions with processes that stand for a driver."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bupo_kernels import dispatch, explain, linear_logprobs
from bupo_kernels.backends import torch_, triton_
from bupo_kernels.selfcheck import __main__ as command
from bupo_kernels.selfcheck import card as cards
from bupo_kernels.selfcheck import decision, problems, records
from bupo_kernels.selfcheck.card import Card
from bupo_kernels.selfcheck.decision import Variant
from bupo_kernels.selfcheck.records import Record, Verdict

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
VARIANT = Variant("native", "float32")
RIGHT = {"passed": True, "reason": "", "worst": 0.13, "seconds": 11.0, "time": 1e9}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has decided nothing, and a cache that is empty."""
    monkeypatch.setenv("BUPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BUPO_SELF_CHECK", raising=False)
    monkeypatch.setattr(decision, "_decided", {})
    monkeypatch.setattr(decision, "_tuned", {})
    monkeypatch.setattr(records, "_in_memory", {})
    monkeypatch.setattr(decision, "_forked", False)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Let the process of a check be a script; return the file where each run of it leaves a line."""
    runs = tmp_path / "runs"
    runs.touch()

    def behave(script: str) -> Path:
        path = tmp_path / "driver.py"
        path.write_text(f"import json, os, sys, time\nopen({str(runs)!r}, 'a').write('run\\n')\n{textwrap.dedent(script)}")
        monkeypatch.setattr(decision, "CHECK", (sys.executable, str(path)))
        return runs

    return behave


def says(**verdict) -> str:
    return f"print(json.dumps({ {**RIGHT, **verdict}!r}))"


def runs_of(path: Path) -> int:
    return len(path.read_text().splitlines())


# ---- the problems


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(problems, "ROWS", 40)
    monkeypatch.setattr(problems, "VOCAB", 150)
    monkeypatch.setattr(problems, "WIDTHS", (64, 43))


def spoil(monkeypatch, kernel: str, change) -> None:
    """Have a row kernel of the torch backend do its work and then ``change(result, block)``."""
    right = getattr(torch_.TorchRows, kernel)

    def wrong(self, block, *rest):
        found = right(self, block, *rest)
        change(found, block, *rest)
        return found

    monkeypatch.setattr(torch_.TorchRows, kernel, wrong)


def add_to(statistic: str, much: float, row: int = -1):
    def change(found, block, targets, running, with_entropy):
        getattr(running, statistic)[row] += much

    return change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_right_passes_with_its_error(small, dtype):
    verdict = problems.check(Variant("torch", dtype), CPU)
    assert (verdict.passed, verdict.reason) == (True, "")
    assert 0 < verdict.worst < 1


calls = iter(range(10**6))
WRONG = {
    "a logprob": ("fold", add_to("z_y", 1e-3), "logprobs of torch at D = 64, flat: off by"),
    "a sum": ("fold", add_to("s", 1e-2), "of torch at D = 64, flat: off by"),
    "an entropy": ("fold", add_to("t", 1e-1), "entropy of torch at D = 64, flat: off by"),
    "NaN in one row": ("fold", add_to("s", float("nan"), 7), "not a number"),
    "an element of dz": ("gradient", lambda dz, *_: dz[0, 0].add_(0.01), "dH of torch at D = 64, flat: off by"),
    "a column of dz left out": ("gradient", lambda dz, *_: dz[:, -1].zero_(), "of torch at D = 64, flat: off by"),
    "a race": ("gradient", lambda dz, *_: dz[0].mul_(1 + 1e-3 * (next(calls) % 2)), "differs from run to run"),
    "unwritten memory": ("gradient", lambda dz, *_: dz[1].copy_(torch.empty_like(dz[1])), "differs from run to run|not a number"),
}


@pytest.mark.parametrize(("kernel", "change", "reason"), WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_a_little_wrong_fails_with_the_result_that_shows_it(small, monkeypatch, kernel, change, reason):
    spoil(monkeypatch, kernel, change)
    verdict = problems.check(Variant("torch", "float32"), CPU)
    assert not verdict.passed
    assert any(part in verdict.reason for part in reason.split("|")), verdict.reason


def test_an_exception_is_a_verdict(small, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of resource: shared memory, Required: 131096, Hardware limit: 101376\nmore")

    monkeypatch.setattr(torch_.TorchRows, "fold", broken)
    verdict = problems.check(Variant("torch", "float32"), CPU)
    assert verdict.reason == "RuntimeError: out of resource: shared memory, Required: 131096, Hardware limit: 101376"
    assert verdict.worst is None


def test_a_check_does_not_depend_on_the_callers_contexts_and_leaves_torchs_settings_as_they_were(small):
    def settings():
        filling = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), filling, torch.backends.cuda.matmul.fp32_precision

    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        before = settings()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            verdict = problems.check(Variant("torch", "float32"), CPU)
        assert verdict.passed, verdict.reason
        assert settings() == before
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


@pytest.mark.parametrize("softcap", [False, pytest.param(True, marks=pytest.mark.broad)])
def test_the_interpreted_triton_kernels_pass(small, monkeypatch, softcap):
    pytest.importorskip("triton")
    monkeypatch.setattr(problems, "WIDTHS", (64,))
    variant = Variant("triton", "bfloat16", softcap)
    assert {case.name for case in problems.cases(variant, CPU)} == {"D = 64, flat", "D = 64, peaked"}
    case = next(problems.cases(variant, CPU))
    assert problems.ways(variant) == (["triton"] if softcap else ["triton:recompute", "triton:cached"])
    if reason := dispatch.TRITON.why_not(explain(case.hidden, case.weight, backend="torch").problem, None):
        pytest.skip(reason)
    verdict = problems.check(variant, CPU)
    assert verdict.passed, verdict.reason


def test_the_variant_of_a_form_runs_that_form(small, monkeypatch):
    seen = []

    def cases(variant, device):
        seen.append(triton_.target_of(device).proven)
        return iter(())

    monkeypatch.setattr(problems, "cases", cases)
    for specialised in (True, False):
        variant = Variant("triton", "bfloat16", specialised=specialised)
        assert Variant.named(variant.name) == variant
        assert problems.check(variant, CPU).passed
    assert seen == [("bfloat16",), ()]


# ---- what stands for a driver


def test_a_verdict_is_found_once_and_kept_on_record(driver, monkeypatch, caplog):
    runs = driver(says())
    with caplog.at_level("INFO", "bupo_kernels"):
        assert decision.why_not(VARIANT, CPU) is None
    assert "native float32: right on" in caplog.text
    assert "worst error 0.13 of its bound (11 s)" in caplog.text
    assert decision.why_not(VARIANT, CPU) is None
    monkeypatch.setattr(decision, "_decided", {})  # another process
    assert decision.why_not(VARIANT, CPU) is None
    assert runs_of(runs) == 1
    assert decision.why_not(replace(VARIANT, dtype="bfloat16"), CPU) is None
    assert runs_of(runs) == 2


FAULTS = {
    "a fault": ("os.abort()", "the process of the check died of signal 6 (Aborted): without a word"),
    "an error": (
        "print('CUDA error: an illegal memory access was encountered', file=sys.stderr); sys.exit(3)",
        "the process of the check died of exit code 3: CUDA error: an illegal memory access was encountered",
    ),
    "wrong numbers": (says(passed=False, reason="logprobs: off by 7 times its bound"), "logprobs: off by 7 times its bound"),
    "nonsense": ("print('[1, 2]')", "the process of the check died of exit code 0: without a word"),
}


@pytest.mark.parametrize(("script", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_failure_is_kept_on_record_and_believed_for_a_day(driver, monkeypatch, script, reason):
    runs = driver(script)
    assert decision.why_not(VARIANT, CPU) == reason
    monkeypatch.setattr(decision, "_decided", {})
    found = decision.decide(VARIANT, CPU)
    assert found.reason == reason
    assert runs_of(runs) == (2 if found.time == RIGHT["time"] else 1)  # the third is older than a day
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + records.FAILURE_HOLDS + 60)
    assert records.read(Card.of(CPU)).verdicts == {}


def test_a_check_that_hangs_is_ended_with_its_children(driver, monkeypatch, tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(alive)!r}, 'w')"
    driver(f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)")
    monkeypatch.setattr(decision, "CHECK_SECONDS", 1)
    assert decision.why_not(VARIANT, CPU) == "the check did not end within 1 s"
    time.sleep(1.6)
    assert not alive.exists()


def test_where_another_context_is_refused_this_process_checks(driver, monkeypatch, small):
    driver("print(json.dumps({'refused': 'all CUDA-capable devices are busy or unavailable'}))")
    assert decision.why_not(Variant("torch", "float32"), CPU) is None
    spoil(monkeypatch, "fold", add_to("s", float("nan"), 7))
    assert "not a number" in decision.why_not(Variant("torch", "bfloat16"), CPU)


def test_the_process_that_checks_is_the_one_that_asks_for_the_device_or_refuses(capsys):
    options = ["--device", "cpu", "--variant", "torch float32", "--expect", "another card's key"]
    assert command.main(options) == 0
    assert json.loads(capsys.readouterr().out) == {"refused": "cpu is another card in a process of its own"}


def test_too_little_memory_is_no_verdict(driver, monkeypatch, small, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nmore")

    variant = Variant("torch", "float32")
    monkeypatch.setattr(problems, "WIDTHS", (43,))
    monkeypatch.setattr(torch_.TorchRows, "fold", out_of_memory)
    assert command.main(["--device", "cpu", "--variant", variant.name]) == 0
    assert json.loads(capsys.readouterr().out) == {"refused": "CUDA out of memory. Tried to allocate 2.00 MiB"}
    driver("print(json.dumps({'refused': 'CUDA out of memory'}))")
    assert decision.why_not(variant, CPU).startswith("not checked, there being no memory left for it")
    assert records.read(Card.of(CPU)) == Record()
    assert command.main(["--device", "cpu", "--dtype", "float32"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("CUDA out of memory. Tried to allocate 2.00 MiB")


def test_a_program_that_can_start_no_other_checks_itself(monkeypatch, small):
    monkeypatch.setattr(decision, "CHECK", ("", "-m", "bupo_kernels.selfcheck"))  # sys.executable of an embedded Python
    assert decision.why_not(Variant("torch", "float32"), CPU) is None


@pytest.mark.broad  # imports torch
def test_a_real_process_finds_a_real_verdict():
    verdict = decision.decide(Variant("torch", "float32"), CPU)
    assert verdict.passed, verdict.reason
    (path,) = records.folder().glob("*.json")
    assert json.loads(path.read_text())["verdicts"]["torch float32"] == asdict(verdict)


# ---- wishes, and where nothing can be found out


def test_BUPO_SELF_CHECK_says_when(driver, monkeypatch):
    runs = driver(says())
    monkeypatch.setenv("BUPO_SELF_CHECK", "0")
    assert "not checked on this card (BUPO_SELF_CHECK=0); `bupo check` does it" in decision.why_not(VARIANT, CPU)
    monkeypatch.setattr(decision, "_decided", {})
    records.add(Card.of(CPU), verdicts={VARIANT.name: Verdict(**RIGHT)})
    assert decision.why_not(VARIANT, CPU) is None
    assert runs_of(runs) == 0
    monkeypatch.setattr(decision, "_decided", {})
    monkeypatch.setenv("BUPO_SELF_CHECK", "again")
    assert decision.why_not(VARIANT, CPU) is None
    assert runs_of(runs) == 1
    monkeypatch.setattr(decision, "_decided", {})
    monkeypatch.setenv("BUPO_SELF_CHECK", "yes")
    with pytest.raises(ValueError, match="BUPO_SELF_CHECK: 'yes' given, accepted are 0, 1, again"):
        decision.why_not(VARIANT, CPU)


def asked_in_a_fork(queue) -> None:
    queue.put(decision.why_not(VARIANT, CPU))


def test_a_forked_process_checks_nothing_and_keeps_to_that(driver):
    runs = driver(says())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=asked_in_a_fork, args=(queue,))
    process.start()
    assert queue.get(timeout=60).startswith("not checked, being met first in a forked process; `bupo check` does it")
    process.join()
    assert runs_of(runs) == 0
    assert decision.why_not(VARIANT, CPU) is None  # the parent does


def test_where_fake_tensors_or_a_graph_are_made_the_fallback_is_taken_and_kept(driver, monkeypatch):
    runs = driver(says())
    with FakeTensorMode():
        assert decision.why_not(VARIANT, CPU).startswith("not checked, being met first while torch was tracing")
    assert decision.why_not(VARIANT, CPU).startswith("not checked, being met first while torch was tracing")
    other = replace(VARIANT, dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Card, "of", staticmethod(lambda device: CARD))
    assert decision.why_not(other, torch.device("cuda")).startswith("not checked, being met first while a CUDA graph was captured")
    assert runs_of(runs) == 0


def test_under_fake_tensors_the_op_asks_nothing_to_run(driver, monkeypatch):
    runs = driver(says())
    monkeypatch.setattr(dispatch.NATIVE_CPU, "why_not_default", lambda problem: decision.why_not(VARIANT, problem.device))
    with FakeTensorMode():
        found = linear_logprobs(torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.arange(5))
        assert found.logprobs.shape == (5,)
    assert runs_of(runs) == 0


def test_a_record_decides_while_torch_traces(driver):
    runs = driver(says())
    records.add(Card.of(CPU), verdicts={VARIANT.name: Verdict(**RIGHT)})
    with FakeTensorMode():
        assert decision.why_not(VARIANT, CPU) is None
    assert runs_of(runs) == 0


def test_compiled_first_and_eager_later_take_the_same_backend(driver, monkeypatch):
    """E, which a forward leaves, has the shape that its backend says while torch traces."""
    runs = driver(says())
    monkeypatch.setattr(dispatch.NATIVE_CPU, "why_not_default", lambda problem: decision.why_not(VARIANT, problem.device))
    hidden, weight, targets = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.arange(5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden):
        return linear_logprobs(hidden, weight, targets).logprobs

    compiled(hidden).sum().backward()
    plan = explain(hidden, weight, targets)
    assert plan.backend == "torch"
    if "native" in plan.why_not and "were not built" not in plan.why_not["native"]:
        assert plan.why_not["native"].startswith("not checked, being met first while torch was tracing")
    assert torch.equal(compiled(hidden), linear_logprobs(hidden, weight, targets).logprobs)
    assert runs_of(runs) == 0


# ---- records


CARD = Card("NVIDIA H100 80GB HBM3", "9.0", 132, "580.65 13000", "13.0", "2.11.0", "3.6.0", "abc")


def test_a_record_is_good_for_one_card_with_one_software():
    records.add(CARD, verdicts={VARIANT.name: Verdict(**RIGHT)})
    assert records.read(CARD) == Record({VARIANT.name: Verdict(**RIGHT)})
    for f in fields(Card):
        other = replace(CARD, **{f.name: 1 if f.type == "int" else "another"})
        assert records.read(other) == Record(), f.name


def test_the_key_follows_the_sources(monkeypatch, tmp_path):
    before = Card.of(CPU)
    package = tmp_path / "package"
    (package / "backends").mkdir(parents=True)
    (package / "backends" / "a.py").write_text("x = 1")
    (package / "engine.py").write_text("")
    monkeypatch.setattr(cards, "PACKAGE", package)
    of, sources = Card.of.__wrapped__, cards._sources.__wrapped__
    monkeypatch.setattr(cards, "_sources", sources)
    first = of(CPU).key
    (package / "backends" / "a.py").write_text("x = 2")
    assert len({before.key, first, of(CPU).key}) == 3


BROKEN = {
    "half a file": lambda path: path.write_text(path.read_text()[:50]),
    "no JSON": lambda path: path.write_bytes(b"\xff\x00"),
    "a list": lambda path: path.write_text("[]"),
    "another card's": lambda path: path.write_text(path.read_text().replace("H100", "H200")),
    "another format": lambda path: path.write_text(path.read_text().replace(f'"version": {records.VERSION}', '"version": 0')),
    "a verdict of words": lambda path: path.write_text(path.read_text().replace("true", '"yes"')),
    "a verdict with more": lambda path: path.write_text(path.read_text().replace('"reason"', '"because"')),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
def test_a_record_that_is_not_whole_is_none_and_is_replaced(breaking):
    path = records.add(CARD, verdicts={VARIANT.name: Verdict(**RIGHT)})
    breaking(path)
    assert records.read(CARD) == Record()
    again = records.add(CARD, verdicts={VARIANT.name: Verdict(**RIGHT)})
    assert records.read(CARD).verdicts[VARIANT.name].passed
    assert again == (None if path.is_dir() else path)  # then it stays in memory


def test_a_writer_that_is_stopped_leaves_the_old_record_whole(monkeypatch):
    path = records.add(CARD, verdicts={"torch float32": Verdict(**RIGHT)})
    before = path.read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        records.add(CARD, verdicts={VARIANT.name: Verdict(**RIGHT)})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_tiles_and_verdicts_add_up():
    records.add(CARD, verdicts={"torch float32": Verdict(**RIGHT)})
    records.add(CARD, tiles={"statistics": {"rows": 128}})
    records.add(CARD, verdicts={VARIANT.name: Verdict(**RIGHT)})
    found = records.read(CARD)
    assert (set(found.verdicts), found.tiles) == ({"torch float32", VARIANT.name}, {"statistics": {"rows": 128}})


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """A home that cannot be made or written, by root neither."""
    (tmp_path / "file").touch()
    monkeypatch.delenv("BUPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(records.tempfile, "tempdir", str(temporary))
    return temporary


def test_without_a_home_records_lie_in_a_temporary_folder_of_the_user(no_home):
    assert records.folder() == no_home / f"bupo_kernels-{os.getuid()}"
    assert (records.folder().stat().st_mode & 0o777) == 0o700


@pytest.mark.parametrize("kind", ["others may write", "a link", "somebody else's"])
def test_a_temporary_folder_that_is_not_the_users_alone_is_not_taken(no_home, monkeypatch, kind):
    place = no_home / f"bupo_kernels-{os.getuid()}"
    if kind == "others may write":
        place.mkdir()
        place.chmod(0o777)
    elif kind == "a link":
        (no_home / "elsewhere").mkdir()
        place.symlink_to(no_home / "elsewhere")
    else:
        place.mkdir(mode=0o700)
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        place.rename(no_home / f"bupo_kernels-{owner + 1}")
    assert records.folder() is None
    assert records.add(CARD, verdicts={VARIANT.name: Verdict(**RIGHT)}) is None
    assert records.read(CARD).verdicts[VARIANT.name].passed  # in memory
    with records.alone(CARD, 1) as held:
        assert not held


DECIDE = """
import sys, torch
from bupo_kernels.selfcheck import decision
decision.CHECK = (sys.executable, {driver!r})
print(decision.why_not(decision.Variant("native", "float32"), torch.device("cpu")))
"""


@pytest.mark.broad  # twice
def test_of_two_processes_at_once_one_checks(driver, tmp_path):
    runs = driver(f"time.sleep(2); {says()}")
    script = DECIDE.format(driver=str(tmp_path / "driver.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["None", "None"]
    assert runs_of(runs) == 1


def test_who_waits_in_vain_goes_on_alone_and_a_lock_of_the_dead_is_free(driver, monkeypatch, tmp_path):
    runs = driver(says())
    folder = records.folder()
    hold = (
        "import sys, time; from filelock import FileLock; FileLock(sys.argv[1]).acquire(); print('held', flush=1); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / f"{Card.of(CPU).key}.lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(decision, "WAIT_SECONDS", 0.2)
    assert decision.why_not(VARIANT, CPU) is None
    assert runs_of(runs) == 1
    holder.kill()
    holder.wait()
    with records.alone(Card.of(CPU), 5) as held:
        assert held


# ---- what a run keeps


def test_a_process_decides_as_another_did(driver, monkeypatch):
    driver(says())
    records.add(Card.of(CPU), tiles={"statistics": {"rows": 128}}, slower={"native float32, D <= 1536": "slower than torch"})
    assert decision.why_not(VARIANT, CPU) is None
    assert decision.why_not(VARIANT, CPU, "D <= 1536") == "slower than torch"
    kept = json.loads(json.dumps(decision.decisions(CPU)))
    assert kept["passed"] == {VARIANT.name: True}

    monkeypatch.setattr(decision, "_decided", {})
    monkeypatch.setattr(decision, "_tuned", {})
    runs = driver(says(passed=False, reason="wrong today"))
    records.add(Card.of(CPU), tiles={"statistics": {"rows": 64}})
    assert decision.pin(CPU, kept) is None
    assert decision.why_not(VARIANT, CPU) is None
    assert decision.tuned(CPU).tiles == {"statistics": {"rows": 128}}
    assert runs_of(runs) == 1  # the first process's
    assert decision.decisions(CPU) == kept

    assert "is taken" in decision.pin(CPU, {**kept, "passed": {VARIANT.name: False}})
    assert decision.pin(CPU, {**kept, "tiles": {}}) == "this process has begun with other results of `bupo tune`"
    assert decision.pin(CPU, {**kept, "card": "x", "name": "NVIDIA H200"}).startswith(
        "kernels were chosen on NVIDIA H200, and this"
    )


# ---- the command


def test_the_table_has_every_variant_with_its_verdict(small, monkeypatch, capsys):
    monkeypatch.setattr(problems, "WIDTHS", (43,))
    assert command.main(["--device", "cpu", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["device", "variant", "verdict", "worst", "error", "/", "bound", "seconds"]
    assert [line.split()[2:4] for line in lines[1:]] == [
        ["triton", "float32"],
        ["triton", "float32"],
        ["native", "float32"],
        ["torch", "float32"],
    ]
    assert "right" in lines[-1]
    spoil(monkeypatch, "fold", add_to("s", float("nan"), 7))
    assert command.main(["--device", "cpu", "--dtype", "float32", "--json"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["variant"], last["verdict"]["passed"]) == ("torch float32", False)


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(ValueError, match=r"--device: 'cuda:7' given, accepted are .*cpu"):
        command.devices_of("cuda:7")
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda:7"])
    assert "--device: 'cuda:7' given" in capsys.readouterr().err
