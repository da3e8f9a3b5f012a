"""Internal policies of families that no line of the code names: found and verified on tiny random models of their configs."""

import pytest
import torch
from models import tiny_model, token_batch
from problems import model_error
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bupo_kernels import internal_policy, policy_lens, policy_logprobs, structure

# What makes a model small, for whichever of these its config has.
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("head_dim", "rotary_dim", "mamba_d_state", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **{"vocab_size": 61, "max_position_embeddings": 64, "n_positions": 64, "linear_num_value_heads": 4, "sliding_window": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    # Numbers that are felt: a scale, a cap or a factor too many or too few changes everything.
    **{"logits_scaling": 3.0, "logit_scale": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    **{"final_logit_softcapping": 2.0},
}
CONFIG = tiny_model().config  # of a model of these sizes, on which errors depend

LATENT = {"num_key_value_heads": 4, "head_dim": None}  # attention whose keys are made from a latent vector has all heads

# Softcap and post-norms, multipliers, scale and a parallel block, experts, convolutions of another stack, no rotary embedding.
FEW = ("gemma2", "granite", "cohere", "mixtral", "olmo2", "gpt2")
MANY = (
    *("gemma", "gemma3_text", "olmo", "olmo3", "olmoe", "granitemoe", "cohere2", "phi", "phi3", "phimoe", "qwen2_moe", "qwen3_moe"),
    *("deepseek_v3", "stablelm", "starcoder2", "glm", "glm4", "glm4_moe", "helium", "exaone4", "smollm3", "nemotron", "falcon"),
    *(
        "gpt_neox",
        "opt",
        "xglm",
        "gptj",
        "gpt_bigcode",
        "codegen",
        "ernie4_5",
        "ernie4_5_moe",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
    ),
    *("gpt_oss", "lfm2", "seed_oss", "persimmon", "minimax_m2", "diffllama", "dots1", "ministral", "vaultgemma", "arcee", "bitnet"),
)
LAYERS_ALONE = {  # and why their attention or FFN is no term of the residual stream, or is not there
    "bloom": "layer 2 the outputs of",
    "mpt": "layer 2 the outputs of",
    "minimax": "layer 2 the outputs of",
    "jamba": "layer 2 of this model has no attention",
    "qwen3_next": "layer 2 of this model has no attention",
}
REFUSED = {  # what they do instead
    "nanochat": "layers 1 to 2 alone differ by .* from its output_hidden_states",  # its final norm stands before the layers too
    "rwkv": "layers 1 to 2 alone differ by .* from its output_hidden_states",
    "bert": "no module turns the output of the last layer into the last hidden state",
}


def family_model(family: str, tied: bool = False, **changes):
    config = CONFIG_MAPPING[family]
    known, names = config().to_dict(), getattr(config, "attribute_map", {})
    given = {names.get(name, name): value for name, value in SMALL.items() if name in known or name in names}
    if family in ("deepseek_v3",):
        given |= LATENT
    if known.get("layer_types"):
        given["layer_types"] = known["layer_types"][:4]
    torch.manual_seed(0)
    config = config(**given | {"tie_word_embeddings": tied} | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def logits_of(model, hidden):
    """As the model makes them of what its head reads."""
    readout = structure.readout_of(model, model.get_output_embeddings())
    logits = model.get_output_embeddings()(hidden) * readout.get("logit_scale", 1.0)
    return logits if "softcap" not in readout else readout["softcap"] * torch.tanh(logits / readout["softcap"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def check_policies(family: str, tied: bool, modules=structure.MODULES) -> None:
    model, (ids, targets) = family_model(family, tied), token_batch()
    decoder = structure.decoder_of(model)
    chosen = targets.clamp(min=0).unsqueeze(-1)
    states = decoder(ids, output_hidden_states=True, use_cache=False).hidden_states

    # The model's own policy is that of its own logits.
    own = model(ids, use_cache=False).logits.log_softmax(-1).gather(-1, chosen).squeeze(-1) * (targets >= 0)
    bound = 4 * model_error(CONFIG, ids.shape[1], backward=True)  # of both, with norms and factors that the one of CONFIG lacks
    torch.testing.assert_close(policy_logprobs(model, ids, targets).logprobs, own, atol=bound, rtol=bound)

    # That of a layer reads what output_hidden_states has of it, forward and backward.
    with internal_policy(model, 2):
        assert torch.equal(decoder(ids, use_cache=False).last_hidden_state, states[2])
    ours = gradients(model, policy_logprobs(model, ids, targets, layer=2).logprobs.sum())
    states = decoder(ids, output_hidden_states=True, use_cache=False).hidden_states
    plain = (logits_of(model, states[2]).log_softmax(-1).gather(-1, chosen).squeeze(-1) * (targets >= 0)).sum()
    theirs = gradients(model, plain)
    assert set(ours) == set(theirs)
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= bound * largest, name

    # Those of its modules add up to what it adds.
    if "attention" in modules:
        added = 0
        for module in ("attention", "ffn"):
            with internal_policy(model, 2, module), torch.no_grad():
                added = added + decoder(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(states[1] + added, states[2], atol=1e-5, rtol=1e-5)
        policy_logprobs(model, ids, targets, layer=2, module="attention").logprobs.sum().backward()
    assert policy_lens(model, ids, targets).entropy.shape == (6, *ids.shape)


@pytest.mark.parametrize("family", FEW)
def test_a_family_that_is_not_named_has_the_policies_of_its_own_hidden_states(family):
    check_policies(family, tied=family in ("gemma2", "cohere"))


@pytest.mark.broad
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", [*MANY, *FEW, *LAYERS_ALONE])
def test_many_families_have_the_policies_of_their_own_hidden_states(family, tied):
    check_policies(family, tied, ("layer",) if family in LAYERS_ALONE else structure.MODULES)


@pytest.mark.parametrize("family", ["bloom", pytest.param("qwen3_next", marks=pytest.mark.broad)])
def test_modules_that_add_no_term_to_the_residual_stream_are_refused(family):
    model, (ids, targets) = family_model(family), token_batch()
    policy_logprobs(model, ids, targets, layer=2)
    with pytest.raises(ValueError, match=LAYERS_ALONE[family]):
        policy_logprobs(model, ids, targets, layer=2, module="attention")


@pytest.mark.parametrize("family", REFUSED)
def test_another_structure_is_refused_with_what_was_measured(family):
    model, (ids, targets) = family_model(family, **({"is_decoder": True} if family == "bert" else {})), token_batch()
    with pytest.raises(ValueError, match=REFUSED[family]):
        policy_logprobs(model, ids, targets, layer=2)
    assert not any(module._forward_hooks for module in model.modules())


def test_it_is_verified_once_and_disturbs_nothing():
    model, (ids, targets) = family_model("gemma2"), token_batch()
    seen = []
    model.model.layers[3].register_forward_hook(lambda *_: seen.append(1))
    model.train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first = policy_logprobs(model, ids, targets, layer=2)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "eager"
    assert seen == []  # layer 4 ran to be verified, which no hook has seen
    calls = []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(policy_logprobs(model, ids, targets, layer=2).logprobs, first.logprobs)
    assert calls == [1]


def test_sequences_are_packed_only_where_positions_keep_them_apart():
    ids, targets = token_batch(1, 12)
    positions = torch.arange(6).repeat(2).unsqueeze(0)
    model = family_model("gemma2")
    both = policy_logprobs(model, ids, targets, position_ids=positions, layer=2).logprobs[:, 6:]
    alone = policy_logprobs(model, ids[:, 6:], targets[:, 6:], layer=2).logprobs
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
    for layer in (2, None):
        with pytest.raises(ValueError, match="position_ids: restart within a row, accepted in a model of type 'opt'"):
            policy_logprobs(family_model("opt"), ids, targets, position_ids=positions, layer=layer)
    with pytest.raises(ValueError, match="position_ids: given, accepted is None: BloomModel"):
        policy_logprobs(family_model("bloom"), ids, targets, position_ids=torch.arange(12).unsqueeze(0), layer=2)


def test_a_head_whose_logits_become_others_is_refused():
    class Shifted(type(family_model("gemma2"))):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

    model, (ids, targets) = family_model("gemma2"), token_batch()
    model.__class__ = Shifted
    with pytest.raises(ValueError, match="changes its head's logits by up to"):
        policy_logprobs(model, ids, targets)
    assert isinstance(model.get_output_embeddings(), nn.Linear)
