"""Steps planned by their cost: reading never holds up generating for long, and it always goes on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks import BlockManager
from engine.cost import StepCost, prefill_share
from engine.engine import Engine
from engine.plan import Chunk
from engine.scheduler import Scheduler
from engine.types import Request
from tests.engine.costs import COST, LAYERS, seconds
from tests.engine.fake import FakeRunner
from tests.engine.simulation import (
    LEAST,
    MIN_SECONDS,
    SIZE,
    STRONG,
    TARGET,
    WEAK,
    Simulation,
    asks,
    beside_a_neighbour,
    make,
)


def crowd(budget: tuple[int, ...]) -> list[Request]:
    return [asks(f"crowd{number}", 600, budget) for number in range(8)]


@pytest.mark.parametrize("budget", [WEAK, STRONG])
def test_a_crowd_stretches_a_neighbours_gaps_to_the_target_and_no_further(budget: tuple[int, ...]) -> None:
    budgeted = beside_a_neighbour(make(), *crowd(budget)).finish()
    assert budgeted.gap("neighbour") <= TARGET + MIN_SECONDS
    assert {id: len(times) for id, times in budgeted.came.items()} == {
        "neighbour": 400,
        **{each.id: 20 for each in crowd(budget)},
    }


def test_without_a_cost_the_gaps_are_several_times_as_long() -> None:
    plain = beside_a_neighbour(make(cost=None), *crowd(STRONG)).finish()
    assert plain.gap("neighbour") > 5 * (TARGET + MIN_SECONDS)


def test_a_prompt_with_more_experts_gets_a_shorter_chunk() -> None:
    lengths = {}
    for budget in (WEAK, (4,) * LAYERS, STRONG):
        simulation = beside_a_neighbour(make(), asks("long", 600, budget))
        plan = simulation.step()
        lengths[budget] = plan[1].length
        assert seconds(COST, plan) <= TARGET
        longer = Chunk(plan[1].sequence, plan[1].start, plan[1].length + 1)
        assert seconds(COST, [plan[0], longer]) > TARGET
    weak, middle, strong = lengths.values()
    assert weak > 2 * middle > 2 * strong >= 2 * LEAST


def test_nothing_is_cut_while_nobody_decodes() -> None:
    scheduler = make()
    for number in range(2):
        scheduler.add(asks(f"{number}", 300, STRONG))
    assert [chunk.length for chunk in scheduler.schedule()] == [300, 212]


def test_a_prompt_is_read_on_even_when_the_decodes_alone_take_too_long() -> None:
    simulation = beside_a_neighbour(make(target=1e-6), asks("long", 40, STRONG), asks("next", 5, WEAK))
    for _ in range(4):
        simulation.step()
    assert simulation.plans[1:] == [
        {"neighbour": 1, "long": 16},
        {"neighbour": 1, "long": 16},
        {"neighbour": 1, "long": 8},
        {"neighbour": 1, "long": 1, "next": 5},
    ]


def test_a_short_prompt_goes_beside_one_that_was_cut() -> None:
    """But only whole, and in half of what the step has left: the long one is read on."""
    pairs = 2 + 40 * sum(STRONG)
    scheduler = make(StepCost(0.0, 0.0, 1.0, 0.0, COST.pools), target=pairs, least=4)
    lengths = {"longer": 300, "short": 5, "late": 139, "last": 20}
    others = [asks(id, length, WEAK, max_tokens=1) for id, length in lengths.items()]
    simulation = beside_a_neighbour(scheduler, asks("long", 600, STRONG), *others)
    for _ in range(2):
        simulation.step()
    assert simulation.plans[1:] == [
        {"neighbour": 1, "short": 5, "late": 139, "long": 4 + 18},
        {"neighbour": 1, "last": 20, "long": 4 + 33},
    ]


def test_prompts_that_cannot_be_cut_are_read_whole() -> None:
    simulation = beside_a_neighbour(make(chunked=False), asks("long", 300, STRONG), asks("next", 200, WEAK))
    simulation.step()
    assert simulation.plans[-1] == {"neighbour": 1, "long": 300, "next": 200}


def test_the_estimate_reaches_the_report() -> None:
    for cost, expected in ((COST, COST.seconds(10, 10 * sum(WEAK), 16 * LAYERS * (1 - (15 / 16) ** 10))), (None, 0.0)):
        engine = Engine(FakeRunner(SIZE), make(cost, target=0.0))
        engine.add(asks("a", 10, WEAK, max_tokens=1))
        assert engine.step().stats.estimated_s == pytest.approx(expected)
        engine.add(asks("b", 10, WEAK))
        engine.abort("b")
        assert engine.step().stats.estimated_s == 0.0  # nothing ran


def test_a_least_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="min_chunk"):
        Scheduler(BlockManager(4, SIZE), 1, 4, 8, min_chunk=0)


budgets = st.tuples(*[st.integers(1, 8)] * LAYERS)
arrivals = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 700), budgets, st.integers(1, 30)), max_size=8)
Arrivals = list[tuple[int, int, tuple[int, ...], int]]  # steps to wait, prompt tokens, counts, new tokens


def simulate(scheduler: Scheduler, todo: Arrivals) -> Simulation:
    simulation = Simulation(scheduler)
    for number, (wait, length, budget, new) in enumerate(todo):
        for _ in range(wait):
            judged_step(simulation)
        simulation.add(asks(f"{number}", length, budget, new))
    while scheduler.has_work:
        judged_step(simulation)
        assert len(simulation.plans) < 5000, "there is still work"
    return simulation


def judged_step(simulation: Simulation) -> None:
    """One step of a scheduler with room for everybody; what it must keep to."""
    scheduler = simulation.scheduler
    running = {sequence.id: sequence.pending for sequence in scheduler._running.values()}
    share = prefill_share(scheduler.oldest_waiting_s)
    plan = simulation.step()
    decodes = [chunk for chunk in plan if running.get(chunk.sequence.id) == 1]
    prompts = [chunk for chunk in plan if running.get(chunk.sequence.id) != 1]
    assert len(decodes) == sum(pending == 1 for pending in running.values())
    assert sum(chunk.length for chunk in plan) <= scheduler.max_step_tokens
    if scheduler.cost is None:
        return
    assert scheduler.plan_stats.estimated_s == pytest.approx(seconds(COST, plan) if plan else 0.0)
    for id, pending in running.items():
        assert simulation.plans[-1][id] >= min(pending, LEAST, scheduler.max_step_tokens - len(decodes))
    if decodes and scheduler._planner.step_seconds:
        least = [Chunk(chunk.sequence, chunk.start, min(chunk.length, LEAST)) for chunk in prompts[-1:]]
        allowed = max(scheduler._planner.step_seconds, seconds(COST, decodes) / (1 - share))
        assert seconds(COST, plan) <= max(allowed, seconds(COST, [*decodes, *least])) + 1e-12


@settings(max_examples=20, deadline=None)
@given(arrivals, st.sampled_from([1e-6, 0.003, 0.01, TARGET, 0.1]))
def test_no_step_that_decodes_exceeds_its_time_by_more_than_a_least_chunk(todo: Arrivals, target: float) -> None:
    simulation = simulate(make(target=target), todo)
    assert {id: len(times) for id, times in simulation.came.items()} == {
        f"{number}": new for number, (_, _, _, new) in enumerate(todo)
    }


@settings(max_examples=20, deadline=None)
@given(arrivals)
def test_switched_off_the_plans_are_those_of_no_cost(todo: Arrivals) -> None:
    plain = simulate(make(cost=None, target=0.0), todo).plans
    for cost, target in ((COST, 0.0), (None, TARGET), (COST, 1e9)):
        assert simulate(make(cost, target), todo).plans == plain
