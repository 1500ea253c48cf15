"""Kernels for installations that have none built: where they are looked for, when one is compiled, and what is said."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.backends.cpu.kernels import build, library
from model.backends.cpu.kernels.build import INSTRUCTION_SETS, cache_folder
from model.backends.cpu.kernels.library import Kernels, load
from model.backends.cpu.kernels.provide import provide


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An installation without a library, on a processor that can do everything; loading is replaced by success."""
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MOEDIAL_KERNELS", raising=False)
    monkeypatch.delenv("MOEDIAL_KERNELS_SANITIZE", raising=False)
    monkeypatch.delenv("MOEDIAL_KERNELS_EMULATE", raising=False)
    monkeypatch.setattr(library, "cpu_flags", lambda: set().union(*library.NEEDS.values()))
    monkeypatch.setattr(library, "_load", lambda name, path: Kernels(name))
    load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    load.cache_clear()
    load()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, bare: Path) -> Path:
    """A compiler that writes an empty library and notes that it was called; returns its notes."""
    program, calls = bare / "compiler", bare / "calls"
    program.write_text(f'#!/bin/sh\necho called >> {calls}\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    calls.touch()
    return calls


def placed(name: str, folder: Path) -> Path:
    """An empty library of an instruction set, there."""
    path = build.library(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_what_a_wheel_brought_is_used_and_nothing_is_compiled(
    bare: Path, compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placed("avx2", build.PREBUILT)
    kernels = provide()
    assert (kernels.name, kernels.origin) == ("avx2", "prebuilt") and not compiler.read_text()
    assert "kernels for avx512, which are not here" in caplog.text and "those for avx2 run" in caplog.text
    caplog.clear()
    placed("avx512", build.BUILT)
    load.cache_clear()
    assert provide().name == "avx512" and not caplog.text


def test_what_was_built_here_comes_first(bare: Path, compiler: Path) -> None:
    for folder in (cache_folder(), build.PREBUILT, build.BUILT):
        placed("avx512", folder)
    assert build.found("avx512") == [build.library("avx512", f) for f in (build.BUILT, build.PREBUILT, cache_folder())]
    assert provide().origin == "built here"


def test_the_best_set_is_compiled_once_into_the_cache(bare: Path, compiler: Path) -> None:
    kernels = provide()
    assert (
        kernels.name == next(iter(INSTRUCTION_SETS)) and kernels.origin == f"compiled into {bare}/cache/moedial/kernels"
    )
    load.cache_clear()
    assert provide() == kernels
    assert len(compiler.read_text().splitlines()) == len(list(build.SOURCES.glob("*.cpp"))) + 1  # and a link


def test_the_set_that_is_asked_for_is_compiled(bare: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAL_KERNELS", "portable")
    assert provide().name == "portable" and compiler.read_text()


def test_nothing_is_compiled_where_kernels_are_off(bare: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAL_KERNELS", "off")
    assert provide() == Kernels("torch", "MOEDIAL_KERNELS is off") and not compiler.read_text()


def test_what_cannot_be_loaded_here_is_compiled_again(
    bare: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a system whose C library is older than the one that the wheel was built with."""
    broken = placed("avx512", build.PREBUILT)
    fault = Kernels("torch", "the native kernels could not be loaded: GLIBC_9.99 is not there")
    monkeypatch.setattr(library, "_load", lambda name, path: fault if path == broken else Kernels(name))
    assert provide().origin.startswith("compiled into ")
    assert "GLIBC_9.99" in caplog.text


def test_without_a_compiler_it_says_exactly_what_is_lost(
    bare: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    kernels = provide()
    assert not kernels.native and "are not built" in kernels.reason
    assert "no C++ compiler was found" in caplog.text
    assert all(word in caplog.text for word in ("speed", "exactness", "--quantize"))


def test_a_cache_that_cannot_be_written_is_a_reason(
    bare: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (bare / "cache").write_text("a file in its place")
    assert not provide().native
    assert f"{bare}/cache/moedial/kernels cannot be written" in caplog.text


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == Path("/home/ada/.cache/moedial/kernels")


def test_builds_of_torch_for_cpus_and_gpus_share_their_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for version in ("2.13.0", "2.13.0+cpu", "2.13.0+cu130"):
        monkeypatch.setattr(build.torch, "__version__", version)
        names.add(build.library("avx2"))
    assert len(names) == 1


def test_what_is_compiled_is_loaded_although_there_was_no_library_before(bare: Path, compiler: Path) -> None:
    assert not load().native  # asked before there is a library, as by a refusal
    assert provide().native and load().native and compiler.read_text()
