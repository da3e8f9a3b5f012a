"""The words in which a call is put to a backend, and :class:`Backend`, the contract under which it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import Coefficients, Statistics, of_active_rows, of_all_rows
from bupo_kernels.backends.gradients import GradientTile, bytes_of_sum, product_dtype
from bupo_kernels.backends.machine import Gpu, Seconds, Shape


class TooSmall(ValueError):
    """A memory budget in which a backend cannot run so many rows."""


@dataclass(frozen=True)
class Readout:
    """The way from a product to a logit: ``z = softcap(logit_scale · (h·W_j + b_j)) / temperature``."""

    temperature: float | Tensor  # a number, or [...] in the shape of the targets
    logit_scale: float
    softcap: float | None

    def rows(self, index: tuple[Tensor, ...], dtype: torch.dtype) -> Readout:
        """Return the readout of some of the rows, its ``temperature`` a column [n, 1]."""
        if not isinstance(self.temperature, Tensor):
            return self
        return Readout(self.temperature[index].to(dtype).unsqueeze(1), self.logit_scale, self.softcap)

    @property
    def is_identity(self) -> bool:
        """Whether, bias and softcap apart, the logits are the products themselves."""
        return not isinstance(self.temperature, Tensor) and self.logit_scale == self.temperature


class Operands(NamedTuple):
    """The tensors of a call, and how its products are read."""

    hidden: Tensor  # [..., D], any view
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V], contiguous
    targets: Tensor  # [...] int64
    readout: Readout

    def coordinates(self, rows: Tensor) -> tuple[Tensor, ...]:  # [n] -> [n] for each leading dimension
        """Return where ``rows``, which number the leading dimensions of ``hidden`` through, lie in each of them."""
        coordinates = []
        for size in reversed(self.targets.shape[1:]):  # torch.unravel_index would copy the shape to the device, and wait
            coordinates.append(rows % size)
            rows = rows // size
        return (rows, *reversed(coordinates))


def is_aligned(matrix: Tensor) -> bool:  # [..., D]
    """Tell whether rows are contiguous and begin on multiples of 16 bytes of the memory that ``matrix`` is a view of."""
    unit = 16 // matrix.element_size()
    return matrix.stride(-1) == 1 and all(start % unit == 0 for start in (matrix.storage_offset(), *matrix.stride()[:-1]))


@dataclass(frozen=True)
class Problem:
    """The facts that a plan depends on. Sizes are in elements, ``memory_budget`` is in bytes."""

    rows: int  # token positions of the call
    active_rows: int  # those that are not masked out
    vocab: int
    width: int  # D, the size of a hidden vector
    dtype: torch.dtype  # of the operands of the products
    device: torch.device
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool
    softcap: bool
    memory_budget: int
    quantised: bool = False  # whether the rows of the weight are dequantised, a slice at a time
    gpu: Gpu | None = None  # to plan for as if it were ``device``, with all backends installed; None for the device that is there
    aligned: bool = True  # whether the rows of the weight are contiguous, and begin on multiples of 16 bytes
    sharded: bool = False  # whether other ranks have other columns of the vocabulary, of which ``vocab`` are here

    @property
    def statistics_dtype(self) -> torch.dtype:
        """The dtype of statistics and sums: fp32, and float64 for float64 operands."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the operands of a library's product, and of the dz that it takes."""
        return product_dtype(self.dtype, self.device) if self.gpu is None else self.dtype

    @property
    def shape(self) -> Shape:
        """The sizes of the logits of the rows that count."""
        return Shape(self.active_rows, self.vocab, self.width, self.dtype.itemsize)

    @property
    def needs_grad(self) -> bool:
        return self.grad_hidden or self.grad_weight or self.grad_bias

    @property
    def planned_rows(self) -> int:
        """The rows that memory is planned for. Off the CPU a call must not wait for the device to tell how many are active."""
        return self.active_rows if self.device.type == "cpu" else self.rows

    def require_budget(self, least: int) -> None:
        """Raise :class:`TooSmall` where the memory budget is below ``least`` bytes."""
        if least > self.memory_budget:
            raise TooSmall(f"memory_budget: {self.memory_budget} bytes given, accepted are at least {least} for this many rows")


class Exchange(Protocol):
    """The columns that this rank has of the vocabulary of several, and how it comes by what the others have."""

    @property
    def first(self) -> int:
        """The id of the first column of this rank."""
        ...

    @property
    def vocab(self) -> int:
        """The number of columns of all ranks."""
        ...

    @property
    def sizes(self) -> list[int]:
        """How many columns each rank has."""
        ...

    def gathered(self, part: Tensor) -> Tensor:  # [k, n] -> [ranks, k, n]
        """Return what each rank has in the place of ``part``, in the order of the ranks."""
        ...


class Tile(NamedTuple):
    """The size of the largest piece of the logits that is formed at once."""

    rows: int
    columns: int


def bytes_of_sums(problem: Problem, tile: Tile, chunk_rows: int = 0) -> tuple[int, int]:
    """Return the bytes that the sums of dH and of dW move where products come in such tiles, and of so many rows at a time: a slice
    is a pass over the sum of dH, and a block of rows one over that of dW."""
    rows, dtype = problem.active_rows, problem.product_dtype
    chunk = min(chunk_rows or rows, rows) or 1
    slices = -(-problem.vocab // tile.columns)
    blocks = rows // chunk * -(-chunk // tile.rows) + -(-(rows % chunk) // tile.rows)
    of_hidden = bytes_of_sum(rows * problem.width, slices, dtype) * problem.grad_hidden
    return of_hidden, bytes_of_sum(problem.vocab * problem.width, blocks, dtype) * problem.grad_weight


class Memory(NamedTuple):
    """The bytes a call needs beyond its inputs, its outputs and their gradients."""

    forward: int  # working memory of the forward
    backward: int  # working memory of the backward
    accumulator: int  # the fp32 twin of dH (of dW, in a one-pass loss of several chunks), where it cannot be summed in place

    @property
    def working(self) -> int:
        return max(self.forward, self.backward)

    def beside(self, kept: int) -> Memory:
        """Return the bytes of a call that has this beside so many that are kept from the forward to the backward."""
        return Memory(self.forward + kept, self.backward + kept, self.accumulator)


class TilePlan(NamedTuple):
    """The plan of a backend for a problem: in what tiles it runs, what it keeps, and in how much memory."""

    problem: Problem
    strategy: str
    tile: Tile  # of the gradient, and in the tile loop of the forward too
    memory: Memory
    cached_rows: int = 0  # rows that leave a cache, so that the backward need not form their product again
    kernels: tuple[str, ...] = ()  # configurations, to be printed
    chunk_rows: int = 0  # of a one-pass loss: rows whose logits, or E, are at hand together
    isa: str = ""  # instruction set of the native CPU kernels
    fused_rows: bool = False  # of a one-pass loss: whether one kernel takes whole rows from products to loss and dz
    in_place: bool = False  # of a one-pass loss: whether dz of a chunk is written over its cache, so that dH is one product

    @property
    def bytes_of_sums(self) -> tuple[int, int]:
        """The bytes that the sums of dH and dW move on a GPU, where the library adds products in memory."""
        tile = Tile(self.chunk_rows, self.problem.vocab) if self.in_place else self.tile
        return bytes_of_sums(self.problem, tile, self.chunk_rows)


class Cache(NamedTuple):
    """The memory that a forward leaves of some rows, so that the backward has their dz without their product; [0] where it leaves
    nothing.

    ``triton`` leaves ``E = 2^(z·log2 e − k)`` in bf16, [rows, columns], and its integer exponents k in int32, one per row and
    column block. The packed panels of a CPU leave products in blocks (csrc/cpu/kernels.h, ``Kept``), and offsets [rows, 0]. The
    tile loop leaves logits less the maximum of their row in their slice, slice after slice [rows · V] (row after row where dz is
    written over them), and these maxima [rows, slices], in the dtype of the statistics.
    """

    values: Tensor
    offsets: Tensor

    @property
    def is_empty(self) -> bool:
        return self.offsets.shape[0] == 0

    def count(self, rows: Tensor | None) -> int:  # [n]
        """Return how many of ``rows``, numbered in ascending order as the cache is, are in it: they are the first. This waits for
        the device."""
        return 0 if rows is None else int((rows < self.offsets.shape[0]).sum())


def row_blocks(count: int, cached: int, step: int) -> list[slice]:
    """Return blocks of at most ``step`` of ``count`` rows, none with rows on both sides of the first ``cached``."""
    parts = (0, cached), (cached, count)
    return [slice(i, min(i + step, end)) for start, end in parts for i in range(start, end, step)]


class PolicyRows(NamedTuple):
    """The results, for n rows, of a kernel that takes whole rows from products to a policy loss."""

    loss: Tensor  # [n], times the weight of the row
    logprob: Tensor  # [n]
    entropy: Tensor  # [n]
    has_gradient: Tensor | None  # [k]: which of the rows; None where no gradient is wanted
    tiles: Iterator[GradientTile] | None  # of the dz of these k


def is_captured(device: torch.device) -> bool:
    """Return whether what runs on ``device`` becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Candidate(ABC):
    """An implementation that ``dispatch.py`` can choose for a problem."""

    strategies: ClassVar[tuple[str, ...]]  # accepted in backend="name:strategy"
    reads_quantised: ClassVar[bool] = False  # whether it takes a weight slice by slice, through quantised.rows_of

    @abstractmethod
    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        """Return the reason this backend cannot run ``problem``, or None. It does not depend on the number of rows."""

    def why_not_default(self, problem: Problem) -> str | None:
        """Return the reason ``backend="auto"`` passes this backend over although it could run ``problem``, or None."""
        return None

    def predicted_forward(self, problem: Problem, gpu: Gpu) -> float | None:
        """Return the seconds that statistics of the active rows are expected to take on ``gpu``, without a cache; None where there
        is no such expectation."""
        return None

    def predicted(self, plan: TilePlan, gpu: Gpu) -> Seconds | None:
        """Return the time that ``plan`` is expected to take on ``gpu``, from counts and its rates; None where there is no such
        expectation."""
        return None

    def gradient_dtype(self, problem: Problem) -> torch.dtype:
        """Return the dtype dz is held in. For fp16 the coefficients are scaled so that it does not underflow."""
        return problem.statistics_dtype


class Backend(Candidate):
    """An implementation of the ops, importable everywhere. ``dispatch.py`` asks whether it can run a problem, and with what plan;
    ``engine.py`` then has it stream statistics and tiles of dz. Its methods hold no state: plans and caches are the caller's.

    ``rows`` [n] number the leading dimensions of ``operands.hidden`` through, in ascending order but for a plan that is
    ``in_place``, where they have ``gradients.in_place_order``.
    """

    @abstractmethod
    def plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        """Plan statistics, and gradients in a backward. Raise :class:`TooSmall` where the budget does not hold the smallest
        tile."""

    @abstractmethod
    def one_pass_plan(self, problem: Problem, strategy: str | None) -> TilePlan:
        """Plan a loss whose gradients are taken in the forward, ``chunk_rows`` at a time. Raise as :meth:`plan` does."""

    def cached_rows(self, problem: Problem, strategy: str | None) -> int:
        """Return how many rows (the first that are active) :meth:`statistics` leaves a cache of."""
        return 0

    def empty_cache(self, problem: Problem, rows: int) -> Cache:
        """Return uninitialised memory for the cache of so many ``rows``, also while torch traces; [0]s for none."""
        nothing = torch.empty(0, dtype=problem.statistics_dtype, device=problem.device)
        return Cache(nothing, nothing.clone())

    def statistics(
        self,
        operands: Operands,
        active: Tensor,  # [N] bool
        plan: TilePlan,
        with_entropy: bool,
    ) -> tuple[Statistics, Cache]:
        """Return the :class:`Statistics` of all rows, and the cache of the first ``plan.cached_rows`` that are active.

        This one waits for the device to say which rows are active, but where a CUDA graph is captured, which nothing may wait in:
        there it takes all of them.
        """
        if is_captured(active.device):
            everything = torch.arange(len(active), dtype=torch.int64, device=active.device)
            part, cache = self.row_statistics(operands, everything, plan, with_entropy=with_entropy, keep=False)
            return of_active_rows(part, active), cache
        rows = active.nonzero().squeeze(1)
        part, cache = self.row_statistics(operands, rows, plan, with_entropy=with_entropy, keep=plan.cached_rows > 0)
        return of_all_rows(part, rows, len(active)), cache

    @abstractmethod
    def row_statistics(
        self,
        operands: Operands,
        rows: Tensor,  # [n]
        plan: TilePlan,
        *,
        with_entropy: bool,
        keep: bool,
    ) -> tuple[Statistics, Cache]:
        """Return the :class:`Statistics` of ``rows`` and, to ``keep``, the cache of all of them."""

    @abstractmethod
    def gradient_tiles(
        self,
        operands: Operands,
        rows: Tensor,  # [n]
        coefficients: Coefficients,  # [n] each, of dz
        plan: TilePlan,
        cache: Cache,
        cache_rows: Tensor | None,  # [n]: where each row would be in the cache; None where that is empty
    ) -> Iterator[GradientTile]:
        """Yield dz of ``rows``, tile by tile; each is overwritten by the next. In a one-pass loss the cache may be, too."""

    def policy_rows(
        self,
        operands: Operands,
        rows: Tensor,  # [n]
        objective: object,  # a PolicyObjective over tokens, read by field name
        inputs: Mapping[str, Tensor | None],  # [n] each
        plan: TilePlan,
    ) -> PolicyRows:
        """Take ``rows`` from products to loss and dz in one kernel. Asked only of a backend whose plans have ``fused_rows``."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel from products to a policy loss")
