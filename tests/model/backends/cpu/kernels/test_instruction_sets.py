"""The same tests on the instruction sets that this process has not chosen, since other machines run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.backends.cpu.kernels.build import INSTRUCTION_SETS, library
from model.backends.cpu.kernels.library import cpu_flags, load, needs

ROOT = Path(__file__).parents[5]


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_products_on_another_instruction_set(name: str) -> None:
    """Each set's own instructions are in its products; `make test-all` runs the rest on them as well."""
    on_another(name, "test_linear.py", "test_grouped.py")


@pytest.mark.slow
@pytest.mark.redundant  # the rest is the same source over other vectors
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_on_another_instruction_set(name: str) -> None:
    on_another(name)


def on_another(name: str, *files: str) -> None:
    """The tests of this folder, or of some of its files, in a process that runs on the set."""
    if name == load().name or os.environ.get("MOEDIAL_KERNELS", "auto") != "auto":
        pytest.skip("the tests beside this one run on it, or one was asked for")
    if not needs(name) <= cpu_flags() or not library(name).exists():
        pytest.skip(f"this machine cannot run {name}, or it is not built")
    tests = [str(Path(__file__).parent / file) for file in files or ("",)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *tests]
    environment = os.environ | {"MOEDIAL_KERNELS": name, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
