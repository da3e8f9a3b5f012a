"""Which tiles Triton's kernels run with: what fits the GPU, what was measured for it, and what a file may say of that."""

import itertools
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from bupo_kernels.backends import triton_
from bupo_kernels.backends.base import Problem, Tile
from bupo_kernels.backends.triton_ import config, tiling
from bupo_kernels.backends.triton_.config import GRADIENT, STATISTICS, KernelConfig, Target
from bupo_kernels.selfcheck.records import Record

BF16, FP16, FP32 = DTYPES = torch.bfloat16, torch.float16, torch.float32
TARGETS = [Target("cuda", arch, 132) for arch in (80, 86, 87, 89, 90, 100, 103, 120, 121)] + [Target("hip", 0, 304)]
FLAGS = [dict(zip(("softcap", "cache"), flags, strict=True)) for flags in itertools.product((True, False), repeat=2)]
EVERY = [
    (kernel, dtype, flags)
    for kernel, dtype, flags in itertools.product((STATISTICS, GRADIENT), DTYPES, FLAGS)
    if not flags["cache"] or (kernel == STATISTICS and config.why_not_cached(dtype, flags["softcap"]) is None)
]
KEY = config.key_of(STATISTICS, BF16, softcap=False, cache=False, width=4096)
TILE = KernelConfig(64, 256, 32, 4, 2, group=3)


SHARED = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    110: 49152,
    120: 101376,
    121: 101376,
}


@pytest.mark.parametrize(("arch", "shared"), SHARED.items())
def test_a_target_has_the_shared_memory_of_its_architecture_unless_it_says_otherwise(arch, shared):
    assert Target("cuda", arch, 1).shared == shared
    assert Target("cuda", arch, 1, 65536).shared == 65536
    assert Target("hip", 0, 1).shared == 65536


@pytest.mark.parametrize(("says", "shared"), [({"shared_memory_per_block_optin": 99 * 1024}, 99 * 1024), ({}, 101376)])
def test_a_device_is_asked_for_its_shared_memory(monkeypatch, says, shared):
    properties = SimpleNamespace(major=12, minor=0, multi_processor_count=170, **says)
    monkeypatch.setattr(config, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton_, "_targets", {})
    monkeypatch.setattr(triton_.decision, "tuned", lambda device: Record())
    assert triton_.target_of(torch.device("cuda", 0)) == Target("cuda", 120, 170, shared)


def test_a_device_has_the_tiles_on_record_and_no_others(monkeypatch, caplog):
    monkeypatch.setattr(config, "interpreted", lambda: False)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    key = config.key_of(config.STATISTICS, torch.bfloat16, softcap=False, cache=False, width=4096)
    tile = config.KernelConfig(128, 256, 64, 8, 3)
    for tiles, found in (({key: asdict(tile)}, ((key, tile),)), ({key: {"rows": "many"}}, ())):
        monkeypatch.setattr(triton_, "_targets", {})
        monkeypatch.setattr(triton_.decision, "tuned", lambda device, tiles=tiles: Record(tiles=tiles))
        assert triton_.target_of(torch.device("cuda", 0)).tiles == found
    assert "what `bupo tune` has on record is not taken: tiles:" in caplog.text
    with triton_.with_target(torch.device("cuda", 0), tiles=((key, tile),)):
        assert triton_.target_of(torch.device("cuda", 0)).tiles == ((key, tile),)
    assert triton_.target_of(torch.device("cuda", 0)).tiles == ()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.kind} {target.arch}")
def test_candidates_fit_and_agree_on_what_the_kernels_rely_on(target):
    for kernel, dtype, flags in EVERY:
        found = config.candidates(kernel, dtype, target, **flags)
        assert len(found) == len(set(found)) > 1
        assert config.chosen(kernel, dtype, target, width=4096, **flags) == found[0]
        for tile in found:
            assert config.shared_bytes(kernel, tile, dtype, target, cache=flags["cache"]) <= target.shared
            assert config.COLUMN_UNIT % tile.columns == 0
            assert tile.depth in (16, 32, 64)  # rows that need no mask along D are whole steps of it
            assert config.exponents_per_row(1000) >= config.padded(1000) // tile.columns


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.kind} {target.arch}")
def test_the_backward_recomputes_in_fp32_with_the_depth_of_the_forward(target):
    # The order of the sums depends on it, and so do a logit's last bits.
    for softcap in (False, True):
        of_both = [(kernel, flags) for kernel, dtype, flags in EVERY if dtype == FP32 and flags["softcap"] == softcap]
        tiles = [tile for kernel, flags in of_both for tile in config.candidates(kernel, FP32, target, **flags)]
        assert len({tile.depth for tile in tiles}) == 1
    key = config.key_of(STATISTICS, FP32, softcap=False, cache=False, width=4096)
    deeper = replace(target, tiles=((key, KernelConfig(64, 64, 64, 8, 2)),))
    assert config.statistics_config(FP32, deeper, width=4096, softcap=False) == config.FP32


def test_the_first_that_fits_is_the_default():
    assert config.statistics_config(BF16, Target("cuda", 90, 1), width=64, softcap=False) == config.WIDE
    small = Target("cuda", 90, 1, 101376)
    tile = config.statistics_config(BF16, small, width=64, softcap=False)
    assert tile not in (config.WIDE, config.WIDE_STORED, config.HOPPER)
    assert config.shared_bytes(STATISTICS, tile, BF16, small) <= 101376


@pytest.mark.parametrize("arch", [120, 121])
def test_a_card_with_99_kib_runs_16_bit_products_in_tiles_that_fit(arch):
    target = Target("cuda", arch, 170)
    assert (target.uses_tma, target.matrix_unit) == (False, "mma.sync")
    for cache in (False, True):
        assert config.statistics_config(BF16, target, width=64, softcap=False, cache=cache) == config.AMPERE
    assert config.gradient_config(FP16, target, width=64, softcap=False) == config.AMPERE_GRADIENT


@pytest.mark.parametrize(
    ("arch", "statistics", "keeping_e", "with_softcap", "recompute"),
    [
        (80, "AMPERE", "AMPERE", "AMPERE", "AMPERE_GRADIENT"),
        (90, "WIDE", "WIDE_STORED", "HOPPER", "HOPPER_GRADIENT"),
        (100, "HOPPER", "HOPPER", "BLACKWELL_SOFTCAP", "HOPPER"),
    ],
)
def test_defaults_follow_what_the_matrix_unit_reads(arch, statistics, keeping_e, with_softcap, recompute):
    target, kind = Target("cuda", arch, 1), {"width": 4096}
    for dtype in (BF16, FP16):
        assert config.statistics_config(dtype, target, softcap=False, **kind) == getattr(config, statistics)
        assert config.statistics_config(dtype, target, softcap=False, cache=True, **kind) == getattr(config, keeping_e)
        assert config.statistics_config(dtype, target, softcap=True, **kind) == getattr(config, with_softcap)
        assert config.gradient_config(dtype, target, softcap=False, **kind) == getattr(config, recompute)
        with_softcap_too = config.AMPERE_SOFTCAP_GRADIENT if arch == 80 else config.SMALL
        assert config.gradient_config(dtype, target, softcap=True, **kind) == with_softcap_too
    for softcap in (False, True):
        assert config.statistics_config(FP32, target, softcap=softcap, **kind) == config.FP32
        assert config.gradient_config(FP32, target, softcap=softcap, **kind) == config.FP32


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.kind} {target.arch}")
def test_a_multiprocessor_has_the_shared_memory_for_the_programs_that_a_tile_plans(target):
    for kernel, dtype, flags in EVERY:
        for tile in config.candidates(kernel, dtype, target, **flags):
            of_one = config.shared_bytes(kernel, tile, dtype, target, cache=flags["cache"])
            assert tile.programs == 1 or tile.programs * (of_one + 1024) <= target.shared + 1024
    if target.matrix_unit == "mma.sync":
        gradient = config.gradient_config(BF16, target, width=4096, softcap=False)
        assert (gradient.warps, gradient.programs) == (4, 2)


def test_a_tile_of_more_programs_than_fit_is_not_taken():
    two, three = (KernelConfig(128, 64, 64, 4, 3, programs=programs) for programs in (2, 3))
    for arch, tile in ((80, two), (80, three), (89, two), (89, three)):
        taken = config.statistics_config(BF16, Target("cuda", arch, 1, tiles=((KEY, tile),)), width=4096, softcap=False)
        assert (taken == tile) == ((arch, tile) != (89, three))
    assert str(two) == "128 x 64 x 64, 4 warps, 3 stages, 2 a multiprocessor"


def test_rows_are_read_as_wide_as_they_are_where_tma_fills_in_zeros():
    hopper, ampere = Target("cuda", 90, 1), Target("cuda", 80, 1)
    widths = {(64, BF16): (64, 64), (1000, BF16): (1000, 1024), (1001, BF16): (1024, 1024), (1004, BF16): (1024, 1024)}
    widths |= {(1004, FP32): (1004, 1024), (1, FP16): (64, 64)}
    for (width, dtype), read in widths.items():
        assert tuple(config.read_width(width, dtype, target) for target in (hopper, ampere)) == read


def test_what_is_copied_takes_a_part_of_the_budget_whatever_the_number_of_rows():
    ampere = Target("cuda", 80, 108)
    for rows, width, aligned, budget in itertools.product((1, 300, 10**6), (1, 1000, 4096), (True, False), (2**16, 2**30)):
        problem = Problem(rows, rows, 151936, width, BF16, torch.device("cpu"), True, True, False, False, budget, aligned=aligned)
        read = tiling.reads(problem, ampere)
        assert read == tiling.reads(replace(problem, rows=7, active_rows=7), ampere)
        assert read.copies_weight == (width == 1000 or width == 1 or not aligned)
        assert read.rows % 256 == 0
        assert read.columns % config.split_columns(151936) == 0 or read.columns == 151936
        assert read.rows == 256 or 2 * read.rows * (read.width + width * (read.width != width)) <= budget / 8
        assert read.columns == 1280 or 2 * read.columns * read.width <= budget / 4
        for cached in (0, rows):
            memory = tiling.memory(problem, Tile(rows, 2048), cached, ampere)
            copied = tiling.memory(replace(problem, aligned=True), Tile(rows, 2048), cached, ampere)
            if width == 4096 and not aligned:
                assert memory.forward - copied.forward == 2 * read.columns * 4096
                assert memory.backward - copied.backward == 2 * 2048 * 4096 * (cached == 0)


def test_too_little_shared_memory_is_told():
    target = Target("cuda", 90, 1, 16384)
    reason = "device: 16384 bytes of shared memory a block given"
    assert config.why_not_fitting(BF16, target, False).startswith(reason)
    assert config.why_not_fitting(BF16, Target("cuda", 120, 1), True) is None
    with pytest.raises(ValueError, match=reason):
        config.gradient_config(BF16, target, width=64, softcap=False)


def test_keys_tell_everything_apart_that_a_tile_may_depend_on():
    keys = [
        config.key_of(kernel, dtype, width=width, **flags) for kernel, dtype, flags in EVERY for width in (1536, 1537, 3072, 3073)
    ]
    assert len(set(keys)) == 3 * len(EVERY)
    assert KEY == "linear_statistics, bfloat16, D > 3072"
    assert config.key_of(GRADIENT, FP16, softcap=True, cache=False, width=1) == ("gradient_recompute, float16, softcap, D <= 1536")


def test_a_measured_tile_is_taken_for_what_it_was_measured_for_and_nothing_else():
    target, plain = Target("cuda", 90, 132, tiles=((KEY, TILE),)), Target("cuda", 90, 132)
    assert config.statistics_config(BF16, target, width=4096, softcap=False) == TILE
    assert config.statistics_config(BF16, target, width=3072, softcap=False) == config.WIDE
    for kernel, dtype, flags in EVERY:
        if (kernel, dtype, flags) != (STATISTICS, BF16, {"softcap": False, "cache": False}):
            assert config.chosen(kernel, dtype, target, width=4096, **flags) == config.chosen(
                kernel, dtype, plain, width=4096, **flags
            )


def test_a_measured_tile_that_does_not_fit_is_not_taken():
    target = Target("cuda", 120, 170, tiles=((KEY, KernelConfig(256, 128, 64, 8, 4)),))
    assert config.statistics_config(BF16, target, width=4096, softcap=False) == config.AMPERE


def test_no_more_warps_than_can_share_tensor_memory_are_taken():
    wide = KernelConfig(128, 256, 64, 16, 3)
    hopper, blackwell = (Target("cuda", arch, 132, tiles=((KEY, wide),)) for arch in (90, 100))
    kind = {"softcap": False}
    assert config.statistics_config(BF16, hopper, width=4096, **kind) == wide
    assert config.statistics_config(BF16, blackwell, width=4096, **kind) == config.HOPPER
    assert wide not in config.candidates(STATISTICS, BF16, blackwell, **kind)


def test_tiles_survive_a_file():
    tiles = tuple(sorted([(KEY, TILE), (KEY.replace("bfloat16", "float32"), config.FP32)]))
    assert config.tiles_from(json.loads(json.dumps(config.tiles_to_json(tiles)))) == tiles
    assert config.tiles_from({}) == ()
    for kernel, dtype, flags in EVERY:
        for tile in config.candidates(kernel, dtype, TARGETS[4], **flags):
            table = {config.key_of(kernel, dtype, width=2048, **flags): tile}
            assert config.tiles_from(config.tiles_to_json(tuple(table.items()))) == tuple(table.items())


FINE = config.tiles_to_json(((KEY, TILE),))[KEY]
BAD = {
    "no table": (None, "NoneType given"),
    "a list": ([KEY], "list given"),
    "another key": ({"linear_statistics, bfloat16, N = 7": FINE}, "key 'linear_statistics, bfloat16, N = 7' given"),
    "a key that is no text": ({1: FINE}, "key 1 given"),
    "no tile": ({KEY: [128, 128, 32, 8, 3]}, r"\[128, 128, 32, 8, 3\] given"),
    "a field too few": ({KEY: {name: FINE[name] for name in FINE if name != "group"}}, "accepted is a table of rows, columns"),
    "a field too many": ({KEY: FINE | {"maxnreg": 255}}, "'maxnreg': 255} given"),
    "text": ({KEY: FINE | {"rows": "128"}}, "rows: '128' given, accepted are 64, 128, 256"),
    "a fraction": ({KEY: FINE | {"rows": 128.0}}, "rows: 128.0 given"),
    "a truth": ({KEY: FINE | {"group": True}}, "group: True given"),
    "no power of two": ({KEY: FINE | {"columns": 100}}, "columns: 100 given"),
    "columns that exponents have no room for": ({KEY: FINE | {"columns": 32}}, "columns: 32 given"),
    "columns that no split is a multiple of": ({KEY: FINE | {"columns": 512}}, "columns: 512 given"),
    "a depth that widths are no multiple of": ({KEY: FINE | {"depth": 128}}, "depth: 128 given"),
    "no warps": ({KEY: FINE | {"warps": 0}}, "warps: 0 given"),
    "no stages": ({KEY: FINE | {"stages": 0}}, "stages: 0 given"),
    "no programs": ({KEY: FINE | {"programs": 0}}, "programs: 0 given, accepted are 1, 2, 3, 4"),
}


@pytest.mark.parametrize(("table", "message"), BAD.values(), ids=BAD)
def test_a_file_with_anything_else_is_refused(table, message):
    with pytest.raises(ValueError, match=f"tiles: .*{message}"):
        config.tiles_from(table)


B200 = Target("cuda", 100, 148, triton=(3, 6))
PROVEN = replace(B200, proven=("bfloat16",))


def test_the_warp_specialised_tiles_are_the_default_where_they_are_proven_and_candidates_before():
    for kernel, dtype, flags in EVERY:
        may = dtype in config.SPECIALISED_DTYPES and not flags["softcap"] and (kernel == STATISTICS or not flags["cache"])
        for target in (B200, PROVEN):
            found = config.candidates(kernel, dtype, target, **flags)
            assert any(tile.specialised for tile in found) == may
            assert found[0].specialised == (may and dtype == BF16 and target is PROVEN)
            assert not all(tile.specialised for tile in found)  # what there was stays for `bupo tune`


@pytest.mark.parametrize("triton", [(0, 0), (3, 5), (3, 10)])
def test_a_version_of_triton_that_nobody_has_looked_at_specialises_nothing(triton):
    unknown = replace(PROVEN, triton=triton)
    for kernel, dtype, flags in EVERY:
        assert not any(tile.specialised for tile in config.candidates(kernel, dtype, unknown, **flags))
    key = config.key_of(STATISTICS, BF16, softcap=False, cache=False, width=4096)
    tuned = replace(unknown, tiles=((key, config.SPECIALISED),))
    assert config.statistics_config(BF16, tuned, width=4096, softcap=False) == config.HOPPER


def test_with_e_stored_only_the_triton_that_spills_nothing_specialises():
    for triton, specialised in (((3, 6), True), ((3, 7), False), ((3, 9), False)):
        target = replace(PROVEN, triton=triton)
        assert config.statistics_config(BF16, target, width=64, softcap=False, cache=True).specialised == specialised
        assert config.gradient_config(BF16, target, width=64, softcap=False).specialised


def test_a_measured_tile_that_is_specialised_otherwise_than_it_was_compiled_is_not_taken():
    key = config.key_of(STATISTICS, BF16, softcap=False, cache=False, width=4096)
    for tile, taken in ((replace(config.SPECIALISED, group=4), True), (replace(config.SPECIALISED, rows=256, columns=128), False)):
        tuned = replace(B200, tiles=((key, tile),))
        assert (config.statistics_config(BF16, tuned, width=4096, softcap=False) == tile) == taken


@pytest.mark.parametrize(
    ("version", "found"), [("3.6.0", (3, 6)), ("3.10.1 /opt/ptxas", (3, 10)), ("unknown", (0, 0)), ("", (0, 0))]
)
def test_the_version_of_triton_is_read_from_what_a_card_has(version, found):
    assert config.version_of(version) == found


@pytest.fixture
def blackwell(monkeypatch):
    properties = SimpleNamespace(major=10, minor=0, multi_processor_count=148, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(config, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton_, "_targets", {})
    monkeypatch.setattr(triton_.Card, "of", lambda device: SimpleNamespace(triton_version="3.6.0"))
    monkeypatch.setattr(triton_.decision, "tuned", lambda device: Record())
    return torch.device("cuda", 0)


def test_a_form_that_fails_its_check_leaves_the_other_and_the_verdict_is_asked_for_once(blackwell, monkeypatch):
    asked = []

    def decide(variant, device):
        asked.append(variant.name)
        return SimpleNamespace(passed=variant.dtype == "float16")

    monkeypatch.setattr(triton_.decision, "decide", decide)
    for _ in range(2):
        target = triton_.target_of(blackwell)
        assert target.proven == ("float16",)
    assert asked == ["triton bfloat16 warp-specialised", "triton float16 warp-specialised"]
    assert config.statistics_config(BF16, target, width=64, softcap=False) == config.HOPPER
    assert config.statistics_config(FP16, target, width=64, softcap=False) == config.SPECIALISED


def test_within_the_check_of_a_form_nothing_is_asked_and_nothing_stays(blackwell, monkeypatch):
    monkeypatch.setattr(triton_.decision, "decide", lambda *_: pytest.fail("the check asks for its own verdict"))
    with triton_.with_target(blackwell, proven=("bfloat16",)):
        assert triton_.target_of(blackwell) == replace(PROVEN, processors=148)
    assert triton_._targets == {}


def test_what_is_only_asked_about_is_not_kept(blackwell, monkeypatch):
    monkeypatch.setattr(triton_.decision, "decide", lambda *_: SimpleNamespace(passed=False))
    with triton_.decision.only_records():
        assert triton_.target_of(blackwell).proven == ()
    assert triton_._targets == {}
