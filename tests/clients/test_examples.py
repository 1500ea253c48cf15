"""The example that sweeps expert counts with lm-evaluation-harness."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.running import MODEL, ROOT
from tests.clients.tasks import write_tasks


def test_a_quality_sweep(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OPENAI_API_KEY": "unused"}.items():
        monkeypatch.setenv(name, value)
    write_tasks(tmp_path / "tasks")
    script = str(ROOT / "examples" / "quality_sweep.py")
    asked = [address, MODEL, "stories_choose", "1", "8", "--", "--include_path", "tasks"]
    done = subprocess.run([sys.executable, script, *asked], cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("stories_choose")]
    assert [row[:3] for row in rows if row[1] == "acc"] == [["stories_choose", "acc", count] for count in ("1", "8")]
