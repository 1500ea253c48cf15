"""How deep JSON may be nested, how much of it there may be, and what that costs to find out. It knows no field.

A body of eight megabytes can hold millions of objects: parsing them stops every other request, for the interpreter's
lock is held. So what parsing would make is counted first, in slices between which others run.
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
    """JSON, but nested deeper or with more in it than the limits allow. Says which, as "at most 64 levels"."""


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
    if deeper(value, limits.depth):
        raise JsonTooLarge(f"at most {limits.depth} levels")
    return value


def check_count(texts: Sequence[bytes | bytearray], limits: JsonLimits) -> None:
    """Raises JsonTooLarge where parsing the texts would make more, together, than is allowed. What is within strings
    is told from the rest only if all of it would be too much."""
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
    """What is left of a JSON text without its strings, in slices."""
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left begins or ends a string
    within = 0
    for start in range(0, len(unescaped), SLICE):
        parts = unescaped[start : start + SLICE].split(b'"')
        yield b"".join(parts[within::2])
        within = (within + len(parts) - 1) % 2


def _objects(data: bytes | bytearray) -> int:
    return data.count(b"{") + data.count(b"[") + data.count(b":")


def deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit`."""
    lists, objects = _sorted_out([value])
    for _ in range(limit):
        if not (lists or objects):
            break
        lists, objects = _sorted_out(chain(chain.from_iterable(lists), chain.from_iterable(map(dict.values, objects))))
    return bool(lists or objects)


def _sorted_out(values: Iterable[Any]) -> tuple[list[list[Any]], list[dict[Any, Any]]]:
    """The lists and the objects among them."""
    containers = [value for value in values if type(value) in CONTAINERS]
    return [one for one in containers if type(one) is list], [one for one in containers if type(one) is dict]


def least_bytes(value: Any, enough: int) -> int:
    """A lower bound of the bytes of `json.dumps(value)`, exact but for escapes and long numbers. It stops counting
    beyond `enough`, so that its cost does not grow with the value."""
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
