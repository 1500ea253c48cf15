"""MoE++: a pool with experts that compute nothing gives what its formulas give, in float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.budget import FAMILY_RULE, RoutingRule
from model.moe.moe_plus_plus import MoEPlusPlusMixture
from model.shapes.mixtures import Router
from model.shapes.moe_plus_plus import MoEPlusPlus
from model.step import LayerStep, Observer
from tests.model.tiny import randomise, use

WIDTH, EXPERTS, POOL = 16, 5, 9


def shape(**changes: Any) -> MoEPlusPlus:
    fields: dict[str, Any] = {"experts": EXPERTS, "width": 12, "trained": 2, "router": Router(normalise=True)}
    return MoEPlusPlus(**fields | changes)


def mixture(seed: int = 0, **changes: Any) -> MoEPlusPlusMixture:
    module = MoEPlusPlusMixture(WIDTH, shape(**changes))
    randomise(module, seed)
    with torch.no_grad():
        module.router.mul_(2.0)
    return module.requires_grad_(False)


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def asked(counts: Sequence[int], biases: Sequence[float], observer: Observer | None = None) -> LayerStep:
    """Tokens of these counts, each with a bias of its own."""
    step = use(counts, observer=observer)
    rules = tuple(RoutingRule(free_bias=bias) for bias in biases)
    return replace(step, budget=replace(step.budget, rules=rules, rule_T=torch.arange(len(counts))))


def by_formula(module: MoEPlusPlusMixture, x_D: Tensor, before_E: Tensor | None, count: int, bias: float) -> Any:
    """What one token chose, best first, its output, and its logits, in float64 from the definition."""
    config, x_D = module.config, x_D.double()
    logits = module.router.double() @ x_D
    if config.residual:
        assert before_E is not None
        logits = logits + module.residual.double() @ before_E
    ranked = [float(value) + bias * (e >= config.experts) for e, value in enumerate(logits)]
    chosen = sorted(range(len(ranked)), key=lambda e: -ranked[e])[:count]
    first_copy = config.experts + config.constant
    first_zero = first_copy + config.copy
    probs = logits.softmax(0)
    gates = {e: float(probs[e]) * (e < first_zero) for e in chosen}
    mass = sum(gates.values())
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for e in chosen:
        if e < config.experts:
            gate, up = (module.gate_up[e].double() @ x_D).chunk(2)
            out = module.down[e].double() @ (torch.nn.functional.silu(gate) * up)
        elif e < first_copy:
            constant = e - config.experts
            alpha = (module.constant_mix[constant].double() @ x_D).softmax(0)
            out = alpha[0] * x_D + alpha[1] * module.constants[constant].double()
        else:
            out = x_D * (e < first_zero)
        total += gates[e] / mass * out if mass else 0.0
    return chosen, total, logits


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_two_layers_give_what_the_formulas_give(data: st.DataObject) -> None:
    """The second reads the first one's logits; counts and biases are each token's own."""
    kinds = {name: data.draw(st.integers(0, 2)) for name in ("constant", "copy", "zero")}
    first, second = mixture(1, **kinds), mixture(2, residual=True, **kinds)
    counts = data.draw(st.lists(st.integers(1, EXPERTS + sum(kinds.values())), min_size=1, max_size=6))
    biases = [data.draw(st.sampled_from([0.0, 0.0, 0.8, -0.8, 50.0, -50.0])) for _ in counts]
    x_TD, step = tokens(len(counts)), asked(counts, biases)
    found = first(x_TD, step), second(x_TD, step)
    for token, (count, bias) in enumerate(zip(counts, biases, strict=True)):
        _, total_D, logits_E = by_formula(first, x_TD[token], None, count, bias)
        torch.testing.assert_close(found[0][token].double(), total_D, atol=1e-4, rtol=0)
        _, total_D, _ = by_formula(second, x_TD[token], logits_E, count, bias)
        torch.testing.assert_close(found[1][token].double(), total_D, atol=1e-4, rtol=0)


def test_fewer_are_the_first_of_more_and_a_bias_frees_tokens() -> None:
    module, x_TD = mixture(), tokens(40)
    logits_TE = module.logits(x_TD)

    def chosen(count: int, bias: float = 0.0) -> list[list[int]]:
        return module.choose(logits_TE, asked([count] * 40, [bias] * 40)).expert_TK.tolist()

    def work(bias: float) -> int:
        return sum(expert < EXPERTS for row in chosen(2, bias) for expert in row)

    full = chosen(POOL)
    assert all(sorted(row) == list(range(POOL)) for row in full)
    assert all(chosen(count) == [row[:count] for row in full] for count in range(1, POOL))
    assert 2 * 40 == work(-50.0) > work(-0.5) > work(0.0) > work(0.5) > work(50.0) == 0


class Told(Observer):
    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs, self.load = pairs, load_E.tolist()

    def used(self, layer: int, used_T: Tensor) -> None:
        self.used_by = used_T.tolist()

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        self.experts = [[expert for expert in row if expert >= 0] for row in expert_TK.tolist()]


def test_only_experts_that_compute_are_counted() -> None:
    module, x_TD, told = mixture(), tokens(12), Told()
    module(x_TD, replace(asked([3] * 12, [0.0] * 12, told), routes=True))
    expected = [[e for e in by_formula(module, x_D, None, 3, 0.0)[0] if e < EXPERTS] for x_D in x_TD]
    assert told.experts == expected and told.used_by == [len(row) for row in expected]
    assert told.pairs == sum(told.load) == sum(told.used_by) < 3 * 12
    assert len(told.load) == EXPERTS


def test_without_a_look_at_values_the_sum_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x_TD = mixture(), tokens(9)
    expected = module(x_TD, asked([3] * 9, [0.0] * 9))
    monkeypatch.setattr("model.moe.topk.devices.readable", lambda _: False)
    torch.testing.assert_close(module(x_TD, asked([3] * 9, [0.0] * 9)), expected, atol=1e-5, rtol=1e-5)


def test_a_token_of_zero_experts_alone_gets_zero() -> None:
    module = mixture(constant=0, copy=0, zero=2)
    assert torch.equal(module(tokens(3), asked([2] * 3, [50.0] * 3)), torch.zeros(3, WIDTH))


def test_logits_of_no_earlier_mixture_are_an_error() -> None:
    with pytest.raises(ValueError, match="no mixture before this one"):
        mixture(residual=True)(tokens(2), use([2, 2]))


@pytest.mark.parametrize("rule", [RoutingRule("raw"), RoutingRule(threshold=0.5), RoutingRule(reuse=1)])
def test_rules_of_other_routers_are_never_dropped_in_silence(rule: RoutingRule) -> None:
    step = use([2])
    budget = replace(step.budget, rules=(FAMILY_RULE, rule), rule_T=torch.tensor([1]))
    with pytest.raises(ValueError, match="no routing rule but a bias"):
        mixture()(tokens(1), replace(step, budget=budget))


@pytest.mark.parametrize("changes", [{"zero": -1}, {"router": Router()}, {"trained": 10}])
def test_a_shape_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"zero|router|trained"):
        shape(**changes)
