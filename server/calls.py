"""From a JSON body to a call that the engine can run: every refusal is made here or below.

It knows fields and limits; it does not run anything and formats no answer.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog
from fastapi import Request as HttpRequest

from engine.types import Request, Sampling
from model.budget import ExpertBudget
from model.errors import InvalidRequest
from server.admission import Reservation
from server.experts import HEADER, ask_of_header, asks_of_body, refuse_misspelt, reported, resolve
from server.generation import Generation, Sequence, Timeouts
from server.lifecycle import Lifecycle
from server.limits import biases_of, check_limits, prompts_of, read_json, room_for
from server.schemas import ChatBody, CompletionBody, GenerationBody, refuse_unsupported, unknown_fields, validate
from server.service import Service
from server.transcript import Transcript

log = structlog.get_logger("server")
COMPLETION_TOKENS = 16  # OpenAI's default for completions
INLINE = 4096  # characters that are tokenised on the event loop; longer texts go to a thread
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
    prompts: tuple[tuple[int, ...], ...]
    generation: Generation

    @property
    def num_experts(self) -> int | float:
        return reported(self.budget)


def _ask(service: Service, http: HttpRequest, raw: Mapping[str, Any], model: str | None) -> ExpertBudget:
    catalogue = service.check_ready()
    asks = [*asks_of_body(raw), *catalogue.asks_of_model(model), *ask_of_header(http.headers.getlist(HEADER))]
    return resolve(catalogue.info.experts, catalogue.default_count, asks)


async def open_completion(service: Service, http: HttpRequest) -> Call:
    arrived = time.monotonic()
    raw = await read_json(http, service.settings)
    body, budget = _check(service, http, CompletionBody, raw)
    prompts = prompts_of(body.prompt, service.settings.max_prompts)
    reservation = service.admission.reserve(body.n * len(prompts))

    async def tokenise() -> list[list[int]]:
        return [
            await _encode(service.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt for prompt in prompts
        ]

    return await _open(service, body, budget, reservation, tokenise, arrived)


async def open_chat(service: Service, http: HttpRequest) -> Call:
    arrived = time.monotonic()
    raw = await read_json(http, service.settings)
    body, budget = _check(service, http, ChatBody, raw)
    reservation = service.admission.reserve(body.n)

    async def tokenise() -> list[list[int]]:
        text = await render(service, body)
        return [await _encode(service.tokenizer.encode_chat, text)]

    return await _open(service, body, budget, reservation, tokenise, arrived)


async def render(service: Service, body: Any) -> str:
    """The chat template's text. A template is code from a checkpoint, so it runs off the event loop."""
    if service.chat is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", "messages", "no_chat_template")
    messages = [message.plain() for message in body.messages]
    return await asyncio.to_thread(
        service.chat.render, messages, None, body.add_generation_prompt, body.chat_template_kwargs
    )


async def _encode(encode: Callable[[str], list[int]], text: str) -> list[int]:
    return encode(text) if len(text) <= INLINE else await asyncio.to_thread(encode, text)


def _check(service: Service, http: HttpRequest, kind: Any, raw: Mapping[str, Any]) -> tuple[Any, ExpertBudget]:
    """Everything that can be refused without tokenising."""
    service.check_ready()
    refuse_misspelt(raw)
    refuse_unsupported(kind, raw)
    body = validate(kind, raw, service.sampling_defaults)
    budget = _ask(service, http, raw, body.model)
    check_limits(body, service.settings)
    _note_unknown(service, unknown_fields(kind, raw))
    return body, budget


def _note_unknown(service: Service, fields: list[str]) -> None:
    if fields:
        service.metrics.inc("request_unknown_fields", by=len(fields))
    for field in fields[:16]:
        if field[:64] not in service.seen_fields and len(service.seen_fields) < LOGGED_FIELDS:
            service.seen_fields.add(field[:64])
            log.warning("unknown field ignored", field=field[:64])


async def _open(
    service: Service,
    body: GenerationBody,
    budget: ExpertBudget,
    reservation: Reservation,
    tokenise: Callable[[], Any],
    arrived: float,
) -> Call:
    """Tokenise and build the sequences. The slots are held already, and given back if anything is refused."""
    try:
        prompts = tuple(tuple(prompt) for prompt in await tokenise())
        _check_tokens(service, body, prompts)
        samplings = [_sampling(service, body, len(prompt)) for prompt in prompts]
        reservation.add_tokens(body.n * sum(map(len, prompts)))
        call_id = ("chatcmpl-" if isinstance(body, ChatBody) else "cmpl-") + uuid.uuid4().hex
        sequences = tuple(
            _sequence(service, body, f"{call_id}-{i * body.n + j}", prompts[i], budget, samplings[i], j, arrived, i)
            for i in range(len(prompts))
            for j in range(body.n)
        )
    except BaseException:
        reservation.release()
        raise
    timeouts = Timeouts(service.settings.queue_timeout, service.settings.total_timeout)
    generation = Generation(service.engine, service.admission, reservation, sequences, timeouts)
    model = body.model or service.settings.name
    return Call(call_id, model, int(time.time()), arrived, body, budget, prompts, generation)


def _check_tokens(service: Service, body: GenerationBody, prompts: tuple[tuple[int, ...], ...]) -> None:
    if not all(prompts):
        raise InvalidRequest("prompt: at least one token is needed, got an empty prompt", "prompt")
    given = body.prompt if isinstance(body, CompletionBody) and isinstance(body.prompt, list) else []
    ids = [id for prompt in prompts for id in prompt] if any(not isinstance(item, str) for item in given) else []
    service.catalogue.check_tokens(
        {"prompt": ids, "stop_token_ids": body.stop_token_ids, "logit_bias": list(biases_of(body))}
    )


def _sampling(service: Service, body: GenerationBody, prompt: int) -> Sampling:
    default = COMPLETION_TOKENS if isinstance(body, CompletionBody) else None
    max_tokens = room_for(body.answer_limit, default, prompt, service.catalogue.info.max_model_len)
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens = {max_tokens}, got {body.min_tokens}", "min_tokens"
        )
    ends = () if body.ignore_eos else service.tokenizer.eos_ids
    return Sampling(
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        min_tokens=body.min_tokens,
        stop_token_ids=tuple(dict.fromkeys((*ends, *body.stop_token_ids))),
        logit_bias=tuple(biases_of(body).items()),
        logprobs=body.alternatives,
    )


def _sequence(
    service: Service,
    body: GenerationBody,
    id: str,
    prompt: tuple[int, ...],
    budget: ExpertBudget,
    sampling: Sampling,
    answer: int,
    arrived: float,
    prompt_index: int,
) -> Sequence:
    """Answer j of a prompt uses seed + j: alone or in a list, a prompt gets the same answers."""
    seeded = replace(sampling, seed=(sampling.seed + answer) & (2**63 - 1))
    transcript = Transcript(prompt_index * body.n + answer, service.tokenizer, body.stop)
    life = Lifecycle(service.metrics, budget, len(prompt), arrived)
    return Sequence(Request(id, prompt, budget, seeded), transcript, life)
