"""Ollama's API: /api/chat, /api/generate, /api/tags, /api/show, /api/ps and /api/version, over the same calls as chats.

Models are neither fetched nor deleted here: such routes are not there.
"""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.formats.ollama import OllamaFormat, loaded
from server.formats.ollama_models import listed, running, shown
from server.http.incoming import incoming
from server.http.opening import opened
from server.http.serving import server_of, service_of
from server.http.sse import answer
from server.requests.calls import GenerationCall
from server.requests.json_body import read_json
from server.requests.notices import Notices
from server.requests.ollama_as_chat import OLLAMA_NAMES, open_ollama_chat, open_ollama_prompt
from server.schemas.ollama import OllamaBody, ShowBody, read_ollama
from server.service import Service
from server.version import VERSION

CHAT, GENERATE = "/api/chat", "/api/generate"
PATHS = (CHAT, GENERATE)
OLLAMA_VERSION = "0.13.0"  # whose API this is like: clients compare it with the oldest one that they work with
router = APIRouter(prefix="/api", tags=["ollama"])


@router.post("/chat")
async def chat(request: Request) -> Response:
    """Answer a conversation; by default as a stream of lines."""
    service = service_of(request)
    return await _answered(service, request, *await opened(service, request, open_ollama_chat))


@router.post("/generate")
async def generate(request: Request) -> Response:
    """Answer a prompt, which is a chat of one message, or, if it is raw, continue it."""
    service = service_of(request)
    return await _answered(service, request, *await opened(service, request, open_ollama_prompt))


@router.get("/tags")
async def tags(request: Request) -> dict[str, Any]:
    """Each model and its aliases."""
    return {"models": [entry for models in server_of(request).listed_models() for entry in listed(models)]}


@router.get("/ps")
async def ps(request: Request) -> dict[str, Any]:
    """The models in memory."""
    return {"models": [running(models) for models in server_of(request).loaded_models()]}


@router.post("/show")
async def show(request: Request) -> Response:
    """What is known of a model or an alias."""
    service = service_of(request)
    read = partial(read_ollama, ShowBody, settings=service.settings)
    body, unread = await read_json(service, incoming(request), read)
    known = shown(service.described, service.chat, service.sampling_defaults, body.model or body.name)
    return JSONResponse(known, headers=Notices(ignored_fields=unread).headers)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": OLLAMA_VERSION, "moedial": VERSION}


async def _answered(service: Service, request: Request, call: GenerationCall | Notices, body: OllamaBody) -> Response:
    if isinstance(call, Notices):
        return JSONResponse(loaded(body, service.settings.name), headers=call.headers)
    with OLLAMA_NAMES.in_errors():  # a schema that cannot be compiled is refused by the engine
        return await answer(service, request, call, lambda call, tokenizer: OllamaFormat(call, tokenizer, body))
