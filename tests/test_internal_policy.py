"""Internal policies of real architectures: which hidden state, which layers run, which parameters learn, what is saved."""

import itertools

import pytest
import torch
from models import FAMILIES, LARGEST, in_float64, tiny_model, token_batch
from problems import contract, covering, divergence_factor, entropy_factor, head_error, model_error, policy_error
from torch import nn
from transformers import AutoModelForCausalLM

from bupo_kernels import FusedLMHead, internal_policy, policy_lens, policy_logprobs, reference

DEPTH = 4
families = pytest.mark.parametrize("family", FAMILIES)
tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def hidden_under(model, ids, *policy, **options):
    with internal_policy(model, *policy, **options):
        return model.base_model(ids, use_cache=False).last_hidden_state


def enable_checkpointing(model, use_reentrant: bool = False):
    # Renamed in transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


def raise_after(_):
    raise RuntimeError("inside")


def module_outputs(model, ids, layer):
    """(A^l, F^l) as hooks on the full model see them."""
    block, seen = model.base_model.layers[layer - 1], {}
    hooks = [
        block.self_attn.register_forward_hook(lambda _, __, out: seen.update(attention=out[0])),
        block.mlp.register_forward_hook(lambda _, __, out: seen.update(ffn=out)),
    ]
    model.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@families
@tying
def test_layer_policies_read_the_hidden_states_of_the_full_model_bit_for_bit(family, tied):
    model, (ids, _) = tiny_model(family, tied=tied), token_batch()
    states = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(1, DEPTH):
        assert torch.equal(hidden_under(model, ids, layer), states[layer])
        assert torch.equal(hidden_under(model, ids, layer, final_norm=True), model.base_model.norm(states[layer]))
    assert torch.equal(hidden_under(model, ids, DEPTH), states[DEPTH])  # normed: the model's own policy


@families
@tying
def test_the_lens_of_a_model_holds_every_layer_s_raw_policy_and_last_its_own(family, tied):
    model, (ids, targets) = tiny_model(family, tied=tied), token_batch()
    raw_last = []
    model.base_model.norm.register_forward_pre_hook(lambda _, inputs: raw_last.append(inputs[0]))
    states = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states
    states = torch.stack([*states[:DEPTH], raw_last[0], states[DEPTH]])
    log_p = reference.logits(states.double(), model.lm_head.weight.double()).log_softmax(-1)
    counts = targets != -100

    seen = policy_lens(model, ids, targets, outputs=("entropy", "logprobs", "kl_to_final"), top_k=2)
    assert seen.entropy.shape == (DEPTH + 2, *ids.shape)
    largest = log_p.abs().max().item()
    bound = contract(largest)  # the hidden states are the same, bit for bit
    entropy, kl = -(log_p.exp() * log_p).sum(-1) * counts, (log_p.exp() * (log_p - log_p[-1])).sum(-1) * counts
    torch.testing.assert_close(seen.entropy.double(), entropy, atol=bound * entropy_factor(61), rtol=0)
    torch.testing.assert_close(seen.kl_to_final.double(), kl, atol=bound * divergence_factor(kl.max().item()), rtol=0)
    chosen = log_p.gather(-1, targets.where(counts, 0).expand(DEPTH + 2, -1, -1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(seen.logprobs.double(), chosen * counts, atol=bound, rtol=0)
    own = model(ids, use_cache=False).logits.double().log_softmax(-1).gather(-1, targets.where(counts, 0).unsqueeze(-1))
    bound = head_error(largest, 32)  # the model's own logits are dense
    torch.testing.assert_close(seen.logprobs[-1].double(), own.squeeze(-1) * counts, atol=bound, rtol=0)
    assert (seen.top_logprobs[:, counts, 0] >= seen.top_logprobs[:, counts, 1]).all()
    hooks = [module._forward_pre_hooks for module in (model.base_model.norm, *model.base_model.layers)]
    assert list(map(len, hooks)) == [1, 0, 0, 0, 0]  # this test's own


@families
@pytest.mark.parametrize("module", ["attention", "ffn"])
def test_module_policies_read_the_output_of_that_module_bit_for_bit(family, module):
    model, (ids, _) = tiny_model(family), token_batch()
    for layer in range(1, DEPTH + 1):
        expected = module_outputs(model, ids, layer)[module]
        assert torch.equal(hidden_under(model, ids, layer, module), expected)
        assert torch.equal(hidden_under(model, ids, layer, module, final_norm=True), model.base_model.norm(expected))


@families
def test_only_the_layers_up_to_the_policys_run(family):
    model, (ids, _) = tiny_model(family), token_batch()
    ran = []
    for number, block in enumerate(model.base_model.layers, 1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        block.mlp.down_proj.register_forward_hook(lambda *_, number=number: ran.append(-number))
    hidden_under(model, ids, 2)
    assert ran == [-1, 1, -2, 2]
    ran.clear()
    hidden_under(model, ids, 2, "attention")
    assert ran == [-1, 1, 2]  # the FFN of layer 2 does not


@pytest.mark.parametrize(
    ("family", "tied", "module", "checkpointing"),
    covering([*itertools.product(FAMILIES, (False, True), ("layer", "attention", "ffn"), (False, True))], unpacked=True),
)
def test_gradients_reach_what_the_policy_is_made_of_and_nothing_else(family, tied, module, checkpointing):
    layer = 2
    model, (ids, targets) = tiny_model(family, tied=tied), token_batch()
    if checkpointing:
        enable_checkpointing(model)
        model.train()
    policy_logprobs(model, ids, targets, layer=layer, module=module).logprobs.sum().backward()

    def untouched(name: str) -> bool:
        if name.startswith("model.norm."):
            return True
        if not name.startswith("model.layers."):
            return False
        number, part = int(name.split(".")[2]) + 1, name.split(".", 3)[3]
        return number > layer or (number == layer and module == "attention" and part.startswith(("mlp.", "post_attention")))

    for name, parameter in model.named_parameters():
        if untouched(name):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name


@families
@tying
def test_gradients_equal_those_of_the_naive_logit_lens(family, tied):
    model, (ids, targets) = in_float64(tiny_model(family, tied=tied)), token_batch()
    policy_logprobs(model, ids, targets, layer=3).logprobs.sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states[3]
    reference.linear_logprobs(hidden, model.lm_head.weight, targets)[0].sum().backward()
    largest = max(parameter.grad.abs().max() for parameter in model.parameters() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            assert name not in ours, name
        else:
            bound = model_error(model.config, ids.shape[1], backward=True, dtype=torch.float64) * largest * parameter.numel() ** 0.5
            assert (ours[name] - parameter.grad).norm() <= bound, name


@families
def test_policy_logprobs_of_the_last_layer_are_the_models_own(family):
    model, (ids, targets) = tiny_model(family), token_batch()
    truth = model(ids, use_cache=False).logits.double().log_softmax(-1)
    expected = truth.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets != -100, 0)
    for layer in (None, DEPTH):
        ours = policy_logprobs(model, ids, targets, layer=layer)
        assert (ours.logprobs - expected).abs().max() < policy_error(model.config, ids.shape[1], truth.abs().max().item())
        assert (ours.logprobs[:, -1] == 0).all()


def test_the_model_itself_becomes_the_policy_inside_the_context():
    model, (ids, _) = tiny_model(), token_batch()
    with internal_policy(model, 2):
        logits = model(ids, use_cache=False).logits
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(logits, model.lm_head(states[2]))


def test_padding_on_either_side_changes_nothing_real():
    model, (ids, targets) = tiny_model(), token_batch(rows=1)
    plain = policy_logprobs(model, ids, targets, layer=2).logprobs
    pad, ignored = torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -100)
    right = policy_logprobs(model, torch.cat([ids, pad], 1), torch.cat([targets, ignored], 1), layer=2).logprobs
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], 1)
    left = policy_logprobs(model, torch.cat([pad, ids], 1), torch.cat([ignored, targets], 1), attention_mask=mask, layer=2).logprobs
    bound = 2 * policy_error(model.config, 15, LARGEST)  # of both
    assert (right[:, :11] - plain).abs().max() < bound
    assert (left[:, 4:] - plain).abs().max() < bound
    assert (right[:, 11:] == 0).all()
    assert (left[:, :4] == 0).all()


@families
def test_nothing_is_left_behind_even_after_an_exception(family):
    model, (ids, _) = tiny_model(family), token_batch()
    config, before = model.config, model(ids, use_cache=False).logits
    for module in ("layer", "attention", "ffn"):
        with pytest.raises(RuntimeError, match="inside"), internal_policy(model, 2, module):
            raise_after(model(ids))
    assert model.config is config
    assert model.base_model.config is config
    assert config.num_hidden_layers == DEPTH
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model.base_model.layers[1].mlp)


@families
@tying
def test_a_checkpoint_saved_inside_the_context_carries_the_full_depth(family, tied, tmp_path):
    model, (ids, _) = tiny_model(family, tied=tied), token_batch()
    with internal_policy(model, 2):
        model.save_pretrained(tmp_path / "model")
        model.base_model.save_pretrained(tmp_path / "backbone")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert type(loaded.config).from_pretrained(tmp_path / "backbone").num_hidden_layers == DEPTH


@pytest.mark.parametrize("layer", [0, 5, -1, 2.0, True])
def test_layer_out_of_range_is_named(layer):
    with (
        pytest.raises(ValueError, match=r"layer: .* given, accepted are 1 to 4"),
        internal_policy(tiny_model(), layer),
    ):
        pass


def test_one_context_at_a_time():
    model, (ids, targets) = tiny_model(), token_batch()
    with internal_policy(model, 2):
        for call in (lambda: policy_logprobs(model, ids, targets), lambda: internal_policy(model, 1).__enter__()):
            with pytest.raises(ValueError, match="model: already an internal policy"):
                call()
    policy_logprobs(model, ids, targets)


@pytest.mark.parametrize("module", ["attention", "ffn"])
def test_checkpointing_that_would_lose_the_gradient_is_refused(module):
    model, (ids, targets) = tiny_model(), token_batch()
    enable_checkpointing(model, use_reentrant=True)
    model.train()
    with pytest.raises(ValueError, match="use_reentrant=True, accepted is use_reentrant=False"):
        policy_logprobs(model, ids, targets, layer=2, module=module)
    policy_logprobs(model, ids, targets, layer=2).logprobs.sum().backward()
    assert model.base_model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_forward_that_others_replaced_comes_back():
    model, (ids, _) = tiny_model(), token_batch()
    hidden_under(model, ids, 2, "attention")  # the first time the structure is verified, with all that is in it
    mlp = model.base_model.layers[1].mlp
    original, calls = mlp.forward, []
    mlp.forward = theirs = lambda hidden: calls.append(1) or original(hidden)
    hidden_under(model, ids, 2, "attention")
    assert mlp.forward is theirs
    assert calls == []


def test_the_config_can_be_printed_inside_the_context():
    model = tiny_model()
    with internal_policy(model, 2):
        assert model.config.to_dict()["num_hidden_layers"] == DEPTH
        assert "num_hidden_layers" in repr(model.base_model.config)


def test_unknown_module_model_and_head_are_named():
    model, (ids, targets) = tiny_model(), token_batch()
    with pytest.raises(ValueError, match="module: 'mlp' given, accepted are 'layer', 'attention', 'ffn'"):
        policy_logprobs(model, ids, targets, layer=2, module="mlp")
    with pytest.raises(ValueError, match="model: of type 'Linear', accepted are"):
        policy_logprobs(nn.Linear(2, 2), ids, targets)
    with pytest.raises(ValueError, match="layer: None given with module"):
        policy_logprobs(model, ids, targets, module="ffn")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="model: its head is a Sequential"):
        policy_logprobs(model, ids, targets)


def test_fused_head_is_called_as_a_module_and_stays_a_linear_layer(tmp_path):
    model, (ids, targets) = tiny_model(tied=True), token_batch()
    plain, logits, keys = policy_logprobs(model, ids, targets, layer=2), model(ids).logits, list(model.state_dict())
    head = FusedLMHead.adopt(model.lm_head)
    assert head is model.lm_head
    assert FusedLMHead.adopt(head) is head
    assert head.weight is model.base_model.embed_tokens.weight
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    fused = policy_logprobs(model, ids, targets, layer=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))
    assert calls == [1]
    assert torch.equal(model(ids).logits, logits)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, logits)


def test_only_plain_linear_layers_are_adopted():
    with pytest.raises(TypeError, match="linear: Embedding given"):
        FusedLMHead.adopt(nn.Embedding(3, 2))
    with pytest.raises(TypeError, match="temperature: given without targets"):
        FusedLMHead(4, 8)(torch.randn(2, 4), temperature=0.5)
