"""The messages between the engine process and a mask process: msgpack in frames with a length.

Plain values, no sockets and no grammars.
"""

import struct
from collections.abc import Iterator

import msgspec

HEADER = struct.Struct("<I")


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """Start following a grammar, for an answer whose first tokens are `tokens`."""

    id: int
    grammar: str
    tokens: tuple[int, ...]


class Advance(msgspec.Struct, frozen=True, array_like=True, tag="advance"):
    """Append these tokens to the answer."""

    id: int
    tokens: tuple[int, ...]


class LookAhead(msgspec.Struct, frozen=True, array_like=True, tag="ahead"):
    """Ask for the masks after each of these draft tokens."""

    id: int
    drafts: tuple[int, ...]


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """Drop an answer. The only message without a reply."""

    id: int


class Masks(msgspec.Struct, frozen=True, array_like=True, tag="masks"):
    """The reply to one message: masks, one row after the other, of 32-bit words.

    `rows` is one mask for the next token, or, after `LookAhead`, one for each draft that the grammar allows. `forced`
    are tokens that must come next. `seconds` is the processor time of the reply.
    """

    id: int
    rows: bytes
    forced: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str = ""


class TokenizerLoaded(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The first message of a process: its tokenizer is loaded."""


ToMasks = Open | Advance | LookAhead | Close
FromMasks = Masks | TokenizerLoaded
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
