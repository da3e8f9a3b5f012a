"""The one error that a user sees as a line. It stands apart so that what writes files needs no pydantic."""

from __future__ import annotations


class ConfigError(Exception):
    """A line that names the key, what was given and what is accepted."""

    speaker: int | None = None  # the rank that prints it, where all ranks raise it
