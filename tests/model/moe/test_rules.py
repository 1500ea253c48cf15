"""Routing rules, compared with the formulas of `RoutingRule` token by token in float64."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import LayerBudget
from model.budget import FAMILY_RULE, Normaliser, RoutingRule
from model.moe.base import Choice
from model.moe.router import choose
from model.shapes.mixtures import Router

EXPERTS, TRAINED = 12, 4
ROUTERS = {
    "softmax": Router(),
    "normalised": Router(normalise=True),
    "scaled": Router(normalise=True, scale=2.5, eps=1e-20),
    "clamped": Router("sigmoid", normalise=True, eps=1e-12, clamp_sum=True),
    "sigmoid": Router("sigmoid"),
    "biased": Router("sigmoid", normalise=True, selection_bias=True, groups=4, kept_groups=2, group_score="top2"),
    "groups": Router(groups=3, kept_groups=2, scale=16.0),
}
RULES = [
    *(RoutingRule(normaliser) for normaliser in ("raw", "kept", 1, 3, 6)),
    *(RoutingRule(threshold=threshold) for threshold in (0.2, 0.5, 1.0)),
    *(RoutingRule(top_p=top_p) for top_p in (0.3, 0.7, 1.0)),
    *(RoutingRule(reuse=reuse) for reuse in (1, 3)),
    RoutingRule("kept", threshold=0.3, reuse=2),
    RoutingRule(6, top_p=0.6, threshold=0.1),
    *(RoutingRule(skip=skip) for skip in (1, 2)),
    RoutingRule("kept", skip=1),
    RoutingRule(2, threshold=0.6, skip=1),
    RoutingRule(top_p=0.4, reuse=2, skip=2),
]
each_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
BIAS_E = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(8)) * 0.3


def logits(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)) * 1.5


def chosen(logits_TE: Tensor, counts: list[int], rules: list[RoutingRule], router: Router) -> Choice:
    distinct = tuple(dict.fromkeys(rules))
    rule_T = torch.tensor([distinct.index(rule) for rule in rules])
    budget = LayerBudget(torch.tensor(counts), max(counts), distinct, rule_T)
    return choose(logits_TE, budget, router, BIAS_E if router.selection_bias else None, TRAINED)


def weights(choice: Choice, token: int) -> dict[int, float]:
    """What one token runs, best first."""
    rows = zip(choice.expert_TK[token], choice.weight_TK[token], choice.runs_TK[token], strict=True)
    return {int(expert): float(weight) for expert, weight, runs in rows if runs}


class ByHand:
    """One token, in float64."""

    def __init__(self, logits_E: Tensor, router: Router) -> None:
        self.router = router
        exact_E = logits_E.double()
        self.score = (exact_E.sigmoid() if router.score == "sigmoid" else exact_E.softmax(0)).tolist()
        bias = BIAS_E.tolist() if router.selection_bias else [0.0] * EXPERTS
        rank = [score + extra for score, extra in zip(self.score, bias, strict=True)]
        size = EXPERTS // router.groups
        groups = [range(first, first + size) for first in range(0, EXPERTS, size)]
        best = 1 if router.group_score == "max" else 2
        groups.sort(key=lambda group: -sum(sorted((rank[e] for e in group), reverse=True)[:best]))
        allowed = [expert for group in groups[: router.kept_groups] for expert in group]
        self.order = sorted(allowed, key=lambda expert: -rank[expert])

    def own(self, count: int, rule: RoutingRule) -> list[int]:
        """What it runs whatever its batch runs."""
        kept: list[int] = []
        total = sum(self.score)
        order = self.order[rule.skip :]
        for expert in order[:count]:
            weak = self.score[expert] < rule.threshold * self.score[order[0]]
            enough = rule.top_p and sum(self.score[e] for e in kept) >= rule.top_p * total
            if kept and (weak or enough):
                break
            kept.append(expert)
        return kept

    def reused(self, own: list[int], running: set[int], rule: RoutingRule) -> list[int]:
        """The same with what its batch runs anyway."""
        further = [expert for expert in self.order[rule.skip :] if expert in running and expert not in own]
        return own + further[: rule.reuse]

    def weights(self, count: int, runs: list[int], rule: RoutingRule) -> dict[int, float]:
        score, router = self.score, self.router
        kept = sum(score[e] for e in runs)
        mass = 1.0 if router.normalise else sum(score[e] for e in self.order[:TRAINED])
        normaliser = rule.normaliser if count < TRAINED else "trained"
        if normaliser == "trained":
            factor = 1 / kept if router.normalise else 1.0
        elif normaliser == "raw":
            factor = 1.0
        elif normaliser == "kept":
            factor = mass / kept
        else:
            factor = mass / sum(score[e] for e in self.order[:normaliser])
        return {e: score[e] * factor * router.scale for e in runs}


def by_hand(logits_TE: Tensor, counts: list[int], rules: list[RoutingRule], router: Router) -> list[dict[int, float]]:
    tokens = [ByHand(logits_E, router) for logits_E in logits_TE]
    cases = list(zip(tokens, counts, rules, strict=True))
    own = [token.own(count, rule) for token, count, rule in cases]
    running = {expert for experts in own for expert in experts}
    return [
        token.weights(count, token.reused(experts, running, rule), rule)
        for (token, count, rule), experts in zip(cases, own, strict=True)
    ]


@each_router
def test_choice_and_weights_follow_the_formulas(router: Router) -> None:
    cases = [(rule, count) for rule, count in product(RULES, (1, 2, 3, 4, 6)) if rule.skip + count <= 6]
    rules, counts = [rule for rule, _ in cases], [count for _, count in cases]
    logits_TE = logits(len(cases))
    choice = chosen(logits_TE, counts, rules, router)
    for token, expected in enumerate(by_hand(logits_TE, counts, rules, router)):
        found = weights(choice, token)
        assert list(found) == list(expected), (rules[token], counts[token])
        assert found == pytest.approx(expected, rel=1e-5), (rules[token], counts[token])


rule_values = st.builds(
    RoutingRule,
    st.sampled_from(["trained", "raw", "kept", 2, 5]),
    st.sampled_from([0.0, 0.25, 0.6]),
    st.sampled_from([0.0, 0.5, 0.9]),
    skip=st.integers(0, 2),
)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([*ROUTERS]))
def test_a_tokens_neighbours_change_neither_choice_nor_weights(data: st.DataObject, name: str) -> None:
    rules = data.draw(st.lists(st.just(FAMILY_RULE) | rule_values, min_size=2, max_size=8))
    counts = [data.draw(st.integers(1, 6 - rule.skip)) for rule in rules]
    router, logits_TE = ROUTERS[name], logits(len(rules), seed=len(rules))
    together = chosen(logits_TE, counts, rules, router)
    bias_E = BIAS_E if router.selection_bias else None
    plain = choose(logits_TE, LayerBudget(torch.tensor(counts), max(counts)), router, bias_E, TRAINED)
    for token, (count, rule) in enumerate(zip(counts, rules, strict=True)):
        alone = chosen(logits_TE[token, None], [count], [rule], router)
        assert weights(together, token) == pytest.approx(weights(alone, 0), rel=1e-6)
        assert rule != FAMILY_RULE or weights(together, token) == weights(plain, token), "equal bits"


ALONE = [name for name, router in ROUTERS.items() if router.groups == 1]


@pytest.mark.parametrize("name", [*ALONE, "sigmoid with a bias"])
def test_kept_experts_choose_and_weigh_as_if_there_were_no_others(name: str) -> None:
    router = ROUTERS.get(name) or Router("sigmoid", normalise=True, selection_bias=True, eps=1e-20)
    cases = [(rule, count) for rule, count in product([FAMILY_RULE, *RULES], (1, 3, 4)) if rule.skip + count <= 6]
    logits_TE, counts = logits(len(cases)), [count for _, count in cases]
    logits_TE[:, ::3] = -200.0  # scores of zero, which experts that are left out must not come before
    kept = [0, 1, 3, 6, 8, 9, 10]
    mask = "".join("1" if expert in kept else "0" for expert in range(EXPERTS))
    masked = chosen(logits_TE, counts, [replace(rule, kept=(mask,)) for rule, _ in cases], router)
    rules = [rule for rule, _ in cases]
    distinct = tuple(dict.fromkeys(rules))
    rule_T = torch.tensor([distinct.index(rule) for rule in rules])
    budget = LayerBudget(torch.tensor(counts), max(counts), distinct, rule_T)
    bias_E = BIAS_E[kept] if router.selection_bias else None
    alone = choose(logits_TE[:, kept], budget, router, bias_E, TRAINED)
    for token, case in enumerate(cases):
        expected = {kept[expert]: weight for expert, weight in weights(alone, token).items()}
        found = weights(masked, token)
        assert list(found) == list(expected), case
        assert found == pytest.approx(expected, rel=1e-5), case


@each_router
def test_keeping_every_expert_changes_no_bit(router: Router) -> None:
    logits_TE, counts = logits(20), [1 + token % 6 for token in range(20)]
    whole = [RoutingRule(kept=("1" * EXPERTS,)), FAMILY_RULE] * 10
    bias_E = BIAS_E if router.selection_bias else None
    plain = choose(logits_TE, LayerBudget(torch.tensor(counts), 6), router, bias_E, TRAINED)
    found = chosen(logits_TE, counts, whole, router)
    assert [weights(found, token) for token in range(20)] == [weights(plain, token) for token in range(20)]


@each_router
@pytest.mark.parametrize("normaliser", ["raw", "kept", 2, 6])
def test_a_normaliser_changes_nothing_from_the_trained_count_on(router: Router, normaliser: Normaliser) -> None:
    logits_TE, rule = logits(20), RoutingRule(normaliser)
    for count in (TRAINED, 6):
        choices = [chosen(logits_TE, [count] * 20, [one] * 20, router) for one in (rule, RoutingRule(repair=True))]
        assert [weights(choices[0], t) for t in range(20)] == [weights(choices[1], t) for t in range(20)]
    below = chosen(logits_TE, [2] * 20, [rule] * 20, router)
    plain = chosen(logits_TE, [2] * 20, [FAMILY_RULE] * 20, router)
    unchanged = {(False, "raw"), (True, "kept"), (True, 2)}  # at 2 experts these say what the family says
    same = all(weights(below, t) == weights(plain, t) for t in range(20))
    assert same == ((router.normalise, normaliser) in unchanged)


@each_router
@pytest.mark.parametrize(
    "rules",
    [
        [RoutingRule(threshold=value) for value in (1.0, 0.6, 0.3, 0.1, 0.0)],
        [RoutingRule(top_p=value) for value in (0.2, 0.5, 0.8, 0.0)],
    ],
)
def test_fewer_experts_are_the_first_of_more(router: Router, rules: list[RoutingRule]) -> None:
    logits_TE = logits(30)
    rows = [chosen(logits_TE, [6] * 30, [rule] * 30, router) for rule in rules]
    means = [float(choice.used_T.double().mean()) for choice in rows]
    assert means == sorted(means) and means[0] < means[-1] == 6
    for fewer, more in pairwise(rows):
        for token in range(30):
            few, many = list(weights(fewer, token)), list(weights(more, token))
            assert len(few) >= 1 and few == many[: len(few)]


@each_router
def test_reuse_adds_only_what_runs_anyway(router: Router) -> None:
    logits_TE, counts = logits(6), [1, 2, 1, 3, 1, 2]
    plain = chosen(logits_TE, counts, [FAMILY_RULE] * 6, router)
    rules = [RoutingRule(reuse=2), FAMILY_RULE] * 3
    together = chosen(logits_TE, counts, rules, router)
    running = {expert for token in range(6) for expert in weights(plain, token)}
    added = 0
    for token, (count, rule) in enumerate(zip(counts, rules, strict=True)):
        found = list(weights(together, token))
        assert found[:count] == list(weights(plain, token))
        assert set(found) <= running and len(found) <= count + rule.reuse
        added += len(found) - count
    assert added > 0
    alone = chosen(logits_TE[:1], [2], [RoutingRule(reuse=5)], router)
    assert alone.used_T.tolist() == [2], "a token alone has nothing to reuse"


@each_router
def test_routes_are_what_runs(router: Router) -> None:
    logits_TE, rules = logits(len(RULES), seed=5), RULES
    choice = chosen(logits_TE, [3] * len(rules), rules, router)
    pairs = choice.pairs(EXPERTS)
    assert choice.routes_TK.dtype == torch.int32
    assert (choice.routes_TK >= 0).sum(1).tolist() == choice.used_T.tolist()
    assert len(pairs.token_R) == int(choice.used_T.sum()) == int(pairs.load_E.sum())
    for token, row in enumerate(choice.routes_TK.tolist()):
        assert row[: int(choice.used_T[token])] == list(weights(choice, token))
        assert set(row[int(choice.used_T[token]) :]) <= {-1}


def test_scores_that_are_all_zero_stay_finite() -> None:
    """Sigmoids of very negative logits."""
    choice = chosen(torch.full((2, EXPERTS), -200.0), [2, 2], [RoutingRule("kept"), RoutingRule(3)], ROUTERS["sigmoid"])
    assert [weights(choice, token) for token in (0, 1)] == [{0: 0.0, 1: 0.0}] * 2


def test_the_sparse_mixer_runs_no_other_rule() -> None:
    with pytest.raises(ValueError, match="sparse mixer"):
        chosen(logits(1), [2], [RoutingRule("raw")], Router("sparse_mixer"))
