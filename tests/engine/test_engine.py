"""One step at a time: reports, and faults that stay where they happened."""

import pytest

from engine.blocks import BlockManager
from engine.engine import Engine
from engine.plan import Plan, StepResult
from engine.scheduler import Scheduler
from engine.types import StepReport, TokenEvent
from model.errors import EngineDown
from tests.engine.fake import CRASH, LOST, FakeRunner, request

SIZE = 4


class ShortRunner(FakeRunner):
    """Forgets one result."""

    def run(self, plan: Plan) -> StepResult:
        result = super().run(plan)
        return StepResult(result.sampled[1:], result.work)


def make(runner: FakeRunner | None = None, running: int = 4) -> Engine:
    return Engine(runner or FakeRunner(SIZE), Scheduler(BlockManager(32, SIZE), running, 16, 100))


def run(engine: Engine) -> tuple[list[StepReport], dict[str, list[TokenEvent]]]:
    reports: list[StepReport] = []
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        reports.append(engine.step())
        for event in reports[-1].events:
            events.setdefault(event.request_id, []).append(event)
        assert len(reports) < 500
    engine.scheduler.check()
    assert engine.scheduler.blocks.used == 0
    return reports, events


def test_step_report_counts_the_step_and_the_state_after_it() -> None:
    engine = make(running=2)
    engine.add(request("a", (1, 2, 3, 4, 5), max_tokens=3, budget=(1, 1)))
    engine.add(request("b", (1, 2), max_tokens=2, budget=(2, 2)))
    engine.add(request("c"))
    first, second = engine.step().stats, engine.step().stats
    assert (first.prompt_tokens, first.generated_tokens, first.mixed) == (7, 2, True)
    assert (first.routed_pairs, first.trained_pairs) == (18, 36)
    assert (first.running, first.waiting, first.blocks_used, first.blocks_total) == (2, 1, 3, 32)
    assert (first.prefix_queries, first.prefix_hits, first.preemptions) == (7, 0, 0)
    assert (second.prompt_tokens, second.generated_tokens) == (0, 2)
    assert (second.running, second.waiting, second.blocks_used) == (1, 1, 2)
    assert first.seconds > 0


def test_runner_fault_ends_its_request_only() -> None:
    engine = make(running=2)
    engine.add(request("bad", (1, CRASH)))
    engine.add(request("mate", (1, 2)))
    engine.add(request("later", (3, 4)))
    reports, events = run(engine)
    assert [event.finish for event in events["bad"]] == ["error"]
    assert events["bad"][0].error == "the model failed while computing this request (ZeroDivisionError)"
    assert events["bad"][0].stats
    for name in ("mate", "later"):
        assert [event.token for event in events[name]] == FakeRunner(SIZE).reference(
            request(name, (1, 2) if name == "mate" else (3, 4))
        )
    assert (reports[0].stats.running, reports[0].stats.retries) == (1, 2)


def test_wrong_number_of_results_is_a_runner_fault() -> None:
    engine = make(ShortRunner(SIZE), running=1)
    for name in "ab":
        engine.add(request(name))
    _, events = run(engine)
    assert [each[-1].error for each in events.values()] == [
        "the model failed while computing this request (ValueError)"
    ] * 2


@pytest.mark.parametrize("method", ["schedule", "commit"])
def test_scheduler_fault_ends_everyone_and_the_engine_goes_on(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(running=1)
    for name in "ab":
        engine.add(request(name))
    engine.step()

    def fail(*_: object) -> None:
        raise KeyError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, method, fail)
        report = engine.step()
    assert [(event.request_id, event.finish) for event in report.events] == [("a", "error"), ("b", "error")]
    assert "secret" not in str(report)
    engine.add(request("c"))
    _, events = run(engine)
    assert events["c"][-1].finish == "length"


def test_work_that_cannot_be_scheduled_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    engine.add(request("a"))
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: ())
    assert [event.finish for event in engine.step().events] == ["error"]


def test_lost_device_is_passed_on() -> None:
    engine = make()
    engine.add(request("a", (LOST,)))
    with pytest.raises(EngineDown):
        engine.step()


def test_abort_is_reported_by_the_next_step() -> None:
    engine = make()
    engine.add(request("a"))
    engine.abort("a")
    assert engine.has_work
    report = engine.step()
    assert [event.finish for event in report.events] == ["abort"]
    assert not engine.has_work
