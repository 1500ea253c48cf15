"""What the process needs before it listens: a certificate that can be used, and as many open files as connections.

It opens no socket.
"""

import resource
import ssl

import structlog

from model.errors import MoedialError

log = structlog.get_logger("server")
OTHER_FILES = 256  # beside connections: the engine's socket, logs, libraries


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
    """Raise the soft limit on open files to what the connections need, and warn where the hard limit is lower.

    Twice the connections: those beyond the limit are open while they are refused.
    """
    wanted = 2 * connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("fewer files may be open than --max-connections needs", wanted=wanted, limit=hard)
