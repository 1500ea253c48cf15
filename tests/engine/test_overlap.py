"""Steps that overlap: step n+1 is launched before the tokens of step n are known, and the answers are the same."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.blocks import BlockManager
from engine.engine import Engine
from engine.plan import Plan
from engine.scheduler import Scheduler
from engine.types import Request, TokenEvent
from model.budget import ExpertBudget
from model.contrast import Contrast
from model.errors import EngineDown, InvalidRequest
from tests.engine.fake import CRASH, LOST, POISON, FakeRunner, request
from tests.engine.overlapping import Launch, LazyRunner

SIZE = 2


def make(
    runner: LazyRunner,
    blocks: int = 64,
    running: int = 4,
    tokens: int = 16,
    chunked: bool = True,
    repeatable: bool = True,
) -> Engine:
    scheduler = Scheduler(BlockManager(blocks, SIZE, prefix_cache=chunked), running, tokens, 200, chunked)
    return Engine(runner, scheduler, overlapping=runner, repeatable=repeatable)


def finish(engine: Engine, limit: int = 500) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(limit):
        if not engine.has_work:
            engine.scheduler.check()
            assert engine.scheduler.blocks.used == 0
            return events
        for event in engine.step().events:
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError("there is still work")


def text(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def test_a_step_is_launched_while_the_last_one_is_computed() -> None:
    runner = LazyRunner(SIZE)
    engine, asked = make(runner), request("a", max_tokens=6)
    engine.add(asked)
    events = finish(engine)["a"]
    assert text(events) == runner.reference(asked) and events[-1].finish == "length"
    assert (runner.launched, runner.ahead) == (6, 5), "of a known length no step is wasted"


def test_a_stop_token_costs_one_row_that_is_thrown_away() -> None:
    runner = LazyRunner(SIZE)
    engine = make(runner)
    plain = request("a", max_tokens=9)
    asked = request("a", max_tokens=9, stop_token_ids=(runner.reference(plain)[3],))
    engine.add(asked)
    events = finish(engine)["a"]
    assert text(events) == runner.reference(plain)[:4] and events[-1].finish == "stop"
    assert runner.launched == 5
    assert events[-1].stats is not None and events[-1].stats.computed_tokens == 3 + 3


def test_tokens_come_one_step_late_and_no_later() -> None:
    engine = make(LazyRunner(SIZE))
    engine.add(request("a", max_tokens=3))
    assert [[event.token is not None for event in engine.step().events] for _ in range(3)] == [[True]] * 3
    assert not engine.has_work


def test_prompts_are_cut_across_overlapping_steps() -> None:
    runner = LazyRunner(SIZE)
    engine = make(runner, tokens=5)
    asked = [request(id, tuple(range(first, first + 17)), max_tokens=4) for id, first in (("a", 0), ("b", 40))]
    for each in asked:
        engine.add(each)
    events = finish(engine)
    assert {id: text(own) for id, own in events.items()} == {each.id: runner.reference(each) for each in asked}


def test_a_request_finds_the_prefix_that_the_step_before_computes() -> None:
    runner = LazyRunner(SIZE)
    engine = make(runner, tokens=12)
    prompt = tuple(range(9))
    engine.add(request("a", prompt, max_tokens=8))
    engine.step()
    engine.add(request("b", prompt, max_tokens=2))
    events = finish(engine)
    last = events["b"][-1]
    assert text(events["b"]) == runner.reference(request("b", prompt, max_tokens=2))
    assert last.stats is not None and last.stats.cached_tokens == 8


def test_counts_that_change_meet_only_what_is_not_launched() -> None:
    runner = LazyRunner(SIZE)
    engine = make(runner)
    asked = request("a", (1, 2, 3), max_tokens=8, budget=(2, 2))
    engine.add(asked)
    engine.step()
    engine.step()  # two tokens are known, the step of the second is launched
    engine.set_counts("a", (1, 5))
    expected = Request("a", asked.prompt, ExpertBudget((2, 2), changes=((3 + 2, (1, 5)),)), asked.sampling)
    assert [event.token for event in finish(engine)["a"]] == runner.reference(expected)[2:]


def test_a_preempted_sequence_goes_on_as_it_would_have() -> None:
    runner = LazyRunner(SIZE)
    engine = make(runner, blocks=7)
    asked = [request(id, (first, 2, 3), max_tokens=8) for first, id in enumerate("ab")]
    for each in asked:
        engine.add(each)
    events = finish(engine)
    assert {id: text(own) for id, own in events.items()} == {each.id: runner.reference(each) for each in asked}
    assert sum(own[-1].stats.preemptions for own in events.values() if own[-1].stats) > 0


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("where", ["fail_launch", "fail_finish"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_fault_of_one_step_loses_nothing(number: int, where: str, repeatable: bool) -> None:
    """The step runs again, or its sequences do; what was launched after it is withdrawn."""
    runner = LazyRunner(SIZE)
    engine = make(runner, repeatable=repeatable)
    asked = [request(id, (first, 2, 3), max_tokens=5) for first, id in enumerate("abc")]
    for each in asked[:2]:
        engine.add(each)
    getattr(runner, where).add(number)
    begun: dict[str, list[TokenEvent]] = {"a": [], "b": []}
    for event in engine.step().events:
        begun[event.request_id].append(event)
    engine.add(asked[2])
    events = finish(engine)
    expected = {each.id: runner.reference(each) for each in asked}
    assert text(events["c"]) == expected["c"]
    assert all(text([*first, *events[id]]) == expected[id] for id, first in begun.items())


def test_a_suspect_is_not_launched_with_others_before_the_step_ahead_of_it_is_known() -> None:
    runner = LazyRunner(SIZE)
    engine, launch, together = make(runner, repeatable=False), runner.launch, list[list[str]]()

    def recorded(plan: Plan, *, counted: bool = True) -> Launch:
        if any(chunk.start < chunk.sequence.isolated_until for chunk in plan):
            together.append([chunk.sequence.id for chunk in plan])
        return launch(plan, counted=counted)

    runner.launch = recorded  # type: ignore[method-assign]
    asked = [request(id, (first, 2, 3), max_tokens=6) for first, id in enumerate("ab")]
    engine.add(asked[0])
    begun = engine.step().events
    engine.add(asked[1])
    engine.scheduler.queues.waiting["b"].isolated_until = 3  # as after a step that failed
    events = finish(engine)
    assert together == [["b"]]
    assert text([*begun, *events["a"]]) == runner.reference(asked[0])
    assert text(events["b"]) == runner.reference(asked[1])


def test_a_fault_of_one_request_ends_it_alone() -> None:
    runner = LazyRunner(SIZE)
    engine = make(runner)
    mate = request("mate", (1, 2), max_tokens=6)
    engine.add(mate)
    first = engine.step().events
    engine.add(request("bad", (1, CRASH)))
    engine.add(request("poisoned", (1, POISON)))
    events = finish(engine)
    assert events["bad"][-1].finish == events["poisoned"][-1].finish == "error"
    assert text([*first, *events["mate"]]) == runner.reference(mate)


def test_a_lost_device_ends_the_engine() -> None:
    engine = make(LazyRunner(SIZE))
    engine.add(request("mate", max_tokens=9))
    engine.step()
    engine.add(request("bad", (1, LOST)))
    with pytest.raises(EngineDown):
        for _ in range(4):
            engine.step()


def test_an_abort_between_steps_ends_with_the_next_one() -> None:
    engine = make(LazyRunner(SIZE))
    engine.add(request("a", max_tokens=50))
    engine.add(request("b", (7, 8), max_tokens=3))
    engine.step()
    engine.abort("a")
    assert {event.request_id: event.finish for event in engine.step().events} == {"a": "abort", "b": None}
    assert finish(engine)["b"][-1].finish == "length"


def test_an_id_may_be_used_again_while_the_wasted_row_of_its_last_request_is_computed() -> None:
    runner = LazyRunner(SIZE)
    engine = make(runner)
    plain = request("a", max_tokens=9)
    engine.add(request("a", max_tokens=9, stop_token_ids=(runner.reference(plain)[0],)))
    assert engine.step().events[-1].finish == "stop"
    again = request("a", (7, 8), max_tokens=2)
    engine.add(again)
    engine.abort("a")
    assert [event.finish for event in finish(engine)["a"]] == ["abort"]


class LateMatcher:
    """Allows every token. Its mask comes after it was asked for so many times."""

    error, row_seconds = "", 0.0

    def __init__(self, asked: int) -> None:
        self._asked, self._left, self.advanced = asked, 0, list[int]()

    @property
    def ready(self) -> bool:
        self._left -= 1
        return self._left < 0

    def open(self) -> None:
        self._left = 0

    def advance(self, tokens: list[int]) -> None:
        self.advanced += tokens
        self._left = self._asked


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("asked", [0, 1, 2, 5])
def test_a_late_mask_delays_its_own_answer_only(asked: int, repeatable: bool) -> None:
    runner = LazyRunner(SIZE)
    engine, matcher = make(runner, repeatable=repeatable), LateMatcher(asked)
    masked, plain = request("masked", (1, 2), max_tokens=6), request("plain", (3, 4), max_tokens=60)
    engine.add(masked, matcher)  # type: ignore[arg-type]
    engine.add(plain)
    came: dict[str, list[int]] = {"masked": [], "plain": []}
    for _ in range(60):
        for event in engine.step().events:
            assert event.token is not None
            came[event.request_id].append(event.token)
    assert not engine.has_work, "the plain answer got a token in every step"
    assert came == {each.id: runner.reference(each) for each in (masked, plain)}
    assert matcher.advanced == came["masked"][:-1]


class Overlap(RuleBasedStateMachine):
    """Requests, aborts, changes and faults at any point between steps that overlap."""

    @initialize(
        chunked=st.booleans(),
        blocks=st.integers(3, 14),
        running=st.integers(1, 4),
        more=st.integers(0, 6),
        noisy=st.booleans(),
        repeatable=st.booleans(),
    )
    def build(self, chunked: bool, blocks: int, running: int, more: int, noisy: bool, repeatable: bool) -> None:
        self.runner = LazyRunner(SIZE, noisy=noisy, mixing=not chunked)
        manager = BlockManager(blocks, SIZE, prefix_cache=chunked, noisy=noisy)
        scheduler = Scheduler(manager, running, running + more, 20, chunked)
        self.engine = Engine(self.runner, scheduler, overlapping=self.runner, repeatable=repeatable)
        self.requests: dict[str, Request] = {}
        self.texts: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.ended: dict[str, str] = {}

    @rule(
        length=st.integers(1, 12),
        base=st.integers(0, 1),
        new=st.integers(1, 8),
        count=st.integers(1, 2),
        seed=st.integers(0, 1),
        kind=st.sampled_from(["plain", "plain", "stops", "crashes"]),
        contrast=st.sampled_from([None, None, Contrast()]),
    )
    def add(
        self, length: int, base: int, new: int, count: int, seed: int, kind: str, contrast: Contrast | None
    ) -> None:
        prompt = tuple(range(base, base + length))
        options: dict[str, Any] = {"budget": (count,), "seed": seed, "contrast": contrast}
        each = request(f"r{len(self.requests)}", prompt, new, **options)
        if kind == "stops":
            options["stop_token_ids"] = (self.runner.reference(each)[new // 2],)
        each = request(each.id, (*prompt, CRASH) if kind == "crashes" else prompt, new, **options)
        try:
            self.engine.add(each)
        except InvalidRequest:
            return
        self.requests[each.id], self.texts[each.id] = each, []

    @rule()
    def step(self) -> None:
        for event in self.engine.step().events:
            assert event.request_id not in self.ended, "an event after the end"
            if event.token is not None:
                self.texts[event.request_id].append(event.token)
            if event.finish:
                self.ended[event.request_id] = event.finish

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.abort(id)
        self.aborted.add(id)

    @rule(ahead=st.integers(1, 3), where=st.sampled_from(["fail_launch", "fail_finish"]))
    def fail_soon(self, ahead: int, where: str) -> None:
        done = self.runner.launched if where == "fail_launch" else self.runner.finished
        getattr(self.runner, where).add(done + ahead)

    @invariant()
    def texts_are_right(self) -> None:
        for id, finish in getattr(self, "ended", {}).items():
            expected = [] if CRASH in self.requests[id].prompt else self.runner.reference(self.requests[id])
            if finish in ("stop", "length"):
                assert self.texts[id] == expected
            else:
                assert id in self.aborted if finish == "abort" else CRASH in self.requests[id].prompt
                assert self.texts[id] == expected[: len(self.texts[id])]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        limit = 60 * len(self.requests) + 10
        while self.engine.has_work:
            self.step()
            limit -= 1
            assert limit > 0, "the queue never drains"
        self.texts_are_right()
        assert set(self.ended) == set(self.requests), "a request never ended"
        assert self.engine.scheduler.blocks.used == 0
        self.engine.scheduler.check()


TestOverlap = Overlap.TestCase


def test_the_fake_device_computes_what_the_fake_runner_does() -> None:
    plain, lazy = Engine(FakeRunner(SIZE), make(LazyRunner(SIZE)).scheduler), make(LazyRunner(SIZE))
    found = []
    for engine in (plain, lazy):
        for id in "abc":
            engine.add(request(id, (ord(id), 3, 4), max_tokens=5))
        found.append({id: text(own) for id, own in finish(engine).items()})
    assert found[0] == found[1]
