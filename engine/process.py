"""The engine process: `python -m engine.process FD`, where FD is one end of a socket pair that the parent made.

It loads the model that the first message names, then alternates between reading messages and stepping. It blocks on the
socket while there is nothing to do, and ends when its parent does. What a model is, `engine/build.py` knows.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from engine.engine import Engine
from engine.messages import (
    HEADER,
    Abort,
    Failed,
    FrameError,
    FromEngine,
    Ready,
    Rejected,
    Report,
    Start,
    Stop,
    Submit,
    ToEngine,
    frame,
    frame_size,
    read_to_engine,
)
from engine.types import EngineInfo, EngineSettings, Request
from model.errors import CheckpointError, EngineDown, InvalidRequest

log = logging.getLogger(__name__)

Builder = Callable[[EngineSettings], tuple[Engine, EngineInfo]]

_PR_SET_PDEATHSIG = 1
_READ_SIZE = 256 * 1024


class Connection:
    """The child's end of the socket: whole messages in, whole messages out."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def send(self, message: FromEngine) -> None:
        """Write one message, waiting as long as the parent takes to read. Raises `OSError` when the parent is gone."""
        self._socket.sendall(frame(message))

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """All messages that have arrived; with `wait`, sleeps until there is something to read.

        Raises:
            EOFError: the parent has closed its end.
            FrameError: what arrived is no message.
        """
        if wait:
            select.select([self._socket], [], [])
        try:
            while data := self._socket.recv(_READ_SIZE, socket.MSG_DONTWAIT):
                self._buffer += data
        except BlockingIOError:
            return list(self._messages())
        raise EOFError("the parent closed the socket")

    def _messages(self) -> list[ToEngine]:
        messages: list[ToEngine] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            end = start + HEADER.size + frame_size(HEADER.unpack_from(self._buffer, start)[0])
            if len(self._buffer) < end:
                break
            messages.append(read_to_engine(bytes(self._buffer[start + HEADER.size : end])))
            start = end
        del self._buffer[:start]
        return messages


def main(arguments: Sequence[str] | None = None, builder: Builder | None = None) -> int:
    """Serve the parent at the other end of the file descriptor in `arguments`; returns the exit status.

    `builder` replaces `engine.build.build_engine`, so that a test can run this very process around a fake model.
    """
    _follow_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    descriptor = int((sys.argv[1:] if arguments is None else arguments)[0])
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as sock:
        connection = Connection(sock)
        try:
            engine = _load(connection, builder)
            if engine is not None:
                serve(connection, engine)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0  # without a parent there is nobody to serve
        except (EngineDown, FrameError) as error:
            log.error("the engine process ends: %s", error)
            return 1
    return 0


def serve(connection: Connection, engine: Engine) -> None:
    """Run requests until a `Stop` has come and everything submitted has ended."""
    stopping = False
    while True:
        for message in connection.receive(wait=not engine.has_work and not stopping):
            stopping = _obey(message, connection, engine) or stopping
        if engine.has_work:
            connection.send(Report(engine.step()))
        elif stopping:
            return


def _obey(message: ToEngine, connection: Connection, engine: Engine) -> bool:
    """Carry out one message; true if it asks to stop."""
    match message:
        case Submit(requests):
            for request in requests:
                _submit(request, connection, engine)
        case Abort(ids):
            for request_id in ids:
                engine.abort(request_id)
        case Stop():
            return True
        case Start():
            raise FrameError("a second start message")
    return False


def _submit(request: Request, connection: Connection, engine: Engine) -> None:
    try:
        engine.add(request)
    except InvalidRequest as error:
        connection.send(Rejected(request.id, error.message, error.param, error.code))


def _load(connection: Connection, builder: Builder | None) -> Engine | None:
    """Build the engine that the first message asks for, and tell the parent; None if that is impossible."""
    while not (messages := connection.receive(wait=True)):
        pass
    if len(messages) != 1 or not isinstance(messages[0], Start):
        raise FrameError("the first message must be a start, alone")
    try:
        engine, info = (builder or _default_builder())(messages[0].settings)
    except CheckpointError as error:
        connection.send(Failed(str(error)))  # whoever asked says it; a traceback would only hide it
        return None
    except Exception as error:
        log.exception("loading failed")
        connection.send(Failed(f"{type(error).__name__}: {error}"))
        return None
    connection.send(Ready(info))
    return engine


def _default_builder() -> Builder:
    # Imported here: it pulls in torch, which nothing else on this side of the border needs.
    from engine.build import build_engine

    return build_engine


def _follow_parent() -> None:
    """Die with the parent, and leave it to the parent to decide what a signal to the whole group means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "linux":
        return  # the closed socket ends us too, only later: between two steps
    # Against a parent killed while we compute; one that died before this line has closed the socket as well.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
