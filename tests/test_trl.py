"""TRL's trainers on this library's head against the same trainers on their own, and BuPO as a trainer of TRL's."""

import importlib
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import tiny_model
from problems import contract
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard

from bupo_kernels import policy_logprobs

pytest.importorskip("trl", reason="trl is not installed (pip install 'trl>=1.16')")

import transformers
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import distillation_trainer, utils
from trl.trainer.utils import add_fused_lm_head

from bupo.demo import character_tokenizer
from bupo_kernels.integrations import trl as integration
from bupo_kernels.integrations.trl import BuPOConfig, BuPOTrainer, patch_trl, unpatch_trl
from bupo_kernels.request import Request

TOKENIZER = character_tokenizer("0123456789+=")
PROMPTS = ["1+1=", "2+3=", "4+4=", "7+2="] * 4
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
BUPO = {"layer": 2, "internal_steps": 2}
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
ONLINE = {
    **COMMON,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


@pytest.fixture
def patched():
    patch_trl()
    yield
    unpatch_trl()


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def online(trainer, config, folder, *, model=None, rollout_func=None, callbacks=None, prompts=PROMPTS, **changes):
    return trainer(
        tiny_model(vocab=len(TOKENIZER)) if model is None else model,
        digits,
        config(str(folder), **ONLINE | changes),
        Dataset.from_dict({"prompt": prompts}),
        processing_class=TOKENIZER,
        callbacks=callbacks,
        **({"rollout_func": rollout_func} if rollout_func else {}),
    )


def bupo(folder, **changes):
    return online(BuPOTrainer, BuPOConfig, folder, **BUPO | changes)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * largest, name


def rows_of_calls(monkeypatch):
    """How many rows each call of this library's head has, as the calls come."""
    rows = []

    def request_of(hidden, *arguments, **options):
        rows.append(len(hidden))
        return Request.of(hidden, *arguments, **options)

    monkeypatch.setattr(integration, "Request", SimpleNamespace(of=request_of))
    return rows


class Watch(TrainerCallback):
    """Which parts of the model each step moved: numbers of layers, counted from 1, and names of what is no layer; and the
    gradients of the last step."""

    def __init__(self):
        self.moved, self.gradients = [], {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def on_step_begin(self, args, state, control, model=None, **_):
        self.before = {name: local(p).clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **_):
        moved = {name for name, p in model.named_parameters() if not torch.equal(local(p), self.before[name])}
        self.moved.append({int(name.split(".")[2]) + 1 if ".layers." in name else name.split(".")[-2] for name in moved})


def local(parameter):
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()


TRAINS_SHARDED = Version(transformers.__version__) >= Version("5.23")
ENDS = {"embed_tokens", "lm_head"}


# The head


@pytest.mark.parametrize(
    ("temperature", "softcap", "logit_scale", "biased", "outputs"),
    [
        (1.0, None, 1.0, False, ALL),
        (0.7, None, 1.3, True, ALL),
        (1.5, 5.0, 0.5, True, ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")),
        (1.0, None, 1.0, False, ("log_probs",)),
    ],
)
def test_every_output_and_gradient_of_the_head_is_that_of_trl_s_own(temperature, softcap, logit_scale, biased, outputs):
    targets, upstream = torch.randint(0, 97, (50,)), torch.randn(2, 50)
    hidden, weight, bias = torch.randn(50, 16) / 2, torch.randn(97, 16), torch.randn(97) if biased else None
    targets[:9] = (hidden @ weight.T + (bias if biased else 0)).argmax(-1)[:9]
    found = []
    for apply in (integration._per_token, utils._ChunkedLogProbFunction.apply):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        h, w, b = leaves if biased else (*leaves, None)
        results = apply(h, w, b, targets, temperature, 32, softcap, logit_scale, outputs)
        loss = (results[0] * upstream[0]).sum() + (0 if results[1] is None else (results[1] * upstream[1]).sum())
        found.append((results, torch.autograd.grad(loss, leaves)))
    for name, ours, theirs in zip(ALL, found[0][0], found[1][0], strict=True):
        assert (ours is None) == (theirs is None) == (name not in outputs), name
        if name == "is_top1" and theirs is not None:
            assert torch.equal(ours, theirs)
            assert 9 <= theirs.sum() < 50
        elif theirs is not None:
            assert relative(ours, theirs) < 3e-6, name
            assert ours.requires_grad == (name in ALL[:2])
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("fp32_head", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_16_bit_model_is_scored_in_the_dtype_trl_would_take_and_closer_to_float64(patched, fp32_head, autocast):
    model = tiny_model(vocab=61).to(torch.bfloat16)
    ids = torch.randint(2, 61, (3, 12))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model.base_model(ids, use_cache=False).last_hidden_state[:, :-1].double()
        exact = (states @ model.lm_head.weight.double().T).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        add_fused_lm_head(model, cast_lm_head_to_fp32=fp32_head)
        ours = model(ids, labels=ids, fused_lm_head=True).log_probs
        unpatch_trl()
        theirs = model(ids, labels=ids, fused_lm_head=True).log_probs
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - exact).abs().max() < 2e-5
    assert ((theirs - exact).abs().max() < 2e-5) == fp32_head


def test_positions_without_a_label_never_reach_the_head(patched, monkeypatch):
    rows, model, ids = rows_of_calls(monkeypatch), tiny_model(vocab=61), torch.randint(2, 61, (2, 10))
    add_fused_lm_head(model)
    labels = ids.clone()
    labels[:, :6] = -100
    out = model(ids, labels=labels, fused_lm_head=True)
    nothing = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    nothing.loss.backward()
    assert rows == [8, 0]
    assert torch.equal(out.log_probs == 0, labels[:, 1:] == -100)
    assert model.lm_head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("reason", ["softcap", "ZeRO-3"])
def test_calls_that_are_left_to_trl_say_so_once_and_give_its_answers(patched, reason, caplog):
    integration.log_once.cache_clear()
    hidden, weight, targets = torch.randn(20, 8), torch.randn(31, 8, requires_grad=True), torch.randint(0, 31, (20,))
    if reason == "ZeRO-3":
        weight.ds_id = 0  # what DeepSpeed marks its parameters with
    arguments = (hidden, weight, None, targets, 1.0, 32, 3.0 if reason == "softcap" else None, 1.0, ALL)
    for _ in range(2):
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    assert all(map(torch.equal, ours, integration._TRLS_OWN.apply(*arguments)))
    assert [reason in record.message for record in caplog.records] == [True]


def test_patching_says_once_what_it_replaces_and_unpatching_restores_it_exactly(caplog):
    names = ("_ChunkedLogProbFunction", "_use_triton", "DTensor")
    before = [getattr(utils, name) for name in names]
    unpatch_trl()
    with caplog.at_level("INFO", "bupo_kernels"):
        patch_trl()
        patch_trl()
    assert len(caplog.records) == 1
    assert all(name in caplog.text for name in names)
    assert not any(getattr(utils, name) is was for name, was in zip(names, before, strict=True))
    unpatch_trl()
    assert all(getattr(utils, name) is was for name, was in zip(names, before, strict=True))
    patch_trl()
    assert utils._ChunkedLogProbFunction is not before[0]
    unpatch_trl()


def test_another_release_with_the_same_head_is_accepted(monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.17.0")
    fresh = fresh_import(monkeypatch)
    fresh.patch_trl()
    assert utils._ChunkedLogProbFunction.apply is fresh._per_token
    fresh.unpatch_trl()


class OtherArguments(utils._ChunkedLogProbFunction):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        raise AssertionError


class OtherValues(utils._ChunkedLogProbFunction):
    """As one whose entropy is in bits."""

    @staticmethod
    def apply(*given):
        log_probs, entropy, *others = utils._ChunkedLogProbFunction.apply(*given)
        return log_probs, entropy / 0.693, *others


def add_another_head(model, temperature=1.0):
    return utils._ChunkedLogProbFunction, utils._use_triton


@pytest.mark.parametrize(
    ("where", "name", "instead", "says"),
    [
        (utils, "_ChunkedLogProbFunction", None, r"has no trl\.trainer\.utils\._ChunkedLogProbFunction, accepted"),
        (utils, "_ChunkedLogProbFunction", OtherArguments, r"takes \(ctx, hidden, weight, targets\), accepted is one .* bias"),
        (GRPOTrainer, "_get_per_token_logps_and_entropies", None, r"has no GRPOTrainer\._get_per_token_logps_and_entropies"),
        (GRPOTrainer, "_generate_and_score_completions", lambda self: None, r"takes \(self\), accepted is .* \(self, inputs\)"),
    ],
)
def test_a_release_that_lacks_what_is_used_is_refused_by_its_name(monkeypatch, where, name, instead, says):
    monkeypatch.delattr(where, name) if instead is None else monkeypatch.setattr(where, name, instead)
    with pytest.raises(ImportError, match=r"^trl 1\.\d+\.\d+ \(tested is 1\.16\).*" + says):
        fresh_import(monkeypatch)


@pytest.mark.parametrize(
    ("where", "name", "instead", "says"),
    [
        (utils, "_use_triton", None, r"has no trl\.trainer\.utils\._use_triton"),
        (utils, "add_fused_lm_head", add_another_head, "add_fused_lm_head does not look up DTensor"),
        (
            integration,
            "_TRLS_OWN",
            OtherValues,
            r"entropy of _ChunkedLogProbFunction is .* on a small input, accepted is",
        ),
    ],
)
def test_a_head_that_works_otherwise_is_refused_and_left_alone(monkeypatch, where, name, instead, says):
    with monkeypatch.context() as patch:
        patch.delattr(where, name) if instead is None else patch.setattr(where, name, instead)
        with pytest.raises(ImportError, match=r"^trl 1\.\d+\.\d+ \(tested is 1\.16\).*" + says):
            patch_trl()
    assert utils._ChunkedLogProbFunction is integration._TRLS_OWN


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("items", [None, 31])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_divergence_of_two_heads_has_value_and_gradients_of_trl_s_own(beta, items, softcap):
    student, teacher = torch.randn(3, 9, 8), torch.randn(3, 9, 12)
    weight, others, bias = torch.randn(31, 8), torch.randn(31, 12), torch.randn(31)
    mask = (torch.rand(3, 9) < 0.7).long()
    found = []
    for loss_of in (integration._divergence_loss, distillation_trainer._chunked_divergence_loss):
        leaves = [x.clone().requires_grad_() for x in (student, weight, bias)]
        frozen = [x.clone().requires_grad_() for x in (teacher, others)]
        loss, entropy, count = loss_of(
            leaves[0],
            frozen[0],
            leaves[1],
            frozen[1],
            mask,
            beta,
            num_items_in_batch=items if items is None else torch.tensor(items),
            student_lm_head_bias=leaves[2],
            student_logit_scale=1.3,
            teacher_final_logit_softcapping=softcap,
            student_final_logit_softcapping=softcap,
            temperature=0.7,
        )
        (loss * 3).backward()
        assert all(x.grad is None for x in frozen)
        found.append((loss, entropy, count, [x.grad for x in leaves]))
    (loss, entropy, count, ours), (*expected, theirs) = found
    assert not entropy.requires_grad
    assert count == expected[2] == mask.sum()
    bound = 2 * contract(max((h @ w.T).abs().max().item() * 1.3 / 0.7 for h, w in ((student, weight), (teacher, others))))
    for a, b in zip((loss, entropy, *ours), (*expected[:2], *theirs), strict=True):
        assert relative(a, b) < bound


def test_a_step_of_distillation_is_that_on_trl_s_own_head(tmp_path, monkeypatch):
    folders, calls, steps = [tmp_path / "student", tmp_path / "teacher"], [], []
    for folder, seed in zip(folders, (0, 1), strict=True):
        tiny_model(vocab=len(TOKENIZER), seed=seed).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    ours = integration._divergence_loss
    monkeypatch.setattr(integration, "_divergence_loss", wraps(ours)(lambda *a, **o: calls.append(None) or ours(*a, **o)))
    for patch in (patch_trl, unpatch_trl):
        patch()
        watch = Watch()
        args = DistillationConfig(
            str(tmp_path), **COMMON, per_device_train_batch_size=4, max_completion_length=6, max_steps=1, save_strategy="no"
        )
        trainer = DistillationTrainer(
            str(folders[0]),
            str(folders[1]),
            args,
            Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=TOKENIZER,
            callbacks=[watch],
        )
        before = len(calls)
        trainer.train()
        steps.append((trainer.state.log_history[0], watch.gradients, len(calls) - before))
    (step, gradients_, count), (own_step, own_gradients, own_count) = steps
    assert count > 0
    assert own_count == 0
    assert_alike(gradients_, own_gradients, 1e-5)
    for name in ("loss", "entropy", "grad_norm"):
        assert step[name] == pytest.approx(own_step[name], rel=1e-5), name


def test_the_divergence_of_a_head_that_zero_3_shards_stays_with_trl(patched, caplog):
    integration.log_once.cache_clear()
    weight = torch.randn(31, 8)
    weight.ds_id = 1
    arguments = torch.randn(1, 9, 8), torch.randn(1, 9, 8), weight, torch.randn(31, 8), torch.ones(1, 9), 0.5
    found = distillation_trainer._chunked_divergence_loss(*arguments)
    assert ["TRL's own head runs for a head sharded by DeepSpeed ZeRO-3" in record.message for record in caplog.records] == [True]
    unpatch_trl()
    for ours, theirs in zip(found, distillation_trainer._chunked_divergence_loss(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_another_divergence_is_refused_and_left_alone(monkeypatch):
    theirs = distillation_trainer._chunked_divergence_loss
    for instead, says in (
        (lambda student_hidden_states: None, "_chunked_divergence_loss takes"),
        (
            wraps(theirs)(lambda *a, **o: tuple(2 * x for x in theirs(*a, **o))),
            "loss of _chunked_divergence_loss is .* accepted is",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(distillation_trainer, "_chunked_divergence_loss", instead)
            with pytest.raises(ImportError, match=says):
                patch_trl()
            assert distillation_trainer._chunked_divergence_loss is instead
    assert utils._ChunkedLogProbFunction is integration._TRLS_OWN


def test_without_trl_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16'"):
        fresh_import(monkeypatch)


def fresh_import(monkeypatch):
    monkeypatch.delitem(sys.modules, integration.__name__)
    return importlib.import_module(integration.__name__)


# TRL's trainers


def test_a_grpo_loss_has_the_gradients_of_trl_s_own_head(tmp_path):
    trainer = online(GRPOTrainer, GRPOConfig, tmp_path, temperature=0.8, entropy_coef=0.01, num_iterations=2)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": prompt} for prompt in PROMPTS[:8]])
    theirs = gradients(trainer.model, trainer._compute_loss(trainer.model, inputs))
    patch_trl()
    ours = gradients(trainer.model, trainer._compute_loss(trainer.model, inputs))
    unpatch_trl()
    assert len(theirs) == len(list(trainer.model.parameters()))
    assert_alike(ours, theirs)


def test_four_steps_of_grpo_take_the_course_they_take_on_trl_s_own_head(tmp_path):
    courses = []
    for patch in (patch_trl, unpatch_trl):
        patch()
        trainer = online(GRPOTrainer, GRPOConfig, tmp_path, optim="sgd", learning_rate=0.1)
        trainer.train()
        courses.append({name: logged(trainer, name) for name in ("loss", "grad_norm", "entropy", "reward")})
    ours, theirs = courses
    assert len(theirs["grad_norm"]) == 4
    assert min(theirs["grad_norm"]) > 0.01
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


PREFERENCES = {"prompt": ["1+1=", "2+3="], "chosen": ["2", "5"], "rejected": ["3=", "11"]}
OFFLINE = {
    "sft": (SFTTrainer, SFTConfig, {"prompt": PREFERENCES["prompt"], "completion": PREFERENCES["chosen"]}, {}),
    "dpo": (DPOTrainer, DPOConfig, PREFERENCES, {"use_weighting": True}),
    "kto": (KTOTrainer, KTOConfig, {"prompt": ["1+1="] * 2, "completion": ["2", "3="], "label": [True, False]}, {}),
}


@pytest.mark.parametrize("method", [*OFFLINE, "rloo"])
def test_a_step_of_the_other_trainers_is_that_on_trl_s_own_head(method, tmp_path, monkeypatch):
    changes = {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0}
    folder, rows, steps = tmp_path / "model", rows_of_calls(monkeypatch), []
    tiny_model(vocab=len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    for patch in (patch_trl, unpatch_trl):
        patch()
        watch = Watch()
        if method == "rloo":
            trainer = online(RLOOTrainer, RLOOConfig, tmp_path, model=str(folder), callbacks=[watch], **changes)
        else:
            kind, config, examples, more = OFFLINE[method]
            args = config(str(tmp_path), **COMMON | changes | more, per_device_train_batch_size=2)
            trainer = kind(str(folder), args=args, train_dataset=Dataset.from_dict(examples), callbacks=[watch])
        trainer.train()
        steps.append((trainer.state.log_history[0], watch.gradients, len(rows)))
    (ours, our_gradients, our_calls), (theirs, their_gradients, all_calls) = steps
    assert our_calls == all_calls > 0
    assert_alike(our_gradients, their_gradients)
    for name in set(theirs) - {"step_time"}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


# BuPO


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, {1, 2}),
        ({"module": "attention", "gradient_checkpointing": True}, {1, 2}),
        ({"module": "ffn", "layer": 3, "final_norm": True}, {1, 2, 3, "norm"}),
        ({"layer": 4}, {1, 2, 3, 4, "norm"}),
    ],
)
def test_the_first_phase_moves_what_its_policy_is_made_of_and_the_second_everything(patched, tmp_path, changes, first):
    watch = Watch()
    trainer = bupo(tmp_path, callbacks=[watch], **changes)
    trainer.train()
    everything = {1, 2, 3, 4, "norm"} | ENDS
    assert watch.moved == [first | ENDS] * 2 + [everything] * 2
    assert trainer.model.config.num_hidden_layers == 4
    assert logged(trainer, "internal") == [1.0, 1.0, 0.0, 0.0]


OLD, NEW = False, True  # log-probs without and with a gradient


@pytest.mark.parametrize(
    ("resumed", "expected"),
    [
        (False, [(0, 2, OLD), (0, 2, NEW), (1, 2, NEW), (2, None, OLD), (2, None, NEW), (3, None, NEW)]),
        # Within a generation, which TRL starts anew: it lasts beyond the step of the switch.
        (True, [(1, 2, OLD), (1, 2, NEW), (2, 2, NEW), (3, None, OLD), (3, None, NEW)]),
    ],
)
def test_a_generation_is_scored_with_one_policy_from_its_beginning_to_its_end(tmp_path, resumed, expected):
    scored = []

    class Recorder(BuPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, ids, mask, length, *arguments, **options):
            found = super()._get_per_token_logps_and_entropies(model, ids, mask, length, *arguments, **options)
            seen, policies = mask[:, -length:].bool(), {}
            for layer in (2, None):
                with torch.no_grad():
                    out = policy_logprobs(model, ids, ids.roll(-1, 1), attention_mask=mask, layer=layer, temperature=0.7)
                policies[layer] = out.logprobs[:, -length - 1 : -1]
            same = [layer for layer in policies if relative(found[0][seen], policies[layer][seen]) < 1e-5]
            scored.append((self.state.global_step, *same, found[0].requires_grad))
            return found

    changes = BUPO | {"temperature": 0.7, "steps_per_generation": 2, "per_device_train_batch_size": 4}
    if resumed:
        bupo(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **changes).train()
    trainer = online(Recorder, BuPOConfig, tmp_path, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resumed else None)
    assert scored == expected


def test_the_reference_is_read_at_the_same_layer_and_evaluation_is_of_the_model_s_own_policy(tmp_path):
    tiny_model(vocab=len(TOKENIZER)).save_pretrained(tmp_path / "model")
    trainer = bupo(tmp_path, model=str(tmp_path / "model"), beta=0.1, learning_rate=0.0, internal_steps=4)
    trainer.train()
    assert logged(trainer, "kl") == [0.0] * 4
    ids = torch.randint(2, 14, (2, 9))
    trainer.model.eval()
    found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 8)
    own = trainer.model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert relative(found, own) < 1e-5


@pytest.mark.parametrize("internal_steps", [1, 2, 3])
def test_a_run_resumes_on_either_side_of_the_switch_as_if_it_had_not_stopped(tmp_path, internal_steps):
    changes = {"internal_steps": internal_steps, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    whole = bupo(tmp_path, **changes)
    whole.train()
    resumed = bupo(tmp_path, model=tiny_model(vocab=len(TOKENIZER), seed=1), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "internal") == logged(whole, "internal")
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 5}, "layer: 5 given, accepted are 1 to 4"),
        ({"layer": 0}, "layer: 0 given"),
        ({"module": "block"}, "module: 'block' given"),
        ({"internal_steps": -1}, "internal_steps: -1 given, accepted are 0 and more"),
        ({"internal_steps": 3, "steps_per_generation": 2}, "internal_steps: 3 given, .* one lasts 2 optimizer steps"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold: 0.5 given, accepted is None"),
        ({"use_vllm": True}, "vllm_importance_sampling_correction: True given, accepted is False"),
    ],
)
def test_what_cannot_be_right_is_refused_at_construction(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bupo(tmp_path, **changes)


@pytest.mark.parametrize(
    ("checkpointing", "find", "right"), [(False, None, True), (True, True, True), (True, None, False), (False, False, False)]
)
def test_ddp_must_look_for_parameters_without_gradient(tmp_path, monkeypatch, checkpointing, find, right):
    monkeypatch.setattr(BuPOConfig, "world_size", 2)
    changes = {"gradient_checkpointing": checkpointing, "ddp_find_unused_parameters": find}
    message = f"ddp_find_unused_parameters: {find} given .* accepted is True"
    with nullcontext() if right else pytest.raises(ValueError, match=message):
        bupo(tmp_path, **changes)


def test_a_configuration_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args: GRPOConfig given, accepted is a BuPOConfig"):
        online(BuPOTrainer, GRPOConfig, tmp_path)


def test_a_peft_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(integration, "is_peft_model", lambda model: True)
    with pytest.raises(ValueError, match="model: with a PEFT adapter"):
        bupo(tmp_path)


# Two ranks


def on_two_ranks(folder):
    """Everything that needs them, in one start of TRL."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = DistributedConfig(fsdp_size=2)
    found = {"own unit": [own_unit_errors(score), own_unit_errors(distill)]}
    for trainer in RUNS:
        sharded = trainer != "ddp"
        if not sharded or TRAINS_SHARDED:
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config) if sharded else None
            found[trainer] = run_with_fixed_completions(trainer, model, folder)
    print("RESULT " + json.dumps(found))
    dist.destroy_process_group()


def score(model, ids, labels):
    out = model(ids, labels=labels, fused_lm_head=True)
    return (out.log_probs + 0.3 * out.entropy).sum()


def distill(model, ids, labels):
    states = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    teacher, weight, mask = states.detach().flip(-1), torch.linspace(-1, 1, 61 * 32).view(61, 32).sin(), labels[:, 1:] != -100
    head = model.lm_head
    return distillation_trainer._chunked_divergence_loss(
        states, teacher, head.weight, weight, mask, 0.4, num_items_in_batch=1, student_lm_head_bias=head.bias
    )[0]


def own_unit_errors(loss_of):
    """Relative errors of gradients where the head is an FSDP2 unit of its own and read outside its forward, as TRL does: of our
    head the largest, of TRL's own that of the weight."""
    own_rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    ids = torch.randint(2, 61, (4, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 5:], ids[1, 7:] = 0, 0
    labels, errors = ids.masked_fill(ids == 0, -100), []
    for patch in (patch_trl, unpatch_trl):
        patch()
        found = []
        for rows in (slice(None), own_rows):
            model = tiny_model(vocab=61)
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 61))
            add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
            if rows is own_rows:
                for unit in (*model.model.layers, model.lm_head, model if loss_of is score else model.model):
                    fully_shard(unit)
            loss = loss_of(model, ids[rows], labels[rows])
            found.append(gradients(model, loss * 2 if rows is own_rows else loss))  # FSDP2 averages over the two
        whole, shards = found
        largest = max(grad.abs().max() for grad in whole.values())
        errors.append({name: ((shards[name].full_tensor() - whole[name]).abs().max() / largest).item() for name in whole})
    return [max(errors[0].values()), errors[1]["lm_head.weight"]]


RUNS = {
    "grpo": (GRPOTrainer, GRPOConfig, {}),
    "bupo": (BuPOTrainer, BuPOConfig, BUPO),
    "ddp": (BuPOTrainer, BuPOConfig, BUPO | {"gradient_checkpointing": True, "ddp_find_unused_parameters": True}),
}


def run_with_fixed_completions(trainer, model, folder):
    """Gradient norms, and what moved, of four steps of 8 sequences on any number of ranks."""
    patch_trl()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    watch, (kind, config, changes) = Watch(), RUNS[trainer]
    changes = changes | {"per_device_train_batch_size": 8 // ranks, "shuffle_dataset": False}
    run = online(kind, config, folder, model=model, callbacks=[watch], rollout_func=fixed_completions, **changes)
    run.train()
    unpatch_trl()
    return logged(run, "grad_norm"), [sorted(map(str, moved)) for moved in watch.moved]


def fixed_completions(prompts, trainer):
    """The same for the same prompts, different within a group."""
    ids = TOKENIZER(prompts).input_ids
    rows = [
        [2 + (3 * sum(prompt) + i % 4 * (2 * j + 1) + j * trainer.state.global_step) % 12 for j in range(5)]
        for i, prompt in enumerate(ids)
    ]
    return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab=len(TOKENIZER)).save_pretrained(folder)
    outputs = on_ranks("test_trl:on_two_ranks", 2, str(folder))
    return [json.loads(output.split("RESULT ")[1].splitlines()[0]) for output in outputs]


def test_a_head_that_fsdp2_shards_as_its_own_unit_gets_the_gradients_of_one_process(two_ranks):
    for ours, theirs in (errors for rank in two_ranks for errors in rank["own unit"]):
        assert ours < 1e-6
        assert theirs > 0.1  # what is repaired


@pytest.mark.parametrize("trainer", RUNS)
def test_runs_under_ddp_and_fsdp2_as_transformers_shards_take_the_course_of_one_process(two_ranks, trainer, tmp_path):
    if trainer != "ddp" and not TRAINS_SHARDED:
        pytest.skip("the Trainer of this transformers cannot train what transformers sharded (5.23 can)")
    norms, moved = run_with_fixed_completions(trainer, None, tmp_path)
    assert min(norms) > 0.01
    for sharded_norms, sharded_moved in (rank[trainer] for rank in two_ranks):
        assert sharded_norms == pytest.approx(norms, rel=1e-5)
        assert sharded_moved == moved


def test_the_example_learns():
    example = Path(__file__).parent.parent / "examples" / "trl_bupo.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rewards = [float(number) for number in re.findall(r"reward ([\d.]+)", done.stdout)]
    assert len(rewards) == 20
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
