"""llama.cpp as a system: its own `llama-batched-bench` on a GGUF of the same checkpoint, one process per run.

Prompts are not shared between sequences (`-pps` off) and all sequences decode side by side, which is what the others
do. Two things differ: it draws its own random prompt tokens, and decodes random tokens instead of its own greedy ones,
so it neither samples nor picks. The expert count is a key of the file overridden at load. It does not use moedial.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
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


FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss")
Kind = Literal["bf16", "q8_0", "q4_0", "q4_k_m"]
WEIGHTS: dict[Kind, Weights] = {"bf16": "bf16", "q8_0": "8 bit", "q4_0": "4 bit", "q4_k_m": "4 bit"}


class LlamaCpp:
    """llama.cpp with weights in bf16, or as its own quantiser makes them."""

    def __init__(self, kind: Kind) -> None:
        self.name = f"llama.cpp {kind}"
        self.weights = WEIGHTS[kind]
        self.file: str = "" if kind == "bf16" else kind
        self._kind = kind

    def version(self) -> str:
        return installed(LLAMACPP) or ""

    def refuses(self, config: dict[str, Any]) -> str | None:
        if not installed(LLAMACPP):
            return "not installed (make bench-peers)"
        if config["model_type"] not in FAMILIES:
            return f"it does not know {config['model_type']}"
        return "its OLMoE has no tied head" if config.get("tie_word_embeddings") else None

    @contextmanager
    def open(self, folder: Path, count: int) -> Iterator["LlamaCppSession"]:
        yield LlamaCppSession(as_file(folder, self._kind), count)


@cache
def _temporary() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()


def scratch(kept: Path | None) -> Path:
    """Where checkpoints and files lie: in a folder that is kept, or gone with the process."""
    if kept is None:
        return Path(_temporary().name)
    kept.mkdir(parents=True, exist_ok=True)
    return kept.resolve()


def made(file: Path, command: Callable[[Path], Sequence[str | Path]]) -> Path:
    """A file, made by a command that is given a path for it, unless it is there."""
    if not file.exists():
        unfinished = file.with_name(f"unfinished-{file.name}")
        call(command(unfinished))
        unfinished.rename(file)
    return file


def as_file(folder: Path, kind: Kind) -> Path:
    """The checkpoint as a GGUF file with such weights, beside it; made once."""
    file = as_bf16(folder)
    return file if kind == "bf16" else _quantised(file, kind)


def as_bf16(folder: Path, layout: str = "own") -> Path:
    """The checkpoint as a GGUF file by llama.cpp's converter, in a layout as `convert_gguf.py` names it."""
    file = folder.with_name(f"{folder.name}.{layout}.bf16.gguf")
    return made(file, lambda out: [python(LLAMACPP), CONVERTER, llamacpp_source(LLAMACPP), folder, out, layout])


def _quantised(file: Path, kind: Kind) -> Path:
    """The same by llama.cpp's quantiser."""
    threads = str(torch.get_num_threads())
    target = file.with_name(file.name.replace(".bf16.", f".{kind}."))
    return made(target, lambda out: [BINARIES / "llama-quantize", file, out, kind, threads])


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

    def warm_up(self) -> None:
        """Nothing: the process of `run` does it."""

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        """One process measures all batches, after one that is not counted."""
        return measured(parse(call(self.command([WARM_UP, *batches]))), batches, "llama-batched-bench")

    def command(self, batches: Sequence[int]) -> list[str | Path]:
        """Read into memory, not mapped: first touches of a mapped file would fall into what is timed."""
        threads = str(torch.get_num_threads())
        shape = ["-npp", str(PROMPT), "-ntg", str(OUTPUT), "-npl", ",".join(map(str, batches))]
        context = str(max(LARGEST_BATCH, *batches) * (PROMPT + OUTPUT))
        experts = f"{architecture(self.file)}.expert_used_count=int:{self.count}"
        options = ["-c", context, "-t", threads, "-tb", threads, "--load-mode", "none", "--override-kv", experts]
        return [BINARIES / "llama-batched-bench", "-m", self.file, *shape, *options, "--output-format", "jsonl"]


def measured(rows: Sequence[dict[str, Any]], batches: Sequence[int], tool: str) -> dict[int, Rates]:
    """The rates of every batch; the first row warmed up. Raises PeerFailed where a batch is missing."""
    found = [row["pl"] for row in rows]
    if found != [WARM_UP, *batches]:
        raise PeerFailed(f"{tool} measured batches {found}, not {[WARM_UP, *batches]}")
    return {row["pl"]: Rates(row["speed_pp"], row["speed_tg"]) for row in rows[1:]}


def parse(output: str) -> list[dict[str, Any]]:
    """The measured rows of `--output-format jsonl`, in order."""
    lines = (line.strip() for line in output.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{") and '"speed_tg"' in line]
