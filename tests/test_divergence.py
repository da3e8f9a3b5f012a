"""KL between two policies that share an unembedding, against float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LARGEST, tiny_model, token_batch
from problems import OPTIONS, case_with, contract, divergence_factor, examples, largest_logit

from bupo_kernels import FusedLMHead, linear_divergence, policy_divergence, reference


def oracle(hidden, other, weight, mask=None, **options):
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    p, q = (reference.logits(x.double(), weight.double(), **options).log_softmax(-1) for x in (hidden, other))
    kl = (p.exp() * (p - q)).sum(-1)
    return kl if mask is None else kl * mask


def assert_near(found, expected, largest) -> None:
    """Within the error model, row by row; logits reach ``largest``."""
    for one, kl in zip(found.double().flatten().tolist(), expected.flatten().tolist(), strict=True):
        assert abs(one - kl) <= contract(largest) * divergence_factor(kl)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kl_equals_the_oracle_with_every_option(name, dtype):
    case = case_with(OPTIONS[name], rows=9, vocab=41, width=6, dtype=dtype)
    other = torch.randn_like(case.hidden)
    found = linear_divergence(case.hidden, other, case.weight, **case.options)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    largest = max(largest_logit(case), largest_logit(replace(case, hidden=other)))
    assert_near(found, oracle(case.hidden, other, case.weight, **case.options), largest)


@examples(30)
@given(rows=st.integers(0, 5), vocab=st.integers(1, 5000), scale=st.sampled_from([1e-3, 1.0, 30.0, 300.0]), seed=st.integers(0, 99))
def test_kl_holds_its_error_bound_from_flat_to_steep_policies_and_over_slices(rows, vocab, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, other = (torch.randn(rows, 8, generator=generator) * scale for _ in range(2))
    weight = torch.randn(vocab, 8, generator=generator) / 8**0.5
    largest = max((x @ weight.T).abs().amax().item() if rows else 0.0 for x in (hidden, other))
    found = linear_divergence(hidden, other, weight)
    assert (found >= 0).all()
    assert_near(found, oracle(hidden, other, weight), largest)


def test_a_policy_diverges_from_itself_by_nothing_and_masked_rows_are_zero():
    hidden, weight = torch.randn(2, 3, 8), torch.randn(50, 8)
    assert (linear_divergence(hidden, hidden, weight) <= 2 * contract(float((hidden @ weight.T).abs().max()))).all()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    found = linear_divergence(hidden, -hidden, weight, mask=mask)
    assert found.shape == (2, 3)
    assert ((found > 0) == mask).all()


def test_what_cannot_be_compared_raises():
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    with pytest.raises(ValueError, match=r"reference: torch.float32 of shape \(2, 8\)"):
        linear_divergence(hidden, hidden[:2], weight)
    with pytest.raises(TypeError, match="backend: given"):
        linear_divergence(hidden, hidden, weight, backend="torch")
    head = FusedLMHead(8, 50)
    with pytest.raises(TypeError, match="reference: given with targets"):
        head(hidden, torch.zeros(3, dtype=torch.long), reference=hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_the_divergence_of_a_layer_from_the_final_policy_is_that_of_its_logits(tied):
    model, (ids, targets) = tiny_model(tied=tied), token_batch()
    states = model(ids, output_hidden_states=True).hidden_states
    found = policy_divergence(model, ids, targets != -100, layer=2, temperature=0.7)
    expected = oracle(states[2], states[4], model.lm_head.weight, targets != -100, temperature=0.7)
    assert_near(found, expected.detach(), LARGEST / 0.7)
    assert model.config.num_hidden_layers == 4
