"""/v1/responses by the real openai client: answers, events, calls there and back, failures."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, ConfigDict, TypeAdapter
from starlette.testclient import TestClient

from model.errors import GenerationFailed, InvalidRequest
from server.dialects.hermes import Hermes
from server.dialects.reasoning import ReasoningTags
from server.schemas.response_object import ResponseEvent, ResponseObject
from tests.server.fakes import FakeEngine, says
from tests.server.harness import ended, frames, in_memory, on_loopback, service_of, value

RESPONSES = "/v1/responses"
# Built when it is first used: it takes a second.
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent, config=ConfigDict(defer_build=True))
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "default": None},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
SCORES = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}

PAIRS = {"routed_pairs": 60, "routed_pairs_trained": 60}  # as the fake engine says


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    engine = FakeEngine()
    with on_loopback(engine) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), engine


@pytest.fixture
def api(served: tuple[openai.OpenAI, FakeEngine]) -> openai.OpenAI:
    served[1].script = says("hello world")
    return served[0]


@pytest.fixture
def engine(served: tuple[openai.OpenAI, FakeEngine]) -> FakeEngine:
    return served[1]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with in_memory() as client:
        service_of(client).dialect = Hermes({}, ReasoningTags())
        yield client


def prompt(engine: FakeEngine) -> bytes:
    return bytes(engine.seen[-1].prompt)


def scripted(client: TestClient, text: str) -> None:
    service_of(client).engine.script = says(text)  # type: ignore[attr-defined]


def post(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(RESPONSES, json={"input": "hi", **body})
    assert response.status_code == 200, response.text
    Response.model_validate(response.json(), strict=True)
    ResponseObject.model_validate(response.json())
    return dict(response.json())


def streamed(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post(RESPONSES, json={"input": "hi", "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream") and response.text.endswith("}\n\n")
    events = [json.loads(frame) for frame in frames(response.text)]
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event)
        ResponseEvent.model_validate(event)
    return events


def only(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == f"response.{kind}"]


def test_a_plain_answer(api: openai.OpenAI, engine: FakeEngine) -> None:
    answer = api.responses.create(
        model="tiny",
        input="hi",
        instructions="be brief",
        temperature=0.5,
        metadata={"a": "b"},
        store=True,
        extra_body={"num_experts": 2, "top_k": 3, "seed": 7},
    )
    assert (answer.output_text, answer.status, answer.error, answer.model) == ("hello world", "completed", None, "tiny")
    assert answer.id.startswith("resp_") and str(answer.output[0].id).startswith("msg_")
    assert prompt(engine) == b"<system>be brief<user>hi<assistant>"
    assert answer.usage is not None and answer.usage.output_tokens == 12
    assert answer.usage.input_tokens == len(prompt(engine)) and answer.usage.total_tokens == len(prompt(engine)) + 12
    assert (
        answer.usage.model_extra == {"num_experts": 2, **PAIRS}
        and (answer.model_extra or {})["metrics"]["num_experts"] == 2
    )
    assert (answer.instructions, answer.metadata, answer.temperature) == ("be brief", {"a": "b"}, 0.5)
    assert (answer.model_extra or {})["store"] is False and answer.previous_response_id is None
    sampling = engine.seen[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 7)


def test_too_short_a_limit_is_incomplete(api: openai.OpenAI) -> None:
    answer = api.responses.create(model="tiny", input="hi", max_output_tokens=5)
    assert (answer.output_text, answer.status, answer.max_output_tokens) == ("hello", "incomplete", 5)
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete" and answer.completed_at is None  # type: ignore[union-attr]
    with api.responses.stream(model="tiny", input="hi", max_output_tokens=5) as stream:
        last = list(stream)[-1]
    assert last.type == "response.incomplete" and last.response.incomplete_details == answer.incomplete_details
    assert last.response.output_text == "hello" and last.response.status == "incomplete"


def test_the_client_streams(api: openai.OpenAI) -> None:
    with api.responses.stream(model="tiny@k2", input="hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hello world"
    assert final.output_text == "hello world" and final.usage is not None and final.usage.model_extra
    assert final.usage.model_extra["num_experts"] == 2 and final.model == "tiny@k2"
    raw = list(api.responses.create(model="tiny", input="hi", stream=True))
    assert [event.type for event in raw] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 11,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_the_asynchronous_client(served: tuple[openai.OpenAI, FakeEngine], api: openai.OpenAI) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=str(api.base_url), api_key="none", max_retries=0) as client:
            plain = await client.responses.create(model="tiny", input="hi")
            async with client.responses.stream(model="tiny", input="hi") as stream:
                final = await stream.get_final_response()
            return plain.output_text, final.output_text

    assert asyncio.run(ask()) == ("hello world", "hello world")


class Cat(BaseModel):
    name: str
    age: int


def test_parsed_answers(api: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = says('{"name": "Tom", "age": 3}')
    answer = api.responses.parse(model="tiny", input="which cat?", text_format=Cat)
    assert answer.output_parsed == Cat(name="Tom", age=3)
    assert '"age"' in engine.seen[-1].sampling.grammar.replace("\\", "")
    assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "json_schema"
    with api.responses.stream(model="tiny", input="which cat?", text_format=Cat) as stream:
        assert stream.get_final_response().output_parsed == Cat(name="Tom", age=3)
    api.responses.create(model="tiny", input="hi", text={"format": {"type": "json_object"}})
    assert "%json" in engine.seen[-1].sampling.grammar
    api.responses.create(model="tiny", input="hi", text={"format": {"type": "text"}})
    assert not engine.seen[-1].sampling.grammar


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_there_and_back(api: openai.OpenAI, engine: FakeEngine, choice: Any) -> None:
    engine.script = says(CALL)
    said: list[Any] = [{"role": "user", "content": "weather in Ulm?"}]
    first = api.responses.create(model="tiny", input=said, tools=[WEATHER], tool_choice=choice)
    call = first.output[0]
    assert call.type == "function_call" and (call.name, json.loads(call.arguments)) == ("weather", {"town": "Ulm"})
    assert first.status == "completed" and first.tools[0].model_dump(exclude_unset=True) == WEATHER
    assert b"<tools weather>" in prompt(engine) and "weather" in engine.seen[-1].sampling.grammar
    engine.script = says("rain")
    said += [item.model_dump() for item in first.output]
    said.append({"type": "function_call_output", "call_id": call.call_id, "output": '{"rain": true}'})
    second = api.responses.create(model="tiny", input=said, tools=[WEATHER])
    assert second.output_text == "rain"
    assert prompt(engine).endswith(b'<user>weather in Ulm?<assistant><tool>{"rain": true}<assistant>')


def test_a_streamed_call(api: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = says("Let me see. " + CALL)
    with api.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    message, call = final.output
    assert message.type == "message" and final.output_text == "Let me see."
    assert call.type == "function_call" and call.parsed_arguments == {"town": "Ulm"}
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert len(parts) > 1 and "".join(parts) == done[0].arguments == call.arguments and done[0].output_index == 1


def test_experts_by_every_way(api: openai.OpenAI, engine: FakeEngine) -> None:
    for way in (
        {"model": "tiny", "extra_body": {"num_experts": 8}},
        {"model": "tiny@k8"},
        {"model": "tiny", "extra_headers": {"X-Num-Experts": "8"}},
        {"model": "tiny", "extra_body": {"experts": {"count": [8, 8, 8]}}},
        {"model": "tiny", "extra_body": {"extra_body": {"num_experts": 8, "top_k": 3}}},
    ):
        raw = api.responses.with_raw_response.create(input="hi", **way)
        assert raw.headers["x-num-experts"] == "8" and engine.seen[-1].budget.per_layer == (8, 8, 8), way
    assert engine.seen[-1].sampling.top_k == 3
    both: dict[str, Any] = {"num_experts": 2, "extra_body": {"num_experts": 4}}
    with pytest.raises(openai.BadRequestError, match="agree"):
        api.responses.create(model="tiny", input="hi", extra_body=both)
    with pytest.raises(openai.BadRequestError, match="agree"):
        api.responses.create(model="tiny@k8", input="hi", extra_body={"num_experts": 2})
    with pytest.raises(openai.BadRequestError, match="did you mean num_experts"):
        api.responses.create(model="tiny", input="hi", extra_body={"num_expert": 2})
    with pytest.raises(openai.NotFoundError, match="huge"):
        api.responses.create(model="huge", input="hi")


def test_reasoning_are_items_of_their_own(client: TestClient) -> None:
    scripted(client, "<think>Hm, well.</think>\n\nYes. " + CALL)
    answer = post(client, tools=[WEATHER], **SCORES)
    reasoning, message, call = answer["output"]
    assert reasoning["type"] == "reasoning" and reasoning["content"] == [
        {"type": "reasoning_text", "text": "Hm, well."}
    ]
    assert message["content"][0]["text"] == "Yes." and call["name"] == "weather"
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == list("Yes.")
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    events = streamed(client, tools=[WEATHER], **SCORES)
    assert "".join(event["delta"] for event in only(events, "reasoning_text.delta")) == "Hm, well."
    assert [event["item"]["type"] for event in only(events, "output_item.added")] == [
        "reasoning",
        "message",
        "function_call",
    ]
    scripted(client, "never told")
    post(client, input=[{"role": "user", "content": "hi"}, *answer["output"]])


def shape(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what no two answers share."""
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in output]


def rebuilt(events: list[dict[str, Any]]) -> list[tuple[str, str, list[Any]]]:
    """Kind, text and log-probabilities of every item, from deltas alone."""
    built: dict[int, tuple[str, str, list[Any]]] = {}
    for event in events:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(built)
            built[event["output_index"]] = (event["item"]["type"], "", [])
        elif event["type"].endswith(".delta"):
            kind, text, scores = built[event["output_index"]]
            built[event["output_index"]] = (kind, text + event["delta"], scores + event.get("logprobs", []))
    return list(built.values())


def written(item: dict[str, Any]) -> tuple[str, str, list[Any]]:
    if item["type"] == "function_call":
        return item["type"], item["arguments"], []
    (part,) = item["content"]
    return item["type"], part["text"], part.get("logprobs", [])


PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", CALL, "<tool_call>", "a", "b €", "😀", "\n", " ", "<", "</tool_call>"]),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@example(parts=[CALL, "<think>", "\n", "</tool_call>", "a"], stop=[], limit=95, tools=True)
@given(
    parts=PARTS,
    stop=st.lists(st.text("ab€😀\n", min_size=1, max_size=3), max_size=2),
    limit=st.integers(1, 120),
    tools=st.booleans(),
)
def test_streamed_and_whole_agree(
    client: TestClient, parts: list[str], stop: list[str], limit: int, tools: bool
) -> None:
    scripted(client, "".join(parts))
    body = {"stop": stop, "max_output_tokens": limit, "tools": [WEATHER] if tools else [], **SCORES}
    whole, events = post(client, **body), streamed(client, **body)
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}" and whole["output"]
    assert shape(last["output"]) == shape(whole["output"])
    assert [event["item"] for event in only(events, "output_item.done")] == last["output"]
    assert rebuilt(events) == [written(item) for item in last["output"]]
    assert (whole["status"] == "incomplete") == (whole["incomplete_details"] is not None)
    assert {name: whole["usage"][name] for name in ("output_tokens", "num_experts")} == {
        name: last["usage"][name] for name in ("output_tokens", "num_experts")
    }
    for kind, text, scores in rebuilt(events):
        if kind == "message" and "�" not in text:
            shown = b"".join(bytes(entry["bytes"]) for entry in scores).decode()
            # where the beginning of a delimiter comes twice, which of them has been shown cannot be seen
            assert shown == text or text.count("<") > 1


def test_a_late_refusal_is_renamed_too() -> None:
    engine = FakeEngine()
    engine.fail_at["-0"] = (3, InvalidRequest("the grammar cannot go on", "grammar", "invalid_grammar"))
    with in_memory(engine) as client:
        last = streamed(client, text={"format": {"type": "json_object"}})[-1]
    assert (last["type"], last["code"], last["param"]) == ("error", "invalid_grammar", "text.format")


def test_unknown_fields_pass_and_are_counted() -> None:
    with in_memory() as client:
        post(client, prompt_cache_key="x", service_tier="auto", store=True, include=["reasoning.encrypted_content"])
        assert value(service_of(client), "request_unknown_fields_total") == 2


def test_every_request_ends_once() -> None:
    with in_memory() as client:
        post(client)
        streamed(client)
        client.post(RESPONSES, json={"input": "hi", "n": 3})
        assert ended(service_of(client)) == 3


def test_a_failure_after_the_first_byte() -> None:
    engine = FakeEngine()
    engine.fail_at["-0"] = (3, GenerationFailed("the engine fell over"))
    with on_loopback(engine) as (url, _):
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        events = list(api.responses.create(model="tiny", input="hi", stream=True))
        with pytest.raises(openai.InternalServerError, match="fell over"):
            api.responses.create(model="tiny", input="hi")
    last = events[-1]
    assert last.type == "error" and (last.code, last.message) == ("generation_failed", "the engine fell over")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    EVENT.validate_python(last.model_dump(), strict=True)
    assert not any(event.type == "response.completed" for event in events)
