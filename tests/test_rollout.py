"""Rollouts: what every engine must do, continuous batching against generate, two ranks against one, vLLM against an imitation."""

import hashlib
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from models import LARGEST, tiny_model
from problems import first_of, policy_error
from ranks import on_ranks
from test_data import END, EOS, PAD, SPECIAL, START, characters
from torch import nn
from transformers import AttentionInterface, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bupo.attention import packed_options, training_attention
from bupo.batching import pack
from bupo.config import Hardware
from bupo.distributed import World, process_group, shard
from bupo.errors import ConfigError
from bupo.rollout import WHOLE, Rollout, Sample, Sampling, _Sets, _warpers, make_rollout, text_of
from bupo_kernels import policy_logprobs

ALONE = World(0, 1, torch.device("cpu"))
TOKENIZER = SimpleNamespace(eos_token_id=1, pad_token_id=0)  # all that an engine asks of one
ENGINES = ("continuous", "generate")


def engine(name: str, model: nn.Module, world: World = ALONE, sequences: int = 64, **sampling) -> Rollout:
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3} | sampling
    return make_rollout(name, model, TOKENIZER, Sampling(**options), world, sequences=sequences)


def random_prompts(count: int, longest: int, vocab: int = 61) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(2, vocab) for _ in range(source.randint(1, longest))] for _ in range(count)]


def responses(samples: list[Sample]) -> list[list[int]]:
    return [list(sample.response_ids) for sample in samples]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only wait for a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(params=ENGINES)
def name(request):
    return request.param


# ---- the same tokens


@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("llama", True), ("mistral", False)])
def test_continuous_batching_decodes_greedily_like_generate(family, tied):
    """Prompts of up to three pages of the cache, room for four of the nine sequences, responses that end and that do not."""
    model = tiny_model(family, tied=tied)
    model.generation_config.eos_token_id = [1, *range(20, 32)]
    prompts = random_prompts(9, 80)
    together, one_by_one = (
        engine(name, model, sequences=room, temperature=0.0).generate(prompts, 1, 1)
        for name, room in (("continuous", 4), ("generate", 1))
    )
    assert together == one_by_one
    assert {sample.finished for sample in together} == {True, False}
    assert len({len(sample.response_ids) for sample in together}) > 2
    assert [sample.prompt_ids for sample in together] == prompts


def test_greedy_decoding_takes_the_most_likely_token(model, name):
    for sample in engine(name, model, temperature=0.0).generate(random_prompts(3, 9), 2, 1):
        logits = model(torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0]
        assert logits.argmax(-1)[len(sample.prompt_ids) - 1 : -1].tolist() == sample.response_ids
        assert sample.logprobs is None


def test_greedy_decoding_sees_the_smallest_difference(model, name):
    """Logits that differ although their probabilities, rounded, do not."""
    logits = torch.zeros(61)
    logits[10], logits[40] = 0.3, torch.tensor(0.3).nextafter(torch.tensor(1.0))
    assert logits.softmax(-1).argmax() == 10

    def replace_logits(module, arguments, output):
        output.logits[:] = logits

    model.register_forward_hook(replace_logits)
    [sample] = engine(name, model, temperature=0.0).generate([[5, 6]], 1, 1)
    assert sample.response_ids == [40] * 12


def test_no_more_sequences_run_at_a_time_than_asked_for(model, name):
    rows = []
    model.register_forward_hook(lambda module, arguments, output: rows.append(output.logits.shape[:2].numel()))
    samples = engine(name, model, sequences=3).generate(random_prompts(5, 30), 4, 1)
    assert len(samples) == 20
    assert max(rows) == 3


def test_all_the_tokens_that_end_a_sequence_end_it(model, name):
    model.generation_config.eos_token_id = [20, 30, 40]
    samples = engine(name, model, max_new_tokens=20).generate(random_prompts(4, 9), 10, 1)
    ends = {1, 20, 30, 40}
    assert {sample.response_ids[-1] for sample in samples if sample.finished} == ends
    for sample in samples:
        assert not ends & set(sample.response_ids[:-1])
        assert sample.finished == (sample.response_ids[-1] in ends)
        assert sample.finished or len(sample.response_ids) == 20


def test_tokens_beyond_the_embedding_neither_pad_nor_end_a_response(model, name, monkeypatch):
    """As of a tokenizer to which a [PAD] was added, the embedding left as it was. Prompts and responses have different lengths."""
    expected = engine(name, model).generate(random_prompts(4, 9), 4, 1)
    assert len({len(sample.response_ids) for sample in expected}) > 1
    monkeypatch.setattr(TOKENIZER, "pad_token_id", 61)
    monkeypatch.setattr(TOKENIZER, "eos_token_id", 62)
    assert engine(name, model).ends == [1]  # the checkpoint's own
    assert engine(name, model).generate(random_prompts(4, 9), 4, 1) == expected


def test_settings_of_the_checkpoint_do_not_bend_the_policy(model, name):
    own = model.generation_config
    plain = {t: engine(name, model, temperature=t).generate([[5, 6]], 8, 1) for t in (0.0, 1.0)}
    bent = {"repetition_penalty": 5.0, "min_p": 0.9, "top_k": 2, "top_p": 0.1, "temperature": 9.0, "no_repeat_ngram_size": 1}
    model.generation_config = bent = GenerationConfig(eos_token_id=own.eos_token_id, do_sample=True, min_new_tokens=12, **bent)
    assert {t: engine(name, model, temperature=t).generate([[5, 6]], 8, 1) for t in (0.0, 1.0)} == plain
    assert model.generation_config is bent


def test_an_update_of_the_weights_leaves_nothing_behind(model):
    prompts, greedy = [random_prompts(40, 61)[0] * 2 + [i] for i in range(2, 6)], {"temperature": 0.0}
    before = engine("continuous", model, **greedy).generate(prompts, 2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = engine("continuous", model, **greedy).generate(prompts, 2, 1)
    assert responses(after) == responses(engine("generate", model, **greedy).generate(prompts, 2, 1)) != responses(before)


# ---- the same distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_that_training_computes(model, name, temperature):
    model.generation_config.eos_token_id = [1, 20, 30]
    samples = engine(name, model, sequences=5, temperature=temperature).generate(random_prompts(7, 40), 2, 1)
    assert {sample.finished for sample in samples} == {True, False}
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        expected = policy_logprobs(model, ids[:, :-1], ids[:, 1:], temperature=temperature).logprobs[
            0, len(sample.prompt_ids) - 1 :
        ]
        assert (torch.tensor(sample.logprobs) - expected).abs().max() <= 2 * policy_error(model.config, 60, LARGEST / temperature)


CUTS = [
    {"top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.2},
    {"top_p": 0.8, "temperature": 0.7},
    {"top_k": 9, "min_p": 0.05, "temperature": 1.3},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
]


def gaps(model: nn.Module, samples: list[Sample], temperature: float, *, on_sets: bool) -> torch.Tensor:
    """How far the log-probs that training has are from the sampler's, on the sets that the sampler kept or on the vocabulary."""
    batch = pack(samples, [0.0] * len(samples), ALONE.device)
    options = {"support": batch.kept, "check": True} if on_sets else {}
    with torch.no_grad(), training_attention(model, "per-sequence"):
        own = policy_logprobs(
            model, batch.input_ids, batch.targets, temperature=temperature, **options, **packed_options(batch, "per-sequence")
        )
    return (own.logprobs - batch.sampler_logprobs)[batch.mask].abs()


@pytest.mark.parametrize("cut", first_of(CUTS[::-1]), ids=str)
def test_logprobs_on_the_kept_sets_are_the_samplers(model, name, cut):
    model.generation_config.eos_token_id = [1, 20, 30]
    samples = engine(name, model, sequences=5, **cut).generate(random_prompts(7, 40), 2, 1)
    assert {sample.finished for sample in samples} == {True, False}
    temperature = cut.get("temperature", 1.0)
    assert gaps(model, samples, temperature, on_sets=True).max() <= min(
        1e-4, 2 * policy_error(model.config, 60, LARGEST / temperature)
    )
    assert gaps(model, samples, temperature, on_sets=False).mean() > 0.05  # what a trainer without the sets would be off by
    sizes = [size for sample in samples for size in sample.kept.sizes]
    assert 1 < sum(sizes) / len(sizes) < 61
    if cut == {"top_k": 5}:
        assert set(sizes) == {5}
    assert engine(name, model, sequences=5, **cut).generate(random_prompts(7, 40), 2, 1) == samples


def test_what_is_sampled_whole_or_greedily_has_no_sets(model, name):
    for sampling in ({}, {"temperature": 0.0, "top_p": 0.5}, WHOLE):
        [sample] = engine(name, model, **sampling).generate([[5, 6]], 1, 1)
        assert sample.kept is None


def test_a_token_outside_its_set_is_noticed():
    """As if the steps of two sequences had been mixed up."""
    sets = _Sets()
    scores = torch.full((2, 5), -torch.inf)
    scores[0, :2], scores[1, 2:] = 0.0, 0.0
    sets.add(torch.tensor([0, 1]), scores)
    assert [list(kept.ids) for kept in sets.of([[1], [4]])] == [[0, 1], [2, 3, 4]]
    with pytest.raises(RuntimeError, match="rollout: token 0 of a response is not in the set it was drawn from"):
        sets.of([[4], [1]])
    with pytest.raises(RuntimeError, match="rollout: a response of 2 tokens has 1 sets"):
        sets.of([[1, 1], [4]])


def test_samples_follow_the_softmax(name):
    """All of it: the 11 least likely of 61 tokens count as one, which the top 50 would leave out."""
    model, count, temperature = tiny_model(layers=1), 2000, 2.0
    rollout = engine(name, model, sequences=100, max_new_tokens=1, temperature=temperature)
    drawn = Counter(sample.response_ids[0] for sample in rollout.generate([[5, 7, 3]], count, 1))
    expected, order = (model(torch.tensor([[5, 7, 3]])).logits[0, -1] / temperature).softmax(-1).mul(count).sort(descending=True)
    observed = torch.tensor([float(drawn[token]) for token in order.tolist()])
    observed, expected = (torch.cat([x[:50], x[50:].sum(0, keepdim=True)]) for x in (observed, expected))
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 86.7  # 1 in 1000 with 50 degrees of freedom


# ---- the same samples


def test_samples_depend_on_seed_stream_step_and_rank_alone(model, name):
    prompts = random_prompts(3, 9)
    rollout = engine(name, model)
    first = rollout.generate(prompts, 4, step=1)
    state = torch.get_rng_state()
    others = [
        rollout.generate(prompts, 4, step=2),
        rollout.with_sampling(seed=4).generate(prompts, 4, step=1),
        rollout.with_sampling(stream="evaluation").generate(prompts, 4, step=1),
        engine(name, model, World(1, 2, ALONE.device)).generate(prompts, 4, step=1),
    ]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    assert rollout.generate(prompts, 4, step=1) == first
    assert all(responses(first) != responses(other) for other in others)
    assert len({tuple(response) for response in responses(first)}) == 12
    assert rollout.sampling == Sampling(12, 1.0, 3)


def test_slow_queueing_changes_nothing(model, monkeypatch):
    """Were requests queued while the manager runs, the first batches would hold as many as had made it."""
    rollout, prompts, add = engine("continuous", model), random_prompts(6, 30), ContinuousBatchingManager.add_request

    def add_slowly(*arguments, **options):
        time.sleep(0.02)
        return add(*arguments, **options)

    quick = rollout.generate(prompts, 2, 1)
    monkeypatch.setattr(ContinuousBatchingManager, "add_request", add_slowly)
    assert rollout.generate(prompts, 2, 1) == quick


# ---- the model as it was


@contextmanager
def unchanged(model):
    """Asserts that nothing of what an engine switches stays switched, threads included."""
    AttentionInterface.register("of_the_trainer", sdpa_attention_forward)
    model.train().config._attn_implementation = "of_the_trainer"
    settings, state, threads = model.generation_config, torch.get_rng_state(), threading.active_count()
    yield
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "of_the_trainer"
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == threads
    assert torch.is_grad_enabled()


def test_a_model_in_training_generates_as_in_evaluation(model, name):
    plain = engine(name, model).generate(random_prompts(3, 9), 2, 1)
    implementations = set()
    model.register_forward_hook(lambda module, *_: implementations.add((module.training, module.config._attn_implementation)))
    model.gradient_checkpointing_enable()
    with unchanged(model):
        assert engine(name, model).generate(random_prompts(3, 9), 2, 1) == plain
    assert len(implementations) == 1
    assert not any(training or attention == "of_the_trainer" for training, attention in implementations)


def test_a_failing_model_raises_and_leaves_everything_in_order(model, name):
    forwards = []

    def fail(*_):
        forwards.append(1)
        if len(forwards) == 3:
            raise ValueError("boom")

    hook = model.register_forward_pre_hook(fail)
    expected = (RuntimeError, "response 1 of 6 failed: boom") if name == "continuous" else (ValueError, "boom")
    with unchanged(model):
        with pytest.raises(expected[0], match=expected[1]) as error:
            engine(name, model).generate(random_prompts(3, 9), 2, 1)
        assert name == "generate" or isinstance(error.value.__cause__, ValueError)
        hook.remove()
        assert len(engine(name, model).generate(random_prompts(3, 9), 2, 1)) == 6


def test_an_interrupt_ends_the_generating_thread(model):
    def interrupt(*_):
        raise KeyboardInterrupt

    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with unchanged(model):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                engine("continuous", model, max_new_tokens=1000).generate(random_prompts(3, 9), 2, 1)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_cache_beyond_memory_names_the_key(model):
    with unchanged(model), pytest.raises(ConfigError, match=r"rollout.sequences: 64 given, accepted are fewer"):
        engine("continuous", model, max_new_tokens=10**12).generate([[5]], 2, 1)


def test_without_prompts_the_model_does_not_run(model, name):
    model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    assert engine(name, model).generate([], 4, 1) == []


def test_an_unknown_engine_is_refused(model):
    with pytest.raises(ValueError, match="engine: 'sglang' given, accepted are continuous, generate, vllm"):
        engine("sglang", model)


# ---- text


def test_a_response_is_shown_as_it_was_generated_without_what_ends_and_pads_it():
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer = characters("<bos>", special=[*SPECIAL, *tags])
    tokenizer.clean_up_tokenization_spaces = True  # as a checkpoint may ask for: it would take the space before the full stop
    response = "<think>a .</think><answer>3</answer>"
    ids = [*tokenizer(response, add_special_tokens=False).input_ids, END, PAD, EOS]
    options = {"tokenizer": tokenizer, "ends": [EOS, END]}
    assert text_of(ids, **options, skip_special_tokens=False) == response
    assert text_of(ids, **options, skip_special_tokens=True) == "a .3"
    assert text_of([START, *ids], **options, skip_special_tokens=False) == "<|im_start|>" + response


# ---- many ranks


def test_sharded_ranks_generate_what_one_process_does():
    """Also two new processes give the same bits as one another."""
    digests = {output.split()[-1] for output in on_ranks("test_rollout:generate_on_a_rank", 2)}
    assert len(digests) == 1


def generate_on_a_rank() -> None:
    plain = tiny_model()
    prompts = random_prompts(5, 40)
    with process_group(Hardware(device="cpu")) as world:
        mine = [prompts[:3], prompts[3:]][world.rank]
        for precision, tied in (("float32", False), ("bfloat16", True)):
            whole = tiny_model(tied=tied).to(getattr(torch, precision))
            whole.model.rotary_emb = plain.model.rotary_emb  # buffers stay in float32
            sharded = shard(tiny_model(tied=tied), world, Hardware(precision=precision))
            sharded.train()
            for name in ENGINES:
                for part, n in ((mine, 2), ([[], mine][world.rank], 1)):
                    sampled = engine(name, sharded, world).generate(part, n, 1)
                    assert sampled == engine(name, whole, world).generate(part, n, 1)
                    assert len(sampled) == len(part) * n
            assert sharded.training
            ids = torch.tensor([prompts[0] + [1]])
            sharded(ids, labels=ids, use_cache=False).loss.backward()  # communicates again
        with imitated_vllm(whole):
            rollout = engine("vllm", sharded, world)
            assert len(rollout.generate([[], mine][world.rank], 2, 1)) == [0, 4][world.rank]
            assert all(torch.equal(p, q) for p, q in zip(rollout.llm.engine.parameters(), whole.parameters(), strict=True))
    samples = engine("continuous", plain, sequences=4).generate(prompts, 3, 1)
    print(hashlib.sha256(repr([asdict(sample) for sample in samples]).encode()).hexdigest())


# ---- vLLM: an imitation of version 0.33, with the names, the defaults and the refusals of its source


@dataclass(frozen=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self):
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")


class LLM:
    """Generates with a model of its own, made at random as ``load_format="dummy"`` does, into which weights can be loaded."""

    def __init__(
        self,
        model: str,
        *,
        load_format: str = "auto",
        dtype: str = "auto",
        skip_tokenizer_init: bool = False,
        generation_config: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float = 0.92,
        logprobs_mode: str = "raw_logprobs",
        distributed_executor_backend: str | None = None,
        tensor_parallel_size: int = 1,
        enable_sleep_mode: bool = False,
        return_sampling_mask: bool = False,
    ):
        self.options = {name: value for name, value in locals().items() if name != "self"}
        self.asleep, self.calls = set(), []
        self.engine = tiny_model(seed=99, tied=LLM.like.config.tie_word_embeddings).to(LLM.like.dtype)
        self.engine.load_weights = self._load_weights

    def _load_weights(self, weights) -> set[str]:
        assert "weights" not in self.asleep
        own, loaded = dict(self.engine.named_parameters()), set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            loaded.add(name)
        return loaded

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.options["enable_sleep_mode"]
        self.asleep = {"weights", "kv_cache"}
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.asleep -= set(tags or self.asleep)
        self.calls.append(f"wake {tags}")
        return not self.asleep

    def apply_model(self, func) -> list:
        self.calls.append("apply_model")
        return [func(self.engine)]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True) -> list[SimpleNamespace]:
        assert not self.asleep
        assert len(prompts) == len(sampling_params)
        assert not use_tqdm
        self.calls.append("generate")
        self.asked = sampling_params
        return [
            SimpleNamespace(outputs=self._answers(p["prompt_token_ids"], s)) for p, s in zip(prompts, sampling_params, strict=True)
        ]

    @torch.no_grad()
    def _answers(self, prompt: list[int], params: SamplingParams) -> list[SimpleNamespace]:
        answers = []
        for child in range(params.n):
            generator, tokens, logprobs, masks = torch.Generator().manual_seed(params.seed + child), [], [], []
            cut = Sampling(0, params.temperature, 0, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
            while len(tokens) < params.max_tokens and tokens[-1:] not in [[end] for end in params.stop_token_ids]:
                logits = self.engine(torch.tensor([prompt + tokens])).logits[0, -1].float()
                for warper in _warpers(cut) if params.temperature else []:
                    logits = warper(None, logits[None])[0]
                scaled = logits.log_softmax(-1)
                masks.append(scaled.isfinite().nonzero().squeeze(1).tolist())
                token = torch.multinomial(scaled.exp(), 1, generator=generator) if params.temperature else scaled.argmax()
                tokens.append(token.item())
                logprobs.append({tokens[-1]: SimpleNamespace(logprob=scaled[token].item(), rank=1, decoded_token=None)})
            reason = "stop" if tokens[-1] in params.stop_token_ids else "length"
            given = None if params.logprobs is None else logprobs
            answers.append(SimpleNamespace(index=child, token_ids=tuple(tokens), logprobs=given, finish_reason=reason))
            if self.options["return_sampling_mask"]:
                answers[-1].sampling_mask = SimpleNamespace(token_ids=masks)
        return answers


@contextmanager
def imitated_vllm(like):
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt, LLM.like = LLM, SamplingParams, dict, like
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", vllm)
        for variable in ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.setenv(variable, "of the test")
            patch.delenv(variable)
        yield


@pytest.fixture
def vllm(model):
    with imitated_vllm(model):
        yield


def test_vllm_that_is_not_installed_is_named_with_the_remedy(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"rollout.engine: 'vllm' given, accepted are continuous, generate, .* pip install vllm"):
        engine("vllm", model)


@pytest.mark.usefixtures("vllm")
def test_vllm_answers_with_the_weights_of_the_moment(model):
    rollout, prompts = engine("vllm", model, temperature=0.0), random_prompts(3, 9)
    assert rollout.llm.options["load_format"] == "dummy"
    for _ in range(2):
        expected = engine("generate", model, temperature=0.0).generate(prompts, 2, 1)
        assert [asdict(sample) for sample in rollout.generate(prompts, 2, 1)] == [asdict(sample) for sample in expected]
        with torch.no_grad():
            model.model.embed_tokens.weight.add_(0.2 * torch.randn_like(model.model.embed_tokens.weight))


@pytest.mark.usefixtures("vllm")
def test_vllm_samples_with_the_logprobs_of_the_temperature_and_a_seed_for_each_prompt(model):
    model.generation_config.eos_token_id = [1, *range(20, 30)]
    rollout, prompts = engine("vllm", model, max_new_tokens=8, temperature=0.7), [[5, 6, 7]] * 2
    samples = rollout.generate(prompts, 3, 1)
    assert rollout.llm.options["logprobs_mode"] == "processed_logprobs"
    assert rollout.llm.options["generation_config"] == "vllm"
    assert {sample.finished for sample in samples} == {True, False}
    assert len({tuple(sample.response_ids) for sample in samples}) == 6
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        expected = policy_logprobs(model, ids[:, :-1], ids[:, 1:], temperature=0.7).logprobs[0, len(sample.prompt_ids) - 1 :]
        assert (torch.tensor(sample.logprobs) - expected).abs().max() <= 2 * policy_error(model.config, 60, LARGEST / 0.7)
        assert sample.finished == (sample.response_ids[-1] in model.generation_config.eos_token_id)
    assert rollout.generate(prompts, 3, 1) == samples
    assert responses(rollout.generate(prompts, 3, 2)) != responses(samples)
    assert responses(rollout.with_sampling(stream="evaluation").generate(prompts, 3, 1)) != responses(samples)


@pytest.mark.usefixtures("vllm")
def test_vllm_is_asked_for_its_sets_where_it_cuts_off(model):
    cut = {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7}
    rollout = engine("vllm", model, max_new_tokens=8, **cut)
    samples = rollout.generate([[5, 6, 7], [9]], 2, 1)
    assert rollout.llm.options["return_sampling_mask"]
    assert {max(sample.kept.sizes) <= 9 for sample in samples} == {True}
    assert gaps(model, samples, 0.7, on_sets=True).max() <= 2 * policy_error(model.config, 60, LARGEST / 0.7)
    rollout.llm.options["return_sampling_mask"] = False
    with pytest.raises(RuntimeError, match="rollout: vLLM gave no sampling_mask"):
        rollout.generate([[5, 6, 7]], 1, 1)
    assert not engine("vllm", model).llm.options["return_sampling_mask"]


@pytest.mark.usefixtures("vllm")
def test_vllm_wakes_for_the_weights_first_and_sleeps_whatever_happens(model):
    rollout = engine("vllm", model)
    woken = ["wake ['weights']", "apply_model", "wake ['kv_cache']", "reset_prefix_cache"]
    rollout.generate([[5]], 1, 1)
    assert rollout.llm.calls == ["sleep 1", *woken, "generate", "sleep 1"]
    rollout.llm.calls.clear()
    assert rollout.generate([], 1, 1) == []
    assert rollout.llm.calls == [*woken, "sleep 1"]
    rollout.llm.engine.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout.generate([[5]], 1, 1)
    assert rollout.llm.asleep == {"weights", "kv_cache"}


@pytest.mark.usefixtures("vllm")
def test_a_parameter_that_vllm_was_not_sent_raises(model):
    rollout = engine("vllm", model)
    rollout.llm.engine.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"lacks: extra\.bias, extra\.weight"):
        rollout.generate([[5]], 1, 1)
