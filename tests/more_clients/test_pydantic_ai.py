"""pydantic-ai's two models of OpenAI's APIs against a real server, unpatched."""

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.inputs import Book, DrawAnimal
from tests.clients.running import MODEL

ASKED = "Tell me a story."
KINDS: list[Any] = [OpenAIChatModel, OpenAIResponsesModel]


def agent(base: str, kind: Any, most: int, model: str = MODEL, output: Any = str, **body: Any) -> Agent[None, Any]:
    made = kind(model, provider=OpenAIProvider(base_url=base, api_key="unused"))
    settings: Any = {"temperature": 0, "max_tokens": most, "extra_body": {"seed": 1} | body}
    return Agent(made, output_type=output, model_settings=settings | {"parallel_tool_calls": False}, retries=0)


def run_both(made: Agent[None, Any]) -> tuple[Any, Any]:
    """What came whole and what came streamed, of which the usage is the same."""

    async def both() -> tuple[Any, Any]:
        whole = await made.run(ASKED)
        async with made.run_stream(ASKED) as streamed:
            output = await streamed.get_output()
            assert streamed.usage.output_tokens == whole.usage.output_tokens
            assert streamed.usage.details["num_experts"] == whole.usage.details["num_experts"] == 2
        return whole.output, output

    return asyncio.run(both())


@pytest.mark.parametrize("kind", KINDS)
def test_run_and_stream(base: str, kind: Any) -> None:
    whole, streamed = run_both(agent(base, kind, 12, num_experts=2))
    assert whole and whole == streamed
    assert run_both(agent(base, kind, 12, model=f"{MODEL}@k2")) == (whole, whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [ToolOutput, NativeOutput])
def test_shapes(base: str, kind: Any, way: Any) -> None:
    shape = Book if way is NativeOutput else DrawAnimal  # a tool's prompt is long, and the context short
    whole, streamed = run_both(agent(base, kind, 120, output=way(shape), num_experts=2))
    assert isinstance(whole, shape) and whole == streamed


def test_a_shape_that_the_prompt_asks_for(base: str) -> None:
    """It sends the schema as words beside `json_object`; the same field with a schema holds the model to it."""
    asked = {"type": "json_object", "schema": DrawAnimal.model_json_schema()}
    made = agent(base, OpenAIChatModel, 40, output=PromptedOutput(DrawAnimal), num_experts=2, response_format=asked)
    whole, streamed = run_both(made)
    assert isinstance(whole, DrawAnimal) and whole == streamed


def test_a_refusal(base: str) -> None:
    with pytest.raises(ModelHTTPError, match="between 1 and 8"):
        agent(base, OpenAIChatModel, 12, num_experts=99).run_sync(ASKED)
