"""Data: reading, columns, templates, tokens, limits, and the order of prompts."""

import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bupo.config import Data
from bupo.data import Example, PromptOrder, _name, load_examples, stream_seed
from bupo.errors import ConfigError
from bupo.rewards import Columns

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
PAD, BOS, EOS, START, END = range(5)
CHAT = [{"role": "system", "content": "Reason."}, {"role": "user", "content": "1+1=?"}]


def characters(
    before: str = "", after: str = "", chat_template: str | None = CHATML, special: list[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    """A token per character; with special tokens around a text that asks for them."""
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([before, "$A", after]).strip(), special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = chat_template
    return fast


TOKENIZER = characters()


def load(where, tokenizer=TOKENIZER, **data) -> list[Example]:
    return load_examples(str(where), Data(train=str(where), **data), tokenizer, "data.train")


def jsonl(path, *rows: object):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path, *rows: dict):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def bupo_row(**changes) -> dict:
    """A row of the layout that BuPO's own files have."""
    row = {
        "data_source": "qwen_math500",
        "prompt": CHAT,
        "ability": "MATH",
        "reward_model": {"ground_truth": "\\frac{1}{2}", "style": "rule"},
        "extra_info": {"index": 3, "split": None},
    }
    return {**row, **changes}


# ---- reading


def test_jsonl_is_read_and_other_columns_ignored(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('\ufeff{"prompt": "1+1=", "answer": "2", "level": 3}\r\n\n{"prompt": "1+2=", "answer": "3"}', encoding="utf-8")
    first, second = load(path)
    assert first == Example("1+1=", tuple(TOKENIZER("1+1=").input_ids), "2", "sums")
    assert (second.prompt, second.answer, second.source) == ("1+2=", "3", "sums")


def test_the_layout_of_bupo_is_read_as_it_is(tmp_path):
    path = parquet(tmp_path / "x.parquet", bupo_row(), bupo_row(data_source="qwen_aime_2024"))
    first, second = load(path)
    assert first.prompt == "<|im_start|>system\nReason.<|im_end|>\n<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    assert (first.answer, first.source, second.source) == ("\\frac{1}{2}", "qwen_math500", "qwen_aime_2024")
    assert first.prompt_ids[0] == START


def test_a_folder_saved_by_datasets_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([bupo_row(data_source=None), bupo_row(data_source=None)])
    table.save_to_disk(tmp_path / "saved")
    assert [example.source for example in load(tmp_path / "saved")] == ["saved", "saved"]
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"data.train: .*both holds the splits train, test, accepted is the folder of one"):
        load(tmp_path / "both")
    assert len(load(tmp_path / "both" / "test")) == 2
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path)
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"row 1 has no 'prompt', .*its columns are text"):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    ("where", "call", "source"),
    [
        ("gsm8k:train", ("gsm8k", None, "train"), "gsm8k"),
        ("openai/gsm8k:train[:10]", ("openai/gsm8k", None, "train[:10]"), "gsm8k"),
        ("openai/gsm8k/main:test", ("openai/gsm8k", "main", "test"), "gsm8k"),
    ],
)
def test_other_names_are_datasets_on_the_hub(monkeypatch, where, call, source):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        rows = [{"prompt": "a", "answer": "b"}]
        table = SimpleNamespace(to_list=lambda: rows, features=SimpleNamespace(arrow_schema=()))
        return SimpleNamespace(
            column_names=["prompt", "answer", "huge"], select_columns=lambda names: (calls.append(names), table)[1]
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (example,) = load(where)
    assert calls == [call, ["prompt", "answer"]]
    assert example.source == source


@pytest.mark.parametrize("where", ["gsm8k", "openai/gsm8k", "openai/gsm8k:", "a/b/c/d:train", "/a:train", ":train"])
def test_a_dataset_on_the_hub_needs_its_split(where):
    with pytest.raises(
        ConfigError, match=r"data.train: .* is no file, no folder and no dataset .*, accepted is .* owner/name:split"
    ):
        load(where)


def test_a_dataset_that_does_not_load_is_named_in_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError, match=r"data.train: a/b:train cannot be loaded \(ConnectionError: no route\), accepted is"):
        load("a/b:train")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"")
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    for where, package in [("a/b:train", "datasets"), (tmp_path, "datasets"), (tmp_path / "x.parquet", "pyarrow")]:
        with pytest.raises(ConfigError, match=f"data.train: .* needs the package {package}, "):
            load(where)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", None, "does not exist, accepted is a .jsonl or .parquet file"),
        ("x.parquet", None, "does not exist"),
        ("x.json", None, "does not exist"),
        ("x.json", b"{}", "is a file of another kind, accepted is a .jsonl or .parquet file"),
        ("x.csv", b"a,b", "is a file of another kind"),
        ("x.jsonl", b'{"prompt": "\xff"}', "is not UTF-8"),
        ("x.jsonl", b"\n \n", "is empty, accepted is at least one example"),
        ("x.parquet", b"no", "is not a parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    if content == b"no":
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^data.train: .*{name} {message}"):
        load(tmp_path / name)


def test_an_empty_table_is_an_error(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="is empty, accepted is at least one example"):
        load(tmp_path / "x.parquet")


@given(
    st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)).filter(lambda row: all(map(str.strip, row))), min_size=1),
    st.booleans(),
)
def test_any_text_survives_jsonl(tmp_path_factory, rows, ascii_only):
    """Line separators of Unicode, which are not JSON's, stand inside a row."""
    rows = [*rows, ("a\u2028b\u0085c\r\vd", "e\u2029f\x1c")]
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    text = "".join(json.dumps({"prompt": p, "answer": a}, ensure_ascii=ascii_only) + "\n" for p, a in rows)
    path.write_bytes(text.encode())
    assert [(example.prompt, example.answer) for example in load(path, max_prompt_tokens=10**6)] == rows


# ---- columns and rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["a", "b"]', r'line 2 is \["a", "b"\], accepted is an object'),
        (
            '{"prompt": "a", "level": 3}',
            "line 2 has no 'answer' or 'reward_model.ground_truth', accepted is .*its columns are prompt, level",
        ),
        ('{"answer": "b"}', "line 2 has no 'prompt', accepted is text .*; its columns are answer"),
        ('{"prompt": "", "answer": "b"}', "line 2: 'prompt' is '', accepted is text"),
        ('{"prompt": " \\n", "answer": "b"}', "line 2: 'prompt' is "),
        ('{"prompt": 3, "answer": "b"}', "line 2: 'prompt' is 3, accepted is text"),
        ('{"prompt": "\\ud800", "answer": "b"}', "line 2: 'prompt' is "),
        ('{"prompt": [], "answer": "b"}', r"line 2: 'prompt' is \[\], accepted is text .* or a chat"),
        ('{"prompt": ["a"], "answer": "b"}', r"line 2: 'prompt' is .* \(message 1 is 'a'\)$"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}', r"line 2: 'prompt' is .* \(message 1 has no content\)$"),
        ('{"prompt": [{"role": "user", "content": ""}], "answer": "b"}', r"\(message 1 has '' as content\)$"),
        ('{"prompt": [{"role": null, "content": "a"}], "answer": "b"}', r"\(message 1 has None as role\)$"),
        (
            '{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": ["x"]}], "answer": "b"}',
            r"\(message 2 has \['x'\] as content\)$",
        ),
        (
            '{"prompt": [{"role": "user", "content": "x", "tool_calls": [1]}], "answer": "b"}',
            r"\(message 1 has 'tool_calls', which templates would not see\)$",
        ),
        (
            '{"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], "answer": "b"}',
            r"line 2: .*whose last message is not the assistant's \(message 2 is\)$",
        ),
        ('{"prompt": "a", "answer": ""}', "line 2: 'answer' is '', accepted is text that is not empty, or a number"),
        ('{"prompt": "a", "answer": null}', "line 2: 'answer' is None"),
        ('{"prompt": "a", "answer": true}', "line 2: 'answer' is True"),
        ('{"prompt": "a", "answer": NaN}', "line 2: 'answer' is nan"),
        ('{"prompt": "a", "answer": ["b"]}', r"line 2: 'answer' is \['b'\]"),
        ('{"prompt": "a", "reward_model": {"ground_truth": ""}}', "line 2: 'reward_model.ground_truth' is ''"),
        ('{"prompt": "a", "reward_model": null}', "line 2 has no 'answer' or 'reward_model.ground_truth'"),
        ('{"prompt": "a", "answer": "b", "data_source": 7}', "line 2: 'data_source' is 7, accepted is text"),
    ],
)
def test_a_bad_row_is_named_by_key_file_and_line(tmp_path, row, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + row + "\n")
    with pytest.raises(ConfigError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"data.train: {path} line 2")
    assert "\n" not in str(error.value)


def test_rows_of_tables_are_counted_from_one(tmp_path):
    path = parquet(tmp_path / "x.parquet", bupo_row(), bupo_row(reward_model={"ground_truth": None, "style": "rule"}))
    with pytest.raises(ConfigError, match=r"x.parquet row 2: 'reward_model.ground_truth' is None, accepted is"):
        load(path)


def test_an_unknown_column_is_answered_with_all_there_are(tmp_path):
    path = parquet(tmp_path / "x.parquet", bupo_row())
    everything = "its columns are data_source, prompt, ability, reward_model, extra_info"
    for columns in ({"prompt": "question"}, {"answer": "reward_model.truth"}, {"source": "level"}):
        with pytest.raises(ConfigError, match=f"row 1 has no '{next(iter(columns.values()))}', accepted is .*{everything}"):
            load(path, **columns)


def test_columns_are_named_and_dots_reach_into_structs(tmp_path):
    row = {"q": {"en": {"text": "a"}}, "a.b": "literal", "a": {"b": "struct"}, "meta": {"level": "hard"}, "answer": "other"}
    path = jsonl(tmp_path / "x.jsonl", row)
    columns = {"prompt": "q.en.text", "answer": "a.b", "source": "meta.level"}
    assert load(path, **columns)[0] == Example("a", tuple(TOKENIZER("a").input_ids), "literal", "hard")
    assert load(parquet(tmp_path / "x.parquet", row), **columns) == load(path, **columns)


def test_what_a_reward_asks_for_comes_with_the_example(tmp_path):
    row = bupo_row(level=3, bytes=None)
    paths = [jsonl(tmp_path / "x.jsonl", row), parquet(tmp_path / "x.parquet", row)]

    def told(path, columns):
        where = str(path)
        (example,) = load_examples(where, Data(train=where), TOKENIZER, "data.train", columns=columns)
        return example.row

    for path in paths:
        assert told(path, None) == {}
        assert told(path, Columns([], ["extra_info", "absent"])) == {"prompt": CHAT, "extra_info": row["extra_info"]}
        assert told(path, Columns(["level"], [])) == {"prompt": CHAT, "level": 3}
        assert told(path, Columns([], None)) == row
        with pytest.raises(ConfigError, match=r"(line|row) 1 has no 'solution', which reward.function asks for; its columns are "):
            told(path, Columns(["solution"], []))
    binary = parquet(tmp_path / "binary.parquet", {"prompt": "a", "answer": "b", "image": b"\xff"})
    assert told(binary, Columns([], None)) == {"prompt": "a", "answer": "b"}
    with pytest.raises(ConfigError, match=r"row 1: 'image' is b'\\xff', accepted for reward.function is what JSON can hold"):
        told(binary, Columns(["image"], []))


def test_data_without_answers_will_do_where_none_is_read(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": None}]
    for path in (jsonl(tmp_path / "x.jsonl", *rows), parquet(tmp_path / "x.parquet", *rows)):
        examples = load_examples(str(path), Data(train=str(path)), TOKENIZER, "--data", answers=False)
        assert [(example.prompt, example.answer) for example in examples] == [("a", ""), ("b", "")]


def test_several_files_are_read_one_after_the_other_and_keep_their_names_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/test.jsonl", "b/test.jsonl", "other.jsonl", "b/test.jsonl")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        jsonl(path, {"prompt": path.parent.name, "answer": "1"}, {"prompt": "x", "answer": "1", "data_source": "named"})
    wheres = list(map(str, paths))
    examples = load_examples(wheres, Data(train=wheres), TOKENIZER, "data.heldout")
    assert [example.source for example in examples] == [
        wheres[0],
        "named",
        wheres[1],
        "named",
        "other",
        "named",
        wheres[1],
        "named",
    ]
    assert load_examples([], Data(train="x"), TOKENIZER, "data.heldout") == []
    hub = ["a/gsm8k:test", "b/gsm8k:test", "gsm8k/main:test"]
    assert [_name(where) for where in hub] == ["gsm8k", "gsm8k", "main"]


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
@pytest.mark.parametrize("bits", ["float16", "float32"])
def test_numbers_of_few_bits_are_the_decimals_they_were_written_as(tmp_path, kind, bits):
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    values = [0.1, 2.0, -12.34, 6.5e-5]
    narrow = np.array(values, bits)
    gold = pyarrow.array([{"x": value} for value in narrow], pyarrow.struct([("x", getattr(pyarrow, bits)())]))
    table = pyarrow.table({"prompt": ["a"] * 4, "answer": pyarrow.array(narrow), "gold": gold, "wide": values})
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table, path)
    if kind == "datasets":
        datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")).save_to_disk(path := tmp_path / "saved")
    expected = ["0.1", "2", "-12.34", "6.5e-05"]
    for column in ("answer", "gold.x", "wide"):
        assert [example.answer for example in load(path, answer=column)] == expected


def test_answer_comes_before_ground_truth(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", bupo_row(answer="7"), bupo_row())
    assert [example.answer for example in load(path)] == ["7", "\\frac{1}{2}"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(5, "5"), (5.0, "5"), (-0.25, "-0.25"), (10**20, "1" + "0" * 20), (1e20, "1" + "0" * 20), ("5.0", "5.0"), (" x ", " x ")],
)
def test_numbers_become_text(tmp_path, value, text):
    assert load(jsonl(tmp_path / "x.jsonl", {"prompt": "a", "answer": value}))[0].answer == text


# ---- templates


def test_the_templates_of_the_paper(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl", {"prompt": "1+1=?", "answer": "2"}, bupo_row(prompt=[{"role": "user", "content": "No."}, *CHAT])
    )
    qwen = (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    )
    octothinker = (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
        "thinks about the reasoning process in the mind and then provides the user with the answer. "
        "User: You must put your answer inside \\boxed{} and Your final answer will be extracted automatically by the \\boxed{} "
        "tag.\n1+1=?\nAssistant:"
    )
    texts = {"qwen-math": qwen, "qwen3-nothinking": qwen + "<think>\n\n</think>\n\n", "octothinker": octothinker}
    for template, text in texts.items():
        assert [example.prompt for example in load(path, template=template)] == [text, text]


def test_text_can_become_a_chat(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "1+1=?", "answer": "2"}, bupo_row())
    chats = [example.prompt for example in load(path, template="chat")]
    assert chats[0] == "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    assert [example.prompt for example in load(path)] == ["1+1=?", chats[1]]


def test_prompt_and_template_must_go_together(tmp_path):
    text, chat = jsonl(tmp_path / "t.jsonl", {"prompt": "a", "answer": "b"}), jsonl(tmp_path / "c.jsonl", bupo_row())
    with pytest.raises(
        ConfigError, match=r"data.train: .*c.jsonl line 1: the prompt is a chat, accepted with data.template: raw is text"
    ):
        load(chat, template="raw")
    for path, template in [(chat, "auto"), (text, "chat")]:
        with pytest.raises(
            ConfigError, match=f"data.template: {template} given, but the tokenizer has no chat template, accepted is raw"
        ):
            load(path, characters(chat_template=None), template=template)
    assert load(text, characters(chat_template=None))[0].prompt == "a"
    system = jsonl(tmp_path / "s.jsonl", bupo_row(prompt=CHAT[:1]))
    with pytest.raises(ConfigError, match=r"s.jsonl line 1: the chat has no message of the user"):
        load(system, template="octothinker")
    with pytest.raises(ConfigError, match=r"c.jsonl line 1: the tokenizer's chat template does not take it \(.*no system\)"):
        load(chat, characters(chat_template="{{ raise_exception('no system') }}"))


def test_a_template_whose_tokens_the_model_lacks_is_refused(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "a", "answer": "b"})
    with pytest.raises(
        ConfigError, match=r"data.template: qwen-math given, but the tokenizer lacks <\|im_end\|> and <\|im_start\|>"
    ):
        load(path, characters(special=SPECIAL[:3]), template="qwen-math")


# ---- tokens


@pytest.mark.parametrize("after", ["", "<eos>"])
def test_special_tokens_come_from_the_tokenizer_unless_the_template_has_them(tmp_path, after):
    tokenizer = characters("<bos>", after, chat_template="{{ bos_token }}{{ messages[-1].content }}<eos>")
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "ab", "answer": "b"}, bupo_row(prompt=[{"role": "user", "content": "cd"}]))
    plain = {text: tokenizer(text, add_special_tokens=False).input_ids for text in ("ab", "cd")}

    def ids(template):
        return [list(example.prompt_ids) for example in load(path, tokenizer, template=template)]

    assert ids("auto") == [[BOS, *plain["ab"]], [BOS, *plain["cd"], EOS]]
    assert ids("chat") == [[BOS, *plain["ab"], EOS], [BOS, *plain["cd"], EOS]]
    assert all(tokens[0] == START and tokens.count(START) == tokens.count(END) + 1 == 3 for tokens in ids("qwen-math"))
    assert all(
        tokens[0] == BOS and tokens[-1] == tokenizer(":", add_special_tokens=False).input_ids[0] for tokens in ids("octothinker")
    )


@pytest.mark.parametrize("after", ["", "<eos>"])
def test_a_beginning_that_the_text_already_has_is_not_put_before_it_again(tmp_path, after):
    tokenizer = characters("<bos>", after, chat_template="{{ bos_token }}{{ messages[-1].content }}")
    texts = ["ab", "<bos>ab", "<bos><bos>ab", "a<bos>b"]
    chats = [bupo_row(prompt=[{"role": "user", "content": text}]) for text in texts]
    path = jsonl(tmp_path / "x.jsonl", *({"prompt": text, "answer": "b"} for text in texts), *chats)
    a, b = tokenizer("ab", add_special_tokens=False).input_ids
    expected = [(BOS, a, b)] * 3 + [(BOS, a, BOS, b)]
    assert [example.prompt_ids for example in load(path, tokenizer)] == expected * 2
    assert [example.prompt_ids for example in load(path)][:2] == [(a, b), (BOS, a, b)]  # a tokenizer that puts nothing there


def test_an_end_of_sequence_that_is_written_in_the_text_stays(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "a<eos>", "answer": "b"})
    assert load(path)[0].prompt_ids[-1] == EOS
    assert load(path, characters(after="<eos>"))[0].prompt_ids[-2:] == (TOKENIZER("a").input_ids[0], EOS)


def test_a_token_beyond_the_embedding_is_named_with_its_row(tmp_path):
    path = str(jsonl(tmp_path / "x.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "a<|im_end|>", "answer": "b"}))
    tokenizer = characters(special=[*SPECIAL[:4], *SPECIAL[5:]])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    vocab = len(tokenizer) - 1
    message = rf"^data.train: .*x.jsonl line 2 has the token '<\|im_end\|>' \({vocab}\), accepted are those below {vocab} \("
    with pytest.raises(ConfigError, match=message):
        load_examples(path, Data(train=path), tokenizer, "data.train", vocab=vocab)
    assert len(load_examples(path, Data(train=path), tokenizer, "data.train", vocab=vocab + 1)) == 2


def test_all_rows_are_tokenised_in_a_call(tmp_path):
    sizes = []

    class Counting:
        eos_token_id, chat_template, get_vocab = EOS, CHATML, TOKENIZER.get_vocab

        def __call__(self, texts, **options):
            sizes.append(len(texts) if isinstance(texts, list) else 1)
            return TOKENIZER(texts, **options)

    load(jsonl(tmp_path / "x.jsonl", *[{"prompt": f"{i}", "answer": "b"} for i in range(5000)]), Counting())
    assert max(sizes) == 5000
    assert len(sizes) <= 3


def test_a_prompt_without_tokens_is_an_error(tmp_path):
    tokenizer = characters()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.backend_tokenizer.model = models.BPE({}, [])
    with pytest.raises(ConfigError, match=r"x.jsonl line 1: the prompt 'ab' has no tokens"):
        load(jsonl(tmp_path / "x.jsonl", {"prompt": "ab", "answer": "b"}), tokenizer)


# ---- limits


def test_a_prompt_above_the_limit_is_named_or_dropped(tmp_path, caplog):
    path = jsonl(tmp_path / "x.jsonl", *[{"prompt": "x" * n, "answer": str(n)} for n in (4, 5, 3, 9)])
    with pytest.raises(
        ConfigError,
        match=r"data.train: .*line 2 has a prompt of 5 tokens, accepted are up to 4 \(data.max_prompt_tokens\); 2 of 4 ",
    ):
        load(path, max_prompt_tokens=4)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "bupo"):
        assert [example.answer for example in load(path, max_prompt_tokens=4, too_long="drop")] == ["4", "3"]
    (record,) = caplog.records
    assert record.getMessage() == f"data.train: 2 of 4 prompts in {path} have more than 4 tokens and are left out"
    assert len(load(path, max_prompt_tokens=9)) == 4


def test_dropping_everything_is_an_error(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "abc", "answer": "b"})
    with pytest.raises(ConfigError, match=r"has a prompt of 3 tokens, accepted are up to 2 .* 1 of 1 prompts are longer"):
        load(path, max_prompt_tokens=2, too_long="drop")


# ---- order


def numbered(count: int) -> list[Example]:
    return [Example(str(i), (i,), str(i), "numbers") for i in range(count)]


def test_every_epoch_shows_each_example_once_in_another_order():
    examples = numbered(10)
    order = PromptOrder(examples, batch=4, seed=3)
    seen = [example for step in range(1, 11) for example in order.at(step)]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch, key=lambda example: example.prompt_ids) == examples for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order.at(7) == PromptOrder(examples, batch=4, seed=3).at(7)
    assert order.at(7) != PromptOrder(examples, batch=4, seed=4).at(7)


def test_a_batch_may_be_larger_than_the_data():
    batch = PromptOrder(numbered(2), batch=5, seed=0).at(2)
    assert len(batch) == 5
    assert set(batch) == set(numbered(2))


def test_streams_of_random_numbers_differ():
    seeds = [
        stream_seed(seed, stream, *index)
        for seed in (0, 1, 2**32 - 1)
        for stream in ("order", "rollout", "evaluation")
        for index in [*((step, 0) for step in range(50)), *((step, 1) for step in range(50))]
    ]
    assert len(set(seeds)) == len(seeds) == 900
    assert all(0 <= seed < 2**32 for seed in seeds)
