"""From a plan to the decoder's input: one step's tokens, counts and pages as tensors.

While the same sequences decode, most of it is what it was a step ago and is kept, and the rest is written in place:
Python touches a sequence once a step, never a token. It runs nothing.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Plan
from engine.sequence import Sequence
from model.batch import Batch, Pages

Ints = NDArray[np.int64]
Shape = list[tuple[Sequence, int, int, int]]  # of each chunk: its sequence, tokens, rows, how often preempted


class InputBatchBuilder:
    """Makes the input of one step after the other for a cache with blocks of `block_size` tokens.

    What a step returns is overwritten by the next.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._shape: Shape = []
        self._pages_of: list[int] = []  # of each sequence in the tables: the page of its first new token
        self._ids_T = self._positions_T = self._end_B = _ints([])
        self._batch: Batch | None = None
        self._pages: Pages | None = None

    def step(self, plan: Plan) -> tuple[Batch, Pages]:
        """The new tokens of every chunk, in plan order, and where their keys and values live.

        Logits are wanted of rows to sample from, all of them first, and then of those whose next tokens are scored.
        """
        shape = [(c.sequence, c.length + len(c.drafts), c.logit_rows, c.sequence.preemptions) for c in plan]
        if self._batch is None or self._pages is None or shape != self._shape or len(self._ids_T) != len(plan):
            return self._begin(plan, shape)
        starts = [c.start for c in plan]
        self._ids_T[:] = [c.sequence.tokens[c.start] for c in plan]
        self._positions_T[:] = starts
        np.add(self._positions_T, 1, out=self._end_B)
        pages_of = [start // self._block_size for start in starts]
        if pages_of != self._pages_of:
            self._pages = replace(self._pages, tables_BP=_tables(plan, self._block_size))
            self._pages_of = pages_of
        return self._batch, self._pages

    def _begin(self, plan: Plan, shape: Shape) -> tuple[Batch, Pages]:
        self._batch = None  # if what follows fails, nothing is kept
        requests = [chunk.sequence.request for chunk in plan]
        start_B = _ints([chunk.start for chunk in plan])
        length_B = _ints([chunk.length + len(chunk.drafts) for chunk in plan])
        first_B = length_B.cumsum() - length_B
        counts_BL = _ints([request.budget.per_layer for request in requests])
        spans_B3 = np.stack([first_B, length_B, start_B + length_B], axis=1)
        self._ids_T = _ints([token for chunk in plan for token in chunk.tokens])
        self._positions_T = np.arange(len(self._ids_T)) + (start_B - first_B).repeat(length_B)
        self._shape, self._end_B, self._pages_of = shape, spans_B3[:, 2], (start_B // self._block_size).tolist()
        batch = Batch(
            ids_T=torch.from_numpy(self._ids_T),
            positions_T=torch.from_numpy(self._positions_T),
            seeds_T=torch.from_numpy(_ints([request.noise for request in requests]).repeat(length_B)),
            experts_LT=torch.from_numpy(np.ascontiguousarray(counts_BL.T.repeat(length_B, axis=1))),
            k_max=int(counts_BL.max(initial=0)),
            pairs_L=tuple((counts_BL * length_B[:, None]).sum(0).tolist()),
            rows_B=torch.from_numpy(_rows(plan, first_B)),
        )
        slots_B = torch.from_numpy(_ints([chunk.sequence.slot for chunk in plan]))
        self._pages = Pages(_tables(plan, self._block_size), torch.from_numpy(spans_B3), slots_B)
        self._batch = batch
        return batch, self._pages


def _rows(plan: Plan, first_B: Ints) -> Ints:
    sampled: list[int] = []
    scored: list[int] = []
    for chunk, first in zip(plan, first_B.tolist(), strict=True):
        if chunk.samples:
            sampled += range(first + chunk.length - 1, first + chunk.length + len(chunk.drafts))
        scored += [first + position - 1 - chunk.start for position in chunk.scored_positions]
    return _ints(sampled + scored)


def _tables(plan: Plan, block_size: int) -> Tensor:
    """Block ids [B, P], padded with block 0."""
    used = [-(-(chunk.start + chunk.length + len(chunk.drafts)) // block_size) for chunk in plan]
    tables_BP = np.zeros((len(plan), max(used, default=0)), dtype=np.int64)
    for table_P, chunk, count in zip(tables_BP, plan, used, strict=True):
        table_P[:count] = chunk.sequence.blocks[:count]
    return torch.from_numpy(tables_BP)


def _ints(values: object) -> Ints:
    return np.array(values, dtype=np.int64)
