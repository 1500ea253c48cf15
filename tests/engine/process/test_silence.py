"""When a silence is too long, and how long a step may be expected to take."""

import pytest

from engine.pace import COMPILE_SECONDS, FIRST_STEP_SECONDS, Pace
from engine.plan import Chunk, Plan
from engine.process.backoff import Backoff
from engine.process.silence import FACTOR, SilenceTimer
from engine.sequence import Sequence
from tests.engine.fake import request


def seconds_until_too_long(silence: SilenceTimer, tick: float = 1.0) -> float:
    silence.tick(tick)  # the word came somewhere in this one
    passed = 0.0
    while not silence.tick(tick):
        passed += tick
        assert passed < 10_000
    return passed


@pytest.mark.parametrize(("expected", "longest"), [(0.0, 10), (0.1, 10), (2.0, 2 * FACTOR)])
def test_the_longest_silence_follows_from_what_is_expected(expected: float, longest: float) -> None:
    silence = SilenceTimer(10.0)
    silence.reset(expected)
    assert seconds_until_too_long(silence) == longest
    silence.reset()
    assert seconds_until_too_long(silence) == 10, "the next word is not expected to take as long"


def test_without_a_limit_no_silence_is_too_long() -> None:
    silence = SilenceTimer(0.0)
    assert not any(silence.tick(1.0) for _ in range(1000))


def test_a_watcher_that_was_held_up_has_not_listened_in_between() -> None:
    silence = SilenceTimer(10.0)
    assert not any(silence.tick(3600.0) for _ in range(5))
    assert silence.tick(3600.0)


def test_a_sign_of_life_is_asked_for_once_in_a_silence() -> None:
    silence = SilenceTimer(10.0)
    asked = []
    for _ in range(8):
        silence.tick(1.0)
        asked.append(silence.asks())
    assert asked == [False, True, *[False] * 6]
    silence.reset()
    silence.tick(2.0)
    assert not silence.asks()
    silence.tick(2.0)
    assert silence.asks()


def plan(*chunks: tuple[int, int]) -> Plan:
    return tuple(Chunk(Sequence(request("a", (1,) * 5000), 0.0), start, length) for start, length in chunks)


def test_a_first_step_is_as_long_as_its_estimate_or_unknown() -> None:
    assert Pace().expect(plan((0, 8)), 0.0) == FIRST_STEP_SECONDS
    assert Pace().expect(plan((0, 8)), 0.2) == 0.2


def test_steps_are_expected_to_take_as_long_as_the_last_and_longer_for_more_or_later_tokens() -> None:
    pace = Pace()
    pace.record(plan((0, 256)), 1.0)
    assert pace.expect(plan((300, 1)), 0.0) == 1.0
    assert pace.expect(plan((256, 512)), 0.0) == pytest.approx(1 + 2 * (256 + 768) / 512)
    assert pace.expect(plan((300, 1)), 9.0) == 9.0
    pace.record(plan((300, 1)), 0.1)
    assert pace.expect(plan((300, 1), (9, 1)), 0.0) == 0.1


def test_restarts_are_put_off_until_one_serves_well() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.delay(False) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert [backoff.delay(True), backoff.delay(False), backoff.delay(False)] == [0.0, 0.5, 1.0]


def test_a_step_of_a_new_size_may_have_to_compile() -> None:
    pace = Pace(compiles=True)
    pace.record(plan((0, 1)), 0.01)
    for given in (plan((0, 9)), plan((0, 16)), plan((0, 100)), plan(*[(7, 1)] * 9)):
        assert pace.expect(given, 0.0) == COMPILE_SECONDS
        assert pace.expect(given, 0.0) == 0.01
    assert pace.expect(plan((5, 90)), 0.0) == 0.01, "as large as 100 tokens, about"
    assert pace.expect(plan((5, 90)), 9.0) == 9.0
