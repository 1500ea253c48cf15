"""The engine's end of a mask process: messages are written without waiting, replies are read when they have come, and a
process that ends or stalls is replaced.

Not here: what a reply means (see `ReplyHandler`). Use from one thread.
"""

import logging
import socket
import subprocess
import sys
import time
from collections import OrderedDict, deque
from typing import Protocol

import msgspec

from engine.environment import child_environment
from engine.grammars.mask_messages import Close, Frames, FromMasks, Masks, ToMasks, frame

log = logging.getLogger(__name__)

READ_SIZE = 1 << 20
BUFFER = 4 << 20  # bytes of the socket's buffer, so that the process need not wait with masks of many answers
STALL_SECONDS = 20.0  # without a reply, before the process is replaced
START_SECONDS = 60.0  # the same until it has read its tokenizer


class ReplyHandler(Protocol):
    """Gets the replies to its messages."""

    def take(self, masks: Masks) -> None:
        """Take the next reply, in the order of the messages."""

    def lost(self, reason: str) -> None:
        """The process ended without a reply; with a reason if this message was the one it was working on."""


class MaskClient:
    """One mask process, started with the first message. Its command line: a descriptor, a niceness, the arguments."""

    def __init__(self, module: str, niceness: int, *arguments: str) -> None:
        self._module, self._niceness, self._arguments = module, niceness, arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._decoder: msgspec.msgpack.Decoder[FromMasks] = msgspec.msgpack.Decoder(FromMasks)
        self._frames, self._unsent = Frames(), bytearray()
        # By answer: the handler of its replies, and how many replies are due.
        self._asked: OrderedDict[int, tuple[ReplyHandler, int]] = OrderedDict()
        self._closing: deque[int] = deque()
        self._since, self._stall_seconds, self._started = 0.0, START_SECONDS, 0

    def __del__(self) -> None:
        self.stop()

    @property
    def busy(self) -> bool:
        """Whether replies are due."""
        return bool(self._asked)

    @property
    def asked(self) -> int:
        """How many answers wait for a reply."""
        return len(self._asked)

    def fileno(self) -> int:
        """The descriptor that is readable when a reply has come; only while the client is busy."""
        assert self._socket is not None
        return self._socket.fileno()

    def start(self) -> int:
        """Start the process unless it runs; returns its number, counted from 1. A new process has no answers open."""
        if self._process is None:
            self._start()
        return self._started

    def ask(self, handler: ReplyHandler, message: ToMasks) -> None:
        """Send a message whose reply goes to `handler`, in a later `collect`."""
        self.start()
        if not self._asked:
            self._since = time.monotonic()
        _, due = self._asked.get(message.id, (handler, 0))
        self._asked[message.id] = handler, due + 1
        if self._closing:
            self._write_closings()
        self._unsent += frame(message)
        self._write()

    def close(self, id: int) -> None:
        """Drop an answer and the replies still due to it. Any thread may call it."""
        self._closing.append(id)

    def collect(self) -> None:
        """Pass on the replies that have come, without waiting."""
        if self._socket is None:
            return
        self._write()
        try:
            while data := self._socket.recv(READ_SIZE):
                self._take(data)
        except BlockingIOError:
            if self._asked and time.monotonic() - self._since > self._stall_seconds:
                self._replace(f"it stood still for {self._stall_seconds:g} s")
            return
        except OSError:
            pass
        self._replace("it ended")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        arguments = [str(theirs.fileno()), str(self._niceness), *self._arguments]
        command = [sys.executable, "-m", self._module, *arguments]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), env=child_environment(), stdin=subprocess.DEVNULL
            )
        ours.setblocking(False)
        self._started += 1
        self._socket, self._frames, self._unsent = ours, Frames(), bytearray()
        self._since, self._stall_seconds = time.monotonic(), START_SECONDS

    def _write_closings(self) -> None:
        while self._closing:
            id = self._closing.popleft()
            self._asked.pop(id, None)
            self._unsent += frame(Close(id))

    def _write(self) -> None:
        assert self._socket is not None
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:  # the process has ended; the next `collect` notices
            self._unsent.clear()

    def _take(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            message = self._decoder.decode(payload)
            self._since, self._stall_seconds = time.monotonic(), STALL_SECONDS
            if isinstance(message, Masks) and (asked := self._asked.pop(message.id, None)):
                handler, due = asked
                if due > 1:
                    self._asked[message.id] = handler, due - 1
                handler.take(message)

    def _replace(self, why: str) -> None:
        """End the process. The first message may have caused this and gets an error; the others are sent again."""
        log.error("a process that computes masks is replaced: %s", why)
        self.stop()
        asked, self._asked = self._asked, OrderedDict()
        self._closing.clear()
        for index, (handler, _) in enumerate(asked.values()):
            handler.lost("" if index else why)
