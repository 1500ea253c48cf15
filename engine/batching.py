"""From a plan to the decoder's input: one step's tokens, counts and pages as tensors.

A handful of array operations whatever the batch; Python touches a sequence once a step, never a token. It runs nothing.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from engine.plan import Plan
from model.batch import Batch, Pages, Span

Ints = NDArray[np.int64]


def batch_of(plan: Plan) -> Batch:
    """The new tokens of every chunk, in plan order."""
    requests = [chunk.sequence.request for chunk in plan]
    start_B, length_B = _ints([chunk.start for chunk in plan]), _ints([chunk.length for chunk in plan])
    first_B = length_B.cumsum() - length_B
    counts_BL = _ints([request.budget.per_layer for request in requests])
    counts_LT = np.ascontiguousarray(counts_BL.T.repeat(length_B, axis=1))
    samples_B = np.array([chunk.samples for chunk in plan])
    return Batch(
        ids_T=torch.from_numpy(_tokens(plan)),
        positions_T=torch.from_numpy(np.arange(length_B.sum()) + (start_B - first_B).repeat(length_B)),
        seeds_T=torch.from_numpy(_ints([request.sampling.seed for request in requests]).repeat(length_B)),
        experts_LT=torch.from_numpy(counts_LT),
        k_max=int(counts_BL.max(initial=0)),
        pairs_L=tuple((counts_BL * length_B[:, None]).sum(0).tolist()),
        rows_B=torch.from_numpy((first_B + length_B - 1)[samples_B]),
    )


def pages_of(plan: Plan, block_size: int) -> Pages:
    """Where the chunks' keys and values live; tables are padded with block 0."""
    ends = [chunk.start + chunk.length for chunk in plan]
    tables_BP = np.zeros((len(plan), -(-max(ends) // block_size)), dtype=np.int64)
    spans, first = [], 0
    for table_P, chunk, end in zip(tables_BP, plan, ends, strict=True):
        used = -(-end // block_size)
        table_P[:used] = chunk.sequence.blocks[:used]
        spans.append(Span(first, chunk.length, end))
        first += chunk.length
    return Pages(torch.from_numpy(tables_BP), tuple(spans))


def _tokens(plan: Plan) -> Ints:
    if all(chunk.length == 1 for chunk in plan):
        return _ints([chunk.sequence.tokens[chunk.start] for chunk in plan])
    return np.concatenate([_ints(c.sequence.tokens[c.start : c.start + c.length]) for c in plan])


def _ints(values: object) -> Ints:
    return np.array(values, dtype=np.int64)
