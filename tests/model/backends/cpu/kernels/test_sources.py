"""The kernels' C++ sources: each header compiles on its own."""

import shutil
import subprocess
from pathlib import Path

import pytest

from model.backends.cpu.kernels.build import COMMON, SOURCES

WITH_TORCH = {
    "checks.h",
    "memory.h",
    "params.h",
    "mixture_params.h",
    "bind.h",
    "step_rules.h",
    "reports.h",
    "block_ops.h",
    "sampling_ops.h",
    "program.h",
}  # seconds each


def kernel_headers() -> list[Path]:
    """The headers of the kernels themselves, which know no torch."""
    return [header for header in sorted(SOURCES.glob("*.h")) if header.name not in WITH_TORCH]


@pytest.mark.parametrize("header", kernel_headers(), ids=lambda header: header.name)
def test_a_header_compiles_on_its_own(header: Path, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    alone = tmp_path / "alone.cpp"
    alone.write_text(f'#include "{header}"\n')
    command = [compiler, *COMMON, "-Werror", "-O0", "-fsyntax-only", str(alone)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_headers_with_torch_are_there() -> None:
    assert {header.name for header in SOURCES.glob("*.h")} >= WITH_TORCH
