"""Authentication as a pure-ASGI middleware: which key a request has, and whether that may be used now.

It reads headers, not bodies. It sets `key_name` of the request's state; empty where there are no keys.
"""

from collections.abc import Callable, Iterable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import MoedialError
from server.access.keys import Keys
from server.access.quotas import Account
from server.errors import RateLimited, Unauthorized
from server.http.error_responses import error_response
from server.http.middleware import OPEN_PATHS

SPACE = b" \t"  # allowed around a field's value, and between a scheme and its credentials
LIMIT_FIELDS = ("limit", "remaining", "reset")  # for each kind of limit; the headers have OpenAI's names
RATE_LIMIT_HEADERS = tuple(f"x-ratelimit-{what}-{kind}" for what in LIMIT_FIELDS for kind in ("requests", "tokens"))
OnResult = Callable[[Scope, MoedialError | None], None]


class Auth:
    """Refuses requests without a known key, where there are keys, except on the open paths.

    POST requests, which cost something, are also refused where a key has used up its requests or tokens per minute.
    `on_result` is called for every refusal, and with None for every POST that was let in. Routes below `own_keys` check
    a key of their own.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        accounts: Mapping[str, Account],
        on_result: OnResult,
        own_keys: tuple[str, ...] = (),
    ) -> None:
        self.app, self.keys, self.accounts, self.on_result = app, keys, accounts, on_result
        self.own_keys = own_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["key_name"] = ""
        if not self.keys or scope["path"] in OPEN_PATHS or scope["path"].startswith(self.own_keys):
            return await self.app(scope, receive, send)
        try:
            account = self.accounts[self._name(scope["headers"])]
        except Unauthorized as error:
            return await self._refuse(error, scope, receive, send)
        state["key_name"] = account.name
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        await self._admit(account, scope, receive, send)

    async def _admit(self, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        if account.remaining():
            send = _with_rate_limits(account, send)
        try:
            account.admit()
        except RateLimited as error:
            return await self._refuse(error, scope, receive, send)
        self.on_result(scope, None)
        await self.app(scope, receive, send)

    async def _refuse(self, error: MoedialError, scope: Scope, receive: Receive, send: Send) -> None:
        self.on_result(scope, error)
        await error_response(error, scope["path"])(scope, receive, send)

    def _name(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        given = set(credentials(headers))
        if len(given) > 1:
            raise Unauthorized("the request holds different keys (authorization, x-api-key); send one")
        name = self.keys.name_of(given.pop()) if given else None
        if name is None:
            raise Unauthorized("a valid key is needed: Authorization: Bearer KEY, or x-api-key: KEY")
        return name


def credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Every key in the headers, as bytes. Authorization by another scheme than Bearer has none."""
    found = []
    for name, value in headers:
        value = value.strip(SPACE)
        if name == b"authorization":
            scheme, _, value = value.partition(b" ")
            if scheme.lower() != b"bearer":
                continue
        elif name != b"x-api-key":
            continue
        found.append(value.strip(SPACE))
    return found


def _with_rate_limits(account: Account, send: Send) -> Send:
    """A `send` that adds headers, as OpenAI does, about what is left of the key's limits."""

    async def send_with_rate_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for limit in account.remaining():
                values = (str(limit.limit), str(limit.remaining), f"{limit.reset:.3f}s")
                for what, value in zip(LIMIT_FIELDS, values, strict=True):
                    headers[f"x-ratelimit-{what}-{limit.kind}"] = value
        await send(message)

    return send_with_rate_limits
