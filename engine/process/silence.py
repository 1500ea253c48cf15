"""How long an engine process has sent no message, and whether that is too long. It depends on seconds, not on the
process.

Time is counted in ticks of the watcher, each at most as twice its usual length: a watcher that was delayed, or a
machine that was suspended, could not receive messages in between.
"""

import asyncio
import time
from collections.abc import Callable

FACTOR = 20  # a step may take this many times its expected time
TICK_SECONDS, PING_SECONDS = 1.0, 2.0  # seconds between two checks, and of silence before a ping
MIN_TICK_SECONDS = 0.05  # seconds between two checks if the limit is short


class SilenceTimer:
    """Counts seconds without a message. Too long is more than `limit` (0: never) and more than `FACTOR` times the
    expected time of the current step. `asks`: whether the process answers pings.
    """

    def __init__(self, limit: float, asks: bool = True) -> None:
        self.seconds = 0.0  # of silence
        self.tick_s = max(MIN_TICK_SECONDS, min(TICK_SECONDS, limit / 4)) if limit else TICK_SECONDS
        self._limit, self._asks = limit, asks
        self._ping_after = min(PING_SECONDS, limit / 4) if limit else PING_SECONDS
        self._expected, self._asked, self._fresh = 0.0, False, False
        self._heard = time.monotonic()

    @property
    def since(self) -> float:
        """Seconds since the last message, by the clock."""
        return time.monotonic() - self._heard

    @property
    def allowed(self) -> float:
        """The longest silence allowed, in seconds; 0: there is no limit."""
        return max(self._limit, FACTOR * self._expected) if self._limit else 0.0

    def reset(self, expected: float = 0.0) -> None:
        """A message came; the next one is `expected` after so many seconds, if that is long."""
        self.seconds, self._expected, self._asked, self._fresh = 0.0, expected, False, True
        self._heard = time.monotonic()

    def tick(self, elapsed: float) -> bool:
        """Count one tick; returns whether the silence is too long. A tick in which a message came counts nothing."""
        if self._fresh:
            self._fresh = False
            return False
        self.seconds += min(elapsed, 2 * self.tick_s)
        return bool(self._limit) and self.seconds > self.allowed

    def asks(self) -> bool:
        """Whether to send a ping now: once per silence."""
        if not self._asks or self._asked or self.seconds < self._ping_after:
            return False
        self._asked = True
        return True


async def too_long(current: Callable[[], SilenceTimer], ask: Callable[[], None]) -> SilenceTimer:
    """Wait until the current silence is too long, and return it; `ask` sends a ping in between."""
    loop = asyncio.get_running_loop()
    while True:
        silence, before = current(), loop.time()
        await asyncio.sleep(silence.tick_s)
        if silence is not current():
            continue
        if silence.tick(loop.time() - before):
            return silence
        if silence.asks():
            ask()
