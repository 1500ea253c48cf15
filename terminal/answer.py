"""One streamed answer, as it grows: its pieces for the screen, its text for the conversation, its figures.

It knows chunks and clocks, neither connections nor colours.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from terminal.errors import StreamFailed
from terminal.sse import Chunk

Kind = Literal["text", "thought", "call"]
Piece = tuple[Kind, str]
THOUGHTS = ("reasoning_content", "reasoning")  # both names are in use


def pieces_of(chunk: Chunk) -> Iterator[Piece]:
    """What a chunk adds, in reading order. A tool call is text: its name, then its arguments as they grow.

    Raises:
        StreamFailed: the chunk has the shape neither of a chat completion's nor of a completion's.
    """
    try:
        for choice in chunk.get("choices") or ():
            if choice.get("text"):  # a completion's
                yield "text", choice["text"]
            delta = choice.get("delta") or {}
            yield from (("thought", delta[name]) for name in THOUGHTS if delta.get(name))
            if delta.get("content"):
                yield "text", delta["content"]
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                name, arguments = function.get("name"), function.get("arguments")
                yield "call", (f"\n[call of {name}] " if name else "") + (arguments or "")
    except (AttributeError, TypeError):
        raise StreamFailed("a chunk of the stream has an unknown shape", "bad chunk") from None


@dataclass(slots=True)
class Answer:
    """Times are seconds of time.perf_counter()."""

    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    said: list[str] = field(default_factory=list)
    cut: bool = False  # it ran into max_tokens or the model's length
    usage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def take(self, chunk: Chunk) -> list[Piece]:
        """Raises StreamFailed as pieces_of does."""
        pieces = [(kind, str(text)) for kind, text in pieces_of(chunk)]
        if pieces:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        self.said += [text for kind, text in pieces if kind != "thought"]
        self.cut = self.cut or any(choice.get("finish_reason") == "length" for choice in chunk.get("choices") or ())
        self.usage = _mapping(chunk.get("usage")) or self.usage
        self.metrics = _mapping(chunk.get("metrics")) or self.metrics
        return pieces

    @property
    def text(self) -> str:
        return "".join(self.said)

    def figures(self) -> str:
        """The line under an answer: the server's own figures, else this side's clock. Without usage, no token count."""
        parts = [self._tokens(), self._speed(), self._wait(), self._count()]
        if self.cut:
            parts.append("cut at the longest answer allowed")
        return " · ".join(part for part in parts if part)

    def _tokens(self) -> str:
        tokens = _number(self.usage, "completion_tokens")
        return "" if tokens is None else f"{tokens:g} token{'s' * (tokens != 1)}"

    def _speed(self) -> str:
        speed, tokens = _number(self.metrics, "tokens_per_second"), _number(self.usage, "completion_tokens")
        if speed is None and tokens and self.last:
            speed = tokens / max(self.last - self.began, 1e-9)
        return "" if speed is None else f"{speed:.1f} tokens/s"

    def _wait(self) -> str:
        wait = _number(self.metrics, "time_to_first_token_ms")
        if wait is None and self.first:
            wait = (self.first - self.began) * 1000
        return "" if wait is None else f"first after {wait:.0f} ms"

    def _count(self) -> str:
        used = _number(self.usage, "num_experts")
        return "" if used is None else f"K {used:g}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    """Servers are strangers: a figure that is none is as good as absent."""
    value = figures.get(name)
    return value if isinstance(value, int | float) else None
