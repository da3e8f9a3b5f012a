"""The points of a block: of every family, on the residual stream of the model itself, or refused."""

import pytest
import torch
from analysis_models import FAMILIES, LARGEST, family_model, log_policy, points_by_hand
from models import token_batch
from problems import head_error
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from bupo.analysis.blocks import UnsupportedModel, check_readout, decoder_of, readout_options, residual_points
from bupo_kernels import FusedLMHead

families = pytest.mark.parametrize("family", FAMILIES)
tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def blocks_of(model, ids):
    blocks = []
    with torch.no_grad(), residual_points(model, blocks.append):
        model.model(ids, use_cache=False)
    return blocks


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@families
@tying
def test_points_are_those_of_the_plain_model(family, tied):
    model, (ids, _) = family_model(family, tied), token_batch()
    with torch.no_grad():
        expected, final = points_by_hand(model, ids)
    blocks = blocks_of(model, ids)
    assert [block.number for block in blocks] == [1, 2, 3, 4]
    for block, by_hand in zip(blocks, expected, strict=True):
        for name, states in by_hand.items():
            assert torch.equal(getattr(block, name), states), (block.number, name)
    with torch.no_grad():
        assert torch.equal(model.model.norm(blocks[-1].layer), final)  # the last of output_hidden_states is normed
    assert not torch.equal(blocks[-1].layer, final)


@families
@tying
def test_the_final_policy_is_the_models_own(family, tied):
    model, (ids, _) = family_model(family, tied), token_batch()
    with torch.no_grad():
        own = model(ids, use_cache=False).logits.log_softmax(-1)
        final = model.model(ids, use_cache=False).last_hidden_state
    found = FusedLMHead.adopt(model.lm_head)([final], top_k=61, outputs=("entropy",), **readout_options(model))
    ours = torch.empty_like(own).scatter_(-1, found.top_ids[0], found.top_logprobs[0])
    bound = head_error(LARGEST, 32)
    assert (ours - own).abs().max() < bound
    assert (log_policy(model, final, False, 1.0) - own).abs().max() < bound  # so the oracle is right, too
    check_readout(model, ids[:1])


@families
def test_bfloat16_keeps_the_sum_within_its_rounding(family):
    model, (ids, _) = family_model(family).bfloat16(), token_batch()
    assert len(blocks_of(model, ids)) == 4
    check_readout(model, ids[:1])


def test_hooks_go_whatever_happens_and_nothing_is_kept():
    model, (ids, _) = family_model("gemma2"), token_batch()
    logits, before = model(ids).logits, hooks_of(model)

    def fail(block):
        raise RuntimeError(f"at {block.number}")

    with pytest.raises(RuntimeError, match="at 1"), residual_points(model, fail):
        model(ids)
    assert hooks_of(model) == before
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_adds_something_else_is_refused_by_the_models_type(dtype):
    model, (ids, _) = family_model("granite").to(dtype), token_batch()
    block = model.model.layers[1]
    forward = block.forward
    block.forward = lambda *arguments, **options: forward(*arguments, **options) * 1.05
    with pytest.raises(UnsupportedModel, match=r"of type 'granite', in whose layer 2 .* differs from H\^l by"):
        blocks_of(model, ids)


def test_logits_that_are_more_than_the_head_says_are_refused():
    model, (ids, _) = family_model(), token_batch()
    model.lm_head.register_forward_hook(lambda _, __, output: output * 1.01 if isinstance(output, torch.Tensor) else None)
    with pytest.raises(UnsupportedModel, match="of type 'qwen3', whose logits are not those of its head"):
        check_readout(model, ids[:1])


def test_models_without_such_blocks_are_named():
    config = GPTNeoXConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(UnsupportedModel, match="of type 'gpt_neox', accepted are causal language models with `layers` and a"):
        decoder_of(GPTNeoXForCausalLM(config))
    with pytest.raises(UnsupportedModel, match="of type 'Linear'"):
        decoder_of(torch.nn.Linear(2, 2))
    model = family_model()
    model.model.layers[1].feedforward = model.model.layers[1].mlp
    del model.model.layers[1].mlp
    with pytest.raises(UnsupportedModel, match=r"whose blocks have self_attn, .*, feedforward; accepted are blocks with self_attn"):
        decoder_of(model)
