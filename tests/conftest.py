"""Every test computes on one thread of torch's: its waiting threads spin, which slows whatever runs beside them."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read once, when torch is imported; the server sets it for its engine

import pytest
import torch

from model.backends.cpu.kernels.library import load

load()  # the kernels' own threads are as many as torch's were


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """An engine built by the test before may have set more."""
    torch.set_num_threads(1)
