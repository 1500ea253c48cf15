"""/v1/responses as a chat: its body becomes a chat's, and what a chat refuses is said in the caller's own words.

It knows both bodies; it checks nothing that the chat checks, and writes no answer.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from model.errors import InvalidRequest
from server.experts.requested_count import EXPERT_FIELDS, merge_extra_body
from server.requests.calls import CheckedBody, GenerationCall, check_chat, open_conversation
from server.requests.json_body import IncomingRequest, read_json
from server.schemas.base import SampledBody
from server.schemas.chat import ChatBody, TemplateBody
from server.schemas.responses import (
    LOGPROBS,
    MOVED,
    FlatAllowed,
    FlatChoice,
    FlatTool,
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputPart,
    InputReasoning,
    ResponsesBody,
    SchemaFormat,
    read_body,
)
from server.schemas.unknown import unknown_nested
from server.service import Service

SHARED = SampledBody.model_fields.keys() | TemplateBody.model_fields.keys()
OWN = (ResponsesBody.model_fields.keys() - SHARED) | ResponsesBody.unsupported.keys() | MOVED.keys() | {"extra_body"}
WORDS = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
FIRST_WORDS = {**WORDS, "messages": "input", "prompt": "input"}
# not within quotes, where a caller's own values stand, nor as a part of another name
WORD = re.compile(rf"(?<![\w.'\"])({'|'.join(WORDS)})(?![\w'\"])")
FIRST = re.compile(rf"({'|'.join(FIRST_WORDS)})(?=[\[.:]|$)")


async def open_response(service: Service, request: IncomingRequest) -> tuple[GenerationCall, ResponsesBody]:
    """The call, and the body as it was asked, which the answer repeats."""
    arrived = time.monotonic()
    checked, body = await read_json(service, request, partial(_check_response, service, request))
    with in_own_words():
        return await open_conversation(service, request, checked, arrived, "resp_"), body


def _check_response(
    service: Service, request: IncomingRequest, given: Mapping[str, Any]
) -> tuple[CheckedBody[ChatBody], ResponsesBody]:
    service.check_ready()
    raw = merge_extra_body(given)
    body = read_body(raw, service.settings)
    unknown = unknown_nested(body, raw)
    with in_own_words():
        checked = check_chat(service, request, chat_of(body, raw) | _nested_counts(given))
    return replace(checked, unknown=checked.unknown + unknown), body


def chat_of(body: ResponsesBody, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw body of the chat that `body`, read from `raw`, asks for. What this API does not know is passed on.

    Raises:
        InvalidRequest: alternatives of tokens are asked for, but no log-probabilities.
    """
    logprobs = LOGPROBS in body.include
    if body.top_logprobs and not logprobs:
        raise InvalidRequest(
            f'top_logprobs is {body.top_logprobs}, which needs include: ["{LOGPROBS}"]', "top_logprobs"
        )
    said: dict[str, Any] = {
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": logprobs,
        "top_logprobs": body.top_logprobs,
        "response_format": _format(body),
        "tools": [_tool(tool) for tool in body.tools],
        "tool_choice": _choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort,
    }
    passed = {field: value for field, value in raw.items() if field not in OWN}
    return passed | {field: value for field, value in said.items() if value is not None}


def _nested_counts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The expert fields of a literal `extra_body`, which are compared with the others where all counts are known."""
    nested = given.get("extra_body")
    return {"extra_body": {field: nested.get(field) for field in EXPERT_FIELDS}} if isinstance(nested, Mapping) else {}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    turns = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    said = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for item in said:
        _add(turns, item)
    return turns


def _add(turns: list[dict[str, Any]], item: InputItem) -> None:
    """The items of one answer become one message, as templates know them: thought, text, calls."""
    match item:
        case InputReasoning():
            if text := "".join(part.text for part in item.content or ()):
                _turn(turns, "reasoning_content", "content", "tool_calls")["reasoning_content"] = text
        case InputMessage(role="assistant"):
            _turn(turns, "content")["content"] = _text(item.content)
        case InputMessage():
            turns.append({"role": item.role, "content": _text(item.content)})
        case InputCall():
            _turn(turns).setdefault("tool_calls", []).append(_call(item))
        case InputCallOutput():
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})


def _turn(turns: list[dict[str, Any]], *fields: str) -> dict[str, Any]:
    """The assistant's message to add to: the last, or a new one where that has one of `fields`."""
    if not turns or turns[-1]["role"] != "assistant" or any(field in turns[-1] for field in fields):
        turns.append({"role": "assistant"})
    return turns[-1]


def _text(content: str | list[InputPart]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [{"type": "text", "text": part.text} for part in content]


def _call(item: InputCall) -> dict[str, Any]:
    function = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _format(body: ResponsesBody) -> dict[str, Any] | None:
    wanted = body.text.format
    if wanted is None:
        return None
    if not isinstance(wanted, SchemaFormat):
        return wanted.model_dump(by_alias=True, exclude_none=True)
    schema = wanted.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
    return {"type": wanted.type, "json_schema": schema}


def _tool(tool: FlatTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}


def _choice(body: ResponsesBody) -> str | dict[str, Any] | None:
    match body.tool_choice:
        case FlatChoice() as chosen:
            return _chosen(chosen)
        case FlatAllowed(mode=mode, tools=tools):
            allowed = {"mode": mode, "tools": [_chosen(tool) for tool in tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        case mode:
            return mode


def _chosen(tool: FlatChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


@contextmanager
def in_own_words() -> Iterator[None]:
    """What is refused inside, a chat or the engine refuses by a chat's names."""
    try:
        yield
    except InvalidRequest as error:
        raise own_words(error) from None


def own_words(error: InvalidRequest) -> InvalidRequest:
    """The same refusal with the names that the caller wrote."""
    message = WORD.sub(lambda found: WORDS[found[0]], _first(error.message))
    return type(error)(message, None if error.param is None else _first(error.param), error.code)


def _first(text: str) -> str:
    found = FIRST.match(text)
    return FIRST_WORDS[found[0]] + text[found.end() :] if found else text
