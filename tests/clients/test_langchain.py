"""LangChain's `ChatOpenAI` and `OpenAI` against a real server, unpatched."""

import asyncio
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.inputs import DRAW, PROMPT, SLEEP, Book, DrawAnimal
from tests.clients.running import MODEL

ASKED = "Tell me a story."
WAYS: list[Any] = [
    {"extra_body": {"num_experts": 2}},
    {"model": f"{MODEL}@k2"},
    {"default_headers": {"X-Num-Experts": "2"}},
]


def chat(base: str, **options: Any) -> ChatOpenAI:
    values: dict[str, Any] = {"model": MODEL, "api_key": "unused", "temperature": 0, "seed": 1, "max_retries": 0}
    return ChatOpenAI(base_url=base, **values | options)


@pytest.mark.parametrize("way", WAYS, ids=["body", "alias", "header"])
def test_invoke_and_stream(base: str, way: dict[str, Any]) -> None:
    llm = chat(base, max_tokens=12, stream_usage=True, **way)
    answer, chunks = llm.invoke(ASKED), list(llm.stream(ASKED))
    assert answer.content and answer.content == "".join(chunk.content for chunk in chunks)
    assert answer.response_metadata["token_usage"]["num_experts"] == 2
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata == sum(chunks[1:], chunks[0]).usage_metadata


def test_async_and_batch(base: str) -> None:
    llm = chat(base, max_tokens=12)

    async def asked() -> tuple[str, str]:
        answer = await llm.ainvoke(ASKED)
        return answer.content, "".join([chunk.content async for chunk in llm.astream(ASKED)])

    whole, streamed = asyncio.run(asked())
    assert whole == streamed == llm.batch([ASKED, ASKED])[1].content


def test_completions(base: str) -> None:
    llm = OpenAI(base_url=base, api_key="unused", model=f"{MODEL}@k1", max_tokens=12, temperature=0, seed=1)
    assert llm.invoke(PROMPT) and llm.invoke(PROMPT) == "".join(llm.stream(PROMPT))


@pytest.mark.parametrize("choice", ["required", "draw_animal"])
def test_tools(base: str, choice: str) -> None:
    llm = chat(base, extra_body={"num_experts": 8})
    calling = llm.bind_tools([DRAW, SLEEP], tool_choice=choice, parallel_tool_calls=False)
    answer = calling.invoke(ASKED)
    (call,) = answer.tool_calls
    assert call["id"] and not answer.invalid_tool_calls
    assert call["name"] == "sleep" or DrawAnimal.model_validate(call["args"])
    chunks = list(calling.stream(ASKED))
    assert [c["args"] for c in sum(chunks[1:], chunks[0]).tool_calls] == [c["args"] for c in answer.tool_calls]
    result = ToolMessage("Done.", tool_call_id=call["id"])
    assert llm.invoke([HumanMessage(ASKED), answer, result]).content


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize(("method", "shape"), [("json_schema", Book), ("function_calling", DrawAnimal)])
def test_structured_output(base: str, method: Any, shape: Any, strict: bool | None) -> None:
    llm = chat(base, extra_body={"num_experts": 2}).with_structured_output(shape, method=method, strict=strict)
    assert isinstance(llm.invoke(ASKED), shape)


def test_responses(base: str) -> None:
    llm = chat(base, use_responses_api=True, seed=None, max_tokens=16, extra_body={"num_experts": 2, "seed": 1})
    answer, chunks = llm.invoke(ASKED), list(llm.stream(ASKED))
    assert answer.text and answer.text == sum(chunks[1:], chunks[0]).text
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 16
