"""OISD: the loss of a step on the model's own policy and a layer that learns from it, against the formula in float64."""

import pytest
import torch
from models import in_float64, tiny_model, token_batch
from problems import first_of

from bupo_kernels import FusedLMHead, PolicyObjective, policy_loss, self_distillation_loss
from bupo_kernels.self_distillation import attention_divergence

TEMPERATURE = 0.8
GSPO = PolicyObjective(ratio="sequence", aggregation="sequence-mean-token-mean")


def jensen_shannon(p, q):
    """Of probabilities, over the last dimension."""
    middle = (p + q) / 2
    return (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).sum(-1) / 2


def batch():
    ids, targets = token_batch()
    generator = torch.Generator().manual_seed(3)
    advantages = torch.randn(ids.shape[0], 1, generator=generator, dtype=torch.float64)
    old = -torch.rand(ids.shape, generator=generator, dtype=torch.float64) - 3
    return ids, targets, advantages, old


def plain(model, layer, ids, final_norm, attention_weight):
    """Both divergences of each token."""
    outputs = model.base_model(ids, output_hidden_states=True, output_attentions=attention_weight > 0, use_cache=False)
    student = outputs.hidden_states[layer]
    student = model.base_model.norm(student) if final_norm else student
    p, q = ((x @ model.lm_head.weight.T / TEMPERATURE).softmax(-1) for x in (student, outputs.hidden_states[-1]))
    divergence, attention = jensen_shannon(p, q.detach()), torch.zeros(())
    if attention_weight:
        a, b = (outputs.attentions[i].mean(1) for i in (layer - 1, -1))
        attention = torch.stack([jensen_shannon(a[:, i, : i + 1], b[:, i, : i + 1].detach()) for i in range(ids.shape[1])], 1)
    return divergence, attention


@pytest.mark.parametrize(
    ("layer", "final_norm", "weight", "attention_weight", "objective"),
    [
        (2, True, 1.0, 0.0, PolicyObjective(kl=None)),
        (3, False, 0.7, 0.1, PolicyObjective(aggregation="sequence-mean-token-mean")),
        (1, True, 0.0, 0.5, GSPO),
    ],
    ids=["logits", "both", "attention"],
)
@pytest.mark.parametrize("tied", first_of([False, True]))
def test_loss_and_gradients_are_those_of_the_formula(layer, final_norm, weight, attention_weight, objective, tied):
    model = in_float64(tiny_model(tied=tied))
    model.config._attn_implementation = "eager" if attention_weight else "sdpa"
    ids, targets, advantages, old = batch()
    counts = targets != -100
    counts[0, -1] = False  # masked, beside what is ignored
    found = self_distillation_loss(
        model,
        ids,
        targets,
        advantages,
        layer=layer,
        divergence_weight=weight,
        attention_weight=attention_weight,
        final_norm=final_norm,
        old_logprobs=old,
        objective=objective,
        mask=counts,
        temperature=TEMPERATURE,
    )
    found.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    options = {"old_logprobs": old, "objective": objective, "mask": counts, "temperature": TEMPERATURE}
    own, metrics = policy_loss(model, ids, targets, advantages, **options)
    per_sequence = counts.sum(1, keepdim=True) * len(ids) if "sequence" in objective.aggregation else counts.sum()
    weights = counts * advantages / per_sequence
    divergence, attention = plain(model, layer, ids, final_norm, attention_weight)
    expected = own + (weights * (weight * divergence + attention_weight * attention)).sum()
    expected.backward()

    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(found.metrics, metrics, strict=True))
    if weight:
        assert torch.allclose(found.divergence, divergence.detach() * counts, rtol=1e-8, atol=1e-12)
    assert (found.attention is None) == (attention_weight == 0)
    if attention_weight:
        assert torch.allclose(found.attention, attention.detach() * counts, rtol=1e-8, atol=1e-12)
    assert not any(x.requires_grad for x in found[2:] if x is not None)
    for name, p in model.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-7, atol=1e-9 * p.grad.abs().max().item()), name


def test_the_teacher_is_a_constant_and_the_layers_above_learn_from_the_reward_alone():
    model, (ids, targets, advantages, old) = in_float64(tiny_model()), batch()
    gradients = {}
    for weight in (0.0, 1.0):
        model.zero_grad()
        found = self_distillation_loss(model, ids, targets, advantages, layer=2, divergence_weight=weight, old_logprobs=old)
        found.loss.backward()
        gradients[weight] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, gradient in gradients[0.0].items():
        above = "layers.2." in name or "layers.3." in name
        assert torch.allclose(gradient, gradients[1.0][name], rtol=1e-12, atol=1e-16) == above, name


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_draws_the_layer_to_what_was_done_well_and_away_from_what_was_done_badly(sign):
    model, (ids, targets, _, _) = in_float64(tiny_model()), batch()

    def divergence():
        advantages = torch.full((len(ids), 1), sign, dtype=torch.float64)
        return self_distillation_loss(model, ids, targets, advantages, layer=2, divergence_weight=1.0)

    before = divergence()
    below = [p for name, p in model.named_parameters() if "layers.1." in name]
    own, _ = policy_loss(model, ids, targets, torch.full((len(ids), 1), sign, dtype=torch.float64))
    gradients = torch.autograd.grad(before.loss - own, below)
    with torch.no_grad():
        for p, gradient in zip(below, gradients, strict=True):
            p -= 1e-3 * gradient
    # The teacher moves with them: the bar is that of the layer's policy from the teacher as it was.
    assert sign * (divergence().divergence.sum() - before.divergence.sum()).item() < 0


def test_a_fused_head_and_recomputed_activations_change_nothing():
    model, (ids, targets, advantages, old) = in_float64(tiny_model()), batch()
    model.config._attn_implementation = "eager"
    options = {"layer": 2, "attention_weight": 0.1, "old_logprobs": old}

    def gradients():
        model.zero_grad()
        self_distillation_loss(model, ids, targets, advantages, **options).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    before = gradients()
    FusedLMHead.adopt(model.lm_head)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        assert torch.allclose(gradient, before[name], rtol=1e-12, atol=1e-15), name
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"^model: .*use_reentrant=True"):
        gradients()


def test_attention_of_a_key_that_is_masked_in_both_layers_has_a_finite_gradient():
    scores = torch.tensor([[0.3, -torch.inf, -torch.inf], [0.1, 0.9, -torch.inf]], dtype=torch.float64).expand(1, 2, 2, 3).clone()
    scores.requires_grad_()
    mask = torch.tensor([[True, True]])
    teacher = scores.detach().flip(-2).softmax(-1)
    values = attention_divergence(scores.softmax(-1), teacher, mask)
    a, b = scores.softmax(-1).mean(1)[..., :2], teacher.mean(1)[..., :2]  # the last key is masked in both
    assert torch.allclose(values, jensen_shannon(a, b))
    (gradient,) = torch.autograd.grad(values.sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[..., 2] == 0).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("layer", {"layer": 4}),
        ("layer", {"layer": 0}),
        ("divergence_weight", {"divergence_weight": -1.0}),
        ("attention_weight", {"attention_weight": float("nan")}),
        ("attention_weight", {"attention_weight": 0.1}),  # the model runs with sdpa
    ],
    ids=str,
)
def test_what_cannot_be_is_named(name, changes):
    ids, targets, advantages, _ = batch()
    with pytest.raises(ValueError, match=f"^{name}: .* given.*, accepted "):
        self_distillation_loss(tiny_model(), ids, targets, advantages, **({"layer": 2} | changes))
