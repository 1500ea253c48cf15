"""The `anthropic` package against a real server, unpatched: messages, streams, tools, schemas, counts, refusals."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import anthropic
import pytest

from tests.clients.inputs import DRAW, QUESTION, DrawAnimal, drawn
from tests.clients.running import CONTEXT, MODEL

Only = Callable[[int], AbstractContextManager[None]]
TOOL = {"name": "draw_animal", "description": "Draw.", "input_schema": DRAW["function"]["parameters"]}
GREEDY = {"temperature": 0, "seed": 1}  # the package has no such parameters
SURE: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "messages": QUESTION, "extra_body": GREEDY}
WAYS: list[dict[str, Any]] = [
    {"extra_body": GREEDY | {"num_experts": 2}},
    {"extra_body": GREEDY | {"experts": {"count": 2}}},
    {"model": f"{MODEL}@k2"},
    {"extra_headers": {"X-Num-Experts": "2"}},
]


@pytest.fixture
def api(address: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key="unused", max_retries=0)


@pytest.mark.parametrize("way", WAYS, ids=["body", "experts", "alias", "header"])
def test_a_message_whole_and_streamed(api: anthropic.Anthropic, only: Only, way: dict[str, Any]) -> None:
    with only(2):
        whole = api.messages.create(**SURE | way)
        with api.messages.stream(**SURE | way) as stream:
            texts = list(stream.text_stream)
            final = stream.get_final_message()
    (block,) = whole.content
    assert block.type == "text" and block.text == "".join(texts) == final.content[0].text
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == final.usage.output_tokens == 12
    assert whole.usage.num_experts == final.usage.num_experts == 2
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == whole.usage.input_tokens


def test_events_have_their_types(api: anthropic.Anthropic) -> None:
    events = list(api.messages.create(**SURE, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-2:] == ["message_delta", "message_stop"]
    assert {type(event).__name__ for event in events} == {
        "RawMessageStartEvent",
        "RawContentBlockStartEvent",
        "RawContentBlockDeltaEvent",
        "RawContentBlockStopEvent",
        "RawMessageDeltaEvent",
        "RawMessageStopEvent",
    }


def test_the_asynchronous_client(address: str) -> None:
    async def asked() -> str:
        client = anthropic.AsyncAnthropic(base_url=address, auth_token="unused", max_retries=0)
        async with client, client.messages.stream(**SURE) as stream:
            return await stream.get_final_text()

    assert asyncio.run(asked())


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "draw_animal"}])
def test_tools_there_and_back(api: anthropic.Anthropic, choice: Any) -> None:
    body = SURE | {"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}], "max_tokens": 100}
    choice = choice | {"disable_parallel_tool_use": True}
    raw = api.messages.with_raw_response.create(**body, tool_choice=choice)
    whole = raw.parse()
    (call,) = whole.content
    assert whole.stop_reason == "tool_use" and call.type == "tool_use" and drawn(json.dumps(call.input))
    assert raw.headers["x-skipped-tools"] == "web_search_20250305:web_search"
    with api.messages.stream(**body, tool_choice=choice) as stream:
        again = stream.get_final_message().content[0]
    assert again.type == "tool_use" and again.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Done."}]}
    said = [*QUESTION, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert api.messages.create(**SURE | {"messages": said}).content


def test_a_shape(api: anthropic.Anthropic) -> None:
    answer = api.messages.parse(**SURE | {"max_tokens": 60}, output_format=DrawAnimal)
    assert isinstance(answer.parsed_output, DrawAnimal)


def test_tokens_are_counted_as_they_are_used(api: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "system": [{"type": "text", "text": "Be brief."}]}
    counted = api.messages.count_tokens(**ask).input_tokens
    usage = api.messages.create(**ask, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_stop_sequences_and_the_context(api: anthropic.Anthropic) -> None:
    text = api.messages.create(**SURE).content[0].text
    word = text.split()[2]
    stopped = api.messages.create(**SURE, stop_sequences=[word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    full = api.messages.create(**SURE | {"max_tokens": 10 * CONTEXT, "extra_body": {"ignore_eos": True}})
    assert full.stop_reason == "model_context_window_exceeded"


def test_refusals(api: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="between 1 and 8"):
        api.messages.create(**SURE | {"extra_body": {"num_experts": 99}})
    with pytest.raises(anthropic.NotFoundError) as missing:
        api.messages.create(**SURE | {"model": "nothing"})
    assert missing.value.type == "not_found_error" and missing.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        api.messages.create(**SURE | {"messages": [{"role": "user", "content": "a story " * CONTEXT}]})
    picture = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="'image' is not supported"):
        api.messages.create(**SURE | {"messages": [{"role": "user", "content": [picture]}]})
