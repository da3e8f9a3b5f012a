"""Figures of an analysis and of a training run: what they show, and that it can be read."""

import os
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from analysis_samples import sample_statistics
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from problems import first_of

from bupo.analysis.figures import draw_training, save_figures, statistics_figures, training_figure
from bupo.plots import GREEN, SKY, YELLOW, svg_of

MEASURED = {
    "entropy_flow": ("entropy",),
    "delta_entropy": ("delta_entropy",),
    "residual_cosine": ("cosine",),
    "residual_norm": ("rms",),
    "divergence_to_final": ("kl_to_final", "kl_from_final"),
}
MATRICES = {"layer_divergence": "kl", "layer_cosine": "cosine"}


def only(name, statistics):
    """``statistics`` with what the figure ``name`` shows and nothing else."""
    curves = {key: curve for key, curve in statistics.curves.items() if key[1] in MEASURED.get(name, ())}
    return replace(statistics, curves=curves, matrices={key: statistics.matrices[key] for key in (MATRICES.get(name),) if key})


def drawn(name, statistics):
    (figure,) = statistics_figures(only(name, statistics)).values()
    return figure


def save(statistics, folder):
    figures = statistics_figures(statistics)
    return save_figures(figures, {name: svg_of(figure) for name, figure in figures.items()}, folder)


def training(steps=60, every=10, switch=30, layers=12, phase="layer 6", **changes):
    """Rows of a run that looks at its layers every so many steps; the entropy of layer l at step s is l + s / 100."""
    rows = [{"step": step, "phase": phase if step <= switch else "final"} for step in range(1, steps + 1)]
    for row in rows[every - 1 :: every]:
        row["lens_entropy"] = [layer + row["step"] / 100 for layer in range(layers + 1)]
        row["lens_kl"] = [float(layers + 1 - layer) for layer in range(layers + 1)]
        row |= changes
    return rows


def texts(figure):
    """The texts that are shown in a figure, drawn, with where they lie."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        shown += [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            shown += [label for tick in ticks if low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)]
    shown += [text for legend in figure.legends for text in legend.get_texts()]
    return [(text.get_text(), text.get_window_extent()) for text in shown if text.get_visible() and text.get_text()]


def check_legible(figure):
    everything, found = figure.bbox, texts(figure)
    assert len(found) > 10
    for text, box in found:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= everything.x1 + 1, text
        assert box.y1 <= everything.y1 + 1, text
    for (one, box), (other, beside) in combinations(found, 2):
        assert not box.padded(-1).overlaps(beside.padded(-1)), (one, other)


# ---- of an analysis


def test_every_figure_is_a_png_and_an_svg(tmp_path):
    paths = save(sample_statistics(4), tmp_path)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in [*MEASURED, *MATRICES] for kind in ("png", "svg")]
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)
    for path in paths:
        if path.suffix == ".png":
            assert imread(path).std() > 0.01
        else:
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
            assert path.stat().st_size < 200_000


@pytest.mark.parametrize("layers", first_of([36, 1, 4, 80]))
def test_texts_neither_overlap_nor_leave_the_figure(layers):
    for figure in statistics_figures(sample_statistics(layers)).values():
        check_legible(figure)


def test_the_title_says_model_tokens_norm_and_interval():
    statistics = sample_statistics(4, model="/a/very/long/path" * 9 + "/Qwen$3-$4B")  # not a formula
    figure = drawn("delta_entropy", statistics)
    title = figure.get_suptitle()
    check_legible(figure)
    for words in ("Qwen$3-$4B", "12,345 tokens of 40 responses", "without the final norm", "95 % interval"):
        assert words in title
    normed = replace(statistics, summary=statistics.summary | {"final_norm": True})
    assert "through the final norm" in drawn("entropy_flow", normed).get_suptitle()


def test_the_stream_flows_through_attention_ffn_and_layer():
    statistics = sample_statistics(4)
    axes = drawn("entropy_flow", statistics).axes[0]
    flow = axes.lines[0]
    np.testing.assert_allclose(flow.get_xdata(), [*np.arange(13) / 3, 4 + 2 / 3])
    attention, ffn, layer, final = (statistics.curves[point, "entropy"].mean for point in ("attention", "ffn", "layer", "final"))
    expected = [layer[0], *np.stack([attention, ffn, layer[1:]], 1).ravel(), *final]
    np.testing.assert_allclose(flow.get_ydata(), expected)
    assert any(np.allclose(line.get_ydata(), np.log(151936)) for line in axes.lines)


def test_changes_of_entropy_have_their_intervals():
    statistics = sample_statistics(12)
    panels = drawn("delta_entropy", statistics).axes
    for axes, module in zip(panels, ("attention", "ffn", "layer"), strict=True):
        curve = statistics.curves[module, "delta_entropy"]
        assert any(np.array_equal(line.get_ydata(), curve.mean) for line in axes.lines)
        corners = axes.collections[0].get_paths()[0].vertices
        for layer, low, high in zip(curve.layers, curve.low, curve.high, strict=True):
            heights = corners[corners[:, 0] == layer, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], [low, high])


def test_segments_are_shaded_and_the_boundary_marked():
    statistics = sample_statistics(36)
    figure = drawn("delta_entropy", statistics)
    for axes in figure.axes:
        spans = {patch.get_facecolor()[:3]: (patch.get_extents().x0, patch.get_extents().x1) for patch in axes.patches}
        edges = axes.transData.transform([(0.5, 0), (6.5, 0), (27.5, 0), (36.5, 0)])[:, 0]
        np.testing.assert_allclose(spans[to_rgba(YELLOW)[:3]], edges[:2])
        np.testing.assert_allclose(spans[to_rgba(SKY)[:3]], edges[2:])
        assert [line.get_xdata()[0] for line in axes.lines if line.get_color() == GREEN] == [6]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["exploration 1–6", "integration 7–27", "convergence 28–36", "boundary layer 6 (in 97% of resamples)"]


def test_without_a_boundary_none_is_marked():
    statistics = sample_statistics(12, responses=1)
    boundary = {"layer": None, "confidence": 0.0, "segments": [], "note": "one response"}
    figure = drawn("delta_entropy", replace(statistics, summary=statistics.summary | {"boundary": boundary}))
    assert not [line for axes in figure.axes for line in axes.lines if line.get_color() == GREEN]
    assert "one response: no intervals" in figure.get_suptitle()
    check_legible(figure)


def test_norms_and_divergences_have_a_logarithmic_axis():
    for name in ("residual_norm", "divergence_to_final"):
        assert drawn(name, sample_statistics(12)).axes[0].get_yscale() == "log"


def test_a_divergence_of_zero_is_drawn():
    statistics = sample_statistics(12)
    curve = statistics.curves["layer", "kl_to_final"]
    statistics.curves["layer", "kl_to_final"] = curve._replace(mean=0 * curve.mean, low=0 * curve.mean, high=0 * curve.mean)
    figure = drawn("divergence_to_final", statistics)
    assert (figure.axes[0].lines[0].get_ydata() == 1e-4).all()
    check_legible(figure)


@pytest.mark.parametrize(("name", "matrix"), [("layer_divergence", "kl"), ("layer_cosine", "cosine")])
def test_matrices_have_a_row_and_a_column_for_every_layer(name, matrix):
    statistics = sample_statistics(80)
    axes = drawn(name, statistics).axes[0]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), statistics.matrices[matrix])
    assert image.origin == "lower"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "0"
    assert labels[-1] == ("π" if matrix == "kl" else "80")
    if matrix == "kl":  # 0 on the diagonal
        assert tuple(image.to_rgba(image.get_array())[5, 5]) == image.cmap(0.0)


@pytest.mark.parametrize("name", [*MEASURED, *MATRICES])
def test_what_was_not_measured_is_left_out(name):
    assert list(statistics_figures(only(name, sample_statistics(4)))) == [name]


def test_the_same_statistics_give_the_same_files(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        save(only("residual_norm", sample_statistics(4)), tmp_path / name)
    for kind in ("png", "svg"):
        one, other = (tmp_path / name / f"residual_norm.{kind}" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_a_figure_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    (tmp_path / "lens.png").write_text("before")

    def fail(figure, path, **options):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_training(training(), tmp_path / "lens.png")
    assert (tmp_path / "lens.png").read_text() == "before"


# ---- of a training run


def test_layers_are_drawn_at_the_steps_they_were_measured_at(tmp_path):
    rows = [row for row in training() if row["step"] != 40]  # 10, 20, 30, 50, 60
    entropy, divergence = (axes.collections[0] for axes in training_figure(rows).axes[:2])
    edges = entropy.get_coordinates()
    np.testing.assert_allclose(edges[0, :, 0], [5, 15, 25, 40, 55, 65])
    np.testing.assert_allclose(edges[:, 0, 1], np.arange(14) - 0.5)
    np.testing.assert_allclose(entropy.get_array(), np.arange(13)[:, None] + np.array([10, 20, 30, 50, 60]) / 100)
    np.testing.assert_allclose(divergence.get_array()[:, 0], 13.0 - np.arange(13))
    assert [path.name for path in draw_training(rows, tmp_path / "lens.png")] == ["lens.png", "lens.svg"]
    assert sorted(os.listdir(tmp_path)) == ["lens.png", "lens.svg"]
    assert imread(tmp_path / "lens.png").std() > 0.01


@pytest.mark.parametrize(("phase", "layer"), [("layer 6", 6), ("ffn 11", 11)])
def test_the_optimised_layer_and_the_end_of_phase_1_are_marked(phase, layer):
    figure = training_figure(training(phase=phase))
    for axes in figure.axes[:2]:
        optimised, boundary = axes.lines
        assert list(optimised.get_ydata()) == [layer, layer]
        assert list(optimised.get_xdata()) == [5, 30.5]
        assert boundary.get_xdata()[0] == 30.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"phase 1: {phase}", "end of phase 1"]


def test_a_run_of_one_phase_has_no_boundary():
    assert not training_figure(training(switch=0)).axes[0].lines
    (optimised,) = training_figure(training(switch=60)).axes[0].lines
    assert list(optimised.get_xdata()) == [5, 60.5]


@pytest.mark.parametrize("rows", first_of([training(layers=80), training(layers=4), training(steps=10), training(steps=2000)]))
def test_the_training_figure_is_legible(rows):
    check_legible(training_figure(rows))


def test_values_that_are_not_finite_stay_empty():
    kl = [None, float("nan"), *[1.0] * 11]
    mesh = training_figure(training(lens_kl=kl)).axes[1].collections[0]
    assert np.ma.getmaskarray(np.ma.masked_invalid(mesh.get_array()))[:3, 0].tolist() == [True, True, False]
    check_legible(training_figure(training(lens_kl=[None] * 13)))


def test_only_what_was_measured_has_a_panel(tmp_path):
    figure = training_figure(training(lens_kl=None))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert list(filter(None, titles)) == ["entropy of the internal policies"]
    assert draw_training(training(every=100), tmp_path / "lens.png") == []
    assert os.listdir(tmp_path) == []
