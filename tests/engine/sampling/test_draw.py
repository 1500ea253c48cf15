"""Drawing: tokens come as often as their probabilities say, and only those that the cuts leave."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling import sampler
from engine.types import Sampling
from model.backends.torch import draw
from tests.engine.sampling.draws import LOGITS, best, frequencies, one, sequence, softmax
from tests.engine.sampling.ops import sample

FOUR = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_should(temperature: float) -> None:
    found, expected = frequencies(LOGITS, temperature=temperature), softmax(LOGITS, temperature)
    assert all(abs(found[token] / 10_000 - p) < 0.015 for token, p in enumerate(expected))


def distance(found: Counter[int], probs_V: Tensor) -> float:
    """Kolmogorov–Smirnov: the largest gap between what came out and what should, cumulated over the tokens."""
    counts_V = torch.tensor([found[token] for token in range(len(probs_V))], dtype=torch.float64)
    return float((counts_V.cumsum(0) / counts_V.sum() - probs_V.double().cumsum(0)).abs().max())


@pytest.mark.parametrize("width", [300, 1111])
@pytest.mark.parametrize(("cut", "top_k"), [(False, 0), (True, 0), (True, 290)])
def test_many_tokens_come_as_often_as_they_should(width: int, cut: bool, top_k: int) -> None:
    """Over several blocks with a shorter one at the end, and among the best, with more than `RANKED_FIRST` kept."""
    logits = torch.randn(width, generator=torch.Generator().manual_seed(width))
    probs = (logits.double() / 1.5).softmax(-1)
    if top_k:
        probs[logits.argsort(descending=True)[top_k:]] = 0
    found = frequencies(logits, 20_000, temperature=1.5, top_k=top_k, min_p=1e-9 if cut else 0.0)
    assert distance(found, probs / probs.sum()) < 1.63 / math.sqrt(20_000)  # one in a hundred is farther off
    assert all(probs[token] > 0 for token in found)


@pytest.mark.parametrize("width", [4096, 50_003])
def test_the_bits_that_tokens_are_drawn_from_are_a_rows_own(width: int) -> None:
    """Torch splits one long sum among its threads and many not, which rounds differently, though too rarely
    to show in tokens."""
    rows = torch.randn(33, width, generator=torch.Generator().manual_seed(2)) * 3
    temperatures = np.linspace(0.3, 3, 33)
    together = draw._probabilities(rows, temperatures)
    for i in (0, 7, 32):
        alone = draw._probabilities(rows[i, None], temperatures[i, None])
        assert torch.equal(alone[0], together[i])
        assert torch.equal(draw._block_sums(alone)[0], draw._block_sums(together)[i])


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9, 1e-6])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.filterwarnings("error")
def test_the_smallest_temperature_is_greedy_and_finite(temperature: float, top_p: float) -> None:
    assert frequencies(LOGITS, 100, temperature=temperature, top_p=top_p) == {5: 100}


def test_a_huge_temperature_is_uniform() -> None:
    found = frequencies(LOGITS, temperature=1e9)
    assert all(abs(found[token] / 10_000 - 1 / 8) < 0.015 for token in range(8))


def test_what_is_cut_is_renormalised() -> None:
    found, expected = frequencies(LOGITS, top_k=3), softmax([LOGITS[token] for token in (5, 0, 2)])
    assert set(found) == {5, 0, 2}
    assert all(abs(found[token] / 10_000 - p) < 0.015 for token, p in zip((5, 0, 2), expected, strict=True))


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    assert set(frequencies(FOUR, 500, top_p=0.6)) == {0, 1}
    assert set(frequencies(FOUR, 500, top_p=0.81)) == {0, 1, 2}
    assert set(frequencies(FOUR, 500, top_p=1e-9)) == {0}
    assert set(frequencies(FOUR, 2000, top_p=1.0)) == {0, 1, 2, 3}


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    assert set(frequencies(FOUR, 2000, top_k=2, top_p=0.63)) == {0, 1}
    assert set(frequencies(FOUR, 500, top_k=2, top_p=0.62)) == {0}


def test_min_p_is_a_share_of_the_best() -> None:
    assert set(frequencies(FOUR, 2000, min_p=0.29)) == {0, 1, 2}
    assert set(frequencies(FOUR, 500, min_p=1.0)) == {0}


def test_the_temperature_comes_before_the_cuts() -> None:
    assert set(frequencies(FOUR, 2000, min_p=0.29, temperature=3.0)) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_the_best_one_of_top_k_is_the_greedy_one(temperature: float) -> None:
    """Also between values that no temperature would tell apart in float32, and of equals the lowest."""
    nearly = torch.tensor([1.0, 10.0, 10.000001, 10.000001, 3.0])
    assert nearly[1] < nearly[2]
    assert frequencies(nearly, 50, top_k=1, temperature=temperature) == {2: 50}


def test_of_equal_tokens_at_the_cut_the_lowest_stay() -> None:
    assert set(frequencies([0.0] * 400, 500, top_k=3)) == {0, 1, 2}
    assert set(frequencies([0.0, 1.0, 0.0, 0.0], 500, top_k=2)) == {0, 1}


def allowed(logits: list[float], s: Sampling) -> set[int]:
    """The definition: the `top_k` best; of these, renormalised, those that top-p and min-p both let stay."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: s.top_k or None]
    best = logits[order[0]]
    exps = [math.exp((logits[token] - best) / s.temperature) for token in order]
    probabilities = [value / sum(exps) for value in exps]
    kept: set[int] = set()
    for rank, token in enumerate(order):
        before = sum(probabilities[:rank])
        fits = before < s.top_p + 1e-6 and probabilities[rank] >= s.min_p * probabilities[0] - 1e-9
        if rank == 0 or fits:
            kept.add(token)
    return kept


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_the_chosen_token_is_always_an_allowed_one(data: st.DataObject) -> None:
    logits = data.draw(st.lists(st.integers(-30, 30).map(lambda n: n / 4), min_size=1, max_size=12))
    options = {
        "temperature": data.draw(st.floats(0.05, 5)),
        "top_k": data.draw(st.integers(0, 15)),
        "top_p": data.draw(st.floats(0.01, 1)),
        "min_p": data.draw(st.floats(0, 1)),
        "seed": data.draw(st.integers(-(2**63), 2**63 - 1)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "RANKED_FIRST", data.draw(st.sampled_from([1, 4, 256])))
        patch.setattr(draw, "BLOCK", data.draw(st.sampled_from([3, 128])))
        assert one(logits, **options).token in allowed(logits, Sampling(max_tokens=1, **options))


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.99}, {"min_p": 0.001}, {"top_k": 500}, {"top_k": 900, "top_p": 0.9}]
)
def test_how_many_are_ranked_first_changes_nothing(options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * 2
    found = []
    for short in (1, 7, 256, 2999):
        monkeypatch.setattr(draw, "RANKED_FIRST", short)
        found.append(frequencies(logits, 400, **options))
    assert len(found[0]) > 50
    assert found == [found[0]] * 4


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.9999999}, {"min_p": 1e-30}])
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_what_has_no_weight_is_never_drawn(
    options: dict[str, float], u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both ends of the random numbers, with masked or hopeless tokens at both ends of the vocabulary."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: u)
    monkeypatch.setattr(draw, "BLOCK", 3)
    masked = {"min_tokens": 1, "stop_token_ids": (0, 1, 2, 3, 8, 9)}
    assert one([5.0, 5, 5, 5, 1, 2, 1, -900, 5, 5], **masked, **options).token in {4, 5, 6}


def test_what_rounding_leaves_of_the_last_block_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of a block in float32 may exceed that of its tokens in float64."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: 1 - 2.0**-53)
    rows = torch.randn(100, draw.BLOCK + 100, generator=torch.Generator().manual_seed(4))
    rows[:, draw.BLOCK + 60 :] = -900
    tokens = [sampled.token for sampled in sample(rows, [sequence() for _ in rows])]
    assert all(token == draw.BLOCK + 59 for token in tokens)


def test_when_adjustments_overflow_the_best_token_is_taken() -> None:
    assert one([1.0, 3e38, 2.0], prompt=(1,), repetition_penalty=0.1).token == 1
    assert one([1.0, 2.0], min_tokens=1, stop_token_ids=(0, 1)).error is None
    assert best([1.0, 3e38, 2.0], prompt=(1,), repetition_penalty=0.1) == 1
