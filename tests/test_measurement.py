"""Measuring and keeping results: ``bupo.measurement``."""

import json
import math
from pathlib import Path

import pytest
import torch

from bupo import measurement
from bupo.measurement import finite, machine, peak_bytes, rates, results_path, timed, write_section

CPU = torch.device("cpu")
MIB = 2**20


def written(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "new folder" / "device.json"
    write_section(path, "kernels", {"rows": [1]})
    write_section(path, "step", {"rows": [2.5, None]})
    write_section(path, "kernels", {"rows": [3]})
    assert written(path) == {"kernels": {"rows": [3]}, "step": {"rows": [2.5, None]}}


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "device.json"
    write_section(path, "kernels", {"rows": [1]})
    write = Path.write_text

    def half(self, text, **options):
        write(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_section(path, "kernels", {"rows": [2]})
    assert written(path) == {"kernels": {"rows": [1]}}


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "not json"])
def test_what_is_no_file_of_results_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "device.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"device\.json: is no file of results.*accepted are JSON objects"):
        write_section(path, "kernels", {})
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path, number):
    path = tmp_path / "device.json"
    with pytest.raises(ValueError, match="JSON compliant"):
        write_section(path, "kernels", {"rows": [{"ms": number}]})
    assert not list(tmp_path.iterdir())
    write_section(path, "kernels", {"rows": [{"ms": finite(number)}]})
    assert written(path) == {"kernels": {"rows": [{"ms": None}]}}


def test_finite_numbers_stay():
    assert [finite(x) for x in (0.0, -1.5, 3)] == [0.0, -1.5, 3]


AVX512 = ["fma", "avx2", "avx512f", "avx512bw"]


@pytest.mark.parametrize(
    ("device", "threads", "sets", "name"),
    [
        ("NVIDIA H200", None, [], "nvidia-h200.json"),
        ("NVIDIA H100 80GB HBM3", None, [], "nvidia-h100-80gb-hbm3.json"),
        (
            "Intel(R) Xeon(R) Platinum 8481C CPU",
            2,
            ["avx2", "amx_tile", "amx_bf16"],
            "intel-xeon-platinum-8481c-cpu-amx-2-threads.json",
        ),
        ("AMD EPYC", 2, ["fma", "avx2"], "amd-epyc-avx2-2-threads.json"),
        ("AMD EPYC", 2, [*AVX512, "avx512_bf16"], "amd-epyc-avx512-bf16-2-threads.json"),
        ("Intel(R) Core(TM) i7", 8, AVX512, "intel-core-i7-avx512-8-threads.json"),
        ("Neoverse-V1", 4, ["asimd", "asimddp", "sve", "bf16"], "neoverse-v1-neon-bf16-4-threads.json"),
        ("../x86_64", 1, ["DEFAULT"], "x86-64-1-threads.json"),
    ],
)
def test_the_file_is_named_after_the_device_its_best_instruction_set_and_its_threads(device, threads, sets, name):
    about = {"device": device, "threads": threads, "instruction_sets": sets}
    assert results_path(Path("results"), about) == Path("results") / name


def test_every_committed_section_lies_in_the_file_of_its_machine():
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    for path in folder.glob("*.json"):
        if path.stem in ("recorded", "study"):  # kept by hand; one a machine for all its runs
            continue
        for section in json.loads(path.read_text(encoding="utf-8")).values():
            assert results_path(folder, section["machine"]) == path


def test_timed_calls_once_and_hands_on_the_result():
    calls, result = [], object()
    seconds, found = timed(lambda: calls.append(1) or result, CPU)
    assert found is result
    assert calls == [1]
    assert isinstance(seconds, float)


def test_rates_are_of_products_in_each_dtype_and_of_a_copy(monkeypatch):
    calls = []
    monkeypatch.setattr(measurement, "timed", lambda call, device: (calls.append(call) or 0.5, None))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out.zero_())  # which takes seconds
    found = rates(CPU)
    assert found["gemm_tflops"] == dict.fromkeys(("bfloat16", "float32"), 2 * 2048**3 / 0.5 / 1e12)
    assert found["copy_gb_per_s"] == 2 * 4 * 2**25 / 0.5 / 1e9
    assert len(calls) == 3 * 7


def test_peak_bytes_are_those_held_at_once_whether_kept_or_not():
    def call():
        a = torch.empty(2 * MIB, dtype=torch.uint8)
        b = torch.empty(MIB, dtype=torch.uint8)
        del b
        c = torch.empty(3 * MIB, dtype=torch.uint8)
        del a
        return c

    assert peak_bytes(call) == 5 * MIB


def test_peak_bytes_do_not_count_what_was_held_before():
    held = torch.empty(4 * MIB, dtype=torch.uint8)
    assert peak_bytes(lambda: held.add_(1)) < MIB
    assert peak_bytes(lambda: None) == 0


def test_the_machine_says_all_that_numbers_depend_on():
    found = machine(CPU, commit="abc")
    assert set(found) == {
        *("device", "kind", "threads", "instruction_sets", "driver", "cuda", "versions", "commit", "date"),
    }
    assert found["kind"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
    assert found["commit"] == "abc"
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"python", "triton", "liger-kernel", "trl", "verl", "cut-cross-entropy"} < set(found["versions"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
