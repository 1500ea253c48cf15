"""Our side of `benchmarks.long_context`: one prompt computed from length to length, and at each length some steps of
decoding with one and with several copies of its cache. The engine's runner on chunks, without its scheduler."""

import time
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import give_back_freed_memory
from benchmarks.systems.system import LongRates
from benchmarks.workload import random_prompt
from engine.build import prepare
from engine.plan import Chunk
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.types import EngineSettings, Request, Sampling
from model.backends.base import Runnable
from model.batch import Cache
from model.budget import ExpertBudget
from weights.load import load_model

CHUNK = 2048  # tokens of the prompt in one step
PAGE = 128  # tokens of a block


@dataclass(frozen=True, slots=True)
class Copies:
    """Sequences of one prompt, whose blocks lie one after the other in the cache: `room` slots each."""

    runner: ModelRunner
    sequences: list[Sequence]
    prompt: list[int]
    room: int

    def prefill(self, start: int, end: int) -> None:
        """Compute the first sequence's prompt from one length to another."""
        sequence = self.sequences[0]
        sequence.tokens = self.prompt[:end]
        for first in range(start, end, CHUNK):
            self.runner.run((Chunk(sequence, first, min(CHUNK, end - first)),))

    def copy(self, end: int) -> None:
        """Give all others the first one's keys and values."""
        used = -(-end // PAGE) * PAGE
        for layer in self.runner.cache.layers:
            for number in range(1, len(self.sequences)):
                layer[:, number * self.room : number * self.room + used] = layer[:, :used]

    def decode(self, length: int, batch: int, steps: int) -> tuple[list[float], int]:
        """Seconds of each step, and the experts that the last one read, after so many tokens of the prompt."""
        seconds, distinct = [], 0
        chosen = self.sequences[:batch]
        for number, sequence in enumerate(chosen):
            sequence.tokens = [*self.prompt[:length], self.prompt[number]]
        for position in range(length, length + steps):
            started = time.perf_counter()
            result = self.runner.run(tuple(Chunk(sequence, position, 1) for sequence in chosen))
            seconds.append(time.perf_counter() - started)
            distinct = result.work.distinct_experts
            for sequence, sampled in zip(chosen, result.sampled, strict=True):
                sequence.tokens.append(sampled.token)
        return seconds, distinct


def copies(model: Runnable, longest: int, batch: int, count: int) -> Copies:
    """A cache for so many sequences of such a length, and a prompt for them."""
    pages = -(-longest // PAGE)
    cache: Cache = model.cache(batch * pages, PAGE)
    prompt = random_prompt(longest, model.config.vocabulary)
    budget: ExpertBudget = model.config.experts.budget(count)
    sequences = []
    for number in range(batch):
        sequence = Sequence(Request(str(number), tuple(prompt), budget, Sampling(longest, number, 0.0)), 0.0)
        sequence.blocks = list(range(number * pages, (number + 1) * pages))
        sequences.append(sequence)
    return Copies(ModelRunner(model, cache), sequences, prompt, pages * PAGE)


@contextmanager
def one_torch_thread() -> Any:
    """As the server runs beside native kernels, whose threads are their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(
    folder: Path, contexts: Many[int], batches: Many[int], steps: int, count: int, **settings: Any
) -> list[LongRates]:
    """Load, and measure every length in turn."""
    loaded, _ = load_model(folder, "bfloat16")
    chosen = EngineSettings(str(folder), max_model_len=max(contexts) + steps, block_size=PAGE, **settings)
    model, _ = prepare(loaded, chosen)
    del loaded
    give_back_freed_memory()
    made, rates, done, spent = copies(model, max(contexts) + steps, max(batches), count), [], 0, 0.0
    with one_torch_thread():
        made.prefill(0, min(128, *contexts))  # warms up
        for context in sorted(contexts):
            started = time.perf_counter()
            made.prefill(done, context)
            spent += time.perf_counter() - started
            made.copy(context)
            done = context
            for batch in batches:
                seconds, touched = made.decode(context, batch, steps)
                rates.append(LongRates(context, batch, context / spent, batch / median(seconds), touched))
    return rates
