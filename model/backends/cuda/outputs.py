"""The outputs of a step, all on the device and without waiting: hidden states, and the choice of each mixture.

The loads of all sparse mixtures are counted together, in a handful of launches. What only some observers want is
computed when it is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.backends.cuda.layer import Routing
from model.batch import BudgetRows
from model.moe.base import Choice
from model.moe.infinity import kept_groups
from model.step import Observer


class Chosen(Protocol):
    """What the tokens of a step chose in one MoE layer."""

    def used_T(self) -> Tensor:
        """Int64: how many pairs each token ran."""
        ...

    def routes_TK(self) -> Tensor:
        """Int32: each token's experts, in the form of `Observer.routes`."""
        ...


@dataclass(frozen=True, slots=True)
class ChosenExperts:
    """The choice in a sparse mixture."""

    routing: Routing

    def used_T(self) -> Tensor:
        """The number of ranks that are not the sentinel."""
        return self._choice().used_T

    def routes_TK(self) -> Tensor:
        """Experts, best first."""
        return self._choice().routes_TK

    def _choice(self) -> Choice:
        expert_TK = self.routing.expert_TK.long()
        return Choice(expert_TK, self.routing.weight_TK, expert_TK < self.routing.experts)


@dataclass(frozen=True, slots=True)
class ChosenGroups:
    """The choice in an ∞-MoE, from its mean masks."""

    mask_TE: Tensor

    def used_T(self) -> Tensor:
        """Draws are never adaptive.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the draws of an ∞-MoE follow from the counts alone")

    def routes_TK(self) -> Tensor:
        """Groups, in rising order."""
        return kept_groups(self.mask_TE)


@dataclass(slots=True)
class ReportedChoice(Observer):
    """Keeps the reports of a mixture in plain torch about one step, as its choice."""

    load_E: Tensor | None = None
    _used_T: Tensor | None = None
    _routes_TK: Tensor | None = None

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.load_E = load_E

    def used(self, layer: int, used_T: Tensor) -> None:
        self._used_T = used_T

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        self._routes_TK = expert_TK

    def used_T(self) -> Tensor:
        """As reported."""
        assert self._used_T is not None
        return self._used_T

    def routes_TK(self) -> Tensor:
        """As reported."""
        assert self._routes_TK is not None
        return self._routes_TK


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """The final normed hidden states of the rows that get logits, and of each MoE layer the pairs per expert (∞-MoE:
    tokens per group), int64, and what chose them."""

    normed_BD: Tensor
    loads: tuple[Tensor, ...]
    chosen: tuple[Chosen, ...]

    def report_to(self, observer: Observer, budget: BudgetRows, routes: bool) -> None:
        """Report a step of this budget to an observer, without the padding after its tokens.

        The reported tensors are copies that no later step overwrites, unlike the outputs of a replay.
        """
        tokens, adaptive = budget.counts_LT.shape[1], any(rule.adaptive for rule in budget.rules)
        layers = zip(budget.pairs_L, _copied(self.loads), self.chosen, strict=True)
        for layer, (pairs, load_E, chosen) in enumerate(layers):
            observer.routed(layer, pairs, load_E, None)
            if adaptive:
                observer.used(layer, chosen.used_T()[:tokens])
            if routes:
                observer.routes(layer, chosen.routes_TK()[:tokens])


def _copied(loads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies of the loads; one launch if all have one shape."""
    if len({load_E.shape for load_E in loads}) == 1:
        return torch.stack(list(loads)).unbind()
    return [load_E.clone() for load_E in loads]


def loads_of(chosen: Sequence[Chosen]) -> tuple[Tensor, ...]:
    """Pairs per expert of each layer."""
    routings = [layer.routing for layer in chosen if isinstance(layer, ChosenExperts)]
    masks = [layer.mask_TE for layer in chosen if isinstance(layer, ChosenGroups)]
    of_experts, of_groups = iter(_pairs_per_expert(routings)), iter(_tokens_per_group(masks))
    loads: list[Tensor] = []
    for layer in chosen:
        if isinstance(layer, ReportedChoice):
            assert layer.load_E is not None
            loads.append(layer.load_E)
        else:
            loads.append(next(of_experts if isinstance(layer, ChosenExperts) else of_groups))
    return tuple(loads)


def _pairs_per_expert(routings: Sequence[Routing]) -> list[Tensor]:
    """A row of counters for each layer; the sentinel has one too, which is left out."""
    if len({routing.expert_TK.shape for routing in routings}) != 1:  # none, or layers of different sizes
        return [load_E for routing in routings for load_E in _pairs_per_expert([routing])]
    expert_MP = torch.stack([routing.expert_TK.flatten() for routing in routings]).long()
    counters = max(routing.experts for routing in routings) + 1
    load_ME = expert_MP.new_zeros(len(routings), counters).scatter_add_(1, expert_MP, torch.ones_like(expert_MP))
    return [load_E[: routing.experts] for load_E, routing in zip(load_ME, routings, strict=True)]


def _tokens_per_group(masks: Sequence[Tensor]) -> Sequence[Tensor]:
    if len({mask_TE.shape for mask_TE in masks}) == 1:
        return (torch.stack(list(masks)) != 0).sum(1).unbind()
    return [(mask_TE != 0).sum(0) for mask_TE in masks]
