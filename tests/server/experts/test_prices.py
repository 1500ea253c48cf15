"""Prices by count: between two of them on the line, and what the operator must say."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.errors import InvalidRequest
from model.expert_range import ExpertRange
from server.configuration.options import Price
from server.experts.prices import Prices
from server.settings import Settings

RANGE = ExpertRange(layers=3, trained=4, minimum=1, maximum=8)
DENSE = ExpertRange(layers=0, trained=0, minimum=0, maximum=0)


def prices_of(text: str, experts: ExpertRange = RANGE, **fields: Any) -> Prices:
    found = Prices.build(Settings.model_validate({"model": "tiny", "prices": text} | fields), experts)
    assert found is not None
    return found


def test_on_the_line_between_two_counts() -> None:
    prices = prices_of("8=80/160/8,1=10/20,4=40/80/40", currency="EUR")
    assert prices.at(4) == Price(40, 80, 40) and prices.at(1) == Price(10, 20, 10)
    assert prices.at(2.5) == pytest.approx(Price(25, 50, 25))
    assert prices.at(7) == pytest.approx(Price(70, 140, 16))
    assert prices.card == {
        "currency": "EUR",
        "per_million_tokens": [
            {"num_experts": 1, "prompt": 10, "completion": 20, "cached": 10},
            {"num_experts": 4, "prompt": 40, "completion": 80, "cached": 40},
            {"num_experts": 8, "prompt": 80, "completion": 160, "cached": 8},
        ],
    }


@settings(max_examples=50)
@given(st.lists(st.floats(0, 12), min_size=2, max_size=5))
def test_more_experts_never_cost_less_where_the_counts_do_not(means: list[float]) -> None:
    prices = prices_of("1=1/2,2=1/3,8=9/30")
    found = [prices.at(mean) for mean in sorted(means)]
    assert found == sorted(found) and prices.at(0) == prices.at(1) and prices.at(12) == prices.at(8)


def test_one_price_is_for_all_counts() -> None:
    prices = prices_of("4=1/2")
    assert prices.at(1) == prices.at(8) == prices.at(4)
    assert prices_of("0=1/2", DENSE).at(0.0) == Price(1, 2, 1)


def test_without_any_nothing_is_priced() -> None:
    assert Prices.build(Settings(model="tiny"), RANGE) is None


@pytest.mark.parametrize(
    ("text", "experts", "words"),
    [
        ("1=1/2,9=3/4", RANGE, "counts from 1 to 8, got a price of 9"),
        ("1=1/2,4=3/4", RANGE, "smallest count, 1, and one of the largest, 8; got 1, 4"),
        ("4=1/2", DENSE, "counts from 0 to 0"),
    ],
)
def test_prices_that_do_not_fit_the_model_end_the_start(text: str, experts: ExpertRange, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        prices_of(text, experts)


@pytest.mark.parametrize(
    "fields",
    [
        {"prices": "1=-1/2"},
        {"prices": "1=nan/2"},
        {"prices": "1=1/1e300"},
        {"prices": "x=1/2"},
        {"prices": "1=1/2,1=3/4"},
        {"prices": "1=1/2,01=3/4"},
        {"currency": "€"},
    ],
)
def test_amounts_and_currencies_that_are_none(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings(model="tiny", **fields)  # type: ignore[arg-type]
