"""The logit lens: statistics without gradient, of several policies that share an unembedding.

Numerics are those of ``functional.py``. It waits for the device, and what ``torch.compile`` traces of it is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bupo_kernels import derivatives, dispatch, engine, vocab_parallel
from bupo_kernels.backends import lens_loop
from bupo_kernels.backends.base import Operands
from bupo_kernels.request import Request, check_plain

LENS_OUTPUTS = (
    *("logsumexp", "logprobs", "entropy", "max_probability", "argmax", "rank"),
    *("kl_to_final", "kl_from_final", "jsd", "pairwise_kl"),
)
OUTPUTS_OF_ANY_BACKEND = {"logsumexp", "logprobs", "entropy", "max_probability"}  # the others stream in torch


class LensStatistics(NamedTuple):
    """Statistics of the L policies of a logit lens, None where not asked for: fp32 (float64 for float64 inputs), ids int64, and 0
    on masked rows. ``[...]`` is the shape of one layer's rows."""

    logsumexp: Tensor | None = None  # [L, ...]
    logprobs: Tensor | None = None  # [L, ...] of the targets, never above 0
    entropy: Tensor | None = None  # [L, ...] nats, in [0, ln V]
    max_probability: Tensor | None = None  # [L, ...]
    argmax: Tensor | None = None  # [L, ...] the lowest id where several logits are equal
    rank: Tensor | None = None  # [L, ...] of the target, from 0: how many logits are strictly greater; equal ones do not count
    top_ids: Tensor | None = None  # [L, ..., k] most probable first; among equal logits any order, and any of them at the end
    top_logprobs: Tensor | None = None  # [L, ..., k]
    kl_to_final: Tensor | None = None  # [L, ...] KL(π^l ‖ π), at least 0; inf where π alone rules a column out
    kl_from_final: Tensor | None = None  # [L, ...] KL(π ‖ π^l), at least 0
    jsd: Tensor | None = None  # [L, ...] ½ KL(π^l ‖ μ) + ½ KL(π ‖ μ) with μ = ½ (π^l + π), in [0, ln 2]
    pairwise_kl: Tensor | None = None  # [L, L, ...] [l, k] = KL(π^l ‖ π^k), at least 0


@torch.no_grad()
def logit_lens(
    hidden_states: Tensor | Sequence[Tensor],  # [L, ..., D], or L x [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor | None = None,  # [...] int64
    *,
    norm: Callable[[Tensor], Tensor] | None = None,  # [n, D] -> [n, D]
    final: Tensor | None = None,  # [..., D]
    top_k: int = 0,
    outputs: Sequence[str] = ("entropy",),
    **options: Any,
) -> LensStatistics:
    """Return what the hidden states of L layers say through one unembedding, ``softmax(h Wᵀ)``, without ``[L, ..., V]`` logits.

    Args:
        hidden_states: of L layers, attention or FFN outputs of a model: a tensor, or a sequence of tensors, which may be any views.
        weight: the unembedding; as in :func:`bupo_kernels.linear_logprobs`.
        targets: ids in ``[0, V)``, needed for ``logprobs`` and ``rank``. One equal to ``ignore_index`` masks its row.
        norm: applied to every hidden state before the unembedding, e.g. the model's final norm. None reads them raw, as BuPO does.
        final: the final policy's hidden state as the head reads it (``norm`` is *not* applied to it), needed for ``kl_to_final``,
            ``kl_from_final`` and ``jsd``.
        top_k: how many of the most probable ids, with their log-probs; up to V.
        outputs: names of the fields of :class:`LensStatistics` wanted, except ``top_…``; others stay None and cost nothing.
        options: ``bias``, ``temperature``, ``logit_scale``, ``softcap``, ``mask``, ``ignore_index``, ``group``, ``backend`` and
            ``memory_budget`` of :func:`bupo_kernels.linear_logprobs`. All policies share them.

    Returns:
        :class:`LensStatistics`; no gradient: they are constants in a loss.

    Cost: 2·L·N·V·D FLOP (L+1 with ``final``), and one pass over W for all layers of as many rows as the budget has room for, in
    most calls all. ``logsumexp``, ``logprobs``, ``entropy`` and ``max_probability`` alone run on any backend. Everything else has
    products of the library (on a CPU fp32 ones, to which 16-bit operands are upcast; bf16 ones in C++ where the CPU has them) and
    row kernels: in C++ on a CPU but for float64, in Triton where ``backend="triton"`` asks for it, else in torch. ``rank`` and
    ``jsd`` take a second look at the logits: C++ and Triton (but for ``pairwise_kl``) keep those of as many rows at a time as the
    budget has room for; torch, and they where that is fewer than 256 rows of all layers together, form them again, which doubles
    the work. ``pairwise_kl`` adds L/D of it. On two cores with AVX-512-BF16 (31 layers, V = 49,152, D = 576), in units of the bare
    products: divergences from the final policy with the top 10 0.94, ``pairwise_kl`` 1.03, ``rank`` 1.10, ``jsd`` 1.21; in bf16
    1.11, 1.33, 1.52 and 1.65.

    With a ``group``, each rank of which has some of the rows of ``weight`` and ``bias`` (:func:`bupo_kernels.linear_logprobs`), all
    pass the same hidden states, targets and options, and all get the same results, bit for bit. Each looks at its own columns; of
    equal logits the lowest rank's come first. Between the looks ranks tell one another numbers of every row, each of 4 bytes (8 of
    float64): of a policy 2, and one more for each of entropy or any KL, ``logprobs`` or ``rank``, and ``argmax``; 2 for each of the
    top; 2 for KLs with the final policy, and one for each policy that it is compared with in ``pairwise_kl``; after the second look
    one each for ``rank`` and ``jsd``. (What runs on any backend takes 4 of a policy.) So 31 layers with entropy and rank
    are 31 · 20 bytes a row, their KLs to the final policy with the top 10 are 32 · 100.

    Numerics: as :func:`bupo_kernels.linear_logprobs`; a KL or ``jsd`` is within ``4e-6 · (1 + max|z|)`` of float64 on the same
    inputs. ``rank`` compares fp32 logits exactly: those within rounding of the target's may fall on either side.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    group, options = vocab_parallel.group_of(options, weight)
    with vocab_parallel.telling(group, weight):
        states, request = _checked(hidden_states, weight, targets, norm, final, top_k, outputs, options)
        operands, active = request.operands(), request.active()
        rows = active.flatten().nonzero().squeeze(1)
        if group is None:
            engine.check_rows(operands, active, request.ignore_index)
    if not top_k and set(outputs) <= OUTPUTS_OF_ANY_BACKEND:
        parts = _by_any_backend(states, request, lens_loop.checked_norm(norm), operands, rows, outputs)
    else:
        with vocab_parallel.telling(group, weight), engine.on(operands.hidden.device):
            problem = engine.problem_of(operands, len(rows), request.settings())
            _, kernels, strategy, _ = dispatch.choose_among(dispatch.LENSES, problem, request.backend)
            wanted = (outputs, top_k, request.memory_budget)
            ranks = 0 if group is None else vocab_parallel.ranks_of(group)
            loop = lens_loop.LensLoop(states, final, norm, operands, len(rows), *wanted, kernels, strategy, ranks)
        if group is None:
            with engine.on(operands.hidden.device):
                parts = [loop.run(some) for some in rows.split(loop.rows)]
        else:
            parts = _on_ranks(loop, request, active, rows)
    found = {}
    for name in parts[0]:
        place = 2 if name == "pairwise_kl" else 1
        found[name] = _on_all_rows(torch.cat([part[name] for part in parts], place), rows, active, place)
    return LensStatistics(**found)


def _checked(
    hidden_states: Tensor | Sequence[Tensor],
    weight: Tensor,
    targets: Tensor | None,
    norm: Callable[[Tensor], Tensor] | None,
    final: Tensor | None,
    top_k: int,
    outputs: tuple[str, ...],
    options: dict[str, Any],
) -> tuple[list[Tensor], Request]:
    """Return the hidden states layer by layer, and the request of the first one with what all share. Raise for what a lens does not
    accept."""
    if unknown := [name for name in outputs if name not in LENS_OUTPUTS]:
        raise ValueError(f"outputs: {unknown[0]!r} given, accepted are {', '.join(map(repr, LENS_OUTPUTS))}")
    if "return_entropy" in options:
        raise TypeError("return_entropy: given, accepted are names in outputs")
    for name, given, needed_by in (("targets", targets, ("logprobs", "rank")), ("final", final, lens_loop.COMPARED)):
        if given is None and (asking := [output for output in outputs if output in needed_by]):
            raise ValueError(f"{name}: None given, which outputs={asking[0]!r} needs")
    states = list(hidden_states)
    if not states:
        raise ValueError("hidden_states: none given, accepted are those of at least one layer")
    compared = {f"hidden_states[{i}]": x for i, x in enumerate(states)} | ({} if final is None else {"final": final})
    derivatives.refuse(compared | {"weight": weight, "targets": targets}, statistic=True)
    _check_alike(compared)
    if states[0].dim() < 2:
        raise ValueError(f"hidden_states: layers of shape {tuple(states[0].shape)} given, accepted are [L, ..., D] or L x [..., D]")
    if norm is not None and not callable(norm):
        raise TypeError(f"norm: {type(norm).__name__} given, accepted are None and functions [n, D] -> [n, D]")
    if targets is None:
        targets = torch.zeros(states[0].shape[:-1], dtype=torch.int64, device=states[0].device)
    if options.get("support") is not None:
        raise ValueError("support: given, accepted is None: the policies of a lens are whole")
    request = Request.of(states[0], weight, targets, return_entropy="entropy" in outputs, **options)
    _check_top(top_k, len(request.weight) if request.group is None else None)
    return states, request


def _check_top(top_k: int, vocab: int | None) -> None:
    """Raise for a number that no top can have, of so many columns; for None, of any number of them."""
    accepted = "0 and above" if vocab is None else f"0 to {vocab}, the size of the vocabulary"
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= (top_k if vocab is None else vocab):
        raise ValueError(f"top_k: {top_k!r} given, accepted are {accepted}")


def _on_ranks(
    loop: lens_loop.LensLoop,
    request: Request,
    active: Tensor,  # [...] bool
    rows: Tensor,  # [n]
) -> list[dict[str, Tensor]]:
    """Return what the ``loop`` gives of all ranks' columns, for some of the rows after the other: on each rank those of the rank
    with the smallest room."""
    shard = _shard_of(loop.operands, request, f"{loop.policies} {loop.outputs} {loop.top_k}", loop.rows)
    at_once = rows.split(int(shard.chunk))
    shapes = ((numbers, len(some)) for some in at_once for numbers in loop.exchanged())
    with engine.on(rows.device), vocab_parallel.Exchanges(shard, loop.dtype, shapes) as exchange:
        engine.check_rows(loop.operands, active, request.ignore_index, shard)
        _check_top(loop.top_k, exchange.vocab)
        return [loop.run(some, exchange) for some in at_once]


def _shard_of(operands: Operands, request: Request, wanted: str, at_once: int) -> vocab_parallel.Shard:
    """Return what this rank has of a vocabulary, from what all ranks tell of the results that are ``wanted``."""
    header = vocab_parallel.Header.of(operands, request.active(), f"logit_lens {wanted} {request.ignore_index}", at_once)
    return vocab_parallel.Shard.of(str(request.group), header, operands.hidden.device, wait=True)


def _on_all_rows(values: Tensor, rows: Tensor, active: Tensor, place: int) -> Tensor:
    """Return ``values``, which are of the active ``rows`` [n] at ``place`` in their shape, for all rows of ``active`` [...], 0 on
    the others."""
    before, after = values.shape[:place], values.shape[place + 1 :]
    whole = values.new_zeros(*before, active.numel(), *after).index_copy_(place, rows, values)
    return whole.view(*before, *active.shape, *after)


def _by_any_backend(
    states: list[Tensor],
    request: Request,
    norm: Callable[[Tensor], Tensor],
    operands: Operands,
    rows: Tensor,  # [n]
    outputs: tuple[str, ...],
) -> list[dict[str, Tensor]]:
    """Return [L, n] of each of the outputs, for some of the rows after the other: those of all layers, below one another, are one
    call of the op."""
    layers, width = len(states), request.weight.shape[1]
    per_row = layers * (4 * width * states[0].element_size() + 64)  # gathered, normed, stacked, cast; statistics
    at_once = max(request.memory_budget // 2 // per_row, 1)
    if request.group is not None:
        at_once = int(_shard_of(operands, request, f"{layers} {outputs}", at_once).chunk)
    parts = []
    for some in rows.split(at_once):
        index = operands.coordinates(some)
        temperature = request.temperature
        with vocab_parallel.telling(request.group, request.hidden):
            hidden = torch.stack([norm(state[index]) for state in states]).to(request.hidden.dtype)
        stacked = replace(
            request,
            hidden=hidden,
            targets=request.targets[index].expand(layers, -1),
            mask=None,
            temperature=temperature[index].expand(layers, -1) if isinstance(temperature, Tensor) else temperature,
            memory_budget=max(request.memory_budget - len(some) * per_row, 1),
        )
        statistics = stacked.statistics()
        # p of the maximum is e^(m−m) / s.
        found = {**statistics._asdict(), "max_probability": (-statistics.log_s).exp()}
        parts.append({name: found[name].view(layers, -1) for name in outputs})
    return parts


def _check_alike(named: dict[str, Tensor]) -> None:
    """Raise unless all are floating-point tensors of the first one's shape, device and, but for autocast, which casts them,
    dtype."""
    (first_name, first), *_ = named.items()
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: {given} given, accepted is a Tensor of floating point")
        check_plain(name, tensor)
        same_dtype = tensor.dtype == first.dtype or torch.is_autocast_enabled(first.device.type)
        if tensor.shape != first.shape or tensor.device != first.device or not same_dtype:
            raise ValueError(
                f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} given, accepted is {first.dtype} of "
                f"{tuple(first.shape)} on {first.device}, as {first_name}"
            )
