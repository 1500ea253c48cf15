"""From a JSON body to a call that the engine can run: every refusal is made here or below.

It knows fields and limits; it does not run anything and formats no answer.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import structlog
from fastapi import Request as HttpRequest

from model.budget import ExpertBudget
from model.errors import InvalidRequest, shown
from server.depth import least_bytes
from server.errors import key_name_of
from server.experts.requested_count import (
    HEADER,
    ask_of_header,
    asks_of_body,
    merged,
    refuse_misspelt,
    reported,
    resolve,
)
from server.generation.admission import Reservation
from server.generation.generation import Generation, Timeouts
from server.protocols import ChatTemplate
from server.requests.encoding import encode_all, sequences_to_avoid
from server.requests.limits import check_limits, kept_tokens, prompts_of, room_for
from server.requests.output_fields import asked_of
from server.requests.output_spec import Form, form_of_chat, form_of_completion, offered
from server.requests.sequences import sequences_of
from server.schemas.base import GenerationBody, refuse_unsupported, validate
from server.schemas.chat import ChatBody, Message, TemplateBody, Tool
from server.schemas.completions import CompletionBody
from server.schemas.unknown import unknown_fields, unknown_nested
from server.service import Service

log = structlog.get_logger("server")
SHORT_GRAMMAR = 4096  # bytes from which a grammar is written on the event loop at the most
LOGGED_FIELDS = 256  # unknown fields that are logged, each once


@dataclass(frozen=True, slots=True)
class Call:
    """One accepted request, its prompts tokenised and its slots taken."""

    id: str
    model: str  # as the caller named it
    created: int
    arrived: float
    body: GenerationBody
    budget: ExpertBudget
    form: Form
    prompts: tuple[tuple[int, ...], ...]
    generation: Generation
    fingerprint: str  # of the model and what runs it

    @property
    def num_experts(self) -> int | float:
        return reported(self.budget)


Prepared = tuple[Form, list[list[int]]]
Body = TypeVar("Body", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class Checked(Generic[Body]):
    """A body in which nothing is wrong that can be seen without tokenising."""

    body: Body
    budget: ExpertBudget
    unknown: list[str]  # fields that nothing reads


async def open_completion(service: Service, http: HttpRequest) -> Call:
    arrived = time.monotonic()
    checked, prompts = await service.bodies.read(http, partial(_check_completion, service, http))
    body = checked.body
    _note_unknown(service, checked.unknown)
    reservation = service.admission.reserve(body.answers * len(prompts), key_name_of(http))

    async def prepare() -> Prepared:
        form = await _off_loop(body, form_of_completion, body, *_schema_rules(service))
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encode, kept = partial(service.tokenizer.encode, framed=body.add_special_tokens), _kept(service, body)
        encoded = iter(await encode_all(service, encode, texts, body.answer_limit, kept))
        return form, [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    return await _open(service, "cmpl-", key_name_of(http), checked, reservation, prepare, arrived)


async def open_chat(service: Service, http: HttpRequest) -> Call:
    arrived = time.monotonic()
    checked = await service.bodies.read(http, partial(check_chat, service, http))
    return await open_conversation(service, http, checked, arrived)


async def open_conversation(
    service: Service, http: HttpRequest, checked: Checked[ChatBody], arrived: float, kind: str = "chatcmpl-"
) -> Call:
    """A call from the body of a chat; `kind` is what its id begins with."""
    body = checked.body
    _note_unknown(service, checked.unknown)
    reservation = service.admission.reserve(body.answers, key_name_of(http))

    async def prepare() -> Prepared:
        tools = None if body.tool_choice == "none" else body.tools
        variables = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
        text = await service.rendering.run(render, service, body, body.messages, tools, variables)
        form = await _off_loop(body, form_of_chat, body, service.dialect, text, *_schema_rules(service))
        encode, kept = partial(service.tokenizer.encode_chat, framed=body.add_special_tokens), _kept(service, body)
        return form, await encode_all(service, encode, [text], body.answer_limit, kept)

    return await _open(service, kind, key_name_of(http), checked, reservation, prepare, arrived)


def render(
    service: Service,
    body: TemplateBody,
    messages: list[Message],
    tools: list[Tool] | None,
    variables: Mapping[str, Any],
) -> str:
    """The chat template's text. A template is code from a checkpoint, so it is to run off the event loop."""
    if service.chat is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", "messages", "no_chat_template")
    if tools and not service.chat.knows_tools:
        raise InvalidRequest("this model's chat template knows no tools", "tools", "unsupported_parameter")
    said, functions = [message.plain() for message in messages], [tool.plain() for tool in tools or ()] or None
    set_by_name = body.chat_template_kwargs | dict(variables) | _thinking(service.chat, body)
    return service.chat.render(said, functions, body.add_generation_prompt, set_by_name, body.continue_final_message)


def _schema_rules(service: Service) -> tuple[int, bool]:
    """The most bytes that a grammar may be written from, and whether objects of schemas are closed."""
    return service.settings.max_grammar_bytes, service.settings.schema_objects == "closed"


def _thinking(chat: ChatTemplate, body: TemplateBody) -> dict[str, bool]:
    """`enable_thinking` for the template.

    Raises:
        InvalidRequest: the template does not know it, or the request says two things.
    """
    field, wanted = "enable_thinking", body.enable_thinking
    if wanted is None:
        return {}
    if not chat.knows_thinking:
        reason = "is not known to this model's chat template"
        raise InvalidRequest(f"{field} = {shown(wanted)} {reason}", field, "unsupported_parameter")
    if (other := body.chat_template_kwargs.get(field, wanted)) != wanted:
        reason = f"says {shown(wanted)} and chat_template_kwargs says {shown(other)}; they must agree"
        raise InvalidRequest(f"{field} {reason}", field)
    return {field: wanted}


async def _off_loop(body: GenerationBody, make: Callable[..., Form], *args: Any) -> Form:
    """Long grammars take a while to write."""
    schemas = [tool.function.parameters for tool in body.tools or ()] if isinstance(body, ChatBody) else []
    asked = asked_of(body)
    long = least_bytes([*(one.value for one in asked), schemas], SHORT_GRAMMAR) > SHORT_GRAMMAR
    long = long or any(one.kind == "grammar" for one in asked)
    return await asyncio.to_thread(make, *args) if long else make(*args)


def _kept(service: Service, body: GenerationBody) -> int | None:
    return kept_tokens(body, service.catalogue.info.max_model_len)


def check_chat(service: Service, http: HttpRequest, raw: Mapping[str, Any]) -> Checked[ChatBody]:
    checked = _check(service, http, ChatBody, raw)
    offered(checked.body)
    _kept(service, checked.body)
    return checked


def _check_completion(
    service: Service, http: HttpRequest, raw: Mapping[str, Any]
) -> tuple[Checked[CompletionBody], list[str | list[int]]]:
    """The checked body and its prompts. Lists of ids that do not fit the context are refused before they are read."""
    checked, catalogue = _check(service, http, CompletionBody, raw), service.check_ready()
    body, context = checked.body, catalogue.info.max_model_len
    prompts, kept = prompts_of(body.prompt, service.settings.max_prompts), kept_tokens(body, context)
    if kept is not None:
        prompts = [prompt if isinstance(prompt, str) else prompt[-kept:] for prompt in prompts]
    for prompt in prompts:
        if isinstance(prompt, list):
            room_for(body.answer_limit, None, len(prompt), context)
            catalogue.check_tokens({"prompt": prompt})
    return checked, prompts


def _check(service: Service, http: HttpRequest, kind: type[Body], given: Mapping[str, Any]) -> Checked[Body]:
    """Everything that can be refused without tokenising. It may run in a thread, so it changes nothing."""
    catalogue = service.check_ready()
    asks = asks_of_body(given)
    raw = merged(given)
    refuse_misspelt(raw)
    refuse_unsupported(kind, raw)
    body = validate(kind, raw, service.sampling_defaults, service.settings)
    asks += [*catalogue.asks_of_model(body.model), *ask_of_header(http.headers.getlist(HEADER))]
    budget = resolve(catalogue.info.experts, catalogue.default_count, asks)
    check_limits(body, service.settings)
    return Checked(body, budget, unknown_fields(kind, raw) + unknown_nested(body, raw))


def _note_unknown(service: Service, fields: list[str]) -> None:
    if fields:
        service.metrics.inc("request_unknown_fields", by=len(fields))
    for field in fields[:16]:
        if field[:64] not in service.seen_fields and len(service.seen_fields) < LOGGED_FIELDS:
            service.seen_fields.add(field[:64])
            log.warning("unknown field ignored", field=field[:64])


async def _open(
    service: Service,
    kind: str,
    key: str,
    checked: Checked[Any],
    reservation: Reservation,
    prepare: Callable[[], Awaitable[Prepared]],
    arrived: float,
) -> Call:
    """Tokenise and build the sequences. The slots are held already, and given back if anything is refused."""
    call_id, body, budget = kind + uuid.uuid4().hex, checked.body, checked.budget
    try:
        form, tokens = await prepare()
        prompts = tuple(map(tuple, tokens))
        avoided = await sequences_to_avoid(service, body.bad_words) if body.bad_words else ()
        sequences = sequences_of(service, body, form, prompts, budget, call_id, arrived, key, avoided)
        reservation.add_tokens(body.answers * sum(map(len, prompts)))
        service.charge(key, sum(map(len, prompts)))
    except BaseException:
        reservation.release()
        raise
    timeouts = Timeouts(service.settings.queue_timeout, service.settings.total_timeout)
    generation = Generation(service.engine, reservation, sequences, timeouts, service.compiler, form.field)
    model, fingerprint = body.model or service.settings.name, service.catalogue.fingerprint
    return Call(call_id, model, int(time.time()), arrived, body, budget, form, prompts, generation, fingerprint)
