"""What a shape says that the kernels are not written for is refused by the name of its field."""

from dataclasses import dataclass, replace

from model.backends.cuda.known import unknown


@dataclass(frozen=True)
class Shape:
    width: int
    window: int = 0
    gated: bool = False


def test_a_field_that_is_not_known_must_have_its_default() -> None:
    shape = Shape(8, window=3)
    assert unknown(shape, ("width", "window")) is None
    assert unknown(shape, ("width",)) == "Shape.window = 3 has no GPU kernel"
    assert unknown(replace(shape, gated=True), ("width", "window")) == "Shape.gated = True has no GPU kernel"


def test_a_field_without_a_default_is_never_taken_unknown() -> None:
    assert unknown(Shape(8), ("gated",)) == "Shape.width = 8 has no GPU kernel"
