"""A rank's process: `python -m engine.ranks.rank HOST:PORT RANK`, or `moedial rank`.

It joins the store of rank 0, loads its experts, and runs what pairs rank 0 sends, until rank 0 ends.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine import logs, parent
from engine.memory import keep_freed_memory
from engine.ranks.group import FAILED, GO, JOB, JOINED, LOAD_SECONDS, READY, Job
from model.devices import CPU, make_current, resolve
from model.errors import CheckpointError, MoedialError
from model.moe.topk import TopKMixture
from model.ranks.experts import answer
from model.ranks.share import Share
from model.ranks.transport import SILENCE_SECONDS, Transport
from weights.calibration import checkpoint_hash
from weights.folder import resolve_model
from weights.load import load_model
from weights.share import expert_bytes, mixtures_of

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one rank until rank 0 ends; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.parent:
        parent.die_with_parent()
        if os.getppid() != options.parent:
            return 1  # it ended before this process could be tied to it
    logs.configure("info", "text")  # until rank 0 says how
    try:
        run(options.address, options.rank, options.model, options.device)
    except (MoedialError, RuntimeError) as error:
        log.error("rank %d ends: %s", options.rank, error)
    return 1


def run(address: str, rank: int, model: str = "", device: str = "") -> None:
    """Join, load and answer.

    Raises:
        CheckpointError: the rank cannot load its part; rank 0 gets the message.
        EngineDown: rank 0 has ended.
        RuntimeError: there is no rank 0 at the address, or it ended while this rank loaded.
    """
    host, _, port = address.rpartition(":")
    wait = timedelta(seconds=LOAD_SECONDS)
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=wait)
    job = msgspec.json.decode(store.get(JOB), type=Job)
    logs.configure(job.log_level, job.log_format)
    if not 0 < rank < job.ranks:
        raise CheckpointError(f"rank {rank} is not between 1 and {job.ranks - 1}, the ranks beside rank 0")
    if store.add(JOINED.format(rank), 1) > 1:
        raise CheckpointError(f"rank {rank} has joined {address} already")
    try:
        mixtures, place = _load(job, Share(rank, job.ranks), model, device)
    except CheckpointError as error:
        store.set(FAILED.format(rank), str(error))
        raise
    store.set(READY.format(rank), str(expert_bytes(torch.nn.ModuleList(mixtures))))
    store.wait([GO], wait)
    answer(Transport(store, rank, job.ranks, place, _own_address(host, int(port)), SILENCE_SECONDS), mixtures)


def _load(job: Job, share: Share, model: str, device: str) -> tuple[list[TopKMixture], torch.device]:
    """This rank's experts, and where they are."""
    keep_freed_memory()
    if not device:
        device = CPU if job.device == CPU else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    place = torch.device(resolve(device))
    if place.type != torch.device(job.device).type:
        raise CheckpointError(f"this rank is on {place}, but rank 0 on {job.device}: ranks run on devices of one kind")
    make_current(str(place))
    torch.set_num_threads(job.threads)
    folder: Path = resolve_model(model or job.model)
    if job.checkpoint and checkpoint_hash(folder) != job.checkpoint:
        raise CheckpointError(f"{folder} is not the checkpoint that rank 0 serves")
    loaded, _ = load_model(folder, job.dtype, device=str(place), share=share)
    return mixtures_of(loaded), place


def _own_address(host: str, port: int) -> str:
    """The address under which rank 0's machine sees this one."""
    with socket.create_connection((host, port), timeout=10) as connection:
        return str(connection.getsockname()[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moedial rank", description=__doc__)
    parser.add_argument("address", help="HOST:PORT, rank 0's --rank-address")
    parser.add_argument("rank", type=int)
    parser.add_argument("--model", default="", help="this machine's copy; by default the path that rank 0 has")
    parser.add_argument("--device", default="", help="cpu or cuda:n; by default as rank 0, on a GPU cuda:$LOCAL_RANK")
    parser.add_argument("--parent", type=int, default=0, help="the process of rank 0, where that started this one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
