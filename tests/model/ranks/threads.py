"""Ranks as threads of one process, each with its own part of a tiny checkpoint and its own sockets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from model.decoder import Decoder
from model.errors import EngineDown
from model.options import DType
from model.ranks.experts import RankedExperts, answer
from model.ranks.share import Share
from model.ranks.transport import Transport
from tests.model.tiny import decoder
from weights.config import decoder_config
from weights.load import load_model
from weights.save import save_model
from weights.share import mixtures_of

EXPERTS = 7  # not a multiple of the ranks
RAW: dict[str, Any] = {
    "model_type": "olmoe",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
}
HOST = "127.0.0.1"


def checkpoint(folder: Path) -> Path:
    """A float32 checkpoint of random weights."""
    save_model(decoder(decoder_config(RAW)), RAW, folder, torch.float32)
    return folder


def transports(ranks: int, seconds: float = 20.0) -> list[Transport]:
    """One per rank, connected."""
    wait, made = timedelta(seconds=30), dict[int, Transport]()
    server = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=wait)

    def connect(rank: int) -> None:
        store = TCPStore(HOST, server.port, is_master=False, wait_for_workers=False, timeout=wait)
        made[rank] = Transport(store, rank, ranks, torch.device("cpu"), HOST, seconds)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [made[rank] for rank in range(ranks)]


@contextmanager
def divided(folder: Path, ranks: int, dtype: DType) -> Iterator[tuple[Decoder, Transport]]:
    """Rank 0's decoder, whose experts run on all ranks, and its transport."""
    parts = [load_model(folder, dtype, share=Share(rank, ranks))[0] for rank in range(ranks)]
    first, *others = transports(ranks)
    for layer, mixture in enumerate(mixtures_of(parts[0])):
        mixture.execute = RankedExperts(layer, mixture, first)

    def run(transport: Transport, part: Decoder) -> None:
        torch.set_num_threads(1)  # as rank 0 has: a setting of each thread, and a product's bits follow it
        with suppress(EngineDown):
            answer(transport, mixtures_of(part))

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in zip(others, parts[1:], strict=True)]
    for thread in threads:
        thread.start()
    yield parts[0], first
    first.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
