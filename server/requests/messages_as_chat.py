"""Turns bodies of Anthropic's API into chat bodies, and the names in the chat's errors back into those of the request.

It depends on both bodies. It checks nothing that the chat checks, and formats no answer.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from model.errors import InvalidRequest
from server.experts.requested_count import merge_extra_body, nested_counts
from server.requests.calls import GenerationCall, open_conversation
from server.requests.chat_prompt import chat_prompt
from server.requests.checks import CheckedBody, check_chat, supported_tools
from server.requests.encoding import max_characters
from server.requests.field_names import FieldNames
from server.requests.json_body import IncomingRequest, read_json
from server.requests.notices import Notices
from server.schemas.base import SampledBody
from server.schemas.chat import ChatBody, ChatWithinContext, TemplateBody
from server.schemas.messages import (
    CHAT_NAMES,
    TOOL_KINDS,
    ContentBlock,
    CountBody,
    MessagesBody,
    RedactedBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    read_messages,
)
from server.schemas.tokens import MAX_TOKENS
from server.schemas.unknown import unknown_nested
from server.service import Service
from weights.tokenizer import TooManyTokens

Body = TypeVar("Body", bound=CountBody)
CHAT_FIELDS = SampledBody.model_fields.keys() | TemplateBody.model_fields.keys()
OWN_FIELDS = (MessagesBody.model_fields.keys() - CHAT_FIELDS) | CountBody.unsupported.keys() | CHAT_NAMES.keys()
INTERNAL_FIELDS = (
    ChatWithinContext.model_fields.keys() - ChatBody.model_fields.keys()
)  # of no API: a request cannot set them
MESSAGES_NAMES = FieldNames(
    anywhere={
        "max_completion_tokens": "max_tokens",
        "response_format": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "enable_thinking": "thinking",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    },
    at_start={"stop": "stop_sequences", "prompt": "messages", "continue_final_message": "messages"},
)
TOO_LONG = "context_length_exceeded"
# Claude Code begins the system prompt with such a line, which differs in every request: no prompt would share a prefix
BILLING = "x-anthropic-billing-header:"
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


async def open_messages(service: Service, request: IncomingRequest) -> tuple[GenerationCall, MessagesBody]:
    """The call, and the body as it was sent."""
    arrived = time.monotonic()
    checked, body = await read_json(service, request, partial(_check, MessagesBody, service, request))
    with messages_errors():
        return await open_conversation(service, request, checked, arrived, "msg_"), body


async def count_tokens(service: Service, request: IncomingRequest) -> tuple[int, Notices]:
    """How many tokens the prompt of a body has, and what of the body was left out."""
    checked, _ = await read_json(service, request, partial(_check, CountBody, service, request))
    with messages_errors():
        return await service.token_routes.run(_prompt_length, service, checked.body), checked.notices


def _prompt_length(service: Service, body: ChatBody) -> int:
    text, most = chat_prompt(service, body), max_characters(service.served_models.info.max_model_len)
    if len(text) > most:
        raise InvalidRequest(f"messages: {len(text)} characters; at most {most} are counted", "messages")
    try:
        return len(service.tokenizer.encode_chat(text, framed=body.add_special_tokens, most=MAX_TOKENS))
    except TooManyTokens as error:
        raise InvalidRequest(f"messages: at least {error.count} tokens; at most {MAX_TOKENS} are counted") from None


def _check(
    kind: type[Body], service: Service, request: IncomingRequest, given: Mapping[str, Any]
) -> tuple[CheckedBody[ChatWithinContext], Body]:
    service.check_ready()
    raw, skipped = supported_tools(service, merge_extra_body(given), TOOL_KINDS)
    body = read_messages(kind, raw, service.settings)
    chat = chat_of(body, raw)
    unread = unknown_nested(body, raw) + _redacted(body)
    if body.thinking is not None and service.chat is not None:
        wanted = body.thinking.type != "disabled"
        if service.chat.knows_thinking:
            chat.setdefault("enable_thinking", wanted)
        elif wanted:
            unread.append("thinking")
    unread += [field for field in INTERNAL_FIELDS if field in raw]
    if body.tool_choice is not None and body.tool_choice.name is not None and body.tool_choice.type != "tool":
        unread.append("tool_choice.name")
    with messages_errors():
        checked = check_chat(service, request, chat | nested_counts(given), ChatWithinContext)
    return replace(checked, unknown=checked.unknown + unread, skipped_tools=skipped), body


def chat_of(body: CountBody, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw chat body of `body`, which was read from `raw`. Fields that this API does not have are passed on."""
    messages = _messages(body)
    translated: dict[str, Any] = {
        "messages": messages,
        "tools": [_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools],
        "reasoning_effort": body.output_config.effort,
    }
    if body.output_config.format is not None:
        schema = {"name": "answer", "schema": body.output_config.format.schema_}
        translated["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesBody):
        translated |= {"most_tokens": body.max_tokens, "stop": body.stop_sequences}
    if body.tool_choice is not None:
        translated["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
        translated["tool_choice"] = _choice(body.tool_choice.type, body.tool_choice.name)
    if body.messages[-1].role == "assistant":  # the answer goes on from it
        _check_continued(messages[-1])
        translated |= {"continue_final_message": True, "add_generation_prompt": False}
    passed = {field: value for field, value in raw.items() if field not in OWN_FIELDS | INTERNAL_FIELDS}
    return passed | {field: value for field, value in translated.items() if value is not None}


def _check_continued(last: Mapping[str, Any]) -> None:
    text = "".join(part["text"] for part in last.get("content", ()))
    if "tool_calls" in last or not text.strip():
        reason = "the last one is the assistant's, which the answer continues: it needs text and no tool_use block"
        raise InvalidRequest(f"messages: {reason}", "messages")


def _choice(kind: str, name: str | None) -> str | dict[str, Any]:
    if kind != "tool":
        return CHOICES[kind]
    if name is None:
        raise InvalidRequest("tool_choice of type tool needs a name", "tool_choice.name")
    return {"type": "function", "function": {"name": name}}


def _tool(name: str, description: str | None, schema: dict[str, Any]) -> dict[str, Any]:
    described = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **described, "parameters": schema}}


def _messages(body: CountBody) -> list[dict[str, Any]]:
    """The chat's messages. Turns of one role that follow each other become one, as Anthropic reads them."""
    messages: list[dict[str, Any]] = []
    for text in _system(body):
        _add_text(messages, "system", text)
    for i, turn in enumerate(body.messages):
        blocks = [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        for j, block in enumerate(blocks):
            _add(messages, turn, block, f"messages[{i}].content[{j}]")
        if not blocks and turn.role != "system":
            _add_text(messages, turn.role, "")
    return messages


def _system(body: CountBody) -> Iterator[str]:
    """The texts of the system prompt, without the line that only bills."""
    blocks = body.system or ()
    texts = [blocks] if isinstance(blocks, str) else [block.text for block in blocks]
    for i, text in enumerate(texts):
        if i == 0 and text.startswith(BILLING):
            text = text.partition("\n")[2]
            if not text:
                continue
        yield text


def _add(messages: list[dict[str, Any]], turn: Turn, block: ContentBlock, where: str) -> None:
    match block:
        case TextBlock(text=text):
            _add_text(messages, turn.role, text)
        case ToolResultBlock() if turn.role == "user":
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        case ToolUseBlock() if turn.role == "assistant":
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            call = {"id": block.id, "type": "function", "function": function}
            _message(messages, "assistant").setdefault("tool_calls", []).append(call)
        case ThinkingBlock() if turn.role == "assistant":
            message = _message(messages, "assistant")
            message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
        case RedactedBlock() if turn.role == "assistant":
            _message(messages, "assistant")
        case _:
            raise InvalidRequest(f"{where}: a message of the role {turn.role} has no {block.type}", where)


def _add_text(messages: list[dict[str, Any]], role: str, text: str) -> None:
    _message(messages, role).setdefault("content", []).append({"type": "text", "text": text})


def _message(messages: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """The message of `role` to add to: the last one, or a new one where that has another role."""
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role})
    return messages[-1]


def _result(block: ToolResultBlock) -> list[dict[str, Any]]:
    content = block.content or ""
    texts = [content] if isinstance(content, str) else [part.text for part in content] or [""]
    if block.is_error:
        texts[0] = f"Error: {texts[0]}"
    return [{"type": "text", "text": text} for text in texts]


def _redacted(body: CountBody) -> list[str]:
    """The name of the field of encrypted thinking blocks, if a message has any: they are not read."""
    turns = (turn.content for turn in body.messages if not isinstance(turn.content, str))
    found = any(isinstance(block, RedactedBlock) for blocks in turns for block in blocks)
    return ["messages[].content[].redacted_thinking"] if found else []


@contextmanager
def messages_errors() -> Iterator[None]:
    """Renames what the errors name that are raised inside. Claude Code looks for "prompt is too long", and compacts."""
    try:
        with MESSAGES_NAMES.in_errors():
            yield
    except InvalidRequest as error:
        if error.code != TOO_LONG:
            raise
        raise type(error)(f"prompt is too long: {error.message}", error.param, error.code) from None
