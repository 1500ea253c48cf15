"""Memory that is allocated but not written holds values that show when they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """What `new_empty` gives is full of what is not a number, or of 99."""
    original = Tensor.new_empty

    def new_empty(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = original(self, *shape, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 99)

    Tensor.new_empty = new_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.new_empty = original  # type: ignore[method-assign]
