"""The decision whether ``backend="auto"`` may take a GPU backend on the card at hand: made once a process, and then kept.

It must not change after the first call that saw it: a traced graph has the shape of what one backend leaves for its backward. So
where nothing may run (while torch traces, while a CUDA graph is captured, in a forked child), what no record vouches for is not
taken, then or later in that process. ``BUPO_SELF_CHECK`` is ``1`` (check what no record vouches for), ``0`` (never check) or
``again`` (check whatever the records say).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bupo_kernels.backends.base import is_captured
from bupo_kernels.selfcheck import records
from bupo_kernels.selfcheck.card import Card
from bupo_kernels.selfcheck.records import Record, Verdict

CHECK = (sys.executable, "-m", "bupo_kernels.selfcheck")
CHECK_SECONDS = 120  # that a check may take; about 15 are expected
WAIT_SECONDS = 150  # for another process that is at it
WISHES = ("0", "1", "again")

log = logging.getLogger("bupo_kernels")


@dataclass(frozen=True)
class Variant:
    """The kernels that are checked together: those of a backend for operands of one dtype, with a softcap or without. Triton's
    warp-specialised ones are a variant of their own, in whose place there are others where it fails."""

    backend: str  # "triton", "native" or "torch"
    dtype: str  # "bfloat16"
    softcap: bool = False
    specialised: bool = False

    @staticmethod
    def of(backend: str, dtype: torch.dtype, softcap: bool = False) -> Variant:
        """Return the variant of a ``dtype`` of torch's."""
        return Variant(backend, str(dtype).removeprefix("torch."), softcap)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def name(self) -> str:
        return f"{self.backend} {self.dtype}{' softcap' * self.softcap}{' warp-specialised' * self.specialised}"

    @staticmethod
    def named(name: str) -> Variant:
        """Return the variant of a ``name``. Raise ``ValueError`` where it is none."""
        backend, dtype, *rest = name.split(" ")
        known = backend in ("triton", "native", "torch") and hasattr(torch, dtype)
        if not known or rest not in ([], ["softcap"], ["warp-specialised"]):
            accepted = "a backend, a dtype and perhaps softcap or warp-specialised"
            raise ValueError(f"variant: {name!r} given, accepted are {accepted}: 'triton bfloat16'")
        return Variant(backend, dtype, rest == ["softcap"], rest == ["warp-specialised"])


_lock = threading.RLock()
_decided: dict[tuple[str, str], Verdict] = {}  # (key of a card, name of a variant)
_tuned: dict[str, Record] = {}  # by key of a card: what `bupo tune` had found when this process first asked
_forked = False
_only_records = False


def _note_fork() -> None:
    global _forked, _lock
    _forked, _lock = True, threading.RLock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def only_records() -> Iterator[None]:
    """Within it nothing is checked and nothing decided: to say what would run costs nothing."""
    global _only_records
    with _lock:
        before, _only_records = _only_records, True
        try:
            yield
        finally:
            _only_records = before


def only_asked() -> bool:
    """Tell whether nothing is decided now, since the caller is within :func:`only_records`."""
    return _only_records


def why_not(variant: Variant, device: torch.device, widths: str = "") -> str | None:
    """Return the reason ``variant`` is not taken on ``device`` unasked, or None where it has proven itself there. ``widths`` names
    those that are measured together."""
    verdict = decide(variant, device)
    return tuned(device).slower.get(slower_key(variant, widths)) if verdict.passed else verdict.reason


def slower_key(variant: Variant, widths: str) -> str:
    """Return the key of :class:`Record`'s ``slower``."""
    return f"{variant.name}, {widths}"


def decide(variant: Variant, device: torch.device) -> Verdict:
    """Return the verdict that holds for ``variant`` on ``device`` in this process, checking it now where that has not been done.

    Raise ``ValueError`` where ``BUPO_SELF_CHECK`` is something else than it accepts.
    """
    card = Card.of(device)
    place = card.key, variant.name
    with _lock:
        if _only_records and place not in _decided:
            return records.read(card).verdicts.get(variant.name) or _undecided("not yet checked on this card")
        if place not in _decided:
            _decided[place] = _find_out(variant, device, card)
        return _decided[place]


def _undecided(reason: str) -> Verdict:
    return Verdict(False, f"{reason}; `bupo check` does it, or a first call outside of that", None, 0.0, time.time())


def _find_out(variant: Variant, device: torch.device, card: Card) -> Verdict:
    wish = os.environ.get("BUPO_SELF_CHECK", "1")
    if wish not in WISHES:
        raise ValueError(f"BUPO_SELF_CHECK: {wish!r} given, accepted are {', '.join(WISHES)}")
    reason = _why_undecided(device)
    if (wish != "again" or reason) and (known := records.read(card).verdicts.get(variant.name)):
        return known
    if wish == "0":
        reason = "not checked on this card (BUPO_SELF_CHECK=0)"
    if reason:
        return _undecided(reason)
    with records.alone(card, WAIT_SECONDS):
        # Another rank may have found out while this one waited.
        if wish != "again" and (known := records.read(card).verdicts.get(variant.name)):
            return known
        try:
            return checked(variant, device, card)
        except torch.OutOfMemoryError:
            return _undecided("not checked, there being no memory left for it")


def checked(variant: Variant, device: torch.device, card: Card) -> Verdict:
    """Check ``variant`` now, whatever is known, write the verdict on record and return it. Raise :class:`torch.OutOfMemoryError`
    where there is too little memory to find one."""
    verdict = _in_a_process(variant, device, card)
    records.add(card, verdicts={variant.name: verdict})
    if verdict.passed:
        worst = verdict.worst or 0.0
        log.info("%s: right on %s, worst error %.2f of its bound (%.0f s)", variant.name, card.name, worst, verdict.seconds)
    return verdict


def _why_undecided(device: torch.device) -> str | None:
    """Return why nothing can be found out now, or None."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return "not checked, being met first while torch was tracing"
    if is_captured(device):
        return "not checked, being met first while a CUDA graph was captured"
    return "not checked, being met first in a forked process" if _forked else None


def _in_a_process(variant: Variant, device: torch.device, card: Card) -> Verdict:
    """Return what a process of its own finds, which may die of a kernel that faults; where that gets no context on the device, what
    this one finds."""
    started = time.perf_counter()

    def failed(reason: str) -> Verdict:
        return Verdict(False, reason, None, time.perf_counter() - started, time.time())

    answer: dict[str, Any]
    try:
        found = _run([*CHECK, "--device", str(device), "--variant", variant.name, "--expect", card.key], CHECK_SECONDS)
        if found is None:
            return failed(f"the check did not end within {CHECK_SECONDS} s")
        code, output, errors = found
        answer = json.loads(output.strip().splitlines()[-1])
        if "refused" not in answer:
            return Verdict.from_json(answer)
    except OSError as error:  # a program that holds Python within itself has no interpreter to start
        answer = {"refused": str(error)}
    except (ValueError, IndexError, TypeError):
        last = (errors.strip().splitlines() or ["without a word"])[-1][:300]
        died = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return failed(f"the process of the check died of {died}: {last}")
    log.info("%s: checked in this process, since another got no context: %s", variant.name, answer["refused"])
    from bupo_kernels.selfcheck.problems import check  # calls the ops, which come here

    return check(variant, device)


def _run(command: list[str], seconds: float) -> tuple[int, str, str] | None:
    """Return exit code, output and errors of a command; None where it did not end in time, and was killed with its children."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "BUPO_SELF_CHECK": "0"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:  # a time-out, Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None
    return process.returncode, output, errors


def tuned(device: torch.device) -> Record:
    """Return what ``bupo tune`` found for ``device``: what was on record when this process first asked."""
    card = Card.of(device)
    with _lock:
        if card.key not in _tuned:
            _tuned[card.key] = records.read(card)
        return _tuned[card.key]


def decisions(device: torch.device) -> dict[str, Any]:
    """Return what this process has decided about ``device``, as JSON: what a run needs to be repeated bit for bit."""
    card = Card.of(device)
    with _lock:
        passed = {name: verdict.passed for (key, name), verdict in sorted(_decided.items()) if key == card.key}
        here = tuned(device)
        return {"card": card.key, "name": card.name, "passed": passed, "tiles": dict(here.tiles), "slower": dict(here.slower)}


def pin(device: torch.device, decided: Mapping[str, Any]) -> str | None:
    """Decide as another process has ``decided``, and return None; or the reason why that cannot be, having changed nothing."""
    card, there = Card.of(device), Record(tiles=dict(decided["tiles"]), slower=dict(decided["slower"]))
    if decided["card"] != card.key:
        return f"kernels were chosen on {decided['name']}, and this is {card.name}, or has other software"
    with _lock:
        for name, passed in decided["passed"].items():
            here = _decided.get((card.key, name))
            if here is not None and here.passed != passed:
                return f"{name} was {'' if passed else 'not '}taken there, and here it is {'' if here.passed else 'not '}taken"
        if card.key in _tuned and (_tuned[card.key].tiles, _tuned[card.key].slower) != (there.tiles, there.slower):
            return "this process has begun with other results of `bupo tune`"
        for name, passed in decided["passed"].items():
            reason = "" if passed else "the run was begun without it"
            _decided.setdefault((card.key, name), Verdict(passed, reason, None, 0.0, time.time()))
        _tuned[card.key] = there
    return None
