"""The shares that are won back, on a checkpoint where everything can be."""

from pathlib import Path

import pytest

from benchmarks.repairs import cells, rows_of
from calibration.options import Options
from tests.calibration.checkpoints import write_text
from tests.calibration.runs import equal_experts


def test_what_is_pure_scale_is_won_back_whole(tmp_path: Path) -> None:
    folder = equal_experts(tmp_path / "model")
    text = write_text(tmp_path / "text.txt")
    rows = rows_of("tiny", Options(model=str(folder), text=[text], minutes=0.02, output=tmp_path), 0)
    found = {row["budget"]: row for row in rows}
    assert set(found) == {"trained count", "half", "half, kept", "half, repair", "half, kept and repair"}
    assert found["trained count"]["loss_won_back"] == found["trained count"]["kl_won_back"] == 1.0
    assert found["half"]["loss_won_back"] == found["half"]["kl_won_back"] == 0.0
    for budget in ("half, kept", "half, repair"):
        assert found[budget]["kl_won_back"] == pytest.approx(1, abs=0.01)
        assert found[budget]["mean_count"] == 1.0
    assert found["half, kept and repair"]["kl_won_back"] < 0.9  # tables are fitted to the family's rule
    assert cells(found["half"])[-2:] == ["0%", "0%"]
