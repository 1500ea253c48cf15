"""Errors as HTTP responses, and the handlers through which FastAPI answers with them.

Statuses and codes are in the table of `server/errors.py`; this module knows Starlette's requests and responses.
"""

from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from model.errors import InvalidRequest, MoedialError
from server.errors import code_of, error_object, http_error_of, loggable, printable
from server.formats.errors import error_for, in_shape_of, is_messages
from server.http.incoming import key_name_of

log = structlog.get_logger("server")
STARLETTE_CODES = {404: "not_found", 405: "method_not_allowed"}


def error_response(error: Exception, path: str = "") -> Response:
    """The response to a request for `path` that ended with `error`, in the shape of its API."""
    http = http_error_of(error)
    headers = {} if http.retry else {"x-should-retry": "false"}
    if http.status in (429, 503):
        headers["retry-after"] = str(getattr(error, "retry_after", 1))
    if http.status == 401:
        headers["www-authenticate"] = "Bearer"
    if http.close:
        headers["connection"] = "close"
    return Response(orjson.dumps(error_for(path, error)), http.status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Let `app` answer every exception with an error in the shape of the API that was asked."""
    app.add_exception_handler(MoedialError, _on_known_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_unexpected_error)


async def _on_known_error(request: Request, error: Exception) -> Response:
    field = {"field": printable(error.param)} if isinstance(error, InvalidRequest) and error.param else {}
    fields = {"status": http_error_of(error).status, "code": code_of(error), **field, "reason": loggable(error)}
    is_probe = "probes" in getattr(request.scope.get("route"), "tags", ())
    write = log.debug if is_probe else log.info  # while a model loads, many probes are refused
    write("refused", **fields, **_log_fields(request))
    return error_response(error, request.url.path)


async def _on_unexpected_error(request: Request, error: Exception) -> Response:
    log.error("internal error", exc_info=error, **_log_fields(request))
    response = error_response(error, request.url.path)
    # Starlette calls this handler outside of our middleware, which adds the header elsewhere
    request_id = _log_fields(request)["request_id"] or ""
    response.headers["x-request-id"] = request_id
    if is_messages(request.url.path):
        response.headers["request-id"] = request_id
    return response


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = STARLETTE_CODES.get(error.status_code, "http_error")
    body = error_object(message, "invalid_request_error", None, code)
    body = in_shape_of(request.url.path, body, error.status_code)
    headers = {**(error.headers or {}), "x-should-retry": "false"}
    return Response(orjson.dumps(body), error.status_code, headers, "application/json")


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return error_response(InvalidRequest(f"{field}: {first['msg']}", field or None), request.url.path)


def _log_fields(request: Request) -> dict[str, Any]:
    """Request id, route and key name, which every log line about a request has."""
    route = request.scope.get("route")
    key_name = key_name_of(request)
    fields = {"request_id": request.scope["state"].get("request_id"), "route": getattr(route, "path", "unknown")}
    return fields | ({"key": key_name} if key_name else {})
