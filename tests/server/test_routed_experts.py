"""`return_routed_experts`: routes on the last chunk and in each choice, and what is refused, by name."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from engine.types import MAX_ROUTED_TOKENS
from server.dialects.hermes import Hermes
from server.dialects.reasoning import ReasoningTags
from server.schemas.answers import ChatCompletion, Completion
from server.schemas.response_object import ResponseObject
from tests.server.fakes import INFO, ROUTES, FakeEngine, says
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory, service_of

RESPONSES = "/v1/responses"
USER: Any = [{"role": "user", "content": "hi"}]
BODIES: Any = [
    (COMPLETIONS, {"prompt": "hi", "max_tokens": 16}),
    (CHAT, {"messages": USER, "max_tokens": 16}),
    (RESPONSES, {"input": "hi", "max_output_tokens": 16}),
]
FIELD = "return_routed_experts"
EXPECTED = {
    "shape": [2, 3, 4],
    "dtype": "uint8",
    "bits": False,
    "first": 2,
    "data": base64.b64encode(ROUTES.data).decode(),
}
ANSWERS: dict[str, type[BaseModel]] = {COMPLETIONS: Completion, CHAT: ChatCompletion, RESPONSES: ResponseObject}
every = pytest.mark.parametrize(("path", "body"), BODIES)


def allowed(engine: FakeEngine | None = None, **settings: Any) -> Any:
    return in_memory(engine or FakeEngine(says("abc")), return_routed_experts=True, **settings)


def message_of(client: TestClient, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """Field and message of a refusal."""
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


@every
def test_a_whole_answer_has_them(path: str, body: dict[str, Any]) -> None:
    with allowed() as client:
        answer = client.post(path, json=body | {FIELD: True}).json()
        without = client.post(path, json=body).json()
    ANSWERS[path].model_validate(answer)
    found = answer if path == RESPONSES else answer["choices"][0]
    assert found["routed_experts"] == EXPECTED
    assert "routed_experts" not in (without if path == RESPONSES else without["choices"][0])


@every
def test_a_stream_has_them_in_its_last_event_and_nowhere_else(path: str, body: dict[str, Any]) -> None:
    with allowed() as client:
        text = client.post(path, json=body | {FIELD: True, "stream": True}).text
    events = [json.loads(frame) for frame in frames(text) if frame != "[DONE]"]
    ended = events[-1]["response"] if path == RESPONSES else events[-1]["choices"][0]
    assert ended["routed_experts"] == EXPECTED
    assert text.count('"routed_experts"') == 1


def test_each_choice_has_its_own_and_a_score_has_them_too() -> None:
    with allowed() as client:
        several = client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2, "max_tokens": 4, FIELD: True}).json()
        scored = client.post(COMPLETIONS, json={"prompt": "hi", "echo": True, "max_tokens": 0, FIELD: True}).json()
    assert [choice["routed_experts"] for choice in several["choices"]] == [EXPECTED] * 4
    assert scored["choices"][0]["routed_experts"] == EXPECTED


@every
def test_the_operator_must_allow_them(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        field, message = message_of(client, path, body | {FIELD: True})
        assert client.post(path, json=body | {FIELD: False}).status_code == 200
    assert field == FIELD and "--return-routed-experts" in message
    assert [request.return_routes for request in engine.seen] == [False]


def test_more_tokens_than_are_returned_are_refused_before_they_run() -> None:
    engine = FakeEngine()
    engine.info = replace(INFO, max_model_len=4096)
    with allowed(engine) as client:
        most = MAX_ROUTED_TOKENS - 2
        field, message = message_of(client, COMPLETIONS, {"prompt": "hi", "max_tokens": most + 1, FIELD: True})
        assert field == FIELD and str(MAX_ROUTED_TOKENS) in message and f"got {MAX_ROUTED_TOKENS + 1}" in message
        field, _ = message_of(client, COMPLETIONS, {"prompt": "hi", "max_tokens": most // 2 + 1, "n": 2, FIELD: True})
        assert field == FIELD
        assert message_of(client, CHAT, {"messages": USER, FIELD: True})[0] == FIELD, "max_tokens is all the context"
        assert engine.seen == []
        assert client.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": most, FIELD: True}).status_code == 200


@every
def test_what_ends_an_answer_before_the_engine_does_is_refused(path: str, body: dict[str, Any]) -> None:
    with allowed() as client:
        assert message_of(client, path, body | {FIELD: True, "stop": ["x"]})[0] == "stop"


def test_a_single_call_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    body = {"messages": USER, "max_tokens": 16, "tools": [tool], FIELD: True}
    with allowed() as client:
        service_of(client).dialect = Hermes({}, ReasoningTags())
        assert client.post(CHAT, json=body).status_code == 200
        assert message_of(client, CHAT, body | {"parallel_tool_calls": False})[0] == FIELD
