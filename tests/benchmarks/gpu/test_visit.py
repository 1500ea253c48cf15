"""A visit to a GPU runs dry on any machine: every part, its tables and its line of JSON. One that fails or hangs costs
itself alone."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.part import LOST, read_rows, shown, tables
from benchmarks.gpu.visit import NAMES

STAND_INS = """
import sys, time, types
from pathlib import Path
from benchmarks.gpu import visit

def slow(part):
    part.add("made", number=1)
    time.sleep(60)

def failing(part):
    part.add("made", number=2)
    raise ValueError("no such thing")

def deadly(part):
    import os
    os._exit(7)

for function in (slow, failing, deadly):
    module = sys.modules[f"benchmarks.gpu.{function.__name__}"] = types.ModuleType(function.__name__)
    module.run = function
out = Path(sys.argv[1])
print([visit.run(visit.Plan(name, 2), False, out)["state"] for name in ("slow", "failing", "deadly")])
"""


def run(*command: str) -> str:
    """What a Python process printed."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.redundant  # docs/gpu.md has it run before a visit
@pytest.mark.timeout(300)  # half a minute where nothing else runs
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_part_runs_dry(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    printed = run("-m", "benchmarks.gpu.visit", "--dry", "--out", str(out))
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert [(state["part"], state["state"]) for state in found["parts"]] == [(name, "ended") for name in NAMES]
    assert found["rows"] == read_rows(out) and {row["part"] for row in found["rows"]} == {*NAMES}
    assert [row for row in found["rows"] if row["table"] == LOST] == []
    assert [row for row in found["rows"] if row.get("holds") is False] == []
    assert all(f"## {name}: ended" in printed for name in NAMES) and "| not measured |" in printed


def test_a_part_that_hangs_fails_or_dies_is_named_and_costs_itself_alone(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    printed = run("-c", STAND_INS, str(out))
    assert printed.splitlines()[-1] == "['cut after 2 s', 'ended', 'died with exit status 7']"
    first, second, lost = read_rows(out)
    assert (first["number"], second["number"]) == (1, 2)
    assert (lost["what"], lost["why"]) == ("failing", "ValueError: no such thing")


def test_an_unknown_part_is_refused_by_name() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.visit", "--parts", "bits,speed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "there is no part 'speed'" in done.stderr


def test_tables_show_what_was_not_measured() -> None:
    rows: list[dict[str, Any]] = [
        {"part": "a", "table": "times", "us": 12.3456, "held": True},
        {"part": "a", "table": "times", "us": None},
    ]
    lines = tables(rows).splitlines()
    assert lines[0] == "**times**"
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == ["not measured", ""]
    assert [shown(value) for value in (1234.5, 0.12345, False, 7, "x")] == ["1,234", "0.123", "NO", "7", "x"]
