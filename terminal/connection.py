"""A server at an address: how it is asked, and its refusals as errors of ours. It knows HTTP, not what is said over it.

No proxy, .netrc or redirect is followed: a key goes to the address that was typed, and a benchmark measures that one.
"""

import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from terminal.errors import BadOption, Refused, Unreachable
from terminal.models import Card, cards_of
from terminal.sanitize import one_line
from terminal.sse import Chunk, Chunks

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
CONNECT = 10.0  # seconds


def address_of(url: str) -> str:
    """Scheme and authority, and a path in front of /v1 if there is one.

    Raises:
        BadOption: no address of a server.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid:
        raise BadOption(f"--url must be an address such as http://127.0.0.1:8000, got {one_line(repr(url))}")
    if "@" in parts.netloc:
        raise BadOption("--url must hold no user name or password; a key goes into --key or MOEDIAL_KEY")
    return url.split("?")[0].split("#")[0].rstrip("/").removesuffix("/v1").rstrip("/")


def client_options(url: str, key: str, timeout: float) -> dict[str, Any]:
    """For httpx.Client and AsyncClient alike; `timeout` in seconds is the longest silence."""
    if not key.isascii() or not key.isprintable():
        raise BadOption("--key must be printable ASCII")
    return {
        "base_url": url,
        "headers": {
            "content-type": "application/json",
            "accept-encoding": "identity",  # events are read as they are; compressing them would delay them
            **({"authorization": f"Bearer {key}"} if key else {}),
        },
        "timeout": httpx.Timeout(timeout, connect=CONNECT),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "trust_env": False,
        "verify": ssl.create_default_context() if url.startswith("https:") else False,
    }


def refusal(response: httpx.Response) -> Refused:
    """An error status whose body has been read. Bodies that are not OpenAI's (a proxy's page) are not shown."""
    status = response.status_code
    try:
        error = orjson.loads(response.content)["error"]
    except (ValueError, KeyError, TypeError, IndexError):
        error = None
    said = error if isinstance(error, Mapping) else {"message": error if isinstance(error, str) else None}
    message = one_line(str(said.get("message") or "no OpenAI error in the answer"))
    code = one_line(str(said.get("code") or said.get("type") or response.reason_phrase))
    retry = one_line(response.headers.get("retry-after", ""))
    again = f"; try again in {retry} s" if retry.isdecimal() else ""
    return Refused(f"{message} (HTTP {status}, {code}){again}", f"HTTP {status} {code}", code)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turns what httpx raises into Unreachable."""
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
    """One server, asked from one thread.

    Every method raises Unreachable, Refused, or StreamFailed.
    """

    def __init__(self, url: str, key: str, timeout: float = 600.0) -> None:
        self.url = address_of(url)
        self._client = httpx.Client(**client_options(self.url, key, timeout))

    def close(self) -> None:
        self._client.close()

    def models(self) -> list[Card]:
        return cards_of(self._whole("GET", "/v1/models"))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._whole("POST", path, body)

    def stream(self, endpoint: str, body: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        """Chunks as they come. Closing the iterator closes the connection, by which the server knows to stop."""
        chunks = Chunks()
        with (
            translated(self.url),
            self._client.stream("POST", PATHS[endpoint], content=orjson.dumps(body)) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise refusal(response)
            for data in response.iter_raw():
                yield from chunks.feed(data)
        chunks.end()

    def _whole(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with translated(self.url):
            response = self._client.request(method, path, content=None if body is None else orjson.dumps(body))
        if response.status_code != 200:
            raise refusal(response)
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise Refused(f"{self.url}{path} did not answer with JSON", "no JSON") from None
