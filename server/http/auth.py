"""Who asks, and whether their key may ask now: a pure-ASGI middleware. It knows header bytes, not bodies.

Sets `key_name` of the request's state: the name of the key, or nothing where there are no keys.
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

SPACE = b" \t"  # all that may stand around a field's value and between a scheme and its credentials
LEVELS = ("limit", "remaining", "reset")  # of each kind of limit, as headers of OpenAI's names
LEVEL_HEADERS = tuple(f"x-ratelimit-{what}-{kind}" for what in LEVELS for kind in ("requests", "tokens"))
Note = Callable[[Scope, MoedialError | None], None]


class Auth:
    """Denies every path but the open ones without a known key, when there are keys, and every POST of a key that has
    used up its requests or tokens per minute. What costs something is a POST. `note` hears of every other request."""

    def __init__(self, app: ASGIApp, keys: Keys, accounts: Mapping[str, Account], note: Note) -> None:
        self.app, self.keys, self.accounts, self.note = app, keys, accounts, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["key_name"] = ""
        if not self.keys or scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        try:
            account = self.accounts[self._name(scope["headers"])]
        except Unauthorized as error:
            return await self._refuse(error, scope, receive, send)
        state["key_name"] = account.name
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        await self._admit(account, scope, receive, _with_levels(account, send) if account.levels() else send)

    async def _admit(self, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            account.admit()
        except RateLimited as error:
            return await self._refuse(error, scope, receive, send)
        self.note(scope, None)
        await self.app(scope, receive, send)

    async def _refuse(self, error: MoedialError, scope: Scope, receive: Receive, send: Send) -> None:
        self.note(scope, error)
        await error_response(error)(scope, receive, send)

    def _name(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        given = set(credentials(headers))
        if len(given) > 1:
            raise Unauthorized("the request holds different keys (authorization, x-api-key); send one")
        name = self.keys.name_of(given.pop()) if given else None
        if name is None:
            raise Unauthorized("a valid key is needed: Authorization: Bearer KEY, or x-api-key: KEY")
        return name


def credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Every key that a request holds, byte for byte. Authorization by another scheme than Bearer holds none of ours."""
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


def _with_levels(account: Account, send: Send) -> Send:
    """`send` that tells, as OpenAI does, what is left of the key's limits."""

    async def send_with_levels(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for level in account.levels():
                values = (str(level.limit), str(level.remaining), f"{level.reset:.3f}s")
                for what, value in zip(LEVELS, values, strict=True):
                    headers[f"x-ratelimit-{what}-{level.kind}"] = value
        await send(message)

    return send_with_levels
