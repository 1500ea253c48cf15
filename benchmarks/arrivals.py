"""Requests that arrive together on our engine, in this process or in one of its own, and when each of their tokens
came. It does not depend on tables or peers."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the server sets it for its engine

import torch

from benchmarks.machine import give_back_freed_memory
from benchmarks.systems.ours import requests, settings
from benchmarks.workload import prompts
from engine.assembly import assemble
from engine.build import prepare
from engine.engine import Engine
from engine.memory import keep_freed_memory
from model.backends.cpu.kernels.library import load
from model.expert_range import ExpertRange
from weights.load import load_model

Times = dict[int, list[float]]  # request number -> seconds after the common start, one per token
STEP_TOKENS = 512  # the engine's default: what a server would run


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine without HTTP and prefix cache, its steps bounded by tokens."""

    engine: Engine
    experts: ExpertRange
    vocabulary: int

    @staticmethod
    def load(folder: Path) -> "Loaded":
        model, _ = load_model(folder, "bfloat16")
        chosen = settings(folder, STEP_TOKENS)
        engine, _ = assemble(prepare(model, chosen)[0], chosen)
        give_back_freed_memory()
        keep_freed_memory()
        return Loaded(engine, model.config.experts, model.config.vocabulary)

    def serve(self, counts: dict[int, int], total: int, start: float) -> Times:
        """Run request n of `total` at counts[n], in order of n; the clock starts at `start` (time.monotonic)."""
        tokens = prompts(total, self.vocabulary)
        for number, count in sorted(counts.items()):
            (request,) = requests([tokens[number]], self.experts.budget(count), f"{number}-")
            self.engine.add(request)
        times: Times = {number: [] for number in counts}
        time.sleep(max(0.0, start - time.monotonic()))
        while self.engine.has_work:
            events = self.engine.step().events
            now = time.monotonic() - start
            for event in events:
                times[int(event.request_id.partition("-")[0])].append(now)
        return times


def use_threads(threads: int) -> None:
    """Set the number of threads of torch and of the native kernels."""
    torch.set_num_threads(1 if load().native else threads)  # as the server does
    if load().native:
        torch.ops.moedial.set_threads(threads)


class Worker:
    """A loaded engine in a process of its own, ready once constructed."""

    def __init__(self, folder: Path) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.kernels: str = self._pipe.recv()

    def begin(self, counts: dict[int, int], total: int, threads: int, start: float) -> None:
        """Start serving with this number of threads at time `start`."""
        self._pipe.send((counts, total, threads, start))

    def end(self) -> Times:
        """The worker's measurements. Raises EOFError if its process has ended."""
        times: Times = self._pipe.recv()
        return times

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def work(folder: Path, pipe: Connection) -> None:
    """The worker process: report the kernels once loaded, then serve requests from the pipe until it closes."""
    loaded = Loaded.load(folder)
    pipe.send(load().name)
    while True:
        try:
            counts, total, threads, start = pipe.recv()
        except EOFError:
            return
        use_threads(threads)
        pipe.send(loaded.serve(counts, total, start))


def side_by_side(workers: Sequence[Worker], shares: Sequence[dict[int, int]], total: int, threads: int) -> Times:
    """Run all workers at once, each on its share of the requests."""
    start = time.monotonic() + 0.1
    for worker, share in zip(workers, shares, strict=True):
        worker.begin(share, total, threads, start)
    return {number: times for worker in workers for number, times in worker.end().items()}
