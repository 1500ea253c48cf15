"""What the process needs before it serves: sockets that listen, a certificate, and as many open files as connections.

All of it is had before anything is loaded, so that a taken port costs no time. It knows no requests.
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
MOST_ANSWERED = 8192  # connections beyond the limit that are open for a while, so that they read why they are refused
BACKLOG = 2048  # connections that wait while the model's files are read; uvicorn's own number
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # IPv6 is switched off, mostly


class CannotListen(MoedialError):
    """The address that the server is to listen on cannot be had."""


class BadCertificate(MoedialError):
    """The certificate or its key cannot be used."""


def check_certificate(certfile: str, keyfile: str) -> None:
    """Raises BadCertificate with the reason, where uvicorn would end with a traceback or ask for a passphrase."""
    if not certfile:
        return
    files = f"--ssl-certfile {certfile}" + (f", --ssl-keyfile {keyfile}" if keyfile else "")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile or None, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise BadCertificate(f"{files}: the certificate or its key cannot be used: {error}") from None


def allow_open_files(connections: int) -> None:
    """Raise the soft limit on open files to what connections need, also those that are refused, as far as the hard
    limit lets it. Warn where that is too little for `connections` alone."""
    needed = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(needed + MOST_ANSWERED, _number(hard))
    if _number(soft) < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning("fewer files may be open than --max-connections needs", needed=needed, limit=hard)


def files_left(connections: int) -> int:
    """How many connections beyond `connections` may stay until an answer has been read, by the limit on open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, min(MOST_ANSWERED, _number(soft) - connections - OTHER_FILES))


def _number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def listen(host: str, port: int) -> list[socket.socket]:
    """A listening socket for every address of `host`, all on one port. `port` 0: any free one.

    Raises:
        CannotListen: says which of host and port is at fault, and why.
    """
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        refused: OSError | None = None
        for family, address in _addresses(host, port):
            taken = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(opened.enter_context(_listener(family, (address[0], taken, *address[2:]))))
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise _refusal(host, taken, error) from None
                refused = error
        if not sockets:
            raise _refusal(host, port, refused)
        opened.pop_all()
    return sockets


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CannotListen(f"cannot listen on {host!r:.255}: no address of that name ({reason}); see --host") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _listener(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of a server that has just ended
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
