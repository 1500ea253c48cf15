"""What torch's tracing is told of each op: its shapes without running it, and which arguments it changes."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.model.backends.cpu.kernels.arguments import OPS, arguments, run


@pytest.mark.parametrize("op", OPS)
def test_shapes_without_running(op: str) -> None:
    real = run(op, arguments(op))
    given = arguments(op)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        for name, value in given.items():
            given[name] = mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        fake = run(op, given)
    for ours, theirs in zip(as_tuple(fake), as_tuple(real), strict=True):
        assert ours.dtype == theirs.dtype and ours.dim() == theirs.dim()
        for size, expected in zip(ours.shape, theirs.shape, strict=True):
            assert isinstance(size, torch.SymInt) or size == expected  # the number of pairs depends on the counts


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


@pytest.mark.parametrize("op", OPS)
def test_ops_change_what_their_schema_says(op: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.moedial, op).default, tuple(arguments(op).values()), test_utils=("test_schema",)
    )
