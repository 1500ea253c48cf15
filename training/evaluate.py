"""Held-out loss of a decoder at a fixed expert count. It depends on windows of tokens, not on files."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.base import Runnable
from model.backends.torch.attend import WholeAttend
from model.batch import Batch, Pages
from model.shapes.decoder import DecoderConfig
from training.step import make_batch

COUNTS = (1, 2, 4, 8)


class WholeModel(Protocol):
    """A callable that computes batches of whole sequences, such as a `Decoder`."""

    config: DecoderConfig

    def __call__(self, batch: Batch, attend: WholeAttend) -> Tensor: ...


class ServedModel:
    """A model as a backend runs it, over whole sequences: the arithmetic that requests will get."""

    def __init__(self, runnable: Runnable, block_size: int) -> None:
        self.runnable, self.block_size = runnable, block_size
        self.config = runnable.config

    def __call__(self, batch: Batch, attend: WholeAttend) -> Tensor:
        length, size = attend.length, self.block_size
        rows, blocks = len(batch.ids_T) // length, -(-length // size)
        cache = self.runnable.cache(rows * blocks, size, slots=rows)
        tables_BP = torch.arange(rows * blocks).unflatten(0, (rows, blocks))
        spans_B3 = torch.tensor([(row * length, length, length) for row in range(rows)])
        return self.runnable(batch, Pages(cache, tables_BP, spans_B3, torch.arange(rows)))


@torch.inference_mode()
def held_out_loss(model: WholeModel, window_BS: Tensor, count: int, rows: int = 8, seed: int = 0) -> float:
    """Mean next-token cross-entropy in nats over windows [B, S] at one count in every layer; noise keyed by `seed`."""
    counts, total = [count] * len(model.config.mixtures), 0.0
    for start in range(0, len(window_BS), rows):
        part_BS = window_BS[start : start + rows]
        ids_BS, target_BS = part_BS[:, :-1], part_BS[:, 1:]
        logits_TV = model(make_batch(ids_BS, counts, seed + start), WholeAttend(ids_BS.shape[1], ids_BS.device))
        total += float(F.cross_entropy(logits_TV.float(), target_BS.flatten(), reduction="sum"))
    return total / window_BS[:, 1:].numel()


@torch.inference_mode()
def agreement(model: WholeModel, window_BS: Tensor, count: int, reference: int, rows: int = 8) -> float:
    """Share of positions whose most likely token at `count` is that at the `reference` count."""
    layers, same = len(model.config.mixtures), 0
    for start in range(0, len(window_BS), rows):
        ids_BS = window_BS[start : start + rows, :-1]
        length = ids_BS.shape[1]
        batches = (make_batch(ids_BS, [k] * layers, start) for k in (count, reference))
        best = [model(batch, WholeAttend(length, ids_BS.device)).argmax(-1) for batch in batches]
        same += int((best[0] == best[1]).sum())
    return same / window_BS[:, 1:].numel()
