"""``logit_lens``: the statistics of every layer's policy, against plain float64 over whole logits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lenses import OF_ANY_BACKEND, OF_FINAL, OF_TARGETS, OUTPUTS, Lens, assert_agrees, random_lens
from models import FAMILIES, tiny_model, token_batch
from problems import CONTRACT, OPTIONS, chain_error, contract, device_of, examples, first_of, products
from torch import Tensor

from bupo.measurement import peak_bytes
from bupo_kernels import FusedLMHead, LensStatistics, dispatch, explain, logit_lens
from bupo_kernels.backends import compiled, lens_loop

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def first_of_the_largest(z: Tensor) -> Tensor:  # [..., V] -> [...]
    return torch.from_numpy(np.asarray(z.cpu().numpy().argmax(-1)))


# ---- values


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_asked_for_alone_needs_no_other_and_brings_no_other(output):
    lens = random_lens()
    arguments = ({"final": lens.final} if output in OF_FINAL else {}) | {"outputs": (output,)}
    targets = lens.targets if output in OF_TARGETS else None
    assert_agrees(logit_lens(lens.states, lens.weight, targets, **arguments), lens, (output,))


def test_entropy_is_what_is_given_unasked_and_the_top_alone_is_given_too():
    lens = random_lens()
    assert_agrees(logit_lens(lens.states, lens.weight), lens, ("entropy",))
    assert_agrees(logit_lens(lens.states, lens.weight, outputs=(), top_k=3), lens, (), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_outputs_together_with_every_option_and_dtype(options, dtype):
    lens = random_lens((0.2, 1.0, 1.0), vocab=41, dtype=dtype, options=options)
    assert_agrees(lens.run(top_k=5), lens, top_k=5)


@examples(30)
@given(
    scales=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 300.0]), min_size=1, max_size=4),
    leading=st.one_of(st.tuples(st.integers(0, 6)), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    vocab=st.one_of(st.integers(1, 70), st.integers(1, 5000)),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(list(OPTIONS.values())),
    budget=st.sampled_from([None, 2**20]),
    data=st.data(),
)
def test_any_shape_from_flat_to_steep_policies(scales, leading, vocab, dtype, options, budget, data):
    if "softcap" in options:  # what fp32 loses of a product of hundreds, a small softcap makes large
        scales = [min(scale, 1.0) for scale in scales]
    lens = random_lens(scales, leading, vocab, dtype=dtype, options=options, seed=data.draw(st.integers(0, 99)))
    outputs = data.draw(st.lists(st.sampled_from(OUTPUTS), unique=True))
    top_k = data.draw(st.integers(0 if outputs else 1, min(vocab, 5)))
    assert_agrees(lens.run(outputs, top_k, memory_budget=budget), lens, outputs, top_k)


def test_hidden_states_are_a_tensor_or_a_sequence_of_any_views():
    lens = random_lens(leading=(2, 5))
    wide = torch.randn(5, 2, 2 * lens.states.shape[-1])  # [S, B, 2 D]
    views = []
    for layer in lens.states:
        holder = wide.clone()
        holder[..., ::2] = layer.transpose(0, 1)
        views.append(holder[..., ::2].transpose(0, 1))
    assert not any(view.is_contiguous() for view in views)
    for given_as in (views, tuple(views), torch.stack(views).transpose(1, 2).contiguous().transpose(1, 2)):
        found = logit_lens(given_as, lens.weight, lens.targets, final=views[0], outputs=OUTPUTS, top_k=2)
        assert_agrees(found, replace(lens, final=lens.states[0]), top_k=2)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
def test_few_rows_or_none_keep_their_shape(layers, leading):
    lens = random_lens([1.0] * layers, leading)
    assert_agrees(lens.run(top_k=2), lens, top_k=2)


def test_one_word_leaves_nothing_to_know():
    lens = random_lens(vocab=1, options={"bias": True})
    found = lens.run(top_k=1)
    assert_agrees(found, lens, top_k=1)
    assert (found.max_probability == 1).all()
    for name in set(found._fields) - {"max_probability", "logsumexp"}:
        assert not getattr(found, name).any(), name


@pytest.mark.parametrize("scale", [1e-3, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_near_uniform_and_huge_logits_in_several_slices(scale, dtype):
    lens = random_lens((scale, 1.0), (12,), 5003, 16, dtype=dtype)
    lens.targets[:8] = torch.tensor([0, 1, 2047, 2048, 2049, 4095, 4096, 5002])  # where slices begin and end
    assert_agrees(lens.run(top_k=10), lens, top_k=10)
    assert_agrees(lens.run(("entropy", "rank")), lens, ("entropy", "rank"))


def test_all_ids_can_be_the_top():
    lens = random_lens(vocab=9)
    found = lens.run((), 9)
    assert_agrees(found, lens, (), 9)
    assert (found.top_ids.sort(-1).values == torch.arange(9)).all()
    largest = max(float(z.abs().max()) for z in lens.logits())
    torch.testing.assert_close(found.top_logprobs.exp().sum(-1), torch.ones(3, 7), atol=contract(largest) + chain_error(9), rtol=0)


# ---- order and ties: whole numbers, whose products are exact


@examples(25)
@given(
    rows=st.integers(1, 5),
    different=st.integers(1, 12),
    vocab=st.one_of(st.integers(1, 40), st.sampled_from([2047, 2048, 2049, 4500])),
    dtype=st.sampled_from(DTYPES),
    top_k=st.integers(1, 7),
    scale=st.sampled_from([1.0, -1.0, 0.0]),
    seed=st.integers(0, 99),
)
def test_ties_do_not_count_and_the_lowest_id_is_the_argmax(rows, different, vocab, dtype, top_k, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-2, 3, (different, 4), generator=generator)  # each of them at many ids, so in many slices
    weight = words[torch.randint(0, different, (vocab,), generator=generator)].to(dtype)
    states = torch.randint(-2, 3, (3, rows, 4), generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    top_k = min(top_k, vocab)
    found = logit_lens(states, weight, targets, outputs=("rank", "argmax"), top_k=top_k, logit_scale=scale)
    z = states.double() @ weight.double().T * scale
    assert (found.rank == (z > z.gather(-1, targets.expand(3, rows).unsqueeze(-1))).sum(-1)).all()
    assert (found.argmax == first_of_the_largest(z)).all()
    assert (z.gather(-1, found.top_ids) == z.topk(top_k, -1).values).all()
    assert (found.top_ids.sort(-1).values.diff(dim=-1) > 0).all()


def test_where_all_logits_are_equal_no_id_is_before_another():
    lens = replace(random_lens(vocab=4200), states=torch.zeros(3, 7, 8))
    found = lens.run(top_k=3)
    assert_agrees(found, lens, top_k=3)
    assert not found.rank.any()
    assert not found.argmax.any()


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_order_is_of_logits_and_not_of_products(scale):
    lens = random_lens(options={"logit_scale": scale})
    assert_agrees(lens.run(top_k=4), lens, top_k=4)


# ---- masks


def test_masked_rows_are_zero_whatever_they_hold():
    lens = random_lens(leading=(3, 4), options={"temperature": "rows", "bias": True})
    mask = torch.rand(3, 4) > 0.4
    ignored = torch.zeros(3, 4, dtype=torch.bool)
    ignored[0] = True
    mask[0, 0] = mask[1, 1] = True
    garbage = ~mask
    states, final, temperature = lens.states.clone(), lens.final.clone(), lens.options["temperature"].clone()
    states[:, garbage | ignored] = torch.nan
    final[garbage | ignored] = torch.inf
    temperature[garbage | ignored] = -1
    targets = lens.targets.masked_fill(garbage, 10**6).masked_fill(ignored, -7)
    options = {**lens.options, "temperature": temperature, "mask": mask, "ignore_index": -7}
    lens = Lens(states, lens.weight, targets, final, options)
    assert 0 < lens.counts.sum() < mask.sum()
    assert_agrees(lens.run(top_k=3), lens, top_k=3)
    assert_agrees(lens.run(OF_ANY_BACKEND, norm=lambda rows: rows), lens, OF_ANY_BACKEND)


def test_an_ignored_target_masks_its_row_also_where_no_output_looks_at_targets():
    lens = random_lens()
    lens = replace(lens, targets=lens.targets.index_fill(0, torch.tensor([2, 5]), -100))
    assert_agrees(lens.run(("entropy", "argmax", "jsd"), 2), lens, ("entropy", "argmax", "jsd"), 2)


def test_nothing_counts_gives_zeros():
    lens = replace(random_lens(), states=torch.full((3, 7, 8), torch.nan), options={"mask": torch.zeros(7, dtype=torch.bool)})
    assert_agrees(lens.run(top_k=2), lens, top_k=2)
    assert_agrees(lens.run(OF_ANY_BACKEND), lens, OF_ANY_BACKEND)


@pytest.mark.parametrize(
    ("outputs", "policies", "passes"),
    [
        (("logsumexp", "logprobs", "entropy", "max_probability"), 2, 1),
        (("argmax", "pairwise_kl"), 2, 1),
        (("entropy", "kl_to_final", "kl_from_final"), 3, 1),
        (("rank",), 2, 2),
        (OUTPUTS, 3, 2),
    ],
    ids=str,
)
def test_rows_that_count_cost_a_product_for_each_policy_and_pass_and_others_none(outputs, policies, passes):
    lens = random_lens((1.0, 1.0), (40,), 64, 16)
    lens = replace(lens, options={"mask": torch.arange(40) % 4 == 0, "backend": "torch"})
    made = products(lambda: lens.run(outputs, 0 if set(outputs) <= set(OF_ANY_BACKEND) else 3))
    assert sum(2 * m * k * n for m, k, n in made) == policies * passes * 2 * 10 * 64 * 16


# ---- the norm


@pytest.mark.parametrize("outputs", [OUTPUTS, OF_ANY_BACKEND], ids=["all", "those of any backend"])
def test_the_norm_is_applied_to_every_hidden_state_and_not_to_the_final_one(outputs):
    norm, top_k = tiny_model().model.norm, 4 * (outputs == OUTPUTS)
    lens = random_lens((0.1, 1.0, 30.0), (2, 5), 61, 32)
    given_dimensions = []

    def spied(rows: Tensor) -> Tensor:
        given_dimensions.append(rows.dim())
        return norm(rows)

    found = lens.run(outputs, top_k, norm=spied)
    assert_agrees(found, replace(lens, states=norm(lens.states).detach()), outputs, top_k)
    assert set(given_dimensions) == {2}  # [n, D]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_norm_in_another_precision_and_a_mask(dtype):
    norm = tiny_model().model.norm.to(dtype)
    lens = random_lens(leading=(9,), width=32, dtype=dtype, options={"mask": True})
    found = lens.run(norm=norm)
    assert_agrees(found, replace(lens, states=norm(lens.states).detach()))


# ---- divergences


def test_a_policy_does_not_diverge_from_itself():
    for scale in (1e-3, 1.0, 300.0):
        states = torch.randn(1, 9, 8) * scale
        weight = torch.randn(3000, 8) / 8**0.5
        found = logit_lens(states.expand(2, 9, 8), weight, final=states[0], outputs=(*OF_FINAL, "pairwise_kl"))
        bound = 2 * CONTRACT * (1 + (states @ weight.T).abs().max())
        for name in (*OF_FINAL, "pairwise_kl"):
            value = getattr(found, name)
            assert (value >= 0).all(), name
            assert (value <= bound).all(), name


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_policies_that_are_all_but_equal_do_not_diverge_by_less_than_nothing(scale):
    lens = random_lens((scale, scale), (100,), 2500)
    near = lens.states[0] * (1 + 1e-5 * torch.randn(100, 8))
    lens = replace(lens, states=torch.stack([lens.states[0], near]), final=lens.states[0] * (1 + 1e-6))
    assert_agrees(lens.run(), lens)


@given(scale=st.sampled_from([1e-3, 1.0, 30.0, 300.0]), vocab=st.integers(1, 300), seed=st.integers(0, 99))
def test_jsd_is_symmetric_and_at_most_ln_2(scale, vocab, seed):
    lens = random_lens((scale,), (5,), vocab, seed=seed)
    (jsd,) = lens.run(("jsd",)).jsd
    other = replace(lens, states=lens.final.unsqueeze(0), final=lens.states[0])
    assert_agrees(other.run(("jsd",)), other, ("jsd",))
    assert ((jsd >= 0) & (jsd <= torch.tensor(math.log(2)))).all()
    largest = max(float(z.abs().max()) for z in lens.logits())
    torch.testing.assert_close(other.run(("jsd",)).jsd[0], jsd, atol=2 * contract(largest), rtol=0)


@pytest.mark.parametrize("words", [1, 30, 1000, 3001])
def test_policies_that_share_no_word_are_ln_2_apart_and_not_more(words):
    weight = torch.cat([torch.ones(words, 1), -torch.ones(words, 1)])  # each policy is uniform over its half
    states = torch.tensor([60.0, 300.0]).view(2, 1, 1).expand(2, 6, 1)
    lens = Lens(states, weight, torch.zeros(6, dtype=torch.int64), -states[1])
    assert_agrees(lens.run(), lens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairwise_divergences_hold_those_to_the_final_policy_once_it_is_appended(dtype):
    lens = random_lens((0.1, 1.0, 10.0), (2, 4), 2500, dtype=dtype, options={"mask": True})
    appended = torch.cat([lens.states, lens.final.unsqueeze(0)])
    pairs = replace(lens, states=appended).run(("pairwise_kl",)).pairwise_kl
    bound = 4 * contract(max(float(z.abs().max()) for z in lens.logits()))
    found = lens.run(OF_FINAL)
    torch.testing.assert_close(pairs[:3, 3], found.kl_to_final, atol=bound, rtol=0)
    torch.testing.assert_close(pairs[3, :3], found.kl_from_final, atol=bound, rtol=0)
    assert (pairs.diagonal() <= bound).all()
    assert (pairs[0, 2] != pairs[2, 0])[lens.counts].all()  # from row to column, and not back


# ---- memory


@pytest.mark.parametrize("outputs", [OUTPUTS, OF_ANY_BACKEND], ids=["all", "those of any backend"])
@pytest.mark.parametrize("dtype", first_of([torch.bfloat16, torch.float32, torch.float64]), ids=str)
def test_a_small_budget_gives_the_same_values_in_more_slices(dtype, outputs):
    options, top_k = {"temperature": "rows", "bias": True, "mask": True}, 6 * (outputs == OUTPUTS)
    lens = random_lens((1e-2, 1.0, 30.0), (2, 3), 2501, 16, dtype=dtype, options=options)
    tight = {"memory_budget": 16 * 1024 * torch.promote_types(dtype, torch.float32).itemsize, "backend": "torch"}
    assert_agrees(lens.run(outputs, top_k, **tight), lens, outputs, top_k)
    made = products(lambda: lens.run(outputs, top_k, **tight))
    assert max(columns for *_, columns in made) < 2501 // 2


BUDGET = 4 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("outputs", "top_k", "layers", "rows", "vocab", "width"),
    [
        *(pytest.param((name,), 0, 6, 128, 20_000, 64, id=f"many words, {name}") for name in ("rank", "jsd", "pairwise_kl")),
        pytest.param(OUTPUTS, 4, 6, 128, 20_000, 64, id="many words, all"),
        pytest.param(("argmax", "kl_to_final"), 0, 6, 2048, 50, 256, id="many rows"),
        pytest.param(OF_ANY_BACKEND, 0, 6, 2048, 50, 256, id="many rows, any backend"),
        pytest.param(("kl_to_final",), 0, 30, 500, 200, 100, id="many layers"),
    ],
)
def test_working_memory_stays_within_the_budget(outputs, top_k, layers, rows, vocab, width, dtype):
    lens = random_lens([1.0] * layers, (rows,), vocab, width, dtype=dtype)
    kept = []
    peak = peak_bytes(lambda: kept.append(lens.run(outputs, top_k, memory_budget=BUDGET, norm=lambda rows: rows * 0.5)))
    results = sum(value.nbytes for value in kept[0] if value is not None)
    assert BUDGET + results < max(layers * rows * vocab * 4, lens.states.nbytes)  # else the test could not fail
    assert peak <= BUDGET + results


# ---- no gradient, nothing written


def test_it_has_no_gradient_and_leaves_its_inputs_alone():
    lens = random_lens(options={"bias": True, "temperature": "rows", "softcap": 3.0})
    tensors = [lens.states, lens.weight, lens.final, lens.options["bias"]]
    before = [x.clone() for x in tensors]
    for x in tensors:
        x.requires_grad_()
    norm = torch.nn.RMSNorm(8)
    for found in (lens.run(top_k=2, norm=norm), lens.run(OF_ANY_BACKEND, norm=norm)):
        assert not any(value.requires_grad for value in found if value is not None)
    for x, kept in zip(tensors, before, strict=True):
        assert torch.equal(x, kept)
        assert x.grad is None


# ---- bad input

STATES, WEIGHT, TARGETS = torch.ones(2, 3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2])
BAD = {
    "an unknown output": ("outputs", {"outputs": ("entropy", "perplexity")}),
    "logprobs without targets": ("targets", {"targets": None, "outputs": ("logprobs",)}),
    "rank without targets": ("targets", {"targets": None, "outputs": ("rank",)}),
    **{f"{name} without final": ("final", {"outputs": (name,)}) for name in OF_FINAL},
    "final of another shape": ("final", {"outputs": ("jsd",), "final": torch.ones(2, 4)}),
    "final with a layer dimension": ("final", {"outputs": ("jsd",), "final": torch.ones(2, 3, 4)}),
    "final of another width": ("final", {"outputs": ("jsd",), "final": torch.ones(3, 5)}),
    "final that is no tensor": ("final", {"outputs": ("jsd",), "final": [0.0]}),
    "targets by layer": ("targets", {"targets": torch.zeros(2, 3, dtype=torch.int64)}),
    "targets that are not int64": ("targets", {"targets": TARGETS.float()}),
    "a target out of range": ("targets", {"targets": TARGETS + 3, "outputs": ("logprobs",)}),
    "a mask by layer": ("mask", {"mask": torch.ones(2, 3, dtype=torch.bool)}),
    "a mask that is not bool": ("mask", {"mask": torch.ones(3)}),
    "a temperature by layer": ("temperature", {"temperature": torch.ones(2, 3)}),
    "a temperature of 0": ("temperature", {"temperature": 0.0}),
    "a row's temperature of 0": ("temperature", {"temperature": torch.tensor([1.0, 0.0, 1.0])}),
    "a negative softcap": ("softcap", {"softcap": -1.0}),
    "an infinite logit_scale": ("logit_scale", {"logit_scale": math.inf}),
    "a bias of another size": ("bias", {"bias": torch.ones(4)}),
    "a weight of another width": ("weight", {"weight": torch.ones(5, 3)}),
    "a weight of another dtype": ("weight", {"weight": WEIGHT.double()}),
    "hidden states of whole numbers": ("hidden_states", {"hidden_states": STATES.long()}),
    "hidden states that are none": ("hidden_states", {"hidden_states": []}),
    "no layer": ("hidden_states", {"hidden_states": STATES[:0]}),
    "hidden states without rows": ("hidden_states", {"hidden_states": STATES[0]}),
    "hidden states of different shapes": ("hidden_states", {"hidden_states": [STATES[0], STATES[1, :2]]}),
    "hidden states of different dtypes": ("hidden_states", {"hidden_states": [STATES[0], STATES[1].double()]}),
    "hidden states that are no tensors": ("hidden_states", {"hidden_states": [STATES[0], None]}),
    "a negative top_k": ("top_k", {"top_k": -1}),
    "more than all words": ("top_k", {"top_k": 6}),
    "half a word": ("top_k", {"top_k": 1.5}),
    "a norm that is none": ("norm", {"norm": 1.0}),
    "a norm that changes the shape": ("norm", {"norm": lambda rows: rows[:, :2]}),
    "an unknown backend": ("backend", {"backend": "abacus"}),
    "a budget of one byte": ("memory_budget", {"memory_budget": 1}),
    "a negative budget": ("memory_budget", {"memory_budget": -1}),
}


@pytest.mark.parametrize(("name", "change"), BAD.values(), ids=BAD)
def test_bad_input_is_named(name, change):
    arguments = {"hidden_states": STATES, "weight": WEIGHT, "targets": TARGETS} | change
    with pytest.raises((ValueError, TypeError), match=rf"^{name}(\[\d\])?: "):
        logit_lens(**arguments)


def test_an_unknown_output_is_told_the_known_ones():
    with pytest.raises(ValueError, match="perplexity") as raised:
        logit_lens(STATES, WEIGHT, outputs=("perplexity",))
    assert all(name in str(raised.value) for name in OUTPUTS)


# ---- the module


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_answers_with_its_own_weight_and_bias(bias):
    head = FusedLMHead(8, 37, bias=bias)
    lens = random_lens(leading=(2, 3), options={"temperature": 0.7})
    lens = replace(lens, weight=head.weight, options={**lens.options, **({"bias": head.bias} if bias else {})})
    found = head(lens.states, lens.targets, outputs=OUTPUTS, final=lens.final, top_k=3, temperature=0.7)
    assert isinstance(found, LensStatistics)
    assert_agrees(found, lens, top_k=3)
    assert_agrees(head(list(lens.states), outputs=("argmax",), temperature=0.7), lens, ("argmax",))


def test_without_outputs_the_head_answers_as_before():
    head, lens = FusedLMHead(8, 37), random_lens()
    assert head(lens.states).shape == (3, 7, 37)
    assert head(lens.states[0], lens.targets)._fields == ("logprobs", "entropy", "logsumexp")


# ---- backends

needs_native = pytest.mark.skipif(compiled.built is None, reason="the C++ kernels were not built")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_answers_what_native_answers_on_a_cpu(dtype, options):
    lens = random_lens((0.2, 1.0), (2, 9), 131, 24, dtype=dtype, options=options)
    assert_agrees(lens.run(backend="torch", top_k=5), lens, top_k=5)


@needs_native
def test_the_fused_statistics_are_chosen_where_they_are_enough(monkeypatch):
    lens = random_lens(leading=(9,), vocab=131, width=32, dtype=torch.bfloat16)
    backend, calls = dispatch.CPU_PANELS, []
    statistics = backend.statistics
    monkeypatch.setattr(backend, "statistics", lambda *arguments: calls.append(None) or statistics(*arguments))

    def runs_native(*arguments, **options) -> bool:
        calls.clear()
        lens.run(*arguments, **options)
        return bool(calls)

    assert runs_native(("entropy",), backend="native")
    assert not runs_native(("entropy",), backend="torch")
    assert runs_native(OF_ANY_BACKEND) == (explain(lens.states, lens.weight).backend == "native")
    assert not runs_native(OUTPUTS)
    norm = tiny_model().model.norm.to(torch.bfloat16)
    found = lens.run(OF_ANY_BACKEND, backend="native", norm=norm)
    assert_agrees(found, replace(lens, states=norm(lens.states).detach()), OF_ANY_BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_triton_answers_what_it_can(dtype, name):
    pytest.importorskip("triton")
    lens = random_lens((0.2, 1.0), (5,), 70, 16, dtype=dtype, device=device_of("triton"), options=OPTIONS[name])
    assert_agrees(lens.run(OF_ANY_BACKEND, backend="triton"), lens, OF_ANY_BACKEND)
    assert_agrees(lens.run(top_k=3, backend="triton"), lens, top_k=3)
    outputs = [name for name in OUTPUTS if name != "pairwise_kl"]  # logits are kept
    assert_agrees(lens.run(outputs, backend="triton"), lens, outputs)


def test_triton_folds_slices_and_what_a_policy_rules_out(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(lens_loop, "CPU_TILE", (16, 50))
    monkeypatch.setattr(lens_loop, "DEVICE_TILE", (16, 50))
    lens = random_lens((0.2, 30.0), (5,), 120, 16, device=device_of("triton"))
    outputs = [name for name in OUTPUTS if name != "pairwise_kl"]
    for budget in (None, 60_000):
        assert_agrees(lens.run(outputs, 3, backend="triton", memory_budget=budget), lens, outputs, 3)
    bias = torch.zeros(120, device=lens.weight.device)
    bias[40:110] = -math.inf
    few = replace(lens, weight=torch.cat([lens.weight[:40], lens.weight[110:]]), targets=lens.targets % 40)
    for asked in (OUTPUTS, outputs):
        found = replace(lens, targets=few.targets).run(asked, backend="triton", bias=bias)
        moved = torch.where(found.argmax >= 110, found.argmax - 70, found.argmax)
        assert_agrees(found._replace(argmax=moved), few, asked)


# ---- real models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_model_is_read_as_its_logits_say(family, tied):
    model, (ids, targets) = tiny_model(family, tied=tied), token_batch()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    *raw, final = out.hidden_states  # the last of them is normed
    lens = Lens(torch.stack(raw), model.lm_head.weight, targets, final)
    assert_agrees(lens.run(top_k=5), lens, top_k=5)
    normed = replace(lens, states=model.model.norm(lens.states).detach())
    found = logit_lens(raw, lens.weight, targets, norm=model.model.norm, final=final, outputs=OUTPUTS)
    assert_agrees(found, normed)
    own = logit_lens([final], lens.weight, targets, outputs=("logprobs", "argmax", "rank"))
    said = out.logits.double().log_softmax(-1)
    bound = CONTRACT * (1 + out.logits.abs().max().item())
    chosen = said.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets != -100)
    torch.testing.assert_close(own.logprobs[0].double(), chosen, atol=2 * bound, rtol=0)
    assert ((own.argmax[0] == said.argmax(-1)) | (targets == -100)).all()
