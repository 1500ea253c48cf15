"""Sparse top-k: exactly the routed pairs that the counts allow, chosen and weighted by rules no batch can change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.moe.base import RoutedPairs
from model.moe.topk import TopKMixture
from model.step import Observer
from tests.model.tiny import randomise, topk, use

WIDTH = 16


def mixture(experts: int = 6, normalise: bool = False) -> TopKMixture:
    module = TopKMixture(WIDTH, topk(experts=experts, trained=1, normalise=normalise))
    randomise(module)
    return module.requires_grad_(False)


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def chosen(pairs: RoutedPairs, count: int) -> list[dict[int, float]]:
    """Each token's experts and weights."""
    experts: list[dict[int, float]] = [{} for _ in range(count)]
    for token, expert, weight in zip(pairs.token_R, pairs.expert_R, pairs.weight_R, strict=True):
        assert int(expert) not in experts[int(token)]
        experts[int(token)][int(expert)] = float(weight)
    return experts


def by_hand(probs: list[float], count: int, normalise: bool) -> dict[int, float]:
    best = sorted(range(len(probs)), key=lambda expert: (-probs[expert], expert))[:count]
    mass = sum(probs[expert] for expert in best) if normalise else 1.0
    return {expert: probs[expert] / mass for expert in best}


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, list[int], bool]:
    """Probabilities with many ties, counts, and the normalisation rule."""
    experts, count = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    logits = [[draw(st.integers(-2, 2)) for _ in range(experts)] for _ in range(count)]
    counts = [draw(st.integers(1, experts)) for _ in range(count)]
    return torch.tensor(logits, dtype=torch.float32).softmax(-1), counts, draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(routings())
def test_each_token_gets_its_best_experts_ties_to_the_lower_index(case: tuple[Tensor, list[int], bool]) -> None:
    probs_TE, counts, normalise = case
    pairs = mixture(probs_TE.shape[1], normalise).route(probs_TE.log(), use(counts))
    found = chosen(pairs, len(counts))
    for token, count in enumerate(counts):
        expected = by_hand(probs_TE[token].tolist(), count, normalise)
        assert found[token].keys() == expected.keys()
        assert found[token] == pytest.approx(expected, abs=1e-6)
    assert len(pairs.token_R) == sum(counts) == int(pairs.load_E.sum())
    order = list(zip(pairs.expert_R.tolist(), pairs.token_R.tolist(), strict=True))
    assert order == sorted(order)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ragged_equals_dense(data: st.DataObject) -> None:
    experts, count = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 30))
    counts = [data.draw(st.integers(1, experts)) for _ in range(count)]
    module = mixture(experts, data.draw(st.booleans()))
    x_TD = tokens(count)
    pairs = module.route(x_TD @ module.router.T, use(counts))
    torch.testing.assert_close(module.run_ragged(x_TD, pairs), module.run_dense(x_TD, pairs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_output_is_the_weighted_sum_of_gated_experts(normalise: bool) -> None:
    module, x_TD, counts = mixture(normalise=normalise), tokens(5), [1, 6, 2, 3, 4]
    y_TD = module(x_TD, use(counts))
    for token, count in enumerate(counts):
        x_D = x_TD[token].double()
        expected_D = torch.zeros_like(x_D)
        for expert, weight in by_hand((module.router.double() @ x_D).softmax(-1).tolist(), count, normalise).items():
            gate_F, up_F = (module.gate_up[expert].double() @ x_D).chunk(2)
            expected_D += weight * (module.down[expert].double() @ (gate_F * gate_F.sigmoid() * up_F))
        torch.testing.assert_close(y_TD[token].double(), expected_D, atol=1e-5, rtol=1e-5)


def test_equal_logits_go_to_the_lower_index_and_a_count_is_a_prefix_of_the_next() -> None:
    module = mixture(experts=20)
    probs_TE = torch.full((3, 20), 0.05)
    for count in range(1, 21):
        assert [sorted(e) for e in chosen(module.route(probs_TE.log(), use([count] * 3)), 3)] == [
            list(range(count))
        ] * 3


def test_a_counts_choice_is_a_prefix_of_the_next() -> None:
    module, x_TD = mixture(experts=12), tokens(40)
    probs_TE = (x_TD @ module.router.T).softmax(-1)
    for count in range(1, 12):
        fewer, more = (chosen(module.route(probs_TE.log(), use([k] * 40)), 40) for k in (count, count + 1))
        for small, large in zip(fewer, more, strict=True):
            assert small.items() <= large.items()


class Seen(Observer):
    """Observer that keeps what it was told."""

    pairs = 0

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs += pairs


def test_work_is_the_sum_of_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    module, counts, seen, rows = mixture(), [1, 6, 1, 1, 2, 1, 1], Seen(), []
    linear = torch.nn.functional.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(len(x))
        return linear(x, weight, bias)

    x_TD = tokens(7)
    pairs = module.route(x_TD @ module.router.T, use(counts))
    monkeypatch.setattr("model.moe.topk.F.linear", counting)
    module.run_ragged(x_TD, pairs)
    assert sum(rows) == 2 * sum(counts)  # gate-and-up, then down, for each pair
    module(x_TD, use(counts, observer=seen))
    assert seen.pairs == sum(counts) < 7 * max(counts)


@pytest.mark.parametrize("normalise", [False, True])
def test_mixed_counts_equal_each_token_alone(normalise: bool) -> None:
    module, x_TD, counts = mixture(normalise=normalise), tokens(12), [1 + t % 6 for t in range(12)]
    mixed_TD = module(x_TD, use(counts))
    for token, count in enumerate(counts):
        alone_1D = module(x_TD[token, None], use([count]))
        torch.testing.assert_close(alone_1D[0], mixed_TD[token], atol=1e-6, rtol=1e-5)


def test_weights_are_bit_equal_whatever_the_largest_count_in_the_batch() -> None:
    module, x_TD = mixture(experts=12, normalise=True), tokens(6)
    probs_TE = (x_TD @ module.router.T).softmax(-1)
    small = chosen(module.route(probs_TE.log(), use([3] * 6)), 6)
    assert chosen(module.route(probs_TE.log(), use([3] * 5 + [12])), 6)[:5] == small[:5]
