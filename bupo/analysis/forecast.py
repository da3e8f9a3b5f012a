"""How long an analysis will take on this machine, from products that are timed before it begins."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from bupo.analysis.blocks import decoder_of
from bupo.analysis.collect import Look
from bupo.output import duration
from bupo_kernels import FusedLMHead

PROBE = 64  # rows of the product that is timed, and so many policies of them
LONG = 600.0  # seconds, above which it is said what makes an analysis shorter


class Forecast(NamedTuple):
    """The work of an analysis and the time that it will take, about."""

    positions: int
    policies: int  # at each position
    flops: float
    rate: float  # FLOP/s, measured

    @property
    def seconds(self) -> float:
        return self.flops / self.rate

    def __str__(self) -> str:
        line = (
            f"{self.positions:,} positions × {self.policies:,} policies: {self.flops / 1e12:,.3g} TFLOP, "
            f"about {duration(self.seconds)} at the {self.rate / 1e9:,.0f} GFLOP/s that this machine does"
        )
        fewer = "fewer with --prompts, --points and --set rollout.max_new_tokens"
        return f"{line} ({fewer})" if self.seconds > LONG else line


def analysis_flops(model: PreTrainedModel, look: Look, tokens: int, positions: int) -> float:
    """Return the FLOPs of a pass: ``tokens`` through the blocks, ``positions`` through the unembedding, one row for each policy.

    Attention's products of queries and keys are left out, which are few in sequences as short as those of a lens.
    """
    decoder, head = decoder_of(model), model.get_output_embeddings()
    blocks = sum(parameter.numel() for parameter in decoder.layers.parameters())
    return 2.0 * tokens * blocks + 2.0 * positions * look.rows(len(decoder.layers)) * head.weight.numel()


@torch.inference_mode()
def forecast(model: PreTrainedModel, look: Look, tokens: int, positions: int) -> Forecast | None:
    """Time a small product and return the :class:`Forecast`; None where the whole is not much more than what would be timed."""
    head = FusedLMHead.adopt(model.get_output_embeddings())
    policies = look.rows(len(decoder_of(model).layers))
    if positions * policies < 50 * PROBE:
        return None
    hidden = [torch.randn(PROBE // 4, head.in_features, dtype=model.dtype, device=model.device) for _ in range(4)]

    def timed() -> float:
        started = time.perf_counter()
        entropy = head(hidden, outputs=("entropy",)).entropy
        assert entropy is not None
        entropy.sum().item()  # waits for the device
        return time.perf_counter() - started

    timed()  # The first call chooses kernels, and on a GPU compiles them.
    seconds = min(timed(), timed())
    rate = 2.0 * PROBE * head.weight.numel() / seconds
    return Forecast(positions, policies, analysis_flops(model, look, tokens, positions), rate)
