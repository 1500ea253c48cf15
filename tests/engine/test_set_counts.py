"""Counts that change while a request runs: what is computed keeps its counts, whatever the scheduler does with it."""

import random
from dataclasses import replace

import pytest

from engine.blocks import BlockManager
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import Request, Sampling
from model.budget import ExpertBudget, ExpertCounts
from tests.engine.fake import FakeRunner, request
from tests.engine.random_workload import Served, alone, bench
from tests.engine.test_scheduler import finish, make, step, text
from tests.model.tiny import llama_like, topk

SERVED = Served(llama_like(topk(normalise=True), topk(), qk_norm="full"), block=4, few=10, requests=1)


def test_the_answer_is_that_of_a_request_with_these_counts_from_the_start() -> None:
    asked = Request("a", (3, 1, 4, 1, 5), ExpertBudget((2, 2), prefill=(1, 1)), Sampling(12, seed=1, temperature=0.0))
    changed = bench(SERVED)
    changed.engine.add(asked)
    for counts, tokens in (((1, 5), 4), ((6, 6), 7)):
        while len(changed.tokens.get("a", ())) < tokens:
            changed.step()
        changed.engine.set_counts("a", counts)
    changed.finish()
    budget = replace(asked.budget, changes=((5 + 3, (1, 5)), (5 + 6, (6, 6))))
    single = alone(SERVED, replace(asked, budget=budget))
    assert changed.tokens == single.tokens and changed.tokens != alone(SERVED, asked).tokens
    for position, row_V in changed.logits["a"].items():
        SERVED.assert_same(row_V, single.logits["a"][position])


def test_only_what_was_computed_before_costs_what_it_did() -> None:
    scheduler, runner = make(), FakeRunner(4)
    scheduler.add(request("a", tuple(range(6)), max_tokens=5, budget=(2, 2)))
    step(scheduler, runner)
    scheduler.set_counts("a", (1, 1))
    last = finish(scheduler, runner)["a"][-1]
    assert last.stats is not None and last.stats.routed_pairs == 6 * 4 + 4 * 2


def test_a_preempted_prompt_keeps_the_cost_of_its_first_attempt() -> None:
    sequence = Sequence(request("a", tuple(range(8)), budget=(2, 2)), 0.0)
    sequence.record_work(0, 6)
    assert sequence.set_counts((1, 1)) == 0
    sequence.record_work(0, 8)
    assert sequence.stats(1.0).routed_pairs == 6 * 4 + 8 * 2


def test_a_request_that_waits_has_its_new_counts_from_the_first_token() -> None:
    scheduler, runner = make(), FakeRunner(4)
    asked = request("a", tuple(range(6)), prefill=(3, 3))
    scheduler.add(asked)
    scheduler.set_counts("a", (1, 4))
    expected = runner.reference(replace(asked, budget=ExpertBudget((1, 4))))
    assert text(finish(scheduler, runner)["a"]) == expected


def test_a_request_that_has_ended_is_left_alone() -> None:
    scheduler = make()
    scheduler.set_counts("gone", (1, 1))
    assert not scheduler.has_work


def test_changed_counts_find_only_blocks_of_their_own() -> None:
    """The second request has the prompt of the first, and its counts only up to where those changed."""
    scheduler, runner = make(tokens=8), FakeRunner(4)
    scheduler.add(request("a", tuple(range(20))))
    step(scheduler, runner)
    scheduler.set_counts("a", (1, 1))  # eight tokens are computed
    finish(scheduler, runner)
    again = {}
    for id, counts in (("old", (2, 2)), ("new", (1, 1))):
        scheduler.add(request(id, tuple(range(20)), budget=counts))
        again[id] = finish(scheduler, runner)[id][-1].stats
    assert again["old"] is not None and again["old"].cached_tokens == 8
    assert again["new"] is not None and again["new"].cached_tokens == 0


COUNTS: list[ExpertCounts] = [(1, 1), (2, 2), (1, 3)]


@pytest.mark.parametrize("part", range(5))
def test_whatever_is_preempted_shared_and_changed(part: int) -> None:
    changes, preemptions = zip(*(storm(8 * part + seed) for seed in range(8)), strict=True)
    assert sum(changes) > 30 and sum(preemptions) > 8


def storm(seed: int) -> tuple[int, int]:
    """Requests that join and change at random, each with its own text; how many changes and preemptions there were."""
    rng, runner = random.Random(seed), FakeRunner(4)
    scheduler = Scheduler(BlockManager(10, 4), 4, 11, 40)
    waiting = [
        request(str(id), tuple(range(rng.randint(1, 20))), rng.randint(1, 19), budget=rng.choice(COUNTS))
        for id in range(14)
    ]
    sequences: dict[str, Sequence] = {}
    texts: dict[str, list[int]] = {asked.id: [] for asked in waiting}
    changes = preemptions = 0
    while waiting or scheduler.has_work:
        if waiting and rng.random() < 0.8:
            scheduler.add(waiting.pop())
        if rng.random() < 0.9:
            scheduler.set_counts(str(rng.randrange(14)), rng.choice(COUNTS))
        plan = scheduler.schedule()
        sequences |= {chunk.sequence.id: chunk.sequence for chunk in plan}
        preemptions += scheduler.plan_stats.preemptions
        for event in scheduler.commit(plan, runner.run(plan).sampled):
            texts[event.request_id] += [] if event.token is None else [event.token]
        scheduler.check()
    for id, sequence in sequences.items():
        changes += len(sequence.request.budget.changes)
        assert texts[id] == runner.reference(sequence.request)
        assert len(sequence.hashes) * 4 <= len(sequence.tokens)
    return changes, preemptions
