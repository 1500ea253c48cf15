"""Log-probabilities of prompts: the same however a prompt is cut, and those that generating it would have given."""

import pytest
import torch

from engine.types import Logprob, Request, Sampling, TokenEvent
from model.budget import ExpertBudget
from model.errors import InvalidRequest
from tests.engine.fake import FakeRunner, request
from tests.engine.random_workload import Bench, Served, bench
from tests.engine.test_mixed_batch import only
from tests.engine.test_scheduler import finish, make

BUDGET = ExpertBudget((2, 1))
PROMPT = tuple((5 * i) % 61 for i in range(23))


def run(made: Bench, *requests: Request) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for each_request in requests:
        made.engine.add(each_request)
    while made.engine.has_work:
        for event in made.engine.step().events:
            assert event.error is None
            events.setdefault(event.request_id, []).append(event)
    return events


def scored(id: str, prompt: tuple[int, ...], **options: int | float) -> Request:
    sampling = {"max_tokens": 0, "seed": 3, "prompt_logprobs": 2} | options
    return Request(id, prompt, BUDGET, Sampling(**sampling))  # type: ignore[arg-type]


def values(found: tuple[Logprob, ...] | None) -> list[float]:
    assert found is not None
    return [each.value for each in found]


@only("topk", "infinity")
def test_a_prompt_is_scored_whole_or_in_chunks_alone_or_beside_others(served: Served) -> None:
    (alone,) = run(bench(served), scored("a", PROMPT))["a"]
    assert (alone.token, alone.finish, len(values(alone.prompt_logprobs))) == (None, "length", len(PROMPT) - 1)
    others = [Request(str(n), PROMPT[:n], BUDGET, Sampling(6, seed=n)) for n in (1, 4, 9)]
    crowd = bench(served, step_tokens=9)
    mixed = run(crowd, *others, scored("a", PROMPT))["a"][0]
    assert crowd.chunks > 0
    torch.testing.assert_close(
        torch.tensor(values(mixed.prompt_logprobs)), torch.tensor(values(alone.prompt_logprobs)), atol=1e-5, rtol=0
    )
    if served.native:
        assert mixed.prompt_logprobs == alone.prompt_logprobs
    best = [entry.top[0] for entry in alone.prompt_logprobs or ()]
    assert all(value >= entry.value for (_, value), entry in zip(best, alone.prompt_logprobs or (), strict=True))


@only("topk", "infinity")
def test_what_was_generated_scores_as_it_was_said(served: Served) -> None:
    said = run(bench(served), Request("a", PROMPT[:5], BUDGET, Sampling(12, seed=3, logprobs=0)))["a"]
    answer = tuple(event.token for event in said if event.token is not None)
    scores = run(bench(served), scored("b", (*PROMPT[:5], *answer)))["b"][0].prompt_logprobs
    expected = [event.logprob.value for event in said if event.logprob is not None]
    torch.testing.assert_close(torch.tensor(values(scores)[4:]), torch.tensor(expected), atol=1e-5, rtol=0)
    if served.native:
        assert values(scores)[4:] == expected


@only("topk")
def test_a_prompt_found_in_the_cache_is_scored_all_the_same(served: Served) -> None:
    made = bench(served)
    run(made, Request("a", PROMPT, BUDGET, Sampling(1, seed=3)))
    events = run(made, scored("b", PROMPT, max_tokens=2))["b"]
    assert len(values(events[0].prompt_logprobs)) == len(PROMPT) - 1
    assert [event.prompt_logprobs for event in events[1:]] == [None]
    assert events[-1].stats is not None and events[-1].stats.cached_tokens == 0


def test_scores_survive_preemption() -> None:
    scheduler, runner = make(blocks=7, tokens=8), FakeRunner(4)
    for name, count in (("a", 6), ("b", 7)):
        scheduler.add(request(name, tuple(range(count)), max_tokens=16, prompt_logprobs=0))
    events = finish(scheduler, runner)
    assert scheduler.blocks.used == 0
    for name, count in (("a", 6), ("b", 7)):
        first, *rest = events[name]
        assert values(first.prompt_logprobs) == [-float(position) for position in range(1, count)]
        assert all(event.prompt_logprobs is None for event in rest)
    assert sum(event.stats.preemptions for each_list in events.values() for event in each_list if event.stats) > 0


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_a_prompt_of_any_length_is_scored(length: int) -> None:
    scheduler = make()
    scheduler.add(request("a", tuple(range(length)), max_tokens=0, prompt_logprobs=1))
    (event,) = finish(scheduler, FakeRunner(4))["a"]
    assert len(event.prompt_logprobs or ()) == length - 1 and event.finish == "length" and event.stats is not None


def test_a_scored_prompt_is_computed_to_its_end_and_needs_the_room() -> None:
    scheduler = make(blocks=2)
    scheduler.add(request("fits", tuple(range(8)), max_tokens=0, prompt_logprobs=0))
    scheduler.add(request("too", tuple(range(8)), max_tokens=1))
    for prompt, new in ((9, 0), (9, 1)):
        with pytest.raises(InvalidRequest, match="cache of this server computes at most 8 tokens"):
            scheduler.add(request("not", tuple(range(prompt)), max_tokens=new, prompt_logprobs=0))
    assert {name: events[-1].finish for name, events in finish(scheduler, FakeRunner(4)).items()} == {
        "fits": "length",
        "too": "length",
    }
