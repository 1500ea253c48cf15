"""Which option a request gets: the quality floor always holds, and more experts never break a bound that fewer keep."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InvalidRequest
from server.experts.experts_object import Auto
from server.experts.policies import Load, best_of, decide, ladder, loaded_cost, predicted_itl, tiers
from tests.server.calibrations import calibration, option
from weights.calibration import Option

OPTIONS = calibration().options
BY_NAME = {one.name: one for one in OPTIONS}


def changed(option: Option, **fields: Any) -> Option:
    quality = msgspec.structs.replace(option.quality, relative=fields.pop("relative", option.quality.relative))
    return msgspec.structs.replace(option, quality=quality, **fields)


@pytest.mark.parametrize(
    ("floor", "chosen"),
    [(0.5, "k1"), (0.82, "k2-repaired"), (0.96, "k2-repaired"), (0.97, "k4"), (1.0, "k4"), (1.01, "k8")],
)
def test_the_cheapest_option_that_has_the_quality(floor: float, chosen: str) -> None:
    for load in (Load(1), Load(64, slowdown=9.0)):
        decision = decide(OPTIONS, Auto(min_quality=floor), load)
        assert decision.option.name == chosen, "whatever the load"
        assert decision.bound_met is None and decision.predicted_itl_ms is None


def test_a_quality_that_no_option_has_is_refused_with_the_best_there_is() -> None:
    with pytest.raises(InvalidRequest, match=r"1\.2.*the best is 1\.05.*of k8") as error:
        decide(OPTIONS, Auto(min_quality=1.2), Load(1))
    assert error.value.param == "experts.auto.min_quality"


@pytest.mark.parametrize(
    ("bound", "running", "slowdown", "chosen", "met"),
    [
        (100.0, 1, 1.0, "k8", True),
        (9.0, 1, 1.0, "k8", True),  # exactly
        (8.9, 1, 1.0, "k4", True),
        (8.9, 1, 2.0, "k2-repaired", True),  # a machine that is half as fast: 6 ms, not 10
        (20.0, 16, 1.0, "k4", True),
        (19.9, 16, 1.0, "k2-repaired", True),
        (20.0, 31, 1.0, "k2-repaired", False),  # beyond the batches that were measured: 21 ms, and k1 takes 14
        (1.0, 1, 1.0, "k1", False),
    ],
)
def test_the_best_option_within_a_latency(bound: float, running: int, slowdown: float, chosen: str, met: bool) -> None:
    if (chosen, met) == ("k2-repaired", False):
        chosen, met = "k1", True
    decision = decide(OPTIONS, Auto(max_itl_ms=bound), Load(running, slowdown))
    assert (decision.option.name, decision.bound_met) == (chosen, met)
    assert decision.predicted_itl_ms == predicted_itl(decision.option, Load(running, slowdown))


def test_the_floor_wins_over_the_bound_and_that_is_told() -> None:
    both = Auto(min_quality=0.96, max_itl_ms=4.0)
    assert decide(OPTIONS, both, Load(1)).option.name == "k2-repaired"
    crowded = decide(OPTIONS, both, Load(16))
    assert (crowded.option.name, crowded.bound_met) == ("k2-repaired", False), "the fastest above the floor"


def test_step_times_lie_on_lines_between_and_beyond_the_measured_batches() -> None:
    k2 = BY_NAME["k2"]  # 3 ms alone, 12 of sixteen
    assert [predicted_itl(k2, Load(n)) for n in (1, 6, 16, 26)] == [3.0, 6.0, 12.0, 18.0]
    assert predicted_itl(k2, Load(16, slowdown=1.5)) == 18.0
    assert k2.speed is not None
    one = changed(k2, speed=msgspec.structs.replace(k2.speed, itl_ms={"4": 7.0}))
    assert [predicted_itl(one, Load(n)) for n in (1, 4, 100)] == [7.0] * 3
    assert predicted_itl(changed(k2, speed=None), Load(1)) is None


def test_options_without_speeds_cannot_keep_a_bound() -> None:
    mute = [changed(one, speed=None) for one in OPTIONS]
    with pytest.raises(InvalidRequest, match="no speeds") as error:
        decide(mute, Auto(max_itl_ms=5.0), Load(1))
    assert error.value.param == "experts.auto.max_itl_ms"
    assert decide([*mute[1:], OPTIONS[0]], Auto(max_itl_ms=5.0), Load(1)).option.name == "k1"


made = st.builds(
    lambda count, loss, relative, cost: changed(
        option(f"k{count}", (count,) * 3, loss), relative=relative, relative_cost=cost
    ),
    st.integers(1, 8),
    st.floats(1, 2),
    st.floats(0.5, 1.1),
    st.floats(0.1, 3),
)


@given(
    st.lists(made, min_size=1, max_size=6),
    st.none() | st.floats(0.5, 1.2),
    st.floats(0.5, 50),
    st.integers(1, 64),
    st.floats(0.2, 5),
)
def test_no_load_breaks_the_floor_or_a_bound_that_can_be_kept(
    options: list[Option], floor: float | None, bound: float, running: int, slowdown: float
) -> None:
    load = Load(running, slowdown)
    good = [one for one in options if floor is None or one.quality.relative >= floor]
    if not good:
        with pytest.raises(InvalidRequest):
            decide(options, Auto(floor, bound), load)
        return
    decision = decide(options, Auto(floor, bound), load)
    times = {id(one): predicted_itl(one, load) or 0.0 for one in good}
    assert id(decision.option) in times, "never below the floor"
    kept = [one for one in good if times[id(one)] <= bound]
    assert bool(kept) == decision.bound_met
    if kept:
        assert decision.option.quality.relative == max(one.quality.relative for one in kept)
    else:
        assert times[id(decision.option)] == min(times.values())


def test_tiers() -> None:
    assert {name: one.name for name, one in tiers(OPTIONS).items()} == {
        "fast": "k2-repaired",
        "balanced": "k4",
        "best": "k8",
    }
    assert tiers(()) == {}
    assert tiers(OPTIONS, fast=0.8)["fast"].name == "k1"
    poor = [changed(one, relative=0.5) for one in OPTIONS]
    assert {one.name for one in tiers(poor).values()} == {"k1"}, "no option has the quality: the best, and cheapest"
    assert best_of([BY_NAME["k8"], changed(BY_NAME["k4"], relative=BY_NAME["k8"].quality.relative)]).name == "k4"


def test_a_ladder_goes_down_in_quality_and_in_cost_to_the_floor() -> None:
    assert [one.name for one in ladder(OPTIONS, BY_NAME["k4"], 0.8)] == ["k4", "k2-repaired", "k1"]
    assert [one.name for one in ladder(OPTIONS, BY_NAME["k4"], 0.95)] == ["k4", "k2-repaired"]
    assert [one.name for one in ladder(OPTIONS, BY_NAME["k4"], 0.97)] == ["k4"]
    assert [one.name for one in ladder(OPTIONS, BY_NAME["k8"], 0.8)] == ["k8", "k4", "k2-repaired", "k1"]


def test_a_ladder_compares_costs_under_load_where_they_were_measured() -> None:
    k1 = BY_NAME["k1"]
    assert loaded_cost(k1, OPTIONS) == 8.0
    assert loaded_cost(k1, [*OPTIONS, changed(k1, speed=None)]) == k1.relative_cost
    assert k1.speed is not None
    slow = changed(k1, speed=msgspec.structs.replace(k1.speed, itl_ms={"1": 0.5, "16": 30.0}))
    assert [one.name for one in ladder([*OPTIONS[1:], slow], BY_NAME["k4"], 0.8)] == ["k4", "k2-repaired"]
