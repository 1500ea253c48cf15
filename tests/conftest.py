"""Settings of all tests.

Each computes on one thread of torch's: its waiting threads spin, which slows whatever runs beside them. Property-based
tests draw the same examples in every run, so that a failure is there again in the next; `make test-all` draws new ones.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read once, when torch is imported; the server sets it for its engine

import pytest
import torch
from hypothesis import settings

from model.backends.cpu.kernels.library import load

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random")
settings.load_profile("repeatable")  # pytest --hypothesis-profile=random

load()  # the kernels' own threads are as many as torch's were


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """An engine built by the test before may have set more."""
    torch.set_num_threads(1)
