"""What there is to find out on a machine with a GPU, in the order that gives answers first: ``make gpu``.

Parts run one after the other, each in a process group of its own and under its own limit. Whatever becomes of one, the next goes
on, and a summary comes at the end. Nothing here needs the network, or more than torch, Triton, pytest, hypothesis, rich and what
setup.py builds with.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 9.0  # what the limits below are made for; they are stretched to what is given
PATIENCE = 5.0  # seconds from an interrupt, on which pytest writes its report, to the end by force, and from there to giving up
FAULT = re.compile(r"=========\s+(Invalid|Misaligned|Program hit|ERROR SUMMARY: [1-9])")  # of compute-sanitizer
OF_TEST = re.compile(r"\s(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")  # behind its name, once it is over
BAD = ("failed", "timeout", "interrupted", "not run")


@dataclass(frozen=True)
class Part:
    """A command, and how long it may take."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    why_not: str | None = None  # why it is skipped here
    pytest: bool = False  # whether it takes --junitxml
    results: Path | None = None  # where the benchmark leaves numbers that are to be in the summary
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A line of the summary."""

    verdict: str
    seconds: float
    reason: str


def parts(options: argparse.Namespace) -> list[list[Part]]:
    """The parts in their order; those of one list run at the same time."""
    share, python = options.minutes / MINUTES, [sys.executable]
    commit = ["--commit", options.commit] if options.commit else []
    sanitizer = compute_sanitizer()
    test = [*python, "-m", "pytest", "-vv", "--tb=short", "-o", "faulthandler_timeout=45", "tests/test_gpu.py", "-m"]
    kernels = [*python, "-m", "benchmarks.kernels", "--device", "cuda"]
    size = ["--models", "Qwen3-4B", "--rows", "4096", "--groups", "forward", "forward+backward", "--rounds", "3"]
    one_size = options.out / "cuBLAS"
    ours = ["--contenders", "bupo_kernels", "--minutes", f"{0.5 * share:g}", "--out", str(one_size)]
    compilation = [*python, "-m", "bupo_kernels.backends.triton_.compile", "--target", "local", "--jobs", str(os.cpu_count())]
    memcheck = [str(sanitizer), "--target-processes", "all", "--report-api-errors", "no", "--error-exitcode", "86"]
    timing = [*kernels, "--contenders", "^(?!.*torch.compile)", "--minutes", f"{3 * share:g}", "--out", str(options.results)]
    step = [*python, "-m", "bupo", "bench", "--minutes", f"{share:g}", "--out", str(options.results)]

    def part(name: str, seconds: float, command: Sequence[str], **about) -> Part:
        return Part(name, command, share * seconds, **about)

    return [
        [
            part("build", 120, [*python, "setup.py", "-q", "build_ext", "--inplace"]),
            part("precompile", 120, compilation, why_not=not_installed("triton")),
        ],
        [part("smallest", 60, [*test, "smallest"], pytest=True)],
        [
            part(
                "sanitizer",
                75,
                [*memcheck, *test, "smallest"],
                pytest=True,
                why_not=None if sanitizer else "compute-sanitizer: neither on the PATH nor in CUDA_HOME/bin",
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor an allocation, whose ends are known
            )
        ],
        [part("real size", 45, [*test, "telling"], pytest=True)],
        [part("cuBLAS", 60, [*kernels, *size, *ours, *commit], results=one_size)],
        [part("self-check", 90, [*python, "-m", "bupo_kernels.selfcheck", "--dtype", "bfloat16"])],
        [part("benchmark", 210, [*timing, *commit])],
        [part("training step", 80, [*step, *commit], why_not=not_installed("pydantic"))],
        [part("tests", 60 * MINUTES, [*test, "gpu and not smallest and not telling", "--durations=10"], pytest=True)],
    ]


def not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package}: not installed"


def compute_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(home, "bin")))


class Running:
    """A part that was started. What it writes goes to the terminal and to its log."""

    def __init__(self, part: Part, limit: float, out: Path, alone: bool):
        self.part, self.limit, self.started = part, min(part.limit, limit), time.monotonic()
        self.is_cut = limit < part.limit
        name = part.name.replace(" ", "-")
        self.log, self.report = out / f"{name}.log", out / f"{name}.xml" if part.pytest else None
        self.prefix = b"" if alone else f"{part.name} | ".encode()
        self.log.write_bytes(b"")
        if self.report is not None:
            self.report.unlink(missing_ok=True)
        command = [*part.command, *(["--junitxml", str(self.report)] if self.report else [])]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **part.environment}
        say(f"\n== {part.name}, {self.limit:.0f} s at most: {' '.join(command)}\n".encode())
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        pending = b""
        with self.log.open("wb", buffering=0) as log:
            while chunk := os.read(self.process.stdout.fileno(), 2**16):
                with suppress(OSError):  # a full disk is no reason to stop reading, and with it the part
                    log.write(chunk)
                if not self.prefix:
                    say(chunk)
                    continue
                *lines, pending = (pending + chunk).split(b"\n")
                say(b"".join(self.prefix + line + b"\n" for line in lines))
        say(self.prefix + pending + b"\n" if pending else b"")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def has_ended(self) -> bool:
        """Whether the command has; it is not reaped, so that its group cannot become another's."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def outcome(self) -> Outcome | None:
        """What came of it, or None as long as nothing has."""
        if self.has_ended():
            code = self.end()
            return self.judged("passed" if code == 0 else "failed", described(code))
        if self.seconds > self.limit:
            self.end()
            return self.judged("timeout", f"over {'the time left' if self.is_cut else 'its limit'} of {self.limit:.0f} s")
        return None

    def end(self) -> int:
        """End the whole group, the command by an interrupt first; return its exit code."""
        for number in (signal.SIGINT, signal.SIGKILL):
            if number == signal.SIGKILL or not self.has_ended():
                with suppress(ProcessLookupError, PermissionError):  # nobody is left; on macOS, none but the dead
                    os.killpg(self.process.pid, number)
            give_up = time.monotonic() + PATIENCE
            while not self.has_ended() and time.monotonic() < give_up:
                time.sleep(0.02)
        self.reader.join(PATIENCE)  # no longer: who left the group may hold the pipe
        if not self.reader.is_alive():
            self.process.stdout.close()
        return self.process.wait() if self.has_ended() else -signal.SIGKILL  # a driver that hangs holds even the dead

    def judged(self, verdict: str, why: str) -> Outcome:
        seconds, last = self.seconds, self.last_words()
        if self.report is not None:
            if verdict in ("timeout", "interrupted") and not OF_TEST.search(last):
                blame(self.report, last, why)
            found = tests_of(self.report)
            if found is None:
                write_report(self.report, self.part.name, f"{why}: {last}", seconds)
                return Outcome("failed" if verdict == "passed" else verdict, seconds, f"{why}, no report: {last}")
            if verdict == "passed":
                return Outcome(verdict if found.passed else "skipped", seconds, str(found))
            said = f"{found}" if found.failed else f"{found}: {last}"
            return Outcome(verdict, seconds, said if found.failed and verdict == "failed" else f"{why}; {said}")
        if verdict != "passed":
            return Outcome(verdict, seconds, f"{why}: {last}")
        if self.part.results is None:
            return Outcome(verdict, seconds, "")
        measured, said = times_of(self.part.results)
        return Outcome(verdict if measured else "failed", seconds, said)

    def last_words(self) -> str:
        """What the log says of the end: the fault that the sanitizer met, the test that pytest was at, an error, the last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip(" =-")]
        faults = [line for line in lines if FAULT.match(line)]
        tests = [line for line in lines if re.match(r"\S+\.py::", line)] if self.part.pytest else []
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        return (faults[:1] or tests[-1:] or errors[-1:] or lines[-1:] or ["nothing was written"])[0][:200]


def described(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


@dataclass(frozen=True)
class Tests:
    """The counts of a report, and what went wrong first, or why the first was skipped."""

    passed: int
    failed: int
    skipped: int
    first: str = ""

    def __str__(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{counts}; {self.first}" if self.first else counts


def tests_of(report: Path) -> Tests | None:
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    bad, skipped = (
        [f"{case.get('name')}: {first_line(child.get('message'))}" for case in cases for child in case if child.tag in tags]
        for tags in (("failure", "error"), ("skipped",))
    )
    passed = sum(all(child.tag not in ("failure", "error", "skipped") for child in case) for case in cases)
    return Tests(passed, len(bad), len(skipped), (bad or ([] if passed else skipped) or [""])[0])


def first_line(text: str | None) -> str:
    return next(iter((text or "").strip().splitlines()), "")[:200]


def blame(report: Path, test: str, message: str) -> None:
    """Make the test that pytest was at when it was interrupted an error; it would leave a nameless one, as if it had passed."""
    with suppress(OSError, ElementTree.ParseError, StopIteration):
        tree, name = ElementTree.parse(report), test.rpartition("::")[2]
        suite = next(tree.getroot().iter("testsuite"))
        cases = list(suite.iter("testcase"))
        case = cases[-1] if cases and cases[-1].get("name") in (None, name) else ElementTree.SubElement(suite, "testcase")
        case.set("name", name)
        ElementTree.SubElement(case, "error", message=message)
        suite.set("errors", str(int(suite.get("errors", "0")) + 1))
        tree.write(report, encoding="utf-8", xml_declaration=True)


def write_report(path: Path, name: str, message: str, seconds: float) -> None:
    """Write what pytest had no time to: a report with one error."""
    suite = ElementTree.Element("testsuite", name="pytest", tests="1", errors="1", failures="0", skipped="0", time=f"{seconds:.1f}")
    case = ElementTree.SubElement(suite, "testcase", classname="make gpu", name=name, time=f"{seconds:.1f}")
    ElementTree.SubElement(case, "error", message=message)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def times_of(folder: Path) -> tuple[bool, str]:
    """Whether anything of this library was measured, and its times over those of the bare products, from sections ``kernels`` (see
    benchmarks/records.py)."""
    sections = [json.loads(path.read_text(encoding="utf-8")).get("kernels", {}) for path in sorted(folder.glob("*.json"))]
    rows = [row for section in sections for row in section.get("rows", []) if row["who"] == "ours"]
    times = [f"{row['group']}, {row['name']}: {row.get('times_floor') or row.get('reason')}" for row in rows]
    measured = any(row.get("times_floor") for row in rows)
    return measured, "times of the bare products: " + ("; ".join(times) or "none")


WRITING = threading.Lock()


def say(text: bytes) -> None:
    with WRITING:
        try:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        except (BrokenPipeError, ValueError):  # nobody listens; the logs have it
            pass


def run(stages: Sequence[Sequence[Part]], minutes: float, out: Path) -> int:
    """Run the parts and print the summary, whatever happens; return the exit code."""
    started = time.monotonic()
    outcomes = {part.name: Outcome("not run", 0.0, f"the {minutes:g} minutes were over") for stage in stages for part in stage}
    with interrupts() as interrupted:
        try:
            for stage in stages:
                run_stage(stage, started + 60 * minutes, out, outcomes.__setitem__, interrupted)
        finally:
            if interrupted.is_set():
                after = {name: o for name, o in outcomes.items() if o.verdict == "not run"}
                outcomes |= dict.fromkeys(after, Outcome("not run", 0.0, "interrupted before"))
            text = summary(outcomes, time.monotonic() - started, out)
            say(b"\n" + text.encode())
            with suppress(OSError):
                (out / "summary.txt").write_text(text, encoding="utf-8")
    return 130 if interrupted.is_set() else int(any(outcome.verdict in BAD for outcome in outcomes.values()))


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Tell by an event that this program was to end, so that nothing is left undone: what runs is ended and the summary printed."""
    event = threading.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup asks for
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: event.set()) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stage(
    stage: Sequence[Part], deadline: float, out: Path, tell: Callable[[str, Outcome], None], interrupted: threading.Event
) -> None:
    """Run some parts at the same time, and tell of each what came of it."""
    running: dict[str, Running] = {}
    try:
        for part in stage:
            left = deadline - time.monotonic()
            if part.why_not is not None:
                tell(part.name, Outcome("skipped", 0.0, part.why_not))
            elif left > 0 and not interrupted.is_set():
                try:
                    running[part.name] = Running(part, left, out, alone=len(stage) == 1)
                except OSError as error:
                    tell(part.name, Outcome("failed", 0.0, str(error)))
        while running and not interrupted.is_set():
            for name, of_part in list(running.items()):
                if (outcome := of_part.outcome()) is not None:
                    del running[name]
                    tell(name, outcome)
            time.sleep(0.05)
    finally:
        for name, of_part in running.items():
            of_part.end()
            tell(name, of_part.judged("interrupted", "interrupted"))


def summary(outcomes: Mapping[str, Outcome], seconds: float, out: Path) -> str:
    rows = [("part", "verdict", "seconds", "reason")]
    rows += [(name, outcome.verdict, f"{outcome.seconds:.1f}", outcome.reason) for name, outcome in outcomes.items()]
    a, b, c = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{name:<{a}}  {verdict:<{b}}  {took:>{c}}  {reason}".rstrip() for name, verdict, took, reason in rows]
    return "\n".join([*lines, f"{seconds:.0f} s; logs and JUnit XML in {out}", ""])


PROBE = """
import torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no GPU here")
p = torch.cuda.get_device_properties(0)
memory = f"{p.total_memory / 2**30:.1f} GiB"
print(f"{p.name}, {p.major}.{p.minor}, {p.multi_processor_count} processors, {memory}, torch {torch.__version__}")
"""


def probe() -> tuple[bool, str]:
    """Whether there is a GPU, and which or why not. Asked in another process: this one must hold no part of it."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return False, "torch did not answer within 120 s"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [described(done.returncode)]
    return done.returncode == 0, said[-1]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python tests/gpu.py", description="Run on a machine with a GPU what there is to find out there; the summary is last."
    )
    p.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="in all; limits of the parts grow along (default 9)")
    p.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="FOLDER", help="logs, JUnit XML (default build/gpu)")
    p.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="FOLDER", help="of the benchmarks")
    p.add_argument("--commit", help="of the code, where there is no git to ask")
    p.add_argument("--parts", nargs="+", metavar="PART", help="only these, in their order (default: all)")
    return p


def main() -> int:
    p = parser()
    options = p.parse_args()
    if not options.minutes > 0:
        p.error(f"--minutes: {options.minutes:g} given, accepted are positive numbers")
    options.out, options.results = options.out.absolute(), options.results.absolute()
    stages = parts(options)
    names = [part.name for stage in stages for part in stage]
    if unknown := [name for name in options.parts or [] if name not in names]:
        p.error(f"--parts: {unknown[0]!r} given, accepted are {', '.join(map(repr, names))}")
    has_gpu, device = probe()
    if not has_gpu:
        p.exit(2, f"{p.prog}: {device}; accepted is a machine with a CUDA GPU\n")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out: {error}")
    say(f"{device}\n".encode())
    chosen = [[part for part in stage if options.parts is None or part.name in options.parts] for stage in stages]
    return run([stage for stage in chosen if stage], options.minutes, options.out)


if __name__ == "__main__":
    sys.exit(main())
