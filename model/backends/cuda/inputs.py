"""What a step gives the kernels: tensors of the device, and the few numbers that launches are sized by.

A graph is captured for one set of these numbers (`StepShape`) and replayed with other contents of the tensors, so
nothing else of a step may reach a launch. Not here: how a plan becomes these tensors (see `places.py`).
"""

from dataclasses import dataclass

from torch import Tensor

from model.backends.cuda.kernels.attend import QueryTiles
from model.backends.cuda.kernels.route import TokenRules


@dataclass(frozen=True, slots=True)
class StepShape:
    """The numbers that size a step's launches; equal shapes are the same launches."""

    tokens: int
    rows: int  # that get logits
    sequences: int
    tiles: int  # of queries
    tile_rows: int  # tokens of one tile
    blocks: int  # columns of the tables
    longest: int  # an upper bound of the contexts
    k_max: int  # the largest count, or any larger number
    has_rules: bool = False


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's tensors, all on the device.

    A token may be padding: its counts are 0, its slot is one that no sequence has, no tile names it, and its results
    mean nothing.
    """

    shape: StepShape
    ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    seeds_T: Tensor  # int64
    counts_LT: Tensor  # int64
    rows_B: Tensor  # int64
    tables_BP: Tensor  # int64: block ids of each sequence
    spans_B3: Tensor  # int64: of each sequence its first row, new tokens, and context
    slots_T: Tensor  # int64: where each new token's keys and values go
    tiles: QueryTiles
    rules: TokenRules | None = None
