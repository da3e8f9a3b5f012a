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
from bupo_kernels.backends.gradients import accumulate_
from bupo_kernels.backends.problem import Operands, Tile
from bupo_kernels.backends.torch_chunked import CPU_TILE, DEVICE_TILE, target_column, to_logits_

COMPARED = ("kl_to_final", "kl_from_final", "jsd")  # with the final policy
SECOND_PASS = ("rank", "jsd")


class Lens:
    """One call: the L policies of ``states``, and that of ``final`` where it is not None, on the rows [n] of ``operands``.

    ``operands.hidden`` lends its shape alone; ``norm`` is applied to rows of ``states`` as they are used.
    """

    def __init__(
        self,
        states: Sequence[Tensor],  # L x [..., D]
        final: Tensor | None,  # [..., D]
        norm: Callable[[Tensor], Tensor] | None,
        operands: Operands,
        rows: Tensor,  # [n]
        outputs: Sequence[str],
        top_k: int,
        memory_budget: int,
    ) -> None:
        self.states, self.norm, self.operands, self.outputs, self.top_k = states, norm, operands, outputs, top_k
        self.final = final if set(outputs) & set(COMPARED) else None
        self.rows, self.coordinates = rows, operands.coordinates(rows)
        self.targets = operands.targets.flatten()[rows]
        self.policies = len(states) + (self.final is not None)
        self.compares = bool(set(outputs) & {"kl_to_final", "kl_from_final", "pairwise_kl"})
        weight = operands.weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.tile = self._tile(memory_budget)

    def _tile(self, memory_budget: int) -> Tile:
        """Tokens and columns of the largest tile within the budget. Raises ``ValueError`` where it holds not even the smallest."""
        policies, n, (vocab, width) = self.policies, len(self.rows), self.operands.weight.shape
        size, item = self.dtype.itemsize, self.operands.weight.dtype.itemsize
        per_token = size * (8 * policies + policies**2 * self.compares) + (size + 8) * policies * self.top_k + 64

        def needed(tokens: int, columns: int) -> int:
            logits = (2 * policies + 4 * ("jsd" in self.outputs)) * tokens * columns * size
            rows = policies * tokens * (width * (size + 2 * item) + 3 * (size + 8) * self.top_k) + 2 * tokens * per_token
            return n * per_token + logits + rows + 2 * columns * width * size * (item < size)

        most_rows, most_columns = CPU_TILE if self.rows.device.type == "cpu" else DEVICE_TILE
        tokens, columns = max(min(most_rows // policies, n), 1), min(most_columns, vocab)
        while tokens > 1 and needed(tokens, columns) > memory_budget:
            tokens = (tokens + 1) // 2
        while columns > 1 and needed(tokens, columns) > memory_budget:
            columns = (columns + 1) // 2
        if (least := needed(tokens, columns)) > memory_budget:
            rows = f"{n} rows of {policies} policies"
            raise ValueError(f"memory_budget: {memory_budget} bytes given, accepted are at least {least} for {rows}")
        return Tile(tokens, columns)

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Columns, tokens, their logits [P, r, c], which the next overwrites, and room for as many numbers."""
        _, weight, bias, _, readout = self.operands
        count, vocab, device = len(self.rows), len(weight), weight.device
        buffers = [
            torch.empty(self.policies * self.tile.rows * self.tile.columns, dtype=self.dtype, device=device) for _ in range(2)
        ]
        for start in range(0, vocab if count else 0, self.tile.columns):
            columns = slice(start, min(start + self.tile.columns, vocab))
            w = weight[columns] if weight.is_cuda else weight[columns].to(self.dtype)
            b = None if bias is None else bias[columns].to(self.dtype)
            for first in range(0, count, self.tile.rows):
                tokens = slice(first, min(first + self.tile.rows, count))
                index = tuple(i[tokens] for i in self.coordinates)
                hidden = self._hidden(index, w.dtype)
                shape = (*hidden.shape[:2], len(w))
                z, scratch = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
                accumulate_(z.flatten(0, 1), hidden.flatten(0, 1), w.T, first=True)
                yield columns, tokens, to_logits_(z, b, readout.rows(index, self.dtype)), scratch

    def _hidden(self, index: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:  # -> [P, r, D]
        rows = [state[index] for state in self.states]
        if self.norm is not None:
            rows = [self.norm(x) for x in rows]
        if self.final is not None:
            rows.append(self.final[index])
        return torch.stack([x.to(self.operands.weight.dtype) for x in rows]).to(dtype)

    def run(self) -> dict[str, Tensor]:
        """[L, n] of each of the outputs, [L, n, k] of ``top_ids`` and ``top_logprobs``, [L, L, n] of ``pairwise_kl``."""
        layers, vocab = len(self.states), len(self.operands.weight)
        statistics, cross, found = self._first_pass()
        results = algebra.finish(statistics, vocab, with_entropy=True)
        found |= {"logprobs": results.logprob, "entropy": results.entropy, "logsumexp": results.logsumexp}
        found["max_probability"] = (-results.log_s).exp()
        if self.top_k:
            found["top_logprobs"] = (found["top_logprobs"] - results.logsumexp.unsqueeze(-1)).clamp_(max=0)
        if cross is not None:
            s, log_s = statistics.s.T, results.log_s.T  # [n, P]
            own = cross.diagonal(dim1=1, dim2=2)
            kl = (own.unsqueeze(2) - cross) / s.unsqueeze(2) - (log_s.unsqueeze(2) - log_s.unsqueeze(1))
            kl = kl.clamp_(min=0).permute(1, 2, 0)  # [P, P, n]
            found |= {"pairwise_kl": kl[:layers, :layers], "kl_to_final": kl[:, -1], "kl_from_final": kl[-1]}
        if set(self.outputs) & set(SECOND_PASS):
            found |= self._second_pass(statistics.z_y, results.logsumexp)
        wanted = {name: found[name][:layers] for name in self.outputs}
        return wanted | ({name: found[name][:layers] for name in ("top_ids", "top_logprobs")} if self.top_k else {})

    def _first_pass(self) -> tuple[algebra.Statistics, Tensor | None, dict[str, Tensor]]:
        """:class:`Statistics` [P, n], the c of all pairs [n, P, P] if policies are compared, argmax and top k (their logits)."""
        shape, device, k = (self.policies, len(self.rows)), self.rows.device, self.top_k
        statistics = algebra.Statistics(*(torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(4)))
        statistics.m.fill_(-math.inf)
        cross = torch.zeros(shape[1], shape[0], shape[0], dtype=self.dtype, device=device) if self.compares else None
        argmax = torch.zeros(shape, dtype=torch.int64, device=device)
        top_z = torch.full((*shape, k), -math.inf, dtype=self.dtype, device=device)
        top_ids = torch.zeros(*shape, k, dtype=torch.int64, device=device)
        for columns, tokens, z, e in self._tiles():
            m, s, t, z_y = (x[:, tokens] for x in statistics)
            column, inside = target_column(self.targets[tokens], columns)
            column = column.expand(self.policies, -1, 1)
            z_y.copy_(torch.where(inside.squeeze(1), z.gather(2, column).squeeze(2), z_y))
            if k:
                values, ids = z.topk(min(k, z.shape[2]))
                values, ids = torch.cat([top_z[:, tokens], values], 2), torch.cat([top_ids[:, tokens], ids + columns.start], 2)
                top_z[:, tokens], order = values.topk(k)
                top_ids[:, tokens] = ids.gather(2, order)
            if "argmax" in self.outputs:
                slice_m, best = z.max(2)  # the first of equals
                argmax[:, tokens] = torch.where(slice_m > m, best + columns.start, argmax[:, tokens])
            else:
                slice_m = z.amax(2)
            higher = torch.maximum(m, slice_m)
            kept = (m - higher).exp()
            moved = torch.where(s > 0, m - higher, 0)  # −inf · 0 before the first slice
            torch.exp(z.sub_(higher.unsqueeze(2)), out=e)
            slice_s = e.sum(2)
            if cross is not None:
                c = cross[tokens].add_(s.T.unsqueeze(2) * moved.T.unsqueeze(1)).mul_(kept.T.unsqueeze(2))
                c.baddbmm_(e.transpose(0, 1), z.permute(1, 2, 0))
            elif "entropy" in self.outputs:
                t.copy_(kept * (t + moved * s) + e.mul_(z).sum(2))
            s.copy_(kept * s + slice_s)
            m.copy_(higher)
        if cross is not None:
            statistics.t.copy_(cross.diagonal(dim1=1, dim2=2).T)
        return statistics, cross, {"argmax": argmax, "top_logprobs": top_z, "top_ids": top_ids}

    def _second_pass(self, z_y: Tensor, logsumexp: Tensor) -> dict[str, Tensor]:  # [P, n] each
        layers = len(self.states)
        rank = torch.zeros_like(z_y, dtype=torch.int64)
        jsd = torch.zeros_like(z_y[:layers])
        for columns, tokens, z, p in self._tiles():
            if "rank" in self.outputs:
                above = z > z_y[:, tokens].unsqueeze(2)
                column, inside = target_column(self.targets[tokens], columns)
                column = column.expand(self.policies, -1, 1)
                above.scatter_(2, column, above.gather(2, column) & ~inside)
                rank[:, tokens] += above.sum(2)
            if "jsd" in self.outputs:
                log_p = z.sub_(logsumexp[:, tokens].unsqueeze(2))
                torch.exp(log_p, out=p)
                for layer in range(layers):
                    mixture = torch.logaddexp(log_p[layer], log_p[-1]).sub_(math.log(2))
                    of_layer = p[layer].mul_(log_p[layer].sub_(mixture)).sum(1)
                    jsd[layer, tokens] += (of_layer + torch.sub(log_p[-1], mixture).mul_(p[-1]).sum(1)) / 2
        return {"rank": rank, "jsd": jsd.clamp_(0, math.log(2))}
