"""The ways to show and to write: a progress bar, a file that is whole at any moment, a folder that one process writes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bupo.errors import ConfigError

LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal to draw a bar in


def progress_bar(shown: bool = True) -> Progress:
    """Return a bar with the time left, for a terminal; it shows nothing where output is a file, or without ``shown``.

    Work of some parts each of which takes long is shown by :func:`progress`.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not shown,
        speed_estimate_period=3600,  # steps may take minutes, and two must lie within the period
    )


@contextmanager
def progress(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Give a function that is told how much more of ``total`` is done: a bar with the time left shows it.

    Where output is no terminal, a line on stderr says so at most every :data:`LINE_EVERY` seconds.
    """
    started = said = time.monotonic()
    done = 0.0
    with progress_bar() as bar:
        task = bar.add_task(what, total=total)

        def advance(more: float) -> None:
            nonlocal said, done
            done += more
            bar.update(task, completed=done)
            now = time.monotonic()
            if not bar.console.is_terminal and now - said >= LINE_EVERY and 0 < done < total:
                left = (now - started) * (total - done) / done
                print(f"{what}: {done:,.0f} of {total:,.0f}, {duration(left)} left", file=sys.stderr, flush=True)
                said = now

        yield advance


def duration(seconds: float) -> str:
    """Return a time in the words of a person who waits: two digits of seconds, minutes, hours or days."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{int(seconds < 9.95 * size)}f} {unit}"
    return f"{seconds:.0f} seconds"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place for a file or folder, which takes that of ``path`` once the context ends without an error, and else is gone."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # a folder that a killed process left unfinished
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise
    shutil.rmtree(path, ignore_errors=True)  # a folder cannot be put over another
    os.replace(partial, path)


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, which at any moment is whole: the old file or the new one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def claim(partial: Path, name: str, plan: dict[str, Any], what: str) -> None:
    """Mark ``partial``, the folder of unfinished work called ``what``, with the settings ``plan``, kept in its file ``name``.

    Raises :class:`ConfigError` where the folder is marked with other settings.
    """
    path, plan = partial / name, json.loads(json.dumps(plan))
    if not path.exists():
        partial.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(plan, indent=2) + "\n")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{path} cannot be read, accepted is a new folder") from None
    if changed := [name for name in plan if before.get(name) != plan[name]]:
        raise ConfigError(
            f"{partial} is of an unfinished {what} with another {' and '.join(changed)}, accepted is the same, or a new folder"
        )


class FolderLock:
    """A lock that keeps every other process out of a folder, as a context manager: a file in it that names host and process.

    The operating system lets go of it when the process ends, however it ends. Where the file system knows no locks, a line says so.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key, self.taken = folder / "lock", key, False
        self.file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        return self

    def take(self) -> None:
        """Lock the folder, if that is not done. Raises :class:`ConfigError` when another process holds it."""
        while not self.taken:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("a+", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"{self.key}: {self.path.parent} cannot be written ({error.strerror})") from None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError(
                        f"{self.key}: {self.path.parent} is in use by {holder}, accepted is a folder of its own"
                    ) from None
                print(f"{self.key}: {self.path.parent} cannot be locked ({error.strerror}): nothing keeps another job out of it")
                self.taken = True
                return
            if not self.path.exists() or not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                file.close()  # its last holder has just removed it: the file that is locked is no longer there
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            self.file, self.taken = file, True

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
        self.file, self.taken = None, False
