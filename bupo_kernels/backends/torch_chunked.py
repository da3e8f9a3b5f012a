"""Statistics and gradients of ``softmax(h Wᵀ)`` in plain torch, one ``[rows, columns]`` tile of logits at a time.

Runs wherever torch runs. Vocabulary slices are the outer loop and row blocks the inner one, forward and backward, so W is
read (and, in 16 bit, upcast) once per pass and ``dW[slice]`` is finished, and rounded, once.

Every product is taken between operands of the statistics' dtype (fp32; float64 for float64 inputs): a 16-bit operand is
upcast tile by tile, which is exact, because torch has no portable 16-bit product that keeps its fp32 accumulator. On a GPU
this runs at the fp32 rate of the library GEMM and follows ``torch.backends.cuda.matmul``'s TF32 setting (off by default).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bupo_kernels.backends.problem import Memory, Problem, Readout, Tile

# Largest tile worth having (rows, columns). CPU: two fp32 tiles of 512 x 2048 are 8 MiB, which stays in a shared L3 while
# the statistics sweep over what the GEMM has just written. Elsewhere: large enough to fill a GPU, small against its memory.
CPU_TILE = (512, 2048)
DEVICE_TILE = (4096, 8192)
SMALL_TILE = 64  # rows, columns: below this products are slow, so slices are cut so that this many rows fit


def why_not(problem: Problem) -> str | None:
    """The reason this backend cannot run ``problem``, or None."""
    smallest = memory(problem, Tile(1, 1))
    if max(smallest.forward, smallest.backward) > problem.memory_budget:
        return f"memory_budget: {problem.memory_budget} bytes given, accepted are at least {max(smallest[:2])} for this many rows"
    return None


def tile(problem: Problem) -> Tile:
    """The largest tile within the budget. Slice borders depend on V, D and the budget, never on the number of rows."""
    most_rows, most_columns = CPU_TILE if problem.device == "cpu" else DEVICE_TILE

    def fits(rows: int, columns: int, problem: Problem) -> bool:
        return max(memory(problem, Tile(rows, columns))[:2]) <= problem.memory_budget

    columns = min(most_columns, problem.vocab)
    while columns > SMALL_TILE and not fits(SMALL_TILE, columns, replace(problem, active_rows=0)):
        columns = (columns + 1) // 2
    rows = max(min(most_rows, problem.active_rows), 1)
    while rows > 1 and not fits(rows, columns, problem):
        rows = (rows + 1) // 2
    while columns > 1 and not fits(rows, columns, problem):  # a budget that only just suffices
        columns = (columns + 1) // 2
    return Tile(rows, columns)


def memory(problem: Problem, tile: Tile) -> Memory:
    """What :class:`LinearStatistics` allocates with this tile; a test holds it against what the allocator saw."""
    size = problem.statistics_dtype.itemsize
    upcast = problem.dtype.itemsize < size
    logits = tile.rows * tile.columns * size
    # Twice, because the next block of rows (slice of W) is made while the last one is still held.
    row_block = tile.rows * problem.width * (2 * size + (problem.dtype.itemsize if upcast else 0))
    weight_slice = tile.columns * problem.width * 2 * size if upcast else 0
    # Per row of the call: coordinates, running statistics and their coefficients; per row of the tile: their partials.
    per_row = (problem.active_rows + tile.rows) * 12 * 8
    forward = 2 * logits + row_block + weight_slice + per_row
    backward = 0
    if problem.grad_hidden or problem.grad_weight or problem.grad_bias:
        backward = forward + problem.softcap * logits
        backward += weight_slice // 2 * problem.grad_weight  # fp32 sum of the slice's dW before it is rounded
        backward += tile.columns * size * 2 * problem.grad_bias
    shared = problem.statistics_dtype == problem.dtype and problem.active_rows == problem.rows
    accumulator = problem.active_rows * problem.width * size if problem.grad_hidden and not shared else 0
    return Memory(forward, backward, accumulator)


def _to_logits_(product: Tensor, bias: Tensor | None, readout: Readout) -> Tensor:  # [r, c], [c]
    """Turns a tile of products into logits in place."""
    if bias is not None:
        product.add_(bias)
    if readout.softcap is not None:
        return product.mul_(readout.logit_scale / readout.softcap).tanh_().mul_(readout.softcap / readout.temperature)
    return product if readout.is_identity else product.mul_(readout.logit_scale / readout.temperature)


class _Block(NamedTuple):
    """One tile of logits and what it was made of."""

    columns: slice
    rows: slice
    weight: Tensor  # [c, D]
    hidden: Tensor  # [r, D]
    logits: Tensor  # [r, c], overwritten by the next tile
    scratch: Tensor  # [r, c], overwritten by the next tile
    readout: Readout


def _blocks(hidden, weight, bias, rows, readout, tile, dtype) -> Iterator[_Block]:
    """All tiles, slice by slice. ``rows`` indexes the leading dimensions of ``hidden``, so any view of it will do."""
    count, vocab = len(rows[0]), weight.shape[0]
    if count == 0:
        return
    buffers = torch.empty(2, tile.rows * tile.columns, dtype=dtype, device=hidden.device)
    for start in range(0, vocab, tile.columns):
        columns = slice(start, min(start + tile.columns, vocab))
        w = weight[columns].to(dtype)
        b = None if bias is None else bias[columns].to(dtype)
        for first in range(0, count, tile.rows):
            block = slice(first, min(first + tile.rows, count))
            index = tuple(i[block] for i in rows)
            h = hidden[index].to(dtype)
            logits, scratch = (buffer[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0]) for buffer in buffers)
            selected = readout.rows(index, dtype)
            torch.mm(h, w.T, out=logits)
            yield _Block(columns, block, w, h, _to_logits_(logits, b, selected), scratch, selected)


def _target_column(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:  # [r] -> [r, 1], [r, 1]
    """Where each row's target lies within the slice (clamped), and whether it does."""
    column = (targets - columns.start).unsqueeze(1)
    width = columns.stop - columns.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


class LinearStatistics(torch.autograd.Function):
    """(log-prob, entropy or None, logsumexp), each of the shape of ``targets``, in fp32 (float64 for float64 inputs).

    ``rows`` are the coordinates of the rows that count, as ``nonzero(as_tuple=True)`` gives them; every other row costs
    nothing and returns 0. Gradients reach ``hidden``, ``weight`` and ``bias``, each only when asked for, and rows whose
    upstream gradients are all exactly zero are left out of the gradient GEMMs. Finite logits are assumed.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, readout, tile, with_entropy, dtype):
        y = targets[rows]  # [n]
        m = torch.full_like(y, -math.inf, dtype=dtype)  # running maximum of z
        s = torch.zeros_like(m)  # Σ e^(z−m)
        t = torch.zeros_like(m)  # Σ (z−m) e^(z−m)
        z_y = torch.zeros_like(m)
        for block in _blocks(hidden, weight, bias, rows, readout, tile, dtype):
            z, e, r = block.logits, block.scratch, block.rows
            column, inside = _target_column(y[r], block.columns)
            z_y[r] = torch.where(inside, z.gather(1, column), z_y[r].unsqueeze(1)).squeeze(1)
            tile_m = z.amax(1)
            torch.exp(z.sub_(tile_m.unsqueeze(1)), out=e)
            tile_s = e.sum(1)
            # Merge of two partials (m, s, t); slices arrive in ascending order, so the result is repeatable bit for bit.
            new_m = torch.maximum(m[r], tile_m)
            a, b = (m[r] - new_m).exp(), (tile_m - new_m).exp()
            if with_entropy:
                tile_t = e.mul_(z).sum(1)
                shifted = torch.where(s[r] > 0, (m[r] - new_m) * s[r], 0)  # −inf · 0 before the first slice
                t[r] = a * (t[r] + shifted) + b * (tile_t + (tile_m - new_m) * tile_s)
            s[r] = a * s[r] + b * tile_s
            m[r] = new_m
        log_s = s.log()
        logprob = ((z_y - m) - log_s).clamp_(max=0)
        entropy = (log_s - t / s).clamp_(0, math.log(weight.shape[0])) if with_entropy else None

        ctx.save_for_backward(hidden, weight, bias, targets, m, log_s, logprob, entropy, *rows)
        ctx.readout, ctx.tile, ctx.dtype = readout, tile, dtype
        ctx.set_materialize_grads(False)

        def spread(statistic):  # [n] -> shape of targets
            return torch.zeros(targets.shape, dtype=dtype, device=targets.device).index_put_(rows, statistic)

        return spread(logprob), spread(entropy) if with_entropy else None, spread(m + log_s)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy, grad_logsumexp):
        hidden, weight, bias, targets, m, log_s, logprob, entropy, *rows = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype, rows = ctx.dtype, tuple(rows)
        grads = [g if g is None else g[rows].to(dtype) for g in (grad_logprob, grad_entropy, grad_logsumexp)]

        # A row all of whose upstream gradients are exactly zero adds exactly nothing: it leaves before any GEMM.
        active = torch.zeros_like(m, dtype=torch.bool)
        for g in grads:
            if g is not None:
                active |= g != 0
        if not active.all():
            rows, m, log_s, logprob = tuple(i[active] for i in rows), m[active], log_s[active], logprob[active]
            entropy = entropy if entropy is None else entropy[active]
            grads = [g if g is None else g[active] for g in grads]
        zero = torch.zeros_like(m)
        g_logprob, g_entropy, g_logsumexp = (zero if g is None else g for g in grads)
        y = targets[rows]

        # dz_j = g_lp (1[j=y] − p_j) − g_H p_j (log p_j + H) + g_lse p_j, with p_j = e^(z_j−m) / s and log p_j = (z_j−m) − ln s:
        # dz_j = e^(z_j−m) (constant − slope (z_j−m)) off the target, and on it 1 − p_y = −expm1(log p_y) to full precision.
        with_entropy = grads[1] is not None
        centre = entropy - log_s if with_entropy else zero
        slope = (g_entropy / log_s.exp()).unsqueeze(1)
        constant = ((g_logsumexp - g_logprob - g_entropy * centre) / log_s.exp()).unsqueeze(1)
        log_p_plus_h = logprob + entropy if with_entropy else zero
        dz_y = -g_logprob * logprob.expm1() + logprob.exp() * (g_logsumexp - g_entropy * log_p_plus_h)

        d_hidden = torch.zeros(len(y), hidden.shape[-1], dtype=dtype, device=hidden.device) if need_hidden else None
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        for block in _blocks(hidden, weight, bias, rows, ctx.readout, ctx.tile, dtype):
            z, dz, r, readout = block.logits, block.scratch, block.rows, block.readout
            if readout.softcap is not None:
                softcap_slope = (z * (readout.temperature / readout.softcap)).square_().neg_().add_(1)  # 1 − tanh²
            torch.exp(z.sub_(m[r].unsqueeze(1)), out=dz)
            if with_entropy:
                dz.mul_(torch.addcmul(constant[r], z, slope[r], value=-1, out=z))
            else:
                dz.mul_(constant[r])
            column, inside = _target_column(y[r], block.columns)
            dz.scatter_(1, column, torch.where(inside, dz_y[r].unsqueeze(1), dz.gather(1, column)))
            if readout.softcap is not None:
                dz.mul_(softcap_slope)
                del softcap_slope
            if not readout.is_identity:
                dz.mul_(readout.logit_scale / readout.temperature)

            if need_hidden:
                d_hidden[r].addmm_(dz, block.weight)
            if block.rows.start == 0:
                # fp32 sums of this slice; where dW is fp32 itself they are its own rows
                d_weight_slice = d_weight[block.columns].to(dtype) if need_weight else None
                d_bias_slice = d_bias[block.columns].to(dtype) if need_bias else None
            if need_weight:
                d_weight_slice.addmm_(dz.T, block.hidden)
            if need_bias:
                d_bias_slice.add_(dz.sum(0))
            if block.rows.stop == len(y):
                if need_weight and dtype != weight.dtype:
                    d_weight[block.columns] = d_weight_slice
                if need_bias and dtype != bias.dtype:
                    d_bias[block.columns] = d_bias_slice
                d_weight_slice = d_bias_slice = None

        if need_hidden:
            if len(y) * hidden.shape[-1] == hidden.numel():
                d_hidden = d_hidden.to(hidden.dtype).view(hidden.shape)
            else:
                everywhere = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
                d_hidden = everywhere.index_put_(rows, d_hidden.to(hidden.dtype))
        return d_hidden, d_weight, d_bias, None, None, None, None, None, None
