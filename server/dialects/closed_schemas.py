"""JSON schemas whose objects are closed: properties that a schema does not name are ruled out unless it says otherwise.

By the standard a silent schema allows any others, and a small model then makes up names for ever; OpenAI's strict
schemas, xgrammar and llama.cpp close such objects, too. It knows no grammar.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import unquote

SPOKEN = ("additionalProperties", "unevaluatedProperties")  # with either, a schema says itself what else there may be
NAMING = ("properties", "patternProperties")
BRANCHES = ("allOf", "anyOf", "oneOf")
# Where schemas stand: those that apply to the same value, and those of values within it
HERE_ONE, HERE_MAP = ("if", "then", "else"), ("dependentSchemas",)
WITHIN_ONE = ("items", "additionalItems", "contains", "additionalProperties", "unevaluatedProperties")
WITHIN_MAP, WITHIN_LIST = (*NAMING, "$defs", "definitions"), ("prefixItems", "items")
DEEPEST = 64  # references that follow from one another
MOST = 20_000  # names that are put together, over all objects

Schema = dict[str, Any]


class TooEntangled(ValueError):
    """A schema's objects are put together from more parts than the limits allow. Says which limit."""


def closed(schema: Mapping[str, Any]) -> Schema:
    """`schema` with its objects closed, wherever they stand.

    An object that names no properties stays open. One that is put together (`allOf`, or `$ref`, `anyOf` beside other
    properties) is closed as a whole, since parts that are closed each by itself contradict each other:

        {"properties": {"a": A}, "allOf": [{"$ref": "#/$defs/b"}]}, where b has a property "b"
        becomes {"properties": {"a": A, "b": true}, "additionalProperties": false, "allOf": …}, and b stays open.

    Other references to b then lead to a closed copy of it.

    Raises:
        TooEntangled: it is put together from too many parts.
    """
    whole: Schema = _Closing(dict(schema)).whole()
    return whole


@dataclass
class _Said:
    """What a schema says of an object's properties, with all that applies to the same value."""

    names: dict[str, None] = field(default_factory=dict)
    patterns: dict[str, None] = field(default_factory=dict)
    speaks: bool = False  # whether a part says what else there may be, or cannot be found

    def add(self, other: "_Said") -> None:
        self.names |= other.names
        self.patterns |= other.patterns
        self.speaks |= other.speaks


class _Closing:
    """Schemas are known by their identity: a reference leads to the same object that stands in the tree."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.parts: set[int] = set()  # schemas to which composites refer
        self.known: dict[int, _Said] = {}
        self.targets: dict[str, Any] = {}
        self.copies: dict[int, tuple[str, Schema]] = {}  # of parts: their names among the definitions, and the parts
        self.names = 0
        for node in _all(root):
            if _sources(node) > 1:
                self._mark_parts(node, DEEPEST)

    def whole(self) -> Schema:
        made: Schema = self._closed(self.root)
        copied: dict[str, Any] = {}
        while waiting := [copy for copy in self.copies.values() if copy[0] not in copied]:
            copied |= {name: self._closed(part, copy=True) for name, part in waiting}
        return made | {"$defs": _map(made, "$defs") | copied} if copied else made

    def _mark_parts(self, node: Any, depth: int) -> None:
        target = self._target(node.get("$ref")) if isinstance(node, dict) else None
        for part in self._here(node, depth):
            if part is target:
                if id(part) in self.parts:
                    continue
                self.parts.add(id(part))
            self._mark_parts(part, depth - 1)

    def _closed(self, node: Any, copy: bool = False) -> Any:
        if not isinstance(node, dict):
            return node
        part = id(node) in self.parts and not copy
        together = part or _sources(node) > 1
        made = self._inside(node, together)
        if not together and id(target := self._target(node.get("$ref"))) in self.parts:
            made["$ref"] = self._copy_of(target)
        if part or any(key in node for key in SPOKEN):
            return made
        if together:
            return self._close(made, self.said(node, DEEPEST))
        return self._close(made, _own(node)) if any(key in node for key in NAMING) else made

    def _copy_of(self, part: Schema) -> str:
        """A reference to it. With names beside it, the reference itself could be closed, but not where it leads back
        to itself: the library does not take those."""
        if id(part) not in self.copies:
            taken = {*_map(self.root, "$defs"), *(name for name, _ in self.copies.values())}
            free = (name for i in count(len(self.copies)) if (name := f"closed-{i}") not in taken)
            self.copies[id(part)] = next(free), part
        return f"#/$defs/{self.copies[id(part)][0]}"

    def _open(self, node: Any) -> Any:
        """A part of what is closed as a whole."""
        return self._inside(node, True) if isinstance(node, dict) else node

    def _inside(self, node: Schema, together: bool) -> Schema:
        """With the schemas in it closed; not those that apply to the same value where it is put `together`."""
        here = self._open if together else self._closed
        made = dict(node)
        for key, value in node.items():
            if key in BRANCHES and isinstance(value, list):
                made[key] = [here(one) for one in value]
            elif key in HERE_ONE:
                made[key] = here(value)
            elif key in HERE_MAP and isinstance(value, dict):
                made[key] = {name: here(one) for name, one in value.items()}
            elif key in WITHIN_MAP and isinstance(value, dict):
                made[key] = {name: self._closed(one) for name, one in value.items()}
            elif key in WITHIN_LIST and isinstance(value, list):
                made[key] = [self._closed(one) for one in value]
            elif key in WITHIN_ONE:
                made[key] = self._closed(value)
        return made

    def _close(self, made: Schema, said: _Said) -> Schema:
        if said.speaks or not (said.names or said.patterns or any(key in made for key in NAMING)):
            return made
        self._count(said)
        own, patterns = _map(made, "properties"), _map(made, "patternProperties")
        if said.names:
            made["properties"] = {name: own.get(name, True) for name in said.names}
        if said.patterns:
            made["patternProperties"] = {pattern: patterns.get(pattern, True) for pattern in said.patterns}
        return made | {"additionalProperties": False}

    def said(self, node: Any, depth: int) -> _Said:
        """Of `node` and of all that applies to the same value."""
        if not isinstance(node, dict):
            return _Said()
        if id(node) in self.known:
            return self.known[id(node)]
        found = self.known[id(node)] = _own(node)
        found.speaks |= "$ref" in node and self._target(node["$ref"]) is None
        for part in self._here(node, depth):
            other = self.said(part, depth - 1)
            self._count(other)
            found.add(other)
        return found

    def _here(self, node: Any, depth: int) -> Iterator[Any]:
        """The other schemas that apply to the same value."""
        if not depth:
            raise TooEntangled(f"at most {DEEPEST} references from one another")
        if isinstance(node, dict):
            yield from _here(node)
            if (target := self._target(node.get("$ref"))) is not None:
                yield target

    def _target(self, reference: Any) -> Any:
        """What a reference within the schema leads to; None for any other."""
        if not isinstance(reference, str) or reference[:2] not in ("#", "#/"):
            return None
        if reference not in self.targets:
            self.targets[reference] = self._found(reference)
        return self.targets[reference]

    def _found(self, reference: str) -> Any:
        node: Any = self.root
        for step in unquote(reference[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            node = node.get(step) if isinstance(node, dict) else _entry(node, step)
        return node if isinstance(node, dict) else None

    def _count(self, said: _Said) -> None:
        self.names += len(said.names) + len(said.patterns)
        if self.names > MOST:
            raise TooEntangled(f"at most {MOST} names of properties put together")


def _own(node: Schema) -> _Said:
    """In the order in which they are written, for so they will be answered; what is required may have no schema."""
    required = node.get("required")
    names = [*_map(node, "properties"), *(required if isinstance(required, list) else ())]
    known = dict.fromkeys(name for name in names if isinstance(name, str))
    return _Said(known, dict.fromkeys(_map(node, "patternProperties")), any(key in node for key in SPOKEN))


def _sources(node: Schema) -> int:
    """Of how many parts an object is put together."""
    parts = [any(key in node for key in keys) for keys in (("$ref",), NAMING, HERE_ONE, ("anyOf",), ("oneOf",))]
    branches = node.get("allOf")
    return sum(parts) + (len(branches) if isinstance(branches, list) else 0)


def _here(node: Schema) -> Iterator[Any]:
    for key in BRANCHES:
        yield from node[key] if isinstance(node.get(key), list) else ()
    yield from (node[key] for key in HERE_ONE if key in node)
    for key in HERE_MAP:
        yield from _map(node, key).values()


def _within(node: Schema) -> Iterator[Any]:
    for key in WITHIN_MAP:
        yield from _map(node, key).values()
    for key in WITHIN_LIST:
        yield from node[key] if isinstance(node.get(key), list) else ()
    yield from (node[key] for key in WITHIN_ONE if key in node)


def _all(root: Schema) -> Iterable[Schema]:
    """Every schema in the tree that is an object."""
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += [*_here(node), *_within(node)]


def _map(node: Schema, key: str) -> dict[str, Any]:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def _entry(node: Any, step: str) -> Any:
    """Of a list; none has so many that a place takes ten digits."""
    place = int(step) if step.isdecimal() and len(step) < 10 else -1
    return node[place] if isinstance(node, list) and 0 <= place < len(node) else None
