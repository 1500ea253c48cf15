"""The engine process: `python -m engine.process.worker FD`, where FD is one end of a socket pair made by the parent.

It loads the model that the first message names, then alternates between reading messages and stepping. It blocks on the
socket while there is nothing to do, and ends when its parent ends. Models are built by `engine/build.py`.
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
from engine.imports import uncollected
from engine.process.coalescer import Coalescer
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
    SetCounts,
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

EngineBuilder = Callable[[EngineSettings], tuple[Engine, EngineInfo]]

_READ_SIZE = 256 * 1024


class Connection:
    """The engine process's end of the socket: reads and writes whole messages."""

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
        """Write bytes that are a frame already; as `send`."""
        self._socket.sendall(data)

    def receive(self, *, wait: bool, beside: Sequence[MaskClient] = ()) -> list[ToEngine]:
        """All messages that have arrived. With `wait`, first sleeps until this socket or one of `beside` is readable,
        or `wake` is called.

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


def main(arguments: Sequence[str] | None = None, builder: EngineBuilder | None = None) -> int:
    """Serve the parent at the other end of the file descriptor in `arguments`; returns the exit status.

    `builder` replaces `engine.build.build_engine`, so that a test can run this process with a fake model.
    """
    parent.die_with_parent()
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
            return 0  # the parent has ended
        except (EngineDown, FrameError) as error:
            log.error("the engine process ends: %s", error)
            return 1
    return 0


def _show_crashes() -> None:
    """Write stack traces of all threads on a crash, and when the parent asks for them before it kills the process."""
    with suppress(OSError, RuntimeError, ValueError):  # without a standard error stream there is no place for it
        faulthandler.enable()
        faulthandler.register(parent.DUMP_SIGNAL, all_threads=True)


def serve(connection: Connection, engine: Engine, interval: float) -> None:
    """Run requests until a `Stop` has come and all of them have ended, then end the mask processes, after an error too.

    `interval` is the coalescer's, in seconds.
    """
    try:
        _serve(connection, engine, interval)
    finally:
        engine.masks.stop()


def _serve(connection: Connection, engine: Engine, interval: float) -> None:
    stopping = False
    intake = Intake(engine, connection.send, connection.wake)
    coalescer = Coalescer(partial(_report, connection, engine), interval)
    engine.announce = partial(_announce, connection, coalescer)
    while True:
        wait = not engine.has_work and (bool(intake.jobs) or not stopping)
        for message in connection.receive(wait=wait, beside=engine.masks.awaited if wait else ()):
            coalescer.flush()  # the message may make the next step a long one
            stopping = _handle(message, intake) or stopping
        if wait:
            engine.masks.collect()  # a mask of an aborted answer, left unread, would end every wait at once
        if intake.admit():
            coalescer.flush()
        if engine.has_work:
            coalescer.put(_step(engine, coalescer), more=engine.has_work)
        elif stopping and not intake.jobs:
            return


def _report(connection: Connection, engine: Engine, message: Reports) -> None:
    for data in frames(message.reports, engine.abort):
        connection.write(data)


def _announce(connection: Connection, coalescer: Coalescer, seconds: float) -> None:
    """Before a long step: send the buffered reports, and how long the step may take."""
    with suppress(OSError):  # the next read notices that the parent has ended
        coalescer.flush()
        connection.send(Busy(seconds))


def _step(engine: Engine, coalescer: Coalescer) -> StepReport:
    """Run one step. If the device is lost, buffered reports are sent first."""
    try:
        return engine.step()
    except EngineDown:
        coalescer.flush()
        raise


def _handle(message: ToEngine, intake: Intake) -> bool:
    """Handle one message; returns whether it asks to stop."""
    match message:
        case Submit(requests):
            for request in requests:
                intake.submit(request)
        case Compile(id, grammar):
            intake.compile(id, grammar)
        case Abort(ids):
            for request_id in ids:
                intake.abort(request_id)
        case SetCounts(request_id, counts):
            intake.set_counts(request_id, counts)
        case Ping():
            intake.send(Pong())
        case Stop():
            return True
        case Start():
            raise FrameError("a second start message")
    return False


def _load(connection: Connection, builder: EngineBuilder | None) -> tuple[Engine, EngineSettings] | None:
    """Build the engine that the first message asks for and report it to the parent; None if it cannot be built."""
    while not (messages := connection.receive(wait=True)):
        pass
    if len(messages) != 1 or not isinstance(messages[0], Start):
        raise FrameError("the first message must be a start, alone")
    settings = messages[0].settings
    logs.configure(settings.log_level, settings.log_format)
    try:
        engine, info = (builder or _default_builder())(settings)
    except CheckpointError as error:
        connection.send(Failed(str(error)))  # the HTTP process logs it; a traceback would only hide it
        return None
    except Exception as error:
        log.exception("loading failed")
        connection.send(Failed(f"{type(error).__name__}: {error}"))
        return None
    connection.send(Ready(info))
    return engine, settings


def _default_builder() -> EngineBuilder:
    # Imported here because it imports torch, which nothing else in this file needs.
    with uncollected():
        from engine.build import build_engine

    return build_engine


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    with suppress(OSError, ValueError):  # no standard output, or it is closed
        print(end="", flush=True)
    os._exit(status)  # to take all of torch down module by module takes a third of a second
