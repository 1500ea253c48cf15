"""Reading JSON from a tape: a value whose text is passed on as it comes, and the object that most families call with.

It checks only as much as it needs to find where a value ends; whether arguments are valid is the client's to judge.
"""

import json
import re
from collections.abc import Container
from typing import Any

from server.dialects.cursor import Script, Tape, Write
from server.dialects.deltas import Pieces

_STRING = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r"[-+.\w]+", re.ASCII)
_BETWEEN = re.compile(r"[ \t\r\n,:]+")
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)  # before a name, another key means that this is no call


def value(tape: Tape, write: Write) -> Script[bool]:
    """Write one JSON value. False: it ends early, or a character that no JSON has there breaks it off."""
    depth = 0
    while True:
        char = yield from tape.peek()
        if char == '"':
            whole = yield from _string(tape, write)
            if not whole:
                return False
        elif char and char in "{[":
            depth += 1
            write(tape.take(1))
        elif char and char in "}]" and depth:
            depth -= 1
            write(tape.take(1))
        elif depth and (between := tape.run(_BETWEEN)):
            write(between)
        elif not (yield from _scalar(tape, write)):
            return False
        if not depth:
            return True


def _string(tape: Tape, write: Write) -> Script[bool]:
    write(tape.take(1))
    while char := (yield from tape.peek()):
        if char == '"':
            write(tape.take(1))
            return True
        if char == "\\":
            write(tape.take(1))
            escaped = yield from tape.peek()
            write(tape.take(len(escaped)))
        else:
            write(tape.run(_STRING))
    return False


def _scalar(tape: Tape, write: Write) -> Script[bool]:
    found = False
    while (yield from tape.peek()) and (scalar := tape.run(_SCALAR)):
        write(scalar)
        found = True
    return found


def arguments(tape: Tape, pieces: Pieces) -> Script[bool]:
    """The arguments of the call that has begun, an object as it comes. Whether they are whole."""
    if (yield from tape.peek()) == "{":
        return (yield from value(tape, pieces.arguments))
    parts: list[str] = []
    whole = yield from value(tape, parts.append)
    pieces.arguments(_object_in("".join(parts)))
    return whole


def last_arguments(tape: Tape, pieces: Pieces) -> Script[None]:
    """The arguments of a call that ends with them."""
    if (yield from arguments(tape, pieces)):
        pieces.call_end()


def call_object(tape: Tape, pieces: Pieces, names: Container[str] | None = None) -> Script[bool]:
    """`{"name": …, "arguments": {…}}`, its keys in any order; `names` are the ones that may be called, None for all.

    True once the call has begun, whatever becomes of it. Until then the caller's pin stays in, to go back to.
    """
    if not (yield from tape.starts("{")):
        return False
    begun, early = False, ""
    waiting = True  # for arguments
    while True:
        yield from tape.skip()
        key = yield from _text(tape)
        if key is None or not (begun or key in _KEYS) or not (yield from _colon(tape)):
            return begun
        if key == "name" and not begun:
            name = yield from _text(tape)
            if not name or not name.isprintable() or (names is not None and name not in names):
                return False
            tape.unpin()
            pieces.call(name)
            pieces.arguments(early)
            begun, waiting = True, not early
        elif key in _ARGUMENTS and begun and waiting:
            yield from arguments(tape, pieces)
            waiting = False
        else:
            parts: list[str] = []
            whole = yield from value(tape, parts.append)
            if not whole:
                return begun
            early = _object_in("".join(parts)) if key in _ARGUMENTS else early
        yield from tape.skip()
        after = yield from tape.starts(",", "}")
        if after == "}" and begun and waiting:
            pieces.arguments("{}")
        if after == "}" and begun:
            pieces.call_end()
        if after != ",":
            return begun


def _colon(tape: Tape) -> Script[bool]:
    yield from tape.skip()
    if not (yield from tape.starts(":")):
        return False
    yield from tape.skip()
    return True


def _text(tape: Tape) -> Script[str | None]:
    """A JSON string, decoded; None if there is none."""
    parts: list[str] = []
    if (yield from tape.peek()) != '"' or not (yield from value(tape, parts.append)):
        return None
    decoded = _decoded("".join(parts))
    return decoded if isinstance(decoded, str) else None


def _object_in(text: str) -> str:
    """Some models write arguments as JSON in a string, or null for none. Anything else stays as it was written."""
    decoded = _decoded(text) if text[:1] in ('"', "n") else ""
    if isinstance(decoded, str):
        return decoded if isinstance(_decoded(decoded), dict) else text
    return "{}" if decoded is None and text == "null" else text


def _decoded(text: str) -> Any:
    """None where `text` is no JSON, or holds half a character that could not be sent on."""
    try:
        decoded = json.loads(text, strict=False)
        str(decoded).encode()
    except (ValueError, RecursionError):
        return None
    return decoded
