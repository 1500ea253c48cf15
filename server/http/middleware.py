"""Small pure-ASGI middlewares: request id, HEAD, and limits on connections, headers and bodies.

They never derive from BaseHTTPMiddleware, which costs three quarters of the streaming rate. They handle bytes and
headers, not JSON. Keys are checked in `server/http/auth.py`.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import EngineStopped, MoedialError
from server.errors import (
    BodiesFull,
    BodyTimeout,
    TooLarge,
    TooManyConnections,
    TooManyHeaders,
)
from server.formats.errors import is_messages
from server.http.error_responses import error_response
from server.http.h11 import RESERVED
from server.http.page_files import PATHS as PAGE_PATHS

PROBES = frozenset({"/live", "/health", "/ready", "/metrics", "/version"})
OPEN_PATHS = PROBES | PAGE_PATHS | {"/docs"}  # without a key
STARTED = "response_started"  # of a request's state
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


UNCOUNTED_BYTES = (
    64 << 10
)  # of each body; these are not in the budget, so that a few large bodies never stop short ones


class RequestId:
    """Takes the client's x-request-id, or draws one, and returns it. Malformed ones, which could forge log lines, are
    replaced."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["state"][STARTED] = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_messages(scope["path"]):
                    headers["request-id"] = request_id  # Anthropic's name
            await send(message)

        await self.app(scope, receive, send_with_id)


class OwnPath:
    """Takes the prefix below which another application serves this one (ASGI's `root_path`) off the path, so that all
    others see the server's own paths. It changes the scope in place: the handler of unexpected errors is outside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "")
        if scope["type"] == "http" and prefix and scope["path"].startswith(f"{prefix}/"):
            scope["path"] = scope["path"].removeprefix(prefix)
        await self.app(scope, receive, send)


class StopGuard:
    """Answers a request that is still running when the server stops waiting for it with an error, without a traceback.

    `RequestId` is outside of it and notes whether a response has begun, which can no longer become an error.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:  # uvicorn cancels what still runs after the drain
            if scope["type"] == "http" and not scope["state"].get(STARTED):
                error = EngineStopped("the server was stopped before the request was answered")
                await error_response(error, scope["path"])(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET without its body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def send_no_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, send_no_body)


class ReservedConnections:
    """Answers only probes on the connections that are reserved for them."""

    def __init__(self, app: ASGIApp, on_refused: Callable[[Scope, MoedialError], None]) -> None:
        self.app, self.on_refused = app, on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = scope.get("state", {}).get(RESERVED)
        if limit is None or scope["path"] in PROBES:
            return await self.app(scope, receive, send)
        error = TooManyConnections(f"the server has {limit} connections, which is its limit; try again later")
        self.on_refused(scope, error)
        await error_response(error, scope["path"])(scope, receive, send)


class BodyBudget:
    """Counts the bytes that the bodies of all unfinished requests hold together, beyond the first few of each."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def take(self, count: int) -> None:
        """Raises BodiesFull when there is no room for `count` more."""
        if self.held + count > self.limit:
            raise BodiesFull(
                f"the bodies of all requests together have more than {self.limit} bytes, which is the limit; "
                "try again later"
            )
        self.held += count

    def give_back(self, count: int) -> None:
        self.held -= count


class BodyLimits:
    """Bounds the number of header fields, and the bytes and time of a body. A route gets the error when it reads."""

    def __init__(self, app: ASGIApp, max_fields: int, max_bytes: int, timeout: float, budget: BodyBudget) -> None:
        self.app, self.max_fields, self.max_bytes, self.timeout = app, max_fields, max_bytes, timeout
        self.budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (fields := len(scope["headers"])) > self.max_fields:
            error = TooManyHeaders(f"{fields} header fields; the limit is {self.max_fields}")
            return await error_response(error, scope["path"])(scope, receive, send)
        body = _BoundedBody(self, scope, receive)
        try:
            await self.app(scope, body, send)
        finally:  # what was parsed of the body lives as long as the request
            self.budget.give_back(body.held)


class _BoundedBody:
    """A `receive` that counts bytes. After the body it passes messages through, so that disconnects are seen."""

    def __init__(self, limits: BodyLimits, scope: Scope, receive: Receive) -> None:
        self.limits, self.receive = limits, receive
        self.deadline = time.monotonic() + limits.timeout
        declared = Headers(scope=scope).get("content-length", "")
        self.declared = int(declared) if declared.isdecimal() else 0
        self.seen, self.held, self.complete = 0, 0, False

    async def __call__(self) -> Message:
        if self.complete:
            return await self.receive()
        if self.declared > self.limits.max_bytes:
            raise TooLarge(f"the body has {self.declared} bytes; the limit is {self.limits.max_bytes}")
        message = await self._next()
        self.seen += len(message.get("body", b""))
        self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        if self.seen > self.limits.max_bytes:
            raise TooLarge(f"the body has more than {self.limits.max_bytes} bytes, which is the limit")
        self._hold(max(0, self.seen - UNCOUNTED_BYTES))
        return message

    def _hold(self, count: int) -> None:
        self.limits.budget.take(count - self.held)
        self.held = count

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                return await self.receive()
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {self.limits.timeout:g} s") from None
