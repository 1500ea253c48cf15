"""smolagents' `OpenAIModel` against a real server, unpatched."""

import json
from typing import Any

from smolagents import OpenAIModel, tool
from smolagents.models import agglomerate_stream_deltas

from tests.clients.inputs import DRAW, Book
from tests.clients.running import MODEL

ASKED: Any = [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}]


@tool
def draw_animal(animal: str) -> str:
    """Draw an animal.

    Args:
        animal: Which one.
    """
    return f"A {animal}."


draw_animal.inputs["animal"]["enum"] = ["cat", "dog", "bird"]


def model(base: str, most: int, name: str = MODEL, **body: Any) -> OpenAIModel:
    sure: Any = {"temperature": 0, "seed": 1, "max_tokens": most, "client_kwargs": {"max_retries": 0}}
    return OpenAIModel(name, api_base=base, api_key="unused", extra_body=body, **sure)


def test_generate_and_stream(base: str) -> None:
    made = model(base, 12, num_experts=2)
    whole, streamed = made.generate(ASKED), agglomerate_stream_deltas(list(made.generate_stream(ASKED)))
    assert whole.content and whole.content == streamed.content
    assert whole.token_usage == streamed.token_usage and whole.raw.usage.num_experts == 2
    alias = model(base, 12, f"{MODEL}@k2").generate(ASKED)
    assert alias.content == whole.content and alias.raw.usage.num_experts == 2


def test_a_tool(base: str) -> None:
    """It asks with `tool_choice` "required" by itself."""
    made = model(base, 60, num_experts=2, parallel_tool_calls=False)
    whole = made.generate(ASKED, tools_to_call_from=[draw_animal])
    streamed = agglomerate_stream_deltas(list(made.generate_stream(ASKED, tools_to_call_from=[draw_animal])))
    for (call,) in (whole.tool_calls, streamed.tool_calls):
        assert call.function.name == DRAW["function"]["name"]
        assert draw_animal(**json.loads(call.function.arguments)) in {"A cat.", "A dog.", "A bird."}


def test_a_shape(base: str) -> None:
    schema = {"name": "Book", "strict": True, "schema": Book.model_json_schema()}
    answer = model(base, 200, num_experts=2).generate(
        ASKED, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert Book.model_validate_json(answer.content)


def test_stop_sequences(base: str) -> None:
    answer = model(base, 40, num_experts=2).generate(ASKED, stop_sequences=["little"])
    assert answer.content and "little" not in answer.content
