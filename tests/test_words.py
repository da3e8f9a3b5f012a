"""The words of CONTRIBUTING.md, as far as they can be told from a syntax tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    ROOT / "setup.py",
    *sorted(path for folder in ("bupo_kernels", "bupo", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
]
FRAGMENT = re.compile(r"(of|from|with|by|in|to|at|for|as|what|which|how|all|those|both|whether|where)\b", re.IGNORECASE)


def documented(tree):
    """Every function and class with a docstring, but for properties, which may say "Whether …"."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
            decorators = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])}
            if not decorators & {"property", "functools.cached_property", "cached_property"}:
                yield node, text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_begins_with_its_verb_or_noun(path):
    fragments = [f"{node.name}: {text}" for node, text in documented(ast.parse(path.read_text())) if FRAGMENT.match(text)]
    assert fragments == []
