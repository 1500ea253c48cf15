"""Middlewares that look at whole HTTP requests once they have been answered: log lines, and trace spans.

Both are there only where a setting asks for them. They do not see the generation call: `server/http/sse.py` leaves its
figures in the state.
"""

import time
from collections.abc import Callable, Collection

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.middleware import PROBES
from server.tracing import AnsweredRequest

log = structlog.get_logger("access")
CALL = "call"  # in the state of a request that generated: the figures of its log line
TRACE_HEADERS = ("traceparent", "tracestate")
MAX_PATH = 256  # characters of a path in a log line
ABORTED = 499  # logged where a caller had gone before an answer began, as other servers do
FAILED = 500  # an unexpected error is answered outside of all middlewares


class Observer:
    """Calls `answered` after every HTTP request that `sees`, with its status."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.sees(scope):
            return await self.app(scope, receive, send)
        began, started, status = time.time_ns(), time.monotonic(), ABORTED

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:
            status = FAILED if status == ABORTED else status
            raise
        finally:
            self.answered(scope, status, began, time.monotonic() - started)

    def sees(self, scope: Scope) -> bool:
        """Whether the request counts."""
        return True

    def answered(self, scope: Scope, status: int, began: int, seconds: float) -> None:
        """Use what was seen: `began` is in nanoseconds since 1970, `seconds` is what the request took."""
        raise NotImplementedError


class AccessLog(Observer):
    """Writes a log line for every request, with its path but neither query nor body."""

    def answered(self, scope: Scope, status: int, began: int, seconds: float) -> None:
        state = scope["state"]
        key = {"key": state["key_name"]} if state.get("key_name") else {}
        write = log.debug if scope["path"] in PROBES else log.info
        write(
            "request",
            request_id=state.get("request_id"),
            **key,
            client=(scope.get("client") or ("",))[0],
            method=scope["method"][:MAX_PATH],
            path=scope["path"][:MAX_PATH],
            status=status,
            seconds=round(seconds, 4),
        )


class Spans(Observer):
    """Calls `record` with every answered request to one of `paths`."""

    def __init__(self, app: ASGIApp, paths: Collection[str], record: Callable[[AnsweredRequest], None]) -> None:
        super().__init__(app)
        self.paths, self.record = paths, record

    def sees(self, scope: Scope) -> bool:
        return scope["method"] == "POST" and scope["path"] in self.paths

    def answered(self, scope: Scope, status: int, began: int, seconds: float) -> None:
        context = {name: value for name, value in Headers(scope=scope).items() if name in TRACE_HEADERS}
        call = scope["state"].get(CALL, {})
        ended = began + round(seconds * 1e9)
        self.record(AnsweredRequest(scope["path"], status, began, ended, context, call))
