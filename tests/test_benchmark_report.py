"""docs/benchmarks.md, its pictures and README.md say what the results say, and nothing that they do not."""

import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import readme, report
from benchmarks.sections import kernels as kernel_section
from benchmarks.sections import scaling as scaling_section
from benchmarks.sections import step as step_section
from benchmarks.text import digits

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MACHINE = {
    "device": "NVIDIA H200",
    "kind": "cuda",
    "threads": None,
    "driver": "570.1",
    "cuda": "12.9",
    "versions": {"torch": "2.13.0", "verl": None},
    "commit": "abc1234",
    "date": "2026-11-22T01:00:00+00:00",
}
RATES = {"gemm_tflops": {"bfloat16": 655.25, "float32": 51.13}, "copy_gb_per_s": 3987.4}
CONTENDERS = (  # name, who, computes, × floor
    ("bare GEMM", "floor", "products", 1.0),
    ("naive logits", "naive", "log-prob, entropy", 2.4),
    ("bupo_kernels triton", "ours", "log-prob, entropy", 1.1),
    ("bupo_kernels torch", "ours", "log-prob, entropy", 1.7),
    ("TRL 1.16.0 chunked", "peer", "log-prob, entropy", 2.2),
    ("Apple CCE 25.1.1 cce", "peer", "log-prob", 1.05),
)


def contender(name, who, computes, times, group="forward", rows=256, ms=3.14159, **changes):
    floor_ms = ms * rows / 256
    errors = {"logprobs": 1.234e-6 * times, "entropy": None, "hidden": 2.5e-3 if "backward" in group else None, "weight": 1e-3}
    row = {"group": group, "model": "Qwen3-4B", "rows": rows, "vocab": 151936, "width": 2560, "layers": 1, "dtype": "bfloat16"}
    row |= {"active": 1.0, "distribution": "flat", "name": name, "who": who, "computes": computes, "remark": "", "reason": None}
    row |= {"ms": floor_ms * times, "ms_of_rounds": [floor_ms * times * noise for noise in (0.98, 1, 1.03)], "times_floor": times}
    row |= {"useful_tflops": 640.4 / times, "peak_bytes": round(times * rows * 12345), "stated_bytes": None}
    return row | {"errors": {} if who == "floor" else {"flat": errors, "peaked": {**errors, "logprobs": 3e-5}}} | changes


def kernels(sizes=(256, 4096), groups=("forward", "forward+backward")):
    rows = [contender(*of, group=group, rows=size) for group in groups for size in sizes for of in CONTENDERS]
    unable = contender("verl 0.9.1 Triton", "peer", "log-prob, entropy", 1, reason="needs pip install verl==0.9.1 | nothing < that")
    measured = ("ms", "ms_of_rounds", "times_floor", "useful_tflops", "peak_bytes", "stated_bytes", "errors")
    return [*rows, {name: value for name, value in unable.items() if name not in measured}]


def side(name, phase=1, layer=6, seconds=2.0, gib=10.0, sequences=8, **changes):
    row = {"model": "Qwen3-4B", "phase": phase, "layer": layer, "layers": 36, "sequences": sequences, "length": 4096}
    row |= {"dtype": "bfloat16", "checkpointing": True, "name": name, "reason": None, "seconds": seconds}
    row |= {"seconds_of_rounds": [seconds, seconds * 1.1], "tokens_per_second": sequences * 4096 / seconds}
    return row | {"peak_bytes": round(gib * 2**30), "loss": -0.0123, "gradient_difference": 2.3e-6} | changes


def steps():
    return [
        side("naive logit lens"),
        side("bupo", seconds=0.5, gib=1.5),
        side("naive logit lens", phase=2, layer=None, seconds=4.0),
        side("bupo", phase=2, layer=None, seconds=3.0, gib=2.5),
        {
            **side("naive logit lens", sequences=16, reason="out of memory"),
            "seconds": None,
            "tokens_per_second": None,
            "peak_bytes": None,
        },
        side("bupo", sequences=16, seconds=1.0),
    ]


def scaling():
    sizes = (256, 1024, 4096)
    points = [{"value": n, "ms": 0.5 + n / 100, "ms_of_rounds": [0.5 + n / 100], "flops": 8 * n * 32000 * 1024} for n in sizes]
    row = {"axis": "rows", "contender": "linear_logprobs, forward+backward", "dtype": "bfloat16", "points": points}
    layers = {**row, "axis": "layer", "fixed": {"rows": 512}, "contender": "policy_loss", "fit": None}
    fit = {"fixed_ms": 0.5, "tflops": 26.2144, "r2": 0.99876}
    return [{**row, "fixed": {"vocab": 32000, "width": 1024}, "fit": fit}, layers]


def section(rows, **machine):
    return {"machine": MACHINE | machine, "rates": RATES, "rows": rows}


def sample():
    return {"nvidia-h200": {"kernels": section(kernels()), "step": section(steps()), "scaling": section(scaling())}}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A checkout with results, and what was made of them."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "results").mkdir()
    (root / "results" / "nvidia-h200.json").write_text(json.dumps(sample()["nvidia-h200"]))
    (root / "README.md").write_text("# x\n\nbefore <!-- benchmarks:speed --><!-- /benchmarks --> after\n", encoding="utf-8")
    report.write(root / "results", root)
    return root


@pytest.fixture
def checkout(written, tmp_path):
    """A copy, to spoil."""
    return Path(shutil.copytree(written, tmp_path / "checkout"))


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def tables(text):
    """Each as a header and rows of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines())
        assert all(len(row) == len(header) for row in rows)
        found.append((header, rows))
    return found


def number(cell):
    return None if cell == "–" else float(cell.replace(",", "").removesuffix("x"))


def assert_says(cell, value, digits=3):
    if value is None:
        assert cell == "–"
    else:
        assert number(cell) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


def test_tables_of_kernels_say_what_the_results_say():
    rows = kernels()
    found = [row for header, body in tables(report.page(sample())) if "stated MiB" in header for row in body]
    assert len(found) == len(rows)
    cases = {}
    for row in rows:
        cases.setdefault((row["group"], row["rows"]), []).append(row)
    for of_case in cases.values():
        printed, found = found[: len(of_case)], found[len(of_case) :]
        by_name = {cells[0].strip("*"): cells for cells in printed}
        for row in of_case:
            _, computes, ms, times, tflops, peak, stated, flat, peaked, *gradients, remark = by_name[row["name"]]
            assert (computes, stated) == (row["computes"], "–")
            if row["reason"]:
                assert remark == "not measured: needs pip install verl==0.9.1 \\| nothing &lt; that"
                assert {ms, times, tflops, peak, flat, peaked, *gradients} == {"–"}
                continue
            assert_says(ms, row["ms"])
            assert_says(times, row["times_floor"])
            assert_says(tflops, row["useful_tflops"])
            assert_says(peak, row["peak_bytes"] / 2**20)
            gradient = None if row["who"] == "floor" else 2.5e-3 if "backward" in row["group"] else 1e-3
            assert_says(flat, row["errors"].get("flat", {}).get("logprobs"), 2)
            assert_says(peaked, row["errors"].get("peaked", {}).get("logprobs"), 2)
            for cell in gradients:
                assert_says(cell, gradient, 2)


def test_tables_are_ordered_by_kind_and_time_and_have_the_machine_on_top():
    page = report.page(sample())
    names = [row[0] for row in next(body for header, body in tables(page) if "stated MiB" in header)]
    ours = ["**bupo_kernels triton**", "**bupo_kernels torch**"]
    assert names == ["bare GEMM", "naive logits", *ours, "Apple CCE 25.1.1 cce", "TRL 1.16.0 chunked", "verl 0.9.1 Triton"]
    rates = r"The machine's own rates: bfloat16 GEMM 655 TFLOP/s, (?:float32 GEMM 51.1 TFLOP/s, )?copy 3,990 GB/s"
    assert len(re.findall(rates, page)) == 2 + 3 + 4 + 1  # in short, sections, tables of kernels and of steps
    assert "driver 570.1, CUDA 12.9, torch 2.13.0." in page
    assert "commit abc1234, 2026-11-22" in page
    assert page.count("<details>") == page.count("</details>") == 2


def test_the_headline_is_of_the_fastest_and_of_sizes_that_naive_logits_took_too():
    rows = kernels(groups=("forward",))
    for row in rows:
        if row["who"] == "naive" and row["rows"] == 4096:
            row["reason"] = "out of memory"
    ((_, body),) = tables(report.blocks({"gpu": {"kernels": section(rows)}})["speed"])
    ((what, computes, ours, naive, peer),) = body
    assert (what, computes) == ("forward: Qwen3-4B, 256 rows, bfloat16", "log-prob, entropy")
    assert ours == "bupo_kernels triton: 1.10x, 582 TFLOP/s, 3.32 MiB"
    assert naive == "naive logits: 2.40x, 267 TFLOP/s, 7.23 MiB"
    assert peer == "TRL 1.16.0 chunked: 2.20x, 291 TFLOP/s, 6.63 MiB"  # CCE is faster and computes less


def test_the_headline_is_of_what_was_measured():
    other = {"model": "Gemma-2-2B", "reason": "the minutes given were over"}
    late = [contender("all", "ours", "", 1, rows=size, **other) for size in (1, 2, 3)]
    single = [contender(*of, dtype="float32") for of in CONTENDERS]
    late += [contender("all", "ours", "", 1, dtype="bfloat16", **{**other, "model": "Qwen3-4B"})]
    ((_, body),) = tables(report.blocks({"gpu": {"kernels": section([*late, *single])}})["speed"])
    assert [row[0] for row in body] == ["forward: Qwen3-4B, 256 rows, float32"]


OURS = ("ours", "ours", "log-prob, entropy")


@pytest.mark.parametrize(
    ("ours", "other", "loses"),
    [
        (1.3, ("naive logits", "naive", "log-prob, entropy", 1.1), True),
        (1.3, ("peer", "peer", "log-prob, entropy, KL", 1.1), True),
        (1.1, ("naive logits", "naive", "log-prob, entropy", 1.3), False),
        (1.1, ("naive logits", "naive", "log-prob, entropy", 1.1), False),
        (1.1004, ("naive logits", "naive", "log-prob, entropy", 1.1), False),  # the same as printed
        (1.3, ("peer", "peer", "log-prob", 1.1), False),
        (1.3, ("bare GEMM", "floor", "products", 1.0), False),
    ],
)
def test_a_line_says_where_this_library_is_slower(ours, other, loses):
    another = contender("ours", "ours", "policy loss", 9)
    lines = list(kernel_section.losses([contender(*OURS, ours, remark="recomputes"), another, contender(*other)]))
    assert len(lines) == loses
    if loses:
        assert f"(log-prob, entropy) than {other[0]}: 1.30x the floor against 1.10x; peak 3.92 against 3.32 MiB" in lines[0]
        assert "flat 1.6e-06 against 1.4e-06" in lines[0]
        assert lines[0].endswith("ours: recomputes.")
    page = report.page({"gpu": {"kernels": section([contender(*OURS, ours), contender(*other)])}})
    assert page.count("**Slower here:**") == loses


def test_without_a_floor_times_are_compared():
    ours, naive = contender(*OURS, 1.3, times_floor=None), contender(*CONTENDERS[1][:3], 1.1)
    assert "4.08 ms against 3.46 ms" in next(kernel_section.losses([ours, naive]))


def test_the_page_lists_what_is_slower_on_each_machine_and_why():
    ours, naive = contender(*OURS, 1.3, algorithm_products=4.0), contender(*CONTENDERS[1][:3], 1.1, algorithm_products=3.0)
    same = contender(*CONTENDERS[1][:3], 1.1, group="forward", rows=4096, algorithm_products=1.0)
    mine = contender(*OURS, 1.3, rows=4096, algorithm_products=1.0)
    slow = report.page({"gpu": {"kernels": section([ours, naive, mine, same]), "step": section(steps())}})
    ((_, body),) = [table for table in tables(slow) if table[0][-1] == "why"]
    assert [row[0] for row in body] == [f"forward: Qwen3-4B, {rows} rows, bfloat16" for rows in ("256", "4,096")]
    assert body[0][2:4] == ["ours: 4.08 ms, 1.30x", "naive logits: 3.46 ms, 1.10x"]
    assert body[0][4] == "4 products against 3: logits are formed again, which it keeps (3.32 MiB against 3.92)"
    assert body[1][4].startswith("the same products at a lower rate")
    fast = report.page({"gpu": {"kernels": section([contender(*OURS, 1.1), contender(*CONTENDERS[1])])}})
    assert "**NVIDIA H200**: nothing of what was measured." in fast
    assert "Where another is faster" not in report.page({})


def test_machines_stand_side_by_side_and_apart_by_their_instruction_sets():
    sets = {"epyc-avx2": ["fma", "avx2"], "epyc-avx512": ["fma", "avx2", "avx512f"]}
    measured = {name: section(kernels(), device="EPYC", threads=2, instruction_sets=flags) for name, flags in sets.items()}
    page = report.page({name: {"kernels": of} for name, of in measured.items()})
    assert "## EPYC, AVX2, 2 threads" in page
    assert "## EPYC, AVX512, 2 threads" in page
    ((header, body),) = [table for table in tables(page) if "EPYC, AVX2, 2 threads" in table[0]]
    assert header == ["", "computes", "EPYC, AVX2, 2 threads", "EPYC, AVX512, 2 threads"]
    assert body[0] == ["forward: Qwen3-4B, 4,096 rows, bfloat16", "log-prob, entropy", *["1.10x / 2.40x / 2.20x"] * 2]
    assert "side by side" not in report.page({"one": {"kernels": measured["epyc-avx2"]}})


def test_tables_of_steps_say_what_the_results_say():
    page = report.page(sample())
    ((_, body),) = [table for table in tables(page) if "Δ gradient" in table[0] and "loss" in table[0]]
    for row, (what, name, speed, faster, peak, share, loss, difference, remark) in zip(steps(), body, strict=True):
        assert name.strip("*") == row["name"]
        layer = "phase 2" if row["phase"] == 2 else "phase 1, layer 6 of 36"
        assert what == f"{layer}, {row['sequences']} x 4,096 tokens"
        assert_says(speed, row["tokens_per_second"])
        assert_says(peak, row["peak_bytes"] and row["peak_bytes"] / 2**30)
        assert (loss, difference) == ("-0.0123", "2.3e-06")
        assert remark == ("not measured: out of memory" if row["reason"] else "")
        if row["sequences"] == 16:
            assert (faster, share) == ("–", "–")
    assert [row[3] for row in body[:4]] == ["1.00x", "4.00x", "1.00x", "1.33x"]
    assert [row[5] for row in body[:4]] == ["1.00", "0.150", "1.00", "0.250"]
    ((_, short),) = tables(report.blocks(sample())["step"])
    assert [row[0] for row in short] == [
        "Qwen3-4B, phase 1, layer 6 of 36, 8 x 4,096 tokens, bfloat16",
        "Qwen3-4B, phase 2, 8 x 4,096 tokens, bfloat16",
    ]
    assert [row[1:] for row in short] == [
        ["16,400 tokens/s, 10.0 GiB", "65,500 tokens/s, 1.50 GiB", "4.00x", "0.150"],
        ["8,190 tokens/s, 10.0 GiB", "10,900 tokens/s, 2.50 GiB", "1.33x", "0.250"],
    ]


def test_a_line_says_where_a_step_is_slower():
    sides = [side("naive logit lens", seconds=2.0), side("naive logit lens, truncated", seconds=1.0), side("bupo", seconds=1.5)]
    (line,) = step_section.losses(sides)
    assert "layer 6 of 36, 8 x 4,096 tokens: bupo than naive logit lens, truncated: 1.50 s against 1.00 s" in line
    assert not list(step_section.losses([*sides[:2], side("bupo", seconds=1.0)]))


def test_fitted_lines_are_printed_with_the_formula_of_their_flops():
    ((_, body),) = [table for table in tables(report.page(sample())) if "fitted line" in table[0]]
    assert body[0][0] == "rows N"
    assert body[0][4:] == ["vocab 32,000, width 1,024", "0.500 ms + 8·N·V·D / 26.2 TFLOP/s", "0.9988"]
    assert body[1][4:] == ["rows 512", "no fit", "–"]
    other = {**scaling()[0], "fixed": {"vocab": 32000, "width": 1000}}  # then 8·N·V·D would be a lie
    assert scaling_section.formula(other) == "0.500 ms + FLOPs / 26.2 TFLOP/s"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (1234.5, "1,230"), (12.345, "12.3"), (0.99951, "1.00"), (0.0123456, "0.0123"), (2.34e-5, "2.3e-05"), (None, "–")],
)
def test_numbers_have_three_digits(number, text):
    assert digits(number) == text


def test_nothing_measured_is_said():
    assert report.page({}).endswith("Nothing is measured yet.\n")
    assert report.figures({}) == {}
    assert [text.strip() for text in report.blocks({}).values()] == ["Nothing is measured yet."] * 3
    assert report.page({"gpu-tune": {"tune": {"rows": [{"ms": 1}]}}}) == report.page({})


@pytest.mark.broad
def test_holes_and_strangers_do_no_harm():
    """Whatever may be null is, nothing else is there, or nothing ran at all."""
    named = ("group", "model", "rows", "name", "axis", "contender", "value", "phase", "sequences", "length", "points", "flops")

    def emptied(row):
        return {
            name: [emptied(point) for point in value] if name == "points" else value if name in named else None
            for name, value in row.items()
        }

    whole = sample()["nvidia-h200"]
    empty = {name: {"rows": [emptied(row) for row in content["rows"]]} for name, content in whole.items()}
    stranger = contender("who?", "passer-by", "nothing", 1.5, peak_bytes=None)
    unable = {name: value for name, value in contender(*CONTENDERS[2]).items() if name in named} | {"reason": "no", "who": "ours"}
    for sections in (
        empty,
        {"kernels": section([stranger])},
        {"kernels": section([unable])},
        {"step": section([side("bupo"), side("another")])},
        {"scaling": section(scaling()[:1]), "kernels": section([])},
        {name: {"rows": content["rows"]} for name, content in whole.items()},
    ):
        page = report.page({"odd": sections})
        assert tables(page)
        assert report.blocks({"odd": sections}).keys() == {"speed", "step", "support"}
        for draw in report.figures({"odd": sections}).values():
            report.write_figure(draw(), io.BytesIO(), "svg")
    assert "not measured: no" in report.page({"odd": {"kernels": section([unable])}})


def test_what_differs_between_sections_is_said_of_each():
    results = sample()
    results["nvidia-h200"]["step"]["machine"] = {**MACHINE, "versions": {"torch": "2.14.0"}, "commit": "later"}
    page = report.page(results)
    assert page.count("torch 2.13.0") == page.count("torch 2.14.0") == page.count("commit later") == 1


def test_pictures_are_well_formed_and_named_in_the_page(written):
    drawn = sorted(path.name for path in (written / "docs" / "benchmarks").iterdir())
    stems = ("kernels-bfloat16-errors", "kernels-bfloat16-memory", "kernels-bfloat16-time", "scaling", "step-qwen3-4b")
    assert drawn == [f"nvidia-h200-{stem}.svg" for stem in stems]
    assert sorted(re.findall(r"\]\(benchmarks/(.*?)\)", (written / "docs" / "benchmarks.md").read_text())) == drawn
    for name in drawn:
        tree = ElementTree.parse(written / "docs" / "benchmarks" / name)
        assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "date" not in (written / "docs" / "benchmarks" / name).read_text().lower()


def test_the_picture_of_times_shows_the_medians_and_this_library_stands_out():
    figure = report.figures(sample())["nvidia-h200-kernels-bfloat16-time"]()
    assert [axes.get_title("left") for axes in figure.axes] == ["forward", "forward+backward"]
    for axes in figure.axes:
        lines = {lines.get_label(): lines.lines[0] for lines in axes.containers}
        assert {name: list(line.get_ydata()) for name, line in lines.items()} == {of[0]: [of[3]] * 2 for of in CONTENDERS[1:]}
        assert all(list(line.get_xdata()) == [256, 4096] for line in lines.values())
        widths = {name: line.get_linewidth() for name, line in lines.items()}
        assert min(widths[name] for name in widths if "bupo" in name) > max(widths[name] for name in widths if "bupo" not in name)
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()}
        assert len(looks) == len(lines)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["floor: bare GEMM", *(of[0] for of in CONTENDERS[1:])]


def test_check_passes_what_was_written_and_writes_nothing(checkout, capsys):
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*")}
    assert report.main(["--results", str(checkout / "results"), "--root", str(checkout), "--check"]) == 0
    assert {path: path.stat().st_mtime_ns for path in checkout.rglob("*")} == before
    assert "TRL 1.16.0 chunked: 2.20x" in (checkout / "README.md").read_text(encoding="utf-8")


def slower(content):
    content["kernels"]["rows"][2]["times_floor"] *= 1.05


def longer(content):
    content["scaling"]["rows"][0]["fit"]["fixed_ms"] *= 2


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: change(root / "results" / "nvidia-h200.json", slower), ["benchmarks.md"]),
        (lambda root: change(root / "results" / "nvidia-h200.json", longer), ["benchmarks.md"]),
        (lambda root: (root / "docs" / "benchmarks" / "nvidia-h200-scaling.svg").unlink(), ["nvidia-h200-scaling.svg"]),
        (lambda root: (root / "docs" / "benchmarks" / "gone-scaling.svg").touch(), ["gone-scaling.svg"]),
        (lambda root: (root / "README.md").write_text("2 GiB <!-- benchmarks:step -->x<!-- /benchmarks -->"), ["README.md"] * 2),
    ],
    ids=["a number", "a fit", "no picture", "a picture of nothing", "the readme"],
)
def test_check_names_what_is_out_of_date(checkout, capsys, spoil, named):
    spoil(checkout)
    arguments = ["--results", str(checkout / "results"), "--root", str(checkout)]
    assert report.main([*arguments, "--check"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [Path(line.partition(": ")[0]).name for line in lines] == named


def test_writing_again_brings_all_up_to_date(checkout):
    results = checkout / "results" / "nvidia-h200.json"
    change(results, lambda content: content.pop("kernels"))
    assert len(report.outdated(results.parent, checkout)) == 2 + 3  # page, README, and pictures of what is gone
    report.write(results.parent, checkout)
    assert report.outdated(results.parent, checkout) == []
    assert not list((checkout / "docs" / "benchmarks").glob("*kernels*"))


def test_only_what_is_marked_is_replaced():
    text = "a\r\n<!-- benchmarks:x -->old\n<!-- /benchmarks --> b <!-- benchmarks:y --><!-- /benchmarks -->\n<!-- c -->"
    filled = readme.fill(text, {"x": "1", "y": r"\1|2", "z": "3"})
    assert filled == "a\r\n<!-- benchmarks:x -->1<!-- /benchmarks --> b <!-- benchmarks:y -->\\1|2<!-- /benchmarks -->\n<!-- c -->"
    assert readme.fill(filled, {"x": "old\n", "y": ""}) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmarks:speeed --><!-- /benchmarks -->", "benchmarks:speeed.*accepted are speed"),
        ("<!-- benchmarks:speed -->", "1 places are opened .* and 0 closed"),
        ("<!-- benchmarks:speed --> <!-- benchmarks:speed --><!-- /benchmarks -->", "2 places are opened .* and 1 closed"),
    ],
)
def test_a_place_that_nothing_can_fill_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        readme.fill(text, {"speed": ""})


def test_recorded_numbers_stand_where_they_are_named():
    recorded = {
        "demo": {"rows": [{"seed": 0, "before": 0.7354, "BuPO": 0.9}]},
        "numbers": {"memory": {"value": 0.53, "unit": "GB", "what": "…"}},
    }
    texts = report.blocks({"recorded": recorded})
    assert texts["memory"] == "0.53 GB"
    assert tables(texts["demo"]) == [(["seed", "before", "BuPO"], [["0", "73.5 %", "90.0 %"]])]


def test_the_readme_and_the_documentation_are_what_the_results_say():
    assert report.outdated(ROOT / "benchmarks" / "results", ROOT) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("It takes 12.5 % less.", "12.5 %"),
        ("It takes 3 GiB.", "3 GiB"),
        ("It takes 0.53 GB, or\n2 minutes", "0.53 GB"),
        ("It is 1.4 times faster.", "1.4 times"),
        ("It is 1.4x faster.", "1.4x"),
        ("It runs at 1,026 tokens/s.", "1,026 tokens/s"),
        ("It runs at 650 TFLOP/s.", "650 TFLOP/s"),
        ("It takes 15 ms.", "15 ms"),
        ("| a | b |\n|---|---|\n| x | **0.80**, 0.93 |", "0.80"),
    ],
)
def test_a_number_in_the_readme_that_no_result_backs_is_found(line, found):
    assert readme.unbacked(README) == []
    assert found in readme.unbacked(f"{README}\n{line}\n")


@pytest.mark.parametrize(
    "line",
    [
        "Of `3 GiB` and\n```\n12 % of code\n```\n",
        "8 x 512 tokens of 24 layers, 3 steps, V = 151,936, FSDP2, Python 3.10 to 3.13, transformers 5 supports it.",
        "| `bupo/x.py` | what ends phase 1 early |",
        "<!-- benchmarks:x -->3 GiB<!-- /benchmarks -->",
    ],
)
def test_settings_shapes_and_versions_need_no_result(line):
    assert readme.unbacked(line) == []


@pytest.mark.parametrize("phrase", readme.ALLOWED)
def test_what_is_allowed_without_a_result_stands_in_the_readme(phrase):
    assert phrase in " ".join(README.split())


@pytest.mark.parametrize("text", ["{", "[]", '{"kernels": []}'])
def test_a_file_that_is_none_of_results_is_named(checkout, capsys, text):
    (checkout / "results" / "broken.json").write_text(text)
    assert report.main(["--results", str(checkout / "results"), "--root", str(checkout), "--check"]) == 1
    assert "broken.json: is no file of results" in capsys.readouterr().err


def test_it_runs_as_a_file(checkout, monkeypatch, capsys):
    """As Python runs one: its folder is where modules are looked for first, and kernels.py there must not pass for the package."""
    change(checkout / "results" / "nvidia-h200.json", slower)
    file = ROOT / "benchmarks" / "report.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--results", str(checkout / "results"), "--root", str(checkout), "--check"])
    monkeypatch.syspath_prepend(file.parent)
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(file), run_name="__main__")
    assert sys.path[0] == str(ROOT)
    assert "benchmarks.md: is out of date, run python -m benchmarks.report" in capsys.readouterr().err
