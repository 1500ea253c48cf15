"""The seam behind which every kind of mixture lives: a router decides, experts compute, nobody else knows how.

What a kind sees of a step is `Use`; what it tells about its work goes to an optional `Observer`.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from model.noise import normal


class Observer(Protocol):
    """Is told what each mixture did: for metrics while serving, for balance losses while training."""

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        """`pairs` computed; `load_E` tokens per expert (∞-MoE: per block); `scores_TE` router probabilities."""


@dataclass(frozen=True, slots=True)
class Use:
    """One MoE layer's share of a step: each token's count, and what keys its noise."""

    layer: int
    counts_T: Tensor  # int64, 1 <= count <= k_max
    k_max: int
    seeds_T: Tensor
    positions_T: Tensor
    observer: Observer | None = None

    def noise(self, token_R: Tensor, sample_R: Tensor, width: int) -> Tensor:
        """ε_RZ ~ N(0, I) for (token, sample) rows; the same for a token whatever the batch."""
        return normal(self.seeds_T[token_R], self.layer, self.positions_T[token_R], sample_R, width)


@dataclass(frozen=True, slots=True)
class Calls:
    """Routed pairs, sorted by expert and, within an expert, by token. `ends_E` is where each expert's pairs end."""

    token_R: Tensor  # int64
    expert_R: Tensor  # int64
    weight_R: Tensor
    ends_E: Tensor  # int64, cumulative

    @property
    def load_E(self) -> Tensor:
        """Pairs per expert."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1))


def ranks(counts_T: Tensor, k_max: int) -> Tensor:
    """Which of `k_max` ranks each token may use: bool [T, K]. The one place where a count becomes a choice."""
    return counts_T.new_tensor(range(k_max))[None, :] < counts_T[:, None]


def sort_calls(token_R: Tensor, expert_R: Tensor, weight_R: Tensor, experts: int) -> Calls:
    """Order pairs by expert; the sort is stable, so a token's order of summation is by expert, whatever its batch."""
    order_R = expert_R.argsort(stable=True)
    ends_E = expert_R.bincount(minlength=experts).cumsum(0)
    return Calls(token_R[order_R], expert_R[order_R], weight_R[order_R], ends_E)


class Mixture(nn.Module):
    """A feed-forward layer whose tokens choose their experts.

    `token_local`: a token's output depends on that token alone. A kind that sets it to False gives up the prefix cache
    and chunked prefill.
    """

    token_local: bool = True

    def forward(self, x_TD: Tensor, use: Use) -> Tensor:
        raise NotImplementedError
