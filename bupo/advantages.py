"""The advantages of sampled responses, without a critic."""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("grpo", "rloo", "reinforce++", "reinforce++-baseline")
EPSILON = 1e-6  # added to every standard deviation, as verl does; TRL adds 1e-4


def estimate_advantages(rewards: Tensor, estimator: str, divide_by_std: bool = True) -> Tensor:  # [P, G] -> [P, G]
    """Return the advantage of each of G responses to each of P prompts, from the ``rewards`` of all devices.

    ========================  ===============================================================================
    ``grpo``                  (R − mean) / std within the prompt's group (arXiv 2402.03300, outcome rewards);
                              R − mean when not ``divide_by_std`` (Dr. GRPO, arXiv 2503.20783)
    ``rloo``                  R − mean of the group's other rewards (arXiv 2402.14740)
    ``reinforce++``           (R − mean) / std over the whole batch (arXiv 2501.03262)
    ``reinforce++-baseline``  R − mean of the group, divided by the std of that over the whole batch (the same)
    ========================  ===============================================================================

    Standard deviations are unbiased. Every response has one vote in the statistics of a batch, as in ms-swift; verl and OpenRLHF
    whiten per token, where a response has as many votes as tokens.

    A nan is a failed sample: its advantage is 0 and it enters no statistic. The same holds for a reward that has no other to be
    compared with. Where all rewards are equal the advantages are exactly 0, so that their tokens cost nothing in the backward.
    Computed in float64 and returned in the dtype of ``rewards``.

    Raises ``ValueError`` for an unknown estimator, another shape or an infinite reward.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: {estimator!r} given, accepted are {', '.join(ESTIMATORS)}")
    least = 1 if estimator == "reinforce++" else 2
    if rewards.dim() != 2 or rewards.shape[1] < least:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)} given, accepted is [P, G] with G at least {least}")
    if rewards.isinf().any():
        raise ValueError("rewards: infinite ones given, accepted are finite numbers, and nan for a failed sample")

    values = rewards.double()
    if estimator == "reinforce++":  # its group is the whole batch
        values = values.reshape(1, -1)
    valid = ~values.isnan()
    count = valid.sum(1, keepdim=True)  # [P, 1]
    valid &= count > 1
    count = count.clamp(min=2)
    # Only differences matter. Taken from the least reward, equal ones are exact zeros; a mean would miss them by a rounding.
    values = (values - values.nan_to_num(torch.inf).amin(1, keepdim=True)).where(valid, 0)
    centred = (values - values.sum(1, keepdim=True) / count).where(valid, 0)

    if estimator == "rloo":
        advantages = centred * count / (count - 1)
    elif estimator == "grpo" and not divide_by_std:
        advantages = centred
    elif estimator == "reinforce++-baseline":
        variance = centred.square().sum() / (valid.sum() - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + EPSILON)
    else:
        variance = centred.square().sum(1, keepdim=True) / (count - 1)
        advantages = centred / (variance.sqrt() + EPSILON)
    return advantages.view_as(rewards).to(rewards.dtype)
