"""The seam between running a call and writing it: what every endpoint's format can do."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import orjson

from engine.types import Logprob
from server.dialects.base import CallArguments, CallStart, Content, Piece, Reasoning
from server.errors import error_body
from server.event_loop.slices import Steps, long_list
from server.generation.output_processor import LOWEST, Delta, TokenLogprob
from server.protocols import Tokenizer

MANY = 256  # deltas that are written without a pause


class Format(ABC):
    """Writes one call's answer, whole or as server-sent events. Chunks and bodies are plain dicts."""

    @abstractmethod
    def opening(self) -> Iterable[dict[str, Any]]:
        """Chunks that come before any text."""

    @abstractmethod
    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """What one delta becomes."""

    @abstractmethod
    def closing(self) -> Iterable[dict[str, Any]]:
        """Chunks after the last delta: the usage, where it was asked for."""

    @abstractmethod
    def frame(self, chunk: dict[str, Any]) -> bytes:
        """A chunk as a server-sent event."""

    @abstractmethod
    def failure(self, error: Exception) -> bytes:
        """The event that ends a stream which failed; the status line has gone out."""

    @abstractmethod
    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        """The whole answer at once. It may be millions of figures, so it is made in steps."""

    def begin(self) -> Steps[bytes]:
        return _framed(self, self.opening())

    def write(self, deltas: Iterable[Delta]) -> bytes:
        return b"".join([self.frame(chunk) for delta in deltas for chunk in self.chunks(delta)])

    def steps_of(self, deltas: list[Delta]) -> Steps[bytes]:
        """What `write` gives, in steps."""
        written = []
        for delta in deltas:
            written.append((yield from _framed(self, self.chunks(delta))))
        return b"".join(written)

    def end(self) -> bytes:
        """What ends a stream that ended well."""
        return b"".join(map(self.frame, self.closing()))


def _framed(format: Format, chunks: Iterable[dict[str, Any]]) -> Steps[bytes]:
    frames = []
    for chunk in chunks:
        frames.append(format.frame(chunk))
        yield
    return b"".join(frames)


def is_long(deltas: list[Delta]) -> bool:
    """Whether writing them may take a while: a prompt's figures come at once, and some formats end with all of it."""
    return len(deltas) > MANY or any(delta.prompt is not None or delta.finish is not None for delta in deltas)


class DataFormat(Format):
    """Server-sent events as completions and chat write them: data alone, and a last word.

    Most deltas are a piece of text and nothing else. Their chunks differ in that text alone, so what is around it is
    written once.
    """

    def __init__(self, same: bool = True) -> None:
        """`same`: whether chunks of text differ in nothing else."""
        self._same = same
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def frame(self, chunk: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def failure(self, error: Exception) -> bytes:
        return b"event: error\n" + self.frame(error_body(error))

    def write(self, deltas: Iterable[Delta]) -> bytes:
        return b"".join([self._written(delta) for delta in deltas])

    def end(self) -> bytes:
        return super().end() + b"data: [DONE]\n\n"

    def _written(self, delta: Delta) -> bytes:
        text = _lone_text(delta) if self._same else None
        if text is None:
            return super().write((delta,))
        if delta.index not in self._around:
            whole = super().write((Delta(delta.index, (Content(PLACE),)),))
            before, _, after = whole.rpartition(orjson.dumps(PLACE))
            self._around[delta.index] = before, after
        return orjson.dumps(text).join(self._around[delta.index])


PLACE = "text"  # nothing that comes after it in a chunk is this in quotes


def _lone_text(delta: Delta) -> str | None:
    """The text of a delta that is nothing else."""
    if len(delta.pieces) != 1 or delta.logprobs or delta.finish or delta.prompt is not None:
        return None
    piece = delta.pieces[0]
    return piece.text if isinstance(piece, Content) else None


def token_text(data: bytes) -> str:
    """A token as text; OpenAI writes a part of a character as `bytes:\\xe2\\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    """A token, its log-probability and its alternatives, as chats and responses write them."""
    best = [_entry(tokenizer, id, value) for id, value in entry.top]
    return {**_entry(tokenizer, entry.token, entry.value), "top_logprobs": best}


def _entry(tokenizer: Tokenizer, id: int, value: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(id)
    return {"token": token_text(data), "logprob": value, "bytes": list(data)}


def prompt_entries(
    tokenizer: Tokenizer, tokens: Sequence[int], found: Sequence[Logprob], listed: int
) -> Steps[list[Any]]:
    """vLLM's prompt_logprobs: of each token of a prompt the best and itself by id; nothing comes before the first."""
    scored = (
        {str(id): _ranked(tokenizer, id, *told) for id, told in _told(token, logprob, listed).items()}
        for token, logprob in zip(tokens[1:], found, strict=True)
    )
    entries: list[Any] = yield from long_list(chain((None,), scored))
    return entries


def _told(token: int, logprob: Logprob, listed: int) -> dict[int, tuple[float, int | None]]:
    """Value and rank by id. The rank of a token that is not among the best is not known."""
    best = {id: (value, place + 1) for place, (id, value) in enumerate(logprob.top[:listed])}
    rank = next((place + 1 for place, (id, _) in enumerate(logprob.top) if id == token), None)
    return {token: (logprob.value, rank), **best}


def _ranked(tokenizer: Tokenizer, id: int, value: float, rank: int | None) -> dict[str, Any]:
    text = tokenizer.token_bytes(id).decode(errors="replace")
    return {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": text}


def joined(deltas: Iterable[Delta]) -> Steps[dict[int, Delta]]:
    """All deltas of each choice as one."""
    by_index: dict[int, list[Delta]] = {}
    for place, delta in enumerate(deltas):
        by_index.setdefault(delta.index, []).append(delta)
        if place % MANY == MANY - 1:
            yield
    answers = {}
    for index, own in by_index.items():
        answers[index] = _one(index, own)
        yield
    return answers


def _one(index: int, own: list[Delta]) -> Delta:
    pieces = tuple(piece for delta in own for piece in delta.pieces)
    logprobs = tuple(entry for delta in own for entry in delta.logprobs)
    finish = next((delta.finish for delta in own if delta.finish), None)
    prompt = next((delta.prompt for delta in own if delta.prompt is not None), None)
    reason = next((delta.stop_reason for delta in own if delta.finish), None)
    return Delta(index, pieces, logprobs, finish, prompt, reason)


def reasoning_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))


def content_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def calls_of(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """Name and arguments of every call, in order."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, CallStart):
            names[piece.index] = piece.name
        elif isinstance(piece, CallArguments):
            arguments[piece.index] = arguments.get(piece.index, "") + piece.text
    return [(name, arguments.get(index, "")) for index, name in names.items()]
