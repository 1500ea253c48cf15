"""One quantised tensor: which stored tensors it consists of, and how it is computed from them. It does not depend on a
format."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from model.grouped import Grouped
from weights.files import Stored


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A tensor that is stored as several.

    Attributes:
        names: the stored tensors that it is computed from.
        stored: the dtype and shape of what is meant, and its form as `Grouped`.
        dense: computes the tensor from the stored ones, in order.
        grouped: the same without widening; None where the values do not fit `Grouped`.
    """

    names: tuple[str, ...]
    stored: Stored
    dense: Callable[..., Tensor]
    grouped: Callable[..., Grouped | None] | None = None
