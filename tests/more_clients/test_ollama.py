"""The `ollama` package against a real server, unpatched: chats, prompts, tools, shapes, lists, refusals."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ollama
import pytest

from tests.clients.inputs import DRAW, PROMPT, QUESTION, DrawAnimal
from tests.clients.running import CONTEXT, MODEL

Only = Callable[[int], AbstractContextManager[None]]
SURE: dict[str, Any] = {"temperature": 0, "seed": 1, "num_predict": 12}
TAGGED = f"{MODEL}:k2"


@pytest.fixture
def api(address: str) -> ollama.Client:
    return ollama.Client(host=address)


def test_a_chat_whole_and_streamed(api: ollama.Client, only: Only) -> None:
    with only(2):
        whole = api.chat(TAGGED, QUESTION, options=SURE)
        parts = list(api.chat(TAGGED, QUESTION, options=SURE, stream=True))
        option = api.chat(MODEL, QUESTION, options=SURE | {"num_experts": 2})
    assert whole.message.content == "".join(part.message.content or "" for part in parts) == option.message.content
    assert whole.eval_count == parts[-1].eval_count == 12 and whole.done_reason == parts[-1].done_reason == "length"
    assert (whole.total_duration or 0) >= (whole.eval_duration or 0) > 0 and whole.model == TAGGED


def test_a_prompt_through_the_template_and_raw(api: ollama.Client, only: Only) -> None:
    with only(2):
        whole = api.generate(TAGGED, PROMPT, raw=True, options=SURE)
        parts = list(api.generate(TAGGED, PROMPT, raw=True, options=SURE, stream=True))
        told = api.generate(TAGGED, "Tell me a story.", system="Be brief.", options=SURE)
    assert whole.response == "".join(part.response or "" for part in parts) and told.response
    assert (told.prompt_eval_count or 0) > 0
    endless = api.generate(MODEL, PROMPT, raw=True, options={"num_ctx": 64, "seed": 1})
    assert 12 < (endless.eval_count or 0) < CONTEXT


def test_the_asynchronous_client(address: str) -> None:
    async def asked() -> str:
        client = ollama.AsyncClient(host=address)
        parts = [part async for part in await client.chat(TAGGED, QUESTION, options=SURE, stream=True)]
        return "".join(part.message.content or "" for part in parts)

    assert asyncio.run(asked())


def test_tools_there_and_back(api: ollama.Client) -> None:
    """The bundled model calls nothing by itself: the call is ours, its result goes back."""
    call = {"function": {"name": "draw_animal", "arguments": {"animal": "cat", "count": 1}}}
    said = [*QUESTION, {"role": "assistant", "tool_calls": [call]}]
    said.append({"role": "tool", "tool_name": "draw_animal", "content": "Done."})
    assert api.chat(TAGGED, QUESTION, tools=[DRAW], options=SURE).message.content
    assert api.chat(TAGGED, said, options=SURE).message.content


def test_shapes(api: ollama.Client) -> None:
    options = SURE | {"num_predict": 60}
    answer = api.chat(TAGGED, QUESTION, format=DrawAnimal.model_json_schema(), options=options)
    assert DrawAnimal.model_validate_json(answer.message.content or "")
    logged = api.chat(TAGGED, QUESTION, options=SURE, logprobs=True, top_logprobs=2)
    assert len(logged.logprobs or ()) == 12


def test_lists(api: ollama.Client) -> None:
    names = [model.model for model in api.list().models]
    assert f"{MODEL}:latest" in names and TAGGED in names
    for name in names:
        shown = api.show(name or "")
        assert shown.details and shown.modelinfo and "completion" in (shown.capabilities or ())
    assert [model.name for model in api.ps().models] == [f"{MODEL}:latest"]
    assert api.generate(MODEL).done_reason == "load" and api.generate(MODEL, keep_alive=0).done_reason == "unload"


def test_refusals(api: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as missing:
        api.chat(f"{MODEL}:k99", QUESTION)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="between 1 and 8"):
        api.chat(MODEL, QUESTION, options={"num_experts": 99})
    with pytest.raises(ollama.ResponseError) as absent:
        api.embed(MODEL, "x")
    assert absent.value.status_code == 404
