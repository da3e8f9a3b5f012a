"""How anything here is shown and written: a progress bar, a file that is whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(shown: bool = True) -> Progress:
    """A bar with the time left, on a terminal; nothing where output is a file or not ``shown``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not shown,
        speed_estimate_period=3600,  # steps may take minutes, and two must lie within the period
    )


def replace_file(path: Path, text: str) -> None:
    """``path`` with the content ``text``; at any moment it is whole, the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
