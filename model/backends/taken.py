"""What a backend has code for, as tables of fields and values, and what of a shape is not in them.

A table names every field of a shape that the backend reads, and where it knows only some values of it, these. A field
that is not named must have its default, so that what is added to a shape later is refused by itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

ANY: tuple[object, ...] = ()  # every value of a field

Values = Mapping[str, tuple[object, ...]]  # of one shape, by field


def any_of(*names: str) -> dict[str, tuple[object, ...]]:
    """These fields, whatever their values."""
    return dict.fromkeys(names, ANY)


def unknown(shape: Any, taken: Mapping[type, Values]) -> Iterator[str]:
    """Each field of a shape, and of the shapes in it, that has no code at its value."""
    known_fields = taken.get(type(shape))
    if known_fields is None:
        yield f"a {type(shape).__name__}"
        return
    for field in fields(shape):
        value = getattr(shape, field.name)
        known = known_fields.get(field.name, (_default(field),))
        if known != ANY and value not in known:
            yield f"{type(shape).__name__}.{field.name} is {value!r:.60}"
        elif is_dataclass(value):
            yield from unknown(value, taken)


def _default(field: "Field[Any]") -> object:
    """What the field is when it is not used; nothing equals it where there is no default."""
    return field.default if field.default is not MISSING else object()
