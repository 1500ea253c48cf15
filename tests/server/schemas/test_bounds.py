"""What a body may hold: every list and object of every model has a bound that holds before its entries."""

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient

from model.errors import InvalidRequest, shown
from server.json_limits import JsonLimits, JsonTooLarge, is_deeper, min_json_bytes, parse
from server.schemas.bounds import AtMost
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.messages import MessagesBody
from server.schemas.ollama import OllamaChatBody, OllamaGenerateBody
from server.schemas.responses import ResponsesBody
from server.schemas.tokens import DetokenizeBody, TokenizeBody
from server.schemas.unknown import unknown_nested
from server.settings import Settings
from tests.server.harness import CHAT, COMPLETIONS, in_memory, service_of, value
from tests.server.test_responses import RESPONSES

OTHER_FORMS = (MessagesBody, OllamaChatBody, OllamaGenerateBody)
BODIES = (CompletionBody, ChatBody, ResponsesBody, *OTHER_FORMS, TokenizeBody, DetokenizeBody)
# what pydantic does not look into, and where it is bounded
BY_HAND = {
    "prompt": "server/requests/limits.py: --max-prompts, and the context for each",
    "num_experts": "server/experts/selection.py: must be an integer",
    "experts": "server/experts/experts_object.py and selection.py: known keys, as many counts as layers",
}


def models_of(kind: type[BaseModel], found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    if kind not in found:
        found.add(kind)
        for field in kind.model_fields.values():
            for inner in within(field.annotation):
                models_of(inner, found)
    return found


def within(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from within(inner)


def unbounded(annotation: Any, bounded: bool) -> Iterator[Any]:
    """Every list or object in a type without `AtMost` around it; a bound does not reach into entries."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        yield from unbounded(inner, bounded or any(isinstance(one, AtMost) for one in metadata))
        return
    holds = (get_origin(annotation) or annotation) in (list, dict, set, tuple)
    if holds and not bounded:
        yield annotation
    for inner in get_args(annotation):
        yield from unbounded(inner, bounded and not holds)


def test_every_list_and_object_has_a_bound() -> None:
    models: set[type[BaseModel]] = set()
    for body in BODIES:
        models_of(body, models)
    assert len(models) > 30
    for model in models:
        for name, field in model.model_fields.items():
            bounded = any(isinstance(one, AtMost) for one in field.metadata)
            assert not list(unbounded(field.annotation, bounded)), f"{model.__name__}.{name}: a list without AtMost"
            assert field.annotation is not Any or name in BY_HAND, f"{model.__name__}.{name}: who bounds it?"


def test_the_walk_finds_what_has_no_bound() -> None:
    assert list(unbounded(list[int] | None, False)) == [list[int]]
    assert list(unbounded(Annotated[list[list[int]], AtMost(3)], False)) == [list[int]]
    assert not list(unbounded(Annotated[str | Annotated[list[int], "tag"], AtMost(3)], False))


def test_bounds_name_settings() -> None:
    for model in set().union(*(models_of(body, set()) for body in BODIES)):
        for field in model.model_fields.values():
            for one in field.metadata:
                assert (
                    not (isinstance(one, AtMost) and isinstance(one.limit, str)) or one.limit in Settings.model_fields
                )


class Listed(BaseModel):
    items: Annotated[list[int] | None, AtMost("max_tools", "things")] = None


def test_one_wrong_entry_is_enough_and_the_operators_limit_holds() -> None:
    with pytest.raises(ValidationError) as wrong:
        Listed.model_validate({"items": ["x"] * 100})
    assert wrong.value.error_count() == 1
    with pytest.raises(ValidationError, match="at most 2 things, got 3"):
        Listed.model_validate({"items": [1, 2, 3]}, context=Settings(max_tools=2))
    assert Listed.model_validate({"items": [1, 2]}, context=Settings(max_tools=2)).items == [1, 2]


LIMITS = JsonLimits(depth=3, values=1000, objects=20)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"b": [1]}}',
        json.dumps({"a": '{[:,\\"' * 100 + "\\"}),
        json.dumps(["\\\\", '\\"', '"' * 50, "é{{{{{" * 9000]),
        json.dumps([1] * 1000),
        json.dumps(["a,b"] * 1000),
    ],
)
def test_json_within_limits(text: str) -> None:
    assert parse(text.encode(), LIMITS) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("[[[[1]]]]", "3 levels"),
        ("[" * 5 + "]" * 5, "3 levels"),
        ("[" * 3000, "20 objects"),
        (json.dumps([1] * 1002), "1000 values"),
        (json.dumps(["\\", '"'] * 501), "1000 values"),
        (json.dumps([{}] * 20), "20 objects"),
        (json.dumps(dict.fromkeys(map(str, range(21)))), "20 objects"),
        (json.dumps(["x" * 70_000, *[{}] * 20]), "20 objects"),
    ],
)
def test_json_beyond_limits(text: str, limit: str) -> None:
    with pytest.raises(JsonTooLarge, match=limit):
        parse(text.encode(), LIMITS)


def test_depth_and_size() -> None:
    assert not is_deeper([[1], {"a": [2]}], 3) and is_deeper([[1], {"a": [2]}], 2) and not is_deeper(1, 0)
    for thing in ([], {}, [1, 2], {"a": [True, None], "bc": "d"}, "x", [[[]]], {"k": {"k": 1}}):
        assert min_json_bytes(thing, 100) <= len(json.dumps(thing)), thing
    assert min_json_bytes({"a": ["x", "y"]}, 100) == len('{"a": ["x", "y"]}')
    begun = time.process_time()
    assert min_json_bytes([[1] * 1_000_000] * 100, 100) > 100 and time.process_time() - begun < 0.5


@pytest.mark.parametrize(
    "thing", [[1, 2], {"a": [None, True]}, "x", 2.5, (), ["x" * 20] * 5, {"k": "x" * 70}, "x" * 64]
)
def test_values_are_shown_as_they_are_and_no_further(thing: Any) -> None:
    assert shown(thing) == repr(thing)[:64]


def test_showing_does_not_grow_with_the_value() -> None:
    things = ("x" * 8_000_000, [[1] * 1_000_000] * 10, dict.fromkeys(range(1_000_000)))
    begun = time.process_time()
    for thing in things:
        assert len(shown(thing)) == 64
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "[" * 64
    assert time.process_time() - begun < 0.2


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with in_memory(max_json_depth=20) as client:
        yield client


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [21, 150, 600, 3000, 30_000])
def test_arguments_of_earlier_calls_are_held_to_the_depth(client: TestClient, levels: int) -> None:
    """They are texts, and parsed for the template."""
    call = {"type": "function", "function": {"name": "f", "arguments": nested(levels)}}
    said = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]
    items = [{"type": "function_call", "call_id": "a", "name": "f", "arguments": nested(levels)}]
    for path, body, field in (
        (CHAT, {"messages": said}, "messages[0].tool_calls[0].function.arguments"),
        ("/tokenize", {"messages": said}, "messages[0].tool_calls[0].function.arguments"),
        (RESPONSES, {"input": items}, "input[0].arguments"),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == field and error["message"] == f"{field} is no JSON of at most 20 levels"


def test_arguments_of_all_calls_are_bounded_together(client: TestClient) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps([[]] * 1000)}}
    for text in ('"', "x"):  # a text that is no JSON hides nothing of the next
        odd = {"type": "function", "function": {"name": "f", "arguments": text}}
        said = [{"role": "assistant", "tool_calls": [odd, *[call] * 140]}]
        for path in (CHAT, "/tokenize"):
            error = client.post(path, json={"messages": said}).json()["error"]
            assert error["param"] == "messages" and "at most 65536 objects, lists and keys together" in error["message"]


def test_arguments_that_are_shallow_or_no_json_pass(client: TestClient) -> None:
    for text in (nested(20), "no JSON", "{" * 30, '["' + "{" * 1000 + '"]', ""):
        call = {"type": "function", "function": {"name": "f", "arguments": text}}
        said = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]
        assert client.post(CHAT, json={"messages": said}).status_code == 200, text


def test_schemas_as_texts_are_held_to_the_operators_depth(client: TestClient) -> None:
    for body in ({"guided_json": nested(21)}, {"structured_outputs": {"json": nested(21)}}):
        message = client.post(COMPLETIONS, json={"prompt": "x"} | body).json()["error"]["message"]
        assert "no JSON of at most 20 levels" in message
    with in_memory(max_json_depth=150) as deep:
        schema = '{"anyOf":[' * 70 + "{}" + "]}" * 70  # 140 levels
        assert deep.post(COMPLETIONS, json={"prompt": "x", "guided_json": schema}).status_code == 200


def test_unknown_nested_fields_are_counted_by_path() -> None:
    tool = {"type": "function", "function": {"name": "f", "cache": 1, "parameters": {"anything": {"x": 1}}}}
    message = {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": 1}], "weight": 1}
    body = {
        "messages": [message, message, {"role": "user", "content": "x", "name": None, "audio": None}],
        "tools": [tool],
        "tool_choice": "none",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"free": 1}}, "more": 1},
        "stream": True,
        "stream_options": {"include_usage": True, "chunk": 1},
    }
    paths = [
        "stream_options.chunk",
        "response_format.more",
        "messages[].weight",
        "messages[].content[].cache_control",
        "tools[].function.cache",
    ]
    assert sorted(unknown_nested(ChatBody.model_validate(body), body)) == sorted(paths)
    with in_memory() as client:
        assert client.post(CHAT, json=body | {"top": 1}).status_code == 200
        assert value(service_of(client), "request_unknown_fields_total") == 6
        assert service_of(client).seen_fields == {*paths, "top"}


def test_unknown_nested_fields_of_responses() -> None:
    """What an answer's items have beside their content comes back with the next turn and asks nothing."""
    text = {"type": "output_text", "text": "x", "annotations": [], "logprobs": []}
    said = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [text], "odd": 1}
    with in_memory() as client:
        assert client.post(RESPONSES, json={"input": [said], "text": {"size": 1}}).status_code == 200
        assert service_of(client).seen_fields == {"input[].odd", "text.size"}


def test_unknown_nested_fields_without_end() -> None:
    body = {"messages": [{"role": "user", "content": "x", f"k{i}": 1} for i in range(4000)]}
    begun = time.process_time()
    found = unknown_nested(ChatBody.model_validate(body), body)
    assert len(found) == 256 and time.process_time() - begun < 0.5
    body = {"messages": [{"role": "user", "content": "x", "odd": 1}] * 4000}
    assert unknown_nested(ChatBody.model_validate(body), body) == ["messages[].odd"]


def test_a_body_has_so_many_fields() -> None:
    with in_memory(max_body_fields=64) as client:
        for body, param in (
            ({"prompt": "x"} | {f"k{i}": 1 for i in range(64)}, None),
            ({"prompt": "x", "extra_body": {f"k{i}": 1 for i in range(65)}}, "extra_body"),
        ):
            error = client.post(COMPLETIONS, json=body).json()["error"]
            assert error["param"] == param and error["message"].endswith("at most 64 fields, got 65")


def test_ids_that_are_none_are_named() -> None:
    with in_memory() as client:
        served_models = service_of(client).served_models
        with pytest.raises(InvalidRequest, match="tokens: token id 257 is not between 0 and 256"):
            served_models.check_tokens({"tokens": [0, 256, 257, -1]})
        served_models.check_tokens({"tokens": [], "prompt": [0, 256]})
