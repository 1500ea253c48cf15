"""The thread pool alone, under the thread sanitizer: `check_pool.cpp` beside this file. `make test-pool` runs more."""

import shutil
import subprocess
from pathlib import Path

import pytest

from model.backends.cpu.kernels.build import SOURCES


def test_random_jobs_on_random_nodes(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "check_pool"
    sources = [Path(__file__).with_name("check_pool.cpp"), SOURCES / "pool.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-pthread", "-fsanitize=thread", f"-I{SOURCES}"]
    done = subprocess.run([compiler, *flags, *sources, "-o", program], capture_output=True, text=True, check=False)
    if "tsan" in done.stderr:
        pytest.skip("no thread sanitizer")
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([program, "2000", "1"], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0 and ran.stdout == "passed\n", ran.stderr[-4000:]
