"""Step reports as frames of bounded size: what is too large for one is cut between reports, between events, and inside
the log-probabilities of a prompt. Order stays.

A reader decodes a frame at once, so that its size bounds for how long it does nothing else. It knows no socket.
"""

from collections.abc import Callable, Iterator

from msgspec.structs import replace

from engine.process.messages import Events, FrameError, Reports, Scores, frame, framed, payload_of
from engine.types import StepReport, TokenEvent

SOFT = 1 << 20  # bytes; only what cannot be cut is larger

GiveUp = Callable[[str], None]


def frames(reports: tuple[StepReport, ...], give_up: GiveUp) -> Iterator[bytes]:
    """All reports. A request with an event that no frame can hold ends with an error; `give_up` gets its id."""
    payload = payload_of(Reports(reports))
    if len(payload) <= SOFT:
        yield framed(payload)
    elif len(reports) > 1:
        yield from frames(reports[: len(reports) // 2], give_up)
        yield from frames(reports[len(reports) // 2 :], give_up)
    else:
        yield from _events(reports[0].events, reports[0].buffered_s, give_up)
        yield frame(Reports((replace(reports[0], events=()),)))


def _events(events: tuple[TokenEvent, ...], buffered_s: float, give_up: GiveUp) -> Iterator[bytes]:
    payload = payload_of(Events(events, buffered_s))
    if len(payload) <= SOFT:
        yield framed(payload)
    elif len(events) > 1:
        yield from _events(events[: len(events) // 2], buffered_s, give_up)
        yield from _events(events[len(events) // 2 :], buffered_s, give_up)
    else:
        try:
            yield from _parts(events[0], buffered_s, len(payload))
        except FrameError as error:
            yield _failed(events[0], buffered_s, error, give_up)


def _parts(event: TokenEvent, buffered_s: float, size: int) -> Iterator[bytes]:
    """The event, of so many bytes, with most of its prompt's log-probabilities ahead of it."""
    scores = event.prompt_logprobs or ()
    each = max(1, len(scores) * SOFT // size)
    last = max(0, len(scores) - 1) // each * each
    for first in range(0, last, each):
        yield frame(Scores(event.request_id, scores[first : first + each]))
    rest = event if event.prompt_logprobs is None else replace(event, prompt_logprobs=scores[last:])
    yield frame(Events((rest,), buffered_s))


def _failed(event: TokenEvent, buffered_s: float, error: FrameError, give_up: GiveUp) -> bytes:
    if event.finish is None:
        give_up(event.request_id)
    why = f"what one step made for this request cannot be handed over ({error}); ask for fewer log-probabilities"
    return frame(
        Events((TokenEvent(event.request_id, None, finish="error", error=why, stats=event.stats),), buffered_s)
    )
