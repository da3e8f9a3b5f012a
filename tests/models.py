"""Tiny random language models, made from configs: nothing is downloaded."""

import functools

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}

LARGEST = 4.0  # no logit of :func:`tiny_model` is beyond: what error bounds are made of


def tiny_model(family: str = "qwen3", *, tied: bool = False, layers: int = 4, vocab: int = 61, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = model_class(config)
    with torch.no_grad():
        # Away from initialisation: gains of 1 and near-zero logits would hide a norm too many or too few.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


class _Widened(TorchFunctionMode):
    """What asks for fp32 gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()

        def widened(argument):
            return torch.float64 if argument is torch.float32 else argument

        return function(*map(widened, args), **{name: widened(argument) for name, argument in (kwargs or {}).items()})


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Casts a model to float64, in place, also where transformers computes in fp32 whatever the model's dtype: in norms, rotary
    embeddings and attention. There a difference of 1e-16 is rounded to none, or now and then to one of 6e-8."""

    def forward(plain, *args, **kwargs):
        with _Widened():
            return plain(*args, **kwargs)

    for module in model.double().modules():
        if type(module).__name__.endswith(("Norm", "RotaryEmbedding", "Attention")):
            module.forward = functools.partial(forward, module.forward)
    return model


def token_batch(rows: int = 3, length: int = 11, vocab: int = 61) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the tokens that follow, the last position of each row ignored."""
    ids = torch.randint(2, vocab, (rows, length))
    targets = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
    return ids, targets
