"""When a step's report leaves the engine process: at once, or together with the next ones, where steps are short.

A message wakes another process, which wakes a reader; for a model whose steps take a millisecond or two that is a fifth
of the time of a token. It knows reports and seconds, not sockets.
"""

import time
from collections.abc import Callable

from msgspec.structs import replace

from engine.process.messages import Reports
from engine.types import StepReport


class Outbox:
    """Holds reports for at most `interval` seconds, as far as the last step tells how long the next one will take.

    A sequence's first event and its last are never held. (A caller's stop string ends an answer on the other side: the
    engine knows nothing of it and goes on until it hears.)
    """

    def __init__(
        self, send: Callable[[Reports], None], interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send, self._interval, self._clock = send, interval, clock
        self._held: list[tuple[StepReport, float]] = []  # and when each was made
        self._sent = float("-inf")  # when nothing was held any more

    def put(self, report: StepReport, more: bool) -> None:
        """`more`: whether another step comes after this one."""
        now = self._clock()
        self._held.append((report, now))
        in_time = now + report.stats.seconds < self._sent + self._interval
        if not (more and in_time) or any([event.stats or event.finish for event in report.events]):
            self.flush()

    def flush(self) -> None:
        """Send what is held."""
        self._sent = self._clock()
        if self._held:
            reports = tuple(replace(report, buffered_s=self._sent - made) for report, made in self._held)
            self._held.clear()
            self._send(Reports(reports))
