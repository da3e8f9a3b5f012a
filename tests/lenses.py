"""Operands of a logit lens, and what its results must be: plain float64 over whole logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from problems import contract
from torch import Tensor

from bupo_kernels import LensStatistics, logit_lens, reference

OUTPUTS = (
    *("logsumexp", "logprobs", "entropy", "max_probability", "argmax", "rank"),
    *("kl_to_final", "kl_from_final", "jsd", "pairwise_kl"),
)
OF_ANY_BACKEND = ("logsumexp", "logprobs", "entropy", "max_probability")
OF_TARGETS = ("logprobs", "rank")
OF_FINAL = ("kl_to_final", "kl_from_final", "jsd")


@dataclass(frozen=True)
class Lens:
    """Operands of a call. ``options`` go to the function and to the oracle alike."""

    states: Tensor  # [L, ..., D], as the head is to read them
    weight: Tensor  # [V, D]
    targets: Tensor  # [...]
    final: Tensor  # [..., D]
    options: dict = field(default_factory=dict)

    def run(self, outputs=OUTPUTS, top_k=0, **changes) -> LensStatistics:
        arguments = {"final": self.final, "outputs": outputs, "top_k": top_k, **self.options}
        return logit_lens(self.states, self.weight, self.targets, **{**arguments, **changes})

    @property
    def counts(self) -> Tensor:  # [...]
        counts = self.targets != self.options.get("ignore_index", -100)
        return counts & self.options["mask"] if "mask" in self.options else counts

    def logits(self, dtype=torch.float64) -> tuple[Tensor, Tensor]:  # [L, n, V], [n, V] of the n rows that count
        keys = ("bias", "temperature", "logit_scale", "softcap")
        options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in self.options.items() if k in keys}
        if isinstance(options.get("temperature"), Tensor):
            options["temperature"] = options["temperature"][self.counts]
        states = (self.states[:, self.counts], self.final[self.counts])
        return tuple(reference.logits(x.detach().to(dtype), self.weight.detach().to(dtype), **options) for x in states)


def random_lens(
    scales=(0.3, 1.0, 3.0), leading=(7,), vocab=37, width=8, *, dtype=torch.float32, device="cpu", seed=0, options=None
) -> Lens:
    """Logits of standard deviation ``scales`` [L] by layer, and 1 of the final policy; ``options`` as in ``problems.OPTIONS``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    options = dict(options or {})
    if options.get("bias"):
        options["bias"] = normal(vocab).to(device, dtype)
    if options.get("temperature") == "rows":
        temperature = torch.rand(leading, generator=generator) + 0.5
        options["temperature"] = temperature.to(device, torch.promote_types(dtype, torch.float32))
    if options.get("mask"):
        options["mask"] = (torch.rand(leading, generator=generator) > 0.3).to(device)
    states = torch.stack([normal(*leading, width) * scale for scale in scales])
    tensors = (states, normal(vocab, width) / width**0.5, normal(*leading, width))
    states, weight, final = (x.to(device, dtype) for x in tensors)
    return Lens(states, weight, torch.randint(0, vocab, leading, generator=generator).to(device), final, options)


def kl(p: Tensor, q: Tensor) -> Tensor:  # log-probs [..., V] -> [...]
    return (p.exp() * (p - q)).sum(-1)


def assert_agrees(found: LensStatistics, lens: Lens, outputs=OUTPUTS, top_k: int = 0, truncation: int = 0) -> None:
    """Exactly what was asked for is there: dtype, shape, 0 on masked rows, range, and each value within the error model.

    A logit, and with it a log-prob and the logsumexp, is off by at most b, the contract (with the ``truncation`` of the device that
    ``found`` is from) of each layer by itself (in float64 so is the oracle), or by twice what an fp32 dense product loses to
    cancellation. Entropy
    is Σ p (−log p): twice that times (1 + H); a divergence twice that, of the worse of its two policies; a probability e^b − 1 of
    itself; an order is that of some logits within b of the true ones.
    """
    counts, (layers, *leading) = lens.counts, lens.states.shape[:-1]
    dtype = torch.promote_types(lens.states.dtype, torch.float32)
    asked = {*outputs, *(("top_ids", "top_logprobs") if top_k else ())}
    assert {name for name, value in found._asdict().items() if value is not None} == asked
    got = {}
    for name in asked:
        value = getattr(found, name)
        front, back = [layers] * (1 + (name == "pairwise_kl")), [top_k] * name.startswith("top_")
        assert value.shape == (*front, *leading, *back), name
        assert value.dtype == (torch.int64 if name in ("argmax", "rank", "top_ids") else dtype), name
        assert not value.requires_grad, name
        every = (slice(None),) * len(front)
        assert not value[(*every, ~counts)].any(), name
        got[name] = value[(*every, counts)]
    if not counts.any():
        return

    z, z_final = lens.logits()
    rounded = lens.logits(dtype)
    vocab, y = z.shape[-1], lens.targets[counts].expand(z.shape[:-1]).unsqueeze(-1)
    unit = contract(0.0, lens.states.shape[-1], dtype=dtype, truncation=truncation) * (1 if dtype == torch.float32 else 2)
    b, b_final = (
        torch.maximum(unit * (1 + true.abs().amax((-2, -1))), 2 * (near.double() - true).abs().amax((-2, -1)))
        for true, near in zip((z, z_final), rounded, strict=True)
    )
    b_pair = torch.maximum(b.unsqueeze(0), b.unsqueeze(1)).unsqueeze(-1)  # [L, L, 1]
    b, b_final = b.unsqueeze(-1), torch.maximum(b, b_final).unsqueeze(-1)  # [L, 1] each

    p, q = z.log_softmax(-1), z_final.log_softmax(-1).expand_as(z)
    middle = torch.logaddexp(p, q) - math.log(2)
    best = p.amax(-1).exp()
    exact = {
        "logsumexp": (z.logsumexp(-1), b),
        "logprobs": (p.gather(-1, y).squeeze(-1), b),
        "entropy": (-(p.exp() * p).sum(-1), 2 * (1 + math.log(vocab)) * b),
        "max_probability": (best, best * b.expm1()),
        "kl_to_final": (kl(p, q), 2 * b_final),
        "kl_from_final": (kl(q, p), 2 * b_final),
        "jsd": ((kl(p, middle) + kl(q, middle)) / 2, 2 * b_final),
        "pairwise_kl": (kl(p.unsqueeze(1), p.unsqueeze(0)), 2 * b_pair),
        "top_logprobs": (p.topk(top_k, -1).values, b.unsqueeze(-1)),
    }
    highest = {"logprobs": 0, "entropy": math.log(vocab), "max_probability": 1, "jsd": math.log(2), "top_logprobs": 0}
    for name, (true, bound) in exact.items():
        if name in got:
            excess = (got[name].double() - true).abs() - bound
            assert not (excess > 0).any(), f"{name}: over its bound by {excess.max().item():.2e}"
            assert not got[name].isnan().any(), name
            if name in highest:
                assert (got[name] <= torch.tensor(highest[name], dtype=dtype, device=z.device)).all(), name
            if name not in ("logsumexp", "logprobs", "top_logprobs"):
                assert (got[name] >= 0).all(), name
    slack = 2 * b.unsqueeze(-1)  # [L, 1, 1], of a difference of two logits
    if "argmax" in got:
        assert (z.gather(-1, got["argmax"].unsqueeze(-1)) >= z.amax(-1, keepdim=True) - slack).all()
    if "rank" in got:
        ahead = z - z.gather(-1, y)
        surely, perhaps = (ahead > slack).sum(-1), (ahead > -slack).scatter(-1, y, False).sum(-1)
        assert ((got["rank"] >= surely) & (got["rank"] <= perhaps)).all()
    if top_k:
        ids, values = got["top_ids"], got["top_logprobs"]
        assert (values.diff(dim=-1) <= 0).all()
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all()  # no id twice
        assert ((p.gather(-1, ids) - values).abs() <= b.unsqueeze(-1)).all()
