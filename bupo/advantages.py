"""Group-relative advantages."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:  # [P, G] -> [P, G]
    """``(R − mean) / (std + 1e-6)`` within each prompt's group of G ≥ 2 responses (GRPO; unbiased std, as verl and TRL).

    A group of equal rewards has advantages of exactly 0, so its tokens cost nothing in the backward.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)} given, accepted is [prompts, samples] with at least 2 samples")
    centred = rewards - rewards.mean(1, keepdim=True)
    # The mean of equal numbers may differ from them by a rounding, which the division would blow up.
    centred = centred.where((rewards != rewards[:, :1]).any(1, keepdim=True), torch.zeros_like(centred))
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if divide_by_std else centred
