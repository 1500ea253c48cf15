"""A streamed answer as it grows: its parts for the screen, its text for the conversation, its statistics.

It depends on chunks and clocks, not on connections or colours.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from terminal.errors import StreamFailed
from terminal.sse import StreamChunk

PartKind = Literal["text", "reasoning", "call"]
AnswerPart = tuple[PartKind, str]
REASONING_FIELDS = ("reasoning_content", "reasoning")  # both names are in use


def parts_of(chunk: StreamChunk) -> Iterator[AnswerPart]:
    """The parts that a chunk adds, in reading order. A tool call is text: its name, then its arguments as they grow.

    Raises:
        StreamFailed: the chunk is of neither a chat completion nor a completion.
    """
    try:
        for choice in chunk.get("choices") or ():
            if choice.get("text"):  # a completion's
                yield "text", choice["text"]
            delta = choice.get("delta") or {}
            yield from (("reasoning", delta[name]) for name in REASONING_FIELDS if delta.get(name))
            if delta.get("content"):
                yield "text", delta["content"]
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                name, arguments = function.get("name"), function.get("arguments")
                yield "call", (f"\n[call of {name}] " if name else "") + (arguments or "")
    except (AttributeError, TypeError):
        raise StreamFailed("a chunk of the stream has an unknown shape", "bad chunk") from None


@dataclass(slots=True)
class StreamedAnswer:
    """One answer; times are seconds of time.perf_counter()."""

    started_at: float = field(default_factory=time.perf_counter)
    first_at: float | None = None
    last_at: float | None = None
    texts: list[str] = field(default_factory=list)
    cut: bool = False  # by max_tokens or the context's length
    usage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def add(self, chunk: StreamChunk) -> list[AnswerPart]:
        """The parts that a chunk adds. Raises StreamFailed as `parts_of` does."""
        parts = [(kind, str(text)) for kind, text in parts_of(chunk)]
        if parts:
            self.last_at = time.perf_counter()
            self.first_at = self.first_at or self.last_at
        self.texts += [text for kind, text in parts if kind != "reasoning"]
        reasons = [choice.get("finish_reason") for choice in chunk.get("choices") or ()]
        self.cut = self.cut or "length" in reasons
        self.usage = _mapping(chunk.get("usage")) or self.usage
        self.metrics = _mapping(chunk.get("metrics")) or self.metrics
        return parts

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def statistics(self) -> str:
        """The line under an answer, from the server's numbers or else from this client's clock."""
        parts = [self._tokens(), self._speed(), self._wait(), self._count()]
        if self.cut:
            parts.append("cut at the longest answer allowed")
        return " · ".join(part for part in parts if part)

    def _tokens(self) -> str:
        tokens = _number(self.usage, "completion_tokens")
        return "" if tokens is None else f"{tokens:g} token{'s' * (tokens != 1)}"

    def _speed(self) -> str:
        speed, tokens = _number(self.metrics, "tokens_per_second"), _number(self.usage, "completion_tokens")
        if speed is None and tokens and self.last_at:
            speed = tokens / max(self.last_at - self.started_at, 1e-9)
        return "" if speed is None else f"{speed:.1f} tokens/s"

    def _wait(self) -> str:
        wait = _number(self.metrics, "time_to_first_token_ms")
        if wait is None and self.first_at:
            wait = (self.first_at - self.started_at) * 1000
        return "" if wait is None else f"first after {wait:.0f} ms"

    def _count(self) -> str:
        used = _number(self.usage, "num_experts")
        return "" if used is None else f"K {used:g}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(numbers: Mapping[str, Any], name: str) -> float | None:
    """A number of an untrusted server; None where it is absent or no number."""
    value = numbers.get(name)
    return value if isinstance(value, int | float) else None
