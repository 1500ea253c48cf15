"""What callers get: the real openai client, streams, echoes, log-probabilities, and what plain and streamed share."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from model.budget import ExpertBudget
from server.dialects.base import Content
from server.formats.base import Format
from server.formats.chat import ChatFormat
from server.formats.completions import CompletionFormat
from server.generation.output_processor import Delta
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from tests.server.fakes import EOS, FakeEngine, FakeTokenizer, says
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory, on_loopback

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    engine = FakeEngine()
    with on_loopback(engine) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), engine


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with in_memory() as client:
        yield client


def test_openai_plain(served: tuple[openai.OpenAI, FakeEngine]) -> None:
    api, engine = served
    answer = api.completions.create(model="tiny", prompt="hi", extra_body={"num_experts": 2})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello world", "stop")
    assert answer.usage is not None and answer.usage.prompt_tokens == 2 and answer.usage.completion_tokens == 12
    assert answer.usage.model_extra == {"num_experts": 2, "routed_pairs": 60, "routed_pairs_trained": 60}
    assert engine.seen[-1].budget.per_layer == (2, 2, 2)
    chat = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("hello", "length")
    assert bytes(engine.seen[-1].prompt) == b"<user>hi<assistant>"


def test_openai_streams(served: tuple[openai.OpenAI, FakeEngine]) -> None:
    api, _ = served
    stream = api.chat.completions.create(
        model="tiny@k2",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == "hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.model_extra == {"num_experts": 2, "routed_pairs": 60, "routed_pairs_trained": 60}
    assert {chunk.model for chunk in chunks} == {"tiny@k2"}
    text = "".join(c.choices[0].text for c in api.completions.create(model="tiny", prompt="hi", stream=True))
    assert text == "hello world"


def test_openai_asks_for_experts_in_three_ways(served: tuple[openai.OpenAI, FakeEngine]) -> None:
    api, engine = served
    for way in (
        {"model": "tiny", "extra_body": {"num_experts": 8}},
        {"model": "tiny@k8"},
        {"model": "tiny", "extra_headers": {"X-Num-Experts": "8"}},
        {"model": "tiny@k8", "extra_body": {"num_experts": 8}, "extra_headers": {"X-Num-Experts": "8"}},
        {"model": "tiny", "extra_body": {"experts": {"count": [8, 8, 8]}}},
        {"model": "tiny", "extra_body": {"experts": 8}},
    ):
        raw = api.completions.with_raw_response.create(prompt="hi", **way)
        assert raw.headers["x-num-experts"] == "8"
        assert engine.seen[-1].budget.per_layer == (8, 8, 8)
    with pytest.raises(openai.BadRequestError, match="agree"):
        api.completions.create(model="tiny@k8", prompt="hi", extra_body={"num_experts": 2})
    with pytest.raises(openai.NotFoundError, match=r"tiny@k9.*tiny@kN, N from 1 to 8"):
        api.completions.create(model="tiny@k9", prompt="hi")


@pytest.mark.parametrize("stream", [False, True])
def test_counts_by_phase_reach_the_engine_and_come_back_as_a_mean(
    served: tuple[openai.OpenAI, FakeEngine], stream: bool
) -> None:
    """Of all tokens: those of the prompt at its count and the twelve of the answer at theirs."""
    api, engine = served
    fields: dict[str, Any] = {"experts": {"prefill": 8, "decode": 2}}
    if stream:
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    raw = api.completions.with_raw_response.create(model="tiny", prompt="hi you", stream=stream, extra_body=fields)
    chunks = list(raw.parse()) if stream else [raw.parse()]
    assert raw.headers["x-num-experts"] == "8:2"
    assert engine.seen[-1].budget == ExpertBudget((2, 2, 2), prefill=(8, 8, 8))
    for usage in (chunk.usage for chunk in chunks):
        prompt, answer = usage.prompt_tokens, usage.completion_tokens
        assert usage.num_experts == round((8 * prompt + 2 * answer) / (prompt + answer), 4)
    assert (prompt, answer) == (6, 12)
    if not stream:
        assert chunks[0].metrics["num_experts"] == 4
    with pytest.raises(openai.BadRequestError, match=r"experts\.decode must be between 1 and 8.*got 9") as error:
        api.completions.create(model="tiny", prompt="hi", extra_body={"experts": {"decode": 9}})
    assert error.value.param == "experts.decode"


def test_openai_lists_models(served: tuple[openai.OpenAI, FakeEngine]) -> None:
    api, _ = served
    models = {model.id: model.model_extra or {} for model in api.models.list()}
    assert list(models) == ["tiny", "tiny@k1", "tiny@k2", "tiny@k4", "tiny@k8"]
    assert models["tiny"]["max_model_len"] == 256 and models["tiny"]["parent"] is None
    moe = models["tiny@k2"]["meta"]["moe"]
    where = {"device": "cpu", "backend": "torch"}
    execution = where | {
        "kernels": "torch",
        "dtype": "float32",
        "quantize": "none",
        "kv_cache_dtype": "auto",
        "reason": "off",
    }
    shared = {"prefix_cache": True, "chunked_prefill": True, "return_routed_experts": False}
    assert models["tiny"]["meta"]["execution"] == execution | shared
    assert models["tiny@k2"]["parent"] == "tiny" and moe["default"] == 2 and moe["quality"][0]["perplexity"] == 9.0
    assert api.models.retrieve("tiny@k2").id == "tiny@k2"
    assert api.models.retrieve("tiny@k3").model_extra["meta"]["moe"]["default"] == 3, "not listed, served all the same"
    for name in ("huge/model", "tiny@k0", "tiny@k03", "tiny@k9", "tiny@k", "tiny@k٣", "huge@k3"):
        with pytest.raises(openai.NotFoundError, match="N from 1 to 8"):
            api.models.retrieve(name)


TEXTS = st.text("ab€😀\n", min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(
    text=TEXTS,
    stop=st.lists(st.text("ab€😀\n", min_size=1, max_size=3), max_size=2),
    chat=st.booleans(),
    together=st.integers(1, 5),
)
def test_streamed_and_plain_agree(client: TestClient, text: str, stop: list[str], chat: bool, together: int) -> None:
    """However many of the engine's events come at one time."""
    engine = client.app.state.service.engine  # type: ignore[attr-defined]
    engine.script = says(text)
    body: dict[str, Any] = {"messages": HELLO} if chat else {"prompt": "hi"}
    body |= {"stop": stop, "max_tokens": 40, "logprobs": True if chat else 1}
    path = CHAT if chat else COMPLETIONS
    plain = client.post(path, json=body).json()["choices"][0]
    engine.together = together
    chunks = [json.loads(f) for f in frames(client.post(path, json=body | {"stream": True}).text)[:-1]]
    engine.together = 1
    choices = [chunk["choices"][0] for chunk in chunks]
    if chat:
        assert "".join(c["delta"].get("content", "") for c in choices) == plain["message"]["content"]
        streamed = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert streamed == plain["logprobs"]["content"]
    else:
        assert "".join(c["text"] for c in choices) == plain["text"]
        streamed = [token for c in choices if c["logprobs"] for token in c["logprobs"]["tokens"]]
        assert streamed == (plain["logprobs"] or {"tokens": []})["tokens"]
    assert choices[-1]["finish_reason"] == plain["finish_reason"] == "stop"
    answer = plain["message"]["content"] if chat else plain["text"]
    assert not any(s in answer for s in stop) and "�" not in answer


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
def test_the_four_shapes_of_a_prompt(prompt: Any, expected: list[bytes]) -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        answer = client.post(COMPLETIONS, json={"prompt": prompt, "n": 2, "seed": 7, "echo": True}).json()
    assert sorted(bytes(r.prompt) for r in engine.seen) == sorted(expected * 2)
    assert sorted(r.sampling.seed for r in engine.seen) == sorted([7, 8] * len(expected))
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
    assert [c["text"] for c in answer["choices"]] == [e.decode() + "hello world" for e in expected for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 24 * len(expected)


def test_completion_logprobs_are_aligned_and_finite() -> None:
    with in_memory(FakeEngine(says("a€"))) as client:
        answer = client.post(COMPLETIONS, json={"prompt": "x", "logprobs": 2, "echo": False}).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert logprobs["token_logprobs"] == [-0.5] * 4 and logprobs["text_offset"] == [0, 1, 1, 1]
    assert logprobs["top_logprobs"][1] == {"A": -9999.0, "B": -2.0, "bytes:\\xe2": -0.5}


def test_chat_logprobs_carry_bytes() -> None:
    with in_memory(FakeEngine(says("€"))) as client:
        body = {"messages": HELLO, "logprobs": True, "top_logprobs": 1}
        entries = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
        assert client.post(CHAT, json={"messages": HELLO}).json()["choices"][0]["logprobs"] is None
    assert [entry["bytes"] for entry in entries] == [[0xE2], [0x82], [0xAC]]
    assert entries[0]["top_logprobs"] == [{"token": "A", "logprob": -9999.0, "bytes": [65]}]


def test_what_the_engine_is_asked_for() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        body = {"prompt": "hi", "temperature": 0, "top_k": -1, "stop_token_ids": [5], "logit_bias": {"7": -100}}
        client.post(COMPLETIONS, json=body | {"min_p": None, "user": "u", "logprobs": 0, "max_tokens": 3})
        client.post(COMPLETIONS, json={"prompt": "hi", "ignore_eos": True})
        client.post(CHAT, json={"messages": HELLO, "max_completion_tokens": 9, "max_tokens": 3})
        client.post(CHAT, json={"messages": [{"role": "developer", "content": [{"type": "text", "text": "be"}]}]})
    first, second, third, fourth = (request.sampling for request in engine.seen)
    assert (first.temperature, first.top_k, first.min_p, first.logprobs, first.max_tokens) == (0, 0, 0, 0, 3)
    assert first.stop_token_ids == (EOS, 5) and first.logit_bias == ((7, -100.0),)
    assert second.stop_token_ids == () and second.max_tokens == 16 and 0 <= second.seed < 2**63
    assert first.seed != second.seed
    assert third.max_tokens == 9
    assert bytes(engine.seen[3].prompt) == b"<system>be<assistant>"
    assert fourth.max_tokens == 256 - len(b"<system>be<assistant>")


def test_the_figures_at_the_end() -> None:
    with in_memory() as client:
        answer = client.post(COMPLETIONS, json={"prompt": "hi", "experts": {"count": [1, 2, 2]}})
        body = answer.json()
        stream = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
        last = json.loads(frames(client.post(COMPLETIONS, json=stream).text)[-2])
    assert body["usage"]["num_experts"] == body["metrics"]["num_experts"] == 1.6667
    assert answer.headers["x-num-experts"] == "1.6667"
    assert set(body["metrics"]) == set(last["metrics"]) and last["choices"] == []
    assert body["metrics"]["time_to_first_token_ms"] > 0 and body["metrics"]["tokens_per_second"] > 0


def test_tokenize_and_back() -> None:
    with in_memory() as client:
        ids = client.post("/tokenize", json={"prompt": "hé"}).json()
        chat = client.post("/tokenize", json={"messages": HELLO}).json()
        text = client.post("/detokenize", json={"tokens": ids["tokens"]}).json()
        wrong = client.post("/detokenize", json={"tokens": [257]})
    assert ids == {"count": 3, "max_model_len": 256, "tokens": [104, 195, 169]} and text == {"prompt": "hé"}
    assert bytes(chat["tokens"]) == b"<user>hi<assistant>"
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tokens"


@given(
    st.lists(st.tuples(st.integers(0, 1), st.text(max_size=8)), max_size=6),
    st.sampled_from(["tiny", '"text"', "{text}\\"]),
)
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_text_delta_is_written_as_every_chunk_is(
    chat: bool, logprobs: bool, said: list[tuple[int, str]], model: str
) -> None:
    """The short way of the common case, beside the long one."""
    body: Any = ChatBody(messages=HELLO, n=2, logprobs=logprobs) if chat else CompletionBody(prompt="hi", n=2)
    call: Any = SimpleNamespace(id="an-id", created=7, model=model, body=body, prompts=((1,),), fingerprint="fp_1")
    format = (ChatFormat if chat else CompletionFormat)(call, FakeTokenizer())
    deltas = [Delta(index, (Content(text),)) for index, text in said] + [Delta(1, (Content("end"),), finish="stop")]
    assert format.write(deltas) == Format.write(format, deltas)
