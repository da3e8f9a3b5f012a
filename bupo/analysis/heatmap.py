"""The logit lens as a table of tokens: what every layer would say at every position of a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.analysis.collect import READINGS, Look, Values, collect
from bupo.analysis.statistics import require_pandas
from bupo.rollout import Sample

POSITIONS, TOP_K = 64, 10  # of a response, and of a cell, that are shown


@dataclass(frozen=True)
class Heatmap:
    """A map of R layers × n positions of one response."""

    title: str
    prompt: str
    context: list[str]  # [n] the token read at each position
    targets: list[str]  # [n] the token that follows, whose rank and log-prob are shown
    layers: list[str]  # [R] bottom up: "0" (the embedding), "1", …, "L" (the raw residual), "π" (the final policy)
    top_tokens: list[list[list[str]]]  # [R][n][k] most probable first
    top_logprobs: np.ndarray  # [R, n, k]
    logprobs: np.ndarray  # [R, n] of the target
    entropy: np.ndarray  # [R, n] nats
    rank: np.ndarray  # [R, n] int, of the target: how many tokens are more probable
    kl: np.ndarray  # [R, n] KL(π^l ‖ π), nats
    reading: str = "raw"  # or "normed", behind the final norm; with a model's name before it where there are two
    tracked: Mapping[str, np.ndarray] = field(default_factory=dict)  # [R, n] ranks of tokens that are tracked, by their text

    def to_dataframe(self) -> Any:
        """Return a pandas ``DataFrame`` with a row for each layer and position.

        Its columns are ``reading``, ``layer`` (text, as in ``layers``), ``position`` (from 1), ``context``, ``target``,
        ``top_token``, ``top_logprob``, ``logprob``, ``entropy``, ``rank``, ``kl`` and ``rank of …`` for each tracked token. Raises
        ``ImportError`` where pandas is not installed.
        """
        rows, positions = self.rank.shape
        table = {
            "reading": [self.reading] * rows * positions,
            "layer": np.repeat(self.layers, positions),
            "position": np.tile(np.arange(1, positions + 1), rows),
            "context": self.context * rows,
            "target": self.targets * rows,
            "top_token": [cell[0] for row in self.top_tokens for cell in row],
            "top_logprob": self.top_logprobs[:, :, 0].ravel(),
        }
        table |= {name: getattr(self, name).ravel() for name in ("logprobs", "entropy", "rank", "kl")}
        table |= {f"rank of {text!r}": ranks.ravel() for text, ranks in self.tracked.items()}
        return require_pandas().DataFrame(table).rename(columns={"logprobs": "logprob"})


def heat_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    positions: int = POSITIONS,
    top_k: int = TOP_K,
    final_norm: bool = False,
    temperature: float = 1.0,
    track: Sequence[int] = (),
) -> list[Heatmap]:
    """Return a :class:`Heatmap` of the first ``positions`` tokens of each response; its title says so where there are more.

    ``track`` are ids whose rank is taken everywhere, too. Model and other options are those of :func:`bupo.analysis.analyze`.
    """
    reading = READINGS[final_norm]
    look = Look((reading,), ("layer",), temperature, top_k, tuple(track))
    found = collect(model, samples, look, shown=len(samples), positions=positions).maps[reading]
    return named_maps(found, tokenizer, samples, reading, track)


def named_maps(
    found: Mapping[int, Values],
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    reading: str,
    track: Sequence[int] = (),
    what: str = "response",
) -> list[Heatmap]:
    """Return a :class:`Heatmap` of each of the maps that :func:`bupo.analysis.collect.collect` found, with the texts of tokens.

    ``what`` is the word for a sample in titles.
    """
    piece = cache(lambda token: token_text(tokenizer, token))
    maps = []
    for place, values in sorted(found.items()):
        sample = samples[place]
        shown, length = values["rank"].shape[1], len(sample.response_ids)
        targets = [int(token) for token in sample.response_ids[:shown]]
        cut = f", the first {shown} of {length} tokens" if length > shown else ""
        maps.append(
            Heatmap(
                title=f"{what} {place + 1}{cut}",
                prompt=tokenizer.decode(sample.prompt_ids),
                context=[piece(token) for token in [int(sample.prompt_ids[-1]), *targets[:-1]]],
                targets=[piece(token) for token in targets],
                layers=[*map(str, range(len(values["rank"]) - 1)), "π"],
                top_tokens=[[[piece(token) for token in cell] for cell in row] for row in values["top_ids"].tolist()],
                top_logprobs=values["top_logprobs"],
                logprobs=values["logprob"],
                entropy=values["entropy"],
                rank=values["rank"],
                kl=values["kl_to_final"],
                reading=reading,
                tracked={piece(token): values["tracked_rank"][i] for i, token in enumerate(track)},
            )
        )
    return maps


def lens_table(views: Sequence[Heatmap]) -> Table:
    """Return a table of what every layer says at the last position of a text, the final policy on top.

    ``views`` are readings of that text: of each the most likely token, its probability, and the rank of every tracked token.
    """
    first = views[0]
    table = Table(title=escape(first.title), title_justify="left", caption_justify="left")
    table.caption = escape(f"behind {first.context[-1]!r}; rank 0 is the most likely token")
    table.add_column("layer", justify="right")
    for view in views:
        named = f"{view.reading}: " if len(views) > 1 else ""
        table.add_column(f"{named}says")
        table.add_column("p", justify="right")
        for text in view.tracked:
            table.add_column(escape(f"rank of {text!r}"), justify="right")
    for row in reversed(range(len(first.layers))):
        cells = [first.layers[row]]
        for view in views:
            cells += [escape(repr(view.top_tokens[row][-1][0])), f"{np.exp(view.top_logprobs[row, -1, 0]):.3f}"]
            cells += [f"{ranks[row, -1]:,}" for ranks in view.tracked.values()]
        table.add_row(*cells, end_section=first.layers[row] == "π")
    return table


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token with the space before a word, which SentencePiece tokenizers drop where they decode it alone."""
    text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text
