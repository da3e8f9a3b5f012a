"""The row kernel of divergences: a program has one row of the products of both sides, whole, and sweeps it three times.

The first sweep takes the statistics of both policies, the second what each is ahead of, and the third writes the gradients of the
products: in fp32 in their place, in 16 bit over the first half of theirs. There a slice is read by all threads before any writes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bupo_kernels.backends.base import Readout
from bupo_kernels.backends.divergences import FORWARD_KL, REVERSE_KL, Side, Upstream
from bupo_kernels.backends.triton_.product import LEAST_EXPONENT, LOWEST, tanh_and_slope

BLOCK_V, WARPS = 2048, 8


@triton.jit
def logits_of(products, bias, columns, within, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the logits of some columns of a row, −inf past the last, and the slope of the softcap (1 without one)."""
    z = tl.load(products + columns, mask=within, other=0.0)
    if BIAS:
        z += tl.load(bias + columns, mask=within, other=0.0)
    z *= inner
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTCAP:
        z, slope = tanh_and_slope(z)
    return tl.where(within, z * outer, float("-inf")), slope


@triton.jit
def folded(m, s, t, z):
    """Return the statistics of a row with those of some more of its logits."""
    new_m = tl.maximum(m, tl.max(z, 0))
    x = z - new_m
    e = tl.exp(x)
    below = m - new_m
    scale = tl.exp(below)
    moved = scale * (t + tl.maximum(below, LEAST_EXPONENT) * s)
    return new_m, scale * s + tl.sum(e, 0), moved + tl.sum(tl.where(e == 0, 0.0, e * x), 0)


@triton.jit
def compared(log_p, log_q, beta, KIND: tl.constexpr):
    """Return both probabilities, and how far each log-prob is ahead: of the other one in a KL, else of the mixture's."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND != 2:
        return p, q, log_p - log_q, log_q - log_p
    # Of p ≥ q, ln M − ln p = ln(1 − β + β q/p): nothing overflows, and the logarithm is of a number between 1 − β and 1.
    a, b = tl.maximum(log_p, LEAST_EXPONENT), tl.maximum(log_q, LEAST_EXPONENT)
    ratio = tl.exp(-tl.abs(b - a))
    own = tl.where(b > a, beta, 1.0 - beta)
    mixture = tl.maximum(a, b) + tl.log(own + (1.0 - own) * ratio)
    return p, q, a - mixture, b - mixture


@triton.jit
def centred(p, x, mean):
    return tl.where(p == 0, 0.0 * mean, p * (x - mean))


@triton.jit(
    do_not_specialize=[
        *("g_divergence", "g_entropy", "divergence", "entropy", "student_outers", "teacher_outers"),
        *("student_inner", "teacher_inner", "student_outer", "teacher_outer", "beta"),
    ]
)
def divergence_rows_kernel(
    student,  # [n, student_stride] fp32
    teacher,  # [n, teacher_stride] fp32
    student_dz,  # [n, student_dz_stride], over the products
    teacher_dz,  # [n, teacher_dz_stride]
    student_bias,  # [vocab] fp32
    teacher_bias,
    student_outers,  # [n] fp32
    teacher_outers,
    g_divergence,  # [n] fp32
    g_entropy,  # [n] fp32
    divergence,  # [n] fp32
    entropy,  # [n] fp32
    student_stride,
    teacher_stride,
    student_dz_stride,
    teacher_dz_stride,
    vocab,
    student_inner,  # z = g((x + bias) · inner) · outer, with g tanh under a softcap
    teacher_inner,
    student_outer,
    teacher_outer,
    beta,
    KIND: tl.constexpr,  # 0 forward KL, 1 reverse KL, 2 with the mixture
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STUDENT_OUTERS: tl.constexpr,
    TEACHER_OUTERS: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    TEACHER_GRADIENT: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    if STUDENT_OUTERS:
        student_outer = tl.load(student_outers + row)
    if TEACHER_OUTERS:
        teacher_outer = tl.load(teacher_outers + row)
    block = tl.arange(0, BLOCK_V)

    # Neither m may become a number of another type in the loop.
    m_p, m_q = tl.full((), LOWEST, tl.float32), tl.full((), LOWEST, tl.float32)
    s_p, s_q = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    t_p, t_q = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for first in range(0, vocab, BLOCK_V):
        columns = first + block
        within = columns < vocab
        z, _ = logits_of(student, student_bias, columns, within, student_inner, student_outer, STUDENT_BIAS, STUDENT_SOFTCAP)
        u, _ = logits_of(teacher, teacher_bias, columns, within, teacher_inner, teacher_outer, TEACHER_BIAS, TEACHER_SOFTCAP)
        m_p, s_p, t_p = folded(m_p, s_p, t_p, z)
        m_q, s_q, t_q = folded(m_q, s_q, t_q, u)
    # A row that no column can be chosen of has no policy.
    log_s_p = tl.where(s_p == 0, float("nan"), tl.log(s_p))
    log_s_q = tl.where(s_q == 0, float("nan"), tl.log(s_q))
    h = log_s_p - t_p / s_p
    tl.store(entropy + row, h)

    mean_p, mean_q = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for first in range(0, vocab, BLOCK_V):
        columns = first + block
        within = columns < vocab
        z, _ = logits_of(student, student_bias, columns, within, student_inner, student_outer, STUDENT_BIAS, STUDENT_SOFTCAP)
        u, _ = logits_of(teacher, teacher_bias, columns, within, teacher_inner, teacher_outer, TEACHER_BIAS, TEACHER_SOFTCAP)
        p, q, of_p, of_q = compared((z - m_p) - log_s_p, (u - m_q) - log_s_q, beta, KIND)
        if KIND != 0:
            mean_p += tl.sum(tl.where(p == 0, 0.0, p * of_p), 0)
        if KIND != 1:
            mean_q += tl.sum(tl.where(q == 0, 0.0, q * of_q), 0)
    if KIND == 0:
        tl.store(divergence + row, mean_q)
    elif KIND == 1:
        tl.store(divergence + row, mean_p)
    else:
        tl.store(divergence + row, beta * mean_q + (1.0 - beta) * mean_p)

    if STUDENT_GRADIENT or TEACHER_GRADIENT:
        g = tl.load(g_divergence + row)
        for first in range(0, vocab, BLOCK_V):
            columns = first + block
            within = columns < vocab
            z, bend = logits_of(student, student_bias, columns, within, student_inner, student_outer, STUDENT_BIAS, STUDENT_SOFTCAP)
            u, bow = logits_of(teacher, teacher_bias, columns, within, teacher_inner, teacher_outer, TEACHER_BIAS, TEACHER_SOFTCAP)
            log_p = (z - m_p) - log_s_p
            p, q, of_p, of_q = compared(log_p, (u - m_q) - log_s_q, beta, KIND)
            tl.debug_barrier()  # 16-bit dz of this slice lie over products of it that other threads read
            if STUDENT_GRADIENT:
                if KIND == 0:
                    dz = g * (p - q)
                elif KIND == 1:
                    dz = g * centred(p, of_p, mean_p)
                else:
                    dz = (1.0 - beta) * g * centred(p, of_p, mean_p)
                if ENTROPY_GRADIENT:
                    dz -= tl.load(g_entropy + row) * centred(p, log_p, -h)
                dz *= bend * (student_inner * student_outer)
                tl.store(student_dz + row * student_dz_stride + columns, dz.to(student_dz.dtype.element_ty), mask=within)
            if TEACHER_GRADIENT:
                if KIND == 0:
                    du = g * centred(q, of_q, mean_q)
                elif KIND == 1:
                    du = g * (q - p)
                else:
                    du = beta * g * centred(q, of_q, mean_q)
                du *= bow * (teacher_inner * teacher_outer)
                tl.store(teacher_dz + row * teacher_dz_stride + columns, du.to(teacher_dz.dtype.element_ty), mask=within)


def _numbers(readout: Readout) -> tuple[float, float, Tensor | None]:
    """Return the factors within and without the softcap, and where that is another one for each row, these."""
    temperature, cap = readout.temperature, readout.softcap
    inner, numerator = (readout.logit_scale, 1.0) if cap is None else (readout.logit_scale / cap, cap)
    if isinstance(temperature, Tensor):
        return inner, 1.0, numerator / temperature.reshape(-1).float()
    return inner, numerator / temperature, None


def divergence_rows(
    student: Side, teacher: Side, beta: float, upstream: Upstream | None, divergence: Tensor, entropy: Tensor
) -> None:
    """Write the divergence of each row and the entropy of the student, [n] each, and with ``upstream`` gradients where the sides
    have room for them. There is at least one row."""
    inner_p, outer_p, outers_p = _numbers(student.readout)
    inner_q, outer_q, outers_q = _numbers(teacher.readout)
    biases = [None if side.bias is None else side.bias.float().contiguous() for side in (student, teacher)]
    of_entropy = None if upstream is None else upstream.entropy
    gradients = [upstream is not None and side.dz is not None for side in (student, teacher)]
    dz = [side.products if side.dz is None else side.dz for side in (student, teacher)]
    divergence_rows_kernel[(len(divergence),)](
        student.products,
        teacher.products,
        dz[0],
        dz[1],
        *(entropy if bias is None else bias for bias in biases),
        *(entropy if outers is None else outers for outers in (outers_p, outers_q)),
        entropy if upstream is None else upstream.divergence.float().contiguous(),
        entropy if of_entropy is None else of_entropy.float().contiguous(),
        divergence,
        entropy,
        student.products.stride(0),
        teacher.products.stride(0),
        dz[0].stride(0),
        dz[1].stride(0),
        student.products.shape[1],
        inner_p,
        inner_q,
        outer_p,
        outer_q,
        beta,
        KIND={FORWARD_KL: 0, REVERSE_KL: 1}.get(beta, 2),
        STUDENT_BIAS=biases[0] is not None,
        TEACHER_BIAS=biases[1] is not None,
        STUDENT_SOFTCAP=student.readout.softcap is not None,
        TEACHER_SOFTCAP=teacher.readout.softcap is not None,
        STUDENT_OUTERS=outers_p is not None,
        TEACHER_OUTERS=outers_q is not None,
        STUDENT_GRADIENT=gradients[0],
        TEACHER_GRADIENT=gradients[1],
        ENTROPY_GRADIENT=of_entropy is not None,
        BLOCK_V=BLOCK_V,
        num_warps=WARPS,
    )
