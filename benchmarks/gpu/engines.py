"""The real engine around a random decoder on the card: scheduler, paged cache, sampler; without HTTP and prefix cache.
It does not depend on tables.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from benchmarks.gpu.decoders import random_decoder, toy
from benchmarks.gpu.part import Part
from engine.assembly import assemble
from engine.build import prepare
from engine.engine import Engine
from engine.types import EngineSettings, Request, Sampling
from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig

LARGEST_BATCH = 128
STEP_TOKENS = 4096  # that a prefill takes in one step
_numbers = count()


@dataclass(frozen=True, slots=True)
class Workload:
    """So many tokens in and out of each request."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second. Prefill ends when every request has its first token; the rest is decoding."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, and the shape of its decoder."""

    engine: Engine
    config: DecoderConfig
    backend: str

    def add(self, counts: Sequence[int], load: Workload, seed: int = 7) -> None:
        """A greedy request of random tokens for each count."""
        generator = torch.Generator().manual_seed(seed)
        size = (len(counts), load.prompt)
        for ids, each in zip(torch.randint(3, self.config.vocabulary, size, generator=generator).tolist(), counts,
                             strict=True):  # fmt: skip
            sampling = Sampling(load.output, seed=0, temperature=0.0)
            self.engine.add(Request(f"r{next(_numbers)}", tuple(ids), self.config.experts.budget(each), sampling))

    def run(self, counts: Sequence[int], load: Workload) -> Speed:
        """Requests of these counts to their end.

        Raises:
            RuntimeError: one did not get all its tokens.
        """
        self.add(counts, load)
        began, first, seen, tokens, after = time.perf_counter(), 0.0, set(), 0, 0
        while self.engine.has_work:
            events = self.engine.step().events
            seen |= {event.request_id for event in events}
            tokens += len(events)
            after += len(events) if first else 0
            if not first and len(seen) == len(counts):
                first = time.perf_counter()
        ended, batch = time.perf_counter(), len(counts)
        if tokens < batch * load.output:
            raise RuntimeError(f"{batch} requests for {load.output} tokens each got {tokens} in all")
        return Speed(batch * load.prompt / (first - began), after / max(1e-9, ended - first))


def loaded(raw: dict[str, Any], part: Part, **changes: Any) -> Loaded:
    """The engine of a config.json on the part's device; on a dry run of a toy of it. `changes` are of its settings."""
    raw = toy(raw) if part.dry else raw
    decoder: Decoder = random_decoder(raw, part.device, torch.float32 if part.dry else torch.bfloat16)
    settings = EngineSettings(
        model="random",
        dtype="float32" if part.dry else "bfloat16",
        device=str(part.device),
        block_size=64,
        max_model_len=256,
        kv_cache_bytes=(1 if part.dry else 1 << 10) << 23,
        max_running=LARGEST_BATCH,
        max_step_tokens=STEP_TOKENS,
        step_ms=0,
        prefix_cache=False,
    )
    settings = replace(settings, **changes)
    runnable, _ = prepare(decoder, settings)
    engine, _ = assemble(runnable, settings)
    return Loaded(engine, decoder.config, runnable.kernels)
