"""POST /tokenize and /detokenize, at the root, where evaluation tools look for them. They need no engine slot."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from model.errors import InvalidRequest
from server.calls import render
from server.limits import check_template, read_json
from server.schemas import DetokenizeBody, TokenizeBody, validate
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
        ids = await asyncio.to_thread(service.tokenizer.encode, body.prompt)
    else:
        check_template(body, service.settings)
        ids = await asyncio.to_thread(service.tokenizer.encode_chat, await render(service, body))
    return {"count": len(ids), "max_model_len": service.catalogue.info.max_model_len, "tokens": ids}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    body = validate(DetokenizeBody, await read_json(request, service.settings))
    service.catalogue.check_tokens({"tokens": body.tokens})
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}
