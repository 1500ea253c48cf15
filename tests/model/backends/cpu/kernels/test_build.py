"""How kernels are compiled and chosen: what changes a library's name, and what is said where there is none."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from model.backends.cpu.kernels import build, library
from model.backends.cpu.kernels.build import INSTRUCTION_SETS, BuildError
from model.backends.cpu.kernels.library import Kernels

choose = library.load.__wrapped__  # without the memory of what this process has loaded


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installation without a library; returns where they would be."""
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MOEDIAL_KERNELS", raising=False)
    monkeypatch.delenv("MOEDIAL_KERNELS_SANITIZE", raising=False)
    monkeypatch.delenv("MOEDIAL_KERNELS_EMULATE", raising=False)
    return tmp_path / "built"


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that can do everything."""
    monkeypatch.setattr(library, "cpu_flags", lambda: set().union(*library.NEEDS.values()))


def test_a_librarys_name_changes_with_all_that_it_is_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing_built: Path
) -> None:
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    build.SOURCES.mkdir()
    source = build.SOURCES / "a.cpp"
    source.write_text("int one;")
    names = [build.library("portable")]
    assert build.library("portable") == names[0]
    names.append(build.library("avx2"))
    source.write_text("int two;")
    names.append(build.library("portable"))
    source.rename(build.SOURCES / "b.cpp")
    names.append(build.library("portable"))
    monkeypatch.setenv("MOEDIAL_KERNELS_SANITIZE", "1")
    names.append(build.library("portable"))
    monkeypatch.setattr(build.torch, "__version__", "99.0")
    names.append(build.library("portable"))
    monkeypatch.setattr(build, "COMMON", [*build.COMMON, "-g"])
    names.append(build.library("portable"))
    assert len(set(names)) == len(names) == 7
    assert all(name.parent == nothing_built for name in names)


def test_sets_are_emulated_where_a_test_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing_built: Path, calls: Path
) -> None:
    """By those of AVX2, which the machine must have; the other sets stay as they are."""
    loads(monkeypatch)
    monkeypatch.setattr(library, "cpu_flags", lambda: {"avx2", "fma", "f16c"})
    real, plain = build.library("avx512"), build.library("avx2")
    header = tmp_path / "emulated.h"
    header.write_text("int one;")
    monkeypatch.setenv("MOEDIAL_KERNELS_EMULATE", str(header))
    first = build.library("avx512")
    header.write_text("int two;")
    assert len({real, first, build.build("avx512")}) == 3 and build.library("avx2") == plain
    assert choose() == Kernels("avx512")
    (compiled,) = (call for call in calls.read_text().splitlines() if "kernels.cpp" in call)
    assert f"-DEMULATED_AVX512=1 -include {header}" in compiled and "-mavx512" not in compiled
    monkeypatch.setattr(library, "cpu_flags", set)
    assert library.candidates() == ["portable"]


def test_the_command_builds_only_the_named_sets(monkeypatch: pytest.MonkeyPatch, nothing_built: Path) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(build, "_build", lambda names, folder: asked.append([*names]))
    build.main(["avx2", "portable"])
    assert asked == [["avx2", "portable"]]
    with pytest.raises(
        SystemExit, match="'avx9' is no instruction set of the kernels: avx512, avxvnni, avx2, portable"
    ):
        build.main(["avx2", "avx9"])
    assert len(asked) == 1


def test_without_a_compiler_it_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, nothing_built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found"):
        build.build("portable")
    build.main([])
    said = capsys.readouterr().err
    assert said.startswith(
        "native kernels were not built, the server will run on torch alone: no C++ compiler was found"
    )
    assert choose() == Kernels("torch", "the native kernels are not built: python -m model.backends.cpu.kernels.build")


def test_a_compiler_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing_built: Path
) -> None:
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="the compiler failed:\nno such flag"):
        build.build("portable")
    compiler.write_text("not a program")
    with pytest.raises(BuildError, match="the compiler could not be run"):
        build.build("portable")
    assert list(nothing_built.iterdir()) == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that writes empty files; returns the file of its arguments, a line for each call."""
    compiler, calls = tmp_path / "counting", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return calls


def test_each_source_is_compiled_once_and_the_kernels_alone_for_their_processor(
    nothing_built: Path, calls: Path
) -> None:
    assert build.build("avx2") == build.build("avx2") == build.library("avx2")
    *compiled, linked = sorted(calls.read_text().splitlines(), key=lambda call: "-shared" in call)
    sources = {path.name for path in build.SOURCES.glob("*.cpp")}
    assert len(compiled) == len(sources) and all(any(name in call for call in compiled) for name in sources)
    assert all(("-mavx2 -mfma" in call) == ("kernels.cpp" in call) and "-mavx512" not in call for call in compiled)
    assert all(f"/{name.removesuffix('.cpp')}.o" in linked for name in sources - {"kernels.cpp"})
    assert "/avx2.o" in linked
    assert [path.name for path in nothing_built.iterdir()] == [build.library("avx2").name]


def test_all_sets_share_what_is_the_same_for_any_processor(
    monkeypatch: pytest.MonkeyPatch, nothing_built: Path, calls: Path
) -> None:
    monkeypatch.setattr(build.os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    build.library("avx2").parent.mkdir()
    build.library("avx2").touch()  # it is there already
    build.build_all()
    called = calls.read_text().splitlines()
    assert sum("ops.cpp" in call for call in called) == 1
    assert sum("kernels.cpp" in call for call in called) == len(INSTRUCTION_SETS) - 1
    assert sorted(nothing_built.iterdir()) == sorted(build.library(name) for name in INSTRUCTION_SETS)


def test_off_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAL_KERNELS", "off")
    assert choose() == Kernels("torch", "MOEDIAL_KERNELS is off") and not choose().native


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAL_KERNELS", "neon")
    with pytest.raises(ValueError, match="MOEDIAL_KERNELS is 'neon', not auto, off, avx512, avxvnni, avx2, portable"):
        choose()


def test_what_the_processor_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, nothing_built: Path) -> None:
    monkeypatch.setattr(library, "cpu_flags", lambda: {"avx2", "fma", "f16c"})
    monkeypatch.setenv("MOEDIAL_KERNELS", "avx512")
    with pytest.raises(ValueError, match="asks for avx512, but this machine can only run avx2, portable"):
        choose()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_what_is_asked_for_and_not_built_is_refused(
    monkeypatch: pytest.MonkeyPatch, nothing_built: Path, able: None, name: str
) -> None:
    monkeypatch.setenv("MOEDIAL_KERNELS", name)
    with pytest.raises(
        ValueError, match=f"asks for {name}, which is not built: python -m model.backends.cpu.kernels.build"
    ):
        choose()


def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the loading itself: a process can do that once."""
    loaded: list[Path] = []
    monkeypatch.setattr(library, "_load", lambda name, path: loaded.append(path) or Kernels(name))
    return loaded


def test_the_best_that_is_built_and_fits_is_chosen(
    monkeypatch: pytest.MonkeyPatch, nothing_built: Path, able: None
) -> None:
    loaded = loads(monkeypatch)
    nothing_built.mkdir()
    for name in reversed(INSTRUCTION_SETS):
        build.library(name).touch()
        assert choose() == Kernels(name) and choose().native
    monkeypatch.setattr(library, "cpu_flags", set)
    assert choose() == Kernels("portable")
    assert loaded == [
        build.library(name)
        for name in ("portable", "portable", "avx2", "avx2", "avxvnni", "avxvnni", "avx512", "avx512", "portable")
    ]


def test_the_one_that_is_asked_for_is_chosen(monkeypatch: pytest.MonkeyPatch, nothing_built: Path, able: None) -> None:
    loads(monkeypatch)
    nothing_built.mkdir()
    for name in INSTRUCTION_SETS:
        build.library(name).touch()
    for name in INSTRUCTION_SETS:
        monkeypatch.setenv("MOEDIAL_KERNELS", name)
        assert choose() == Kernels(name)


def test_a_library_that_cannot_be_loaded_is_a_reason(nothing_built: Path, able: None) -> None:
    nothing_built.mkdir()
    build.library("avx512").write_text("no library")
    found = choose()
    assert found.name == "torch" and found.reason.startswith("the native kernels could not be loaded: ")


def test_processor_flags_are_unknown_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> str:
        raise FileNotFoundError(path)

    assert all(flag == flag.strip() and flag for flag in library.cpu_flags())
    monkeypatch.setattr(Path, "read_text", fails)
    assert library.cpu_flags() == set()
