"""Delivers the events of running requests: each request's sink gets its events, and exactly one end.

It depends on reports and requests, not on the process.
"""

import logging
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from engine.process.messages import Compiled, Events, PromptLogprobsPart, Rejected
from engine.types import Logprob, StepReport, TimedEvent, TokenEvent
from model.errors import InvalidRequest, MoedialError

log = logging.getLogger(__name__)

Sink = Callable[[Sequence[TimedEvent] | MoedialError], None]


class Sinks(dict[str, Sink | None]):
    """The sinks by request id. None: the reader has left, but the engine has not confirmed the end; the id is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._scores: dict[str, list[Logprob]] = {}  # log-probabilities of prompts received so far

    def receive(self, message: Rejected | Compiled | Events | PromptLogprobsPart, now: float) -> bool:
        """Deliver a message that is not a report; returns whether a request was answered to its end."""
        match message:
            case Events():
                return self.distribute((message,), now)
            case PromptLogprobsPart(request_id, scores):
                if self.get(request_id) is not None:
                    self._scores.setdefault(request_id, []).extend(scores)
            case Compiled(id):
                self.deliver(id, (), last=True)
            case Rejected(request_id, reason, param, code):
                self.deliver(request_id, InvalidRequest(reason, param, code), last=True)
        return False

    def distribute(self, parts: Sequence[StepReport | Events], now: float) -> bool:
        """Deliver events, all of one request in one call. Returns whether a request was answered to its end."""
        arrivals: dict[str, list[TimedEvent]] = {}
        for part in parts:
            at = now - part.buffered_s
            for event in part.events:
                if self._scores:
                    event = self._completed(event)
                arrivals.setdefault(event.request_id, []).append(TimedEvent(event, at))
        answered = False
        for request_id, found in arrivals.items():
            finish = found[-1].event.finish
            answered = answered or finish in ("stop", "length")
            self.deliver(request_id, found, last=finish is not None)
        return answered

    def deliver(self, request_id: str, item: Sequence[TimedEvent] | MoedialError, *, last: bool) -> None:
        """Call a request's sink, unless its reader has left."""
        if last:
            self._scores.pop(request_id, None)
        sink = self.pop(request_id, None) if last else self.get(request_id)
        if sink is None:
            return
        try:
            sink(item)
        except Exception:
            log.exception("the reader of a request failed")  # it must not end what all others depend on

    def fail(self, error: Callable[[], MoedialError]) -> None:
        """End every request with an error of its own."""
        for request_id in list(self):
            self.deliver(request_id, error(), last=True)

    def _completed(self, event: TokenEvent) -> TokenEvent:
        if event.prompt_logprobs is None or (kept := self._scores.pop(event.request_id, None)) is None:
            return event
        return replace(event, prompt_logprobs=(*kept, *event.prompt_logprobs))
