"""The command ``bupo analyze``: responses, the pass over them, and the files written of it."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bupo.analysis.blocks import UnsupportedModel, decoder_of
from bupo.analysis.boundary import describe, suggest
from bupo.analysis.collect import analyze, ids_fingerprint, model_fingerprint
from bupo.analysis.figures import draw_statistics
from bupo.analysis.heatmap import heat_maps
from bupo.analysis.report import write_report
from bupo.analysis.statistics import Statistics, layer_table, require_pyarrow, write_statistics
from bupo.architecture import load_architecture
from bupo.config import TrainConfig, check_new_folder
from bupo.data import encode, jsonl_rows, load_examples, require_known
from bupo.distributed import World, process_group
from bupo.errors import ConfigError
from bupo.model import load_tokenizer, read_model, require_finite, unusable
from bupo.output import FolderLock, claim, progress_bar, replace_file
from bupo.rollout import WHOLE, Sample, configured_rollout
from bupo_kernels import FusedLMHead


def analyze_command(
    config: TrainConfig,
    out: Path,
    *,
    responses: Sequence[str] = (),
    prompts: int = 64,
    final_norm: bool = False,
    suggest_layer: bool = False,
    examples: int = 4,
    max_tokens: int = 2048,
) -> Statistics:
    """Print and write into ``out`` entropy flow, ΔH and the boundary layer of ``config.model`` on its own responses.

    The responses are those in the files ``responses``, or else ``rollout.samples`` to each of ``prompts`` problems of
    ``data.heldout``, chosen by the seed; ``rollout.temperature`` is that of the samples and of all policies. An analysis begun in
    ``out`` and not ended goes on. Raises :class:`ConfigError`.
    """
    for key, number, least in (("--prompts", prompts, 1), ("--examples", examples, 0), ("--max-tokens", max_tokens, 1)):
        if number < least:
            raise ConfigError(f"{key}: {number} given, accepted are {least} and more")
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
        if responses:
            files = [load_responses(where, tokenizer, "--responses", vocab) for where in responses]
            samples, greedy = [sample for sampled, _ in files for sample in sampled], sum(left_out for _, left_out in files)
            lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
        else:
            problems = load_examples(config.heldout, config.data, tokenizer, "--data", vocab=vocab, answers=False)
            chosen = np.sort(np.random.default_rng(config.seed).permutation(len(problems))[:prompts])
            asked = [problems[i].prompt_ids for i in chosen]
            lengths = [len(prompt) + config.rollout.max_new_tokens for prompt in asked]
        if max(lengths) > (positions := getattr(architecture.get_text_config(), "max_position_embeddings", max(lengths))):
            raise ConfigError(
                f"{'--responses' if responses else 'rollout.max_new_tokens'}: prompt and response of {max(lengths)} tokens, "
                f"accepted are at most {positions} (the positions of {config.model})"
            )
        model = _load_for_reading(config, world)
        lock.take()
        if not responses:
            samples = _respond(model, tokenizer, asked, config, world, partial)
        temperature, seed = config.rollout.temperature, config.seed
        try:
            statistics = analyze(
                model,
                samples,
                final_norm=final_norm,
                temperature=temperature,
                max_tokens=max_tokens,
                partial=partial,
                seed=seed,
            )
        except UnsupportedModel as error:
            raise ConfigError(str(error)) from None
        write_statistics(statistics, out)
        if not responses:
            _write_responses(samples, tokenizer, out / "responses.jsonl")
        draw_statistics(statistics, out)
        firsts = list({tuple(sample.prompt_ids): sample for sample in reversed(samples)}.values())[::-1]  # one of each prompt
        maps = heat_maps(model, tokenizer, firsts[:examples], final_norm=final_norm, temperature=temperature)
        write_report(statistics, maps, out / "report.html")
    shutil.rmtree(partial)

    # Into a file, which has no width, rich would fold the table to 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(layer_table(statistics))
    print(describe(statistics.summary["boundary"]))
    if greedy:
        print(f"{greedy} greedy responses left out: they are no samples of the policy")
    if suggest_layer:
        print(suggest(statistics.summary))
    print(f"statistics.parquet, summary.json, figures and report.html are in {out}")
    return statistics


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


def _load_for_reading(config: TrainConfig, world: World) -> PreTrainedModel:
    model = read_model(config.model, dtype=getattr(torch, config.hardware.precision))
    require_finite(config.model, model)
    FusedLMHead.adopt(model.get_output_embeddings())
    return model.to(world.device).eval()


def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[tuple[int, ...]],
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
    with progress_bar() as bar:
        for step, path in enumerate(bar.track(paths, description="responses, parts")):
            if rollout is not None and not path.exists():
                new = rollout.generate(prompts[step * width : (step + 1) * width], sampling.samples, step)
                ids = [([int(x) for x in s.prompt_ids], [int(x) for x in s.response_ids], s.finished) for s in new]
                replace_file(path, json.dumps(ids))
            parts = json.loads(path.read_text(encoding="utf-8"))
            samples += [Sample(prompt, ids, None, finished) for prompt, ids, finished in parts]
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
