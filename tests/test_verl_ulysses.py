"""verl's Ulysses sequence parallelism with its fused head on this library, two gloo ranks on the CPU: dense models, mixtures of
experts and those that see, against plain forwards in float64 (verl #3512, #3723, #5633, #6068)."""

import importlib.metadata
import os

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.nn.functional import scaled_dot_product_attention

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed (pip install 'bupo-kernels[verl]')", allow_module_level=True)

from test_verl import (
    ENTROPY,
    LENGTHS,
    TEMPERATURE,
    assert_same_gradients,
    cpu_platform,
    look_and_learn,
    make_engine,
    own_forward,
    the_advantages,
    the_sequences,
)

TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
IDS = {"image_token_id": 57, "video_token_id": 58, "vision_start_token_id": 59, "vision_end_token_id": 60}
MODELS = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"} | {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
CASES = [
    {"model": model, "tied": False, "backend": backend, "packed": True, "attention": "packed", "sequence_parallel": 2}
    for model in MODELS
    for backend in ("torch", "triton")
]


def make_model(name: str):
    import transformers

    model_class = getattr(transformers, MODELS[name])
    text = TEXT | (EXPERTS if name.endswith("moe") else {})
    if "vl" in name:
        parts = {"text_config": text | {"rope_parameters": ROPE}, "vision_config": VISION, "tie_word_embeddings": False}
        config = model_class.config_class(**parts, **IDS)
    else:
        config = model_class.config_class(**text)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def attention(q, k, v, mask, query_length, is_causal=True, softmax_scale=None, position_ids=None, **_):
    """What flash attention is to verl and transformers, of packed sequences: [B, S, heads, width] each."""
    allowed = None
    if is_causal:
        allowed = torch.ones(2 * q.shape[1:2], dtype=torch.bool).tril()
        if position_ids is not None:
            sequence = (position_ids[0] == 0).cumsum(-1)
            allowed &= sequence[:, None] == sequence
    q, k, v = (x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, allowed, scale=softmax_scale).transpose(1, 2)


def rank_cases(folder: str) -> None:
    os.environ.update(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda", VERL_USE_EXTERNAL_PLUGINS="none")
    cpu_platform()
    import transformers
    from transformers.integrations import flash_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    import bupo_kernels.integrations.verl  # noqa: F401 (it replaces the heads)

    assert FusedLinearForPPO.forward.__module__ == "bupo_kernels.integrations.verl"
    # verl goes from sequences to heads and back around it.
    monkey_patch._flash_attention_forward = attention
    ALL_ATTENTION_FUNCTIONS.register("packed", flash_attention.flash_attention_forward)
    dist.init_process_group("gloo")
    found = []
    for case in CASES:
        with own_forward(getattr(transformers, MODELS[case["model"]])):
            engine = make_engine(folder, case, engine={"ulysses_sequence_parallel_size": 2})
            found.append(look_and_learn(engine, case))
    torch.save(found, f"{folder}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> list[list[dict]]:
    folder = tmp_path_factory.mktemp("ulysses")
    for name in MODELS:
        make_model(name).save_pretrained(folder / name)
    on_ranks("test_verl_ulysses:rank_cases", 2, str(folder), timeout=300)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def alone(name: str) -> tuple[list, dict]:
    """Log-probs and entropies of the responses, and the gradients of the update, by plain forwards in float64."""
    model, seen, loss = make_model(name).double(), [], 0
    model.set_experts_implementation("eager")  # torch's grouped products have no float64
    for ids, (p, r), advantage in zip(the_sequences(0), LENGTHS, the_advantages(0), strict=True):
        positions = {"position_ids": torch.arange(len(ids)).expand(4, 1, -1)} if "vl" in name else {}
        log_p = (model(ids[None], **positions).logits[0, p - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logprobs, entropy = log_p.gather(1, ids[p:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        ratio = (logprobs - logprobs.detach() - 0.1).exp()
        loss = loss - (advantage * ratio + ENTROPY * entropy).sum() / sum(r for _, r in LENGTHS)
        seen.append({"log_probs": logprobs.detach(), "entropy": entropy.detach()})
    loss.backward()
    return seen, {n: p.grad for n, p in model.named_parameters() if ".visual." not in n}  # verl runs that on nothing, times 0


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n]['model']} {CASES[n]['backend']}")
def test_ranks_that_share_sequences_have_the_logprobs_and_gradients_of_whole_ones(number, on_two_ranks):
    seen, gradients = alone(CASES[number]["model"])
    for rank in range(2):
        found = on_two_ranks[rank][number]
        for name in ("log_probs", "entropy"):
            for got, want in zip(found[name], (row[name] for row in seen), strict=True):
                torch.testing.assert_close(got[: len(want)].double(), want, atol=3e-6, rtol=0)
        assert_same_gradients(found["gradients"], gradients, 3e-6)
