"""Turns one sequence's token events into deltas: whole characters only, and never a part of a stop string.

The dialect's parser separates tool calls and reasoning from content. Not here: JSON (see `server/formats`).
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from engine.types import Logprob, Routes, TokenEvent
from server.dialects.base import CallStart, Content, DeltaPart, OutputParser, Reasoning
from server.dialects.cursor import PARTIAL_CHARACTER
from server.protocols import DetokenizerProtocol

FinishReason = Literal["stop", "length", "tool_calls"]
MIN_LOGPROB = -9999.0  # in place of -Infinity, which JSON does not have; other servers send the same


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """One shown token, its log-probability, the best alternatives, and where its text starts in the answer."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...]
    offset: int


class Delta(msgspec.Struct, frozen=True, gc=False):
    """The additions of one event to choice `index`; the last delta has `finish`.

    `prompt`: in the first delta, the log-probabilities of the prompt's tokens but the first, where requested.
    `stop_reason`: in the last delta, the request's own stop string or stop token that ended the answer.
    """

    index: int
    parts: tuple[DeltaPart, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    prompt: tuple[Logprob, ...] | None = None
    stop_reason: str | int | None = None
    tokens: int = 0  # of the answer so far
    routes: Routes | None = None  # in the last delta, where requested: which experts ran

    @property
    def text(self) -> str:
        """The content, without reasoning and calls."""
        return "".join([part.text for part in self.parts if isinstance(part, Content)])

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.parts or self.logprobs or self.finish or self.prompt is not None)


class StopMatcher:
    """Releases text as soon as no stop string can begin in it.

    The match is the one that is complete first (of two, the longer), so that the result does not depend on how text is
    split. With `include` the text ends with it, otherwise before it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.stops, self._include = tuple(stops), include
        self.matched = ""  # the stop string
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be shown, once `text` has been added."""
        if not self.stops:
            return text
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if matches:
            end, start = min(matches)
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
            first = max(0, len(text) - len(stop) + 1)
            at = text.find(stop[0], first)
            while at != -1 and at < cut and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at != -1:
                cut = min(cut, at)
        return cut


class OutputProcessor:
    """The output of one sequence as it grows.

    `ends_shown`: whether a stop token gets a log-probability as well. `calls_only`: the answer has no content, so that
    other text is an incomplete delimiter, which is not shown. `stop_ids`: the request's own stop tokens; with
    `include_stop` the answer includes the stop token or stop string that ended it.
    """

    def __init__(
        self,
        index: int,
        decoder: DetokenizerProtocol,
        stops: Sequence[str],
        parser: OutputParser | None = None,
        ends_shown: bool = False,
        calls_only: bool = False,
        stop_ids: Sequence[int] = (),
        include_stop: bool = False,
    ) -> None:
        self.index = index
        self.finish: FinishReason | None = None
        self.total_logprob = 0.0  # of all tokens so far, where log-probabilities are requested
        self._total_measured = 0.0  # of the measure that a cascade decides by
        self._decoder, self._parser, self._ends_shown, self._calls_only = decoder, parser, ends_shown, calls_only
        self._matcher = StopMatcher(stops, include_stop)
        self._stop_ids, self._include_stop = stop_ids, include_stop
        self._tokens = 0
        self.reasoning_tokens = 0
        self._calls = False
        self._decoded = 0  # characters so far
        self._shown = 0  # characters so far
        self._held: deque[TokenLogprob] = deque()

    @property
    def mean_measured(self) -> float:
        """The mean over the tokens so far of the measure that a cascade decides by."""
        return self._total_measured / max(1, self._tokens)

    def push(self, event: TokenEvent) -> Delta:
        """The delta of one event. A stop token ends the text and is no part of it."""
        text = ""
        ends = event.finish == "stop"
        hidden = ends and not (self._include_stop and event.token in self._stop_ids)
        if event.token is not None:
            self._tokens += 1
            self._total_measured += event.measured or 0.0
            if event.logprob is not None:
                self.total_logprob += event.logprob.value
                if self._ends_shown or not hidden:
                    self._held.append(token_logprob(event.token, event.logprob, self._decoded))
            text = "" if hidden else self._decoder.push(event.token)
        if event.finish is not None:
            text += self._decoder.flush()
        self._decoded += len(text)
        return self._release(text, event)

    def _release(self, text: str, event: TokenEvent) -> Delta:
        shown = self._matcher.push(text)
        finish: FinishReason | None = None
        if self._matcher.matched:
            finish = "stop"
        elif event.finish is not None:
            shown += self._matcher.flush()
            finish = "stop" if event.finish == "stop" else "length"
        self._shown += len(shown)
        self.finish = finish
        parts: tuple[DeltaPart, ...] = ()
        if self._parser is not None:
            parts = tuple(self._parse(self._parser, shown))
        elif shown:
            parts = (Content(shown),)
        reason = None if self.finish is None else self._reason(event)
        return Delta(
            self.index, parts, self._entries(), self.finish, event.prompt_logprobs, reason, self._tokens, event.routes
        )

    def _reason(self, event: TokenEvent) -> str | int | None:
        if self._matcher.matched:
            return self._matcher.matched
        return event.token if event.finish == "stop" and event.token in self._stop_ids else None

    def _parse(self, parser: OutputParser, shown: str) -> list[DeltaPart]:
        """The parts of the text; calls among them change the finish reason."""
        parts = self._parse_last(parser, shown) if self.finish else parser.push(shown) if shown else []
        self._calls = self._calls or any(isinstance(part, CallStart) for part in parts)
        if self._calls:
            self._update_finish(parser)
        self.reasoning_tokens += any(isinstance(part, Reasoning) for part in parts)
        return [part for part in parts if not isinstance(part, Content)] if self._calls_only else parts

    def _parse_last(self, parser: OutputParser, shown: str) -> list[DeltaPart]:
        """The parts of the last text. Where the answer was cut, an incomplete character counts as its end."""
        cut = self.finish == "length" or bool(self._matcher.matched and not self._include_stop)
        text = shown.rstrip(PARTIAL_CHARACTER) if cut else shown
        parts = parser.push(text) if text else []
        if parser.complete:
            self.finish = "stop"
        return parts + parser.flush(cut, shown[len(text) :])

    def _update_finish(self, parser: OutputParser) -> None:
        """End the answer after a complete call that must be the only one. A call cut by a stop string is not
        reported."""
        if self.finish is None and parser.complete:
            self.finish = "stop"
        if self.finish == "stop" and not (self._matcher.matched and parser.in_call):
            self.finish = "tool_calls"

    def _entries(self) -> tuple[TokenLogprob, ...]:
        """The log-probabilities whose text has been shown: earlier ones would reveal text that is held back."""
        everything = self.finish is not None and not self._matcher.matched
        entries = []
        while self._held and (everything or self._held[0].offset < self._shown):
            entries.append(self._held.popleft())
        return tuple(entries)


def token_logprob(token: int, logprob: Logprob, offset: int) -> TokenLogprob:
    """A log-probability as it is written: JSON has no infinity."""
    top = tuple((id, max(value, MIN_LOGPROB)) for id, value in logprob.top)
    return TokenLogprob(token, max(logprob.value, MIN_LOGPROB), top, offset)
