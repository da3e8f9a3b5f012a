"""The logit lens as a table of tokens: what every layer would say at every position of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.analysis.blocks import BlockStates, decoder_of, evaluating, readout_options, residual_points
from bupo.analysis.collect import Batch, make_batch
from bupo.rollout import Sample
from bupo_kernels import FusedLMHead


@dataclass(frozen=True)
class Heatmap:
    """A map of R layers × n positions of one response."""

    title: str
    prompt: str
    context: list[str]  # [n] the token read at each position
    targets: list[str]  # [n] the token that follows, whose rank and log-prob are shown
    layers: list[str]  # [R] bottom up: "0" (the embedding), "1", …, "L" (the raw residual), "π" (the final policy)
    top_tokens: list[list[list[str]]]  # [R][n][k] most probable first
    top_logprobs: np.ndarray  # [R, n, k]
    logprobs: np.ndarray  # [R, n] of the target
    entropy: np.ndarray  # [R, n] nats
    rank: np.ndarray  # [R, n] int, of the target: how many tokens are more probable
    kl: np.ndarray  # [R, n] KL(π^l ‖ π), nats


@torch.inference_mode()
def heat_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    positions: int = 64,
    top_k: int = 10,
    final_norm: bool = False,
    temperature: float = 1.0,
) -> list[Heatmap]:
    """Return a :class:`Heatmap` of the first ``positions`` tokens of each response; its title says so where there are more.

    Model and options are those of :func:`bupo.analysis.analyze`.
    """
    decoder, head = decoder_of(model), FusedLMHead.adopt(model.get_output_embeddings())
    options = readout_options(model) | {"temperature": temperature, "top_k": min(top_k, head.out_features)}
    outputs = ("logprobs", "entropy", "rank", "kl_to_final")
    piece = cache(lambda token: token_text(tokenizer, token))
    maps = []
    for number, sample in enumerate(samples, 1):
        shown = Sample(sample.prompt_ids, sample.response_ids[:positions], None, finished=False)
        batch = make_batch([shown], model.device)
        residual: list[Tensor] = []

        def receive(block: BlockStates, batch: Batch = batch, residual: list[Tensor] = residual) -> None:
            states = (block.previous, block.layer) if block.number == 1 else (block.layer,)
            residual.extend(x[batch.row, batch.column] for x in states)

        with evaluating(model), residual_points(model, receive):
            final = decoder(batch.input_ids, use_cache=False).last_hidden_state[batch.row, batch.column]
        policies = [*(map(decoder.norm, residual) if final_norm else residual), final]
        found = head(policies, batch.targets, final=final, outputs=outputs, **options)
        length, cut = len(sample.response_ids), f", the first {positions} of {len(sample.response_ids)} tokens"
        maps.append(
            Heatmap(
                title=f"response {number}{cut if length > positions else ''}",
                prompt=tokenizer.decode(sample.prompt_ids),
                context=[piece(token) for token in batch.input_ids[0, batch.column].tolist()],
                targets=[piece(token) for token in batch.targets.tolist()],
                layers=[*map(str, range(len(residual))), "π"],
                top_tokens=[[[piece(token) for token in cell] for cell in row] for row in found.top_ids.tolist()],
                top_logprobs=_array(found.top_logprobs),
                logprobs=_array(found.logprobs),
                entropy=_array(found.entropy),
                rank=_array(found.rank),
                kl=_array(found.kl_to_final),
            )
        )
    return maps


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token with the space before a word, which SentencePiece tokenizers drop where they decode it alone."""
    text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
