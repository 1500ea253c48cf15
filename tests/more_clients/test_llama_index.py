"""LlamaIndex's `OpenAILike` against a real server, unpatched."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.inputs import PROMPT, Book, DrawAnimal
from tests.clients.running import CONTEXT, MODEL

Only = Callable[[int], AbstractContextManager[None]]
ASKED = [ChatMessage(role="user", content="Tell me a story.")]


def llm(base: str, **options: Any) -> OpenAILike:
    values: dict[str, Any] = {"api_base": base, "api_key": "unused", "temperature": 0, "max_retries": 0}
    values |= {"model": MODEL, "is_chat_model": True, "is_function_calling_model": True, "context_window": CONTEXT}
    extra = {"seed": 1, "extra_body": {"num_experts": 2}}
    return OpenAILike(**values | {"max_tokens": 12, "additional_kwargs": extra} | options)


@pytest.mark.parametrize("way", [{}, {"model": f"{MODEL}@k2", "additional_kwargs": {"seed": 1}}], ids=["body", "alias"])
def test_chat_and_stream(base: str, only: Only, way: dict[str, Any]) -> None:
    made = llm(base, **way)
    with only(2):
        whole = made.chat(ASKED)
        streamed = list(made.stream_chat(ASKED))
    assert whole.message.content and whole.message.content == "".join(part.delta or "" for part in streamed)
    assert whole.raw.usage.num_experts == 2 and whole.raw.usage.completion_tokens == 12


def test_complete(base: str, only: Only) -> None:
    made = llm(base, is_chat_model=False)
    with only(2):
        whole, streamed = made.complete(PROMPT), "".join(part.delta or "" for part in made.stream_complete(PROMPT))
    assert whole.text and whole.text == streamed


def test_a_tool(base: str, only: Only) -> None:
    def draw(animal: Literal["cat", "dog", "bird"]) -> str:
        """Draw an animal."""
        return f"A {animal}."

    tool, made = FunctionTool.from_defaults(draw), llm(base, max_tokens=60)
    asked: Any = {"user_msg": "Draw.", "tool_required": True, "allow_parallel_tool_calls": False}
    with only(2):
        (call,) = made.get_tool_calls_from_response(made.chat_with_tools([tool], **asked))
        *_, last = made.stream_chat_with_tools([tool], **asked)
        done = made.predict_and_call([tool], **asked)
    assert call.tool_name == "draw" and call.tool_kwargs["animal"] in {"cat", "dog", "bird"}
    assert made.get_tool_calls_from_response(last)[0].tool_kwargs == call.tool_kwargs
    assert str(done) == f"A {call.tool_kwargs['animal']}."


def test_a_shape_by_its_schema(base: str, only: Only) -> None:
    made = llm(base, max_tokens=120, should_use_structured_outputs=True).as_structured_llm(Book)
    with only(2):
        whole, *_, last = made.chat(ASKED), *made.stream_chat(ASKED)
    assert isinstance(whole.raw, Book) and last.raw == whole.raw


def test_a_shape_by_a_call(base: str, only: Only) -> None:
    """Whole only: for a stream the package leaves it to the model whether it calls."""
    with only(2):
        answer = (
            llm(base, max_tokens=120, should_use_structured_outputs=False).as_structured_llm(DrawAnimal).chat(ASKED)
        )
    assert isinstance(answer.raw, DrawAnimal)
