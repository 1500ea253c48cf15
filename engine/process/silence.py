"""For how long an engine process has said nothing, and whether that is too long. It knows seconds, no process.

Time counts in ticks of the watcher, each as twice its usual length at most: one that was held up, or a machine that
slept, has not listened in between.
"""

import asyncio
import time
from collections.abc import Callable

FACTOR = 20  # a step may take so many times what was expected of it
TICK, ASK = 1.0, 2.0  # seconds between two looks, and of silence before a sign of life is asked for
LEAST = 0.05  # seconds between two looks, where the limit is shorter


class Silence:
    """`limit` seconds without a word are too long, 0: never; so is `FACTOR` times what was expected, if that is more.

    `asks`: whether a sign of life can be asked for.
    """

    def __init__(self, limit: float, asks: bool = True) -> None:
        self.seconds = 0.0  # of silence
        self.tick_s = max(LEAST, min(TICK, limit / 4)) if limit else TICK
        self._limit, self._asks = limit, asks
        self._ask = min(ASK, limit / 4) if limit else ASK
        self._expected, self._asked, self._fresh = 0.0, False, False
        self._heard = time.monotonic()

    @property
    def since(self) -> float:
        """Seconds since the last word, by the clock."""
        return time.monotonic() - self._heard

    @property
    def longest(self) -> float:
        """Seconds of silence that are not too long; 0: there is no limit."""
        return max(self._limit, FACTOR * self._expected) if self._limit else 0.0

    def heard(self, expected: float = 0.0) -> None:
        """There was a word; the next one is `expected` after so many seconds, if that is long."""
        self.seconds, self._expected, self._asked, self._fresh = 0.0, expected, False, True
        self._heard = time.monotonic()

    def tick(self, elapsed: float) -> bool:
        """So much later there was no word; whether that is too long. Of a tick with a word in it nothing counts."""
        if self._fresh:
            self._fresh = False
            return False
        self.seconds += min(elapsed, 2 * self.tick_s)
        return bool(self._limit) and self.seconds > self.longest

    def asks(self) -> bool:
        """Whether a sign of life is to be asked for, once in each silence."""
        if not self._asks or self._asked or self.seconds < self._ask:
            return False
        self._asked = True
        return True


async def too_long(current: Callable[[], Silence], ask: Callable[[], None]) -> Silence:
    """Wait until the current silence is too long, and return it; `ask` for signs of life in between."""
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
