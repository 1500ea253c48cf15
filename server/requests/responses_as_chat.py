"""Turns the body of /v1/responses into a chat body, and the names in the chat's errors back into those of the request.

It depends on both bodies. It checks nothing that the chat checks, and formats no answer.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from model.errors import InvalidRequest
from server.experts.requested_count import merge_extra_body, nested_counts
from server.requests.calls import GenerationCall, open_conversation
from server.requests.checks import CheckedBody, check_chat, supported_tools
from server.requests.field_names import FieldNames
from server.requests.json_body import IncomingRequest, read_json
from server.schemas.base import SampledBody
from server.schemas.chat import ChatBody, TemplateBody
from server.schemas.responses import (
    CHAT_NAMES,
    LOGPROBS,
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

CHAT_FIELDS = SampledBody.model_fields.keys() | TemplateBody.model_fields.keys()
OWN_FIELDS = ResponsesBody.model_fields.keys() - CHAT_FIELDS
RESPONSE_FIELDS = OWN_FIELDS | ResponsesBody.unsupported.keys() | CHAT_NAMES.keys() | {"extra_body"}
RESPONSE_NAMES = FieldNames(
    anywhere={
        "max_completion_tokens": "max_output_tokens",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
    },
    at_start={"messages": "input", "prompt": "input"},
)
NO_INPUT = {"role": "user", "content": ""}  # Codex probes a server with an empty list


async def open_response(service: Service, request: IncomingRequest) -> tuple[GenerationCall, ResponsesBody]:
    """The call, and the body as it was sent, which the answer repeats."""
    arrived = time.monotonic()
    checked, body = await read_json(service, request, partial(_check_response, service, request))
    with RESPONSE_NAMES.in_errors():
        return await open_conversation(service, request, checked, arrived, "resp_"), body


def _check_response(
    service: Service, request: IncomingRequest, given: Mapping[str, Any]
) -> tuple[CheckedBody[ChatBody], ResponsesBody]:
    service.check_ready()
    raw, skipped = supported_tools(service, merge_extra_body(given))
    body = read_body(raw, service.settings)
    unknown = unknown_nested(body, raw)
    with RESPONSE_NAMES.in_errors():
        checked = check_chat(service, request, chat_of(body, raw) | nested_counts(given), ChatBody)
    return replace(checked, unknown=checked.unknown + unknown, skipped_tools=skipped), body


def chat_of(body: ResponsesBody, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw chat body of `body`, which was read from `raw`. Fields that this API does not have are passed on.

    Raises:
        InvalidRequest: `top_logprobs` is set, but log-probabilities are not included.
    """
    logprobs = LOGPROBS in body.include
    if body.top_logprobs and not logprobs:
        raise InvalidRequest(
            f'top_logprobs is {body.top_logprobs}, which needs include: ["{LOGPROBS}"]', "top_logprobs"
        )
    translated: dict[str, Any] = {
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
    passed = {field: value for field, value in raw.items() if field not in RESPONSE_FIELDS}
    return passed | {field: value for field, value in translated.items() if value is not None}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for item in items:
        _add(messages, item)
    return messages if items else [*messages, NO_INPUT]


def _add(messages: list[dict[str, Any]], item: InputItem) -> None:
    """Add an item. The items of one answer become one message, as chat templates expect: reasoning, text, calls."""
    match item:
        case InputReasoning():
            text = "".join(part.text for part in item.content or ())
            if text:
                message = _assistant_message(messages, "reasoning_content", "content", "tool_calls")
                message["reasoning_content"] = text
        case InputMessage(role="assistant"):
            _assistant_message(messages, "content")["content"] = _text(item.content)
        case InputMessage():
            messages.append({"role": item.role, "content": _text(item.content)})
        case InputCall():
            _assistant_message(messages).setdefault("tool_calls", []).append(_call(item))
        case InputCallOutput():
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})


def _assistant_message(messages: list[dict[str, Any]], *fields: str) -> dict[str, Any]:
    """The assistant's message to add to: the last one, or a new one where that has one of `fields` already."""
    if not messages or messages[-1]["role"] != "assistant" or any(field in messages[-1] for field in fields):
        messages.append({"role": "assistant"})
    return messages[-1]


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
