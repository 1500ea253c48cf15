"""Reading config.json's `quantization_config`: every field that is set must be known. It does not depend on a
format."""

from collections.abc import Collection, Mapping
from typing import Any

from model.errors import CheckpointError

_UNSET: tuple[object, ...] = (None, False, 0, "", [], {})  # values that say no more than an absent field


def expect(quantisation: Mapping[str, Any], field: str, *values: object, default: object = None) -> Any:
    """The value of a field, one of those that are known; absent or null: `default`.

    Raises:
        CheckpointError: it has another one.
    """
    found = quantisation.get(field)
    found = default if found is None else found
    if not any(found == value and type(found) is type(value) for value in values):
        known = ", ".join(map(repr, values))
        raise CheckpointError(f"config.json: quantization_config's {field} is {found!r:.80}; known: {known}")
    return found


def whole(quantisation: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A field that is a positive number, or -1.

    Raises:
        CheckpointError: it is none.
    """
    found = quantisation.get(field, default)
    if type(found) is not int or not (found == -1 or 0 < found < 1 << 30):
        raise CheckpointError(f"config.json: quantization_config's {field} is {found!r:.80}, not a number of inputs")
    return found


def fields_of(quantisation: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """A field that is an object; none, where it says no more than an absent one.

    Raises:
        CheckpointError: it is no object.
    """
    found = quantisation.get(field)
    if found in _UNSET:
        return {}
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: quantization_config's {field} is {found!r:.80}, not an object")
    return found


def refuse_unknown(quantisation: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise CheckpointError where a field is set that is not among those `known`."""
    for field, value in quantisation.items():
        if field not in known and value not in _UNSET:
            raise CheckpointError(f"config.json: quantization_config's {field} is not known; it is {value!r:.80}")
