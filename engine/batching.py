"""From a plan to the decoder's input: one step's tokens, counts and pages as tensors.

While the same sequences decode, most of it is what it was a step ago and is kept: Python touches a sequence once a
step, never a token. It runs nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Chunk, Plan
from engine.sequence import Sequence
from model.batch import Batch, Pages

Ints = NDArray[np.int64]
Shape = list[tuple[Sequence, int, int]]  # of each chunk: its sequence, its length, how often that was preempted


@dataclass(frozen=True, slots=True)
class Fixed:
    """What a step shares with the next of the same shape."""

    length_B: Ints
    first_B: Ints
    last_B: Tensor
    seeds_T: Tensor
    counts_LT: Tensor
    k_max: int
    pairs_L: tuple[int, ...]


class Batching:
    """Makes the input of one step after the other for a cache with blocks of `block_size` tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._shape: Shape = []
        self._fixed: Fixed | None = None
        self._used_B = _ints([])  # blocks of each sequence in the tables below
        self._tables_BP = torch.zeros(0, 0, dtype=torch.int64)

    def step(self, plan: Plan) -> tuple[Batch, Pages]:
        """The new tokens of every chunk, in plan order, and where their keys and values live."""
        shape = [(c.sequence, c.length, c.sequence.preemptions) for c in plan]
        if shape != self._shape or self._fixed is None:
            self._shape, self._fixed, self._used_B = shape, _fixed(plan), _ints([])
        fixed = self._fixed
        start_B, samples = _ints([c.start for c in plan]), [c.samples for c in plan]
        positions_T = start_B if len(fixed.seeds_T) == len(plan) else _positions(start_B, fixed)
        batch = Batch(
            ids_T=torch.from_numpy(_tokens(plan)),
            positions_T=torch.from_numpy(positions_T),
            seeds_T=fixed.seeds_T,
            experts_LT=fixed.counts_LT,
            k_max=fixed.k_max,
            pairs_L=fixed.pairs_L,
            rows_B=fixed.last_B if all(samples) else fixed.last_B[samples],
        )
        return batch, self._pages(plan, fixed, start_B + fixed.length_B)

    def _pages(self, plan: Plan, fixed: Fixed, end_B: Ints) -> Pages:
        used_B = -(-end_B // self._block_size)
        if not np.array_equal(used_B, self._used_B):
            self._used_B, self._tables_BP = used_B, _tables(plan, used_B.tolist())
        spans_B3 = torch.from_numpy(np.stack([fixed.first_B, fixed.length_B, end_B], axis=1))
        return Pages(self._tables_BP, spans_B3)


def _fixed(plan: Plan) -> Fixed:
    requests = [chunk.sequence.request for chunk in plan]
    length_B = _ints([chunk.length for chunk in plan])
    counts_BL = _ints([request.budget.per_layer for request in requests])
    return Fixed(
        length_B,
        length_B.cumsum() - length_B,
        torch.from_numpy(length_B.cumsum() - 1),
        torch.from_numpy(_ints([request.sampling.seed for request in requests]).repeat(length_B)),
        torch.from_numpy(np.ascontiguousarray(counts_BL.T.repeat(length_B, axis=1))),
        int(counts_BL.max(initial=0)),
        tuple((counts_BL * length_B[:, None]).sum(0).tolist()),
    )


def _positions(start_B: Ints, fixed: Fixed) -> Ints:
    positions_T: Ints = np.arange(len(fixed.seeds_T)) + (start_B - fixed.first_B).repeat(fixed.length_B)
    return positions_T


def _tokens(plan: Plan) -> Ints:
    return _ints([token for chunk in plan for token in _chunk_tokens(chunk)])


def _chunk_tokens(chunk: Chunk) -> list[int]:
    return chunk.sequence.tokens[chunk.start : chunk.start + chunk.length]


def _tables(plan: Plan, used: list[int]) -> Tensor:
    """Block ids [B, P], padded with block 0."""
    tables_BP = np.zeros((len(plan), max(used)), dtype=np.int64)
    for table_P, chunk, count in zip(tables_BP, plan, used, strict=True):
        table_P[:count] = chunk.sequence.blocks[:count]
    return torch.from_numpy(tables_BP)


def _ints(values: object) -> Ints:
    return np.array(values, dtype=np.int64)
