"""`bupo analyze`: the responses it reads, what it writes, how it goes on, and what it refuses before the weights are read."""

import itertools
import json
import os
import re
from html import unescape

import numpy as np
import pytest
import torch
from problems import entropy_factor, policy_error
from test_data import BOS, END, EOS, START, characters
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bupo import cli
from bupo.analysis import collect, read_statistics
from bupo.analysis.collect import Look, make_batch, measure
from bupo.analysis.command import load_responses
from bupo.analysis.defaults import device_defaults
from bupo.analysis.forecast import analysis_flops, forecast
from bupo.analysis.translators import Translators, _each_layer
from bupo.analysis.views import read_texts
from bupo.config import Data
from bupo.data import load_examples
from bupo.demo import character_tokenizer, small_model
from bupo.errors import ConfigError
from bupo.output import progress
from bupo.rollout import Generate, Sample
from bupo_kernels import FusedLMHead


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that says something, and ten problems."""
    folder = tmp_path_factory.mktemp("analysis")
    tokenizer = character_tokenizer("0123456789+=")
    model = small_model(tokenizer, 0)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+{b}="} for a, b in ((1, 2), (3, 4), (5, 6), (7, 8), (9, 9), (0, 1))]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def responses_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_responses_are_read_as_an_evaluation_wrote_them(tmp_path):
    tokenizer = character_tokenizer("0123456789+=")
    rows = [
        {"prompt": "1+2=", "response": "3", "finished": True, "greedy": True},
        {"prompt": "1+2=", "response": "3", "finished": True, "greedy": False},
        {"prompt": "1+2=", "response": "34", "finished": False},
        {"prompt": "1+2=", "response": "", "finished": True},
    ]
    samples, greedy = load_responses(str(responses_file(tmp_path / "r.jsonl", rows)), tokenizer, "--responses")
    three, four = tokenizer("34").input_ids
    end = tokenizer.eos_token_id
    assert greedy == 1
    assert [list(sample.response_ids) for sample in samples] == [[three, end], [three, four], [end]]
    assert all(tokenizer.decode(sample.prompt_ids) == "1+2=" for sample in samples)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1"}], "line 1 has no 'response', accepted is text; its columns are prompt"),
        ([{"prompt": "1", "response": "2"}, {"prompt": "", "response": "2"}], "line 2: 'prompt' is '', accepted is text that is"),
        ([{"prompt": "1", "response": 2}], "line 1: 'response' is 2, accepted is text"),
        ([{"prompt": "1", "response": ""}], "line 1: its response has no tokens"),
        ([{"prompt": "1", "response": "2", "greedy": True}], "has 1 lines, 1 of them greedy"),
    ],
)
def test_bad_responses_are_named(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        load_responses(str(responses_file(tmp_path / "r.jsonl", rows)), character_tokenizer("0123456789+="), "--responses")


def test_prompts_are_read_with_the_beginning_that_training_gives_them(tmp_path):
    tokenizer = characters("<bos>", "<eos>")
    prompts = ["ab", "<bos>ab"]
    rows = [{"prompt": prompt, "response": "<bos><bos>c", "finished": True, "answer": "c"} for prompt in prompts]
    path = str(responses_file(tmp_path / "r.jsonl", rows))
    trained = [list(example.prompt_ids) for example in load_examples(path, Data(train=path), tokenizer, "data.train")]
    samples, _ = load_responses(path, tokenizer, "--responses")
    assert [list(sample.prompt_ids) for sample in samples] == trained
    c = tokenizer("c", add_special_tokens=False).input_ids
    assert [list(sample.response_ids) for sample in samples] == [[BOS, BOS, *c, EOS]] * 2


def test_ids_that_stand_beside_a_text_are_what_is_read_if_they_are_this_tokenizers(tmp_path, caplog):
    tokenizer = characters("<bos>")
    a, c = tokenizer("ac", add_special_tokens=False).input_ids
    texts = {"prompt": "a", "response": "c", "finished": True}
    rows = [
        texts | {"prompt_ids": [a], "response_ids": [START, c, END]},  # no beginning, another end, and a token the text lacks
        texts | {"prompt_ids": [BOS, a], "response_ids": [c + 1, c, EOS]},
        texts | {"prompt_ids": [BOS, a], "response_ids": [10**6]},
        texts,
    ]
    path = responses_file(tmp_path / "r.jsonl", rows)
    samples, _ = load_responses(str(path), tokenizer, "--responses")
    found = [(list(sample.prompt_ids), list(sample.response_ids)) for sample in samples]
    assert found == [([a], [START, c, END])] + [([BOS, a], [c, EOS])] * 3
    (record,) = caplog.records
    assert record.getMessage().endswith(f"in 2 of 4 rows of {path} the ids are not this tokenizer's, and the text is read")
    responses_file(path, [texts | {"prompt_ids": [a], "response_ids": ["c"]}])
    with pytest.raises(ConfigError, match=r"line 1: 'response_ids' is \['c'\], accepted is a list of token ids"):
        load_responses(str(path), tokenizer, "--responses")


def test_a_response_with_a_token_beyond_the_embedding_is_named(tmp_path):
    tokenizer, path = character_tokenizer("0123456789+="), responses_file(tmp_path / "r.jsonl", [{"prompt": "1", "response": "="}])
    (equals,) = tokenizer("=").input_ids
    with pytest.raises(ConfigError, match=rf"^--responses: .* line 1 has the token '=' \({equals}\), accepted are those below"):
        load_responses(str(path), tokenizer, "--responses", equals)


SMALL = ("rollout.max_new_tokens=4", "rollout.engine=generate", "data.max_prompt_tokens=8", "hardware.precision=float32")


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr("bupo.analysis.report.statistics_figures", lambda statistics: {})


def run(checkpoint, out, *words, what=None):
    what = what or ("--data", str(checkpoint / "problems.jsonl"))
    words = words if "--set" in words else (*words, "--set", *SMALL)
    return cli.main(["analyze", str(checkpoint / "model"), *map(str, what), "--out", str(out), *words])


def test_the_command_writes_all_and_reads_its_own_responses(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(checkpoint, out, "--prompts", "5", "--samples", "2", "--suggest", "--examples", "1") == 0
    printed = capsys.readouterr().out
    assert "ΔH FFN" in printed
    assert "boundary layer" in printed
    assert "bupo:\n  layer:" in printed or "# No layer is suggested" in printed
    assert {"statistics.parquet", "summary.json", "report.html", "responses.jsonl"} <= set(os.listdir(out))
    assert not (out / "partial").exists()
    assert not list(out.glob("*.partial"))
    found = read_statistics(out)
    assert (found.summary["responses"], found.summary["layers"], found.summary["model_type"]) == (10, 4, "qwen3")
    assert "response 1" in unescape((out / "report.html").read_text())
    assert run(checkpoint, out, "--prompts", "5") == 2  # not empty
    assert "--out:" in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
def test_the_commands_own_responses_can_be_given_back(checkpoint, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    assert run(checkpoint, out, "--prompts", "5", "--samples", "2") == 0
    found = read_statistics(out)
    assert run(checkpoint, again, what=("--responses", out / "responses.jsonl")) == 0
    other = read_statistics(again)
    assert other.summary["tokens"] == found.summary["tokens"]
    bound = (
        2 * policy_error(small_model(character_tokenizer("0123456789+="), 0).config, 20, 10.0) * entropy_factor(14)
    )  # no logit reaches 10
    entropy, before = (x.curves["layer", "entropy"] for x in (other, found))
    assert all(np.allclose(a, b, rtol=0, atol=bound) for a, b in zip(entropy, before, strict=True))


@pytest.mark.usefixtures("without_pictures")
def test_an_interrupted_command_goes_on_with_the_responses_it_has(checkpoint, tmp_path, monkeypatch, capsys):
    whole, out, measured = tmp_path / "whole", tmp_path / "out", []
    assert run(checkpoint, whole, "--max-tokens", "16") == 0

    def interrupted(*arguments, **options):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "measure", interrupted)
        assert run(checkpoint, out, "--max-tokens", "16") == 130
    capsys.readouterr()
    assert run(checkpoint, out, "--max-tokens", "17") == 2
    assert "unfinished analysis with another max_tokens" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("bupo.analysis.command.configured_rollout", None)  # nothing is sampled again
        assert run(checkpoint, out, "--max-tokens", "16") == 0
    one, other = read_statistics(whole), read_statistics(out)
    assert one.summary == other.summary
    assert all(np.array_equal(a, b) for key in one.curves for a, b in zip(one.curves[key], other.curves[key], strict=True))


@pytest.mark.usefixtures("without_pictures")
def test_responses_that_were_finished_before_an_interruption_are_not_sampled_again(checkpoint, tmp_path, monkeypatch):
    generate, asked = Generate.generate, []

    def counted(self, prompts, n, step):
        if len(asked) == 1:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(step)
        return generate(self, prompts, n, step)

    monkeypatch.setattr(Generate, "generate", counted)
    whole, out, parts = tmp_path / "whole", tmp_path / "out", ("--set", *SMALL, "rollout.sequences=2")
    assert run(checkpoint, out, *parts) == 130
    assert run(checkpoint, out, *parts) == 0
    assert asked == [0, None, 1, 2]
    assert run(checkpoint, whole, *parts) == 0
    assert (out / "responses.jsonl").read_text() == (whole / "responses.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompts", "0"), "--prompts: 0 given, accepted are 1 and more"),
        (("--examples", "-1"), "--examples: -1 given, accepted are 0 and more"),
        (("--max-tokens", "0"), "--max-tokens: 0 given, accepted are 1 and more"),
        (("--samples", "0"), "rollout.samples: 0 given"),
        (
            ("--set", "rollout.max_new_tokens=100", "data.max_prompt_tokens=8"),
            "prompt and response of 104 tokens, accepted are at most 64",
        ),
        (("--set", "hardware.device=cuda:77"), "hardware.device"),
        (("--data", "missing.jsonl"), "--data: missing.jsonl does not exist"),
        (("--responses", "missing.jsonl"), "--responses: missing.jsonl is not a file"),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(checkpoint, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr("bupo.analysis.command._load_for_reading", None)
    given = () if words[0] in ("--data", "--responses") else ("--data", str(checkpoint / "problems.jsonl"))
    assert cli.main(["analyze", str(checkpoint / "model"), "--out", str(tmp_path / "out"), *given, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_looked_into_is_named_before_its_weights_are_read(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bupo.analysis.command._load_for_reading", None)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / "model" / name).read_bytes())
    config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 14}))
    words = ("--data", str(checkpoint / "problems.jsonl"), "--out", str(tmp_path / "out"))
    assert cli.main(["analyze", str(folder), *words]) == 2
    assert "of type 'gpt_neox', accepted are causal language models with `layers`" in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
def test_a_text_is_read_as_it_stands_raw_and_normed_and_words_are_followed(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bupo.analysis.command.configured_rollout", None)  # nothing is generated
    words = ("--track", "3", "--set", *SMALL)
    assert run(checkpoint, tmp_path / "out", *words, what=("--prompt", "1+2=", "--prompt", "12")) == 0
    printed = capsys.readouterr().out
    assert "text 1: 1+2=" in printed
    assert "rank of '3'" in printed
    model, tokenizer = (part.from_pretrained(checkpoint / "model") for part in (AutoModelForCausalLM, PreTrainedTokenizerFast))
    ids = tokenizer("1+2=", return_tensors="pt").input_ids
    with torch.no_grad():
        own = model(ids).logits[0].log_softmax(-1)
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "out" / "report.html").read_text(), re.DOTALL)[1])
    first, second = data["responses"]
    assert [view["name"] for view in first["views"]] == ["raw", "normed"]
    assert [data["tokens"][i] for i in first["context"]] == list("1+2=")
    assert [data["tokens"][i] for i in first["targets"]] == [*"+2=", tokenizer.decode([own[-1].argmax()])]
    assert len(second["targets"]) == 2
    three = tokenizer("3").input_ids[0]
    for view in first["views"]:
        assert view["trackedRank"][0][-1] == (own > own[:, three, None]).sum(-1).tolist()
        np.testing.assert_allclose(view["logprob"][-1][:3], own[range(3), ids[0, 1:]], rtol=1e-3)
    raw, normed = (read_statistics(tmp_path / "out" / name) for name in ("raw", "normed"))
    assert (raw.summary["tokens"], raw.summary["final_norm"], normed.summary["final_norm"]) == (6, False, True)
    assert ("ffn", "entropy") not in raw.curves
    assert normed.curves["layer", "kl_to_final"].mean[-1] == pytest.approx(0, abs=1e-5)


def test_a_word_that_is_no_token_is_refused_with_the_tokens_it_makes(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bupo.analysis.command._load_for_reading", None)
    for words, message in (
        (("--track", "12"), "--track: '12' given, accepted is a word that is one token of this tokenizer; ' 12' makes"),
        (("--track", "x"), "--track: 'x' given"),
        (("--track", "1", "--points", "ffn"), "--track: given, accepted with --examples of 1 and more and with layer"),
    ):
        assert run(checkpoint, tmp_path / "out", *words, "--set", *SMALL, what=("--prompt", "1+2=")) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_pictures")
def test_two_models_are_compared_on_the_same_tokens(checkpoint, tmp_path, capsys):
    other = AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(3)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((checkpoint / "model" / name).read_bytes())
    out = tmp_path / "out"
    assert run(checkpoint, out, "--against", str(tmp_path / "other"), "--prompts", "3", "--set", *SMALL) == 0
    first, second, difference = (read_statistics(out / name) for name in ("model raw", "other raw", "difference, raw"))
    for key, curve in difference.curves.items():
        np.testing.assert_allclose(curve.mean, second.curves[key].mean - first.curves[key].mean, atol=1e-12)
    unchanged, changed = (difference.curves["layer", "entropy"].mean[part] for part in (slice(0, 3), slice(3, 5)))
    assert (unchanged == 0).all()
    assert (changed != 0).all()
    assert difference.curves["layer", "entropy"].low[1] == difference.curves["layer", "entropy"].high[1] == 0  # paired
    capsys.readouterr()
    small = small_model(character_tokenizer("0123456789+="), 0).config
    small.num_hidden_layers = 2
    small.layer_types = small.layer_types[:2]
    small.save_pretrained(tmp_path / "other")
    assert run(checkpoint, tmp_path / "new", "--against", str(tmp_path / "other")) == 2
    assert "has 2 layers, accepted are models with 4" in capsys.readouterr().err


@pytest.mark.usefixtures("without_pictures")
def test_points_choose_what_is_read(checkpoint, tmp_path):
    assert run(checkpoint, tmp_path / "out", "--prompts", "2", "--points", "attention", "--set", *SMALL) == 0
    found = read_statistics(tmp_path / "out")
    assert {point for point, _ in found.curves} == {"attention_input", "attention", "final"}
    assert found.matrices == {}
    assert found.summary["boundary"]["note"] == "the FFNs were not read"


def test_a_report_is_shown_in_a_notebook_and_becomes_a_table(checkpoint):
    model, tokenizer = (part.from_pretrained(checkpoint / "model") for part in (AutoModelForCausalLM, PreTrainedTokenizerFast))
    report = read_texts(model, tokenizer, ["1+2=3"], track=["3"])
    shown = unescape(re.search(r'srcdoc="([^"]*)"', report._repr_html_())[1])
    assert shown == report.html()
    table = report.to_dataframe()
    entropy = table[(table.view == "normed") & (table.point == "layer") & (table.statistic == "entropy")]
    np.testing.assert_array_equal(entropy["mean"], report.statistics["normed"].curves["layer", "entropy"].mean)
    cells = report.heatmaps[0].to_dataframe()
    assert len(cells) == 6 * 5
    last = cells[(cells.layer == "π") & (cells.position == 4)].iloc[0]
    assert (last.context, last.target, last["rank"]) == ("=", "3", report.heatmaps[0].rank[-1, 3])
    assert last["rank of '3'"] == last["rank"]
    with pytest.raises(ConfigError, match="texts: text 1 is '', accepted is text of at least one token"):
        read_texts(model, tokenizer, [""])


def test_a_cpu_reads_less_and_in_bfloat16_where_that_is_faster(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("bupo.analysis.defaults.isas", lambda: ("avx2", "portable"))
    assert device_defaults({}) == (16, 64, 512, "float32", 40, "")
    monkeypatch.setattr("bupo.analysis.defaults.isas", lambda: ("amx", "avx2"))
    assert device_defaults({}).precision == "bfloat16"
    assert "this CPU (amx)" in device_defaults({}).note
    assert device_defaults({"hardware": {"precision": "float32"}}).note == ""
    assert device_defaults({"hardware": {"device": "cuda:1"}}) == (64, 256, 2048, "float32", 250, "")


def test_how_long_it_will_take_is_said_and_counts_all_products(checkpoint, monkeypatch):
    model = small_model(character_tokenizer("0123456789+="), 0)
    look, blocks = Look(), sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert look.rows(4) == 4 * 4 + 6  # four points of every block, H^0 to H^4 and the final policy
    assert analysis_flops(model, look, 10, 7) == 2 * 10 * blocks + 2 * 7 * 22 * 14 * 160
    assert forecast(model, look, 10, 7) is None  # sooner done than said
    clock = itertools.count(0, 0.5)
    monkeypatch.setattr("bupo.analysis.forecast.time.perf_counter", lambda: next(clock))
    coming = forecast(model, look, 20_000_000, 10_000_000)
    assert coming.rate == 2 * 64 * 14 * 160 / 0.5
    assert "10,000,000 positions × 22 policies" in str(coming)
    assert "fewer with --prompts" in str(coming)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    clock = itertools.count(0, 20.0)
    monkeypatch.setattr("bupo.output.time.monotonic", lambda: next(clock))
    with progress("analysis, tokens", 2000) as advance:
        for _ in range(4):
            advance(500)
    assert capsys.readouterr().err == "analysis, tokens: 1,000 of 2,000, 40 seconds left\n"


@pytest.mark.usefixtures("without_pictures")
def test_translators_are_fitted_kept_and_used(checkpoint, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "translators.safetensors"
    words = ("--prompts", "6", "--samples", "4", "--fit-translators", str(file), "--fit-steps", "60", "--set", *SMALL)
    assert run(checkpoint, out, *words) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"│ +([0-3]) │ +([\d.]+) │ +([\d.]+) │", printed)
    assert [row[0] for row in rows] == ["3", "2", "1", "0"]
    assert sum(float(after) for *_, after in rows) < 0.8 * sum(float(before) for _, before, _ in rows)
    tuned, normed = (read_statistics(out / name).curves["layer", "kl_from_final"].mean for name in ("tuned", "normed"))
    assert tuned[:-1].sum() < 0.8 * normed[:-1].sum()
    assert tuned[-1] == normed[-1]  # the last layer needs none
    assert [read_statistics(out / name).summary.get("translators") for name in ("tuned", "normed")] == [True, None]
    again = tmp_path / "again"
    assert run(checkpoint, again, "--translators", str(file), "--set", *SMALL, what=("--responses", out / "responses.jsonl")) == 0
    np.testing.assert_array_equal(read_statistics(again / "tuned").curves["layer", "kl_from_final"].mean, tuned)
    for words, message in (
        (("--fit-translators", str(file)), "is there already, accepted is a new file"),
        (("--translators", str(tmp_path / "none")), "is not a file, accepted is what --fit-translators wrote"),
        (("--translators", str(file), "--points", "ffn"), "accepted with --points layer"),
        (("--fit-steps", "3"), "--fit-steps: 3 given, accepted are 1 and more, with --fit-translators"),
        (("--translators", str(checkpoint / "model" / "model.safetensors")), "cannot be used"),
    ):
        assert run(checkpoint, tmp_path / "new", *words, "--set", *SMALL) == 2
        assert message in capsys.readouterr().err


def test_a_translator_has_the_gradient_of_float64_logits(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    batch = make_batch([Sample([2, 3], [4, 5, 6], None, True)], model.device)
    translators = Translators(4, 160, model.device)
    FusedLMHead.adopt(model.lm_head)
    (_, divergence), *_ = itertools.islice(_each_layer(model.requires_grad_(False), translators, batch), 2, 3)
    divergence.backward()
    wide = AutoModelForCausalLM.from_pretrained(checkpoint / "model").double()
    states = wide.model(batch.input_ids, output_hidden_states=True).hidden_states
    weight = torch.zeros(160, 160, dtype=torch.float64, requires_grad=True)
    read = states[2][0, 1:].detach()
    student = wide.lm_head(wide.model.norm(read + read @ weight.T)).log_softmax(-1)
    teacher = wide.lm_head(states[-1][0, 1:]).log_softmax(-1).detach()
    (teacher.exp() * (teacher - student)).sum(-1).mean().backward()
    error = (translators.weight[2].grad.double() - weight.grad).abs().max() / weight.grad.abs().max()
    assert error < 8 * policy_error(model.config, 20, 10.0)
    assert [parameter.grad is None for parameter in translators.weight] == [True, True, False, True]
