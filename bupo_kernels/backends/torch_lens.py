"""The row kernels of a lens in plain torch: wherever torch runs, and any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import Statistics
from bupo_kernels.backends.base import Problem
from bupo_kernels.backends.lens_loop import Comparison, LensRows, LensTile, Running
from bupo_kernels.backends.torch_ import target_column, to_logits_


class TorchLens(LensRows):
    """Row kernels in plain torch. A product of all pairs cannot take ``0 · −inf`` for 0: where columns are ruled out, c is of the
    other ones."""

    strategies = ("recompute",)
    reads_quantised = True
    multiplies = True

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return None

    def fold(self, tile: LensTile, running: Running, with_entropy: bool, strategy: str | None) -> None:
        z, e, columns = to_logits_(tile.z, tile.bias, tile.readout), tile.scratch, tile.columns
        (m, s, t, z_y), cross, k = running.statistics, running.cross, running.top_z.shape[2]
        assert e is not None
        z_y.copy_(_of_targets(z, tile, z_y))
        if k:
            keep_top(z, running, columns)
        if running.argmax is not None:
            slice_m, best = z.max(2)  # the first of equals
            running.argmax.copy_(torch.where(slice_m > m, best + columns.start, running.argmax))
        else:
            slice_m = z.amax(2)
        higher = torch.maximum(m, slice_m)
        shrink = (m - higher).exp()
        moved = torch.where(s > 0, m - higher, 0)  # how far it was from nothing to the first maximum does not matter
        torch.exp(z.sub_(higher.unsqueeze(2)), out=e)
        if cross is not None:
            multiply_pairs(running, e, z, shrink, moved)
        slice_s = e.sum(2)
        if cross is not None:
            t.copy_(cross.diagonal(dim1=1, dim2=2).T)
        elif with_entropy:
            t.copy_(shrink * (t + moved * s) + e.mul_(z).nansum(2))  # as in TorchRows.fold
        s.copy_(shrink * s + slice_s)
        m.copy_(higher)

    def compare(
        self, tile: LensTile, statistics: Statistics, log_s: Tensor, found: Comparison, strategy: str | None
    ) -> None:  # [P, r] each
        z, scratch = to_logits_(tile.z, tile.bias, tile.readout), tile.scratch
        if found.rank is not None:
            # As numbers: a sum of bools would be one of int64.
            above = torch.gt(z, statistics.z_y.unsqueeze(2), out=scratch)
            column, inside = target_column(tile.targets, tile.columns)
            column = column.expand(len(z), -1, 1)
            above.scatter_(2, column, torch.where(inside, 0, above.gather(2, column)))
            found.rank.add_(above.sum(2).long())
        if found.jsd is not None:
            log_p = z.sub_(statistics.m.unsqueeze(2)).sub_(log_s.unsqueeze(2))
            p = torch.exp(log_p, out=scratch)
            for layer in range(len(z) - 1):
                mixture = torch.logaddexp(log_p[layer], log_p[-1]).sub_(math.log(2))
                own = p[layer].mul_(log_p[layer].sub_(mixture)).nansum(1)  # 0 · ln 0 is left out
                found.jsd[layer] += (own + torch.sub(log_p[-1], mixture).mul_(p[-1]).nansum(1)) / 2


def _of_targets(z: Tensor, tile: LensTile, z_y: Tensor) -> Tensor:  # [P, r, c], [P, r] -> [P, r]
    column, inside = target_column(tile.targets, tile.columns)
    return torch.where(inside.squeeze(1), z.gather(2, column.expand(len(z), -1, 1)).squeeze(2), z_y)


def keep_top(z: Tensor, running: Running, columns: slice) -> None:  # [P, r, c]
    """Keep the top k of those so far and of the logits of a tile, in order."""
    k = running.top_z.shape[2]
    seen = slice(0, min(k, columns.start))
    values, ids = z.topk(min(k, z.shape[2]))
    values = torch.cat([running.top_z[:, :, seen], values], 2)
    ids = torch.cat([running.top_ids[:, :, seen], ids + columns.start], 2)
    values, order = values.topk(min(k, columns.stop))
    running.top_z[:, :, : columns.stop] = values
    running.top_ids[:, :, : columns.stop] = ids.gather(2, order)


def multiply_pairs(
    running: Running,
    e: Tensor,  # [P, r, c]: e^(z−m)
    x: Tensor,  # [P, r, c]: z − m, overwritten where columns are ruled out
    shrink: Tensor,  # [P, r]: e^(m−m') of the maxima m before, and m' now
    moved: Tensor,  # [P, r]: m − m', 0 where there was nothing before
) -> None:
    """Add to c of all pairs, and have it count from new maxima; s of ``running`` is still that of before."""
    assert running.cross is not None
    s = running.statistics.s
    c = running.cross.add_(s.T.unsqueeze(2) * moved.T.unsqueeze(1)).mul_(shrink.T.unsqueeze(2))
    if running.ruled_out is None:
        c.baddbmm_(e.transpose(0, 1), x.permute(1, 2, 0))
        return
    where = x == -math.inf
    c.baddbmm_(e.transpose(0, 1), x.masked_fill_(where, 0).permute(1, 2, 0))
    lost = running.ruled_out.mul_(shrink.T.unsqueeze(2))
    lost.baddbmm_(e.transpose(0, 1), x.copy_(where).permute(1, 2, 0))
