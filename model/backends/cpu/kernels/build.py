"""Compiles the kernels, once for each source, compiler flags and torch version.

Run it as `python -m model.backends.cpu.kernels.build`, for all instruction sets or with the names of some. Each set has
its own library; which one runs is chosen when it is loaded. Only the kernels themselves are compiled for each: the rest
is the same code for any processor, compiled once and linked into all that are built together.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model.topology import usable_cpus

SOURCES = Path(__file__).parent / "csrc"
BUILT = Path(__file__).parent / "built"  # by this module's command, for a checkout
PREBUILT = Path(__file__).parent / "prebuilt"  # in a wheel
LOST = """Without them the same models run on plain torch, which costs:
  - speed: prompts and answers take several times as long;
  - exactness: logits may differ in their last bits with what else is in the batch, which can turn a near-tie;
  - --quantize, which is refused.
Every other answer, field and setting is the same."""
COMMON = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall"]
# With checks -O3 and whole debug information take several times as long, and what is tested with them hardly gains:
# most of its time is the references' in Python.
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE = ["-O1", "-Wno-psabi", "-g1", "-fno-omit-frame-pointer", *CHECKS]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16", "vnni")), *_AVX2]
INSTRUCTION_SETS = {"avx512": _AVX512, "avxvnni": ["-mavxvnni", *_AVX2], "avx2": _AVX2, "portable": []}
EMULATABLE = ("avx512", "avxvnni")  # on AVX2
KERNELS = "kernels.cpp"  # the one source that is compiled for each instruction set
MAX_COMPILERS = 4  # at a time: each takes up to a gigabyte


class BuildError(Exception):
    """The kernels could not be compiled; the text is for a person."""


def sanitized() -> bool:
    """Whether the kernels are to be built with address and undefined-behaviour checks (for tests)."""
    return os.environ.get("MOEDIAL_KERNELS_SANITIZE", "") == "1"


def emulation(name: str) -> Path | None:
    """The header that replaces the instructions of this set by those of AVX2, where one is asked for (for tests)."""
    header = os.environ.get("MOEDIAL_KERNELS_EMULATE", "")
    return Path(header).resolve() if header and name in EMULATABLE else None


def cache_folder() -> Path:
    """Where a server that finds no library for its machine compiles one."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "moedial" / "kernels"


def library(name: str, folder: Path | None = None) -> Path:
    """Where the library of an instruction set lies once it is built: its name changes with everything it depends on.

    The version of torch counts without its suffix: builds for CPUs and for GPUs have the same C++ interface.
    """
    version, _, _ = torch.__version__.partition("+")
    digest = hashlib.sha256(f"{version} {_flags(name)}".encode())
    header = emulation(name)
    for source in [*sorted(SOURCES.iterdir()), *([header] if header else [])]:
        digest.update(source.name.encode() + source.read_bytes())
    return (folder or BUILT) / f"{name}-{digest.hexdigest()[:16]}.so"


def found(name: str) -> list[Path]:
    """The libraries of an instruction set that exist, in the order in which they are tried."""
    file = library(name).name
    return [folder / file for folder in (BUILT, PREBUILT, cache_folder()) if (folder / file).exists()]


def origin(path: Path) -> str:
    """How a library came to be, in words."""
    return {BUILT: "built here", PREBUILT: "prebuilt"}.get(path.parent, f"compiled into {path.parent}")


def _flags(name: str) -> list[str]:
    if header := emulation(name):
        # -O1 takes a third of the time; no other code calls functions with these vectors, whose convention may change.
        emulated = ["-O1", "-Wno-psabi", f"-DEMULATED_{name.upper()}=1", "-include", str(header)]
        return [*_common_flags(), *_AVX2, *emulated]
    return [*_common_flags(), *INSTRUCTION_SETS[name]]


def _common_flags() -> list[str]:
    return COMMON + (SANITIZE if sanitized() else [])


def build(name: str, folder: Path | None = None) -> Path:
    """Compile one library into `folder`, unless it is there.

    Raises:
        BuildError: no compiler, or it refused; or the folder cannot be written.
    """
    _build([name], folder or BUILT)
    return library(name, folder)


def _build(names: Iterable[str], folder: Path) -> None:
    """Compile those libraries that are missing."""
    targets = {name: path for name in names if not (path := library(name, folder)).exists()}
    if not targets:
        return
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler was found (g++ or c++, or name one in CXX)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = _compile_all(compiler, targets, Path(scratch))
            for name, target in targets.items():
                made = Path(scratch) / target.name
                _run([compiler, *_flags(name), *objects[name], "-shared", "-o", str(made), *_libraries()])
                made.replace(target)  # at once: another process may be loading
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}") from None


def _compile_all(compiler: str, names: Iterable[str], scratch: Path) -> dict[str, list[str]]:
    """The object files of each library, compiled side by side."""
    shared = [source for source in sorted(SOURCES.glob("*.cpp")) if source.name != KERNELS]
    own = {str(scratch / f"{name}.o"): (SOURCES / KERNELS, _flags(name)) for name in names}
    common = {str(scratch / f"{source.stem}.o"): (source, _common_flags()) for source in shared}

    def compile_one(item: tuple[str, tuple[Path, list[str]]]) -> None:
        made, (source, flags) = item
        _run([compiler, *flags, *_includes(), "-c", str(source), "-o", made])

    with ThreadPoolExecutor(max_workers=min(MAX_COMPILERS, len(usable_cpus()))) as pool:
        list(pool.map(compile_one, (common | own).items()))
    return {name: [str(scratch / f"{name}.o"), *common] for name in names}


def _includes() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]


def _libraries() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"the compiler could not be run: {error}") from None
    if done.returncode:
        raise BuildError(f"the compiler failed:\n{done.stderr.strip()[-2000:]}")


def build_all(folder: Path | None = None) -> None:
    """Compile for every instruction set that this compiler and machine type know. Raises as `build`."""
    x86 = os.uname().machine in ("x86_64", "AMD64")
    _build(INSTRUCTION_SETS if x86 else ["portable"], folder or BUILT)


def main(sets: list[str]) -> None:
    """Build these libraries, or all, and say so. A server without any runs on torch alone: no compiler is no error."""
    if unknown := [name for name in sets if name not in INSTRUCTION_SETS]:
        sys.exit(f"{unknown[0]!r:.40} is no instruction set of the kernels: {', '.join(INSTRUCTION_SETS)}")
    try:
        if sets:
            _build(sets, BUILT)
        else:
            build_all()
        print(f"native kernels are in {BUILT}")
    except BuildError as error:
        print(f"native kernels were not built, the server will run on torch alone: {error}\n{LOST}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
