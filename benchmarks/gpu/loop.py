"""What a step costs beside the card's own work: launches of a decoding step, the time in which the card computes, and
the time in which it waits for the host; with and without overlapped steps and graphs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.decoders import OLMOE_7B
from benchmarks.gpu.engines import Loaded, Workload, loaded
from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import forget
from engine.engine import Engine

STEPS = 20
LAUNCHES = ("LaunchKernel", "GraphLaunch")


@dataclass(frozen=True, slots=True)
class Step:
    """Means over decoding steps; microseconds."""

    wall: float
    busy: float  # the card computes
    kernels: float
    launches: float  # of the host: kernels and graphs


def run(part: Part) -> None:
    """Each way to run the engine at three batches."""
    for way, make in list(WAYS.items())[: 1 if part.dry else None]:
        with part.tried(way), torch.inference_mode():
            made = make(part)
            for batch in (2,) if part.dry else (1, 32, 128):
                if part.enough(f"{way}, batch {batch}", 3):
                    _batch(part, way, made, batch)
            del made
        forget()


def _batch(part: Part, way: str, engine: Loaded, batch: int) -> None:
    counts, steps = [engine.config.experts.trained] * batch, 3 if part.dry else STEPS
    for _ in range(1 if part.dry else 3):  # compile and record
        engine.run(counts, Workload(5, 4))
    wall = _decoding(engine, counts, steps)
    step = Step(wall, *_profiled(engine, counts, steps))
    if part.dry:
        part.add("a decoding step, µs", way=way, backend=engine.backend, batch=batch, wall=None, busy=None,
                 idle=None, kernels=None, launches=None)  # fmt: skip
        return
    part.add("a decoding step, µs", way=way, backend=engine.backend, batch=batch, wall=step.wall, busy=step.busy,
             idle=step.wall - step.busy, kernels=step.kernels, launches=step.launches)  # fmt: skip


def _decoding(engine: Loaded, counts: list[int], steps: int) -> float:
    """Microseconds of one step, when all requests decode; what is left of them is run to its end."""
    engine.add(counts, Workload(5, steps + 8))
    for _ in range(4):
        engine.engine.step()
    began = time.perf_counter()
    for _ in range(steps):
        engine.engine.step()
    wall = 1e6 * (time.perf_counter() - began) / steps
    while engine.engine.has_work:
        engine.engine.step()
    return wall


def _profiled(engine: Loaded, counts: list[int], steps: int) -> tuple[float, float, float]:
    """Of the same steps: the card's microseconds, kernels and launches of one step."""
    engine.add(counts, Workload(5, steps + 8))
    for _ in range(4):
        engine.engine.step()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as found:
        for _ in range(steps):
            engine.engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    while engine.engine.has_work:
        engine.engine.step()
    busy, kernels, launches = 0.0, 0, 0
    for event in found.events() or ():
        if event.device_type.name == "CUDA":
            busy += event.device_time
            kernels += 1
        elif any(name in event.name for name in LAUNCHES):
            launches += 1
    return busy / steps, kernels / steps, launches / steps


def _as_served(part: Part) -> Loaded:
    return loaded(OLMOE_7B, part)


def _waiting(part: Part) -> Loaded:
    """The same without overlapped steps."""
    made = loaded(OLMOE_7B, part)
    return replace(made, engine=Engine(made.engine.runner, made.engine.scheduler))


def _without_graphs(part: Part) -> Loaded:
    """The same with every launch by the host."""
    made = loaded(OLMOE_7B, part)
    model = getattr(made.engine.runner, "model")  # noqa: B009 - of the runner that the engine was made with
    if getattr(model, "graphs", None) is None:
        raise RuntimeError(f"{made.backend} runs without graphs anyway")
    model.graphs = None
    return made


WAYS: dict[str, Callable[[Part], Loaded]] = {
    "as served": _as_served,
    "each step waited for": _waiting,
    "without graphs": _without_graphs,
}
