"""The benchmark of the lens: what it measures, what it writes, and what the page says of it."""

import json

from benchmarks import lens, report
from benchmarks.records import read_results


def test_every_output_is_measured_over_the_bare_products_and_the_page_has_it(tmp_path, capsys, no_rates):
    assert lens.main(["--device", "cpu", "--models", "tiny", "--rounds", "2", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["lens"]["rows"]
    assert [row["name"] for row in rows] == 2 * [lens.FLOOR, *lens.CALLS]
    assert all(len(row["ms_of_rounds"]) == 2 and row["ms"] > 0 for row in rows)
    floors = {row["dtype"]: row["ms"] for row in rows if row["name"] == lens.FLOOR}
    assert all(row["ratio"] == row["ms"] / floors[row["dtype"]] for row in rows)
    assert "tiny, bfloat16, auto" in capsys.readouterr().out
    page = report.page(read_results(tmp_path))
    assert all(page.count(f"| {name} |") == 2 for name in (lens.FLOOR, *lens.CALLS))
