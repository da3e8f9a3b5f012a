"""Statistics of a model on its responses: against plain float64, batch by batch, resumed, written, and as heat maps."""

import itertools
import math

import numpy as np
import pytest
import torch
from analysis_models import FAMILIES, LARGEST, family_model, log_policy, points_by_hand, some_samples, values_by_hand
from models import in_float64
from problems import chain_error, contract, covering, divergence_factor, entropy_factor, policy_error

from bupo.analysis import analyze, collect, heat_maps, read_statistics, statistics, write_statistics
from bupo.analysis.blocks import UnsupportedModel
from bupo.analysis.collect import Look, batches_of, make_batch, measure
from bupo.analysis.heatmap import token_text
from bupo.analysis.statistics import Sums, estimate, first_layer, layer_table, resampled_means
from bupo.demo import character_tokenizer, small_model
from bupo.errors import ConfigError
from bupo.rollout import Sample
from bupo_kernels import FusedLMHead

DEPTH = 4
# Of the statistics of a model in float64, the least exact of which are divergences.
EXACT = policy_error(family_model().config, 12, LARGEST, dtype=torch.float64) * divergence_factor(2 * LARGEST)
EXACT_SUMS = 17 * 2 * LARGEST * EXACT  # of 17 tokens, and of squares


def sums_of(model, samples, *, partial=None, max_tokens=2048, final_norm=False, temperature=1.0):
    reading = "normed" if final_norm else "raw"
    return collect.collect(model, samples, Look((reading,), temperature=temperature), max_tokens=max_tokens, partial=partial).sums[
        reading
    ]


def same(one: Sums, other: Sums, tolerance: float = 0.0) -> bool:
    pairs = [(one.tokens, other.tokens)]
    pairs += [(one.totals[key], other.totals[key]) for key in one.totals]
    pairs += [(one.matrices[key], other.matrices[key]) for key in one.matrices]
    return one.totals.keys() == other.totals.keys() and all(np.abs(a - b).max() <= tolerance for a, b in pairs)


# ---- numbers


@pytest.mark.parametrize(
    ("family", "tied", "final_norm"), covering(list(itertools.product(FAMILIES, (False, True), (False, True))), 1, unpacked=True)
)
def test_statistics_equal_a_plain_float64_computation(family, tied, final_norm):
    model, samples = in_float64(family_model(family, tied)), some_samples()
    how = {"final_norm": final_norm, "temperature": 0.8}
    by_hand = [values_by_hand(model, sample, **how) for sample in samples]
    expected = {name: np.concatenate([values[name] for values in by_hand], -1) for name in by_hand[0]}
    found = analyze(model, samples, **how, max_tokens=24)
    assert {f"{point}.{statistic}" for point, statistic in found.curves} | {"pair.kl", "pair.cosine"} == expected.keys()
    for (point, statistic), curve in found.curves.items():
        values = expected[f"{point}.{statistic}"]
        assert curve.layers.tolist() == list(range(first_layer(point, statistic, DEPTH), DEPTH + 1)), (point, statistic)
        assert np.abs(curve.mean - values.mean(-1)).max() < EXACT, (point, statistic)
        # Of float64 sums of squares little is left where the values are nearly all the same: the root of their error.
        assert np.abs(curve.std - values.std(-1)).max() <= np.abs(values).max() * math.sqrt(EXACT), (point, statistic)
    for statistic, matrix in found.matrices.items():
        assert np.abs(matrix - expected[f"pair.{statistic}"].mean(-1)).max() < EXACT
    assert found.summary["perplexity"] == pytest.approx(np.exp(-expected["final.logprob"].mean()), rel=EXACT)
    assert (found.summary["tokens"], found.summary["responses"], found.summary["layers"]) == (17, 4, DEPTH)
    if final_norm:  # the normed residual of the last layer is the final policy
        assert found.curves["layer", "entropy"].mean[-1] == pytest.approx(found.curves["final", "entropy"].mean[0], abs=EXACT)
        assert found.curves["layer", "kl_to_final"].mean[-1] < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_same_hidden_states_statistics_are_those_of_float64(dtype):
    # Of statistics of the same hidden states, in which the model itself has no part.
    bound = contract(LARGEST) * entropy_factor(61)
    model, (sample, *_) = family_model().to(dtype), some_samples(((3, 40),))
    batch = make_batch([sample], model.device)
    FusedLMHead.adopt(model.lm_head)
    values = measure(model, batch, Look())["raw"]
    with torch.no_grad():
        points, final = points_by_hand(model, batch.input_ids)
        wide = family_model().double()
        wide.lm_head.weight.copy_(model.lm_head.weight)

        def entropy(states):
            policy = log_policy(wide, states[0, batch.column].double(), False, 1.0)
            return (-(policy.exp() * policy).sum(-1)).numpy()

        for number, block in enumerate(points):
            for point in ("attention_input", "attention", "ffn_input", "ffn"):
                assert np.abs(values[f"{point}.entropy"][number] - entropy(block[point])).max() < bound, point
            assert np.abs(values["layer.entropy"][number + 1] - entropy(block["layer"])).max() < bound
            delta = entropy(block["ffn"]) - entropy(block["ffn_input"])
            assert np.abs(values["ffn.delta_entropy"][number] - delta).max() < 2 * bound
            rms = block["layer"][0, batch.column].double().square().mean(-1).sqrt().numpy()
            assert np.abs(values["layer.rms"][number + 1] / rms - 1).max() < chain_error(32)
        assert np.abs(values["final.entropy"][0] - entropy(final)).max() < bound


def test_many_layers_are_compared_in_parts(monkeypatch):
    model, samples = in_float64(family_model()), some_samples()
    whole = sums_of(model, samples)
    monkeypatch.setattr(collect, "PAIR_ELEMENTS", 3 * (DEPTH + 2) ** 2)
    monkeypatch.setattr(collect, "COSINE_ROWS", 4)
    assert same(whole, sums_of(model, samples), EXACT_SUMS)


def test_a_response_counts_the_same_alone_and_in_a_padded_batch():
    model, samples = in_float64(family_model("gemma3_text")), some_samples()
    together = sums_of(model, samples)
    assert same(together, sums_of(model, samples, max_tokens=1), EXACT_SUMS)
    alone = [sums_of(model, [sample]) for sample in samples]
    assert together.tokens.tolist() == [5, 2, 9, 1]
    for key, totals in together.totals.items():  # in the order of the samples, whatever that of the batches
        assert np.abs(totals - np.concatenate([one.totals[key] for one in alone], 1)).max() < EXACT_SUMS


def test_batches_hold_their_tokens_with_padding_and_every_sequence_once():
    lengths = [5, 90, 7, 7, 30, 31, 2]
    batches = batches_of(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)
    assert batches == [[1], [5, 4], [2, 3, 0, 6]]


def test_what_is_not_finite_is_not_averaged():
    model = family_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UnsupportedModel, match=r"model: of type 'qwen3', whose [\w.]+ is not finite"):
        sums_of(model, some_samples())


def test_samples_without_tokens_are_refused():
    with pytest.raises(ValueError, match="samples: 1 given, accepted is at least one, each with prompt and response tokens"):
        analyze(family_model(), [Sample([3], [], None, True)])


# ---- resuming


@pytest.mark.parametrize("done", [0, 1, 3])
def test_resumed_equals_uninterrupted_exactly(tmp_path, monkeypatch, done):
    model, samples = family_model(), some_samples()
    whole, measured = sums_of(model, samples, max_tokens=6), []

    def interrupted(*arguments, **options):
        if len(measured) == done:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*arguments, **options)

    monkeypatch.setattr(collect, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sums_of(model, samples, max_tokens=6, partial=tmp_path)
    assert len(list(tmp_path.glob("batch-*.npz"))) == done
    (tmp_path / "batch-000003.npz.partial").write_bytes(b"half a file")
    again = []
    monkeypatch.setattr(collect, "measure", lambda *a, **o: again.append(1) or measure(*a, **o))
    assert same(whole, sums_of(model, samples, max_tokens=6, partial=tmp_path))
    assert len(again) == 4 - done
    assert same(whole, sums_of(model, samples, max_tokens=6, partial=tmp_path))
    assert len(again) == 4 - done


def test_another_plan_in_the_same_folder_is_refused(tmp_path):
    model, samples = family_model(), some_samples()
    sums_of(model, samples, partial=tmp_path)
    with pytest.raises(ConfigError, match="unfinished analysis with another responses, accepted is the same"):
        sums_of(model, samples[1:], partial=tmp_path)
    with pytest.raises(ConfigError, match="another readings and max_tokens"):
        sums_of(model, samples, partial=tmp_path, final_norm=True, max_tokens=7)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.001)
    with pytest.raises(ConfigError, match="another model"):
        sums_of(model, samples, partial=tmp_path)


# ---- estimates


def test_resampled_means_draw_whole_responses():
    generator = np.random.default_rng(0)
    tokens = np.array([1, 40, 5, 10])
    values = generator.standard_normal((4, 3)) * tokens[:, None]
    means = resampled_means(values, tokens, seed=5)
    assert np.array_equal(means, resampled_means(values, tokens, seed=5))
    assert not np.array_equal(means, resampled_means(values, tokens, seed=6))
    draws = generator.integers(4, size=(4000, 4))
    naive = np.stack([values[draw].sum(0) / tokens[draw].sum() for draw in draws])
    for q in (2.5, 50, 97.5):
        assert np.abs(np.percentile(means, q, 0) - np.percentile(naive, q, 0)).max() < 0.12
    assert np.abs(means.std(0) / naive.std(0) - 1).max() < 0.1


def test_intervals_cover_the_mean_and_one_response_has_none():
    model, samples = family_model(), some_samples()
    for curve in analyze(model, samples).curves.values():
        assert (curve.low <= curve.mean + 1e-12).all()
        assert (curve.high >= curve.mean - 1e-12).all()
    alone = analyze(model, samples[:1])
    assert np.isnan(alone.curves["ffn", "delta_entropy"].low).all()
    assert alone.summary["boundary"]["note"].startswith("one response")


def test_the_boundary_is_that_of_the_measured_curve():
    rows, tokens = np.random.default_rng(1), np.array([20, 30, 10, 25, 15, 40])
    deltas = np.array([1.0, 0.6, 0.4, -0.005, -1.0])
    values = tokens[:, None] * (deltas + 0.002 * rows.standard_normal((6, 5)))
    totals = {("ffn", "delta_entropy"): np.stack([values, values**2]), ("final", "logprob"): np.ones((2, 6, 1))}
    found = estimate(Sums(tokens, totals, {}), {"layers": 5})
    boundary = found.summary["boundary"]
    assert boundary["layer"] == 3
    assert boundary["confidence"] > 0.99
    assert boundary["delta_entropy"] == pytest.approx(found.curves["ffn", "delta_entropy"].mean[2])
    assert [part["name"] for part in boundary["segments"]] == ["exploration", "integration", "convergence"]


def test_written_statistics_come_back(tmp_path):
    found = analyze(family_model(), some_samples())
    write_statistics(found, tmp_path)
    back = read_statistics(tmp_path)
    assert back.summary == found.summary
    assert back.curves.keys() == found.curves.keys()
    for key, curve in found.curves.items():
        assert all(np.array_equal(a, b) for a, b in zip(curve, back.curves[key], strict=True))
    assert all(np.array_equal(back.matrices[key], matrix) for key, matrix in found.matrices.items())
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"has no summary.json, accepted is what `bupo analyze --out` wrote"):
        read_statistics(tmp_path)


def test_the_table_of_one_response_is_written_without_intervals(tmp_path):
    found = analyze(family_model(), some_samples()[:1])
    write_statistics(found, tmp_path)
    assert np.isnan(read_statistics(tmp_path).curves["ffn", "delta_entropy"].low).all()
    assert layer_table(found).row_count == DEPTH + 2


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install bupo-kernels\[train\]"):
        statistics.require_pyarrow()


# ---- heat maps


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("final_norm", [False, True], ids=["raw", "normed"])
def test_a_heat_map_shows_what_each_layer_says(family, final_norm):
    tokenizer = character_tokenizer("".join(map(chr, range(ord("A"), ord("A") + 59))))
    model, sample = in_float64(family_model(family)), some_samples(((3, 9),))[0]
    short, whole = (
        heat_maps(model, tokenizer, [sample], positions=5, top_k=7, final_norm=final_norm),
        values_by_hand(model, sample, final_norm),
    )
    (drawn,) = short
    assert drawn.title == "response 1, the first 5 of 9 tokens"
    assert drawn.layers == ["0", "1", "2", "3", "4", "π"]
    text = [tokenizer.decode([token]) for token in [*sample.prompt_ids, *sample.response_ids]]
    assert drawn.prompt == "".join(text[:3])
    assert (drawn.context, drawn.targets) == (text[2:7], text[3:8])
    for name, values in (("entropy", "entropy"), ("logprobs", "logprob"), ("kl", "kl_to_final")):
        expected = np.concatenate([whole[f"layer.{values}"], whole[f"final.{values}"]])[:, :5]
        assert np.abs(getattr(drawn, name) - expected).max() < EXACT
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    with torch.no_grad():
        own = model(ids).logits[0, 2:7].log_softmax(-1)
    assert np.abs(drawn.top_logprobs[-1] - own.topk(7).values.numpy()).max() < EXACT
    assert drawn.top_tokens[-1] == [[tokenizer.decode([i]) for i in row] for row in own.topk(7).indices.tolist()]
    targets = ids[0, 3:8, None]
    assert drawn.rank[-1].tolist() == (own > own.gather(1, targets)).sum(-1).tolist()
    assert drawn.rank.dtype.kind == "i"


def test_a_whole_response_is_titled_so_and_more_tokens_than_there_are_are_not_asked_for():
    tokenizer, model = character_tokenizer("0123456789+="), small_model(character_tokenizer("0123456789+="), 0)
    drawn = heat_maps(model, tokenizer, [Sample([2, 3], [4, 5], None, True)] * 2, top_k=100)
    assert [one.title for one in drawn] == ["response 1", "response 2"]
    assert drawn[0].top_logprobs.shape == (6, 2, 14)


def test_the_space_before_a_word_is_kept():
    class SentencePiece:
        def decode(self, ids):
            return "word"

        def convert_ids_to_tokens(self, token):
            return "▁word" if token == 1 else "word"

    assert (token_text(SentencePiece(), 1), token_text(SentencePiece(), 2)) == (" word", "word")
