"""Divergences of two policies over one vocabulary, row by row: the kernel from two matrices of products to values and both dz.

With the student's ``p = softmax(z)`` and the teacher's ``q = softmax(u)``, one number says which divergence D it is:

* 0: forward, ``KL(q ‖ p)``, with ``dz = p − q`` and ``du = q (ln q − ln p − D)``
* 1: reverse, ``KL(p ‖ q)``, with ``dz = p (ln p − ln q − D)`` and ``du = q − p``
* β between them: generalised Jensen and Shannon's, ``β KL(q ‖ M) + (1−β) KL(p ‖ M)`` with ``M = β q + (1−β) p`` (GKD, arXiv
  2306.13649, equation 1), with ``dz = (1−β) p (ln p − ln M − KL(p ‖ M))`` and ``du = β q (ln q − ln M − KL(q ‖ M))``

Each dz is ``p`` times a difference of log-probs that is centred on its own mean, so it sums to 0 over a row.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import lowest
from bupo_kernels.backends.base import Candidate, Problem, Readout
from bupo_kernels.backends.torch_ import to_logits_

FORWARD_KL, REVERSE_KL = 0.0, 1.0

# Elements of the few temporary matrices of the torch kernel. On a CPU they are to stay in its caches.
CPU_ELEMENTS, DEVICE_ELEMENTS = 2**18, 2**24
TEMPORARIES = 8


class Side(NamedTuple):
    """The products of one of the two policies with its unembedding, for n rows."""

    products: Tensor  # [n, V] fp32 (float64), rows apart by its stride; the kernel overwrites them
    dz: Tensor | None  # [n, V], where the gradient of the products goes; it may lie over them, row i in their row i. None: unwanted
    bias: Tensor | None  # [V], of the dtype of the products
    readout: Readout  # of these rows

    def rows(self, block: slice) -> Side:
        """Return some of the rows."""
        temperature = self.readout.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[block]
        readout = Readout(temperature, self.readout.logit_scale, self.readout.softcap)
        return Side(self.products[block], None if self.dz is None else self.dz[block], self.bias, readout)


class Top(NamedTuple):
    """A teacher that is known by log-probs of k ids for each row; all other ids are one bucket, of the probability that these
    leave."""

    ids: Tensor  # [..., k] int64, each another in its row
    logprobs: Tensor  # [..., k]

    def of_rows(self, rows: Tensor, dtype: torch.dtype) -> Top:  # [n] -> [n, k] each
        """Return those of ``rows``, which number the leading dimensions through."""
        k = self.ids.shape[-1]
        ids, logprobs = (x.reshape(self.ids.shape[:-1].numel(), k)[rows] for x in self)
        return Top(ids, logprobs.to(dtype))

    def with_rest(self) -> Tensor:  # [n, k + 1]
        """Return the log-probs with that of the bucket as the last; −inf where nothing is left for it."""
        total = self.logprobs.logsumexp(1, keepdim=True).clamp_(max=0)
        return torch.cat([self.logprobs, total.expm1_().neg_().log_()], 1)


class Upstream(NamedTuple):
    """The gradients of a loss with respect to what rows have."""

    divergence: Tensor  # [n]
    entropy: Tensor | None  # [n], of the student's; None for 0

    def rows(self, block: slice) -> Upstream:
        """Return those of some of the rows."""
        return Upstream(self.divergence[block], None if self.entropy is None else self.entropy[block])


class DivergenceRows(Candidate):
    """An implementation of the row kernel. Its methods hold no state."""

    reads_quantised = True  # which only products need, that are the library's

    @abstractmethod
    def rows(
        self, student: Side, teacher: Side, beta: float, upstream: Upstream | None, with_entropy: bool, strategy: str | None
    ) -> tuple[Tensor, Tensor]:  # [n] each
        """Return the divergence of each row and the entropy of the student (uninitialised, if not ``with_entropy``); with
        ``upstream``, write the gradients of the products where the sides have room for them."""

    def working_memory(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        """Return the bytes that :meth:`rows` takes beside the matrices."""
        return 0

    def top_rows(
        self, student: Side, teacher: Top, beta: float, upstream: Upstream | None, strategy: str | None
    ) -> tuple[Tensor, Tensor]:  # [n] each
        """Return what :meth:`rows` does, of a teacher that is known by its top. Asked only where :meth:`why_not_top` gives None."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel for the top of a teacher")

    def why_not_top(self) -> str | None:
        """Return the reason :meth:`top_rows` cannot run, or None."""
        return "it has no kernel for teacher_top"


class TorchDivergence(DivergenceRows):
    """The row kernel in plain torch, on any device and in any dtype: a block of whole rows at a time."""

    strategies = ()

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return None

    def working_memory(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
        return TEMPORARIES * min(rows, _block_rows(vocab, device)) * vocab * dtype.itemsize

    def rows(
        self, student: Side, teacher: Side, beta: float, upstream: Upstream | None, with_entropy: bool, strategy: str | None
    ) -> tuple[Tensor, Tensor]:
        def of_block(block: slice, some: Upstream | None) -> tuple[Tensor, Tensor]:
            return _rows(student.rows(block), teacher.rows(block), beta, some)

        return _in_blocks(student.products, upstream, of_block)

    def why_not_top(self) -> str | None:
        return None

    def top_rows(
        self, student: Side, teacher: Top, beta: float, upstream: Upstream | None, strategy: str | None
    ) -> tuple[Tensor, Tensor]:
        def of_block(block: slice, some: Upstream | None) -> tuple[Tensor, Tensor]:
            return _top_rows(student.rows(block), Top(teacher.ids[block], teacher.logprobs[block]), beta, some)

        return _in_blocks(student.products, upstream, of_block)


def _block_rows(vocab: int, device: torch.device) -> int:
    return max((CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS) // vocab, 1)


def _in_blocks(
    products: Tensor,  # [n, V]
    upstream: Upstream | None,
    of_block: Callable[[slice, Upstream | None], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # [n] each
    """Return divergence and entropy of all rows from those of one block of them after the other."""
    count, vocab = products.shape
    divergence, entropy = (products.new_empty(count) for _ in range(2))
    step = _block_rows(vocab, products.device)
    for first in range(0, count, step):
        block = slice(first, min(first + step, count))
        divergence[block], entropy[block] = of_block(block, None if upstream is None else upstream.rows(block))
    return divergence, entropy


def largest(beta: float) -> float:
    """Return the largest value that a divergence can have."""
    if beta in (FORWARD_KL, REVERSE_KL):
        return math.inf
    return -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)


class Sums(NamedTuple):
    """The shape of rows: whole ones of a matrix, or ragged ones that follow one another."""

    total: Callable[[Tensor], Tensor]  # -> [n]: the sum of each row, in which a NaN counts
    spread: Callable[[Tensor], Tensor]  # [n] -> a number for each element of its row


OF_MATRIX = Sums(lambda x: x.sum(1), lambda x: x.unsqueeze(1))


class Policies(NamedTuple):
    """Two policies as log-probs and probabilities."""

    log_p: Tensor  # of the student
    log_q: Tensor
    p: Tensor
    q: Tensor


def compare(
    policies: Policies, beta: float, sums: Sums, *, gradients: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the divergence of each row and its derivatives by the logits of student and teacher, where ``gradients`` asks for
    them."""
    log_p, log_q, p, q = policies
    if beta in (FORWARD_KL, REVERSE_KL):
        forward = beta == FORWARD_KL
        of, other, ahead = (q, p, log_q - log_p) if forward else (p, q, log_p - log_q)
        value = sums.total(_weighted(of, ahead)).clamp_(min=0)
        by_of, by_other = reversed(gradients) if forward else gradients
        of_own = _centred(of, ahead, value, sums) if by_of else None
        of_other = other - of if by_other else None
        return (value, of_other, of_own) if forward else (value, of_own, of_other)
    mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    parts, derivatives = [], []
    for share, x, log_x, wanted in ((1 - beta, p, log_p, gradients[0]), (beta, q, log_q, gradients[1])):
        ahead = log_x - mixture
        parts.append(sums.total(_weighted(x, ahead)))
        derivatives.append(_centred(x, ahead, parts[-1], sums).mul_(share) if wanted else None)
    return ((1 - beta) * parts[0] + beta * parts[1]).clamp_(0, largest(beta)), derivatives[0], derivatives[1]


def entropy_of(log_p: Tensor, p: Tensor, sums: Sums, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the entropy of each row, and its derivative by the logits where it is wanted."""
    value = sums.total(_weighted(p, log_p)).neg_().clamp_(min=0)
    return value, _centred(p, log_p, -value, sums).neg_() if gradient else None


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """Return ``p x``, 0 where p is: x may be infinite there, or the difference of two infinities."""
    return torch.where(p == 0, 0, p * x)


def _centred(p: Tensor, x: Tensor, mean: Tensor, sums: Sums) -> Tensor:
    """Return ``p (x − mean)``, 0 where p is, but in a row whose mean is not finite."""
    mean = sums.spread(mean)
    return torch.where(p == 0, 0 * mean, p * (x - mean))


def _rows(student: Side, teacher: Side, beta: float, upstream: Upstream | None) -> tuple[Tensor, Tensor]:  # -> [r], [r]
    """Return divergence and entropy of a block of rows, and write its gradients."""
    log_p, slope_p = _log_policy_(student)
    log_q, slope_q = _log_policy_(teacher)
    policies = Policies(log_p, log_q, log_p.exp(), log_q.exp())
    wanted = upstream is not None and student.dz is not None, upstream is not None and teacher.dz is not None
    of_entropy = wanted[0] and upstream is not None and upstream.entropy is not None
    entropy, by_entropy = entropy_of(log_p, policies.p, OF_MATRIX, gradient=of_entropy)
    divergence, dz, du = compare(policies, beta, OF_MATRIX, gradients=wanted)
    if upstream is None:
        return divergence, entropy
    g = upstream.divergence.unsqueeze(1)
    if dz is not None:
        dz.mul_(g)
        if by_entropy is not None and upstream.entropy is not None:
            dz.add_(by_entropy.mul_(upstream.entropy.unsqueeze(1)))
        _write(student, dz, slope_p)
    if du is not None:
        _write(teacher, du.mul_(g), slope_q)
    return divergence, entropy


def _top_rows(student: Side, teacher: Top, beta: float, upstream: Upstream | None) -> tuple[Tensor, Tensor]:  # -> [r], [r]
    """Return divergence and entropy of a block of rows, and write its gradient.

    The student's policy on k + 1 buckets is the softmax of its k logits and of the logsumexp of the others. That one is summed over
    these others themselves: what 1 leaves of k probabilities would be lost in rounding where they are nearly all.
    """
    z, ids = to_logits_(student.products, student.bias, student.readout), teacher.ids
    slope = _slope(student, z)
    own = z.gather(1, ids)
    z.scatter_(1, ids, -math.inf)
    m = z.amax(1, keepdim=True).clamp_(min=lowest(z.dtype))
    e = torch.exp(z.sub_(m))
    s = e.sum(1, keepdim=True)
    log_s = s.log()
    buckets = torch.cat([own, m + log_s], 1)
    log_p, log_q = buckets - buckets.logsumexp(1, keepdim=True), teacher.with_rest()
    # Where nothing is left for the student, as of a top of the whole vocabulary, what rounding leaves for the teacher is nothing.
    rounding = math.log(max(ids.shape[1], 1) * torch.finfo(z.dtype).eps)
    log_q[:, -1].masked_fill_((log_p[:, -1] == -math.inf) & (log_q[:, -1] <= rounding), -math.inf)
    policies = Policies(log_p, log_q, log_p.exp(), log_q.exp())
    wanted = upstream is not None and student.dz is not None
    divergence, dz, _ = compare(policies, beta, OF_MATRIX, gradients=(wanted, False))
    rest = policies.p[:, -1:]
    of_rest = torch.where(s == 0, 0, log_s - _weighted(e, z).sum(1, keepdim=True) / s)  # the entropy of the others among them
    entropy = entropy_of(log_p, policies.p, OF_MATRIX, gradient=False)[0]
    entropy = entropy + torch.where(rest == 0, 0, rest * of_rest).squeeze(1)
    if upstream is None or dz is None:
        return divergence, entropy
    dz.mul_(upstream.divergence.unsqueeze(1))
    share = torch.where(s == 0, 0, e / s)  # of one of the others in their bucket
    whole = share * dz[:, -1:]
    if upstream.entropy is not None:
        g, mean = upstream.entropy.unsqueeze(1), entropy.unsqueeze(1)
        whole.sub_(g * _weighted(share * rest, z - log_s + log_p[:, -1:] + mean))
        dz = dz[:, :-1] - g * _weighted(policies.p[:, :-1], log_p[:, :-1] + mean)
    whole.scatter_(1, ids, dz[:, : ids.shape[1]])
    _write(student, whole, slope)
    return divergence, entropy


def _slope(side: Side, z: Tensor) -> Tensor | None:  # [r, V]
    """Return the slope of the softcap, where there is one and a gradient is wanted."""
    if side.readout.softcap is None or side.dz is None:
        return None
    return (z * (side.readout.temperature / side.readout.softcap)).square_().neg_().add_(1)  # 1 − tanh²


def _log_policy_(side: Side) -> tuple[Tensor, Tensor | None]:  # -> [r, V], [r, V]
    """Return ``ln softmax`` of the logits, in place of the products; and the slope of the softcap, where there is one."""
    z = to_logits_(side.products, side.bias, side.readout)
    slope = _slope(side, z)
    z.sub_(z.amax(1, keepdim=True).clamp_(min=lowest(z.dtype)))
    s = z.exp().sum(1, keepdim=True)
    return z.sub_(s.log_().masked_fill_(s == -math.inf, math.nan)), slope


def _write(side: Side, dz: Tensor, slope: Tensor | None) -> None:
    assert side.dz is not None
    if slope is not None:
        dz.mul_(slope)
    side.dz.copy_(dz.mul_(side.readout.logit_scale / side.readout.temperature))
