"""How a step's inputs reach the device: collected on the host, and copied at once to memory that has one place for
each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.cuda.inputs import ALIGNMENT, StepInputs, changed
from model.backends.cuda.recorder import Event, Recorder
from model.batch import LateIds

MIN_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors lie in memory: of each its first byte, type and shape."""

    places: tuple[tuple[int, torch.dtype, torch.Size], ...]
    size: int  # bytes

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Layout":
        """One after the other, each aligned as an allocation of its own."""
        places, start = [], 0
        for tensor in tensors:
            places.append((start, tensor.dtype, tensor.shape))
            start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(places), start)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in such memory."""
        return [
            memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for start, dtype, shape in self.places
        ]


class Staging:
    """Two buffers of the host, used in turn: one is written while the device may still copy from the other."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._buffers = [recorder.pinned(MIN_BYTES) for _ in range(2)]
        self._copied: list[Event | None] = [None, None]  # the event after each buffer's last copy
        self._next = 0

    def send(self, tensors: Sequence[Tensor], layout: Layout, target: Tensor) -> None:
        """Queue the copy of tensors of the host to the device. They may be overwritten once this returns.

        A tensor that has fewer rows than its place leaves the others as they may be.
        """
        buffer = self._free_buffer(layout.size)
        for place, tensor in zip(layout.views(buffer), tensors, strict=True):
            place[: len(tensor)] = tensor
        self._recorder.copy(target, buffer[: layout.size])
        self._copied[self._next] = self._recorder.record_event()
        self._next = 1 - self._next

    def _free_buffer(self, size: int) -> Tensor:
        """The next buffer, with at least `size` bytes. Waits until its last copy is done."""
        if (copied := self._copied[self._next]) is not None:
            copied.wait()
        if len(self._buffers[self._next]) < size:
            self._buffers[self._next] = self._recorder.pinned(2 * size)
        return self._buffers[self._next]


class StepMemory:
    """Memory of the device for the inputs of steps of one shape, and of `inputs` in it; their values come with `fill`.

    `like` is such a step on the host.
    """

    def __init__(self, like: StepInputs, recorder: Recorder) -> None:
        late_T = torch.empty_like(like.ids_T)  # rows of ids that come late, and where they stand
        self._layout = Layout.of([*tensors_of(like), late_T, late_T])
        self._memory = recorder.memory(self._layout.size)
        *tensors, self._row_T, self._source_T = self._layout.views(self._memory)
        views = iter(tensors)
        self.inputs: StepInputs = changed(like, lambda _: next(views))

    def fill(self, step: StepInputs, late: LateIds | None, staging: Staging) -> None:
        """Queue the copy of a step of this shape, and of the ids that only the device knows."""
        row_N, source_N = (step.ids_T[:0],) * 2 if late is None else (late.row_N, late.source_N)
        staging.send([*tensors_of(step), row_N, source_N], self._layout, self._memory)
        if late is not None:
            token_N = late.token_R.index_select(0, self._source_T[: len(source_N)])
            self.inputs.ids_T.index_copy_(0, self._row_T[: len(row_N)], token_N)


def tensors_of(inputs: StepInputs) -> list[Tensor]:
    """All tensors of a step but its cache's, in the order of `changed`."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    changed(inputs, collect)
    return tensors
