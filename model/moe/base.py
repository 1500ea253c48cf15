"""`Choice` (a router's experts of each token) and `RoutedPairs` (the same as (token, expert, weight) sorted by expert),
and helpers that all kinds of mixtures share.

Not here: how a kind chooses and what its experts are (one file for each kind, beside this one).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from model import devices
from model.batch import LayerBudget
from model.shapes.mixtures import Router


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


@dataclass(frozen=True, slots=True)
class Choice:
    """Experts of each token, best first, their weights, and which of them run. The weights of the others are
    undefined."""

    expert_TK: Tensor  # int64
    weight_TK: Tensor
    runs_TK: Tensor  # bool

    @property
    def used_T(self) -> Tensor:
        """How many experts each token runs."""
        return self.runs_TK.sum(-1)

    @property
    def routes_TK(self) -> Tensor:
        """The experts that run, best first, then -1; int32."""
        order_TK = self.runs_TK.sort(dim=-1, descending=True, stable=True).indices
        return self.expert_TK.where(self.runs_TK, -1).gather(-1, order_TK).int()

    def by_expert(self, experts: int) -> tuple[Tensor, Tensor]:
        """Weights and which experts run, both [T, E]. Unlike `pairs`, no shape depends on values."""
        shape = len(self.expert_TK), experts
        weight_TK = self.weight_TK.where(self.runs_TK, 0)
        weight_TE = weight_TK.new_zeros(shape).scatter(-1, self.expert_TK, weight_TK)
        return weight_TE, self.runs_TK.new_zeros(shape).scatter(-1, self.expert_TK, self.runs_TK)

    def pairs(self, experts: int) -> RoutedPairs:
        """The pairs that run, of a layer with so many experts."""
        token_R, rank_R = self.runs_TK.nonzero(as_tuple=True)
        return sort_pairs(token_R, self.expert_TK[token_R, rank_R], self.weight_TK[token_R, rank_R], experts)


def running_sum(weight_TK: Tensor) -> Tensor:
    """The sum of each row, [T, 1], from the first rank on. So zeros at the end (ranks that only other tokens of the
    batch use) do not change its bits."""
    return weight_TK.cumsum(-1)[:, -1:]


def normalised(weight_TK: Tensor, sum_T1: Tensor, router: Router) -> Tensor:
    """Weights over their sum, with the router's own guard against zero."""
    return weight_TK / (sum_T1.clamp(min=router.eps) if router.clamp_sum else sum_T1 + router.eps)


def ranks(budget: LayerBudget) -> Tensor:
    """Which of `k_max` ranks each token may use: bool [T, K]. Plain torch only: the kernels have `route` in topk.h."""
    counts_T = budget.counts_T
    return torch.arange(budget.k_max, device=counts_T.device)[None, :] < counts_T[:, None]


def rule_offsets(budget: LayerBudget, name: Literal["gate_offset", "free_bias"]) -> Tensor | None:
    """The offset that each token's rule adds to its logits, [T, 1] float32; None if no rule has one."""
    values: list[float] = [getattr(rule, name) for rule in budget.rules]
    if budget.rule_T is None or not any(values):
        return None
    return devices.tensor_on(values, budget.rule_T.device)[budget.rule_T, None]


def allowed(budget: LayerBudget) -> Tensor | None:
    """Which experts each token's rule allows, bool [T, E]; None if every rule allows all."""
    if budget.rule_T is None or not any(rule.kept for rule in budget.rules):
        return None
    kept_RE = _kept(tuple(rule.kept[budget.moe_layer] if rule.kept else "" for rule in budget.rules))
    return kept_RE.to(budget.rule_T.device, non_blocking=True)[budget.rule_T]


@lru_cache(maxsize=1024)
def _kept(layers: tuple[str, ...]) -> Tensor:
    everything = "1" * max(map(len, layers))
    return torch.tensor([[one == "1" for one in layer or everything] for layer in layers])


def token_ranks(counts_T: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Token and rank of all `pairs` that the counts allow, by token and then by rank."""
    device = counts_T.device
    token_R = torch.arange(len(counts_T), device=device).repeat_interleave(counts_T, output_size=pairs)
    first_T = counts_T.cumsum(0) - counts_T
    return token_R, torch.arange(pairs, device=device) - first_T[token_R]


def sort_pairs(token_R: Tensor, expert_R: Tensor, weight_R: Tensor, experts: int) -> RoutedPairs:
    """Order pairs by expert; the sort is stable, so a token's order of summation is by expert, whatever its batch."""
    order_R = expert_R.argsort(stable=True)
    ends_E = expert_R.bincount(minlength=experts).cumsum(0)
    return RoutedPairs(token_R[order_R], expert_R[order_R], weight_R[order_R], ends_E)
