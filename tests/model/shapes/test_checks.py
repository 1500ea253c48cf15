"""What values of a shape are held to: every refusal names the field and the value."""

from collections.abc import Callable
from typing import Any, Literal

import pytest

from model.shapes.checks import LARGEST, counts, naturals, one_of, positive, reals, sizes


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (sizes, [1, LARGEST], [0, -1, 1.0, True, "1", None, LARGEST + 1]),
        (naturals, [0, 1, LARGEST], [-1, 0.5, False, True, None, LARGEST + 1]),
        (reals, [0, -1.5, None, 1e300], [float("nan"), float("inf"), True, "1"]),
        (positive, [1, 1e-9], [0, -1, None, float("nan")]),
    ],
)
def test_numbers(check: Callable[..., None], good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check(field=value)
    for value in bad:
        with pytest.raises(ValueError, match=r"^field must be ") as refused:
            check(field=value)
        assert repr(value) in str(refused.value)


def test_words() -> None:
    one_of("kind", "a", Literal["a", "b"])
    with pytest.raises(ValueError, match="kind 'c' is not known, only a, b"):
        one_of("kind", "c", Literal["a", "b"])


def test_expert_counts() -> None:
    counts(2, 2)
    with pytest.raises(ValueError, match="the trained expert count 3 is more than the largest, 2"):
        counts(3, 2)
