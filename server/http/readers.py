"""Readers that take nothing of what was written to them: their connection ends, or it would be held for ever.

It knows a transport and its buffer, no HTTP.
"""

import asyncio

STALLED_SECONDS = 60.0  # in which a reader takes nothing


class ReaderWatch:
    """Watches one connection while something waits to be taken, and while it closes."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch, unless that has begun."""
        if self._timer is None:
            self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._timer = self._loop.call_later(STALLED_SECONDS, self._look, self._transport.get_write_buffer_size())

    def _look(self, before: int) -> None:
        if self._transport.get_write_buffer_size() < before:
            self._wait()
        else:
            self._transport.abort()
