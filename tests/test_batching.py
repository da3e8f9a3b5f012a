"""Packing: what is put together, how it is shared out, and that packed sequences do not see one another."""

import contextlib
import itertools
import math
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, LARGEST, tiny_model
from problems import covering, model_error, policy_error

from bupo.attention import NAME, packed_options, per_sequence_attention, training_attention
from bupo.batching import IGNORE, fill, pack, pack_all, plan_micro_batches, token_weights, tokens
from bupo.distributed import World
from bupo.rollout import KeptSets, Sample
from bupo_kernels import policy_logprobs, policy_loss

CPU = torch.device("cpu")


def random_samples(count: int, seed: int = 0, vocab: int = 61, longest: int = 12) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(2, vocab, (length,), generator=generator).tolist()

    return [Sample(ids(), response := ids(), [-1.0] * len(response), True) for _ in range(count)]


# ---- packing


def test_a_packed_row_holds_the_sequences_their_positions_and_the_tokens_that_follow():
    samples = [Sample([5, 6, 7], [8, 1], [-0.5, -0.25], True), Sample([9], [10], None, False)]
    batch = pack(samples, [2.0, -3.0], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 8, 1, 10]]
    assert batch.mask.tolist() == [[False, False, True, True, True]]
    assert batch.coefficients.tolist() == [[2.0, 2.0, 2.0, 2.0, -3.0]]
    assert batch.sampler_logprobs[0, 2:4].tolist() == [-0.5, -0.25]
    assert batch.sampler_logprobs[0, [0, 1, 4]].isnan().all()
    assert batch.lengths == (4, 1)


def test_packed_rows_have_the_sets_of_their_tokens_and_none_elsewhere():
    first = Sample([5, 6, 7], [8, 1], [-0.5, -0.25], True, KeptSets(array("i", [8, 9, 1]), array("i", [2, 1])))
    second = Sample([9], [10], [-1.0], False, KeptSets(array("i", [3, 10]), array("i", [2])))
    ids, offsets = pack([first, second], [2.0, -3.0], CPU).kept
    assert ids.tolist() == [8, 9, 1, 3, 10]
    assert offsets.tolist() == [0, 0, 0, 2, 3, 5]
    assert ids.dtype == offsets.dtype == torch.int64
    assert pack([], [], CPU).kept is None
    with pytest.raises(ValueError, match="samples: some with and some without kept sets given"):
        pack([first, Sample([9], [10], None, False)], [1.0, 1.0], CPU)


def test_a_rank_without_work_gets_a_row_that_changes_nothing():
    model, batch = tiny_model(), pack([], [], CPU)
    with training_attention(model, "per-sequence"):
        options = packed_options(batch, "per-sequence")
        loss, metrics = policy_loss(model, batch.input_ids, batch.targets, batch.coefficients, denominator=1, **options)
    loss.backward()
    assert loss.item() == metrics.active_rows.item() == 0
    for name, parameter in model.named_parameters():  # a gradient of zeros, not none: other ranks reduce theirs with it
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


lengths = st.lists(st.integers(1, 50), max_size=60)


@settings(deadline=None)
@given(lengths=lengths, ranks=st.integers(1, 5), max_tokens=st.integers(50, 120))
def test_a_plan_holds_every_sequence_once_within_the_budget_and_as_many_micro_batches_on_every_rank(lengths, ranks, max_tokens):
    plan = plan_micro_batches(lengths, max_tokens, ranks)
    assert len(plan) == ranks
    assert len({len(parts) for parts in plan}) == 1
    flat = [part for parts in plan for part in parts]
    assert sorted(i for part in flat for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in flat]
    assert max(loads, default=0) <= max_tokens
    floor = math.ceil(sum(lengths) / (ranks * max_tokens))
    assert floor <= len(plan[0]) <= 2 * floor + 1


def test_a_plan_is_even_and_refuses_what_fits_nowhere():
    plan = plan_micro_batches([10] * 32, 80, 2)
    assert [[len(part) for part in parts] for parts in plan] == [[8, 8], [8, 8]]
    assert plan_micro_batches([], 80, 2) == [[], []]
    with pytest.raises(ValueError, match="81 given, accepted are up to max_tokens"):
        plan_micro_batches([81], 80, 2)


def test_all_ranks_shares_are_the_whole():
    samples = random_samples(23)
    shares = [pack_all(samples, [1.0] * 23, 40, World(rank, 3, CPU)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sum(sum(batch.lengths) for share in shares for batch in share if batch.mask.any()) == sum(map(tokens, samples))
    assert all(batch.input_ids.shape[1] <= 40 for share in shares for batch in share)


def test_filling_takes_sequences_in_order_and_says_what_was_left_out():
    assert fill([5, 5, 3, 2, 9], [0, 1, 2, 3, 4], 2, 8) == ([[0, 2], [1, 3]], [4])
    assert fill([5], [0], 0, 8) == ([], [0])


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("token-mean", [1 / 6] * 3), ("sequence-mean-token-mean", [1 / 3, 1 / 6, 1 / 9])]
)
def test_token_weights_are_those_of_the_mini_batch(aggregation, expected):
    weights = token_weights([1, 2, 3], aggregation)
    assert weights == pytest.approx(expected)
    assert sum(weight * length for weight, length in zip(weights, [1, 2, 3], strict=True)) == pytest.approx(1)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean"])
def test_a_mini_batch_without_a_valid_sample_has_no_weights(aggregation):
    assert token_weights([], aggregation) == []


# ---- attention


POLICIES = [{}, {"layer": 2}, {"layer": 3, "module": "attention"}, {"layer": 2, "module": "ffn"}]


@pytest.mark.parametrize("case", covering([*itertools.product(FAMILIES, (False, True), POLICIES)], 1), ids=str)
def test_packed_log_probs_and_gradients_are_those_of_the_sequences_apart(case):
    family, checkpointing, policy = case
    model, samples = tiny_model(family), random_samples(9)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = pack(sorted(samples, key=tokens), [1.0] * 9, CPU)
    with training_attention(model, "per-sequence"):
        options = packed_options(batch, "per-sequence") | policy
        packed = policy_logprobs(model, batch.input_ids, batch.targets, **options)
        packed.logprobs.sum().backward()
    found = packed.logprobs[batch.mask]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    apart = []
    for sample in sorted(samples, key=tokens):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        targets = ids[:, 1:].masked_fill(torch.arange(ids.shape[1] - 1) < len(sample.prompt_ids) - 1, IGNORE)
        alone = policy_logprobs(model, ids[:, :-1], targets, **policy).logprobs
        alone.sum().backward()
        apart.append(alone[targets != IGNORE])
    # Of both, and the gradients beside the largest.
    torch.testing.assert_close(found, torch.cat(apart), atol=2 * policy_error(model.config, 40, LARGEST), rtol=0)
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    atol = 2 * model_error(model.config, 40, backward=True) * largest
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 13])
def test_transformers_own_attention_gives_the_same_packed_log_probs(implementation, window):
    model, batch = tiny_model("mistral"), pack(random_samples(5), [1.0] * 5, CPU)
    assert min(batch.lengths) < 13 < max(batch.lengths)
    model.config.sliding_window = window
    found = []
    for name in ("per-sequence", implementation):
        with training_attention(model, name):
            found.append(policy_logprobs(model, batch.input_ids, batch.targets, **packed_options(batch, name)).logprobs)
    torch.testing.assert_close(*found, atol=2 * policy_error(model.config, 40, LARGEST), rtol=0)


def test_the_models_own_attention_is_back_afterwards():
    model = tiny_model()
    before = model.config._attn_implementation
    with contextlib.suppress(ZeroDivisionError), training_attention(model, "per-sequence"):
        assert model.config._attn_implementation == NAME
        _ = 1 / 0
    assert model.config._attn_implementation == before


def test_lengths_that_are_not_the_batchs_raise():
    q = torch.zeros(1, 4, 6, 8)
    for others in (None, [3, 4]):
        with pytest.raises(ValueError, match="sequence_lengths: sum"):
            per_sequence_attention(None, q, q, q, None, scaling=1.0, sequence_lengths=others)
