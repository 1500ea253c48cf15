"""Sampling: every setting does what it says, in its own row, and a token is a function of logits, settings and seed."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.plan import Sampled
from engine.sampler import sample
from engine.sequence import Sequence
from engine.types import Request, Sampling
from model.budget import ExpertBudget

LOGITS = [2.0, 0.5, 1.0, -1.0, 0.0, 3.0, -2.0, 0.25]


def sequence(prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **options: Any) -> Sequence:
    given_options = {"max_tokens": 99, "seed": 7} | options
    made = Sequence(Request("r", prompt, ExpertBudget((1,)), Sampling(**given_options)), 0.0)
    made.tokens += output
    return made


def one(logits: list[float] | Tensor, **options: Any) -> Sampled:
    return sample(torch.as_tensor(logits)[None], [sequence(**options)])[0]


def frequencies(logits: list[float], draws: int = 10_000, **options: Any) -> Counter[int]:
    """How often each token comes out over many seeds."""
    rows = torch.tensor([logits]).expand(draws, -1)
    return Counter(s.token for s in sample(rows, [sequence(seed=seed, **options) for seed in range(draws)]))


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    exps = [math.exp(value / temperature) for value in logits]
    return [value / sum(exps) for value in exps]


def test_temperature_zero_is_greedy() -> None:
    assert {one(LOGITS, temperature=0, seed=seed).token for seed in range(50)} == {5}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_should(temperature: float) -> None:
    found, expected = frequencies(LOGITS, temperature=temperature), softmax(LOGITS, temperature)
    assert all(abs(found[token] / 10_000 - p) < 0.015 for token, p in enumerate(expected))


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_the_smallest_temperature_is_greedy_and_finite(temperature: float) -> None:
    assert frequencies(LOGITS, 100, temperature=temperature) == {5: 100}


def test_a_huge_temperature_is_uniform() -> None:
    found = frequencies(LOGITS, temperature=1e9)
    assert all(abs(found[token] / 10_000 - 1 / 8) < 0.015 for token in range(8))


def test_what_is_cut_is_renormalised() -> None:
    found, expected = frequencies(LOGITS, top_k=3), softmax([LOGITS[token] for token in (5, 0, 2)])
    assert set(found) == {5, 0, 2}
    assert all(abs(found[token] / 10_000 - p) < 0.015 for token, p in zip((5, 0, 2), expected, strict=True))


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(p) for p in probabilities]
    assert set(frequencies(logits, 500, top_p=0.6)) == {0, 1}
    assert set(frequencies(logits, 500, top_p=0.81)) == {0, 1, 2}
    assert set(frequencies(logits, 500, top_p=1e-9)) == {0}
    assert set(frequencies(logits, 2000, top_p=1.0)) == {0, 1, 2, 3}


def test_min_p_is_a_share_of_the_best() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(frequencies(logits, 2000, min_p=0.29)) == {0, 1, 2}
    assert set(frequencies(logits, 500, min_p=1.0)) == {0}


def test_the_temperature_comes_before_the_cuts() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(frequencies(logits, 2000, min_p=0.29, temperature=3.0)) == {0, 1, 2, 3}


def allowed(logits: list[float], s: Sampling) -> set[int]:
    """The definition: the `top_k` best; of these, renormalised, those that top-p and min-p both let stay."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: s.top_k or None]
    best = logits[order[0]]
    exps = [math.exp((logits[token] - best) / s.temperature) for token in order]
    probabilities = [value / sum(exps) for value in exps]
    kept: set[int] = set()
    for rank, token in enumerate(order):
        before = sum(probabilities[:rank])
        fits = before < s.top_p + 1e-9 and probabilities[rank] >= s.min_p * probabilities[0] - 1e-9
        if rank == 0 or fits:
            kept.add(token)
    return kept


@settings(deadline=None, max_examples=200)
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
    assert one(logits, **options).token in allowed(logits, Sampling(max_tokens=1, **options))


def test_a_seed_repeats_and_a_position_does_not() -> None:
    logits = [0.0] * 50
    again = [one(logits, seed=3).token for _ in range(3)]
    positions = {one(logits, seed=3, output=(0,) * length).token for length in range(30)}
    assert len(set(again)) == 1
    assert len(positions) > 15
    assert len({one(logits, seed=seed).token for seed in range(30)}) > 15


def test_the_position_is_counted_from_the_start_of_the_prompt() -> None:
    """So that a preempted sequence, whose output has become its prompt, goes on as before."""
    logits = [0.0] * 50
    assert one(logits, prompt=(1, 2), output=(3, 4)).token == one(logits, prompt=(1, 2, 3, 4)).token


def best(logits: list[float], **options: Any) -> int:
    return one(logits, temperature=0, **options).token


def test_penalties_by_hand() -> None:
    # 5 generated twice, 0 once; 5 has 3.0, 0 has 2.0, 2 has 1.0
    output = (5, 5, 0)
    assert best(LOGITS, output=output, presence_penalty=0.9) == 5  # 2.1 against 1.1 and 1.0
    assert best(LOGITS, output=output, presence_penalty=2.1) == 2  # 0.9 against −0.1 and 1.0
    assert best(LOGITS, output=output, frequency_penalty=0.7) == 5  # 1.6 against 1.3
    assert best(LOGITS, output=output, frequency_penalty=1.1) == 2  # 0.8 against 0.9 and 1.0
    assert best(LOGITS, output=output, presence_penalty=0.3, frequency_penalty=0.9) == 2  # 0.9 against 0.8 and 1.0
    assert best(LOGITS, prompt=(7,), output=output, repetition_penalty=3.1) == 2  # 0.97 against 0.65 and 1.0
    assert best([-1.0, -1.5, -9.0], prompt=(0,), repetition_penalty=2.0) == 1  # −1 doubled is −2


def test_negative_penalties_reward() -> None:
    assert best(LOGITS, output=(0,), presence_penalty=-1.1) == 0


def test_presence_and_frequency_count_the_output_only_and_repetition_the_prompt_too() -> None:
    prompt = (5, 5)
    assert best(LOGITS, prompt=prompt, presence_penalty=2.0, frequency_penalty=2.0) == 5
    assert best(LOGITS, prompt=prompt, repetition_penalty=2.0) == 0


def test_stop_tokens_are_masked_until_the_minimum_length() -> None:
    options: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (5, 0)}
    assert best(LOGITS, **options) == 2
    assert best(LOGITS, output=(1,), **options) == 2
    assert best(LOGITS, output=(1, 1), **options) == 5
    assert 5 not in frequencies(LOGITS, 500, **options)
    assert best(LOGITS, stop_token_ids=(5,)) == 5


def test_a_bias_adds_up_with_the_minimum_length() -> None:
    assert best(LOGITS, logit_bias=((3, 4.5),)) == 3
    assert best(LOGITS, logit_bias=((5, -100.0), (0, -100.0))) == 2
    assert best(LOGITS, logit_bias=((5, 100.0),), min_tokens=1, stop_token_ids=(5,)) == 0


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    """Stop ids come from checkpoints too; one that no token has cannot be generated, and must not end a step."""
    assert best(LOGITS, logit_bias=((8, 9.0), (-1, 9.0)), min_tokens=1, stop_token_ids=(8, 5, -2)) == 0


def test_logprobs_are_the_models_own_and_sorted() -> None:
    found = one(LOGITS, temperature=0, logit_bias=((6, 50.0),), logprobs=3)
    expected = [math.log(p) for p in softmax(LOGITS)]
    assert found.token == 6 and found.logprob is not None
    assert found.logprob.value == pytest.approx(expected[6], abs=1e-6)
    assert [token for token, _ in found.logprob.top] == [5, 0, 2]
    assert [value for _, value in found.logprob.top] == pytest.approx([expected[5], expected[0], expected[2]], abs=1e-6)


def test_logprobs_off_none_and_more_than_there_are() -> None:
    assert one(LOGITS).logprob is None
    chosen = one(LOGITS, logprobs=0).logprob
    assert chosen is not None and chosen.top == ()
    every = one(LOGITS, logprobs=20).logprob
    assert every is not None and len(every.top) == len(LOGITS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    rows = torch.tensor([LOGITS, [*LOGITS[:-1], bad], LOGITS])
    sequences = [sequence(seed=seed, temperature=temperature, logprobs=2) for seed in range(3)]
    first, broken, last = sample(rows, sequences)
    assert broken.error is not None and broken.logprob is None
    assert first == sample(rows[:1], sequences[:1])[0] and first.error is None
    assert last == sample(rows[2:], sequences[2:])[0] and last.error is None


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(40, 97, generator=generator) * 2
    settings_of: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3, "top_k": 5},
        {"top_p": 0.5, "presence_penalty": 1.0},
        {"min_p": 0.2, "repetition_penalty": 1.3, "logprobs": 4},
        {"min_tokens": 9, "stop_token_ids": (3,), "logit_bias": ((4, 2.0),)},
    ]
    sequences = [sequence(seed=row, output=(row % 7, 4), **settings_of[row % 6]) for row in range(40)]
    together = sample(rows, sequences)
    assert together == tuple(sample(rows[row, None], [sequences[row]])[0] for row in range(40))


def test_the_models_logits_are_left_as_they_were() -> None:
    rows = torch.tensor([LOGITS])
    sample(rows, [sequence(output=(5,), presence_penalty=1.0, logit_bias=((0, 3.0),))])
    assert rows.tolist() == [LOGITS]


def test_bfloat16_logits() -> None:
    assert sample(torch.tensor([LOGITS]).bfloat16(), [sequence(temperature=0)])[0].token == 5
