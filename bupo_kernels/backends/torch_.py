"""Row kernels in plain torch: the backend that runs wherever torch runs, and any dtype.

Where the library multiplies 16-bit operands into an fp32 result (``gradients.product_dtype``: GPUs with tensor cores), products are
taken between those, at their rate, and dz is rounded to their dtype. Elsewhere torch has no 16-bit product that keeps its fp32 sum:
a 16-bit operand is upcast tile by tile, which is exact. fp32 products follow ``torch.backends.cuda.matmul``'s TF32 setting (off by
default). On a GPU some thirteen passes over the fp32 tiles come on top of the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import LEAST_EXPONENT, Coefficients, Statistics, lowest
from bupo_kernels.backends.base import Problem, Readout, TilePlan
from bupo_kernels.backends.tile_loop import Block, RowKernels, TileLoop


class Torch(TileLoop):
    """The tile loop with the row kernels of this file."""

    strategies = ("recompute",)
    passes = 13
    passes_of_gradient = 14
    reads_quantised = True

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return None

    def row_kernels(self, plan: TilePlan) -> RowKernels:
        return TorchRows()


class TorchRows:
    """The :class:`RowKernels` of :class:`Torch`."""

    def fold(self, block: Block, targets: Tensor, running: Statistics, with_entropy: bool) -> Tensor:  # [r], [r] each -> [r]
        """Leave logits less the maximum of their row in the tile, which is returned."""
        z, e, m, s = to_logits_(block.tile, block.bias, block.readout), block.scratch, running.m, running.s
        column, inside = target_column(targets, block.columns)
        running.z_y.copy_(torch.where(inside, z.gather(1, column), running.z_y.unsqueeze(1)).squeeze(1))
        tile_m = z.amax(1).clamp_(min=lowest(z.dtype))
        torch.exp(z.sub_(tile_m.unsqueeze(1)), out=e)
        tile_s = e.sum(1)
        # This merges two partials (m, s, t); slices arrive in ascending order, so the result is repeatable bit for bit.
        new_m = torch.maximum(m, tile_m)
        m_shift, tile_shift = (x.sub(new_m).clamp_(min=LEAST_EXPONENT) for x in (m, tile_m))
        a, b = m_shift.exp(), tile_shift.exp()
        if with_entropy:
            tile_t = e.mul_(z).nansum(1)  # 0 · −inf is left out; a NaN among the logits is in s
            running.t.copy_(a * (running.t + m_shift * s) + b * (tile_t + tile_shift * tile_s))
        s.copy_(a * s + b * tile_s)
        m.copy_(new_m)
        return tile_m

    def gradient(self, block: Block, coefficients: Coefficients) -> Tensor:  # [r] each -> [r, c]
        z, dz, readout = block.tile, block.scratch, block.readout
        z = to_logits_(z, block.bias, readout) if block.maxima is None else z.add_(block.maxima.unsqueeze(1))
        softcap_slope = None
        if readout.softcap is not None:
            softcap_slope = (z * (readout.temperature / readout.softcap)).square_().neg_().add_(1)  # 1 − tanh²
        exact = dz if dz.dtype == z.dtype else torch.empty_like(z)
        torch.exp(z.sub_(coefficients.m.unsqueeze(1)), out=exact)
        if coefficients.slope is None:
            exact.mul_(coefficients.constant.unsqueeze(1))
        else:
            z.clamp_(min=LEAST_EXPONENT)
            slope = coefficients.slope.unsqueeze(1)
            exact.mul_(torch.addcmul(coefficients.constant.unsqueeze(1), z, slope, value=-1, out=z))
        column, inside = target_column(coefficients.targets, block.columns)
        exact.scatter_(1, column, torch.where(inside, coefficients.on_target.unsqueeze(1), exact.gather(1, column)))
        if softcap_slope is not None:
            exact.mul_(softcap_slope)
        return dz if exact is dz else dz.copy_(exact)


def to_logits_(product: Tensor, bias: Tensor | None, readout: Readout) -> Tensor:  # [r, c], [c]
    """Turn a tile of products into logits, in place."""
    if bias is not None:
        product.add_(bias)
    if readout.softcap is not None:
        return product.mul_(readout.logit_scale / readout.softcap).tanh_().mul_(readout.softcap / readout.temperature)
    return product if readout.is_identity else product.mul_(readout.logit_scale / readout.temperature)


def target_column(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:  # [r] -> [r, 1], [r, 1]
    """Return where each row's target lies within the slice (clamped), and whether it does."""
    column = (targets - columns.start).unsqueeze(1)
    width = columns.stop - columns.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
