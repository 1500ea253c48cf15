"""A step that fails: the request at fault ends, its neighbours get the answers that they would have got alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.blocks import BlockManager
from engine.engine import Engine
from engine.expert_stats import ExpertStats
from engine.plan import Plan, StepResult
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.types import Finish, Request, Sampling, StepReport
from model.backends.cpu.kernels.library import load
from model.backends.torch.backend import TorchRunnable
from model.budget import ExpertBudget
from model.devices import DeviceErrors
from model.errors import EngineDown
from model.shapes.attention import Attention, GatedDeltaNet
from model.shapes.rope import Rope
from tests.engine.fake import CRASH, FakeRunner, request
from tests.engine.random_workload import Served, alone, bench
from tests.model.tiny import VOCABULARY, infinity, llama_like, topk

ROWS = 7
RECURRENT = (
    GatedDeltaNet(key_heads=2, value_heads=4, key_width=4, value_width=4, kernel=3),
    Attention(4, 2, 6, rope=Rope(6)),
)
SERVED = {
    "torch": Served(llama_like(topk(), topk(), context=80), block=4, few=20, requests=0),
    "recurrent": Served(llama_like(topk(), topk(), attention=RECURRENT, context=80), block=4, few=20, requests=0),
    "native": Served(llama_like(infinity(), topk(), context=80, head_width=16), 16, 5, 0, native=True),
}
FAULTS = {"in its prompt": 1, "later": 9}  # tokens that "bad" has when steps that hold it begin to fail


class Faulty:
    """Runs the model, and then raises where a plan holds "bad" with so many tokens: all side effects have happened."""

    def __init__(self, runner: ModelRunner, tokens: int) -> None:
        self.runs = 0
        self._tokens, self._forward = tokens, runner.forward
        runner.forward = self.forward  # type: ignore[method-assign]

    def forward(self, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        self.runs += 1
        logits_RV = self._forward(plan, expert_stats)
        if any(chunk.sequence.id == "bad" and len(chunk.sequence.tokens) >= self._tokens for chunk in plan):
            raise MemoryError("secret")
        return logits_RV


def requests() -> list[Request]:
    """One of them "bad", in the middle; prompts that are cut into chunks, penalties, scores and temperatures."""
    made = []
    for row in range(ROWS):
        sampling: dict[str, Any] = {"temperature": row % 2 * 0.8, "frequency_penalty": row % 3 * 0.3}
        if row == 1:
            sampling |= {"prompt_logprobs": 2, "logprobs": 3}
        prompt = tuple((7 * row + i) % VOCABULARY for i in range(4 + 5 * (row % 4)))
        budget = ExpertBudget((1 + row % 3, 2))
        made.append(Request(f"r{row}", prompt, budget, Sampling(max_tokens=20 + row, seed=row, **sampling)))
    made[3] = replace(made[3], id="bad", prompt=(1, 2))
    return made


def run(engine: Engine) -> list[StepReport]:
    reports = []
    while engine.has_work:
        reports.append(engine.step())
        engine.scheduler.check()
        assert not torch.is_inference_mode_enabled(), "a failed step leaves it too"
        assert len(reports) < 2000
    assert engine.scheduler.blocks.used == 0
    return reports


def finishes(reports: list[StepReport]) -> dict[str, Finish]:
    """How each request ended: once."""
    ends = [event for report in reports for event in report.events if event.finish]
    assert len(ends) == len({event.request_id for event in ends})
    return {event.request_id: event.finish for event in ends if event.finish}


@pytest.mark.parametrize("served", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("tokens", FAULTS.values(), ids=FAULTS)
def test_neighbours_of_a_fault_answer_as_if_alone(served: Served, tokens: int) -> None:
    if served.native and not load().native:
        pytest.skip(f"no native kernels: {load().reason}")
    crowd = bench(served, blocks=35, step_tokens=24, running=ROWS)
    faulty = Faulty(crowd.engine.runner, tokens)  # type: ignore[arg-type]
    for each in requests():
        crowd.engine.add(each)
    reports = run(crowd.engine)
    events = [event for report in reports for event in report.events]
    errors = {event.request_id: event.error for event in events if event.error}
    assert errors == {"bad": "the model failed while computing this request (MemoryError)"}
    for each in requests():
        if each.id == "bad":
            continue
        single = alone(served, each)
        found = [event.token for event in events if event.request_id == each.id and event.token is not None]
        assert found == single.tokens[each.id]
        for position, row_V in crowd.logits[each.id].items():
            served.assert_same(row_V, single.logits[each.id][position])
    assert finishes(reports).keys() == {each.id for each in requests()}
    assert sum(report.stats.retries for report in reports) <= 4 * ROWS
    assert faulty.runs <= len(reports) + 4 * ROWS


class Counting(FakeRunner):
    runs = 0

    def run(self, plan: Plan) -> StepResult:
        self.runs += 1
        return super().run(plan)


def crowd(prompts: list[tuple[int, ...]], repeatable: bool = True) -> tuple[Engine, Counting]:
    runner = Counting(4)
    rows = len(prompts)
    scheduler = Scheduler(BlockManager(8 * rows, 4, prefix_cache=repeatable), rows, 8 * rows, 100)
    engine = Engine(runner, scheduler, repeatable=repeatable)
    for row, prompt in enumerate(prompts):
        engine.add(request(f"r{row}", prompt))
    return engine, runner


@pytest.mark.parametrize(("rows", "repeatable", "most"), [(64, True, 127), (300, True, 150), (64, False, 65)])
def test_a_model_that_always_fails_is_not_tried_for_ever(
    rows: int, repeatable: bool, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine, runner = crowd([(row, CRASH) for row in range(rows)], repeatable)
    assert set(finishes(run(engine)).values()) == {"error"}
    assert runner.runs <= most
    assert sum(record.exc_info is not None for record in caplog.records) == 1, "one traceback, not one per row"


def test_a_call_whose_every_row_fails_ends_no_other() -> None:
    engine, _ = crowd([(row, CRASH if 3 <= row < 63 else 2) for row in range(64)])
    ends = finishes(run(engine))
    assert sorted(id for id, end in ends.items() if end == "length") == ["r0", "r1", "r2", "r63"]


@pytest.mark.parametrize("bad", [{0}, {63}, {5, 6, 40}])
def test_rows_at_fault_are_found_by_halving(bad: set[int]) -> None:
    engine, runner = crowd([(row, CRASH if row in bad else 2) for row in range(64)])
    first = engine.step()
    assert {event.request_id for event in first.events if event.error} == {f"r{row}" for row in bad}
    assert first.stats.generated_tokens == 64 - len(bad), "the others have lost no step"
    assert runner.runs == first.stats.retries + 1 <= 1 + 12 * len(bad)
    run(engine)


def test_a_fault_that_goes_away_ends_nothing() -> None:
    engine, runner = crowd([(row, 2) for row in range(4)])
    fine, runner.run = runner.run, None  # type: ignore[method-assign, assignment]

    def once(plan: Plan) -> StepResult:
        runner.run = fine  # type: ignore[method-assign]
        raise MemoryError

    runner.run = once  # type: ignore[method-assign]
    assert set(finishes(run(engine)).values()) == {"length"}


class Narrow(FakeRunner):
    """A device whose memory holds so many tokens of one step."""

    def __init__(self, most: int) -> None:
        super().__init__(4)
        self._most = most

    def run(self, plan: Plan) -> StepResult:
        with DeviceErrors(torch.device("cpu")):
            if sum(chunk.length for chunk in plan) > self._most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().run(plan)


def test_out_of_memory_ends_the_request_that_does_not_fit() -> None:
    scheduler = Scheduler(BlockManager(64, 4), 8, 200, 100)
    engine = Engine(Narrow(20), scheduler)
    for row, length in enumerate((5, 30, 5, 9, 14)):
        engine.add(request(f"r{row}", (2,) * length))
    reports = run(engine)
    assert [id for id, end in finishes(reports).items() if end == "error"] == ["r1"]
    (error,) = [event.error for report in reports for event in report.events if event.error]
    assert "the memory of cpu is too small to compute this request" in error


def test_a_runner_tells_what_errors_of_its_device_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench(SERVED["torch"], blocks=35, step_tokens=24, running=2)

    def full(self: TorchRunnable, *_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TorchRunnable, "launch", full)
    made.engine.add(requests()[0])
    (error,) = [event.error for report in run(made.engine) for event in report.events if event.error]
    assert "the memory of cpu is too small to compute this request" in error


def test_a_lost_device_is_not_tried_again() -> None:
    engine, runner = crowd([(row, 2) for row in range(4)])

    def lost(plan: Plan) -> StepResult:
        runner.runs += 1
        with DeviceErrors(torch.device("cpu")):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    runner.run = lost  # type: ignore[method-assign]
    with pytest.raises(EngineDown, match="cpu is lost: CUDA error: an illegal memory access"):
        engine.step()
    assert runner.runs == 1
