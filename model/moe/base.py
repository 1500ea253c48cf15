"""Routed pairs, (token, expert) with a weight: what a router chooses, and what a kind of mixture computes.

How a kind chooses and what its experts are is in its own file beside this one.
"""

from dataclasses import dataclass

from torch import Tensor

from model.batch import LayerBudget


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """Routed pairs, sorted by expert and, within an expert, by token. `ends_E` is where each expert's pairs end."""

    token_R: Tensor  # int64
    expert_R: Tensor  # int64
    weight_R: Tensor
    ends_E: Tensor  # int64, cumulative

    @property
    def load_E(self) -> Tensor:
        """Pairs per expert."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1))


def ranks(budget: LayerBudget) -> Tensor:
    """Which of `k_max` ranks each token may use: bool [T, K]. Plain torch only: the kernels have `route` in topk.h."""
    counts_T = budget.counts_T
    return counts_T.new_tensor(range(budget.k_max))[None, :] < counts_T[:, None]


def sort_pairs(token_R: Tensor, expert_R: Tensor, weight_R: Tensor, experts: int) -> RoutedPairs:
    """Order pairs by expert; the sort is stable, so a token's order of summation is by expert, whatever its batch."""
    order_R = expert_R.argsort(stable=True)
    ends_E = expert_R.bincount(minlength=experts).cumsum(0)
    return RoutedPairs(token_R[order_R], expert_R[order_R], weight_R[order_R], ends_E)
