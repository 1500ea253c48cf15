"""Which web pages may use this server: the names it answers to (Host), and the sites whose pages may ask it (Origin).

A browser sends the requests of any page to a server on the user's machine, and only keeps the answers from the page.
A page whose name is made to resolve to that machine (DNS rebinding) gets the answers, too. The first shows in the
Origin header, the second in the Host header. It knows headers, no route and no key.
"""

import ipaddress
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from model.errors import InvalidRequest, MoedialError
from server.errors import HostNotAllowed, OriginNotAllowed, error_response

ANY = "*"
LOCAL_SUFFIXES = (".localhost", ".local", ".internal")  # no public name ends so


def name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def is_local(name: str) -> bool:
    """Whether no stranger can have this name: it is an address, has no dot, or ends as local names do."""
    return "." not in name or name.endswith(LOCAL_SUFFIXES) or _address(name) is not None


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    address = _address(host)
    return name_of(host) == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Hosts:
    """The names that a server answers to. `checked`: other ones are refused."""

    listed: frozenset[str]
    checked: bool

    def knows(self, name: str) -> bool:
        """Whether the name is local or listed, as it is or as *.domain."""
        return is_local(name) or not self.listed.isdisjoint({ANY, name, *_wildcards(name)})

    def take(self, name: str) -> bool:
        return not self.checked or self.knows(name)


def _wildcards(name: str) -> Iterable[str]:
    parts = name.split(".")
    return ("*." + ".".join(parts[i:]) for i in range(1, len(parts)))


def hosts_of(listed: Iterable[str], bound: str, keys: bool) -> Hosts:
    """Names are checked where the operator lists some, or where the server is this machine's own and has no keys.

    A server that listens on other addresses is meant to be reached by names that it cannot know, such as those of the
    machine that publishes a container's port.
    """
    names = frozenset(name.lower() for name in listed)
    return Hosts(
        names | {bound.lower(), socket.gethostname().lower()}, bool(names) or (is_loopback(bound) and not keys)
    )


Note = Callable[[Scope, MoedialError], None]  # hears of each refusal


class Sites:
    """Refuses requests for other hosts, requests of other sites' pages, and bodies of pages without a content type."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Hosts,
        origins: frozenset[str],
        keys: bool,
        note: Note,
    ) -> None:
        self.app, self.hosts, self.origins, self.keys, self.note = app, hosts, origins, keys, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            return await self.app(scope, receive, send)
        self.note(scope, error)
        await error_response(error)(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> MoedialError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.hosts.take(name_of(host)):
            return HostNotAllowed(
                f"{name_of(host)!r:.120} is no name of this server; the operator can add it with --allowed-hosts"
            )
        if origin is None:
            return None
        # with keys, a page that has none gets nowhere, and one that has one may ask; but not a preflight
        if (not self.keys or "access-control-request-method" in headers) and not self._takes(origin, host):
            return OriginNotAllowed(
                f"pages of {origin!r:.120} may not use this server; the operator can allow them with --allow-origin"
            )
        if "content-type" not in headers and _has_body(headers):
            return InvalidRequest("the body of a web page needs a content-type: application/json", "content-type")
        return None

    def _takes(self, origin: str, host: str) -> bool:
        """Whether the page is allowed, or this server's own, by a name that no other site can have."""
        if not self.origins.isdisjoint({ANY, origin}):
            return True
        return origin.partition("://")[2].lower() == host.lower() != "" and self.hosts.knows(name_of(host))


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
