"""How long calls take on a device: under graph replay where they can be captured. On a CPU nothing is measured."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one call, and how it was launched. None: not measured."""

    seconds: float | None
    how: str  # "graph", "eager" or "dry"

    @property
    def micro(self) -> float | None:
        """Microseconds."""
        return None if self.seconds is None else 1e6 * self.seconds


def timed(calls: Sequence[Call], device: torch.device, seconds: float = 0.3) -> Timed:
    """The mean time of one of several calls that take turns, with different weights or inputs each, so that none finds
    its weights in a cache; the median over several replays of all of them.
    """
    for call in calls:
        call()
    if device.type == "cpu":
        return Timed(None, "dry")
    torch.cuda.synchronize()
    replay, how = _captured(calls)
    one = _elapsed(replay)
    times = sorted(_elapsed(replay) for _ in range(max(3, min(50, int(seconds / one)))))
    return Timed(times[len(times) // 2] / len(calls), how)


def _captured(calls: Sequence[Call]) -> tuple[Call, str]:
    """One launch of all calls; where they cannot be captured, their launches one by one."""

    def launch() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError:
        torch.cuda.synchronize()
        return launch, "eager"
    return graph.replay, "graph"


def _elapsed(call: Call) -> float:
    """Seconds of one call on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return max(1e-7, start.elapsed_time(end) / 1e3)


def host_seconds(call: Call, times: int) -> float:
    """The mean of so many calls on the host's clock."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def forget() -> None:
    """Give back what no tensor uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
