"""As `mixture_cases`, for tokens with routing rules: random ones, and what they say in plain Python, token by token."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.backends.cpu.kernels import reference, reference_mixtures
from model.backends.cpu.kernels.pack import Kind
from model.backends.cpu.kernels.params import RepairParams
from model.backends.cpu.kernels.reference import Weight
from model.budget import Normaliser, RoutingRule
from model.moe.base import sort_pairs
from model.shapes.mixtures import Infinity, Router
from tests.model.backends.cpu.kernels.cases import Make
from tests.model.backends.cpu.kernels.mixture_cases import (
    InfinityCase,
    RouteCase,
    Rules,
    TopKCase,
    infinity_case,
    topk_case,
)

Ranked = list[tuple[float, int]]  # probability and expert, best first


def random_rule(make: Make, experts: int, reuse: bool = False, skip: int = 0) -> RoutingRule:
    """Any rule of a top-k mixture that skips at most `skip` experts; most fields are the family's."""
    choice = make.rng.choice
    normalisers: list[Normaliser] = ["trained", "raw", "kept", make.rng.randint(1, experts)]
    return RoutingRule(
        normaliser=choice(normalisers),
        threshold=choice([0.0, 0.0, 0.1, 0.6, 1.0]),
        top_p=choice([0.0, 0.0, 0.2, 0.7, 1.0]),
        repair=choice([False, True]),
        reuse=choice([0, make.rng.randint(1, experts)]) if reuse else 0,
        skip=choice([0, 0, min(skip, 1), make.rng.randint(0, skip)]),
    )


def random_rules(make: Make, counts_T: Tensor, experts: int, reuse: bool = False) -> Rules:
    """Some rules, the family's among them, one for every row. What a rule skips leaves the highest count."""
    skip = experts - int(counts_T.max())
    distinct = (RoutingRule(), *(random_rule(make, experts, reuse, skip) for _ in range(4)))
    return Rules(distinct, make.whole(0, len(distinct) - 1, len(counts_T)))


def random_repair(make: Make, counts: int, width: int) -> RepairParams:
    """Tables of the counts up to `counts`."""
    return RepairParams(1 + make.normal(counts + 1, width, scale=0.3), make.normal(counts + 1, width, scale=0.3))


@dataclass
class RuledRouteCase(RouteCase):
    """Routing by rules; what is expected is said in plain Python."""

    def expected(self) -> Tensor:
        weights_TE = torch.full(self.logits_TE.shape, -1.0, dtype=torch.float64)
        whole = [rank(logits_E) for logits_E in self.logits_TE]
        ranked = [order[self.rule(row).skip :] for row, order in enumerate(whole)]
        own = [own_count(self.rule(row), count, ranked[row]) for row, count in enumerate(self.counts_T.tolist())]
        running = {expert for row, count in enumerate(own) for _, expert in ranked[row][:count]}
        for row, count in enumerate(own):
            more = [one for one in ranked[row][count:] if one[1] in running][: self.rule(row).reuse]
            for weight, expert in self.weighed(row, whole[row], ranked[row][:count] + more):
                weights_TE[row, expert] = weight
        return weights_TE

    def rule(self, row: int) -> RoutingRule:
        assert self.rules.rule_T is not None
        return self.rules.distinct[int(self.rules.rule_T[row])]

    def weighed(self, row: int, ranked: Ranked, chosen: Ranked) -> Ranked:
        """The chosen experts with their weights."""
        normaliser = self.rule(row).normaliser
        if self.counts_T[row] >= self.trained:
            normaliser = "trained"
        if normaliser == "raw" or (normaliser == "trained" and not self.router.normalise):
            return chosen
        mass = 1.0 if self.router.normalise else total(ranked[: self.trained])
        over = total(ranked[:normaliser] if isinstance(normaliser, int) else chosen)
        return [(p * mass / over, expert) for p, expert in chosen]


def rank(logits_E: Tensor) -> Ranked:
    p_E = logits_E.double().softmax(-1).tolist()
    return sorted(zip(p_E, range(len(p_E)), strict=True), key=lambda one: (-one[0], one[1]))


def total(ranked: Ranked) -> float:
    return sum(p for p, _ in ranked)


def own_count(rule: RoutingRule, count: int, ranked: Ranked) -> int:
    """How many experts a token runs, whatever the others run."""
    own = 1
    while own < count:
        p, _ = ranked[own]
        if p < rule.threshold * ranked[0][0] or (rule.top_p and total(ranked[:own]) >= rule.top_p):
            break
        own += 1
    return own


def ruled_route_case(make: Make, rows: int, experts: int, router: Router, reuse: bool = False) -> RuledRouteCase:
    logits_TE, counts_T = make.normal(rows, experts, scale=2), make.whole(1, max(1, experts - 2), rows)
    rules, trained = random_rules(make, counts_T, experts, reuse), make.rng.randint(1, experts)
    return RuledRouteCase(logits_TE, counts_T, router, rules, trained)


@dataclass
class TogetherCase:
    """All rows of another case as the only one, run together however often it is asked for: for what depends on the
    batch, where rows that are run again give the same."""

    case: RuledRouteCase
    rows = 1
    rounded = False

    def run(self, rows_r: Tensor) -> Tensor:
        return torch.stack([self.case.run(torch.arange(self.case.rows)).flatten() for _ in rows_r])

    def expected(self) -> Tensor:
        return self.case.expected().flatten()[None]


@dataclass
class RuledTopKCase(TopKCase):
    """x += top-k mixture(norm(x)) whose routing is what `RuledRouteCase` expects."""

    def reference(self) -> tuple[Tensor, Tensor]:
        h_TD, budget = self.norm(self.x_TD), self.rules.budget(self.counts_T, torch.arange(self.rows))
        logits_TE = Weight.of(self.router)(h_TD).float()
        weights_TE = RuledRouteCase(logits_TE, self.counts_T, self.shape, self.rules, self.trained).expected()
        token_R, expert_R = (weights_TE >= 0).nonzero(as_tuple=True)
        pairs = sort_pairs(token_R, expert_R, weights_TE[token_R, expert_R], self.layer.count)
        y_TD = reference.experts(h_TD, pairs, self.layer.plain())
        return self.x_TD + reference_mixtures.repaired(y_TD, budget, self.repair), pairs.load_E


def ruled_topk_case(
    make: Make, rows: int, width: int, units: int, experts: int, kind: Kind, norm: str = "rms", **rest: Any
) -> TopKCase:
    """A top-k mixture whose rows have rules, some of them repair."""
    case = topk_case(make, rows, width, units, experts, kind, norm, **rest)
    rules, repair = random_rules(make, case.counts_T, experts), random_repair(make, experts, width)
    parts = (case.x_TD, case.counts_T, case.norm, case.router, case.layer, case.shape)
    return RuledTopKCase(*parts, rules, make.rng.randint(1, experts), repair)


def repaired_infinity_case(
    make: Make, rows: int, width: int, config: Infinity, run: int, kind: Kind, norm: str = "rms"
) -> InfinityCase:
    """An ∞-MoE about half of whose rows are repaired."""
    case = infinity_case(make, rows, width, config, run, kind, norm)
    distinct, rule_T = (RoutingRule(), RoutingRule(repair=True)), make.whole(0, 1, rows)
    use = replace(case.use, budget=replace(case.use.budget, rules=distinct, rule_T=rule_T))
    return replace(case, use=use, repair=random_repair(make, config.maximum, width))
