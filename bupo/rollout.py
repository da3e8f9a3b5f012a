"""The engines that sample responses from the final policy: transformers' continuous batching, its ``generate``, and vLLM."""

from __future__ import annotations

import gc
import math
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from bupo.config import TrainConfig
from bupo.data import stream_seed
from bupo.distributed import World, full, unsharded
from bupo.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """A prompt and a response to it."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]  # with the end-of-sequence token as the last one if finished
    logprobs: Sequence[float] | None  # the sampler's, of the policy that it drew from, one per response token; None if greedy
    finished: bool  # False if it was cut off at max_new_tokens
    kept: KeptSets | None = None  # what the sampler could have drawn; None if that is all there is, or greedy


class KeptSets(NamedTuple):
    """The ids that a sampler kept for each token of a response, one token's after the other's."""

    ids: array[int]  # [M]
    sizes: array[int]  # [T]


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling. There is no penalty, whatever the checkpoint says, and what cuts off the softmax is applied in the
    order it has here, after the temperature; by default it is sampled whole."""

    max_new_tokens: int
    temperature: float  # 0 = greedy
    seed: int  # the run's
    stream: str = "rollout"  # one of data.STREAMS
    stop: Callable[[], bool] | None = None  # called between tokens; once it returns True, `generate` raises Stopped
    top_k: int = 0  # the most probable ids that are kept; 0 = all
    top_p: float = 1.0  # the probability that the fewest ids have which are kept; 1 = all
    min_p: float = 0.0  # of the most probable id's probability, what those have that are kept; 0 = all

    @property
    def truncates(self) -> bool:
        """Whether a sample is of some of the ids alone, so that it comes with its sets."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


WHOLE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # the settings of a :class:`Sampling` that cuts nothing off


class Stopped(Exception):
    """The end of a generation that is given up because this process was told to end."""


class Response(NamedTuple):
    """A response as an engine gives it."""

    tokens: list[int]
    logprobs: list[float] | None
    kept: KeptSets | None


def text_of(
    response_ids: Sequence[int], *, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], skip_special_tokens: bool
) -> str:
    """Return a response as rewards, episodes and files have it: the generated text, without the tokens that end and pad it."""
    hidden = {*ends, tokenizer.pad_token_id}
    shown = [i for i in response_ids if i not in hidden]
    return tokenizer.decode(shown, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def configured_decode(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> Callable[[Sequence[int]], str]:
    """Return :func:`text_of` as ``config.rollout`` wants it, for the responses of ``rollout``."""
    skip = config.rollout.skip_special_tokens
    return partial(text_of, tokenizer=tokenizer, ends=rollout.ends, skip_special_tokens=skip)


class Rollout(Protocol):
    """An engine that samples responses."""

    @property
    def sampling(self) -> Sampling: ...

    @property
    def ends(self) -> Sequence[int]:
        """The tokens that end a response."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], n: int, step: int) -> list[Sample]:
        """Return ``n`` responses to each prompt, those of one prompt together, in order.

        A collective: every rank calls it, also with no prompts. The samples depend on weights, prompts, ``sampling``, ``step``
        and rank alone, and the global random generators stay as they were. Raises RuntimeError when a response fails, and
        :class:`Stopped`, on this rank alone, when ``sampling.stop`` returns True (vLLM does not call it).
        """
        ...

    def with_sampling(self, **changes: Any) -> Rollout:
        """Return the engine with another :class:`Sampling`, e.g. ``with_sampling(temperature=0.0, stream="evaluation")``."""
        ...


def configured_rollout(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, temperature: float | None = None
) -> Rollout:
    """Return the engine that ``config.rollout`` describes; given a ``temperature``, at that one, and with nothing cut off. Raises
    :class:`ConfigError`."""
    section = config.rollout
    cut = WHOLE if temperature is not None else {name: getattr(section, name) for name in WHOLE}
    rollout = make_rollout(
        section.engine,
        model,
        tokenizer,
        Sampling(section.max_new_tokens, section.temperature if temperature is None else temperature, config.seed, **cut),
        world,
        sequences=section.sequences,
        longest=sum(config.lengths),
        precision=config.hardware.precision,
        vllm_memory=section.vllm_memory,
    )
    if not rollout.ends:
        reason = f"its end-of-sequence token {tokenizer.eos_token!r} ({tokenizer.eos_token_id}) has no row in its embedding"
        raise ConfigError(f"model: {config.model} cannot be used: {reason}")
    return rollout


def make_rollout(
    engine: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    world: World,
    *,
    sequences: int,
    longest: int | None = None,
    precision: str = "bfloat16",
    vllm_memory: float = 0.5,
) -> Rollout:
    """Return the engine called ``engine``: "continuous", "generate" or "vllm".

    Args:
        sequences: how many are generated at a time per device.
        longest: the most tokens of prompt and response together; vllm only, None = as many as the model has positions.
        precision: the type of the weights; vllm only, the others use the model's.
        vllm_memory: the share of the GPU's memory that vLLM may take.

    Raises:
        ConfigError: vLLM is not installed.
    """
    if engine == "vllm":
        llm = _start_vllm(model, world, sequences, longest, precision, vllm_memory, sampling.truncates)
        return VLLM(model, tokenizer, sampling, world, sequences, llm)
    if engine not in _ENGINES:
        raise ValueError(f"engine: {engine!r} given, accepted are {', '.join(_ENGINES)}, vllm")
    return _ENGINES[engine](model, tokenizer, sampling, world, sequences)


@dataclass(frozen=True)
class _Engine(ABC):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    world: World
    sequences: int

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], n: int, step: int) -> list[Sample]: ...

    def with_sampling(self, **changes: Any) -> Rollout:
        return replace(self, sampling=replace(self.sampling, **changes))

    def _seed(self, *indices: int) -> int:
        return stream_seed(self.sampling.seed, self.sampling.stream, *indices)

    @property
    def ends(self) -> list[int]:
        """The tokens that end a response: the checkpoint's and the tokenizer's, if the model's embedding has them."""
        own = self.model.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        return sorted(i for i in ids - {None} if i < self.model.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class _Transformers(_Engine):
    """An engine that generates with the training model itself, each rank by itself on the whole weights."""

    _attention: ClassVar[str]  # the attention implementation while it generates

    def generate(self, prompts: Sequence[Sequence[int]], n: int, step: int) -> list[Sample]:
        ends = self.ends
        sampling = self.sampling
        policy = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        settings = GenerationConfig(
            **(policy if self.sampling.temperature > 0 else {"do_sample": False}),
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=(ends or [0])[0],  # any token of the embedding, which may lack the tokenizer's; nothing looks at it
        )
        requests = [list(prompt) for prompt in prompts for _ in range(n)]
        with self._ready():
            responses = self._responses(requests, settings, step) if requests else []
        return [
            Sample(prompt, tokens, logprobs, tokens[-1] in ends, kept)
            for prompt, (tokens, logprobs, kept) in zip(requests, responses, strict=True)
        ]

    def _ask(self) -> None:
        if self.sampling.stop is not None and self.sampling.stop():
            raise Stopped

    @abstractmethod
    def _responses(self, prompts: list[list[int]], settings: GenerationConfig, step: int) -> list[Response]:
        """Return one response to each prompt."""

    @contextmanager
    def _ready(self) -> Iterator[None]:
        model, device = self.model, self.world.device
        training, attention, own_settings = model.training, model.config._attn_implementation, model.generation_config
        with unsharded(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                # While training, caches of keys and values are off, and the attention of packed batches takes none.
                model.eval().set_attn_implementation(self._attention)
                # transformers would take missing settings from the checkpoint (a repetition penalty, min_p): another policy.
                model.generation_config = GenerationConfig()
                yield
            finally:
                model.train(training).set_attn_implementation(attention)
                model.generation_config = own_settings


_FIELDS = {field.name for field in fields(ContinuousBatchingConfig)}
_PAGE = 32  # tokens in the unit of the cache, and of prompts that requests share
_PREFILL = 1024  # tokens that a forward pass may hold; its attention mask is this × the cache


class ContinuousBatching(_Transformers):
    """The engine of transformers' continuous batching: a finished response makes room for the next prompt.

    Every call has a manager and a cache of its own, so no keys and values outlive an update of the weights. The cache holds
    ``sequences`` of the longest length that this call can produce; further requests wait. With scaled_dot_product_attention each
    token attends, masked, to the whole cache: the cost of a step grows with the square of ``sequences``.
    """

    # Where it cannot be told not to, transformers may turn "sdpa" into flash attention.
    _attention = "sdpa" if "auto_switch_to_flash" in _FIELDS else "paged|sdpa"

    def _responses(self, prompts: list[list[int]], settings: GenerationConfig, step: int) -> list[Response]:
        together = min(self.sequences, len(prompts))
        pages = math.ceil((max(map(len, prompts)) + self.sampling.max_new_tokens) / _PAGE) + 1  # transformers 5.17 takes one ahead
        config = ContinuousBatchingConfig(
            **{"page_size" if "page_size" in _FIELDS else "block_size": _PAGE},
            **({"auto_switch_to_flash": False} if "auto_switch_to_flash" in _FIELDS else {}),
            num_blocks=together * pages,
            max_requests_per_batch=together,
            max_batch_tokens=max(together, min(_PREFILL, sum(map(len, prompts)))),
            safety_margin=0.0,  # the cache holds the longest sequences as it is
            return_logprobs=settings.do_sample,
            # A graph could not give sets, whose size is not known before.
            **({"use_cuda_graph": False, "use_async_batching": False} if self.sampling.truncates else {}),
            disable_nccl_graph_mixing=False,  # for tensor parallelism; True sets an environment variable
            seed=self._seed(step, self.world.rank),
        )
        manager = self.model.init_continuous_batching(settings, config)
        # They are queued before the thread starts, so that its results depend on nothing but them, bit by bit.
        names = manager.add_requests(prompts, max_new_tokens=settings.max_new_tokens)
        seen = _SeenBatches(names) if self.sampling.truncates else None
        if seen is not None:  # last of the processors, and with an argument for each request: its number
            processors = manager.logit_processor
            if self.sampling.min_p > 0:  # each row by itself, though transformers warns that it might not be fit for this
                processors.logits_processor.append(MinPLogitsWarper(self.sampling.min_p))
            processors.logits_processor.append(seen)
            processors.tensors_required += 1
            processors.do_processing = True
        gc.freeze()  # the manager collects garbage twice, 0.2 s each if it had to look at everything alive
        outputs: dict[str, Any] = {}
        try:
            manager.warmup()  # the cache is made in this thread, so that its errors are raised here
            manager.start()
            while len(outputs) < len(names) and manager.is_running():
                self._ask()
                if (output := manager.get_result(timeout=1)) is not None:
                    outputs[output.request_id] = output
        except MemoryError as error:
            raise ConfigError(f"rollout.sequences: {self.sequences} given, accepted are fewer: {error}") from error
        finally:
            if manager.is_running():  # it has nothing left to do, or this thread was interrupted
                manager.stop(hard_stop=True)
            gc.unfreeze()
        outputs |= {output.request_id: output for output in iter(manager.get_result, None)}  # they came while the thread died
        for number, name in enumerate(names, 1):
            failure = outputs[name].error if name in outputs else "no result"
            if failure is not None:
                cause = manager.background_thread_status.fatal_error
                raise RuntimeError(f"rollout: response {number} of {len(names)} failed: {failure}") from cause
        tokens = [outputs[name].generated_tokens for name in names]
        logprobs = [outputs[name].logprobs if settings.do_sample else None for name in names]
        kept = seen.sets.of(tokens) if seen is not None else [None] * len(names)
        return [Response(*response) for response in zip(tokens, logprobs, kept, strict=True)]


class Generate(_Transformers):
    """The engine of transformers' ``generate``: left-padded batches of ``sequences`` run until their longest response ends."""

    _attention = "sdpa"

    def _responses(self, prompts: list[list[int]], settings: GenerationConfig, step: int) -> list[Response]:
        responses: list[Response] = []
        for start in range(0, len(prompts), self.sequences):
            torch.manual_seed(self._seed(step, self.world.rank, start))
            responses += self._together(prompts[start : start + self.sequences], settings)
        return responses

    def _together(self, prompts: list[list[int]], settings: GenerationConfig) -> Iterator[Response]:
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[settings.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        drawn = _Drawn(self.sampling.truncates) if settings.do_sample else None
        asking = _Asking(self._ask) if self.sampling.stop is not None else None
        # transformers puts its own after those it is given, and what is drawn from is to be seen after all of them.
        warpers = _warpers(self.sampling) if settings.do_sample else []
        if settings.do_sample:
            settings.update(temperature=1.0, top_k=0, top_p=1.0)
        sequences = self.model.generate(
            torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            generation_config=settings,
            logits_processor=[processor for processor in (asking, *warpers, drawn) if processor is not None],
            synced_gpus=False,  # every rank has the whole weights and generates by itself
        )
        ends = settings.eos_token_id or []
        logprobs = drawn.until(sequences).tolist() if drawn else [None] * len(prompts)
        tokens = []
        for row in sequences[:, width:].tolist():
            length = next((i for i, token in enumerate(row, 1) if token in ends), len(row))
            tokens.append(row[:length])
        kept = drawn.sets.of(tokens) if drawn and drawn.sets else [None] * len(prompts)
        for own, row, sets in zip(tokens, logprobs, kept, strict=True):
            yield Response(own, row and row[: len(own)], sets)


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Return what transformers makes of logits before it draws, in its order."""
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))] if sampling.temperature != 1 else []
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


class _Sets:
    """The ids that were kept of the scores of many sequences, step after step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # numbers [n] and sizes [n] of a step's sequences, ids [m] of all

    def add(self, numbers: Tensor, scores: Tensor) -> None:  # [n], [n, V]
        """Note what of the ``scores`` that tokens are drawn from is above −inf, in a step of the sequences of these ``numbers``."""
        kept = scores > -math.inf
        numbers = numbers.to("cpu", copy=True)  # their memory is that of the next step, too
        self.steps.append((numbers, kept.sum(1).cpu(), kept.nonzero()[:, 1].int().cpu()))

    def of(self, responses: Sequence[Sequence[int]]) -> list[KeptSets]:
        """Return the sets of ``responses``, whose sequences are numbered from 0. Steps after a response's end are left out."""
        numbers, sizes, ids = (torch.cat(parts) for parts in zip(*self.steps, strict=True))
        ids = ids[numbers.repeat_interleave(sizes).sort(stable=True).indices]
        numbers, order = numbers.sort(stable=True)
        sizes = sizes[order]
        first_steps = torch.searchsorted(numbers, torch.arange(len(responses) + 1, dtype=numbers.dtype)).tolist()
        first_ids = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        found = []
        for number, tokens in enumerate(responses):
            first, last = first_steps[number], first_steps[number] + len(tokens)
            if last > first_steps[number + 1]:
                raise RuntimeError(f"rollout: a response of {len(tokens)} tokens has {first_steps[number + 1] - first} sets")
            found.append(_kept_sets(tokens, ids[first_ids[first] : first_ids[last]], sizes[first:last]))
        return found


def _kept_sets(tokens: Sequence[int], ids: Tensor, sizes: Tensor) -> KeptSets:  # [T], [M], [T]
    """Return the sets of a response. Raise RuntimeError where one lacks its token: it would be another's."""
    drawn, steps = torch.tensor(tokens, dtype=ids.dtype), torch.arange(len(sizes)).repeat_interleave(sizes)
    there = torch.zeros(len(sizes), dtype=torch.bool).index_fill_(0, steps[ids == drawn[steps]], True)
    if not there.all():
        raise RuntimeError(f"rollout: token {int((~there).nonzero()[0])} of a response is not in the set it was drawn from")
    return KeptSets(array("i", ids.tolist()), array("i", sizes.tolist()))


class _SeenBatches(ContinuousBatchingLogitsProcessor):
    """A processor that changes nothing and notes the sets of each sequence of a continuous batch. Its argument for a request is the
    place of the request's name among ``names``, and −1 for those of a warm-up."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, names: Sequence[str]) -> None:
        self.numbers, self.sets = {name: number for number, name in enumerate(names)}, _Sets()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(-1)

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        numbers = [self.numbers.get(request.state.request_id, -1) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # [n, V], [n or more]
        self.sets.add(tensor_arg[: len(scores)], scores)
        return scores


class _Drawn(LogitsProcessor):
    """A processor that changes nothing and notes the log-prob of each drawn token, [B] a step, and, where it ``keeps`` them, the
    sets they were drawn from, without keeping any [B, V]. It is the last one."""

    def __init__(self, keeps: bool) -> None:
        self.columns: list[Tensor] = []
        self.scores: Tensor | None = None  # those of the last step, from which no token was drawn yet
        self.sets = _Sets() if keeps else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, S], [B, V]
        if self.scores is not None:
            self._draw(input_ids)
        self.scores = scores
        if self.sets is not None:
            self.sets.add(torch.arange(len(scores), device=scores.device), scores)
        return scores

    def until(self, sequences: Tensor) -> Tensor:
        """Return the log-probs [B, T] of the last T tokens of ``sequences[B, S + T]``, which are all that were drawn."""
        self._draw(sequences)
        return torch.stack(self.columns, 1)

    def _draw(self, input_ids: Tensor) -> None:
        assert self.scores is not None  # at least one token is generated
        self.columns.append(self.scores.gather(1, input_ids[:, -1:]).squeeze(1) - self.scores.logsumexp(1))


class _Asking(LogitsProcessor):
    """A processor that changes nothing and calls ``ask``, which may raise, before each token."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self.ask = ask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ask()
        return scores


_ENGINES = {"continuous": ContinuousBatching, "generate": Generate}


@dataclass(frozen=True)
class VLLM(_Engine):
    """The engine of vLLM, one per rank, in this process and on the GPU that trains: between calls it sleeps and frees its memory.

    Weights are pushed before every call, so the samples are always those of the model as it is.

    It is written against the source of vLLM 0.33 and tested against an imitation of it; it has never run on a GPU here. Its sampler
    applies ``min_p`` before ``top_k`` and ``top_p``, and gives sets only with a ``top_k``, which bounds them.
    """

    llm: Any  # vllm.LLM

    def generate(self, prompts: Sequence[Sequence[int]], n: int, step: int) -> list[Sample]:
        import vllm

        ends, greedy = self.ends, self.sampling.temperature == 0
        settings = [
            vllm.SamplingParams(
                n=1 if greedy else n,  # vLLM refuses more
                temperature=self.sampling.temperature,
                top_k=self.sampling.top_k,
                top_p=self.sampling.top_p,
                min_p=self.sampling.min_p,
                max_tokens=self.sampling.max_new_tokens,
                seed=self._seed(step, self.world.rank, number),  # the seeds of the n responses count on from it
                logprobs=None if greedy else 0,  # 0 others beside the drawn token's
                stop_token_ids=ends,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        torch.cuda.empty_cache()  # vLLM cannot wake up in memory that torch has reserved
        try:
            self.llm.wake_up(tags=["weights"])
            self.llm.apply_model(self._push)
            self.llm.wake_up(tags=["kv_cache"])
            self.llm.reset_prefix_cache()
            requests = [vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
            outputs = self.llm.generate(requests, settings, use_tqdm=False) if requests else []
        finally:
            self.llm.sleep(level=1)  # level 2 loses state of some models: vllm#29341, NeMo-RL#2631
        samples = [
            _vllm_sample(prompt, response, ends, self.sampling.truncates)
            for prompt, output in zip(prompts, outputs, strict=True)
            for response in output.outputs * (n if greedy else 1)
        ]
        if len(samples) != len(prompts) * n:
            raise RuntimeError(f"rollout: vLLM gave {len(samples)} responses to {len(prompts)} prompts, {n} each were asked for")
        return samples

    def _push(self, engine_model: Any) -> None:
        """Load the model's weights, each gathered from its shards in turn (a collective), into vLLM's model."""
        parameters = self.model.named_parameters()
        loaded = engine_model.load_weights((name, full(parameter.detach())) for name, parameter in parameters)
        if loaded is not None and (missing := {name for name, _ in engine_model.named_parameters()} - loaded):
            raise RuntimeError(f"rollout: vLLM's model has parameters that the trained one lacks: {', '.join(sorted(missing))}")


def _vllm_sample(prompt: Sequence[int], response: Any, ends: list[int], truncates: bool) -> Sample:
    tokens, kept = list(response.token_ids), None
    logprobs = response.logprobs and [drawn[token].logprob for token, drawn in zip(tokens, response.logprobs, strict=True)]
    if truncates:
        mask = getattr(response, "sampling_mask", None)
        if mask is None:
            raise RuntimeError("rollout: vLLM gave no sampling_mask, accepted with top_k, top_p and min_p are versions that do")
        rows = mask.token_ids
        sizes = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        if len(sizes) != len(tokens):
            raise RuntimeError(f"rollout: a response of {len(tokens)} tokens has {len(sizes)} sets")
        kept = _kept_sets(tokens, torch.tensor([id_ for row in rows for id_ in row], dtype=torch.int32), sizes)
    return Sample(prompt, tokens, logprobs, tokens[-1] in ends, kept)


def _start_vllm(
    model: PreTrainedModel, world: World, sequences: int, longest: int | None, precision: str, memory: float, truncates: bool
) -> Any:
    # The engine runs in this process, so that its model can be reached, and finds the variables of torchrun, whoever set them.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", 0), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    try:
        import vllm
    except ImportError as error:
        remedy = "accepted are continuous, generate, and vllm where it is installed: pip install vllm"
        raise ConfigError(f"rollout.engine: 'vllm' given, {remedy} ({error})") from error
    llm = vllm.LLM(
        model=model.name_or_path,
        load_format="dummy",  # the weights are pushed
        dtype=precision,
        skip_tokenizer_init=True,
        generation_config="vllm",  # not the checkpoint's own
        max_model_len=longest,
        max_num_seqs=sequences,
        gpu_memory_utilization=memory,
        logprobs_mode="processed_logprobs",  # after temperature, and what cuts off
        **({"return_sampling_mask": True} if truncates else {}),  # which older versions do not know
        distributed_executor_backend="external_launcher",  # each rank has its own engine, within the trainer's process group
        tensor_parallel_size=1,
        enable_sleep_mode=True,
    )
    llm.sleep(level=1)
    return llm
