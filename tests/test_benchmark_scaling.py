"""``python -m benchmarks.scaling`` on sizes that take no time."""

import json
import re
import time

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import AXES, SIZES, Point, Run, fit, main, measure, once
from bupo.cost import Work, pass_flops

CPU = torch.device("cpu")
HEAD = ("linear_logprobs, forward", "linear_logprobs, forward+backward", "linear_policy_loss, forward+backward")


@pytest.fixture(autouse=True)
def _no_rates(monkeypatch):
    monkeypatch.setattr(scaling, "rates", lambda device: {"copy_gb_per_s": 1.0})  # seconds of products


def run(folder, *arguments):
    code = main(["--device", "cpu", "--tiny", "--rounds", "2", "--commit", "abc", "--out", str(folder), *arguments])
    return code, [json.loads(path.read_text(encoding="utf-8"))["scaling"] for path in folder.glob("*.json")]


def run_of(call=lambda: (torch.zeros(2),), **changes):
    return Run(**{"name": "it", "flops": 1.0, "call": call, "expected": lambda: torch.zeros(2), "tolerance": 0.1} | changes)


def test_every_axis_is_measured_fitted_and_written(tmp_path, capsys):
    code, (section,) = run(tmp_path)
    assert code == 0
    assert section["machine"]["commit"] == "abc"
    assert section["rates"] == {"copy_gb_per_s": 1.0}
    rows = section["rows"]
    assert [(row["axis"], row["contender"]) for row in rows] == [
        *((axis, name) for axis in AXES[:-1] for name in HEAD),
        ("layer", "policy_loss, forward+backward"),
    ]
    for row in rows:
        values, fixed = SIZES["tiny"][row["axis"]]
        assert set(row) == {"axis", "contender", "dtype", "fixed", "points", "fit"}
        assert row["dtype"] == "bfloat16"
        assert row["fixed"] == fixed
        assert tuple(point["value"] for point in row["points"]) == values
        for point in row["points"]:
            assert len(point["ms_of_rounds"]) == 2
            assert min(point["ms_of_rounds"]) <= point["ms"] <= max(point["ms_of_rounds"])
        assert row["fit"] == fit([p["flops"] for p in row["points"]], [p["ms"] for p in row["points"]])
    printed = capsys.readouterr().out.strip().splitlines()
    for axis in AXES:
        assert sum(line.startswith(f"{axis}; ") for line in printed) == 1
    for row in rows:
        assert sum(line.startswith(f"{row['contender']} ") for line in printed) == (1 if row["axis"] == "layer" else 4)
    assert printed[-1].startswith(f"written to {tmp_path}")


def test_flops_are_those_of_the_active_rows_and_of_the_layers_that_run(tmp_path, monkeypatch):
    _, (section,) = run(tmp_path, "--axes", "active", "vocab", "layer")
    of = {(row["axis"], row["contender"]): [point["flops"] for point in row["points"]] for row in section["rows"]}
    product = 2 * 517 * 64
    assert of["active", HEAD[0]] == [rows * product for rows in (8, 16, 32)]
    assert of["vocab", HEAD[0]] == [2 * 16 * vocab * 64 for vocab in (259, 517, 1031)]
    for axis in ("active", "vocab"):
        for both in HEAD[1:]:  # three products, or four where one is taken twice
            assert {total / one for total, one in zip(of[axis, both], of[axis, HEAD[0]], strict=True)} in ({3.0}, {4.0})

    asked = []
    monkeypatch.setattr(scaling, "pass_flops", lambda *a, **k: asked.append((a, k)) or pass_flops(*a, **k))
    values, fixed = SIZES["tiny"]["layer"]
    list(scaling.layer_points(values, fixed, CPU, "float32"))
    assert [named["layer"] for _, named in asked] == list(values)
    assert {given[1] for given, _ in asked} == {Work(tokens=16, pairs=2 * 36, head_rows=16)}
    flops = of["layer", "policy_loss, forward+backward"]
    assert flops == [pass_flops(*given, **named).hardware for given, named in asked]


def test_a_line_is_fitted_exactly():
    flops = [1e9, 3e9, 4e9, 8e12]
    found = fit(flops, [0.25 + x / 2e12 * 1e3 for x in flops])
    assert found == pytest.approx({"fixed_ms": 0.25, "tflops": 2.0, "r2": 1.0}, rel=1e-9)


def test_a_fit_is_of_least_squares():
    found = fit([1e9, 2e9, 3e9], [1.0, 3.0, 2.0])  # slope 1/2, through the means (2, 2)
    assert found == pytest.approx({"fixed_ms": 1.0, "tflops": 2.0, "r2": 0.25})


def test_a_cost_that_does_not_grow_has_no_rate():
    assert fit([1e9, 2e9, 3e9], [3.0, 2.0, 1.0])["tflops"] is None


def test_points_take_turns_on_new_inputs_and_the_first_round_does_not_count():
    seen = []

    def point(value):
        runs = [run_of(lambda n=n: (seen.append((value, n)) or torch.zeros(2),), name=n) for n in ("a", "b")]
        return Point(value, lambda: seen.append((value, "new")), runs)

    points = [point(1), point(2)]
    measure(points, CPU, 3, time.monotonic() + 3600)
    one_round = [(value, what) for value in (1, 2) for what in ("new", "a", "b")]
    assert seen == 4 * one_round
    assert all(len(run.ms) == 3 for p in points for run in p.runs)


def test_one_round_counts_when_there_is_no_time(tmp_path):
    _, (section,) = run(tmp_path, "--axes", "rows", "--minutes", "0")
    assert {len(point["ms_of_rounds"]) for row in section["rows"] for point in row["points"]} == {1}


@pytest.mark.parametrize("wrong", [1.0, float("nan"), float("inf")])
def test_a_wrong_result_is_noticed(wrong):
    once(run_of(lambda: (torch.zeros(2), torch.ones(3))), CPU)
    with pytest.raises(RuntimeError, match="it: off by"):
        once(run_of(lambda: (torch.tensor([0.0, wrong]),)), CPU)
    if wrong != 1:
        with pytest.raises(RuntimeError, match="it: a gradient is not finite"):
            once(run_of(lambda: (torch.zeros(2), torch.ones(3), torch.tensor([1.0, wrong]))), CPU)


@pytest.mark.parametrize("axis", AXES)
def test_what_is_expected_of_a_contender_is_not_met_by_unwritten_results(axis):
    values, fixed = SIZES["tiny"][axis]
    make = scaling.layer_points if axis == "layer" else lambda *rest: scaling.head_points(axis, *rest)
    for point in make(values, fixed, CPU, "float32"):
        point.refresh()
        for run in point.runs:
            assert (torch.zeros(()) - run.expected()).abs().max() > run.tolerance


def test_an_axis_that_fails_is_told_and_the_others_are_written(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(scaling, "layer_points", fail)
    code, (section,) = run(tmp_path, "--axes", "layer", "width")
    assert code == 1
    assert {row["axis"] for row in section["rows"]} == {"width"}
    assert "benchmarks.scaling: layer: OutOfMemoryError: no more" in capsys.readouterr().err
    code, sections = run(tmp_path / "other", "--axes", "layer")
    assert (code, sections) == (1, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--axes", "rows", "depth"], r"--axes: invalid choice: 'depth'.*'?rows'?, '?vocab'?, '?width'?, '?active'?, '?layer'?"),
        (["--rounds", "0"], "--rounds: 0 given, accepted are 1 and more"),
        (["--dtype", "int8"], r"--dtype: invalid choice: 'int8'.*bfloat16"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *arguments)
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())
    assert re.search(message, capsys.readouterr().err)
