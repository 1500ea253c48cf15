"""Reports that are too large for a frame: cut without loss, in order; what cannot be cut fails its own request."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.process import messages, packing
from engine.process.messages import HEADER, Events, PromptLogprobsPart, Reports, read_from_engine
from engine.process.sinks import Sinks
from engine.types import Logprob, RequestStats, StepReport, TimedEvent, TokenEvent
from model.errors import MoedialError
from tests.server.fakes import step_stats

STATS = RequestStats(0.0, 0.0, 0.0, 0, 0, 0, 0)


def report(*events: TokenEvent) -> StepReport:
    return StepReport(events, step_stats(1), 0.25)


def scores(count: int, alternatives: int) -> tuple[Logprob, ...]:
    top = tuple((70_000 + i, -float(i) - 0.1) for i in range(alternatives))
    return tuple(Logprob(-float(position), top) for position in range(count))


def received(frames: Sequence[bytes], ids: Sequence[str]) -> tuple[dict[str, list[TokenEvent]], int]:
    """What the sinks of these requests get, and the number of reports."""
    got: dict[str, list[TokenEvent]] = {id: [] for id in ids}
    sinks, reports = Sinks(), 0

    def sink(id: str, found: Sequence[TimedEvent] | MoedialError) -> None:
        assert not isinstance(found, MoedialError) and all(arrival.at == 99.75 for arrival in found)
        got[id] += [arrival.event for arrival in found]

    for id in ids:
        sinks[id] = lambda found, id=id: sink(id, found)  # type: ignore[misc]
    for data in frames:
        match read_from_engine(data[HEADER.size :]):
            case Reports(several):
                reports += len(several)
                sinks.distribute(several, 100.0)
            case Events() | PromptLogprobsPart() as part:
                sinks.receive(part, 100.0)
            case other:
                raise AssertionError(other)
    assert not sinks._scores
    return got, reports


Sizes = st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), max_size=6), min_size=1, max_size=5)


@settings(deadline=None)
@given(Sizes)
def test_whatever_is_cut_arrives_whole_and_in_order(sizes: list[list[tuple[str, int]]]) -> None:
    """Each event of a size, many of them larger than a frame should be."""
    number, made = 0, []
    for step in sizes:
        events = []
        for id, size in step:
            number += 1
            logprob = Logprob(-1.0, tuple((i, -2.0) for i in range(size)))
            events.append(TokenEvent(id, number, logprob, prompt_logprobs=scores(size, 3) if size % 2 else None))
        made.append(report(*events))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SOFT_LIMIT", 300)
        frames = list(packing.frames(tuple(made), lambda _: None))
    got, reports = received(frames, "abc")
    assert reports == len(made), "each step is counted once"
    for id in "abc":
        assert got[id] == [event for each in made for event in each.events if event.request_id == id]


def test_a_prompts_scores_are_cut_to_frames_that_are_read_quickly() -> None:
    event = TokenEvent("a", 5, finish="length", stats=STATS, prompt_logprobs=scores(3000, 50))
    frames = list(packing.frames((report(TokenEvent("b", 1), event, TokenEvent("c", 2)),), lambda _: None))
    assert len(frames) > 3 and max(map(len, frames)) < 1.1 * packing.SOFT_LIMIT
    got, _ = received(frames, "abc")
    assert got == {"a": [event], "b": [TokenEvent("b", 1)], "c": [TokenEvent("c", 2)]}


@pytest.mark.parametrize(
    "event",
    [
        TokenEvent("big", 1, Logprob(-1.0, tuple((i, -2.0) for i in range(9000))), stats=STATS),
        TokenEvent("big", 1, stats=STATS, prompt_logprobs=scores(2, 9000)),
    ],
)
def test_an_event_that_no_frame_holds_fails_its_request_alone(
    event: TokenEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SOFT_LIMIT", 1000)
    monkeypatch.setattr(messages, "MAX_FRAME", 50_000)
    given_up: list[str] = []
    frames = list(packing.frames((report(TokenEvent("a", 1), event, TokenEvent("c", 2)),), given_up.append))
    got, reports = received(frames, ["a", "big", "c"])
    assert reports == 1 and (got["a"], got["c"]) == ([TokenEvent("a", 1)], [TokenEvent("c", 2)])
    [end] = got["big"]
    assert end.finish == "error" and "the limit is 50000" in (end.error or "")
    assert given_up == ["big"]


def test_what_is_small_is_one_frame() -> None:
    reports = (report(TokenEvent("a", 1)), report())
    [data] = packing.frames(reports, lambda _: None)
    assert msgspec.msgpack.decode(data[HEADER.size :], type=Reports) == Reports(reports)
