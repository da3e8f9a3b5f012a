"""The Triton kernels against the oracle, path by path: what a call of another size, GPU or budget would take. Without a GPU they
run in Triton's interpreter, where each path is chosen by naming a GPU that has it."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    OPTIONS,
    Case,
    assert_stored_gradients,
    assert_values,
    case_with,
    covering,
    device_of,
    examples,
    gradients,
    leaves,
    random_case,
)

from bupo_kernels import explain, linear_logprobs, reference
from bupo_kernels.backends import triton_
from bupo_kernels.backends.base import Operands, Readout
from bupo_kernels.backends.triton_ import config

pytest.importorskip("triton")

DEVICE = device_of("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTH = 64  # rows of whole, aligned blocks: what TMA takes
SPECIALISED = config.Target("cuda", 100, 3, triton=(3, 6), proven=("bfloat16", "float16"))
# sm_120 takes the tiles and the loads of the first.
PATHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_100, warp-specialised": SPECIALISED}


@contextmanager
def running_as(arch, tiles=()):
    """A GPU of that architecture, or a target, with 3 processors: several work items for each program."""
    with pytest.MonkeyPatch.context() as patch:
        if config.interpreted():
            patch.setattr(triton_, "target_of", lambda device: target_of(arch, tiles))
        yield


def target_of(arch, tiles=()):
    return replace(arch, tiles=tiles) if isinstance(arch, config.Target) else config.Target("cuda", arch, 3, tiles=tiles)


def check(case, backend="triton", *, memory_budget=None, upstream=None):
    """Values and gradients of all three statistics, and the plan."""
    options = {**case.options, "backend": backend, "memory_budget": memory_budget}
    plan = explain(case.hidden, case.weight, case.targets, **options)
    ours = linear_logprobs(case.hidden, case.weight, case.targets, **options)
    assert_values(ours, case)
    if upstream is None:
        upstream = [torch.randn(len(case.targets)).to(DEVICE) for _ in ours]
    got = gradients(sum((g * x).sum() for g, x in zip(upstream, ours, strict=True) if g is not None), *leaves(case))
    assert_stored_gradients(got, case, upstream, backend)
    return plan, got


def runs(backend, dtype, options):
    return backend != "triton:cached" or config.why_not_cached(dtype, "softcap" in options) is None


EVERY_PATH = [
    (arch, backend, dtype, option)
    for arch in PATHS.values()
    for backend in ("triton", "triton:cached")
    for dtype in (BF16, FP16, FP32)
    for option in ("plain", "temperature per row", "everything")
    if runs(backend, dtype, OPTIONS[option]) and (dtype == BF16 or target_of(arch).uses_tma)
]


@pytest.mark.parametrize("case", covering(EVERY_PATH), ids=str)
def test_every_option_on_rows_that_need_no_masks(case):
    arch, backend, dtype, options = *case[:3], OPTIONS[case[3]]
    # 264 columns are two splits, the last of 8; sm_90 and sm_100 read and write through TMA.
    with running_as(arch):
        check(case_with(options, 23, 264, WIDTH, dtype=dtype, device=DEVICE, scale=3.0), backend)


@examples(15)
@given(data=st.data(), arch=st.sampled_from(list(PATHS.values())), dtype=st.sampled_from([BF16, FP16, FP32]))
def test_any_shape_option_path_and_budget(data, arch, dtype):
    backend = data.draw(st.sampled_from(["triton"] + ["triton:cached"] * (dtype != FP32)))
    options = OPTIONS[data.draw(st.sampled_from([name for name, options in OPTIONS.items() if runs(backend, dtype, options)]))]
    rows, vocab = data.draw(st.sampled_from([(300, 200), (150, 700), (20, 1500), (3, 3000)]))
    rows, vocab = data.draw(st.integers(1, rows)), data.draw(st.integers(1, vocab))
    width = data.draw(st.one_of(st.integers(1, 100), st.just(WIDTH)))
    scale, seed = data.draw(st.sampled_from([1e-3, 1.0, 30.0])), data.draw(st.integers(0, 2**16))
    budget = data.draw(st.sampled_from([None, 2**21]))
    with running_as(arch):
        check(
            case_with(options, rows, vocab, width, dtype=dtype, device=DEVICE, scale=scale, seed=seed),
            backend,
            memory_budget=budget,
        )


@pytest.mark.parametrize(("arch", "dtype"), covering([*product(PATHS, (BF16, FP32))], 1, unpacked=True), ids=str)
def test_a_small_budget_cuts_the_backward_into_slices_and_blocks_of_rows(arch, dtype):
    case = random_case(270, 700, WIDTH, dtype=dtype, device=DEVICE)
    with running_as(PATHS[arch]):
        plan, _ = check(case, memory_budget=300 * 1024)
    assert 1 < plan.tile_plan.tile.rows < 270
    assert plan.tile_plan.tile.columns < 700


# Widths, and how rows of H and W lie: what the kernels then read of each.
LAYOUTS = {
    "odd width": (77, lambda x: x),
    "whole units of 16 bytes": (72, lambda x: x),
    "transposed": (WIDTH, lambda x: x.T.contiguous().T),
    "odd stride": (WIDTH, lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1]),
    "odd start": (WIDTH, lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)),
}


# Every path with both widths, and every other layout, which are copied alike, on two of them.
LAID_OUT = [(arch, layout, dtype) for arch in PATHS for layout in list(LAYOUTS)[:2] for dtype in (BF16, FP32)]
LAID_OUT += [(arch, layout, BF16) for arch in ("sm_80", "sm_90") for layout in list(LAYOUTS)[2:]]


@pytest.mark.parametrize(("arch", "layout", "dtype"), covering(LAID_OUT, 1, unpacked=True), ids=str)
def test_operands_that_cannot_be_read_in_place_are_copied_in_pieces(arch, layout, dtype, monkeypatch):
    arch, (width, lay) = PATHS[arch], LAYOUTS[layout]
    case = random_case(270, 1100, width, dtype=dtype, device=DEVICE)
    case.hidden, case.weight = (lay(x.detach()).requires_grad_() for x in (case.hidden, case.weight))
    case.options = {"mask": torch.arange(270, device=DEVICE) % 90 != 1}
    pieces = []

    def noted(weight, columns, width):
        piece = weight_slice(weight, columns, width)
        pieces.append((columns, piece.values.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()))
        return piece

    weight_slice = triton_.weight_slice
    monkeypatch.setattr(triton_, "weight_slice", noted)
    with running_as(arch):
        plan, _ = check(case, memory_budget=500 * 1024)
    in_place = layout == "whole units of 16 bytes" and (target_of(arch).uses_tma or not config.interpreted())
    assert {copied for _, copied in pieces} == {not in_place}
    # The forward takes two chunks of rows, each through all pieces of W.
    of_chunk = next(i for i, (columns, _) in enumerate(pieces) if columns.stop == 1100) + 1
    assert [columns for columns, _ in pieces[:of_chunk]] == [columns for columns, _ in pieces[of_chunk : 2 * of_chunk]]
    assert (of_chunk == 1) == in_place
    assert ("weight read in place" in plan.tile_plan.kernels[-1]) == in_place
    assert "hidden gathered 256 rows at a time" in plan.tile_plan.kernels[-1]


@pytest.mark.parametrize("backend", ["triton", "triton:cached"])
def test_no_row_depends_on_the_chunk_that_it_is_gathered_in(backend):
    case = random_case(300, 520, 77, dtype=BF16, device=DEVICE)
    with torch.no_grad():  # products of whole numbers are exact; those of NumPy else depend on where a row lies
        for x in (case.hidden, case.weight):
            x.copy_((2 * x).round())
    mask = torch.arange(300, device=DEVICE) % 7 != 1
    for budget in (2**20, 2**30):
        options = {"backend": backend, "memory_budget": budget, "temperature": 16.0}
        out = linear_logprobs(case.hidden, case.weight, case.targets, mask=mask, **options)
        alone = linear_logprobs(case.hidden[290:], case.weight, case.targets[290:], mask=mask[290:], **options)
        assert all(torch.equal(a, b[290:]) for a, b in zip(alone, out, strict=True))


@pytest.mark.parametrize(("arch", "masked"), [(80, True), (90, False)], ids=["sm_80, masked rows", "sm_90"])
def test_rows_past_the_cache_are_recomputed(arch, masked):
    case = random_case(300, 520, WIDTH, dtype=BF16, device=DEVICE)
    if masked:
        case.options = {"mask": torch.arange(300, device=DEVICE) % 8 != 1}
    with running_as(arch):
        plan, _ = check(case, "triton:cached", memory_budget=800 * 1024)
    assert plan.tile_plan.strategy == "cached and recompute"
    assert 0 < plan.tile_plan.cached_rows < 300 * 7 // 8  # past it even with the masked rows gone


@pytest.mark.parametrize(
    ("backend", "kept"),
    covering([*product(("triton", "triton:cached"), ("first", "last", "scattered", "one", "none"))], 1, unpacked=True),
)
def test_dropped_rows_get_exactly_nothing_and_shift_no_other(backend, kept):
    rows = {"first": slice(0, 40), "last": slice(150, 190), "scattered": slice(1, 190, 3), "one": slice(47, 48), "none": slice(0)}
    case = random_case(190, 300, 20, dtype=BF16, device=DEVICE)
    case.targets[45:60:3] = -100
    weights = torch.zeros(190, device=DEVICE)
    weights[rows[kept]] = torch.rand(190)[rows[kept]].to(DEVICE) + 0.5
    budget = 300 * 1024  # of the cached rows, too, some are kept, some dropped and some recomputed
    _, got = check(case, backend, memory_budget=budget, upstream=[weights, None, -weights])
    assert (got[0][weights == 0] == 0).all()
    assert got[1].any() == (kept != "none")


@pytest.mark.parametrize("backend", ["triton", "triton:cached"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_operand_changes_no_other_gradient(backend, frozen):
    case = random_case(40, 300, WIDTH, dtype=BF16, device=DEVICE)
    getattr(case, frozen).requires_grad_(False)
    _, got = check(case, backend)
    assert len(got) == 1


@pytest.mark.parametrize("arch", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("offset", [500.0, -500.0])
def test_the_cache_keeps_its_accuracy_far_from_zero(arch, offset):
    # E has an integer exponent of its own for each row and block: a common offset is none of its mantissa's business.
    case = random_case(9, 520, WIDTH, dtype=BF16, device=DEVICE)
    case.options = {"bias": torch.full((520,), offset, device=DEVICE)}
    with running_as(arch):
        check(case, "triton:cached")


@pytest.mark.parametrize(
    ("arch", "logit_scale", "temperature", "others"),
    covering([*product(PATHS, (-1.3, 0.0), (0.7, "rows"), ({"bias": True}, {"softcap": 2.0}))], unpacked=True),
    ids=str,
)
def test_a_scale_that_is_not_positive_finds_the_largest_logit_where_it_is(arch, logit_scale, temperature, others):
    options = {"logit_scale": logit_scale, "temperature": temperature, **others}
    case = case_with(options, 23, 264, WIDTH, dtype=BF16, device=DEVICE, scale=3.0)
    with running_as(PATHS[arch]):
        for backend in ("triton", "triton:cached"):
            if runs(backend, BF16, options):
                check(case, backend)


@pytest.mark.parametrize(
    ("backend", "vocab", "targets"),
    covering(
        [*product(("triton", "triton:cached"), (7, 256, 257, 520, 1050), ("first tile", "last tile", "one row"))], unpacked=True
    ),
)
def test_targets_are_found_wherever_they_are(backend, vocab, targets):
    # Tiles without a target skip the search for it, and all but the last one the end of the vocabulary.
    case = random_case(140, vocab, WIDTH, dtype=BF16, device=DEVICE)
    if targets == "first tile":
        case.targets %= min(vocab, 64)
    elif targets == "last tile":
        case.targets = vocab - 1 - case.targets % (vocab % 64 or 64)
    else:
        case.targets[torch.arange(140, device=DEVICE) != 133] = -100
    with running_as(90):
        check(case, backend)


# Standard deviation of the logits, what all have in common, and what multiplies them.
FAR = [(1.0, 0.0, 1 / 0.7), (8.0, 0.0, 1 / 0.7), (8.0, 200.0, 0.37), (100.0, 0.0, 1.0), (30.0, -3000.0, 1.3), (30.0, 3e6, 1.0)]


@pytest.mark.parametrize(
    ("deviation", "offset", "scale", "sign"), covering([(*far, sign) for far in FAR for sign in (1, -1)], 1, unpacked=True)
)
def test_logits_far_from_zero_keep_the_contract(deviation, offset, scale, sign):
    case = random_case(17, 520, WIDTH, dtype=BF16, device=DEVICE, scale=deviation, logit_scale=sign * scale)
    case.options["bias"] = torch.full((520,), sign * offset, device=DEVICE)
    with running_as(90):
        for backend in ("triton", "triton:cached"):
            if deviation * scale < 35:  # or probabilities are too small for fp32, which the model of gradients does not know
                check(case, backend)
            assert_values(linear_logprobs(case.hidden, case.weight, case.targets, backend=backend, **case.options), case)


@pytest.mark.parametrize("size", [1e10, 1e30, 8e37])
def test_logits_of_any_size_give_finite_gradients(size):
    case = random_case(17, 520, WIDTH, dtype=BF16, device=DEVICE)
    with torch.no_grad():
        case.hidden[:8] *= size
    out = linear_logprobs(case.hidden, case.weight, case.targets, backend="triton")
    assert_values(type(out)(*(x[8:] for x in out)), Case(case.hidden[8:], case.weight, case.targets[8:]))
    assert (out.entropy[:8] == 0).all()
    assert all(x.isfinite().all() for x in gradients(sum(x.sum() for x in out), *leaves(case)))


@pytest.mark.parametrize(("arch", "columns"), [(80, 64), (90, 256)])
def test_measured_tiles_run_in_place_of_the_defaults(arch, columns):
    # What shares an exponent of E follows the forward's tile, and the backward's may be another.
    flags, other = {"softcap": False, "width": WIDTH}, 320 - columns
    tiles = (
        (config.key_of(config.STATISTICS, BF16, cache=False, **flags), config.KernelConfig(64, columns, 32, 4, 2)),
        (config.key_of(config.STATISTICS, BF16, cache=True, **flags), config.KernelConfig(128, columns, 32, 8, 2)),
        (config.key_of(config.GRADIENT, BF16, cache=False, **flags), config.KernelConfig(64, other, 64, 4, 2)),
    )
    for backend, rows, budget in (("triton", 20, None), ("triton:cached", 150, 400 * 1024)):
        case = random_case(rows, 520, WIDTH, dtype=BF16, device=DEVICE)
        with running_as(arch, tiles):
            plan, _ = check(case, backend, memory_budget=budget)
        if config.interpreted():
            assert f"x {columns} x 32" in plan.tile_plan.kernels[0]
            assert f"64 x {other} x 64" in plan.tile_plan.kernels[1]
    assert plan.tile_plan.strategy == "cached and recompute"


def test_targets_of_several_dimensions_and_a_transposed_weight():
    leaf = torch.randn(5, 3, 30, 2).to(DEVICE, BF16).requires_grad_()
    wide = torch.randn(30, 301).to(DEVICE, BF16).requires_grad_()
    hidden, targets = leaf[..., 1].transpose(0, 1), torch.randint(0, 301, (3, 5)).to(DEVICE)
    mask = (torch.arange(15, device=DEVICE) % 3 != 0).view(3, 5)
    out = linear_logprobs(hidden, wide.T, targets, mask=mask, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in (leaf, wide)]
    truth = reference.linear_logprobs(exact[0][..., 1].transpose(0, 1), exact[1].T, targets, mask=mask)
    assert (out.logprobs - truth[0]).abs().max() < 1e-4
    got, want = gradients(out.logprobs.sum(), leaf, wide), gradients(truth[0].sum(), *exact)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 2 * torch.finfo(BF16).eps * b.norm()


@pytest.mark.parametrize("backend", ["triton", "triton:cached"])
def test_warp_specialised_tiles_run_where_they_are_proven_and_nowhere_else(backend):
    flags = {"width": WIDTH, "softcap": False}
    for target, specialised in ((SPECIALISED, True), (replace(SPECIALISED, proven=("float16",)), False)):
        with running_as(target):
            plan = explain(*(torch.zeros(n, WIDTH, dtype=BF16, device=DEVICE) for n in (9, 600)), backend=backend)
        if config.interpreted():
            assert ["warp-specialised" in kernel for kernel in plan.tile_plan.kernels[:1]] == [specialised]
        for cache in (False, True):
            assert config.statistics_config(BF16, target, cache=cache, **flags).specialised == specialised
        assert config.gradient_config(BF16, target, **flags).specialised == specialised


@pytest.mark.parametrize("vocab", [200, 256, 1061])
def test_a_partial_for_each_tile_gives_a_row_the_same_bits_alone_and_among_others(vocab):
    # Products of small integers are exact in any order: numpy's, which multiplies here, depends on the size.
    hidden, weight = (torch.randint(-3, 4, (n, WIDTH), device=DEVICE).to(BF16) / 4 for n in (150, vocab))
    targets = torch.randint(0, vocab, (150,), device=DEVICE)
    with running_as(SPECIALISED):
        many = linear_logprobs(hidden, weight, targets, backend="triton")
        for rows in (slice(0, 150), slice(0, 1), slice(128, 129), slice(3, 140)):
            some = linear_logprobs(hidden[rows], weight, targets[rows], backend="triton")
            for of_some, of_many in zip(some, many, strict=True):
                assert of_some is None or torch.equal(of_some, of_many[rows])


@pytest.mark.parametrize(("arch", "options"), covering([*product(PATHS, ("plain", "everything"))], 1, unpacked=True))
def test_the_largest_logit_survives_splits_and_merge(arch, options):
    from bupo_kernels.backends.triton_.copies import HiddenRows, weight_slice
    from bupo_kernels.backends.triton_.linear_statistics import linear_statistics
    from bupo_kernels.backends.triton_.merge import merge
    from bupo_kernels.backends.triton_.product import Launch

    case = case_with(OPTIONS[options], 150, 1100, WIDTH, dtype=BF16, device=DEVICE)
    bias = case.options.get("bias")
    readout = Readout(case.options.get("temperature", 1.0), case.options.get("logit_scale", 1.0), case.options.get("softcap"))
    with torch.no_grad():
        rows = torch.arange(0, 150, 2, device=DEVICE)
        positions = torch.cat([rows, torch.zeros(75, dtype=torch.int64, device=DEVICE)])
        operands = Operands(
            case.hidden.detach(), case.weight.detach(), None if bias is None else bias.detach(), case.targets, readout
        )
        hidden = HiddenRows(operands, positions, WIDTH, ascending=False)[:]
        target = target_of(PATHS[arch])
        tile = config.statistics_config(BF16, target, width=WIDTH, softcap=readout.softcap is not None)
        launch, splits = Launch(operands, positions, hidden, target), -(-1100 // config.partial_columns(1100, tile))
        count, partials = torch.tensor([75], device=DEVICE), torch.empty(splits, 4, 150, device=DEVICE)
        linear_statistics(launch, weight_slice(operands.weight, slice(0, 1100), WIDTH), count, partials, with_entropy=True)
        statistics = torch.full((4, 150), 7.0, device=DEVICE)
        merge(partials, count, positions, statistics, with_entropy=True)
        plain = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case.options.items() if k != "mask"}
        z = reference.logits(case.hidden.double(), case.weight.double(), **plain)
    assert (statistics[0, rows] - z.amax(1)[rows]).abs().max() < 1e-5
    assert (statistics[:, 1::2] == 7).all()  # rows that do not count are not written
