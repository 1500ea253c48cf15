"""Rank 0's side of an engine on several ranks: starts the others or waits for them, connects, and notices their end.

The ranks meet in a store of torch.distributed, whose keys are below. It is not authenticated: the network between ranks
must be private. Where nothing else is said it is the loopback interface. Not here: what a rank does
(`engine/ranks/rank.py`), and what is sent for a layer (`model/ranks/experts.py`).
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine.environment import child_environment
from engine.logs import Level, LogFormat
from engine.types import EngineSettings
from model.decoder import Decoder
from model.devices import CPU, resolve
from model.errors import CheckpointError, EngineDown
from model.options import DType
from model.ranks.experts import RankedExperts
from model.ranks.transport import BEAT_SECONDS, Transport
from weights.calibration import checkpoint_hash
from weights.share import expert_bytes, mixtures_of

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
JOB, GO = "job", "go"  # keys: what to load; all ranks are ready
JOINED, READY, FAILED = "joined/{}", "ready/{}", "failed/{}"  # keys of a rank
LOAD_SECONDS = 600.0  # that all ranks together may take to join and to load
_POLL_SECONDS = 0.05


def _end_process(error: EngineDown) -> None:
    """End this process, so that the next one starts without waiting for a request."""
    log.error("the engine process ends: %s", error)
    os._exit(1)


class Job(msgspec.Struct, frozen=True):
    """The message of rank 0 to the other ranks before they load."""

    ranks: int
    model: str
    checkpoint: str  # its hash, where ranks may read other copies
    dtype: DType
    device: str  # of rank 0
    threads: int
    log_level: Level
    log_format: LogFormat


class RankGroup:
    """The ranks of one engine. Those of this machine are started, and load while rank 0 does. `lost` is called, in a
    thread of its own, when a rank is found to be lost while nothing runs.

    Raises:
        CheckpointError: `rank_address` is no address of this machine, or is taken.
    """

    def __init__(
        self, settings: EngineSettings, folder: Path, threads: int, lost: Callable[[EngineDown], None] = _end_process
    ) -> None:
        self._ranks, self._device = settings.ranks, torch.device(resolve(settings.device))
        self._seconds, self._lost = settings.rank_seconds, lost
        host, _, port = (settings.rank_address or f"{LOOPBACK}:0").rpartition(":")
        self._host = host
        self._store = _store(host, int(port))
        self.address = f"{host}:{self._store.port}"
        job = Job(
            ranks=settings.ranks,
            model=str(folder),
            checkpoint=checkpoint_hash(folder) if settings.rank_address else "",
            dtype=settings.dtype,
            device=str(self._device),
            threads=threads,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )
        self._store.set(JOB, msgspec.json.encode(job).decode())
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        if settings.rank_address:
            log.info("waiting for ranks 1 to %d at %s", self._ranks - 1, self.address)
        else:
            self.processes = {rank: self._start(rank) for rank in range(1, self._ranks)}

    def connect(self, model: Decoder) -> tuple[int, ...]:
        """Wait for all ranks, and run the model's experts on them; returns the bytes of experts that each rank holds.

        Raises:
            CheckpointError: a rank cannot load its part, or does not come.
            EngineDown: not all ranks connect.
        """
        held = (expert_bytes(model), *self._wait())
        self._store.set(GO, "")
        transport = Transport(self._store, 0, self._ranks, self._device, self._host, self._seconds)
        for layer, mixture in enumerate(mixtures_of(model)):
            mixture.execute = RankedExperts(layer, mixture, transport)
        self.beats = threading.Thread(target=_beat, args=(transport, self._lost), name="rank beats", daemon=True)
        self.beats.start()
        for rank, size in enumerate(held):
            log.info("rank %d holds %.3f GB of experts", rank, size / 1e9)
        return held

    def _start(self, rank: int) -> "subprocess.Popen[bytes]":
        device = CPU if self._device.type == CPU else f"cuda:{rank}"
        command = [sys.executable, "-m", "engine.ranks.rank", self.address, str(rank)]
        arguments = [*command, "--device", device, "--parent", str(os.getpid())]
        return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=2, env=child_environment())

    def _wait(self) -> list[int]:
        """The bytes that each of the other ranks says it holds, once all are ready."""
        waiting, held = set(range(1, self._ranks)), dict[int, int]()
        deadline = time.monotonic() + LOAD_SECONDS
        while waiting:
            for rank in sorted(waiting):
                if self._store.check([READY.format(rank)]):
                    held[rank] = int(self._store.get(READY.format(rank)))
                    waiting.remove(rank)
                elif self._store.check([FAILED.format(rank)]):
                    raise CheckpointError(f"rank {rank}: {self._store.get(FAILED.format(rank)).decode()}")
                elif rank in self.processes and self.processes[rank].poll() is not None:
                    raise CheckpointError(f"rank {rank} ended while it loaded: status {self.processes[rank].poll()}")
            if time.monotonic() > deadline:
                missing = ", ".join(map(str, sorted(waiting)))
                raise CheckpointError(f"ranks {missing} were not ready after {LOAD_SECONDS:g} seconds")
            time.sleep(_POLL_SECONDS)
        return [held[rank] for rank in sorted(held)]


def _store(host: str, port: int) -> TCPStore:
    """A store that listens on this address alone: left to itself it would listen on all."""
    try:
        with socket.create_server((host, port), backlog=64) as listener:
            return TCPStore(
                host,
                listener.getsockname()[1],
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=LOAD_SECONDS),
                master_listen_fd=os.dup(listener.fileno()),
            )
    except OSError as error:
        raise CheckpointError(f"rank_address {host}:{port}: {error}") from None


def _beat(transport: Transport, lost: Callable[[EngineDown], None]) -> None:
    """Show the ranks that this one lives, until one is lost."""
    while True:
        time.sleep(BEAT_SECONDS)
        try:
            transport.beat()
        except EngineDown as error:
            lost(error)
            return
