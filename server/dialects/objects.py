"""Parsers of JSON: of a value whose text is passed on as it arrives, and of the object that is a call in most families.

They check only what they need to find where a value ends; the client checks whether arguments are valid.
"""

import json
import re
from collections.abc import Container
from typing import Any

from server.dialects.cursor import Cursor, Parser, Write
from server.dialects.deltas import Deltas

_STRING = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r"[-+.\w]+", re.ASCII)
_BETWEEN = re.compile(r"[ \t\r\n,:]+")
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)  # before the name, any other key means that the object is no call


def copy_value(cursor: Cursor, write: Write) -> Parser[bool]:
    """Write one JSON value. False: the answer ends within it, or a character is no JSON."""
    depth = 0
    while True:
        char = yield from cursor.peek()
        if char == '"':
            whole = yield from _string(cursor, write)
            if not whole:
                return False
        elif char and char in "{[":
            depth += 1
            write(cursor.take(1))
        elif char and char in "}]" and depth:
            depth -= 1
            write(cursor.take(1))
        elif depth and (between := cursor.take_match(_BETWEEN)):
            write(between)
        elif not (yield from _scalar(cursor, write)):
            return False
        if not depth:
            return True


def _string(cursor: Cursor, write: Write) -> Parser[bool]:
    write(cursor.take(1))
    while char := (yield from cursor.peek()):
        if char == '"':
            write(cursor.take(1))
            return True
        if char == "\\":
            write(cursor.take(1))
            escaped = yield from cursor.peek()
            write(cursor.take(len(escaped)))
        else:
            write(cursor.take_match(_STRING))
    return False


def _scalar(cursor: Cursor, write: Write) -> Parser[bool]:
    found = False
    while (yield from cursor.peek()) and (scalar := cursor.take_match(_SCALAR)):
        write(scalar)
        found = True
    return found


def arguments(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
    """Parse the arguments of the call that has begun. Returns whether they are complete."""
    if (yield from cursor.peek()) == "{":
        return (yield from copy_value(cursor, deltas.arguments))
    parts: list[str] = []
    whole = yield from copy_value(cursor, parts.append)
    deltas.arguments(_object_in("".join(parts)))
    return whole


def last_arguments(cursor: Cursor, deltas: Deltas) -> Parser[None]:
    """Parse the arguments of a call that ends with them."""
    if (yield from arguments(cursor, deltas)):
        deltas.call_end()


def call_object(cursor: Cursor, deltas: Deltas, names: Container[str] | None = None) -> Parser[bool]:
    """Parse `{"name": …, "arguments": {…}}` with its keys in any order; `names` may be called, None: all.

    Returns True once a call has begun, even if it stays incomplete. Until then the cursor's pin is kept.
    """
    if not (yield from cursor.take_one_of("{")):
        return False
    begun, waiting = False, True  # for arguments
    early = ""  # arguments that came before the name
    while True:
        yield from cursor.skip()
        key = yield from _text(cursor)
        if key is None or not (begun or key in _KEYS) or not (yield from _colon(cursor)):
            return begun
        if key == "name" and not begun:
            name = yield from _text(cursor)
            if not name or not name.isprintable() or (names is not None and name not in names):
                return False
            cursor.unpin()
            deltas.call(name)
            deltas.arguments(early)
            begun, waiting = True, not early
        elif key in _ARGUMENTS and begun and waiting:
            yield from arguments(cursor, deltas)
            waiting = False
        else:
            parts: list[str] = []
            whole = yield from copy_value(cursor, parts.append)
            if not whole:
                return begun
            early = _object_in("".join(parts)) if key in _ARGUMENTS else early
        yield from cursor.skip()
        after = yield from cursor.take_one_of(",", "}")
        if after == "}" and begun and waiting:
            deltas.arguments("{}")
        if after == "}" and begun:
            deltas.call_end()
        if after != ",":
            return begun


def _colon(cursor: Cursor) -> Parser[bool]:
    """Take a colon and the space around it."""
    yield from cursor.skip()
    if not (yield from cursor.take_one_of(":")):
        return False
    yield from cursor.skip()
    return True


def _text(cursor: Cursor) -> Parser[str | None]:
    """A JSON string, decoded; None if no string is here."""
    parts: list[str] = []
    if (yield from cursor.peek()) != '"' or not (yield from copy_value(cursor, parts.append)):
        return None
    decoded = _decoded("".join(parts))
    return decoded if isinstance(decoded, str) else None


def _object_in(text: str) -> str:
    """The arguments as an object where a model wrote them as JSON in a string, or null for none; else unchanged."""
    decoded = _decoded(text) if text[:1] in ('"', "n") else ""
    if isinstance(decoded, str):
        return decoded if isinstance(_decoded(decoded), dict) else text
    return "{}" if decoded is None and text == "null" else text


def _decoded(text: str) -> Any:
    """The value of a JSON text; None where it is no JSON, or has half a surrogate pair that could not be sent."""
    try:
        decoded = json.loads(text, strict=False)
        str(decoded).encode()
    except (ValueError, RecursionError):
        return None
    return decoded
