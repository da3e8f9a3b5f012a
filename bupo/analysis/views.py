"""One report of several views: readings of one model, or of two on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.analysis.collect import Look, collect, summary_of
from bupo.analysis.heatmap import Heatmap, named_maps
from bupo.analysis.report import Report
from bupo.analysis.statistics import Statistics, Sums, estimate, estimate_difference
from bupo.analysis.texts import TEACHER_FORCED, text_samples, tracked_tokens
from bupo.analysis.translators import Translators
from bupo.data import encode_texts
from bupo.rollout import Sample


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    track: Sequence[str] = (),
    readings: Sequence[str] = ("raw", "normed"),
    points: Sequence[str] = ("layer",),
    temperature: float = 1.0,
    template: str = "raw",
    translators: Translators | None = None,
) -> Report:
    """Return a :class:`Report` on what every layer of ``model`` makes of ``texts``, each read as it stands.

    The model reads the texts token by token and generates nothing; of a long one the last 64 positions are looked at. What the last
    position is asked for is the model's own most likely next token. In a notebook the report shows itself.

    Args:
        model: as in :func:`bupo.analysis.analyze`.
        texts: one or several, each of at least one token.
        track: words whose rank is followed through the layers; both the token of a word behind a space and that of one at the
            beginning of a text, where they are single tokens.
        readings: ``"raw"`` (``softmax(H Wᵀ)``, as BuPO reads layers), ``"normed"`` (behind the final norm), or both.
        points: as in :func:`bupo.analysis.analyze`.
        temperature: that of all policies.
        template: as ``data.template`` of ``bupo train``: ``"raw"`` is the text itself, ``"chat"`` a user's message in the
            tokenizer's chat template.
        translators: of :func:`fit_translators`; adds the reading ``"tuned"``, behind them and the final norm.

    Raises:
        ConfigError: a text has no tokens, or a word of ``track`` is no single token; the message names them.
        UnsupportedModel, ValueError, TypeError: as :func:`bupo.analysis.analyze`.
    """
    samples = text_samples(model, encode_texts(texts, template, tokenizer, "texts", model.get_input_embeddings().num_embeddings))
    look = Look(tuple(readings), tuple(points), temperature, track=tuple(tracked_tokens(track, tokenizer)))
    if translators is not None:
        look = replace(look, readings=(*look.readings, "tuned"), translate=translators)
    return report_of([model], tokenizer, samples, look, examples=len(samples), texts=texts)


def report_of(
    models: Iterable[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    look: Look,
    *,
    examples: int = 4,
    max_tokens: int = 2048,
    partial: Path | None = None,
    seed: int = 0,
    texts: Sequence[str] = (),
    names: Sequence[str] = ("",),
) -> Report:
    """Return the :class:`Report` of one model or two, each taken from ``models`` when the one before is done with.

    Args:
        examples: how many samples the page shows.
        texts: what ``samples`` were made of, by :func:`bupo.analysis.texts.text_samples`; empty where they are responses.
        names: those of the models in the report, with two of them.
        max_tokens, partial, seed: as in :func:`bupo.analysis.analyze`.
    """
    statistics: dict[str, Statistics] = {}
    maps: list[Heatmap] = []
    sums: dict[str, list[Sums]] = {}
    for name, model in zip(names, models, strict=False):
        place = partial if partial is None or name == names[0] else partial / "against"
        found = collect(model, samples, look, max_tokens=max_tokens, shown=examples, partial=place)
        for reading in look.readings:
            view = f"{name} {reading}".strip()
            summary = summary_of(model, look, reading) | {"read": "texts" if texts else "responses"}
            statistics[view] = estimate(found.sums[reading], summary, seed)
            sums.setdefault(reading, []).append(found.sums[reading])
            named = named_maps(found.maps[reading], tokenizer, samples, view, look.track, "text" if texts else "response")
            maps += [_of_text(heatmap, texts[i]) for i, heatmap in enumerate(named)] if texts else named
        del model  # before the next one is read
    differences = {}
    if len(names) > 1:
        for reading, (first, second) in sums.items():
            views = [statistics[f"{name} {reading}"].summary for name in names]
            named_both: dict[str, Any] = {"model": f"{names[1]} − {names[0]}"}
            differences[reading] = estimate_difference(first, second, views[0] | named_both, seed)
    title = f"{names[0]} and {names[1]}, layer by layer" if len(names) > 1 else None
    return Report(statistics, maps, differences, title, TEACHER_FORCED if texts else "")


def _of_text(heatmap: Heatmap, text: str) -> Heatmap:
    """Return the map with the text that it is of as its prompt and in its title."""
    line = " ".join(text.split())
    return replace(heatmap, title=f"{heatmap.title}: {line[:60]}{'…' if len(line) > 60 else ''}", prompt=text)
