"""Every number that the Triton kernels run with, as pure functions of the kernel, the dtype and what the GPU has.

``make kernels`` compiles each of these for each target and prints registers, spills, shared memory and the matrix instruction; the
tests hold that nothing spills and all of it fits. No configuration here has been timed on a GPU yet: the defaults follow from the
cost model below, and ``candidates`` has what else may be faster on a given card.

A tile of rows x columns does rows · columns / (rows + columns) FLOP for each byte it pulls from L2 in 16 bit: 85 for 128 x 256,
51 for 256 x 64, 64 for 128 x 128. A Hopper at 700 TFLOP/s needs about 100 FLOP per byte from an L2 of 7 TB/s, so the widest tile
is taken whose epilogue fits the 255 registers of a thread (docs/gpu-kernels.md). A product in fp32 is three products
in TF32, and bound by arithmetic.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from dataclasses import asdict, dataclass, fields, replace

import torch


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def shared_memory(kind: str, arch: int) -> int:
    """Return the bytes of shared memory that a block may ask for, by compute capability x 10; 48 KiB where it is not known."""
    if kind == "hip":
        return 65536
    if arch in (86, 89) or arch // 10 == 12:
        return 101376
    if arch in (80, 87):
        return 166912
    return 232448 if arch // 10 in (9, 10) else 49152


RESERVED = 1024  # bytes of shared memory that CUDA takes for each block
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class KernelConfig:
    """The tile of a kernel, and how its program runs."""

    rows: int  # BLOCK_N
    columns: int  # BLOCK_V
    depth: int  # BLOCK_D
    warps: int
    stages: int
    group: int = 8  # row blocks that visit columns of W one after the other, while these are in L2
    programs: int = 1  # of a multiprocessor at a time: while one is in its epilogue, another multiplies
    # Whether loads and products have warps of their own beside those of the epilogue, which then runs during the next products; the
    # statistics leave a partial for each tile, since nothing may be carried from one to the next.
    specialised: bool = False

    def __str__(self) -> str:
        size = f"{self.rows} x {self.columns} x {self.depth}, {self.warps} warps, {self.stages} stages"
        of_several = f", {self.programs} a multiprocessor" if self.programs > 1 else ""
        return size + of_several + ", warp-specialised" * self.specialised


@dataclass(frozen=True)
class Target:
    """The GPU that a kernel is compiled for, as far as configurations depend on it.

    A process has one for each device and never another: the backward reads E in the blocks that the forward wrote.
    """

    kind: str  # "cuda" or "hip"
    arch: int  # compute capability x 10, or 0 for hip
    processors: int  # multiprocessors, each of which runs the persistent programs that a tile plans
    shared: int = 0  # bytes of shared memory that a block may ask for; 0 stands for those of the architecture
    tiles: tuple[tuple[str, KernelConfig], ...] = ()  # (key_of(…), the fastest that was measured for it)
    triton: tuple[int, int] = (0, 0)  # the version that compiles, major and minor; (0, 0) stands for one that nobody has looked at
    proven: tuple[str, ...] = ()  # dtypes whose warp-specialised kernels have passed the self-check on the card

    def __post_init__(self) -> None:
        if self.shared == 0:
            object.__setattr__(self, "shared", shared_memory(self.kind, self.arch))

    @property
    def shared_of_processor(self) -> int:
        """The bytes of shared memory of a multiprocessor, of which a block takes RESERVED beside what it asks for."""
        return self.shared + RESERVED

    @property
    def matrix_unit(self) -> str:
        """The family of instructions that products compile to."""
        if self.kind == "hip":
            return "mfma"
        return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(self.arch // 10, "mma.sync")

    @property
    def uses_tma(self) -> bool:
        """Whether the matrix unit takes its operands from shared memory, where TMA brings them.

        Elsewhere they pass through registers and come by asynchronous copies, on 12.x too: from what TMA leaves there, Triton's
        loop has twice the instructions (docs/gpu-kernels.md).
        """
        return self.matrix_unit in ("wgmma", "tcgen05")


STATISTICS, GRADIENT = "linear_statistics", "gradient_recompute"  # the kernels with a product

FP32 = KernelConfig(128, 64, 32, 8, 3)
FP32_SMALL = KernelConfig(64, 64, 32, 8, 3)
FP32_SHALLOW = KernelConfig(64, 64, 16, 8, 3)  # on 12.x with all options, what addresses of a depth of 32 take is spilled
SMALL = KernelConfig(128, 64, 64, 8, 3)  # epilogues with many live values for each logit
AMPERE = KernelConfig(128, 128, 32, 8, 3)
AMPERE_GRADIENT = KernelConfig(128, 128, 32, 4, 3, programs=2)
AMPERE_SOFTCAP_GRADIENT = KernelConfig(128, 64, 64, 4, 3, programs=2)
SHALLOW = KernelConfig(128, 64, 32, 8, 3)  # the same on 12.x, where 4 warps spill with Triton 3.9
HOPPER = KernelConfig(128, 128, 64, 8, 4)  # on Blackwell too, where kernels are not warp-specialised: wider ones spill with 3.9
WIDE = KernelConfig(128, 256, 64, 8, 4)
WIDE_STORED = KernelConfig(128, 256, 64, 8, 3)  # E lies beside the operands
HOPPER_GRADIENT = KernelConfig(256, 128, 64, 8, 3)  # and so does dz
SPECIALISED = KernelConfig(128, 256, 64, 8, 4, specialised=True)
SPECIALISED_STORED = replace(SPECIALISED, stages=3)  # E, or dz, lies beside the operands
BLACKWELL_SOFTCAP = KernelConfig(128, 64, 64, 4, 3, programs=2)
SMALLEST = KernelConfig(64, 64, 32, 4, 2)

# The versions of Triton that compile a kernel warp-specialised, with nothing spilled (docs/gpu-kernels.md), by whether E is stored.
SPECIALISED_BY = {
    (STATISTICS, False): ((3, 6), (3, 7), (3, 8), (3, 9)),
    (STATISTICS, True): ((3, 6),),
    (GRADIENT, False): ((3, 6), (3, 7), (3, 8), (3, 9)),
}
SPECIALISED_DTYPES = (torch.bfloat16, torch.float16)
SPECIALISED_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in SPECIALISED_DTYPES)  # as Target.proven has them


def version_of(triton: str) -> tuple[int, int]:
    """Return what ``Target.triton`` has of a version like "3.6.0"."""
    found = re.match(r"(\d+)\.(\d+)", triton)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def specialises(kernel: str, dtype: torch.dtype, target: Target, *, softcap: bool, cache: bool = False) -> bool:
    """Tell whether a kernel can be warp-specialised: where accumulators lie in tensor memory, apart from the registers of the
    epilogue. With a softcap the gradient would spill."""
    if target.arch // 10 != 10 or dtype not in SPECIALISED_DTYPES or softcap:
        return False
    return target.triton in SPECIALISED_BY.get((kernel, cache), ())


# In order of what may be measured first.
OTHERS_FP32: tuple[KernelConfig, ...] = (
    FP32,
    FP32_SMALL,
    KernelConfig(64, 128, 32, 8, 3),
    KernelConfig(64, 64, 32, 4, 3),
    SMALLEST,
)
OTHERS_FROM_SHARED: tuple[KernelConfig, ...] = (
    SPECIALISED,
    SPECIALISED_STORED,
    HOPPER,
    KernelConfig(128, 128, 64, 8, 3),
    WIDE,
    WIDE_STORED,
    KernelConfig(128, 256, 32, 8, 6),
    KernelConfig(128, 256, 64, 16, 3),
    KernelConfig(256, 128, 64, 8, 4),
    HOPPER_GRADIENT,
    KernelConfig(256, 128, 32, 8, 6),
    KernelConfig(256, 64, 64, 8, 4),
    BLACKWELL_SOFTCAP,
    SMALL,
    AMPERE,
    SMALLEST,
)
OTHERS_FROM_REGISTERS: tuple[KernelConfig, ...] = (
    AMPERE,
    KernelConfig(128, 128, 32, 8, 4),
    KernelConfig(128, 128, 64, 8, 3),
    KernelConfig(128, 256, 32, 8, 3),
    KernelConfig(256, 128, 32, 8, 3),
    AMPERE_GRADIENT,
    AMPERE_SOFTCAP_GRADIENT,
    KernelConfig(128, 64, 64, 4, 3, programs=2),
    KernelConfig(128, 64, 32, 4, 4, programs=2),
    KernelConfig(64, 128, 32, 4, 4, programs=2),
    SMALL,
    SMALLEST,
)


def shared_bytes(kernel: str, tile: KernelConfig, dtype: torch.dtype, target: Target, *, cache: bool = False) -> int:
    """Return a bound of the shared memory that a block of ``kernel`` asks for, after what Triton 3.6 allocates.

    A step of D has a buffer for each stage where the matrix unit reads shared memory, and for each but one where the operands pass
    through registers. So do those that are split for three TF32 products, and both parts of W's then need room of their own.
    Barriers take 16 bytes a stage; what is warp-specialised has more of them, and keeps its reductions apart. The tile that is
    stored lies beside the buffers for TMA, and where they were for pointers.
    """
    item, pipelined = dtype.itemsize, max(tile.stages - 1, 1)
    step = (tile.rows + tile.columns) * tile.depth * item
    operands = pipelined * step
    if target.uses_tma and dtype == torch.float32:
        operands = max(tile.stages * step, operands + 2 * tile.columns * tile.depth * item)  # one TF32 product; three
    elif target.uses_tma:
        operands = tile.stages * step
    operands += 16 * tile.stages + tile.specialised * (8 * tile.rows + 64)
    stored = tile.rows * tile.columns * (item if kernel == GRADIENT else 2 if cache else 0)
    return operands + stored if target.uses_tma else max(operands, stored)


def _default(kernel: str, dtype: torch.dtype, target: Target, *, softcap: bool, cache: bool) -> KernelConfig:
    """Return the configuration that is preferred where it fits."""
    if specialises(kernel, dtype, target, softcap=softcap, cache=cache) and str(dtype).removeprefix("torch.") in target.proven:
        return SPECIALISED if kernel == STATISTICS and not cache else SPECIALISED_STORED
    statistics, tensor_memory = kernel == STATISTICS, target.matrix_unit == "tcgen05"
    if dtype == torch.float32:
        return FP32_SHALLOW if softcap and target.arch // 10 == 12 else FP32
    if target.matrix_unit == "mma.sync" and not statistics:
        if softcap:
            return SHALLOW if target.arch // 10 == 12 else AMPERE_SOFTCAP_GRADIENT
        return AMPERE_GRADIENT
    if softcap and not statistics:
        return SMALL
    if not target.uses_tma:
        return AMPERE
    if softcap:
        return BLACKWELL_SOFTCAP if tensor_memory else HOPPER
    if tensor_memory:
        return HOPPER
    if statistics and not cache:
        return WIDE
    return WIDE_STORED if statistics else HOPPER_GRADIENT


@functools.cache
def candidates(kernel: str, dtype: torch.dtype, target: Target, *, softcap: bool, cache: bool = False) -> tuple[KernelConfig, ...]:
    """Return the configurations of ``kernel`` that ``target`` has the shared memory for, the default first; () where none fits."""
    preferred = _default(kernel, dtype, target, softcap=softcap, cache=cache)
    if dtype == torch.float32:
        others = OTHERS_FP32
    else:
        others = OTHERS_FROM_SHARED if target.uses_tma else OTHERS_FROM_REGISTERS
    groups = tuple(replace(preferred, group=group) for group in (4, 16))
    every = dict.fromkeys((preferred, *others, *groups))
    return tuple(tile for tile in every if _serves(tile, kernel, dtype, target, preferred.depth, softcap=softcap, cache=cache))


def _serves(tile: KernelConfig, kernel: str, dtype: torch.dtype, target: Target, depth: int, *, softcap: bool, cache: bool) -> bool:
    """Tell whether a tile fits the target, and sums along D in the order that all tiles for the dtype do.

    In 16 bit all do that whose instruction is the same, as it takes as many elements of D whatever the tile: 16 warps cannot share
    tensor memory, and would take another. In fp32 three TF32 products are added for each step of D, so that a logit's last bits
    depend on the depth.
    """
    if target.matrix_unit == "tcgen05" and tile.warps > 8:
        return False
    if dtype == torch.float32 and tile.depth != depth:
        return False
    if tile.specialised:
        compiled = replace(tile, stages=SPECIALISED.stages, group=SPECIALISED.group) == SPECIALISED
        if not (compiled and specialises(kernel, dtype, target, softcap=softcap, cache=cache)):
            return False
    shared = shared_bytes(kernel, tile, dtype, target, cache=cache)
    return shared <= target.shared and tile.programs * (shared + RESERVED) <= target.shared_of_processor


def key_of(kernel: str, dtype: torch.dtype, *, softcap: bool, cache: bool, width: int) -> str:
    """Return the name of what a measured tile is for. It must not name the number of rows: no row may depend on the others."""
    flags = ["softcap"] * softcap + ["E stored"] * cache
    return ", ".join([kernel, str(dtype).removeprefix("torch."), *flags, widths_of(width)])


def widths_of(width: int) -> str:
    """Return the name of the widths that have their tiles together with ``width``."""
    return "D <= 1536" if width <= 1536 else "D <= 3072" if width <= 3072 else "D > 3072"


# What a measured tile may have. ``columns`` divide COLUMN_UNIT, and ``depth`` divides WIDTH_UNIT.
ACCEPTED: dict[str, tuple[int, ...] | tuple[bool, ...]] = {
    "rows": (64, 128, 256),
    "columns": (64, 128, 256),
    "depth": (16, 32, 64),
    "warps": (4, 8, 16),
    "stages": tuple(range(1, 9)),
    "group": tuple(range(1, 65)),
    "programs": (1, 2, 3, 4),
    "specialised": (False, True),
}


@functools.cache
def _keys() -> frozenset[str]:
    flags = (False, True)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return frozenset(
        key_of(kernel, dtype, softcap=softcap, cache=cache, width=width)
        for kernel, dtype, softcap, cache, width in itertools.product((STATISTICS, GRADIENT), dtypes, flags, flags, (1, 2000, 4000))
    )


def tiles_to_json(tiles: tuple[tuple[str, KernelConfig], ...]) -> dict[str, dict[str, int | bool]]:
    """Return ``Target.tiles`` as what ``json.dumps`` takes."""
    return {key: asdict(tile) for key, tile in tiles}


def tiles_from(table: object) -> tuple[tuple[str, KernelConfig], ...]:
    """Return the ``Target.tiles`` that ``tiles_to_json`` made the ``table`` of. Raise ``ValueError`` for anything else, since it is
    read from a file."""
    if not isinstance(table, dict):
        raise ValueError(f"tiles: {type(table).__name__} given, accepted is a table of tiles by key")
    tiles = []
    for key, tile in table.items():
        if not isinstance(key, str) or key not in _keys():
            raise ValueError(f"tiles: key {key!r} given, accepted are those of key_of, like {min(_keys())!r}")
        names = [field.name for field in fields(KernelConfig)]
        if not isinstance(tile, dict) or set(tile) != set(names):
            raise ValueError(f"tiles: {key}: {tile!r} given, accepted is a table of {', '.join(names)}")
        for name in names:
            if type(tile[name]) is not type(ACCEPTED[name][0]) or tile[name] not in ACCEPTED[name]:
                accepted = ", ".join(map(str, ACCEPTED[name]))
                raise ValueError(f"tiles: {key}: {name}: {tile[name]!r} given, accepted are {accepted}")
        tiles.append((key, KernelConfig(**tile)))
    return tuple(sorted(tiles, key=lambda item: item[0]))


def chosen(kernel: str, dtype: torch.dtype, target: Target, *, width: int, softcap: bool, cache: bool = False) -> KernelConfig:
    """Return the tile that was measured to be the fastest, where there is one that serves, else the default."""
    fitting = candidates(kernel, dtype, target, softcap=softcap, cache=cache)
    if not fitting:
        raise ValueError(_too_little(target))
    tuned = dict(target.tiles).get(key_of(kernel, dtype, softcap=softcap, cache=cache, width=width))
    serves = tuned and _serves(tuned, kernel, dtype, target, fitting[0].depth, softcap=softcap, cache=cache)
    return tuned if tuned and serves else fitting[0]


def _too_little(target: Target) -> str:
    return f"device: {target.shared} bytes of shared memory a block given, accepted is what the smallest tile takes"


@functools.cache  # every call of an op asks
def why_not_fitting(dtype: torch.dtype, target: Target, softcap: bool) -> str | None:
    """Return the reason why a kernel has no configuration that fits the target, or None."""
    fits = all(candidates(kernel, dtype, target, softcap=softcap) for kernel in (STATISTICS, GRADIENT))
    return None if fits else _too_little(target)


def statistics_config(dtype: torch.dtype, target: Target, *, width: int, softcap: bool, cache: bool = False) -> KernelConfig:
    """Return the configuration of ``linear_statistics_kernel``. It does not depend on the number of rows, nor does any result.

    ``width`` is D; ``cache`` says whether the epilogue also stores E (see ``linear_statistics.py``).
    """
    return chosen(STATISTICS, dtype, target, width=width, softcap=softcap, cache=cache)


def gradient_config(dtype: torch.dtype, target: Target, *, width: int, softcap: bool) -> KernelConfig:
    """Return the configuration of ``gradient_recompute_kernel``."""
    return chosen(GRADIENT, dtype, target, width=width, softcap=softcap)


# Elements: a whole number of steps of any kernel.
WIDTH_UNIT = 64


def read_width(width: int, dtype: torch.dtype, target: Target) -> int:
    """Return the width of the rows that kernels read of H and W, of which all past ``width`` is 0.

    TMA brings zeros from past the end of a row by itself, and only asks that rows begin on multiples of 16 bytes. A copy through
    pointers would need a mask, and none that has one is asynchronous: there rows are a whole number of steps.
    """
    if target.uses_tma and width * dtype.itemsize % 16 == 0:
        return width
    return -(-width // WIDTH_UNIT) * WIDTH_UNIT


def precision(dtype: torch.dtype, target: Target, allow_tf32: bool) -> str:
    """Return the precision of products. In fp32 they are three TF32 products, as exact as fp32 sums, where the GPU has TF32; a
    single one only on request."""
    if dtype != torch.float32:
        return "ieee"
    if target.kind == "hip":
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


# Columns of a vocabulary split are whole blocks of any kernel; slices of the backward too.
COLUMN_UNIT = 256
NARROWEST = min(ACCEPTED["columns"])


def split_columns(vocab: int) -> int:
    """Return the width of a vocabulary split. V alone fixes it: about 128 splits, enough to occupy a GPU with a single block of
    rows, and for many rows still few partials (16 bytes each) against the columns they stand for."""
    return max(COLUMN_UNIT, -(-vocab // (128 * COLUMN_UNIT)) * COLUMN_UNIT)


def partial_columns(vocab: int, tile: KernelConfig) -> int:
    """Return how many columns a partial of the statistics stands for: those of a tile, or of a split."""
    return tile.columns if tile.specialised else split_columns(vocab)


# Below this width E takes more time to write and to read than the product that it saves: 2·V·D FLOP at 700 TFLOP/s and 4 bytes for
# each logit at 4 TB/s break even at D = 350.
CACHE_MIN_WIDTH = 512
CACHE_MIN_ROWS = 4096  # half of the budget must hold as many


def why_not_cached(dtype: torch.dtype, softcap: bool) -> str | None:
    """Return the reason why no row can leave E, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype: {dtype} given, accepted are 16-bit ones (E is kept in bf16)"
    if softcap:
        return "softcap: given, accepted is none (its slope cannot be had from E)"
    return None


def padded(vocab: int) -> int:
    """Return the columns of a row of E: whole blocks of every kernel."""
    return -(-vocab // COLUMN_UNIT) * COLUMN_UNIT


def exponents_per_row(vocab: int) -> int:
    """Return how many exponents a row of E has: one for each column block of the narrowest kernel."""
    return padded(vocab) // NARROWEST


MOST_COLUMNS = 32768  # of a slice in the backward
