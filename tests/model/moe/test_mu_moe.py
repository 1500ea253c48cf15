"""µMoE is what its formulas say, in float64, with the whole tensor of experts; counts are nested upper bounds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.budget import RoutingRule
from model.moe.mu_moe import FactorisedMap, MultilinearMixture, entmax15
from model.shapes.mu_moe import MuMoE
from model.step import Observer
from tests.model.tiny import randomise, use

WIDTH, EXPERTS = 10, 6
SHAPES: dict[str, dict[str, Any]] = {
    "cp": {"factorisation": "cp", "ranks": (9,)},
    "cp plain": {"factorisation": "cp", "ranks": (9,), "bias": False, "input_norm": False, "gate_norm": "none"},
    "tr": {"factorisation": "tr", "ranks": (3, 2, 5)},
    "tr dropping": {"factorisation": "tr", "ranks": (2, 3, 4), "restriction": "drop", "gate_bias": True},
}
each_shape = pytest.mark.parametrize("name", SHAPES)


def mixture(name: str) -> MultilinearMixture:
    module = MultilinearMixture(WIDTH, MuMoE(EXPERTS, 8, EXPERTS, **SHAPES[name]))
    randomise(module)
    with torch.no_grad():
        module.up.experts.add_(1.0)
        module.down.experts.add_(1.0)
    return module.requires_grad_(False)


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def by_bisection(logits: Sequence[float]) -> list[float]:
    """Entmax-1.5 from its definition: the threshold at which the squares sum to 1."""
    halves = [value / 2 for value in logits]
    low, high = max(halves) - 1, max(halves)
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(max(0.0, half - middle) ** 2 for half in halves)
        low, high = (middle, high) if total > 1 else (low, middle)
    return [max(0.0, half - low) ** 2 for half in halves]


def whole_tensor(one: FactorisedMap) -> Tensor:
    """W [N, O, I] of all experts, entry by entry of the definition."""
    experts, inputs, outputs = one.experts.double(), one.inputs.double(), one.outputs.double()
    if not one.is_ring:
        return torch.stack([outputs @ torch.diag(row) @ inputs.T for row in experts])
    tensor = torch.zeros(experts.shape[1], outputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for n, o, i in torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist():
        tensor[n, o, i] = (experts[:, n] @ inputs[:, i] @ outputs[:, o]).trace()
    return tensor


def gate(module: MultilinearMixture, x_D: Tensor) -> list[float]:
    logits = module.gate.weight.double() @ x_D + (module.gate.bias.double() if module.shape.gate_bias else 0)
    if module.shape.gate_norm == "layer":
        logits = (logits - logits.mean()) / (logits.var(correction=0) + 1e-5).sqrt()
    return by_bisection(logits.tolist())


def kept(module: MultilinearMixture, x_D: Tensor, count: int) -> dict[int, float]:
    """The weights of the first experts of one token."""
    weights = gate(module, x_D.double())
    best = [n for n in sorted(range(EXPERTS), key=lambda n: -weights[n])[:count] if weights[n] > 0]
    total = sum(weights[n] for n in best) if module.shape.restriction == "renormalise" else 1.0
    return {n: weights[n] / total for n in best}


def by_formula(module: MultilinearMixture, x_D: Tensor, weights: dict[int, float]) -> Tensor:
    """One token's output for these weights of experts."""
    x_D, shape = x_D.double(), module.shape
    if shape.input_norm:
        normed = (x_D - x_D.mean()) / (x_D.var(correction=0) + 1e-5).sqrt()
        x_D = normed * module.input_norm.weight.double() + module.input_norm.bias.double()

    def mapped(one: FactorisedMap, values: Tensor) -> Tensor:
        if shape.bias:
            values = torch.cat([values, torch.ones(1, dtype=torch.float64)])
        tensor = whole_tensor(one)
        return torch.stack([weight * (tensor[n] @ values) for n, weight in weights.items()]).sum(0)

    return mapped(module.down, torch.nn.functional.gelu(mapped(module.up, x_D)))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, 1e4, -1e4]), min_size=1, max_size=12))
def test_entmax_is_its_definition(logits: list[float]) -> None:
    """With ties, with one value, and with values far apart."""
    found = entmax15(torch.tensor([logits]))[0]
    torch.testing.assert_close(found.double(), torch.tensor(by_bisection(logits)).double(), atol=3e-5, rtol=0)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)


def test_entmax_of_many_equal_values_and_of_wide_rows() -> None:
    assert entmax15(torch.zeros(2, 8192)).sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits, entmax15(logits), strict=True):
        expected = torch.tensor(by_bisection(row.tolist())).double()
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
        assert 1 < int((found > 0).sum()) < 500


@each_shape
def test_each_token_gets_what_the_formula_gives(name: str) -> None:
    """Tokens of all counts side by side; the same alone."""
    module, counts = mixture(name), [1, 6, 2, 3, 6, 4, 5, 1]
    x_TD = tokens(len(counts))
    y_TD = module(x_TD, use(counts))
    for token, count in enumerate(counts):
        expected = by_formula(module, x_TD[token], kept(module, x_TD[token], count))
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(y_TD[token].double(), expected, atol=2e-5, rtol=1e-4)
        alone_D = module(x_TD[token : token + 1], use([count]))[0]
        torch.testing.assert_close(y_TD[token], alone_D, atol=1e-5, rtol=1e-4)


@each_shape
def test_at_all_experts_it_is_the_published_layer(name: str) -> None:
    """The whole gate as entmax gives it, whatever the restriction; a count below changes the output."""
    module, x_TD = mixture(name), tokens(20)
    full_TD = module(x_TD, use([EXPERTS] * 20))
    for x_D, y_D in zip(x_TD, full_TD, strict=True):
        expected = by_formula(module, x_D, dict(enumerate(gate(module, x_D.double()))))
        torch.testing.assert_close(y_D.double(), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(full_TD, module(x_TD, use([1] * 20)), atol=1e-2)


@each_shape
def test_fewer_are_the_first_of_more(name: str) -> None:
    module = mixture(name)
    gate_TE = module.weights(tokens(30))

    def chosen(count: int) -> list[list[int]]:
        routes_TK = module.choose(gate_TE, use([count] * 30).budget).routes_TK
        return [[expert for expert in row if expert >= 0] for row in routes_TK.tolist()]

    full = chosen(EXPERTS)
    assert all(1 <= len(row) <= EXPERTS for row in full) and len({*map(len, full)}) > 1
    for count in range(1, EXPERTS):
        assert chosen(count) == [row[:count] for row in full]


class Told(Observer):
    pairs, loads, used_by, chosen = 0, 0, [0], [[0]]

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs, self.loads = pairs, int(load_E.sum())

    def used(self, layer: int, used_T: Tensor) -> None:
        self.used_by = used_T.tolist()

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        self.chosen = [[expert for expert in row if expert >= 0] for row in expert_TK.tolist()]


@each_shape
def test_experts_of_weight_zero_are_not_counted(name: str) -> None:
    module, x_TD, told = mixture(name), tokens(12), Told()
    module(x_TD, replace(use([5] * 12, observer=told), routes=True))
    expected = [list(kept(module, x_D, 5)) for x_D in x_TD]
    assert told.chosen == expected and told.used_by == [*map(len, expected)]
    assert told.pairs == told.loads == sum(map(len, expected)) < 12 * 5


def test_rules_are_never_dropped_in_silence() -> None:
    step = use([2])
    budget = replace(step.budget, rules=(RoutingRule("raw"),), rule_T=torch.tensor([0]))
    with pytest.raises(ValueError, match="runs no routing rule"):
        mixture("cp")(tokens(1), replace(step, budget=budget))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (3, 4)}, "'cp' has 1 ranks, got"),
        ({"ranks": (0,)}, "ranks must be a whole number of at least 1, got 0"),
        ({"factorisation": "tt", "ranks": (3,)}, "factorisation 'tt' is not known, only cp, tr"),
        ({"gate_norm": "batch"}, "gate_norm 'batch' is not known, only layer, none"),
        ({"experts": 9000}, "num_experts must be at most 8192, got 9000"),
    ],
)
def test_what_no_model_can_have_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    fields = {"experts": 6, "width": 8, "trained": 6} | SHAPES["cp"]
    with pytest.raises(ValueError, match=message):
        MuMoE(**fields | changes)


@pytest.mark.parametrize("name", ["cp", "tr"])
def test_the_count_changes_no_work(name: str) -> None:
    module = mixture(name)
    one, all_of_them = (module.shape.token_work(WIDTH, count) for count in (1, EXPERTS))
    norm = module.input_norm.weight.numel() * 2
    assert one == all_of_them and one.routed == 0
    assert one.shared == sum(parameter.numel() for parameter in module.parameters()) - norm
