"""Opens the call of a request that generates; a request that is refused is counted here, once."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request

from server.errors import KeyShareTaken, code_of
from server.http.incoming import incoming, key_name_of
from server.requests.json_body import IncomingRequest
from server.service import Service

Opened = TypeVar("Opened")


async def opened(
    service: Service, request: Request, open: Callable[[Service, IncomingRequest], Awaitable[Opened]]
) -> Opened:
    """What `open` returns."""
    try:
        return await open(service, incoming(request))
    except Exception as error:
        service.metrics.inc("requests_rejected", code_of(error))
        if isinstance(error, KeyShareTaken):
            service.metrics.inc("key_requests_limited", key_name_of(request), error.limit)
        raise
