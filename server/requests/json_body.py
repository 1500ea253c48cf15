"""A request as the code below HTTP sees it, and its body read as a JSON object within the operator's limits.

It checks sizes and depths, not the meaning of fields. `server/http/incoming.py` makes the request.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from model.errors import InvalidRequest
from server.json_limits import JsonTooLarge, parse
from server.settings import Settings
from server.state import ServerState

INLINE_BYTES = 32 << 10  # a larger body is parsed in a thread
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class IncomingRequest:
    """The parts of an HTTP request that decide what is generated."""

    content_type: str
    expert_headers: Sequence[str]  # the values of X-Num-Experts
    key_name: str  # of the API key; empty without keys
    read: Callable[[], Awaitable[bytearray]]  # the whole body, once


async def read_json(server: ServerState, request: IncomingRequest, check: Callable[[dict[str, Any]], Result]) -> Result:
    """What `check` returns for the body, which is a JSON object. `check` may run in a thread.

    Raises:
        InvalidRequest: the body is no JSON object, or beyond the limits.
    """
    _check_content_type(request.content_type)
    data, settings = await request.read(), server.settings
    if len(data) <= INLINE_BYTES:
        return check(object_in(data, settings))
    return await server.body_parsing.run(lambda: check(object_in(data, settings)))


def _check_content_type(value: str) -> None:
    content_type = value.partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequest(f"the content type must be application/json, got {content_type!r:.64}", "content-type")


def object_in(data: bytes | bytearray, settings: Settings) -> dict[str, Any]:
    """The body as an object.

    Raises:
        InvalidRequest: it is no JSON, no object, nested too deeply or too large.
    """
    try:
        body = parse(data, settings.json_limits)
    except JsonTooLarge as error:
        raise InvalidRequest(f"the body may have {error}, got more", None, "invalid_json") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error!s:.200}", None, "invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {type(body).__name__}", None, "invalid_json")
    _check_field_count(body, "the body", None, settings.max_body_fields)
    nested = body.get("extra_body")
    if isinstance(nested, dict):
        _check_field_count(nested, "extra_body", "extra_body", settings.max_body_fields)
    return body


def _check_field_count(fields: dict[str, Any], place: str, param: str | None, limit: int) -> None:
    if len(fields) > limit:
        raise InvalidRequest(f"{place} may have at most {limit} fields, got {len(fields)}", param)
