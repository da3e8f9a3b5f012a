"""Responses sampled from the final policy, and the batch that training makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

IGNORE = -100  # target of a position that is not followed by a response token


@dataclass(frozen=True)
class Sample:
    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]  # ends with the end-of-sequence token if finished
    finished: bool


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int | None = None,
) -> list[Sample]:
    """One response of the model's final policy to each prompt, in order.

    Args:
        temperature: 0 decodes greedily; otherwise the softmax is sampled whole (no top-k, no top-p).
        seed: of the sampling. The global generator is seeded with it, so a step's samples depend on the step alone.
        batch: sequences at a time; None runs all at once.
    """
    torch.manual_seed(seed)
    batch = batch or max(len(prompts), 1)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    was_training, own_settings = model.training, model.generation_config
    # What generate is not told it takes from the checkpoint (a repetition penalty, min_p), which would be another policy.
    model.eval().generation_config = GenerationConfig()
    try:
        parts = (prompts[start : start + batch] for start in range(0, len(prompts), batch))
        return [sample for part in parts for sample in _generate_together(model, tokenizer, part, settings)]
    finally:
        model.train(was_training).generation_config = own_settings


def _generate_together(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], settings: GenerationConfig
) -> Iterator[Sample]:
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    encoded = encoded.to(model.device)
    sequences = model.generate(**encoded, generation_config=settings)
    responses = sequences[:, encoded.input_ids.shape[1] :].tolist()
    for prompt, ids, mask, response in zip(prompts, encoded.input_ids, encoded.attention_mask, responses, strict=True):
        finished = tokenizer.eos_token_id in response
        if finished:
            response = response[: response.index(tokenizer.eos_token_id) + 1]
        text = tokenizer.decode(response, skip_special_tokens=True)
        yield Sample(prompt, text, ids[mask.bool()].tolist(), response, finished)


@dataclass(frozen=True)
class Batch:
    """Prompts with responses, one sequence a row, padded on the right (where nothing real looks, so no attention mask)."""

    input_ids: Tensor  # [B, S]
    targets: Tensor  # [B, S], the token after each position; IGNORE but for response tokens
    advantages: Tensor  # [B, S]
    old_logprobs: Tensor | None = None  # [B, S], of the optimised policy before the step's first update

    @property
    def mask(self) -> Tensor:  # [B, S] bool, True on response tokens
        return self.targets != IGNORE

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """Some of the sequences, cut to the longest of them."""
        width = int(self.mask[rows].any(0).nonzero().max()) + 1
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: t if t is None else t[rows, :width] for name, t in tensors.items()})

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of at most ``size`` sequences."""
        return (self[start : start + size] for start in range(0, len(self), size))


def collate(samples: list[Sample], advantages: Tensor, pad_token_id: int, device: torch.device) -> Batch:
    """The training batch of ``samples`` with one advantage each, ``advantages[B]``."""
    width = max(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    input_ids = torch.full((len(samples), width), pad_token_id)
    targets = torch.full((len(samples), width), IGNORE)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.prompt_ids + sample.response_ids)
        input_ids[row, : len(ids)] = ids
        targets[row, len(sample.prompt_ids) - 1 : len(ids) - 1] = ids[len(sample.prompt_ids) :]
    return Batch(input_ids.to(device), targets.to(device), advantages.to(device).unsqueeze(1).expand(-1, width))
