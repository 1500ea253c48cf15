"""Fields that vLLM's clients send: each changes the answer as they know it, streamed and whole alike."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.fakes import FakeEngine, says
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory

USER: Any = [{"role": "user", "content": "hi"}]
BODIES: Any = [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": USER})]
both = pytest.mark.parametrize(("path", "body"), BODIES)


def chunks_of(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(frame) for frame in frames(client.post(path, json=body | {"stream": True}).text)[:-1]]


def answers(client: TestClient, path: str, body: dict[str, Any]) -> tuple[str, Any, Any]:
    """Text, finish reason and stop reason, which are the same in a stream."""
    whole = client.post(path, json=body)
    assert whole.status_code == 200, whole.text
    choice = whole.json()["choices"][0]
    choices = [chunk["choices"][0] for chunk in chunks_of(client, path, body)]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    pieces = [c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices]
    ended = choices[-1]
    assert "".join(pieces) == text
    assert (ended["finish_reason"], ended["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
    assert all("stop_reason" not in c for c in choices[:-1])
    return text, choice["finish_reason"], choice["stop_reason"]


@both
def test_what_stopped_an_answer_is_told_and_may_be_kept(path: str, body: dict[str, Any]) -> None:
    keep = {"include_stop_str_in_output": True}
    with in_memory(FakeEngine(says("ab<c"))) as client:
        assert answers(client, path, body) == ("ab<c", "stop", None)
        assert answers(client, path, body | {"max_tokens": 2}) == ("ab", "length", None)
        assert answers(client, path, body | {"stop": ["x", "b<"]}) == ("a", "stop", "b<")
        assert answers(client, path, body | {"stop": ["x", "b<"]} | keep) == ("ab<", "stop", "b<")
        assert answers(client, path, body | {"stop_token_ids": [98]}) == ("a", "stop", 98)
        assert answers(client, path, body | {"stop_token_ids": [98]} | keep) == ("ab", "stop", 98)
        assert answers(client, path, body | keep) == ("ab<c", "stop", None)


@both
def test_the_usage_in_every_chunk(path: str, body: dict[str, Any]) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    engine = FakeEngine(says("abcd"))
    engine.first_stats = True
    with in_memory(engine) as client:
        chunks = chunks_of(client, path, body | options)
        plain = chunks_of(client, path, body | {"stream_options": {"include_usage": True}})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5 and counts[0] < 2
    assert all(chunk["usage"]["prompt_tokens"] == chunks[-1]["usage"]["prompt_tokens"] for chunk in chunks)
    assert chunks[-1]["choices"] == [] and ["usage" in chunk for chunk in plain] == [False] * (len(plain) - 1) + [True]


def test_one_fingerprint_for_all_answers() -> None:
    found = set()
    for _ in range(2):
        with in_memory() as client:
            for path, body in BODIES:
                found.add(client.post(path, json=body).json()["system_fingerprint"])
                found |= {chunk["system_fingerprint"] for chunk in chunks_of(client, path, body)}
    with in_memory(default_num_experts=2) as client:
        other = client.post(COMPLETIONS, json={"prompt": "hi"}).json()["system_fingerprint"]
    (one,) = found
    assert one.startswith("fp_") and other != one
