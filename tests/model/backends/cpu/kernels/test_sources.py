"""The kernels' C++ sources: a header includes what it needs, and the kernels compile for sets of other processors."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from model.backends.cpu.kernels.build import COMMON, INSTRUCTION_SETS, KERNELS, SOURCES
from model.backends.cpu.kernels.library import cpu_flags, needs

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


def assert_compiles(*arguments: str) -> None:
    """Without optimisation, which takes most of a compiler's time."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    command = [compiler, *COMMON, "-Werror", "-O0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.redundant  # the two orders below find most of what a header lacks
@pytest.mark.parametrize("header", kernel_headers(), ids=lambda header: header.name)
def test_a_header_compiles_on_its_own(header: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.cpp"
    alone.write_text(f'#include "{header}"\n')
    assert_compiles("-fsyntax-only", str(alone))


@pytest.mark.parametrize("backwards", [False, True])
def test_headers_compile_in_either_order(backwards: bool, tmp_path: Path) -> None:
    """Of two headers, each is once the first: one that needs the other and does not include it fails there."""
    headers = sorted(kernel_headers(), reverse=backwards)
    together = tmp_path / "together.cpp"
    together.write_text("".join(f'#include "{header}"\n' for header in headers))
    assert_compiles("-fsyntax-only", str(together))


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "AMD64"), reason="the sets are those of x86")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_kernels_compile_for_a_set_that_this_processor_lacks(name: str, tmp_path: Path) -> None:
    """`make` builds only what can run here. An intrinsic that the flags of a set do not allow is found here as well."""
    if needs(name) <= cpu_flags():
        pytest.skip("it is built and run")
    assert_compiles(*INSTRUCTION_SETS[name], "-c", str(SOURCES / KERNELS), "-o", str(tmp_path / "kernels.o"))


def test_the_headers_with_torch_are_there() -> None:
    assert {header.name for header in SOURCES.glob("*.h")} >= WITH_TORCH
