"""Ollama's API: chats, prompts, lines, models, refusals; and Open WebUI's recorded requests of both its APIs."""

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
from server.requests.ollama_as_chat import model_of
from server.schemas.ollama_objects import (
    OllamaChatAnswer,
    OllamaError,
    OllamaGenerateAnswer,
    OllamaModels,
    OllamaShown,
    OllamaVersion,
)
from tests.server.fakes import INFO, FakeEngine, says
from tests.server.harness import frames, in_memory, service_of, value
from tests.server.recorded import recorded
from weights.sizes import WeightFiles

CHAT, GENERATE, SHOW = "/api/chat", "/api/generate", "/api/show"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'


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


def post(client: TestClient, path: str = CHAT, **body: Any) -> dict[str, Any]:
    """A whole answer."""
    given = {"messages": USER} if path == CHAT else {"prompt": "hi"}
    response = client.post(path, json={"stream": False, **given, **body})
    assert response.status_code == 200 and response.headers["content-type"] == "application/json", response.text
    (OllamaChatAnswer if path == CHAT else OllamaGenerateAnswer).model_validate(response.json(), strict=True)
    return dict(response.json())


def lines(client: TestClient, path: str = CHAT, **body: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which is the default."""
    response = client.post(path, json=({"messages": USER} if path == CHAT else {"prompt": "hi"}) | body)
    assert response.headers["content-type"] == "application/x-ndjson", response.text
    found = [json.loads(line) for line in response.text.splitlines()]
    for line in found:
        (OllamaChatAnswer if path == CHAT else OllamaGenerateAnswer).model_validate(line, strict=True)
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    return found


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream, as clients put it together."""
    messages = [line["message"] for line in found]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    texts = {name: "".join(message.get(name, "") for message in messages) for name in ("content", "thinking")}
    return {**texts, "calls": [call["function"] for call in calls]}


def test_a_chat_whole_and_in_lines(client: TestClient) -> None:
    scripted(client, "hello world")
    whole, found = post(client, model="tiny:k2"), lines(client, model="tiny:k2")
    assert whole["message"] == {"role": "assistant", "content": "hello world"} and whole["done_reason"] == "stop"
    assert joined(found)["content"] == "hello world" and len(found) == 12 and whole["model"] == "tiny:k2"
    for last in (whole, found[-1]):
        assert (last["prompt_eval_count"], last["eval_count"], last["num_experts"]) == (19, 12, 2)
        assert (last["prompt_eval_duration"], last["eval_duration"]) == (2_000_000, 3_000_000)
        assert last["total_duration"] > 0 and last["load_duration"] == 0 and last["metrics"]["num_experts"] == 2


def test_a_prompt_goes_through_the_template_unless_it_is_raw(client: TestClient) -> None:
    scripted(client, "hello")
    whole, found = post(client, GENERATE, system="be brief"), lines(client, GENERATE)
    assert whole["response"] == "hello" == "".join(line["response"] for line in found)
    assert prompt(client) == "<user>hi<assistant>"
    assert bytes(engine_of(client).seen[-2].prompt).decode() == "<system>be brief<user>hi<assistant>"
    post(client, GENERATE, raw=True)
    assert prompt(client) == "hi" and engine_of(client).seen[-1].sampling.max_tokens == 2046, "no limit but the context"
    post(client, GENERATE, raw=True, options={"num_predict": 2})
    assert engine_of(client).seen[-1].sampling.max_tokens == 2
    with in_memory(with_chat=False) as plain:
        assert post(plain, GENERATE)["response"] == "hello world" and prompt(plain) == "hi"
        error = plain.post(GENERATE, json={"prompt": "hi", "system": "x"})
        assert error.status_code == 400 and "chat template" in error.json()["error"]


def test_options(client: TestClient) -> None:
    options = {"temperature": 0.5, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": "wor", "num_predict": 9}
    options |= {"repeat_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    unread = {"num_ctx": 4096, "mirostat": 2, "num_gpu": 1, "what": None}
    scripted(client, "hello world")
    response = client.post(CHAT, json={"messages": USER, "options": options | unread, "keep_alive": 5, "stream": False})
    assert response.json()["message"]["content"] == "hello " and response.json()["done_reason"] == "stop"
    sampling = engine_of(client).seen[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.8, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.25, 0.5)
    assert (sampling.seed, sampling.max_tokens) == (3, 9)
    named = "options.num_ctx, options.mirostat, options.num_gpu, keep_alive"
    assert response.headers["x-ignored-fields"] == named
    for endless in (-1, -2, 0, 10_000):
        post(client, options={"num_predict": endless})
        assert engine_of(client).seen[-1].sampling.max_tokens == 2048 - 19
    assert post(client, options={"num_predict": 3})["done_reason"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "tiny:k8"},
        {"model": "tiny@k8"},
        {"num_experts": 8},
        {"experts": {"count": [8, 8, 8]}},
        {"options": {"num_experts": 8}},
        {"options": {"experts": {"prefill": 8, "decode": 8}}, "num_experts": 8},
    ],
)
def test_experts_by_every_way(client: TestClient, fields: dict[str, Any]) -> None:
    asked = {"prompt": "hi"}
    for path, body in ((CHAT, {"messages": USER}), (GENERATE, asked), (GENERATE, asked | {"raw": True})):
        response = client.post(path, json={"stream": False, **body, **fields})
        assert response.status_code == 200, response.text
        assert engine_of(client).seen[-1].budget.per_layer == (8, 8, 8) and response.json()["num_experts"] == 8


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("tiny", "tiny"),
        ("tiny:latest", "tiny"),
        ("tiny:k2", "tiny@k2"),
        ("tiny:fast", "tiny@fast"),
        ("tiny@k2", "tiny@k2"),
        ("other:k2", "other:k2"),
        (None, None),
    ],
)
def test_names_of_models(named: str | None, meant: str | None) -> None:
    assert model_of(named, "tiny") == meant
    assert model_of("tiny:1b", "tiny:1b") == "tiny:1b" and model_of("tiny:1b:k2", "tiny:1b") == "tiny:1b@k2"


def test_calls_there_and_back(client: TestClient) -> None:
    scripted(client, f"<think>Hm.</think>Let me see. {CALL}{CALL}")
    whole, found = post(client, tools=[TOOL]), lines(client, tools=[TOOL])
    calls = [{"index": index, "name": "weather", "arguments": {"town": "Ulm"}} for index in (0, 1)]
    assert [call["function"] for call in whole["message"]["tool_calls"]] == calls
    assert joined(found) == {"content": "Let me see.", "thinking": "Hm.", "calls": calls}
    assert whole["message"]["thinking"] == "Hm." and whole["done_reason"] == "stop"
    assert "<tools weather>" in prompt(client)
    scripted(client, "rain")
    result = {"role": "tool", "tool_name": "weather", "content": "rain"}
    told: list[list[dict[str, Any]]] = []
    chat: Any = service_of(client).chat
    render = chat.render
    chat.render = lambda messages, *rest: told.append(messages) or render(messages, *rest)
    try:
        post(client, messages=[*USER, whole["message"], result], tools=[TOOL, {"type": "web_search"}])
    finally:
        del chat.render
    assert told[0][1]["reasoning_content"] == "Hm." and len(told[0][1]["tool_calls"]) == 2
    assert told[0][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"town": "Ulm"}}
    assert told[0][2] == {"role": "tool", "content": "rain", "name": "weather"}
    skipped = client.post(CHAT, json={"messages": USER, "tools": [{"type": "web_search"}]})
    assert skipped.headers["x-skipped-tools"] == "web_search"


def test_formats_thinking_and_logprobs(client: TestClient) -> None:
    scripted(client, '{"a": 1}')
    for format, part in (("json", '"type": "object"'), ({"enum": [7]}, '"enum": [7]')):
        post(client, format=format)
        assert part in engine_of(client).seen[-1].sampling.grammar
    post(client, format="")
    assert not engine_of(client).seen[-1].sampling.grammar
    for think, head in ((True, "<enable_thinking=True>"), (False, "<enable_thinking=False>"), ("low", "<reasoning")):
        post(client, think=think)
        assert prompt(client).startswith(head)
    chat: Any = service_of(client).chat
    chat.knows_thinking = False
    try:
        post(client, think=False)
        error = client.post(CHAT, json={"messages": USER, "think": True}).json()["error"]
    finally:
        chat.knows_thinking = True
    assert error.startswith("think = True is not known")
    scripted(client, "abc")
    whole, found = post(client, logprobs=True, top_logprobs=1), lines(client, logprobs=True, top_logprobs=1)
    assert [entry["token"] for entry in whole["logprobs"]] == ["a", "b", "c"]
    assert [entry for line in found for entry in line.get("logprobs", [])] == whole["logprobs"]
    raw = post(client, GENERATE, raw=True, logprobs=True)
    assert [entry["token"] for entry in raw["logprobs"]] == ["a", "b", "c"]


def test_bodies_without_a_prompt_ask_for_loading(client: TestClient) -> None:
    before = len(engine_of(client).seen)
    assert post(client, GENERATE, prompt="", model="tiny")["done_reason"] == "load"
    assert post(client, messages=[], keep_alive=0)["done_reason"] == "unload"
    assert client.post(CHAT, json={"model": "tiny:k99"}).status_code == 404
    asked = {"model": "tiny", "foo": 1, "num_experts": 99, "options": {"num_ctx": 1}, "tools": [{"type": "web"}]}
    chat, prompt = (client.post(path, json=asked) for path in (CHAT, GENERATE))
    assert chat.headers["x-ignored-fields"] == "foo, options.num_ctx, num_experts, options"
    assert chat.headers["x-skipped-tools"] == "web"
    assert prompt.headers["x-ignored-fields"] == "foo, tools, options.num_ctx, num_experts, options"
    assert len(engine_of(client).seen) == before


def test_what_nothing_reads_is_named(client: TestClient) -> None:
    user = {
        "role": "user",
        "content": "x",
        "tool_calls": [{"function": {"name": "f"}}],
        "tool_name": "",
        "thinking": "t",
    }
    answer = client.post(CHAT, json={"messages": [user, user, {"role": "tool", "tool_name": "f", "content": "y"}]})
    assert answer.headers["x-ignored-fields"] == "messages[].tool_calls, messages[].thinking"
    assert client.post(SHOW, json={"model": "tiny", "a\r\nb: c": 1, "": 2}).headers["x-ignored-fields"] == "a__b:_c, _"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}]}, "messages[0].images"),
        (CHAT, {"messages": [{"role": "developer", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": USER, "options": {"temperature": -1}}, "options.temperature"),
        (CHAT, {"messages": USER, "options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
        (CHAT, {"messages": USER, "options": {"stop": [""]}}, "options.stop[0]"),
        (CHAT, {"messages": USER, "options": {"num_expert": 2}}, "did you mean num_experts"),
        (CHAT, {"messages": USER, "num_experts": 4, "options": {"num_experts": 2}}, "in options says 2"),
        (CHAT, {"messages": USER, "model": "tiny:k4", "num_experts": 2}, "must agree"),
        (CHAT, {"messages": USER, "top_logprobs": 3, "logprobs": True, "tools": [{"type": 1}]}, "tools[0].type"),
        (CHAT, {"messages": USER, "format": "xml"}, "format"),
        (CHAT, {"messages": USER, "top_logprobs": 3}, "top_logprobs is 3, which needs logprobs: true"),
        (GENERATE, {"prompt": "x", "raw": True, "top_logprobs": 3}, "top_logprobs is 3, which needs logprobs: true"),
        (CHAT, {"messages": USER, "keep_alive": True}, "keep_alive: Input should be"),
        (GENERATE, {"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        (GENERATE, {"prompt": "x", "context": [1]}, "context is not supported"),
        (GENERATE, {"prompt": "x", "images": ["a"]}, "images is not supported"),
        (GENERATE, {"prompt": "x", "template": "{{ . }}"}, "template is not supported"),
        (GENERATE, {"prompt": "x", "raw": True, "system": "y"}, "system needs a chat template"),
        (GENERATE, {"prompt": "x" * 3000}, "maximum context length is 2048"),
        (SHOW, {"model": 1}, "model: Input should be a valid string"),
    ],
)
def test_refusals_have_ollamas_shape(client: TestClient, path: str, body: dict[str, Any], words: str) -> None:
    before = value(service_of(client), "requests_rejected_total")
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert words in OllamaError.model_validate(response.json(), strict=True).error
    assert value(service_of(client), "requests_rejected_total") == before + (path != SHOW)


def test_unknown_models_and_paths(client: TestClient) -> None:
    for path, body in ((CHAT, {"messages": USER, "model": "x"}), (SHOW, {"model": "tiny:k99"}), ("/api/pull", {})):
        response = client.post(path, json=body)
        assert response.status_code == 404 and list(response.json()) == ["error"]
    with in_memory(api_keys=("k",)) as locked:
        assert "valid key" in locked.get("/api/tags").json()["error"]


def test_failures_within_a_stream(client: TestClient) -> None:
    engine = engine_of(client)
    scripted(client, "hello")
    engine.fail_at = {"-0": (2, GenerationFailed("it broke"))}
    found = client.post(CHAT, json={"messages": USER}).text.splitlines()
    assert [json.loads(line).get("error") for line in found] == [None, None, "it broke"]
    engine.fail_at = {"-0": (1, InvalidRequest("stop[0] is odd", "stop[0]"))}
    assert json.loads(client.post(CHAT, json={"messages": USER}).text.splitlines()[-1])["error"] == (
        "options.stop[0] is odd"
    )
    engine.fail_at = {}


def test_the_lists_of_models(client: TestClient) -> None:
    tags = OllamaModels.model_validate(client.get("/api/tags").json(), strict=True).models
    assert [model.name for model in tags][:3] == ["tiny:latest", "tiny:k1", "tiny:k2"]
    assert len({model.digest for model in tags}) == len(tags) and {model.size for model in tags} == {4000}
    (loaded,) = OllamaModels.model_validate(client.get("/api/ps").json(), strict=True).models
    assert (loaded.name, loaded.size_vram, loaded.context_length) == ("tiny:latest", 0, 2048)
    for model in tags:
        shown = OllamaShown.model_validate(client.post(SHOW, json={"name": model.name}).json(), strict=True)
        assert shown.capabilities == ["completion", "tools", "thinking"]
    for body, used in (({"model": "tiny:k2"}, 2), ({}, 4)):
        assert client.post(SHOW, json=body).json()["model_info"]["infinity_moe.expert_used_count"] == used
    OllamaVersion.model_validate(client.get("/api/version").json(), strict=True)


@pytest.mark.parametrize(
    ("quantize", "files", "level", "sizes"),
    [
        ("none", WeightFiles(bytes=3996), "F32", (3996, 4000)),
        ("as stored: int4 g32 with minimum, int6 g16", WeightFiles("gguf", "Q4_K_M", 600), "Q4_K_M", (600, 600)),
        ("as stored: int4 g128", WeightFiles(bytes=600), "int4 g128", (600, 600)),
        ("int8 experts", WeightFiles("gguf", "F16", 2000), "int8 experts", (2000, 1000)),
        ("int4 experts", WeightFiles("gguf", "F16", 2000), "int4 experts", (2000, 531)),
        ("none", WeightFiles("gguf", "F16", 2000), "F16", (2000, 4000)),
    ],
)
def test_a_model_has_the_format_and_size_of_its_files(
    quantize: str, files: WeightFiles, level: str, sizes: tuple[int, int]
) -> None:
    engine = FakeEngine()
    engine.info = replace(INFO, quantize=quantize, weight_files=files)
    with in_memory(engine) as served:
        tags, loaded = (served.get(path).json()["models"][0] for path in ("/api/tags", "/api/ps"))
        details = served.post(SHOW, json={"model": "tiny"}).json()["details"]
    assert (tags["size"], loaded["size"]) == sizes and details == tags["details"]
    shown = {name: details[name] for name in ("format", "quantization_level", "parameter_size")}
    assert shown == {"format": files.format, "quantization_level": level, "parameter_size": "1.0K"}


SAID = st.lists(st.sampled_from(["<think>", "</think>", CALL, "€😀", "a\n", "<tool_call>", "stop", "<"]), max_size=6)


@settings(max_examples=15, deadline=None)
@given(said=SAID, stop=st.booleans(), most=st.integers(1, 90))
def test_streamed_and_whole_agree(client: TestClient, said: list[str], stop: bool, most: int) -> None:
    scripted(client, "".join(said))
    body: dict[str, Any] = {
        "tools": [TOOL],
        "options": {"num_predict": most, "stop": ["stop"] if stop else []},
        "logprobs": True,
    }
    whole, found = post(client, **body), lines(client, **body)
    message = whole["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert joined(found) == {"content": message["content"], "thinking": message.get("thinking", ""), "calls": calls}
    assert [entry for line in found for entry in line.get("logprobs", [])] == whole.get("logprobs", [])
    for field in ("done_reason", "prompt_eval_count", "eval_count", "num_experts"):
        assert found[-1][field] == whole[field]


def test_open_webui(client: TestClient) -> None:
    answers = []
    for request in recorded("open_webui"):
        scripted(client, '{"title": "Stories"}' if request["path"] == CHAT else "There are 12.")
        content = None if request["body"] is None else json.dumps(request["body"])
        response = client.request(request["method"], request["path"], headers=request["headers"], content=content)
        assert response.status_code == 200, response.text
        answers.append(response)
    version, tags, ps, show, chat, title, models, streamed, whole = answers
    assert version.json()["version"].count(".") == 2
    assert {"name", "model", "modified_at", "size", "digest", "details"} <= tags.json()["models"][0].keys()
    assert ps.json()["models"][0]["name"] == "tiny:latest" and "tools" in show.json()["capabilities"]
    assert joined([json.loads(line) for line in chat.text.splitlines()])["content"] == '{"title": "Stories"}'
    assert chat.headers["x-num-experts"] == "2"
    assert chat.headers["x-ignored-fields"] == "options.num_ctx, options.repeat_last_n, options.mirostat, keep_alive"
    assert json.loads(title.json()["message"]["content"]) == {"title": "Stories"}
    assert {"tiny", "tiny@k2"} <= {card["id"] for card in models.json()["data"]}
    assert json.loads(frames(streamed.text)[-2])["usage"]["num_experts"] == 2
    assert whole.json()["choices"][0]["message"]["content"] == "There are 12."
