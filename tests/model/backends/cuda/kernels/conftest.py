"""These tests run kernels in Triton's interpreter, in processes of their own (`test_interpreted.py` starts them)."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import tests.triton_interpreter  # noqa: F401 - before the first kernel
else:
    collect_ignore_glob = ["test_*.py"]  # the interpreter must be chosen before triton is imported


@pytest.fixture(autouse=True)
def infinities() -> Iterator[None]:
    """Overflow is infinity and what is undefined no number, without a warning, as on a GPU."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated is full of NaN, or of 99."""
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        made = original(self, *shape, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 99)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products add in the order of the inner dimension, whatever the height and width of a tile.

    That is what the kernels expect of a GPU's instruction; numpy's own products may add in another order where a tile
    has another shape. So equal bits here mean that a kernel asks for the same sums in the same order.
    """
    from triton.runtime import interpreter

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        products = np.empty((len(b.data) + 1, *d.data.shape), np.float32)
        products[0] = d.data
        np.multiply(a.data.T[:, :, None], b.data[:, None, :], out=products[1:])
        return interpreter.TensorHandle(np.add.reduce(products, axis=0), d.dtype.scalar)  # row after row

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
