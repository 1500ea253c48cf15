"""The load meter, with simulated steps: what they say of this machine's speed, and how soon it is forgotten."""

import msgspec
import pytest

from engine.cost import StepCost
from engine.types import StepStats
from model.expert_range import ExpertRange
from server.experts.load import IDLE_S, LoadMeter
from tests.server.calibrations import calibration
from tests.server.fakes import step_stats

RANGE = ExpertRange(layers=3, trained=4, minimum=1, maximum=8)
DEFAULT = RANGE.budget(4)  # a step of one sequence was calibrated to take 5 ms, one of sixteen 20


def meter(cost: StepCost | None = None) -> LoadMeter:
    return LoadMeter(calibration().options, DEFAULT, RANGE, cost)


def step(milliseconds: float, running: int = 1, count: int = 4, generated: int = 1) -> StepStats:
    pairs, trained = running * 3 * count, running * 3 * 4
    changes = {"seconds": milliseconds / 1000, "running": running, "generated_tokens": generated}
    return msgspec.structs.replace(step_stats(pairs), trained_pairs=trained, **changes)


@pytest.mark.parametrize(
    ("running", "count", "calibrated"), [(1, 4, 5.0), (16, 4, 20.0), (1, 1, 2.0), (1, 3, 4.0), (16, 8, 36.0)]
)
def test_the_slowdown_is_against_what_was_calibrated_for_the_count_and_the_batch(
    running: int, count: int, calibrated: float
) -> None:
    measured = meter()
    for number in range(2000):
        measured.record(step(1.5 * calibrated, running, count), number * 0.01)
    assert measured.slowdown(20.0) == pytest.approx(1.5, rel=0.01)


def test_before_the_first_step_the_machine_is_as_fast_as_when_it_loaded() -> None:
    twice = StepCost(fixed=0.010, per_token=0.0, per_pair=0.0, per_expert=0.0, pools=())
    assert meter(twice).slowdown(0.0) == pytest.approx(2.0) and meter(twice).unloaded_ms == pytest.approx(10.0)
    assert meter().slowdown(0.0) == 1.0 and meter().unloaded_ms == pytest.approx(5.0)


def test_the_time_of_a_step_is_averaged_over_about_a_second() -> None:
    measured = meter()
    measured.record(step(5.0), 0.0)
    assert measured.itl_ratio(0.0) == pytest.approx(1.0)
    for number in range(10):
        measured.record(step(50.0, running=4), 0.1 + number * 0.05)
    assert 1.0 < measured.itl_ratio(0.6) < 9.0
    for number in range(100):
        measured.record(step(50.0, running=4), 1.0 + number * 0.05)
    assert measured.itl_ratio(6.0) == pytest.approx(10.0, rel=0.05)
    assert measured.running(6.0) == pytest.approx(4.0, rel=0.05)


def test_what_an_unloaded_server_takes_is_learnt_from_sequences_that_run_alone() -> None:
    wrong = StepCost(fixed=0.001, per_token=0.0, per_pair=0.0, per_expert=0.0, pools=())
    measured = meter(wrong)
    for number in range(1000):  # 2 ms as calibrated, so that this machine is half as fast
        measured.record(step(4.0, count=1), 0.05 * number)
    assert measured.unloaded_ms == pytest.approx(10.0, rel=0.01), "of the default count, 4; the estimate was 1 ms"
    for number in range(1000):
        measured.record(step(40.0, running=16), 50.0 + 0.05 * number)
        measured.record(msgspec.structs.replace(step(40.0), prompt_tokens=64), 50.02 + 0.05 * number)
    assert measured.unloaded_ms == pytest.approx(10.0, rel=0.01), "neither a batch nor a prompt beside it counts"
    assert measured.itl_ratio(99.97) == pytest.approx(4.0, rel=0.01)


def test_a_sequence_that_runs_alone_is_not_slowed_down_by_load() -> None:
    measured = meter()
    measured.record(step(50.0), 0.0)
    assert measured.itl_ratio(0.0) == 1.0
    for number in range(100):
        measured.record(step(50.0, running=2), number * 0.05)
    assert measured.itl_ratio(5.0) == pytest.approx(10.0, rel=0.05), "nor has one long step moved the base much"


def test_one_very_long_step_does_not_stay() -> None:
    measured = meter()
    measured.record(step(60_000.0), 0.0)
    assert measured.slowdown(0.0) <= 20.0


def test_an_idle_spell_forgets_the_load() -> None:
    later = IDLE_S + 0.1
    for read, neutral in ((LoadMeter.itl_ratio, 0.0), (LoadMeter.running, 0.0), (LoadMeter.slowdown, 1.0)):
        measured = meter()
        for number in range(10):
            measured.record(step(50.0, running=4), number * 0.01)
        assert read(measured, IDLE_S) > neutral
        assert read(measured, 0.09 + later) == neutral


def test_steps_that_generate_nothing_say_nothing() -> None:
    measured = meter()
    measured.record(step(500.0, generated=0), 0.0)
    measured.record(step(500.0, running=0), 0.0)
    assert measured.itl_ratio(0.0) == 0.0 and measured.slowdown(0.0) == 1.0


def test_without_a_calibration_nothing_is_compared() -> None:
    bare = LoadMeter((), DEFAULT, RANGE, None)
    bare.record(step(50.0, running=4), 0.0)
    assert (bare.itl_ratio(0.0), bare.slowdown(0.0)) == (0.0, 1.0)
    dense = LoadMeter((), RANGE.budget(1).at_most(0), ExpertRange(0, 0, 0, 0), None)
    dense.record(step(50.0, running=4), 0.0)
    assert dense.itl_ratio(0.0) == 0.0
