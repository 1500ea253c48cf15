"""Makes a generation call from a request body: every fault of a request is found before the engine sees it.

Not here: what is found without tokenising (`server/requests/checks.py`), running a generation call (see
`server/generation`) and formatting its answer (see `server/formats`).
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from server.experts.choice import ExpertChoice
from server.experts.prices import Prices
from server.experts.selection import count_in_header, rounded
from server.generation.admission import Reservation
from server.generation.generation import Generation, Timeouts
from server.generation.passes import PassUsage, pass_usages
from server.json_limits import min_json_bytes
from server.requests.chat_prompt import chat_prompt
from server.requests.checks import Chat, CheckedBody, Completion, check_chat, check_completion
from server.requests.encoding import bad_word_tokens, encode_all
from server.requests.json_body import IncomingRequest, read_json
from server.requests.limits import tokens_to_keep
from server.requests.notices import Notices
from server.requests.output_fields import constraint_fields
from server.requests.output_spec import OutputSpec, chat_output_spec, completion_output_spec
from server.requests.sequences import SequenceBuilder
from server.schemas.base import GenerationBody
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.service import Service

log = structlog.get_logger("server")
SHORT_GRAMMAR = 4096  # bytes; a grammar written from more of them is written in a thread
MAX_LOGGED_FIELDS = 256  # unknown fields that are logged, each once


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
        """The usage of its passes so far. `shown`, in a stream: how many tokens of each answer the client has
        received."""
        cascade = self.choice.cascade
        budgets = [self.choice.budget] if cascade is None else [self.choice.budget, cascade.high]
        return pass_usages(self.generation, budgets, [len(prompt) for prompt in self.prompts], shown)

    @property
    def num_experts(self) -> int | float:
        """The expert count as the answer reports it so far: a mean over its tokens."""
        return mean_num_experts(self.passes())

    @property
    def headers(self) -> dict[str, str]:
        """The headers of its answer: the expert count, if it is final before the answer starts, and notices about
        ignored parts of the request."""
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


def _schema_rules(service: Service) -> tuple[int, bool]:
    """The most bytes that a grammar may be written from, and whether objects of schemas are closed."""
    return service.settings.max_grammar_bytes, service.settings.schema_objects == "closed"


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
