"""The objectives: values and derivatives against autograd through formulas written out here, clip borders, weights, metrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import covering, examples

from bupo_kernels.policy_losses import (
    AGGREGATIONS,
    PolicyObjective,
    active_tokens,
    policy_metrics,
    policy_terms,
    simpo_loss,
    token_weights,
    top_entropy_bound,
)

NAN = math.nan
LOW, HIGH, CAP = 0.2, 0.3, 2.0
SURROGATES = [
    *({"ratio": r, "clip": "ppo", **bound} for r in ("token", "sequence") for bound in ({}, {"dual_clip": 3.0}, {"delta": 1.5})),
    *({"ratio": r, "clip": "cispo"} for r in ("token", "sequence")),
    *({"ratio": r, "clip": None, **bound} for r in ("token", "sequence") for bound in ({}, {"delta": 1.5})),
    {"ratio": "none", "clip": None},
    *({"ratio": r, "clip": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 3.0} for r in ("token", "sequence")),
    {"ratio": "sequence", "clip": "gmpo"},
    {"ratio": "sequence", "clip": "vespo", "vespo_k_neg": 0.5},
    {"top_entropy_quantile": 0.3},
    {"ratio": "sequence", "clip": "vespo", "top_entropy_quantile": 0.0},
]
# Neither of the three touches what another does.
OPTIONS = list(zip([None, None, "k1", "k1", "k2", "k2", "k3", "k3"], itertools.cycle([0.0, 0.1]), itertools.cycle(AGGREGATIONS)))


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- the plain formulas, one sequence after the other, through autograd


def plain_loss(objective, logprobs, entropy, advantages, old, reference, sampler, mask):
    """Lists over the sequences of ``[tokens that count]`` losses, with autograd."""
    losses, counts = [], mask & sampler.isfinite()
    bound = torch.quantile(entropy[counts], 1 - objective.top_entropy_quantile) if counts.any() else 0
    for b in range(len(mask)):
        kept = counts[b]
        lp, a = logprobs[b][kept], advantages.expand(mask.shape)[b][kept]
        before = lp.detach() if old is None else old[b][kept]
        log_ratio, gap = lp - before, before - sampler[b][kept]
        capped = gap.clamp(-20, 20).exp().clamp(max=objective.importance_cap)
        if objective.clip == "vespo":
            log_ratio = (log_ratio + (capped.log() if objective.importance else 0)).sum().expand(len(lp))
        elif objective.clip == "gmpo":
            signed, low, high = log_ratio.clamp(-20, 20), -objective.clip_low, objective.clip_high
            signed = torch.where(a > 0, signed.minimum(signed.clamp(low, high)), signed)
            signed = torch.where(a < 0, signed.maximum(signed.clamp(low, high)), signed)
            log_ratio = (signed.sum() / max(len(lp), 1)).expand(len(lp))
        elif objective.ratio == "sequence":
            log_ratio = (log_ratio.sum() / max(len(lp), 1)).expand(len(lp))
        r = log_ratio.clamp(-20, 20).exp()
        if objective.ratio == "none":
            loss = -a * lp
        elif objective.clip == "cispo":
            loss = -r.detach().clamp(max=1 + objective.clip_high) * a * lp
        elif objective.clip == "sapo":
            tau = torch.where(a > 0, objective.sapo_temperature_pos, objective.sapo_temperature_neg)
            loss = -torch.sigmoid(tau * (r - 1)) * 4 / tau * a
        elif objective.clip == "vespo":
            k = torch.where(a >= 0, objective.vespo_k_pos, objective.vespo_k_neg)
            decay = torch.where(a >= 0, objective.vespo_lambda_pos, objective.vespo_lambda_neg)
            loss = -(decay.exp() * r**k * (-decay * r).exp()).detach() * a * lp
        elif objective.clip == "gmpo":
            loss = -r * a
        else:
            free = r if objective.delta is None else r.clamp(max=objective.delta)
            loss = -free * a
            if objective.clip == "ppo":
                loss = torch.maximum(loss, -r.clamp(1 - objective.clip_low, 1 + objective.clip_high) * a)
            if objective.dual_clip is not None:
                loss = torch.where(a < 0, torch.minimum(loss, -objective.dual_clip * a), loss)
        if objective.importance == "token" and objective.clip != "vespo":
            loss = loss * capped
        elif objective.importance == "sequence":
            product = gap.sum().exp()
            loss = loss * (product if 1 / objective.importance_cap <= product <= objective.importance_cap else 0)
        loss = loss * (entropy[b][kept] >= bound)
        if objective.kl is not None:
            d = (reference[b][kept] - lp).clamp(-20, 20)
            loss = loss + objective.kl_coefficient * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[objective.kl]
        losses.append(loss - objective.entropy_coefficient * entropy[b][kept])
    return losses


def aggregate(losses, aggregation, max_length):
    filled = [row for row in losses if len(row)]
    if not filled:
        return sum(row.sum() for row in losses)
    if aggregation == "token-mean":
        return torch.cat(filled).mean()
    if aggregation == "sequence-mean-token-mean":
        return torch.stack([row.mean() for row in filled]).mean()
    if aggregation == "sequence-mean-token-sum":
        return torch.stack([row.sum() for row in filled]).mean()
    return torch.stack([row.sum() / max_length for row in filled]).mean()


def borders():
    """Log-ratios at, just inside and just outside of every bound, and far from all of them."""
    bounds = [math.log(x) for x in (1 - LOW, 1 + HIGH, 1.5, 3.0)] + [20.0, -20.0]
    return st.one_of(
        st.builds(lambda bound, side: bound + side, st.sampled_from(bounds), st.sampled_from([-1e-3, -2e-9, 2e-9, 1e-3])),
        st.sampled_from([0.0, 0.05, -3.0, 400.0, -400.0]),
        st.floats(-1, 1),
    )


@st.composite
def batches(draw):
    """Inputs ``[B, S]`` of `policy_terms`, with rubbish wherever the mask is False and some sampler log-probs not finite."""
    b, s = draw(st.sampled_from([4, 5, 3, 2, 1])), draw(st.sampled_from([4, 5, 3, 2, 1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape):
        return torch.randn(shape or (b, s), generator=generator)

    mask = torch.rand(b, s, generator=generator) < draw(st.sampled_from([0.8, 0.9, 1.0, 0.4, 0.0]))
    log_ratio = torch.tensor(draw(st.lists(borders(), min_size=b, max_size=b)))[:, None].expand(b, s).clone()
    log_ratio += 0.2 * normal() * draw(st.sampled_from([0, 1]))  # without noise a whole sequence sits where it was put
    logprobs = -normal().abs()
    old = logprobs - log_ratio
    finite = mask & (torch.rand(b, s, generator=generator) < draw(st.sampled_from([0.7, 1.0])))
    totals = st.sampled_from([0.3, -0.3, 3.0, -3.0, *(sign * math.log(CAP) + d for sign in (1, -1) for d in (2e-9, -2e-9))])
    gap = torch.tensor(draw(st.lists(totals, min_size=b, max_size=b)))[:, None] / finite.sum(1, keepdim=True).clamp(min=1)
    on_policy = draw(st.integers(0, 3)) == 3
    inputs = {
        "logprobs": logprobs,
        "entropy": normal().abs(),
        "old": old,
        "reference": logprobs + normal() * draw(st.sampled_from([0.1, 1.0, 100.0])),
        "sampler": torch.where(finite, (logprobs if on_policy else old) - gap, draw(st.sampled_from([NAN, -math.inf, math.inf]))),
    }
    inputs = {name: torch.where(mask, x, NAN) for name, x in inputs.items()} | {"mask": mask}
    inputs["old"] = None if on_policy else inputs["old"]
    advantages = normal(b, 1) if draw(st.booleans()) else normal()
    return inputs | {"advantages": torch.where(advantages.abs() < 0.2, 0.0, advantages)}


def terms_of(objective, logprobs, entropy, advantages, old, reference, sampler, mask):
    named = {"old_logprobs": old, "reference_logprobs": reference, "sampler_logprobs": sampler, "mask": mask}
    return policy_terms(objective, logprobs, entropy, advantages, **named)


@pytest.mark.parametrize(
    ("surrogate", "importance"),
    covering(
        [
            (surrogate, importance)
            for surrogate, importance in itertools.product(SURROGATES, (None, "token", "sequence"))
            if not (surrogate.get("clip") == "vespo" and importance == "sequence")  # refused
        ],
        1,
        unpacked=True,
    ),
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_loss_and_derivatives_are_autograds_through_the_plain_formula(surrogate, importance):
    @examples(12)
    @given(batches())
    def check(inputs):
        for kl, bonus, aggregation in OPTIONS:
            max_length = 7 if aggregation == "sequence-mean-token-sum-norm" else None
            objective = PolicyObjective(
                **surrogate,
                clip_low=LOW,
                clip_high=HIGH,
                kl=kl,
                kl_coefficient=0.5 if kl else 0.0,
                entropy_coefficient=bonus,
                importance=importance,
                importance_cap=CAP,
                aggregation=aggregation,
                max_length=max_length,
            )
            leaves = {name: inputs[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
            expected = aggregate(plain_loss(objective, **(inputs | leaves)), aggregation, max_length)
            gradients = torch.autograd.grad(expected, leaves.values())

            terms = terms_of(objective, **(inputs | leaves))
            assert not any(x.requires_grad for x in terms)
            weights = token_weights(terms.active, aggregation, max_length=max_length)
            assert close((weights * terms.loss).sum(), expected.detach(), scale=(weights * terms.loss).abs().sum())
            assert close(weights * terms.d_logprob, gradients[0], scale=gradients[0].abs())
            assert close(weights * terms.d_entropy, gradients[1], scale=0)
            assert all((x[~terms.active] == 0).all() for x in (terms.loss, terms.d_logprob, terms.d_entropy))

    check()


def close(ours, expected, scale):
    return (ours - expected).abs().le(1e-12 + 1e-12 * scale).all()


# ---- exactly on a bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.floats(0.01, 0.6), st.booleans())
def test_a_token_exactly_on_a_bound_keeps_its_gradient_and_one_beyond_it_has_none(dtype, log_ratio, dual):
    """The bound is made from the ratio, so that both are one and the same number."""
    eps = torch.finfo(dtype).eps
    for sign in (1, -1):
        ratio = torch.tensor([sign * log_ratio], dtype=dtype).exp()
        r = ratio.item()
        bound = {"clip_high": r - 1} if sign == 1 else {"clip_low": 1 - r}
        cases = [(bound, sign)]
        if sign == 1:
            upper = {"dual_clip": r} if dual else {"delta": r}
            cases.append(({"clip_high": 0.0, **upper}, -1))
        for fields, advantage in cases:
            name = [*fields][-1]
            for step, kept in ((0, True), (8 * eps, True), (-8 * eps, False)):  # of the bound, away from the ratio
                change = step * (-1 if name == "clip_low" else 1) * (1 if name != "clip_low" else -1)
                objective = PolicyObjective(**(fields | {name: fields[name] + change}))
                terms = policy_terms(
                    objective,
                    torch.tensor([sign * log_ratio], dtype=dtype),
                    None,
                    torch.tensor([advantage], dtype=dtype),
                    old_logprobs=torch.zeros(1, dtype=dtype),
                )
                assert terms.loss.item() == pytest.approx(-advantage * r, rel=20 * eps)
                assert terms.d_logprob.item() == (terms.loss.item() if kept else 0)
                assert (terms.clipped_low | terms.clipped_high).item() is not kept


def test_log_ratios_are_clamped_to_20_and_keep_their_gradient_exactly_there():
    objective = PolicyObjective(clip=None, kl="k3", kl_coefficient=1.0)
    for log_ratio, inside in ((20.0, True), (-20.0, True), (20.0 + 1e-9, False), (-1e4, False), (math.inf, False)):
        at = torch.tensor([log_ratio])
        terms = policy_terms(objective, at, None, torch.ones(1), old_logprobs=torch.zeros(1), reference_logprobs=at)
        assert terms.ratio.item() == pytest.approx(math.exp(max(min(log_ratio, 20), -20)))
        if math.isfinite(log_ratio):
            assert terms.d_logprob.item() == (-terms.ratio.item() if inside else 0)
            d = policy_terms(objective, -at, None, torch.zeros(1), reference_logprobs=torch.zeros(1))
            assert d.d_logprob.item() == (-math.expm1(log_ratio) if inside else 0)
            assert d.kl.isfinite()


@pytest.mark.parametrize("total", [math.log(CAP), -math.log(CAP)])
def test_a_sequence_exactly_on_the_importance_cap_counts(total):
    objective = PolicyObjective(importance="sequence", importance_cap=CAP)
    logprobs, advantages = torch.zeros(3, 1), torch.ones(3, 1)
    sampler = torch.tensor([[-total], [-total * (1 + 1e-12)], [0.0]])
    weight = policy_terms(objective, logprobs, None, advantages, sampler_logprobs=sampler).weight
    assert weight.flatten().tolist() == [pytest.approx(math.exp(total)), 0.0, 1.0]


# ---- what the arguments mean


def test_on_policy_is_ratio_one_with_the_policy_gradient():
    logprobs, advantages = -torch.rand(2, 3), torch.randn(2, 1)
    for surrogate in SURROGATES:
        equal = torch.ones(2, 3)  # entropies, of which none is below the others
        terms = policy_terms(PolicyObjective(**surrogate), logprobs, equal, advantages)
        assert (terms.ratio == 1).all()
        assert torch.allclose(terms.d_logprob, -advantages.expand(2, 3))
        same = policy_terms(PolicyObjective(**surrogate), logprobs, equal, advantages, old_logprobs=logprobs)
        assert all(torch.equal(a, b) for a, b in zip(terms, same, strict=True))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("importance", [None, "token", "sequence"])
def test_a_token_without_a_finite_sampler_logprob_leaves_numerator_and_denominator(bad, importance):
    objective = PolicyObjective(importance=importance, importance_cap=100.0)
    logprobs, old, sampler = -torch.rand(2, 4), -torch.rand(2, 4), -torch.rand(2, 4)
    advantages = torch.randn(2, 1)
    whole = {"old_logprobs": old[:, 1:], "sampler_logprobs": sampler[:, 1:]}
    expected = policy_terms(objective, logprobs[:, 1:], None, advantages, **whole)
    sampler[:, 0] = bad
    terms = policy_terms(objective, logprobs, None, advantages, old_logprobs=old, sampler_logprobs=sampler)
    assert torch.equal(terms.active, active_tokens(logprobs, None, sampler))
    for aggregation in AGGREGATIONS[:2]:
        weights, without = token_weights(terms.active, aggregation), token_weights(expected.active, aggregation)
        assert (weights * terms.loss).sum().item() == pytest.approx((without * expected.loss).sum().item())
        assert torch.allclose((weights * terms.d_logprob)[:, 1:], without * expected.d_logprob)


@pytest.mark.parametrize("importance", [None, "sequence"])
@pytest.mark.parametrize("clip", ["ppo", "gmpo", "vespo"])
def test_packed_sequences_are_those_of_one_row_each(clip, importance):
    if (clip, importance) == ("vespo", "sequence"):
        return  # refused
    objective = PolicyObjective(ratio="sequence", clip=clip, importance=importance, importance_cap=3.0)
    lengths = torch.tensor([3, 0, 5, 1])
    shape = 4, 5
    real = torch.arange(5) < lengths[:, None]
    values = {name: -torch.rand(shape) for name in ("logprobs", "old_logprobs", "sampler_logprobs")}
    advantages, mask = torch.randn(4, 1).expand(shape), real & (torch.rand(shape) < 0.8)
    whole = policy_terms(objective, entropy=None, advantages=advantages, mask=mask, **values)
    row = {name: x[real][None] for name, x in values.items()}
    packed = policy_terms(objective, entropy=None, advantages=advantages[real][None], mask=mask[real][None], lengths=lengths, **row)
    for name, ours, theirs in zip(packed._fields, packed, whole, strict=True):
        counts = mask[real]
        assert torch.allclose(ours[0][counts].double(), theirs[real][counts].double(), rtol=1e-12), name


@given(st.integers(0, 40), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.integers(0, 9))
def test_the_bound_of_the_highest_entropies_takes_as_many_tokens_as_torchs_quantile(count, quantile, seed):
    torch.manual_seed(seed)
    entropy, mask = torch.rand(5, 8), torch.zeros(40, dtype=torch.bool)
    mask[torch.randperm(40)[:count]] = True
    mask = mask.view(5, 8)
    chosen = mask & (entropy >= top_entropy_bound(entropy, mask, quantile))
    if count == 0:
        assert not chosen.any()
    else:
        assert torch.equal(chosen, mask & (entropy >= torch.quantile(entropy[mask], 1 - quantile) - 1e-12))
        assert chosen.sum() >= max(1, math.floor(quantile * count))


def test_parts_of_a_batch_with_its_bound_choose_the_tokens_that_the_whole_does():
    objective = PolicyObjective(top_entropy_quantile=0.2)
    logprobs, entropy, advantages = -torch.rand(6, 5), torch.rand(6, 5), torch.randn(6, 1)
    whole = policy_terms(objective, logprobs, entropy, advantages)
    assert (whole.weight == 1).sum() == 1 + 29 // 5
    bound = top_entropy_bound(entropy, whole.active, 0.2)
    for part in torch.arange(6).split(2):
        terms = policy_terms(objective, logprobs[part], entropy[part], advantages[part], entropy_bound=bound)
        assert torch.equal(terms.d_logprob, whole.d_logprob[part])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_the_papers_formula_and_its_derivative(smoothing):
    beta, gamma = 2.5, 0.8
    chosen, rejected = -torch.rand(3, 4), -torch.rand(3, 6)
    masks = torch.arange(4) < torch.tensor([[4], [1], [2]]), torch.arange(6) < torch.tensor([[3], [6], [0]])
    leaves = [torch.where(mask, x, NAN).requires_grad_() for x, mask in zip((chosen, rejected), masks, strict=True)]
    loss, margin = simpo_loss(*leaves, *masks, beta=beta, gamma=gamma, label_smoothing=smoothing)
    assert not margin.requires_grad
    gradients = torch.autograd.grad(loss.sum(), leaves)
    for i in range(3):
        w, r = chosen[i][masks[0][i]], rejected[i][masks[1][i]]
        m = beta * (w.sum() / len(w) - r.sum() / max(len(r), 1)) - gamma
        sigma = 1 / (1 + (-m).exp())
        assert margin[i].item() == pytest.approx(m.item(), rel=1e-12)
        assert loss[i].item() == pytest.approx((-(1 - smoothing) * sigma.log() - smoothing * (1 - sigma).log()).item(), rel=1e-12)
        slope = -beta * ((1 - sigma) - smoothing)
        assert torch.allclose(gradients[0][i], torch.where(masks[0][i], slope / len(w), 0.0), rtol=1e-12)
        assert torch.allclose(gradients[1][i], torch.where(masks[1][i], -slope / max(len(r), 1), 0.0), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("beta", {"beta": 0}),
        ("gamma", {"gamma": -1}),
        ("label_smoothing", {"label_smoothing": 0.5}),
        ("rejected_logprobs", {"rejected_logprobs": torch.zeros(3, 4)}),
        ("chosen_mask", {"chosen_mask": torch.ones(2, 5, dtype=torch.bool)}),
    ],
    ids=str,
)
def test_simpo_names_what_it_does_not_take(name, changes):
    mask = torch.ones(2, 4, dtype=torch.bool)
    given = {f"{name}_logprobs": torch.zeros(2, 4) for name in ("chosen", "rejected")}
    given |= {"chosen_mask": mask, "rejected_mask": mask}
    with pytest.raises(ValueError, match=f"^{name}: .* given, accepted are"):
        simpo_loss(**(given | changes))


def test_fp32_in_fp32_out_and_no_graph():
    logprobs = (-torch.rand(2, 3, dtype=torch.float32)).requires_grad_()
    terms = policy_terms(PolicyObjective(), logprobs, None, torch.ones(2, 1), old_logprobs=logprobs - 1)
    assert {x.dtype for x in terms} == {torch.float32, torch.bool}
    assert not any(x.requires_grad for x in terms)
    assert {x.dtype for x in policy_metrics(terms, logprobs)[:-1]} == {torch.float32}


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: "-".join(map(str, [*s.values()])))
def test_nothing_waits_for_the_device(surrogate):
    """Meta tensors have no values, so whatever looked at one would raise."""
    x = torch.zeros(2, 3, device="meta")
    weights = [None, "token"] if surrogate.get("clip") == "vespo" else [None, "token", "sequence"]
    for importance, aggregation in zip(weights, itertools.cycle(AGGREGATIONS[:2]), strict=False):
        objective = PolicyObjective(**surrogate, kl="k3", kl_coefficient=0.1, entropy_coefficient=0.1, importance=importance)
        terms = terms_of(objective, x, x, x, x, x, x, x > 0)
        assert token_weights(terms.active, aggregation, denominator=x.sum()).shape == terms.loss.shape
        assert all(metric.ndim == 0 for metric in policy_metrics(terms, x, x, x, x, x > 0))


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"entropy_coefficient": 0.1}, "entropy"),
        ({"kl": "k3"}, "reference_logprobs"),
        ({"importance": "token"}, "sampler_logprobs"),
    ],
    ids=str,
)
def test_a_missing_tensor_is_named(fields, missing):
    with pytest.raises(ValueError, match=f"^{missing}: None given"):
        policy_terms(PolicyObjective(**fields), torch.zeros(1), None, torch.zeros(1))


def test_an_objective_says_what_it_needs():
    assert PolicyObjective(entropy_coefficient=0.1).needs_entropy
    assert PolicyObjective(kl="k1").needs_reference
    assert PolicyObjective(importance="token").needs_sampler
    assert PolicyObjective(importance="sequence").needs_sequence
    assert PolicyObjective(ratio="sequence").needs_sequence
    plain = PolicyObjective()
    assert not any((plain.needs_entropy, plain.needs_reference, plain.needs_sampler, plain.needs_sequence))


BAD = [
    ("ratio", {"ratio": "tokens"}),
    ("clip", {"clip": "none"}),
    ("kl", {"kl": "k4"}),
    ("importance", {"importance": True}),
    ("aggregation", {"aggregation": "sequence-mean"}),
    ("clip_low", {"clip_low": 1.5}),
    ("clip_low", {"clip_low": "0.2"}),
    ("clip_high", {"clip_high": -0.1}),
    ("clip_high", {"clip_high": True}),
    ("clip_high", {"clip_high": NAN}),
    ("dual_clip", {"dual_clip": 1.0}),
    ("delta", {"delta": 1.2}),
    ("delta", {"delta": 1.0, "clip": None}),
    ("delta", {"delta": math.inf}),
    ("kl_coefficient", {"kl": "k1", "kl_coefficient": -1}),
    ("entropy_coefficient", {"entropy_coefficient": math.inf}),
    ("importance_cap", {"importance_cap": 0.5}),
    ("clip", {"ratio": "none"}),
    ("clip", {"ratio": "none", "clip": "cispo"}),
    ("dual_clip", {"dual_clip": 3.0, "clip": "cispo"}),
    ("dual_clip", {"dual_clip": 3.0, "clip": None}),
    ("delta", {"delta": 3.0, "clip": "cispo"}),
    ("delta", {"delta": 3.0, "clip": None, "ratio": "none"}),
    ("delta", {"delta": 3.0, "dual_clip": 3.0}),
    ("delta", {"delta": 3.0, "clip": "sapo"}),
    ("ratio", {"clip": "gmpo"}),
    ("ratio", {"clip": "vespo"}),
    ("importance", {"clip": "vespo", "ratio": "sequence", "importance": "sequence"}),
    ("sapo_temperature_neg", {"clip": "sapo", "sapo_temperature_neg": 0}),
    ("vespo_k_pos", {"vespo_k_pos": -1}),
    ("vespo_lambda_neg", {"vespo_lambda_neg": 0}),
    ("top_entropy_quantile", {"top_entropy_quantile": 1.5}),
    ("top_entropy_quantile", {"top_entropy_quantile": 0.2, "clip": "gmpo", "ratio": "sequence"}),
    ("kl_coefficient", {"kl_coefficient": 0.1}),
    ("max_length", {"max_length": 5}),
    ("max_length", {"aggregation": "sequence-mean-token-sum-norm"}),
    ("max_length", {"aggregation": "sequence-mean-token-sum-norm", "max_length": 0}),
    ("max_length", {"aggregation": "sequence-mean-token-sum-norm", "max_length": 2.0}),
]


@pytest.mark.parametrize(("name", "fields"), BAD, ids=str)
def test_a_bad_field_is_named_with_what_was_given_and_what_is_accepted(name, fields):
    with pytest.raises(ValueError, match=f"^{name}: .* given, accepted are "):
        PolicyObjective(**fields)


# ---- weights

masks = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6).map(torch.tensor)


@given(masks)
def test_weights_sum_to_one_and_are_zero_off_the_mask(mask):
    for aggregation in AGGREGATIONS[:2]:
        weights = token_weights(mask, aggregation)
        assert weights.sum().item() == pytest.approx(1.0 if mask.any() else 0.0)
        assert (weights[~mask] == 0).all()
    summed = token_weights(mask, AGGREGATIONS[3])
    assert summed.sum().item() == pytest.approx(mask.sum().item() / max(mask.any(1).sum().item(), 1))
    weights = token_weights(mask, AGGREGATIONS[2], max_length=9)
    assert weights.sum().item() == pytest.approx(mask.sum().item() / 9 / max(mask.any(1).sum().item(), 1))
    assert (weights[~mask] == 0).all()


@given(masks, st.integers(1, 5), st.booleans())
def test_parts_with_the_denominator_of_the_whole_sum_to_the_whole(mask, size, as_tensor):
    losses = torch.randn(mask.shape)
    for aggregation in AGGREGATIONS:
        max_length = 9 if aggregation == AGGREGATIONS[2] else None
        count = (mask if aggregation == "token-mean" else mask.any(1)).sum()
        denominator = count if as_tensor else count.item()
        whole = (token_weights(mask, aggregation, max_length=max_length) * losses).sum()
        parts = [
            (token_weights(m, aggregation, denominator=denominator, max_length=max_length) * x).sum()
            for m, x in zip(mask.split(size), losses.split(size), strict=True)
        ]
        assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


def test_bad_aggregations_are_named():
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="aggregation: 'mean' given, accepted are 'token-mean', 'sequence-mean-token-mean'"):
        token_weights(mask, "mean")
    with pytest.raises(ValueError, match="max_length: None given, accepted are positive integers"):
        token_weights(mask, AGGREGATIONS[2])


# ---- TRL's objectives, as its 1.16 documents them (it is not installed here: these are its formulas, not its code)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "gspo", "luspo"])
@given(st.integers(0, 1000))
def test_trls_objectives(name, seed):
    torch.manual_seed(seed)
    shape, length, beta, low, high = (4, 6), 10, 0.04, 0.2, 0.28
    logprobs, old, reference, sampler = (-torch.rand(shape) for _ in range(4))
    advantages = torch.randn(4, 1)
    mask = torch.arange(6) < torch.randint(1, 7, (4, 1))

    # Ratio, surrogate, importance weight on the surrogate alone, k3 added after it, aggregation.
    log_ratio = logprobs - old
    if name in ("gspo", "luspo"):  # importance_sampling_level="sequence" with loss_type="grpo"
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None].expand(shape)
    r = log_ratio.exp()
    if name == "cispo":
        token = -r.clamp(max=1 + high) * advantages * logprobs  # TRL writes the bound 1 + high as its epsilon_high
    else:
        token = -torch.minimum(r * advantages, r.clamp(1 - low, 1 + high) * advantages)
    token = token * (old - sampler).exp().clamp(max=3.0)
    token = token + beta * ((reference - logprobs).exp() - (reference - logprobs) - 1)
    if name in ("grpo", "gspo"):
        expected = ((token * mask).sum(1) / mask.sum(1)).mean()
    elif name == "luspo":
        expected = (token * mask).sum(1).mean()
    elif name == "dr_grpo":
        expected = (token * mask).sum() / (len(token) * length)
    else:
        expected = (token * mask).sum() / mask.sum()

    objective = PolicyObjective(
        ratio="sequence" if name in ("gspo", "luspo") else "token",
        clip="cispo" if name == "cispo" else "ppo",
        clip_low=low,
        clip_high=high,
        kl="k3",
        kl_coefficient=beta,
        importance="token",
        importance_cap=3.0,
        aggregation=AGGREGATIONS[{"grpo": 1, "gspo": 1, "dr_grpo": 2, "luspo": 3}.get(name, 0)],
        max_length=length if name == "dr_grpo" else None,
    )
    terms = terms_of(objective, logprobs, None, advantages, old, reference, sampler, mask)
    weights = token_weights(mask, objective.aggregation, max_length=objective.max_length)
    assert (weights * terms.loss).sum().item() == pytest.approx(expected.item(), rel=1e-12)


# ---- metrics


@pytest.mark.parametrize(
    "surrogate", [{"clip": "ppo"}, {"clip": "cispo"}, {"clip": "ppo", "dual_clip": 3.0}, {"clip": None}], ids=str
)
@given(batches())
def test_metrics_are_numpys_over_the_tokens_that_count(surrogate, inputs):
    objective = PolicyObjective(**surrogate, clip_low=LOW, clip_high=HIGH, kl="k2")
    terms = terms_of(objective, **inputs)
    old = inputs["old"]
    metrics = policy_metrics(terms, inputs["logprobs"], inputs["entropy"], old, inputs["sampler"], inputs["mask"])
    rows = terms.active.numpy()
    lp, entropy, reference, sampler = (inputs[k].numpy()[rows] for k in ("logprobs", "entropy", "reference", "sampler"))
    a = np.broadcast_to(inputs["advantages"].numpy(), rows.shape)[rows]
    log_ratio = np.clip(lp - (lp if old is None else old.numpy()[rows]), -20, 20)
    r = np.exp(log_ratio)
    low, high = (r < 1 - LOW) & (a < 0), (r > 1 + HIGH) & (a > 0)
    if objective.clip != "ppo":
        low, high = np.zeros_like(low), r > 1 + HIGH if objective.clip else np.zeros_like(low)
    elif objective.dual_clip:
        high = high | ((r > 3.0) & (a < 0))
    expected = {
        "ratio_mean": r.mean() if len(r) else 1.0,
        "ratio_min": r.min() if len(r) else 1.0,
        "ratio_max": r.max() if len(r) else 1.0,
        "clipped_low": low.sum() / max(len(r), 1),
        "clipped_high": high.sum() / max(len(r), 1),
        "kl_old": (r - 1 - log_ratio).sum() / max(len(r), 1),
        "kl_reference": (np.clip(reference - lp, -20, 20) ** 2 / 2).sum() / max(len(r), 1),
        "entropy": entropy.sum() / max(len(r), 1),
        "sampler_gap": np.abs(lp - sampler).sum() / max(len(r), 1),
        "active_rows": rows.sum(),
    }
    assert all(x.ndim == 0 and not x.requires_grad for x in metrics)
    assert {k: v.item() for k, v in metrics._asdict().items()} == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_metrics_of_no_rows_and_of_what_was_not_given():
    terms = policy_terms(PolicyObjective(), torch.zeros(0), None, torch.zeros(0))
    metrics = policy_metrics(terms, torch.zeros(0))
    assert [x.item() for x in metrics] == pytest.approx([1, 1, 1, 0, 0, 0, 0, NAN, NAN, 0], nan_ok=True)
