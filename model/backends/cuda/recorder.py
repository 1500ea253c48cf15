"""What graphs need of a device: pinned memory, events in its queue of work, and recordings of work.

`CudaRecorder` is thin, since it is the one part that no machine without a GPU can run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Pool = Any  # a name of memory that recordings share


class Event(Protocol):
    """A point in the queue of work, as a CUDA event."""

    def wait(self) -> None:
        """Return when all work before it is done."""
        ...


class Recording(Protocol[T_co]):
    """Work that can be queued again, on the same memory."""

    @property
    def outputs(self) -> T_co:
        """What the recorded function returned. Each replay overwrites its tensors; before the first they mean
        nothing."""
        ...

    def replay(self) -> None:
        """Queue the work once more."""
        ...


class Recorder(Protocol):
    """A device with one queue of work, as the host fills it."""

    def pinned(self, size: int) -> Tensor:
        """Bytes of the host that the device copies from while the host goes on."""
        ...

    def memory(self, size: int) -> Tensor:
        """Bytes of the device."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy of pinned bytes to the device."""
        ...

    def record_event(self) -> Event:
        """An event after the work that is queued now."""
        ...

    def pool(self) -> Pool:
        """A new pool."""
        ...

    def record(self, function: Callable[[], T], pool: Pool) -> Recording[T]:
        """Record what the function would queue; nothing of it is done.

        What it allocates stays in the pool. Other memory that it reads or writes must stay where it is.
        """
        ...


class CudaRecorder:
    """A GPU, and the stream that is its current one when steps run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # recordings are made on one of their own

    def pinned(self, size: int) -> Tensor:
        """Page-locked bytes."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def memory(self, size: int) -> Tensor:
        """Bytes of the GPU."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """A copy that is not waited for."""
        target.copy_(source, non_blocking=True)

    def record_event(self) -> "CudaEvent":
        """A CUDA event on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return CudaEvent(event)

    def pool(self) -> Pool:
        """A memory pool for graphs."""
        return torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], T], pool: Pool) -> Recording[T]:
        """A CUDA graph. What is queued already is waited for."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                outputs = function()
        finally:
            torch.cuda.set_stream(current)  # the end of a capture that failed may raise before it has done so
        return CudaRecording(graph, outputs)


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """A CUDA event."""

    event: torch.cuda.Event

    def wait(self) -> None:
        """Wait for the event."""
        self.event.synchronize()


@dataclass(frozen=True, slots=True)
class CudaRecording(Generic[T]):
    """A graph on a GPU."""

    graph: torch.cuda.CUDAGraph
    outputs: T

    def replay(self) -> None:
        """Launch the graph."""
        self.graph.replay()
