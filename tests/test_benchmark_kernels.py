"""The runner behind the tables: what it lets in, what it throws out, and what it says of them. Nothing here depends on time."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import first_of
from rich.console import Console

from benchmarks import kernels
from benchmarks.contenders import GROUPS, Contender
from benchmarks.inputs import Case, Inputs
from benchmarks.ours import floor, naive, ours
from bupo.measurement import peak_bytes

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CASE = Case.of("tiny", 64, dtype="float32")
LENS = Case.of("tiny", 16, dtype="float32", layers=3)


@pytest.fixture(autouse=True, scope="module")
def _memory_is_not_measured():
    """The profiler takes half a second to start."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(kernels, "peak_bytes", lambda call, device: (call(), 1)[1])
        yield


def case_of(group: str) -> Case:
    return LENS if group == "lens" else CASE


def some(group: str, x: Inputs) -> list[Contender]:
    """Those that run on any CPU without a compiler."""
    return [c for c in (floor(group, x), *naive(group, x), *ours(group, x)) if "compile" not in c.name and c.why_not(x) is None]


def measured(monkeypatch, group: str, *contenders: Contender, case: Case | None = None, rounds: int = 2, **options) -> list[dict]:
    """The rows of these, or of :func:`some`, behind the floor's."""
    these = (lambda group, x: [floor(group, x), *contenders]) if contenders else some
    monkeypatch.setattr(kernels, "contenders", these)
    return kernels.measure(group, case or case_of(group), CPU, rounds, **options)


def honest(group: str = "forward") -> Contender:
    return next(c for c in ours(group, Inputs(CASE, CPU)) if c.name == "bupo_kernels torch")


@pytest.fixture(scope="module", params=first_of(GROUPS))
def tables(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return request.param, measured(monkeypatch, request.param)


def test_every_row_is_measured_against_the_floor_of_its_own_rounds(tables):
    group, rows = tables
    assert len(rows) >= 3
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    of_floor = rows[0]
    assert of_floor["who"] == "floor"
    assert of_floor["times_floor"] == 1
    for row in rows:
        assert row["reason"] is None, row
        assert len(row["ms_of_rounds"]) == 2
        ratios = [ms / floor_ms for ms, floor_ms in zip(row["ms_of_rounds"], of_floor["ms_of_rounds"], strict=True)]
        assert row["times_floor"] == pytest.approx(sum(ratios) / 2)
        case = case_of(group)
        flops = 2 * GROUPS[group] * case.layers * case.rows * case.vocab * case.width
        assert row["useful_tflops"] == pytest.approx(flops / row["ms"] / 1e9)


def test_errors_are_those_of_float32(tables):
    group, rows = tables
    for row in rows[1:]:
        for of in ("flat", "peaked"):
            errors = {name: error for name, error in row["errors"][of].items() if error is not None}
            gradients = {"hidden", "weight"} if GROUPS[group] == 3 else set()
            statistics = set() if group == "one-pass loss" else {"logprobs", "entropy"}
            assert set(errors) == gradients | statistics
            assert 0 < max(errors.values()) < 1e-4, (row["name"], of, errors)


def test_rows_that_do_not_count_are_in_neither_floor_nor_flops(monkeypatch):
    cases = [replace(CASE, active=share, rows=512) for share in (0.5, 1)]
    half, whole = (measured(monkeypatch, "forward", honest(), case=case, rounds=1) for case in cases)
    for a, b in zip(half, whole, strict=True):
        assert a["useful_tflops"] * a["ms"] == pytest.approx(b["useful_tflops"] * b["ms"] / 2)
    x = Inputs(cases[0], CPU)
    contender = floor("forward", x)
    contender.poison()
    assert [p.shape for p in contender.call(x)] == [(256, 517)]


def cheating(call, name="a peer", group="forward", **others) -> Contender:
    return Contender(name, "peer", group, "log-prob, entropy", call, 1, **others)


def test_one_that_returns_what_it_found_before_is_thrown_out(monkeypatch):
    kept = {}

    def call(x):
        if x.distribution not in kept:
            kept[x.distribution] = honest().call(x)
        return kept[x.distribution]

    # Flat, peaked, and then flat again: the first result would serve.
    row = measured(monkeypatch, "forward", cheating(call))[1]
    assert row["reason"] == "Wrong: log-probs that are not of the operands given"
    assert "ms" not in row


def test_a_stale_gradient_is_thrown_out(monkeypatch):
    class Stale(torch.autograd.Function):
        kept = {}  # noqa: RUF012

        @staticmethod
        def forward(ctx, hidden, weight, x):
            with torch.enable_grad():
                loss = honest("one-pass loss").call(x)
            gradients = torch.autograd.grad(loss, x.leaves)
            ctx.save_for_backward(*Stale.kept.setdefault(x.distribution, gradients))
            return loss.detach()

        @staticmethod
        def backward(ctx, upstream):
            return *ctx.saved_tensors, None

    call = lambda x: Stale.apply(*x.leaves, x)  # noqa: E731
    contender = replace(cheating(call, group="one-pass loss"), computes="policy loss")
    row = measured(monkeypatch, "one-pass loss", contender)[1]
    assert row["reason"] == "Wrong: a gradient that is not of the operands given"


def test_memory_that_is_never_written_shows(monkeypatch):
    def call(x):
        logprobs, entropy = honest().call(x)
        unwritten = torch.empty_like(logprobs)
        unwritten[1:] = logprobs[1:]
        return unwritten, entropy

    row = measured(monkeypatch, "forward", cheating(call))[1]
    assert row["reason"] == "Wrong: logprobs not finite, with flat policies"


def test_the_floor_writes_all_of_its_products():
    x = Inputs(CASE, CPU)
    contender = floor("forward+backward", x)
    contender.poison()
    first = kernels.run(contender, x)
    assert [tuple(p.shape) for p in first.values()] == [(64, 517), (64, 64), (517, 64)]
    kernels.require_finite(first, x)
    contender.poison()
    assert all(p.isnan().all() for p in first.values())


def test_one_that_fails_is_a_row_with_the_reason(monkeypatch):
    def call(x):
        raise torch.OutOfMemoryError("no room\nfor this")

    refusing = cheating(honest().call, "not here", why_not=lambda x: "needs pip install something")
    rows = measured(monkeypatch, "forward", cheating(call), refusing, honest())
    assert [row["reason"] for row in rows[1:]] == ["OutOfMemoryError: no room for this", "needs pip install something", None]


def test_a_table_in_which_nothing_runs_has_all_the_reasons(monkeypatch):
    def call(x):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(kernels, "contenders", lambda group, x: [replace(floor(group, x), call=call), cheating(call)])
    rows = kernels.measure("forward", CASE, CPU, 2)
    assert [row["reason"] for row in rows] == ["OutOfMemoryError: no room"] * 2


def test_contenders_take_turns_and_none_is_always_first(monkeypatch):
    order = []

    def named(name):
        return cheating(lambda x: (order.append(name), honest().call(x))[1], name)

    measured(monkeypatch, "forward", named("a"), named("b"), rounds=3)
    # Two checks, a first round in which each warms up, then the floor moves from first to last.
    assert order == ["a", "b"] * 2 + ["a", "a", "b", "b"] + ["a", "b"] + ["b", "a"]


def test_past_the_deadline_nobody_is_tried_and_one_round_is_run(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(clock))
    # Looked at twice in a check, and before a contender is tried.
    floor_row, tried, not_tried = measured(monkeypatch, "forward", honest(), cheating(honest().call), rounds=5, deadline=3.5)
    assert not_tried["reason"] == "the minutes given were over"
    assert [len(row["ms_of_rounds"]) for row in (floor_row, tried)] == [1, 1]


@pytest.mark.broad
def test_one_that_takes_long_runs_in_fewer_rounds(monkeypatch):
    def measure(patience):
        monkeypatch.setattr(kernels, "timed", lambda call, device: (2.0, call()))
        return [len(row["ms_of_rounds"]) for row in measured(monkeypatch, "forward", honest(), rounds=5, patience=patience)]

    assert measure(5.0) == [3, 3]  # the first round, and two of 2 s
    assert measure(8.0) == [5, 5]


def test_one_that_takes_too_long_is_not_waited_for(monkeypatch):
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(clock))  # every run takes 4 s
    for patience, allowed in ((1.0, 3), (3.0, 3)):  # three times as long is allowed for the first
        floor_row, row = measured(monkeypatch, "forward", honest(), rounds=1, patience=patience)
        assert row["reason"] == f"Slow: 4 s for a run, of which {allowed} are waited for"
        assert floor_row["reason"] is None
    assert measured(monkeypatch, "forward", honest(), rounds=1, patience=4.0)[1]["reason"] is None


def test_memory_is_what_is_held_beyond_the_results(monkeypatch):
    monkeypatch.setattr(kernels, "peak_bytes", peak_bytes)

    def call(x):
        held = torch.zeros(2**20)
        return honest().call(x) if held.sum() == 0 else None

    plain, greedy = measured(monkeypatch, "forward", honest(), cheating(call))[1:]
    assert greedy["peak_bytes"] - plain["peak_bytes"] == pytest.approx(4 * 2**20, abs=1000)
    assert plain["peak_bytes"] <= plain["stated_bytes"]


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(kernels, "contenders", some)
    monkeypatch.setattr(kernels, "rates", lambda device: {"gemm_tflops": {"float32": 1.0}, "copy_gb_per_s": 1.0})

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["kernels", "--device", "cpu", *words])
        return kernels.main()

    return run


def test_command_writes_its_section_and_prints_every_row(command, tmp_path, capsys):
    given = ("--models", "tiny", "--rows", "32", "--dtypes", "float32", "--rounds", "1", "--commit", "abc", "--out", str(tmp_path))
    assert command(*given, "--groups", "forward", "lens") == 0
    (path,) = tmp_path.glob("*.json")
    section = json.loads(path.read_text())["kernels"]
    assert section["machine"]["commit"] == "abc"
    assert [row["rows"] * row["layers"] for row in section["rows"] if row["who"] == "floor"] == [32, 32]
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for row in section["rows"])
    assert str(path) in printed.replace("\n", "")


def test_what_time_is_not_enough_for_is_a_row_with_the_reason(command, tmp_path):
    assert command("--models", "tiny", "--rows", "8", "--minutes", "0", "--groups", "forward", "--out", str(tmp_path)) == 0
    (row,) = json.loads(next(tmp_path.glob("*.json")).read_text())["kernels"]["rows"]
    assert row["reason"] == "the minutes given were over"


@pytest.mark.broad
def test_tables_of_the_same_commit_stay_beside_new_ones(command, tmp_path):
    def tables(*words: str) -> list[tuple]:
        assert command("--models", "tiny", "--rounds", "1", "--out", str(tmp_path), "--contenders", "torch", *words) == 0
        rows = json.loads(next(tmp_path.glob("*.json")).read_text())["kernels"]["rows"]
        return list(dict.fromkeys((row["group"], row["rows"], row["reason"]) for row in rows))

    of_abc = ("--commit", "abc", "--groups", "forward")
    assert tables(*of_abc, "--rows", "8") == [("forward", 8, None)]
    assert tables(*of_abc, "--rows", "16") == [("forward", 8, None), ("forward", 16, None)]
    assert tables(*of_abc, "--rows", "8") == [("forward", 16, None), ("forward", 8, None)]
    over = "the minutes given were over"
    both = [("forward", 16, None), ("forward", 8, None)]
    assert tables(*of_abc, "--rows", "8", "32", "--minutes", "0") == [*both, ("forward", 32, over)]
    assert tables("--commit", "other", "--groups", "forward", "--rows", "32") == [("forward", 32, None)]
    assert tables("--commit", "x-dirty", "--groups", "forward", "--rows", "8") == [("forward", 8, None)]
    assert tables("--commit", "x-dirty", "--groups", "forward", "--rows", "16") == [("forward", 16, None)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rows", "0"], "--rows"),
        (["--rounds", "0"], "--rounds"),
        (["--active", "1.5"], "--active"),
        (["--contenders", "("], "--contenders: '(' is no regular expression"),
        (["--models", "GPT-5"], "argument --models: invalid choice: 'GPT-5'"),
    ],
)
def test_bad_options_are_named(command, capsys, words, says):
    with pytest.raises(SystemExit) as stopped:
        command(*words)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_table_has_the_reasons_of_those_that_did_not_run(monkeypatch):
    refusing = cheating(honest().call, "[red] peer", why_not=lambda x: "needs [a GPU]")
    rows = measured(monkeypatch, "forward", refusing, rounds=1)
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    kernels.print_rows(rows, console)
    assert "[red] peer: not run: needs [a GPU]" in console.export_text()


@pytest.mark.broad
def test_it_needs_nothing_that_a_machine_with_a_gpu_may_lack():
    lacking = ("pydantic", "accelerate", "datasets", "trl", "verl", "liger_kernel", "cut_cross_entropy")
    hidden = f"import sys; sys.modules.update(dict.fromkeys({lacking}))"
    subprocess.run(
        [sys.executable, "-c", f"{hidden}; import benchmarks.kernels, bupo.tune, bupo_kernels.selfcheck.__main__"],
        check=True,
        cwd=ROOT,
    )
