"""llama.cpp as a system: its own `llama-batched-bench` on a GGUF of the same checkpoint, one process per run.

Prompts are not shared between sequences (`-pps` off) and all sequences decode side by side, which is what the others
do. Two things differ: it draws its own random prompt tokens, and decodes random tokens instead of its own greedy
ones, so it neither samples nor picks. The expert count is a key of the file overridden at load. It knows nothing of
us.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.peers import LLAMACPP, installed, llamacpp_source, python
from benchmarks.systems.system import PeerFailed, Rates, Weights
from benchmarks.workload import LARGEST_BATCH, OUTPUT, PROMPT

BINARIES = LLAMACPP / "build" / "bin"
CONVERTER = Path(__file__).parent / "convert_gguf.py"
WARM_UP = 1  # a batch measured first and thrown away


Kind = Literal["bf16", "q8_0", "q4_0", "q4_k_m"]
WEIGHTS: dict[Kind, Weights] = {"bf16": "bf16", "q8_0": "8 bit", "q4_0": "4 bit", "q4_k_m": "4 bit"}


class LlamaCpp:
    """llama.cpp with weights in bf16, or as its own quantiser makes them."""

    def __init__(self, kind: Kind) -> None:
        self.name = f"llama.cpp {kind}"
        self.weights = WEIGHTS[kind]
        self._kind = kind

    def version(self) -> str:
        return installed(LLAMACPP) or ""

    def refuses(self, config: dict[str, Any]) -> str | None:
        if not installed(LLAMACPP):
            return "not installed (make bench-peers)"
        if config["model_type"] not in ("olmoe", "mixtral"):
            return f"it does not know {config['model_type']}"
        return "its OLMoE has no tied head" if config.get("tie_word_embeddings") else None

    @contextmanager
    def open(self, folder: Path, count: int) -> Iterator["LlamaCppSession"]:
        yield LlamaCppSession(as_file(folder, self._kind), count)


@cache
def scratch() -> "tempfile.TemporaryDirectory[str]":
    """Where the files of this run lie; gone with the process."""
    return tempfile.TemporaryDirectory()


def as_file(folder: Path, kind: Kind) -> Path:
    """The checkpoint as a GGUF file with such weights, made once a run."""
    file = _as_bf16(folder)
    return file if kind == "bf16" else _quantised(file, kind)


def _as_bf16(folder: Path) -> Path:
    """The checkpoint as a GGUF file by llama.cpp's converter."""
    file = Path(scratch().name) / f"{str(folder.resolve()).replace('/', '-')}.bf16.gguf"
    if not file.exists():
        call([python(LLAMACPP), CONVERTER, llamacpp_source(LLAMACPP), folder, file])
    return file


def _quantised(file: Path, kind: Kind) -> Path:
    """The same by llama.cpp's quantiser."""
    target = file.with_name(file.name.replace(".bf16.", f".{kind}."))
    if not target.exists():
        call([BINARIES / "llama-quantize", file, target, kind, str(torch.get_num_threads())])
    return target


def call(command: Sequence[str | Path]) -> str:
    """Standard output. OpenMP's own spinning is left as llama.cpp finds it best, whatever is set for us."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if run.returncode:
        said = (run.stderr or run.stdout)[-600:]
        raise PeerFailed(f"{Path(command[0]).name} ended with {run.returncode}: {said}")
    return run.stdout


def architecture(file: Path) -> str:
    """A GGUF file's `general.architecture`, with which its keys begin: the first entry, as type (u32), length (u64),
    text."""
    key = b"general.architecture"
    with file.open("rb") as opened:
        head = opened.read(512)
    at = head.index(key) + len(key) + 4
    length = int.from_bytes(head[at : at + 8], "little")
    return head[at + 8 : at + 8 + length].decode()


@dataclass(frozen=True, slots=True)
class LlamaCppSession:
    """A file and a count; every run loads it."""

    file: Path
    count: int

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        """One process measures all batches, after one that is not counted."""
        rows = parse(call(self.command([WARM_UP, *batches])))
        if [row["pl"] for row in rows] != [WARM_UP, *batches]:
            raise PeerFailed(f"llama-batched-bench measured batches {[row['pl'] for row in rows]}, not {list(batches)}")
        return {row["pl"]: Rates(row["speed_pp"], row["speed_tg"]) for row in rows[1:]}

    def command(self, batches: Sequence[int]) -> list[str | Path]:
        """Read into memory, not mapped: first touches of a mapped file would fall into what is timed."""
        threads = str(torch.get_num_threads())
        shape = ["-npp", str(PROMPT), "-ntg", str(OUTPUT), "-npl", ",".join(map(str, batches))]
        context = str(max(LARGEST_BATCH, *batches) * (PROMPT + OUTPUT))
        experts = f"{architecture(self.file)}.expert_used_count=int:{self.count}"
        options = ["-c", context, "-t", threads, "-tb", threads, "--load-mode", "none", "--override-kv", experts]
        return [BINARIES / "llama-batched-bench", "-m", self.file, *shape, *options, "--output-format", "jsonl"]


def parse(output: str) -> list[dict[str, Any]]:
    """The measured rows of `--output-format jsonl`, in order."""
    lines = (line.strip() for line in output.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{") and '"speed_tg"' in line]
