"""One step's input to the decoder: new tokens of many sequences side by side, and where their keys and values live.

Shape suffixes used throughout `model/`: T tokens, B sequences, D width, H heads, G kv heads, C head width, F expert
width, E experts (or blocks), K count, R routed pairs, S context slots, Z expert-space width, L MoE layers,
V vocabulary, P pages. This file knows no requests, no scheduling and no mixture.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's rows in the batch: `rows` new tokens from row `first`, after `context - rows` cached ones."""

    first: int
    rows: int
    context: int


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

    @property
    def spans(self) -> tuple[Span, ...]:
        """The same, as values."""
        return tuple(Span(*span) for span in self.spans_B3.tolist())


@dataclass(frozen=True, slots=True)
class Batch:
    """T new tokens. `k_max` is the largest count in `counts_LT`, kept on the host so that nothing waits for it."""

    ids_T: Tensor  # int64
    positions_T: Tensor  # int64, absolute
    seeds_T: Tensor  # int64, each token's request seed
    counts_LT: Tensor  # int64, the allowed count per MoE layer and token
    k_max: int
    pairs_L: tuple[int, ...]  # the sums of `counts_LT`, on the host too
    rows_B: Tensor  # int64: the rows whose logits are wanted
