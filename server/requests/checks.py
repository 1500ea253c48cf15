"""From a JSON body to a checked one: everything that can be refused without tokenising.

It may run in a thread, so it changes nothing. Not here: prompts as tokens, and the call (`server/requests/calls.py`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from server.experts.requested_count import (
    merge_extra_body,
    refuse_misspelled,
    requested_in_body,
    requested_in_header,
)
from server.experts.selection import Selection
from server.requests.json_body import IncomingRequest
from server.requests.limits import check_limits, max_new_tokens, prompts_of, tokens_to_keep
from server.requests.notices import Notices
from server.requests.output_spec import offered_tools
from server.schemas.base import GenerationBody, refuse_unsupported, validate
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.kinds import without_unknown_tools
from server.schemas.unknown import unknown_fields, unknown_nested
from server.service import Service

TOOL_KINDS = ("function",)
Body = TypeVar("Body", bound=GenerationBody)
Chat = TypeVar("Chat", bound=ChatBody)
Completion = TypeVar("Completion", bound=CompletionBody)


@dataclass(frozen=True, slots=True)
class CheckedBody(Generic[Body]):
    """A body in which nothing is wrong that can be seen without tokenising."""

    body: Body
    selection: Selection
    unknown: list[str]  # fields that nothing reads
    skipped_tools: list[str]  # of kinds that are not supported

    @property
    def notices(self) -> Notices:
        return Notices(self.skipped_tools, self.unknown)


def check_chat(
    service: Service, request: IncomingRequest, raw: Mapping[str, Any], body_type: type[Chat]
) -> CheckedBody[Chat]:
    """The checked body of a chat."""
    checked = _check(service, request, body_type, raw)
    offered_tools(checked.body)
    tokens_to_keep(checked.body, service.served_models.info.max_model_len)
    return checked


def check_completion(
    service: Service, request: IncomingRequest, raw: Mapping[str, Any], body_type: type[Completion]
) -> tuple[CheckedBody[Completion], list[str | list[int]]]:
    """The checked body and its prompts. Prompts of token ids that do not fit the context are refused here."""
    checked = _check(service, request, body_type, raw)
    models, body = service.check_ready(), checked.body
    context = models.info.max_model_len
    prompts, kept = prompts_of(body.prompt, service.settings.max_prompts), tokens_to_keep(body, context)
    if kept is not None:
        prompts = [prompt if isinstance(prompt, str) else prompt[-kept:] for prompt in prompts]
    for prompt in prompts:
        if isinstance(prompt, list):
            max_new_tokens(body.answer_limit, None, len(prompt), context)
            models.check_tokens({"prompt": prompt})
    return checked, prompts


def _check(
    service: Service, request: IncomingRequest, body_type: type[Body], given: Mapping[str, Any]
) -> CheckedBody[Body]:
    """Everything that can be refused without tokenising. It may run in a thread, so it changes nothing."""
    models = service.check_ready()
    requested = requested_in_body(given)
    raw = merge_extra_body(given)
    skipped: list[str] = []
    if issubclass(body_type, ChatBody):
        raw, skipped = supported_tools(service, raw)
    refuse_misspelled(raw)
    refuse_unsupported(body_type, raw)
    body = validate(body_type, raw, service.sampling_defaults, service.settings)
    requested += [*models.requested_in_alias(body.model), *requested_in_header(request.expert_headers)]
    selection = models.select(requested)
    check_limits(body, service.settings)
    return CheckedBody(body, selection, unknown_fields(body_type, raw) + unknown_nested(body, raw), skipped)


def supported_tools(
    service: Service, raw: Mapping[str, Any], known: Collection[str] = TOOL_KINDS
) -> tuple[dict[str, Any], list[str]]:
    """The body without tools of kinds that are not supported, and their names.

    With --strict-tools they stay, and are refused by the body's own checks.
    """
    settings = service.settings
    return (dict(raw), []) if settings.strict_tools else without_unknown_tools(raw, known, settings.max_tools)
