"""The outcome of one request: when its text arrived, what the server reports, or why it failed.

It depends on the clock and chunks, not on connections or other requests.
"""

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from terminal.bench.plan import PlannedRequest
from terminal.counts import Count
from terminal.errors import StreamFailed, TerminalError
from terminal.sse import EventParser, StreamChunk

DELTA_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """Times in seconds; `began` and `ended` are of time.perf_counter(). `failure` is None for a successful request."""

    count: Count | None
    began: float
    ended: float
    late: float  # how long after its planned arrival it was sent
    arrivals: Sequence[float]  # of text; all text of one read of the connection arrives at the same time
    prompt_tokens: int
    cached: int  # tokens of the prompt that the server reports as cached
    tokens: int
    used: float | None  # the count that the server reports
    failure: TerminalError | None

    @property
    def ttft(self) -> float | None:
        return self.arrivals[0] - self.began if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first; None where all text arrived at once."""
        seconds = self.arrivals[-1] - self.arrivals[0] if self.arrivals else 0.0
        return (self.tokens - 1) / seconds if seconds > 0 and self.tokens > 1 else None


class Recorder:
    """Records the bytes of one response.

    A server that buffers tokens for some milliseconds sends them in one burst, which HTTP passes on in parts; the time
    between these is this client's own. All parts until `end_read` are therefore one arrival.
    """

    def __init__(self, planned: PlannedRequest, late: float) -> None:
        self.planned, self.late = planned, late
        self.events, self.arrivals = EventParser(), array("d")
        self.usage: Mapping[str, Any] = {}
        self.reading = False  # whether text of the current read has arrived
        self.began = time.perf_counter()

    def feed(self, data: bytes) -> None:
        """Add a part of the stream; the first text of a read is an arrival."""
        for chunk in self.events.feed(data):
            if _has_text(chunk) and not self.reading:
                self.arrivals.append(time.perf_counter())
                self.reading = True
            if usage := chunk.get("usage"):
                self.usage = usage

    def end_read(self) -> None:
        """Note that what follows belongs to another read."""
        self.reading = False

    def finish(self) -> RequestOutcome:
        """The outcome of a complete stream.

        Raises:
            StreamFailed: the stream was cut, or had no usage to count tokens by.
        """
        self.events.end()
        try:
            prompt, tokens = int(self.usage["prompt_tokens"]), int(self.usage["completion_tokens"])
            cached = int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            used = self.usage.get("num_experts")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise StreamFailed("the stream ended without usage", "no usage in the stream") from None
        return replace(self._outcome(None), prompt_tokens=prompt, cached=cached, tokens=tokens, used=_number(used))

    def failed(self, error: TerminalError) -> RequestOutcome:
        """The outcome of a request that failed."""
        return self._outcome(error)

    def _outcome(self, failure: TerminalError | None) -> RequestOutcome:
        ended = time.perf_counter()
        count, arrivals = self.planned.count, self.arrivals
        return RequestOutcome(count, self.began, ended, self.late, arrivals, 0, 0, 0, None, failure)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _has_text(chunk: StreamChunk) -> bool:
    """Whether a chunk has text. Raises StreamFailed where it is no chunk of OpenAI's API."""
    try:
        for choice in chunk.get("choices") or ():
            if choice.get("text"):
                return True
            delta = choice.get("delta")
            if delta and any(delta.get(field) for field in DELTA_FIELDS):
                return True
    except (AttributeError, TypeError):
        raise StreamFailed("a chunk of the stream has an unknown shape", "bad chunk") from None
    return False
