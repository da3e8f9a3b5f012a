"""Tiny models of more families than those that can be trained, and an oracle that looks into them in float64, materialising all."""

from unittest import mock

import models
import numpy as np
import torch
from torch.nn.functional import cosine_similarity
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

from bupo.rollout import Sample

MORE = {
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "cohere": (CohereConfig, CohereForCausalLM),
}
FAMILIES = [*models.FAMILIES, *MORE]

# What stands before and behind the two modules, where that is not Llama's; a norm that is "" is not there.
NORMS = {
    "gemma2": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "cohere": ("input_layernorm", "", "input_layernorm", ""),  # in parallel: both read the same
}
MULTIPLIER, SCALING, CAP = 0.3, 5.0, 3.0
LARGEST = 10.0  # no logit of these models is beyond, raw ones included: what error bounds are made of


def family_model(family: str = "qwen3", tied: bool = False, **options) -> PreTrainedModel:
    """With a softcap, a multiplier and a scale that are felt, where the family has them."""
    with mock.patch.dict(models.FAMILIES, MORE):
        model = models.tiny_model(family, tied=tied, **options)
    if family == "gemma2":
        model.config.final_logit_softcapping = CAP
    if family == "granite":
        model.config.logits_scaling = SCALING
        for block in model.model.layers:
            block.residual_multiplier = MULTIPLIER
    return model


def some_samples(lengths=((3, 5), (4, 2), (2, 9), (1, 1)), vocab: int = 61) -> list[Sample]:
    """Of these prompt and response lengths."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(2, vocab, (n,), generator=generator).tolist()

    return [Sample(ids(prompt), ids(response), None, True) for prompt, response in lengths]


def points_by_hand(model: PreTrainedModel, ids: torch.Tensor) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Of each block, [1, S, D] each, and the final hidden state: the residual by ``output_hidden_states``, the rest from it."""
    family, decoder = model.config.model_type, model.model
    out = decoder(ids, output_hidden_states=True, use_cache=False)
    raw_last, attended = [], []
    hooks = [decoder.norm.register_forward_pre_hook(lambda _, inputs: raw_last.append(inputs[0]))]
    hooks += [block.self_attn.register_forward_hook(lambda _, __, output: attended.append(output[0])) for block in decoder.layers]
    decoder(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    residual = [*out.hidden_states[:-1], raw_last[0]]
    default = ("input_layernorm", "", "post_attention_layernorm", "")
    multiplier = MULTIPLIER if family == "granite" else 1.0
    points = []
    for number, block in enumerate(decoder.layers, 1):
        before_attention, behind_attention, before_ffn, behind_ffn = (
            getattr(block, name) if name else (lambda x: x) for name in NORMS.get(family, default)
        )
        previous = residual[number - 1]
        attention = behind_attention(attended[number - 1]) * multiplier
        middle = previous + attention
        ffn_input = before_ffn(previous if family == "cohere" else middle)
        points.append(
            {
                "previous": previous,
                "attention_input": before_attention(previous),
                "attention": attention,
                "attention_residual": middle,
                "ffn_input": ffn_input,
                "ffn": behind_ffn(block.mlp(ffn_input)) * multiplier,
                "layer": residual[number],
            }
        )
    return points, out.hidden_states[-1]


def log_policy(model: PreTrainedModel, hidden: torch.Tensor, norm: bool, temperature: float) -> torch.Tensor:  # -> [n, V]
    hidden = model.model.norm(hidden) if norm else hidden
    logits = hidden @ model.lm_head.weight.T
    family = model.config.model_type
    if family == "gemma2":
        logits = CAP * torch.tanh(logits / CAP)
    if family == "granite":
        logits = logits / SCALING
    if family == "cohere":
        logits = logits * model.config.logit_scale
    assert (logits / temperature).abs().max() <= LARGEST
    return (logits / temperature).log_softmax(-1)


@torch.no_grad()
def values_by_hand(
    model: PreTrainedModel, sample: Sample, final_norm: bool = False, temperature: float = 1.0
) -> dict[str, np.ndarray]:
    """[layers, n] of ``"point.statistic"``, and the two matrices [P, P, n], of one response by itself. ``model`` is in float64."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    read = slice(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
    points, final = points_by_hand(model, ids)
    points = [{name: x[0, read] for name, x in block.items()} for block in points]
    residual = [points[0]["previous"], *(block["layer"] for block in points)]
    targets = torch.tensor(sample.response_ids)[:, None]

    def log_p(hidden):
        return log_policy(model, hidden, final_norm, temperature)

    def entropy(log_p):
        return -(log_p.exp() * log_p).sum(-1)

    def rms(x):
        return x.square().mean(-1).sqrt()

    policies = [*map(log_p, residual), log_policy(model, final[0, read], False, temperature)]
    values = {f"{p}.entropy": [entropy(log_p(b[p])) for b in points] for p in ("attention_input", "attention", "ffn_input", "ffn")}
    values |= {f"{p}.rms": [rms(b[p]) for b in points] for p in ("attention", "ffn")} | {"layer.rms": [*map(rms, residual)]}
    values["attention.cosine"] = [cosine_similarity(b["attention"], b["previous"], dim=-1) for b in points]
    values["ffn.cosine"] = [cosine_similarity(b["ffn"], b["attention_residual"], dim=-1) for b in points]
    values["layer.cosine"] = [cosine_similarity(b["layer"], b["previous"], dim=-1) for b in points]
    kl = torch.stack([torch.stack([(a.exp() * (a - b)).sum(-1) for b in policies]) for a in policies])
    of_all = {
        "entropy": torch.stack([*map(entropy, policies)]),
        "logprob": torch.stack([policy.gather(1, targets)[:, 0] for policy in policies]),
        "max_probability": torch.stack([policy.exp().amax(-1) for policy in policies]),
        "kl_to_final": kl[:, -1],
        "kl_from_final": kl[-1],
    }
    values = {name: torch.stack(rows) for name, rows in values.items()}
    for name, both in of_all.items():
        values[f"layer.{name}"], values[f"final.{name}"] = both[:-1], both[-1:]
    for module in ("attention", "ffn"):
        values[f"{module}.delta_entropy"] = values[f"{module}.entropy"] - values[f"{module}_input.entropy"]
    values["layer.delta_entropy"] = values["layer.entropy"].diff(dim=0)
    values["pair.kl"] = kl
    values["pair.cosine"] = torch.stack([torch.stack([cosine_similarity(a, b, dim=-1) for b in residual]) for a in residual])
    return {name: x.numpy() for name, x in values.items()}
