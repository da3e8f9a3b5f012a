"""The report of an analysis: one HTML file that needs no server and no network, and the same in a notebook."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bupo.analysis.figures import difference_figure, model_name, save_figures, segment_label, sources, statistics_figures
from bupo.analysis.heatmap import Heatmap
from bupo.analysis.statistics import Statistics, require_pandas, write_statistics
from bupo.output import replace_file
from bupo.plots import svg_of

TEMPLATE = Path(__file__).with_name("report.html")

# What each figure shows, in a line below it. Those of the second group show hidden states, which no reading changes.
CAPTIONS = {
    "entropy_flow": "How undecided each layer's policy is. The dotted line is that of a policy that knows nothing.",
    "delta_entropy": "Above 0 a module widens the policy, below it narrows it.",
    "divergence_to_final": "How far each layer's policy is from what the model says in the end, both ways.",
    "layer_divergence": "Which layers say the same as which others.",
    "residual_norm": "How large the residual stream and what is added to it are. To a raw policy it is an inverse temperature.",
    "residual_cosine": "Whether a module adds in the direction of the stream (1), across it (0), or against it (−1).",
    "layer_cosine": "Where the residual stream turns.",
    "difference": "Above 0 the second model has more of it. Intervals are paired: both models read the same tokens.",
}
OF_POLICIES = ("entropy_flow", "delta_entropy", "divergence_to_final", "layer_divergence")


@dataclass(frozen=True)
class Report:
    """An analysis, to look at and to keep; in a notebook it is shown as its HTML page.

    ``statistics`` and ``differences`` are by name of the view: ``"raw"`` and ``"normed"``, where there are two models with the
    model's before it.
    """

    statistics: Mapping[str, Statistics]  # at least one; side by side in the page
    heatmaps: Sequence[Heatmap] = ()  # those of one text are side by side; ``reading`` is the name of their view
    differences: Mapping[str, Statistics] = field(default_factory=dict)  # the second model minus the first
    title: str | None = None
    note: str = ""  # on how the texts were read

    def to_dataframe(self) -> Any:
        """Return :meth:`Statistics.to_dataframe` of all views below one another, with the name of the view as first column.

        Raises ``ImportError`` where pandas is not installed.
        """
        frames = {**self.statistics, **{f"difference, {name}": found for name, found in self.differences.items()}}
        tables = {name: found.to_dataframe() for name, found in frames.items()}
        return require_pandas().concat(tables, names=["view"]).reset_index(level="view").reset_index(drop=True)

    def html(self) -> str:
        """Return the whole page.

        Numbers of the heat maps have four significant digits. Texts of tokens and prompts are JSON that no markup can end, and the
        page shows them as text only.
        """
        (first, *_) = self.statistics.values()
        parts = {
            "title": escape(self.title or self._default_title(first.summary)),
            "facts": "".join(f"<li>{escape(fact)}</li>" for fact in facts(first.summary)),
            "summary": "\n".join(self._summaries()),
            "sizes": escape(" ".join(self._size_notes())),
            "figures": "\n".join(self._figure_rows()),
            "data": json.dumps(_heatmap_data(self.heatmaps_by_text(), self.note), separators=(",", ":"), allow_nan=False).replace(
                "<", "\\u003c"
            ),
        }
        # One pass fills all places, so that the texts put in are not searched for further ones.
        return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))

    def heatmaps_by_text(self) -> list[list[Heatmap]]:
        """Return the heat maps of each text, one for every view."""
        groups: dict[tuple, list[Heatmap]] = {}
        for heatmap in self.heatmaps:
            groups.setdefault((heatmap.title, *heatmap.context, *heatmap.targets, *heatmap.layers), []).append(heatmap)
        return list(groups.values())

    def _repr_html_(self) -> str:
        page = escape(self.html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 55rem; border: 0" title="analysis"></iframe>'

    def write(self, folder: Path, *, pictures: bool = True) -> None:
        """Write ``report.html`` and, of each view, statistics and, with ``pictures``, figures into ``folder``.

        One view's files are in ``folder`` itself, those of several in a folder of the view's name each. Every file is whole or not
        there. Raises :class:`bupo.errors.ConfigError` where pyarrow is not installed.
        """
        for name, statistics in self.statistics.items():
            place = folder if len(self.statistics) == 1 else folder / name
            write_statistics(statistics, place)
            if pictures:
                save_figures(self._figures[name], self._svgs[name], place)
        for name, statistics in self.differences.items():
            write_statistics(statistics, folder / f"difference, {name}")
        replace_file(folder / "report.html", self.html())

    @cached_property
    def _figures(self) -> dict[str, dict[str, Any]]:
        return {name: statistics_figures(statistics) for name, statistics in self.statistics.items()}

    @cached_property
    def _svgs(self) -> dict[str, dict[str, bytes]]:
        return {name: {key: svg_of(figure) for key, figure in figures.items()} for name, figures in self._figures.items()}

    def _figure_rows(self) -> list[str]:
        """Return rows of figures: each that shows policies for all views side by side, the others once for each model."""
        rows = []
        for name, statistics in self.differences.items():
            if (figure := difference_figure(statistics)) is not None:
                rows.append(_row([_image("difference", name, svg_of(figure), many=True)]))
        of_view = list(self._svgs.items())

        def images(name: str) -> list[str]:
            return [_image(name, view, svgs[name], many=len(of_view) > 1) for view, svgs in of_view if name in svgs]

        # Of several views the same figure of each is a row; of one all are.
        sets = [(name,) for name in OF_POLICIES] if len(of_view) > 1 else [OF_POLICIES]
        rows += [_row(row) for names in sets if (row := [image for name in names for image in images(name)])]
        once: dict[str, str] = {}
        for name, statistics in self.statistics.items():
            once.setdefault(statistics.summary["model"], name)
        for view in once.values():
            others = [key for key in self._svgs[view] if key not in OF_POLICIES]
            rows += [_row([_image(key, view, self._svgs[view][key], many=len(once) > 1) for key in others])] if others else []
        return rows

    def _default_title(self, summary: dict[str, Any]) -> str:
        if summary.get("read") == "texts":
            return f"What every layer of {model_name(summary)} would say"
        return f"Internal policies of {model_name(summary)}"

    def _size_notes(self) -> list[str]:
        """Return :func:`size_note` of each model that is read raw, with its name where there are two."""
        notes = []
        for name, raw in self.statistics.items():
            normed = self.statistics.get(f"{name.removesuffix('raw')}normed") if name.endswith("raw") else None
            if note := size_note(raw, normed):
                notes.append(f"{name.removesuffix(' raw')}: {note}" if self.differences else note)
        return notes

    def _summaries(self) -> list[str]:
        parts = []
        for name, statistics in self.statistics.items():
            heading = f"<h3>{escape(name)}</h3>" if len(self.statistics) > 1 else ""
            lines = "\n".join(
                f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>" for key, text in summary_lines(statistics.summary)
            )
            parts.append(f'{heading}<dl class="summary">\n{lines}\n</dl>')
        return parts


def facts(summary: Mapping[str, Any]) -> list[str]:
    """Return the few things that a reader of the page asks first, a short text each."""
    found = [
        f"{summary['layers']} layers",
        f"{summary['vocab']:,} tokens in the vocabulary",
        f"{summary['tokens']:,} positions of {sources(summary)}",
        f"perplexity {summary['perplexity']:.3g}",
    ]
    if (boundary := summary["boundary"])["layer"] is not None:
        found.append(f"boundary layer {_boundary(boundary)}")
    return found


def size_note(raw: Statistics, normed: Statistics | None = None) -> str:
    """Return what the size of the residual stream has to do with the ``raw`` policies, in words and numbers.

    With the ``normed`` reading of the same model beside it, it also says how much of the picture that size is. "" where ``raw`` is
    no raw reading of the layers.
    """
    curves = raw.curves
    if raw.summary["final_norm"] or not {("layer", "rms"), ("layer", "entropy")} <= curves.keys():
        return ""
    size, entropy = (curves["layer", name].mean for name in ("rms", "entropy"))
    largest = int(size.argmax())
    words = (
        "Raw policies are softmax(H Wᵀ), without the final norm: the size of H is an inverse temperature. Here rms(H) goes from "
        f"{size[0]:.3g} at the embedding to {size[largest]:.3g} at layer {largest}."
    )
    if normed is None or ("layer", "entropy") not in normed.curves:
        return f"{words} How much of the picture that is, --norm both shows."
    own, other = entropy[1:].mean(), normed.curves["layer", "entropy"].mean[1:].mean()
    words += f" The mean entropy of layers 1 to {len(size) - 1} is {own:.3g} nats raw and {other:.3g} behind the final norm, "
    if own < other / 2:
        return words + "which takes the size out: the raw picture shows mostly rms(H), and little of what the layers say."
    return words + "which takes the size out."


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


def _row(images: list[str]) -> str:
    return f'<div class="figures">{"".join(images)}</div>'


def _image(name: str, view: str, svg: bytes, *, many: bool) -> str:
    """Return a figure as an image of its own: identifiers of several SVGs in one page would be confused."""
    address = "data:image/svg+xml;base64," + b64encode(svg).decode()
    before = f"<b>{escape(view)}</b> " if many else ""
    return f'<figure><img alt="{name.replace("_", " ")}" src="{address}"><figcaption>{before}{CAPTIONS[name]}</figcaption></figure>'


def _heatmap_data(texts: Sequence[Sequence[Heatmap]], note: str) -> dict[str, Any]:
    """Return ``tokens``, every text once, and ``responses``, which name tokens by their place among them.

    ``texts`` has the views of each response.
    """
    places: dict[str, int] = {}

    def place(tokens: list) -> list:
        return [place(token) if isinstance(token, list) else places.setdefault(token, len(places)) for token in tokens]

    responses = []
    for first, *others in texts:
        responses.append(
            {
                "title": first.title,
                "prompt": first.prompt,
                "context": place(first.context),
                "targets": place(first.targets),
                "tracked": place(list(first.tracked)),
                "views": [
                    {
                        "name": view.reading,
                        "layers": view.layers,
                        "topTokens": place(view.top_tokens),
                        "topLogprobs": _numbers(view.top_logprobs),
                        "logprob": _numbers(view.logprobs),
                        "entropy": _numbers(view.entropy),
                        "rank": view.rank.tolist(),
                        "kl": _numbers(view.kl),
                        "trackedRank": [ranks.tolist() for ranks in view.tracked.values()],
                    }
                    for view in (first, *others)
                ],
            }
        )
    return {"tokens": list(places), "responses": responses, "note": note}


def _numbers(values: np.ndarray) -> list:
    """Return nested lists of four significant digits, with None where a number is not finite."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
