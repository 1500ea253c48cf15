"""Ends connections whose client stopped reading what was written to it; otherwise they would be held without end.

It depends on a transport and its buffer, not on HTTP.
"""

import asyncio

STALLED_SECONDS = 60.0  # without progress


class StalledReaderWatch:
    """Watches one connection while data waits to be read, and while it closes."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start watching, unless it has been started."""
        if self._timer is None:
            self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._timer = self._loop.call_later(STALLED_SECONDS, self._check, self._transport.get_write_buffer_size())

    def _check(self, before: int) -> None:
        if self._transport.get_write_buffer_size() < before:
            self._wait()
        else:
            self._transport.abort()
