"""Which web pages may use this server: the host names it answers to, and the sites whose pages may send it requests.

A browser sends requests of any page to a server on the user's machine, and only withholds the answers from the page.
A page whose name is made to resolve to that machine (DNS rebinding) gets the answers as well. The first case shows in
the Origin header, or in Sec-Fetch-Site where a browser sends no Origin, the second in the Host header.
"""

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from model.errors import InvalidRequest, MoedialError
from server.errors import HostNotAllowed, OriginNotAllowed

ANY = "*"
LOCAL_SUFFIXES = (".localhost", ".local", ".internal")  # no public name has one of these


def name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    is_ipv6 = host.startswith("[")
    name, _, _ = host[1:].partition("]") if is_ipv6 else host.partition(":")
    return name.lower().removesuffix(".")


def is_local(name: str) -> bool:
    """Whether no public site can have this name: it is an address, has no dot, or ends as local names do."""
    return "." not in name or name.endswith(LOCAL_SUFFIXES) or _address(name) is not None


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    address = _address(host)
    return name_of(host) == "localhost" if address is None else address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Hosts:
    """The names that a server answers to. `checked`: requests with other names are refused."""

    listed: frozenset[str]
    checked: bool

    def knows(self, name: str) -> bool:
        """Whether the name is local or listed, as it is or as *.domain."""
        return is_local(name) or not self.listed.isdisjoint({ANY, name, *_wildcards(name)})

    def allow(self, name: str) -> bool:
        return not self.checked or self.knows(name)


def _wildcards(name: str) -> Iterable[str]:
    """`*.b.c` and `*.c` for `a.b.c`."""
    parts = name.split(".")
    return ("*." + ".".join(parts[i:]) for i in range(1, len(parts)))


def hosts_of(listed: Iterable[str], bound: str, keys: bool) -> Hosts:
    """The names to check: those that the operator lists, or the local ones where a local server has no keys.

    A server that listens on other addresses is meant to be reached by names that it cannot know, such as those of the
    machine that publishes a container's port.
    """
    names = frozenset(name.lower() for name in listed)
    checked = bool(names) or (is_loopback(bound) and not keys)
    return Hosts(names | {bound.lower(), socket.gethostname().lower()}, checked)


@dataclass(frozen=True, slots=True)
class SitePolicy:
    """Which requests are refused for the host they name, or for the site whose page sent them."""

    hosts: Hosts
    origins: frozenset[str]
    keys: bool  # whether the server has API keys

    def refusal(self, method: str, headers: Mapping[str, str]) -> MoedialError | None:
        """The error that a request with these headers, in lower case, is refused with."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.hosts.allow(name_of(host)):
            return HostNotAllowed(
                f"{name_of(host)!r:.120} is no name of this server; the operator can add it with --allowed-hosts"
            )
        if origin is None:
            return self._refusal_without_origin(method, headers)
        # with keys, a page needs one for every request but the preflight, which is checked here
        if (not self.keys or "access-control-request-method" in headers) and not self._allows(origin, host):
            return OriginNotAllowed(
                f"pages of {origin!r:.120} may not use this server; the operator can allow them with --allow-origin"
            )
        if "content-type" not in headers and _has_body(headers):
            return InvalidRequest("the body of a web page needs a content-type: application/json", "content-type")
        return None

    def _refusal_without_origin(self, method: str, headers: Mapping[str, str]) -> MoedialError | None:
        """Refuse what another site's page loads as a picture, script or frame. A link that a person follows is no such
        request: the answer becomes a page of its own, which the other one cannot read."""
        if self.keys or ANY in self.origins or headers.get("sec-fetch-site") != "cross-site":
            return None
        mode, goal = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
        if method == "GET" and mode == "navigate" and goal == "document":
            return None
        return OriginNotAllowed(
            "pages of other sites (Sec-Fetch-Site: cross-site) may not use this server; the operator can allow them "
            "with --allow-origin"
        )

    def _allows(self, origin: str, host: str) -> bool:
        """Whether the page's site is allowed, or is this server under a name that no other site can have."""
        if not self.origins.isdisjoint({ANY, origin}):
            return True
        own = origin.partition("://")[2].lower()
        return own == host.lower() != "" and self.hosts.knows(name_of(host))


def _has_body(headers: Mapping[str, str]) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
