"""What the process needs before it loads a model: listening sockets, a certificate, and enough open files.

A port that is already in use is therefore refused at once.
"""

import errno
import os
import resource
import socket
import ssl
import sys
from contextlib import ExitStack
from typing import Any

import structlog

from model.errors import MoedialError

log = structlog.get_logger("server")
OTHER_FILES = 256  # beside connections: the engine's socket, logs, libraries
MAX_LINGERING = 8192  # connections beyond the limit that stay open until their refusal has been read
BACKLOG = 2048  # connections that wait while the model is loaded; uvicorn's default
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # mostly since IPv6 is switched off


class CannotListen(MoedialError):
    """The address that the server is to listen on cannot be bound."""


class BadCertificate(MoedialError):
    """The certificate or its key cannot be used."""


def check_certificate(certfile: str, keyfile: str) -> None:
    """Raises BadCertificate with the reason; uvicorn would end with a traceback or ask for a passphrase."""
    if not certfile:
        return
    files = f"--ssl-certfile {certfile}" + (f", --ssl-keyfile {keyfile}" if keyfile else "")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile or None, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BadCertificate(f"{files}: the certificate or its key cannot be used: {error}") from None


def allow_open_files(connections: int) -> None:
    """Raise the soft limit on open files to what connections need, refused ones included, up to the hard limit.

    A warning is logged where that is not enough for `connections`.
    """
    needed = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(needed + MAX_LINGERING, _number(hard))
    if _number(soft) < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning("fewer files may be open than --max-connections needs", needed=needed, limit=hard)


def files_left(connections: int) -> int:
    """How many connections beyond `connections` the limit on open files leaves for those whose answer is being read."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, min(MAX_LINGERING, _number(soft) - connections - OTHER_FILES))


def _number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def listen(host: str, port: int) -> list[socket.socket]:
    """A listening socket for every address of `host`, all on one port. `port` 0: any free one.

    Raises:
        CannotListen: says which of host and port is at fault, and why.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        refused: OSError | None = None
        for family, address in _addresses(host, port):
            bound_port = sockets[0].getsockname()[1] if sockets else port
            try:
                listener = _listener(family, (address[0], bound_port, *address[2:]))
                sockets.append(stack.enter_context(listener))
            except OSError as error:
                if error.errno not in NO_SUCH_ADDRESS:
                    raise _refusal(host, bound_port, error) from None
                refused = error
        if not sockets:
            raise _refusal(host, port, refused)
        stack.pop_all()
    return sockets


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CannotListen(f"cannot listen on {host!r:.255}: no address of that name ({reason}); see --host") from None
    addresses = ((family, address) for family, _, _, _, address in found)
    return list(dict.fromkeys(addresses))


def _listener(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # so that the port of a server that has just ended can be used
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _refusal(host: str, port: int, error: OSError | None) -> CannotListen:
    number = error.errno if error is not None and error.errno is not None else 0
    reason = os.strerror(number) if number else "no address"
    hint = {
        errno.EADDRINUSE: "another process has the port; choose one with --port",
        errno.EACCES: "ports below 1024 need a privilege; choose one with --port",
    }.get(number, "this machine does not have that address; see --host")
    return CannotListen(f"cannot listen on {host} port {port}: {reason.lower()}; {hint}")
