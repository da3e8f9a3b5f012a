"""The training loop, top to bottom: rollouts, rewards, advantages, old log-probs, clipped updates."""

from __future__ import annotations

import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bupo.advantages import estimate_advantages
from bupo.architecture import check_fits, load_architecture
from bupo.attention import packed_options, training_attention
from bupo.batching import IGNORE, MicroBatch, fill, pack, pack_all, token_weights, tokens
from bupo.checkpoint import Checkpoints, last_step, require_space, space_needed
from bupo.config import BASE, TrainConfig, load_config
from bupo.cost import looks_of, parameters, training_flops, work_of
from bupo.data import Example, PromptOrder, load_examples, question, stream_seed
from bupo.distributed import Termination, World, as_forward, full, process_group
from bupo.errors import ConfigError
from bupo.evaluation import Accuracy, evaluate
from bupo.guard import PerplexityGuard
from bupo.kernels import keep_to_kernels, kernels_in_use
from bupo.model import export, export_type, keep_base, load_model, load_tokenizer, make_optimizer
from bupo.monitor import RunFolder
from bupo.output import FolderLock
from bupo.peaks import peak_flops
from bupo.rewards import RewardPool
from bupo.rollout import WHOLE, Rollout, Sample, Stopped, configured_decode, configured_rollout
from bupo.schedule import FINAL, OptimisedPolicy, Schedule, learning_rate
from bupo_kernels import PolicyMetrics, PolicyObjective, policy_logprobs, policy_loss, self_distillation_loss
from bupo_kernels.internal_policy import PolicyStates, policy_states, read_head
from bupo_kernels.policy_losses import top_entropy_bound

HOPELESS = 3  # steps without a single reward after which a run that begins with them ends


def train(config: TrainConfig) -> list[Accuracy]:
    """Train as ``config`` says, from the start or from the newest checkpoint in its run folder; return the held-out accuracies.

    Raises :class:`ConfigError`, before anything is written, when a value does not fit the model, the data or the machine; and when
    every reward of the first :data:`HOPELESS` steps failed. On SIGTERM the step is finished, or the evaluation given up, and a
    checkpoint written; the same call later goes on from there.
    """
    config = config.with_absolute_paths()
    lock = FolderLock(config.output_dir, "output_dir")
    with process_group(config.hardware) as world, Termination(world) as termination, lock, ExitStack() as closing:
        with world.agree():
            pool = closing.enter_context(RewardPool(**config.reward.model_dump()))
        setup = prepare(config, world, lock, pool)
        with opened(setup, lock) as run:
            run.say(describe_run(setup))
            return take_steps(setup, run, termination)


def take_steps(setup: Setup, run: RunFolder, termination: Termination) -> list[Accuracy]:
    """Take the steps that are left, export the model and return the held-out accuracies; return early on SIGTERM."""
    config, world, model, optimizer, last = setup.config, setup.world, setup.model, setup.optimizer, setup.last
    accuracies: list[Accuracy] = []
    scored = 0  # rewards that did not fail

    def due(step: int, every: int) -> bool:
        """Return whether a thing done every so many steps, 0 = never, is due after ``step``; the last step is a case apart."""
        return every > 0 and step % every == 0 and step < config.steps

    def log_accuracy(step: int) -> bool:
        """Return whether held-out accuracy is there now: on SIGTERM it is given up, and measured when the run goes on."""
        with suppress(Stopped):
            if setup.heldout:
                accuracies.append(evaluate_heldout(setup, partial(run.show_progress, "evaluation"), termination))
                run.log_accuracy(step, accuracies[-1])
            return True
        return False

    guarded = setup.schedule.needs_perplexity(last + 1)
    guard = PerplexityGuard(model, setup.rollout, setup.heldout, config, world, last) if guarded else None
    interrupted = due(last, config.evaluation.every) and not run.has_accuracy(last)
    if (last == 0 or interrupted) and not log_accuracy(last):
        run.say(f"SIGTERM: nothing was trained after step {last}; the same command goes on from there")
        return accuracies

    for step in range(last + 1, config.steps + 1):
        clock, policy = Clock(), setup.schedule.policy(step)
        rate = set_learning_rate(optimizer, learning_rate(step, config))

        # Rollouts come from the final policy in both phases.
        episodes = sample_episodes(setup, step, clock)
        samples, rewards, advantages = episodes.samples, episodes.rewards, episodes.advantages
        scored += int(rewards.isfinite().sum())
        if episodes.failure:
            run.say(f"step {step}: a reward failed: {episodes.failure}")

        # Everything in the loss is of the policy being optimised; the final policy is only looked at.
        with training_attention(model, config.hardware.attention):
            seen = look_around(setup, run, samples, policy, step, clock)
            seen["perplexity"] = None
            if guard and policy != FINAL:
                seen["perplexity"] = guard.measure(model)
                clock.lap("guard")
            mini_batches = [
                [with_old_logprobs(model, batch, policy, config) for batch in batches]
                for batches in make_mini_batches(samples, rewards, advantages, config, world)
            ]
            clock.lap("old")
            mini_batches = [of_highest_entropies(batches, config, world) for batches in mini_batches if batches]
            updates = [update(model, optimizer, batches, policy, config, world) for batches in mini_batches]
            clock.lap("update")

        metrics: dict[str, Any] = {"step": step, "phase": policy.phase, "learning_rate": rate, **seen, **describe_updates(updates)}
        metrics |= describe_samples(samples, rewards, advantages) | clock.seconds
        metrics |= describe_speed(samples, advantages, policy, clock.seconds, setup.architecture, config, world)
        if policy != FINAL:
            metrics["switched"] = setup.schedule.observe(
                step, metrics["reward"], seen["kl"], seen["perplexity"], seen["look_tokens"]
            )
        run.log_step(metrics)
        if scored == 0 and step == min(last + HOPELESS, config.steps):
            everything = f"for every response since step {last + 1}"
            with world.agree():
                raise ConfigError(f"reward.function: {config.reward.function!r} failed {everything}: {episodes.failure}")
        if step == 1 or step % config.telemetry.episodes_every == 0:
            first = samples[: config.rollout.samples], rewards[0].tolist(), advantages[0].tolist()
            run.log_episodes(step, policy.phase, episodes.examples[0], episodes.responses, *first)

        state, stop = {"schedule": setup.schedule.state_dict(), "kernels": kernels_in_use(world)}, termination.requested()
        if stop or step == config.steps or due(step, config.checkpoints.every):
            setup.checkpoints.save(step, model, optimizer, state)
        if due(step, config.evaluation.every) and not stop:
            stop = not log_accuracy(step)
        if stop and step < config.steps:
            setup.checkpoints.save(step, model, optimizer, state)
            run.say(f"SIGTERM: a checkpoint of step {step} is written; the same command goes on from there")
            return accuracies

    dtype = export_type(setup.architecture, config.checkpoints.export_dtype)
    export(model, setup.tokenizer, config.output_dir / "model", world, dtype)
    run.say(f"the model is in {config.output_dir / 'model'}, in {str(dtype).removeprefix('torch.')}")
    if not log_accuracy(config.steps):
        run.say("SIGTERM: its last evaluation is missing; the same command makes it")
        return accuracies
    run.say(f"picture, metrics, episodes, checkpoints and the model are in {config.output_dir}")
    return accuracies


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, as the newest checkpoint left it."""

    config: TrainConfig
    world: World
    pool: RewardPool
    architecture: PretrainedConfig
    source: str  # the folder or hub name that architecture and tokenizer come from
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    checkpoints: Checkpoints
    last: int  # the step of the checkpoint the run goes on from, or 0
    rollout: Rollout
    decode: Callable[[Sequence[int]], str]  # turns the tokens of a response into text
    order: PromptOrder
    heldout: list[Example]


def prepare(config: TrainConfig, world: World, lock: FolderLock, pool: RewardPool) -> Setup:
    """Make or load everything a run needs. Nothing is written but the ``lock`` of a folder that was begun.

    Raises :class:`ConfigError`.
    """
    with world.agree():
        if world.main and (config.output_dir / "config.yaml").exists():
            lock.take()
    checkpoints = Checkpoints(config.output_dir / "checkpoints", config.checkpoints.keep, world)
    steps = checkpoints.steps()
    with world.agree():
        last = last_step(config, steps)
        source = model_source(config) if last else config.model
        architecture = load_architecture(config.model_copy(update={"model": source}))
        check_fits(architecture, config)
        require_space(config.output_dir, space_needed(parameters(architecture).total, config.checkpoints.keep))
        tokenizer = load_tokenizer(source)
        load = partial(load_examples, data=config.data, tokenizer=tokenizer, columns=pool.columns, vocab=architecture.vocab_size)
        examples = load(config.data.train, key="data.train")
        heldout = load(config.heldout, key="data.heldout")
    model = load_model(source, config.hardware, world, weights=not last)
    optimizer, schedule = make_optimizer(model, config.optimizer), Schedule(config)
    if last:
        state = checkpoints.newest(lambda step: checkpoints.load(step, model, optimizer))
        last = state["step"]
        schedule.load_state_dict(state["schedule"])
        if "kernels" in state:  # which earlier versions did not write
            keep_to_kernels(state["kernels"], world)
    with world.agree():
        rollout = configured_rollout(config, model, tokenizer, world)
    return Setup(
        config=config,
        world=world,
        pool=pool,
        architecture=architecture,
        source=source,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        checkpoints=checkpoints,
        last=last,
        rollout=rollout,
        decode=configured_decode(config, tokenizer, rollout),
        order=PromptOrder(examples, config.rollout.prompts, config.seed),
        heldout=heldout,
    )


def model_source(config: TrainConfig) -> str:
    """Return where config and tokenizer come from when a run goes on.

    That is the model's folder; where it is gone, or the model is a name on the hub, the run's own copy, unless ``config`` names
    another model than before.
    """
    copy = config.output_dir / BASE
    with suppress(ConfigError):  # the configuration of before may be unreadable
        before = config.output_dir / "config.yaml"
        if not Path(config.model).exists() and copy.is_dir() and load_config(before).model == config.model:
            return str(copy)
    return config.model


@contextmanager
def opened(setup: Setup, lock: FolderLock) -> Iterator[RunFolder]:
    """Open the run folder, which from here on this job alone writes. Raises :class:`ConfigError`."""
    config, world, copy = setup.config, setup.world, setup.config.output_dir / BASE
    with ExitStack() as closing:
        with world.agree():
            run = RunFolder(config, world, setup.last)
            if world.main and not lock.taken:
                lock.take()
                if (config.output_dir / "config.yaml").exists():
                    raise ConfigError(f"output_dir: {config.output_dir} was begun by another process, accepted is a new folder")
            closing.enter_context(run)
            if world.main and setup.source != str(copy):
                keep_base(setup.source, setup.tokenizer, copy)
        yield run


class Episodes(NamedTuple):
    """The responses of a step to P prompts, G to each, on all ranks, and what they are worth."""

    examples: list[Example]  # P
    samples: list[Sample]  # P · G, those of one prompt together
    responses: list[str]  # the texts of the first prompt's samples
    rewards: Tensor  # [P, G], NaN where a reward failed
    advantages: Tensor  # [P, G]
    failure: str | None  # how one of the rewards failed


def sample_episodes(setup: Setup, step: int, clock: Clock) -> Episodes:
    """Sample and score responses to this rank's share of the step's prompts; return those of all ranks. A collective."""
    config, world, group = setup.config, setup.world, setup.config.rollout.samples
    examples = setup.order.at(step)
    share = world.share(examples)
    samples = setup.rollout.generate([example.prompt_ids for example in share], group, step)
    clock.lap("rollout")
    responses = [setup.decode(sample.response_ids) for sample in samples]
    asked = [example for example in share for _ in range(group)]
    scores = setup.pool.score([question(e, r, s.response_ids) for e, r, s in zip(asked, responses, samples, strict=True)])
    failures = world.gather([setup.pool.last_failure] if any(map(math.isnan, scores)) else [])
    samples, responses = world.gather(samples), world.gather(responses[:group])
    rewards = torch.tensor(world.gather(scores)).view(len(examples), group)
    advantages = estimate_advantages(rewards, config.objective.advantage, config.objective.advantage_std)
    clock.lap("reward")
    return Episodes(examples, samples, responses[:group], rewards, advantages, failures[0] if failures else None)


def evaluate_heldout(setup: Setup, progress: Callable[[int, int], None], termination: Termination) -> Accuracy:
    """Return the held-out accuracy of the final policy. Raises :class:`Stopped` on SIGTERM. A collective."""
    evaluation = setup.config.evaluation
    return evaluate(
        setup.rollout.with_sampling(temperature=evaluation.temperature, **WHOLE),
        setup.decode,
        setup.heldout,
        setup.pool,
        setup.world,
        samples=evaluation.samples,
        ks=evaluation.k,
        seed=setup.config.seed,
        progress=progress,
        termination=termination,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Give each group of parameters its share of ``rate``; return ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * rate
    return rate


def make_mini_batches(
    samples: list[Sample], rewards: Tensor, advantages: Tensor, config: TrainConfig, world: World
) -> list[list[MicroBatch]]:
    """Return this rank's micro-batches of each optimizer step: as many on every rank, none where no sample has a gradient.

    Samples whose reward failed are left out. Those of zero advantage (their whole group was right, or wrong) add exactly nothing to
    loss and gradient: they count in the denominators, and cost nothing.
    """
    size = config.optimizer.mini_batch * config.rollout.samples
    scored, values = rewards.flatten().isfinite().tolist(), advantages.flatten().tolist()
    mini_batches = []
    for first in range(0, len(samples), size):
        counted = [i for i in range(first, first + size) if scored[i]]
        weights = token_weights([len(samples[i].response_ids) for i in counted], config.objective.aggregation)
        coefficients = {i: values[i] * weight for i, weight in zip(counted, weights, strict=True) if values[i] != 0}
        chosen = [samples[i] for i in coefficients]
        mini_batches.append(pack_all(chosen, [*coefficients.values()], config.hardware.max_tokens_per_device, world))
    return mini_batches


def batch_options(batch: MicroBatch, config: TrainConfig) -> dict[str, Any]:
    """Return the arguments that a call on ``batch`` needs, whatever its policy."""
    return packed_options(batch, config.hardware.attention) | {"temperature": config.rollout.temperature}


def call_options(batch: MicroBatch, policy: OptimisedPolicy, config: TrainConfig) -> dict[str, Any]:
    """Return the arguments that the log-probs, loss and divergence of ``policy`` on ``batch`` have in common: also that they are on
    the ids that the sampler kept, for an internal policy too."""
    return batch_options(batch, config) | {"support": batch.kept} | policy.options


@torch.no_grad()
def with_old_logprobs(model: PreTrainedModel, batch: MicroBatch, policy: OptimisedPolicy, config: TrainConfig) -> MicroBatch:
    """Return ``batch`` with the log-probs of its response tokens under ``policy`` as the weights stand, and their entropies where
    the objective asks for them."""
    options = call_options(batch, policy, config) | {"return_entropy": config.objective.top_entropy_quantile < 1}
    old = as_forward(policy_logprobs, model, batch.input_ids, batch.targets, **options)
    return replace(batch, old_logprobs=old.logprobs, old_entropy=old.entropy)


def of_highest_entropies(batches: list[MicroBatch], config: TrainConfig, world: World) -> list[MicroBatch]:
    """Return a mini-batch in which the share ``objective.top_entropy_quantile`` of the tokens of all ranks has a coefficient, those
    of the highest entropy before the step's updates; the others cost no product of the head. A collective.

    The tokens are those of samples with a gradient, as with DAPO's dynamic sampling, which the paper has (arXiv 2506.01939).
    """
    quantile = config.objective.top_entropy_quantile
    if quantile == 1:
        return batches
    pairs = [(batch, batch.old_entropy) for batch in batches if batch.old_entropy is not None]
    found = torch.cat(world.gather([entropy[batch.mask & (batch.coefficients != 0)].cpu() for batch, entropy in pairs]))
    bound = top_entropy_bound(found, torch.ones_like(found, dtype=torch.bool), quantile).to(world.device)
    return [replace(batch, coefficients=batch.coefficients * (entropy >= bound)) for batch, entropy in pairs]


class Update(NamedTuple):
    """The outcome of one optimizer step, over all ranks."""

    loss: float
    clipped: float  # tokens on which a clip decided
    kl_old: float  # summed over tokens
    tokens: float  # response tokens with a gradient
    jsd: float | None  # of the layer that OISD trains from the model's own policy, summed over tokens; None without
    jsd_attention: float | None  # the same of their attention
    ratio_max: float
    grad_norm: float  # before clipping
    micro_batches: int  # as many on each rank


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    policy: OptimisedPolicy,
    config: TrainConfig,
    world: World,
) -> Update:
    """Take one optimizer step on a mini-batch, its gradient summed over micro-batches and ranks.

    The weights of the aggregation are in the coefficients: a positive factor of an advantage is one of its term, clipped or not.
    """
    objective = policy_objective(config)
    sums, ratio_max = torch.zeros(6, device=world.device), torch.ones((), device=world.device)
    for batch in micro_batches:
        loss, metrics, *divergences = loss_of(model, batch, policy, objective, config)
        (loss * world.size).backward()  # FSDP averages over the ranks
        active, clipped = metrics.active_rows, metrics.clipped_low + metrics.clipped_high
        sums += torch.stack([loss.detach(), clipped * active, metrics.kl_old * active, active, *divergences])
        ratio_max = torch.maximum(ratio_max, metrics.ratio_max)
    grad_norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)).item()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"gradient norm {grad_norm}: the weights are as before this update, the last checkpoint is good")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    total_loss, clipped_rows, kl_old, rows, jsd, attention = world.sum(sums).tolist()
    return Update(
        loss=total_loss,
        clipped=clipped_rows,
        kl_old=kl_old,
        tokens=rows,
        jsd=jsd if config.distillation and config.distillation.weight else None,
        jsd_attention=attention if config.distillation and config.distillation.attention_weight else None,
        ratio_max=world.max(ratio_max).item(),
        grad_norm=grad_norm,
        micro_batches=len(micro_batches),
    )


def loss_of(
    model: PreTrainedModel, batch: MicroBatch, policy: OptimisedPolicy, objective: PolicyObjective, config: TrainConfig
) -> tuple[Tensor, PolicyMetrics, Tensor, Tensor]:
    """Return loss and metrics of a micro-batch, and the divergences of OISD summed over its tokens, 0 without it."""
    ids, targets, coefficients = batch.input_ids, batch.targets, batch.coefficients
    options: dict[str, Any] = {"old_logprobs": batch.old_logprobs, "objective": objective, "denominator": 1}
    options["lengths"] = batch.sequence_lengths if objective.needs_sequence else None
    none, taught = torch.zeros((), device=batch.targets.device), config.distillation
    if taught is None:
        options |= call_options(batch, policy, config)
        return *as_forward(policy_loss, model, ids, targets, coefficients, **options), none, none
    found = as_forward(
        self_distillation_loss,
        model,
        ids,
        targets,
        coefficients,
        layer=taught.layer,
        divergence_weight=taught.weight,
        attention_weight=taught.attention_weight,
        final_norm=taught.final_norm,
        support=batch.kept,
        **(options | batch_options(batch, config)),
    )
    return found.loss, found.metrics, found.divergence.sum(), none if found.attention is None else found.attention.sum()


def policy_objective(config: TrainConfig) -> PolicyObjective:
    """Return the objective of a token; its aggregation, and which tokens count, is in the coefficients."""
    fields = config.objective.model_dump(exclude={"advantage", "advantage_std", "aggregation", "top_entropy_quantile"})
    return PolicyObjective(**(fields if fields["clip"] == "ppo" else fields | {"dual_clip": None}))


def look_around(
    setup: Setup, run: RunFolder, samples: list[Sample], policy: OptimisedPolicy, step: int, clock: Clock
) -> dict[str, Any]:
    """Return what is seen of policies in ``step``: as much as :func:`bupo.cost.looks_of` allows, None where that is nothing."""
    model, config, world = setup.model, setup.config, setup.world
    lengths = [(len(sample.prompt_ids), len(sample.response_ids)) for sample in samples]
    looks = looks_of(setup.architecture, config, lengths, world.size, policy)
    if step == setup.last + 1:
        run.say(f"looks at policies: {looks}")
    if not looks.due(step):
        clock.lap("look")
        return dict.fromkeys(("entropy", "entropy_final", "kl", "sampler_gap", "look_tokens"))
    with_lens = looks.lens_due(step)
    count = looks.samples_with_lens if with_lens else looks.samples
    found, seen = look(model, samples, policy, count, step, config, world)
    clock.lap("look")
    layers: dict[str, Any] = {}
    if with_lens:
        layers = look_at_layers(model, seen, looks.lens_tokens, step, config, world)
        clock.lap("lens")
    return found | layers


class Seen(NamedTuple):
    """The samples of a look on this rank, and what every policy's head reads on them."""

    batch: MicroBatch
    states: PolicyStates


@torch.no_grad()
def look(
    model: PreTrainedModel, samples: list[Sample], policy: OptimisedPolicy, count: int, step: int, config: TrainConfig, world: World
) -> tuple[dict[str, float | None], Seen]:
    """Return statistics of both policies on randomly chosen samples, ``count`` on each rank, before the updates; and the samples.

    There are fewer samples where they would have more than ``config.look_tokens`` on a rank.
    """
    batch = some_of(samples, stream_seed(config.seed, "look", step), count, config.look_tokens, world)
    states, (*values, logprobs) = as_forward(_look, model, batch, policy, config)
    gap = torch.where(batch.mask, (logprobs - batch.sampler_logprobs).abs(), 0)
    sums = [x.sum(dtype=torch.float64) for x in (*values, gap, batch.mask)]
    *sums, tokens_ = world.sum(torch.stack(sums)).tolist()
    names = ("entropy", "entropy_final", "kl", "sampler_gap")
    means = {name: value / tokens_ for name, value in zip(names, sums, strict=True)}
    known = {"kl": policy != FINAL, "sampler_gap": math.isfinite(means["sampler_gap"])}
    found = {name: mean if known.get(name, True) else None for name, mean in means.items()}
    return found | {"look_tokens": int(tokens_)}, Seen(batch, states)


def _look(
    model: PreTrainedModel, batch: MicroBatch, policy: OptimisedPolicy, config: TrainConfig
) -> tuple[PolicyStates, list[Tensor]]:
    """Return what heads read in one forward, and of it the entropies of ``policy`` and of the model's own, the divergence of the
    one from the other, and the log-probs of the other."""
    states = policy_states(model, batch.input_ids, **packed_options(batch, config.hardware.attention), **policy.options)
    read: dict[str, Any] = {"temperature": config.rollout.temperature}
    if policy != FINAL and batch.kept is None:  # one pass over the weight of the head for all
        read |= {"outputs": ("entropy", "kl_to_final", "logprobs"), "final": states.final}
        lens = read_head(model, [states.internal, states.final], targets=batch.targets, **read)
        return states, [*lens.entropy, lens.kl_to_final[0], lens.logprobs[1]]
    read |= {"support": batch.kept}
    own = read_head(model, states.final, targets=batch.targets, **read)
    if policy == FINAL:
        return states, [own.entropy, own.entropy, torch.zeros_like(own.entropy), own.logprobs]
    compared = {"teacher_hidden": states.final, "kind": "reverse_kl", "mask": batch.mask}
    internal = read_head(model, states.internal, **compared, **read)
    return states, [internal.entropy, own.entropy, internal.divergence, own.logprobs]


@torch.no_grad()
def look_at_layers(
    model: PreTrainedModel, seen: Seen, limit: int, step: int, config: TrainConfig, world: World
) -> dict[str, list[float] | float]:
    """Return the entropy of the policies of H^0 to H^L, their KL to the final one and the perplexity of that.

    They are means over randomly chosen response tokens of what was ``seen``, at most ``limit`` on each rank, before the updates.
    """
    batch, states = seen
    responses = batch.mask.flatten().nonzero().squeeze(1).tolist()
    chosen = random.Random(stream_seed(config.seed, "lens", step)).sample(responses, min(limit, len(responses)))
    targets = torch.full_like(batch.targets, IGNORE)
    targets[0, chosen] = batch.targets[0, chosen]

    outputs = ("entropy", "kl_to_final", "logprobs")
    read = {"outputs": outputs, "final": states.final, "temperature": config.rollout.temperature}
    lens = as_forward(read_head, model, [*states.residual, states.final], targets=targets, **read)
    count = torch.full((1,), len(chosen), dtype=torch.float64, device=world.device)
    entropy, divergence, logprobs = (getattr(lens, name) for name in outputs)
    sums = [x.sum((1, 2), dtype=torch.float64) for x in (entropy[:-1], divergence[:-1], logprobs[-1:])]
    means = world.sum(torch.cat([*sums, count])).tolist()
    tokens_ = means.pop()
    *means, logprob = (value / tokens_ for value in means)
    half = len(means) // 2
    numbers = {"lens_perplexity": math.exp(-logprob), "lens_tokens": int(tokens_)}
    return {"lens_entropy": means[:half], "lens_kl": means[half:], **numbers}


def some_of(samples: list[Sample], seed: int, count: int, limit: int, world: World) -> MicroBatch:
    """Return this rank's part of randomly chosen samples, ``count`` on each rank or up to ``limit`` tokens."""
    chosen = random.Random(seed).sample(range(len(samples)), min(len(samples), count * world.size))
    parts, _ = fill([tokens(sample) for sample in samples], chosen, world.size, limit)
    mine = sorted((samples[i] for i in parts[world.rank]), key=tokens)
    return pack(mine, [0.0] * len(mine), world.device)


def describe_run(setup: Setup) -> str:
    """Return a line about the model, the devices and the data."""
    architecture, config, world = setup.architecture, setup.config, setup.world
    size = f"{architecture.num_hidden_layers} layers, {parameters(architecture).total / 1e6:,.1f} M parameters"
    devices = f"{config.hardware.precision} on {world.size} x {world.device.type}"
    return f"{architecture.model_type}, {size}; {devices}; {len(setup.order.examples):,} prompts"


def describe_samples(samples: list[Sample], rewards: Tensor, advantages: Tensor) -> dict[str, float | None]:
    """Return what a step's samples are like on average."""
    kept = [sample.kept for sample in samples if sample.kept is not None]
    return {
        "reward": rewards.nanmean().item(),
        "reward_failures": int(rewards.isnan().sum()),
        "active": (advantages != 0).float().mean().item(),
        "response_tokens": sum(len(sample.response_ids) for sample in samples) / len(samples),
        "finished": sum(sample.finished for sample in samples) / len(samples),
        "support_size": sum(len(sets.ids) for sets in kept) / sum(len(sets.sizes) for sets in kept) if kept else None,
    }


def describe_updates(updates: list[Update]) -> dict[str, float]:
    """Return means over a step's updates, or over their tokens; a divergence only where there is one."""
    count, tokens_ = len(updates) or 1, sum(u.tokens for u in updates) or 1
    divergences = {name: [getattr(u, name) for u in updates if getattr(u, name) is not None] for name in ("jsd", "jsd_attention")}
    return {name: sum(values) / tokens_ for name, values in divergences.items() if values} | {
        "loss": sum(u.loss for u in updates) / count,
        "clip_share": sum(u.clipped for u in updates) / tokens_,
        "kl_old": sum(u.kl_old for u in updates) / tokens_,
        "ratio_max": max((u.ratio_max for u in updates), default=1.0),
        "grad_norm": sum(u.grad_norm for u in updates) / count,
        "micro_batches": sum(u.micro_batches for u in updates),
        "updates": len(updates),
    }


def describe_speed(
    samples: list[Sample],
    advantages: Tensor,
    policy: OptimisedPolicy,
    seconds: dict[str, float],
    architecture: PretrainedConfig,
    config: TrainConfig,
    world: World,
) -> dict[str, float | None]:
    """Return tokens per second of the whole step, model FLOP/s and MFU of one device in old log-probs and updates, peak memory."""
    read = [(len(sample.prompt_ids), len(sample.response_ids)) for sample in samples]
    trained = work_of(lengths for lengths, advantage in zip(read, advantages.flatten().tolist(), strict=True) if advantage)
    rate = training_flops(architecture, config, trained, policy.layer, policy.module).model / world.size
    rate /= seconds["seconds_old"] + seconds["seconds_update"]
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), config.hardware.precision)
        memory = torch.cuda.max_memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
    else:
        peak, memory = None, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most since the process' start
    if config.telemetry.peak_tflops is not None:
        peak = 1e12 * config.telemetry.peak_tflops
    return {
        "layers": policy.layer or architecture.num_hidden_layers,
        "tokens_per_second": sum(map(sum, read)) / seconds["seconds"],
        "tflops": rate / 1e12,
        "mfu": rate / peak if peak else None,
        "memory_gib": memory / 2**30,
    }


class Clock:
    """The seconds of the parts of a step, and of all of them."""

    def __init__(self) -> None:
        self.last, self.seconds = time.perf_counter(), {"seconds": 0.0}

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap as those of the part ``name``."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self.last
        self.seconds["seconds"] += now - self.last
        self.last = now
