"""The floor, naive logits, and this library. Other libraries are in :mod:`benchmarks.peers`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.contenders import GROUPS, Contender, policy_loss_of
from benchmarks.inputs import IGNORED, Inputs
from bupo_kernels import PolicyObjective, explain, linear_logprobs, linear_policy_loss, logit_lens

ALL_OF_E = 96 * 2**30  # bytes: E of every row, and the widest slices
LENS = ("logprobs", "entropy")


def floor(group: str, x: Inputs) -> Contender:
    """Return the library's bare products, as many as the group needs, over the active rows, into memory that is there already."""
    n, vocab, width = x.active_rows, x.case.vocab, x.case.width
    shapes = {"logits": (n, vocab)} | ({"hidden": (n, width), "weight": (vocab, width)} if GROUPS[group] == 3 else {})
    out: dict[str, Tensor] = {}

    def poison() -> None:
        for name, shape in shapes.items():
            if name not in out:
                out[name] = torch.empty(shape, dtype=x.hidden.dtype, device=x.device)
            out[name].fill_(torch.nan)

    @torch.no_grad()
    def call(x: Inputs) -> tuple[Tensor, ...]:
        for state in x.counted:
            torch.mm(state, x.weight.T, out=out["logits"])
        if GROUPS[group] == 3:
            torch.mm(out["logits"], x.weight, out=out["hidden"])
            torch.mm(out["logits"].T, state, out=out["weight"])
        return tuple(out.values())

    return Contender("bare GEMM", "floor", group, "products", call, GROUPS[group], poison=poison)


def naive(group: str, x: Inputs) -> Iterator[Contender]:
    """Yield logits in the operands' dtype, with all else in fp32, of every row, as where nobody tells the head which count."""
    products = GROUPS[group] * x.case.rows / x.active_rows
    if group == "lens":
        yield Contender("naive logits", "naive", group, "log-prob, entropy", _naive_lens, products, remark="a layer at a time")
        return
    for name, wrap in (("naive logits", lambda f: f), ("naive logits, torch.compile", torch.compile)):
        if group == "one-pass loss":
            logprobs = wrap(_logprobs_of_logits)
            call = policy_loss_of(lambda x, f=logprobs: f(*x.leaves, x.labels))
            yield Contender(name, "naive", group, "policy loss", call, products)
        else:
            statistics = wrap(_statistics_of_logits)
            call = lambda x, f=statistics: f(*x.leaves, x.labels)  # noqa: E731
            yield Contender(name, "naive", group, "log-prob, entropy", call, products)


def _logprobs_of_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def _statistics_of_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def _naive_lens(x: Inputs) -> tuple[Tensor, ...]:
    found = [_statistics_of_logits(state, x.weight, x.labels) for state in x.states]
    return tuple(map(torch.stack, zip(*found, strict=True)))


def ours(group: str, x: Inputs) -> Iterator[Contender]:
    if group == "one-pass loss":
        ways = [("native", None), ("torch", None), ("triton", None), ("triton, all rows at once", ALL_OF_E)]
        yield from (_policy_loss(x, *way) for way in ways)
    elif group == "lens":
        yield from (_lens(x, f"bupo_kernels {backend}", LENS, backend, 1) for backend in ("native", "torch", "triton"))
        with_final = (x.case.layers + 1) / x.case.layers
        yield _lens(x, "bupo_kernels torch, and KL to the last layer", (*LENS, "kl_to_final"), "torch", with_final)
        yield _lens(x, "bupo_kernels torch, and KL between all layers", (*LENS, "pairwise_kl"), "torch", 1)
        two_passes = (*LENS, "rank", "kl_to_final")
        yield _lens(x, "bupo_kernels torch, and rank and KL, in two passes", two_passes, "torch", 2 * with_final)
    else:
        ways = [("native", None), ("torch", None), ("triton", None)]
        if group == "forward+backward":
            ways = [*ways[:2], ("triton:recompute", None), ("triton:cached", ALL_OF_E)]
        yield from (_statistics(x, group, *way) for way in ways)


def _statistics(x: Inputs, group: str, backend: str, budget: int | None) -> Contender:
    options = {"backend": backend, "memory_budget": budget}

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        found = linear_logprobs(*x.leaves, x.targets, ignore_index=IGNORED, **options)
        return found.logprobs, found.entropy

    with torch.set_grad_enabled(group != "forward"):
        planned = _planned(x, **options)
    return Contender(f"bupo_kernels {backend}", "ours", group, "log-prob, entropy", call=call, **planned)


def _policy_loss(x: Inputs, way: str, budget: int | None) -> Contender:
    objective = PolicyObjective(clip=None)
    options = {"backend": way.partition(",")[0], "memory_budget": budget}

    def call(x: Inputs) -> Tensor:
        loss, _ = linear_policy_loss(*x.leaves, x.targets, x.advantages, objective=objective, ignore_index=IGNORED, **options)
        return loss

    planned = _planned(x, objective=objective, **options)
    return Contender(f"bupo_kernels {way}", "ours", "one-pass loss", "policy loss", call=call, **planned)


def _lens(x: Inputs, name: str, outputs: tuple[str, ...], backend: str, products: float) -> Contender:
    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        final = x.states[-1] if "kl_to_final" in outputs else None
        options = {"outputs": outputs, "ignore_index": IGNORED, "backend": backend}
        seen = logit_lens(x.states, x.weight.detach(), x.targets, final=final, **options)
        return seen.logprobs, seen.entropy

    with torch.no_grad():
        planned = _planned(x, backend=backend) | {"products": products, "stated": None}
    return Contender(name, "ours", "lens", "log-prob, entropy", call=call, **planned)


def _planned(x: Inputs, **options) -> dict:
    """Return the answer of ``explain`` to these inputs: products, stated memory, a remark; or why not."""
    try:
        plan = explain(*x.leaves, x.targets, ignore_index=IGNORED, **options)
    except ValueError as error:
        reason = str(error).partition("it cannot run this: ")[2] or str(error)
        return {"products": 0, "why_not": lambda x: reason}
    memory, kept = plan.tile_plan.memory, plan.tile_plan.cached_rows
    widened = plan.backend == "torch" and x.device.type == "cpu" and x.hidden.itemsize == 2
    by_itself = explain(*x.leaves, x.targets, **options | {"backend": "auto"}).backend
    remarks = {
        "what auto takes here": plan.backend == by_itself,
        f"E of {kept} rows kept": kept > 0,
        "products of operands widened to fp32": widened,
    }
    return {
        "products": (plan.flops_forward + plan.flops_backward) / (2 * x.active_rows * x.case.vocab * x.case.width),
        "stated": max(memory.forward, memory.backward) + memory.accumulator,
        "remark": "; ".join(remark for remark, holds in remarks.items() if holds),
    }
