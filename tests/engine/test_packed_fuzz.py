"""Damaged packed models are read or refused; `make fuzz-packed` tries many more."""

import pytest

from model.backends.cpu.kernels.library import load
from tests import fuzz_packed

pytestmark = pytest.mark.skipif(not load().native, reason="native kernels are not loaded")


def test_damaged_packed_models_are_read_or_refused() -> None:
    assert 20 < fuzz_packed.run(60, seed=0, names=("topk", "infinity")) < 60
