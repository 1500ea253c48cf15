"""POST /tokenize and /detokenize, at the root, where evaluation tools expect them. They need no slot in the queue.

What may take long runs, and is serialised, in a thread, one request at a time.
"""

from functools import partial
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from model.errors import InvalidRequest
from server.http.incoming import incoming
from server.http.serving import service_of
from server.requests.chat_prompt import render
from server.requests.encoding import max_characters
from server.requests.json_body import read_json
from server.requests.limits import check_template
from server.schemas.base import validate
from server.schemas.tokens import MAX_TOKENS, DetokenizeBody, TokenizeBody
from server.service import Service
from weights.tokenizer import TooManyTokens

Body = TypeVar("Body", bound=BaseModel)
router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Ids of a `prompt`, or of `messages` as the chat template writes them."""
    service = service_of(request)
    body = await _read(service, request, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("exactly one of prompt and messages must be given", "prompt")
    for field in ("continue_final_message", "enable_thinking"):
        if body.messages is None and getattr(body, field):
            raise InvalidRequest(f"{field} needs messages", field)
    if body.messages is not None:
        check_template(body, body.messages, service.settings)
    return await service.token_routes.run(_tokenized, service, body)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    service = service_of(request)
    body = await _read(service, request, DetokenizeBody)
    return await service.token_routes.run(_detokenized, service, body)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What evaluation tools need of a tokenizer: its special tokens as texts, and the chat template."""
    service = service_of(request)
    return dict(service.tokenizer_info)


async def _read(service: Service, request: Request, body_type: type[Body]) -> Body:
    check = partial(validate, body_type, settings=service.settings)
    return await read_json(service, incoming(request), check)


def _tokenized(service: Service, body: TokenizeBody) -> Response:
    length = service.described.info.max_model_len
    try:
        ids = _ids(service, body)
    except TooManyTokens as error:
        field = "messages" if body.prompt is None else "prompt"
        reason = f"{field}: at least {error.count} tokens; at most {MAX_TOKENS} are listed"
        raise InvalidRequest(reason, field) from None
    return _json({"count": len(ids), "max_model_len": length, "tokens": ids})


def _ids(service: Service, body: TokenizeBody) -> list[int]:
    """The token ids of the prompt or the messages.

    A prompt that is the text of a special token, unframed, is that token: evaluation tools so look up the ids of texts
    from /tokenizer_info. In all other places a client's text is plain text.
    """
    tokenizer, framed = service.tokenizer, body.add_special_tokens
    if not framed and (special := tokenizer.specials.get(body.prompt or "")) is not None:
        return [special]
    text = body.prompt
    if text is None:
        text = render(service, body, body.messages or [], body.tools, {})
    most = max_characters(service.described.info.max_model_len)
    if len(text) > most:
        field = "messages" if body.prompt is None else "prompt"
        raise InvalidRequest(f"{field}: {len(text)} characters; at most {most} are tokenised", field)
    if (least := tokenizer.least_tokens(text)) > MAX_TOKENS:
        raise TooManyTokens(least, MAX_TOKENS)
    if body.prompt is None:
        return tokenizer.encode_chat(text, most=MAX_TOKENS)
    return tokenizer.encode(text, framed, most=MAX_TOKENS)


def _detokenized(service: Service, body: DetokenizeBody) -> Response:
    service.described.check_tokens({"tokens": body.tokens})
    return _json({"prompt": service.tokenizer.decode(body.tokens)})


def _json(answer: dict[str, Any]) -> Response:
    return Response(orjson.dumps(answer), media_type="application/json")
