"""What the engine process and a process that computes masks say to each other, as msgpack in frames with a length.

Plain values; both ends are ours.
"""

import struct
from collections.abc import Iterator

import msgspec

HEADER = struct.Struct("<I")


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """Follow a grammar from now on, for an answer that has come as far as `tokens`."""

    id: int
    grammar: str
    tokens: tuple[int, ...]


class Advance(msgspec.Struct, frozen=True, array_like=True, tag="advance"):
    """These tokens have become part of the answer."""

    id: int
    tokens: tuple[int, ...]


class Ahead(msgspec.Struct, frozen=True, array_like=True, tag="ahead"):
    """What could follow each of these guesses?"""

    id: int
    drafts: tuple[int, ...]


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """Forget an answer. It is the only message without a reply."""

    id: int


class Masks(msgspec.Struct, frozen=True, array_like=True, tag="masks"):
    """The reply to one message: masks, one row after the other, of 32-bit words.

    `rows` is one mask for the next token, or, after `Ahead`, one for each guess that could be followed. `forced` are
    tokens that must come next. `seconds` of the processor were spent on it.
    """

    id: int
    rows: bytes
    forced: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str = ""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The first message of a process: its tokenizer is loaded."""


ToMasks = Open | Advance | Ahead | Close
FromMasks = Masks | Ready
_ENCODER = msgspec.msgpack.Encoder()


def frame(message: ToMasks | FromMasks) -> bytes:
    """One message as bytes."""
    payload = _ENCODER.encode(message)
    return HEADER.pack(len(payload)) + payload


class Frames:
    """Cuts a stream of bytes into the payloads of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Every payload that is complete with this data."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield payload
