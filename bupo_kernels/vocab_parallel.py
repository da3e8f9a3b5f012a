"""Heads whose vocabulary lies on several ranks: what one has of it, and the few numbers of a row that make it whole.

The ranks of a group hold W's rows side by side, in the order of the ranks, and all have the same hidden vectors. Each streams the
statistics of its own columns; what they are of all columns follows from four numbers a row of each rank
(:mod:`bupo_kernels.backends.algebra`), merged in the order of the ranks: bit for bit the same on each of them, and from run to run.
dW and db stay where they are. dH is the sum over the ranks of what each has of it, in the dtype of the sums, and is rounded after.

A rank that cannot go on must not leave the others waiting, and ranks that differ must not take each other's numbers for theirs. So
a call begins with a :class:`Header` from each, and what follows it carries a flag. On a CPU a rank raises what it finds there.
Elsewhere, where that would be a wait for the device, it is a device-side assert.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bupo_kernels.backends.algebra import LEAST_EXPONENT, Statistics, in_order
from bupo_kernels.backends.base import Operands
from bupo_kernels.dispatch import Columns

_COLLECTIVES = torch.ops._c10d_functional  # which take a group by its name

# The facts of a header in which ranks may not differ, and what an error says of each, which is given one for each rank.
SAME = {
    "rows": "hidden: {} rows given",
    "width": "hidden: rows of {} numbers given",
    "active": "mask: {} rows that count given",
    "targets": "targets: ids given whose sums are {}",
    "dtype": "hidden: dtypes given whose digests are {}",
    "options": "group: calls or options given whose digests are {}",
}


class Header(NamedTuple):
    """The facts of a call that a rank tells the others, each an integer."""

    failed: int = 0  # 1 where the rank raises instead
    columns: int = 0
    rows: int = 0
    width: int = 0
    active: int | Tensor = 0
    targets: int | Tensor = 0  # the sum of those that count
    dtype: int = 0
    options: int = 0
    chunk: int = 0  # the most rows that the rank takes at a time

    @staticmethod
    def of(operands: Operands, active: Tensor, call: str, chunk: int = 0) -> Header:  # [...] bool
        """Return the header of a ``call``, in words that are the same on all ranks: its name and its options."""
        hidden, readout = operands.hidden, operands.readout
        by_row = isinstance(readout.temperature, Tensor)
        numbers = "rows" if by_row else readout.temperature, readout.logit_scale, readout.softcap, operands.bias is None
        return Header(
            columns=operands.weight.shape[0],
            rows=active.numel(),
            width=hidden.shape[-1],
            active=active.sum(),
            targets=torch.where(active, operands.targets, 0).sum(),
            dtype=digest(str(hidden.dtype)),
            options=digest(f"{call} {numbers}"),
            chunk=chunk,
        )


def digest(text: str) -> int:
    return zlib.crc32(text.encode())


class Shard(NamedTuple):
    """The columns that this rank has of the vocabulary of a group, for one call."""

    group: str  # its name
    rank: int  # in the group
    headers: Tensor  # [ranks, len(Header)] int64, on the device of the operands

    @staticmethod
    def of(group: str, header: Header, device: torch.device, *, wait: bool = False) -> Shard:
        """Return the shard of this rank. Every rank of the group calls this, once a call.

        Raise ``ValueError`` where ranks differ in what :data:`SAME` has, and ``RuntimeError`` where another raises instead. Off the
        CPU, unless this may ``wait`` for the device, it is a device-side assert.
        """
        headers = tell(group, header, device)
        _check(headers, wait)
        return Shard(group, dist.get_rank(group_named(group)), headers)

    @property
    def sizes(self) -> Tensor:  # [ranks] int64
        """How many columns each rank has."""
        return self.headers[:, Header._fields.index("columns")]

    @property
    def start(self) -> Tensor:  # []
        """The id of the first column of this rank."""
        return self.sizes[: self.rank].sum()

    @property
    def vocab(self) -> Tensor:  # []
        """The number of columns of all ranks."""
        return self.sizes.sum()

    @property
    def chunk(self) -> Tensor:  # []
        """The most rows that every rank takes at a time."""
        return self.headers[:, Header._fields.index("chunk")].amin()

    def columns(self) -> Columns:
        """Return what a plan says of them; it waits for the device."""
        sizes: list[int] = self.sizes.tolist()
        return Columns(sum(sizes[: self.rank]), sizes[self.rank], sum(sizes), len(sizes))

    def local(self, operands: Operands) -> Operands:
        """Return the operands with targets that count from this rank's first column, −1 for those that are on another rank."""
        ids = operands.targets - self.start
        inside = (ids >= 0) & (ids < operands.weight.shape[0])
        return operands._replace(targets=torch.where(inside, ids, -1))

    def gathered(self, part: Tensor) -> Tensor:  # [k, n] -> [ranks, k, n]
        """Return what each rank has in the place of ``part``. A rank that raises within :meth:`telling` takes part in this."""
        received = self._gathered(part.shape, part.dtype, part)
        failed = received[:, -1] != 0
        if not is_at_hand(part):
            torch._assert_async(~failed.any(), RAISED.format("another"))
        elif failed.any():
            raise RuntimeError(RAISED.format(failed.nonzero()[0].item()))
        return received[:, :-1].view(len(received), *part.shape)

    @contextmanager
    def telling(self, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[None]:
        """Take the part of this rank in the :meth:`gathered` of the others, of a tensor of such ``shape`` and ``dtype``, where what
        is within raises; and raise it then."""
        try:
            yield
        except Exception:
            self.tell_failure(shape, dtype)
            raise

    def tell_failure(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Take the part of this rank, which raises, in the :meth:`gathered` of the others."""
        self._gathered(shape, dtype, None)

    def _gathered(self, shape: tuple[int, ...], dtype: torch.dtype, part: Tensor | None) -> Tensor:  # -> [ranks, k · n + 1]
        sent = torch.zeros(shape[0] * shape[1] + 1, dtype=dtype, device=self.headers.device)
        if part is None:
            sent[-1:].fill_(1)
        else:
            sent[:-1].view(shape).copy_(part)
        return _all_gathered(self.group, sent)

    def merged(self, part: Statistics) -> Statistics:  # [n] each
        """Return the statistics of all columns of rows that are active, from those of this rank's."""
        m, s, t, z_y = self.gathered(torch.stack(list(part))).unbind(1)  # [ranks, n] each
        largest = m.amax(0)
        below = (m - largest).clamp_(min=LEAST_EXPONENT)
        scale = below.exp()
        # A target is a column of one rank, and 0 on all others.
        return Statistics(largest, in_order(scale * s), in_order(scale * (t + below * s)), in_order(z_y))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise what is raised within, and where another rank raises in the same place. All ranks of the group come by it, for a
        header of each ends it."""
        with telling(self.group, self.headers.device):
            yield
        _check(tell(self.group, Header(), self.headers.device), wait=False)

    def start_sum(self, total: Tensor) -> None:
        """Begin to make ``total`` its sum over the ranks. It is that after :meth:`wait_for`."""
        _COLLECTIVES.all_reduce_(total, "sum", self.group)

    def wait_for(self, total: Tensor) -> None:
        """Have what follows, on the device where it is one, wait for a sum that was begun."""
        _COLLECTIVES.wait_tensor(total)


class Exchanges:
    """The exchanges of a call that has several, one after the other. All ranks know their ``shapes`` beforehand: what raises within
    this context on one of them takes that rank's part in the next one, where the others raise too."""

    def __init__(self, shard: Shard, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]) -> None:
        self._shard, self._dtype, self._shapes = shard, dtype, iter(shapes)
        self._told = False  # whether the others know that this rank raises, or it raises since one of them does
        self.sizes: list[int] = shard.sizes.tolist()
        self.first, self.vocab = sum(self.sizes[: shard.rank]), sum(self.sizes)

    def gathered(self, part: Tensor) -> Tensor:  # [k, n] -> [ranks, k, n]
        """Return what each rank has in the place of ``part``, in the order of the ranks."""
        self._next(part.shape)
        found = self._shard.gathered(part)
        self._told = False
        return found

    def sum_(self, total: Tensor) -> None:  # [n, D]
        """Make ``total`` its sum over the ranks, where none of them raises. It has the place of an exchange of shape (0, 0)."""
        self._next((0, 0))
        self._shard.gathered(total.new_empty(0, 0))
        self._shard.start_sum(total)
        self._shard.wait_for(total)
        self._told = False

    def _next(self, shape: Sequence[int]) -> None:
        expected = next(self._shapes, None)
        if expected != tuple(shape):
            raise RuntimeError(f"group: an exchange of shape {tuple(shape)}, expected on all ranks is {expected}")
        self._told = True

    def __enter__(self) -> Exchanges:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and not self._told:
            shape = next(self._shapes, None)
            if shape is not None:
                self._shard.tell_failure(shape, self._dtype)


RAISED = "group: rank {} raises an error, so this call has no result here either; what it is, that rank says"


def tell(group: str, header: Header, device: torch.device) -> Tensor:
    """Return the headers of all ranks [ranks, len(Header)], which all give theirs."""
    mine = torch.zeros(len(header), dtype=torch.int64, device=device)
    for i, fact in enumerate(header):  # a tensor made of the facts would be copied to the device, and wait
        if isinstance(fact, Tensor):
            mine[i].copy_(fact)
        elif fact:
            mine[i].fill_(fact)
    return _all_gathered(group, mine)


def _check(headers: Tensor, wait: bool) -> None:
    """Raise where a rank has raised, or ranks differ in what they may not differ in."""
    of = {name: headers[:, i] for i, name in enumerate(Header._fields)}
    if not wait and not is_at_hand(headers):
        same = torch.stack([of[name] == of[name][0] for name in SAME]).all()
        torch._assert_async(same & (of["failed"] == 0).all(), "group: a rank raises, or the ranks differ in shapes or options")
        return
    if failed := of["failed"].nonzero().flatten().tolist():
        raise RuntimeError(RAISED.format(failed[0]))
    for name, what in SAME.items():
        given = of[name].tolist()
        if len(set(given)) > 1:
            raise ValueError(f"{what.format(', '.join(map(str, given)))} on the ranks of the group, accepted is the same on all")


def is_at_hand(x: Tensor) -> bool:
    """Tell whether to look at ``x`` would not be to wait for a device."""
    return x.device.type == "cpu"


def _all_gathered(group: str, part: Tensor) -> Tensor:  # [k] -> [ranks, k]
    ranks = dist.get_world_size(group_named(group))
    return _COLLECTIVES.wait_tensor(_COLLECTIVES.all_gather_into_tensor(part, ranks, group)).view(ranks, *part.shape)


def ranks_of(group: str) -> int:
    """Return how many ranks the group of that name has."""
    return dist.get_world_size(group_named(group))


def group_named(name: str) -> Any:
    """Return the process group of that name. A call has its name, for graphs that are traced hold no group."""
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def name_of(group: Any, weight: Any) -> str:
    """Return the name of the group that a caller means. Raise unless it is a group that this rank is in, or a dimension of the mesh
    that ``weight`` is sharded over."""
    mesh: Any = getattr(weight, "device_mesh", None)
    if isinstance(group, str):
        names = () if mesh is None else mesh.mesh_dim_names or ()
        if group not in names:
            accepted = "a ProcessGroup" if mesh is None else f"a ProcessGroup, or one of the mesh's dimensions {names}"
            raise ValueError(f"group: {group!r} given, accepted is {accepted}")
        group = mesh.get_group(group)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: {type(group).__name__} given, accepted is a ProcessGroup that this rank is in")
    return str(group.group_name)


_TELLING: ContextVar[str | None] = ContextVar("telling", default=None)


@contextmanager
def telling(group: str | None, device: Any) -> Iterator[None]:
    """Tell the ranks that wait for a :class:`Header` of this one where what is within, before it, raises; and raise it then. Of one
    within another the outer one tells. While torch traces there is nobody to tell, nor without a group. The ``device`` may be that
    of a tensor."""
    if group is None or torch.compiler.is_compiling() or _TELLING.get() == group:
        yield
        return
    outside = _TELLING.set(group)
    try:
        yield
    except Exception:
        device = getattr(device, "device", device)
        tell(group, Header(failed=1), device if isinstance(device, torch.device) else torch.device("cpu"))
        raise
    finally:
        _TELLING.reset(outside)


def group_of(options: dict[str, Any], weight: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the name of the group among the ``options`` of a call, None for none, and the options with that group itself. Raise as
    :func:`name_of` does."""
    group = options.get("group")
    if group is None:
        return None, options
    name = name_of(group, weight)
    return name, options | {"group": group_named(name)} if isinstance(group, str) else options


def shard_of(name: str, parameter: Any, group: str) -> Any:
    """Return the columns that this rank has of a ``DTensor``. It stays sharded over the dimension of its mesh that the group is,
    and is gathered over the others, along which ranks have rows of their own: its gradient is averaged over those."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, placements = parameter.device_mesh, parameter.placements
    own = [mesh.get_group(dimension).group_name == group for dimension in range(mesh.ndim)]
    found = [placement for placement, is_own in zip(placements, own, strict=True) if is_own]
    if found != [Shard(0)]:
        given = f"a DTensor of {found[0]!r}" if found else "a DTensor on a mesh without such a dimension"
        raise TypeError(f"{name}: {given} given, accepted with this group is Shard(dim=0) over its ranks")
    whole = [Shard(0) if is_own else Replicate() for is_own in own]
    averaged = [Shard(0) if is_own else Partial("avg") for is_own in own]
    return parameter.redistribute(placements=whole).to_local(grad_placements=averaged)
