"""What a plan may contain, who waits for whom, and how requests end."""

import pytest

from engine.blocks import BlockManager
from engine.engine import NO_RESULT
from engine.plan import Sampled
from engine.scheduler import Scheduler
from engine.types import TokenEvent
from model.errors import InvalidRequest
from tests.engine.fake import POISON, FakeRunner, request
from tests.engine.test_scheduler_storm import Oracle

SIZE = 4


def make(blocks: int = 64, running: int = 4, tokens: int = 16, chunked: bool = True, context: int = 200) -> Scheduler:
    manager = BlockManager(blocks, SIZE, prefix_cache=chunked)
    return Scheduler(manager, running, tokens, context, chunked)


def shape(plan: object) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.length) for chunk in plan]  # type: ignore[attr-defined]


def step(scheduler: Scheduler, runner: FakeRunner) -> list[TokenEvent]:
    plan = scheduler.schedule()
    result = runner.run(plan) if plan else NO_RESULT
    return scheduler.commit(plan, result.sampled, result.prompt_logprobs)


def finish(scheduler: Scheduler, runner: FakeRunner, limit: int = 1000) -> dict[str, list[TokenEvent]]:
    """Step until all is done; the events of each request."""
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(limit):
        if not scheduler.has_work:
            return events
        for event in step(scheduler, runner):
            events.setdefault(event.request_id, []).append(event)
        scheduler.check()
    raise AssertionError("there is still work")


def text(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def test_long_prompt_is_read_in_chunks_beside_decodes() -> None:
    scheduler, runner = make(tokens=8), FakeRunner(SIZE)
    scheduler.add(request("short", (1, 2), max_tokens=9))
    step(scheduler, runner)
    scheduler.add(request("long", tuple(range(10, 30))))
    plan = scheduler.schedule()
    assert shape(plan) == [("short", 2, 1), ("long", 0, 7)]
    assert [chunk.samples for chunk in plan] == [True, False]
    scheduler.commit(plan, runner.run(plan).sampled)
    assert shape(scheduler.schedule()) == [("short", 3, 1), ("long", 7, 7)]


def test_several_prompts_share_a_step_in_order() -> None:
    scheduler = make(tokens=10)
    for name in "abc":
        scheduler.add(request(name, (1, 2, 3, 4)))
    assert shape(scheduler.schedule()) == [("a", 0, 4), ("b", 0, 4), ("c", 0, 2)]


def test_running_limit_and_queue() -> None:
    scheduler = make(running=2)
    for name in "abc":
        scheduler.add(request(name))
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["a", "b"]
    assert (scheduler.running, scheduler.waiting) == (2, 1)


def test_prefix_hits_are_counted_and_reported() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    prompt = tuple(range(10))
    scheduler.add(request("a", prompt))
    finish(scheduler, runner)
    scheduler.add(request("b", prompt))
    assert shape(scheduler.schedule()) == [("b", 8, 2)]
    assert (scheduler.plan_stats.prefix_queries, scheduler.plan_stats.prefix_hits) == (10, 8)


def test_scored_and_preempted_prompts_are_not_queries() -> None:
    """The first is not looked up, the second would find its own blocks."""
    scheduler, runner = make(blocks=6), FakeRunner(SIZE)
    scheduler.add(request("scored", tuple(range(9)), max_tokens=1, prompt_logprobs=0))
    queries = [_counted(scheduler, runner)]
    for index, name in enumerate("abc"):
        scheduler.add(request(name, (index, 1, 2), max_tokens=14))
    while scheduler.has_work:
        queries.append(_counted(scheduler, runner))
    assert sum(preempted for preempted, _, _ in queries) > 0
    assert (sum(asked for _, asked, _ in queries), sum(found for _, _, found in queries)) == (9, 0)


def _counted(scheduler: Scheduler, runner: FakeRunner) -> tuple[int, int, int]:
    """One step; sequences set back in it, prompt tokens looked up and found."""
    step(scheduler, runner)
    counts = scheduler.plan_stats
    return counts.preemptions, counts.prefix_queries, counts.prefix_hits


def test_cached_tokens_reach_the_stats() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    for name in "ab":
        scheduler.add(request(name, tuple(range(10))))
        last = finish(scheduler, runner)[name][-1]
    assert last.stats is not None
    assert last.stats.cached_tokens == 8
    assert min(last.stats.queue_s, last.stats.prefill_s, last.stats.decode_s) >= 0


@pytest.mark.parametrize("prefill", [(), (3, 1)])
@pytest.mark.parametrize("truth", [None, 1.0, 0.5])
def test_the_work_of_all_sequences_is_that_of_all_steps(truth: float | None, prefill: tuple[int, ...]) -> None:
    """Also where some are set back, share a prefix or are guessed at; tokens from the cache cost nothing."""
    runner = FakeRunner(SIZE)
    manager, speculator = BlockManager(7, SIZE), None if truth is None else Oracle(runner, truth)
    scheduler = Scheduler(manager, 4, 16, 200, speculator=speculator)
    for index, name in enumerate("aabb"):
        scheduler.add(
            request(
                f"{name}{index}", (index // 2, 1, 2, 3, 4), max_tokens=12, budget=(index // 2 + 1, 2), prefill=prefill
            )
        )
    pairs = tokens = preemptions = 0
    ends = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        result = runner.run(plan) if plan else NO_RESULT
        pairs, tokens = pairs + result.work.routed_pairs, tokens + sum(len(chunk.tokens) for chunk in plan)
        preemptions += scheduler.plan_stats.preemptions
        ends += [
            event.stats for event in scheduler.commit(plan, result.sampled, result.prompt_logprobs) if event.finish
        ]
    assert preemptions and len(ends) == 4 and sum(stats.cached_tokens for stats in ends if stats)
    assert sum(stats.routed_pairs for stats in ends if stats) == pairs
    assert sum(stats.computed_tokens for stats in ends if stats) == tokens


@pytest.mark.parametrize(("prefill", "found"), [((), 16), ((5, 5), 4), ((3, 4), 16)])
def test_an_answer_that_becomes_a_prompt_is_found_where_its_counts_are_those_of_a_prompt(
    prefill: tuple[int, ...], found: int
) -> None:
    """The first request's prompt fills one block and a half; what it was answered has the counts of an answer."""
    scheduler, runner = make(), FakeRunner(SIZE)
    counts = {"budget": (3, 4), "prefill": prefill}
    first = request("first", tuple(range(6)), max_tokens=12, **counts)
    scheduler.add(first)
    said = [event.token for event in finish(scheduler, runner)["first"]]
    assert said == runner.reference(first)
    again = request("again", (*first.prompt, *said), max_tokens=12, **counts)
    scheduler.add(again)
    events = finish(scheduler, runner)["again"]
    assert [event.token for event in events] == runner.reference(again)
    assert events[-1].stats is not None and events[-1].stats.cached_tokens == found


def test_tokens_from_the_cache_cost_nothing() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    for name, computed in (("first", 10), ("again", 2)):
        scheduler.add(request(name, tuple(range(10)), max_tokens=1, budget=(3, 4)))
        stats = finish(scheduler, runner)[name][-1].stats
        assert stats is not None and (stats.computed_tokens, stats.routed_pairs) == (computed, 7 * computed)


def test_stats_split_the_time() -> None:
    now = iter([10.0, 11.0, 13.0, 20.0])  # arrival, admission, first token, end
    scheduler = Scheduler(BlockManager(8, SIZE), 1, 8, 50, clock=lambda: next(now))
    scheduler.add(request("a", max_tokens=2))
    stats = finish(scheduler, FakeRunner(SIZE))["a"][-1].stats
    assert stats is not None
    assert (stats.queue_s, stats.prefill_s, stats.decode_s) == (1.0, 2.0, 7.0)


def test_length_and_stop() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    plain = request("a", max_tokens=5)
    expected = runner.reference(plain)
    stopping = request("b", max_tokens=5, stop_token_ids=(expected[2],))
    scheduler.add(plain)
    scheduler.add(stopping)
    events = finish(scheduler, runner)
    assert text(events["a"]) == expected
    assert events["a"][-1].finish == "length"
    assert text(events["b"]) == expected[: expected.index(expected[2]) + 1]
    assert events["b"][-1].finish == "stop"
    assert [event.finish for event in events["a"][:-1]] == [None] * 4


def test_stop_wins_over_length() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    token = runner.reference(request("x", max_tokens=1))[0]
    scheduler.add(request("a", max_tokens=1, stop_token_ids=(token,)))
    assert finish(scheduler, runner)["a"][-1].finish == "stop"


def test_exactly_full_context_is_served() -> None:
    scheduler, runner = make(context=8), FakeRunner(SIZE)
    scheduler.add(request("a", (1, 2, 3), max_tokens=5))
    assert len(text(finish(scheduler, runner)["a"])) == 5


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "code"),
    [
        ((1,) * 6, 5, "max_tokens", "context_length_exceeded"),
        ((), 5, "prompt", "invalid_value"),
        ((1,), 0, "max_tokens", "invalid_value"),
        ((1,), -1, "max_tokens", "invalid_value"),
    ],
)
def test_impossible_requests_are_refused(prompt: tuple[int, ...], max_tokens: int, param: str, code: str) -> None:
    scheduler = make(context=10)
    with pytest.raises(InvalidRequest) as caught:
        scheduler.add(request("a", prompt, max_tokens))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert not scheduler.has_work


def test_request_larger_than_the_cache_is_refused_and_the_largest_is_served() -> None:
    scheduler, runner = make(blocks=3), FakeRunner(SIZE)
    with pytest.raises(InvalidRequest, match="key-value cache"):
        scheduler.add(request("a", (1,) * 10, max_tokens=4))
    scheduler.add(request("a", (1,) * 10, max_tokens=3))  # the last token needs no slot
    assert len(text(finish(scheduler, runner)["a"])) == 3


def test_taken_id_is_refused_while_waiting_and_running() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    scheduler.add(request("a"))
    with pytest.raises(InvalidRequest, match="already running"):
        scheduler.add(request("a"))
    step(scheduler, runner)
    with pytest.raises(InvalidRequest, match="already running"):
        scheduler.add(request("a"))
    finish(scheduler, runner)
    scheduler.add(request("a"))


def test_youngest_is_preempted_and_resumes_with_the_same_text() -> None:
    scheduler, runner = make(blocks=6), FakeRunner(SIZE)
    requests = [request(name, (index, 1, 2), max_tokens=14) for index, name in enumerate("abc")]
    for each in requests:
        scheduler.add(each)
    events = finish(scheduler, runner)
    for each in requests:
        assert text(events[each.id]) == runner.reference(each)
        assert events[each.id][-1].stats.cached_tokens == 0  # type: ignore[union-attr]  # its own blocks do not count
    preemptions = {name: events[name][-1].stats.preemptions for name in "abc"}  # type: ignore[union-attr]
    assert preemptions["a"] == 0
    assert preemptions["c"] > 0


def test_preempted_goes_before_newcomers() -> None:
    scheduler, runner = make(blocks=3), FakeRunner(SIZE)
    for name in "ab":
        scheduler.add(request(name, (1, 2), max_tokens=10))
    step(scheduler, runner)
    scheduler.add(request("new", (9,), max_tokens=2))
    order: list[str] = []
    while scheduler.has_work:
        order += [event.request_id for event in step(scheduler, runner) if event.finish]
    assert order == ["a", "b", "new"]


def test_partly_read_prompt_waits_for_blocks_and_keeps_its_work() -> None:
    scheduler, runner = make(blocks=7, tokens=4), FakeRunner(SIZE)
    scheduler.add(request("a", (1, 2, 3), max_tokens=9))
    step(scheduler, runner)
    long = request("long", tuple(range(10, 30)), max_tokens=1)  # needs five blocks; "a" grows to three meanwhile
    scheduler.add(long)
    for _ in range(6):
        step(scheduler, runner)
    plan = scheduler.schedule()
    assert shape(plan) == [("a", 9, 1)]
    scheduler.commit(plan, runner.run(plan).sampled)
    events = finish(scheduler, runner)
    assert text(events["long"]) == runner.reference(long)
    assert events["long"][-1].stats.preemptions == 0  # type: ignore[union-attr]


def test_abort_while_waiting_running_and_unknown() -> None:
    scheduler, runner = make(running=1), FakeRunner(SIZE)
    for name in "ab":
        scheduler.add(request(name, max_tokens=50))
    step(scheduler, runner)
    scheduler.abort("a")
    scheduler.abort("b")
    scheduler.abort("b")
    scheduler.abort("nobody")
    assert (scheduler.running, scheduler.waiting, scheduler.blocks.used) == (0, 0, 0)
    assert scheduler.has_work  # the ends must still be told
    events = step(scheduler, runner)
    assert [(event.request_id, event.finish, event.token) for event in events] == [
        ("a", "abort", None),
        ("b", "abort", None),
    ]
    assert all(event.stats for event in events)
    assert not scheduler.has_work


@pytest.mark.parametrize("length", [3, 30])
def test_abort_in_flight_ends_with_the_commit(length: int) -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    scheduler.add(request("a", (1,) * length))
    scheduler.add(request("b", (1, 2)))
    plan = scheduler.schedule()
    scheduler.abort("a")
    assert scheduler.blocks.used > 0  # the runner may be writing to them
    events = scheduler.commit(plan, runner.run(plan).sampled)
    assert [event.finish for event in events if event.request_id == "a"] == ["abort"]
    scheduler.check()
    scheduler.add(request("a"))  # the id is free again, and nothing of its past remains
    assert finish(scheduler, runner)["a"][-1].finish == "length"
    assert scheduler.blocks.used == 0


def test_sampled_error_ends_one_request_and_its_blocks_are_forgotten() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    scheduler.add(
        request("bad", (*range(20), POISON))
    )  # read in two chunks: the first is offered to others for a while
    scheduler.add(request("good", (5, 6)))
    events = finish(scheduler, runner)
    assert events["bad"][-1].error == "the logits are not finite"
    assert (len(events["bad"]), events["bad"][-1].finish) == (1, "error")
    assert text(events["good"]) == runner.reference(request("x", (5, 6)))
    scheduler.add(request("again", tuple(range(10))))
    assert shape(scheduler.schedule()) == [("again", 0, 10)]


def test_failed_plan_leaves_the_queue_alone() -> None:
    scheduler, runner = make(running=1), FakeRunner(SIZE)
    for name in "ab":
        scheduler.add(request(name))
    events = scheduler.fail(scheduler.schedule(), "broken")
    assert [(event.request_id, event.finish, event.error) for event in events] == [("a", "error", "broken")]
    assert scheduler.blocks.used == 0
    assert text(finish(scheduler, runner)["b"]) == runner.reference(request("b"))


def test_wrong_number_of_results_changes_nothing() -> None:
    scheduler, runner = make(), FakeRunner(SIZE)
    scheduler.add(request("a"))
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="samples 1 tokens, got 2"):
        scheduler.commit(plan, [Sampled(1), Sampled(2)])
    with pytest.raises(RuntimeError, match="neither committed nor failed"):
        scheduler.schedule()
    assert len(scheduler.commit(plan, runner.run(plan).sampled)) == 1


def test_whole_prompts_when_not_chunked() -> None:
    scheduler = make(tokens=8, chunked=False)
    for name, length in (("a", 5), ("b", 5)):
        scheduler.add(request(name, (1,) * length))
    assert shape(scheduler.schedule()) == [("a", 0, 5)]


def test_prompt_longer_than_a_step_is_read_alone_when_not_chunked() -> None:
    scheduler, runner = make(tokens=8, chunked=False), FakeRunner(SIZE, mixing=True)
    scheduler.add(request("a", (1, 2), max_tokens=9))
    step(scheduler, runner)
    scheduler.add(request("long", (1,) * 20))
    scheduler.add(request("next", (1,)))
    assert shape(scheduler.schedule()) == [("a", 2, 1), ("long", 0, 20)]


def test_recomputation_repeats_the_first_computation_when_not_chunked() -> None:
    """With a mixture that mixes tokens, other chunks would be another text."""
    scheduler, runner = make(blocks=6, chunked=False), FakeRunner(SIZE, mixing=True)
    requests = [request(name, (index, 1, 2), max_tokens=14) for index, name in enumerate("abc")]
    for each in requests:
        scheduler.add(each)
    events = finish(scheduler, runner)
    assert events["c"][-1].stats.preemptions > 0  # type: ignore[union-attr]
    for each in requests:
        assert text(events[each.id]) == runner.reference(each)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_step_tokens"):
        Scheduler(BlockManager(4, SIZE), max_running=8, max_step_tokens=4, max_model_len=8)
    with pytest.raises(ValueError, match="prefix cache"):
        Scheduler(BlockManager(4, SIZE), 1, 4, 8, chunked=False)


def test_check_sees_a_waiting_sequence_with_blocks() -> None:
    scheduler = make()
    scheduler.add(request("a"))
    scheduler.schedule()
    scheduler._running.clear()
    with pytest.raises(RuntimeError, match="does not run"):
        scheduler.check()


@pytest.mark.parametrize("queue", ["_waiting", "_running"])
def test_check_sees_a_broken_order(queue: str) -> None:
    scheduler, runner = make(running=2), FakeRunner(SIZE)
    for name in "abcd":
        scheduler.add(request(name))
    step(scheduler, runner)
    scheduler.check()
    sequences = getattr(scheduler, queue)
    sequences.move_to_end(next(iter(sequences)))
    with pytest.raises(RuntimeError, match="order of arrival"):
        scheduler.check()


def test_check_sees_a_second_prompt_partly_read() -> None:
    scheduler, runner = make(tokens=8), FakeRunner(SIZE)
    for length, name in ((3, "short"), (20, "long")):
        scheduler.add(request(name, (1,) * length))
    step(scheduler, runner)
    scheduler.check()
    scheduler._running["short"].computed = 0
    with pytest.raises(RuntimeError, match="more than one prompt is partly prefilled"):
        scheduler.check()
