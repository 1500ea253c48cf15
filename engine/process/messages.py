"""The messages between the HTTP process and the engine process: tagged msgpack in frames of bounded size.

A frame is a 4-byte little-endian length and that many bytes. Messages are decoded into the declared types or refused;
none can name code to run.
"""

import struct
from typing import TypeVar

import msgspec

from engine.types import EngineInfo, EngineSettings, Logprob, Request, StepReport, TokenEvent
from model.budget import ExpertCounts

MAX_FRAME = 64 * 1024 * 1024  # bytes; a request with a prompt of ten million tokens still fits
HEADER = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First message to the child: what to load."""

    settings: EngineSettings


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Queue these requests, in this order."""

    requests: tuple[Request, ...]


class Compile(msgspec.Struct, frozen=True, tag="compile"):
    """Compile a grammar that a request is going to have; `id` is like a request's, and may be aborted."""

    id: str
    grammar: str


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End these requests; unknown ids are ignored."""

    ids: tuple[str, ...]


class SetCounts(msgspec.Struct, frozen=True, tag="counts"):
    """Give the tokens of a request that are still to be computed these counts, one per MoE layer; an unknown id is
    ignored."""

    request_id: str
    counts: ExpertCounts


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Finish what was submitted, then exit."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Ask for a `Pong`, to see that the engine process is alive."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded; requests may follow."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The model cannot be loaded, and another attempt would fail as well."""

    message: str


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """One request was refused; the fields are those of `InvalidRequest`."""

    request_id: str
    message: str
    param: str | None
    code: str


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """A grammar can be used, and the mask process has compiled it."""

    id: str


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to a ping, between two steps."""


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """A step begins that may take this many seconds."""

    seconds: float


class Reports(msgspec.Struct, frozen=True, tag="reports"):
    """The reports of one or more steps, in order."""

    reports: tuple[StepReport, ...]


class Events(msgspec.Struct, frozen=True, tag="events"):
    """Events of a step whose report follows: they were too many for one frame."""

    events: tuple[TokenEvent, ...]
    buffered_s: float


class PromptLogprobsPart(msgspec.Struct, frozen=True, tag="scores"):
    """A part of a prompt's log-probabilities, in order; the last part comes with the request's event."""

    request_id: str
    logprobs: tuple[Logprob, ...]


ToEngine = Start | Submit | Compile | Abort | SetCounts | Stop | Ping
FromEngine = Ready | Failed | Rejected | Compiled | Pong | Busy | Reports | Events | PromptLogprobsPart
Message = TypeVar("Message")

_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class FrameError(Exception):
    """The other process sent something that is no message, or a message is larger than a frame may be."""


def frame(message: ToEngine | FromEngine) -> bytes:
    """One message as bytes.

    Raises:
        FrameError: it is larger than `MAX_FRAME`, or holds an integer of more than 64 bits.
    """
    return framed(payload_of(message))


def payload_of(message: ToEngine | FromEngine) -> bytes:
    """One message as bytes of any size; `FrameError` if it holds an integer of more than 64 bits."""
    try:
        return msgspec.msgpack.encode(message)
    except OverflowError as error:
        raise FrameError("a message holds an integer of more than 64 bits") from error


def framed(payload: bytes) -> bytes:
    """An encoded message with its length before it; `FrameError` if it is larger than `MAX_FRAME`."""
    return HEADER.pack(frame_size(len(payload))) + payload


def frame_size(size: int) -> int:
    """The size itself, if a frame may be so large; `FrameError` otherwise."""
    if size > MAX_FRAME:
        raise FrameError(f"a frame of {size} bytes; the limit is {MAX_FRAME}")
    return size


def read_to_engine(payload: bytes) -> ToEngine:
    """Decode what the HTTP process sent; `FrameError` if it is no such message."""
    return _decode(_TO_ENGINE, payload)


def read_from_engine(payload: bytes) -> FromEngine:
    """Decode what the engine process sent; `FrameError` if it is no such message."""
    return _decode(_FROM_ENGINE, payload)


def _decode(decoder: msgspec.msgpack.Decoder[Message], payload: bytes) -> Message:
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise FrameError(f"a frame that is no message: {error}") from error
