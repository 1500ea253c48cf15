"""Which reports wait, for how long, and that none is lost or overtaken."""

from dataclasses import dataclass, field

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.process.coalescer import Coalescer
from engine.process.messages import Reports
from engine.types import RequestStats, StepReport, TokenEvent
from tests.server.fakes import step_stats

STATS = RequestStats(0.0, 0.0, 0.0, 0, 0, 0, 0)
TOKEN, FIRST, LAST = TokenEvent("a", 1), TokenEvent("a", 1, stats=STATS), TokenEvent("a", 1, finish="stop", stats=STATS)


@dataclass
class Desk:
    """An coalescer on a clock that steps move."""

    interval: float
    now: float = 100.0
    sent: list[tuple[float, Reports]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.coalescer = Coalescer(
            lambda message: self.sent.append((self.now, message)), self.interval, lambda: self.now
        )

    def step(self, seconds: float, *events: TokenEvent, more: bool = True) -> None:
        self.now += seconds
        stats = msgspec.structs.replace(step_stats(1), seconds=seconds)
        self.coalescer.put(StepReport(events, stats), more)

    @property
    def sizes(self) -> list[int]:
        return [len(message.reports) for _, message in self.sent]


def test_short_steps_travel_together() -> None:
    desk = Desk(0.04)
    for _ in range(11):
        desk.step(0.009, TOKEN)
    assert desk.sizes == [1, 4, 4]  # the fifth after one that left would be late
    waited = [round(report.buffered_s, 6) for report in desk.sent[1][1].reports]
    assert waited == [0.027, 0.018, 0.009, 0.0]


def test_without_an_interval_nothing_waits() -> None:
    desk = Desk(0.0)
    for _ in range(5):
        desk.step(0.001, TOKEN)
    assert desk.sizes == [1] * 5


def test_steps_as_long_as_the_interval_do_not_wait() -> None:
    desk = Desk(0.04)
    for _ in range(5):
        desk.step(0.025, TOKEN)
    assert desk.sizes == [1] * 5


Steps = st.lists(st.tuples(st.sampled_from([(TOKEN,), (FIRST,), (LAST,), ()]), st.booleans()), max_size=40)


@given(Steps, st.floats(0.0001, 0.1), st.sampled_from([0.0, 0.02, 0.04]))
def test_all_arrive_in_order_and_in_time(
    steps: list[tuple[tuple[TokenEvent, ...], bool]], seconds: float, interval: float
) -> None:
    desk, made = Desk(interval), []
    for number, (events, more) in enumerate(steps):
        numbered = tuple(msgspec.structs.replace(event, request_id=str(number)) for event in events)
        desk.step(seconds, *numbered, more=more)
        made.append((desk.now, numbered))
        if not more or any(event.stats for event in events):
            assert desk.sent[-1][1].reports[-1].events == numbered  # it has left, with all before it
    desk.coalescer.flush()
    arrived = [(at, report) for at, message in desk.sent for report in message.reports]
    assert [report.events for _, report in arrived] == [events for _, events in made]
    for (at, report), (when, _) in zip(arrived, made, strict=True):
        assert abs(at - report.buffered_s - when) < 1e-9 and report.buffered_s <= interval
