"""POST /v1/completions, /v1/chat/completions and /v1/responses: open the call, or count its refusal; then answer it."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.formats.chat import ChatFormat
from server.formats.completions import CompletionFormat
from server.formats.responses import ResponsesFormat
from server.http.opening import opened
from server.http.serving import service_of
from server.http.sse import answer
from server.requests.calls import open_chat, open_completion
from server.requests.responses_as_chat import RESPONSE_NAMES, open_response

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PATHS = (COMPLETIONS, CHAT, RESPONSES)
router = APIRouter(tags=["generate"])


@router.post(COMPLETIONS)
async def completions(request: Request) -> Response:
    """Continue one or more prompts."""
    service = service_of(request)
    call = await opened(service, request, open_completion)
    return await answer(service, request, call, CompletionFormat)


@router.post(CHAT)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, written out by the checkpoint's own chat template."""
    service = service_of(request)
    call = await opened(service, request, open_chat)
    return await answer(service, request, call, ChatFormat)


@router.post(RESPONSES)
async def responses(request: Request) -> Response:
    """Answer a text or a conversation, in OpenAI's newer form. Nothing is stored: each request brings all of it."""
    service = service_of(request)
    call, body = await opened(service, request, open_response)
    with RESPONSE_NAMES.in_errors():  # a schema that cannot be compiled is refused by the engine
        return await answer(service, request, call, lambda call, tokenizer: ResponsesFormat(call, tokenizer, body))
