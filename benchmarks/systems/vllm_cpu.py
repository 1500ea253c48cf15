"""vLLM's CPU build as a system: a driver in its own venv and process, told over pipes what to run.

Scheduler and worker share that process: as separate ones, vLLM sets a core aside for the scheduler, half of a machine
of two. The expert count is overridden at load. It does not use moedial.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.peers import VLLM, installed, python
from benchmarks.systems.system import PeerFailed, Rates, Weights
from benchmarks.systems.vllm_driver import MARK
from benchmarks.workload import LARGEST_BATCH, OUTPUT, PROMPT, prompts

DRIVER = Path(__file__).parent / "vllm_driver.py"


class Vllm:
    """vLLM in bfloat16, eager or compiled by torch at load (half a minute more, less overhead per step)."""

    weights: Weights = "bf16"
    file = ""

    def __init__(self, eager: bool = True) -> None:
        self.name = "vllm" if eager else "vllm compiled"
        self._eager = eager

    def version(self) -> str:
        return f"{installed(VLLM)}, {'eager' if self._eager else 'compiled'}"

    def refuses(self, config: dict[str, Any]) -> str | None:
        if not installed(VLLM):
            return "not installed (make bench-peers)"
        if config["model_type"] not in ("olmoe", "mixtral"):
            return f"it does not know {config['model_type']}"
        return "its OLMoE has no tied head" if config.get("tie_word_embeddings") else None

    @contextmanager
    def open(self, folder: Path, count: int) -> Iterator["VllmSession"]:
        """A driver with the model loaded."""
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        with tempfile.TemporaryFile("w+") as log, started(folder, count, self._eager, log) as driver:
            session = VllmSession(driver, log, vocabulary)
            session.answer()
            yield session


def environment() -> dict[str, str]:
    """As many threads as everybody, Intel's OpenMP first as vLLM asks for it, no hub, no statistics sent."""
    kept = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    openmp = VLLM / "venv" / "lib" / "libiomp5.so"
    return kept | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "KMP_BLOCKTIME": "5",  # what vLLM sets itself where it binds threads
        "KMP_TPAUSE": "0",
        "LD_PRELOAD": str(openmp) if openmp.exists() else "",
        "VLLM_CACHE_ROOT": str(VLLM / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(VLLM / "cache" / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextmanager
def started(folder: Path, count: int, eager: bool, log: IO[str]) -> Iterator["subprocess.Popen[str]"]:
    """The driver's process, ended with its input."""
    settings = {
        "folder": str(folder),
        "count": count,
        "context": PROMPT + OUTPUT,
        "sequences": LARGEST_BATCH,
        "step_tokens": LARGEST_BATCH * PROMPT,
        "output": OUTPUT,
        "eager": eager,
    }
    command = [str(python(VLLM)), str(DRIVER), json.dumps(settings)]
    with subprocess.Popen(
        command, text=True, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
    ) as driver:
        try:
            yield driver
        finally:
            with suppress(BrokenPipeError):
                _pipe(driver.stdin).close()  # the driver ends when nothing more can come


def _pipe(end: IO[str] | None) -> IO[str]:
    """An end of the driver's pipes, which `started` asked for."""
    assert end is not None
    return end


@dataclass(frozen=True, slots=True)
class VllmSession:
    """A running driver."""

    driver: "subprocess.Popen[str]"
    log: IO[str]
    vocabulary: int

    def warm_up(self) -> None:
        self._run(1)

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        return {batch: self._run(batch) for batch in batches}

    def _run(self, batch: int) -> Rates:
        wanted = {"prompts": prompts(batch, self.vocabulary)}
        with suppress(BrokenPipeError):  # the answer says why
            _pipe(self.driver.stdin).write(json.dumps(wanted) + "\n")
            _pipe(self.driver.stdin).flush()
        took = self.answer()
        decode = batch * (OUTPUT - 1) / (took["all"] - took["prefill"])
        return Rates(batch * PROMPT / took["prefill"], decode)

    def answer(self) -> dict[str, float]:
        """The driver's next answer. Raises PeerFailed with the end of its log when it has ended."""
        for line in _pipe(self.driver.stdout):
            if line.startswith(MARK):
                answer: dict[str, float] = json.loads(line.removeprefix(MARK))
                return answer
        self.log.seek(0)
        raise PeerFailed(f"vLLM's process ended: {self.log.read()[-600:]}")
