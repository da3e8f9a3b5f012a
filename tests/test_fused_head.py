"""``apply_fused_head``: nothing about a model changes but what its head can answer, with adapters on it too."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from models import FAMILIES, in_float64, tiny_model, token_batch
from problems import chain_error, contract, entropy_factor, head_error
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    NanoChatConfig,
    PhiConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
    xLSTMConfig,
)

from bupo_kernels import FusedLMHead, linear_divergence, linear_logprobs, linear_policy_loss, logit_lens, policy_logprobs
from bupo_kernels.integrations import transformers as integration
from bupo_kernels.integrations.transformers import apply_fused_head, remove_fused_head


def dense(logits, targets):
    """Log-probs and entropy of logits."""
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


EXACT = 8 * contract(10.0, dtype=torch.float64)  # of what is made of a few log-probs, and of gradients beside the largest


def assert_answers_for(logits, statistics, targets):
    """Within the contract, and what logits lose that are sums over the width of the head."""
    largest = logits.detach().abs().max().item()
    bound = head_error(largest, 32, logits.dtype)
    factors = 1, entropy_factor(logits.shape[-1])
    answers = statistics.logprobs, statistics.entropy
    for ours, want, factor in zip(answers, dense(logits, targets), factors, strict=True):
        torch.testing.assert_close(ours.double(), want.double(), atol=factor * bound, rtol=0)


# ---- models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_changes_is_what_the_head_can_answer(family, tied, tmp_path, caplog):
    caplog.set_level(logging.INFO, "bupo_kernels")
    model, before = (tiny_model(family, tied=tied) for _ in range(2))
    weight, seen = model.lm_head.weight, []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    assert apply_fused_head(model) is model
    assert type(model.lm_head) is FusedLMHead
    assert model.lm_head.weight is weight
    assert (model.model.embed_tokens.weight is weight) == tied
    assert list(model.state_dict()) == list(before.state_dict())
    assert [record.message for record in caplog.records] == [f"output embedding of {type(model).__name__}: Linear -> FusedLMHead"]
    ids, _ = token_batch()
    assert torch.equal(model(ids).logits, before(ids).logits)
    assert seen
    assert torch.equal(model.generate(ids, max_new_tokens=3), before.generate(ids, max_new_tokens=3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, before(ids).logits)
    apply_fused_head(model)
    assert len(caplog.records) == 1
    assert remove_fused_head(remove_fused_head(model)) is model
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is weight


SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
OTHERS = {  # config, and what is measured of it
    "gpt2": (GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=1), {}),
    "phi": (PhiConfig(**SMALL), {}),  # a bias
    "gemma2": (Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=2.0), {"softcap": 2.0}),
    "gemma3": (Gemma3TextConfig(**SMALL, **HEADS, final_logit_softcapping=None), {}),
    "recurrent_gemma": (RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, logits_soft_cap=3.0), {"softcap": 3.0}),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.25), {"logit_scale": 0.25}),
    "granite": (GraniteConfig(**SMALL, logits_scaling=13.0), {"logit_scale": 1 / 13}),
    "falcon_h1": (FalconH1Config(**SMALL, **HEADS, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4), {"logit_scale": 0.3}),
    "nanochat": (NanoChatConfig(**SMALL, final_logit_softcapping=4.0), {"softcap": 4.0}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_statistics_are_those_of_the_models_own_logits_with_the_gradients_of_plain_torch(name, caplog):
    config, measured = copy.deepcopy(OTHERS[name])
    model = in_float64(AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    apply_fused_head(model)
    assert model.get_output_embeddings().readout == pytest.approx(measured)
    assert not warnings_in(caplog)
    hidden = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    ids = torch.randint(2, 61, (2, 9))
    targets = torch.randint(0, 61, (2, 9))
    logits = model(ids).logits
    statistics = model.get_output_embeddings()(hidden[0], targets)
    assert_answers_for(logits, statistics, targets)
    # What is given stands in the place of what was measured.
    given = {"softcap": 1.5, "logit_scale": 0.5}
    plain = linear_logprobs(hidden[0], model.lm_head.weight, targets, bias=model.lm_head.bias, **given)
    assert all(map(torch.equal, model.lm_head(hidden[0], targets, **given), plain))
    parameters = dict(model.named_parameters())
    upstream = torch.randn(2, 2, 9)
    found = []
    for values in ((statistics.logprobs, statistics.entropy), dense(logits, targets)):
        loss = sum((g * x).sum() for g, x in zip(upstream, values, strict=True))
        found.append(torch.autograd.grad(loss, list(parameters.values()), retain_graph=True))
    # Two layers there and back, a few dozen sums of up to 48 terms.
    atol = chain_error(*2 * 3 * 10 * [48], dtype=torch.float64) * max(g.abs().max() for g in found[1])
    for of, got, want in zip(parameters, *found, strict=True):
        torch.testing.assert_close(got, want, atol=atol, rtol=0, msg=lambda m, n=of: n + m)


def warnings_in(caplog):
    return [r.message for r in caplog.records if r.levelno == logging.WARNING and r.name == "bupo_kernels"]


def test_every_statistic_is_of_the_capped_and_scaled_logits():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS["gemma2"][0])).double()
    head, options = apply_fused_head(model).lm_head, {"softcap": 2.0}
    (hidden, targets), advantages = rows(), torch.randn(3, 7)
    hidden, weight = 9 * hidden, head.weight
    for found, want in (
        (head(hidden, targets, advantages)[0], linear_policy_loss(hidden, weight, targets, advantages, **options)[0]),
        (head(hidden, teacher_hidden=2 * hidden).divergence, linear_divergence(hidden, weight, 2 * hidden, **options).divergence),
        (head([hidden], outputs=("entropy",)).entropy, logit_lens([hidden], weight, **options).entropy),
    ):
        assert torch.equal(found, want)
    assert torch.equal(head(hidden), hidden @ weight.T)  # the model caps these itself


def chameleon():
    images = {f"IMGIMG{letter}Z": 10 + number for number, letter in enumerate("ABCD")}
    vision = {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    vision |= {"latent_channels": 32, "resolution": 8}
    return ChameleonForConditionalGeneration(ChameleonConfig(**SMALL, vq_config=vision, vocabulary_map={"<image>": 4} | images))


def minicpm():
    if not hasattr(transformers, "MiniCPM3Config"):
        pytest.skip("this transformers has no MiniCPM3")
    return AutoModelForCausalLM.from_config(transformers.MiniCPM3Config(**SMALL))


def t5(tied):
    sizes = {"vocab_size": 61, "d_model": 16, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=tied))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (chameleon, r"4 of 61 \(ids 10, 11, 12, 13\) by more than a scale and a softcap, accepted is softcap\(scale · logits\)"),
        (lambda: t5(tied=True), "multiplies its last hidden state by 0.25 before its head, accepted are models that hand it on"),
        (minicpm, "multiplies its last hidden state by 8 before its head"),
        (
            lambda: with_logits(lambda z: z.log_softmax(-1)),
            "logits by up to .*, and 61 of 61 .ids 0, 1, 2, 3, 4, …",
        ),
        (lambda: with_logits(lambda z: z[..., :60]), "has 60 logits where its head has 61"),
    ],
)
def test_a_model_that_does_more_than_scale_and_cap_is_refused_with_what_was_measured(model, says):
    model = model()
    with pytest.raises(ValueError, match=says):
        apply_fused_head(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert "set_output_embeddings" not in vars(model)


def with_logits(change):
    """A model that makes something else of its head's logits."""
    model = tiny_model()
    forward = model.forward

    def changed(input_ids, use_cache=None):
        output = forward(input_ids, use_cache=use_cache)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


def test_an_encoder_decoder_that_scales_nothing_is_fused(caplog):
    model = apply_fused_head(t5(tied=False)).eval()
    assert not warnings_in(caplog)
    ids, targets = torch.randint(2, 61, (2, 5)), torch.randint(0, 61, (2, 5))
    out = model(ids, decoder_input_ids=ids, output_hidden_states=True)
    assert_answers_for(out.logits, model.lm_head(out.decoder_hidden_states[-1], targets), targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_measured_does_not_depend_on_a_dtype_that_logits_are_rounded_to(dtype):
    model = apply_fused_head(with_logits(lambda z: (3 * torch.tanh(0.5 * z / 3)).to(dtype)))
    assert model.lm_head.readout == {"logit_scale": 0.5, "softcap": 3.0}


def test_a_model_is_measured_without_reading_running_or_drawing_anything():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS["gemma2"][0])).train()
    model.model.eval()
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda module, _: pytest.fail(f"{type(module).__name__} ran"))
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    modules = list(model.modules())
    apply_fused_head(model)
    assert model.lm_head.readout == {"softcap": 2.0}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_model_on_the_meta_device_is_measured_and_so_is_one_under_other_defaults():
    with torch.device("meta"):
        model = apply_fused_head(AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS["gemma2"][0])))
    assert model.lm_head.readout == {"softcap": 2.0}
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = apply_fused_head(AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS["granite"][0])))
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.lm_head.readout == {"logit_scale": 1 / 13}


def test_a_cap_that_its_model_applies_in_chunks_is_measured():
    config = xLSTMConfig(vocab_size=61, hidden_size=32, num_blocks=1, num_heads=4, output_logit_soft_cap=3.0)
    assert apply_fused_head(AutoModelForCausalLM.from_config(config)).lm_head.readout == pytest.approx({"softcap": 3.0})


def test_what_is_measured_follows_the_model_when_it_is_applied_again():
    model = apply_fused_head(AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS["gemma2"][0])))
    model.config.final_logit_softcapping = None
    assert apply_fused_head(model).lm_head.readout == {}


class Flat(PreTrainedModel):
    """Its layers are its own, and would run."""

    config_class = PhiConfig

    def __init__(self):
        super().__init__(PhiConfig(**SMALL))
        self.layer, self.head = nn.Embedding(61, 32), nn.Linear(32, 61)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.layer(input_ids)))


def test_what_would_run_layers_or_fsdp2_units_is_not_measured(caplog, one_process):
    masked = BertForMaskedLM(BertConfig(**SMALL))
    fully_shard(masked.cls.predictions.transform, mesh=dist.init_device_mesh("cpu", (1,)))
    for model, reason in ((Flat(), "none of its children is a model"), (masked, "FSDP2 shards its cls.predictions.transform")):
        caplog.clear()
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
        apply_fused_head(model)
        (warning,) = warnings_in(caplog)
        assert f"could not be measured ({reason}" in warning


@pytest.mark.parametrize("reason", ["raises", "does not call its head"])
def test_a_model_that_cannot_be_measured_is_fused_with_a_warning(reason, caplog):
    model = tiny_model()
    weight = model.lm_head.weight
    model.forward = {
        "raises": lambda pixels: pixels.shape,
        "does not call its head": lambda input_ids: SimpleNamespace(logits=model.model(input_ids).last_hidden_state @ weight.T),
    }[reason]
    apply_fused_head(model)
    (warning,) = warnings_in(caplog)
    assert f"its forward {reason}" in warning
    assert "give softcap or logit_scale with targets" in warning
    hidden, targets = rows(torch.float32)
    assert_answers_for(hidden @ weight.T, model.lm_head(hidden, targets), targets)


def test_a_masked_language_model_has_a_fused_head_too(caplog):
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    apply_fused_head(model)
    (warning,) = warnings_in(caplog)
    assert "something stands between its last hidden state and its head" in warning
    hidden, targets = torch.randn(2, 5, 32), torch.randint(0, 61, (2, 5))
    decoder = model.cls.predictions.decoder
    assert_answers_for(decoder(hidden), decoder(hidden, targets), targets)


class Subclass(nn.Linear):
    """As bitsandbytes' Linear4bit and GPTQ's layers are."""


class Quantised(torch.Tensor):
    """As torchao's weights are, in a plain ``nn.Linear``."""


def with_head(head):
    model = tiny_model()
    model.lm_head = head
    return model


def with_weight(weight):
    model = tiny_model()
    model.lm_head._parameters["weight"] = weight
    return model


def with_view():
    """As FSDP1 leaves a head with use_orig_params=False."""
    model = tiny_model()
    del model.lm_head._parameters["weight"]
    model.lm_head.weight = torch.zeros(61, 32)
    return model


class OtherAdapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(32, 61)


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: nn.Linear(3, 3), TypeError, "Linear given, accepted is a model of transformers, before others wrap it"),
        (lambda: nn.DataParallel(tiny_model()), TypeError, "DataParallel given, .* before others wrap it"),
        (lambda: tiny_model().model, ValueError, "Qwen3Model given, .* no output embedding"),
        (lambda: BertForSequenceClassification(BertConfig(**SMALL)), ValueError, "no output embedding"),
        (lambda: with_head(Subclass(32, 61)), TypeError, "its head is a Subclass, accepted are nn.Linear .* do not quantise"),
        (lambda: with_head(OtherAdapter()), TypeError, "its head is a OtherAdapter, .* leave it out of target_modules"),
        (
            lambda: with_weight(nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)),
            TypeError,
            "Parameter of torch.int8, accepted is a Parameter of floating point",
        ),
        (
            lambda: with_weight(nn.Parameter(torch.zeros(61, 32)).as_subclass(Quantised)),
            TypeError,
            "weight of its head is a Quantised",
        ),
        (with_view, TypeError, r"is a Tensor of torch\.float32, .* call apply_fused_head before FSDP wraps the model"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_cannot_be_exact_is_refused_and_left_alone(model, error, says):
    model = model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=says):
        apply_fused_head(model)
    assert [type(module) for module in model.modules()] == kinds


def test_a_sharded_head_that_nothing_gathers_or_calls_is_refused(one_process):
    weight = distribute_tensor(torch.zeros(61, 32), dist.init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match="is a DTensor, accepted are those that FSDP2 gathers"):
        apply_fused_head(with_weight(nn.Parameter(weight)))


def test_other_releases_of_transformers_are_refused(monkeypatch):
    monkeypatch.setattr(integration, "version", lambda _: "6.0.1")
    with pytest.raises(ImportError, match=r"transformers 6.0.1 is installed, accepted is 5 \(pip install"):
        apply_fused_head(tiny_model())


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("unit", ["head", "root"])
def test_a_model_that_fsdp2_has_sharded_stays_so(unit, one_process):
    model, plain = tiny_model(), tiny_model()
    ids, targets = torch.randint(2, 61, (2, 9)), torch.randint(2, 61, (2, 9))
    fully_shard(model.lm_head if unit == "head" else model, mesh=dist.init_device_mesh("cpu", (1,)))
    before = type(model.lm_head)
    apply_fused_head(model)
    assert isinstance(model.lm_head, FusedLMHead)
    assert isinstance(model.lm_head, FSDPModule) == (unit == "head")
    if unit == "head":
        hidden = torch.randn(2, 9, 32)
        model.lm_head(hidden, targets).logprobs.sum().backward()
        dense(plain.lm_head(hidden), targets)[0].sum().backward()
        want = plain.lm_head.weight.grad
        torch.testing.assert_close(model.lm_head.weight.grad.full_tensor(), want, atol=8 * contract(4.0) * want.abs().max(), rtol=0)
        model.lm_head.reshard()
    remove_fused_head(model)
    assert type(model.lm_head).__mro__[-3:] == before.__mro__[-3:]
    assert type(model.lm_head).__name__ == before.__name__
    assert torch.equal(model(ids).logits, plain(ids).logits)


# ---- adapters of peft, whose structure is enough


class LoRA(nn.Module):
    """What peft's LoRA on an ``nn.Linear`` is, and its forward."""

    def __init__(self, base_layer, rank=4, dropout=0.0):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_variant, self.scaling, self.active_adapters = {}, {"default": 2.0}, ["default"]
        self.disable_adapters, self.merged = False, False

    def forward(self, x, *arguments, **options):
        result = self.base_layer(x, *arguments, **options)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            inner = self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))
            result = result + self.lora_B[name](self.lora_A[name](inner)) * self.scaling[name]
        return result.to(dtype)

    def merge(self):
        with torch.no_grad():
            self.base_layer.weight += self.scaling["default"] * self.lora_B["default"].weight @ self.lora_A["default"].weight
        self.merged = True


class ModulesToSave(nn.Module):
    """What peft's ``ModulesToSaveWrapper`` is."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})
        self.disable_adapters = False

    def forward(self, *arguments, **options):
        module = self.original_module if self.disable_adapters else self.modules_to_save["default"]
        return module(*arguments, **options)


@pytest.mark.parametrize("sharded_first", [False, True])
def test_a_lora_that_is_a_unit_of_fsdp2_is_gathered_around_its_statistics(sharded_first, one_process):
    hidden, targets = rows()
    plain = LoRA(tiny_model().double().lm_head).double()
    model = with_head(copy.deepcopy(plain))
    steps = [lambda: fully_shard(model.lm_head, mesh=dist.init_device_mesh("cpu", (1,))), lambda: apply_fused_head(model)]
    for step in steps if sharded_first else steps[::-1]:
        step()
    model.lm_head(hidden, targets).logprobs.sum().backward()
    dense(plain(hidden), targets)[0].sum().backward()
    for got, want in zip(model.lm_head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), want.grad, atol=EXACT * want.grad.abs().max(), rtol=0)
    remove_fused_head(model)
    assert [kind.__name__ for kind in type(model.lm_head).__mro__[:3]] == ["FSDPLoRA", "FSDPModule", "LoRA"]


@pytest.fixture(params=["structure", "peft"])
def adapted(request):
    """``adapted("lora" | "modules_to_save", dtype, dropout)``: a model with that on its head, and the calls that switch it."""

    def make(kind, dtype=torch.float64, dropout=0.0):
        model = tiny_model().to(dtype)
        if request.param == "structure":
            model.lm_head = LoRA(model.lm_head, dropout=dropout) if kind == "lora" else ModulesToSave(model.lm_head)
            disable, merge = (lambda: setattr(model.lm_head, "disable_adapters", True)), (lambda: model.lm_head.merge())
        else:
            peft = pytest.importorskip("peft", reason="the same with peft itself: pip install peft")
            where = {"target_modules": ["q_proj", "lm_head"]} if kind == "lora" else {"modules_to_save": ["lm_head"]}
            where = {"target_modules": ["q_proj"], **where}
            config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, **where)
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
            disable, merge = model.base_model.disable_adapter_layers, model.merge_adapter
        model.requires_grad_(True)
        head = model.get_output_embeddings()
        if dtype == torch.float64:
            head.to(dtype)
        with torch.no_grad():
            parts = (*head.lora_A.values(), *head.lora_B.values()) if kind == "lora" else head.modules_to_save.values()
            for part in parts:
                part.weight.normal_(std=0.3)
        return SimpleNamespace(model=model, head=head, disable=disable, merge=merge, kind=type(head))

    return make


def rows(dtype=torch.float64):
    return torch.randn(3, 7, 32, dtype=dtype), torch.randint(0, 61, (3, 7))


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
def test_statistics_are_those_of_the_adapted_logits_with_their_gradients(kind, adapted):
    given = adapted(kind)
    hidden, targets = rows()
    hidden.requires_grad_()
    names = list(given.model.state_dict())
    want = given.head(hidden)
    apply_fused_head(given.model)
    assert list(given.model.state_dict()) == names
    assert torch.equal(given.head(hidden), want)
    assert isinstance(given.head, given.kind)
    statistics = given.head(hidden, targets)
    assert_answers_for(want, statistics, targets)
    leaves = {"hidden": hidden} | dict(given.head.named_parameters())
    upstream = torch.randn(2, 3, 7)
    found = []
    for values in ((statistics.logprobs, statistics.entropy), dense(want, targets)):
        loss = sum((g * x).sum() for g, x in zip(upstream, values, strict=True))
        found.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
    assert sum(gradient is not None for gradient in found[1]) == (4 if kind == "lora" else 2)
    for name, got, gradient in zip(leaves, *found, strict=True):
        assert (got is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(got, gradient, atol=EXACT * gradient.abs().max(), rtol=0, msg=lambda m, n=name: n + m)
    remove_fused_head(given.model)
    assert type(given.head) is given.kind
    assert not any(isinstance(module, FusedLMHead) for module in given.model.modules())
    assert torch.equal(given.head(hidden), want)


@pytest.mark.parametrize(("kind", "switch"), [("lora", "disable"), ("lora", "merge"), ("modules_to_save", "disable")])
def test_adapters_may_be_merged_and_disabled_at_any_time(kind, switch, adapted):
    given = adapted(kind)
    hidden, targets = rows()
    apply_fused_head(given.model)
    active = given.head(hidden)
    getattr(given, switch)()
    logits = given.head(hidden)
    assert torch.allclose(logits, active) == (switch == "merge")
    assert_answers_for(logits, given.head(hidden, targets), targets)
    if kind == "lora":
        lens = given.head([hidden, 2 * hidden], outputs=("entropy",))
        torch.testing.assert_close(lens.entropy[0].double(), dense(logits, targets)[1], atol=EXACT, rtol=0)


def test_an_adapter_put_on_a_fused_head_is_fused_by_applying_again():
    model, (hidden, targets) = apply_fused_head(tiny_model().double()), rows()
    model.lm_head = LoRA(model.lm_head).double()
    apply_fused_head(model)
    assert_answers_for(model.lm_head(hidden), model.lm_head(hidden, targets), targets)


def test_losses_and_divergences_of_an_active_lora_are_those_of_its_merged_weight(adapted):
    given = adapted("lora")
    hidden, targets = rows()
    apply_fused_head(given.model)
    adapters = zip(given.head.lora_B.values(), given.head.lora_A.values(), strict=True)
    merged = given.head.base_layer.weight + sum(2 * b.weight @ a.weight for b, a in adapters)
    advantages = torch.randn(3, 7)
    torch.testing.assert_close(
        given.head(hidden, targets, advantages)[0], linear_policy_loss(hidden, merged, targets, advantages)[0], atol=EXACT, rtol=0
    )
    other = torch.randn_like(hidden)
    found, want = given.head(hidden, teacher_hidden=other), linear_divergence(hidden, merged, other)
    torch.testing.assert_close(found.divergence, want.divergence, atol=EXACT, rtol=0)
    with pytest.raises(ValueError, match="outputs: given with an active LoRA on the head, accepted once it is merged"):
        given.head([hidden], outputs=("entropy",))


def test_dropout_of_an_adapter_is_the_one_its_logits_have(adapted):
    given = adapted("lora", dropout=0.5)
    hidden, targets = rows()
    apply_fused_head(given.model).train()
    torch.manual_seed(1)
    logits = given.head(hidden)
    assert not torch.equal(given.head(hidden), logits)
    torch.manual_seed(1)
    assert_answers_for(logits, given.head(hidden, targets), targets)


def test_an_update_that_a_merged_bfloat16_weight_would_lose_is_not_lost(adapted):
    given = adapted("lora", torch.bfloat16)
    hidden, targets = rows(torch.bfloat16)
    apply_fused_head(given.model)
    (a,), (b,) = given.head.lora_A.values(), given.head.lora_B.values()
    with torch.no_grad():
        b.weight.mul_(2**-6)
    weight, update = given.head.base_layer.weight.double(), 2 * b.weight.double() @ a.weight.double()
    exact, lossy = (dense(hidden.double() @ w.T, targets)[0] for w in (weight + update, (weight + update).bfloat16().double()))
    error = (given.head(hidden, targets).logprobs - exact).abs().max()
    assert error * 8 < (lossy - exact).abs().max()


def test_adapters_beyond_plain_lora_are_refused_when_applied_and_when_added_later(adapted):
    given = adapted("lora")
    hidden, targets = rows()
    apply_fused_head(given.model)
    given.head.lora_variant["default"] = object()
    with pytest.raises(ValueError, match=r"an adapter with lora_variant, accepted is plain LoRA; call merge_and_unload\(\), or"):
        given.head(hidden, targets)
    remove_fused_head(given.model)
    with pytest.raises(ValueError, match="an adapter with lora_variant, accepted is plain LoRA"):
        apply_fused_head(given.model)
    assert type(given.head) is given.kind
    given.head.lora_variant.clear()
    given.head.lora_B["default"].bias = nn.Parameter(torch.zeros(61))
    with pytest.raises(ValueError, match="an adapter with lora_bias"):
        apply_fused_head(given.model)
    given.head.lora_B["default"].bias = None
    given.head.base_layer = Subclass(32, 61)
    with pytest.raises(TypeError, match="its head is a Subclass"):  # QLoRA
        apply_fused_head(given.model)


def test_after_merge_and_unload_of_peft_the_head_is_a_fused_one():
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    merged = apply_fused_head(model).merge_and_unload()
    assert type(merged.lm_head) is FusedLMHead
    hidden, targets = rows(torch.float32)
    assert_answers_for(merged.lm_head(hidden), merged.lm_head(hidden, targets), targets)


def test_a_weight_that_zero_3_has_partitioned_says_how_to_gather_it():
    model = apply_fused_head(tiny_model())
    model.lm_head.weight.data = torch.empty(0)  # what DeepSpeed leaves of it outside its modules' forwards
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"weight: partitioned by DeepSpeed ZeRO-3, .* within the forward of the engine"):
        model.lm_head(*rows(torch.float32))


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
@pytest.mark.parametrize("layer", [None, 2])
def test_internal_policies_of_an_adapted_model_have_its_adapted_head(kind, layer, adapted):
    given = adapted(kind)
    apply_fused_head(given.model)
    ids, targets = torch.randint(2, 61, (2, 9)), torch.randint(2, 61, (2, 9))
    out = given.model(ids, output_hidden_states=True, use_cache=False)
    logits = out.logits if layer is None else given.head(out.hidden_states[layer])
    assert_answers_for(logits, policy_logprobs(given.model, ids, targets, layer=layer), targets)
