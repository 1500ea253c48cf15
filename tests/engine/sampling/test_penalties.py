"""Adjustments: by hand, against their definition, and kept with a sequence without a walk over what it has said."""

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.penalties import AdjustedTokens, adjusted
from engine.sequence import Sequence
from tests.engine.sampling.draws import LOGITS, best, frequencies, one, sequence
from tests.engine.sampling.ops import sample
from tests.engine.sampling.test_sampler import OPTIONS, TOKENS


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


def test_biases_add_up_and_yield_to_the_minimum_length() -> None:
    assert best(LOGITS, logit_bias=((3, 4.5),)) == 3
    assert best(LOGITS, logit_bias=((5, -100.0), (0, -100.0))) == 2
    assert best(LOGITS, logit_bias=((3, 2.5), (3, 2.0))) == 3
    assert best(LOGITS, logit_bias=((5, 100.0),), min_tokens=1, stop_token_ids=(5,)) == 0


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    """Stop ids come from checkpoints too; one that no token has cannot be generated, and must not end a step."""
    assert best(LOGITS, logit_bias=((8, 9.0), (-1, 9.0)), min_tokens=1, stop_token_ids=(8, 5, -2)) == 0


def defined(logits: list[float], s: Sequence) -> list[float]:
    """The definition, token by token."""
    asked, counts = s.request.sampling, Counter(s.tokens[s.prompt_length :])
    for token in set(s.tokens):
        logits[token] *= asked.repetition_penalty if logits[token] < 0 else 1 / asked.repetition_penalty
    for token, count in counts.items():
        logits[token] -= asked.presence_penalty + asked.frequency_penalty * count
    for token, bias in asked.logit_bias:
        if 0 <= token < len(logits):
            logits[token] += bias
    masked = {token for token in asked.stop_token_ids if s.output_count < asked.min_tokens}
    if asked.allowed_token_ids:
        masked |= set(range(len(logits))) - set(asked.allowed_token_ids)
    answer = tuple(s.tokens[s.prompt_length :])
    masked |= {word[-1] for word in asked.bad_words if answer[len(answer) - len(word) + 1 :] == word[:-1]}
    return [float("-inf") if token in masked else value for token, value in enumerate(logits)]


@settings(deadline=None, max_examples=80)
@given(st.lists(OPTIONS, min_size=1, max_size=4), st.lists(st.integers(0, TOKENS - 1), max_size=90), st.booleans())
def test_every_step_is_as_defined(options: list[dict[str, Any]], said: list[int], seen: bool) -> None:
    """Whether the sampler has followed a sequence token by token or sees it for the first time."""
    sequences = [sequence(**row) for row in options]
    rows = torch.randn(len(sequences), TOKENS, generator=torch.Generator().manual_seed(len(said)))
    for token in said:
        for s in sequences:
            s.tokens.append(token)
        if seen:
            adjusted(rows, sequences)
    expected = [defined(row.tolist(), s) for row, s in zip(rows, sequences, strict=True)]
    torch.testing.assert_close(adjusted(rows, sequences), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_what_is_kept_goes_with_its_sequence() -> None:
    gc.collect()
    before = sum(type(item) is AdjustedTokens for item in gc.get_objects())
    sequences = [sequence(output=(1, 2), presence_penalty=1.0) for _ in range(5)]
    sample(torch.zeros(5, 8), sequences)
    assert sum(type(item) is AdjustedTokens for item in gc.get_objects()) == before + 5
    del sequences
    gc.collect()
    assert sum(type(item) is AdjustedTokens for item in gc.get_objects()) == before


@pytest.mark.parametrize("options", [{}, {"min_tokens": 1}, {"stop_token_ids": (3,)}])
def test_who_asks_for_nothing_pays_nothing(options: dict[str, Any]) -> None:
    rows, plain = torch.zeros(1, 8), sequence(output=(1,), **options)
    assert adjusted(rows, [plain]) is rows
    assert plain.sampler_state is None


def test_only_allowed_tokens_are_generated() -> None:
    assert best(LOGITS, allowed_token_ids=(2, 7)) == 2
    assert best(LOGITS, allowed_token_ids=(0, 2), presence_penalty=2.0, output=(0,)) == 2
    assert set(frequencies(LOGITS, 500, allowed_token_ids=(0, 2))) == {0, 2}
    assert best(LOGITS, allowed_token_ids=(2, 99)) == 2, "an id beyond the vocabulary is no token"


def test_bad_words_are_not_generated() -> None:
    """5 is best, then 0, then 2."""
    assert best(LOGITS, bad_words=((5,),)) == 0
    assert best(LOGITS, bad_words=((5,), (0,)), logit_bias=((0, 50.0),)) == 2
    assert 5 not in frequencies(LOGITS, 500, bad_words=((5,),))
    word: dict[str, Any] = {"bad_words": ((1, 2, 5), (3, 0), (5, 5))}
    assert best(LOGITS, **word) == 5
    assert best(LOGITS, output=(1, 2), **word) == 0
    assert best(LOGITS, output=(2,), **word) == 5
    assert best(LOGITS, output=(2, 2), **word) == 5
    assert best(LOGITS, output=(5,), **word) == 0
    assert best(LOGITS, output=(3, 1, 2), **word) == 0
    assert best(LOGITS, prompt=(1, 2), **word) == 5, "only what is generated counts"
    assert best(LOGITS, prompt=(1,), output=(2,), **word) == 5


def test_settings_that_leave_no_token_end_the_answer() -> None:
    for options in (
        {"allowed_token_ids": (5,), "bad_words": ((5,),)},
        {"allowed_token_ids": (0,), "bad_words": ((0,),)},
        {"allowed_token_ids": (0,), "stop_token_ids": (0,), "min_tokens": 2},
    ):
        for temperature in (0, 1.0):
            found = one(LOGITS, temperature=temperature, **options)
            assert found.code == "no_token_left" and found.error


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 99))
def test_no_bad_word_is_in_an_answer(words: list[list[int]], seed: int) -> None:
    """Token by token over random logits of five tokens, one of which is in no word."""
    running = sequence(seed=seed, bad_words=tuple(map(tuple, words)))
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
    for row in rows:
        running.tokens.append(sample(row[None], [running])[0].token)
    said = "".join(map(str, running.tokens[running.prompt_length :]))
    assert not any("".join(map(str, word)) in said for word in words)
