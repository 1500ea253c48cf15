"""What a body of /v1/responses becomes, and what is refused of it: in the caller's words, with the field's name."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from model.errors import InvalidRequest
from server.dialects.hermes import Hermes
from server.dialects.reasoning import ReasoningTags
from server.errors import ModelNotFound
from server.requests.responses_as_chat import RESPONSE_NAMES, chat_of
from server.schemas.responses import read_body
from tests.server.fakes import REFUSED
from tests.server.harness import in_memory, service_of, value
from tests.server.test_responses import RESPONSES, SCORES, WEATHER


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with in_memory() as client:
        service_of(client).dialect = Hermes({}, ReasoningTags())
        yield client


def chat(**body: Any) -> dict[str, Any]:
    return chat_of(read_body(body), body)


def test_what_chat_it_becomes() -> None:
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    calls = [{"type": "function_call", "call_id": c, "name": "f", "arguments": "{}"} for c in "ab"]
    outputs = [
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
    ]
    said = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "So.", "annotations": []}],
    }
    items = [{"role": "user", "content": "x"}, reasoning, said, *calls, *outputs, reasoning, said, said]
    written = [{"id": c, "type": "function", "function": {"name": "f", "arguments": "{}"}} for c in "ab"]
    text = [{"type": "text", "text": "So."}]
    assert chat(input=items, instructions="be")["messages"] == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": text, "tool_calls": written},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "reasoning_content": "Hm.", "content": text},
        {"role": "assistant", "content": text},
    ]


def test_which_fields_go_where() -> None:
    schema = {"type": "object", "default": None}
    given: dict[str, Any] = {
        "input": "hi",
        "model": "tiny",
        "max_output_tokens": 9,
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True},
            "verbosity": "medium",
        },
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "min_p": 0.1,
        "num_experts": 2,
        "truncation": "disabled",
        "previous_response_id": None,
        "n": 1,
        "stream_options": {"include_obfuscation": False},
        "anything": "else",
        **SCORES,
    }
    assert chat(**given) == {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "tiny",
        "max_completion_tokens": 9,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        "tools": [{"type": "function", "function": {name: WEATHER[name] for name in WEATHER if name != "type"}}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "min_p": 0.1,
        "num_experts": 2,
        "anything": "else",
        "logprobs": True,
        "top_logprobs": 1,
    }


def refused(response: Any, param: str | None, code: str | None = None) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    return str(error["message"])


PICTURE = {"type": "input_image", "image_url": "data:"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp", "server_label": "s"}}, "tool_choice.type"),
        ({"input": [{"role": "user", "content": [PICTURE]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": [PICTURE]}]},
            "input[0].output[0].type",
        ),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "text"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
    ],
)
def test_what_is_not_there_is_refused_by_name(client: TestClient, fields: dict[str, Any], param: str) -> None:
    message = refused(client.post(RESPONSES, json={"input": "hi", **fields}), param, "unsupported_parameter")
    assert param in message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "required"),
        ({"input": [5]}, "input[0]", "5"),
        ({"input": [{"content": "x"}]}, "input[0].role", "required"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "tool"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", "required"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "required"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content", "None"),
        ({"input": [{"role": "user", "content": "x"}] * 21}, "input", "at most 20 messages"),
        (
            {"input": "x" * 256},
            "input",
            "This model's maximum context length is 256 tokens. However, you requested 274",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "0"),
        ({"max_output_tokens": 250}, "max_output_tokens", "at most 237 new tokens fit"),
        ({"max_output_tokens": 4, "min_tokens": 5}, "min_tokens", "at most max_output_tokens = 4, got 5"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "required"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex", "text.format both say"),
        (
            {"guided_regex": "a", "tools": [WEATHER], "tool_choice": "required"},
            "guided_regex",
            "guided_regex cannot hold where tool_choice forces a call",
        ),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "a b"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two functions named 'weather'"),
        ({"tools": [{**WEATHER, "parameters": {"maximum": 10**30}}]}, "tools", "64-bit"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "max_tokens"}},
            "tool_choice",
            "'max_tokens', which is not among tools",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "message.output_text.logprobs"),
        ({**SCORES, "top_logprobs": 21}, "top_logprobs", "at most 20, got 21"),
        ({"include": ["thoughts"]}, "include[0]", "thoughts"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "detailed"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "False"),
        ({"num_experts": 9}, "num_experts", "1 and 8"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"stop": [""]}, "stop[0]", "empty"),
    ],
)
def test_refusals_in_the_callers_words(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    before = value(service_of(client), "requests_rejected_total")
    assert words in refused(client.post(RESPONSES, json={"input": "hi", **fields}), param)
    assert value(service_of(client), "requests_rejected_total") == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_renamed(stream: bool) -> None:
    class Refusing(Hermes):
        def answer_grammar(self, prompt: str, rules: str) -> str:
            return REFUSED

    with in_memory() as client:
        service_of(client).dialect = Refusing({})
        body = {"input": "hi", "text": {"format": {"type": "json_object"}}, "stream": stream}
        refused(client.post(RESPONSES, json=body), "text.format", "invalid_grammar")


def test_only_names_are_renamed() -> None:
    for before, after in (
        ("max_tokens must be less", "max_output_tokens must be less"),
        ("it exceeds max_completion_tokens", "it exceeds max_output_tokens"),
        ("prompt: empty prompt", "input: empty prompt"),
        ("got 'max_tokens", "got 'max_tokens"),
        ("got max_tokens'", "got max_tokens'"),
        ("my_max_tokens, a.max_tokens", "my_max_tokens, a.max_tokens"),
    ):
        assert RESPONSE_NAMES.renamed(InvalidRequest(before)).message == after
    error = RESPONSE_NAMES.renamed(ModelNotFound("no such model", "model", "a_code"))
    assert isinstance(error, ModelNotFound) and (error.param, error.code) == ("model", "a_code")


def test_no_template_no_responses() -> None:
    with in_memory(with_chat=False) as client:
        assert "no chat template" in refused(client.post(RESPONSES, json={"input": "hi"}), "input", "no_chat_template")
