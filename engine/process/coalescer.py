"""The coalescer: sends a step's report to the HTTP process at once, or, if steps are short, together with later ones.

Every message wakes the other process and a reader in it; for a model whose steps take a millisecond or two that costs a
fifth of a token's time.
"""

import time
from collections.abc import Callable

from msgspec.structs import replace

from engine.process.messages import Reports
from engine.types import StepReport


class Coalescer:
    """Buffers reports for at most `interval` seconds, if the next step takes as long as the last one.

    The first and the last event of a sequence are never buffered. (Stop strings are found in the HTTP process: the
    engine goes on until it gets an abort.)
    """

    def __init__(
        self, send: Callable[[Reports], None], interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send, self._interval, self._clock = send, interval, clock
        self._buffered: list[tuple[StepReport, float]] = []  # with the time when each was made
        self._sent = float("-inf")  # time of the last flush

    def put(self, report: StepReport, more: bool) -> None:
        """Buffer or send a report. `more`: whether another step follows."""
        now = self._clock()
        self._buffered.append((report, now))
        in_time = now + report.stats.seconds < self._sent + self._interval
        if not (more and in_time) or any([event.stats or event.finish for event in report.events]):
            self.flush()

    def flush(self) -> None:
        """Send all buffered reports."""
        self._sent = self._clock()
        if self._buffered:
            sent = self._sent
            reports = tuple(replace(report, buffered_s=sent - made) for report, made in self._buffered)
            self._buffered.clear()
            self._send(Reports(reports))
