"""``make gpu`` without a GPU: parts that pass, fail, hang or are interrupted, and the summary that comes whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import gpu
import pytest
from gpu import Part, parser, parts

ROOT = Path(__file__).parents[1]


def python(name: str, code: str, limit: float = 60, **about) -> Part:
    return Part(name, [sys.executable, "-c", code], limit, **about)


def rows_of(text: str) -> dict[str, list[str]]:
    """Verdict, seconds and reason by the name of the part."""
    lines = text[text.rindex("part ") :].splitlines()[1:-1]
    columns = [[field.strip() for field in line.split("  ") if field.strip()] for line in lines]
    return {name: rest for name, *rest in columns}


def is_alive(pid: int) -> bool:
    """Whether a process runs; those that are dead but not reaped do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert condition()


# It starts a child, tells its id, and neither hears an interrupt.
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
print("about to hang", flush=True)
time.sleep(600)
"""


def hanging(folder: Path, limit: float) -> Part:
    return Part("hangs", [sys.executable, "-c", HANGS, str(folder / "child")], limit)


def test_whatever_becomes_of_a_part_the_next_goes_on_and_the_summary_tells(tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.3)
    stages = [
        [python("passes", "print('all is well')"), python("at the same time", "raise RuntimeError('no such thing')")],
        [hanging(tmp_path, 2)],
        [python("skipped", "", why_not="a tool: not installed")],
        [python("dies", "import os; os.kill(os.getpid(), 11)")],
        [Part("is not there", ["/no/such/program"], 60)],
        [python("comes last", "print('still here')")],
    ]
    assert gpu.run(stages, 1, tmp_path) == 1
    output = capfdbinary.readouterr().out.decode()
    found = rows_of(output)
    assert list(found) == [part.name for stage in stages for part in stage]
    assert {name: row[0] for name, row in found.items()} == {
        "passes": "passed",
        "at the same time": "failed",
        "hangs": "timeout",
        "skipped": "skipped",
        "dies": "failed",
        "is not there": "failed",
        "comes last": "passed",
    }
    assert found["at the same time"][2] == "exit code 1: RuntimeError: no such thing"
    assert found["hangs"][2] == "over its limit of 2 s: about to hang"
    assert 2 <= float(found["hangs"][1]) < 15
    assert found["skipped"][2] == "a tool: not installed"
    assert found["dies"][2] == "killed by SIGSEGV: nothing was written"
    assert "/no/such/program" in found["is not there"][2]
    assert not is_alive(int((tmp_path / "child").read_text()))
    assert "\npasses | all is well\n" in output  # beside another part each line says whose it is
    assert "\nstill here\n" in output
    assert (tmp_path / "passes.log").read_text() == "all is well\n"
    assert rows_of((tmp_path / "summary.txt").read_text()) == found


def test_all_that_passes_or_is_skipped_is_a_success(tmp_path):
    assert gpu.run([[python("passes", "")], [python("skipped", "", why_not="not here")]], 1, tmp_path) == 0


def test_a_child_that_outlives_its_part_is_ended_with_it(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    started = time.monotonic()
    assert gpu.run([[python("leaves a child", code)]], 1, tmp_path) == 0
    assert time.monotonic() - started < 30
    pid = int((tmp_path / "leaves-a-child.log").read_text())
    wait_for(lambda: not is_alive(pid))


def test_the_limit_of_all_cuts_a_part_short_and_leaves_out_the_others(tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.3)
    assert gpu.run([[hanging(tmp_path, 60)], [python("late", "")]], 2 / 60, tmp_path) == 1
    found = rows_of(capfdbinary.readouterr().out.decode())
    assert found["hangs"][0] == "timeout"
    assert "the time left" in found["hangs"][2]
    assert found["late"][::2] == ["not run", "the 0.0333333 minutes were over"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_ends_what_runs_and_the_summary_comes_all_the_same(tmp_path, number):
    script = (
        "import sys; from pathlib import Path; from test_gpu_run import *; gpu.PATIENCE = 0.3; out = Path(sys.argv[1])\n"
        "sys.exit(gpu.run([[python('first', '')], [hanging(out, 60)], [python('late', '')]], 1, out))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: (tmp_path / "hangs.log").exists() and "about" in (tmp_path / "hangs.log").read_text())
        process.send_signal(number)
        process.send_signal(number)  # of one who cannot wait
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found = rows_of(output)
    assert [row[0] for row in found.values()] == ["passed", "interrupted", "not run"]
    assert found["late"][2] == "interrupted before"
    assert not is_alive(int((tmp_path / "child").read_text()))


PASSES = "def test_a(): pass\n"
FAILS = PASSES + "def test_b():\n    assert 1 == 2, 'off by one'\n"
SKIPS = "import pytest\n@pytest.mark.skip(reason='needs 80.0 GiB of device memory')\ndef test_c(): pass\n"
IS_SLOW = PASSES + "import time\ndef test_d(): time.sleep(600)\n"
FAULTS = PASSES + "import os\ndef test_e(): os.kill(os.getpid(), 9)\n"


@pytest.mark.parametrize(
    ("text", "verdict", "reason"),
    [
        (PASSES, "passed", "1 passed, 0 failed, 0 skipped"),
        (PASSES + SKIPS, "passed", "1 passed, 0 failed, 1 skipped"),
        (FAILS, "failed", "1 passed, 1 failed, 0 skipped; test_b: AssertionError: off by one"),
        (SKIPS, "skipped", "0 passed, 0 failed, 1 skipped; test_c: needs 80.0 GiB of device memory"),
        (IS_SLOW, "timeout", "over its limit of 60 s; 1 passed, 1 failed, 0 skipped; test_d: over its limit of 60 s"),
        (FAULTS, "failed", r"killed by SIGKILL, no report: .*test_it.py::test_e"),
        ("", "failed", "exit code 5; 0 passed, 0 failed, 0 skipped: .*"),
    ],
    ids=["passes", "passes and skips", "fails", "skips", "is slow", "faults", "has no tests"],
)
def test_a_part_of_pytest_leaves_a_report_and_its_first_failure_in_the_summary(
    tmp_path, capfdbinary, monkeypatch, text, verdict, reason
):
    (tmp_path / "test_it.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        str(tmp_path / "test_it.py"),
    ]
    quickly = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    part = Part("some tests", command, 60, pytest=True, environment=quickly)
    if text is IS_SLOW:  # its time is over as soon as it is in the test
        monkeypatch.setattr(gpu.Running, "seconds", property(lambda self: 61.0 if b"test_d" in self.log.read_bytes() else 0.0))
    code = gpu.run([[part]], 2, tmp_path)
    (row,) = rows_of(capfdbinary.readouterr().out.decode()).values()
    assert row[0] == verdict
    assert re.fullmatch(reason, row[2])
    assert code == (verdict in ("failed", "timeout"))
    report = ElementTree.parse(tmp_path / "some-tests.xml").getroot()
    bad = [child for child in report.iter() if child.tag in ("failure", "error")]
    assert len(bad) == (text in (FAILS, IS_SLOW, FAULTS))
    assert sum(int(suite.get(name)) for suite in report.iter("testsuite") for name in ("failures", "errors")) == len(bad)


def test_the_summary_names_the_fault_that_the_sanitizer_met(tmp_path, capfdbinary):
    said = "a.py::test_a PASSED\n========= Invalid __global__ read of size 4 bytes\n=========     at x\n"
    code = f"import sys; print({said!r}); sys.exit(86)"
    assert gpu.run([[python("sanitizer", code, pytest=True)]], 1, tmp_path) == 1
    (row,) = rows_of(capfdbinary.readouterr().out.decode()).values()
    assert row[2] == "exit code 86, no report: ========= Invalid __global__ read of size 4 bytes"


def test_the_summary_has_the_times_beside_the_bare_products(tmp_path, capfdbinary):
    rows = [
        {"who": "floor", "name": "products", "group": "forward", "times_floor": 1.0},
        {"who": "ours", "name": "bupo_kernels triton", "group": "forward", "times_floor": 1.25, "reason": None},
        {"who": "ours", "name": "bupo_kernels native", "group": "forward", "reason": "not built"},
    ]
    code = f"from pathlib import Path; Path({str(tmp_path / 'a.json')!r}).write_text({json.dumps({'kernels': {'rows': rows}})!r})"
    assert gpu.run([[python("cuBLAS", code, results=tmp_path)]], 1, tmp_path) == 0
    (row,) = rows_of(capfdbinary.readouterr().out.decode()).values()
    said = "forward, bupo_kernels triton: 1.25; forward, bupo_kernels native: not built"
    assert row[2] == f"times of the bare products: {said}"
    assert gpu.times_of(tmp_path / "nothing") == (False, "times of the bare products: none")


def parsed(*arguments: str) -> list[list[Part]]:
    return parts(parser().parse_args(arguments))


def test_parts_come_in_the_order_that_gives_answers_first():
    stages = parsed()
    assert [[part.name for part in stage] for stage in stages] == [
        ["build", "precompile"],
        ["smallest"],
        ["sanitizer"],
        ["real size"],
        ["cuBLAS"],
        ["self-check"],
        ["benchmark"],
        ["training step"],
        ["tests"],
    ]
    *_, tests = (max(part.limit for part in stage) for stage in stages)
    assert tests == 60 * gpu.MINUTES  # whatever is left
    markers = [
        part.command[part.command.index("-m", 3) + 1] for stage in stages for part in stage if part.name in ("smallest", "tests")
    ]
    assert markers == ["smallest", "gpu and not smallest and not telling"]


def test_limits_and_benchmarks_grow_with_the_minutes_and_the_commit_is_handed_on():
    nine, eighteen = ({part.name: part for stage in parsed(*given) for part in stage} for given in ([], ["--minutes", "18"]))
    assert {name: part.limit for name, part in eighteen.items()} == {name: 2 * part.limit for name, part in nine.items()}
    assert "--minutes 3 " in " ".join(nine["benchmark"].command)
    assert "--minutes 6 " in " ".join(eighteen["benchmark"].command)
    (of_commit,) = ({part.name for stage in parsed("--commit", "abc") for part in stage if "abc" in part.command},)
    assert of_commit == {"cuBLAS", "benchmark", "training step"}


def test_what_the_machine_lacks_is_skipped_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    reasons = {part.name: part.why_not for stage in parsed() for part in stage if part.why_not}
    assert reasons == {
        "precompile": "triton: not installed",
        "sanitizer": "compute-sanitizer: neither on the PATH nor in CUDA_HOME/bin",
        "training step": "pydantic: not installed",
    }
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    (sanitizer,) = (part for stage in parsed() for part in stage if part.name == "sanitizer")
    assert sanitizer.why_not is None
    assert sanitizer.command[0] == str(tool)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "sees no GPU here; accepted is a machine with a CUDA GPU"),
        (["--parts", "smallest", "largest"], "--parts: 'largest' given, accepted are 'build', 'precompile', 'smallest'"),
        (["--minutes", "0"], "--minutes: 0 given, accepted are positive numbers"),
    ],
    ids=["no GPU", "no such part", "no time"],
)
def test_it_exits_with_2_and_writes_nothing(tmp_path, arguments, said):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), "--out", str(out), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert not out.exists()
