"""Tensors between rank 0 and the other ranks, over torch.distributed: gloo on CPUs, NCCL for contents on GPUs.

Every wait is bounded, and every failure is an `EngineDown` that names the rank. No experts here.
"""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Protocol, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

from model.devices import CPU
from model.errors import EngineDown

SIZES, CONTENT, RESULT = 0, 1, 2  # tags of messages
BEAT_SECONDS = 5.0  # between two signs of life of rank 0
SILENCE_SECONDS = 60.0  # after so long without any a rank gives up
CONNECT_SECONDS = 60.0
FIELDS = 4  # numbers in a message of sizes


class Group(Protocol):
    """What is used of a process group: the stubs of torch lack it."""

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work: ...


class Transport:
    """One rank's connections. `seconds`: how long any wait for another rank may take. What is sent has left when the
    other rank receives it.

    Raises:
        EngineDown: not all ranks connect.
    """

    def __init__(self, store: Store, rank: int, ranks: int, device: torch.device, host: str, seconds: float) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.lock = threading.Lock()  # held while a message is sent
        self._seconds = timedelta(seconds=seconds)
        self._control: Group
        self._data: Group
        self._sent: list[tuple[int, Work]] = []
        try:
            self._control = _gloo(PrefixStore("control", store), rank, ranks, host)
            self._data = self._control if device.type == CPU else _nccl(PrefixStore("data", store), rank, ranks)
        except RuntimeError as error:
            raise EngineDown(f"rank {rank} cannot connect to the other ranks: {_first_line(error)}") from None

    def send_sizes(self, peer: int, sizes: Sequence[int]) -> None:
        """Say what comes; of four numbers the first says what they mean."""
        self._send(self._control, peer, torch.tensor(sizes), SIZES)

    def receive_sizes(self, peer: int, seconds: float) -> list[int]:
        """The next message of sizes, waited for so long."""
        sizes = torch.empty(FIELDS, dtype=torch.int64)
        work = self._started(peer, lambda: self._control.recv([sizes], peer, SIZES))
        self._wait(peer, work, timedelta(seconds=seconds))
        return sizes.tolist()

    def send(self, peer: int, content: Tensor, tag: int) -> None:
        """Start to send a tensor, which must not change before `finish`."""
        self._send(self._data, peer, content, tag)

    def receive(self, peer: int, into: Tensor, tag: int) -> Callable[[], None]:
        """Start to fill a contiguous tensor with what a rank sends; the result is called to wait for that."""
        work = self._started(peer, lambda: self._data.recv([into], peer, tag))
        return partial(self._wait, peer, work, self._seconds)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        sent, self._sent = self._sent, []
        for peer, work in sent:
            self._wait(peer, work, self._seconds)

    def beat(self) -> None:
        """Show all other ranks that this one lives."""
        with self.lock:
            for peer in range(self.ranks):
                if peer != self.rank:
                    self.send_sizes(peer, [0] * FIELDS)
            self.finish()

    def close(self) -> None:
        """Close all connections: the other ranks notice."""
        self._sent.clear()
        del self._control, self._data

    def _send(self, group: Group, peer: int, content: Tensor, tag: int) -> None:
        self._sent.append((peer, self._started(peer, lambda: group.send([content], peer, tag))))

    def _started(self, peer: int, start: Callable[[], Work]) -> Work:
        try:
            return start()
        except RuntimeError as error:
            raise self._lost(peer, error) from None

    def _wait(self, peer: int, work: Work, timeout: timedelta) -> None:
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise self._lost(peer, error) from None

    def _lost(self, peer: int, error: RuntimeError) -> EngineDown:
        text = str(error)
        if "Connection" in text:
            return EngineDown(f"rank {peer} has ended: its connection is closed")
        if "imed out" in text:
            return EngineDown(f"rank {peer} has not answered in time (--rank-seconds): {_first_line(error)}")
        return EngineDown(f"rank {peer} is lost: {_first_line(error)}")


def _gloo(store: Store, rank: int, ranks: int, host: str) -> Group:
    """`host`: this machine's address, which the other ranks connect to."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # what `Options` of the stubs is at run time
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._threads, options._timeout = 1, timedelta(seconds=CONNECT_SECONDS)
    return cast(Group, ProcessGroupGloo(store, rank, ranks, options))


def _nccl(store: Store, rank: int, ranks: int) -> Group:
    """On the current GPU, of which each rank must have one of its own."""
    if not torch.distributed.is_nccl_available():
        raise RuntimeError("this torch has no NCCL, which ranks on GPUs need")
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=CONNECT_SECONDS)
    return cast(Group, ProcessGroupNCCL(store, rank, ranks, options))


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0][:200]
