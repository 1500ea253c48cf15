"""The state machine of brownout, with a simulated clock and load: up while too much waits, down when there is room."""

from dataclasses import replace

import pytest

from server.experts.brownout import LOWER_AFTER_S, RAISE_AFTER_S, RAISE_WAIT_S, Brownout, Pressure

COSTS = (4.0, 2.0, 1.0)
TICK = 0.05
CALM = Pressure(waiting=0, oldest_wait_s=0.0, itl_ratio=0.3, running=1.0, slots=8)
QUEUED = Pressure(waiting=9, oldest_wait_s=RAISE_WAIT_S, itl_ratio=1.0, running=8.0, slots=8)
BETWEEN = Pressure(waiting=1, oldest_wait_s=RAISE_WAIT_S / 2, itl_ratio=1.0, running=8.0, slots=8)


class Simulated:
    """A brownout and its clock."""

    def __init__(self, max_itl_ratio: float = 1.5) -> None:
        self.brownout, self.now = Brownout(COSTS, max_itl_ratio), 100.0

    def run(self, pressure: Pressure, seconds: float) -> list[float]:
        """The seconds after which the level changed."""
        changes = []
        for tick in range(round(seconds / TICK) + 1):
            if self.brownout.update(self.now + tick * TICK, pressure):
                changes.append(round(tick * TICK, 3))
        self.now += seconds
        return changes


def test_a_queue_raises_the_level_step_by_step_up_to_the_last() -> None:
    simulated = Simulated()
    assert simulated.run(QUEUED, 10.0) == pytest.approx([RAISE_AFTER_S, 2 * RAISE_AFTER_S])
    assert simulated.brownout.level == 2


def test_a_short_burst_changes_nothing() -> None:
    simulated = Simulated()
    for _ in range(20):
        assert simulated.run(QUEUED, RAISE_AFTER_S - 2 * TICK) == []
        assert simulated.run(BETWEEN, TICK) == []
    assert simulated.brownout.level == 0


def test_it_comes_down_more_slowly_than_it_went_up() -> None:
    simulated = Simulated()
    simulated.run(QUEUED, 1.0)
    assert simulated.run(CALM, 10.0) == pytest.approx([LOWER_AFTER_S, 2 * LOWER_AFTER_S])
    assert simulated.brownout.level == 0 and LOWER_AFTER_S > RAISE_AFTER_S


def test_between_the_two_loads_the_level_stays() -> None:
    simulated = Simulated()
    simulated.run(QUEUED, RAISE_AFTER_S)
    assert simulated.brownout.level == 1
    assert simulated.run(BETWEEN, 60.0) == []
    assert simulated.run(replace(CALM, waiting=1), 60.0) == [], "something waits, if not for long"


def test_an_interrupted_calm_starts_again() -> None:
    simulated = Simulated()
    simulated.run(QUEUED, RAISE_AFTER_S)
    for _ in range(5):
        assert simulated.run(CALM, LOWER_AFTER_S - 2 * TICK) == []
        assert simulated.run(BETWEEN, TICK) == []
    assert simulated.brownout.level == 1


def test_slow_tokens_raise_the_level_without_a_queue_unless_only_the_queue_counts() -> None:
    slow = Pressure(waiting=0, oldest_wait_s=0.0, itl_ratio=1.4, running=4.0, slots=8)
    assert Simulated().run(slow, 1.0) != []
    assert Simulated(max_itl_ratio=float("inf")).run(slow, 1.0) == []
    fine = Pressure(waiting=0, oldest_wait_s=0.0, itl_ratio=1.3, running=4.0, slots=8)
    assert Simulated().run(fine, 1.0) == []


@pytest.mark.parametrize(
    ("running", "itl_ratio", "comes_down"),
    [(2.9, 0.5, True), (3.1, 0.5, False), (1.0, 0.66, True), (1.0, 0.7, False)],
)
def test_it_comes_down_only_where_the_load_would_fit(running: float, itl_ratio: float, comes_down: bool) -> None:
    """At level 1 a step takes 2, at level 0 4: twice as many run at once, of 8 at most three quarters."""
    simulated = Simulated()
    simulated.run(QUEUED, RAISE_AFTER_S)
    quiet = Pressure(waiting=0, oldest_wait_s=0.0, itl_ratio=itl_ratio, running=running, slots=8)
    assert bool(simulated.run(quiet, 5.0)) == comes_down


def test_under_a_steady_load_that_only_the_lowest_level_carries_it_does_not_swing() -> None:
    """A closed loop: the queue grows where the level's work is more than the slots can do, and drains where it is
    less."""
    brownout, queue, levels = Brownout(COSTS), 0.0, []
    for tick in range(2400):
        demand = 5.0 * COSTS[brownout.level]  # slots that the arrivals keep busy
        queue = max(0.0, queue + (demand - 8.0) * TICK)
        wait = queue / 8.0 * COSTS[brownout.level]
        running = 8.0 if queue else min(8.0, demand)
        brownout.update(tick * TICK, Pressure(round(queue), wait, 1.0, running, 8))
        levels.append(brownout.level)
    assert set(levels[1200:]) == {2}, "5 slots busy at cost 1 would be 10 of 8 at cost 2"


def test_a_single_level_never_moves() -> None:
    brownout = Brownout((1.0,))
    assert not any(brownout.update(tick * TICK, QUEUED) for tick in range(100))
