"""The thread pool and the working memory alone, under sanitizers: the `check_*.cpp` beside this file.

`make test-pool` runs the pool for longer.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from model.backends.cpu.kernels.build import SOURCES


def passes(program: Path, *arguments: str) -> None:
    """Run a compiled check, without the run-time of another sanitizer (`make test-sanitized`)."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [str(program), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0 and ran.stdout == "passed\n", ran.stderr[-4000:]


def compiled(folder: Path, name: str, sanitizer: str, *sources: str) -> Path:
    """The program of a check and of these sources of the kernels."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program, files = folder / name, [Path(__file__).with_name(f"{name}.cpp"), *(SOURCES / one for one in sources)]
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-pthread", f"-fsanitize={sanitizer}", f"-I{SOURCES}"]
    done = subprocess.run([compiler, *flags, *files, "-o", program], capture_output=True, text=True, check=False)
    if "tsan" in done.stderr or "ubsan" in done.stderr:
        pytest.skip(f"no {sanitizer} sanitizer")
    assert done.returncode == 0, done.stderr
    return program


def test_random_jobs_on_random_nodes(tmp_path: Path) -> None:
    passes(compiled(tmp_path, "check_pool", "thread", "pool.cpp"), "2000", "1")


def test_memory_that_is_given_back_is_found_again(tmp_path: Path) -> None:
    """Not under the address sanitizer, where every piece is an allocation of its own."""
    passes(compiled(tmp_path, "check_scratch", "undefined"))
