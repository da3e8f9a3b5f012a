"""Behind pytest-benchmark's tables: ours, with errors and memory."""

import pytest
from rich.console import Console

from benchmarks.kernels import print_rows

ROWS = pytest.StashKey[list]()


@pytest.fixture
def measured_rows(request) -> list[dict]:
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash.get(ROWS, []):
        terminalreporter.section("benchmarks.kernels")
        print_rows(rows, Console(width=150))
