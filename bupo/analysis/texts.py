"""Texts to look at as they are, and words to follow through the layers: how both become tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.analysis.blocks import evaluating
from bupo.analysis.heatmap import POSITIONS, token_text
from bupo.errors import ConfigError
from bupo.rollout import Sample

TEACHER_FORCED = "read as it stands, nothing is generated; the last next token is the model's own most likely one"


@torch.inference_mode()
def text_samples(model: PreTrainedModel, texts: Sequence[Sequence[int]], positions: int = POSITIONS) -> list[Sample]:
    """Return the token ids of each text as a sample whose response is its last ``positions`` tokens, and the one that would follow.

    The text is what the model reads at each position, whatever it would have said itself (teacher forcing). What follows the last
    token is the model's own most likely token, so that the lens shows what the text makes it say; nothing else is generated.
    """
    samples = []
    with evaluating(model):
        for ids in texts:
            given = [int(token) for token in ids]
            logits = model(torch.tensor([given], device=model.device), use_cache=False, logits_to_keep=1).logits  # [1, 1, V]
            own = int(logits[0, -1].argmax())
            first = max(len(given) - positions + 1, 1)
            samples.append(Sample(given[:first], [*given[first:], own], None, finished=False))
    return samples


def tracked_tokens(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, key: str = "track") -> list[int]:
    """Return the ids of ``words``, each once, in their order.

    A word stands behind a space in most texts and at the beginning of others, and to a tokenizer these two are different tokens:
    whichever of the two forms is a single token is followed, and both where both are. A word given with a space before it is that
    form alone.

    Raises :class:`ConfigError` where no form of a word is a single token; the message says what tokens it makes.
    """
    found: list[int] = []
    for word in words:
        forms = [word] if word[:1].isspace() else [f" {word}", word]
        ids = {form: tokenizer(form, add_special_tokens=False, verbose=False).input_ids for form in forms}
        single = [made[0] for form, made in ids.items() if len(made) == 1 and _is(form, made[0], tokenizer)]
        if not word.strip() or not single:
            makes = "; ".join(f"{form!r} makes {[token_text(tokenizer, token) for token in made]}" for form, made in ids.items())
            raise ConfigError(f"{key}: {word!r} given, accepted is a word that is one token of this tokenizer; {makes}")
        found += [token for token in single if token not in found]
    return found


def _is(form: str, token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the text of ``token`` is ``form``, which an unknown word's is not; a space may be left out before it."""
    return token_text(tokenizer, token).strip() == form.strip()
