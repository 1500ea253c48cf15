"""POST /tokenize and /detokenize, at the root, where evaluation tools look for them. They need no engine slot."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from model.errors import InvalidRequest
from server.bodies.base import validate
from server.bodies.tokens import DetokenizeBody, TokenizeBody
from server.calls import render
from server.limits import check_template, read_json
from server.service import Service

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """Ids of a `prompt`, or of `messages` as the chat template writes them."""
    service: Service = request.app.state.service
    body = validate(TokenizeBody, await read_json(request, service.settings))
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("exactly one of prompt and messages must be given", "prompt")
    if body.prompt is not None:
        ids = await _encode(service, body.prompt, body.add_special_tokens)
    else:
        check_template(body, service.settings)
        text = await render(service, body, body.messages or [], body.tools, {})
        ids = await asyncio.to_thread(service.tokenizer.encode_chat, text)
    return {"count": len(ids), "max_model_len": service.catalogue.info.max_model_len, "tokens": ids}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    body = validate(DetokenizeBody, await read_json(request, service.settings))
    service.catalogue.check_tokens({"tokens": body.tokens})
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What evaluation tools ask of a tokenizer: its special tokens as texts, and the chat template."""
    service: Service = request.app.state.service
    return dict(service.tokenizer_info)


async def _encode(service: Service, prompt: str, framed: bool) -> list[int]:
    """A prompt that is one special token, unframed, is that token: so evaluation tools look up the id of a token whose
    text /tokenizer_info told them. Everywhere else, what a client writes is plain text."""
    special = None if framed else service.tokenizer.specials.get(prompt)
    return [special] if special is not None else await asyncio.to_thread(service.tokenizer.encode, prompt, framed)
