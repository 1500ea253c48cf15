"""The one table from the exception tree to HTTP, and the handlers that apply it. Bodies are OpenAI-shaped.

It adds to `model/errors.py` only what exists on the wire alone: keys, body sizes, deadlines.
"""

import re
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from model.errors import (
    CheckpointError,
    EngineBusy,
    EngineDown,
    EngineStopped,
    GenerationFailed,
    InvalidRequest,
    MoedialError,
)

log = structlog.get_logger("server")


class ModelNotFound(InvalidRequest):
    """The `model` field names neither the model nor one of its aliases."""


class Unauthorized(MoedialError):
    """No key, or a wrong one."""


class RateLimited(MoedialError):
    """The key has used up what it may use. `limit` says of what; `retry_after` is in seconds."""

    def __init__(self, message: str, limit: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.limit, self.retry_after = limit, retry_after


class PlacesTaken(RateLimited):
    """The key holds its share of the places; the body has been read."""


class TooLarge(MoedialError):
    """The body is larger than the limit."""


class TooManyHeaders(MoedialError):
    """The request has more header fields than the limit."""


class HeadersTooLarge(MoedialError):
    """The request line and headers have more bytes than the limit."""


class HeaderTimeout(MoedialError):
    """The request headers did not arrive in time."""


class BadHttp(MoedialError):
    """What came is no HTTP/1.1 request, or an ambiguous one."""


class TooManyConnections(MoedialError):
    """The server has as many connections as it takes."""


class BodiesFull(MoedialError):
    """The bodies of all requests together have as many bytes as the server takes."""


class HostNotAllowed(MoedialError):
    """The request names a host that this server does not answer for."""


class OriginNotAllowed(MoedialError):
    """A web page of another site has sent the request."""


class BodyTimeout(MoedialError):
    """The body did not arrive in time."""


class QueueTimeout(EngineBusy):
    """The request waited too long for its first turn."""


class GenerationTimeout(GenerationFailed):
    """The request ran into its total time limit."""


class ClientGone(MoedialError):
    """The caller has closed the connection; nobody reads the answer."""


@dataclass(frozen=True, slots=True)
class Wire:
    """How one kind of error looks on the wire. `retry`: whether sending the same request again can help."""

    status: int
    type: str
    code: str
    retry: bool = False
    close: bool = False  # the body was not read to its end, so the connection cannot be used again


TABLE: dict[type[Exception], Wire] = {
    ModelNotFound: Wire(404, "invalid_request_error", "model_not_found"),
    InvalidRequest: Wire(400, "invalid_request_error", "invalid_value"),
    Unauthorized: Wire(401, "authentication_error", "invalid_api_key", close=True),
    RateLimited: Wire(429, "rate_limit_error", "rate_limit_exceeded", retry=True, close=True),
    PlacesTaken: Wire(429, "rate_limit_error", "rate_limit_exceeded", retry=True),
    TooLarge: Wire(413, "invalid_request_error", "body_too_large", close=True),
    TooManyHeaders: Wire(431, "invalid_request_error", "too_many_headers", close=True),
    HeadersTooLarge: Wire(431, "invalid_request_error", "headers_too_large", close=True),
    HeaderTimeout: Wire(408, "invalid_request_error", "header_timeout", retry=True, close=True),
    BadHttp: Wire(400, "invalid_request_error", "bad_http", close=True),
    TooManyConnections: Wire(503, "overloaded_error", "too_many_connections", retry=True, close=True),
    BodiesFull: Wire(503, "overloaded_error", "too_many_body_bytes", retry=True, close=True),
    HostNotAllowed: Wire(403, "permission_error", "host_not_allowed", close=True),
    OriginNotAllowed: Wire(403, "permission_error", "origin_not_allowed", close=True),
    BodyTimeout: Wire(408, "invalid_request_error", "body_timeout", retry=True, close=True),
    ClientGone: Wire(499, "client_closed_request", "client_gone"),
    QueueTimeout: Wire(503, "overloaded_error", "queue_timeout", retry=True),
    EngineBusy: Wire(503, "overloaded_error", "queue_full", retry=True),
    EngineDown: Wire(503, "unavailable_error", "engine_down", retry=True),
    GenerationTimeout: Wire(504, "timeout_error", "timeout"),
    EngineStopped: Wire(503, "unavailable_error", "server_stopped", retry=True),
    GenerationFailed: Wire(500, "server_error", "generation_failed"),
    CheckpointError: Wire(500, "server_error", "bad_checkpoint"),
}
SHOWN = ("model", "num_experts", "experts")  # fields whose values are logged
QUOTED = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1).)*(?:\1|$)""", re.DOTALL)
GOT = re.compile(r"\bgot (?![-\d'\"]|True\b|False\b|None\b|nan\b|inf\b).*", re.DOTALL)
LONGEST_REASON = 300  # characters
INTERNAL = Wire(500, "server_error", "internal_error")
HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def wire_of(error: Exception) -> Wire:
    """The row of the nearest class of the error's family."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), INTERNAL)


def printable(text: str) -> str:
    """Text that can always be written as UTF-8: a lone surrogate once turned a 404 into a 500."""
    return text.encode("utf-8", "backslashreplace").decode()


def code_of(error: Exception) -> str:
    wire = wire_of(error)
    return error.code if isinstance(error, InvalidRequest) and wire.status == 400 else wire.code


def error_body(error: Exception) -> dict[str, Any]:
    """The OpenAI error object. An error that nobody foresaw says nothing of the inside."""
    known = isinstance(error, MoedialError)
    message = str(error) if known else "internal error; the server's log has more under this request's id"
    param = error.param if isinstance(error, InvalidRequest) else None
    return _body(message, wire_of(error).type, param, code_of(error))


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    shown = None if param is None else printable(param)
    return {"error": {"message": printable(message), "type": kind, "param": shown, "code": printable(code)}}


def loggable(error: Exception) -> str:
    """An error's message for the log, bounded, without what may be part of a prompt: the values of a caller that are no
    numbers, but for names of models, and what a compiler says of a grammar."""
    message = str(error)
    if isinstance(error, InvalidRequest) and error.param not in SHOWN:
        message = message.partition(": ")[0] if error.code == "invalid_grammar" else message
        message = QUOTED.sub(r"\1…\1", GOT.sub("got …", message))
    return message if len(message) <= LONGEST_REASON else message[:LONGEST_REASON] + "…"


def error_response(error: Exception) -> Response:
    wire = wire_of(error)
    headers = {} if wire.retry else {"x-should-retry": "false"}
    if wire.status in (429, 503):
        headers["retry-after"] = str(getattr(error, "retry_after", 1))
    if wire.status == 401:
        headers["www-authenticate"] = "Bearer"
    if wire.close:
        headers["connection"] = "close"
    return Response(orjson.dumps(error_body(error)), wire.status, headers, "application/json")


async def _on_known(request: Request, error: Exception) -> Response:
    field = {"field": printable(error.param)} if isinstance(error, InvalidRequest) and error.param else {}
    probe = "probes" in getattr(request.scope.get("route"), "tags", ())  # while a model loads, these are many
    say = log.debug if probe else log.info
    say("refused", status=wire_of(error).status, code=code_of(error), **field, reason=loggable(error), **_who(request))
    return error_response(error)


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    log.error("internal error", exc_info=error, **_who(request))
    response = error_response(error)
    response.headers["x-request-id"] = _who(request)["request_id"] or ""  # this handler is outside our middlewares
    return response


async def _on_http(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = _body(message, "invalid_request_error", None, HTTP_CODES.get(error.status_code, "http_error"))
    headers = {**(error.headers or {}), "x-should-retry": "false"}
    return Response(orjson.dumps(body), error.status_code, headers, "application/json")


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return error_response(InvalidRequest(f"{field}: {first['msg']}", field or None))


def _who(request: Request) -> dict[str, Any]:
    route = request.scope.get("route")
    key = {"key": name} if (name := key_name_of(request)) else {}
    request_id = request.scope["state"].get("request_id")
    return {"request_id": request_id, "route": getattr(route, "path", "unknown"), **key}


def key_name_of(request: Request) -> str:
    """The name of the API key that the request came with; empty without keys."""
    return str(request.scope["state"].get("key_name", ""))


def install(app: FastAPI) -> None:
    app.add_exception_handler(MoedialError, _on_known)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(Exception, _on_unforeseen)
