"""Sphinx makes the pages of this folder, and an API reference of the docstrings: ``make docs``."""

import builtins
import dataclasses
import inspect
import re
import sys
from importlib.metadata import version as version_of
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

EXAMPLES = Path(__file__).parent.parent / "examples" / "api"

project = html_title = "bupo_kernels"
version = release = version_of("bupo-kernels")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
default_role = "literal"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Returns"]  # as it is written: napoleon takes what stands before a colon for a type
smartquotes = False
python_maximum_signature_line_length = 88


def fields_of(kind: type) -> dict[str, str]:
    """Return what a class says of each of its fields: a configuration in defaults and descriptions, others in comments."""
    if issubclass(kind, BaseModel):
        return {name: described(field) for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        return dict(re.findall(r"^    (\w+): [^#\n]*(?:# (?!noqa)(.*))?$", inspect.getsource(kind), re.MULTILINE))
    return {}


def described(field: FieldInfo) -> str:
    choices = " or ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
    default = "" if field.is_required() or isinstance(field.default, BaseModel) else f"``{field.default!r}``. "
    return default + (field.description or choices)


def add_fields(app, what, name, thing, options, lines):
    """Add its fields to the description of a class."""
    if what == "class" and (fields := fields_of(thing)):
        items = [f"* ``{field}``{': ' if said else ''}{said}" for field, said in fields.items()]
        lines += ["", *(item.replace("|", r"\|") for item in items)]


def add_example(app, what, name, thing, options, lines):
    """Add to the description of a function or class the example that bears its name."""
    example = EXAMPLES / f"{name.rpartition('.')[2]}.py"
    if what in ("function", "class") and example.exists():
        lines += ["", ".. rubric:: Example", "", f".. literalinclude:: /../examples/api/{example.name}", "   :language: python"]


def find_elsewhere(app, env, node, text):
    """Resolve a reference to what another module documents; what exists without a place in the reference stays plain text."""
    if node.get("refdomain") != "py":
        return None
    node["refspecific"] = True  # any module's
    found = env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, text)
    return found or (text if all(map(exists, node["reftarget"].split(", "))) else None)


def exists(name: str) -> bool:
    """Return whether ``name`` is a builtin, a module, or a name in one of ours."""
    first = name.partition(".")[0]
    ours = [vars(module) for key, module in sys.modules.items() if key.partition(".")[0] in ("bupo", "bupo_kernels")]
    for names in (vars(builtins), sys.modules, *ours):
        try:
            attrgetter(name)(type("Names", (), {first: names[first]}))
        except (KeyError, AttributeError):
            continue
        return True
    return False


def setup(app):
    app.connect("autodoc-process-docstring", add_fields, priority=900)
    app.connect("autodoc-process-docstring", add_example, priority=901)
    app.connect("missing-reference", find_elsewhere)
