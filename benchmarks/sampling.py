"""What does sampling cost, by batch, vocabulary and setting? `python -m benchmarks.sampling [THREADS]`.

Measures: the engine's sampler on float32 logits [B, V] whose probabilities fall with about the 1.7th power of the rank,
for sequences of 200 prompt and 200 generated tokens that all ask for the same. Medians of microseconds a step. The
ceiling is one read of the logits, here their sum; where they fit a cache, as after a small model, so does the read.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the server sets it for its engine

import torch

from benchmarks.machine import facts, introduce, use_threads
from benchmarks.tables import grid
from engine.memory import keep_freed_memory
from engine.sampling.sampler import sample
from engine.sequence import Sequence
from engine.types import Request, Sampling
from model.backends.base import SamplingOps
from model.backends.cpu.kernels.library import load
from model.backends.cpu.sampling import NativeSampling
from model.backends.torch.sampling import TorchSampling
from model.budget import ExpertBudget

OPS: SamplingOps = NativeSampling() if load().native else TorchSampling()
SHAPES = [(vocabulary, batch) for vocabulary in (4096, 16_384, 50_304, 151_936) for batch in (1, 8, 32, 64)]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "bias of 20": {"temperature": 0.0, "logit_bias": tuple((token, 1.0) for token in range(20))},
    "5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def sequence(row: int, options: dict[str, Any]) -> Sequence:
    sampling = Sampling(max_tokens=999, seed=row, **options)
    prompt = tuple(range(row, row + 200))
    made = Sequence(Request(str(row), prompt, ExpertBudget(()), sampling), 0.0)
    made.tokens += [(7 * position + row) % 500 for position in range(200)]
    return made


def microseconds(call: Callable[[], object], budget_s: float = 0.4) -> float:
    call()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < budget_s:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1e6 * median(seconds)


@torch.inference_mode()
def measure(vocabulary: int, batch: int) -> dict[str, float]:
    logits_BV = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(7)) / 2
    for row_V in logits_BV:
        generator = torch.Generator().manual_seed(batch)
        row_V -= 1.7 * (torch.randperm(vocabulary, generator=generator) + 1).log()
    costs = {"read": microseconds(lambda: logits_BV.sum(-1))}
    for name, options in CASES.items():
        sequences = [sequence(row, options) for row in range(batch)]
        costs[name] = microseconds(partial(sample, OPS, logits_BV, sequences))
    return costs


if __name__ == "__main__":
    keep_freed_memory()
    use_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    introduce(machine := facts())
    found = {f"{vocabulary:,}, {batch}": measure(vocabulary, batch) for vocabulary, batch in SHAPES}
    lines = []
    for shape, row in found.items():
        lines.append([shape, *(f"{cost:,.0f}" for cost in row.values())])
    print(grid(["V, B", "read", *CASES], lines))
    print(json.dumps(machine | {"microseconds": found}))
