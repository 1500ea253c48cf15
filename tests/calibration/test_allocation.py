"""Splits of experts over layers: the dynamic programme, the climb, and a layer that needs nothing."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from calibration import allocation
from calibration.allocation import MOVES, cheapest_split, climb, interpolated, layer_costs, part_of
from calibration.scoring import Windows
from model.budget import ExpertCounts
from tests.calibration.runs import idle_middle, run_of

COSTS = [(5.0, 1.0, 0.5, 0.0), (0.2, 0.1, 0.1, 0.0), (9.0, 4.0, 1.0, 0.0)]


def added(counts: ExpertCounts) -> float:
    return sum(layer[count - 1] for layer, count in zip(COSTS, counts, strict=True))


@pytest.mark.parametrize("total", range(3, 13))
def test_the_cheapest_split_is_the_best_of_all(total: int) -> None:
    splits = [counts for counts in product(range(1, 5), repeat=3) if sum(counts) == total]
    found = cheapest_split(COSTS, total)
    assert sum(found) == total
    assert added(found) == pytest.approx(min(map(added, splits)))


def test_the_climb_finds_what_the_sums_do_not_know() -> None:
    """The first two layers can only be cheap together, which no layer alone shows."""

    def measure(splits: Sequence[ExpertCounts]) -> list[float]:
        return [added(counts) + (0 if counts[0] == counts[1] else 50) for counts in splits]

    start = cheapest_split(COSTS, 8)
    found = climb([start], COSTS, measure)
    assert start[0] != start[1] and found[0] == found[1] and sum(found) == 8


def test_the_climb_ends_soon_and_never_gets_worse() -> None:
    tried: list[ExpertCounts] = []

    def measure(splits: Sequence[ExpertCounts]) -> list[float]:
        tried.extend(splits)
        return [1.0 if counts == start else 2.0 for counts in splits]

    start = (2, 2, 2)
    assert climb([start], COSTS, measure) == start
    assert len(tried) <= MOVES + 1
    assert all(sum(counts) == 6 and min(counts) >= 1 and max(counts) <= 4 for counts in tried)


def test_the_climb_begins_at_the_better_start() -> None:
    def measure(splits: Sequence[ExpertCounts]) -> list[float]:
        return [0.0 if counts == (2, 2, 2) else 1.0 for counts in splits]

    assert climb([(1, 1, 4), (2, 2, 2)], COSTS, measure) == (2, 2, 2)


def test_costs_between_measured_counts_are_linear() -> None:
    assert interpolated({1: 4.0, 3: 2.0, 5: 0.0}, 5) == (4.0, 3.0, 2.0, 1.0, 0.0)
    assert interpolated({2: 4.0, 4: 0.0}, 4) == (4.0, 4.0, 2.0, 0.0)


def test_each_layer_is_lowered_alone() -> None:
    asked: list[ExpertCounts] = []

    def measure(splits: Sequence[ExpertCounts]) -> list[float]:
        asked.extend(splits)
        return [float(sum(4 - count for count in counts)) for counts in splits]

    assert layer_costs(2, 4, [1, 2], measure) == [(3.0, 2.0, 1.0, 0.0)] * 2
    assert asked == [(1, 4), (2, 4), (4, 1), (4, 2)]


def test_a_part_of_a_text_is_its_first_windows() -> None:
    text = Windows("decisions", ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    assert part_of(text, 4).windows == text.windows[:2]
    assert part_of(text, 1).windows == text.windows[:1]
    assert part_of(text, 4).name != text.name


def test_a_layer_that_gives_nothing_gets_the_least(tmp_path: Path) -> None:
    with run_of(idle_middle(tmp_path), "1,2,4") as run:
        found = allocation.search(run)
        assert found.profiles["p2"][1] == 1
        assert sum(found.profiles["p2"]) == 2 * 3
        profile, uniform = run.score([found.options["p2"], run.uniform(2)], run.report)
        assert profile.kl < uniform.kl
        assert profile.pairs_per_token == uniform.pairs_per_token
    assert set(found.profiles) == {"p2"}  # nothing to split at one expert a layer, nothing to win at the trained count
