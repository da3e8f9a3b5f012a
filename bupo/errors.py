"""The one error that a user is to see as a line; apart, so that what writes files needs no pydantic."""

from __future__ import annotations


class ConfigError(Exception):
    """One line that names the key, what was given and what is accepted."""

    speaker: int | None = None  # the rank that prints it, where all ranks know of it
