"""The estimate of a step grows with its work, and what fits is exactly what stays within the time."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cost import NO_COST, ExpertPool, StepBudget, StepCost, StepLoad

constants = st.floats(0, 1e-2)
pools = st.builds(ExpertPool, st.integers(1, 64), st.sampled_from([0, 0, 1]))
COUNTS = st.tuples(st.integers(1, 8), st.integers(1, 8))
buckets = st.sampled_from([(), (), (1, 2, 4, 8, 16), (3, 40)])
costs = st.builds(StepCost, constants, constants, constants, constants, st.tuples(pools, pools), buckets)
loads = st.lists(st.tuples(COUNTS, st.integers(1, 40)), max_size=4)


def filled(cost: StepCost, work: list[tuple[tuple[int, ...], int]]) -> StepLoad:
    load = StepLoad(cost)
    for counts, tokens in work:
        load.add(counts, tokens)
    return load


def test_the_work_of_a_step() -> None:
    cost = StepCost(1.0, 0.1, 0.01, 0.001, (ExpertPool(4), ExpertPool(8)))
    load = filled(cost, [((1, 2), 2), ((2, 2), 1)])
    assert (load.tokens, load.routed_pairs) == (3, 10)
    assert load.distinct_experts == pytest.approx(4 * (1 - (3 / 4) ** 2 * (2 / 4)) + 8 * (1 - (6 / 8) ** 3))
    assert load.seconds == pytest.approx(1 + 0.3 + 0.1 + 0.001 * load.distinct_experts)


def test_an_empty_step_costs_what_is_fixed() -> None:
    assert StepLoad(StepCost(1.0, 0.1, 0.01, 0.001, (ExpertPool(4),))).seconds == 1.0
    assert filled(NO_COST, [((3, 3), 5)]).seconds == 0.0


def test_a_padded_step_costs_what_its_bucket_costs() -> None:
    plain = StepCost(1.0, 0.1, 0.01, 0.001, (ExpertPool(4), ExpertPool(8)))
    padded = replace(plain, token_buckets=(1, 2, 4, 8, 16))
    for tokens, bucket in ((1, 1), (3, 4), (8, 8), (9, 16), (16, 16), (17, 17), (300, 300)):
        same_work = filled(plain, [((1, 2), tokens)]).seconds + 0.1 * (bucket - tokens)
        assert filled(padded, [((1, 2), tokens)]).seconds == pytest.approx(same_work)
    assert filled(padded, []).seconds == 1.0


def test_a_bucket_is_filled_before_it_is_left() -> None:
    load = filled(StepCost(0.0, 1.0, 0.0, 0.0, (), (8, 16, 32)), [((1,), 9)])
    assert load.max_tokens_within((1,), 16.5, 100) == 7
    assert load.max_tokens_within((1,), 31.5, 100) == 7
    assert load.max_tokens_within((1,), 32.5, 100) == 23


def test_experts_of_a_token_differ_and_draws_may_repeat() -> None:
    assert ExpertPool(8).untouched_probability(8) == 0
    assert ExpertPool(8).untouched_probability(9) == 0  # no count is refused here
    assert ExpertPool(8, kept=2).untouched_probability(2) == pytest.approx((6 / 8) ** 2)
    assert ExpertPool(8, kept=8).untouched_probability(1) == 0


@settings(deadline=None)
@given(costs, loads, COUNTS, st.integers(1, 40))
def test_more_work_never_costs_less(
    cost: StepCost, work: list[tuple[tuple[int, ...], int]], counts: tuple[int, int], tokens: int
) -> None:
    before, after = filled(cost, work), filled(cost, [*work, (counts, tokens)])
    assert after.seconds >= before.seconds - 1e-12
    stronger = filled(cost, [*work, ((counts[0] + 1, counts[1]), tokens)])
    assert stronger.seconds >= after.seconds - 1e-12
    assert after.distinct_experts <= sum(pool.experts for pool in cost.pools) + 1e-9


@settings(deadline=None)
@given(costs, loads, COUNTS, st.floats(0, 1), st.integers(-1, 300))
def test_what_fits_stays_within_the_time_and_one_more_does_not(
    cost: StepCost, work: list[tuple[tuple[int, ...], int]], counts: tuple[int, int], seconds: float, most: int
) -> None:
    fit = filled(cost, work).max_tokens_within(counts, seconds, most)
    assert 0 <= fit <= max(0, most)
    if fit:
        assert filled(cost, [*work, (counts, fit)]).seconds <= seconds + 1e-9
    if fit < most:
        assert filled(cost, [*work, (counts, fit + 1)]).seconds > seconds - 1e-9


@settings(deadline=None)
@given(costs, loads, COUNTS, st.floats(0, 1), st.floats(0, 1))
def test_more_time_or_fewer_experts_fit_no_fewer_tokens(
    cost: StepCost, work: list[tuple[tuple[int, ...], int]], counts: tuple[int, int], one: float, other: float
) -> None:
    load, (less, more) = filled(cost, work), sorted((one, other))
    assert load.max_tokens_within(counts, less, 300) <= load.max_tokens_within(counts, more, 300)
    assert load.max_tokens_within((counts[0] + 1, counts[1] + 1), more, 300) <= load.max_tokens_within(
        counts, more + 1e-9, 300
    )


def test_the_search_does_not_go_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    seconds = StepCost.seconds

    def counted(self: StepCost, *work: float) -> float:
        nonlocal calls
        calls += 1
        return seconds(self, *work)

    monkeypatch.setattr(StepCost, "seconds", counted)
    assert StepLoad(StepCost(0.0, 1e-6, 0.0, 0.0, ())).max_tokens_within((1,), 0.5, 1_000_000) == pytest.approx(
        500_000, abs=1
    )
    assert calls <= 21


def step_budget(seconds: float, tokens: int = 100) -> StepBudget:
    return StepBudget(StepCost(0.0, 1.0, 0.0, 0.0, ()), tokens, seconds, min_chunk=4)


def test_without_a_decode_only_tokens_bound_a_step() -> None:
    step = step_budget(seconds=10)
    step.spend((1,), 60, prompt=True)
    assert step.max_chunk((1,)) == 40


def test_with_a_decode_time_bounds_it() -> None:
    step = step_budget(seconds=10)
    step.spend((1,), 1, prompt=False)
    assert step.max_chunk((1,)) == 9
    step.spend((1,), 5, prompt=True)
    assert step.max_chunk((1,)) == 4
    step.spend((1,), 1, prompt=True)
    assert step.max_chunk((1,)) == 0  # three tokens are not worth a chunk


@pytest.mark.parametrize(("tokens", "room"), [(100, 4), (3, 2), (1, 0)])
def test_the_first_prompt_gets_its_least_chunk_whatever_it_costs(tokens: int, room: int) -> None:
    step = step_budget(seconds=0.5, tokens=tokens)
    step.spend((1,), 1, prompt=False)
    assert step.max_chunk((1,)) == room


def test_a_step_without_a_limit() -> None:
    step = step_budget(seconds=math.inf)
    step.spend((1,), 1, prompt=False)
    assert step.max_chunk((1,)) == 99
