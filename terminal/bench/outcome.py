"""What one request came to: when its text arrived, what the server says it used, or why it failed.

It knows the clock and chunks, neither connections nor other requests.
"""

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from terminal.bench.plan import Job
from terminal.counts import Count
from terminal.errors import StreamFailed, TerminalError
from terminal.sse import Chunk, Chunks

FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times in seconds; `began` and `ended` on time.perf_counter(). `failure` None: it went well."""

    count: Count | None
    began: float
    ended: float
    late: float  # how long after its planned arrival it was sent
    arrivals: Sequence[float]  # of text; what one read of the connection brought arrived at one time
    prompt_tokens: int
    cached: int  # of the prompt's tokens, those that the server says it still knew
    tokens: int
    used: float | None  # the count that the server says it used
    failure: TerminalError | None

    @property
    def ttft(self) -> float | None:
        return self.arrivals[0] - self.began if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first: None where all text came at once."""
        seconds = self.arrivals[-1] - self.arrivals[0] if self.arrivals else 0.0
        return (self.tokens - 1) / seconds if seconds > 0 and self.tokens > 1 else None


class Recorder:
    """Fed with the bytes of one response.

    A server that holds tokens for some milliseconds sends them in one burst. HTTP hands a burst over in pieces, whose
    distances are this client's own time: all until `end_read` are one arrival.
    """

    def __init__(self, job: Job, late: float) -> None:
        self.job, self.late = job, late
        self.chunks, self.arrivals = Chunks(), array("d")
        self.usage: Mapping[str, Any] = {}
        self.reading = False  # text of the read that goes on has arrived
        self.began = time.perf_counter()

    def feed(self, data: bytes) -> None:
        """One piece of the stream: the first text of a read is an arrival."""
        for chunk in self.chunks.feed(data):
            if _has_text(chunk) and not self.reading:
                self.arrivals.append(time.perf_counter())
                self.reading = True
            if usage := chunk.get("usage"):
                self.usage = usage

    def end_read(self) -> None:
        """Whatever comes now was not there before."""
        self.reading = False

    def finish(self) -> Outcome:
        """Raises StreamFailed where the stream was cut, or had no usage to count tokens by."""
        self.chunks.end()
        try:
            prompt, tokens = int(self.usage["prompt_tokens"]), int(self.usage["completion_tokens"])
            cached = int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            used = self.usage.get("num_experts")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise StreamFailed("the stream ended without usage", "no usage in the stream") from None
        return replace(self._outcome(None), prompt_tokens=prompt, cached=cached, tokens=tokens, used=_figure(used))

    def failed(self, error: TerminalError) -> Outcome:
        return self._outcome(error)

    def _outcome(self, failure: TerminalError | None) -> Outcome:
        return Outcome(
            self.job.count, self.began, time.perf_counter(), self.late, self.arrivals, 0, 0, 0, None, failure
        )


def _figure(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _has_text(chunk: Chunk) -> bool:
    """Raises StreamFailed where the chunk has not the shape of OpenAI's."""
    try:
        for choice in chunk.get("choices") or ():
            if choice.get("text"):
                return True
            delta = choice.get("delta")
            if delta and any(delta.get(field) for field in FIELDS):
                return True
    except (AttributeError, TypeError):
        raise StreamFailed("a chunk of the stream has an unknown shape", "bad chunk") from None
    return False
