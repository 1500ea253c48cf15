"""The command as a process: Ctrl-C and a kill leave partial results, from which the next run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibration.partial import FILE as PARTIAL
from tests.calibration.checkpoints import two_experts
from weights import calibration as files

SECONDS = 60
COMMAND = [sys.executable, "-c", "from server.cli import main; main()", "calibrate"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command on a folder; some seconds of work."""
    command = [*COMMAND, str(folder), "--no-searches", "--minutes", "0.2", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.redundant)]
)
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, number: int, status: int) -> None:
    folder = two_experts(tmp_path / "model")
    first = start(folder)
    wait_for(folder / PARTIAL, first)
    os.kill(first.pid, number)
    _, told = first.communicate(timeout=SECONDS)
    assert first.returncode == status
    assert (number == signal.SIGKILL) or "moedial: stopped; the same command goes on from here" in told
    assert "Traceback" not in told
    assert not (folder / files.FILE).exists()

    second = start(folder)
    table, told = second.communicate(timeout=SECONDS)
    assert second.returncode == 0, told
    assert f"going on from {folder / PARTIAL}" in told
    assert "k6" in table and "area under the hull" in table
    assert files.read(folder / files.FILE, files.checkpoint_hash(folder)).trained == 4
    assert not (folder / PARTIAL).exists()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the process has made a file."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    process = start(two_experts(tmp_path), "--counts", "1,99")
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert told == "moedial: --counts must be between 1 and 6 for this model, got 99\n"
