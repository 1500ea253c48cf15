"""From one sequence's token events to what may be shown: whole characters, never a part of a stop string, in pieces.

It knows no HTTP and no JSON; what is a call or a thought, the dialect's reader says.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from engine.types import Logprob, TokenEvent
from server.dialects.base import CallStart, Content, Piece, Reader, Reasoning
from server.dialects.cursor import BROKEN
from server.protocols import IncrementalDecoder

WireFinish = Literal["stop", "length", "tool_calls"]
LOWEST = -9999.0  # JSON has no -Infinity; this is what other servers send


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """One shown token, its log-probability, the best alternatives, and where its text starts in the answer."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...]
    offset: int


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What one event adds to choice `index`; with `finish` it is the last one.

    `prompt`: log-probabilities of the prompt's tokens but the first, with the first delta of who asked for them.
    `stop_reason`: with `finish`, the caller's own stop string or stop token that ended the answer.
    """

    index: int
    pieces: tuple[Piece, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: WireFinish | None = None
    prompt: tuple[Logprob, ...] | None = None
    stop_reason: str | int | None = None
    tokens: int = 0  # of the answer so far

    @property
    def text(self) -> str:
        """The content alone."""
        return "".join([piece.text for piece in self.pieces if isinstance(piece, Content)])

    @property
    def empty(self) -> bool:
        """Whether nobody needs to hear of it."""
        return not (self.pieces or self.logprobs or self.finish or self.prompt is not None)


class StopMatcher:
    """Releases text as soon as no stop string can begin in it.

    The match is the one that completes first (of two, the longer), so the result does not depend on how text is split.
    With `include`, the text ends with it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.stops, self._include = tuple(stops), include
        self.matched = ""  # the stop string
        self._held = ""

    def push(self, text: str) -> str:
        if not self.stops:
            return text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, start = min((at + len(stop), at) for at, stop in found)
            self.matched, self._held = text[start:end], ""
            return text[: end if self._include else start]
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        cut = len(text)
        for stop in self.stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at != -1 and at < cut and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at != -1:
                cut = min(cut, at)
        return cut


class Transcript:
    """The answer of one sequence as it grows.

    `ends_shown`: whether a stop token gets a log-probability, too. `calls_only`: there is no content, only marks around
    calls; one that is cut off is nothing to show. `stop_ids`: the caller's own stop tokens; with `include_stop`, what
    ends the answer, one of them or a stop string, is a part of it.
    """

    def __init__(
        self,
        index: int,
        decoder: IncrementalDecoder,
        stops: Sequence[str],
        reader: Reader | None = None,
        ends_shown: bool = False,
        calls_only: bool = False,
        stop_ids: Sequence[int] = (),
        include_stop: bool = False,
    ) -> None:
        self.index = index
        self.finish: WireFinish | None = None
        self.total = 0.0  # log-probability of all tokens so far, where it is asked for
        self._decoder, self._reader, self._ends_shown, self._calls_only = decoder, reader, ends_shown, calls_only
        self._matcher = StopMatcher(stops, include_stop)
        self._stop_ids, self._include_stop = stop_ids, include_stop
        self._tokens = 0
        self.reasoning = 0  # tokens that added to a thought
        self._calls = False
        self._decoded = 0  # characters that came out of the decoder
        self._shown = 0  # characters that were released
        self._held: deque[TokenLogprob] = deque()

    def push(self, event: TokenEvent) -> Delta:
        """Add one event. A stop token ends the text and is not part of it."""
        text = ""
        ends = event.finish == "stop"
        hidden = ends and not (self._include_stop and event.token in self._stop_ids)
        if event.token is not None:
            self._tokens += 1
            if event.logprob is not None:
                self.total += event.logprob.value
                if self._ends_shown or not hidden:
                    self._held.append(entry_of(event.token, event.logprob, self._decoded))
            text = "" if hidden else self._decoder.push(event.token)
        if event.finish is not None:
            text += self._decoder.flush()
        self._decoded += len(text)
        return self._release(text, event)

    def _release(self, text: str, event: TokenEvent) -> Delta:
        shown = self._matcher.push(text)
        finish: WireFinish | None = None
        if self._matcher.matched:
            finish = "stop"
        elif event.finish is not None:
            shown += self._matcher.flush()
            finish = "stop" if event.finish == "stop" else "length"
        self._shown += len(shown)
        self.finish = finish
        pieces = tuple(self._read(self._reader, shown)) if self._reader else ((Content(shown),) if shown else ())
        reason = None if self.finish is None else self._reason(event)
        return Delta(self.index, pieces, self._entries(), self.finish, event.prompt_logprobs, reason, self._tokens)

    def _reason(self, event: TokenEvent) -> str | int | None:
        if self._matcher.matched:
            return self._matcher.matched
        return event.token if event.finish == "stop" and event.token in self._stop_ids else None

    def _read(self, reader: Reader, shown: str) -> list[Piece]:
        """The pieces of the text, and what they make of the finish reason."""
        pieces = self._read_last(reader, shown) if self.finish else reader.push(shown) if shown else []
        self._calls = self._calls or any(isinstance(piece, CallStart) for piece in pieces)
        if self._calls:
            self._judge_calls(reader)
        self.reasoning += any(isinstance(piece, Reasoning) for piece in pieces)
        return [piece for piece in pieces if not isinstance(piece, Content)] if self._calls_only else pieces

    def _read_last(self, reader: Reader, shown: str) -> list[Piece]:
        """Of a text that is cut, half a character waits for the end, which says whether a mark was cut in it."""
        cut = self.finish == "length" or bool(self._matcher.matched and not self._include_stop)
        text = shown.rstrip(BROKEN) if cut else shown
        pieces = reader.push(text) if text else []
        if reader.over:
            self.finish = "stop"
        return pieces + reader.flush(cut, shown[len(text) :])

    def _judge_calls(self, reader: Reader) -> None:
        """A call that a stop string cut is none to be made; one that ends the answer stops it."""
        if self.finish is None and reader.over:
            self.finish = "stop"
        if self.finish == "stop" and not (self._matcher.matched and reader.in_call):
            self.finish = "tool_calls"

    def _entries(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities leave with their text: a held one would leak what is held."""
        everything = self.finish is not None and not self._matcher.matched
        entries = []
        while self._held and (everything or self._held[0].offset < self._shown):
            entries.append(self._held.popleft())
        return tuple(entries)


def entry_of(token: int, logprob: Logprob, offset: int) -> TokenLogprob:
    """As it is written: JSON has no infinity."""
    top = tuple((id, max(value, LOWEST)) for id, value in logprob.top)
    return TokenLogprob(token, max(logprob.value, LOWEST), top, offset)
