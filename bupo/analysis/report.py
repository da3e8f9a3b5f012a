"""The report of an analysis: one HTML file that needs no server and no network."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bupo.analysis.figures import segment_label, statistics_figures
from bupo.analysis.heatmap import Heatmap
from bupo.analysis.statistics import Statistics
from bupo.output import replace_file
from bupo.plots import write_figure

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(statistics: Statistics, heatmaps: list[Heatmap], path: Path, title: str | None = None) -> None:
    """Write the summary, the heat maps of layers × positions and the figures into ``path``, which is whole or not there.

    Numbers of the heat maps have four significant digits. Texts of tokens and prompts are JSON that no markup can end, and the
    page shows them as text only.
    """
    lines, figures = summary_lines(statistics.summary), statistics_figures(statistics).items()
    parts = {
        "title": escape(title or f"Internal policies of {statistics.summary['model']}"),
        "summary": "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in lines),
        "figures": "\n".join(f'<img alt="{name.replace("_", " ")}" src="{_data_address(figure)}">' for name, figure in figures),
        "data": json.dumps(_heatmap_data(heatmaps), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    # One pass fills all places, so that the texts put in are not searched for further ones.
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))
    replace_file(path, page)


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return name and text of every entry of ``summary``."""
    lines = []
    for name, value in summary.items():
        if name == "boundary":
            lines.append(("boundary layer", _boundary(value)))
            lines += [("segments", ", ".join(map(segment_label, value["segments"])))] if value["segments"] else []
        elif isinstance(value, dict):
            lines.append((name, ", ".join(f"{key} {entry}" for key, entry in value.items())))
        else:
            lines.append((name.replace("_", " "), _text(value)))
    return lines


def _boundary(boundary: dict) -> str:
    if boundary["layer"] is None:
        return f"none: {boundary['note']}"
    return f"{boundary['layer']} (in {boundary['confidence']:.0%} of bootstrap resamples)"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _data_address(figure: Figure) -> str:
    """Return the address of ``figure`` as an image of its own: identifiers of several SVGs in one page would be confused."""
    file = BytesIO()
    write_figure(figure, file, "svg")
    return "data:image/svg+xml;base64," + b64encode(file.getvalue()).decode()


def _heatmap_data(heatmaps: list[Heatmap]) -> dict[str, Any]:
    """Return ``tokens``, every text once, and ``responses``, which name tokens by their place among them."""
    places: dict[str, int] = {}

    def place(tokens: list) -> list:
        return [place(token) if isinstance(token, list) else places.setdefault(token, len(places)) for token in tokens]

    responses = [
        {
            "title": heatmap.title,
            "prompt": heatmap.prompt,
            "layers": heatmap.layers,
            "context": place(heatmap.context),
            "targets": place(heatmap.targets),
            "topTokens": place(heatmap.top_tokens),
            "topLogprobs": _numbers(heatmap.top_logprobs),
            "logprob": _numbers(heatmap.logprobs),
            "entropy": _numbers(heatmap.entropy),
            "rank": heatmap.rank.tolist(),
            "kl": _numbers(heatmap.kl),
        }
        for heatmap in heatmaps
    ]
    return {"tokens": list(places), "responses": responses}


def _numbers(values: np.ndarray) -> list:
    """Return nested lists of four significant digits, with None where a number is not finite."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
