"""The input batch builder: turns a plan into the decoder's input, a step's tokens, expert counts and pages as tensors.

While the same sequences decode, most of the input is the same as one step before: it is kept, and the rest is written
in place, so that Python work per step grows with the sequences, not with their tokens. It runs no model.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Plan
from engine.sequence import Sequence
from model.batch import Batch, BudgetRows, Cache, LateIds, Pages
from model.budget import FAMILY_RULE, ExpertCounts, RoutingRule

Ints = NDArray[np.int64]
# Per chunk: its sequence, tokens, logit rows, preemptions so far, and the expert counts of its first token.
PlanShape = list[tuple[Sequence, int, int, int, ExpertCounts]]


class InputBatchBuilder:
    """Builds the input of each step for one cache.

    The tensors of one step are overwritten by the next.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache, self._block_size = cache, cache.block_size
        self._shape: PlanShape = []
        self._first_pages: list[int] = []  # per sequence in the tables: the page of its first new token
        self._ids_T = self._positions_T = self._end_B = _ints([])
        self._batch: Batch | None = None
        self._pages: Pages | None = None

    def build(self, plan: Plan, late: LateIds | None = None) -> tuple[Batch, Pages]:
        """The new tokens of every chunk, in plan order, and the pages of their sequences. `late`: those whose ids are
        not known here.

        The rows of the batch that get logits: first all rows to sample from, then those that score prompt tokens.
        """
        shape: PlanShape = []
        starts: list[int] = []
        ids: list[int] = []  # of the first tokens
        for chunk in plan:
            sequence, start = chunk.sequence, chunk.start
            length, counts = chunk.length + len(chunk.drafts), sequence.counts_at(start)
            shape.append((sequence, length, chunk.logit_rows, sequence.preemptions, counts))
            starts.append(start)
            ids.append(sequence.tokens[start])
        one_token_each = len(self._ids_T) == len(plan)
        if self._batch is None or self._pages is None or shape != self._shape or not one_token_each:
            return self._rebuild(plan, shape, late)
        self._ids_T[:], self._positions_T[:] = ids, starts
        self._end_B[:] = [start + 1 for start in starts]
        first_pages = [start // self._block_size for start in starts]
        snapshots_N3 = _snapshots(plan)
        if snapshots_N3 is not self._pages.snapshots_N3:
            self._pages = replace(self._pages, snapshots_N3=snapshots_N3)
        if first_pages != self._first_pages:
            self._pages = replace(self._pages, tables_BP=_tables(plan, self._block_size))
            self._first_pages = first_pages
        if self._batch.late is not late:
            self._batch = replace(self._batch, late=late)
        return self._batch, self._pages

    def _rebuild(self, plan: Plan, shape: PlanShape, late: LateIds | None) -> tuple[Batch, Pages]:
        self._batch = None  # if what follows fails, nothing is kept
        start_B = _ints([chunk.start for chunk in plan])
        length_B = _ints([chunk.length + len(chunk.drafts) for chunk in plan])
        first_B = length_B.cumsum() - length_B
        spans_B3 = np.stack([first_B, length_B, start_B + length_B], axis=1)
        self._ids_T = _ints([token for chunk in plan for token in chunk.tokens])
        self._positions_T = np.arange(len(self._ids_T)) + (start_B - first_B).repeat(length_B)
        self._shape = shape
        self._end_B = spans_B3[:, 2]
        self._first_pages = (start_B // self._block_size).tolist()
        batch = replace(self._batch_of(plan, first_B, length_B), late=late)
        slots_B = torch.from_numpy(_ints([chunk.sequence.slot for chunk in plan]))
        tables_BP, spans = _tables(plan, self._block_size), torch.from_numpy(spans_B3)
        self._pages = Pages(self._cache, tables_BP, spans, slots_B, _snapshots(plan))
        self._batch = batch
        return batch, self._pages

    def _batch_of(self, plan: Plan, first_B: Ints, length_B: Ints) -> Batch:
        requests = [chunk.sequence.request for chunk in plan]
        seeds_B = _ints([request.noise for request in requests])
        ids_T, positions_T = torch.from_numpy(self._ids_T), torch.from_numpy(self._positions_T)
        seeds_T = torch.from_numpy(seeds_B.repeat(length_B))
        rows_B = torch.from_numpy(_logit_rows(plan, first_B))
        return Batch(
            ids_T=ids_T,
            positions_T=positions_T,
            seeds_T=seeds_T,
            budget=_budget_rows(plan),
            rows_B=rows_B,
            routes=any(request.return_routes for request in requests),
        )


def _budget_rows(plan: Plan) -> BudgetRows:
    """What every token of the plan may use, from the runs of counts of its chunks."""
    runs = [run for chunk in plan for run in chunk.count_runs]
    counts_NL = _ints([counts for counts, _ in runs])
    length_N = _ints([tokens for _, tokens in runs])
    counts_LT = np.ascontiguousarray(counts_NL.T.repeat(length_N, axis=1))
    pairs_L = (counts_NL * length_N[:, None]).sum(0)
    rules, rule_T = _rules(plan)
    k_max = int(counts_NL.max(initial=0))
    return BudgetRows(torch.from_numpy(counts_LT), k_max, tuple(pairs_L.tolist()), rules, rule_T)


def _rules(plan: Plan) -> tuple[tuple[RoutingRule, ...], Tensor | None]:
    """The distinct routing rules of the plan, and which of them each token has; none where all have the family's."""
    rule_B = [chunk.sequence.request.budget.rule for chunk in plan]
    rules = tuple(dict.fromkeys(rule_B))
    if rules == (FAMILY_RULE,):
        return (), None
    length_B = [chunk.length + len(chunk.drafts) for chunk in plan]
    return rules, torch.from_numpy(_ints([rules.index(rule) for rule in rule_B]).repeat(length_B))


def _logit_rows(plan: Plan, first_B: Ints) -> Ints:
    """The rows of the batch that get logits: those to sample from, then those that score prompt tokens."""
    sampled: list[int] = []
    scored: list[int] = []
    for chunk, first in zip(plan, first_B.tolist(), strict=True):
        if chunk.samples:
            last = first + chunk.length - 1
            sampled += range(last, last + 1 + len(chunk.drafts))
        scored += [first + position - 1 - chunk.start for position in chunk.scored_positions]
    return _ints(sampled + scored)


def _snapshots(plan: Plan) -> Tensor | None:
    """The snapshots to take of each sequence: see `Pages.snapshots_N3`."""
    taken = [(i, at - c.start, slot) for i, c in enumerate(plan) for at, slot in c.sequence.snapshots]
    return torch.from_numpy(_ints(taken)) if taken else None


def _tables(plan: Plan, block_size: int) -> Tensor:
    """The block ids of each sequence's pages, [B, P], padded with block 0."""
    lengths = [chunk.start + chunk.length + len(chunk.drafts) for chunk in plan]
    used = [-(-length // block_size) for length in lengths]
    tables_BP = np.zeros((len(plan), max(used, default=0)), dtype=np.int64)
    for table_P, chunk, count in zip(tables_BP, plan, used, strict=True):
        table_P[:count] = chunk.sequence.blocks[:count]
    return torch.from_numpy(tables_BP)


def _ints(values: object) -> Ints:
    return np.array(values, dtype=np.int64)
