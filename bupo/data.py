"""Prompts with verifiable answers: their files and datasets, their templates and tokens, and their order in training."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bupo.config import Data
from bupo.errors import ConfigError
from bupo.rewards import Columns, Question


@dataclass(frozen=True)
class Example:
    """A prompt with its answer."""

    prompt: str  # the text the model sees, after the template
    prompt_ids: tuple[int, ...]
    answer: str
    source: str  # the name by which accuracy is reported
    row: dict[str, Any] = field(default_factory=dict, hash=False)  # the further columns that the reward is called with


def load_examples(
    where: str | Sequence[str],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    *,
    vocab: int | None = None,
    columns: Columns | None = None,
    answers: bool = True,
) -> list[Example]:
    """Return the examples of a JSONL or parquet file, of a folder saved by `datasets`, or of a dataset on the Hugging Face hub; or
    of several of them, one after the other.

    Args:
        data: the section with columns, template and limit.
        key: the configuration key of ``where``, for messages.
        vocab: the size of the model's embedding, which every token must be below; None = any.
        columns: the further columns that the reward asks for.
        answers: whether there must be answers; without, they are empty. Numbers become text, whole ones without a point.

    Raises:
        ConfigError: a file or a row is not as it must be; the message names the first row.
    """
    wheres = [where] if isinstance(where, str) else where
    sharing = Counter(map(_name, dict.fromkeys(wheres)))  # how many datasets have a name: no two are reported as one
    names = [_name(one) if sharing[_name(one)] == 1 else one for one in wheres]
    parts = [_load(*one, data, tokenizer, key, vocab, columns, answers) for one in zip(wheres, names, strict=True)]
    return [example for part in parts for example in part]


def _load(
    where: str,
    name: str,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    vocab: int | None,
    columns: Columns | None,
    answers: bool,
) -> list[Example]:
    """Return the examples of one file or dataset; ``name`` is the source of those that name none."""
    wanted = [data.prompt, data.source or "data_source", *(_answer_columns(data) if answers else ())]
    if columns is not None:
        wanted += [*columns.required, *(columns.optional or ())]
    everything = columns is not None and columns.optional is None
    rows = _read(where, None if everything else wanted, key)
    if not rows:
        raise ConfigError(f"{key}: {where} is empty, accepted is at least one example")
    _check_special_tokens(data.template, tokenizer)
    prompts = [row.get((data.prompt,), _prompt, _PROMPT) for row in rows]
    accepted = "text that is not empty, or a number"
    solutions = [row.get(_answer_columns(data), _answer, accepted) if answers else "" for row in rows]
    sources = [
        name
        if data.source is None and _find(row.values, "data_source") in (_MISSING, None)
        else row.get((data.source or "data_source",), _text, "text that is not empty")
        for row in rows
    ]
    texts = [_render(prompt, row, data.template, tokenizer) for prompt, row in zip(prompts, rows, strict=True)]
    ids = encode(texts, [_is_whole(prompt, data.template) for prompt in prompts], tokenizer)

    for row, text, prompt_ids in zip(rows, texts, ids, strict=True):
        if not prompt_ids:
            raise ConfigError(f"{row.place}: the prompt {text!r:.100} has no tokens, accepted is at least one")
        require_known(row.place, prompt_ids, tokenizer, vocab)
    too_long = [i for i, prompt_ids in enumerate(ids) if len(prompt_ids) > data.max_prompt_tokens]
    if too_long and (data.too_long == "error" or len(too_long) == len(rows)):
        first = too_long[0]
        raise ConfigError(
            f"{rows[first].place} has a prompt of {len(ids[first])} tokens, accepted are up to {data.max_prompt_tokens} "
            f"(data.max_prompt_tokens); {len(too_long)} of {len(rows)} prompts are longer, and data.too_long is {data.too_long}"
        )
    if too_long:
        logging.getLogger("bupo").warning(
            "%s: %d of %d prompts in %s have more than %d tokens and are left out",
            *(key, len(too_long), len(rows), where, data.max_prompt_tokens),
        )
    columns_told = [_told(row, prompt, columns) for row, prompt in zip(rows, prompts, strict=True)]
    examples = [Example(*example) for example in zip(texts, map(tuple, ids), solutions, sources, columns_told, strict=True)]
    return [example for example in examples if len(example.prompt_ids) <= data.max_prompt_tokens]


def question(example: Example, response: str, response_ids: Sequence[int]) -> Question:
    """Return the question about a response to ``example`` that its reward answers."""
    return Question(response, example.answer, response_ids, example.source, example.row)


def encode_texts(
    texts: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase, key: str, vocab: int | None = None
) -> list[list[int]]:
    """Return the tokens of texts as prompts of data files have them, behind the ``template``.

    Raises :class:`ConfigError` with ``key`` and the number of the text.
    """
    _check_special_tokens(template, tokenizer)
    rows = [_Row(f"{key}: text {number}", {}, ()) for number in range(1, len(texts) + 1)]
    rendered = [_render(text, row, template, tokenizer) for text, row in zip(texts, rows, strict=True)]
    encoded = encode(rendered, [_is_whole(text, template) for text in texts], tokenizer)
    for row, text, ids in zip(rows, texts, encoded, strict=True):
        if not text or not ids:
            raise ConfigError(f"{row.place} is {text!r:.100}, accepted is text of at least one token")
        require_known(row.place, ids, tokenizer, vocab)
    return encoded


# ---- rows

_MISSING = object()
_PROMPT = "text that is not empty, or a chat: a list of {role, content} whose last message is not the assistant's"
_PLACES = "a .jsonl or .parquet file, a folder saved by `datasets`, or owner/name:split or owner/name/config:split on the hub"


@dataclass(frozen=True)
class _Row:
    """A row of a dataset."""

    place: str  # the key, the file and the row, for messages
    values: dict[str, Any]
    columns: Sequence[str]  # the names of all columns; `values` may have fewer

    def get(self, columns: Sequence[str], convert: Callable[[Any], Any], accepted: str) -> Any:
        """Return what ``convert`` makes of the first of ``columns`` that is there. Raises :class:`ConfigError` where that is None,
        or where ``convert`` raises a ``ValueError``, which says what of the value is wrong."""
        for column in columns:
            if (value := _find(self.values, column)) is not _MISSING:
                reason = ""
                try:
                    converted = convert(value)
                except ValueError as error:
                    converted, reason = None, f" ({error})"
                if converted is None:
                    raise ConfigError(f"{self.place}: {column!r} is {value!r:.100}, accepted is {accepted}{reason}")
                return converted
        wanted, there = " or ".join(map(repr, columns)), ", ".join(self.columns)
        raise ConfigError(f"{self.place} has no {wanted}, accepted is {accepted}; its columns are {there}")


def _find(values: Any, column: str) -> Any:
    """Return the value of a column, where ``a.b`` is b in the struct a, or :data:`_MISSING`."""
    if not isinstance(values, dict):
        return _MISSING
    if column in values:
        return values[column]
    struct, _, rest = column.partition(".")
    return _find(values.get(struct), rest) if rest else _MISSING


def _answer_columns(data: Data) -> tuple[str, ...]:
    return ("answer", "reward_model.ground_truth") if data.answer is None else (data.answer,)


def _text(value: Any) -> str | None:
    """Return a value that is text and not empty, else None."""
    try:
        return value if isinstance(value, str) and value.strip() and value.encode() else None
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return None


def _answer(value: Any) -> str | None:
    """Return an answer as text, or None if it is none."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value) if isinstance(value, int) else _text(value)


def _prompt(value: Any) -> str | list[dict[str, str]] | None:
    """Return a prompt, text or a chat, or None if it is none. Raises ``ValueError`` for the message of a chat that is wrong."""
    if not isinstance(value, list):
        return _text(value)
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {message!r:.60}")
        for name in ("role", "content"):
            if _text(message.get(name)) is None:
                raise ValueError(f"message {number} has {f'{message[name]!r:.60} as' if name in message else 'no'} {name}")
        # A table has every column in every row, so that None is as good as nothing.
        if more := [name for name, content in message.items() if name not in ("role", "content") and content is not None]:
            raise ValueError(f"message {number} has {', '.join(map(repr, more))}, which templates would not see")
    if value and value[-1]["role"] == "assistant":
        raise ValueError(f"message {len(value)} is")
    return [{name: message[name] for name in ("role", "content")} for message in value] or None


def _told(row: _Row, prompt: str | list[dict[str, str]], columns: Columns | None) -> dict[str, Any]:
    """Return what a reward that asks for ``columns`` is told of the row: those, and the prompt as it was before the template."""
    if columns is None:
        return {}
    for name in columns.required:
        if name not in row.values:
            there = ", ".join(row.columns)
            raise ConfigError(f"{row.place} has no {name!r}, which reward.function asks for; its columns are {there}")
        if not _is_json(row.values[name]):
            value = row.values[name]
            raise ConfigError(f"{row.place}: {name!r} is {value!r:.100}, accepted for reward.function is what JSON can hold")
    optional = row.values if columns.optional is None else columns.optional
    found = {name: row.values[name] for name in optional if name in row.values and _is_json(row.values[name])}
    return found | {name: row.values[name] for name in columns.required} | {"prompt": prompt}


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


# ---- files and datasets


def _name(where: str) -> str:
    """Return the name of a dataset whose rows do not say their source."""
    path = Path(where)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.suffix.lower() in (".jsonl", ".parquet") else where.partition(":")[0].split("/")[:2][-1]


def _read(where: str, wanted: Sequence[str] | None, key: str) -> list[_Row]:
    """Return the rows of a dataset, with at least the columns in ``wanted``, or with all if that is None."""
    path = Path(where)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _datasets_rows(where, wanted, key)
    if path.is_file() and suffix in (".jsonl", ".parquet"):
        try:
            return jsonl_rows(where, key) if suffix == ".jsonl" else _parquet_rows(where, wanted, key)
        except OSError as error:
            raise ConfigError(f"{key}: {where} cannot be read ({error.strerror or error}), accepted is {_PLACES}") from None
    if path.exists():
        raise ConfigError(f"{key}: {where} is a file of another kind, accepted is {_PLACES}")
    if suffix in (".jsonl", ".json", ".parquet"):
        raise ConfigError(f"{key}: {where} does not exist, accepted is {_PLACES}")
    return _datasets_rows(where, wanted, key)


def jsonl_rows(where: str, key: str) -> list[_Row]:
    """Return the rows of a JSONL file. Raises :class:`ConfigError` with ``key`` for the first line that is not one."""
    try:
        lines = Path(where).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028 within a text
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {where} is not UTF-8: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        place = f"{key}: {where} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{place} is {line.strip()[:100]}, accepted is an object: {{column: value, ...}}")
        rows.append(_Row(place, values, list(values)))
    return rows


def _parquet_rows(where: str, wanted: Sequence[str] | None, key: str) -> list[_Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{key}: {where} needs the package pyarrow, accepted is {_PLACES}") from None
    try:
        with parquet.ParquetFile(where) as file:
            columns = file.schema_arrow.names
            table = file.read(columns=_needed(columns, wanted))
            values, schema = table.to_pylist(), table.schema
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{key}: {where} is not a parquet file: {_first_line(error)}") from None
    return _table_rows(values, schema, columns, where, key)


def _datasets_rows(where: str, wanted: Sequence[str] | None, key: str) -> list[_Row]:
    """Return the rows of a folder that `datasets` saved, or else of a dataset on the hub."""
    name, _, split = where.partition(":")
    parts = name.split("/")
    folder = Path(where).is_dir()
    if not folder and not (split and all(parts) and len(parts) <= 3):
        raise ConfigError(f"{key}: {where} is no file, no folder and no dataset with its split, accepted is {_PLACES}")
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{key}: {where} needs the package datasets, or else accepted is a .jsonl or .parquet file") from None
    try:
        if folder:
            dataset = datasets.load_from_disk(where)
        else:
            dataset = datasets.load_dataset("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split=split)
    except Exception as error:  # network, hub and format raise their own, and datasets has no class for them
        raise ConfigError(f"{key}: {where} cannot be loaded ({_first_line(error)}), accepted is {_PLACES}") from None
    if isinstance(dataset, dict):
        raise ConfigError(f"{key}: {where} holds the splits {', '.join(dataset)}, accepted is the folder of one of them")
    columns = dataset.column_names
    table = dataset.select_columns(_needed(columns, wanted))
    return _table_rows(table.to_list(), table.features.arrow_schema, columns, where, key)


def _table_rows(values: list[dict[str, Any]], schema: Any, columns: list[str], where: str, key: str) -> list[_Row]:
    for column in schema:
        if re.search(r"\b(half)?float\b", str(column.type)):  # arrow's names of 16 and 32 bits
            for row in values:
                row[column.name] = _shortest(row[column.name], column.type)
    return [_Row(f"{key}: {where} row {number}", row, columns) for number, row in enumerate(values, 1)]


def _shortest(value: Any, kind: Any) -> Any:
    """Return a value of an arrow type with numbers of 16 and 32 bits as the decimals they were written as: 0.1, not the
    0.10000000149011612 that Python's float makes of it."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_float32(kind) or types.is_float16(kind):
        return float(str((np.float32 if types.is_float32(kind) else np.float16)(value)))
    if types.is_struct(kind):
        return {part.name: _shortest(value[part.name], part.type) for part in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_shortest(entry, kind.value_type) for entry in value]
    return value


def _needed(columns: list[str], wanted: Sequence[str] | None) -> list[str]:
    """Return the columns of a table to read, as others can be gigabytes; at least one, without which `datasets` has no rows."""
    if wanted is None:
        return columns
    return [name for name in columns if any(column == name or column.startswith(f"{name}.") for column in wanted)] or columns[:1]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# ---- templates and tokens

_QWEN = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
TEMPLATES = {  # the texts before and after the problem, as the paper has them
    "qwen-math": _QWEN,
    "qwen3-nothinking": (_QWEN[0], _QWEN[1] + "<think>\n\n</think>\n\n"),
    "octothinker": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "User: You must put your answer inside \\boxed{} "
        "and Your final answer will be extracted automatically by the \\boxed{} tag.\n",
        "\nAssistant:",
    ),
}


def _check_special_tokens(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    needed = re.findall(r"<\|\w+\|>", "".join(TEMPLATES.get(template, ())))
    if missing := sorted(set(needed) - tokenizer.get_vocab().keys()):
        lacking = f"the tokenizer lacks {' and '.join(missing)}"
        raise ConfigError(f"data.template: {template} given, but {lacking}, accepted is another template, or a model that has them")


def _render(prompt: str | list[dict[str, str]], row: _Row, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that the model sees. Raises :class:`ConfigError` when prompt, template and tokenizer do not go together."""
    if template in TEMPLATES:
        before, after = TEMPLATES[template]
        users = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt if message["role"] == "user"]
        if not users:
            raise ConfigError(f"{row.place}: the chat has no message of the user, accepted with data.template: {template} is one")
        return before + users[-1] + after
    if isinstance(prompt, str) and template != "chat":
        return prompt
    if template == "raw":
        raise ConfigError(f"{row.place}: the prompt is a chat, accepted with data.template: raw is text")
    if not tokenizer.chat_template:
        accepted = f"raw (text only), {', '.join(TEMPLATES)}, or a tokenizer with a chat template"
        raise ConfigError(f"data.template: {template} given, but the tokenizer has no chat template, accepted is {accepted}")
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise ConfigError(f"{row.place}: the tokenizer's chat template does not take it ({_first_line(error)})") from None


def _is_whole(prompt: str | list[dict[str, str]], template: str) -> bool:
    """Return whether the template has written the special tokens, so that the tokenizer must not add its own."""
    if template in TEMPLATES:
        return TEMPLATES[template][0].startswith("<|")
    return template == "chat" or not isinstance(prompt, str)


def encode(texts: list[str], whole: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of prompts.

    The tokens that the tokenizer puts before a text stand there once, also where the text has them already; before a ``whole`` text
    only if it has them. Those that the tokenizer appends are left out, as no prompt ends there.
    """
    begin = _tokens_before(tokenizer)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    for i, ids in enumerate(encoded):
        bare = ids
        while begin and bare[: len(begin)] == begin:
            bare = bare[len(begin) :]
        if len(bare) < len(ids) or not whole[i]:
            encoded[i] = [*begin, *bare]
    return encoded


def _tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text, such as one for the beginning of a sequence."""
    bare, marked = (tokenizer("1", add_special_tokens=special).input_ids for special in (False, True))
    return next(marked[:i] for i in range(len(marked) + 1) if marked[i : i + len(bare)] == bare)


def require_known(place: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocab: int | None) -> None:
    """Raise :class:`ConfigError` when one of the tokens is beyond the ``vocab`` rows of the model's embedding."""
    if vocab is not None and (unknown := next((i for i in ids if i >= vocab), None)) is not None:
        token = tokenizer.convert_ids_to_tokens(unknown)
        raise ConfigError(f"{place} has the token {token!r} ({unknown}), accepted are those below {vocab} (the model's embedding)")


# ---- order


class PromptOrder:
    """The order of prompts: shuffled epochs. A batch is a function of the step alone, with nothing to save and to restore."""

    def __init__(self, examples: list[Example], batch: int, seed: int) -> None:
        self.examples, self.batch, self.seed = examples, batch, seed

    def at(self, step: int) -> list[Example]:
        """Return the examples of ``step``, counted from 1."""
        first, size = (step - 1) * self.batch, len(self.examples)
        epochs = range(first // size, (first + self.batch - 1) // size + 1)
        order = [i for epoch in epochs for i in self._permutation(epoch)]
        offset = first - epochs.start * size
        return [self.examples[i] for i in order[offset : offset + self.batch]]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
        return torch.randperm(len(self.examples), generator=generator).tolist()


STREAMS = ("order", "rollout", "evaluation", "warm-up", "guard", "look", "lens")


def stream_seed(seed: int, stream: str, *indices: int) -> int:
    """Return the seed for one use (an epoch; a step and a rank) of one of a run's :data:`STREAMS` of random numbers.

    It is hashed to 32 bits, as torch's CPU generator reads no more of its seed: sums and shifts would collide.
    """
    return int(np.random.SeedSequence((seed, STREAMS.index(stream), *indices)).generate_state(1)[0])
