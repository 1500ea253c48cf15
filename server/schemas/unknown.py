"""Which fields of a body nothing reads. It knows models and their fields, not what becomes of the names."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from server.schemas.base import SampledBody

MOST = 256  # different paths that are told of one body


def unknown_fields(kind: type[SampledBody], raw: Mapping[str, Any]) -> list[str]:
    """Those of the top level."""
    return [key for key in raw if key not in kind.model_fields and key not in kind.unsupported and key != "extra_body"]


def unknown_nested(body: BaseModel, raw: Mapping[str, Any]) -> list[str]:
    """Those further down that are not null, each path once and without places in lists: `messages[].weight`.

    `body` was read from `raw`, so the two have one shape; an object that no model describes, as a schema, is not
    looked into.
    """
    found: dict[str, None] = {}
    for _ in _parts(body, raw, "", found):
        if len(found) >= MOST:
            break
    return list(found)[:MOST]


def _parts(model: BaseModel, raw: Mapping[str, Any], path: str, found: dict[str, None]) -> Iterator[None]:
    """Goes from object to object, and adds what it finds."""
    known, nested = _fields(type(model))
    if path and not known.issuperset(raw):
        found |= dict.fromkeys(f"{path}.{key[:64]}" for key in raw if key not in known and raw[key] is not None)
    yield
    for name, key in nested:
        value, given, here = getattr(model, name), raw.get(key), f"{path}.{key}" if path else key
        pairs = [(value, given)]
        if isinstance(value, list) and isinstance(given, list):
            pairs, here = list(zip(value, given, strict=False)), here + "[]"
        for one, its in pairs:
            if isinstance(one, BaseModel) and isinstance(its, Mapping):
                yield from _parts(one, its, here, found)


@cache
def _fields(kind: type[BaseModel]) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    """The keys that a model reads or that ask nothing (`carried`); names and keys of the fields that hold models."""
    keys = {name: field.alias or name for name, field in kind.model_fields.items()}
    by_name = frozenset(keys) if kind.model_config.get("populate_by_name") else frozenset()
    nested = [(name, keys[name]) for name, field in kind.model_fields.items() if _holds_models(field.annotation)]
    return by_name.union(keys.values(), getattr(kind, "carried", ())), tuple(nested)


def _holds_models(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_holds_models(inner) for inner in get_args(annotation))
