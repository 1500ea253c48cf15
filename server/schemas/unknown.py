"""Finds the fields of a body that nothing reads. It depends on models and their fields, not on what is done with the
names."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from server.schemas.base import SampledBody

MAX_PATHS = 256  # reported for one body


def unknown_fields(body_type: type[SampledBody], raw: Mapping[str, Any]) -> list[str]:
    """The unknown fields at the top level."""
    known = {*body_type.model_fields, *body_type.unsupported, "extra_body"}
    return [key for key in raw if key not in known]


def unknown_nested(body: BaseModel, raw: Mapping[str, Any]) -> list[str]:
    """The unknown fields further down that are not null, each path once, such as `messages[].weight`.

    `body` was parsed from `raw`, so that they have the same shape. Objects without a model, such as schemas, are not
    searched.
    """
    found: dict[str, None] = {}
    for _ in _search(body, raw, "", found):
        if len(found) >= MAX_PATHS:
            break
    return list(found)[:MAX_PATHS]


def _search(model: BaseModel, raw: Mapping[str, Any], path: str, found: dict[str, None]) -> Iterator[None]:
    """Add the unknown fields of one object after the other to `found`."""
    known, nested = _fields(type(model))
    if path and not known.issuperset(raw):
        unknown = [key for key in raw if key not in known and raw[key] is not None]
        found |= dict.fromkeys(f"{path}.{key[:64]}" for key in unknown)
    yield
    for name, key in nested:
        value, given = getattr(model, name), raw.get(key)
        here = f"{path}.{key}" if path else key
        pairs = [(value, given)]
        if isinstance(value, list) and isinstance(given, list):
            pairs, here = list(zip(value, given, strict=False)), here + "[]"
        for inner, inner_raw in pairs:
            if isinstance(inner, BaseModel) and isinstance(inner_raw, Mapping):
                yield from _search(inner, inner_raw, here, found)


@cache
def _fields(body_type: type[BaseModel]) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    """The keys that a model reads or may ignore; names and keys of the fields that hold models."""
    keys = {name: field.alias or name for name, field in body_type.model_fields.items()}
    by_name = frozenset(keys) if body_type.model_config.get("populate_by_name") else frozenset()
    fields = body_type.model_fields.items()
    nested = [(name, keys[name]) for name, field in fields if _holds_models(field.annotation)]
    return by_name.union(keys.values(), getattr(body_type, "ignored_fields", ())), tuple(nested)


def _holds_models(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_holds_models(inner) for inner in get_args(annotation))
