"""The logit lens: statistics of several policies that share an unembedding, streamed over slices of the vocabulary.

A tile holds the logits of P policies (the layers, and last the final policy where one is compared with) on the same few tokens, so
W is read once for all of them, and what compares two policies is at hand together. Of each policy's logits z the first pass keeps
``m = max z``, ``s = Σ e^(z−m)`` and, of each pair (l, k), ``c_lk = Σ e^(z^l−m^l) (z^k − m^k)``. From these

* entropy ``ln s_l − c_ll / s_l``
* ``KL(π^l ‖ π^k) = (c_ll − c_lk) / s_l − ln s_l + ln s_k``

``c`` of all pairs is one product of ``[P, columns]`` matrices a token: P/D of the work of the logits themselves. What needs the
target's logit, or the normalised policies, beforehand (the rank; Jensen and Shannon's mixture) takes a second pass over the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bupo_kernels.backends import algebra
from bupo_kernels.backends.base import Operands, Tile
from bupo_kernels.backends.gradients import accumulate_, product_dtype
from bupo_kernels.backends.quantised import is_plain, rows_of
from bupo_kernels.backends.tile_loop import CPU_TILE, DEVICE_TILE, SMALL_TILE
from bupo_kernels.backends.torch_ import target_column, to_logits_

COMPARED = ("kl_to_final", "kl_from_final", "jsd")  # with the final policy
SECOND_PASS = ("rank", "jsd")


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

    ``operands.hidden`` lends its shape and dtype; ``norm`` is applied to rows of ``states`` as they are used. At most ``rows`` may
    be asked for at a time: fewer than ``count`` where the budget does not hold the statistics of all.
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
    ) -> None:
        self.states, self.norm, self.operands, self.outputs, self.top_k = states, checked_norm(norm), operands, outputs, top_k
        self.final = final if set(outputs) & set(COMPARED) else None
        self.policies = len(states) + (self.final is not None)
        self.compares = bool(set(outputs) & {"kl_to_final", "kl_from_final", "pairwise_kl"})
        self.rules_out = self.compares and operands.bias is not None and bool((operands.bias == -math.inf).any())
        self.dtype = torch.promote_types(operands.hidden.dtype, torch.float32)
        self.product_dtype = product_dtype(operands.hidden.dtype, operands.hidden.device)
        self.rows, self.tile = self._plan(count, memory_budget)

    def _plan(self, count: int, memory_budget: int) -> tuple[int, Tile]:
        """Return how many rows there may be at a time, and the tokens and columns of the largest tile within the budget. Raise
        ``ValueError`` where it holds not even the smallest."""
        policies, k, (vocab, width) = self.policies, self.top_k, self.operands.weight.shape
        size, item, of_product = self.dtype.itemsize, self.operands.hidden.dtype.itemsize, self.product_dtype.itemsize
        copies = item < of_product if is_plain(self.operands.weight) else 2  # of a slice, as in tile_loop.memory
        # A row has statistics and results, in float and int64, the top k twice, products of all pairs, indices and coordinates.
        per_row = policies * (10 * size + 2 * 8 + 2 * k * (size + 8)) + policies**2 * size * self.compares + 64

        def needed(rows: int, tokens: int, columns: int) -> int:
            logits = ((2 * policies + 3 * ("jsd" in self.outputs)) * size + policies * self.compares) * tokens * columns
            hidden = policies * tokens * width * (of_product * (item < of_product) + 3 * item)
            merged = tokens * policies * (4 * k * (size + 8) + 10 * size + policies * size * self.compares)
            return rows * per_row + logits + hidden + merged + 2 * columns * width * size * copies

        most_rows, most_columns = CPU_TILE if self.operands.weight.device.type == "cpu" else DEVICE_TILE
        rows = max(min(count, memory_budget // 2 // per_row), 1)
        tokens, columns = max(min(most_rows // policies, rows), 1), min(most_columns, vocab)
        while needed(rows, tokens, columns) > memory_budget and max(tokens, columns) > 1:
            # Products of fewer than SMALL_TILE rows or columns are slow.
            if columns == 1 or (tokens > 1 and (tokens * policies > SMALL_TILE or columns <= SMALL_TILE)):
                tokens = (tokens + 1) // 2
            else:
                columns = (columns + 1) // 2
        if (least := needed(rows, tokens, columns)) > memory_budget:
            raise ValueError(f"memory_budget: {memory_budget} bytes given, accepted are at least {least} for {policies} policies")
        return rows, Tile(tokens, columns)

    def _tiles(self, rows: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield columns, tokens, their logits [P, r, c], which the next ones overwrite, and room for as many numbers."""
        _, weight, bias, _, readout = self.operands
        count, vocab, device, coordinates = len(rows), len(weight), weight.device, self.operands.coordinates(rows)
        buffers = [
            torch.empty(self.policies * self.tile.rows * self.tile.columns, dtype=self.dtype, device=device) for _ in range(2)
        ]
        for start in range(0, vocab if count else 0, self.tile.columns):
            columns = slice(start, min(start + self.tile.columns, vocab))
            w = rows_of(weight, columns)
            w = w.to(self.product_dtype)
            b = None if bias is None else bias[columns].to(self.dtype)
            for first in range(0, count, self.tile.rows):
                tokens = slice(first, min(first + self.tile.rows, count))
                index = tuple(i[tokens] for i in coordinates)
                hidden = self._hidden(index, w.dtype)
                shape = (*hidden.shape[:2], len(w))
                z, scratch = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
                accumulate_(z.flatten(0, 1), hidden.flatten(0, 1), w.T, first=True)
                yield columns, tokens, to_logits_(z, b, readout.rows(index, self.dtype)), scratch

    def _hidden(self, index: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:  # -> [P, r, D]
        rows = [self.norm(state[index]) for state in self.states]
        if self.final is not None:
            rows.append(self.final[index])
        return torch.stack([x.to(self.operands.hidden.dtype) for x in rows]).to(dtype)

    def run(self, rows: Tensor) -> dict[str, Tensor]:  # [n]
        """Return [L, n] for each of the outputs, [L, n, k] for ``top_ids`` and ``top_logprobs``, [L, L, n] for ``pairwise_kl``."""
        layers, vocab, outputs = len(self.states), len(self.operands.weight), set(self.outputs)
        statistics, cross, found = self._first_pass(rows, self.rules_out)
        if cross is not None and not self.rules_out and not cross.isfinite().all():  # a product was −inf
            statistics, cross, found = self._first_pass(rows, True)
        logprob, entropy, logsumexp, log_s = algebra.finish(statistics, vocab, with_entropy=True)
        assert entropy is not None
        found |= {"logprobs": logprob, "entropy": entropy, "logsumexp": logsumexp}
        found["max_probability"] = (-log_s).exp()
        if self.top_k:
            found["top_logprobs"] = (found["top_logprobs"] - statistics.m.unsqueeze(-1)).sub_(log_s.unsqueeze(-1)).clamp_(max=0)

        def divergence(own: Tensor, other: Tensor, s: Tensor, log_s: Tensor, other_log_s: Tensor) -> Tensor:
            return (own - other).div_(s).sub_(log_s - other_log_s).clamp_(min=0)

        if self.final is not None and cross is not None:
            s, t = statistics.s, statistics.t
            found["kl_to_final"] = divergence(t, cross[:, :, -1].T, s, log_s, log_s[-1])
            found["kl_from_final"] = divergence(t[-1], cross[:, -1].T, s[-1], log_s[-1], log_s)
        if "pairwise_kl" in outputs and cross is not None:
            kl = cross.neg_().add_(statistics.t.T.unsqueeze(2)).div_(statistics.s.T.unsqueeze(2))
            kl.sub_(log_s.T.unsqueeze(2)).add_(log_s.T.unsqueeze(1)).clamp_(min=0)
            found["pairwise_kl"] = kl.permute(1, 2, 0)[:layers, :layers]
        if outputs & set(SECOND_PASS):
            found |= self._second_pass(rows, statistics, log_s)
        return {name: found[name][:layers] for name in (*self.outputs, *(("top_ids", "top_logprobs") if self.top_k else ()))}

    def _first_pass(self, rows: Tensor, rules_out: bool) -> tuple[algebra.Statistics, Tensor | None, dict[str, Tensor]]:
        """Return :class:`Statistics` [P, n], the c of all pairs [n, P, P] if policies are compared, argmax and top k (their
        logits).

        A product cannot take ``0 · −inf`` for 0: where policies are compared that rule columns out, c is of the other columns, and
        −inf where the first of a pair gives some probability to what the second rules out.
        """
        shape, device, k, y = (self.policies, len(rows)), rows.device, self.top_k, self.operands.targets.flatten()[rows]
        statistics = algebra.Statistics(*(torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(4)))
        statistics.m.fill_(algebra.lowest(self.dtype))
        cross = torch.zeros(shape[1], shape[0], shape[0], dtype=self.dtype, device=device) if self.compares else None
        ruled_out = torch.zeros_like(cross) if rules_out and cross is not None else None  # e^(z^l−m^l) summed where z^k is −inf
        argmax = torch.zeros(shape, dtype=torch.int64, device=device)
        top_z = torch.empty(*shape, k, dtype=self.dtype, device=device)
        top_ids = torch.empty(*shape, k, dtype=torch.int64, device=device)
        for columns, tokens, z, e in self._tiles(rows):
            m, s, t, z_y = (x[:, tokens] for x in statistics)
            column, inside = target_column(y[tokens], columns)
            column = column.expand(self.policies, -1, 1)
            z_y.copy_(torch.where(inside.squeeze(1), z.gather(2, column).squeeze(2), z_y))
            if k:
                seen = slice(0, min(k, columns.start))
                values, ids = z.topk(min(k, z.shape[2]))
                values = torch.cat([top_z[:, tokens, seen], values], 2)
                ids = torch.cat([top_ids[:, tokens, seen], ids + columns.start], 2)
                values, order = values.topk(min(k, columns.stop))
                top_z[:, tokens, : columns.stop] = values
                top_ids[:, tokens, : columns.stop] = ids.gather(2, order)
            if "argmax" in self.outputs:
                slice_m, best = z.max(2)  # the first of equals
                argmax[:, tokens] = torch.where(slice_m > m, best + columns.start, argmax[:, tokens])
            else:
                slice_m = z.amax(2)
            higher = torch.maximum(m, slice_m)
            shrink = (m - higher).exp()
            moved = torch.where(s > 0, m - higher, 0)  # how far it was from nothing to the first maximum does not matter
            torch.exp(z.sub_(higher.unsqueeze(2)), out=e)
            slice_s = e.sum(2)
            if cross is not None:
                c = cross[tokens].add_(s.T.unsqueeze(2) * moved.T.unsqueeze(1)).mul_(shrink.T.unsqueeze(2))
                if ruled_out is not None:
                    where = z == -math.inf
                    z.masked_fill_(where, 0)
                c.baddbmm_(e.transpose(0, 1), z.permute(1, 2, 0))
                if ruled_out is not None:
                    lost = ruled_out[tokens].mul_(shrink.T.unsqueeze(2))
                    lost.baddbmm_(e.transpose(0, 1), z.copy_(where).permute(1, 2, 0))
            elif "entropy" in self.outputs:
                t.copy_(shrink * (t + moved * s) + e.mul_(z).nansum(2))  # as in TorchRows.fold
            s.copy_(shrink * s + slice_s)
            m.copy_(higher)
        if cross is not None and ruled_out is not None:
            cross.masked_fill_(ruled_out > 0, -math.inf)
        if cross is not None:
            statistics.t.copy_(cross.diagonal(dim1=1, dim2=2).T)
        return statistics, cross, {"argmax": argmax, "top_logprobs": top_z, "top_ids": top_ids}

    def _second_pass(
        self,
        rows: Tensor,
        statistics: algebra.Statistics,
        log_s: Tensor,  # [P, n] each
    ) -> dict[str, Tensor]:
        """Return rank and jsd, [P, n] and [L, n]."""
        layers, y = len(self.states), self.operands.targets.flatten()[rows]
        rank = torch.zeros_like(log_s, dtype=torch.int64)
        jsd = torch.zeros_like(log_s[:layers])
        for columns, tokens, z, scratch in self._tiles(rows):
            if "rank" in self.outputs:
                above = torch.gt(
                    z, statistics.z_y[:, tokens].unsqueeze(2), out=scratch
                )  # as numbers: a sum of bools would be one of int64
                column, inside = target_column(y[tokens], columns)
                column = column.expand(self.policies, -1, 1)
                above.scatter_(2, column, torch.where(inside, 0, above.gather(2, column)))
                rank[:, tokens] += above.sum(2).long()
            if "jsd" in self.outputs:
                log_p = z.sub_(statistics.m[:, tokens].unsqueeze(2)).sub_(log_s[:, tokens].unsqueeze(2))
                p = torch.exp(log_p, out=scratch)
                for layer in range(layers):
                    mixture = torch.logaddexp(log_p[layer], log_p[-1]).sub_(math.log(2))
                    own = p[layer].mul_(log_p[layer].sub_(mixture)).nansum(1)  # 0 · ln 0 is left out
                    jsd[layer, tokens] += (own + torch.sub(log_p[-1], mixture).mul_(p[-1]).nansum(1)) / 2
        jsd += 0 * (log_s[:layers] + log_s[-1])  # NaN where one of the two is no policy
        return {"rank": rank, "jsd": jsd.clamp_(0, math.log(2))}
