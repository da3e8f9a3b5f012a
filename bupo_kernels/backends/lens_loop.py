"""The logit lens: statistics of several policies that share an unembedding, streamed over slices of the vocabulary.

A tile holds the logits of P policies (the layers, and last the final policy where one is compared with) on the same few tokens, so
W is read once for all of them, and what compares two policies is at hand together. Of each policy's logits z the first pass keeps
``m = max z``, ``s = Σ e^(z−m)`` and, of pairs (l, k), ``c_lk = Σ e^(z^l−m^l) (z^k − m^k)``. From these

* entropy ``ln s_l − c_ll / s_l``
* ``KL(π^l ‖ π^k) = (c_ll − c_lk) / s_l − ln s_l + ln s_k``

Of columns that several ranks have, each with maxima m_r and sums of its own, those of all are

* ``m = max m_r`` and, with ``a_r = e^(m_r−m)``, ``s = Σ_r a_r s_r``
* ``c_lk = Σ_r a_r^l (c_r,lk + (m_r^k − m^k) s_r^l)``, since ``z^k − m^k = (z^k − m_r^k) + (m_r^k − m^k)``; with k = l that is
  the t of ``algebra.py``

``c`` of all pairs takes P/D of the work of the logits themselves. What needs the target's logit, or the normalised policies,
beforehand (the rank; Jensen and Shannon's mixture) takes a second pass over the tiles: over those of the first one, where the row
kernels leave logits and the budget has room for all tiles of enough rows, else over products that are formed again.

What is done to the rows of a tile is a matter of :class:`LensRows`: ``torch_lens.py``, ``native_lens.py``, ``triton_/lens.py``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends import algebra
from bupo_kernels.backends.algebra import Statistics, in_order
from bupo_kernels.backends.base import Candidate, Exchange, Operands, Readout, Tile
from bupo_kernels.backends.compiled import present
from bupo_kernels.backends.cpu_arguments import PANEL
from bupo_kernels.backends.gradients import accumulate_, product_dtype
from bupo_kernels.backends.quantised import is_plain, rows_of
from bupo_kernels.backends.tile_loop import CPU_TILE, DEVICE_TILE, SMALL_TILE

COMPARED = ("kl_to_final", "kl_from_final", "jsd")  # with the final policy
SECOND_PASS = ("rank", "jsd")
KEPT_ROWS = 256  # of products at least, for which W is read once: with fewer, to form products twice is no slower


class LensTile(NamedTuple):
    """The products, or logits, of P policies on r tokens and c columns."""

    columns: slice
    tokens: slice
    z: Tensor  # [P, r, c], contiguous
    scratch: Tensor | None  # as much memory, where the row kernels need it; overwritten by the next tile
    formed: bool  # whether z are logits, which a fold left, and not products
    bias: Tensor | None  # [c]
    readout: Readout  # of these tokens
    targets: Tensor  # [r] int64


class Running(NamedTuple):
    """The results of P policies on r tokens as tiles are folded into them, None where nobody asks."""

    statistics: Statistics  # [P, r] each
    argmax: Tensor | None  # [P, r] int64
    cross: Tensor | None  # [r, P, P]: c of the pairs, −inf where the first gives probability to what the second rules out
    pairs: bool  # whether `cross` is of all pairs, and not of those with the last policy alone
    ruled_out: Tensor | None  # [r, P, P]: Σ e^(z^l−m^l) where z^k is −inf, kept for `cross` by row kernels that multiply matrices
    top_z: Tensor  # [P, r, k]
    top_ids: Tensor  # [P, r, k] int64

    def at(self, tokens: slice) -> Running:
        """Return the results of some of the tokens."""
        statistics = Statistics(*(x[:, tokens] for x in self.statistics))
        argmax = None if self.argmax is None else self.argmax[:, tokens]
        cross, ruled_out = (None if x is None else x[tokens] for x in (self.cross, self.ruled_out))
        return Running(statistics, argmax, cross, self.pairs, ruled_out, self.top_z[:, tokens], self.top_ids[:, tokens])


class Comparison(NamedTuple):
    """The results of the second pass on r tokens, None where nobody asks."""

    rank: Tensor | None  # [P, r] int64
    jsd: Tensor | None  # [P, r], of which the last policy's has no meaning


class LensRows(Candidate):
    """The two kernels that work on the rows of a lens's tiles. Methods hold no state."""

    multiplies: ClassVar[bool] = False  # whether `cross` is a product of matrices, which does not take 0 · −inf for 0

    def keeps(self, pairs: bool) -> bool:
        """Return whether a fold leaves logits in its tile, from which the second pass can be taken."""
        return False

    def packs(self, dtype: torch.dtype, strategy: str | None) -> bool:
        """Return whether operands of ``dtype`` are multiplied by kernels of its own, which pack them: with :meth:`pack_hidden`,
        :meth:`pack_weight` and :meth:`multiply`."""
        return False

    def pack_hidden(self, hidden: Tensor, strategy: str | None) -> Tensor:  # [n, D] -> [words]
        """Return the hidden vectors as :meth:`multiply` takes them: of at most 2 bytes an element, with n rounded up to 32."""
        raise NotImplementedError(f"{type(self).__name__} has no product of its own")

    def pack_weight(self, weight: Tensor, strategy: str | None) -> Tensor:  # [c, D] -> [words]
        """Return rows of the weight as :meth:`multiply` takes them: of at most 2 bytes an element, with c rounded up to 32."""
        raise NotImplementedError(f"{type(self).__name__} has no product of its own")

    def multiply(self, out: Tensor, hidden: Tensor, weight: Tensor, width: int, strategy: str | None) -> None:  # [n, c]
        """Write the fp32 products of what :meth:`pack_hidden` and :meth:`pack_weight` gave."""
        raise NotImplementedError(f"{type(self).__name__} has no product of its own")

    def workspace_bytes(self, strategy: str | None) -> int:
        """Return the bytes that :meth:`multiply` allocates beside its result."""
        return 0

    def needs_scratch(self, pairs: bool) -> bool:
        """Return whether tiles need scratch memory, where ``pairs`` says whether all pairs are compared."""
        return True

    @abstractmethod
    def fold(self, tile: LensTile, running: Running, with_entropy: bool, strategy: str | None) -> None:
        """Fold a tile into the ``running`` results of its tokens. The top k so far are the first of the k places, in any order."""

    @abstractmethod
    def compare(
        self,
        tile: LensTile,
        statistics: Statistics,  # [P, r] each
        log_s: Tensor,  # [P, r]
        found: Comparison,
        strategy: str | None,
    ) -> None:
        """Add to rank and jsd what follows from a tile."""


def checked_norm(norm: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """Return ``norm``, or the identity for None, as a function that raises ``ValueError`` where the shape does not stay."""

    def normed(rows: Tensor) -> Tensor:  # [n, D]
        found = rows if norm is None else norm(rows)
        if not isinstance(found, Tensor) or found.shape != rows.shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"norm: gives {given} for {tuple(rows.shape)}, accepted are functions that keep the shape")
        return found

    return normed


class LensLoop:
    """The statistics of the L policies of ``states``, and of that of ``final`` where it is not None, on rows of ``operands``.

    ``operands.hidden`` lends its shape and dtype; ``norm`` is applied to rows of ``states`` as they are used. ``ranks`` says how
    many there are where each has some of the columns. At most ``rows`` may
    be asked for at a time: fewer than ``count`` where the budget does not hold what all of them need.
    """

    def __init__(
        self,
        states: Sequence[Tensor],  # L x [..., D]
        final: Tensor | None,  # [..., D]
        norm: Callable[[Tensor], Tensor] | None,
        operands: Operands,
        count: int,
        outputs: Sequence[str],
        top_k: int,
        memory_budget: int,
        kernels: LensRows,
        strategy: str | None,
        ranks: int = 0,
    ) -> None:
        self.states, self.norm, self.operands, self.outputs, self.top_k = states, checked_norm(norm), operands, outputs, top_k
        self.kernels, self.strategy, self.ranks = kernels, strategy, ranks
        self.final = final if set(outputs) & set(COMPARED) else None
        self.policies = len(states) + (self.final is not None)
        self.pairs = "pairwise_kl" in outputs
        self.compares = self.pairs or bool(set(outputs) & {"kl_to_final", "kl_from_final"})
        self.rules_out = operands.bias is not None and bool((operands.bias == -math.inf).any())
        self.dtype = torch.promote_types(operands.hidden.dtype, torch.float32)
        self.product_dtype = product_dtype(operands.hidden.dtype, operands.hidden.device)
        self.packs = kernels.packs(operands.hidden.dtype, strategy)
        workspace = kernels.workspace_bytes(strategy) if self.packs else 0
        if 8 * workspace > memory_budget:
            self.packs, workspace = False, 0
        self.rows, self.tile, self.keeps = self._plan(count, memory_budget - workspace)
        # Panels of few rows are mostly padding, for which no memory is planned.
        self.packs = self.packs and min(self.tile.rows * self.policies, self.tile.columns) >= SMALL_TILE

    def _plan(self, count: int, memory_budget: int) -> tuple[int, Tile, bool]:
        """Return how many rows there may be at a time, the tokens and columns of the largest tile within the budget, and whether
        all tiles are kept for the second pass. Raise ``ValueError`` where the budget holds not even the smallest."""
        policies, k, (vocab, width) = self.policies, self.top_k, self.operands.weight.shape
        size, item, of_product = self.dtype.itemsize, self.operands.hidden.dtype.itemsize, self.product_dtype.itemsize
        width = -(-width // PANEL) * PANEL if self.packs else width
        copies = item < of_product if is_plain(self.operands.weight) else 2  # of a slice, as in tile_loop.memory
        # A row has statistics and results, in float and int64, the top k twice, products of all pairs, indices and coordinates;
        # and its hidden vectors.
        per_row = policies * (10 * size + 2 * 8 + 2 * k * (size + 8)) + policies**2 * size * self.compares + 64
        per_row += policies * width * of_product
        # What ranks exchange is sent, received from each of them, and received again as what it is merged to.
        per_row += (1 + 3 * self.ranks) * max(self.exchanged()) * size * (self.ranks > 0)
        second, scratch = bool(set(self.outputs) & set(SECOND_PASS)), self.kernels.needs_scratch(self.pairs)
        keeps = self.kernels.keeps(self.pairs)
        temporary = 3 * size * ("jsd" in self.outputs) * (not keeps)
        temporary += policies * self.compares * (not keeps)

        def needed(rows: int, tokens: int, columns: int, kept: bool = False) -> int:
            logits = ((not kept) + scratch) * policies * size * tokens * columns + temporary * tokens * columns
            hidden = policies * tokens * width * (of_product * (item < of_product) + 3 * item)
            merged = tokens * policies * (4 * k * (size + 8) + 10 * size + policies * size * self.compares)
            all_logits = rows * policies * vocab * size * kept
            return rows * per_row + logits + all_logits + hidden + merged + 2 * columns * width * size * copies

        most_rows, most_columns = CPU_TILE if self.operands.weight.device.type == "cpu" else DEVICE_TILE
        tokens, columns = max(min(most_rows // policies, count), 1), max(min(most_columns, vocab), 1)
        if second and keeps and count:
            room = memory_budget - needed(0, tokens, columns, True)
            rows = min(room // (per_row + policies * vocab * size), count)
            if rows * policies >= min(KEPT_ROWS, count * policies):
                rows = -(-count // -(-count // rows))  # of as many parts as it takes, each has as much
                return rows, Tile(min(tokens, rows), columns), True
        rows = max(min(count, memory_budget // 2 // per_row), 1)
        tokens = min(tokens, rows)
        while needed(rows, tokens, columns) > memory_budget and max(tokens, columns) > 1:
            # Products of fewer than SMALL_TILE rows or columns are slow.
            if columns == 1 or (tokens > 1 and (tokens * policies > SMALL_TILE or columns <= SMALL_TILE)):
                tokens = (tokens + 1) // 2
            else:
                columns = (columns + 1) // 2
        if (least := needed(rows, tokens, columns)) > memory_budget:
            raise ValueError(f"memory_budget: {memory_budget} bytes given, accepted are at least {least} for {policies} policies")
        return rows, Tile(tokens, columns), False

    def _blocks(self, rows: Tensor) -> list[tuple[slice, Tensor, Readout]]:  # [n]
        """Return the rows block by block, with their hidden vectors [P · r, D], or these as they are packed, and their
        readout."""
        blocks, coordinates = [], self.operands.coordinates(rows)
        for first in range(0, len(rows), self.tile.rows):
            tokens = slice(first, min(first + self.tile.rows, len(rows)))
            index = tuple(i[tokens] for i in coordinates)
            hidden = [self.norm(state[index]) for state in self.states]
            if self.final is not None:
                hidden.append(self.final[index])
            stacked = torch.stack([x.to(self.operands.hidden.dtype) for x in hidden]).flatten(0, 1)
            operand = self.kernels.pack_hidden(stacked, self.strategy) if self.packs else stacked.to(self.product_dtype)
            blocks.append((tokens, operand, self.operands.readout.rows(index, self.dtype)))
        return blocks

    def _tiles(self, y: Tensor, blocks: list[tuple[slice, Tensor, Readout]], kept: Tensor | None) -> Iterator[LensTile]:  # [n]
        """Yield tiles of products on rows with the targets ``y``; each overwrites the one before, unless all are ``kept``, side by
        side."""
        _, weight, bias, _, _ = self.operands
        vocab, device = len(weight), weight.device
        of_tile = self.policies * self.tile.rows * self.tile.columns
        room = torch.empty(of_tile if kept is None else 0, dtype=self.dtype, device=device)
        scratch = torch.empty(of_tile if self.kernels.needs_scratch(self.pairs) else 0, dtype=self.dtype, device=device)
        at = 0
        for start in range(0, vocab if len(y) else 0, self.tile.columns):
            columns = slice(start, min(start + self.tile.columns, vocab))
            w = rows_of(weight, columns)
            w = self.kernels.pack_weight(w, self.strategy) if self.packs else w.to(self.product_dtype)
            b = None if bias is None else bias[columns].to(self.dtype)
            for tokens, hidden, readout in blocks:
                shape = (self.policies, tokens.stop - tokens.start, columns.stop - columns.start)
                count = math.prod(shape)
                z = (room[:count] if kept is None else kept[at : at + count]).view(shape)
                at += count
                if self.packs:
                    self.kernels.multiply(z.flatten(0, 1), hidden, w, weight.shape[1], self.strategy)
                else:
                    accumulate_(z.flatten(0, 1), hidden, w.T, first=True)
                free = scratch[:count].view(shape) if len(scratch) else None
                yield LensTile(columns, tokens, z, free, False, b, readout, y[tokens])

    def run(self, rows: Tensor, exchange: Exchange | None = None) -> dict[str, Tensor]:  # [n]
        """Return [L, n] for each of the outputs, [L, n, k] for ``top_ids`` and ``top_logprobs``, [L, L, n] for ``pairwise_kl``.

        By way of an ``exchange`` they are of the columns of all ranks: these tell one another what :meth:`exchanged` says.
        """
        layers, vocab, outputs = len(self.states), len(self.operands.weight), set(self.outputs)
        blocks, memory, y = self._blocks(rows), None, self.operands.targets.flatten()[rows]
        if exchange is not None:
            y, vocab = y - exchange.first, exchange.vocab
            y.masked_fill_((y < 0) | (y >= len(self.operands.weight)), -1)
        kept: list[LensTile] = []
        if self.keeps:
            elements = self.policies * len(rows) * len(self.operands.weight)
            memory = present(torch.empty(elements, dtype=self.dtype, device=rows.device))
        tiles = self._tiles(y, blocks, memory)
        running = self._first_pass(tiles, kept, len(rows), self.kernels.multiplies and self.rules_out)
        if self.kernels.multiplies and not self.rules_out and running.cross is not None and not running.cross.isfinite().all():
            running = self._first_pass(self._tiles(y, blocks, None), [], len(rows), True)  # a product was −inf
        if exchange is not None:
            running = self._merged(running, exchange)
        statistics, cross = running.statistics, running.cross
        logprob, entropy, logsumexp, log_s = algebra.finish(statistics, vocab, with_entropy=True)
        assert entropy is not None
        found = {"logprobs": logprob, "entropy": entropy, "logsumexp": logsumexp, "max_probability": (-log_s).exp()}
        if running.argmax is not None:
            found["argmax"] = running.argmax
        if self.top_k:
            top_z, order = running.top_z.sort(dim=-1, descending=True, stable=True)
            found["top_ids"] = running.top_ids.gather(2, order)
            found["top_logprobs"] = top_z.sub_(statistics.m.unsqueeze(-1)).sub_(log_s.unsqueeze(-1)).clamp_(max=0)

        def divergence(own: Tensor, other: Tensor, s: Tensor, log_s: Tensor, other_log_s: Tensor) -> Tensor:
            return (own - other).div_(s).sub_(log_s - other_log_s).clamp_(min=0)

        if self.final is not None and cross is not None:
            s, t = statistics.s, statistics.t
            found["kl_to_final"] = divergence(t, cross[:, :, -1].T, s, log_s, log_s[-1])
            found["kl_from_final"] = divergence(t[-1], cross[:, -1].T, s[-1], log_s[-1], log_s)
        if self.pairs and cross is not None:
            kl = cross.neg_().add_(statistics.t.T.unsqueeze(2)).div_(statistics.s.T.unsqueeze(2))
            kl.sub_(log_s.T.unsqueeze(2)).add_(log_s.T.unsqueeze(1)).clamp_(min=0)
            found["pairwise_kl"] = kl.permute(1, 2, 0)[:layers, :layers]
        if outputs & set(SECOND_PASS):
            found |= self._second_pass(kept if self.keeps else self._tiles(y, blocks, None), statistics, log_s, exchange)
        return {name: found[name][:layers] for name in (*self.outputs, *(("top_ids", "top_logprobs") if self.top_k else ()))}

    def _first_pass(self, tiles: Iterator[LensTile], kept: list[LensTile], count: int, rules_out: bool) -> Running:
        """Return what comes of all ``tiles`` of ``count`` rows, and leave them in ``kept`` where the second pass is over them."""
        shape, device, k = (self.policies, count), self.operands.weight.device, self.top_k
        numbers = torch.zeros(4, *shape, dtype=self.dtype, device=device)
        numbers[0].fill_(algebra.lowest(self.dtype))
        cross = torch.zeros(count, shape[0], shape[0], dtype=self.dtype, device=device) if self.compares else None
        running = Running(
            Statistics(*numbers),
            torch.zeros(shape, dtype=torch.int64, device=device) if "argmax" in self.outputs else None,
            cross,
            self.pairs,
            torch.zeros_like(cross) if rules_out and cross is not None else None,
            torch.empty(*shape, k, dtype=self.dtype, device=device),
            torch.empty(*shape, k, dtype=torch.int64, device=device),
        )
        for tile in tiles:
            self.kernels.fold(tile, running.at(tile.tokens), "entropy" in self.outputs, self.strategy)
            if self.keeps:
                kept.append(tile._replace(formed=True))
        if cross is not None and running.ruled_out is not None:
            cross.masked_fill_(running.ruled_out > 0, -math.inf)
        return running

    def exchanged(self) -> list[int]:
        """Return how many numbers, of the dtype of results, a rank tells the others of each row in one exchange after the other."""
        policies, outputs = self.policies, set(self.outputs)
        first = policies * (2 + self._needs_t + self._needs_target + ("argmax" in outputs) + 2 * self.top_k)
        first += (policies if self.pairs else 2) * policies * self.compares
        second = policies * len(outputs & set(SECOND_PASS))
        return [first, second] if second else [first]

    @property
    def _needs_t(self) -> bool:
        return self.compares or "entropy" in self.outputs

    @property
    def _needs_target(self) -> bool:
        return bool({"logprobs", "rank"} & set(self.outputs))

    def _merged(self, own: Running, exchange: Exchange) -> Running:
        """Return the results of the columns of all ranks, with ids that count these, from those of this rank's."""
        (m, s, t, z_y), (policies, count), k = own.statistics, own.statistics.m.shape, self.top_k
        sent = {"m": m, "s": s}
        if self._needs_t:
            sent["t"] = t
        if self._needs_target:
            sent["z_y"] = z_y
        if own.argmax is not None:
            sent["argmax"] = as_numbers(own.argmax + exchange.first, self.dtype)
        if k:
            sent["top_z"] = own.top_z.transpose(1, 2).flatten(0, 1)
            sent["top_ids"] = as_numbers((own.top_ids + exchange.first).transpose(1, 2).flatten(0, 1), self.dtype)
        if own.cross is not None:
            pairs = own.cross.permute(1, 2, 0)  # [P, P, n]
            sent["cross"] = pairs.flatten(0, 1) if self.pairs else torch.cat([pairs[:, -1], pairs[-1]])
        gathered = exchange.gathered(torch.cat(list(sent.values()))).split([len(x) for x in sent.values()], 1)
        found = dict(zip(sent, gathered, strict=True))  # [ranks, …, n] each

        m, s = found["m"].amax(0), found["s"]
        moved = found["m"] - m
        shrink = moved.exp()
        moved = torch.where(s > 0, moved, 0)  # how far it is from nothing to a maximum does not matter
        if self._needs_t:
            t = in_order(shrink * (found["t"] + moved * s))
        if self._needs_target:
            z_y = in_order(found["z_y"])  # that of one rank, and 0 on the others
        argmax, cross = own.argmax, own.cross
        if argmax is not None:
            argmax, best = torch.zeros_like(argmax), torch.full_like(m, algebra.lowest(self.dtype))
            for largest, ids in zip(found["m"], as_ids(found["argmax"]), strict=True):
                argmax, best = torch.where(largest > best, ids, argmax), torch.maximum(largest, best)
        top_z, top_ids = own.top_z, own.top_ids
        if k:
            # Of fewer columns than k a rank has as many candidates.
            shape, some = (len(s), policies, k, count), [min(k, size) for size in exchange.sizes]
            values, ids = found["top_z"].reshape(shape), as_ids(found["top_ids"]).view(shape)
            top_z, order = _side_by_side(values, some).sort(dim=-1, descending=True, stable=True)
            top_z, top_ids = top_z[:, :, :k], _side_by_side(ids, some).gather(2, order[:, :, :k])
        if cross is not None:

            def whole(c: Tensor, of: Tensor | slice, other: Tensor | slice) -> Tensor:
                """Return c of all columns, of pairs of policies."""
                a = shrink[:, of]
                return in_order(torch.where(a == 0, 0, a * (c + moved[:, other] * s[:, of])))  # 0 · −inf is 0

            first = torch.arange(policies, dtype=torch.int64, device=m.device)
            last = torch.full_like(first, policies - 1)
            if self.pairs:
                pairs = whole(found["cross"], first.repeat_interleave(policies), first.repeat(policies))
                cross = pairs.view(policies, policies, count).permute(2, 0, 1).contiguous()
            else:
                pairs = whole(found["cross"], torch.cat([first, last]), torch.cat([last, first]))
                cross[:, :, -1], cross[:, -1] = pairs[:policies].T, pairs[policies:].T
        # In their memory, for row kernels take them as parts of one tensor.
        for mine, of_all in zip(own.statistics, (m, in_order(shrink * s), t, z_y), strict=True):
            mine.copy_(of_all)
        return Running(own.statistics, argmax, cross, own.pairs, own.ruled_out, top_z, top_ids)

    def _second_pass(
        self,
        tiles: Iterable[LensTile],
        statistics: Statistics,  # [P, n] each
        log_s: Tensor,  # [P, n]
        exchange: Exchange | None,
    ) -> dict[str, Tensor]:
        """Return rank and jsd, [P, n] each."""
        rank = torch.zeros_like(log_s, dtype=torch.int64) if "rank" in self.outputs else None
        jsd = torch.zeros_like(log_s) if "jsd" in self.outputs else None
        for tile in tiles:
            t = tile.tokens
            into = Comparison(*(None if x is None else x[:, t] for x in (rank, jsd)))
            self.kernels.compare(tile, Statistics(*(x[:, t] for x in statistics)), log_s[:, t], into, self.strategy)
        if exchange is not None:
            own = [x for x in (None if rank is None else as_numbers(rank, self.dtype), jsd) if x is not None]
            gathered = list(exchange.gathered(torch.cat(own)).split(self.policies, 1))
            rank = None if rank is None else as_ids(gathered.pop(0)).sum(0)
            jsd = None if jsd is None else in_order(gathered.pop(0))
        found = {} if rank is None else {"rank": rank}
        if jsd is not None:
            jsd += 0 * (log_s + log_s[-1])  # NaN where one of the two is no policy
            found["jsd"] = jsd.clamp_(0, math.log(2))
        return found


def as_numbers(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers below 2^31 in memory that is said to be of ``dtype``, so that they travel with numbers."""
    return ids.contiguous().view(dtype) if dtype.itemsize == ids.itemsize else ids.int().contiguous().view(dtype)


def as_ids(numbers: Tensor) -> Tensor:
    """Return the integers of :func:`as_numbers`."""
    return numbers.contiguous().view(torch.int64 if numbers.itemsize == 8 else torch.int32).long()


def _side_by_side(x: Tensor, some: list[int]) -> Tensor:  # [ranks, P, k, n] -> [P, n, Σ some]
    """Return the first ``some`` of the k places of each rank."""
    return torch.cat([of_rank[:, :count] for of_rank, count in zip(x, some, strict=True)], 1).transpose(1, 2)
