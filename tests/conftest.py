"""Settings of all tests.

Each computes on one thread of torch's: its waiting threads spin, which slows whatever runs beside them. Property-based
tests draw the same examples in every run, so that a failure is there again in the next; `make test-all` draws new ones.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read once, when torch is imported; the server sets it for its engine

import pytest
import torch
from hypothesis import settings

from model.backends.cpu.kernels.library import load

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random")
settings.load_profile("repeatable")  # pytest --hypothesis-profile=random

gc.disable()  # until the tests are collected
load()  # the kernels' own threads are as many as torch's were

# `make test` gives each file to one process whole. The longest begin first, so that all processes end together.
LONGEST = (
    "engine/test_mixed_batch.py",
    "model/backends/cuda/test_interpreted.py",
    "e2e/test_bundled.py",
    "e2e/test_dial.py",
    "test_examples.py",
    "calibration/test_command.py",
    "calibration/test_expert_sets.py",
    "e2e/test_openai_client.py",
    "e2e/test_structured.py",
    "e2e/test_families.py",
    "engine/process/test_client.py",
    "server/test_start.py",
    "server/test_process.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Leave what was imported and collected out of all later garbage collections: they took a fifth of the tests'
    processor time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """An engine built by the test before may have set more."""
    torch.set_num_threads(1)
