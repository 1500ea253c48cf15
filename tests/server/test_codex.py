"""Codex: its recorded requests replayed, tools of kinds that are left out, and its list of models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.dialects.hermes import Hermes
from server.dialects.reasoning import ReasoningTags
from tests.server.fakes import INFO, FakeEngine, says
from tests.server.harness import CHAT, frames, in_memory, service_of, value
from tests.server.recorded import recorded
from tests.server.test_responses import EVENT, RESPONSES

CALL = '<tool_call>\n{"name": "shell_command", "arguments": {"command": "ls"}}\n</tool_call>'
LISTING, PROBE, FIRST, SECOND = recorded("codex")
SKIPPED = "custom:apply_patch, web_search, image_generation, namespace:mcp__notes"
FUNCTION = {"type": "function", "function": {"name": "add"}}
SEARCH = {"type": "web_search"}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    engine = FakeEngine()
    engine.info = replace(INFO, max_model_len=2048)
    with in_memory(engine) as client:
        service_of(client).dialect = Hermes({}, ReasoningTags())
        yield client


def replay(client: TestClient, request: dict[str, Any], answer: str = "hello") -> Any:
    engine: Any = service_of(client).engine
    engine.script = says(answer)
    response = client.request(
        request["method"], request["path"], headers=request["headers"], content=json.dumps(request["body"])
    )
    assert response.status_code == 200, response.text
    return response


def prompt(client: TestClient) -> str:
    engine: Any = service_of(client).engine
    return bytes(engine.seen[-1].prompt).decode()


def test_an_empty_input_is_answered(client: TestClient) -> None:
    answer = replay(client, PROBE).json()
    assert answer["usage"]["output_tokens"] == 1 and prompt(client) == "<user><assistant>"
    named = client.post(RESPONSES, json={"input": [], "instructions": "be brief", "max_output_tokens": 1})
    assert named.status_code == 200 and prompt(client) == "<system>be brief<user><assistant>"


def test_a_turn_ends_with_a_call(client: TestClient) -> None:
    skipped = value(service_of(client), "request_skipped_tools_total")
    response = replay(client, FIRST, f"I look at the folder. {CALL}")
    events = [EVENT.validate_python(json.loads(frame)) for frame in frames(response.text)]
    call = events[-1].response.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "shell_command", {"command": "ls"})
    assert response.headers["x-skipped-tools"] == SKIPPED and response.headers["x-num-experts"] == "2"
    assert response.headers["x-ignored-fields"] == "prompt_cache_key, client_metadata"
    assert value(service_of(client), "request_skipped_tools_total") == skipped + 4
    assert "<tools shell_command update_plan view_image>" in prompt(client)
    assert [tool.name for tool in events[-1].response.tools] == ["shell_command", "update_plan", "view_image"]


def test_the_next_turn_brings_the_results(client: TestClient) -> None:
    response = replay(client, SECOND, "There are 12.")
    last = json.loads(frames(response.text)[-1])
    assert last["response"]["output"][-1]["content"][0]["text"] == "There are 12."
    assert prompt(client).endswith("Output:\n12\n<assistant><tool>Exit code: 0\nOnce upon a time<assistant>")


def test_its_list_of_models(client: TestClient) -> None:
    answer = replay(client, LISTING).json()
    assert [entry["slug"] for entry in answer["models"]] == [card["id"] for card in answer["data"]]
    assert {"tiny", "tiny@k2"} <= {entry["slug"] for entry in answer["models"]}
    entry = next(entry for entry in answer["models"] if entry["slug"] == "tiny@k2")
    assert entry["description"] == "2 experts per token, of 16" and entry["context_window"] == 2048
    assert entry["shell_type"] == "shell_command" and entry["apply_patch_tool_type"] is None


@pytest.mark.parametrize("stream", [True, False])
def test_a_chat_leaves_them_out_too(client: TestClient, stream: bool) -> None:
    body = {"messages": USER, "tools": [SEARCH, FUNCTION, {"type": "custom", "custom": {}}], "stream": stream}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200 and response.headers["x-skipped-tools"] == "web_search, custom"
    assert "<tools add>" in prompt(client)
    assert "x-skipped-tools" not in client.post(CHAT, json={"messages": USER, "tools": [FUNCTION]}).headers


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": USER, "tools": [SEARCH], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": USER, "tools": [SEARCH], "tool_choice": SEARCH}, "tool_choice.type"),
        (CHAT, {"messages": USER, "tools": [{"type": 5}]}, "tools[0].type"),
        (CHAT, {"messages": USER, "tools": [{"function": {}}]}, "tools[0].type"),
        (CHAT, {"messages": USER, "tools": [SEARCH] * 129}, "tools"),
        (RESPONSES, {"input": "hi", "tools": [SEARCH], "tool_choice": "required"}, "tool_choice"),
        (RESPONSES, {"input": "hi", "tools": [SEARCH], "tool_choice": SEARCH}, "tool_choice.type"),
        (RESPONSES, {"input": "hi", "tools": [{"name": "f"}]}, "tools[0].type"),
    ],
)
def test_what_needs_them_is_refused(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_strict_tools_refuses_them() -> None:
    with in_memory(strict_tools=True) as client:
        for path, body in ((CHAT, {"messages": USER}), (RESPONSES, {"input": "hi"})):
            error = client.post(path, json=body | {"tools": [FUNCTION | {"name": "f"}, SEARCH]}).json()["error"]
            assert error["param"] == "tools[1].type" and "web_search" in error["message"]


def test_names_in_headers_are_bounded_and_forge_nothing(client: TestClient) -> None:
    odd = [{"type": "a\r\nset-cookie: b=c", "name": "é" * 100}, {"type": "t" * 999}, {"type": "", "name": ""}]
    odd += [{"type": f"kind{i}"} for i in range(100)]
    response = client.post(CHAT, json={"messages": USER, "tools": odd, "x\n": 1, "é, b": 2})
    assert response.status_code == 200 and "set-cookie" not in response.headers
    names = response.headers["x-skipped-tools"].split(", ")
    assert len(names) == 17 and names[-1] == "+87" and names[0].startswith("a__set-cookie:_b_c:___")
    assert max(map(len, names)) <= 128 and names[1] == "t" * 64
    assert response.headers["x-ignored-fields"] == "x_, ___b"
