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
    """The largest tile within the budget. Slice borders depend on V, D and the budget, not on the number of rows (but where the
    budget only just holds the statistics of that many rows)."""
    most_rows, most_columns = CPU_TILE if problem.device == "cpu" else DEVICE_TILE

    def fits(rows: int, columns: int, problem: Problem) -> bool:
        return max(memory(problem, Tile(rows, columns))[:2]) <= problem.memory_budget

    columns = min(most_columns, problem.vocab)
    while columns > SMALL_TILE and not fits(SMALL_TILE, columns, replace(problem, active_rows=0)):
        columns = (columns + 1) // 2
    rows = max(min(most_rows, problem.active_rows), 1)
    while rows > 1 and not fits(rows, columns, problem):
        rows = (rows + 1) // 2
    while columns > 1 and not fits(rows, columns, problem):
        columns = (columns + 1) // 2
    return Tile(rows, columns)


def memory(problem: Problem, tile: Tile) -> Memory:
    """What :class:`LinearStatistics` allocates with this tile; a test holds it against what the allocator saw."""
    size = problem.statistics_dtype.itemsize
    upcast = problem.dtype.itemsize < size
    tile_bytes = tile.rows * tile.columns * size
    # The next block of rows (slice of W) is made while the last one is still held; so are rows of dH when they are put in place.
    row_block, weight_slice = tile.rows * problem.width * size, tile.columns * problem.width * size * upcast
    gathered = tile.rows * problem.width * problem.dtype.itemsize * upcast
    several_slices = problem.vocab > tile.columns
    several_tiles = several_slices or problem.active_rows > tile.rows
    rows = problem.active_rows + tile.rows
    # Per row: coordinates and targets in int64, running statistics, and in the backward their coefficients and a selection of all.
    forward = 2 * tile_bytes + (1 + several_tiles) * row_block + gathered + (1 + several_slices) * weight_slice
    forward += rows * (6 * 8 + 10 * size)
    backward = 0
    if problem.grad_hidden or problem.grad_weight or problem.grad_bias:
        backward = (2 + problem.softcap) * tile_bytes + 2 * row_block + gathered + (1 + several_slices) * weight_slice
        backward += rows * (10 * 8 + 26 * size)
        backward += weight_slice * problem.grad_weight  # fp32 sum of the slice's dW before it is rounded
        backward += tile.columns * size * 2 * problem.grad_bias
    accumulator = problem.active_rows * problem.width * size if problem.grad_hidden and upcast else 0
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

        temperature = readout.temperature if isinstance(readout.temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, targets, m, log_s, logprob, entropy, temperature, *rows)
        ctx.readout, ctx.tile, ctx.dtype = readout, tile, dtype
        ctx.set_materialize_grads(False)

        def spread(statistic):  # [n] -> shape of targets
            return torch.zeros(targets.shape, dtype=dtype, device=targets.device).index_put_(rows, statistic)

        return spread(logprob), spread(entropy) if with_entropy else None, spread(m + log_s)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy, grad_logsumexp):
        hidden, weight, bias, targets, m, log_s, logprob, entropy, temperature, *rows = ctx.saved_tensors
        readout = ctx.readout if temperature is None else replace(ctx.readout, temperature=temperature)
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

        d_hidden = d_hidden_sum = None
        if need_hidden:
            # The sum is over slices, in fp32 and for the active rows only. Where dH is fp32 itself its first rows hold it.
            d_hidden = torch.zeros(targets.numel(), hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
            shared = dtype == hidden.dtype
            d_hidden_sum = d_hidden[: len(y)] if shared else d_hidden.new_zeros(len(y), hidden.shape[-1], dtype=dtype)
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        for block in _blocks(hidden, weight, bias, rows, readout, ctx.tile, dtype):
            z, dz, r, at = block.logits, block.scratch, block.rows, block.readout
            if at.softcap is not None:
                softcap_slope = (z * (at.temperature / at.softcap)).square_().neg_().add_(1)  # 1 − tanh²
            torch.exp(z.sub_(m[r].unsqueeze(1)), out=dz)
            if with_entropy:
                dz.mul_(torch.addcmul(constant[r], z, slope[r], value=-1, out=z))
            else:
                dz.mul_(constant[r])
            column, inside = _target_column(y[r], block.columns)
            dz.scatter_(1, column, torch.where(inside, dz_y[r].unsqueeze(1), dz.gather(1, column)))
            if at.softcap is not None:
                dz.mul_(softcap_slope)
                del softcap_slope
            if not at.is_identity:
                dz.mul_(at.logit_scale / at.temperature)

            if need_hidden:
                d_hidden_sum[r].addmm_(dz, block.weight)
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
            _move_rows(d_hidden_sum, d_hidden, _flat(rows, targets.shape), ctx.tile.rows)
            d_hidden = d_hidden.view(hidden.shape)
        return d_hidden, d_weight, d_bias, None, None, None, None, None, None


def _flat(rows: tuple[Tensor, ...], shape: torch.Size) -> Tensor:  # [n]
    """Coordinates as positions in a contiguous tensor of that shape; ascending, as ``nonzero`` orders them."""
    flat = torch.zeros_like(rows[0])
    for coordinate, size in zip(rows, shape, strict=True):
        flat = flat * size + coordinate
    return flat


def _move_rows(source: Tensor, target: Tensor, position: Tensor, step: int) -> None:  # [n, D], [N, D], [n]
    """``target[position] = source``, rounded to the dtype of ``target``, with no more than ``step`` rows of memory.

    ``source`` may be the first rows of ``target``: positions ascend, so a row only moves towards the end, and going from the
    last block to the first none is overwritten before it has moved.
    """
    shared = source.dtype == target.dtype
    if shared and len(source) == len(target):
        return
    for last in range(len(source), 0, -step):
        block = slice(max(last - step, 0), last)
        values = source[block].to(target.dtype, copy=True)
        if shared:
            source[block].zero_()
        target[position[block]] = values
