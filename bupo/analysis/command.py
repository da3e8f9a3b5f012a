"""The command ``bupo analyze``: responses, the pass over them, and the files written of it."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bupo.analysis.blocks import UnsupportedModel, decoder_of
from bupo.analysis.boundary import describe, suggest
from bupo.analysis.collect import MODULES, Look, ids_fingerprint, model_fingerprint
from bupo.analysis.forecast import forecast
from bupo.analysis.heatmap import lens_table
from bupo.analysis.report import Report
from bupo.analysis.statistics import layer_table, require_pyarrow
from bupo.analysis.texts import text_samples, tracked_tokens
from bupo.analysis.translators import Translators, fit_table, fit_translators
from bupo.analysis.views import report_of
from bupo.architecture import load_architecture
from bupo.config import TrainConfig, check_new_folder
from bupo.data import encode, encode_texts, jsonl_rows, load_examples, require_known
from bupo.distributed import World, process_group
from bupo.errors import ConfigError
from bupo.model import load_tokenizer, read_model, require_finite, unusable
from bupo.output import FolderLock, claim, progress, replace_file
from bupo.rollout import WHOLE, Sample, configured_rollout
from bupo_kernels import FusedLMHead


class Source(NamedTuple):
    """The source of the tokens that are read: one of the three."""

    data: bool = False  # problems of data.heldout, to which the model responds itself
    responses: Sequence[str] = ()  # files with prompts and responses
    texts: Sequence[str] = ()  # read as they stand


def analyze_command(
    config: TrainConfig,
    out: Path,
    *,
    source: Source | None = None,
    prompts: int = 64,
    readings: Sequence[str] = ("raw",),
    points: Sequence[str] = MODULES,
    track: Sequence[str] = (),
    against: str | None = None,
    translators: Path | None = None,
    fit_steps: int = 0,
    suggest_layer: bool = False,
    examples: int = 4,
    max_tokens: int = 2048,
) -> Report:
    """Print and write into ``out`` entropy flow, ΔH and the boundary layer of ``config.model`` on its own responses, or on texts.

    The responses are those in files, or else ``rollout.samples`` to each of ``prompts`` problems of ``data.heldout``, chosen by the
    seed; ``rollout.temperature`` is that of the samples and of all policies. ``against`` is a second model, which reads the same
    tokens; ``translators`` a file that gives the tuned reading, fitted first where ``fit_steps`` are given. An analysis begun in
    ``out`` and not ended goes on. Raises :class:`ConfigError`.
    """
    source = source or Source(data=True)
    for key, number, least in (("--prompts", prompts, 1), ("--examples", examples, 0), ("--max-tokens", max_tokens, 1)):
        if number < least:
            raise ConfigError(f"{key}: {number} given, accepted are {least} and more")
    if track and (not examples or "layer" not in points):
        raise ConfigError("--track: given, accepted with --examples of 1 and more and with layer among --points")
    _check_translators(translators, fit_steps, points, against)
    partial = out / "partial"
    if not partial.is_dir():
        check_new_folder(out, "--out")
    require_pyarrow()
    with process_group(config.hardware) as world, FolderLock(partial, "--out") as lock:
        with world.agree():
            if world.size > 1:
                raise ConfigError(f"analyze: started on {world.size} devices, accepted is one process")
        architecture = load_architecture(config)
        _check_blocks(config.model, architecture)
        tokenizer, greedy, vocab = load_tokenizer(config.model), 0, architecture.get_text_config().vocab_size
        names = ("",) if against is None else _check_against(config, against, architecture, tokenizer)
        look = Look(tuple(readings), tuple(points), config.rollout.temperature)
        look = replace(look, track=tuple(tracked_tokens(track, tokenizer, "--track")))
        asked: list[Sequence[int]] = []
        samples: list[Sample] = []
        if source.responses:
            files = [load_responses(where, tokenizer, "--responses", vocab) for where in source.responses]
            samples, greedy = [sample for sampled, _ in files for sample in sampled], sum(left_out for _, left_out in files)
            key, lengths = "--responses", [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
        elif source.texts:
            asked = [*encode_texts(source.texts, config.data.template, tokenizer, "--prompt", vocab)]
            key, lengths = "--prompt", [len(ids) + 1 for ids in asked]
        else:
            problems = load_examples(config.heldout, config.data, tokenizer, "--data", vocab=vocab, answers=False)
            chosen = np.sort(np.random.default_rng(config.seed).permutation(len(problems))[:prompts])
            asked = [problems[i].prompt_ids for i in chosen]
            key, lengths = "rollout.max_new_tokens", [len(prompt) + config.rollout.max_new_tokens for prompt in asked]
        if max(lengths) > (positions := getattr(architecture.get_text_config(), "max_position_embeddings", max(lengths))):
            raise ConfigError(
                f"{key}: prompt and response of {max(lengths)} tokens, accepted are at most {positions} (the positions of "
                f"{config.model})"
            )
        model = _load_for_reading(config, config.model, world)
        lock.take()
        if source.texts:
            samples = text_samples(model, asked)
        elif not source.responses:
            _say(model, look, [(len(ids), config.rollout.max_new_tokens) for ids in asked for _ in range(config.rollout.samples)])
            samples = _respond(model, tokenizer, asked, config, world, partial)
        if source.texts or source.responses:
            _say(model, look, [(len(sample.prompt_ids), len(sample.response_ids)) for sample in samples])

        if translators is not None:
            look = replace(look, readings=(*look.readings, "tuned"))
            look = replace(look, translate=_translators(model, samples, translators, fit_steps, max_tokens, config.seed))

        def models() -> Iterator[PreTrainedModel]:
            nonlocal model
            yield model
            if against is not None:
                del model  # there is room for one of them
                model = _load_for_reading(config, against, world)
                yield model

        try:
            report = report_of(
                models(),
                tokenizer,
                samples,
                look,
                examples=len(samples) if source.texts else examples,
                max_tokens=max_tokens,
                partial=partial,
                seed=config.seed,
                texts=source.texts,
                names=names,
            )
        except UnsupportedModel as error:
            raise ConfigError(str(error)) from None
        if source.data:
            _write_responses(samples, tokenizer, out / "responses.jsonl")
        report.write(out, pictures=not source.texts)
    shutil.rmtree(partial)

    # Into a file, which has no width, rich would fold the table to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200)
    if source.texts:
        for views in report.heatmaps_by_text():
            console.print(lens_table(views))
    for name, statistics in () if source.texts else report.statistics.items():
        console.print(layer_table(statistics, name if len(report.statistics) > 1 else ""))
        if "ffn" in points:
            print(describe(statistics.summary["boundary"]))
    if greedy:
        print(f"{greedy} greedy responses left out: they are no samples of the policy")
    if suggest_layer:
        print(suggest(next(iter(report.statistics.values())).summary))
    files_written = "statistics and report.html" if source.texts else "statistics.parquet, summary.json, figures and report.html"
    print(f"{files_written} are in {out}")
    return report


def _check_translators(path: Path | None, fit_steps: int, points: Sequence[str], against: str | None) -> None:
    """Raise :class:`ConfigError` where translators cannot be used, before anything is read."""
    if path is None:
        return
    key = "--fit-translators" if fit_steps else "--translators"
    if tuple(points) != ("layer",):
        raise ConfigError(f"{key}: given with --points {' '.join(points)}, accepted with --points layer, which they translate")
    if against is not None:
        raise ConfigError(f"{key}: given with --against, accepted for one model")
    if fit_steps and path.exists():
        raise ConfigError(f"{key}: {path} is there already, accepted is a new file; --translators uses it")
    if not fit_steps and not path.is_file():
        raise ConfigError(f"{key}: {path} is not a file, accepted is what --fit-translators wrote")


def _translators(
    model: PreTrainedModel, samples: Sequence[Sample], path: Path, fit_steps: int, max_tokens: int, seed: int
) -> Translators:
    """Return the translators in ``path``, which are fitted to ``samples`` and put there first where there are ``fit_steps``."""
    if not fit_steps:
        return Translators.load(path, model, "--translators")
    if len(samples) < 2:
        raise ConfigError(f"--fit-translators: given with {len(samples)} text, accepted are at least 2: one is held out")
    translators, fit = fit_translators(model, samples, steps=fit_steps, max_tokens=max_tokens, seed=seed)
    translators.save(path, model)
    Console(width=None if sys.stdout.isatty() else 200).print(fit_table(fit))
    print(f"translators of {len(fit.before)} layers are in {path}", flush=True)
    return translators


def _say(model: PreTrainedModel, look: Look, lengths: Sequence[tuple[int, int]]) -> None:
    """Print how long it will take to read prompts and responses of such ``lengths``, where that is worth a line."""
    tokens, positions = sum(sum(pair) for pair in lengths), sum(response for _, response in lengths)
    if (coming := forecast(model, look, tokens, positions)) is not None:
        print(f"{len(lengths):,} responses, {coming}", flush=True)


def _check_against(
    config: TrainConfig, against: str, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Return the names of the two models in a report. Raises :class:`ConfigError` where they do not read the same tokens."""
    other = load_architecture(config.model_copy(update={"model": against}), "--against")
    _check_blocks(against, other)
    depths = [text.get_text_config().num_hidden_layers for text in (architecture, other)]
    if depths[0] != depths[1]:
        raise ConfigError(f"--against: {against} has {depths[1]} layers, accepted are models with {depths[0]}, as {config.model}")
    vocabularies = [text.get_vocab() for text in (tokenizer, load_tokenizer(against))]
    if vocabularies[0] != vocabularies[1]:
        pairs = set(vocabularies[1].items()) ^ set(vocabularies[0].items())
        word = min(pairs, key=lambda pair: pair[1])
        raise ConfigError(
            f"--against: {against} has another tokenizer ({len(pairs)} entries differ, {word[0]!r} for {word[1]} among them), "
            f"accepted are models with that of {config.model}"
        )
    first, second = Path(config.model).name, Path(against).name
    return (first, second) if first != second else (f"{first} (1)", f"{second} (2)")


def load_responses(where: str, tokenizer: PreTrainedTokenizerBase, key: str, vocab: int | None = None) -> tuple[list[Sample], int]:
    """Return the samples in a JSONL file as ``bupo evaluate --out`` writes it, and how many greedy responses were left out.

    A row needs ``prompt``, the text the model saw, and ``response``. With ``greedy: true`` it is left out: it is no sample of the
    policy. Tokens are ``prompt_ids`` and ``response_ids`` where those are there and this tokenizer's. Else the texts become tokens
    again, which need not be the very ones that were sampled; with ``finished: true`` the end-of-sequence token follows. Raises
    :class:`ConfigError` with ``key`` and the line that is not as it must be, ids from ``vocab`` on included.
    """
    if not Path(where).is_file():
        raise ConfigError(f"{key}: {where} is not a file, accepted is a JSONL file with prompt and response in each line")
    rows = jsonl_rows(where, key)
    sampled = [row for row in rows if row.values.get("greedy") is not True]
    if not sampled:
        raise ConfigError(f"{key}: {where} has {len(rows)} lines, {len(rows)} of them greedy; accepted is at least one sample")
    prompts = [row.get(("prompt",), lambda x: x if isinstance(x, str) and x else None, "text that is not empty") for row in sampled]
    responses = [row.get(("response",), lambda x: x if isinstance(x, str) else None, "text") for row in sampled]
    # Ids and text must agree but for special tokens, which may have been left out of the text.
    plain = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    prompt_ids = encode(prompts, [False] * len(prompts), tokenizer)
    response_ids = tokenizer(responses, add_special_tokens=False, verbose=False).input_ids
    samples, foreign = [], 0
    for row, prompt, response in zip(sampled, prompt_ids, response_ids, strict=True):
        finished = row.values.get("finished") is True
        ids = [*response, tokenizer.eos_token_id] if finished else response
        if "prompt_ids" in row.values and "response_ids" in row.values:
            stored = [row.get((name,), _ids, "a list of token ids") for name in ("prompt_ids", "response_ids")]
            if [*map(plain, stored)] == [plain(prompt), plain(response)]:
                prompt, ids = stored
            else:
                foreign += 1
        if not ids or not prompt:
            raise ConfigError(f"{row.place}: its {'prompt' if ids else 'response'} has no tokens, accepted is at least one")
        require_known(row.place, [*prompt, *ids], tokenizer, vocab)
        samples.append(Sample(prompt, ids, None, finished))
    if foreign:
        logging.getLogger("bupo").warning(
            "%s: in %d of %d rows of %s the ids are not this tokenizer's, and the text is read", *(key, foreign, len(rows), where)
        )
    return samples, len(rows) - len(sampled)


def _ids(value: Any) -> list[int] | None:
    """Return ``value`` if it is a list of token ids, else None."""
    return value if isinstance(value, list) and value and all(type(i) is int and 0 <= i < 2**32 for i in value) else None


def _check_blocks(name: str, architecture: PretrainedConfig) -> None:
    """Raise :class:`ConfigError` where the model, of which no weight has been read yet, is not one to look into."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture)
        FusedLMHead.adopt(model.get_output_embeddings())
        decoder_of(model)
    except (ValueError, TypeError) as error:  # UnsupportedModel among them
        raise unusable(name, error) from None


def _load_for_reading(config: TrainConfig, name: str, world: World) -> PreTrainedModel:
    model = read_model(name, dtype=getattr(torch, config.hardware.precision))
    require_finite(name, model)
    FusedLMHead.adopt(model.get_output_embeddings())
    return model.to(world.device).eval()


def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: TrainConfig,
    world: World,
    partial: Path,
) -> list[Sample]:
    """Return responses to the prompts, ``rollout.samples`` each: those of an unfinished analysis in ``partial``, or new ones."""
    sampling = config.rollout
    settings = {"model": model_fingerprint(model), "prompts": ids_fingerprint(prompts), "seed": config.seed}
    settings |= sampling.model_dump(include={"engine", "samples", "sequences", "max_new_tokens", "temperature"})
    settings |= sampling.model_dump(include=set(WHOLE), exclude_defaults=True)
    claim(partial, "sampling.json", settings | {"precision": config.hardware.precision}, "analysis")
    width = max(sampling.sequences // sampling.samples, 1)
    paths = [partial / f"samples-{step:06}.json" for step in range(math.ceil(len(prompts) / width))]
    rollout = None if all(path.exists() for path in paths) else configured_rollout(config, model, tokenizer, world)
    samples = []
    with progress("responses, prompts", len(prompts)) as advance:
        for step, path in enumerate(paths):
            if rollout is not None and not path.exists():
                new = rollout.generate(prompts[step * width : (step + 1) * width], sampling.samples, step)
                ids = [([int(x) for x in s.prompt_ids], [int(x) for x in s.response_ids], s.finished) for s in new]
                replace_file(path, json.dumps(ids))
            parts = json.loads(path.read_text(encoding="utf-8"))
            samples += [Sample(prompt, ids, None, finished) for prompt, ids, finished in parts]
            advance(len(prompts[step * width : (step + 1) * width]))
    return samples


def _write_responses(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write ``samples`` as ``--responses`` reads them."""
    rows = []
    for sample in samples:
        prompt, response = (list(map(int, ids)) for ids in (sample.prompt_ids, sample.response_ids))
        texts = (
            tokenizer.decode(x, clean_up_tokenization_spaces=False) for x in (prompt, response[: -1 if sample.finished else None])
        )
        row = dict(zip(("prompt", "response"), texts, strict=True)) | {"finished": sample.finished}
        rows.append(row | {"prompt_ids": prompt, "response_ids": response})
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))
