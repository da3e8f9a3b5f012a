"""``apply_fused_head`` and whatever else is done to a model, in every order: statistics are those of the model's logits, or a
sentence says which order does."""

import copy
import functools
import itertools
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from models import tiny_model
from problems import entropy_factor, head_error
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM, Gemma2Config

from bupo_kernels import FusedLMHead, policy_divergence, policy_logprobs
from bupo_kernels.integrations.transformers import apply_fused_head, remove_fused_head

accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
peft = pytest.importorskip("peft", reason="pip install peft")
from accelerate.hooks import remove_hook_from_module  # noqa: E402

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def fresh_model(tied=False):
    """Its logits are capped, so that what a fused head knows of its model has to come along."""
    config = Gemma2Config(**SMALL, final_logit_softcapping=3.0, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def head_of(model):
    return model.get_output_embeddings()


def lora(model, **options):
    options = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()


def merged(model):
    model.merge_adapter()


def offloaded(model):
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def with_hooks(model):
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def without_hooks(model):
    with_hooks(model)
    remove_hook_from_module(model, recurse=True)


def with_a_partial_forward(model):
    forward = head_of(model).forward
    head_of(model).forward = functools.partial(lambda forward, *args, **named: forward(*args, **named), forward)


def with_another_head(model):
    model.set_output_embeddings(nn.Linear(32, 67, dtype=model.dtype))


def through_a_file(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


def saved_and_loaded(model, path):
    """As a new model, which nothing has been applied to."""
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


def assigned(model):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


def sharded(model, unit):
    fully_shard(unit(model), mesh=dist.init_device_mesh("cpu", (1,)))


def compiled_head(model):
    head_of(model).compile(backend="eager")


def wrapped_head(model):
    model.lm_head = torch.compile(model.lm_head, backend="eager")


STEPS = {
    "apply": lambda model, _: apply_fused_head(model),
    "remove": lambda model, _: remove_fused_head(model),
    "device_map": lambda model, _: with_hooks(model),
    "hooks removed": lambda model, _: without_hooks(model),
    "offload": lambda model, _: offloaded(model),
    "partial": lambda model, _: with_a_partial_forward(model),
    "lora": lambda model, _: lora(model),
    "lora merged": lambda model, _: merged(model := lora(model)) or model,
    "lora merged and unloaded": lambda model, _: lora(model).merge_and_unload(),
    "lora unloaded": lambda model, _: lora(model).unload(),
    "dora": lambda model, _: lora(model, use_dora=True),
    "target_parameters": lambda model, _: lora(model, target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
    "adalora": lambda model, _: peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=["lm_head"], total_step=9)),
    "ia3": lambda model, _: peft.get_peft_model(model, peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
    "modules_to_save": lambda model, _: lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "resize": lambda model, _: model.resize_token_embeddings(67, mean_resizing=False) and None,
    "other head": lambda model, _: with_another_head(model),
    "tie_weights": lambda model, _: model.tie_weights(),
    "float64": lambda model, _: model.double(),
    "half": lambda model, _: model.half().float(),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
    "save_pretrained": saved_and_loaded,
    "load_state_dict": lambda model, _: assigned(model),
    "FSDP2 head": lambda model, _: sharded(model, head_of),
    "FSDP2 layers": lambda model, _: sharded(model, lambda model: model.model.layers[0]),
    "FSDP2 root": lambda model, _: sharded(model, lambda model: model),
    "compile": lambda model, _: torch.compile(model, backend="eager"),
    "head.compile": lambda model, _: compiled_head(model),
    "compiled head": lambda model, _: wrapped_head(model),
    "weight_norm": lambda model, _: weight_norm(head_of(model)) and None,
}

# What is done to a model together, around and between.
TOGETHER = ("device_map", "lora", "modules_to_save", "resize", "float64", "deepcopy", "pickle")
AGAIN = r"was put around its head after that was fused, .* call apply_fused_head\(model\) again"
NEVER = "its head has an adapter with .*, accepted is plain LoRA; call merge_and_unload"
REFUSED = {  # by what says which order is right; every other order of these works
    ("partial", "apply"): "has been replaced .* fuse the head first, and replace its forward then",
    ("weight_norm", "apply"): "its head is parametrized, .* parametrize it after apply_fused_head",
    **{(*before, "apply", "lora"): AGAIN for before in ((), *((step,) for step in TOGETHER))},
    ("apply", "dora"): AGAIN,
    ("apply", "target_parameters"): AGAIN,
    ("apply", "adalora"): AGAIN,
    ("apply", "ia3"): AGAIN,
    ("dora", "apply"): NEVER,
    ("target_parameters", "apply"): NEVER,
    ("adalora", "apply"): NEVER,
    ("ia3", "apply"): r"its head is a peft\.tuners\.ia3\.layer\.Linear, .* leave it out of target_modules",
    ("apply", "adalora", "apply"): NEVER,
    ("apply", "ia3", "apply"): "leave it out of target_modules",
    ("apply", "dora", "apply"): NEVER,
    ("apply", "target_parameters", "apply"): NEVER,
    ("offload", "lora", "apply"): "the weight of its head is offloaded and has an active LoRA, .* or a merged one",
    ("lora", "apply", "offload"): "the weight of its head is offloaded and has an active LoRA",
    ("apply", "save_pretrained"): r"Linear.forward\(\) takes 2 positional arguments",  # a new model, torch's own words
    ("apply", "remove"): r"Linear.forward\(\) takes 2 positional arguments",
}
NOT_OURS = {  # what plain torch, transformers and peft refuse
    ("lora", "resize"),  # Old language model head is of type Linear, which is not an instance of Linear
    ("modules_to_save", "resize"),
    ("lora", "modules_to_save"),
    ("modules_to_save", "lora"),
    ("device_map", "pickle"),  # Can't pickle local object
}
ORDERS = [order for step in STEPS if step != "apply" for order in ((step, "apply"), ("apply", step))]
AROUND = [("apply", step, "apply") for step in STEPS if step != "apply"]
ORDERS += [order if order in REFUSED else pytest.param(order, marks=pytest.mark.broad) for order in AROUND]
ORDERS += [
    pytest.param(order, marks=pytest.mark.broad)
    for a, b in itertools.permutations(TOGETHER, 2)
    if (a, b) not in NOT_OURS
    for order in ((a, "apply", b), ("apply", a, b, "apply"))
]
ORDERS += [("FSDP2 layers", "apply", "FSDP2 root"), ("FSDP2 layers", "FSDP2 head", "apply", "FSDP2 root")]
ORDERS += [("offload", "lora", "apply"), ("lora", "apply", "offload"), ("offload", "lora merged", "apply")]


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_order(steps, folder, tied=False):
    model = fresh_model(tied)
    for step in steps:
        changed = STEPS[step](model, folder)
        model = model if changed is None else changed
    return model


def assert_answers_for_its_model(model):
    """As a user does it: the hidden state that the model hands its head, to the head with targets."""
    states = []
    hook = head_of(model).register_forward_pre_hook(lambda _, given: states.append(given[0]))
    logits = model(torch.randint(2, 61, (2, 5))).logits.double()
    hook.remove()
    targets = torch.randint(0, logits.shape[-1], (2, 5))
    found = head_of(model)(states[0], targets)
    want = logits.log_softmax(-1)
    largest = logits.abs().max().item()
    bound = head_error(largest, 32)
    chosen = want.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(found.logprobs.double(), chosen, atol=bound, rtol=0)
    torch.testing.assert_close(
        found.entropy.double(), -(want.exp() * want).sum(-1), atol=bound * entropy_factor(logits.shape[-1]), rtol=0
    )


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_in_every_order_it_works_or_says_which_order_does(order, tmp_path, one_process):
    refused = REFUSED.get(order)
    with pytest.raises((ValueError, TypeError), match=refused) if refused else nullcontext():
        assert_answers_for_its_model(in_order(order, tmp_path))


@pytest.mark.parametrize(
    "order", [("resize", "apply"), ("apply", "resize"), ("apply", "tie_weights"), ("apply", "pickle", "resize")]
)
def test_a_tied_head_stays_tied(order, tmp_path):
    model = in_order(order, tmp_path, tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_answers_for_its_model(model)


@pytest.mark.parametrize(
    "step", ["device_map", "hooks removed", "lora", "modules_to_save", "resize", "deepcopy", "pickle", "float64"]
)
@pytest.mark.parametrize("first", [False, True])
def test_removing_it_leaves_the_model_as_if_it_had_never_been_applied(step, first, tmp_path):
    order = ("apply", step, "apply", "remove") if first else (step, "apply", "remove")
    model, plain = in_order(order, tmp_path), in_order((step,), tmp_path)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(2, 61, (2, 5))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for ours, never in zip(model.modules(), plain.modules(), strict=True):
        assert vars(ours).keys() == vars(never).keys()


def test_a_model_that_nothing_else_refers_to_is_freed_at_once():
    gone = weakref.ref(apply_fused_head(fresh_model()))
    assert gone() is None


def test_an_output_embedding_that_cannot_be_fused_is_refused_before_it_is_set():
    model = apply_fused_head(fresh_model())
    head = model.lm_head
    with pytest.raises(TypeError, match=r"its head is a Bilinear, accepted are nn\.Linear"):
        model.set_output_embeddings(nn.Bilinear(2, 3, 4))
    assert model.lm_head is head


@pytest.mark.parametrize(
    ("fuse", "argument"), [(apply_fused_head, "model"), (lambda model: FusedLMHead.adopt(model.lm_head), "linear")]
)
def test_a_head_whose_forward_is_replaced_is_refused_and_left_alone(fuse, argument):
    model = fresh_model()
    with_a_partial_forward(model)
    with pytest.raises(ValueError, match=f"{argument}: the forward of its Linear has been replaced"):
        fuse(model)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("asked", ["targets", "advantages", "teacher_hidden", "outputs"])
def test_no_statistic_is_taken_for_logits_by_an_adapter_put_on_later(asked):
    head = head_of(lora(apply_fused_head(fresh_model())))
    hidden, targets = torch.randn(61, 61, 32), torch.randint(0, 61, (61, 61))  # a statistic that could be added to logits
    given = {"targets": {"targets": targets}, "outputs": {"outputs": ("entropy",)}}
    given["teacher_hidden"] = {"teacher_hidden": 2 * hidden}
    given["advantages"] = {"targets": targets, "advantages": torch.randn(61, 61)}
    with pytest.raises(ValueError, match=AGAIN):
        head([hidden] if asked == "outputs" else hidden, **given[asked])


@pytest.mark.parametrize("active", [[], ["other"]])
def test_an_adapter_without_a_part_on_the_head_leaves_its_statistics_alone(active):
    model = apply_fused_head(lora(fresh_model()))
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(active)
    assert_answers_for_its_model(model)


def test_policies_are_not_taken_from_a_head_that_answers_with_logits():
    model = apply_fused_head(tiny_model(tied=True))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}))
    ids = torch.randint(2, 61, (2, 5))
    with pytest.raises(TypeError, match="its head is a TrainableTokensWrapper, which answers with logits"):
        policy_logprobs(model, ids, ids)
    with pytest.raises(TypeError, match="its head is a TrainableTokensWrapper, which answers with logits"):
        policy_divergence(model, ids, ids > 0, layer=2)


def test_a_graph_with_the_head_in_it_is_one_and_answers_as_it_does():
    head = apply_fused_head(fresh_model()).lm_head
    hidden, targets = torch.randn(2, 5, 32), torch.randint(0, 61, (2, 5))
    found = torch.compile(lambda *given: head(*given), backend="eager", fullgraph=True)(hidden, targets)
    assert all(map(torch.equal, found, head(hidden, targets)))
