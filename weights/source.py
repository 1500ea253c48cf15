"""What a loader reads tensors from, whatever kind of file they are in. It opens no files."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from model.grouped import Grouped
from weights.files import Stored


class TensorSource(Protocol):
    """Tensors by the names that a family's rules have, as they are meant."""

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Every tensor; `Stored.form` says which `grouped` may return."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, ready to be copied into a parameter."""
        ...

    def read_into(self, name: str, target: Tensor) -> None:
        """One tensor that is stored as `target` is."""
        ...

    def grouped(self, name: str) -> Grouped | None:
        """Quantised matrices without widening them, or None where `read` alone has them.

        The shape is that of `stored`, with the last two dimensions exchanged where that is `turned`.
        """
        ...
