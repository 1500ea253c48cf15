"""What an answer must match, and which calls it may make, under every name that clients send.

The engine is a fake: the grammar that reaches it is looked at, and asked which texts it allows.
"""

import json
import re
from typing import Any

import pytest

from server.dialects.detect import dialect_named
from tests.server.fakes import FakeEngine, says
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory, service_of, value

RESPONSES = "/v1/responses"
USER: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
SUB: Any = {"type": "function", "function": {"name": "sub", "parameters": PARAMETERS}}
FLAT_ADD, FLAT_SUB = ({"type": "function"} | tool["function"] for tool in (ADD, SUB))
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("format", ["json_object", "json_schema"])
def test_a_forced_call_wins_over_a_format(choice: Any, format: str) -> None:
    schema = {"json_schema": {"name": "n", "schema": {"enum": [7]}}} if format == "json_schema" else {}
    body = {"messages": USER, "tools": [ADD], "tool_choice": choice, "response_format": {"type": format, **schema}}
    flat = {"type": format, **schema.get("json_schema", {})}
    chosen = choice if isinstance(choice, str) else {"type": "function", "name": "add"}
    same = {"input": "hi", "tools": [FLAT_ADD], "tool_choice": chosen, "text": {"format": flat}}
    engine = FakeEngine()
    with in_memory(engine) as client:
        assert client.post(CHAT, json=body).status_code == 200
        assert client.post(RESPONSES, json=same).status_code == 200
        del body["response_format"], same["text"]
        client.post(CHAT, json=body)
        client.post(RESPONSES, json=same)
    assert len({request.sampling.grammar for request in engine.seen}) == 1, "as if there were no format"
    assert "add" in engine.seen[0].sampling.grammar


def test_a_format_that_cannot_be_used_is_refused_where_it_waits() -> None:
    with in_memory() as client:
        body = {"messages": USER, "tools": [ADD], "tool_choice": "required"}
        for fields in ({"response_format": {"type": "json_schema"}}, {"guided_regex": "a"}):
            refused = client.post(CHAT, json=body | fields)
            assert refused.status_code == 400 and next(iter(fields)) in refused.json()["error"]["message"]


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def streamed(text: str) -> tuple[str, list[str], str]:
    """Content, arguments of calls and the finish reason of a chat's events."""
    content, calls, finish = "", [], ""
    for frame in frames(text)[:-1]:
        (choice,) = json.loads(frame)["choices"]
        content += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                calls.append("")
            calls[-1] += call["function"]["arguments"]
        finish = choice["finish_reason"] or finish
    return content, calls, finish


def whole(answer: dict[str, Any]) -> tuple[str, list[str], str]:
    (choice,) = answer["choices"]
    calls = [call["function"]["arguments"] for call in choice["message"].get("tool_calls", [])]
    return choice["message"]["content"] or "", calls, choice["finish_reason"]


@pytest.mark.parametrize("said", [f"Well. {CALL}", "Well."])
def test_no_limit_shows_markup_of_a_free_answer(said: str) -> None:
    with in_memory(FakeEngine(says(said))) as client:
        service_of(client).dialect = dialect_named("hermes", {})
        body: dict[str, Any] = {"messages": USER, "tools": [ADD]}
        for most in range(1, len(said) + 1):
            content, calls, finish = whole(client.post(CHAT, json=body | {"max_tokens": most}).json())
            events = client.post(CHAT, json=body | {"max_tokens": most, "stream": True}).text
            assert streamed(events) == (content, calls, finish)
            assert "Well. ".startswith(content) and finish == "length"
            assert all('{"a": 1}'.startswith(call) for call in calls)


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_first_one_ends_a_free_answer(stream: bool) -> None:
    engine = FakeEngine(says(f"Well. {CALL}\n{CALL}\nThat is all."))
    engine.together = 4
    with in_memory(engine) as client:
        service_of(client).dialect = dialect_named("hermes", {})
        body = {"messages": USER, "tools": [ADD], "stream": stream}
        response = client.post(CHAT, json=body | {"parallel_tool_calls": False})
        found = streamed(response.text) if stream else whole(response.json())
        several = client.post(CHAT, json=body)
        assert found == ("Well.", ['{"a": 1}'], "tool_calls")
        assert (streamed(several.text) if stream else whole(several.json()))[1] == ['{"a": 1}'] * 2
        assert len(engine.aborted) == 1, "the engine writes no more of it"
        if not stream:
            ended = f"Well. {CALL}".index("}}") + 2
            assert response.json()["usage"]["completion_tokens"] == ended


SEVEN: dict[str, Any] = {"enum": [7]}
GBNF = 'root ::= "x" "y"'
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object", "schema": SEVEN}}, '"enum": [7]'),
    ({"response_format": {"type": "json_object", "schema": {}}}, '"type": "object"'),
    ({"response_format": {"type": "json_schema", "schema": SEVEN}}, '"enum": [7]'),
    ({"regex": "a+b"}, "/a+b/"),
    ({"ebnf": GBNF}, '\\"x\\" \\"y\\"'),
    ({"grammar": GBNF}, '\\"x\\" \\"y\\"'),
    ({"json_schema": json.dumps(SEVEN)}, '"enum": [7]'),
    ({"json_schema": SEVEN}, '"enum": [7]'),
    ({"format": "json"}, '"type": "object"'),
    ({"format": SEVEN}, '"enum": [7]'),
    ({"format": "", "grammar": "", "regex": "a+b"}, "/a+b/"),
    ({"guided_json": SEVEN, "guided_whitespace_pattern": "[ ]?"}, '{"whitespace_pattern": "[ ]?"}'),
    ({"structured_outputs": {"json": SEVEN, "whitespace_pattern": ""}}, '{"whitespace_pattern": ""}'),
    ({"structured_outputs": {"json": SEVEN, "disable_any_whitespace": True, "disable_fallback": True}}, "[7]"),
    ({"guided_json": SEVEN, "guided_decoding_backend": "outlines"}, '"enum": [7]'),
]


@pytest.mark.parametrize(("fields", "part"), OTHERS)
def test_other_servers_names_are_honoured(fields: dict[str, Any], part: str) -> None:
    engine = FakeEngine()
    bodies: list[tuple[str, dict[str, Any]]] = [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": USER})]
    bodies += [] if "response_format" in fields else [(RESPONSES, {"input": "hi"})]
    with in_memory(engine) as client:
        for path, body in bodies:
            response = client.post(path, json=body | fields)
            assert response.status_code == 200, response.text
        unknown = value(service_of(client), "request_unknown_fields_total")
    assert len(engine.seen) == len(bodies)
    assert all(part in request.sampling.grammar for request in engine.seen), engine.seen[-1].sampling.grammar
    assert unknown == ("guided_decoding_backend" in fields) * len(bodies), "every other field is read"


FORMATS: list[tuple[dict[str, Any], str]] = [
    ({"type": "structural_tag", "structures": []}, "structural_tag"),
    ({"type": "grammar", "grammar": GBNF}, "'grammar'"),
    ({"type": "json_schema", "schema": SEVEN, "json_schema": {"name": "n", "schema": SEVEN}}, "give one"),
    ({"type": "json_object", "json_schema": {"name": "n", "schema": SEVEN}}, "json_object"),
    ({"type": "text", "schema": SEVEN}, "text"),
    ({"type": "json_schema"}, "missing"),
    ({"type": "json_schema", "json_schema": {"type": "object", "properties": {}}}, "schema belongs into"),
]
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(({"response_format": format}, ("response_format", word)) for format, word in FORMATS),
    ({"structural_tag": "{}"}, ("structural_tag",)),
    ({"structured_outputs": {"structural_tag": "{}"}}, ("structural_tag",)),
    ({"grammar_lazy": True}, ("grammar_lazy",)),
    ({"format": "xml"}, ("format", "xml")),
    ({"regex": ""}, ("regex", "empty")),
    ({"regex": "a", "ebnf": GBNF}, ("regex", "ebnf")),
    ({"grammar": GBNF, "format": "json"}, ("grammar", "format")),
    ({"json_schema": "{}", "guided_json": {}}, ("json_schema", "guided_json")),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, ("structured_outputs", "got json and regex")),
    ({"structured_outputs": {"whitespace_pattern": ""}}, ("structured_outputs", "json")),
    ({"json_schema": "{"}, ("json_schema", "no JSON")),
    ({"grammar": {"type": "json", "value": {}}}, ("grammar",)),
    ({"regex": "a", "response_format": {"type": "json_object"}}, ("regex", "response_format")),
    ({"guided_whitespace_pattern": " ?"}, ("guided_whitespace_pattern", "schema")),
    ({"guided_whitespace_pattern": " ?", "regex": "a"}, ("guided_whitespace_pattern", "schema")),
    ({"regex": "a" * 65537}, ("regex", "65536", "65537")),
    ({"format": {"enum": ["a" * 65537]}}, ("format", "65536")),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_what_cannot_be_held_is_refused_by_name(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with in_memory() as client:
        for path, body in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": USER})):
            response = client.post(path, json=body | fields)
            assert response.status_code == 400, (path, response.text)
            assert all(word in response.json()["error"]["message"] for word in words), response.text


def test_a_response_repeats_the_schema_of_an_object() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        answer = client.post(
            RESPONSES, json={"input": "hi", "text": {"format": {"type": "json_object", "schema": SEVEN}}}
        )
        assert answer.json()["text"]["format"] == {"type": "json_object", "schema": SEVEN}
        assert client.post(RESPONSES, json={"input": "hi"}).json()["text"]["format"] == {"type": "text"}
        for fields, words in (({"text": {"format": {"type": "text", "schema": SEVEN}}}, "text.format.schema"),):
            refused = client.post(RESPONSES, json={"input": "hi"} | fields)
            assert refused.status_code == 400 and words in refused.json()["error"]["message"]
    assert '"enum": [7]' in engine.seen[0].sampling.grammar and not engine.seen[1].sampling.grammar


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPENED = {**OBJECT, "additionalProperties": True}
CLOSED = '"additionalProperties": false'
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": OBJECT}}
FORCED = {"tools": [ADD], "tool_choice": "required"}
CLOSINGS: list[tuple[dict[str, Any], str, bool]] = [
    ({"response_format": SCHEMA_FORMAT}, "closed", True),
    ({"response_format": SCHEMA_FORMAT}, "open", False),
    (FORCED, "closed", True),
    (FORCED, "open", False),
    ({"guided_json": OPENED}, "closed", False),
    ({"json_schema": json.dumps(OBJECT)}, "closed", True),
    ({"structured_outputs": {"json": OBJECT}}, "closed", True),
    ({"structured_outputs": {"json": OBJECT, "disable_additional_properties": False}}, "closed", False),
    ({"structured_outputs": {"json": OBJECT, "disable_additional_properties": True}}, "open", True),
]


@pytest.mark.parametrize(("fields", "setting", "closed"), CLOSINGS)
def test_objects_are_closed_unless_the_schema_the_request_or_the_server_opens_them(
    fields: dict[str, Any], setting: str, closed: bool
) -> None:
    engine = FakeEngine()
    with in_memory(engine, schema_objects=setting) as client:
        assert client.post(CHAT, json={"messages": USER} | fields).status_code == 200
    assert (CLOSED in engine.seen[0].sampling.grammar) == closed


def test_what_cannot_be_closed_is_refused_by_its_field() -> None:
    links = {f"d{i}": {"properties": {"a": {}}, "allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(99)}
    schema = {"type": "object", "$defs": links, "properties": {"a": {"$ref": "#/$defs/d0"}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    with in_memory() as client:
        for field, fields in (("guided_json", {"guided_json": schema}), ("tools", FORCED | {"tools": [tool]})):
            error = client.post(CHAT, json={"messages": USER} | fields).json()["error"]
            assert error["param"] == field and "at most 64 references" in error["message"]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def flat_allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}


def asked_both(mode: str, *names: str, **more: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (CHAT, {"messages": USER, "tools": [ADD, SUB], "tool_choice": allowed(mode, *names)} | more),
        (RESPONSES, {"input": "hi", "tools": [FLAT_ADD, FLAT_SUB], "tool_choice": flat_allowed(mode, *names)} | more),
    ]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_can_be_called_and_all_are_told(mode: str) -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        service_of(client).dialect = dialect_named("hermes", {})
        for path, body in asked_both(mode, "sub"):
            assert client.post(path, json=body).status_code == 200
        named = {"tool_choice": "required", "tools": [SUB], "messages": USER}
        client.post(CHAT, json=named)
    first, second, only = (request.sampling.grammar for request in engine.seen)
    assert first == second and "sub" in first and not re.search(r"\badd\b", first)
    assert (first == only) == (mode == "required")
    assert all(b"<tools add sub>" in bytes(request.prompt) for request in engine.seen[:2])
    assert mode == "required" or "MOE_FREE" in first


def test_all_tools_allowed_is_the_same_as_their_mode() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        for path, body in asked_both("auto", "add", "sub"):
            client.post(path, json=body)
        assert [request.sampling.grammar for request in engine.seen] == ["", ""], "the answer is as free as ever"
        for choice in (allowed("required", "sub", "add"), "required"):
            client.post(CHAT, json={"messages": USER, "tools": [ADD, SUB], "tool_choice": choice})
    assert engine.seen[2].sampling.grammar == engine.seen[3].sampling.grammar


def test_allowed_tools_beside_other_fields() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        for path, body in asked_both("required", "add", "sub", parallel_tool_calls=False):
            client.post(path, json=body)
        format = {"response_format": {"type": "json_object"}}
        assert client.post(CHAT, json=asked_both("required", "add")[0][1] | format).status_code == 200
        assert client.post(CHAT, json=asked_both("auto", "add")[0][1] | format).status_code == 200
        echoed = client.post(RESPONSES, json=asked_both("auto", "add")[1][1]).json()["tool_choice"]
        noted = value(service_of(client), "request_unknown_fields_total")
    one, same, waits, either, _ = (request.sampling.grammar for request in engine.seen)
    assert one == same and "moe_call*" not in one and ")*" not in one
    assert "sub" not in waits and "object" in either and "sub" not in either
    assert echoed == flat_allowed("auto", "add") and noted == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": allowed("auto", "mul")}, "tool_choice"),
        ({"tool_choice": allowed("required", "add"), "tools": None}, "tool_choice"),
        ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
        ({"tool_choice": allowed("none", "add")}, "tool_choice.allowed_tools.mode"),
        ({"tool_choice": allowed("auto", *["add"] * 129)}, "tool_choice.allowed_tools.tools"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tool_choice": {"type": "custom", "function": {"name": "add"}}}, "tool_choice.type"),
        ({"tool_choice": 5}, "tool_choice"),
    ],
)
def test_allowed_tools_that_are_refused(change: dict[str, Any], param: str) -> None:
    with in_memory() as client:
        response = client.post(CHAT, json={"messages": USER, "tools": [ADD, SUB]} | change)
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        (flat_allowed("auto", "mul"), "tool_choice"),
        (flat_allowed("auto"), "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, "tool_choice.tools[0].type"),
    ],
)
def test_allowed_tools_that_a_response_refuses(choice: dict[str, Any], param: str) -> None:
    with in_memory() as client:
        response = client.post(RESPONSES, json={"input": "hi", "tools": [FLAT_ADD], "tool_choice": choice})
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
