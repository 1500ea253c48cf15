"""The Agents SDK of OpenAI against a real server, unpatched, over both of its APIs."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from tests.clients.inputs import Book
from tests.clients.running import MODEL

Only = Callable[[int], AbstractContextManager[None]]
ASKED = "Tell me a story."
KINDS: list[Any] = [OpenAIChatCompletionsModel, OpenAIResponsesModel]
set_tracing_disabled(True)


def agent(base: str, kind: Any, most: int, model: str = MODEL, **options: Any) -> Agent:
    client = AsyncOpenAI(base_url=base, api_key="unused", max_retries=0)
    settings = ModelSettings(temperature=0, max_tokens=most, extra_body={"seed": 1} | options.pop("body", {}))
    return Agent(
        name="teller",
        model=kind(model=model, openai_client=client),
        model_settings=settings.resolve(options.pop("settings", None)),
        **options,
    )


def run_both(made: Agent) -> tuple[Any, Any, str]:
    """The result of a run, of a streamed run, and the text that the second one streamed."""

    async def both() -> tuple[Any, Any, str]:
        whole, streamed, text = await Runner.run(made, ASKED), Runner.run_streamed(made, ASKED), ""
        async for event in streamed.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                text += event.data.delta
        return whole, streamed, text

    return asyncio.run(both())


def used(result: Any) -> tuple[int, int]:
    usage = result.context_wrapper.usage
    return usage.input_tokens, usage.output_tokens


@pytest.mark.parametrize("way", [{"body": {"num_experts": 2}}, {"model": f"{MODEL}@k2"}], ids=["body", "alias"])
def test_run_and_stream(base: str, only: Only, way: dict[str, Any]) -> None:
    with only(2):
        settings = ModelSettings(include_usage=True)
        whole, streamed, text = run_both(agent(base, OpenAIChatCompletionsModel, 12, settings=settings, **way))
    assert whole.final_output and whole.final_output == streamed.final_output == text
    assert used(whole) == used(streamed) and used(whole)[1] == 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape(base: str, only: Only, kind: Any) -> None:
    with only(2):
        whole, streamed, text = run_both(agent(base, kind, 200, output_type=Book, body={"num_experts": 2}))
    assert isinstance(whole.final_output, Book) and whole.final_output == streamed.final_output
    assert Book.model_validate_json(text) == whole.final_output


@pytest.mark.parametrize("kind", KINDS)
def test_a_tool_and_the_answer_after_it(base: str, only: Only, kind: Any) -> None:
    seen = []

    @function_tool
    def draw(animal: Literal["cat", "dog", "bird"]) -> str:
        seen.append(animal)
        return "Done."

    forced = ModelSettings(tool_choice="draw", parallel_tool_calls=False)
    made = agent(
        base, kind, 40, tools=[draw], settings=forced, body={"num_experts": 2}, tool_use_behavior="run_llm_again"
    )
    with only(2):
        result = asyncio.run(Runner.run(made, ASKED))
    assert len(seen) == 1 and seen[0] in {"cat", "dog", "bird"}
    assert [type(item).__name__ for item in result.new_items][:2] == ["ToolCallItem", "ToolCallOutputItem"]
    assert result.final_output
