"""LiteLLM's `completion` and similar functions against a real server, through its two providers for OpenAI's API."""

import asyncio
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read at import; else it looks for prices on the network

import litellm
import pytest

from tests.clients.inputs import DRAW, PROMPT, QUESTION, SLEEP, Book, drawn
from tests.clients.running import MODEL

CHAT, TEXT = f"openai/{MODEL}", f"text-completion-openai/{MODEL}"
WAYS: list[Any] = [
    {"num_experts": 2},
    {"extra_body": {"num_experts": 2}},
    {"model": f"{CHAT}@k2"},
    {"extra_headers": {"X-Num-Experts": "2"}},
]
litellm.suppress_debug_info = True


def to(base: str, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model": CHAT, "api_base": base, "api_key": "unused", "temperature": 0, "seed": 1}
    return values | {"messages": QUESTION, "max_tokens": 12, "num_retries": 0} | options


@pytest.mark.parametrize("way", WAYS, ids=["keyword", "body", "alias", "header"])
def test_completion_and_stream(base: str, way: dict[str, Any]) -> None:
    answer = litellm.completion(**to(base, **way))
    chunks = list(litellm.completion(**to(base, **way), stream=True, stream_options={"include_usage": True}))
    rebuilt: Any = litellm.stream_chunk_builder(chunks)
    assert answer.choices[0].message.content and answer.usage.num_experts == 2
    assert rebuilt.choices[0].message.content == answer.choices[0].message.content
    assert rebuilt.choices[0].finish_reason == answer.choices[0].finish_reason == "length"
    assert rebuilt.usage.total_tokens == answer.usage.total_tokens


def test_acompletion(base: str) -> None:
    async def asked() -> tuple[str, str]:
        answer = await litellm.acompletion(**to(base, num_experts=8))
        chunks = [chunk async for chunk in await litellm.acompletion(**to(base, num_experts=8), stream=True)]
        return answer.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in chunks)

    whole, streamed = asyncio.run(asked())
    assert whole and whole == streamed


@pytest.mark.parametrize("way", [{"extra_body": {"num_experts": 1}}, {"model": f"{TEXT}@k1"}], ids=["body", "alias"])
def test_text_completion(base: str, way: dict[str, Any]) -> None:
    body = to(base, model=TEXT, prompt=PROMPT) | way
    del body["messages"]
    answer = litellm.text_completion(**body)
    assert answer.choices[0].text and answer.usage.num_experts == 1
    streamed = "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**body, stream=True))
    assert streamed == answer.choices[0].text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "draw_animal"}}])
def test_tools(base: str, choice: Any) -> None:
    body = to(base, tools=[DRAW, SLEEP], tool_choice=choice, max_tokens=100, num_experts=2, parallel_tool_calls=False)
    answer = litellm.completion(**body)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "sleep" or drawn(call.function.arguments)
    rebuilt: Any = litellm.stream_chunk_builder(list(litellm.completion(**body, stream=True)))
    (again,) = rebuilt.choices[0].message.tool_calls
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Done."}
    turns = [*QUESTION, answer.choices[0].message.model_dump(), result]
    assert litellm.completion(**to(base, messages=turns)).choices[0].message.content


def test_structured_output(base: str) -> None:
    answer = litellm.completion(**to(base, response_format=Book, max_tokens=200))
    assert Book.model_validate_json(answer.choices[0].message.content)


def test_responses(base: str) -> None:
    answer = litellm.responses(
        model=CHAT,
        input="Tell me a story.",
        api_base=base,
        api_key="unused",
        max_output_tokens=16,
        extra_body={"num_experts": 2},
    )
    assert answer.output[0].content[0].text and answer.usage.output_tokens == 16


def test_refusals(base: str) -> None:
    with pytest.raises(litellm.BadRequestError, match="between 1 and 8"):
        litellm.completion(**to(base, num_experts=99))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**to(base, model="openai/nobody"))
