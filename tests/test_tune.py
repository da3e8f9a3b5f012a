"""``bupo tune`` with the interpreted kernels and times from a script: what wins, what is refused, what is put on record."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from bupo import tune
from bupo.cli import main
from bupo.errors import ConfigError
from bupo_kernels.backends.triton_ import config, target_of
from bupo_kernels.backends.triton_.config import KernelConfig
from bupo_kernels.selfcheck import decision, records
from bupo_kernels.selfcheck.card import Card
from bupo_kernels.selfcheck.records import Verdict

CPU, BF16 = torch.device("cpu"), torch.bfloat16
RIGHT = Verdict(True, "", 0.1, 1.0, 0.0)
SIZES = {"vocab": 100, "rows": 20, "rounds": 3}
DEFAULT, OTHER = KernelConfig(128, 128, 32, 8, 3), KernelConfig(64, 64, 32, 4, 2)
BROKEN = KernelConfig(128, 100, 32, 8, 3)  # tiles are powers of two

pytestmark = pytest.mark.skipif(not config.interpreted(), reason="Triton is not interpreted")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("BUPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decision, "_tuned", {})
    monkeypatch.setattr(config, "candidates", lambda *_, **__: (DEFAULT, OTHER, BROKEN))


@pytest.fixture
def clock(monkeypatch):
    """Let a call take the milliseconds that are set for the tile it runs with, None for what runs without Triton."""
    milliseconds = {DEFAULT: 2.0, OTHER: 1.0, None: 4.0}

    def timed(call, device):
        tiles = [tile for _, tile in target_of(device).tiles]
        return milliseconds[tiles[0] if tiles else None] / 1e3, call()

    monkeypatch.setattr(tune, "timed", timed)
    return milliseconds


def tuned(out=None, **sizes) -> records.Record:
    options = {"device": CPU, "dtypes": [BF16], "widths": [64], "out": out, "commit": "abc"} | SIZES | sizes
    assert tune.tune_command(**options) == 0
    return records.read(Card.of(CPU))


def test_a_tile_that_wins_goes_on_record_for_its_widths_and_any_number_of_rows(clock, tmp_path, capsys):
    records.add(Card.of(CPU), verdicts={"triton bfloat16": RIGHT})
    found = tuned(out=tmp_path / "out")
    keys = [
        config.key_of(kernel, BF16, softcap=False, cache=cache, width=64)
        for kernel, cache in ((config.STATISTICS, False), (config.STATISTICS, True), (config.GRADIENT, False))
    ]
    assert found.tiles == dict.fromkeys(keys, asdict(OTHER))
    assert config.tiles_from(json.loads(json.dumps(found.tiles))) == tuple((key, OTHER) for key in sorted(keys))
    assert found.slower == {}
    assert found.rates == dict.fromkeys(keys, pytest.approx(1e3 * 2 * 20 * 100 * 64))  # FLOP a second, in a millisecond
    assert set(found.verdicts) == {"triton bfloat16"}
    assert target_of(CPU).tiles == ()  # as before: a process keeps what it has

    printed = capsys.readouterr().out
    assert printed.index("64 x 64 x 32, 4 warps, 2 stages, group 8") < printed.index("the default")
    assert "128 x 100 x 32, 8 warps, 3 stages, group 8" in printed
    assert "3 tiles other than the default are on record in " in printed
    (path,) = (tmp_path / "out").glob("*-tune.json")
    ways = json.loads(path.read_text())["tune"]["ways"]
    assert len(ways) == 3 * 4
    assert [way["median"] for way in ways if way["name"].startswith("64")] == [1.0] * 3
    assert all(way["reason"] for way in ways if way["name"].startswith("128 x 100"))


def test_a_gain_within_the_noise_wins_nothing(clock):
    clock[OTHER] = 1.97
    assert tuned().tiles == {}


def test_what_is_slower_than_the_librarys_product_says_so_and_auto_passes_it_over(clock, capsys, monkeypatch):
    clock[None] = 0.5
    found = tuned()
    (key,) = found.slower
    assert key == "triton bfloat16, D <= 1536"
    assert found.slower[key].startswith("slower than the library's product, row kernels here, 0.50 ms against 1.00")
    assert found.slower[key] in capsys.readouterr().out
    monkeypatch.setattr(decision, "_decided", {})
    records.add(Card.of(CPU), verdicts={"triton bfloat16": RIGHT})
    variant = decision.Variant("triton", "bfloat16")
    assert decision.why_not(variant, CPU, config.widths_of(64)) == found.slower[key]
    assert decision.why_not(variant, CPU, config.widths_of(4096)) is None


def test_a_tile_whose_result_is_off_is_refused(clock, monkeypatch):
    right = tune.works

    def wrong(inputs):
        for work in right(inputs):
            call = work.with_triton

            def off(call=call):
                found = call()
                return found + 1 if target_of(CPU).tiles[0][1] == OTHER else found

            yield replace(work, with_triton=off)

    monkeypatch.setattr(tune, "works", wrong)
    assert tuned().tiles == {}


def test_what_was_tuned_before_is_replaced_and_forgotten(clock, capsys):
    key, other = (config.key_of(config.GRADIENT, BF16, softcap=False, cache=False, width=width) for width in (64, 4096))
    tiles = dict.fromkeys((key, other), asdict(DEFAULT))
    slower = {"triton bfloat16, D <= 1536": "x", "triton float16, D <= 1536": "y"}
    records.add(Card.of(CPU), verdicts={"triton bfloat16": RIGHT}, tiles=tiles, slower=slower)
    clock[OTHER] = 2.0
    assert tuned().tiles == {other: asdict(DEFAULT)}
    assert records.read(Card.of(CPU)).slower == {"triton float16, D <= 1536": "y"}
    tune.forget(CPU)
    assert records.read(Card.of(CPU)) == records.Record({"triton bfloat16": RIGHT})
    assert capsys.readouterr().out.endswith("has its default tiles again\n")


def test_where_triton_cannot_run_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(config, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match="--device: cpu given, Triton cannot run there: device: cpu given, accepted is cuda"):
        tuned()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:9"], "--device: 'cuda:9' given, accepted are"),
        (["--rows", "0"], "--rows: 0 given, accepted are 1 and more"),
        (["--width", "64", "-1"], "--width: -1 given, accepted are 1 and more"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
