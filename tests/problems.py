"""Inputs, the error model and the memory measurement that the tests of the ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bupo_kernels import reference

# Of the numerics contract: |Δlogprob| ≤ CONTRACT · (1 + max|z|) against float64 on the same inputs.
CONTRACT = 2e-6


@dataclass
class Case:
    """Random operands; ``options`` go to the op and to the oracle alike."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    options: dict = field(default_factory=dict)

    @property
    def oracle_options(self) -> dict:
        return {k: v for k, v in self.options.items() if k not in ("backend", "memory_budget")}


def random_case(rows: int, vocab: int, width: int, *, scale: float = 1.0, dtype=torch.float32, seed: int = 0, **options) -> Case:
    """Logits of standard deviation ``scale`` (before temperature and the like)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, width, generator=generator) * scale).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return Case(hidden, weight, targets, options)


def largest_logit(case: Case) -> float:
    options = {k: v for k, v in case.oracle_options.items() if k in ("bias", "temperature", "logit_scale", "softcap")}
    options = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in options.items()}
    return float(reference.logits(case.hidden.detach().double(), case.weight.detach().double(), **options).abs().max())


def dense_fp32_error(case: Case) -> Tensor:
    """Per row, the error that rounding the logits to fp32 alone makes: fp32 dense product, float64 statistics."""
    with torch.no_grad():
        rounded = (case.hidden.float() @ case.weight.float().T).double()
        exact = case.hidden.double() @ case.weight.double().T
        chosen = [z.log_softmax(-1).gather(1, case.targets[:, None]) for z in (rounded, exact)]
    return (chosen[0] - chosen[1]).abs().squeeze(1)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def assert_same_gradients(got: Sequence[Tensor], want: Sequence[Tensor], case: Case) -> None:
    """Equal up to one rounding to the dtype (of each side) and a few times the contract's bound in every dz."""
    bound = CONTRACT * (1 + largest_logit(case))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= (2 * torch.finfo(a.dtype).eps + 8 * bound) * b.double().norm()


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held during ``call`` beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = call()
    held = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak
