"""One step's input to the decoder: new tokens of many sequences side by side, and where their keys and values live.

Shape suffixes used throughout `model/`: T tokens, B sequences, D width, H heads, G kv heads, C head width, F expert
width, E experts (∞-MoE: groups of units), K count, R routed pairs, S context slots, Z expert-space width, L MoE layers,
V vocabulary, P pages. Not here: how a batch is put together (see `engine/batching.py`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.budget import RoutingRule


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's rows in the batch: `rows` new tokens from row `first`, after `context - rows` cached ones."""

    first: int
    rows: int
    context: int


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's part of an attention in which not all its new rows attend to all its past.

    Its next `queries` rows have positions from `query` on, and attend to the positions from `first` up to `end` (in
    causal attention to none after their own). Its next `keys` rows of keys and values have positions from `key` on.
    """

    sequence: int  # of the step
    queries: int
    query: int
    keys: int
    key: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Cache:
    """What is kept of all sequences: a tensor for each of `config.memory`, laid out by the backend that made it."""

    block_size: int
    layers: list[Tensor]


@dataclass(frozen=True, slots=True)
class Pages:
    """Where keys, values and states of this step's sequences live in a cache."""

    cache: Cache
    tables_BP: Tensor  # int64: block ids of each sequence, padded with 0
    spans_B3: Tensor  # int64: of each sequence its first row, new tokens, and cached and new tokens together
    slots_B: Tensor | None = None  # int64: of each sequence the slot of its states; only layers with states need it
    # int64, in order: a sequence of the step, after how many of its rows its states are copied, and to which slot.
    snapshots_N3: Tensor | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The same, as values."""
        return tuple(Span(*span) for span in self.spans_B3.tolist())


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """What each token may use in one MoE layer."""

    counts_T: Tensor  # int64, 1 <= count <= k_max
    k_max: int
    rules: tuple[RoutingRule, ...] = ()  # the distinct ones; empty: every token has its family's rule
    rule_T: Tensor | None = None  # int64: which of them each token has
    known_pairs: int | None = None  # the sum of the counts, where the host knows it
    partial: bool = False  # of some tokens of the step alone: the others do not run this layer
    moe_layer: int = 0  # its number among the MoE layers

    @property
    def pairs(self) -> int:
        """The sum of the counts: what the layer runs, unless a rule is adaptive."""
        return int(self.counts_T.sum()) if self.known_pairs is None else self.known_pairs

    @property
    def adaptive(self) -> bool:
        """Whether the number of experts that run does not follow from the counts."""
        return self.partial or any(rule.adaptive for rule in self.rules)

    @property
    def ranks(self) -> bool:
        """Whether a token's rule changes which ranks run, or how they are weighted."""
        return any(rule.ranks for rule in self.rules)

    @property
    def reroutes(self) -> bool:
        """Whether some token's experts, or their weights, are not its family's."""
        return any(rule.reroutes for rule in self.rules)


@dataclass(frozen=True, slots=True)
class BudgetRows:
    """What each of T tokens may use in each MoE layer: budgets as the layers and kernels read them.

    A new field must also be added to `LayerBudget` (one layer), and for the native kernels to
    `NativeDecoder.__call__`, `ProgramStep` (csrc/program.h) and `LayerRows` (csrc/mixtures.h). Values that the host
    needs are kept beside the tensor, so that it does not wait for a device.
    """

    counts_LT: Tensor  # int64
    k_max: int  # the largest count
    pairs_L: tuple[int, ...]  # the sums of the counts: what each layer runs, unless a rule is adaptive
    rules: tuple[RoutingRule, ...] = ()  # the distinct ones; empty: every token has its family's rule
    rule_T: Tensor | None = None  # int64: which of them each token has

    def layer(self, moe_layer: int) -> LayerBudget:
        """The part of one MoE layer."""
        pairs = self.pairs_L[moe_layer]
        counts_T = self.counts_LT[moe_layer]
        return LayerBudget(counts_T, self.k_max, self.rules, self.rule_T, pairs, moe_layer=moe_layer)

    def to(self, device: torch.device) -> "BudgetRows":
        """The same on a device."""
        rule_T = None if self.rule_T is None else self.rule_T.to(device, non_blocking=True)
        return replace(self, counts_LT=self.counts_LT.to(device, non_blocking=True), rule_T=rule_T)


@dataclass(frozen=True, slots=True)
class LateIds:
    """Token ids that are still on the device only: the step before has sampled them, and the host has not read them."""

    row_N: Tensor  # int64, on the host: the rows of the batch
    source_N: Tensor  # int64, on the host: where their ids stand in `token_R`
    token_R: Tensor  # int64, on the device

    def put(self, ids_T: Tensor) -> Tensor:
        """The ids of a batch on the device, with these filled in. Does not wait for the device."""
        row_N, source_N = (x.to(ids_T.device, non_blocking=True) for x in (self.row_N, self.source_N))
        return ids_T.index_copy(0, row_N, self.token_R[source_N])


@dataclass(frozen=True, slots=True)
class Batch:
    """T new tokens."""

    ids_T: Tensor  # int64
    positions_T: Tensor  # int64, absolute
    seeds_T: Tensor  # int64, the noise seed of each token's request
    budget: BudgetRows
    rows_B: Tensor  # int64: the rows whose logits are wanted
    routes: bool = False  # whether the observer wants every token's experts
    late: LateIds | None = None  # ids that take the place of those in `ids_T`

    def to(self, device: torch.device) -> "Batch":
        """The same on a device, with late ids filled in. Does not wait for the device; the host's values may be
        overwritten once this returns."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        ids_T = moved(self.ids_T)
        return replace(
            self,
            ids_T=ids_T if self.late is None else self.late.put(ids_T),
            late=None,
            positions_T=moved(self.positions_T),
            seeds_T=moved(self.seeds_T),
            budget=self.budget.to(device),
            rows_B=moved(self.rows_B),
        )
