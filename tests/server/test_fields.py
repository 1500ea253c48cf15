"""Fields that vLLM's clients send: each changes the answer as they know it, streamed and whole alike."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.schemas.answers import ChatCompletion, Completion
from server.settings import Settings
from tests.server.fakes import EOS, FakeChat, FakeEngine, FakeTokenizer, says
from tests.server.harness import CHAT, COMPLETIONS, eventually, frames, in_memory, service_of

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
    parts = [c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices]
    ended = choices[-1]
    assert "".join(parts) == text
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
    engine.together = 5
    with in_memory(engine) as client:
        chunks = chunks_of(client, path, body | options)
        plain = chunks_of(client, path, body | {"stream_options": {"include_usage": True}})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == ([0] if path == CHAT else []) + [1, 2, 3, 4, 5, 5], "those that came together, too"
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


def test_only_the_last_tokens_of_a_prompt_are_kept() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:

        def prompt(path: str, body: dict[str, Any], kept: int) -> bytes:
            answer = client.post(path, json=body | {"truncate_prompt_tokens": kept})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] == len(engine.seen[-1].prompt)
            return bytes(engine.seen[-1].prompt)

        assert prompt(COMPLETIONS, {"prompt": "hello"}, 3) == b"llo"
        assert prompt(COMPLETIONS, {"prompt": [104, 105]}, 1) == b"i"
        assert prompt(COMPLETIONS, {"prompt": "hello"}, 256 - 16) == b"hello"
        assert prompt(CHAT, {"messages": USER}, 4) == b"ant>"
        long = "a" * 5000 + "b"
        assert prompt(COMPLETIONS, {"prompt": long}, -1) == b"a" * 239 + b"b"
        assert prompt(COMPLETIONS, {"prompt": long, "max_tokens": 250}, -1) == b"aaaaab"
        assert len(prompt(CHAT, {"messages": [{"role": "user", "content": long}]}, -1)) == 255
        echoed = client.post(COMPLETIONS, json={"prompt": "hello", "truncate_prompt_tokens": 2, "echo": True}).json()
        assert echoed["choices"][0]["text"] == "lohello world"
        for wrong in (0, -2, 257, "1", 1.5):
            for path, body in BODIES:
                answer = client.post(path, json=body | {"truncate_prompt_tokens": wrong})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "truncate_prompt_tokens"


@both
def test_special_tokens_are_shown_where_that_is_asked(path: str, body: dict[str, Any]) -> None:
    with in_memory(FakeEngine(lambda _: [97, EOS, 98])) as client:
        ends = {"ignore_eos": True, "spaces_between_special_tokens": True}
        assert answers(client, path, body | ends)[0] == "ab"
        assert answers(client, path, body | ends | {"skip_special_tokens": False})[0] == "a<end>b"
        kept = {"skip_special_tokens": False, "stop_token_ids": [EOS], "include_stop_str_in_output": True}
        assert answers(client, path, body | kept) == ("a<end>", "stop", EOS)
        wrong = client.post(path, json=body | {"spaces_between_special_tokens": False})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "spaces_between_special_tokens"


def test_an_echo_shows_special_tokens_too() -> None:
    body = {"prompt": [97, EOS, 98], "echo": True, "max_tokens": 0, "logprobs": 0}
    with in_memory() as client:
        plain = client.post(COMPLETIONS, json=body).json()["choices"][0]
        shown = client.post(COMPLETIONS, json=body | {"skip_special_tokens": False}).json()["choices"][0]
    assert (plain["text"], plain["logprobs"]["text_offset"]) == ("ab", [0, 1, 1])
    assert (shown["text"], shown["logprobs"]["text_offset"]) == ("a<end>b", [0, 1, 6])


class Framing(FakeTokenizer):
    """Puts a token before what it is asked to frame."""

    def encode(self, text: str, framed: bool = True, most: int | None = None) -> list[int]:
        return [EOS] * framed + super().encode(text, framed, most)


def test_what_goes_around_a_prompt_may_be_left_out_or_added() -> None:
    engine = FakeEngine()
    app = create_app(Settings(model="tiny", name="tiny"), engine, Framing(), FakeChat(), {})
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        for path, body in BODIES:
            for field in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
                assert client.post(path, json=body | field).status_code == 200
    assert [request.prompt[0] == EOS for request in engine.seen] == [True, True, False, False, True, False]


def test_tokens_that_may_come_and_words_that_may_not_reach_the_engine() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        for path, body in BODIES:
            asked = {"allowed_token_ids": [97, 98, 97], "bad_words": ["ab", " c", "ab"]}
            assert client.post(path, json=body | asked).status_code == 200
            sampling = engine.seen[-1].sampling
            assert sampling.allowed_token_ids == (97, 98) and sampling.bad_words == (
                (97, 98),
                (32, 97, 98),
                (99,),
                (32, 99),
            )
            assert client.post(path, json=body | {"allowed_token_ids": [], "bad_words": []}).status_code == 200
            assert not engine.seen[-1].sampling.restricts
            for field, wrong, param in (
                ("allowed_token_ids", [257], "allowed_token_ids"),
                ("allowed_token_ids", ["a"], "allowed_token_ids[0]"),
                ("bad_words", ["a", " "], "bad_words[1]"),
                ("bad_words", ["x" * 257], "bad_words[0]"),
                ("bad_words", ["x"] * 1025, "bad_words"),
            ):
                answer = client.post(path, json=body | {field: wrong})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_an_assistants_message_is_continued() -> None:
    engine = FakeEngine(says(" there"))
    begun = [*USER, {"role": "assistant", "content": "hello"}]
    asked = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    with in_memory(engine) as client:
        assert answers(client, CHAT, asked)[0] == " there"
        assert bytes(engine.seen[-1].prompt) == b"<user>hi<assistant>hello"
        tokens = client.post("/tokenize", json=asked).json()["tokens"]
        assert tokens == list(engine.seen[-1].prompt)
        for fields, param in (
            ({"add_generation_prompt": True}, "add_generation_prompt"),
            ({"messages": USER}, "continue_final_message"),
            ({"messages": [{"role": "assistant", "content": " "}]}, "continue_final_message"),
            ({"messages": [{"role": "assistant"}]}, "continue_final_message"),
        ):
            for path in (CHAT, "/tokenize"):
                answer = client.post(path, json=asked | fields)
                assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_log_probabilities_of_the_prompt() -> None:
    with in_memory() as client:
        asked = {"prompt_logprobs": 1, "n": 2}
        for path, body in BODIES:
            answer = client.post(path, json=body | asked).json()
            kind: Any = Completion if path == COMPLETIONS else ChatCompletion
            kind.model_validate(answer, strict=True)
            found = [each.get("prompt_logprobs") for each in answer["choices"]]
            found = found if path == COMPLETIONS else [answer["prompt_logprobs"]]
            for scores in found:
                assert len(scores) == answer["usage"]["prompt_tokens"] and scores[0] is None
                (token,) = scores[1].values()
                assert token["logprob"] == -0.25 and token["rank"] == 1 and len(token["decoded_token"]) == 1
            assert "prompt_logprobs" not in client.post(path, json=body).text
        none = client.post(COMPLETIONS, json={"prompt": "hi", "prompt_logprobs": 0, "max_tokens": 0}).json()
        (choice,) = none["choices"]
        told = {"logprob": -0.25, "rank": None, "decoded_token": "i"}
        assert choice["prompt_logprobs"] == [None, {"105": told}] and choice["logprobs"] is None


def test_the_prompts_figures_and_the_echos_beside_each_other() -> None:
    with in_memory() as client:
        body = {"prompt": "hi", "max_tokens": 2}
        echo, scores = {"echo": True, "logprobs": 0}, {"prompt_logprobs": 1}
        both = client.post(COMPLETIONS, json=body | echo | scores).json()["choices"][0]
        alone = [client.post(COMPLETIONS, json=body | each).json()["choices"][0] for each in (echo, scores)]
        shown = client.post(COMPLETIONS, json=body | {"logprobs": 0} | scores).json()["choices"][0]
    assert both["logprobs"] == alone[0]["logprobs"] and both["prompt_logprobs"] == alone[1]["prompt_logprobs"]
    assert shown["logprobs"]["tokens"] == ["h", "e"], "of the answer alone"


@pytest.mark.parametrize("field", ["continue_final_message", "enable_thinking"])
def test_a_prompt_that_is_tokenised_has_no_template(field: str) -> None:
    with in_memory() as client:
        answer = client.post("/tokenize", json={"prompt": "hi", field: True})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def test_thinking_is_for_templates_that_know_it() -> None:
    engine = FakeEngine()
    allowed = ("enable_thinking",)
    with in_memory(engine, chat_template_kwargs=allowed) as client:
        for wanted in (True, False):
            body = {"messages": USER, "enable_thinking": wanted}
            assert client.post(CHAT, json=body).status_code == 200
            assert bytes(engine.seen[-1].prompt).startswith(f"<enable_thinking={wanted}>".encode())
            assert (
                client.post(CHAT, json=body | {"chat_template_kwargs": {"enable_thinking": wanted}}).status_code == 200
            )
            against = client.post(CHAT, json=body | {"chat_template_kwargs": {"enable_thinking": not wanted}})
            assert against.status_code == 400 and "agree" in against.text
        assert client.post(CHAT, json={"messages": USER, "enable_thinking": None}).status_code == 200
        service_of(client).chat.knows_thinking = False  # type: ignore[union-attr]
        refused = client.post(CHAT, json=body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "enable_thinking"
