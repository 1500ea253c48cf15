"""ik_llama.cpp as a system: llama.cpp's fork with kernels of its own, through its library in a process of its own.

It does not support OLMoE: such a checkpoint is given to it as the Qwen3-MoE of the same shape, with the same experts
and matrices. llama.cpp's converter writes the file, the fork's own quantiser packs it. The build is the one that
Python's package index has, for AVX2: on processors with more than that, it is not the fork's best. It does not use
moedial.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.peers import IK_LLAMACPP, LLAMACPP, installed, python
from benchmarks.systems.llamacpp import FAMILIES, WARM_UP, architecture, as_bf16, call, made, measured, parse
from benchmarks.systems.system import Rates, Weights
from benchmarks.workload import OUTPUT, PROMPT

DRIVER = Path(__file__).parent / "ik_driver.py"

IkKind = Literal["bf16", "q8_0", "q4_0", "q4_k_m", "iq4_ks"]
IK_WEIGHTS: dict[IkKind, Weights] = {
    "bf16": "bf16",
    "q8_0": "8 bit",
    "q4_0": "4 bit",
    "q4_k_m": "4 bit",
    "iq4_ks": "4 bit",
}


class IkLlamaCpp:
    """ik_llama.cpp with weights in bf16, or as its own quantiser makes them; repacked when they are loaded."""

    def __init__(self, kind: IkKind) -> None:
        self.name = f"ik_llama.cpp {kind}"
        self.weights = IK_WEIGHTS[kind]
        self.file = ""
        self._kind = kind

    def version(self) -> str:
        return f"{installed(IK_LLAMACPP)}, built for AVX2"

    def refuses(self, config: dict[str, Any]) -> str | None:
        for folder in (IK_LLAMACPP, LLAMACPP):
            if not installed(folder):
                return f"{folder.name} is not installed (make bench-peers)"
        if config["model_type"] not in FAMILIES:
            return f"it does not know {config['model_type']}"
        return "its Qwen3-MoE has no tied head" if config.get("tie_word_embeddings") else None

    @contextmanager
    def open(self, folder: Path, count: int) -> Iterator["IkSession"]:
        yield IkSession(self._as_file(folder), count)

    def _as_file(self, folder: Path) -> Path:
        """The checkpoint as a file with such weights, made once a run."""
        file = as_bf16(folder, "qwen3_moe")
        if self._kind == "bf16":
            return file
        kind, threads = self._kind.upper(), str(torch.get_num_threads())
        target = file.with_name(file.name.replace(".bf16.", f".ik.{self._kind}."))
        return made(target, lambda out: [quantiser(), file, out, kind, threads])


def quantiser() -> Path:
    """The package's `llama-quantize`."""
    return next((IK_LLAMACPP / "venv" / "lib").glob("python3*/site-packages/ik_llama_cpp/bin/llama-quantize"))


@dataclass(frozen=True, slots=True)
class IkSession:
    """A file and a count; every run loads it."""

    file: Path
    count: int

    def warm_up(self) -> None:
        """Nothing: the process of `run` does it."""

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        """One process measures all batches, after one that is not counted."""
        settings = {
            "file": str(self.file),
            "experts": {f"{architecture(self.file)}.expert_used_count": self.count},
            "repack": True,
            "batches": [WARM_UP, *batches],
            "prompt": PROMPT,
            "output": OUTPUT,
            "threads": torch.get_num_threads(),
        }
        return measured(parse(call([python(IK_LLAMACPP), DRIVER, json.dumps(settings)])), batches, "ik_llama.cpp")
