"""Every error that the server can answer with, and the one table that gives its HTTP status, type and code.

To the exceptions of `model/errors.py` it adds those that only HTTP has: keys, sizes of bodies, deadlines. It makes the
OpenAI-shaped error object; the responses that carry it are made in `server/http/error_responses.py`.
"""

import re
from dataclasses import dataclass
from typing import Any

from model.errors import (
    CheckpointError,
    EngineBusy,
    EngineDown,
    EngineStopped,
    GenerationFailed,
    InvalidRequest,
    MoedialError,
)


class ModelNotFound(InvalidRequest):
    """The `model` field names neither the model nor one of its aliases."""


class ModelsBusy(EngineBusy):
    """The model is not in memory, and there is no room for it beside the models in use."""


class ModelInUse(MoedialError):
    """The model cannot be unloaded while requests use it."""


class NotCalibrated(MoedialError):
    """The model has no calibration to show."""


class Unauthorized(MoedialError):
    """No key, or a wrong one."""


class RateLimited(MoedialError):
    """The key has used up one of its limits, which `limit` names; `retry_after` is in seconds."""

    def __init__(self, message: str, limit: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.limit, self.retry_after = limit, retry_after


class KeyShareTaken(RateLimited):
    """The key holds its share of the queue; unlike other limits this one is checked after the body was read."""


class TooLarge(MoedialError):
    """The body is larger than the limit."""


class TooManyHeaders(MoedialError):
    """The request has more header fields than the limit."""


class HeadersTooLarge(MoedialError):
    """The request line and headers have more bytes than the limit."""


class HeaderTimeout(MoedialError):
    """The request headers did not arrive in time."""


class BadHttp(MoedialError):
    """The bytes received are no HTTP/1.1 request, or an ambiguous one."""


class TooManyConnections(MoedialError):
    """The server has as many connections as it may have."""


class BodiesFull(MoedialError):
    """The bodies of all requests together have as many bytes as they may have."""


class HostNotAllowed(MoedialError):
    """The request names a host that this server does not answer for."""


class OriginNotAllowed(MoedialError):
    """A web page of another site has sent the request."""


class BodyTimeout(MoedialError):
    """The body did not arrive in time."""


class QueueTimeout(EngineBusy):
    """The request waited too long in the queue."""


class GenerationTimeout(GenerationFailed):
    """The request ran into its total time limit."""


class ClientGone(MoedialError):
    """The client has closed the connection, so that no answer can be read."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """How one kind of error is answered. `retry`: whether sending the same request again can help."""

    status: int
    type: str
    code: str
    retry: bool = False
    close: bool = False  # the body was not read to its end, so that the connection cannot be used again


HTTP_ERRORS: dict[type[Exception], HttpError] = {
    ModelNotFound: HttpError(404, "invalid_request_error", "model_not_found"),
    NotCalibrated: HttpError(404, "invalid_request_error", "not_calibrated"),
    InvalidRequest: HttpError(400, "invalid_request_error", "invalid_value"),
    Unauthorized: HttpError(401, "authentication_error", "invalid_api_key", close=True),
    RateLimited: HttpError(429, "rate_limit_error", "rate_limit_exceeded", retry=True, close=True),
    KeyShareTaken: HttpError(429, "rate_limit_error", "rate_limit_exceeded", retry=True),
    TooLarge: HttpError(413, "invalid_request_error", "body_too_large", close=True),
    TooManyHeaders: HttpError(431, "invalid_request_error", "too_many_headers", close=True),
    HeadersTooLarge: HttpError(431, "invalid_request_error", "headers_too_large", close=True),
    HeaderTimeout: HttpError(408, "invalid_request_error", "header_timeout", retry=True, close=True),
    BadHttp: HttpError(400, "invalid_request_error", "bad_http", close=True),
    TooManyConnections: HttpError(503, "overloaded_error", "too_many_connections", retry=True, close=True),
    BodiesFull: HttpError(503, "overloaded_error", "too_many_body_bytes", retry=True, close=True),
    HostNotAllowed: HttpError(403, "permission_error", "host_not_allowed", close=True),
    OriginNotAllowed: HttpError(403, "permission_error", "origin_not_allowed", close=True),
    BodyTimeout: HttpError(408, "invalid_request_error", "body_timeout", retry=True, close=True),
    ClientGone: HttpError(499, "client_closed_request", "client_gone"),
    QueueTimeout: HttpError(503, "overloaded_error", "queue_timeout", retry=True),
    ModelsBusy: HttpError(503, "overloaded_error", "models_busy", retry=True),
    ModelInUse: HttpError(409, "invalid_request_error", "model_in_use", retry=True),
    EngineBusy: HttpError(503, "overloaded_error", "queue_full", retry=True),
    EngineDown: HttpError(503, "unavailable_error", "engine_down", retry=True),
    GenerationTimeout: HttpError(504, "timeout_error", "timeout"),
    EngineStopped: HttpError(503, "unavailable_error", "server_stopped", retry=True),
    GenerationFailed: HttpError(500, "server_error", "generation_failed"),
    CheckpointError: HttpError(500, "server_error", "bad_checkpoint"),
}
LOGGED_FIELDS = ("model", "num_experts", "experts")  # fields whose values are logged
QUOTED = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1).)*(?:\1|$)""", re.DOTALL)
GOT = re.compile(r"\bgot (?![-\d'\"]|True\b|False\b|None\b|nan\b|inf\b).*", re.DOTALL)
MAX_REASON = 300  # characters
INTERNAL_ERROR = HttpError(500, "server_error", "internal_error")


def http_error_of(error: Exception) -> HttpError:
    """The table's entry for the error's class, or for the nearest of its base classes that has one."""
    return next((HTTP_ERRORS[kind] for kind in type(error).__mro__ if kind in HTTP_ERRORS), INTERNAL_ERROR)


def printable(text: str) -> str:
    """Text that can always be written as UTF-8: a lone surrogate once turned a 404 into a 500."""
    return text.encode("utf-8", "backslashreplace").decode()


def code_of(error: Exception) -> str:
    """The machine-readable code; a refused field may have one of its own."""
    http = http_error_of(error)
    return error.code if isinstance(error, InvalidRequest) and http.status == 400 else http.code


def error_body(error: Exception) -> dict[str, Any]:
    """The OpenAI error object. An unexpected error reveals nothing about the server."""
    known = isinstance(error, MoedialError)
    message = str(error) if known else "internal error; the server's log has more under this request's id"
    param = error.param if isinstance(error, InvalidRequest) else None
    return error_object(message, http_error_of(error).type, param, code_of(error))


def error_object(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """The OpenAI error object of these parts."""
    shown = None if param is None else printable(param)
    return {"error": {"message": printable(message), "type": kind, "param": shown, "code": printable(code)}}


def loggable(error: Exception) -> str:
    """An error's message for the log: bounded in length, and without text that may be part of a prompt.

    A client's values are left out unless they are numbers, expert counts or names of models; so is what the grammar
    compiler quotes.
    """
    message = str(error)
    if isinstance(error, InvalidRequest) and error.param not in LOGGED_FIELDS:
        message = message.partition(": ")[0] if error.code == "invalid_grammar" else message
        message = QUOTED.sub(r"\1…\1", GOT.sub("got …", message))
    return message if len(message) <= MAX_REASON else message[:MAX_REASON] + "…"
