"""Where the events of running requests go: each request's sink gets what comes for it, and one end.

It knows reports and requests, no process.
"""

import logging
from collections.abc import Callable, Sequence

from engine.types import Arrival, StepReport
from model.errors import MoedialError

log = logging.getLogger(__name__)

Sink = Callable[[Sequence[Arrival] | MoedialError], None]


class Sinks(dict[str, Sink | None]):
    """By request id. None: the reader has left, but the engine has not confirmed the end; the id is still taken."""

    def distribute(self, reports: Sequence[StepReport], now: float) -> bool:
        """Every request gets what has come for it in one piece. Returns whether one was answered to its end."""
        arrivals: dict[str, list[Arrival]] = {}
        for report in reports:
            at = now - report.held_s
            for event in report.events:
                arrivals.setdefault(event.request_id, []).append(Arrival(event, at))
        answered = False
        for request_id, found in arrivals.items():
            finish = found[-1].event.finish
            answered = answered or finish in ("stop", "length")
            self.deliver(request_id, found, last=finish is not None)
        return answered

    def deliver(self, request_id: str, item: Sequence[Arrival] | MoedialError, *, last: bool) -> None:
        """Hand something to a request's sink, if it is still wanted."""
        sink = self.pop(request_id, None) if last else self.get(request_id)
        if sink is None:
            return
        try:
            sink(item)
        except Exception:
            log.exception("the reader of a request failed")  # it must not end what all others depend on

    def fail(self, error: Callable[[], MoedialError]) -> None:
        """Every request ends with an error of its own."""
        for request_id in list(self):
            self.deliver(request_id, error(), last=True)
