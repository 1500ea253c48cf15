"""A connection to a server: how requests are sent, and how refusals become errors. It handles HTTP, not the meaning of
requests.

No proxy, .netrc or redirect is used: a key goes only to the address that was typed, and a benchmark measures that one.
"""

import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from terminal.errors import BadOption, Refused, Unreachable
from terminal.models import ModelCard, cards_of
from terminal.sanitize import one_line
from terminal.sse import EventParser, StreamChunk

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
CONNECT_SECONDS = 10.0


def address_of(url: str) -> str:
    """The address without /v1 at its end: scheme, authority, and a path if there is one.

    Raises:
        BadOption: no address of a server.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid:
        raise BadOption(f"--url must be an address such as http://127.0.0.1:8000, got {one_line(repr(url))}")
    if "@" in parts.netloc:
        raise BadOption("--url must hold no user name or password; a key goes into --key or MOEDIAL_KEY")
    return url.split("?")[0].split("#")[0].rstrip("/").removesuffix("/v1").rstrip("/")


def client_options(url: str, key: str, timeout: float) -> dict[str, Any]:
    """Arguments for httpx.Client and AsyncClient; `timeout` is the longest silence in seconds."""
    if not key.isascii() or not key.isprintable():
        raise BadOption("--key must be printable ASCII")
    headers = {"content-type": "application/json", "accept-encoding": "identity"}  # compression would delay events
    if key:
        headers["authorization"] = f"Bearer {key}"
    return {
        "base_url": url,
        "headers": headers,
        "timeout": httpx.Timeout(timeout, connect=CONNECT_SECONDS),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "trust_env": False,
        "verify": ssl.create_default_context() if url.startswith("https:") else False,
    }


def refusal(response: httpx.Response) -> Refused:
    """The error of a response whose body has been read. Bodies without an OpenAI error (of a proxy) are not shown."""
    status = response.status_code
    try:
        error = orjson.loads(response.content)["error"]
    except (ValueError, KeyError, TypeError, IndexError):
        error = None
    if isinstance(error, str):
        error = {"message": error}
    fields = error if isinstance(error, Mapping) else {}
    message = one_line(str(fields.get("message") or "no OpenAI error in the answer"))
    code = one_line(str(fields.get("code") or fields.get("type") or response.reason_phrase))
    retry = one_line(response.headers.get("retry-after", ""))
    again = f"; try again in {retry} s" if retry.isdecimal() else ""
    kind = f"HTTP {status} {code}"
    return Refused(f"{message} (HTTP {status}, {code}){again}", kind, code)


@contextmanager
def httpx_errors(url: str) -> Iterator[None]:
    """Raises Unreachable for the exceptions that httpx raises inside."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        reason = one_line(str(error)) or "no answer"
        raise Unreachable(f"cannot connect to {url}: {reason}", "no connection") from None
    except httpx.TimeoutException:
        raise Unreachable(f"{url} has been silent for too long", "timeout") from None
    except (httpx.HTTPError, httpx.StreamError) as error:
        reason = one_line(str(error)) or type(error).__name__
        raise Unreachable(f"the connection to {url} broke: {reason}", "connection broke") from None


class Server:
    """A client of one server, for one thread.

    Every method raises Unreachable, Refused, or StreamFailed.
    """

    def __init__(self, url: str, key: str, timeout: float = 600.0) -> None:
        self.url = address_of(url)
        self._client = httpx.Client(**client_options(self.url, key, timeout))

    def close(self) -> None:
        self._client.close()

    def models(self) -> list[ModelCard]:
        return cards_of(self._request("GET", "/v1/models"))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("POST", path, body)

    def stream(self, endpoint: str, body: Mapping[str, Any]) -> Generator[StreamChunk, None, None]:
        """The chunks of an answer as they arrive. Closing the iterator ends the connection and the answer."""
        parser = EventParser()
        with (
            httpx_errors(self.url),
            self._client.stream("POST", PATHS[endpoint], content=orjson.dumps(body)) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise refusal(response)
            for data in response.iter_raw():
                yield from parser.feed(data)
        parser.end()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with httpx_errors(self.url):
            response = self._client.request(method, path, content=None if body is None else orjson.dumps(body))
        if response.status_code != 200:
            raise refusal(response)
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise Refused(f"{self.url}{path} did not answer with JSON", "no JSON") from None
