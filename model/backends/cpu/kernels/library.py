"""Loads the compiled kernels that fit this machine, or says why there are none. Nothing is built here.

`MOEDIAL_KERNELS` chooses: `auto` (the default), `off`, or the name of an instruction set.
"""

import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from model.backends.cpu.kernels import threads
from model.backends.cpu.kernels.build import INSTRUCTION_SETS, emulation, found, origin

NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "f16c"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set[str](),
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """What this process runs on: an instruction set, or "torch" and the reason. `origin`: how it was compiled."""

    name: str
    reason: str = ""
    origin: str = field(default="", compare=False)

    @property
    def native(self) -> bool:
        return self.name != "torch"


@cache
def load() -> Kernels:
    """Load the library, once per process.

    Raises:
        ValueError: MOEDIAL_KERNELS names no instruction set, or one that this machine or installation lacks, or
            MOEDIAL_NODES no nodes.
    """
    wanted = candidates()
    if not wanted:
        return Kernels("torch", "MOEDIAL_KERNELS is off")
    loaded = Kernels("torch", "the native kernels are not built: python -m model.backends.cpu.kernels.build")
    libraries = [(name, path) for name in wanted for path in found(name)]
    for name, path in libraries:
        loaded = _load(name, path)
        if loaded.native:
            return replace(loaded, origin=origin(path))
    if not libraries and asked() != "auto":
        raise ValueError(
            f"MOEDIAL_KERNELS asks for {asked()}, which is not built: python -m model.backends.cpu.kernels.build"
        )
    return loaded


def asked() -> str:
    """What MOEDIAL_KERNELS says."""
    return os.environ.get("MOEDIAL_KERNELS", "auto")


def candidates() -> list[str]:
    """The instruction sets to try, best first; none where they are switched off.

    Raises:
        ValueError: MOEDIAL_KERNELS names no instruction set, or one that this machine lacks.
    """
    if (wanted := asked()) == "off":
        return []
    if wanted != "auto" and wanted not in INSTRUCTION_SETS:
        raise ValueError(f"MOEDIAL_KERNELS is {wanted!r:.40}, not auto, off, {', '.join(INSTRUCTION_SETS)}")
    able = [name for name in INSTRUCTION_SETS if needs(name) <= cpu_flags()]
    if wanted != "auto" and wanted not in able:
        raise ValueError(f"MOEDIAL_KERNELS asks for {wanted}, but this machine can only run {', '.join(able)}")
    return able if wanted == "auto" else [wanted]


def needs(name: str) -> set[str]:
    """What the processor must be able to do for this set, in Linux' names."""
    return NEEDS["avx2"] if emulation(name) else NEEDS[name]


def _load(name: str, path: Path) -> Kernels:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Kernels("torch", f"the native kernels could not be loaded: {error.__cause__ or error}")
    import model.backends.cpu.kernels.fake  # noqa: F401 - shapes for torch's tracing, registered on import

    threads.arrange()
    threads.use(torch.get_num_threads())
    return Kernels(name)


def cpu_flags() -> set[str]:
    """What the processor can do, in Linux' names; empty where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.partition(":")[2].split())
