"""The floor, naive logits, and this library. Other libraries are in :mod:`benchmarks.peers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.contenders import GROUPS, Contender, policy_loss_of
from benchmarks.inputs import IGNORED, Inputs
from bupo_kernels import PolicyObjective, explain, linear_logprobs, linear_policy_loss, logit_lens

ALL_OF_E = 96 * 2**30  # bytes: E of every row, and the widest slices
LENS = ("logprobs", "entropy")


def floor(group: str, x: Inputs) -> Contender:
    """The library's bare products, as many as the group needs, over the rows that count, into memory that is there already."""
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

    return Contender("bare GEMM", "floor", group, "products", GROUPS[group], call, poison=poison)


def naive(group: str, x: Inputs) -> Iterator[Contender]:
    """Logits in the operands' dtype, all else in fp32; every row, as where nobody tells the head which count."""
    products = GROUPS[group] * x.case.rows / x.active_rows
    if group == "lens":
        yield Contender("naive logits", "naive", group, "log-prob, entropy", products, _naive_lens, remark="a layer at a time")
        return
    for name, wrap in (("naive logits", lambda f: f), ("naive logits, torch.compile", torch.compile)):
        if group == "one-pass loss":
            logprobs = wrap(_logprobs_of_logits)
            call = policy_loss_of(lambda x, f=logprobs: f(*x.leaves, x.labels))
            yield Contender(name, "naive", group, "policy loss", products, call)
        else:
            statistics = wrap(_statistics_of_logits)
            call = lambda x, f=statistics: f(*x.leaves, x.labels)  # noqa: E731
            yield Contender(name, "naive", group, "log-prob, entropy", products, call)


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
        ways = [("triton", 3, None), ("triton, all rows at once", 3, ALL_OF_E), ("native", 3, None), ("torch", 3, None)]
        yield from (_policy_loss(*way) for way in ways)
    elif group == "lens":
        yield from (_lens(f"bupo_kernels {backend}", LENS, backend, 1) for backend in ("triton", "native", "torch"))
        products = (x.case.layers + 1) / x.case.layers
        yield _lens("bupo_kernels torch, and KL to the last layer", (*LENS, "kl_to_final"), "torch", products)
        yield _lens("bupo_kernels torch, and KL between all layers", (*LENS, "pairwise_kl"), "torch", 1)
        yield _lens("bupo_kernels torch, and rank and KL, in two passes", (*LENS, "rank", "kl_to_final"), "torch", 2 * products)
    else:
        ways = [("native", 1, None), ("torch", 1, None), ("triton", 1, None)]
        if group == "forward+backward":
            ways = [("native", 4, None), ("torch", 4, None), ("triton:recompute", 4, None), ("triton:cached", 3, ALL_OF_E)]
        yield from (_statistics(group, *way) for way in ways)


def _statistics(group: str, backend: str, products: int, budget: int | None) -> Contender:
    options = {"backend": backend, "memory_budget": budget}

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        found = linear_logprobs(*x.leaves, x.targets, ignore_index=IGNORED, **options)
        return found.logprobs, found.entropy

    def stated(x: Inputs) -> int:
        with torch.set_grad_enabled(group != "forward"):
            memory = explain(*x.leaves, x.targets, **options).schedule.memory
        return max(memory.forward, memory.backward + memory.accumulator)

    name = f"bupo_kernels {backend}"
    return Contender(name, "ours", group, "log-prob, entropy", products, call, _refusal(options), stated, _kept(budget))


def _policy_loss(way: str, products: int, budget: int | None) -> Contender:
    objective = PolicyObjective(clip=None)
    options = {"backend": way.partition(",")[0], "memory_budget": budget}

    def call(x: Inputs) -> Tensor:
        loss, _ = linear_policy_loss(*x.leaves, x.targets, x.advantages, objective=objective, ignore_index=IGNORED, **options)
        return loss

    def stated(x: Inputs) -> int:
        memory = explain(*x.leaves, x.targets, objective=objective, **options).schedule.memory
        return memory.forward + memory.accumulator

    name = f"bupo_kernels {way}"
    return Contender(name, "ours", "one-pass loss", "policy loss", products, call, _refusal(options), stated, _kept(budget))


def _kept(budget: int | None) -> str:
    return "E of every row kept" if budget else ""


def _lens(name: str, outputs: tuple[str, ...], backend: str, products: float) -> Contender:
    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        final = x.states[-1] if "kl_to_final" in outputs else None
        options = {"outputs": outputs, "ignore_index": IGNORED, "backend": backend}
        seen = logit_lens(x.states, x.weight.detach(), x.targets, final=final, **options)
        return seen.logprobs, seen.entropy

    return Contender(name, "ours", "lens", "log-prob, entropy", products, call, _refusal({"backend": backend}))


def _refusal(options: dict) -> Callable[[Inputs], str | None]:
    """What the plan says against these inputs."""

    def why_not(x: Inputs) -> str | None:
        try:
            explain(*x.leaves, x.targets, **options)
        except ValueError as error:
            return str(error).partition("it cannot run this: ")[2] or str(error)

    return why_not
