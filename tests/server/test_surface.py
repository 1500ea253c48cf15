"""The rest of OpenAI's surface: log-probabilities of prompts, best_of, structured output, tools, reasoning.

The engine is a fake that says what it is told; that answers are held to their grammar is tested with a real one.
"""

import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.types import Request
from server.dialects.detect import dialect_named
from server.schemas import answers
from tests.server.fakes import EOS, FakeEngine, says
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory, on_loopback, service_of, value

USER: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_echo_with_log_probabilities_is_aligned() -> None:
    with in_memory(FakeEngine(says("o"))) as client:
        body = {"prompt": "hé", "echo": True, "logprobs": 1, "max_tokens": 4}
        choice = client.post(COMPLETIONS, json=body).json()["choices"][0]
        chunks = [json.loads(f) for f in frames(client.post(COMPLETIONS, json=body | {"stream": True}).text)[:-1]]
        scored = client.post(COMPLETIONS, json=body | {"max_tokens": 0}).json()
    found = choice["logprobs"]
    assert choice["text"] == "héo"
    assert found["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "o", ""], "the end of the text has an entry, too"
    assert found["token_logprobs"] == [None, -0.25, -0.25, -0.5, -0.5]
    assert found["top_logprobs"][0] is None and found["top_logprobs"][1] == {"bytes:\\xc3": -0.25}
    assert found["text_offset"] == [0, 1, 1, 2, 3]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == "héo"
    lists = [part["logprobs"] for part in parts if part["logprobs"]]
    assert {name: [entry for each in lists for entry in each[name]] for name in found} == found
    (only,) = scored["choices"]
    assert only["text"] == "hé" and only["finish_reason"] == "length" and scored["usage"]["completion_tokens"] == 0
    assert {name: values[:3] for name, values in found.items()} == only["logprobs"]


def test_an_echo_by_itself_generates_nothing() -> None:
    with in_memory() as client:
        body = {"prompt": "hé", "echo": True, "max_tokens": 0}
        answer = client.post(COMPLETIONS, json=body).json()
        chunks = [json.loads(f) for f in frames(client.post(COMPLETIONS, json=body | {"stream": True}).text)[:-1]]
        service = service_of(client)
    assert (answer["choices"][0]["text"], answer["choices"][0]["logprobs"]) == ("hé", None)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hé"
    assert value(service, "prompt_tokens_total") == 6 and value(service, "request_success_total") == 2


def test_a_batch_of_prompts_is_scored_in_order() -> None:
    with in_memory() as client:
        body = {"prompt": [[104], [104, 105, 106]], "echo": True, "logprobs": 0, "max_tokens": 0}
        choices = client.post(COMPLETIONS, json=body).json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [1, 3]
    assert [choice["index"] for choice in choices] == [0, 1]


def test_the_best_of_several_comes_first() -> None:
    texts = {0: "bad", 1: "good", 2: "fair"}
    engine = FakeEngine(lambda request: [*texts[int(request.id[-1])].encode(), EOS])
    with in_memory(engine) as client:
        likely = {0: -9.0, 1: -1.0, 2: -4.0}
        engine.likely = lambda request: likely[int(request.id[-1])]
        answer = client.post(COMPLETIONS, json={"prompt": "hi", "best_of": 3, "n": 2, "seed": 5}).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "good"), (1, "fair")]
    assert all(choice["logprobs"] is None for choice in answer["choices"]), "not requested"
    assert answer["usage"]["completion_tokens"] == 4 + 5 + 5, "what was generated counts"
    assert sorted(request.sampling.seed for request in engine.seen) == [5, 6, 7]
    assert {request.noise for request in engine.seen} == {0}, "the prompt is the same to all of them"


GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": "a+"}, "/a+/"),
    ({"guided_choice": ["yes", 'n"o']}, '"yes" | "n\\"o"'),
    ({"guided_json": '{"type": "integer"}'}, '"type": "integer"'),
    ({"guided_grammar": 'root ::= "x"'}, 'start: \\"x\\"'),
    ({"structured_outputs": {"regex": "b+"}}, "/b+/"),
    ({"structured_outputs": {"json_object": True}}, '"type": "object"'),
    ({"response_format": {"type": "json_object"}}, '"type": "object"'),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [7]}}}}, '"enum": [7]'),
    ({"extra_body": {"guided_regex": "c+"}}, "/c+/"),
]


@pytest.mark.parametrize(("fields", "part"), GRAMMARS)
def test_what_an_answer_must_match_reaches_the_engine(fields: dict[str, Any], part: str) -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        for path, body in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": USER})):
            assert client.post(path, json=body | fields).status_code == 200
    assert all(part in request.sampling.grammar for request in engine.seen), engine.seen[-1].sampling.grammar
    assert all("whitespace_flexible" in r.sampling.grammar for r in engine.seen if "%json" in r.sampling.grammar)


@pytest.mark.parametrize("stream", [True, False])
def test_a_bad_grammar_is_a_400_for_its_own_request(stream: bool) -> None:
    with in_memory() as client:
        response = client.post(CHAT, json={"messages": USER, "guided_regex": "refused", "stream": stream})
        assert response.status_code == 400
        assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (
            "guided_regex",
            "invalid_grammar",
        )
        assert client.post(CHAT, json={"messages": USER}).status_code == 200


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}, "auto", None])
def test_calls_by_the_real_client(choice: Any) -> None:
    engine = FakeEngine(says(CALL))
    with on_loopback(engine) as (url, service):
        service.dialect = dialect_named("hermes", {})
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        options = {"tool_choice": choice} if choice else {}
        answer = api.chat.completions.create(model="tiny@k2", messages=USER, tools=[TOOL], **options)
        stream = api.chat.completions.create(model="tiny", messages=USER, tools=[TOOL], stream=True, **options)
        deltas = [chunk.choices[0] for chunk in stream]
    (call,) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert call.function.name == "add" and json.loads(call.function.arguments) == {"a": 1}
    parts = [part for delta in deltas for part in delta.delta.tool_calls or ()]
    assert parts[0].id and parts[0].function and parts[0].function.name == "add"
    assert all(part.id is None for part in parts[1:])
    assert "".join(p.function.arguments or "" for p in parts if p.function) == call.function.arguments
    assert deltas[-1].finish_reason == "tool_calls" and not any(delta.delta.content for delta in deltas)
    assert bool(engine.seen[0].sampling.grammar) == (choice not in ("auto", None))
    assert b"<tools add>" in bytes(engine.seen[0].prompt)


def test_without_a_choice_the_model_hears_of_no_tools() -> None:
    engine = FakeEngine(says(CALL))
    with in_memory(engine) as client:
        service_of(client).dialect = dialect_named("hermes", {})
        body = {"messages": USER, "tools": [TOOL], "tool_choice": "none"}
        choice = client.post(CHAT, json=body).json()["choices"][0]
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
    assert b"tools" not in bytes(engine.seen[0].prompt)


def test_a_call_that_is_cut_off_is_length_and_shows_no_delimiters() -> None:
    with in_memory(FakeEngine(says(CALL))) as client:
        body = {"messages": USER, "tools": [TOOL], "tool_choice": "required"}
        cut = [client.post(CHAT, json=body | {"max_tokens": n}).json()["choices"][0] for n in range(1, len(CALL))]
    assert {choice["finish_reason"] for choice in cut} == {"length"}
    assert {choice["message"]["content"] for choice in cut} <= {"", None}


def test_earlier_calls_and_their_results_reach_the_template() -> None:
    engine = FakeEngine()
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    told: list[list[dict[str, Any]]] = []
    with in_memory(engine) as client:
        chat = service_of(client).chat
        assert chat is not None
        chat.render = lambda messages, *_: told.append(messages) or "x"  # type: ignore[method-assign,assignment,func-returns-value]
        messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]}]
        assert client.post(CHAT, json={"messages": messages, "tools": [TOOL]}).status_code == 200
    assert told[0][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}, "as an object"
    assert told[0][2] == {"role": "tool", "content": "2", "tool_call_id": "c1"}


def test_tools_are_refused_where_the_template_knows_none() -> None:
    with in_memory() as client:
        service_of(client).chat.knows_tools = False  # type: ignore[union-attr]
        error = client.post(CHAT, json={"messages": USER, "tools": [TOOL]}).json()["error"]
        service_of(client).chat.knows_tools = True  # type: ignore[union-attr]
    assert error["param"] == "tools" and "knows no tools" in error["message"]


SAID = st.lists(
    st.sampled_from(["<think>", "</think>", CALL, "€😀", "a\n", "<tool_call>", "}", "stop", "<"]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(said=SAID, tools=st.booleans(), stop=st.booleans(), most=st.integers(1, 90), parallel=st.booleans())
def test_streamed_and_whole_agree_and_keep_to_the_contract(
    said: list[str], tools: bool, stop: bool, most: int, parallel: bool
) -> None:
    engine = FakeEngine(says("".join(said)))
    with in_memory(engine) as client:
        service_of(client).dialect = dialect_named("hermes", {})
        body = {"messages": USER, "max_tokens": most, "logprobs": True, "stop": ["stop"] if stop else []}
        body |= {"tools": [TOOL], "parallel_tool_calls": parallel} if tools else {}
        whole = client.post(CHAT, json=body).json()
        streamed = client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text
    answers.ChatCompletion.model_validate(whole, strict=True)
    chunks = [answers.ChatChunk.model_validate_json(frame, strict=True) for frame in frames(streamed)[:-1]]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    message = whole["choices"][0]["message"]
    assert "".join(delta.content or "" for delta in deltas) == (message["content"] or "")
    assert "".join(delta.reasoning_content or "" for delta in deltas) == message.get("reasoning_content", "")
    arguments: dict[int, str] = {}
    for call in (call for delta in deltas for call in delta.tool_calls or ()):
        arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert [*arguments.values()] == [call["function"]["arguments"] for call in message.get("tool_calls", [])]
    assert parallel or len(arguments) <= 1
    assert chunks[-2].choices[0].finish_reason == whole["choices"][0]["finish_reason"]
    entries = [
        e.model_dump() for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content
    ]
    assert entries == whole["choices"][0]["logprobs"]["content"]
    assert not (stop and "stop" in (message["content"] or "")), "a stop string never shows"


def test_completions_keep_to_the_contract() -> None:
    with in_memory() as client:
        body = {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 2}
        answers.Completion.model_validate(client.post(COMPLETIONS, json=body).json(), strict=True)
        answers.TokenizerInfo.model_validate(client.get("/tokenizer_info").json(), strict=True)
        answers.Models.model_validate(client.get("/v1/models").json(), strict=True)
        answers.Error.model_validate(client.post(COMPLETIONS, json={}).json(), strict=True)


def test_a_seed_counts_up_over_answers_and_is_not_the_noises() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        client.post(COMPLETIONS, json={"prompt": "hi", "n": 3, "seed": 9})
        client.post(COMPLETIONS, json={"prompt": "hi", "seed": -1})
    seen: list[Request] = engine.seen
    assert [(r.sampling.seed, r.noise) for r in seen] == [(9, 0), (10, 0), (11, 0), (2**63 - 1, 0)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses"])
def test_the_noise_has_a_seed_of_the_server_or_of_the_request(path: str) -> None:
    engine = FakeEngine()
    body = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    body = {"input": "hi"} if path == "/v1/responses" else body
    with in_memory(engine, noise_seed=3) as client:
        for given in (None, 7, -1):
            assert client.post(path, json=body | {"noise_seed": given}).status_code == 200
        refused = client.post(path, json=body | {"noise_seed": 2**63}).json()["error"]
    assert [request.noise for request in engine.seen] == [3, 7, 2**63 - 1]
    assert len({request.sampling.seed for request in engine.seen}) == 3
    assert refused["param"] == "noise_seed" and str(2**63) in refused["message"]


def test_without_a_seed_every_prompt_of_a_list_draws_its_own() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        client.post(COMPLETIONS, json={"prompt": ["hi"] * 4, "n": 2})
        client.post(COMPLETIONS, json={"prompt": ["hi"] * 2, "seed": 5})
    seeds = [r.sampling.seed for r in sorted(engine.seen[:8], key=lambda r: int(r.id.rpartition("-")[2]))]
    assert len(set(seeds)) == 8
    assert all((first + 1) % 2**63 == second for first, second in zip(seeds[::2], seeds[1::2], strict=True))
    assert [r.sampling.seed for r in engine.seen[8:]] == [5, 5], "with a seed, a prompt's answer is its own in any list"


def test_a_single_special_token_is_looked_up_only_without_a_frame() -> None:
    with in_memory() as client:
        assert client.post("/tokenize", json={"prompt": "<end>", "add_special_tokens": False}).json()["tokens"] == [EOS]
        assert client.post("/tokenize", json={"prompt": "<end>"}).json()["count"] == 5
        assert client.get("/tokenizer_info").json()["eos_token"] == "<end>"
