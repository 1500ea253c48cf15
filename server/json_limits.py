"""Parses JSON within limits on depth and size, which are checked before most of the work.

A body of eight megabytes can hold millions of objects: parsing it holds the interpreter's lock and stops every other
request. What parsing would make is therefore counted first, in slices between which others run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic_core import from_json

SLICE = 1 << 16  # bytes that are counted at a time
CONTAINERS = {dict, list}


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """`objects`: objects, lists and keys, which cost the most; `values`: entries of all lists and objects."""

    depth: int
    values: int
    objects: int


class JsonTooLarge(ValueError):
    """JSON beyond a limit, which the message names, such as "at most 64 levels"."""


def parse(data: bytes | bytearray, limits: JsonLimits) -> Any:
    """The value of a JSON text.

    Raises:
        JsonTooLarge: it is beyond the limits.
        ValueError: it is no JSON.
    """
    check_count([data], limits)
    try:
        value = from_json(data, allow_inf_nan=True)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise JsonTooLarge(f"at most {limits.depth} levels") from None
        raise
    if is_deeper(value, limits.depth):
        raise JsonTooLarge(f"at most {limits.depth} levels")
    return value


def check_count(texts: Sequence[bytes | bytearray], limits: JsonLimits) -> None:
    """Raises JsonTooLarge where parsing the texts would make more, together, than is allowed.

    Strings are left out of the count only if the count with them would be too much, since finding them takes time.
    """
    if sum(data.count(b",") for data in texts) < limits.values and sum(map(_objects, texts)) <= limits.objects:
        return
    commas = objects = 0
    for outside in (part for data in texts for part in _outside_strings(data)):
        commas += outside.count(b",")
        objects += _objects(outside)
        if commas >= limits.values:
            raise JsonTooLarge(f"at most {limits.values} values")
        if objects > limits.objects:
            raise JsonTooLarge(f"at most {limits.objects} objects, lists and keys")


def _outside_strings(data: bytes | bytearray) -> Iterator[bytes]:
    """A JSON text without its strings, in slices."""
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # every remaining quote begins or ends a string
    within = 0
    for start in range(0, len(unescaped), SLICE):
        parts = unescaped[start : start + SLICE].split(b'"')
        yield b"".join(parts[within::2])
        within = (within + len(parts) - 1) % 2


def _objects(data: bytes | bytearray) -> int:
    """How many objects, lists and keys the text can have."""
    return data.count(b"{") + data.count(b"[") + data.count(b":")


def is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit`."""
    lists, objects = _containers([value])
    for _ in range(limit):
        if not (lists or objects):
            break
        values = chain(chain.from_iterable(lists), chain.from_iterable(map(dict.values, objects)))
        lists, objects = _containers(values)
    return bool(lists or objects)


def _containers(values: Iterable[Any]) -> tuple[list[list[Any]], list[dict[Any, Any]]]:
    """The lists and the objects among `values`."""
    containers = [value for value in values if type(value) in CONTAINERS]
    lists = [container for container in containers if type(container) is list]
    objects = [container for container in containers if type(container) is dict]
    return lists, objects


def min_json_bytes(value: Any, enough: int) -> int:
    """A lower bound of the bytes of `json.dumps(value)`, exact except for escapes and long numbers.

    Counting stops beyond `enough`, so that its cost does not grow with the value.
    """
    size, waiting = 0, [value]
    while waiting and size <= enough:
        node = waiting.pop()
        if isinstance(node, str):
            size += 2 + len(node)
        elif isinstance(node, dict | list):
            size += max(2, 2 * len(node))  # brackets, and ", " between entries
            if size > enough:
                break
            if isinstance(node, dict):
                size += sum(map(len, node)) + 4 * len(node)
            waiting += node.values() if isinstance(node, dict) else node
        else:
            size += 1
    return size
