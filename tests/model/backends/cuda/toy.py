"""A decoder of whole numbers, which has no rounding: a token's logits follow from all tokens that its sequence has in
the cache, from its count and from its rule. Padding gets what means nothing."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.backends.cuda.inputs import StepInputs, host_inputs
from model.backends.cuda.kernels.attend import PAGE
from model.batch import Batch, BudgetRows, Cache, LateIds, Pages
from model.budget import FAMILY_RULE, RoutingRule

LAYERS, VOCABULARY, TRAINED, MOST, LENGTH = 2, 7, 4, 16, 6000
BLOCKS, STATES = 400, 300
MEANINGLESS = -(10**9)


@dataclass(frozen=True)
class Outputs:
    logits_BV: Tensor
    loads: tuple[Tensor, ...]


def empty_cache() -> Cache:
    """Of tokens and of states, each with one slot more, which a slot of -1 means."""
    return Cache(PAGE, [torch.zeros(slots + 1, dtype=torch.int64) for slots in (BLOCKS * PAGE, STATES)])


def compute(inputs: StepInputs) -> Outputs:
    shape, (cache_S, states_S) = inputs.shape, inputs.cache.layers
    value_T = inputs.ids_T * 31 + inputs.positions_T * 7 + inputs.seeds_T + inputs.counts_LT.sum(0) * 1001
    if inputs.rules is not None:
        value_T = value_T + inputs.rules.normaliser_T * 13 + (inputs.rules.top_p_T * 100).long()
        if inputs.rules.repair_T is not None:
            value_T = value_T + inputs.rules.repair_T * 17
    if inputs.states_B is not None:
        has_rows_B = inputs.spans_B3[:, 1] > 0
        state_B = states_S[inputs.states_B] * 3 % 1009 + inputs.spans_B3[:, 2]
        states_S.index_put_((torch.where(has_rows_B, inputs.states_B, -1),), state_B)
    cache_S.index_put_((inputs.slots_T,), value_T)
    seen_T = value_T.new_full((shape.tokens + 1,), MEANINGLESS)
    sequence_N = inputs.tiles.sequence_N.long()
    first_N, rows_N, context_N = inputs.spans_B3[sequence_N.clamp(min=0)].unbind(1)
    table_NP = inputs.tables_BP[sequence_N.clamp(min=0)]
    slot_NS = (table_NP[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1)
    for row in range(shape.tile_rows):
        offset_N = inputs.tiles.first_N + row
        is_real_N = (sequence_N >= 0) & (offset_N < rows_N)
        sees_NS = torch.arange(slot_NS.shape[1]) <= (context_N - rows_N + offset_N)[:, None]
        seen_N = (cache_S[slot_NS] * sees_NS).sum(1)
        token_N = torch.where(is_real_N, first_N + offset_N, shape.tokens)
        seen_T.index_put_((token_N,), seen_N, accumulate=True)  # a token that two tiles name is wrong
    logits_BV = seen_T[inputs.rows_B, None] * torch.arange(1, VOCABULARY + 1) % 1009
    return Outputs(logits_BV, tuple(inputs.counts_LT.sum(1).unbind()))


@dataclass(frozen=True)
class Step:
    """What a test says of a step; all else follows from the seed."""

    contexts: tuple[int, ...]
    rows: tuple[int, ...]  # new tokens of each sequence
    k_max: int = TRAINED
    rules: bool = False
    late: int = 0  # how many ids come late
    wanted: int | None = None  # rows that get logits; None: each sequence's last
    states: bool = False
    seed: int = 0

    def inputs(self, cache: Cache) -> tuple[StepInputs, LateIds | None]:
        """The step on the host, and its late ids."""
        rng = np.random.default_rng(self.seed)
        rows_B, context_B = np.array(self.rows), np.array(self.contexts)
        first_B, tokens = rows_B.cumsum() - rows_B, int(rows_B.sum())
        position_T = np.arange(tokens) + (context_B - rows_B - first_B).repeat(rows_B)
        pages = -(-context_B // PAGE)
        tables_BP = rng.integers(0, BLOCKS, (len(rows_B), max(pages)))
        own = iter(rng.permutation(BLOCKS))  # blocks that are written are those of one sequence
        for table_P, end, start in zip(tables_BP, pages, (context_B - rows_B) // PAGE, strict=True):
            table_P[start:end] = [next(own) for _ in range(start, end)]
        last_B = (first_B + rows_B - 1)[: self.wanted]
        batch = Batch(
            ids_T=torch.from_numpy(rng.integers(0, VOCABULARY, tokens)),
            positions_T=torch.from_numpy(position_T),
            seeds_T=torch.from_numpy(rng.integers(0, 1000, tokens)),
            budget=self._budget(rng, tokens),
            rows_B=torch.from_numpy(last_B),
            late=self._late(rng, tokens),
        )
        spans_B3 = torch.from_numpy(np.stack([first_B, rows_B, context_B], axis=1))
        states_B = torch.from_numpy(rng.permutation(STATES)[: len(rows_B)]) if self.states else None
        pages = Pages(cache, torch.from_numpy(tables_BP), spans_B3, states_B)
        return host_inputs(batch, pages, 8, TRAINED), batch.late

    def _budget(self, rng: np.random.Generator, tokens: int) -> BudgetRows:
        counts_LT = rng.integers(1, self.k_max + 1, (LAYERS, tokens))
        counts_LT[0, 0] = self.k_max
        rules: tuple[RoutingRule, ...] = ()
        if self.rules:
            rules = (FAMILY_RULE, RoutingRule(normaliser=3), RoutingRule(top_p=0.5, repair=self.seed % 2 == 1))
        rule_T = torch.from_numpy(rng.integers(0, len(rules), tokens)) if rules else None
        return BudgetRows(torch.from_numpy(counts_LT), self.k_max, tuple(counts_LT.sum(1).tolist()), rules, rule_T)

    def _late(self, rng: np.random.Generator, tokens: int) -> LateIds | None:
        if not self.late:
            return None
        number = min(self.late, tokens)
        row_N, source_N = rng.permutation(tokens)[:number], rng.integers(0, 9, number)
        return LateIds(torch.from_numpy(row_N), torch.from_numpy(source_N), torch.from_numpy(rng.integers(0, 9, 9)))


def decoding(*contexts: int, **values: Any) -> Step:
    """A step in which sequences with such contexts have one new token each."""
    return Step(contexts, (1,) * len(contexts), **values)
