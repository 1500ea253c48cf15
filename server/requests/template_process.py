"""The worker process that renders a chat template: `python -m server.requests.template_process MODEL SECONDS`.

A sandbox keeps a template from the machine, but not from taking time and memory; a process can be killed. It reads
conversations from a socket, its standard input, and writes the rendered texts. A conversation that takes more than
SECONDS of processor time ends the process.
"""

import json
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

from engine import parent
from model.errors import CheckpointError, InvalidRequest
from weights.chat import ChatTemplate

SIZE = struct.Struct("<I")
RENDERED, REFUSED = b"+", b"-"  # the first byte of an answer
MEMORY = 1 << 30  # bytes of address space; a body of 8 MB in the smallest messages needs a fifth of it


def send(connection: socket.socket, data: bytes) -> None:
    """Send one frame. Raises OSError as the socket does."""
    connection.sendall(SIZE.pack(len(data)) + data)


def receive(connection: socket.socket, deadline: float | None = None) -> bytes:
    """One frame.

    Raises:
        EOFError: the other end has closed.
        TimeoutError: it did not arrive in time.
        OSError: as the socket does.
    """
    size = SIZE.unpack(_exactly(connection, SIZE.size, deadline))[0]
    return _exactly(connection, size, deadline)


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def main() -> None:
    parent.die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        try:
            template = ChatTemplate.load(Path(sys.argv[1]))
        except (CheckpointError, MemoryError) as error:
            send(connection, json.dumps({"error": str(error) or "the chat template needs too much memory"}).encode())
            return
        send(connection, json.dumps(_described(template)).encode())
        if template is not None:
            _serve(connection, template, float(sys.argv[2]))


def _described(template: ChatTemplate | None) -> dict[str, Any] | None:
    if template is None:
        return None
    known = {"knows_tools": template.knows_tools, "knows_thinking": template.knows_thinking}
    return {"source": template.source, **known}


def _serve(connection: socket.socket, template: ChatTemplate, seconds: float) -> None:
    """Answer requests until the parent has ended. The timer's signal, which has no handler, ends the process."""
    try:
        while True:
            request = receive(connection)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = _answer(template, request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(connection, answer)
    except (EOFError, ConnectionError):
        return


def _answer(template: ChatTemplate, request: bytes) -> bytes:
    try:
        return RENDERED + template.render(**json.loads(request)).encode()
    except InvalidRequest as error:
        return REFUSED + error.message.encode("utf-8", "replace")
    except RecursionError:
        return REFUSED + b"the messages are nested too deeply for the chat template"
    except MemoryError:
        return REFUSED + f"the chat template needs more than {MEMORY >> 20} MB for these messages".encode()
    except UnicodeEncodeError:
        return REFUSED + b"the chat template writes what is no text"


if __name__ == "__main__":
    main()
