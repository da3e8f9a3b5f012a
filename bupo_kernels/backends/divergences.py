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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bupo_kernels.backends.algebra import in_order, lowest
from bupo_kernels.backends.base import Candidate, Exchange, Problem, Readout
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

    def working_memory(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, *, shard: bool = False) -> int:
        """Return the bytes that :meth:`rows`, or for a ``shard`` :meth:`shard_rows`, takes beside the matrices."""
        return 0

    def top_rows(
        self, student: Side, teacher: Top, beta: float, upstream: Upstream | None, strategy: str | None
    ) -> tuple[Tensor, Tensor]:  # [n] each
        """Return what :meth:`rows` does, of a teacher that is known by its top. Asked only where :meth:`why_not_top` gives None."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel for the top of a teacher")

    def why_not_top(self) -> str | None:
        """Return the reason :meth:`top_rows` cannot run, or None."""
        return "it has no kernel for teacher_top"

    def shard_rows(
        self, student: Side, teacher: Side | Top, beta: float, upstream: Upstream | None, exchange: Exchange
    ) -> tuple[Tensor, Tensor]:  # [n] each
        """Return what :meth:`rows` or :meth:`top_rows` does, equal on all ranks, of sides that have the columns of this rank
        alone. Asked only where :meth:`why_not_shard` gives None."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel for shards of a vocabulary")

    def exchanged(self, top: int | None, beta: float) -> tuple[int, ...]:
        """Return how many numbers a row :meth:`shard_rows` tells the other ranks in one exchange after the other, of a teacher of
        so many ``top`` ids, or for None of one that has logits."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel for shards of a vocabulary")

    def why_not_shard(self) -> str | None:
        """Return the reason :meth:`shard_rows` cannot run, or None."""
        return "it takes rows from logits to gradients in one kernel, and with group= ranks exchange sums in between"


class TorchDivergence(DivergenceRows):
    """The row kernel in plain torch, on any device and in any dtype: a block of whole rows at a time."""

    strategies = ()

    def why_not(self, problem: Problem, strategy: str | None) -> str | None:
        return None

    def working_memory(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, *, shard: bool = False) -> int:
        # Of a shard logits stay where products were, and log-probs are two matrices more.
        return (TEMPORARIES + 2 * shard) * min(rows, _block_rows(vocab, device)) * vocab * dtype.itemsize

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

    def why_not_shard(self) -> str | None:
        return None

    def exchanged(self, top: int | None, beta: float) -> tuple[int, ...]:
        # Two statistics of both sides, then the sums of the divergence and of the entropy.
        return (4, 2 + (beta not in (FORWARD_KL, REVERSE_KL))) if top is None else (top + 3,)

    def shard_rows(
        self, student: Side, teacher: Side | Top, beta: float, upstream: Upstream | None, exchange: Exchange
    ) -> tuple[Tensor, Tensor]:
        if isinstance(teacher, Top):
            return _shard_top_rows(student, teacher, beta, upstream, exchange)
        return _shard_rows(student, teacher, beta, upstream, exchange)


def _block_rows(vocab: int, device: torch.device) -> int:
    return max((CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS) // max(vocab, 1), 1)


def _blocks(products: Tensor) -> Iterator[slice]:  # [n, V]
    """Yield the blocks of rows that the torch kernel takes at a time."""
    count, vocab = products.shape
    step = _block_rows(vocab, products.device)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _in_blocks(
    products: Tensor,  # [n, V]
    upstream: Upstream | None,
    of_block: Callable[[slice, Upstream | None], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:  # [n] each
    """Return divergence and entropy of all rows from those of one block of them after the other."""
    divergence, entropy = (products.new_empty(len(products)) for _ in range(2))
    for block in _blocks(products):
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
    policies: Policies,
    beta: float,
    sums: Sums,
    *,
    gradients: tuple[bool, bool],
    parts: Sequence[Tensor] | None = None,  # [n] each
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Return the sums over each row that its divergence is made of, for :func:`value_of`: one of a KL, and of a mixture that of the
    student and that of the teacher; and the derivatives by the logits of both, where ``gradients`` asks for them. Sums that are
    given as ``parts`` are not taken again: those of rows whose other columns are elsewhere."""
    log_p, log_q, p, q = policies
    if beta in (FORWARD_KL, REVERSE_KL):
        forward = beta == FORWARD_KL
        of, other, ahead = (q, p, log_q - log_p) if forward else (p, q, log_p - log_q)
        found = [sums.total(_weighted(of, ahead)) if parts is None else parts[0]]
        by_of, by_other = reversed(gradients) if forward else gradients
        of_own = _centred(of, ahead, value_of(found, beta), sums) if by_of else None
        of_other = other - of if by_other else None
        return (found, of_other, of_own) if forward else (found, of_own, of_other)
    mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    found, derivatives = [], []
    for i, (share, x, log_x, wanted) in enumerate(((1 - beta, p, log_p, gradients[0]), (beta, q, log_q, gradients[1]))):
        ahead = log_x - mixture
        found.append(sums.total(_weighted(x, ahead)) if parts is None else parts[i])
        derivatives.append(_centred(x, ahead, found[-1], sums).mul_(share) if wanted else None)
    return found, derivatives[0], derivatives[1]


def value_of(parts: Sequence[Tensor], beta: float) -> Tensor:  # [n] each -> [n]
    """Return the divergence of each row from the sums of :func:`compare`."""
    if beta in (FORWARD_KL, REVERSE_KL):
        return parts[0].clamp(min=0)
    return ((1 - beta) * parts[0] + beta * parts[1]).clamp_(0, largest(beta))


def entropy_of(
    log_p: Tensor, p: Tensor, sums: Sums, *, gradient: bool, value: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the entropy of each row, which is not taken again where it is given as ``value`` [n], and its derivative by the logits
    where it is wanted."""
    if value is None:
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
    return _of_policies(policies, student, teacher, (slope_p, slope_q), beta, upstream)


def _of_policies(
    policies: Policies,  # [r, V] each
    student: Side,
    teacher: Side,
    slopes: tuple[Tensor | None, Tensor | None],  # [r, V] each
    beta: float,
    upstream: Upstream | None,
    parts: Sequence[Tensor] | None = None,  # [r] each, as in compare
    entropy: Tensor | None = None,  # [r], where it is known
) -> tuple[Tensor, Tensor]:  # [r] each
    """Return divergence and entropy, and write the gradients."""
    wanted = upstream is not None and student.dz is not None, upstream is not None and teacher.dz is not None
    of_entropy = wanted[0] and upstream is not None and upstream.entropy is not None
    entropy, by_entropy = entropy_of(policies.log_p, policies.p, OF_MATRIX, gradient=of_entropy, value=entropy)
    parts, dz, du = compare(policies, beta, OF_MATRIX, gradients=wanted, parts=parts)
    if upstream is not None:
        g = upstream.divergence.unsqueeze(1)
        if dz is not None:
            dz.mul_(g)
            if by_entropy is not None and upstream.entropy is not None:
                dz.add_(by_entropy.mul_(upstream.entropy.unsqueeze(1)))
            _write(student, dz, slopes[0])
        if du is not None:
            _write(teacher, du.mul_(g), slopes[1])
    return value_of(parts, beta), entropy


def _top_rows(student: Side, teacher: Top, beta: float, upstream: Upstream | None) -> tuple[Tensor, Tensor]:  # -> [r], [r]
    """Return divergence and entropy of a block of rows, and write its gradient."""
    z, ids = to_logits_(student.products, student.bias, student.readout), teacher.ids
    slope, upstream = _slope(student, z), upstream if student.dz is not None else None
    own, others, e = _others_(z, ids)
    found = _of_buckets(own, others, teacher, beta, upstream)
    if upstream is not None:
        _write(student, _by_logits(found, others, z, e, ids, upstream), slope)
    return found.divergence, found.entropy


class Others(NamedTuple):
    """The statistics of a student's logits beyond a top, as ``algebra.py`` has them of all, [r, 1] each."""

    m: Tensor
    s: Tensor
    t: Tensor


def _others_(z: Tensor, ids: Tensor) -> tuple[Tensor, Others, Tensor]:  # [r, V], [r, k] -> [r, k], …, [r, V]
    """Return the logits of ``ids``, the statistics of all others and their ``e^(z−m)``. Leave ``z − m`` in place of ``z``, −inf for
    ``ids``."""
    own = z.gather(1, ids)
    z.scatter_(1, ids, -math.inf)
    m = z.amax(1, keepdim=True).clamp_(min=lowest(z.dtype))
    e = torch.exp(z.sub_(m))
    return own, Others(m, e.sum(1, keepdim=True), _weighted(e, z).sum(1, keepdim=True)), e


class Buckets(NamedTuple):
    """The results of rows of k ids and a bucket for the others."""

    divergence: Tensor  # [r]
    entropy: Tensor  # [r], of the student's whole policy
    log_p: Tensor  # [r, k + 1]
    p: Tensor  # [r, k + 1]
    dz: Tensor | None  # [r, k + 1], by the student's logits, of which the last is the logsumexp of the others

    def rows(self, block: slice) -> Buckets:
        """Return the results of some of the rows."""
        divergence, entropy, log_p, p, dz = self
        return Buckets(divergence[block], entropy[block], log_p[block], p[block], dz if dz is None else dz[block])


def _of_buckets(
    own: Tensor,  # [r, k]
    others: Others,
    teacher: Top,
    beta: float,
    upstream: Upstream | None,
) -> Buckets:
    """Return what follows from the logits of the top ids and the statistics of all others.

    The student's policy on k + 1 buckets is the softmax of its k logits and of the logsumexp of the others. That one is summed over
    these others themselves: what 1 leaves of k probabilities would be lost in rounding where they are nearly all.
    """
    m, s, t = others
    log_s = s.log()
    buckets = torch.cat([own, m + log_s], 1)
    log_p, log_q = buckets - buckets.logsumexp(1, keepdim=True), teacher.with_rest()
    # Where nothing is left for the student, as of a top of the whole vocabulary, what rounding leaves for the teacher is nothing.
    rounding = math.log(max(own.shape[1], 1) * torch.finfo(own.dtype).eps)
    log_q[:, -1].masked_fill_((log_p[:, -1] == -math.inf) & (log_q[:, -1] <= rounding), -math.inf)
    policies = Policies(log_p, log_q, log_p.exp(), log_q.exp())
    parts, dz, _ = compare(policies, beta, OF_MATRIX, gradients=(upstream is not None, False))
    rest = policies.p[:, -1:]
    of_rest = torch.where(s == 0, 0, log_s - t / s)  # the entropy of the others among them
    entropy = entropy_of(log_p, policies.p, OF_MATRIX, gradient=False)[0]
    entropy = entropy + torch.where(rest == 0, 0, rest * of_rest).squeeze(1)
    return Buckets(value_of(parts, beta), entropy, log_p, policies.p, dz)


def _by_logits(
    found: Buckets,
    others: Others,
    z: Tensor,  # [r, V]: z − m, −inf for ids
    e: Tensor,  # [r, V]: e^(z−m)
    ids: Tensor,  # [r, k]
    upstream: Upstream,
) -> Tensor:  # [r, V]
    """Return the gradient by the student's logits."""
    assert found.dz is not None
    dz = found.dz.mul_(upstream.divergence.unsqueeze(1))
    share = torch.where(others.s == 0, 0, e / others.s)  # of one of the others in their bucket
    whole = share * dz[:, -1:]
    if upstream.entropy is not None:
        g, mean, rest = upstream.entropy.unsqueeze(1), found.entropy.unsqueeze(1), slice(-1, None)
        whole.sub_(g * _weighted(share * found.p[:, rest], z - others.s.log() + found.log_p[:, rest] + mean))
        dz = dz[:, :-1] - g * _weighted(found.p[:, :-1], found.log_p[:, :-1] + mean)
    return whole.scatter_(1, ids, dz[:, : ids.shape[1]])


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


def _shard_rows(
    student: Side,  # of this rank's columns
    teacher: Side,
    beta: float,
    upstream: Upstream | None,
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:  # [n] each
    """Return divergence and entropy of rows, of whose columns each rank has some, and write the gradients of these.

    Logits are looked at three times. After the first look ranks exchange maxima and sums of both sides, after the second what their
    columns add to the sums that values and the means of gradients are.
    """
    sides = student, teacher
    own = [torch.cat([_shard_statistics_(side.rows(block)) for block in _blocks(side.products)], 1) for side in sides]
    of_student, of_teacher = exchange.gathered(torch.cat(own)).split(2, 1)  # [R, 2, n] each
    normalisers = _normaliser(of_student), _normaliser(of_teacher)

    def policies_of(block: slice) -> Policies:
        log_p, log_q = (
            side.products[block].sub(m[block].unsqueeze(1)).sub_(log_s[block].unsqueeze(1))
            for side, (m, log_s) in zip(sides, normalisers, strict=True)
        )
        return Policies(log_p, log_q, log_p.exp(), log_q.exp())

    def sums_of(block: slice) -> Tensor:  # -> [2 or 3, r]
        policies = policies_of(block)
        parts, *_ = compare(policies, beta, OF_MATRIX, gradients=(False, False))
        return torch.stack([*parts, _weighted(policies.p, policies.log_p).sum(1)])

    *parts, of_entropy = in_order(exchange.gathered(torch.cat([sums_of(block) for block in _blocks(student.products)], 1)))
    entropy = of_entropy.neg().clamp_(min=0)
    if upstream is not None:
        for block in _blocks(student.products):
            some = student.rows(block), teacher.rows(block)
            slopes = _slope(some[0], some[0].products), _slope(some[1], some[1].products)
            known = [part[block] for part in parts]
            _of_policies(policies_of(block), *some, slopes, beta, upstream.rows(block), known, entropy[block])
    return value_of(parts, beta), entropy


def _shard_statistics_(side: Side) -> Tensor:  # [r, V_r] -> [2, r]
    """Leave logits in place of the products of a shard's columns, and return their ``m`` and ``s``."""
    z = to_logits_(side.products, side.bias, side.readout)
    m = z.new_full((len(z),), lowest(z.dtype))
    if z.shape[1]:
        m = torch.maximum(m, z.amax(1))
    return torch.stack([m, z.sub(m.unsqueeze(1)).exp_().sum(1)])


def _normaliser(of_shards: Tensor) -> tuple[Tensor, Tensor]:  # [R, 2, n] -> [n], [n]
    """Return ``m`` and ``ln s`` of whole rows, NaN where a row has no logits, from ``m`` and ``s`` of all shards."""
    maxima, sums = of_shards.unbind(1)
    m = maxima.amax(0)
    log_s = in_order((maxima - m).exp_() * sums).log_()
    return m, log_s.masked_fill_(log_s == -math.inf, math.nan)


def _shard_top_rows(
    student: Side,  # of this rank's columns
    teacher: Top,
    beta: float,
    upstream: Upstream | None,
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:  # [n] each
    """Return what :func:`_top_rows` does, of rows of whose columns each rank has some. An id of the top is a column of one rank,
    whose logit ranks exchange, with the statistics of the others."""
    columns, upstream = student.products.shape[1], upstream if student.dz is not None else None
    ids = teacher.ids - exchange.first
    here = (ids >= 0) & (ids < columns)
    ids = ids.masked_fill(~here, columns)  # the ids of other ranks are in one column more, which is dropped

    def with_one_more(z: Tensor) -> Tensor:  # [r, V_r] -> [r, V_r + 1]
        return torch.cat([z, z.new_full((len(z), 1), -math.inf)], 1)

    own = []
    for block in _blocks(student.products):
        some = student.rows(block)
        top, others, _ = _others_(with_one_more(to_logits_(some.products, some.bias, some.readout)), ids[block])
        own.append(torch.cat([top.masked_fill_(~here[block], 0), *others], 1).T)
    gathered = exchange.gathered(torch.cat(own, 1)).transpose(1, 2)  # [R, n, k + 3]
    tops, maxima, sums, moments = gathered.split([ids.shape[1], 1, 1, 1], 2)
    m = maxima.amax(0)
    ahead = maxima - m
    shrink = ahead.exp()
    whole = Others(m, in_order(shrink * sums), in_order(shrink * (moments + ahead * sums)))
    found = _of_buckets(in_order(tops), whole, teacher, beta, upstream)
    if upstream is not None:
        for block in _blocks(student.products):
            some, of_block = student.rows(block), Others(*(x[block] for x in whole))
            z = with_one_more(some.products).scatter_(1, ids[block], -math.inf).sub_(of_block.m)
            dz = _by_logits(found.rows(block), of_block, z, z.exp(), ids[block], upstream.rows(block))
            _write(some, dz[:, :columns], _slope(some, some.products))
    return found.divergence, found.entropy
