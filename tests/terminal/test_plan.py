"""Mixes, lengths and arrivals: exact shares, and everything from the seed."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal.bench.mix import MixEntry, apportion, parse_mix
from terminal.bench.plan import PromptLengths, check_rate, parse_lengths, plan
from terminal.errors import BadOption

COUNTS = st.none() | st.integers(1, 64)
WEIGHTS = st.fractions(Fraction(1, 1000), 100, max_denominator=1000)
MIXES = st.dictionaries(COUNTS, WEIGHTS, min_size=1, max_size=6).map(
    lambda mix: tuple(MixEntry(count, weight) for count, weight in mix.items())
)


@given(MIXES, st.integers(1, 500), st.integers(0, 9))
def test_shares_are_honoured_up_to_rounding(mix: tuple[MixEntry, ...], total: int, seed: int) -> None:
    found = Counter(job.count for job in plan(mix, total, seed, None, None))
    whole = sum(share.weight for share in mix)
    assert found.total() == total
    assert all(abs(found[share.count] - share.weight * total / whole) < 1 for share in mix)


@given(MIXES, st.integers(1, 50), st.integers(0, 9), st.none() | st.floats(0.1, 100))
def test_same_seed_same_plan(mix: tuple[MixEntry, ...], total: int, seed: int, rate: float | None) -> None:
    lengths = PromptLengths(3, 9)
    jobs = plan(mix, total, seed, lengths, rate)
    assert jobs == plan(mix, total, seed, lengths, rate)
    assert all(3 <= (job.length or 0) <= 9 for job in jobs)
    assert [job.number for job in jobs] == list(range(total))


def test_another_seed_is_another_plan_and_the_order_is_mixed() -> None:
    mix = parse_mix("1:1,8:1")
    first, second = ([job.count for job in plan(mix, 40, seed, None, None)] for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second) and first != sorted(first)


def test_runs_that_differ_in_the_mix_share_the_rest() -> None:
    few, many = (plan(parse_mix(text), 30, 5, PromptLengths(1, 99), 10.0) for text in ("1:1", "1:1,8:2"))
    assert [(j.length, j.text_seed, j.at, j.seed) for j in few] == [(j.length, j.text_seed, j.at, j.seed) for j in many]


def test_arrivals_are_poisson() -> None:
    times = [job.at or 0.0 for job in plan(parse_mix("1:1"), 4000, 0, None, 50.0)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    summary = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0 and min(gaps) >= 0
    assert mean == pytest.approx(1 / 50, rel=0.1) and summary == pytest.approx(mean, rel=0.1)


def test_mixes_as_typed() -> None:
    shares = parse_mix("1:0.5, 4:0.3,default:1/5")
    assert shares == (MixEntry(1, Fraction(1, 2)), MixEntry(4, Fraction(3, 10)), MixEntry(None, Fraction(1, 5)))
    assert apportion(shares, 10) == [1] * 5 + [4] * 3 + [None] * 2
    assert parse_mix("8:2:1/2,2:1") == (MixEntry((8, 2), Fraction(1, 2)), MixEntry(2, Fraction(1)))


def test_what_is_left_over_goes_to_the_largest_remainders_and_ties_to_the_first() -> None:
    assert apportion(parse_mix("1:0.1,2:0.3,3:0.6"), 2) == [2, 3]
    assert apportion(parse_mix("4:1,2:1,1:1"), 2) == [4, 2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1:",
        ":1",
        "0:1",
        "-1:1",
        "1:0",
        "1:-1",
        "1:nan",
        "1:1e9",
        "x:1",
        "1:1/0",
        "1:1,",
        "²:1",
        "01:1",
        "8::1",
        "1:2:3:4",
        "0:2:1",
    ],
)
def test_mixes_that_are_none(text: str) -> None:
    with pytest.raises(BadOption, match="count:share pairs"):
        parse_mix(text)


def test_a_count_twice() -> None:
    with pytest.raises(BadOption, match="default twice"):
        parse_mix("default:1,1:1,default:2")


def test_lengths_as_typed() -> None:
    assert parse_lengths("128") == PromptLengths(128, 128) and parse_lengths("16-256") == PromptLengths(16, 256)


@pytest.mark.parametrize("text", ["", "0", "-5", "5-", "9-3", "1-2-3", "a", "²"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(BadOption, match="--prompt-tokens"):
        parse_lengths(text)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_are_none(rate: float) -> None:
    with pytest.raises(BadOption, match="--rate"):
        check_rate(rate, None)


def test_rate_or_concurrency() -> None:
    with pytest.raises(BadOption, match="exclude each other"):
        check_rate(1.0, 1)
