"""Where a step's tokens lie, as the kernels ask for it: slots of new keys and values, and tiles of queries.

Made once for a step from what the host knows of its sequences; every layer reads the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.cuda.kernels.attend import PAGE, QueryTiles


@dataclass(frozen=True, slots=True)
class Places:
    """One step's tokens in the pages of its sequences."""

    tables_BP: Tensor
    spans_B3: Tensor
    slots_T: Tensor  # int64
    tiles: QueryTiles
    longest: int  # context


def check_block_size(size: int) -> None:
    """Refuse a cache whose blocks are not the kernels' pages.

    Raises:
        ValueError: they are not.
    """
    if size != PAGE:
        raise ValueError(f"the GPU kernels read blocks of {PAGE} tokens, not of {size}")


def query_tiles(spans_B3: Tensor, most: int) -> QueryTiles:
    """New tokens in tiles of one sequence each, on the host: single ones, or up to `most` where a sequence has
    several."""
    rows_B = spans_B3[:, 1]
    rows = min(most, int(rows_B.max()))
    tiles_B = (rows_B + rows - 1) // rows
    sequence_N = torch.arange(len(rows_B)).repeat_interleave(tiles_B)
    number_N = torch.arange(len(sequence_N)) - (tiles_B.cumsum(0) - tiles_B)[sequence_N]
    return QueryTiles(sequence_N.int(), (number_N * rows).int(), rows)


def slots_of(tables_BP: Tensor, spans_B3: Tensor) -> Tensor:
    """The slot of each new token, on the host."""
    first_B, rows_B, context_B = spans_B3.unbind(1)
    sequence_T = torch.arange(len(rows_B)).repeat_interleave(rows_B)
    before_B = context_B - rows_B - first_B  # what to add to a row's number to get its position
    position_T = torch.arange(len(sequence_T)) + before_B[sequence_T]
    return tables_BP[sequence_T, position_T // PAGE] * PAGE + position_T % PAGE
