"""One row of the tables, and what the groups of rows stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.inputs import Inputs

# Group -> the products (of 2·N·V·D FLOP) without which it cannot be had.
GROUPS = {"forward": 1, "forward+backward": 3, "one-pass loss": 3, "lens": 1}


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    ``call`` gets the inputs and returns, in the group "one-pass loss", the scalar loss; in "lens" the log-probs and entropies
    [L, N], and whatever else; else the log-probs [N] (any float dtype, anything outside the mask) and the entropies, or None in
    their place. It is run without gradients in "forward" and "lens", and differentiated in the other two with
    ``inputs.coefficients(computes)``. A floor returns its products.
    """

    name: str
    who: str  # "floor", "naive", "peer", "ours"
    group: str
    computes: str  # of Inputs.coefficients
    call: Callable[[Inputs], object]
    products: float  # of 2·N·V·D FLOP each that its algorithm takes, N being the rows that count
    why_not: Callable[[Inputs], str | None] = lambda x: None  # the reason it does not run on these, before anything is tried
    stated: int | None = None  # bytes of working memory that it promises to stay within
    remark: str = ""  # printed beside its numbers: what is not computed, what makes it fast or slow
    poison: Callable[[], None] = lambda: None  # what it writes into again and again is NaN after this


def policy_loss_of(logprobs: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """Return the plainest on-policy loss on some head's log-probs [N]: −mean of A · exp(logp − its own value) over the rows that
    count."""

    def call(x: Inputs) -> Tensor:
        found = logprobs(x).where(x.mask, 0)
        return -(x.advantages * (found - found.detach()).exp()).sum() / x.active_rows

    return call
