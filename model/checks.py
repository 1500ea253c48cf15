"""What the values of a decoder's shape are checked with. Every refusal names the field and the value."""

from typing import get_args


def one_of(name: str, value: object, kind: object) -> None:
    """Raise ValueError unless `value` is one of the literals of `kind`."""
    if value not in get_args(kind):
        raise ValueError(f"{name} {value!r:.40} is not known, only {', '.join(get_args(kind))}")


def sizes(**values: object) -> None:
    """Raise ValueError unless every value is a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.40}")


def counts(trained: int, maximum: int) -> None:
    """Raise ValueError unless the trained expert count is at most the largest."""
    sizes(trained=trained, maximum=maximum)
    if trained > maximum:
        raise ValueError(f"the trained expert count {trained} is more than the largest, {maximum}")
