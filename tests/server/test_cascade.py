"""`experts.cascade` over HTTP: which run is returned, that it is what a plain request at its count gives, and usage."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from msgspec import structs
from starlette.testclient import TestClient

from model.budget import ExpertBudget, RoutingRule
from server.cascade import Cascade
from server.generation.passes import pass_usages
from tests.server.fakes import EOS, STATS, FakeEngine
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory, key_file, on_loopback, service_of, value

LOW, HIGH = ExpertBudget((1, 1, 1)), ExpertBudget((8, 8, 8))
CASCADE = {"low": 1, "high": 8, "by": "entropy", "threshold": 1.5}
ASKED = {"experts": {"cascade": CASCADE}}
TEXTS = {LOW: "few", HIGH: "many experts"}
LOW_TOKENS, HIGH_TOKENS = len("few") + 1, len("many experts") + 1  # with the end of the text


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[TestClient, FakeEngine]]:
    engine = FakeEngine()
    with in_memory(engine) as client:
        yield client, engine


@pytest.fixture
def engine(server: tuple[TestClient, FakeEngine]) -> FakeEngine:
    """One whose answers say which budget they were made with, and that is unsure of all that few experts said."""
    engine = server[1]
    engine.script = lambda request: [*TEXTS.get(request.budget, "other").encode(), EOS]
    engine.unsure = lambda request: 2.0 if request.budget == LOW else 0.5
    engine.seen.clear()
    return engine


@pytest.fixture
def client(server: tuple[TestClient, FakeEngine], engine: FakeEngine) -> TestClient:
    return server[0]


def asked(client: TestClient, path: str = COMPLETIONS, status: int = 200, **fields: Any) -> Any:
    body = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    answer = client.post(path, json=body | ASKED | fields)
    assert answer.status_code == status, answer.text
    return answer.json() if status != 200 or not fields.get("stream") else answer


@pytest.mark.parametrize(
    ("by", "threshold", "mean", "unsure"),
    [
        ("entropy", 1.5, 1.6, True),
        ("entropy", 1.5, 1.5, False),
        ("margin", 0.5, 0.4, True),
        ("margin", 0.5, 0.5, False),
    ],
)
def test_the_decision(by: Any, threshold: float, mean: float, unsure: bool) -> None:
    assert Cascade(LOW, HIGH, by, threshold).unsure(mean) is unsure


def test_an_unsure_answer_is_made_again_and_both_runs_count(client: TestClient, engine: FakeEngine) -> None:
    answer = asked(client, seed=5)
    assert answer["choices"][0]["text"] == "many experts"
    first, second = engine.seen
    assert (first.budget, second.budget) == (LOW, HIGH) and first.sampling == second.sampling
    assert first.prompt == second.prompt and first.id != second.id
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 4 and usage["completion_tokens"] == LOW_TOKENS + HIGH_TOKENS
    assert usage["total_tokens"] == 4 + LOW_TOKENS + HIGH_TOKENS
    assert usage["num_experts"] == round((1 * (2 + LOW_TOKENS) + 8 * (2 + HIGH_TOKENS)) / usage["total_tokens"], 4)
    assert usage["cascade"] == {
        "by": "entropy",
        "threshold": 1.5,
        "low": {"num_experts": 1, "prompt_tokens": 2, "completion_tokens": LOW_TOKENS},
        "high": {"num_experts": 8, "prompt_tokens": 2, "completion_tokens": HIGH_TOKENS},
        "answers": [{"returned": "high", "low": 2.0, "high": 0.5}],
    }
    assert "cost" not in usage


def test_a_sure_answer_is_returned_as_it_is(client: TestClient, engine: FakeEngine) -> None:
    engine.unsure = lambda _: 1.5
    answer = asked(client)
    assert answer["choices"][0]["text"] == "few" and [one.budget for one in engine.seen] == [LOW]
    usage = answer["usage"]
    assert usage["num_experts"] == 1 and usage["completion_tokens"] == LOW_TOKENS and usage["prompt_tokens"] == 2
    assert usage["cascade"]["high"] is None
    assert usage["cascade"]["answers"] == [{"returned": "low", "low": 1.5, "high": None}]


def test_the_mean_is_over_what_the_answer_has_when_a_stop_string_ends_it(
    client: TestClient, engine: FakeEngine
) -> None:
    answer = asked(client, stop="e", max_tokens=9)
    assert answer["choices"][0]["text"] == "many " and answer["choices"][0]["stop_reason"] == "e"
    assert answer["usage"]["completion_tokens"] == len("fe") + len("many e")


def test_a_margin_below_the_threshold_is_unsure(client: TestClient, engine: FakeEngine) -> None:
    cascade = CASCADE | {"by": "margin", "threshold": 0.3}
    engine.unsure = lambda request: 0.1 if request.budget == LOW else 0.2
    answer = asked(client, experts={"cascade": cascade})
    assert answer["choices"][0]["text"] == "many experts" and engine.seen[0].sampling.measured == "margin"


def test_each_answer_is_decided_by_itself(client: TestClient, engine: FakeEngine) -> None:
    """Of two prompts with two answers each, the second answer of the first prompt is unsure: only its prompt is read
    again."""
    unsure = lambda request: request.budget == LOW and request.id.endswith("-1")  # noqa: E731
    engine.unsure = lambda request: 2.0 if unsure(request) else 0.0
    answer = asked(client, prompt=["hi", "hello"], n=2, seed=1)
    assert [choice["text"] for choice in answer["choices"]] == ["few", "many experts", "few", "few"]
    cascade = answer["usage"]["cascade"]
    assert [one["returned"] for one in cascade["answers"]] == ["low", "high", "low", "low"]
    assert cascade["low"] == {"num_experts": 1, "prompt_tokens": 7, "completion_tokens": 4 * LOW_TOKENS}
    assert cascade["high"] == {"num_experts": 8, "prompt_tokens": 2, "completion_tokens": HIGH_TOKENS}
    again = engine.seen[-1]
    assert again.sampling.seed == 2, "the seed of the answer that is made again"


def test_a_prompt_cost_what_the_answer_that_began_first_read_of_it() -> None:
    """In the second run that may be a later answer: the others find the prompt in the prefix cache."""

    def ran(cached: int) -> Any:
        stats, prompt = structs.replace(STATS, cached_tokens=cached), SimpleNamespace(done=True)
        return SimpleNamespace(timeline=SimpleNamespace(tokens=4, stats=stats, prompt=prompt))

    generation: Any = SimpleNamespace(sequences=[0, 1], passes=({0: ran(0), 1: ran(6)}, {1: ran(0), 0: ran(6)}))
    assert [used.cached_tokens for used in pass_usages(generation, [LOW, HIGH], [7])] == [0, 0]


def test_best_of_ranks_the_answers_that_stand(client: TestClient, engine: FakeEngine) -> None:
    engine.unsure = lambda request: 2.0 if request.budget == LOW and request.id.endswith("-2") else 0.0
    engine.likely = lambda request: -0.1 if request.budget == HIGH else -0.5
    answer = asked(client, n=1, best_of=3)
    assert answer["choices"][0]["text"] == "many experts" and len(answer["usage"]["cascade"]["answers"]) == 3


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("unsure", [True, False])
def test_a_stream_begins_after_the_decision(path: str, unsure: bool, client: TestClient, engine: FakeEngine) -> None:
    engine.unsure = lambda _: 2.0 if unsure else 0.5
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = asked(client, path, stream=True, stream_options=options, logprobs=1 if path == COMPLETIONS else True)
    assert "x-num-experts" not in streamed.headers, "which of the two it is was not known"
    *chunks, last = [json.loads(frame) for frame in frames(streamed.text)[:-1]]
    texts = [
        choice.get("text") or choice.get("delta", {}).get("content") for one in chunks for choice in one["choices"]
    ]
    assert "".join(text or "" for text in texts) == ("many experts" if unsure else "few")
    whole = asked(client, path, logprobs=1 if path == COMPLETIONS else True)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    counts = [one["usage"]["completion_tokens"] for one in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]
    if unsure:
        assert counts[0] >= LOW_TOKENS, "the first run counts from the start"
    assert last["usage"]["cascade"]["answers"][0]["returned"] == ("high" if unsure else "low")


def test_a_silent_stream_sends_comments_until_the_decision() -> None:
    engine = FakeEngine()
    engine.script = lambda request: [*TEXTS[request.budget].encode(), EOS]
    with on_loopback(engine, heartbeat=0.01) as (url, _):
        engine.gate = asyncio.Event()
        with httpx.stream("POST", url + COMPLETIONS, json={"prompt": "hi", "stream": True} | ASKED) as answer:
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(3)] == [": waiting", "", ": waiting"]
            engine.gate.set()
            text = "".join(line for line in lines)
    assert "few" not in text and '"text":"m"' in text


def test_responses_have_it_too(client: TestClient, engine: FakeEngine) -> None:
    body = {"input": "hi", "experts": {"cascade": CASCADE}}
    answer = client.post("/v1/responses", json=body).json()
    assert answer["output"][0]["content"][0]["text"] == "many experts"
    assert answer["usage"]["cascade"]["answers"] == [{"returned": "high", "low": 2.0, "high": 0.5}]
    assert answer["usage"]["output_tokens"] == LOW_TOKENS + HIGH_TOKENS


def test_rules_hold_in_both_runs_and_layers_may_differ(client: TestClient, engine: FakeEngine) -> None:
    asked(client, experts={"cascade": {"low": [1, 2, 1], "high": [1, 4, 8], "threshold": 0.0}, "threshold": 0.25})
    rule = RoutingRule(threshold=0.25)
    assert [one.budget for one in engine.seen] == [
        ExpertBudget((1, 2, 1), rule=rule),
        ExpertBudget((1, 4, 8), rule=rule),
    ]
    assert engine.seen[0].sampling.measured == "entropy", "the default"


def test_tools_are_parsed_in_the_run_that_is_returned(client: TestClient, engine: FakeEngine) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    answer = asked(client, CHAT, response_format=schema)
    assert answer["choices"][0]["message"]["content"] == "many experts"
    assert {one.sampling.grammar for one in engine.seen} == {engine.compiled[-1]}, "compiled once"


def test_a_run_that_fails_fails_the_request(client: TestClient, engine: FakeEngine) -> None:
    engine.fail_at = {"-again": (3, "the second run failed")}
    try:
        assert "second run" in asked(client, status=500)["error"]["message"]
    finally:
        engine.fail_at = {}
    assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 200, "its slot is free again"


def test_each_run_is_a_sequence_of_the_metrics(client: TestClient, engine: FakeEngine) -> None:
    service = service_of(client)
    read = lambda count: value(service, "generation_tokens_total", num_experts=count)  # noqa: E731
    before = read("1"), read("8")
    asked(client)
    assert (read("1") - before[0], read("8") - before[1]) == (LOW_TOKENS, HIGH_TOKENS)


def test_an_api_key_is_charged_for_both_runs(tmp_path: Path) -> None:
    """A prompt once in each run, however many of its answers are made again."""
    keys = key_file(tmp_path, '[alice]\nkey = "sk-a"\ntokens_per_minute = 100000\n')
    with in_memory(FakeEngine(), api_keys_file=keys) as client:
        client.headers["authorization"] = "Bearer sk-a"
        asked(client, n=2)
        service = service_of(client)
        assert value(service, "key_tokens_total", key="alice", kind="prompt") == 2 * len("hi")
        assert value(service, "key_tokens_total", key="alice", kind="generation") == 4 * (len("hello world") + 1)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"experts": {"cascade": {"low": 1, "high": 8}}}, "experts.cascade.threshold", "missing"),
        ({"experts": {"cascade": CASCADE | {"high": 9}}}, "experts.cascade.high", "between 1 and 8"),
        ({"experts": {"cascade": CASCADE | {"low": 8}}}, "experts.cascade.high", "more experts than"),
        (
            {"experts": {"cascade": CASCADE | {"low": [1, 8, 1], "high": 4}}},
            "experts.cascade.high",
            "more experts than",
        ),
        ({"experts": {"cascade": CASCADE | {"low": [1, 1]}}}, "experts.cascade.low", "2 entries"),
        ({"experts": {"cascade": CASCADE | {"low": True}}}, "experts.cascade.low", "an integer"),
        ({"experts": {"cascade": CASCADE | {"by": "luck"}}}, "experts.cascade.by", "margin"),
        ({"experts": {"cascade": CASCADE | {"threshold": -1}}}, "experts.cascade.threshold", "between 0 and 100"),
        ({"experts": {"cascade": CASCADE | {"by": "margin"}}}, "experts.cascade.threshold", "between 0 and 1 "),
        ({"experts": {"cascade": CASCADE | {"treshold": 1}}}, "experts.cascade.treshold", "experts.cascade.threshold"),
        ({"experts": {"cascade": 4}}, "experts.cascade", "an object"),
        ({"experts": {"cascade": CASCADE, "count": 2}}, "experts", "exclude each other"),
        ({"num_experts": 2}, "experts.cascade", "exclude each other"),
        ({"model": "tiny@k2"}, "experts.cascade", "exclude each other"),
        ({"extra_body": {"experts": {"cascade": CASCADE | {"low": 2}}}}, "experts.cascade", "they must agree"),
        ({"max_tokens": 0, "echo": True}, "max_tokens", "at least 1"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str, client: TestClient) -> None:
    error = asked(client, status=400, **fields)["error"]
    assert error["param"] == param and words in error["message"]
