"""Means over generated tokens with bootstrap intervals over responses, and the files that hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from bupo.analysis.boundary import find_boundary, no_boundary
from bupo.errors import ConfigError
from bupo.output import replace_file, replacing

POINTS = ("attention_input", "attention", "attention_residual", "ffn_input", "ffn", "layer")
RESAMPLES = 2000
TABLE, SUMMARY = "statistics.parquet", "summary.json"
TABLE_COLUMNS = {
    "entropy": ("layer", "entropy"),
    "ΔH attention": ("attention", "delta_entropy"),
    "ΔH FFN": ("ffn", "delta_entropy"),
    "ΔH layer": ("layer", "delta_entropy"),
    "rms": ("layer", "rms"),
    "KL to π": ("layer", "kl_to_final"),
}
COLUMNS = ("point", "statistic", "layer", "other_layer", "mean", "std", "low", "high")


class Curve(NamedTuple):
    """A statistic layer by layer; arrays ``[n]``."""

    layers: np.ndarray  # int, ascending
    mean: np.ndarray  # over generated tokens
    std: np.ndarray  # over generated tokens
    low: np.ndarray  # of the mean: 95 % percentile bootstrap interval over responses; NaN with one response
    high: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """The statistics of a model on its responses.

    ``curves`` has, by point (:data:`POINTS`, or ``"final"``: the model's own policy) and statistic,

    * ``entropy``: of all points but ``attention_residual``, and of ``final``; nats
    * ``delta_entropy``: of ``attention``, ``ffn`` and ``layer`` (BuPO, arXiv 2512.19673, equations 12, 13 and 11); nats
    * ``rms``: of the vectors of ``layer``, ``attention``, ``ffn``; raw ones, also with ``final_norm``
    * ``cosine``: ``attention`` cos(A^l, H^{l-1}), ``ffn`` cos(F^l, H^{l-1}+A^l), ``layer`` cos(H^l, H^{l-1}); raw too
    * ``logprob`` of the generated token, ``max_probability``, ``kl_to_final`` KL(π^l ‖ π) and ``kl_from_final``, nats: of ``layer``
      and ``final``

    Layers count from 1; ``layer`` exists at 0, too, the embedding. The raw residual of layer L and the final policy, which is
    normed, are two things: the one is ``layer`` at L, the other ``final`` at L. What was not among the ``points`` that were read is
    not there.
    """

    curves: dict[tuple[str, str], Curve]
    matrices: dict[str, np.ndarray]  # "kl" [L+2, L+2]: mean KL(π^l ‖ π^k) of H^0..H^L and, last, π; "cosine" [L+1, L+1] of H^0..H^L
    summary: dict[str, Any]  # as in summary.json

    def to_dataframe(self) -> Any:
        """Return a pandas ``DataFrame`` with a row for each point, statistic and layer, as ``statistics.parquet`` has them.

        Columns are :data:`COLUMNS`: text, integers and float64; nats but for ``rms``, ``cosine`` and ``max_probability``. Raises
        ``ImportError`` where pandas is not installed.
        """
        return require_pandas().DataFrame(_rows(self), columns=list(COLUMNS)).astype({"layer": "int32", "other_layer": "Int32"})


class Sums(NamedTuple):
    """Sums over the tokens of each of R responses, in float64; those of the matrices are over all tokens."""

    tokens: np.ndarray  # [R] int
    totals: dict[tuple[str, str], np.ndarray]  # [2, R, layers]: the sums of the values, and of their squares
    matrices: dict[str, np.ndarray]  # [P, P]


def first_layer(point: str, statistic: str, depth: int) -> int:
    """Return the first layer at which ``point`` has ``statistic``."""
    if point == "final":
        return depth
    return 0 if point == "layer" and statistic not in ("delta_entropy", "cosine") else 1


def estimate(sums: Sums, summary: dict[str, Any], seed: int = 0) -> Statistics:
    """Return the statistics that follow from ``sums``; their ``summary`` gains tokens, perplexity and the boundary layer."""
    curves = _curves(sums, summary["layers"], seed)
    found: dict[str, Any] = {
        "responses": len(sums.tokens),
        "tokens": int(sums.tokens.sum()),
        "perplexity": float(np.exp(-curves["final", "logprob"].mean[0])),
        "boundary": no_boundary("the FFNs were not read"),
    }
    if ("ffn", "delta_entropy") in curves:
        _, mean, _, low, high = curves["ffn", "delta_entropy"]
        resampled = resampled_means(sums.totals["ffn", "delta_entropy"][0], sums.tokens, seed)
        found["boundary"] = find_boundary(mean, low, high, resampled)
    return Statistics(curves, _mean_matrices(sums), summary | found)


def estimate_difference(first: Sums, second: Sums, summary: dict[str, Any], seed: int = 0) -> Statistics:
    """Return the statistics of ``second`` minus those of ``first``, of two models on the same responses.

    Intervals are paired: each resample draws responses for both. There is no std, and in ``summary`` the ratio of the perplexities
    is all that is added to the counts.
    """
    totals = {
        key: np.stack([second.totals[key][0] - first.totals[key][0], np.full_like(first.totals[key][1], np.nan)])
        for key in first.totals
    }
    matrices = {name: second.matrices[name] - first.matrices[name] for name in first.matrices}
    sums = Sums(first.tokens, totals, matrices)
    curves = _curves(sums, summary["layers"], seed)
    ratio = float(np.exp(-curves["final", "logprob"].mean[0]))
    found = {"responses": len(sums.tokens), "tokens": int(sums.tokens.sum()), "perplexity_ratio": ratio}
    return Statistics(curves, _mean_matrices(sums), summary | found)


def _curves(sums: Sums, depth: int, seed: int) -> dict[tuple[str, str], Curve]:
    """Return means over tokens, with the intervals that resampled responses give."""
    count, curves = sums.tokens.sum(), {}
    for (point, statistic), (values, squares) in sums.totals.items():  # [R, layers] each
        mean = values.sum(0) / count
        variance = np.maximum(squares.sum(0) / count - mean**2, 0)
        if len(values) > 1:
            low, high = np.percentile(resampled_means(values, sums.tokens, seed), [2.5, 97.5], axis=0)
        else:
            low = high = np.full_like(mean, np.nan)
        layers = first_layer(point, statistic, depth) + np.arange(len(mean))
        curves[point, statistic] = Curve(layers, mean, np.sqrt(variance), low, high)
    return curves


def _mean_matrices(sums: Sums) -> dict[str, np.ndarray]:
    return {name: total / sums.tokens.sum() for name, total in sums.matrices.items()}


def resampled_means(values: np.ndarray, tokens: np.ndarray, seed: int) -> np.ndarray:  # [R, columns], [R] -> [RESAMPLES, columns]
    """Return means over tokens of responses, each with all of its tokens, drawn again with replacement; one seed, one draw.

    The tokens of one response depend on one another: to draw tokens would give intervals that are far too narrow.
    """
    responses = len(tokens)
    weights = np.random.default_rng(seed).multinomial(responses, np.full(responses, 1 / responses), RESAMPLES).astype(np.float64)
    return weights @ values / (weights @ tokens)[:, None]


def write_statistics(statistics: Statistics, folder: Path) -> None:
    """Write ``statistics.parquet`` and ``summary.json`` into ``folder``, each whole or not at all.

    A row of the table is one point, statistic and layer, with mean, std, low, high. Matrices are rows of the point ``pair``, which
    have a mean alone; in ``kl`` layer L+1 is the final policy. Raises :class:`ConfigError` where pyarrow is not installed.
    """
    pyarrow, parquet = require_pyarrow()
    text, number, real = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    kinds = zip(COLUMNS, (text, text, number, number, real, real, real, real), zip(*_rows(statistics), strict=True), strict=True)
    table = pyarrow.table({name: pyarrow.array(column, kind) for name, kind, column in kinds})
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TABLE) as partial:
        parquet.write_table(table, partial)
    replace_file(folder / SUMMARY, json.dumps(statistics.summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _rows(statistics: Statistics) -> list[tuple]:
    """Return the values of :data:`COLUMNS`, a tuple for each row."""
    rows: list[tuple] = [
        (point, statistic, int(layer), None, *map(float, numbers))
        for (point, statistic), curve in statistics.curves.items()
        for layer, *numbers in zip(*curve, strict=True)
    ]
    for statistic, matrix in statistics.matrices.items():
        rows += [("pair", statistic, *place, float(mean), None, None, None) for place, mean in np.ndenumerate(matrix)]
    return rows


def read_statistics(folder: Path) -> Statistics:
    """Read what :func:`write_statistics` wrote. Raises :class:`ConfigError` where it is not there."""
    _, parquet = require_pyarrow()
    for name in (TABLE, SUMMARY):
        if not (folder / name).is_file():
            raise ConfigError(f"folder: {folder} has no {name}, accepted is what `bupo analyze --out` wrote")
    columns = parquet.read_table(folder / TABLE).to_pydict()
    groups: dict[tuple[str, str], list[tuple]] = {}
    for point, statistic, *numbers in zip(*columns.values(), strict=True):
        groups.setdefault((point, statistic), []).append(tuple(numbers))
    curves, matrices = {}, {}
    for (point, statistic), rows in groups.items():
        layer, other, *numbers = zip(*rows, strict=True)
        if point == "pair":
            matrices[statistic] = np.zeros((max(layer) + 1, max(other) + 1))
            matrices[statistic][layer, other] = numbers[0]
        else:
            curves[point, statistic] = Curve(np.array(layer), *(np.array(x, dtype=np.float64) for x in numbers))
    return Statistics(curves, matrices, json.loads((folder / SUMMARY).read_text(encoding="utf-8")))


def layer_table(statistics: Statistics, name: str = "") -> Table:
    """Return a table with a row for each layer, the last on top, as the residual stream is drawn; and one for the final policy.

    ``name`` is that of the view, where there are several. What was not read has no column.
    """
    summary, curves = statistics.summary, statistics.curves
    norm = name or ("behind the final norm" if summary["final_norm"] else "raw")
    caption = (
        f"mean over {summary['tokens']:,} tokens of {summary['responses']} responses; nats; {norm}; [95 % interval over responses]"
    )
    table = Table(caption=caption, caption_justify="left")
    boundary = summary["boundary"]
    table.add_column("layer", justify="right")
    shown = {title: key for title, key in TABLE_COLUMNS.items() if key in curves}
    for title in shown:
        table.add_column(title, justify="right")

    def cell(point: str, statistic: str, layer: int, digits: int = 3, interval: bool = False) -> str:
        curve = curves.get((point, statistic))
        if curve is None or layer < curve.layers[0]:
            return ""
        mean, _, low, high = (x[layer - curve.layers[0]] for x in curve[1:])
        bounds = f" \\[{low:+.{digits}f}, {high:+.{digits}f}]" if interval and not np.isnan(low) else ""
        return f"{mean:{'+' if 'delta' in statistic else ''}.{digits}f}{bounds}"

    depth = summary["layers"]
    table.add_row("π", *(cell("final", "entropy", depth) if statistic == "entropy" else "" for _, statistic in shown.values()))
    table.add_section()
    for layer in range(depth, -1, -1):
        here = "→ " if layer == boundary["layer"] else ""
        cells = [cell(*key, layer, interval=key == ("ffn", "delta_entropy")) for key in shown.values()]
        table.add_row(f"{here}{layer}", *cells, style="bold" if here else None)
    return table


def require_pandas() -> Any:
    """Return the module pandas. Raises ``ImportError`` where it is not installed."""
    try:
        import pandas
    except ImportError:
        raise ImportError("to_dataframe needs the package pandas: pip install bupo-kernels[analysis]") from None
    return pandas


def require_pyarrow() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet. Raises :class:`ConfigError` where they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{TABLE} needs the package pyarrow: pip install bupo-kernels[train]") from None
    return pyarrow, parquet
