"""Experts with gates: DynMoE and ReMoE are what their formulas say, in float64; counts and offsets are nested."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.budget import FAMILY_RULE, RoutingRule
from model.moe.topk import TopKMixture
from model.shapes.mixtures import Router, Score
from model.step import LayerStep, Observer
from tests.model.tiny import randomise, topk, use

WIDTH, EXPERTS = 16, 6
each_gate = pytest.mark.parametrize("score", ["top_any", "relu"])


def mixture(score: Score, threshold: float = 0.0) -> TopKMixture:
    module = TopKMixture(WIDTH, replace(topk(experts=EXPERTS, trained=EXPERTS), router=Router(score)))
    randomise(module)
    if score == "top_any":
        with torch.no_grad():
            module.temperature.fill_(4.0)
            module.thresholds.add_(threshold)
    return module.requires_grad_(False)


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def asked(counts: Sequence[int], offsets: Sequence[float] = (), observer: Observer | None = None) -> LayerStep:
    """Tokens of these counts, each with an offset of its own."""
    step = use(counts, observer=observer)
    if not offsets:
        return step
    rules = tuple(RoutingRule(gate_offset=offset) for offset in offsets)
    return replace(step, budget=replace(step.budget, rules=rules, rule_T=torch.arange(len(counts))))


def by_formula(module: TopKMixture, x_D: Tensor, count: int, offset: float) -> tuple[dict[int, float], Tensor]:
    """The weights of one token's experts, and their sum, in float64 from the definition."""
    x_D, router = x_D.double(), module.router.double()
    if module.config.router.score == "relu":
        score = [float(w @ x_D) for w in router]
        weights = {e: value + offset for e, value in enumerate(score) if value + offset > 0}
    else:
        t = float(module.temperature)
        score = [float(w @ x_D / w.norm() / x_D.norm()) for w in router]
        moved = [1 / (1 + exp(-t * cosine - offset)) for cosine in score]
        passes = [s > 1 / (1 + exp(-t * float(g))) for s, g in zip(moved, module.thresholds, strict=True)]
        weights = {e: 1.0 for e in range(EXPERTS) if passes[e]} or {score.index(max(score)): 1.0}
    best = sorted(weights, key=lambda e: -score[e])[:count]
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for e in best:
        gate, up = (module.gate_up[e].double() @ x_D).chunk(2)
        total += weights[e] * (module.down[e].double() @ (torch.nn.functional.silu(gate) * up))
    return {e: weights[e] for e in best}, total


@each_gate
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_each_token_gets_what_the_formula_gives(score: Score, data: st.DataObject) -> None:
    """Tokens with their own counts and offsets side by side; nothing but one's own matters."""
    counts = data.draw(st.lists(st.integers(1, EXPERTS), min_size=1, max_size=6))
    offsets = [data.draw(st.sampled_from([0.0, 0.0, -1.5, -0.25, 0.5, 100.0, -100.0])) for _ in counts]
    module, x_TD = mixture(score, data.draw(st.sampled_from([-0.2, 0.0, 0.3]))), tokens(len(counts))
    step = asked(counts, offsets)
    y_TD, choice = module(x_TD, step), module.choose(module.logits(x_TD), step)
    for token, (count, offset) in enumerate(zip(counts, offsets, strict=True)):
        weights, total_D = by_formula(module, x_TD[token], count, offset)
        torch.testing.assert_close(y_TD[token].double(), total_D, atol=1e-4 * (1 + abs(offset)), rtol=0)
        runs_K = choice.runs_TK[token]
        found = zip(choice.expert_TK[token][runs_K].tolist(), choice.weight_TK[token][runs_K].tolist(), strict=True)
        assert dict(found) == pytest.approx(weights, abs=1e-4)


@each_gate
def test_fewer_are_the_first_of_more_and_more_gates_open_with_the_offset(score: Score) -> None:
    module, x_TD = mixture(score), tokens(40)
    logits_TE = module.logits(x_TD)

    def chosen(count: int, offset: float) -> list[list[int]]:
        routes_TK = module.choose(logits_TE, asked([count] * 40, [offset] * 40)).routes_TK
        return [[expert for expert in row if expert >= 0] for row in routes_TK.tolist()]

    full = chosen(EXPERTS, 0.0)
    for count in range(1, EXPERTS):
        assert chosen(count, 0.0) == [row[:count] for row in full]
    wider, narrower = chosen(EXPERTS, 0.4), chosen(EXPERTS, -0.4)
    assert all(set(less) <= set(more) for less, more in zip(full, wider, strict=True))
    assert sum(map(len, narrower)) < sum(map(len, full)) < sum(map(len, wider)) < 40 * EXPERTS
    least = 1 if score == "top_any" else 0
    assert {len(row) for row in chosen(EXPERTS, -100.0)} == {least}
    assert {len(row) for row in chosen(EXPERTS, 100.0)} == {EXPERTS}


class Told(Observer):
    pairs, loads, used_by = 0, 0, None

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs, self.loads = pairs, int(load_E.sum())

    def used(self, layer: int, used_T: Tensor) -> None:
        self.used_by = used_T.tolist()


@each_gate
def test_what_ran_is_told_under_every_rule(score: Score) -> None:
    module, x_TD, told = mixture(score), tokens(7), Told()
    module(x_TD, asked([EXPERTS] * 7, observer=told))
    expected = [len(by_formula(module, x_D, EXPERTS, 0.0)[0]) for x_D in x_TD]
    assert told.used_by == expected and told.pairs == told.loads == sum(expected)
    assert 0 < sum(expected) < 7 * EXPERTS


@each_gate
def test_without_a_look_at_values_the_sum_is_the_same(score: Score) -> None:
    module, x_TD = mixture(score), tokens(9)
    step = asked([3] * 9, [0.1 * t for t in range(9)])
    weight_TE, runs_TE = module.choose(module.logits(x_TD), step).by_expert(EXPERTS)
    torch.testing.assert_close(module.run_padded(x_TD, weight_TE, runs_TE), module(x_TD, step), atol=1e-5, rtol=1e-5)


@each_gate
@pytest.mark.parametrize("rule", [RoutingRule("raw"), RoutingRule(threshold=0.5), RoutingRule(reuse=1)])
def test_rules_of_other_routers_are_never_dropped_in_silence(score: Score, rule: RoutingRule) -> None:
    step = use([2])
    budget = replace(step.budget, rules=(FAMILY_RULE, rule), rule_T=torch.tensor([1]))
    with pytest.raises(ValueError, match="no routing rule but an offset"):
        mixture(score)(tokens(1), replace(step, budget=budget))


def test_a_router_with_gates_has_no_other_fields() -> None:
    with pytest.raises(ValueError, match="no other field than scale"):
        Router("relu", normalise=True)
