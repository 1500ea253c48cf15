"""What every endpoint's format can do: write the deltas of a generation call as one body or as server-sent events.

Not here: sending (see `server/http/sse.py`) and running a generation call (see `server/generation`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import orjson
from pydantic_core import from_json

from engine.types import Logprob
from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Reasoning
from server.errors import error_body
from server.event_loop.slices import Steps, long_list
from server.generation.output_processor import MIN_LOGPROB, Delta, TokenLogprob
from server.protocols import TokenizerProtocol

LONG = 256  # deltas; more are written in slices
EVENTS = "text/event-stream"
COMMENT = b": waiting\n\n"


class Format(ABC):
    """Writes the answer to one generation call, whole or as server-sent events. Chunks and bodies are plain dicts."""

    media_type = EVENTS  # of a stream

    @property
    def heartbeat(self) -> bytes:
        """What is sent in pauses, so that clients and proxies keep the connection open."""
        return COMMENT

    @abstractmethod
    def opening(self) -> Iterable[dict[str, Any]]:
        """Chunks that come before any text."""

    @abstractmethod
    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """The chunks that one delta becomes."""

    @abstractmethod
    def closing(self) -> Iterable[dict[str, Any]]:
        """Chunks after the last delta: the usage, where it is requested."""

    @abstractmethod
    def frame(self, chunk: dict[str, Any]) -> bytes:
        """A chunk as a server-sent event."""

    @abstractmethod
    def failure(self, error: Exception) -> bytes:
        """The event that ends a stream with an error, since its status has been sent already."""

    @abstractmethod
    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        """The whole answer as one object. It may have millions of numbers, so that it is made in steps."""

    def begin(self) -> Steps[bytes]:
        """The events that come before any text, in steps."""
        return _framed(self, self.opening())

    def write(self, deltas: Iterable[Delta]) -> bytes:
        """The events of `deltas`."""
        return b"".join([self.frame(chunk) for delta in deltas for chunk in self.chunks(delta)])

    def steps_of(self, deltas: list[Delta]) -> Steps[bytes]:
        """What `write` returns, in steps."""
        written = []
        for delta in deltas:
            written.append((yield from _framed(self, self.chunks(delta))))
        return b"".join(written)

    def end(self) -> bytes:
        """The events that end a stream without an error."""
        return b"".join(map(self.frame, self.closing()))


def _framed(format: Format, chunks: Iterable[dict[str, Any]]) -> Steps[bytes]:
    frames = []
    for chunk in chunks:
        frames.append(format.frame(chunk))
        yield
    return b"".join(frames)


def is_long(deltas: list[Delta]) -> bool:
    """Whether writing them may take a while.

    A prompt's log-probabilities come all at once, and a last event may repeat the whole answer.
    """
    if len(deltas) > LONG:
        return True
    return any(delta.prompt is not None or delta.finish is not None for delta in deltas)


class DataFormat(Format):
    """Server-sent events as completions and chat have them: only data, and `[DONE]` at the end.

    Most deltas are text and nothing else. Their chunks differ in that text only, so that the rest is serialised once.
    """

    def __init__(self, uniform: bool = True) -> None:
        """`uniform`: whether chunks of text differ in nothing but their text."""
        self._same = uniform
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def frame(self, chunk: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def failure(self, error: Exception) -> bytes:
        return b"event: error\n" + self.frame(error_body(error))

    def write(self, deltas: Iterable[Delta]) -> bytes:
        return b"".join([self._written(delta) for delta in deltas])

    def end(self) -> bytes:
        return super().end() + b"data: [DONE]\n\n"

    def _written(self, delta: Delta) -> bytes:
        text = _only_text(delta) if self._same else None
        if text is None:
            return super().write((delta,))
        if delta.index not in self._frames:
            whole = super().write((Delta(delta.index, (Content(PLACEHOLDER),)),))
            before, _, after = whole.rpartition(orjson.dumps(PLACEHOLDER))
            self._frames[delta.index] = before, after
        return orjson.dumps(text).join(self._frames[delta.index])


PLACEHOLDER = "text"  # nothing after it in a chunk is this word in quotes


def _only_text(delta: Delta) -> str | None:
    """The text of a delta that has nothing else; None for any other delta."""
    if len(delta.parts) != 1 or delta.logprobs or delta.finish or delta.prompt is not None:
        return None
    part = delta.parts[0]
    return part.text if isinstance(part, Content) else None


def token_text(data: bytes) -> str:
    """A token as text; OpenAI writes a part of a character as `bytes:\\xe2\\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_entry(tokenizer: TokenizerProtocol, entry: TokenLogprob) -> dict[str, Any]:
    """A token, its log-probability and its alternatives, as chats and responses write them."""
    best = [_entry(tokenizer, id, value) for id, value in entry.top]
    return {**_entry(tokenizer, entry.token, entry.value), "top_logprobs": best}


def _entry(tokenizer: TokenizerProtocol, id: int, value: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(id)
    return {"token": token_text(data), "logprob": value, "bytes": list(data)}


def prompt_entries(
    tokenizer: TokenizerProtocol, tokens: Sequence[int], found: Sequence[Logprob], listed: int
) -> Steps[list[Any]]:
    """vLLM's `prompt_logprobs`: for each token of a prompt the best tokens and itself, by id; null for the first."""
    pairs = zip(tokens[1:], found, strict=True)
    entries = (_prompt_entry(tokenizer, token, logprob, listed) for token, logprob in pairs)
    written: list[Any] = yield from long_list(chain((None,), entries))
    return written


def _prompt_entry(tokenizer: TokenizerProtocol, token: int, logprob: Logprob, listed: int) -> dict[str, Any]:
    values = _values_by_id(token, logprob, listed)
    return {str(id): _ranked(tokenizer, id, *ranked) for id, ranked in values.items()}


def _values_by_id(token: int, logprob: Logprob, listed: int) -> dict[int, tuple[float, int | None]]:
    """Log-probability and rank by id. The rank of a token that is not among the best is unknown."""
    best = {}
    for rank, (id, value) in enumerate(logprob.top[:listed], 1):
        best[id] = (value, rank)
    ranks = {id: rank for rank, (id, _) in enumerate(logprob.top, 1)}
    return {token: (logprob.value, ranks.get(token)), **best}


def _ranked(tokenizer: TokenizerProtocol, id: int, value: float, rank: int | None) -> dict[str, Any]:
    text = tokenizer.token_bytes(id).decode(errors="replace")
    return {"logprob": max(value, MIN_LOGPROB), "rank": rank, "decoded_token": text}


def merge_deltas(deltas: Iterable[Delta]) -> Steps[dict[int, Delta]]:
    """The deltas of each choice merged into one, by index."""
    by_index: dict[int, list[Delta]] = {}
    for position, delta in enumerate(deltas):
        by_index.setdefault(delta.index, []).append(delta)
        if position % LONG == LONG - 1:
            yield
    answers = {}
    for index, own in by_index.items():
        answers[index] = _merged(index, own)
        yield
    return answers


def _merged(index: int, own: list[Delta]) -> Delta:
    parts = tuple(part for delta in own for part in delta.parts)
    logprobs = tuple(entry for delta in own for entry in delta.logprobs)
    finish = next((delta.finish for delta in own if delta.finish), None)
    prompt = next((delta.prompt for delta in own if delta.prompt is not None), None)
    reason = next((delta.stop_reason for delta in own if delta.finish), None)
    routes = next((delta.routes for delta in own if delta.finish), None)
    return Delta(index, parts, logprobs, finish, prompt, reason, routes=routes)


def reasoning_of(parts: Iterable[DeltaPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Reasoning))


def content_of(parts: Iterable[DeltaPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def calls_of(parts: Iterable[DeltaPart]) -> list[tuple[str, str]]:
    """Name and arguments of every tool call, in order."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for part in parts:
        if isinstance(part, CallStart):
            names[part.index] = part.name
        elif isinstance(part, CallArguments):
            arguments[part.index] = arguments.get(part.index, "") + part.text
    return [(name, arguments.get(index, "")) for index, name in names.items()]


def arguments_object(text: str) -> dict[str, Any]:
    """The arguments of a call as an object: of a text that was cut, what came; a text that is no object is a member."""
    try:
        value = from_json(text or "{}", allow_partial="trailing-strings", allow_inf_nan=False)
        orjson.dumps(value)  # it has no integers beyond 64 bits
    except (ValueError, TypeError):
        value = text
    return value if isinstance(value, dict) else {"arguments": value}
