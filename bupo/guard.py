"""The guard on phase 1 that the paper's Figure 5c suggests: how well the final policy still predicts what the first model said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from bupo.attention import packed_options, training_attention
from bupo.batching import pack_all
from bupo.config import TrainConfig
from bupo.data import Example
from bupo.distributed import World, as_forward
from bupo.errors import ConfigError
from bupo.output import replace_file
from bupo.rollout import WHOLE, Rollout, Sample
from bupo_kernels import policy_logprobs

FILE = "guard.json"  # in the run folder, since the first model is gone when a run is resumed


class PerplexityGuard:
    """The responses of the first model to held-out prompts, and its perplexity on them, to which later ones are relative."""

    def __init__(
        self, model: PreTrainedModel, rollout: Rollout, heldout: Sequence[Example], config: TrainConfig, world: World, last: int
    ) -> None:
        self.attention, self.max_tokens, self.world = config.hardware.attention, config.hardware.max_tokens_per_device, world
        path = config.output_dir / FILE
        if last == 0:
            prompts = [example.prompt_ids for example in world.share(heldout[: config.guards.responses])]
            samples = world.gather(rollout.with_sampling(stream="guard", **WHOLE).generate(prompts, 1, 0))
            self._hold(samples)
            self.first = 1.0
            self.first = self.measure(model)
            if world.main:
                pairs = [[list(sample.prompt_ids), list(sample.response_ids)] for sample in samples]
                replace_file(path, json.dumps({"perplexity": self.first, "responses": pairs}))
            world.barrier()
            return
        with world.agree():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                samples = [Sample(prompt, response, None, True) for prompt, response in saved["responses"]]
                self.first = saved["perplexity"]
            except (OSError, ValueError, TypeError, KeyError) as error:
                fault = "missing" if isinstance(error, FileNotFoundError) else "damaged"
                accepted = "accepted is a run folder with it, or bupo.guards.perplexity: null"
                raise ConfigError(f"output_dir: {path} is {fault}, {accepted}") from error
        self._hold(samples)

    def _hold(self, samples: list[Sample]) -> None:
        self.micro_batches = pack_all(samples, [0.0] * len(samples), self.max_tokens, self.world)

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> float:
        """Return the perplexity of ``model``'s own policy, divided by that of the first model. A collective."""
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with training_attention(model, self.attention):
            for batch in self.micro_batches:
                options = packed_options(batch, self.attention)
                own = as_forward(policy_logprobs, model, batch.input_ids, batch.targets, return_entropy=False, **options)
                total += torch.stack([own.logprobs.sum(dtype=torch.float64), batch.mask.sum()])
        logprobs, count = self.world.sum(total).tolist()
        return math.exp(-logprobs / count) / self.first
