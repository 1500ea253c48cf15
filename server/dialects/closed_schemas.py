"""Closes the objects of JSON schemas: properties that a schema does not name are ruled out unless it says otherwise.

By the standard a schema that says nothing allows any further properties, and a small model then invents names without
end; OpenAI's strict schemas, xgrammar and llama.cpp close such objects as well.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import unquote

# Keys that say which further properties are allowed, and keys that name properties
EXPLICIT_KEYS = ("additionalProperties", "unevaluatedProperties")
NAMING_KEYS = ("properties", "patternProperties")
BRANCH_KEYS = ("allOf", "anyOf", "oneOf")
# Keys whose values are schemas: those that apply to the same value, and those of values within it
SAME_VALUE_KEYS = ("if", "then", "else")
SAME_VALUE_MAPS = ("dependentSchemas",)
INNER_KEYS = ("items", "additionalItems", "contains", "additionalProperties", "unevaluatedProperties")
INNER_MAPS = (*NAMING_KEYS, "$defs", "definitions")
INNER_LISTS = ("prefixItems", "items")
MAX_REFERENCES = 64  # in a chain
MAX_NAMES = 20_000  # of properties collected over all objects

Schema = dict[str, Any]


class SchemaTooComplex(ValueError):
    """A schema's objects are composed of more parts than the limits allow; the message says which limit."""


def closed(schema: Mapping[str, Any]) -> Schema:
    """`schema` with its objects closed, wherever they stand.

    An object that names no properties stays open. A composed one (`allOf`, or `$ref` or `anyOf` beside other
    properties) is closed as a whole, since parts that are each closed by themselves contradict each other:

        {"properties": {"a": A}, "allOf": [{"$ref": "#/$defs/b"}]}, where b has a property "b"
        becomes {"properties": {"a": A, "b": true}, "additionalProperties": false, "allOf": …}, and b stays open.

    Other references to b then lead to a closed copy of it.

    Raises:
        SchemaTooComplex: it is composed of too many parts.
    """
    return _Closer(dict(schema)).run()


@dataclass
class _Properties:
    """The properties that a schema and all that applies to the same value name."""

    names: dict[str, None] = field(default_factory=dict)
    patterns: dict[str, None] = field(default_factory=dict)
    explicit: bool = False  # whether a part says which further ones are allowed, or cannot be found

    def add(self, other: "_Properties") -> None:
        self.names |= other.names
        self.patterns |= other.patterns
        self.explicit |= other.explicit


class _Closer:
    """Closes one schema. Subschemas are known by their identity: a reference leads to the same object as the tree."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.shared: set[int] = set()  # ids of schemas to which composed ones refer
        self.properties_of: dict[int, _Properties] = {}
        self.resolved: dict[str, Any] = {}
        self.copies: dict[int, tuple[str, Schema]] = {}  # of shared schemas: their names among the definitions
        self.names = 0
        for node in _subschemas(root):
            if _part_count(node) > 1:
                self._find_shared(node, MAX_REFERENCES)

    def run(self) -> Schema:
        made: Schema = self._closed(self.root)
        copied: dict[str, Any] = {}
        while waiting := [copy for copy in self.copies.values() if copy[0] not in copied]:
            copied |= {name: self._closed(part, copy=True) for name, part in waiting}
        return made | {"$defs": _map(made, "$defs") | copied} if copied else made

    def _find_shared(self, node: Any, depth: int) -> None:
        target = self._referenced(node.get("$ref")) if isinstance(node, dict) else None
        for part in self._same_value(node, depth):
            if part is target:
                if id(part) in self.shared:
                    continue
                self.shared.add(id(part))
            self._find_shared(part, depth - 1)

    def _closed(self, node: Any, copy: bool = False) -> Any:
        if not isinstance(node, dict):
            return node
        part = id(node) in self.shared and not copy
        composed = part or _part_count(node) > 1
        made = self._with_closed_inside(node, composed)
        target = self._referenced(node.get("$ref"))
        if not composed and id(target) in self.shared:
            made["$ref"] = self._copy_of(target)
        if part or any(key in node for key in EXPLICIT_KEYS):
            return made
        if composed:
            return self._close(made, self.properties(node, MAX_REFERENCES))
        if any(key in node for key in NAMING_KEYS):
            return self._close(made, _own_properties(node))
        return made

    def _copy_of(self, part: Schema) -> str:
        """A reference to a closed copy of `part`, which may refer to itself.

        Closing the reference itself, with the names beside it, would do otherwise, but llguidance refuses such a
        schema where it leads back to itself.
        """
        if id(part) not in self.copies:
            taken = set(_map(self.root, "$defs"))
            taken |= {name for name, _ in self.copies.values()}
            names = (f"closed-{i}" for i in count(len(self.copies)))
            name = next(name for name in names if name not in taken)
            self.copies[id(part)] = name, part
        return f"#/$defs/{self.copies[id(part)][0]}"

    def _open(self, node: Any) -> Any:
        """A part of a composed schema, which is closed as a whole."""
        return self._with_closed_inside(node, True) if isinstance(node, dict) else node

    def _with_closed_inside(self, node: Schema, composed: bool) -> Schema:
        """`node` with the schemas in it closed; where it is `composed`, not those that apply to the same value."""
        here = self._open if composed else self._closed
        made = dict(node)
        for key, value in node.items():
            if key in BRANCH_KEYS and isinstance(value, list):
                made[key] = [here(one) for one in value]
            elif key in SAME_VALUE_KEYS:
                made[key] = here(value)
            elif key in SAME_VALUE_MAPS and isinstance(value, dict):
                made[key] = {name: here(one) for name, one in value.items()}
            elif key in INNER_MAPS and isinstance(value, dict):
                made[key] = {name: self._closed(one) for name, one in value.items()}
            elif key in INNER_LISTS and isinstance(value, list):
                made[key] = [self._closed(one) for one in value]
            elif key in INNER_KEYS:
                made[key] = self._closed(value)
        return made

    def _close(self, made: Schema, properties: _Properties) -> Schema:
        names_any = properties.names or properties.patterns or any(key in made for key in NAMING_KEYS)
        if properties.explicit or not names_any:
            return made
        self._count(properties)
        own, patterns = _map(made, "properties"), _map(made, "patternProperties")
        if properties.names:
            made["properties"] = {name: own.get(name, True) for name in properties.names}
        if properties.patterns:
            made["patternProperties"] = {pattern: patterns.get(pattern, True) for pattern in properties.patterns}
        return made | {"additionalProperties": False}

    def properties(self, node: Any, depth: int) -> _Properties:
        """The properties that `node` and all that applies to the same value name."""
        if not isinstance(node, dict):
            return _Properties()
        if id(node) in self.properties_of:
            return self.properties_of[id(node)]
        found = self.properties_of[id(node)] = _own_properties(node)
        found.explicit |= "$ref" in node and self._referenced(node["$ref"]) is None
        for part in self._same_value(node, depth):
            other = self.properties(part, depth - 1)
            self._count(other)
            found.add(other)
        return found

    def _same_value(self, node: Any, depth: int) -> Iterator[Any]:
        """The other schemas that apply to the same value."""
        if not depth:
            raise SchemaTooComplex(f"at most {MAX_REFERENCES} references from one another")
        if isinstance(node, dict):
            yield from _same_value(node)
            if (target := self._referenced(node.get("$ref"))) is not None:
                yield target

    def _referenced(self, reference: Any) -> Any:
        """The schema that a local reference leads to; None for any other reference."""
        if not isinstance(reference, str) or reference[:2] not in ("#", "#/"):
            return None
        if reference not in self.resolved:
            self.resolved[reference] = self._resolve(reference)
        return self.resolved[reference]

    def _resolve(self, reference: str) -> Any:
        node: Any = self.root
        for step in unquote(reference[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            node = node.get(step) if isinstance(node, dict) else _item(node, step)
        return node if isinstance(node, dict) else None

    def _count(self, properties: _Properties) -> None:
        self.names += len(properties.names) + len(properties.patterns)
        if self.names > MAX_NAMES:
            raise SchemaTooComplex(f"at most {MAX_NAMES} names of properties put together")


def _own_properties(node: Schema) -> _Properties:
    """The properties that `node` itself names, in the order in which answers will have them. A required one may have no
    schema."""
    required = node.get("required")
    names = [*_map(node, "properties"), *(required if isinstance(required, list) else ())]
    patterns = dict.fromkeys(_map(node, "patternProperties"))
    explicit = any(key in node for key in EXPLICIT_KEYS)
    return _Properties(dict.fromkeys(name for name in names if isinstance(name, str)), patterns, explicit)


def _part_count(node: Schema) -> int:
    """How many parts a schema is composed of."""
    kinds_of_parts = (("$ref",), NAMING_KEYS, SAME_VALUE_KEYS, ("anyOf",), ("oneOf",))
    count = sum(any(key in node for key in keys) for keys in kinds_of_parts)
    branches = node.get("allOf")
    return count + (len(branches) if isinstance(branches, list) else 0)


def _same_value(node: Schema) -> Iterator[Any]:
    """The subschemas that apply to the same value as `node`."""
    for key in BRANCH_KEYS:
        yield from node[key] if isinstance(node.get(key), list) else ()
    yield from (node[key] for key in SAME_VALUE_KEYS if key in node)
    for key in SAME_VALUE_MAPS:
        yield from _map(node, key).values()


def _inner(node: Schema) -> Iterator[Any]:
    """The subschemas of values within the value of `node`."""
    for key in INNER_MAPS:
        yield from _map(node, key).values()
    for key in INNER_LISTS:
        yield from node[key] if isinstance(node.get(key), list) else ()
    yield from (node[key] for key in INNER_KEYS if key in node)


def _subschemas(root: Schema) -> Iterable[Schema]:
    """Every subschema that is an object."""
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += [*_same_value(node), *_inner(node)]


def _map(node: Schema, key: str) -> dict[str, Any]:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def _item(node: Any, step: str) -> Any:
    """The item of a list at an index of up to nine digits."""
    place = int(step) if step.isdecimal() and len(step) < 10 else -1
    return node[place] if isinstance(node, list) and 0 <= place < len(node) else None
