"""Runs the tests of `kernels/` in two processes side by side, whose Triton interprets kernels on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "kernels"
WHOLE = sorted(map(str, [*FOLDER.glob("test_decoder*.py"), *FOLDER.glob("test_graph*.py")]))  # half of the time
PARTS = sorted({str(file) for file in FOLDER.glob("test_*.py")} - set(WHOLE))


@pytest.mark.timeout(600)  # about a minute where nothing else runs
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("chosen", ["not redundant", pytest.param("redundant", marks=pytest.mark.redundant)])
def test_kernels_in_the_interpreter(chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [*command, *files], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for files in (WHOLE, PARTS)
    ]
    try:
        told = [run.communicate(timeout=590)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    # Of the redundant tests one process may have none.
    codes = {run.returncode for run in runs}
    assert 0 in codes and codes <= {0, pytest.ExitCode.NO_TESTS_COLLECTED}, "\n".join(text[-8000:] for text in told)
