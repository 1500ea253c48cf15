"""What a request may say to the chat template, and what the checkpoint says where a request is silent."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from model.errors import CheckpointError
from server.app import create_app
from server.serve import defaults_of
from server.settings import Settings
from tests.server.fakes import FakeChat, FakeEngine, FakeTokenizer
from tests.server.harness import CHAT, COMPLETIONS, eventually, in_memory, service_of

USER = [{"role": "user", "content": "hi"}]
ALLOWED = {"chat_template_kwargs": ("enable_thinking", "mood")}
SAID = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}


def prompt_of(engine: FakeEngine) -> str:
    return bytes(engine.seen[-1].prompt).decode()


@pytest.mark.parametrize("value", [True, False, None, 3, -0.5, "calm", ""])
def test_allowed_names_reach_the_template(value: Any) -> None:
    engine = FakeEngine()
    with in_memory(engine, **ALLOWED) as client:
        body = {"messages": USER, "chat_template_kwargs": {"mood": value}}
        assert client.post(CHAT, json=body).status_code == 200
        assert prompt_of(engine) == f"<mood={value}><user>hi<assistant>"
        tokens = client.post("/tokenize", json=body).json()["tokens"]
        assert tokens == list(engine.seen[-1].prompt)


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"moods": 1}, ["'moods'", "enable_thinking, mood"]),
        ({"messages": "x"}, ["'messages'", "enable_thinking, mood"]),
        ({"mood": [1]}, ["mood", "[1]"]),
        ({"mood": {}}, ["mood", "{}"]),
        ([], ["dictionary"]),
        ("x", ["dictionary"]),
    ],
)
def test_others_are_refused_by_name(path: str, given: Any, words: list[str]) -> None:
    with in_memory(**ALLOWED) as client:
        response = client.post(path, json={"messages": USER, "chat_template_kwargs": given})
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == "chat_template_kwargs"
        assert all(word in error["message"] for word in words), error


def test_without_leave_nothing_is_allowed() -> None:
    with in_memory() as client:
        body = {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}}
        error = client.post(CHAT, json=body).json()["error"]
        assert "'enable_thinking'" in error["message"] and "none" in error["message"]
        for nothing in ({}, None):
            assert client.post(CHAT, json=body | {"chat_template_kwargs": nothing}).status_code == 200


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with in_memory(**ALLOWED) as client:
        body = json.dumps({"messages": USER, "chat_template_kwargs": {"mood": float("nan")}})
        response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["param"] == "chat_template_kwargs"


def test_the_generation_prompt_can_be_left_out() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        assert client.post(CHAT, json={"messages": USER, "add_generation_prompt": False}).status_code == 200
        assert prompt_of(engine) == "<user>hi"


def test_names_are_read_from_a_list_and_the_servers_own_are_refused() -> None:
    assert Settings(chat_template_kwargs="a, b,").chat_template_kwargs == ("a", "b")  # type: ignore[arg-type]
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        with pytest.raises(ValidationError, match=name):
            Settings(chat_template_kwargs=f"a,{name}")  # type: ignore[arg-type]


@contextmanager
def with_defaults(engine: FakeEngine, defaults: dict[str, Any]) -> Iterator[TestClient]:
    app = create_app(Settings(model="tiny"), engine, FakeTokenizer(), FakeChat(), {}, defaults)
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        yield client


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_silent_request_takes_the_checkpoints_values(path: str) -> None:
    engine = FakeEngine()
    body: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "hi"}
    with with_defaults(engine, SAID) as client:
        for asked, wanted in [
            ({}, SAID),
            ({"temperature": None}, SAID),
            ({"temperature": 0}, SAID | {"temperature": 0}),
        ]:
            assert client.post(path, json=body | asked).status_code == 200
            sampling = engine.seen[-1].sampling
            assert {name: getattr(sampling, name) for name in SAID} == wanted
    with with_defaults(engine, {}) as client:
        client.post(path, json=body)
        assert engine.seen[-1].sampling.temperature == 1.0 and engine.seen[-1].sampling.top_k == 0


def test_what_the_file_says_and_when_it_is_not_read(tmp_path: Path) -> None:
    assert defaults_of(Settings(), tmp_path) == {}
    other = {"do_sample": True, "max_length": 20, "eos_token_id": 3, "transformers_version": "5"}
    (tmp_path / "generation_config.json").write_text(json.dumps(SAID | other | {"top_p": None}))
    assert defaults_of(Settings(), tmp_path) == {name: value for name, value in SAID.items() if name != "top_p"}
    assert defaults_of(Settings(generation_config="none"), tmp_path) == {}


@pytest.mark.parametrize("fault", [{"temperature": -1}, {"top_p": "x"}, {"top_k": 2.5}, {"repetition_penalty": 0}])
def test_values_out_of_range_are_a_checkpoint_error(fault: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(fault))
    with pytest.raises(CheckpointError, match=next(iter(fault))) as caught:
        defaults_of(Settings(), tmp_path)
    assert "generation_config.json" in str(caught.value)
    assert defaults_of(Settings(generation_config="none"), tmp_path) == {}
