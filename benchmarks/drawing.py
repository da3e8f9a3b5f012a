"""What the pictures of the sections share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

ORANGE, GREY = "#E69F00", "#999999"  # beside the colours of bupo.plots
Pictures = Iterator[tuple[str, Callable[[], Figure]]]  # what the name of a picture ends in, and what draws it


def slug(text: object) -> str:
    """Return ``text`` as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")


def figure_of(title: str, width: float, height: float) -> Figure:
    """Return an empty figure of that many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def panels_of(figure: Figure, names: Iterable[str]) -> dict[str, Axes]:
    """Return a panel for each name, two side by side."""
    names = list(names)
    columns = min(2, len(names))
    names += ["."] * (len(names) % columns)  # the mosaic's word for an empty place
    return figure.subplot_mosaic([names[first : first + columns] for first in range(0, len(names), columns)])


def with_legend(figure: Figure, handles: dict[str, Any]) -> Figure:
    """Return ``figure``, complete with what its colours stand for."""
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def logarithmic(axes: Axes, sizes: Iterable[float]) -> None:
    """Write values in full, and at most seven of the ``sizes``, the least and the greatest among them; all is drawn before."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5, 7) if high < 15 * low else (2, 5)))
    axes.yaxis.set_minor_formatter("{x:,g}" if high < 300 * low else NullFormatter())
    sizes = sorted(sizes)
    axes.xaxis.set_major_locator(FixedLocator(sorted({sizes[0], *sizes[:: -(math.ceil((len(sizes) - 1) / 6) or 1)]})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda size, _: _short(size))


def _short(size: float) -> str:
    if size >= 1024 and size % 1024 == 0:
        return f"{size / 1024:g}Ki"
    return f"{size / 1000:.3g}k" if size >= 10000 else f"{size:g}"


def bars(medians: list[float], rounds: list[list[float]]) -> list[list[float]]:
    """Return how far it is down to the least and up to the greatest of the rounds, as ``errorbar`` has it."""
    ranges = [(median, min(of, default=median), max(of, default=median)) for median, of in zip(medians, rounds, strict=True)]
    return [[max(0, median - least) for median, least, _ in ranges], [max(0, most - median) for median, _, most in ranges]]
