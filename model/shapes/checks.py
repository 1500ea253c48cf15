"""What the values of a decoder's shape are checked with. Every refusal names the field and the value."""

from math import isfinite
from typing import get_args

LARGEST = 1 << 24  # of any size; published models have contexts of 10 million tokens and vocabularies of one


def one_of(name: str, value: object, kind: object) -> None:
    """Raise ValueError unless `value` is one of the literals of `kind`."""
    if value not in get_args(kind):
        raise ValueError(f"{name} {value!r:.40} is not known, only {', '.join(get_args(kind))}")


def sizes(**values: object) -> None:
    """Raise ValueError unless every value is a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.40}")
        if value > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST}, got {value!r:.40}")


def naturals(**values: object) -> None:
    """Raise ValueError unless every value is a whole number of at least 0."""
    for name, value in values.items():
        if value != 0 or isinstance(value, bool):
            sizes(**{name: value})


def reals(**values: object) -> None:
    """Raise ValueError unless every value is a finite number, or None where it may be left out."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not number and value is not None:
            raise ValueError(f"{name} must be a finite number, got {value!r:.40}")


def positive(**values: float) -> None:
    """Raise ValueError unless every value is a finite number above zero."""
    for name, value in values.items():
        reals(**{name: value})
        if value is None or value <= 0:
            raise ValueError(f"{name} must be above zero, got {value!r:.40}")


def counts(trained: int, maximum: int) -> None:
    """Raise ValueError unless the trained expert count is at most the largest."""
    sizes(trained=trained, maximum=maximum)
    if trained > maximum:
        raise ValueError(f"the trained expert count {trained} is more than the largest, {maximum}")
