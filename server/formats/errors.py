"""The error object of each API, chosen by the path of a request: OpenAI's, Anthropic's or Ollama's."""

from typing import Any

from server.errors import error_body, http_error_of

MESSAGES_PATH, OLLAMA_PATH = "/v1/messages", "/api/"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_messages(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/")


def error_for(path: str, error: Exception) -> dict[str, Any]:
    """The error as the API that `path` belongs to writes it."""
    return in_shape_of(path, error_body(error), http_error_of(error).status)


def in_shape_of(path: str, body: dict[str, Any], status: int) -> dict[str, Any]:
    """OpenAI's error object in the shape of another API; field and code stay where the shape has room for them."""
    details = body["error"]
    if is_messages(path):
        own = {"type": _anthropic_type(status), "message": details["message"]}
        return {"type": "error", "error": own | {"param": details["param"], "code": details["code"]}}
    if path.startswith(OLLAMA_PATH):
        return {"error": details["message"]}
    return body


def _anthropic_type(status: int) -> str:
    return ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
