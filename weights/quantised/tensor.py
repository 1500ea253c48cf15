"""One quantised tensor: which stored tensors it consists of, and how it is computed from them. It knows no format."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from model.grouped import GROUPS, Grouped
from weights.files import Stored


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A tensor that is stored as several.

    Attributes:
        names: the stored tensors that it is computed from.
        stored: the dtype and shape of what is meant, and its bytes as `Grouped`.
        dense: computes the tensor from the stored ones, in order.
        grouped: the same without widening; None where the values do not fit `Grouped`.
    """

    names: tuple[str, ...]
    stored: Stored
    dense: Callable[..., Tensor]
    grouped: Callable[..., Grouped | None] | None = None


def grouped_bytes(shape: tuple[int, ...], bits: int, group: int, minimum: bool = False, factor: bool = False) -> int:
    """Bytes of matrices [..., n, k] as `Grouped` with such codes and groups."""
    *batch, k = shape
    outputs = 1
    for size in batch:
        outputs *= size
    return outputs * (k * bits // 8 + k // group * (4 if minimum else 2) + (4 if factor else 0))


def group_within(k: int, run: int) -> int | None:
    """The largest of `GROUPS` that divides k inputs and a run of so many neighbours with one scale; None if none
    does."""
    return next((group for group in reversed(GROUPS) if k % group == 0 and run % group == 0), None)
