"""What every contender is given, and what float64 makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Of models that people train: vocabulary, width.
MODELS = {
    "Qwen3-0.6B": (151936, 1024),
    "Qwen3-4B": (151936, 2560),
    "Qwen3-8B": (151936, 4096),
    "Llama-3.1-8B": (128256, 4096),
    "Gemma-2-2B": (256000, 2304),
    "tiny": (517, 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DISTRIBUTIONS = ("flat", "peaked")
IGNORED = -100
SEQUENCE = 256  # rows; the first of each are its prompt
FLAT = 0.5  # standard deviation of the logits
PEAKED = (6.0, 24.0)  # what the targets' logits stand out by, and the others' noise is 1


@dataclass(frozen=True)
class Case:
    """One problem. ``active``: share of the rows that count, of each :data:`SEQUENCE` of them the last; the others are prompts."""

    model: str
    vocab: int
    width: int
    rows: int
    dtype: str = "bfloat16"
    active: float = 1.0
    layers: int = 1  # of a lens, each of ``rows`` rows

    @classmethod
    def of(cls, model: str, rows: int, **others) -> Case:
        """Return a case with the shape of one of :data:`MODELS`."""
        return cls(model, *MODELS[model], rows, **others)


class Inputs:
    """Operands of a :class:`Case`; :meth:`refresh` draws them anew, in place.

    ``hidden [N, D]`` and ``weight [V, D]`` are leaves that want gradients; ``targets [N]`` is :data:`IGNORED` outside ``mask [N]``,
    and ``labels [N]`` has an id everywhere; ``g_logprob`` and ``g_entropy [N]`` are upstream gradients, ``advantages [N]`` those of
    a policy loss, all 0 outside the mask. ``states [L, N, D]`` are the layers' of a lens, the last of them ``hidden``'s values, and
    ``counted [L, n, D]`` their rows inside the mask.

    flat: logits of standard deviation 0.5, as of an early layer: the entropy is within a few per cent of ln V. peaked: targets
    stand out, from as likely as the rest to almost sure, as of a last layer.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        n, vocab, width, dtype = case.rows, case.vocab, case.width, DTYPES[case.dtype]
        self.states = torch.empty(case.layers, n, width, dtype=dtype, device=device)
        self.hidden = torch.empty(n, width, dtype=dtype, device=device).requires_grad_()
        self.weight = torch.empty(vocab, width, dtype=dtype, device=device).requires_grad_()
        self.labels = torch.empty(n, dtype=torch.int64, device=device)
        of_prompt = round((1 - case.active) * min(SEQUENCE, n))
        self.mask = torch.arange(n, device=device) % SEQUENCE >= of_prompt
        self.active_rows = int(self.mask.sum())
        self.g_logprob, self.g_entropy, self.advantages = (torch.empty(n, device=device) for _ in range(3))
        self.refresh("flat")

    @torch.no_grad()
    def refresh(self, distribution: str) -> None:
        self.distribution = distribution
        self.weight.normal_(std=self.case.width**-0.5)
        self.labels.random_(self.case.vocab)
        self.targets = self.labels.masked_fill(~self.mask, IGNORED)
        for layer in self.states:
            self._draw(layer)
        self.hidden.copy_(self.states[-1])
        self.counted = self.states[:, self.mask]
        for values in (self.g_logprob, self.g_entropy, self.advantages):
            values.normal_().mul_(self.mask)

    def _draw(self, hidden: Tensor) -> None:
        if self.distribution == "flat":
            hidden.normal_(std=FLAT)
            return
        hidden.normal_()
        chosen = self.weight[self.labels].float()  # [N, D], of length about 1
        hidden += (chosen * torch.empty(len(chosen), 1, device=self.device).uniform_(*PEAKED)).to(hidden.dtype)

    def spread(self, count: int) -> Tensor:
        """Return ``count`` of the active rows, [r], spread from the first to the last; all if there are fewer."""
        counted = self.mask.nonzero().squeeze(1)
        return counted[torch.linspace(0, len(counted) - 1, min(count, len(counted)), device=self.device).long()]

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def coefficients(self, computes: str) -> tuple[Tensor, Tensor]:
        """Return upstream gradients of log-prob and entropy [N], with which a contender of that kind is differentiated, or which it
        uses itself."""
        zero, count = torch.zeros_like(self.g_logprob), self.active_rows
        return {
            "log-prob, entropy": (self.g_logprob, self.g_entropy),
            "log-prob": (self.g_logprob, zero),
            "policy loss": (-self.advantages / count, zero),
            "cross entropy": (-self.mask.float() / count, zero),
        }[computes]


@dataclass
class Exact:
    """float64: statistics of every row that counts, and what the gradients of a few dozen rows and columns need."""

    logprobs: Tensor  # [N], 0 outside the mask
    entropy: Tensor  # [N]
    rows: Tensor  # [r], of those that count
    columns: Tensor  # [c], some of them targets
    logprobs_of_rows: Tensor  # [r, V]
    logprobs_of_columns: Tensor  # [N, c]

    @classmethod
    @torch.no_grad()
    def of(cls, x: Inputs, sampled: int = 32) -> Exact:
        """Compute it in two passes over slices of the vocabulary: for the statistics, and for the logits of the rows picked."""
        counted = x.mask.nonzero().squeeze(1)
        hidden = x.hidden[counted].double()
        largest = torch.full((len(counted),), -torch.inf, dtype=torch.float64, device=x.device)
        total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
        chosen = torch.zeros_like(largest)
        for start, weight in slices(x.weight):
            z = hidden @ weight.T
            higher = torch.maximum(largest, z.amax(1))
            shift, z_m = torch.exp(largest - higher), z - higher[:, None]
            e = z_m.exp()
            moved = torch.where(total > 0, (largest - higher) * total, 0)
            weighted = shift * (weighted + moved) + (e * z_m).sum(1)
            total, largest = shift * total + e.sum(1), higher
            inside = (x.labels[counted] >= start) & (x.labels[counted] < start + len(weight))
            at = (x.labels[counted] - start).clamp(0, len(weight) - 1)
            chosen = torch.where(inside, z.gather(1, at[:, None]).squeeze(1), chosen)
        lse = largest + total.log()
        on_all = torch.zeros(x.case.rows, dtype=torch.float64, device=x.device)
        rows = x.spread(sampled)
        columns = torch.cat([x.labels[rows], torch.randint(x.case.vocab, (sampled,), device=x.device)]).unique()
        picked = x.hidden[rows].double()
        z_of_rows = torch.cat([picked @ weight.T for _, weight in slices(x.weight)], 1)
        of_columns = torch.zeros(x.case.rows, len(columns), dtype=torch.float64, device=x.device)
        of_columns[counted] = hidden @ x.weight[columns].double().T - lse[:, None]
        return cls(
            logprobs=on_all.index_put((counted,), chosen - lse),
            entropy=on_all.index_put((counted,), total.log() - weighted / total),
            rows=rows,
            columns=columns,
            logprobs_of_rows=z_of_rows - on_all.index_put((counted,), lse)[rows, None],
            logprobs_of_columns=of_columns,
        )

    @torch.no_grad()
    def gradients(self, x: Inputs, g_logprob: Tensor, g_entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Return dH [r, D] of :attr:`rows` and dW [c, D] of :attr:`columns` under these upstream gradients [N]."""
        g_lp, g_h = g_logprob.double(), g_entropy.double()
        rows = self.rows
        dz = untargeted(self.logprobs_of_rows, self.entropy[rows], g_lp[rows], g_h[rows])
        dz.scatter_add_(1, x.labels[rows, None], g_lp[rows, None])
        grad_hidden = sum(dz[:, start : start + len(weight)] @ weight for start, weight in slices(x.weight))
        dz = untargeted(self.logprobs_of_columns, self.entropy, g_lp, g_h)
        dz += g_lp[:, None] * (x.labels[:, None] == self.columns)
        return grad_hidden, dz.T @ x.hidden.double()


def untargeted(log_p: Tensor, entropy: Tensor, g_logprob: Tensor, g_entropy: Tensor) -> Tensor:  # [n, c], three times [n]
    """Return the gradient of the logits [n, c], but for the g_logprob that a target's has besides."""
    return -log_p.exp() * (g_logprob[:, None] + g_entropy[:, None] * (log_p + entropy[:, None]))


def slices(weight: Tensor, columns: int = 8192) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns].double()
