"""The report as a file, and as a page in a browser where one is installed."""

import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from analysis_samples import sample_heatmap, sample_statistics

from bupo.analysis import report
from bupo.analysis.report import Report, summary_lines

# The last three: a lone surrogate, letters that turn the direction, nothing.
HOSTILE = ("</script><script>alert(1)</script>", "<!--", "<b>bold</b>", "&lt;", "{{figures}}", "\\u003c", "\ud800", "\u202e", "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Tags with their attributes, and the text in elements with an id, of a file."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.place = [], {}, None
        self.feed(path.read_text(encoding="utf-8"))

    def json(self, place):
        return json.loads(self.texts[place])

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.place = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        self.place = None

    def handle_data(self, text):
        self.texts[self.place] = self.texts.get(self.place, "") + text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def few():
    """Statistics without most curves: the figures are tested elsewhere."""
    statistics = sample_statistics(12)
    return replace(statistics, curves={key: curve for key, curve in statistics.curves.items() if key[1] == "rms"}, matrices={})


@pytest.fixture
def nothing(few):
    return replace(few, curves={})


def write_page(path, statistics, heatmaps, **options):
    path.write_text(Report({"raw": statistics}, heatmaps, **options).html(), encoding="utf-8")


def written(folder, statistics, heatmaps, **options):
    write_page(folder / "report.html", statistics, heatmaps, **options)
    return Page(folder / "report.html")


# ---- the file


def test_the_page_is_whole_and_asks_nobody_for_anything(tmp_path, few):
    page = written(tmp_path, few, [sample_heatmap()])
    assert os.listdir(tmp_path) == ["report.html"]
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*", policy)
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset")]
    assert len(addresses) == 1
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not page.all("link")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "{{" not in text
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML", text)


def test_the_figures_are_in_it(tmp_path, few):
    (image,) = written(tmp_path, few, []).all("img")
    root = ElementTree.fromstring(base64.b64decode(image["src"].partition(",")[2]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert image["alt"] == "residual norm"


def test_the_same_analysis_gives_the_same_report(tmp_path, few):
    for name in ("one.html", "other.html"):
        write_page(tmp_path / name, few, [sample_heatmap()])
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()


def test_texts_cannot_end_the_data_or_the_title(tmp_path, nothing):
    heatmap = replace(sample_heatmap(words=HOSTILE, k=3), title=HOSTILE[0], prompt="".join(HOSTILE))
    statistics = replace(nothing, summary=nothing.summary | {"model": HOSTILE[0]})
    page = written(tmp_path, statistics, [heatmap])
    assert [attributes.get("type") for attributes in page.all("script")] == ["application/json", None]
    assert not page.all("b")
    assert page.texts["title"] == page.texts["h1"] == "Internal policies of " + HOSTILE[0]
    assert set(page.json("data")["tokens"]) == set(HOSTILE)
    (response,) = page.json("data")["responses"]
    assert response["title"] == HOSTILE[0]
    assert response["prompt"] == "".join(HOSTILE)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<" not in re.search(r'id="data">(.*?)</script>', raw, re.DOTALL)[1]


def test_tokens_and_numbers_are_those_of_the_heat_map(tmp_path, nothing):
    heatmaps = [sample_heatmap(seed=0), sample_heatmap(layers=4, positions=7, k=3, title="response 2", seed=1)]
    data = written(tmp_path, nothing, heatmaps, title="a < b").json("data")
    words = np.array(data["tokens"])
    for heatmap, response in zip(heatmaps, data["responses"], strict=True):
        (view,) = response["views"]
        assert words[view["topTokens"]].tolist() == heatmap.top_tokens
        assert words[response["context"]].tolist() == heatmap.context
        assert words[response["targets"]].tolist() == heatmap.targets
        assert view["layers"] == heatmap.layers
        np.testing.assert_array_equal(view["rank"], heatmap.rank)
        numbers = {"topLogprobs": heatmap.top_logprobs, "logprob": heatmap.logprobs, "entropy": heatmap.entropy, "kl": heatmap.kl}
        for name, values in numbers.items():
            np.testing.assert_allclose(view[name], values, rtol=5e-4)


def test_numbers_that_are_not_finite_are_null(tmp_path, nothing):
    heatmap = sample_heatmap(layers=4, positions=3)
    heatmap.kl[2] = [np.nan, np.inf, 0.5]
    assert written(tmp_path, nothing, [heatmap]).json("data")["responses"][0]["views"][0]["kl"][2] == [None, None, 0.5]


def test_four_responses_of_a_36_layer_model_stay_below_3_megabytes(tmp_path):
    heatmaps = [sample_heatmap(36, 64, 10, seed=seed) for seed in range(4)]
    write_page(tmp_path / "report.html", sample_statistics(36), heatmaps)
    assert (tmp_path / "report.html").stat().st_size < 3e6


def test_the_summary_is_complete(few):
    lines = dict(summary_lines(few.summary))
    assert lines == {
        "model": "Qwen/Qwen3-4B",
        "model type": "qwen3",
        "layers": "12",
        "vocab": "151,936",
        "responses": "40",
        "tokens": "12,345",
        "final norm": "no",
        "temperature": "1",
        "precision": "bfloat16",
        "perplexity": "1.235",
        "boundary layer": "2 (in 97% of bootstrap resamples)",
        "segments": "exploration 1–2, integration 3–9, convergence 10–12",
        "versions": "torch 2.11.0, transformers 5.17.0",
    }
    none = {"layer": None, "confidence": 0.0, "segments": [], "note": "one response gives no confidence interval"}
    lines = dict(summary_lines(few.summary | {"boundary": none}))
    assert lines["boundary layer"] == "none: one response gives no confidence interval"
    assert "segments" not in lines


def test_a_report_that_fails_leaves_the_one_that_was_there(tmp_path, few, monkeypatch):
    Report({"raw": few}, title="before").write(tmp_path, pictures=False)
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "absent.html")
    with pytest.raises(FileNotFoundError):
        Report({"raw": few}).write(tmp_path, pictures=False)
    assert Page(tmp_path / "report.html").texts["title"] == "before"


# ---- the page

# Uses the page as a reader would, and leaves what it found in an element of its own.
READER = """
<script>
{
addEventListener("error", (event) => found.errors.push(event.message));
const found = { errors: [], modes: {} };
const cells = () => [...document.querySelectorAll(".map td")];
const shown = () => document.getElementById("details").textContent;
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const place = () => [document.activeElement.parentNode.rowIndex, document.activeElement.cellIndex];

for (const button of document.querySelectorAll("#modes input")) {
  button.click();
  found.modes[button.value] = {
    colors: cells().map((cell) => [getComputedStyle(cell).backgroundColor, getComputedStyle(cell).color]),
    label: document.getElementById("scale-label").textContent,
    ticks: [...document.querySelectorAll("#scale-ticks span")].map((tick) => {
      const { left, right } = tick.getBoundingClientRect();
      return { text: tick.textContent, left, right };
    }),
  };
}
found.first = shown();
cells()[2].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
found.hovered = shown();
cells()[0].focus();
found.places = ["ArrowRight", "ArrowDown", "End", "ArrowRight", "Home", "ArrowUp", "ArrowUp"].map((key) => (press(key), place()));
found.focused = shown();
found.stops = cells().filter((cell) => cell.tabIndex === 0).length;
const head = document.querySelector(".map thead th:nth-child(2)"), side = document.querySelector(".map tbody th");
const scroll = document.querySelector(".scroll");
const before = [head.getBoundingClientRect().top, side.getBoundingClientRect().left];
scroll.scrollTo(200, 60);
found.scrolled = [scroll.scrollLeft, scroll.scrollTop];
found.sticky = before.map((value, i) => value - [head.getBoundingClientRect().top, side.getBoundingClientRect().left][i]);
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const selector = document.getElementById("response");
found.options = [...selector.options].map((option) => option.textContent);
selector.selectedIndex = 1;
selector.dispatchEvent(new Event("change"));
found.second = cells().length;
cells()[0].focus();
found.lines = [...document.querySelectorAll("#trajectory polyline")].map((line) => line.getAttribute("points").split(" ").length);
found.legend = [...document.querySelectorAll("#trajectory li")].map((entry) => entry.textContent);
document.querySelectorAll("#readings input")[2]?.click();
found.alone = [cells().length, document.querySelector("#maps h3")?.textContent];
document.querySelectorAll("#readings input")[0]?.click();
selector.selectedIndex = 0;
selector.dispatchEvent(new Event("change"));
found.width = innerWidth;
const answer = parent.document.createElement("pre");
parent.document.body.append(Object.assign(answer, { id: "found", textContent: JSON.stringify(found) }));
}
</script>
"""


class Opened(Page):
    """The page after :data:`READER`; rows of cells, top layer first, each with its class and text."""

    def __init__(self, path):
        self.rows, self.cell = [], None
        super().__init__(path)
        self.found = self.json("found")

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = [dict(attributes).get("class", ""), ""]
            self.rows[-1].append(self.cell)

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, text):
        super().handle_data(text)
        if self.cell:
            self.cell[1] += text


def opened(folder, heatmaps, statistics, frame=None):
    """The page in a window of 1280 pixels, or in a frame of so many: windows of less than 500 there are not."""
    write_page(folder / "report.html", statistics, heatmaps)
    whole = (folder / "report.html").read_text(encoding="utf-8")
    page = whole.replace("</body>", READER + "</body>")
    if frame:
        page = f'<body><iframe style="width: {frame}px; height: 800px; border: 0" srcdoc="{escape(page)}"></iframe></body>'
    (folder / "read.html").write_text(page, encoding="utf-8")
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    options = ("headless", "no-sandbox", "disable-gpu", *quiet, f"user-data-dir={folder / 'profile'}", "window-size=1280,800")
    command = [CHROMIUM, *(f"--{option}" for option in options), "--dump-dom", (folder / "read.html").as_uri()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    (folder / "dom.html").write_text(answer.stdout, encoding="utf-8")
    return Opened(folder / "dom.html")


@pytest.fixture(scope="module")
def heatmaps():
    words = (*HOSTILE, " the", "\n", "\t", "x" * 60)
    first = sample_heatmap(layers=36, positions=64, k=5, words=words)
    first.kl[0, 0] = np.nan
    second = sample_heatmap(layers=12, positions=3, k=5, title="response 2", seed=1)
    second = replace(second, tracked={" Paris": second.rank + 1, second.targets[0]: second.rank})
    return [first, second, *(replace(heatmap, reading="normed") for heatmap in (first, second))]


@pytest.fixture(scope="module")
def page(tmp_path_factory, heatmaps, few):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    return opened(tmp_path_factory.mktemp("page"), heatmaps, few)


def visible(token):
    shown = {" ": "␣", "\n": "↵", "\t": "⇥", "\ud800": "⟨U+D800⟩", "\u202e": "⟨U+202E⟩"}
    return "".join(shown.get(character, character) for character in token) or "∅"


def test_every_cell_shows_its_most_likely_token_the_top_layer_on_top(page, heatmaps):
    first, rows = heatmaps[0], page.rows[1:39]
    assert page.found["errors"] == []
    assert [row[0][1] for row in rows] == first.layers[::-1]
    assert [row[0][1] for row in page.rows[41:79]] == first.layers[::-1]  # and once more beside it, in its other reading
    assert [[text for _, text in row[1:]] for row in rows] == [[visible(top[0]) for top in line] for line in first.top_tokens[::-1]]
    assert [text for _, text in page.rows[0][1:]] == [f"{visible(token)}{i}" for i, token in enumerate(first.targets, 1)]
    assert [text for _, text in page.rows[39][1:]] == [visible(token) for token in first.context]
    assert len(page.all("script")) == 3  # data, page, reader


def test_cells_whose_token_is_the_next_one_are_marked(page, heatmaps):
    marked = [["hit" in classes for classes, _ in row[1:]] for row in page.rows[1:39]]
    np.testing.assert_array_equal(marked, heatmaps[0].rank[::-1] == 0)
    assert 0 < np.sum(marked) < np.size(marked)


def luminance(color):
    parts = np.array([int(part) for part in re.findall(r"\d+", color)[:3]]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("mode", ["probability", "entropy", "rank", "kl"])
def test_colours_follow_the_chosen_number_and_can_be_read_on(page, heatmaps, mode):
    first, found = heatmaps[0], page.found["modes"][mode]
    values = {"probability": first.top_logprobs[..., 0], "entropy": first.entropy, "rank": first.rank, "kl": first.kl}[mode]
    shades, letters = (np.array([luminance(color) for color in colors]) for colors in zip(*found["colors"], strict=True))
    order = np.argsort(values[::-1].ravel())  # NaN last
    order = order[: np.isfinite(values).sum()]
    assert (np.diff(shades[order]) > -0.02).all()  # brighter with the value
    assert shades[order[-1]] - shades[order[0]] > 0.3
    contrast = (np.maximum(shades, letters) + 0.05) / (np.minimum(shades, letters) + 0.05)
    assert contrast[order].min() >= 4.5
    if mode == "kl":
        assert found["colors"][36 * 64 + 64][0] == "rgba(0, 0, 0, 0)"  # the embedding's first position is not finite


def test_the_scale_has_numbers_and_units_that_do_not_overlap(page):
    modes = page.found["modes"]
    for mode in modes.values():
        assert all(left["right"] < right["left"] for left, right in pairwise(mode["ticks"])), mode["ticks"]
    assert [tick["text"] for tick in modes["probability"]["ticks"]] == ["0", "0.25", "0.5", "0.75", "1"]
    assert modes["rank"]["ticks"][0]["text"] == "0"
    assert "nats" in modes["entropy"]["label"]
    assert "nats" in modes["kl"]["label"]
    assert "0 = most likely" in modes["rank"]["label"]


def test_hover_and_keys_show_a_cell_in_full(page, heatmaps):
    first, found = heatmaps[0], page.found
    for text, row, position in ((found["first"], -1, 0), (found["hovered"], -1, 2), (found["focused"], -1, 0)):
        assert f"layer {first.layers[row]}, position {position + 1}" in text
        assert f"its rank{first.rank[row, position]}" in text
        for value, unit in ((first.entropy[row, position], " nats"), (first.kl[row, position], " nats")):
            assert f"{float(f'{value:.4g}'):.3g}{unit}" in text
        for token in first.top_tokens[row][position]:
            assert visible(token) in text
        assert f"{100 * np.exp(float(f'{first.top_logprobs[row, position, 0]:.4g}')):.3g} %" in text
    assert found["places"] == [[1, 2], [2, 2], [2, 64], [2, 64], [2, 1], [1, 1], [1, 1]]
    assert found["stops"] == 1  # for the tabulator


def test_headers_stay_while_the_map_scrolls_and_the_page_does_not(page):
    assert page.found["scrolled"] == [200, 60]
    assert max(page.found["sticky"]) <= 1
    assert page.found["wide"] == 0


def test_the_response_can_be_chosen(page):
    assert page.found["options"] == ["response 1", "response 2"]
    assert page.found["second"] == 2 * 14 * 3


def test_ranks_are_followed_through_the_layers_in_every_reading_and_one_reading_can_be_chosen(page, heatmaps):
    found, target = page.found, visible(heatmaps[1].targets[0])
    assert found["lines"] == [14] * 4  # the next token and the one word that is another, twice
    assert found["legend"] == [f"{target} (next token)", "␣Paris", "solid: raw, dashed: normed"]
    assert found["alone"] == [14 * 3, "normed"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_narrow_window_scrolls_inside_the_map_only(tmp_path, few):
    found = opened(tmp_path, [sample_heatmap(80, 20), sample_heatmap(4, 3)], few, frame=400).found
    assert found["errors"] == []
    assert found["width"] == 400
    assert found["wide"] == 0
    assert max(found["sticky"]) <= 1
    for mode in found["modes"].values():
        assert all(left["right"] < right["left"] for left, right in pairwise(mode["ticks"])), mode["ticks"]
