"""Keeps the server running when a standard stream is missing, or has a reader that stopped reading.

It depends on file descriptors, not on log lines.
"""

import atexit
import fcntl
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

CAPACITY = 1 << 20  # bytes of log lines that wait for a slow reader, and of the pipe before them
MAX_LINE = 1 << 18  # bytes; a longer one may be cut
GATHER_SECONDS = 0.02  # between two reads: a thread that wakes for every line would hold up the event loop
END_SECONDS = 0.5  # for the last lines to be read at the end of the process


def open_missing() -> None:
    """Open the null device in place of standard streams that were closed when the process began.

    Otherwise a socket may get such a number, and starting a child process, which sets up its own streams under these
    numbers, closes it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            if (null := os.open(os.devnull, os.O_RDWR)) != number:  # the lowest free number, which is this one
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def say(text: str) -> None:
    """Write a text to the standard output without waiting for its reader, which may have ended."""

    def write() -> None:
        with suppress(OSError):
            _write_all(1, text.encode() + b"\n")

    threading.Thread(target=write, name="standard output", daemon=True).start()


class StderrPump:
    """Puts a pipe in place of the standard error stream of this process and its children, and copies its output.

    Lines for which a stalled reader leaves no room are dropped and counted.

    `dropped_line(n)` is the line that reports n dropped lines; `whole_lines`: only whole lines are copied, so that none
    is cut. On a terminal a progress bar is no line.
    """

    def __init__(
        self, dropped_line: Callable[[int], str], *, whole_lines: bool = True, capacity: int = CAPACITY
    ) -> None:
        self.on_dropped: Callable[[int], None] = lambda count: None
        self._dropped_line, self._whole_lines, self._capacity = dropped_line, whole_lines, capacity
        self._waiting: deque[bytes] = deque()
        self._bytes, self._unreported, self._ended = 0, 0, False
        self._end = b"\0%b\n" % os.urandom(16).hex().encode()  # comes last; no line holds it
        self._changed = threading.Condition()
        self._real = os.dup(2)
        self._pipe, inlet = os.pipe()
        with suppress(OSError, AttributeError):
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, capacity)
        os.dup2(inlet, 2)
        os.close(inlet)
        self._threads: list[threading.Thread] = []
        for work in (self._read, self._write):
            self._threads.append(threading.Thread(target=work, name="standard error", daemon=True))
            self._threads[-1].start()
        atexit.register(self.close)

    def close(self) -> None:
        """Remove the pipe, once the last lines have been copied or `END_SECONDS` have passed."""
        atexit.unregister(self.close)
        null = os.open(os.devnull, os.O_WRONLY)
        os.write(2, self._end)  # the pipe itself ends only when all children have closed it
        os.dup2(null, 2)
        os.close(null)
        deadline = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            os.dup2(self._real, 2)

    def _read(self) -> None:
        rest, ended = b"", b""
        while not ended and (data := os.read(self._pipe, 1 << 16)):
            data, ended, _ = (rest + data).partition(self._end)
            lines, rest = self._split(data)
            self._put(lines)
            if not ended:
                time.sleep(GATHER_SECONDS)
        self._put(rest)
        with self._changed:
            self._waiting += self._report()
            self._ended = True
            self._changed.notify()

    def _split(self, data: bytes) -> tuple[bytes, bytes]:
        """What may be copied, and the beginning of a line that is not complete, unless it is too long."""
        end = len(data)
        if self._whole_lines and len(data) < MAX_LINE:
            end = data.rfind(b"\n") + 1
        return data[:end], data[end:]

    def _put(self, data: bytes) -> None:
        if not data:
            return
        with self._changed:
            if self._bytes + len(data) > self._capacity:
                self._drop(data)
                return
            for part in (*self._report(), data):
                self._waiting.append(part)
                self._bytes += len(part)
            self._changed.notify()

    def _drop(self, data: bytes) -> None:
        count = max(1, data.count(b"\n"))
        with self._changed:
            self._unreported += count
        self.on_dropped(count)

    def _report(self) -> list[bytes]:
        """The line about what was dropped since the last such line, if anything was."""
        count, self._unreported = self._unreported, 0
        return [f"{self._dropped_line(count)}\n".encode()] if count else []

    def _write(self) -> None:
        while (data := self._next()) is not None:
            try:
                _write_all(self._real, data)
            except OSError:  # the reader has ended, or the disk is full
                self._drop(data)
            with self._changed:
                self._bytes -= len(data)

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            return self._waiting.popleft() if self._waiting else None


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, however long that takes. Raises OSError when that is impossible."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another process that shares the stream made it non-blocking
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()
