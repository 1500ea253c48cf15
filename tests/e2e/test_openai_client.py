"""The `openai` package against a real server: what its documentation promises, and the expert count beside it."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.inputs import DRAW, PROMPT, QUESTION, SLEEP, SURE, Book, DrawAnimal, drawn
from tests.e2e.live import Live, serving
from weights.folder import DEFAULT

ASKED: dict[str, Any] = {"model": DEFAULT, "messages": QUESTION, "max_tokens": 12} | SURE
PROMPTED: dict[str, Any] = {"model": DEFAULT, "prompt": PROMPT, "max_tokens": 12} | SURE
CALLING: dict[str, Any] = {"model": DEFAULT, "messages": QUESTION, "tools": [DRAW, SLEEP]} | SURE
SHAPED: dict[str, Any] = {"model": DEFAULT, "messages": QUESTION, "response_format": Book} | SURE
RESPONDED: dict[str, Any] = {"model": DEFAULT, "input": "Tell me a story.", "max_output_tokens": 16, "temperature": 0}
RESPONDED |= {"extra_body": {"seed": 1}}  # for which this API has no word
NAMED: Any = {"type": "function", "function": {"name": "draw_animal"}}
NAMED_CLASS: Any = {"type": "function", "function": {"name": "DrawAnimal"}}
WAYS: list[Any] = [
    {"extra_body": {"num_experts": 2}},
    {"model": f"{DEFAULT}@k2"},
    {"extra_headers": {"X-Num-Experts": "2"}},
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--threads", "1") as server:
        yield server


def options(live: Live) -> Any:
    """Strict: answers are validated by the package's own types, which it does not do by default."""
    strict = {"_strict_response_validation": True}
    return {"base_url": f"{live.url}/v1", "api_key": "unused", "max_retries": 0, "timeout": 60} | strict


@pytest.fixture
def api(live: Live) -> openai.OpenAI:
    return openai.OpenAI(**options(live))


def patient(live: Live) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(**options(live))


def experts(usage: Any) -> int:
    count = usage.model_extra["num_experts"]
    assert isinstance(count, int)
    return count


@pytest.mark.parametrize("way", WAYS, ids=["body", "alias", "header"])
def test_every_endpoint_takes_a_count_in_every_way(api: openai.OpenAI, way: dict[str, Any]) -> None:
    assert experts(api.completions.create(**PROMPTED | way).usage) == 2
    assert experts(api.chat.completions.create(**ASKED | way).usage) == 2
    assert experts(api.responses.create(**RESPONDED | way).usage) == 2
    refused = {"extra_body": {"num_experts": 99}} if "model" not in way else {"model": f"{DEFAULT}@k99"}
    for create, body in [(api.chat.completions.create, ASKED), (api.responses.create, RESPONDED)]:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            create(**body | refused)
        assert caught.value.param in ("num_experts", "model") and caught.value.type == "invalid_request_error"


def test_plain_and_streamed_sync_and_async_say_the_same(live: Live, api: openai.OpenAI) -> None:
    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    whole = api.chat.completions.create(**ASKED)
    chunks = list(api.chat.completions.create(**ASKED, **streaming))

    async def asked() -> tuple[Any, list[Any]]:
        async with patient(live) as api:
            one = await api.chat.completions.create(**ASKED)
            return one, [chunk async for chunk in await api.chat.completions.create(**ASKED, **streaming)]

    whole_async, chunks_async = asyncio.run(asked())
    text = whole.choices[0].message.content
    assert text and text == whole_async.choices[0].message.content == said(chunks) == said(chunks_async)
    assert whole.choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def said(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_completions_async_and_many_at_once(live: Live) -> None:
    async def asked() -> list[Any]:
        async with patient(live) as api:
            bodies = [PROMPTED | {"extra_body": {"num_experts": count}} for count in (1, 2, 4, 8)]
            return await asyncio.gather(*(api.completions.create(**body) for body in bodies))

    answers = asyncio.run(asked())
    assert [experts(answer.usage) for answer in answers] == [1, 2, 4, 8]
    assert all(answer.choices[0].text for answer in answers)


def test_a_prompt_is_scored_without_an_answer(live: Live) -> None:
    """As on OpenAI's own server the first entry is null, which the package's types do not have."""
    (choice,) = live.client.completions.create(**PROMPTED | {"max_tokens": 0, "echo": True, "logprobs": 1}).choices
    assert choice.text == PROMPT and choice.logprobs is not None and choice.finish_reason == "length"
    first, *rest = choice.logprobs.token_logprobs or []
    assert first is None and all(value is not None and value <= 0 for value in rest)
    assert "".join(choice.logprobs.tokens or []).endswith(PROMPT), "the tokenizer may put a token of its own before it"


def test_fields_of_other_servers_hold(api: openai.OpenAI) -> None:
    def said(**fields: Any) -> tuple[str, Any]:
        (choice,) = api.completions.create(**PROMPTED | {"temperature": 0, "extra_body": fields}).choices
        return choice.text, choice

    plain, _ = said()
    word = plain.split()[1]
    assert word not in said(bad_words=[word])[0].split()
    kept, choice = said(stop=[word], include_stop_str_in_output=True)
    assert kept == plain[: plain.index(word) + len(word)] and choice.model_extra["stop_reason"] == word
    _, choice = said(prompt_logprobs=1)
    first, *rest = choice.model_extra["prompt_logprobs"]
    assert first is None and all(any(token["rank"] == 1 for token in entry.values()) for entry in rest)
    assert PROMPT.endswith("".join(next(iter(entry.values()))["decoded_token"] for entry in rest[-2:]))


def test_an_assistants_message_goes_on(api: openai.OpenAI) -> None:
    begun: Any = [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": "Once upon a"}]
    asked = {"continue_final_message": True, "add_generation_prompt": False}
    answer = api.chat.completions.create(
        model=DEFAULT, messages=begun, temperature=0, max_tokens=4, extra_body=asked
    ).choices[0]
    assert (answer.message.content or "").startswith(" time")


@pytest.mark.parametrize("count", [1, 8])
def test_a_named_call_is_made_once(api: openai.OpenAI, count: int) -> None:
    (answer,) = api.chat.completions.create(
        **CALLING | {"tool_choice": NAMED, "extra_body": {"num_experts": count}}
    ).choices
    (call,) = answer.message.tool_calls or []
    assert call.type == "function" and call.id and call.function.name == "draw_animal"
    assert drawn(call.function.arguments) and not answer.message.content
    assert answer.finish_reason in ("tool_calls", "stop")


@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_is_made(api: openai.OpenAI, parallel: bool) -> None:
    """A small model that may make several goes on until it is stopped; what was cut off is not shown as text."""
    body = CALLING | {"tool_choice": "required", "parallel_tool_calls": parallel, "max_tokens": 100}
    (answer,) = api.chat.completions.create(**body).choices
    calls = answer.message.tool_calls or []
    assert calls and not answer.message.content and (parallel or len(calls) == 1)
    assert parallel or answer.finish_reason == "tool_calls"
    first = calls[0].function
    assert drawn(first.arguments) if first.name == "draw_animal" else isinstance(json.loads(first.arguments), dict)


@pytest.mark.parametrize("limit", [4, 12, 24, 36, 48])
def test_a_call_that_is_cut_short_leaves_no_markup(api: openai.OpenAI, limit: int) -> None:
    (answer,) = api.chat.completions.create(**CALLING | {"tool_choice": NAMED, "max_tokens": limit}).choices
    assert not answer.message.content and answer.finish_reason in ("length", "tool_calls", "stop")


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_call_that_may_be_made(api: openai.OpenAI, choice: Any) -> None:
    (answer,) = api.chat.completions.create(**CALLING | {"tool_choice": choice, "max_tokens": 24}).choices
    assert choice == "auto" or not answer.message.tool_calls
    assert answer.message.tool_calls or answer.message.content


@pytest.mark.parametrize("mode", ["auto", pytest.param("required", marks=pytest.mark.redundant)])
def test_only_allowed_tools_are_called(api: openai.OpenAI, mode: str) -> None:
    subset = {"mode": mode, "tools": [{"type": "function", "function": {"name": "draw_animal"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": subset}
    for seed in range(3):
        body = CALLING | {"tool_choice": choice, "temperature": 1, "seed": seed, "max_tokens": 60}
        (answer,) = api.chat.completions.create(**body).choices
        assert {call.function.name for call in answer.message.tool_calls or []} <= {"draw_animal"}
        assert mode == "auto" or (answer.message.tool_calls and not answer.message.content)
    tools: Any = [{"type": "function", "strict": True} | tool["function"] for tool in (DRAW, SLEEP)]
    flat: Any = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "draw_animal"}]}
    response = api.responses.create(**RESPONDED | {"tools": tools, "tool_choice": flat, "max_output_tokens": 100})
    assert mode == "auto" or response.output[0].type == "function_call"


def test_a_format_waits_for_a_turn_that_answers(api: openai.OpenAI) -> None:
    body = {**SHAPED, **CALLING, "tools": [openai.pydantic_function_tool(DrawAnimal)], "tool_choice": NAMED_CLASS}
    answer = api.chat.completions.parse(**body).choices[0].message
    assert answer.tool_calls and answer.parsed is None


def test_an_object_has_no_names_that_its_schema_has_not(api: openai.OpenAI) -> None:
    inner = {"type": "object", "properties": {"legs": {"type": "integer", "minimum": 1, "maximum": 9}}}
    schema: Any = {"type": "object", "properties": {"animal": inner}, "required": ["animal"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(4):
        body = ASKED | {"response_format": wanted, "temperature": 1, "seed": seed, "max_tokens": 100}
        (answer,) = api.chat.completions.create(**body).choices
        found = json.loads(answer.message.content or "")
        assert set(found) == {"animal"} and set(found["animal"]) <= {"legs"}


def test_a_streamed_call_is_the_whole_one_in_parts(api: openai.OpenAI) -> None:
    body = CALLING | {"tool_choice": NAMED, "parallel_tool_calls": False}
    (whole,) = api.chat.completions.create(**body).choices[0].message.tool_calls or []
    chunks = [chunk.choices[0] for chunk in api.chat.completions.create(**body, stream=True)]
    parts = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert parts[0].id and parts[0].function.name == "draw_animal"
    assert not any(part.id or part.function.name for part in parts[1:]) and {p.index for p in parts} == {0}
    assert "".join(part.function.arguments or "" for part in parts) == whole.function.arguments
    assert chunks[-1].finish_reason in ("tool_calls", "stop")


def test_a_conversation_with_a_call_in_it_goes_on(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(**CALLING | {"tool_choice": NAMED}).choices[0].message
    (call,) = answer.tool_calls or []
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "The cat is drawn."}
    story = api.chat.completions.create(**ASKED | {"messages": [*QUESTION, answer, result]})
    assert story.choices[0].message.content


def test_answers_take_the_shape_of_a_class(live: Live, api: openai.OpenAI) -> None:
    async def asked() -> Any:
        async with patient(live) as api:
            return await api.chat.completions.parse(**SHAPED)

    for answer in (
        api.chat.completions.parse(**SHAPED),
        api.beta.chat.completions.parse(**SHAPED),
        asyncio.run(asked()),
    ):
        assert isinstance(answer.choices[0].message.parsed, Book) and answer.choices[0].finish_reason == "stop"
    with api.chat.completions.stream(**SHAPED) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Book)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_calls_take_the_shape_of_a_class(api: openai.OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(DrawAnimal)]
    answer = api.chat.completions.parse(**CALLING | {"tools": tools, "tool_choice": NAMED_CLASS})
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, DrawAnimal)


def test_json_of_any_shape(api: openai.OpenAI) -> None:
    body = ASKED | {"response_format": {"type": "json_object"}, "max_tokens": 200}
    (answer,) = api.chat.completions.create(**body).choices
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content or ""), dict)


def test_responses(live: Live, api: openai.OpenAI) -> None:
    async def asked() -> Any:
        async with patient(live) as api:
            return await api.responses.create(**RESPONDED)

    turns: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Tell me a story."}]}]
    one, same = api.responses.create(**RESPONDED), api.responses.create(**RESPONDED | {"input": turns})
    assert one.output_text and one.output_text == same.output_text == asyncio.run(asked()).output_text
    assert one.status == "incomplete" and one.incomplete_details is not None
    assert one.incomplete_details.reason == "max_output_tokens"
    assert one.usage is not None and one.usage.output_tokens == 16
    told = api.responses.create(**RESPONDED | {"instructions": "Be kind."})
    assert told.usage is not None and told.usage.input_tokens > one.usage.input_tokens


def test_responses_stream_their_events(api: openai.OpenAI) -> None:
    body = RESPONDED | {"extra_body": {"seed": 1, "num_experts": 2}}
    whole, events = api.responses.create(**body), list(api.responses.create(**body, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    order = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    places = [kinds.index(f"response.{kind}") for kind in (*order, "output_item.done")]
    assert places == sorted(places)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert experts(events[-1].response.usage) == 2


def test_responses_take_the_shape_of_a_class(api: openai.OpenAI) -> None:
    body = RESPONDED | {"max_output_tokens": 200}
    assert isinstance(api.responses.parse(**body, text_format=Book).output_parsed, Book)
    with api.responses.stream(**body, text_format=Book) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Book)


def test_responses_call_tools(api: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "strict": True} | DRAW["function"]
    body = RESPONDED | {"tools": [tool], "tool_choice": "required", "max_output_tokens": 200}
    (call, *_) = [item for item in api.responses.create(**body).output if item.type == "function_call"]
    assert call.name == "draw_animal" and call.call_id and drawn(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Done."}
    turns: Any = [*QUESTION, call.model_dump(), result]
    assert api.responses.create(**RESPONDED | {"input": turns}).output_text


def test_responses_stream_a_call(api: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "strict": True} | DRAW["function"]
    body = RESPONDED | {"tools": [tool], "tool_choice": {"type": "function", "name": "draw_animal"}}
    events = list(api.responses.create(**body | {"max_output_tokens": 100}, stream=True))
    added, *_ = [event for event in events if event.type == "response.output_item.added"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert added.item.type == "function_call" and added.item.name == "draw_animal" and added.item.call_id
    assert "".join(parts) == done.arguments and drawn(done.arguments) and done.item_id == added.item.id
    assert events[-1].type == "response.completed" and events[-1].response.output[0].arguments == done.arguments


def test_refusals_are_the_errors_that_people_catch(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.responses.create(**RESPONDED | {"model": "gpt-5"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(**CALLING | {"tool_choice": {"type": "function", "function": {"name": "nobody"}}})
    assert caught.value.param == "tool_choice"
