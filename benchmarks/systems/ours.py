"""Our engine as one of the systems: scheduler, paged cache and sampler without HTTP, prefix cache off. The expert
count is each request's own, so one loaded model serves every session. Of the peers it knows llama.cpp's files."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from benchmarks.machine import give_back_freed_memory
from benchmarks.systems.llamacpp import WEIGHTS, Kind, LlamaCpp, as_file
from benchmarks.systems.system import Rates, Weights
from benchmarks.workload import LARGEST_BATCH, OUTPUT, PROMPT, prompts
from engine.assembly import assemble
from engine.build import keep_groups, prepare
from engine.engine import Engine
from engine.types import EngineSettings, Request, Sampling
from model.backends.cpu.kernels.library import load
from model.budget import ExpertBudget
from model.shapes.decoder import DecoderConfig
from weights.load import load_model


def _weights(bits: Literal["8 bit", "4 bit"], everywhere: bool) -> Weights:
    if bits == "8 bit":
        return "8 bit" if everywhere else "8 bit experts"
    return "4 bit" if everywhere else "4 bit experts"


class OurEngine:
    """moedial in bfloat16, or with `quantize` as its engine names it: its experts, or after "all:" every matrix."""

    file = ""

    def __init__(self, quantize: str = "none") -> None:
        everywhere, _, kind = quantize.rpartition(":")
        self.weights: Weights
        self.name = "moedial" if quantize == "none" else f"moedial {quantize}"
        self.weights = (
            "bf16" if quantize == "none" else _weights("4 bit" if kind == "int4" else "8 bit", bool(everywhere))
        )
        self._quantize: dict[str, Any] = {"quantize": kind, "quantize_layers": everywhere or "experts"}
        self._loaded: tuple[Path, Engine, DecoderConfig] | None = None

    def version(self) -> str:
        kernels = load()
        return f"{version('moedial')}, {kernels.name}{kernels.reason and f' ({kernels.reason})'}"

    def refuses(self, config: dict[str, Any]) -> str | None:
        return None if self.weights == "bf16" or load().native else load().reason

    @contextmanager
    def open(self, folder: Path, count: int) -> Iterator["OurSession"]:
        """Load the model unless it is loaded."""
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None  # before the next is there
            self._loaded = (folder, *self._load(folder))
        yield OurSession(*self._loaded[1:], count)

    def _load(self, folder: Path) -> tuple[Engine, DecoderConfig]:
        model, _ = load_model(folder, "bfloat16")
        chosen = settings(folder, **self._quantize)
        engine, _ = assemble(prepare(model, chosen)[0], chosen)
        give_back_freed_memory()
        return engine, model.config


class OurFile(OurEngine):
    """moedial on the GGUF file that llama.cpp's quantiser made of the checkpoint, whose blocks stay as they are."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.name = f"moedial {kind} file"
        self.weights = WEIGHTS[kind]
        self.file = kind
        self._kind = kind

    def refuses(self, config: dict[str, Any]) -> str | None:
        return LlamaCpp(self._kind).refuses(config) or super().refuses(config)

    def _load(self, folder: Path) -> tuple[Engine, DecoderConfig]:
        file = as_file(folder, self._kind)
        chosen = settings(file)
        model, _ = load_model(file, keep_groups=keep_groups(file, chosen))
        engine, _ = assemble(prepare(model, chosen)[0], chosen)
        give_back_freed_memory()
        return engine, model.config


def settings(folder: Path, max_step_tokens: int = LARGEST_BATCH * PROMPT, **quantize: Any) -> EngineSettings:
    """An engine for this workload: nothing is remembered, and unless told otherwise a whole batch of prompts fits one
    step (steps are bounded by tokens, not by time)."""
    return EngineSettings(
        model=str(folder),
        max_step_tokens=max_step_tokens,
        max_model_len=PROMPT + OUTPUT,
        kv_cache_bytes=1 << 30,
        prefix_cache=False,
        **quantize,
    )


@dataclass(frozen=True, slots=True)
class OurSession:
    """An engine at one count."""

    engine: Engine
    config: DecoderConfig
    count: int

    def warm_up(self) -> None:
        self._run(1)

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        return {batch: self._run(batch) for batch in batches}

    def _run(self, batch: int) -> Rates:
        for request in requests(prompts(batch, self.config.vocabulary), self.config.experts.budget(self.count)):
            self.engine.add(request)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the server does beside native kernels, whose threads are their own
        try:
            return timed(self.engine, batch)
        finally:
            torch.set_num_threads(threads)


def requests(tokens: Sequence[Sequence[int]], budget: ExpertBudget, name: str = "") -> list[Request]:
    """Greedy requests for OUTPUT tokens each."""
    made = []
    for number, prompt in enumerate(tokens):
        sampling = Sampling(OUTPUT, seed=number, temperature=0.0)
        made.append(Request(f"{name}{number}", tuple(prompt), budget, sampling))
    return made


def timed(engine: Engine, batch: int) -> Rates:
    """Run all requests to their end. Prefill ends when every request has its first token; the rest is decoding."""
    started, first, seen, touched = time.perf_counter(), 0.0, set(), []
    while engine.has_work:
        report = engine.step()
        if first:
            touched.append(report.stats.distinct_experts)
        seen |= {event.request_id for event in report.events}
        if not first and len(seen) == batch:
            first = time.perf_counter()
    ended = time.perf_counter()
    prefill = batch * PROMPT / (first - started)
    decode = batch * (OUTPUT - 1) / (ended - first)
    return Rates(prefill, decode, mean(touched))
