"""The training loop, top to bottom: rollouts, rewards, advantages, old log-probs, clipped updates."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bupo.advantages import group_advantages
from bupo.checkpoint import save_checkpoint
from bupo.config import ConfigError, TrainConfig
from bupo.data import PromptOrder, load_examples, stream_seed
from bupo.evaluation import Accuracy, evaluate
from bupo.monitor import RunFolder
from bupo.rewards import load_reward, score
from bupo.rollout import Batch, collate, generate
from bupo.schedule import FINAL, OptimisedPolicy, policy_at
from bupo_kernels import FusedLMHead, LinearLogprobs, PolicyObjective, policy_logprobs, policy_loss
from bupo_kernels.internal_policy import MODEL_TYPES
from bupo_kernels.policy_losses import batch_denominator


def train(config: TrainConfig) -> tuple[Accuracy, Accuracy]:
    """Trains as ``config`` says and leaves the run folder behind; returns held-out accuracy before and after.

    Raises :class:`ConfigError`, before anything is written, when a value does not fit the model or the data.
    """
    examples = load_examples(config.data.train, "data.train")
    heldout = load_examples(config.data.heldout, "data.heldout")
    reward = load_reward(config.reward)
    model, tokenizer = load_model(config)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    order = PromptOrder(examples, config.rollout.prompts, config.seed)
    group, max_new_tokens = config.rollout.samples, config.rollout.max_new_tokens

    def accuracy() -> Accuracy:
        how = config.evaluation.model_dump(exclude={"every"})
        seed = stream_seed(config.seed, "evaluation")
        return evaluate(model, tokenizer, heldout, reward, max_new_tokens=max_new_tokens, seed=seed, **how)

    with RunFolder(config) as run:
        run.log_accuracy(0, before := accuracy())
        for step in range(1, config.steps + 1):
            started = time.perf_counter()
            policy = policy_at(step, config)

            # Rollouts come from the final policy in both phases.
            asked = [example for example in order.at(step) for _ in range(group)]
            samples = generate(
                model,
                tokenizer,
                [example.prompt for example in asked],
                max_new_tokens=max_new_tokens,
                temperature=config.rollout.temperature,
                seed=stream_seed(config.seed, "rollout", step),
            )
            rewards = score(reward, samples, asked)  # [P·G]
            advantages = group_advantages(rewards.view(-1, group), config.objective.advantage_std).flatten()
            batch = collate(samples, advantages, tokenizer.pad_token_id, model.device)

            # Everything in the loss is of the policy being optimised; the final policy's entropy is only looked at.
            old_logprobs, entropy = statistics(model, batch, policy, config)
            entropy_final = entropy if policy == FINAL else statistics(model, batch, FINAL, config)[1]
            batch = replace(batch, old_logprobs=old_logprobs)
            mini_batches = batch.split(config.optimizer.mini_batch * group)
            updates = [update(model, optimizer, mini_batch, policy, config) for mini_batch in mini_batches]

            tokens = int(batch.mask.sum())
            run.log_step(
                {
                    "step": step,
                    "phase": policy.phase,
                    "reward": rewards.mean().item(),
                    "loss": sum(u.loss for u in updates) / len(updates),
                    "entropy": (entropy.sum() / tokens).item(),
                    "entropy_final": (entropy_final.sum() / tokens).item(),
                    "clip_share": sum(u.clipped for u in updates) / tokens,
                    "grad_norm": sum(u.grad_norm for u in updates) / len(updates),
                    "response_tokens": tokens / len(samples),
                    "finished": sum(s.finished for s in samples) / len(samples),
                    "tokens_per_second": sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)
                    / (time.perf_counter() - started),
                }
            )
            if step % config.episodes_every == 0 or step == 1:
                run.log_episodes(step, policy.phase, samples[:group], asked[:group], rewards[:group], advantages[:group])
            if config.evaluation.every and step % config.evaluation.every == 0 and step < config.steps:
                run.log_accuracy(step, accuracy())
        save_checkpoint(model, tokenizer, run.path / "checkpoint")
        run.log_accuracy(config.steps, after := accuracy())
    return before, after


def load_model(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32 with a :class:`FusedLMHead`, and its tokenizer. Raises :class:`ConfigError`."""
    try:
        # internal_policy would refuse these too, but only after the weights have been read.
        architecture = AutoConfig.from_pretrained(config.model)
        if architecture.model_type not in MODEL_TYPES:
            raise ValueError(f"it is of type {architecture.model_type}, accepted are {', '.join(MODEL_TYPES)}")
        depth = architecture.num_hidden_layers
        if config.policy == "bupo" and config.bupo.layer > depth:
            raise ConfigError(f"bupo.layer: {config.bupo.layer} given, accepted are 1 to {depth} (the layers of {config.model})")
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no end-of-sequence token")
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        FusedLMHead.adopt(model.get_output_embeddings())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model: {config.model} cannot be used: {' '.join(str(error).split())}") from None
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: {config.device!r} given, accepted are auto, cpu, cuda, cuda:N ({reason})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The old and the new log-probs of a ratio must come from one and the same network: no dropout.
    return model.eval(), tokenizer


def forward(model: PreTrainedModel, batch: Batch, policy: OptimisedPolicy, config: TrainConfig) -> LinearLogprobs:
    return policy_logprobs(model, batch.input_ids, batch.targets, temperature=config.rollout.temperature, **policy.options)


@torch.no_grad()
def statistics(model: PreTrainedModel, batch: Batch, policy: OptimisedPolicy, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, each ``[B, S]``, of the response tokens under ``policy`` as the weights stand."""
    width = batch.targets.shape[1]
    parts = [forward(model, micro, policy, config) for micro in batch.split(config.optimizer.micro_batch)]
    logprobs, entropy = (
        torch.cat([F.pad(getattr(part, name), (0, width - part.logprobs.shape[1])) for part in parts])
        for name in ("logprobs", "entropy")
    )
    return logprobs, entropy


class Update(NamedTuple):
    loss: float
    clipped: float  # tokens on which a clip decided
    grad_norm: float  # before clipping


def update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch, policy: OptimisedPolicy, config: TrainConfig
) -> Update:
    """One optimizer step on a mini-batch, its gradient summed over micro-batches.

    Sequences of zero advantage (their whole group was right, or wrong) add exactly nothing to loss and gradient; they count
    in the denominator, and cost nothing. A mini-batch of nothing else makes no step.
    """
    how = config.objective
    objective = PolicyObjective(
        clip_low=how.clip_low, clip_high=how.clip_high, dual_clip=how.dual_clip, aggregation=how.aggregation
    )
    denominator = batch_denominator(batch.mask, how.aggregation)
    active = batch.advantages[:, 0] != 0
    if not active.any():
        return Update(loss=0.0, clipped=0.0, grad_norm=0.0)
    loss, clipped = 0.0, 0.0
    for micro in batch[active].split(config.optimizer.micro_batch):
        micro_loss, metrics = policy_loss(
            model,
            micro.input_ids,
            micro.targets,
            micro.advantages,
            old_logprobs=micro.old_logprobs,
            objective=objective,
            denominator=denominator,
            temperature=config.rollout.temperature,
            **policy.options,
        )
        micro_loss.backward()
        loss += micro_loss.item()
        clipped += ((metrics.clipped_low + metrics.clipped_high) * metrics.active_rows).item()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(loss, clipped, grad_norm.item())
