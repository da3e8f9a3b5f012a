"""A training step measured against the naive logit lens: ``bupo bench``.

A step is old log-probs and update, on random tokens and weights. Up to four sides take turns, round by round, on one model and
one optimizer with a learning rate of 0: AdamW reads and writes all it would, and every side finds the same weights. They and its
moments take 12 bytes a parameter, float32 as in the trainer, and gradients 4 more: of Qwen3-4B 48 and 16 GB, which leaves a GPU of
141 GB some 75 for a step. The gradients of the first side, with which those of the others are compared, wait in the CPU's memory.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config

from bupo.architecture import check_type, load_architecture
from bupo.attention import training_attention
from bupo.batching import MicroBatch, pack
from bupo.config import TrainConfig, parse_config
from bupo.cost import parameters
from bupo.distributed import World, as_forward, full, process_group, shard
from bupo.errors import ConfigError
from bupo.measurement import machine, peak_bytes, rates, results_path, timed, write_section
from bupo.model import checkpoint_activations, make_optimizer
from bupo.output import progress_bar
from bupo.rollout import Sample
from bupo.schedule import FINAL, OptimisedPolicy
from bupo.tables import columns
from bupo.trainer import batch_options, policy_objective, set_learning_rate, update, with_old_logprobs
from bupo_kernels import FusedLMHead, internal_policy

NAIVE = "naive logit lens"
LATE = "not within --minutes"
T = TypeVar("T")

# The name and config of the model where no --model-config is given, and the tokens of a step and of each sequence.
DEFAULTS = {
    "cpu": (
        "Qwen3, 24 x 512",
        Qwen3Config(
            vocab_size=32000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        (1024, 256),
    ),
    "cuda": (
        "Qwen3-4B",
        Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
        ),
        (8192, 2048),
    ),
}


class Case(NamedTuple):
    """The batch and the policy of a step: a phase, and equally long sequences."""

    phase: int
    layer: int  # of the internal policy; phase 2 trains the model's own, and only the naive lens still asks this one
    sequences: int
    length: int  # of each, as the layers see it

    @property
    def policy(self) -> OptimisedPolicy:
        return OptimisedPolicy(self.layer) if self.phase == 1 else FINAL

    def __str__(self) -> str:
        policy = f"layer {self.layer}" if self.phase == 1 else "the model's own policy"
        return f"phase {self.phase}: {policy}, {self.sequences} x {self.length} tokens"


class Trainee:
    """A model with random weights, made ready as by :func:`bupo.model.load_model`, and its optimizer, which the sides share."""

    def __init__(self, architecture: PretrainedConfig, config: TrainConfig, world: World) -> None:
        self.architecture, self.config, self.world = architecture, config, world
        self.build()

    def build(self) -> None:
        """Make the model and the optimizer; the weights are the same each time."""
        free(self.world.device)
        torch.manual_seed(0)
        self.architecture.attention_dropout = 0.0  # All sides must compute the same.
        with torch.device(self.world.device):
            model = AutoModelForCausalLM.from_config(self.architecture, dtype=torch.float32, attn_implementation="sdpa")
        FusedLMHead.adopt(model.get_output_embeddings())
        if self.config.hardware.checkpoint_activations:
            checkpoint_activations(model)
        shard(model, self.world, self.config.hardware)
        self.model = model.train()
        self.optimizer = make_optimizer(model, self.config.optimizer)
        set_learning_rate(self.optimizer, 0.0)

    def rebuild(self) -> None:
        """Build again: after an exception within a forward or a backward FSDP is not to be trusted."""
        del self.model, self.optimizer
        gc.collect()
        self.build()

    def update(self, loss: Tensor) -> float:
        """Step the optimizer as :func:`bupo.trainer.update` does and return the number in ``loss``."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


# ---- the sides, each of which takes a step and returns its loss


Step = Callable[[Trainee, Case, MicroBatch], float]


def bupo_step(trainee: Trainee, case: Case, batch: MicroBatch) -> float:
    """Take the step with the trainer's own functions."""
    model, config = trainee.model, trainee.config
    with training_attention(model, config.hardware.attention):
        batch = with_old_logprobs(model, batch, case.policy, config)
        return update(model, trainee.optimizer, [batch], case.policy, config, trainee.world).loss


def untruncated_step(trainee: Trainee, case: Case, batch: MicroBatch) -> float:
    """Take the step with the same head on the same rows, but run all layers."""
    model, options = trainee.model, batch_options(batch, trainee.config)
    with training_attention(model, trainee.config.hardware.attention):
        statistics_of = partial(untruncated, layer=case.layer, input_ids=batch.input_ids, targets=batch.targets, **options)
        with torch.no_grad():
            old_logprobs = as_forward(statistics_of, model, return_entropy=False).logprobs
        ratio = {"old_logprobs": old_logprobs, "objective": policy_objective(trainee.config), "denominator": 1}
        loss, _ = as_forward(statistics_of, model, advantages=batch.coefficients, **ratio)
        return trainee.update(loss)


def naive_step(trainee: Trainee, case: Case, batch: MicroBatch, both_heads: bool) -> float:
    """Take the step in plain torch, with sequences as the rows of a batch (they are of one length: no padding)."""
    shape, clips = (case.sequences, case.length), trainee.config.objective
    input_ids, targets, coefficients, mask = (
        x.view(shape) for x in (batch.input_ids, batch.targets, batch.coefficients, batch.mask)
    )
    arguments = case, input_ids, targets.clamp(min=0), both_heads
    with torch.no_grad():
        old_logprobs = as_forward(naive_logprobs, trainee.model, *arguments, entropy=True)
    ratio = (as_forward(naive_logprobs, trainee.model, *arguments) - old_logprobs).exp()
    terms = torch.maximum(-coefficients * ratio, -coefficients * ratio.clamp(1 - clips.clip_low, 1 + clips.clip_high))
    if clips.dual_clip is not None:
        terms = torch.where(coefficients < 0, terms.minimum(-coefficients * clips.dual_clip), terms)
    return trainee.update((terms * mask).sum())


def naive_logprobs(
    model: PreTrainedModel,
    case: Case,
    input_ids: Tensor,  # [B, S]
    targets: Tensor,  # [B, S]
    both_heads: bool,
    entropy: bool = False,
) -> Tensor:  # [B, S] fp32
    """Return the log-probs of ``targets`` from the logits of every token, prompts too.

    ``both_heads`` is the reference: all layers run and their outputs are kept, an internal and the final policy give logits in both
    phases, and the entropy that it logs is the final one's. Else only the layers and the head that are optimised run.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    if both_heads:
        out = backbone(input_ids, output_hidden_states=True, use_cache=False)
        internal, final = head(out.hidden_states[case.layer]), head(out.last_hidden_state)
        logits = internal if case.phase == 1 else final
    else:
        with internal_policy(model, case.policy.layer or model.config.num_hidden_layers):
            logits = final = head(backbone(input_ids, use_cache=False).last_hidden_state)
    if entropy:
        entropy_from_logits(final)
    logprobs = logits.log_softmax(-1, dtype=torch.float32).gather(-1, targets.unsqueeze(-1))
    return logprobs.squeeze(-1).clone()  # FSDP warns of a view


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy as verl computes it, in float32."""
    logits = logits.float()
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def untruncated(
    model: PreTrainedModel,
    layer: int,
    input_ids: Tensor,  # [1, T]
    targets: Tensor,  # [1, T]
    position_ids: Tensor,  # [1, T]
    model_options: dict,
    **options,
):
    """Run all layers and return what the fused head makes of the output of ``layer``, given ``options``."""
    backbone, states = model.base_model, []

    def receive(_, arguments: tuple, named: dict) -> None:
        states.append(arguments[0] if arguments else named["hidden_states"])

    if layer == len(backbone.layers):  # The last layer's policy is the model's own, which is normed.
        handle = backbone.norm.register_forward_hook(lambda _, __, output: states.append(output))
    else:
        handle = backbone.layers[layer].register_forward_pre_hook(receive, with_kwargs=True)
    try:
        backbone(input_ids, position_ids=position_ids, use_cache=False, **model_options)
    finally:
        handle.remove()
    return model.get_output_embeddings()(states.pop(), targets, **options)


BOTH_HEADS, ONE_HEAD = partial(naive_step, both_heads=True), partial(naive_step, both_heads=False)

# The sides of each phase by their words for --sides: name in a table, and step. Phase 2 has no layers to leave out.
SIDES: dict[int, dict[str, tuple[str, Step]]] = {
    1: {
        "naive": (NAIVE, BOTH_HEADS),
        "naive-truncated": (f"{NAIVE}, truncated", ONE_HEAD),
        "bupo-not-truncated": ("bupo, not truncated", untruncated_step),
        "bupo": ("bupo", bupo_step),
    },
    2: {"naive": (NAIVE, BOTH_HEADS), "naive-truncated": ("naive, one head", ONE_HEAD), "bupo": ("bupo", bupo_step)},
}


# ---- measurement


class Compared(NamedTuple):
    """A step compared with that of the first side."""

    loss: float
    difference: float  # largest over the parameters of max|Δ gradient| / max|the first side's gradient|
    parameter: str  # the one with that difference


@dataclass
class Side:
    """The measurements of a side."""

    name: str
    step: Step
    reason: str | None = None  # why it has no numbers
    compared: Compared | None = None
    peak: int | None = None  # bytes
    seconds: list[float] = field(default_factory=list)  # of every round
    last: float = 0.0  # seconds of the last attempt at a step

    def row(self, tokens: int) -> dict[str, Any]:
        """Return what the results keep of a side whose steps have that many tokens."""
        row: dict[str, Any] = {"name": self.name, "reason": self.reason}
        if self.reason is not None or self.compared is None:
            return row
        median = statistics.median(self.seconds)
        row |= {"seconds": median, "seconds_of_rounds": self.seconds, "tokens_per_second": tokens / median}
        return row | {"peak_bytes": self.peak, "loss": self.compared.loss, "gradient_difference": self.compared.difference}


def tolerance(precision: str) -> float:
    """Return the relative difference of losses and gradients that is accepted: half of the digits.

    Sides that compute the same differ by how they round logits and what follows from them, a few to some thirty times one
    rounding; a wrong one by about 1.
    """
    return torch.finfo(getattr(torch, precision)).eps ** 0.5


def compare(trainee: Trainee, step: Callable[[], float], first: dict[str, Tensor]) -> Compared:
    """Take a step and compare it with that of the first side.

    ``first`` holds the gradients of the first side that ran, on the CPU; where it is empty, those of this one are put into it.
    """
    gradients, worst = {}, (0.0, "")

    def receive(*_) -> None:
        nonlocal worst
        for name, parameter in trainee.model.named_parameters():
            gradient = None if parameter.grad is None else full(parameter.grad)
            if not first:
                gradients[name] = gradient if gradient is None else gradient.cpu()
                continue
            mine, theirs = (torch.zeros(1) if g is None else g for g in (gradient, first[name]))
            difference, largest = (mine - theirs.to(mine.device)).abs().max().item(), theirs.abs().max().item()
            share = difference / largest if largest else math.inf if difference else 0.0
            worst = max(worst, (math.inf if math.isnan(share) else share, name))  # max would pass over a NaN.

    handle = trainee.optimizer.register_step_pre_hook(receive)
    try:
        loss = step()
    finally:
        handle.remove()
    first.update(gradients)
    return Compared(loss, *worst)


def measure(
    trainee: Trainee,
    case: Case,
    sides: Sequence[str],
    rounds: int,
    deadline: float = math.inf,
    advance: Callable[[], object] = lambda: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each of ``sides`` that the phase has, and a line for each that does not agree with the first that ran.

    Each takes a step that is compared and warms it up, one whose memory is measured, and then they take turns on tokens that are
    new in every round. A side that raises, or does not agree, is a row with the reason.

    Args:
        deadline: a time of ``time.monotonic``; no side is begun after it, and no round that would take longer than is left.
        advance: called after every step.
    """
    device, accepted = trainee.world.device, tolerance(trainee.config.hardware.precision)
    measured = [Side(*SIDES[case.phase][side]) for side in dict.fromkeys(sides) if side in SIDES[case.phase]]
    gradients: dict[str, Tensor] = {}
    first, wrong = None, []

    def attempt(side: Side, batch: MicroBatch, call: Callable[[Callable[[], float]], T]) -> T | None:
        if side.reason is not None:
            advance()
            return None
        started = time.monotonic()
        try:
            return call(lambda: side.step(trainee, case, batch))
        except Exception as error:  # Whatever it is belongs in the table.
            side.reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
        finally:
            side.last = time.monotonic() - started
            advance()
        trainee.rebuild()
        return None

    batch = random_batch(case, trainee.architecture.vocab_size, device)
    for side in measured:
        if time.monotonic() > deadline:
            side.reason = LATE
        found = side.compared = attempt(side, batch, lambda step: compare(trainee, step, gradients))
        free(device)
        if found is not None:
            first = first or found
            if not (abs(found.loss - first.loss) <= accepted * abs(first.loss) and found.difference <= accepted):
                side.reason = (
                    f"disagrees with the first side: loss {found.loss:.6g} against {first.loss:.6g}, gradients differ by "
                    f"{found.difference:.1e} of the largest ({found.parameter}), accepted is {accepted:.1e} of each"
                )
                wrong.append(f"{case}: {side.name} {side.reason}")
        side.peak = attempt(side, batch, lambda step: peak_bytes(step, device))
        free(device)
    gradients.clear()
    for turn in range(rounds):
        running = [side for side in measured if side.reason is None]
        if time.monotonic() + sum(side.last for side in running) > deadline:
            for side in running if turn == 0 else ():
                side.reason = LATE
            break
        batch = random_batch(case, trainee.architecture.vocab_size, device)
        for side in measured:
            elapsed = attempt(side, batch, lambda step: timed(step, device)[0])
            side.seconds += [] if elapsed is None else [elapsed]
    return [_about(case, trainee) | side.row(case.sequences * case.length) for side in measured], wrong


def _about(case: Case, trainee: Trainee) -> dict[str, Any]:
    return {
        "model": trainee.config.model,
        "phase": case.phase,
        "layer": case.policy.layer,
        "layers": trainee.architecture.num_hidden_layers,
        "sequences": case.sequences,
        "length": case.length,
        "dtype": trainee.config.hardware.precision,
        "checkpointing": trainee.config.hardware.checkpoint_activations,
    }


def random_batch(case: Case, vocab: int, device: torch.device) -> MicroBatch:
    """Return a batch whose sequences have ``length`` tokens for the layers, half of them with a target."""
    ids = torch.randint(vocab, (case.sequences, case.length + 1)).tolist()
    prompt = case.length // 2 + 1
    samples = [Sample(prompt_ids=row[:prompt], response_ids=row[prompt:], logprobs=None, finished=True) for row in ids]
    count = case.sequences * len(samples[0].response_ids)
    return pack(samples, [(1.0 if i % 2 else -0.5) / count for i in range(case.sequences)], device)


def free(device: torch.device) -> None:
    """Give back a GPU's memory that only waits to be used again, so that one side's blocks are not in the way of the next."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# ---- the command


def bench_command(
    *,
    model_config: Path | None,
    layers: Sequence[int] | None,
    tokens: Sequence[int] | None,
    contexts: Sequence[int] | None,
    phases: Sequence[int],
    sides: Sequence[str],
    rounds: int,
    device: str | None,
    precision: str | None,
    keep_activations: bool,
    minutes: float | None,
    out: Path | None,
    commit: str | None,
) -> int:
    """Print a table for every phase, layer and size, and put the rows into ``out``.

    Returns the exit code, 1 where a side does not agree with the first. Raises :class:`ConfigError` before anything is built.
    """
    started = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"torchrun: {os.environ['WORLD_SIZE']} processes given, accepted is one")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, architecture, sizes = DEFAULTS[device]
    if model_config is not None:
        if not model_config.is_file():
            raise ConfigError(f"--model-config: {model_config} is not a file, accepted is a model's config.json")
        name = model_config.stem if model_config.stem != "config" else model_config.resolve().parent.name
    hardware = {
        "device": device,
        "precision": precision or ("float32" if device == "cpu" else "bfloat16"),
        "checkpoint_activations": not keep_activations,
    }
    config = bench_config(name, hardware)
    if model_config is not None:
        architecture = load_architecture(config.model_copy(update={"model": str(model_config)}))
    cases = plan(name, architecture, layers, tokens or sizes[:1], contexts or sizes[1:], phases)
    cases = [case for case in cases if set(sides) & set(SIDES[case.phase])]
    _require(bool(cases), "--sides", " ".join(sides), f"in phase 2 are {', '.join(SIDES[2])}")
    _require(rounds >= 1, "--rounds", rounds, "are 1 and more")
    _require(minutes is None or minutes > 0, "--minutes", minutes, "are numbers above 0")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {out} is no folder and cannot become one ({error.strerror})") from None

    rows, wrong = {}, []
    with process_group(config.hardware) as world:
        about, best = machine(world.device, commit), rates(world.device)
        print(describe(about, best, config, architecture))
        try:
            trainee = Trainee(architecture, config, world)
        except torch.OutOfMemoryError:
            size = f"{12 * parameters(architecture).total / 2**30:.0f} GiB"
            raise ConfigError(f"--model-config: {name} and its optimizer take {size}, more than {about['device']} has") from None
        deadline = math.inf if minutes is None else started + 60 * minutes
        with progress_bar() as bar:
            total = sum((rounds + 2) * len(set(sides) & set(SIDES[case.phase])) for case in cases)
            task = bar.add_task("bench", total=total)
            for case in cases:
                bar.update(task, description=str(case))
                rows[case], faults = measure(trainee, case, sides, rounds, deadline, lambda: bar.advance(task))
                wrong += faults
    for case, found in rows.items():
        print_table(case, found)
    for fault in wrong:
        print(f"bupo bench: {fault}", file=sys.stderr)
    if out is not None:
        path, found = results_path(out, about), [row for of_case in rows.values() for row in of_case]
        try:
            write_section(path, "step", {"machine": about, "rates": best, "rows": found})
        except ValueError as error:
            raise ConfigError(f"--out: {error}") from None
        print(f"\nwritten to {path}")
    return 1 if wrong else 0


def bench_config(model: str, hardware: dict[str, Any]) -> TrainConfig:
    """Return the trainer's defaults with this ``hardware`` section."""
    return parse_config(
        {"model": model, "output_dir": "unused", "data": {"train": "unused"}, "policy": "grpo", "hardware": hardware}
    )


def plan(
    model: str,
    architecture: PretrainedConfig,
    layers: Sequence[int] | None,
    tokens: Sequence[int],
    contexts: Sequence[int],
    phases: Sequence[int],
) -> list[Case]:
    """Return the cases of phases, contexts, tokens and, in phase 1, layers in all combinations. Raises :class:`ConfigError`."""
    check_type(architecture, model, "--model-config")
    depth, longest = architecture.num_hidden_layers, architecture.max_position_embeddings
    layers = layers or [max(1, round(depth / 6))]
    for layer in layers:
        _require(1 <= layer <= depth, "--layer", layer, f"are 1 to {depth} (the layers of {model})")
    for context in contexts:
        _require(1 <= context <= longest, "--context", context, f"are 1 to {longest} (the positions of {model})")
    for count, context in product(tokens, contexts):
        _require(count > 0 and count % context == 0, "--tokens", count, f"are multiples of --context ({context})")
    sizes = [(count // context, context) for context, count in product(contexts, tokens)]
    swept = {phase: layers if phase == 1 else layers[:1] for phase in phases}
    return list(dict.fromkeys(Case(phase, layer, *size) for phase in phases for size in sizes for layer in swept[phase]))


def _require(holds: bool, option: str, given: object, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{option}: {given} given, accepted {accepted}")


def describe(about: dict[str, Any], best: dict[str, Any], config: TrainConfig, architecture: PretrainedConfig) -> str:
    """Return what stands above the tables: the machine, its own rates, the model."""
    threads = f", {about['threads']} threads" if about["threads"] else ""
    products = ", ".join(f"{rate:,.3g} TFLOP/s in {dtype}" for dtype, rate in best["gemm_tflops"].items())
    counts, hardware = parameters(architecture), config.hardware
    return "\n".join(
        [
            f"{about['device']}{threads}: products {products}; copies {best['copy_gb_per_s']:,.0f} GB/s",
            f"{config.model}: {architecture.model_type}, {counts.layers} layers, {counts.total / 1e6:,.1f} M parameters, "
            f"random weights; {hardware.precision}, activations {'recomputed' if hardware.checkpoint_activations else 'kept'}",
            "old log-probs and update, medians of rounds in which the sides take turns; memory beyond weights and optimizer state",
        ]
    )


def print_table(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """Print speed and memory of every side, against the naive one's where that ran."""
    ran = [row for row in rows if not row["reason"]]
    naive = next((row for row in ran if row["name"] == NAIVE), None)
    table = [[str(case), "tokens/s", "× naive", "peak GiB", "of naive", "gradients differ"]]
    for row in ran:
        faster = share = ""
        if naive:
            pairs = zip(naive["seconds_of_rounds"], row["seconds_of_rounds"], strict=True)
            faster = f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"
            share = f"{row['peak_bytes'] / naive['peak_bytes']:.0%}"
        speed, peak = f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**30:.2f}"
        table.append([row["name"], speed, faster, peak, share, f"{row['gradient_difference']:.1e}"])
    print("", *columns(table, numbers=True), sep="\n")
    for row in rows:
        if row["reason"]:
            print(f"{row['name']}: {row['reason']}")
