"""From one sequence's token events to text that may be shown: whole characters, and never a part of a stop string.

It knows no HTTP and no JSON.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.types import TokenEvent
from server.seams import Tokenizer

WireFinish = Literal["stop", "length"]
LOWEST = -9999.0  # JSON has no -Infinity; this is what other servers send


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One shown token, its log-probability, the best alternatives, and where its text starts in the answer."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to choice `index`; with `finish` it is the last one."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: WireFinish | None = None


class StopMatcher:
    """Releases text as soon as no stop string can begin in it.

    The match is the one that completes first (of two, the longer), so the result does not depend on how text is split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.matched = False
        self._held = ""

    def push(self, text: str) -> str:
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            self.matched, self._held = True, ""
            _end, start = min((at + len(stop), at) for at, stop in found)
            return text[:start]
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
    """The answer of one sequence as it grows."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.index = index
        self.finish: WireFinish | None = None
        self._decoder = tokenizer.stream()
        self._matcher = StopMatcher(stops)
        self._decoded = 0  # characters that came out of the decoder
        self._shown = 0  # characters that were released
        self._held: deque[TokenLogprob] = deque()

    def push(self, event: TokenEvent) -> Delta:
        """Add one event. A stop token ends the text and is not part of it."""
        text = ""
        if event.token is not None and event.finish != "stop":
            if event.logprob is not None:
                value = max(event.logprob.value, LOWEST)
                top = tuple((id, max(v, LOWEST)) for id, v in event.logprob.top)
                self._held.append(TokenLogprob(event.token, value, top, self._decoded))
            text = self._decoder.push(event.token)
        if event.finish is not None:
            text += self._decoder.flush()
        self._decoded += len(text)
        return self._release(text, event)

    def _release(self, text: str, event: TokenEvent) -> Delta:
        shown = self._matcher.push(text)
        if self._matcher.matched:
            self.finish = "stop"
        elif event.finish is not None:
            shown += self._matcher.flush()
            self.finish = "stop" if event.finish == "stop" else "length"
        self._shown += len(shown)
        return Delta(self.index, shown, self._entries(), self.finish)

    def _entries(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities leave with their text: a held one would leak what is held."""
        everything = self.finish is not None and not self._matcher.matched
        entries = []
        while self._held and (everything or self._held[0].offset < self._shown):
            entries.append(self._held.popleft())
        return tuple(entries)
