"""Any order of arrivals, steps, aborts and faults: everyone ends once, with the right text, and nothing leaks."""

import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.blocks import BlockManager
from engine.cost import ExpertPool, StepBudget, StepCost, prefill_share
from engine.plan import Chunk, Plan, rows_of
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.speculation import Speculator
from engine.types import Request, TokenEvent
from model.contrast import Contrast
from model.errors import InvalidRequest
from tests.engine.costs import seconds
from tests.engine.fake import FakeRunner, request

SIZE = 2
BUDGET = st.fixed_dictionaries(
    {"budget": st.tuples(st.integers(1, 2)), "prefill": st.just(()) | st.tuples(st.integers(1, 2))}
)
CONTRAST = st.sampled_from([None, None, Contrast(), Contrast(weak_rank=1)])
COST = StepCost(fixed=1.0, per_token=0.2, per_pair=0.4, per_expert=0.1, pools=(ExpertPool(8),))


class Oracle(Speculator):
    """Knows what will be said, and lies now and then."""

    def __init__(self, runner: FakeRunner, truth: float) -> None:
        super().__init__()
        self.runner, self.truth, self.random = runner, truth, random.Random(0)

    def propose(self, sequence: Sequence, most: int, step_budget: StepBudget) -> tuple[int, ...]:
        told = self.runner.reference(sequence.request)[sequence.output_count :][: min(3, max(0, most))]
        return tuple(token if self.random.random() < self.truth else token + 1 for token in told)


class Storm(RuleBasedStateMachine):
    """Drives a small scheduler and judges it from outside, by plans and events only."""

    @initialize(
        chunked=st.booleans(),
        blocks=st.integers(2, 12),
        running=st.integers(1, 4),
        more=st.integers(0, 6),
        noisy=st.booleans(),
        oracle=st.sampled_from([None, 1.0, 0.5]),
        seconds_a_step=st.sampled_from([0.0, 0.001, 4.0, 9.0]),
        least=st.integers(1, 4),
    )
    def build(
        self,
        chunked: bool,
        blocks: int,
        running: int,
        more: int,
        noisy: bool,
        oracle: float | None,
        seconds_a_step: float,
        least: int,
    ) -> None:
        self.chunked, self.least = chunked, least
        self.now, self.age = 0.0, 0.0  # of the scheduler's clock, and the most that a prompt can have waited
        self.asked: dict[str, float] = {}
        self.target = seconds_a_step if chunked else 0.0
        manager = BlockManager(blocks, SIZE, prefix_cache=chunked, noisy=noisy)
        self.runner = FakeRunner(SIZE, noisy=noisy, mixing=not chunked)
        self.scheduler = Scheduler(
            manager,
            running,
            running + more,
            20,
            chunked,
            lambda: self.now,
            cost=COST,
            step_seconds=seconds_a_step,
            min_chunk=least,
            speculator=Oracle(self.runner, oracle) if oracle and chunked else None,
        )
        self.requests: dict[str, Request] = {}
        self.texts: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.failed: set[str] = set()
        self.ended: dict[str, str] = {}
        self.decoding: set[str] = set()

    @rule(
        length=st.integers(1, 12),
        base=st.integers(0, 1),
        new=st.integers(1, 10),
        budget=BUDGET,
        seed=st.integers(0, 1),
        stops=st.booleans(),
        contrast=CONTRAST,
    )
    def add(
        self,
        length: int,
        base: int,
        new: int,
        budget: dict[str, Any],
        seed: int,
        stops: bool,
        contrast: Contrast | None,
    ) -> None:
        self.ask(tuple(range(base, base + length)), new, budget | {"contrast": contrast}, seed, stops)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), new=st.integers(1, 6), budget=st.none() | BUDGET)
    def go_on(self, data: st.DataObject, new: int, budget: dict[str, Any] | None) -> None:
        """What another request said and heard is a prompt now, in part or whole, often with its budget: tokens and
        budgets are equal, prompt lengths are not."""
        before = data.draw(st.sampled_from(sorted(self.requests.values(), key=lambda each: each.id)))
        said = (*before.prompt, *self.runner.reference(before))
        prompt = said[: data.draw(st.integers(1, len(said)))]
        same: dict[str, Any] = {"budget": before.budget.per_layer, "prefill": before.budget.prefill}
        same["contrast"] = before.budget.contrast
        self.ask(prompt, new, budget or same, before.sampling.seed, False)

    def ask(self, prompt: tuple[int, ...], new: int, budget: dict[str, Any], seed: int, stops: bool) -> None:
        length = len(prompt)
        each = request(f"r{len(self.requests)}", prompt, new, **budget, seed=seed)
        if stops:
            stop = self.runner.reference(each)[new // 2]
            each = request(each.id, each.prompt, new, **budget, seed=seed, stop_token_ids=(stop,))
        rows = each.budget.rows
        capacity = min(20, self.scheduler.blocks.total // rows * SIZE + 1)
        fits = length + new <= capacity and rows <= self.scheduler.max_running
        try:
            self.scheduler.add(each)
        except InvalidRequest:
            assert not fits
            return
        assert fits
        self.requests[each.id], self.texts[each.id], self.asked[each.id] = each, [], self.now

    @rule()
    def step(self) -> None:
        plan = self.plan()
        self.commit(plan)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.requests)))
        self.scheduler.abort(id)
        self.aborted.add(id)
        assert id not in self.scheduler.blocks.holders

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort_in_flight(self, data: st.DataObject) -> None:
        plan = self.plan()
        id = data.draw(st.sampled_from(sorted(self.requests)))
        self.scheduler.abort(id)
        self.aborted.add(id)
        self.commit(plan)
        assert id not in self.scheduler.blocks.holders

    @rule()
    def fail(self) -> None:
        plan = self.plan()
        self.failed |= {chunk.sequence.id for chunk in plan}
        self.take(self.scheduler.fail(plan, "broken"))

    def plan(self) -> Plan:
        """A new plan, checked against the rules that every plan keeps."""
        had_work = self.scheduler.running + self.scheduler.waiting
        self.now += 0.3
        partly = self.scheduler.queues.partial_prefill
        plan = self.scheduler.schedule()
        self.age = max([self.now - self.asked[id] for id in self.asked.keys() - self.ended.keys()], default=0.0)
        assert plan or not had_work, "there is work, but nothing is planned"
        ids = [chunk.sequence.id for chunk in plan]
        assert len(set(ids)) == len(ids)
        rows = rows_of(plan)
        assert len(rows) <= self.scheduler.max_running
        for chunk in plan:
            assert 1 <= chunk.length <= chunk.sequence.pending
            assert chunk.start == chunk.sequence.computed
        for chunk in rows:
            assert len(chunk.sequence.blocks) * SIZE >= chunk.start + len(chunk.tokens)
        reading = [chunk for chunk in plan if chunk.start < chunk.sequence.prompt_length]
        if self.chunked or len(reading) > 1:
            assert sum(len(chunk.tokens) for chunk in rows) <= self.scheduler.max_step_tokens
        if not self.chunked:
            assert all((chunk.start, chunk.length) == (0, chunk.sequence.prompt_length) for chunk in reading)
        preempted = set(self.scheduler._waiting)
        if partly is not None and partly.id in self.scheduler._running and self.scheduler.queues.youngest is not partly:
            assert partly.id in ids, "what overtook it takes what it needs"
        assert self.decoding - preempted <= set(ids), "a running decode got no token"
        self.judge_time(plan, self.decoding - preempted)
        return plan

    def judge_time(self, plan: Plan, decoding: set[str]) -> None:
        """Prompts stay in the time that is theirs, but for a least chunk of one of them: one that is cut comes last."""
        decodes = [chunk for chunk in plan if chunk.sequence.id in decoding]
        if decodes and self.target:
            prompts = [chunk for chunk in plan if chunk.sequence.id not in decoding]
            least = [Chunk(chunk.sequence, chunk.start, min(chunk.length, self.least)) for chunk in prompts[-1:]]
            share = prefill_share(self.age)
            allowed = max(self.target, seconds(COST, rows_of(tuple(decodes))) / (1 - share))
            assert seconds(COST, rows_of(plan)) <= max(allowed, seconds(COST, rows_of((*decodes, *least)))) + 1e-9

    def commit(self, plan: Plan) -> None:
        self.take(self.scheduler.commit(plan, self.runner.run(plan).sampled if plan else ()))

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            assert event.request_id not in self.ended, "an event after the end"
            if event.token is not None:
                self.texts[event.request_id].append(event.token)
            if event.finish:
                assert event.stats is not None
                self.ended[event.request_id] = event.finish
        self.scheduler.check()
        self.decoding = {s.id for s in self.scheduler._running.values() if s.pending == 1}

    @invariant()
    def texts_are_right(self) -> None:
        for id, finish in getattr(self, "ended", {}).items():
            expected = self.runner.reference(self.requests[id])
            text = self.texts[id]
            if finish in ("stop", "length"):
                assert text == expected
            else:
                assert id in (self.aborted if finish == "abort" else self.failed)
                assert text == expected[: len(text)]

    @invariant()
    def decodes_are_alive(self) -> None:
        if hasattr(self, "scheduler"):
            self.decoding &= set(self.scheduler._running)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        limit = 50 * len(self.requests) + 10
        while self.scheduler.has_work:
            self.step()
            limit -= 1
            assert limit > 0, "the queue never drains"
        self.texts_are_right()
        assert set(self.ended) == set(self.requests), "somebody never ended"
        assert self.scheduler.blocks.used == 0
        self.scheduler.check()


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
