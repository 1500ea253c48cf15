"""The seam between running a call and writing it: what every endpoint's format can do."""

from collections.abc import Iterable
from typing import Any, Protocol

from server.transcript import Delta


class Format(Protocol):
    """Writes one call's answer, whole or in chunks. Chunks and bodies are plain dicts."""

    def opening(self) -> Iterable[dict[str, Any]]:
        """Chunks that come before any text."""

    def chunks(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """What one delta becomes; the finish reason is a chunk of its own."""

    def usage(self) -> dict[str, Any]:
        """The chunk with empty `choices` that a caller can ask for."""

    def body(self, deltas: list[Delta]) -> dict[str, Any]:
        """The whole answer at once."""


def token_text(data: bytes) -> str:
    """A token as text; OpenAI writes a part of a character as `bytes:\\xe2\\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def joined(deltas: Iterable[Delta], index: int) -> Delta:
    """All deltas of one choice as one."""
    own = [delta for delta in deltas if delta.index == index]
    logprobs = tuple(entry for delta in own for entry in delta.logprobs)
    finish = next((delta.finish for delta in own if delta.finish), None)
    return Delta(index, "".join(delta.text for delta in own), logprobs, finish)
