"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same calls as chats."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.formats.messages import MessagesFormat
from server.http.incoming import incoming
from server.http.opening import opened
from server.http.serving import service_of
from server.http.sse import answer
from server.requests.messages_as_chat import count_tokens, messages_errors, open_messages

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
PATHS = (MESSAGES,)
router = APIRouter(tags=["generate"])


@router.post(MESSAGES)
async def messages(request: Request) -> Response:
    """Answer a conversation, in Anthropic's form."""
    service = service_of(request)
    call, body = await opened(service, request, open_messages)
    with messages_errors():  # a schema that cannot be compiled is refused by the engine
        return await answer(service, request, call, lambda call, tokenizer: MessagesFormat(call, tokenizer, body))


@router.post(COUNT)
async def count(request: Request) -> Response:
    """How many tokens the prompt of such a conversation has."""
    service = service_of(request)
    tokens, notices = await count_tokens(service, incoming(request))
    counted: dict[str, Any] = {"input_tokens": tokens}
    return JSONResponse(counted, headers=notices.headers)
