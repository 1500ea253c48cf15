"""The HTTP process's end of one engine process: starts it, writes and reads messages, notices its end.

Not here: what a message or an exit means (see `engine/process/client.py`).
"""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from engine.environment import child_environment
from engine.parent import DUMP_SIGNAL
from engine.process.messages import HEADER, FromEngine, ToEngine, frame, frame_size, read_from_engine

DUMP_SECONDS = 0.2  # for a process that hangs to write its stack traces
EXIT_GRACE = 5.0  # seconds from the closed socket to a kill
_READ_LIMIT = 1024 * 1024  # bytes buffered before the socket is left to fill


class Child:
    """A running engine process, made by `spawn`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> "Child":
        """Start `command` with the number of its socket as last argument. Raises `OSError` if that is impossible."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:  # ours must be the only copy on this side, or the child's death would not be seen
                descriptor = theirs.fileno()
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(descriptor),
                    pass_fds=(descriptor,),
                    env=child_environment(),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # whatever a library prints belongs to the log
                )
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_READ_LIMIT)
        except BaseException:
            ours.close()  # a child that did start ends when it reads this
            raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message. One for a child that has ended is dropped: the reader of `messages` sees the end.

        Raises:
            FrameError: the message is too large.
        """
        data = frame(message)
        if not self._writer.is_closing():
            self._writer.write(data)

    async def messages(self) -> AsyncIterator[FromEngine]:
        """The child's messages until it closes the socket. Raises `FrameError` if something is no message."""
        buffer = bytearray()
        # An exit in the middle of a frame is treated as one between two frames.
        with suppress(ConnectionError):
            while data := await self._reader.read(_READ_LIMIT):
                buffer += data
                start = 0
                while len(buffer) - start >= HEADER.size:
                    end = start + HEADER.size + frame_size(HEADER.unpack_from(buffer, start)[0])
                    if len(buffer) < end:
                        break
                    yield read_from_engine(bytes(buffer[start + HEADER.size : end]))
                    start = end
                del buffer[:start]

    def kill(self) -> None:
        """End the process at once."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def dump(self) -> None:
        """Make the process write the stack trace of each thread to its standard error, if it still can."""
        with suppress(ProcessLookupError):
            self._process.send_signal(DUMP_SIGNAL)
        await asyncio.sleep(DUMP_SECONDS)

    def kill_and_close(self) -> None:
        """End the process at once and read no more of its messages."""
        self.kill()
        self._writer.transport.abort()

    async def close(self) -> int:
        """Close the socket, wait for the process, kill it if that takes too long; returns its exit status."""
        self._writer.transport.abort()
        try:
            return await asyncio.wait_for(self._process.wait(), EXIT_GRACE)
        except TimeoutError:
            self.kill()
            return await self._process.wait()


def exit_description(status: int) -> str:
    """How a process ended, for a log line: by a signal or with an exit status."""
    if status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with status {status}"
