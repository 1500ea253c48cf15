"""Everything here runs the native kernels: skipped where there are none. Each test starts and ends with two threads."""

from collections.abc import Iterator

import pytest
import torch

from model.backends.cpu.kernels.library import load


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    if not load().native:
        pytest.skip(f"no native kernels: {load().reason}")
    torch.ops.moedial.set_threads(2)
    yield
    torch.ops.moedial.set_threads(torch.get_num_threads())
