"""/v1/messages and /v1/messages/count_tokens: Claude Code's recorded requests replayed, blocks, events, refusals."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from model.errors import GenerationFailed, InvalidRequest
from server.dialects.hermes import Hermes
from server.dialects.reasoning import ReasoningTags
from server.formats.base import arguments_object
from server.schemas.message_object import MessageEvent, MessageObject, MessagesError
from tests.server.fakes import INFO, FakeEngine, says
from tests.server.harness import frames, in_memory, key_file, service_of, value
from tests.server.recorded import recorded

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
QUOTA, TITLE, COUNTED, FIRST, SECOND = recorded("claude_code")
USER = [{"role": "user", "content": "hi"}]
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": USER}
WEATHER = {"name": "weather", "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
BASH = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>'


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = FakeEngine()
    engine.info = replace(INFO, max_model_len=2048)
    with in_memory(engine) as client:
        service_of(client).dialect = Hermes({}, ReasoningTags())
        yield client


def engine_of(client: TestClient) -> FakeEngine:
    engine = service_of(client).engine
    assert isinstance(engine, FakeEngine)
    return engine


def scripted(client: TestClient, text: str) -> None:
    engine_of(client).script = says(text)


def prompt(client: TestClient) -> str:
    return bytes(engine_of(client).seen[-1].prompt).decode()


def post(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(MESSAGES, json=ASK | body)
    assert response.status_code == 200, response.text
    MessageObject.model_validate(response.json(), strict=True)
    return dict(response.json())


def events_of(text: str) -> list[dict[str, Any]]:
    events = [json.loads(frame) for frame in frames(text)]
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events] and text.endswith("}\n\n")
    for event in events:
        MessageEvent.model_validate(event)
    return events


def streamed(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post(MESSAGES, json=ASK | {"stream": True} | body)
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    return events_of(response.text)


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content of a message, from its events as a client puts them together."""
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            texts.append("")
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            delta = event["delta"]
            kind = blocks[-1]["type"]
            assert delta["type"] == {"tool_use": "input_json_delta"}.get(kind, f"{kind}_delta")
            texts[-1] += delta["partial_json" if kind == "tool_use" else kind]
            blocks[-1]["input" if kind == "tool_use" else kind] = texts[-1]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = arguments_object(block["input"] or "")
    return blocks


def replay(client: TestClient, request: dict[str, Any], answer: str) -> Any:
    scripted(client, answer)
    response = client.post(request["path"], headers=request["headers"], content=json.dumps(request["body"]))
    assert response.status_code == 200, response.text
    return response


def test_claude_code_asks_for_its_quota_and_a_title(client: TestClient) -> None:
    assert replay(client, QUOTA, "hello").json()["stop_reason"] == "max_tokens"
    response = replay(client, TITLE, '{"title": "Counting stories"}')
    assert rebuilt(events_of(response.text)) == [{"type": "text", "text": '{"title": "Counting stories"}'}]
    assert '"title"' in engine_of(client).seen[-1].sampling.grammar.replace("\\", "")
    assert prompt(client).startswith("<enable_thinking=False><system>Find a title"), "no line that bills"
    assert response.headers["x-num-experts"] == "1"


def test_claude_code_counts_tokens(client: TestClient) -> None:
    counted = replay(client, COUNTED, "").json()["input_tokens"]
    body = {key: FIRST["body"][key] for key in ("model", "messages", "system", "tools")}
    assert counted == post(client, **body)["usage"]["input_tokens"] == len(prompt(client))


def test_claude_code_has_a_turn_that_ends_with_a_call(client: TestClient) -> None:
    response = replay(client, FIRST, f"<think>Files.</think>I look. {BASH}")
    events = events_of(response.text)
    thinking, text, call = rebuilt(events)
    assert thinking == {"type": "thinking", "thinking": "Files.", "signature": ""} and text["text"] == "I look."
    assert (call["name"], call["input"]) == ("Bash", {"command": "ls"}) and call["id"].startswith("toolu_")
    assert [event["type"] for event in events[:3]] == ["message_start", "ping", "content_block_start"]
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["num_experts"] == 2 == int(response.headers["x-num-experts"])
    assert events[-2]["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    assert response.headers["x-skipped-tools"] == "web_search_20250305:web_search"
    assert response.headers["x-ignored-fields"] == "context_management"
    assert "<tools Bash Read TodoWrite mcp__notes__list_notes>" in prompt(client)
    assert "<reasoning_effort=medium><enable_thinking=True>" in prompt(client)
    assert engine_of(client).seen[-1].sampling.max_tokens == 2048 - len(prompt(client)), "32,000 do not fit"


def test_claude_code_brings_the_results(client: TestClient) -> None:
    told: list[list[dict[str, Any]]] = []
    chat: Any = service_of(client).chat
    render = chat.render
    chat.render = lambda messages, *rest: told.append(messages) or render(messages, *rest)
    try:
        response = replay(client, SECOND, "There are 12.")
    finally:
        del chat.render
    assert rebuilt(events_of(response.text)) == [{"type": "text", "text": "There are 12."}]
    system, user, assistant, one, other, last = told[0]
    assert system["content"] == "You help with a repository.\nUse the tools. Keep answers short."
    assert user["content"].endswith("</system-reminder>\nHow many stories are there?")
    assert (assistant["content"], assistant["reasoning_content"]) == ("I look at the folder.", "I count files.")
    calls = [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in assistant["tool_calls"]]
    assert calls == [
        ("toolu_1", "Bash", {"command": "ls stories | wc -l"}),
        ("toolu_2", "Read", {"file_path": "/home/user/stories/0.txt"}),
    ]
    assert one == {"role": "tool", "content": "12", "tool_call_id": "toolu_1"}
    assert other == {"role": "tool", "content": "Error: File does not exist.", "tool_call_id": "toolu_2"}
    assert last == {"role": "user", "content": "Answer in one sentence."}


@pytest.mark.parametrize(
    ("fields", "stop", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 5}, "max_tokens", None),
        ({"stop_sequences": ["wor"]}, "stop_sequence", "wor"),
    ],
)
def test_why_an_answer_ends(client: TestClient, fields: dict[str, Any], stop: str, sequence: str | None) -> None:
    scripted(client, "hello world")
    whole, events = post(client, **fields), streamed(client, **fields)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (stop, sequence)
    assert events[-2]["delta"] == {"stop_reason": stop, "stop_sequence": sequence}
    assert rebuilt(events) == whole["content"] == [{"type": "text", "text": whole["content"][0]["text"]}]


def test_an_answer_that_fills_the_context_says_so() -> None:
    with in_memory(FakeEngine(says("x" * 300))) as client:
        body = ASK | {"max_tokens": 10_000}
        assert client.post(MESSAGES, json=body).json()["stop_reason"] == "model_context_window_exceeded"
        long = client.post(MESSAGES, json=body | {"messages": [{"role": "user", "content": "x" * 300}]})
    error = long.json()["error"]
    assert long.status_code == 400 and error["message"].startswith("prompt is too long: This model's maximum context")
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        "messages",
        "context_length_exceeded",
    )


def test_the_last_message_of_the_assistant_is_continued(client: TestClient) -> None:
    scripted(client, "Tom.")
    said = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "The cat is called"}]}]
    assert post(client, messages=said)["content"] == [{"type": "text", "text": "Tom."}]
    assert prompt(client).endswith("<user>hi<assistant>The cat is called")


def test_what_cannot_be_continued_is_refused_in_the_apis_own_words(client: TestClient) -> None:
    called = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    for blocks in ([], [{"type": "text", "text": " "}], [{"type": "text", "text": "x"}, called]):
        answer = client.post(MESSAGES, json=ASK | {"messages": [*USER, {"role": "assistant", "content": blocks}]})
        error = MessagesError.model_validate(answer.json()).error
        assert (answer.status_code, error.param) == (400, "messages"), answer.text
        assert error.message.startswith("messages: the last one is the assistant's")


def test_turns_of_one_role_are_one(client: TestClient) -> None:
    post(client, messages=[*USER, {"role": "user", "content": [{"type": "text", "text": "you"}]}], system="be brief")
    assert prompt(client) == "<system>be brief<user>hi\nyou<assistant>"
    post(client, messages=[*USER, {"role": "system", "content": "in French"}, *USER])
    assert prompt(client) == "<user>hi<system>in French<user>hi<assistant>"
    post(client, messages=[{"role": "user", "content": []}], system=[])
    assert prompt(client) == "<user><assistant>"


@pytest.mark.parametrize(
    ("choice", "grammar"),
    [({"type": "any"}, True), ({"type": "tool", "name": "weather"}, True), ({"type": "auto"}, False), (None, False)],
)
def test_a_choice_of_tools(client: TestClient, choice: Any, grammar: bool) -> None:
    scripted(client, CALL)
    answer = post(client, tools=[WEATHER], tool_choice=choice)
    assert answer["stop_reason"] == "tool_use" and answer["content"][0]["input"] == {"town": "Ulm"}
    assert bool(engine_of(client).seen[-1].sampling.grammar) == grammar
    none = post(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert none["stop_reason"] == "end_turn" and "tools" not in prompt(client)
    scripted(client, CALL + CALL)
    assert len(post(client, tools=[WEATHER])["content"]) == 2
    one = post(client, tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert len(one["content"]) == 1
    named = client.post(MESSAGES, json=ASK | {"tools": [WEATHER], "tool_choice": {"type": "auto", "name": "weather"}})
    assert named.headers["x-ignored-fields"] == "tool_choice.name"


def test_fields_that_are_the_servers_own_are_not_read(client: TestClient) -> None:
    answer = client.post(MESSAGES, json=ASK | {"most_tokens": 1})
    assert answer.headers["x-ignored-fields"] == "most_tokens"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1, {"b": "c', {"a": [1, {"b": "c"}]}),
        ("", {}),
        ("[1]", {"arguments": [1]}),
        ("no JSON", {"arguments": "no JSON"}),
        ('{"a": 123456789012345678901234567890}', {"arguments": '{"a": 123456789012345678901234567890}'}),
        ('{"a": NaN}', {"arguments": '{"a": NaN}'}),
        ('{"a":' * 500, {"arguments": '{"a":' * 500}),
    ],
)
def test_arguments_are_an_object_whatever_was_written(text: str, expected: dict[str, Any]) -> None:
    assert arguments_object(text) == expected


def test_experts_by_every_way(client: TestClient) -> None:
    for fields, headers in (
        ({"model": "tiny@k8"}, {}),
        ({"num_experts": 8}, {}),
        ({"experts": {"count": [8, 8, 8]}}, {}),
        ({"extra_body": {"num_experts": 8}}, {}),
        ({}, {"X-Num-Experts": "8"}),
    ):
        response = client.post(MESSAGES, json=ASK | fields, headers=headers)
        assert response.headers["x-num-experts"] == "8" and response.json()["usage"]["num_experts"] == 8
    both = client.post(MESSAGES, json=ASK | {"model": "tiny@k8", "num_experts": 2})
    assert both.status_code == 400 and "agree" in both.json()["error"]["message"]
    assert client.post(MESSAGES, json=ASK | {"num_expert": 2}).json()["error"]["param"] == "num_expert"
    assert client.post(COUNT, json=ASK | {"model": "tiny@k99"}).json()["error"]["type"] == "not_found_error"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "'image'"),
        (
            {"messages": [{"role": "user", "content": [RESULT | {"content": [IMAGE]}]}]},
            "messages[0].content[0].content[0].type",
            "'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}, *USER]}, "messages[0].content[0]", "tool_result"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": USER, "system": [IMAGE]}, "system[0].type", "'image'"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "0"),
        ({"messages": USER, "max_tokens": None}, "max_tokens", "required"),
        ({"messages": USER, "stop": ["x"]}, "stop", "stop_sequences"),
        ({"messages": USER, "stop_sequences": [""]}, "stop_sequences[0]", "empty"),
        ({"messages": USER, "tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
        ({"messages": USER, "tool_choice": {"type": "tool"}}, "tool_choice.name", "needs a name"),
        ({"messages": USER, "tools": [{"name": "f"}]}, "tools[0].input_schema", "required"),
        ({"messages": USER, "mcp_servers": [{"url": "http://x"}]}, "mcp_servers", "not supported"),
        ({"messages": USER, "temperature": -1}, "temperature", "-1"),
        ({"messages": USER, "n": 2}, "n", "not supported"),
    ],
)
def test_refusals_have_anthropics_shape(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    before = value(service_of(client), "requests_rejected_total")
    response = client.post(MESSAGES, json=ASK | fields)
    error = MessagesError.model_validate(response.json(), strict=True).error
    assert response.status_code == 400 and error.type == "invalid_request_error", response.text
    assert error.param == param and words in error.message, response.text
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert value(service_of(client), "requests_rejected_total") == before + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_schema_that_cannot_be_used_names_its_field(client: TestClient, stream: bool) -> None:
    schema = {"type": "string", "pattern": "/refused/"}
    body = ASK | {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "stream": stream}
    response = client.post(MESSAGES, json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "output_config.format", response.text


def test_redacted_thoughts_and_unread_fields_are_named(client: TestClient) -> None:
    thought = {"type": "redacted_thinking", "data": "xyz"}
    said = [*USER, {"role": "assistant", "content": [thought, {"type": "text", "text": "yes", "odd": 1}]}, *USER]
    response = client.post(MESSAGES, json=ASK | {"messages": said, "thinking": {"type": "enabled", "budget_tokens": 9}})
    names = {"thinking.budget_tokens", "messages[].content[].odd", "messages[].content[].redacted_thinking"}
    assert set(response.headers["x-ignored-fields"].split(", ")) == names
    chat: Any = service_of(client).chat
    chat.knows_thinking = False
    try:
        asked = client.post(COUNT, json=ASK | {"thinking": {"type": "adaptive"}})
        off = client.post(COUNT, json=ASK | {"thinking": {"type": "disabled"}})
    finally:
        chat.knows_thinking = True
    assert "thinking" in asked.headers["x-ignored-fields"].split(", ")
    assert "thinking" not in off.headers.get("x-ignored-fields", "").split(", ")


def test_failures_before_and_within_a_stream(client: TestClient) -> None:
    engine = engine_of(client)
    scripted(client, "hello")
    for after, error, kind in ((0, GenerationFailed("it broke"), "api_error"), (2, "it broke", "api_error")):
        engine.fail_at = {"-0": (after, error)}
        response = client.post(MESSAGES, json=ASK | {"stream": True})
        last = response.json() if after == 0 else events_of(response.text)[-1]
        assert last["error"]["type"] == kind and last["type"] == "error", last
        assert response.status_code == (500 if after == 0 else 200)
    engine.fail_at = {"-0": (1, InvalidRequest("stop[0] is odd", "stop[0]"))}
    last = events_of(client.post(MESSAGES, json=ASK | {"stream": True}).text)[-1]
    assert last["error"]["param"] == "stop_sequences[0]"
    engine.fail_at = {}


def test_refusals_outside_of_the_route_have_the_same_shape(tmp_path: Any) -> None:
    keys = key_file(tmp_path, '[a]\nkey = "right"\nrequests_per_minute = 1\n')
    with in_memory(api_keys_file=keys, max_header_fields=40) as client:
        wrong = client.post(MESSAGES, json=ASK, headers={"x-api-key": "wrong"})
        right = client.post(MESSAGES, json=ASK, headers={"x-api-key": "right", "anthropic-version": "2023-06-01"})
        again = client.post(MESSAGES, json=ASK, headers={"authorization": "Bearer right"})
        method = client.get(MESSAGES, headers={"x-api-key": "right"})
        path = client.post(MESSAGES + "/batches", headers={"x-api-key": "right"})
        many = client.post(COUNT, headers={"x-api-key": "right"} | {f"x-{i}": "" for i in range(50)})
    assert right.status_code == 200
    for response, status, kind in (
        (wrong, 401, "authentication_error"),
        (again, 429, "rate_limit_error"),
        (method, 405, "invalid_request_error"),
        (path, 429, "rate_limit_error"),
        (many, 429, "rate_limit_error"),
    ):
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind), response.text
        MessagesError.model_validate(response.json(), strict=True)


PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", CALL, "<tool_call>", "a", "b €", "😀", "\n", " ", "<", "</tool_call>"]),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(parts=PARTS, stop=st.lists(st.text("ab€\n", min_size=1, max_size=3), max_size=2), limit=st.integers(1, 120))
def test_streamed_and_whole_agree(client: TestClient, parts: list[str], stop: list[str], limit: int) -> None:
    scripted(client, "".join(parts))
    body = {"stop_sequences": stop, "max_tokens": limit, "tools": [WEATHER]}
    whole, events = post(client, **body), streamed(client, **body)
    unnamed = [[{**block, "id": None} for block in blocks] for blocks in (rebuilt(events), whole["content"])]
    assert unnamed[0] == unnamed[1]
    assert events[-2]["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
    same = ("input_tokens", "output_tokens", "num_experts")
    assert [events[-2]["usage"][key] for key in same] == [whole["usage"][key] for key in same]
    begun = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert begun == [event["index"] for event in events if event["type"] == "content_block_stop"]
