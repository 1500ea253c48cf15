"""The engine process: `python -m engine.process.worker FD`, where FD is one end of a socket pair that the parent made.

It loads the model that the first message names, then alternates between reading messages and stepping. It blocks on the
socket while there is nothing to do, and ends when its parent does. What a model is, `engine/build.py` knows.
"""

import faulthandler
import logging
import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from engine import logs, parent
from engine.engine import Engine
from engine.grammars.mask_client import MaskClient
from engine.process.coalescer import Outbox
from engine.process.intake import Intake
from engine.process.messages import (
    HEADER,
    Abort,
    Busy,
    Compile,
    Failed,
    FrameError,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Reports,
    Start,
    Stop,
    Submit,
    ToEngine,
    frame,
    frame_size,
    read_to_engine,
)
from engine.process.packing import frames
from engine.types import EngineInfo, EngineSettings, StepReport
from model.errors import CheckpointError, EngineDown

log = logging.getLogger(__name__)

Builder = Callable[[EngineSettings], tuple[Engine, EngineInfo]]

_READ_SIZE = 256 * 1024


class Connection:
    """The child's end of the socket: whole messages in, whole messages out."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self._waker, self._woken = socket.socketpair()
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._waker.setblocking(False)
        self._woken.setblocking(False)

    def wake(self) -> None:
        """Let a waiting `receive` return; any thread may call it."""
        with suppress(BlockingIOError):  # full of wakes: it will wake
            self._waker.send(b"!")

    def send(self, message: FromEngine) -> None:
        """Write one message, waiting as long as the parent takes to read. Raises `OSError` when the parent is gone."""
        self.write(frame(message))

    def write(self, data: bytes) -> None:
        """The same of a message that is a frame already."""
        self._socket.sendall(data)

    def receive(self, *, wait: bool, beside: Sequence[MaskClient] = ()) -> list[ToEngine]:
        """All messages that have arrived; with `wait`, sleeps until there is something to read, here or `beside`, or
        `wake` is called.

        Raises:
            EOFError: the parent has closed its end.
            FrameError: what arrived is no message.
        """
        if not wait and not self._readable.poll(0):
            return []  # between two steps, the common case
        if wait:
            self._wait([self._socket, self._woken, *beside])
        try:
            while data := self._socket.recv(_READ_SIZE, socket.MSG_DONTWAIT):
                self._buffer += data
        except BlockingIOError:
            return list(self._messages())
        raise EOFError("the parent closed the socket")

    def _wait(self, sources: list[socket.socket | MaskClient]) -> None:
        if self._woken in select.select(sources, [], [])[0]:
            self._woken.recv(_READ_SIZE)

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
    parent.follow()
    _show_crashes()
    logs.configure("info", "text")  # until the settings are here
    descriptor = int((sys.argv[1:] if arguments is None else arguments)[0])
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as sock:
        connection = Connection(sock)
        try:
            if (loaded := _load(connection, builder)) is not None:
                engine, settings = loaded
                serve(connection, engine, settings.stream_interval_ms / 1000)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0  # without a parent there is nobody to serve
        except (EngineDown, FrameError) as error:
            log.error("the engine process ends: %s", error)
            return 1
    return 0


def _show_crashes() -> None:
    """A crash writes where each thread is, and so does a process that hangs, when its parent asks before it kills."""
    with suppress(OSError, RuntimeError, ValueError):  # without a standard error stream there is no place for it
        faulthandler.enable()
        faulthandler.register(parent.DUMP_SIGNAL, all_threads=True)


def serve(connection: Connection, engine: Engine, interval: float) -> None:
    """Run requests until a `Stop` has come and everything submitted has ended. `interval`: see `Outbox`, in seconds."""
    stopping = False
    intake, outbox = (
        Intake(engine, connection.send, connection.wake),
        Outbox(partial(_report, connection, engine), interval),
    )
    engine.announce = partial(_announce, connection, outbox)
    while True:
        wait = not engine.has_work and (bool(intake.jobs) or not stopping)
        for message in connection.receive(wait=wait, beside=engine.awaited if wait else ()):
            outbox.flush()  # what it asks for may make the next step a long one
            stopping = _obey(message, intake) or stopping
        if wait:
            engine.collect_masks()  # one may be of an answer that was aborted: left unread, it would end every wait
        if intake.admit():
            outbox.flush()
        if engine.has_work:
            outbox.put(_step(engine, outbox), more=engine.has_work)
        elif stopping and not intake.jobs:
            return


def _report(connection: Connection, engine: Engine, message: Reports) -> None:
    for data in frames(message.reports, engine.abort):
        connection.write(data)


def _announce(connection: Connection, outbox: Outbox, seconds: float) -> None:
    """A long step begins: what was made before does not wait for its end."""
    with suppress(OSError):  # a parent that is gone is seen by the next read
        outbox.flush()
        connection.send(Busy(seconds))


def _step(engine: Engine, outbox: Outbox) -> StepReport:
    """What was made before the device was lost is not lost with it."""
    try:
        return engine.step()
    except EngineDown:
        outbox.flush()
        raise


def _obey(message: ToEngine, intake: Intake) -> bool:
    """Carry out one message; true if it asks to stop."""
    match message:
        case Submit(requests):
            for request in requests:
                intake.submit(request)
        case Compile(id, grammar):
            intake.compile(id, grammar)
        case Abort(ids):
            for request_id in ids:
                intake.abort(request_id)
        case Ping():
            intake.send(Pong())
        case Stop():
            return True
        case Start():
            raise FrameError("a second start message")
    return False


def _load(connection: Connection, builder: Builder | None) -> tuple[Engine, EngineSettings] | None:
    """Build the engine that the first message asks for, and tell the parent; None if that is impossible."""
    while not (messages := connection.receive(wait=True)):
        pass
    if len(messages) != 1 or not isinstance(messages[0], Start):
        raise FrameError("the first message must be a start, alone")
    settings = messages[0].settings
    logs.configure(settings.log_level, settings.log_format)
    try:
        engine, info = (builder or _default_builder())(settings)
    except CheckpointError as error:
        connection.send(Failed(str(error)))  # whoever asked says it; a traceback would only hide it
        return None
    except Exception as error:
        log.exception("loading failed")
        connection.send(Failed(f"{type(error).__name__}: {error}"))
        return None
    connection.send(Ready(info))
    return engine, settings


def _default_builder() -> Builder:
    # Imported here: it pulls in torch, which nothing else on this side of the border needs.
    from engine.build import build_engine

    return build_engine


if __name__ == "__main__":
    sys.exit(main())
