"""Every refusal: status, OpenAI's shape, the field at fault; and storms of bad bodies, none of which is a 5xx."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.server.fakes import FakeEngine
from tests.server.harness import CHAT, COMPLETIONS, in_memory, service_of, value

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with in_memory() as client:
        yield client


def refused(response: Any, status: int, param: str | None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    assert all(isinstance(error[key], str) and error[key] for key in ("message", "type", "code"))
    return str(error["message"])


@pytest.mark.parametrize("value", [0, -1, 10**9, "8", 2.5, True, [], {}, [4, 4, 4]])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_bad_expert_counts(client: TestClient, path: str, value: Any) -> None:
    body = {"prompt": "hi", "num_experts": value} if path == COMPLETIONS else {"messages": USER, "num_experts": value}
    message = refused(client.post(path, json=body), 400, "num_experts")
    assert "1 and 8" in message and repr(value) in message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_does_not_have(client: TestClient, text: str) -> None:
    body = '{"prompt": "hi", "num_experts": ' + text + "}"
    refused(client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400, "num_experts")
    body = '{"prompt": "hi", "temperature": ' + text + "}"
    refused(client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400, "temperature")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 0}, "n", "0"),
        ({"n": 10**6}, "n", "at most 8, got 1000000"),
        ({"n": True}, "n", "integer"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": "5"}, "max_tokens", "'5'"),
        (
            {"max_tokens": 255},
            "max_tokens",
            "you requested 257 tokens (2 in the prompt, 255 as max_tokens); at most 254 new tokens",
        ),
        (
            {"prompt": "x" * 256},
            "prompt",
            "This model's maximum context length is 256 tokens. However, you requested 257 tokens",
        ),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "[]"),
        ({"prompt": [[]]}, "prompt", "prompt[0]"),
        ({"prompt": [True]}, "prompt", "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt", "prompt[0]"),
        ({"prompt": [257]}, "prompt", "257 is not between 0 and 256"),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": ["x"] * 65}, "prompt", "at most 64 prompts, got 65"),
        ({"prompt": {"a": 1}}, "prompt", "string"),
        ({"prompt": None}, "prompt", "required"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 strings, got 17"),
        ({"stop": "x" * 257}, "stop[0]", "at most 256 characters, got 257"),
        ({"stop": ["a", ""]}, "stop[1]", "empty"),
        ({"stop": [1]}, "stop[0]", "string"),
        ({"logprobs": 21}, "logprobs", "at most 20, got 21"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"max_tokens": 0}, "max_tokens", "only be 0 with echo"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "999"),
        ({"logit_bias": {"1": 101}}, "logit_bias[1]", "100"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024 entries, got 1025"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "300"),
        ({"min_tokens": 17}, "min_tokens", "at most max_tokens = 16, got 17"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": True}, "temperature", "True"),
        ({"top_p": 0}, "top_p", "0"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"seed": 2**63}, "seed", "9223372036854775808"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"suffix": "x"}, "suffix", "not supported yet"),
        ({"best_of": 9}, "best_of", "at most 8, got 9"),
        ({"best_of": 1, "n": 2}, "best_of", "at least n = 2, got 1"),
        ({"best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "-1"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"guided_json": "[" * 30000}, "guided_json", "no JSON"),
        ({"guided_json": '{"items":' * 3000 + "{}" + "}" * 3000}, "guided_json", "no JSON"),
        ({"guided_regex": "ü" * 40000}, "guided_regex", "at most 65536 bytes, got 80000"),
        ({"guided_grammar": "start: @moe_all"}, "guided_grammar", "own"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"guided_regex": ""}, "guided_regex", "empty"),
        ({"guided_regex": "refused"}, "guided_regex", "a reason"),
        ({"guided_choice": []}, "guided_choice", "[]"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "give one"),
        ({"guided_regex": "a" * 65537}, "guided_regex", "at most 65536 bytes, got 65537"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "not permitted"),
        ({"extra_body": {"n": 2}, "n": 3}, "n", "another value"),
        ({"experts": {"auto": {"min_quality": 1}}}, "experts.auto", "moedial calibrate"),
        ({"n_experts": 2}, "n_experts", "num_experts"),
    ],
)
def test_bad_completions(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    assert words in refused(client.post(COMPLETIONS, json={"prompt": "hi"} | fields), 400, param)


TOOL = {"type": "function", "function": {"name": "f"}}
WORDS = {"enum": ["x" * 1000] * 140}
HUGE = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": WORDS}}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": USER * 21}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [HUGE], "tool_choice": "required"}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_bad_chats(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post(CHAT, json={"messages": USER} | fields)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith(param), response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "functions": None},
        {"best_of": 1, "suffix": None, "n": None, "stop": None, "logprobs": False, "use_beam_search": False},
        {"metadata": {"a": 1}, "store": True, "user": "me", "service_tier": "auto"},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert client.post(CHAT, json={"messages": USER} | fields).status_code == 200


def test_unknown_fields_are_counted() -> None:
    with in_memory() as client:
        client.post(COMPLETIONS, json={"prompt": "hi", "metadata": 1, "store": True})
        assert value(service_of(client), "request_unknown_fields_total") == 2


def test_a_prompt_that_exactly_fits_is_served(client: TestClient) -> None:
    answer = client.post(COMPLETIONS, json={"prompt": "x" * 255})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1
    assert client.post(COMPLETIONS, json={"prompt": "xx", "max_tokens": 254}).status_code == 200


BODIES: list[bytes] = [
    b"",
    b"\x00",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b"[" * 100_000,
    b'{"prompt":' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"prompt":"\xff\xfe"}',
    b'{"prompt":"\\ud800"}',
    b'{"prompt":"hi","num_experts":1,"num_experts":99}',
    b'{"prompt":"hi","\\ud800":1}',
    b'{"prompt":"hi","seed":' + b"9" * 4000 + b"}",
    b'{"prompt":"hi","seed":' + b"9" * 9000 + b"}",
    b'{"prompt":"hi","n_experts\\u0000\\n":1}',
    b'{"model":"\\u0000\xf0\x9f\x98\x80","prompt":"hi"}',
    b'{"prompt":"hi","stop":' + json.dumps(["x"] * 10_000).encode() + b"}",
    b'{"prompt":"hi","stream_options":7,"stream":true}',
    b'{"prompt":"hi","logit_bias":{"1":1e999}}',
    b'{"prompt":"hi","logit_bias":[1]}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_a_bad_body_is_a_400(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 404) or (path == "/tokenize" and response.status_code == 200), response.text
    assert response.status_code == 200 or response.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
NAMES = "model num_experts experts max_tokens n temperature top_k stop logit_bias stream seed prompt messages logprobs"


@settings(max_examples=80, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(NAMES.split()), JSON, min_size=1, max_size=4), chat=st.booleans())
def test_no_body_is_a_server_error(client: TestClient, fields: dict[str, Any], chat: bool) -> None:
    body = json.dumps({"messages": USER, "prompt": "hi"} | fields)
    response = client.post(CHAT if chat else COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    assert service_of(client).admission.held == 0


def test_wrong_content_type_path_and_method(client: TestClient) -> None:
    refused(client.post(COMPLETIONS, content="a=1", headers={"content-type": "text/plain"}), 400, "content-type")
    refused(client.get("/v2/completions"), 404, None)
    assert client.get(COMPLETIONS).json()["error"]["code"] == "method_not_allowed"
    refused(client.get("/v1/models/%ED%A0%80"), 404, "model")


def test_chat_without_a_template_is_refused() -> None:
    with in_memory(with_chat=False) as client:
        assert "chat template" in refused(client.post(CHAT, json={"messages": USER}), 400, "messages")


def test_a_large_body_is_a_413_by_length_and_by_count() -> None:
    with in_memory(max_body_bytes=1000) as client:
        declared = client.post(COMPLETIONS, json={"prompt": "x" * 2000})
        chunked = client.post(COMPLETIONS, content=(b"x" * 100 for _ in range(20)))
        for response in (declared, chunked):
            assert "1000" in refused(response, 413, None)
            assert response.headers["connection"] == "close" and response.headers["x-should-retry"] == "false"
        assert value(service_of(client), "requests_rejected_total", reason="body_too_large") == 2


def test_too_many_header_fields() -> None:
    with in_memory(max_header_fields=20) as client:
        assert client.get("/health", headers={f"x-{i}": "1" for i in range(30)}).status_code == 431


def test_keys_guard_every_path_but_the_probes() -> None:
    engine = FakeEngine()
    with in_memory(engine, api_keys=("sécret", "other")) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic other"},
            {"x-api-key": "wrong"},
        ):
            response = client.post(COMPLETIONS, json={"prompt": "hi"}, headers=headers)
            refused(response, 401, None)
            assert response.headers["x-request-id"]
        for path in ("/v1/models", "/tokenize", "/openapi.json", "/nothing"):
            assert client.get(path).status_code == 401
        for path in ("/live", "/health", "/ready", "/metrics", "/version", "/docs"):
            assert client.get(path).status_code == 200
        for key in ("other", "sécret"):
            authorization = {b"authorization": f"Bearer {key}".encode()}
            good = client.post(COMPLETIONS, json={"prompt": "hi"}, headers=authorization)
            assert good.status_code == 200
        assert value(service_of(client), "requests_rejected_total", reason="invalid_api_key") == 4


def test_request_ids_are_echoed_only_when_well_formed(client: TestClient) -> None:
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    forged = client.get("/health", headers={"x-request-id": 'a"} {"level":"x'}).headers["x-request-id"]
    assert len(forged) == 32 and forged.isalnum()
