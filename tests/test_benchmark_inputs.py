"""What the benchmarks give their contenders, and what they hold them to, against float64 autograd."""

import math

import pytest
import torch

from benchmarks.inputs import DISTRIBUTIONS, IGNORED, MODELS, SEQUENCE, Case, Exact, Inputs

CPU = torch.device("cpu")
COMPUTES = ("log-prob, entropy", "log-prob", "policy loss", "cross entropy")
TENSORS = ("states", "hidden", "weight", "labels", "g_logprob", "g_entropy", "advantages")
# Several slices of the vocabulary, the last of them partial; and two sequences, the second cut short.
CASES = [Case("several slices", 20000, 16, 24, "float32"), Case("two sequences", 517, 64, 300, "bfloat16")]


def inputs(case=CASES[1], distribution="flat", **changes):
    x = Inputs(Case(**vars(case) | changes), CPU)
    x.refresh(distribution)
    return x


def dense(x):
    """Leaves in float64, and log-prob and entropy [N] of all rows with a graph to them."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves]
    log_p = (leaves[0] @ leaves[1].T).log_softmax(1)
    return leaves, log_p.gather(1, x.labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def difference(found, want):
    return ((found - want).norm() / want.norm()).item()


@pytest.mark.parametrize("active", [1.0, 0.5])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_exact_is_what_float64_autograd_gives(case, distribution, active):
    x = inputs(case, distribution, active=active)
    exact = Exact.of(x)
    leaves, logprobs, entropy = dense(x)
    torch.testing.assert_close(exact.logprobs, logprobs.detach() * x.mask, rtol=0, atol=1e-12)
    torch.testing.assert_close(exact.entropy, entropy.detach() * x.mask, rtol=0, atol=1e-12)
    assert x.mask[exact.rows].all()
    assert len(exact.rows) == min(32, x.active_rows)
    assert torch.isin(x.labels[exact.rows], exact.columns).all()
    for computes in COMPUTES:
        coefficients = x.coefficients(computes)
        want = torch.autograd.grad((logprobs, entropy), leaves, [g.double() for g in coefficients], retain_graph=True)
        grad_hidden, grad_weight = exact.gradients(x, *coefficients)
        assert difference(grad_hidden, want[0][exact.rows]) < 1e-12, computes
        assert difference(grad_weight, want[1][exact.columns]) < 1e-12, computes


def test_coefficients_are_the_derivatives_of_what_a_contender_returns():
    x = inputs(active=0.5)
    logprobs, entropy = (torch.randn(x.case.rows, requires_grad=True) for _ in range(2))
    losses = {
        "log-prob, entropy": logprobs @ x.g_logprob + entropy @ x.g_entropy,
        "log-prob": logprobs @ x.g_logprob,
        "policy loss": -(x.advantages * (logprobs - logprobs.detach()).exp())[x.mask].mean(),
        "cross entropy": -logprobs[x.mask].mean(),
    }
    for computes, loss in losses.items():
        want = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
        for found, gradient in zip(x.coefficients(computes), want, strict=True):
            torch.testing.assert_close(found, torch.zeros_like(found) if gradient is None else gradient)


def test_refresh_draws_everything_anew_and_in_place():
    x = inputs(layers=2)
    before = {name: (getattr(x, name).detach().clone(), getattr(x, name).data_ptr()) for name in TENSORS}
    targets = x.targets.clone()
    x.refresh("flat")
    for name, (values, place) in before.items():
        now = getattr(x, name).detach()
        assert now.data_ptr() == place
        assert (now == values).float().mean() < 0.1, name  # bfloat16 numbers may coincide
    assert not torch.equal(x.targets, targets)
    assert x.hidden.is_leaf
    assert x.hidden.requires_grad
    assert x.weight.requires_grad


def test_layers_of_a_lens_differ_and_the_last_is_hidden():
    x = inputs(layers=3)
    assert x.states.shape == (3, x.case.rows, x.case.width)
    assert torch.equal(x.states[-1], x.hidden)
    assert not torch.equal(x.states[0], x.states[1])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_masked_rows_are_prompts_with_no_target_and_no_coefficient(distribution):
    x = inputs(distribution=distribution, active=0.25, rows=2 * SEQUENCE)
    prompt = SEQUENCE * 3 // 4
    assert x.mask.view(2, SEQUENCE).sum(0).tolist() == [0] * prompt + [2] * (SEQUENCE - prompt)
    assert x.active_rows == x.case.rows // 4
    assert (x.targets[~x.mask] == IGNORED).all()
    assert torch.equal(x.targets[x.mask], x.labels[x.mask])
    assert ((x.labels >= 0) & (x.labels < x.case.vocab)).all()
    for computes in COMPUTES:
        g_logprob, g_entropy = x.coefficients(computes)
        assert not g_logprob[~x.mask].any()
        assert not g_entropy[~x.mask].any()
        assert g_logprob[x.mask].all()
    assert not x.advantages[~x.mask].any()


def test_all_rows_count_when_all_are_active():
    x = inputs()
    assert x.mask.all()
    assert x.active_rows == x.case.rows
    assert torch.equal(x.targets, x.labels)


def test_flat_logits_have_the_stated_deviation_and_an_entropy_near_the_most_there_is():
    x = inputs(dtype="float32")
    assert (x.hidden @ x.weight.T).std().item() == pytest.approx(0.5, rel=0.02)
    # Of normal logits, ln V − σ²/2.
    assert Exact.of(x).entropy.mean().item() == pytest.approx(math.log(x.case.vocab) - 0.125, abs=0.01)


def test_peaked_targets_stand_out_from_unsure_to_almost_sure():
    x = inputs(distribution="peaked")
    exact = Exact.of(x)
    p = exact.logprobs.exp()
    assert ((x.hidden @ x.weight.T).argmax(1) == x.labels).float().mean() > 0.9
    assert p.min() < 0.6
    assert p.max() > 0.999
    assert exact.entropy.mean() < 1


def test_a_case_has_the_shape_of_its_model():
    case = Case.of("Qwen3-4B", 7, active=0.5)
    assert (case.vocab, case.width, case.rows, case.active) == (*MODELS["Qwen3-4B"], 7, 0.5)
