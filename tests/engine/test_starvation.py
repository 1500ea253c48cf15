"""Storms in simulated time: how long a prompt waits for its first token, and what that costs those that decode."""

import pytest

from engine.cost import MAX_PREFILL_SHARE, prefill_share
from engine.engine import Engine
from engine.plan import Chunk
from engine.scheduler import Scheduler
from tests.engine.costs import COST, seconds
from tests.engine.fake import FakeRunner
from tests.engine.simulation import LEAST, MIN_SECONDS, SIZE, STRONG, TARGET, WEAK, Simulation, asks, make

DECODES = 100
LONG = 1900  # tokens; LONG_SECONDS at the most to read them in chunks, if nothing else ran
LONG_SECONDS = LONG * (COST.seconds(1, sum(STRONG), 0) - COST.fixed)


def overloaded(target: float = TARGET) -> Simulation:
    """Sequences decode that take nearly twice the target by themselves."""
    simulation = Simulation(make(target=target, running=128, blocks=20_000))
    for number in range(DECODES):
        simulation.add(asks(f"decode{number}", 5, STRONG, max_tokens=1990))
    simulation.step()
    plan = simulation.step()
    assert len(plan) == DECODES and 1.8 * TARGET < seconds(COST, plan) < 2.2 * TARGET
    return simulation


def run(simulation: Simulation, id: str, limit: int = 5000) -> None:
    """Until a request has its first token."""
    for _ in range(limit):
        if id in simulation.came:
            return
        simulation.step()
    raise AssertionError(f"{id} got nothing in {simulation.clock.now} s")


def test_a_short_prompt_behind_long_ones_gets_its_token_at_once() -> None:
    simulation = overloaded()
    for number in range(10):
        simulation.add(asks(f"long{number}", LONG, STRONG))
    for _ in range(5):
        simulation.step()
    simulation.add(asks("short", 3, WEAK))
    run(simulation, "short")
    assert simulation.waited("short") < 0.5


def test_long_prompts_are_read_in_a_multiple_of_the_time_that_they_need() -> None:
    """Three quarters of the time are theirs once they have waited for five seconds; a quarter at the least."""
    simulation = overloaded()
    for number in range(10):
        simulation.add(asks(f"long{number}", LONG, STRONG, max_tokens=1))
    run(simulation, "long9")
    assert simulation.waited("long9") < 10 * LONG_SECONDS / MAX_PREFILL_SHARE + 5
    assert simulation.waited("long0") < LONG_SECONDS / prefill_share(0.0)


def test_decodes_get_their_share_too() -> None:
    simulation = overloaded()
    alone = max(simulation.gap(f"decode{number}") for number in range(DECODES))
    for number in range(5):
        simulation.add(asks(f"long{number}", LONG, STRONG, max_tokens=1))
    run(simulation, "long4")
    assert simulation.gap("decode0") < alone / (1 - MAX_PREFILL_SHARE) + MIN_SECONDS


def test_a_long_prompt_is_read_on_beside_any_number_of_short_ones() -> None:
    simulation = overloaded()
    simulation.add(asks("long", LONG, STRONG))
    for number in range(2000):
        if "long" in simulation.came:
            break
        for each in range(4):
            simulation.add(asks(f"short{number}-{each}", 40, STRONG, max_tokens=1))
        simulation.step()
    assert simulation.waited("long") < 2 * LONG_SECONDS / prefill_share(0.0)


def crowded(blocks: int) -> Simulation:
    """A long prompt of 20 blocks, which is being read beside an older sequence that decodes."""
    simulation = Simulation(make(running=8, blocks=blocks))
    simulation.add(asks("old", 10, WEAK, max_tokens=30))
    simulation.step()
    simulation.add(asks("long", 20 * SIZE - 5, STRONG, max_tokens=2))
    simulation.step()
    assert 1 < len(simulation.scheduler._running["long"].blocks) < 10
    return simulation


@pytest.mark.parametrize(("blocks", "starts"), [(23, False), (24, True)])
def test_a_short_prompt_leaves_the_blocks_that_a_long_one_needs(blocks: int, starts: bool) -> None:
    """One for the old sequence, 20 for the long one, one for the short one, and a spare one for each that runs."""
    simulation = crowded(blocks)
    simulation.add(asks("short", 5, WEAK))
    simulation.step()
    assert ("short" in simulation.plans[-1]) is starts
    simulation.finish()


def test_what_overtook_a_long_prompt_gives_way_to_it() -> None:
    simulation = crowded(24)
    scheduler = simulation.scheduler
    simulation.add(asks("short", 5, WEAK))
    simulation.step()
    short, long = scheduler._running["short"], scheduler._running["long"]
    while scheduler.blocks.reserve(short, short.computed + 1 + len(short.blocks) * SIZE):
        pass  # it grows into all that was left
    for _ in range(3):
        simulation.step()
        assert {"old", "long"} <= simulation.plans[-1].keys()
    assert short.preemptions == 1 and long.preemptions == 0
    simulation.finish()
    assert simulation.came.keys() == {"old", "long", "short"}


def test_a_sequence_that_was_set_back_has_waited_since_then() -> None:
    simulation = Simulation(make(cost=None))
    simulation.add(asks("a", 10, WEAK))
    simulation.step()
    simulation.clock.now = 100.0
    simulation.scheduler._planner.preempt(simulation.scheduler._running["a"])
    simulation.clock.now = 101.0
    assert simulation.scheduler.oldest_waiting_s == 1.0


def test_a_preempted_sequence_keeps_its_place_in_the_order() -> None:
    """It had overtaken a long prompt and an older one that waits behind it: both go first."""
    simulation = Simulation(make(cost=None, running=3, blocks=70))
    for id, length in (("long", 600), ("older", 500), ("short", 10)):
        simulation.add(asks(id, length, WEAK, max_tokens=40))
    simulation.step()
    assert list(simulation.scheduler._running) == ["long", "short"]
    simulation.scheduler._planner.preempt(simulation.scheduler._running["short"])
    assert list(simulation.scheduler._waiting) == ["older", "short"]
    simulation.finish()


def test_the_age_of_the_oldest_that_waits_reaches_the_report() -> None:
    scheduler: Scheduler = make(running=1)
    simulation = Simulation(scheduler)
    engine = Engine(FakeRunner(SIZE), scheduler)
    engine.add(asks("a", 10, WEAK, max_tokens=3))
    engine.add(asks("b", 600, WEAK, max_tokens=1))
    simulation.clock.now = 2.5
    assert engine.step().stats.oldest_waiting_s == 2.5
    while engine.scheduler.waiting:
        stats = engine.step().stats
    assert stats.oldest_waiting_s == 2.5, "it is partly read"
    while engine.has_work:
        stats = engine.step().stats
    assert stats.oldest_waiting_s == 0.0


@pytest.mark.parametrize(("age", "share"), [(0.0, 0.25), (2.0, 0.45), (5.0, 0.75), (1e6, 0.75)])
def test_the_share_grows_with_age_and_leaves_a_quarter_for_decodes(age: float, share: float) -> None:
    assert prefill_share(age) == pytest.approx(share)


def test_a_prompt_that_fits_the_least_chunk_is_not_held_up_by_what_is_left() -> None:
    simulation = overloaded(target=1e-6)
    simulation.add(asks("short", LEAST - 1, STRONG))
    plan = simulation.step()
    assert plan[-1] == Chunk(plan[-1].sequence, 0, LEAST - 1)
