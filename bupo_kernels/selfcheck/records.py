"""Records on disk: what was found out about a card, one JSON file each, whole or not there at all.

They lie in ``$BUPO_CACHE``, or in ``bupo_kernels`` of the user's cache (``$XDG_CACHE_HOME``, ``~/.cache``); where that cannot be
written, in a folder of the user's own in the temporary directory; and else in the memory of the process.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout  # torch requires it

from bupo_kernels.selfcheck.card import Card

VERSION = 2  # of the format: a file of another is not read
FAILURE_HOLDS = 86_400  # seconds that a failure is believed: what it came from may pass, and else every process would pay for it

log = logging.getLogger("bupo_kernels")


@dataclass(frozen=True)
class Verdict:
    """The outcome of the check of one variant on one card."""

    passed: bool
    reason: str  # why not; "" where it passed
    worst: float | None  # the largest error there was, as a share of its bound; None where none was measured
    seconds: float
    time: float  # when, in seconds since 1970

    @property
    def holds(self) -> bool:
        """Whether it is still believed."""
        return self.passed or 0 <= time.time() - self.time < FAILURE_HOLDS

    @staticmethod
    def from_json(values: Any) -> Verdict:
        """Return the verdict of a JSON object. Raise ``ValueError`` where it is none."""
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(Verdict)}:
            raise ValueError(f"verdict: {values!r} given, accepted is an object of {', '.join(f.name for f in fields(Verdict))}")
        numbers = [values["seconds"], values["time"], *([] if values["worst"] is None else [values["worst"]])]
        sound = isinstance(values["passed"], bool) and isinstance(values["reason"], str)
        if not sound or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
            raise ValueError(f"verdict: {values!r} given, accepted are a bool, a string and numbers")
        return Verdict(**values)


@dataclass(frozen=True)
class Record:
    """The facts that were found out about a card."""

    verdicts: Mapping[str, Verdict] = field(default_factory=dict)  # by the name of the variant
    # These three are found by `bupo tune`: tiles as triton_.config reads them, and of what is right but slow, what is faster.
    tiles: Mapping[str, Any] = field(default_factory=dict)  # by kernel, dtype, kind of operands and widths
    slower: Mapping[str, str] = field(default_factory=dict)  # by variant and widths
    rates: Mapping[str, float] = field(default_factory=dict)  # FLOP/s of the tile that is taken, by the keys of ``tiles``

    def updated(self, other: Record) -> Record:
        """Return the record with all that the ``other`` has put over it."""
        return Record(*({**getattr(self, f.name), **getattr(other, f.name)} for f in fields(Record)))


_in_memory: dict[str, Record] = {}


def folder() -> Path | None:
    """Return the folder of the records, made if need be; None where none can be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for place in filter(None, (os.environ.get("BUPO_CACHE"), os.path.join(home, "bupo_kernels"))):
        path = Path(place)
        with suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            if os.access(path, os.W_OK | os.X_OK):
                return path
    return _own_temporary_folder()


def _own_temporary_folder() -> Path | None:
    """Return a folder in the temporary directory that nobody else can have made or can write; None where there cannot be one."""
    if not hasattr(os, "getuid"):
        return None
    path = Path(tempfile.gettempdir()) / f"bupo_kernels-{os.getuid()}"
    with suppress(OSError):
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return path
    return None


def read(card: Card) -> Record:
    """Return what is on record about ``card``; nothing for a file that is not whole, is another card's or is not this format's."""
    place, remembered = folder(), _in_memory.get(card.key, Record())
    if place is None:
        return remembered
    try:
        found = json.loads((place / f"{card.key}.json").read_text(encoding="utf-8"))
        if found["version"] != VERSION or found["card"] != asdict(card):
            return remembered
        verdicts = {str(name): Verdict.from_json(values) for name, values in found["verdicts"].items()}
        believed = {name: verdict for name, verdict in verdicts.items() if verdict.holds}
        slower = {str(name): str(reason) for name, reason in found["slower"].items()}
        rates = {str(name): float(rate) for name, rate in found["rates"].items() if rate > 0}
        return Record(believed, dict(found["tiles"]), slower, rates).updated(remembered)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return remembered


def add(card: Card, **found: Mapping[str, Any]) -> Path | None:
    """Add what was ``found``, by the names of the fields of :class:`Record`, and return as :func:`write` does."""
    return write(card, read(card).updated(Record(**found)))


def write(card: Card, record: Record) -> Path | None:
    """Put the ``record`` of ``card`` in the place of the one there is, and return its file; None where it stays in memory. A reader
    sees the old file or the new."""
    place = folder()
    if place is not None:
        whole = {
            "version": VERSION,
            "card": asdict(card),
            "verdicts": {name: asdict(verdict) for name, verdict in record.verdicts.items()},
            "tiles": dict(record.tiles),
            "slower": dict(record.slower),
            "rates": dict(record.rates),
        }
        with suppress(OSError):
            return _replace(place / f"{card.key}.json", json.dumps(whole, indent=1))
    _in_memory[card.key] = record
    return None


def _replace(path: Path, text: str) -> Path:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem[:8]}-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return path


@contextmanager
def alone(card: Card, seconds: float) -> Iterator[bool]:
    """Be the only process of the user that finds out about ``card``, and yield True. After so many seconds, or where locks are not
    to be had, go on beside the others, and yield False. The lock of a process that died is free."""
    place = folder()
    lock = None if place is None else FileLock(place / f"{card.key}.lock")
    held = False
    if lock is not None:
        try:
            lock.acquire(timeout=seconds)
            held = True
        except (Timeout, OSError, NotImplementedError):
            log.info("another process has been checking %s for %.0f s; this one goes on by itself", card.name, seconds)
    try:
        yield held
    finally:
        if lock is not None and held:
            lock.release()
