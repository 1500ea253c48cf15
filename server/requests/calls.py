"""From a JSON body to a generation call: every fault of a request is found here or below, before the engine sees it.

Not here: running a generation call (see `server/generation`) and formatting its answer (see `server/formats`).
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import structlog

from model.errors import InvalidRequest, shown
from server.experts.choice import ExpertChoice
from server.experts.prices import Prices
from server.experts.requested_count import (
    merge_extra_body,
    refuse_misspelled,
    requested_in_body,
    requested_in_header,
)
from server.experts.selection import Selection, count_in_header, rounded
from server.generation.admission import Reservation
from server.generation.generation import Generation, Timeouts
from server.generation.passes import PassUsage, pass_usages
from server.json_limits import min_json_bytes
from server.protocols import ChatTemplateProtocol
from server.requests.encoding import bad_word_tokens, encode_all
from server.requests.json_body import IncomingRequest, read_json
from server.requests.limits import check_limits, max_new_tokens, prompts_of, tokens_to_keep
from server.requests.notices import Notices
from server.requests.output_fields import constraint_fields
from server.requests.output_spec import OutputSpec, chat_output_spec, completion_output_spec, offered_tools
from server.requests.sequences import SequenceBuilder
from server.schemas.base import GenerationBody, refuse_unsupported, validate
from server.schemas.chat import ChatBody, Message, TemplateBody, Tool
from server.schemas.completions import CompletionBody
from server.schemas.kinds import without_unknown_tools
from server.schemas.unknown import unknown_fields, unknown_nested
from server.service import Service

log = structlog.get_logger("server")
SHORT_GRAMMAR = 4096  # bytes; a grammar written from more of them is written in a thread
MAX_LOGGED_FIELDS = 256  # unknown fields that are logged, each once
TOOL_KINDS = ("function",)


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """One accepted request: its prompts are tokenised and its slots in the queue are taken."""

    id: str
    model: str  # as the client named it
    created: int
    arrived: float
    body: GenerationBody
    choice: ExpertChoice
    output_spec: OutputSpec
    prompts: tuple[tuple[int, ...], ...]
    generation: Generation
    fingerprint: str  # of the model and what runs it
    prices: Prices | None
    notices: Notices

    def passes(self, shown: Mapping[int, int] | None = None) -> list[PassUsage]:
        """What its passes used so far; `shown`, in a stream: the tokens of each answer that its client has."""
        cascade = self.choice.cascade
        budgets = [self.choice.budget] if cascade is None else [self.choice.budget, cascade.high]
        return pass_usages(self.generation, budgets, [len(prompt) for prompt in self.prompts], shown)

    @property
    def num_experts(self) -> int | float:
        """The expert count as the answer reports it so far: a mean over its tokens."""
        return mean_num_experts(self.passes())

    @property
    def headers(self) -> dict[str, str]:
        """What the headers of its answer say: of experts as far as it is settled when they are sent, and of what the
        request asked for in vain."""
        if not self.choice.settled:
            return self.notices.headers
        report = self.choice.report()
        option = {} if report is None else {"x-experts-option": report["option"]}
        return {"x-num-experts": count_in_header(self.choice.budget)} | option | self.notices.headers


def mean_num_experts(passes: Sequence[PassUsage]) -> int | float:
    """The mean expert count of all passes, by their tokens."""
    if len(passes) == 1:
        return rounded(passes[0].mean_count)
    return rounded(sum(one.mean_count * one.tokens for one in passes) / sum(one.tokens for one in passes))


Prepared = tuple[OutputSpec, list[list[int]]]  # and the token ids of each prompt
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


async def open_completion(service: Service, request: IncomingRequest) -> GenerationCall:
    """The generation call of a request to /v1/completions. Raises InvalidRequest, EngineBusy or EngineDown."""
    arrived = time.monotonic()
    checked, prompts = await read_json(
        service, request, partial(check_completion, service, request, body_type=CompletionBody)
    )
    return await open_prompts(service, request, checked, prompts, arrived)


async def open_prompts(
    service: Service,
    request: IncomingRequest,
    checked: CheckedBody[Completion],
    prompts: Sequence[str | list[int]],
    arrived: float,
    id_prefix: str = "cmpl-",
) -> GenerationCall:
    """The generation call of a checked completion and its prompts."""
    body = checked.body
    count_notices(service, checked.notices)
    reservation = service.admission.reserve(body.answers * len(prompts), request.key_name)

    async def prepare() -> Prepared:
        spec = await _off_loop(body, completion_output_spec, body, *_schema_rules(service))
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encode = partial(service.tokenizer.encode, framed=body.add_special_tokens)
        encoded = iter(await encode_all(service, encode, texts, body.answer_limit, _tokens_to_keep(service, body)))
        return spec, [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    return await _open(service, id_prefix, request.key_name, checked, reservation, prepare, arrived)


async def open_chat(service: Service, request: IncomingRequest) -> GenerationCall:
    """The generation call of a request to /v1/chat/completions. Raises InvalidRequest, EngineBusy or EngineDown."""
    arrived = time.monotonic()
    checked = await read_json(service, request, partial(check_chat, service, request, body_type=ChatBody))
    return await open_conversation(service, request, checked, arrived)


async def open_conversation(
    service: Service,
    request: IncomingRequest,
    checked: CheckedBody[Chat],
    arrived: float,
    id_prefix: str = "chatcmpl-",
) -> GenerationCall:
    """The generation call of a checked chat body."""
    body = checked.body
    count_notices(service, checked.notices)
    reservation = service.admission.reserve(body.answers, request.key_name)

    async def prepare() -> Prepared:
        text = await service.rendering.run(chat_prompt, service, body)
        spec = await _off_loop(body, chat_output_spec, body, service.dialect, text, *_schema_rules(service))
        encode = partial(service.tokenizer.encode_chat, framed=body.add_special_tokens)
        return spec, await encode_all(service, encode, [text], body.answer_limit, _tokens_to_keep(service, body))

    return await _open(service, id_prefix, request.key_name, checked, reservation, prepare, arrived)


def chat_prompt(service: Service, body: ChatBody) -> str:
    """The prompt of a chat as the chat template writes it. Call it off the event loop."""
    tools = None if body.tool_choice == "none" else body.tools
    variables = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return render(service, body, body.messages, tools, variables)


def render(
    service: Service,
    body: TemplateBody,
    messages: list[Message],
    tools: list[Tool] | None,
    variables: Mapping[str, Any],
) -> str:
    """The prompt as the chat template writes it. Call it off the event loop: a template is a checkpoint's code."""
    if service.chat is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", "messages", "no_chat_template")
    if tools and not service.chat.knows_tools:
        raise InvalidRequest("this model's chat template knows no tools", "tools", "unsupported_parameter")
    plain_messages = [message.for_template() for message in messages]
    plain_tools = [tool.for_template() for tool in tools] if tools else None
    named = body.chat_template_kwargs | dict(variables) | _thinking(service.chat, body)
    return service.chat.render(
        plain_messages, plain_tools, body.add_generation_prompt, named, body.continue_final_message
    )


def _schema_rules(service: Service) -> tuple[int, bool]:
    """The most bytes that a grammar may be written from, and whether objects of schemas are closed."""
    return service.settings.max_grammar_bytes, service.settings.schema_objects == "closed"


def _thinking(chat: ChatTemplateProtocol, body: TemplateBody) -> dict[str, bool]:
    """`enable_thinking` as a variable of the template.

    Raises:
        InvalidRequest: the template does not know it, or the body sets it to two values.
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


async def _off_loop(body: GenerationBody, make: Callable[..., OutputSpec], *args: Any) -> OutputSpec:
    """`make(*args)`, in a thread where it writes a grammar that takes a while."""
    return await asyncio.to_thread(make, *args) if _grammar_is_long(body) else make(*args)


def _grammar_is_long(body: GenerationBody) -> bool:
    tools = body.tools if isinstance(body, ChatBody) else None
    schemas = [tool.function.parameters for tool in tools or ()]
    fields = constraint_fields(body)
    if any(field.kind == "grammar" for field in fields):
        return True
    return min_json_bytes([*(field.value for field in fields), schemas], SHORT_GRAMMAR) > SHORT_GRAMMAR


def _tokens_to_keep(service: Service, body: GenerationBody) -> int | None:
    return tokens_to_keep(body, service.served_models.info.max_model_len)


def check_chat(
    service: Service, request: IncomingRequest, raw: Mapping[str, Any], body_type: type[Chat]
) -> CheckedBody[Chat]:
    """The checked body of a chat."""
    checked = _check(service, request, body_type, raw)
    offered_tools(checked.body)
    _tokens_to_keep(service, checked.body)
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


def count_notices(service: Service, notices: Notices) -> None:
    """Count tools that were left out and unknown fields, and log the name of each of these once."""
    if notices.skipped_tools:
        service.metrics.inc("request_skipped_tools", by=len(notices.skipped_tools))
    fields = notices.ignored_fields
    if fields:
        service.metrics.inc("request_unknown_fields", by=len(fields))
    for field in fields[:16]:
        if field[:64] not in service.seen_fields and len(service.seen_fields) < MAX_LOGGED_FIELDS:
            service.seen_fields.add(field[:64])
            log.warning("unknown field ignored", field=field[:64])


async def _open(
    service: Service,
    id_prefix: str,
    key: str,
    checked: CheckedBody[Any],
    reservation: Reservation,
    prepare: Callable[[], Awaitable[Prepared]],
    arrived: float,
) -> GenerationCall:
    """Tokenise and build the sequences. The slots are held already, and released if anything is refused."""
    call_id, body = id_prefix + uuid.uuid4().hex, checked.body
    try:
        spec, tokens = await prepare()
        prompts = tuple(map(tuple, tokens))
        bad_words = await bad_word_tokens(service, body.bad_words) if body.bad_words else ()
        builder = SequenceBuilder(service, body, spec, checked.selection, call_id, arrived, key, bad_words)
        sequences = builder.build(prompts)
        reservation.add_tokens(body.answers * sum(map(len, prompts)))
        service.charge(key, sum(map(len, prompts)))
    except BaseException:
        reservation.release()
        raise
    timeouts = Timeouts(service.settings.queue_timeout, service.settings.total_timeout)
    choice = service.chooser.choice(checked.selection, len(sequences))
    generation = Generation(service.engine, reservation, sequences, timeouts, service.compiler, choice, spec.field)
    return GenerationCall(
        id=call_id,
        model=body.model or service.settings.name,
        created=int(time.time()),
        arrived=arrived,
        body=body,
        choice=choice,
        output_spec=spec,
        prompts=prompts,
        generation=generation,
        fingerprint=service.served_models.fingerprint,
        prices=service.served_models.prices,
        notices=checked.notices,
    )
