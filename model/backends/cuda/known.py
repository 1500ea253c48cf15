"""Fields of a shape that the kernels are not written for: a field that is new is refused by itself."""

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any


def unknown(shape: Any, known: Collection[str]) -> str | None:
    """The first field that is not known and not at its default, as the reason of a refusal; None if there is none."""
    for field in fields(shape):
        value = getattr(shape, field.name)
        if field.name not in known and (field.default is MISSING or value != field.default):
            return f"{type(shape).__name__}.{field.name} = {value!r:.60} has no GPU kernel"
    return None
