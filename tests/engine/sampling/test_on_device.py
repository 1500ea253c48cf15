"""The sampler on a device, where CPU tensors stand for it: the same results as the host's, and nothing is waited for.

The two draw from sums that differ by rounding, about one part in 10^6: a random number or a share would have to lie
that close to the border of a token to make a difference, which none does here.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.grammars.matcher import Matcher, Words
from engine.plan import NOT_FINITE, Sampled
from engine.sampling import on_device
from engine.sampling.logprobs import prompt_logprobs
from engine.sampling.on_device import launch_samples, launch_scores
from engine.sampling.upload import upload
from engine.sequence import Sequence
from engine.types import Logprob
from model.backends.torch import device_sampling
from model.backends.torch.device_sampling import TorchDeviceSampling
from tests.engine.sampling.draws import LOGITS, sequence
from tests.engine.sampling.ops import sample
from tests.engine.sampling.test_sampler import OPTIONS, TOKENS, logits_of
from tests.model.backends.torch.test_device import META, NothingMade, NothingWaits

OPS = TorchDeviceSampling()


class FakeMatcher:
    """Allows the tokens that a rule names after what has been said. `error` as a matcher's."""

    def __init__(self, allows: Callable[[list[int]], set[int]], width: int) -> None:
        self.allows, self.width, self.error, self.said = allows, width, "", list[int]()

    def words(self, drafts: int) -> Words:
        allowed_V = np.zeros(-(-self.width // 32) * 32, np.bool_)
        allowed_V[list(self.allows(self.said))] = True
        return np.packbits(allowed_V, bitorder="little").view(np.int32)[None]

    def spend(self, seconds: float, rows: int) -> None:
        pass


def constantly(allowed: set[int], said: list[int]) -> set[int]:
    return allowed


def matched(allows: Callable[[list[int]], set[int]], width: int, **options: Any) -> Sequence:
    made = sequence(**options)
    made.matcher = cast(Matcher, FakeMatcher(allows, width))
    return made


def launched(rows: Tensor, sequences: list[Sequence]) -> tuple[Sampled, ...]:
    return launch_samples(OPS, rows, sequences).results()


def assert_near(found: Logprob, wanted: Logprob) -> None:
    assert found.value == pytest.approx(wanted.value, abs=1e-4)
    assert [token for token, _ in found.top] == [token for token, _ in wanted.top]
    assert [value for _, value in found.top] == pytest.approx([value for _, value in wanted.top], abs=1e-4)


def assert_same(found: tuple[Sampled, ...], wanted: tuple[Sampled, ...]) -> None:
    """Log-probabilities may differ in their last bits."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.token, one.error, one.code) == (other.token, other.error, other.code)
        assert one.measured == pytest.approx(other.measured, abs=1e-6)
        assert (one.logprob is None) == (other.logprob is None)
        if one.logprob and other.logprob:
            assert_near(one.logprob, other.logprob)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_results_are_the_hosts(data: st.DataObject) -> None:
    """Also where several values are equal, and where one is not finite."""
    drawn: list[dict[str, Any]] = data.draw(st.lists(OPTIONS, min_size=1, max_size=5))
    sequences = [sequence(**options) for options in drawn]
    for row in sequences:
        if data.draw(st.booleans()):
            allowed = data.draw(st.sets(st.integers(0, TOKENS - 1)))
            row.matcher = cast(Matcher, FakeMatcher(partial(constantly, allowed), TOKENS))
    rows = logits_of(len(sequences), TOKENS, data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([0.0, 0.5])))
    bad = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
    if bad is not None:
        rows[-1, data.draw(st.integers(0, TOKENS - 1))] = bad
    assert_same(launched(rows, sequences), sample(rows, sequences))


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "logprobs": 20},
    {"temperature": 0.3, "top_k": 5},
    {"top_p": 0.52, "presence_penalty": 1.0},
    {"min_p": 0.21, "repetition_penalty": 1.3, "logprobs": 4},
    {"min_tokens": 9, "stop_token_ids": (3,), "logit_bias": ((4, 2.0),)},
    {"top_k": 700, "top_p": 0.91},
    {"temperature": 1.7, "top_p": 0.97, "logprobs": 2},
]


def mixed(rows: int) -> list[Sequence]:
    return [sequence(seed=row, output=(row % 7, 4), **MIXED[row % 8]) for row in range(rows)]


@pytest.mark.parametrize("width", [4096, 50_003])
@pytest.mark.parametrize("step", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_hosts_in_a_large_vocabulary(width: int, step: float, dtype: torch.dtype) -> None:
    rows = (8 * logits_of(16, width, 1, step)).to(dtype)
    assert_same(launched(rows, mixed(16)), sample(rows, mixed(16)))


@pytest.mark.parametrize("width", [4096, 50_003])
def test_a_row_does_not_depend_on_its_neighbours(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, also where rows are drawn in groups."""
    monkeypatch.setattr(device_sampling, "GROUP", 3 * width)
    rows = logits_of(17, width, 1)
    together = launched(rows, mixed(17))
    assert together == tuple(launched(rows[i, None], [row])[0] for i, row in enumerate(mixed(17)))


def toy_generation(sampler: Callable[[Tensor, list[Sequence]], tuple[Sampled, ...]]) -> list[list[Sampled]]:
    """60 tokens each of eight answers; logits depend on the last token and the position."""
    width = 300
    generator = torch.Generator().manual_seed(8)
    after_VV, at_PV = torch.randn(width, width, generator=generator), torch.randn(99, width, generator=generator)
    even, digits = set(range(0, width, 2)), set(range(10))
    sequences = [
        sequence(temperature=0.0),
        sequence(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.3, logprobs=3),
        sequence(seed=1, presence_penalty=0.7, top_p=0.87),
        sequence(seed=2, temperature=0.8, bad_words=((7,), (2, 8)), min_tokens=30, stop_token_ids=(5, 6), logprobs=0),
        matched(lambda said: even if len(said) % 2 else digits, width, seed=3, top_k=9),
        matched(lambda said: digits - set(said[-4:]), width, seed=4, min_p=0.11, logprobs=5),
        matched(lambda said: {5}, width, temperature=0.0, min_tokens=20, stop_token_ids=(5,)),
        sequence(seed=5, allowed_token_ids=tuple(range(40, 60)), logit_bias=((41, 2.5),)),
    ]
    found: list[list[Sampled]] = [[] for _ in sequences]
    for position in range(60):
        rows = torch.stack([after_VV[s.tokens[-1]] + at_PV[position] for s in sequences])
        for row, (s, result) in enumerate(zip(sequences, sampler(rows, sequences), strict=True)):
            found[row].append(result)
            s.tokens.append(result.token)
            if s.matcher is not None:
                cast(FakeMatcher, s.matcher).said.append(result.token)
    return found


def test_whole_answers_are_the_hosts() -> None:
    found, wanted = toy_generation(launched), toy_generation(sample)
    for one, other in zip(found, wanted, strict=True):
        assert_same(tuple(one), tuple(other))
        assert {result.error for result in one} == {None}
    assert {result.token for result in found[4][::2]} <= set(range(10))
    assert len({result.token for result in found[2]}) > 20


def test_ids_for_the_next_step_stay_on_the_device() -> None:
    rows = torch.tensor([LOGITS, [math.nan] * 8, LOGITS])
    step = launch_samples(OPS, rows, [sequence(temperature=0), sequence(), sequence(top_k=1)])
    assert step.token_R.tolist() == [5, 0, 5] and step.token_R.dtype == torch.int64
    assert [result.error for result in step.results()] == [None, NOT_FINITE, None]


def test_results_are_of_the_tokens_that_a_sequence_had() -> None:
    """Bad words, too: the sequence may have grown when the results are read."""
    running = sequence(temperature=0, output=(1,), bad_words=((1, 5), (5, 0)))
    step = launch_samples(OPS, torch.tensor([LOGITS]), [running])
    running.tokens.append(5)
    assert step.results()[0] == Sampled(0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_grammars_that_fail_and_settings_that_leave_nothing(temperature: float) -> None:
    broken = matched(lambda said: {2}, 8, temperature=temperature)
    cast(FakeMatcher, broken.matcher).error = "too many states"
    sequences = [
        broken,
        matched(lambda said: {2}, 8, temperature=temperature, allowed_token_ids=(5,)),
        matched(lambda said: {2}, 8, temperature=temperature, stop_token_ids=(2,), min_tokens=3),
        sequence(temperature=temperature, allowed_token_ids=(5,), bad_words=((5,),)),
        sequence(temperature=temperature, allowed_token_ids=(0,), stop_token_ids=(0,), min_tokens=2),
        sequence(temperature=temperature, allowed_token_ids=(2, 99)),
        matched(
            lambda said: {2}, 8, temperature=temperature, allowed_token_ids=(2,), stop_token_ids=(2,), min_tokens=3
        ),
    ]
    rows = torch.tensor([LOGITS] * len(sequences))
    found = launched(rows, sequences)
    assert_same(found, sample(rows, sequences))
    none_left = "no_token_left"
    assert [result.code for result in found] == ["grammar_too_complex", none_left, "", none_left, none_left, "", ""]
    assert found[2].token == found[5].token == found[6].token == 2


def test_when_adjustments_overflow_the_best_token_is_taken() -> None:
    for temperature in (0, 1.0):
        found = launched(
            torch.tensor([[1.0, 3e38, 2.0]]), [sequence((1,), temperature=temperature, repetition_penalty=0.1)]
        )
        assert found[0].token == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.9999999}, {"min_p": 1e-30}])
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_what_has_no_weight_is_never_drawn(options: dict[str, Any], u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends of the random numbers, with masked or hopeless tokens at both ends of the vocabulary."""
    monkeypatch.setattr("engine.sampling.sampler.uniform", lambda seed, position: u)
    masked: dict[str, Any] = {"min_tokens": 1, "stop_token_ids": (0, 1, 2, 3, 8, 9)}
    rows = torch.tensor([[5.0, 5, 5, 5, 1, 2, 1, -900, 5, 5]])
    assert launched(rows, [sequence(**masked, **options)])[0].token in {4, 5, 6}


def test_the_models_logits_are_left_as_they_were() -> None:
    rows = torch.tensor([LOGITS])
    launched(rows, [sequence(output=(5,), presence_penalty=1.0, logit_bias=((0, 3.0),), allowed_token_ids=(0, 5))])
    launched(rows, [matched(lambda said: {1}, 8, top_p=0.5)])
    assert rows.tolist() == [LOGITS]


def test_prompt_scores_are_the_hosts() -> None:
    """Of chunks with other numbers of tokens and alternatives; one of them has a row that is not finite."""
    rows = logits_of(9, 500, 3, 0.25)
    rows[4, 7] = math.nan
    wanted: list[tuple[list[int], int | None]] = [([3, 499, 0], 2), ([9, 9], 5), ([1], 0), ([5, 6, 7], 600)]
    found = launch_scores(rows, wanted).results()
    first = 0
    for scored, (tokens, count) in zip(found, wanted, strict=True):
        expected = prompt_logprobs(rows[first : first + len(tokens)], tokens, count)
        first += len(tokens)
        assert (scored is None) == (expected is None)
        for one, other in zip(scored or (), expected or (), strict=True):
            assert_near(one, other)
    assert [scored is None for scored in found] == [False, True, False, False]
    assert launch_scores(rows[:0], []).results() == ()


def test_equal_alternatives_are_listed_lowest_first() -> None:
    rows = torch.zeros(2, 40)
    rows[:, 30] = 1.0
    rows[:, 2] = -0.0
    found = launched(rows, [sequence(logprobs=2), sequence(logprobs=25)])
    assert [[token for token, _ in s.logprob.top] for s in found if s.logprob] == [[30, 0], [30, *range(24)]]


def test_a_rows_scores_do_not_depend_on_the_others() -> None:
    rows = logits_of(12, 50_003, 3)
    wanted = [sequence(seed=row, logprobs=4) for row in range(12)]
    together = launched(rows, wanted)
    assert together == tuple(launched(rows[i, None], [row])[0] for i, row in enumerate(wanted))


def test_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tokens and for scores of every kind; the copies to the host are `Fetched`'s."""
    monkeypatch.setattr(on_device, "Fetched", lambda tensors: tensors)
    sequences = [*mixed(9), matched(lambda said: {3, 4}, 4096), sequence(allowed_token_ids=(3, 4), bad_words=((1,),))]
    rows = torch.empty(len(sequences), 4096, dtype=torch.bfloat16, device=META)
    with torch.inference_mode(), NothingWaits(), NothingMade():
        assert launch_samples(OPS, rows, sequences).token_R.device == META
        assert launch_samples(OPS, rows[:1], [sequence(temperature=0)]).token_R.device == META
        launch_scores(rows, [([1, 2], 3), ([4] * 9, None)])


def test_arrays_arrive_as_they_are() -> None:
    arrays: list[np.ndarray[Any, Any]] = [
        np.arange(3),
        np.zeros((0, 4), np.int32),
        np.array([[1.5], [math.inf]]),
        np.arange(10, dtype=np.int32),
    ]
    for array, tensor in zip(arrays, upload(arrays, torch.device("cpu")), strict=True):
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
