"""A device with one queue of work that the CPU plays: copies are read late, and recordings are operations of torch
that are done again on the same memory. What a GPU does not record is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.backends.cuda.recorder import Pool

T = TypeVar("T")
GARBAGE = 77


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class NotRecordable(RuntimeError):
    """What a GPU cannot record, or would replay on memory that is gone."""


@dataclass
class Operation:
    """One operation of torch, and what it returned while it was recorded."""

    function: Any
    arguments: Any
    keywords: Any
    results: list[Tensor]

    def again(self) -> None:
        """What it returns goes where it went before."""
        read = {storage(tensor) for tensor in tensors((self.arguments, self.keywords))}
        returned = tensors(self.function(*self.arguments, **self.keywords))
        for kept, result in zip(self.results, returned, strict=True):
            if storage(kept) not in read:
                kept.copy_(result)


class Recorded(TorchDispatchMode):
    """Keeps every operation. Tensors that it reads must be static or results of earlier ones."""

    def __init__(self, static: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._known = {storage(tensor) for tensor in static}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if "_local_scalar_dense" in str(func):
            raise NotRecordable("a value is read back")
        if any(storage(tensor) not in self._known for tensor in tensors((args, keywords)) if tensor.numel()):
            raise NotRecordable(f"{func} reads memory that is not static")
        result = func(*args, **keywords)
        self.operations.append(Operation(func, args, keywords, tensors(result)))
        self._known.update(map(storage, tensors(result)))
        return result


@dataclass
class FakeRecording(Generic[T]):
    outputs: T
    operations: list[Operation]
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        for operation in self.operations:
            operation.again()


@dataclass
class FakeEvent:
    recorder: "FakeRecorder"
    copies: int

    def wait(self) -> None:
        self.recorder.finish(self.copies)


@dataclass
class FakeRecorder:
    """`static`: memory that stays where it is, beside what `memory` gives: weights and caches."""

    static: list[Tensor]
    failure: Exception | None = None  # of every recording
    recordings: list[FakeRecording[Any]] = field(default_factory=list)
    pools: int = 0
    waited_for: int = 0  # copies
    _copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # sources, and what they held when queued

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def memory(self, size: int) -> Tensor:
        self.static.append(torch.full((size,), GARBAGE, dtype=torch.uint8))
        return self.static[-1]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Done at once, but the source must hold what it holds now until the copy is waited for."""
        target.copy_(source)
        self._copies.append((source, source.clone()))

    def record_event(self) -> FakeEvent:
        return FakeEvent(self, len(self._copies))

    def finish(self, copies: int | None = None) -> None:
        """Do so many copies of all, or all."""
        end = len(self._copies) if copies is None else copies
        for source, was in self._copies[self.waited_for : end]:
            assert torch.equal(source, was), "a buffer was written while the device copied from it"
        self.waited_for = max(self.waited_for, end)

    def pool(self) -> Pool:
        self.pools += 1
        return self.pools

    def record(self, function: Callable[[], T], pool: Pool) -> FakeRecording[T]:
        """Nothing is done: static memory is as before, and what is returned means nothing yet."""
        assert pool == self.pools
        before = [tensor.clone() for tensor in self.static]
        mode = Recorded(self.static)
        try:
            with mode:
                outputs = function()
                if self.failure is not None:
                    raise self.failure
        finally:
            for tensor, was in zip(self.static, before, strict=True):
                tensor.copy_(was)
        for operation in mode.operations:
            for result in operation.results:
                if storage(result) not in map(storage, self.static):
                    result.fill_(GARBAGE)
        self.recordings.append(FakeRecording(outputs, mode.operations))
        return self.recordings[-1]
