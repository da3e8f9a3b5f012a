"""Faces of the ops as ``nn.Module``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bupo_kernels.functional import (
    LensStatistics,
    LinearLogprobs,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    logit_lens,
)
from bupo_kernels.policy_losses import PolicyMetrics


class FusedLMHead(nn.Linear):
    """The unembedding of a language model, which can answer with statistics instead of logits.

    A plain ``nn.Linear`` in every other respect: the same parameters under the same state-dict keys, and ``head(hidden)``
    still gives logits, so generation and saving work unchanged. The weight is only ever read inside :meth:`forward`, which is
    what sharded training needs (FSDP2 gathers a module's parameters around its forward).
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> FusedLMHead:
        """Turns ``linear`` into a :class:`FusedLMHead` in place and returns it; its parameters, ties and hooks stay.

        Raises ``TypeError`` unless ``linear`` is an ``nn.Linear`` itself: a subclass (LoRA, quantised) may not compute
        ``hidden @ weight.T``.
        """
        if type(linear) is cls:
            return linear
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear: {type(linear).__name__} given, accepted is a plain nn.Linear")
        linear.__class__ = cls
        return linear

    def forward(
        self,
        hidden: Tensor | Sequence[Tensor],
        targets: Tensor | None = None,
        advantages: Tensor | None = None,
        *,
        reference: Tensor | None = None,
        outputs: Sequence[str] | None = None,
        **options,
    ) -> Tensor | LinearLogprobs | LensStatistics | tuple[Tensor, PolicyMetrics]:
        """Logits ``[..., V]`` of ``hidden[..., D]``; given ``targets[...]``, :class:`LinearLogprobs`, with the options of
        :func:`bupo_kernels.linear_logprobs`; given ``advantages`` too, what :func:`bupo_kernels.linear_policy_loss` returns, with
        its options; given ``reference[..., D]`` alone, :func:`bupo_kernels.linear_divergence` from it; given ``outputs``,
        :func:`bupo_kernels.logit_lens` of ``hidden``, those of several layers (``bias`` is always the module's own)."""
        if outputs is not None:
            if reference is not None or advantages is not None:
                raise TypeError("outputs: given with reference or advantages, accepted only without them")
            return logit_lens(hidden, self.weight, targets, outputs=outputs, bias=self.bias, **options)
        if reference is not None and (targets is not None or advantages is not None):
            raise TypeError("reference: given with targets or advantages, accepted only without them")
        if reference is not None:
            return linear_divergence(hidden, reference, self.weight, bias=self.bias, **options)
        if targets is None and advantages is not None:
            raise TypeError("advantages: given without targets, accepted only with them")
        if targets is None:
            if options:
                raise TypeError(f"{', '.join(options)}: given without targets, accepted only with them")
            return super().forward(hidden)
        if advantages is not None:
            return linear_policy_loss(hidden, self.weight, targets, advantages, bias=self.bias, **options)
        return linear_logprobs(hidden, self.weight, targets, bias=self.bias, **options)
