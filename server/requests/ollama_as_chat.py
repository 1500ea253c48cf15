"""Turns bodies of Ollama's API into chats and prompts, and the names in their errors back into those of the request.

It depends on all these bodies. It checks nothing that chats and completions check, and formats no answer.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from model.errors import InvalidRequest
from server.experts.requested_count import EXPERT_FIELDS, refuse_misspelled
from server.requests.calls import GenerationCall, count_notices, open_conversation, open_prompts
from server.requests.checks import CheckedBody, check_chat, check_completion, supported_tools
from server.requests.field_names import FieldNames
from server.requests.json_body import IncomingRequest, read_json
from server.requests.notices import Notices
from server.schemas.chat import ChatWithinContext
from server.schemas.completions import CompletionWithinContext
from server.schemas.ollama import OllamaBody, OllamaChatBody, OllamaGenerateBody, OllamaMessage, read_ollama
from server.service import Service

OPTION_NAMES = {  # of chats, and here
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
}
OLLAMA_NAMES = FieldNames(
    anywhere={"extra_body": "options", "enable_thinking": "think", "reasoning_effort": "think"},
    at_start={name: f"options.{own}" for name, own in OPTION_NAMES.items()},
)
LATEST = "latest"
READ_BY_LOADING = ("model", "stream", "messages", "prompt", "keep_alive")
ROLE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "assistant": ("tool_calls", "thinking"),
    "tool": ("tool_name", "tool_call_id"),
}


async def open_ollama_chat(
    service: Service, request: IncomingRequest
) -> tuple[GenerationCall | Notices, OllamaChatBody]:
    """The call, and the body as it was sent; where that has no messages, there is no call, but what it asks in vain."""
    arrived = time.monotonic()
    checked, body = await read_json(service, request, partial(_check_chat, service, request))
    if isinstance(checked, Notices):
        count_notices(service, checked)
        return checked, body
    with OLLAMA_NAMES.in_errors():
        return await open_conversation(service, request, checked, arrived, "ollama-"), body


async def open_ollama_prompt(
    service: Service, request: IncomingRequest
) -> tuple[GenerationCall | Notices, OllamaGenerateBody]:
    """The same of a body with a prompt: a chat of one message, or, where it is raw, the prompt itself."""
    arrived = time.monotonic()
    checked, body = await read_json(service, request, partial(_check_prompt, service, request))
    if isinstance(checked, Notices):
        count_notices(service, checked)
        return checked, body
    chat, raw = checked
    with OLLAMA_NAMES.in_errors():
        if chat is not None:
            return await open_conversation(service, request, chat, arrived, "ollama-"), body
        assert raw is not None
        return await open_prompts(service, request, raw, [body.prompt], arrived, "ollama-"), body


def model_of(named: str | None, served: str) -> str | None:
    """A model under Ollama's name as the server calls it: `NAME:k2` is NAME@k2, `NAME:latest` is NAME."""
    name, colon, tag = (named or "").rpartition(":")
    if not colon or name != served or named == served:
        return named
    return name if tag == LATEST else f"{name}@{tag}"


def _check_chat(
    service: Service, request: IncomingRequest, given: Mapping[str, Any]
) -> tuple[CheckedBody[ChatWithinContext] | Notices, OllamaChatBody]:
    models = service.check_ready()
    raw, skipped = supported_tools(service, given)
    body, unread = _read(OllamaChatBody, service, raw)
    if not body.messages:
        models.requested_in_alias(model_of(body.model, models.name))
        return _unread_by_loading(raw, unread, skipped), body
    unread += _of_other_roles(body.messages)
    messages = [_message(message) for message in body.messages]
    tools = {"tools": raw["tools"]} if body.tools else {}
    return _checked(service, request, body, {"messages": messages, **tools}, unread, skipped), body


Checked = tuple[CheckedBody[ChatWithinContext] | None, CheckedBody[CompletionWithinContext] | None] | Notices


def _check_prompt(
    service: Service, request: IncomingRequest, given: Mapping[str, Any]
) -> tuple[Checked, OllamaGenerateBody]:
    models = service.check_ready()
    body, unread = _read(OllamaGenerateBody, service, given)
    if not body.prompt:
        models.requested_in_alias(model_of(body.model, models.name))
        return _unread_by_loading(given, unread, []), body
    if not body.raw and service.chat is not None:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        return (_checked(service, request, body, {"messages": messages}, unread, []), None), body
    if body.system:
        raise InvalidRequest("system needs a chat template: raw must be false, and the model have one", "system")
    raw = _shared(body, service.settings.name) | {"prompt": body.prompt}
    if body.logprobs:
        raw["logprobs"] = body.top_logprobs or 0
    with OLLAMA_NAMES.in_errors():
        checked, _ = check_completion(service, request, raw, CompletionWithinContext)
    return (None, replace(checked, unknown=unread + (["think"] if body.think else []))), body


def _read(kind: type[Any], service: Service, raw: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The body, and what of it nothing reads: unknown fields, and what asks for loading."""
    for place in (raw, raw.get("options")):
        refuse_misspelled(place if isinstance(place, Mapping) else ())
    body, unread = read_ollama(kind, raw, service.settings)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(f"top_logprobs is {body.top_logprobs}, which needs logprobs: true", "top_logprobs")
    return body, unread + (["keep_alive"] if body.keep_alive is not None else [])


def _unread_by_loading(raw: Mapping[str, Any], unread: list[str], skipped: list[str]) -> Notices:
    """What a body without a prompt has beside the model's name, all of it in vain."""
    further = [name for name, value in raw.items() if value and name not in (*READ_BY_LOADING, *unread)]
    return Notices(skipped, unread + further)


def _of_other_roles(messages: Sequence[OllamaMessage]) -> list[str]:
    """The fields in messages whose role has no such field, each once."""
    found: dict[str, None] = {}
    for message in messages:
        for role, names in ROLE_FIELDS.items():
            if role != message.role:
                found |= {f"messages[].{name}": None for name in names if getattr(message, name)}
    return list(found)


def _checked(
    service: Service,
    request: IncomingRequest,
    body: OllamaBody,
    chat: Mapping[str, Any],
    unread: list[str],
    skipped: list[str],
) -> CheckedBody[ChatWithinContext]:
    raw = {**_shared(body, service.settings.name), **_thinking(service, body), **chat}
    if body.logprobs:
        raw |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    with OLLAMA_NAMES.in_errors():
        checked = check_chat(service, request, raw, ChatWithinContext)
    return replace(checked, unknown=unread, skipped_tools=skipped)


def _shared(body: OllamaBody, served: str) -> dict[str, Any]:
    """The fields that chats and completions share. Counts among the options are compared with the others later."""
    options = body.options
    sampling = {name: getattr(options, own) for name, own in OPTION_NAMES.items()}
    counts = {field: getattr(body, field) for field in EXPERT_FIELDS}
    nested = {"extra_body": {field: getattr(options, field) for field in EXPERT_FIELDS}}
    most = options.num_predict if (options.num_predict or 0) > 0 else None
    shared = {"model": model_of(body.model, served), "stream": body.stream, "format": body.format, "most_tokens": most}
    return shared | sampling | counts | nested


def _thinking(service: Service, body: OllamaBody) -> dict[str, Any]:
    """`think` as a chat has it. Not to think is what a template that knows no thinking does anyway."""
    if isinstance(body.think, str):
        return {"reasoning_effort": body.think}
    knows = service.chat is not None and service.chat.knows_thinking
    return {} if body.think is None or not (body.think or knows) else {"enable_thinking": body.think}


def _message(message: OllamaMessage) -> dict[str, Any]:
    calls = [
        {"id": call.id, "function": {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}}
        for call in message.tool_calls or ()
    ]
    own = {"tool_calls": calls or None, "reasoning_content": message.thinking}
    result = {"tool_call_id": message.tool_call_id, "name": message.tool_name}
    by_role: dict[str, dict[str, Any]] = {"assistant": own, "tool": result}
    fields = by_role.get(message.role, {})
    filled = {name: value for name, value in fields.items() if value is not None}
    return {"role": message.role, "content": message.content or "", **filled}
