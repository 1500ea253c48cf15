"""Packs step reports into frames of bounded size: large ones are split between reports, between events, and inside the
log-probabilities of a prompt. The order stays.

A reader decodes a frame in one go, so the frame size bounds how long its event loop is blocked.
"""

from collections.abc import Callable, Iterator

from msgspec.structs import replace

from engine.process.messages import Events, FrameError, PromptLogprobsPart, Reports, frame, framed, payload_of
from engine.types import StepReport, TokenEvent

SOFT_LIMIT = 1 << 20  # bytes; only a message that cannot be split is larger

GiveUp = Callable[[str], None]


def frames(reports: tuple[StepReport, ...], give_up: GiveUp) -> Iterator[bytes]:
    """The frames of all reports. A request with an event too large for a frame ends with an error; `give_up` gets its
    id."""
    payload = payload_of(Reports(reports))
    if len(payload) <= SOFT_LIMIT:
        yield framed(payload)
    elif len(reports) > 1:
        yield from frames(reports[: len(reports) // 2], give_up)
        yield from frames(reports[len(reports) // 2 :], give_up)
    else:
        yield from _events(reports[0].events, reports[0].buffered_s, give_up)
        yield frame(Reports((replace(reports[0], events=()),)))


def _events(events: tuple[TokenEvent, ...], buffered_s: float, give_up: GiveUp) -> Iterator[bytes]:
    payload = payload_of(Events(events, buffered_s))
    if len(payload) <= SOFT_LIMIT:
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
    """The frames of one event of `size` bytes, most of its prompt's log-probabilities in frames before it."""
    scores = event.prompt_logprobs or ()
    each = max(1, len(scores) * SOFT_LIMIT // size)
    last = max(0, len(scores) - 1) // each * each
    for first in range(0, last, each):
        yield frame(PromptLogprobsPart(event.request_id, scores[first : first + each]))
    rest = event if event.prompt_logprobs is None else replace(event, prompt_logprobs=scores[last:])
    yield frame(Events((rest,), buffered_s))


def _failed(event: TokenEvent, buffered_s: float, error: FrameError, give_up: GiveUp) -> bytes:
    if event.finish is None:
        give_up(event.request_id)
    why = f"what one step made for this request cannot be handed over ({error}); ask for fewer log-probabilities"
    failed = TokenEvent(event.request_id, None, finish="error", error=why, stats=event.stats)
    return frame(Events((failed,), buffered_s))
