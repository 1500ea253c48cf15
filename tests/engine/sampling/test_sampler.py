"""Sampling: every setting does what it says, in its own row, and a token is a function of logits, settings and seed."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sequence import Sequence
from model.backends.torch import draw
from tests.engine.sampling.draws import LOGITS, best, frequencies, one, sequence, softmax
from tests.engine.sampling.ops import sample

TOKENS = 12

OPTIONS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=4).map(tuple),
        "output": st.lists(st.integers(0, TOKENS - 1), max_size=6).map(tuple),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "temperature": st.sampled_from([0.0, 1e-6, 0.7, 1.0, 30.0]),
    },
    optional={
        "top_k": st.integers(0, TOKENS + 2),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 9),
        "min_tokens": st.integers(0, 4),
        "allowed_token_ids": st.lists(st.integers(0, TOKENS), min_size=1, max_size=5).map(tuple),
        "bad_words": st.lists(
            st.lists(st.integers(0, TOKENS), min_size=1, max_size=2).map(tuple), min_size=1, max_size=3
        ).map(tuple),
        "stop_token_ids": st.lists(st.integers(-1, TOKENS), max_size=3).map(tuple),
        "logit_bias": st.dictionaries(st.integers(-1, TOKENS), st.floats(-9, 9), max_size=3).map(
            lambda d: tuple(d.items())
        ),
        "logprobs": st.none() | st.integers(0, TOKENS + 2),
        "measured": st.sampled_from(["entropy", "margin"]),
    },
)


def logits_of(rows: int, width: int, seed: int, step: float = 0.0) -> Tensor:
    """Random rows, few of them alike in how sharp they are; `step` rounds them, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, width, generator=generator) * torch.logspace(-1, 1, rows)[:, None]
    return (made / step).round() * step if step else made


def alone(rows: Tensor, sequences: list[Sequence]) -> tuple[Any, ...]:
    """Each row by itself, for a sequence that has never been sampled for."""
    fresh = [
        sequence(s.request.prompt, tuple(s.tokens[s.prompt_length :]), **asdict(s.request.sampling)) for s in sequences
    ]
    return tuple(sample(rows[i, None], [new])[0] for i, new in enumerate(fresh))


def test_temperature_zero_is_greedy() -> None:
    assert {one(LOGITS, temperature=0, seed=seed).token for seed in range(50)} == {5}


def test_of_equal_tokens_the_lowest_is_best() -> None:
    assert best([0.0, 2.0, 1.0, 2.0, 2.0]) == 1


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
    assert every is not None and [token for token, _ in every.top] == [5, 0, 2, 1, 7, 4, 3, 6]


def test_equal_alternatives_are_listed_lowest_first_however_many_others_want() -> None:
    rows = torch.zeros(3, 40)
    rows[:, 30] = 1.0
    wanted = [sequence(logprobs=count) for count in (2, 25, 4)]
    found = [[token for token, _ in s.logprob.top] for s in sample(rows, wanted) if s.logprob]
    assert found == [[30, 0], [30, *range(24)], [30, 0, 1, 2]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    rows = torch.tensor([LOGITS, [*LOGITS[:-1], bad], LOGITS])
    sequences = [sequence(seed=seed, temperature=temperature, logprobs=2) for seed in range(3)]
    first, broken, last = sample(rows, sequences)
    assert broken.error is not None and broken.logprob is None and broken.token == 0
    assert first == sample(rows[:1], sequences[:1])[0] and first.error is None
    assert last == sample(rows[2:], sequences[2:])[0] and last.error is None


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_row_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    """To the bit, whatever they want: also where few are ranked at first and blocks and groups are small."""
    sequences = [sequence(**data.draw(OPTIONS)) for _ in range(data.draw(st.integers(2, 7)))]
    step = data.draw(st.sampled_from([0.0, 0.5]))
    rows = logits_of(len(sequences), TOKENS, data.draw(st.integers(0, 2**32)), step)
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in {"BLOCK": [5, 128], "RANKED_FIRST": [1, 3, 256], "GROUP": [20, 1 << 22]}.items():
            patch.setattr(draw, name, data.draw(st.sampled_from(sizes)))
        assert sample(rows, sequences) == alone(rows, sequences)


@pytest.mark.parametrize("width", [4096, 50_003])
@pytest.mark.parametrize("step", [0.0, 0.25])
def test_a_row_does_not_depend_on_its_neighbours_in_a_large_vocabulary(width: int, step: float) -> None:
    """Large enough for torch to share the work among its threads."""
    settings_of: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0, "logprobs": 20},
        {"temperature": 0.3, "top_k": 5},
        {"top_p": 0.5, "presence_penalty": 1.0},
        {"min_p": 0.2, "repetition_penalty": 1.3, "logprobs": 4},
        {"min_tokens": 9, "stop_token_ids": (3,), "logit_bias": ((4, 2.0),)},
        {"top_k": 700, "top_p": 0.9},
        {"temperature": 1.7, "top_p": 0.97, "logprobs": 2},
    ]
    rows = logits_of(33, width, 1, step)
    sequences = [sequence(seed=row, output=(row % 7, 4), **settings_of[row % 8]) for row in range(33)]
    assert sample(rows, sequences) == alone(rows, sequences)


def test_the_models_logits_are_left_as_they_were() -> None:
    rows = torch.tensor([LOGITS])
    for temperature in (0.0, 0.5):
        sample(rows, [sequence(output=(5,), presence_penalty=1.0, logit_bias=((0, 3.0),), temperature=temperature)])
        sample(rows, [sequence(temperature=temperature, top_p=0.5, top_k=3)])
        assert rows.tolist() == [LOGITS]


def test_bfloat16_logits() -> None:
    assert sample(torch.tensor([LOGITS]).bfloat16(), [sequence(temperature=0)])[0].token == 5
    assert frequencies(torch.tensor(LOGITS).bfloat16(), 100, top_k=1) == {5: 100}
