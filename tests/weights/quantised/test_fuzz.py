"""Damaged quantised matrices are read or refused; `make fuzz-quantised` tries many more."""

import random
from pathlib import Path

from tests import fuzz_quantised


def test_what_is_not_damaged_is_read(tmp_path: Path) -> None:
    fuzz_quantised.read_everything(tmp_path, *fuzz_quantised.sample(random.Random(0)))


def test_damaged_matrices_are_read_or_refused() -> None:
    assert 50 < fuzz_quantised.run(200, seed=0) < 200
