"""Starlette's request turned into an `IncomingRequest`, which is all that the code below this package sees of it."""

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.errors import ClientGone
from server.experts.requested_count import HEADER
from server.requests.json_body import IncomingRequest


def incoming(request: Request, read: Callable[[], Awaitable[bytearray]] | None = None) -> IncomingRequest:
    """What the server reads of a request; its body is read later, once: by `read`, or off the connection."""
    headers = request.headers
    content_type = headers.get("content-type", "application/json")
    return IncomingRequest(
        content_type, headers.getlist(HEADER), key_name_of(request), read or partial(read_body, request)
    )


async def read_body(request: Request) -> bytearray:
    """The whole body.

    Starlette's `request.body()` would keep it as long as the request lives, and join it from parts that leave holes in
    the heap.

    Raises:
        ClientGone: the connection was closed first.
    """
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
    except ClientDisconnect:
        raise ClientGone("the caller closed the connection before the body had arrived") from None
    return body


def key_name_of(request: Request) -> str:
    """The name of the API key that the request came with; empty without keys."""
    return str(request.scope["state"].get("key_name", ""))
