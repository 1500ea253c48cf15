"""POST /v1/completions and /v1/chat/completions: open the call, or count its refusal; then answer it."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.calls import Call, open_chat, open_completion
from server.errors import code_of
from server.service import Service
from server.stream import answer
from server.wire.chat import ChatFormat
from server.wire.completions import CompletionFormat

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PATHS = (COMPLETIONS, CHAT)
router = APIRouter(tags=["generate"])


@router.post(COMPLETIONS)
async def completions(request: Request) -> Response:
    """Continue one or more prompts."""
    service: Service = request.app.state.service
    call = await _opened(service, request, open_completion)
    return await answer(service, request, call, CompletionFormat)


@router.post(CHAT)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, written out by the checkpoint's own chat template."""
    service: Service = request.app.state.service
    call = await _opened(service, request, open_chat)
    return await answer(service, request, call, ChatFormat)


async def _opened(service: Service, request: Request, open: Callable[[Service, Request], Awaitable[Call]]) -> Call:
    """A request that never becomes a call is counted here, once."""
    try:
        return await open(service, request)
    except Exception as error:
        service.metrics.inc("requests_rejected", code_of(error))
        raise
