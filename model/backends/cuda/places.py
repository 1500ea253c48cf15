"""Where a step's tokens lie, as the kernels ask for it: slots of new keys and values, and tiles of queries.

Made once for a step from what the host knows of its sequences; every layer whose heads share keys alike reads the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.cuda.kernels.attend import MOST_QUERIES, PAGE, QueryTiles
from model.batch import Pages, Span


@dataclass(frozen=True, slots=True)
class Places:
    """One step's tokens in the pages of its sequences."""

    tables_BP: Tensor
    spans_B3: Tensor
    slots_T: Tensor  # int64
    tiles: QueryTiles
    longest: int  # context


def places_of(pages: Pages, spans: Sequence[Span], shared: int) -> Places:
    """The places of a step whose layers share keys among so many heads. `spans` are those of the pages, on the host.

    Raises:
        ValueError: the cache has blocks of another size than the kernels' pages.
    """
    size = pages.cache.block_size
    if size != PAGE:
        raise ValueError(f"the GPU kernels read blocks of {PAGE} tokens, not of {size}")
    longest = max((span.context for span in spans), default=0)
    tiles = query_tiles(spans, max(1, MOST_QUERIES // shared), pages.tables_BP.device)
    return Places(pages.tables_BP, pages.spans_B3, _slots(pages, spans), tiles, longest)


def query_tiles(spans: Sequence[Span], most: int, device: torch.device) -> QueryTiles:
    """New tokens in tiles of one sequence each: single ones, or up to `most` where a sequence has several."""
    rows = min(most, max((span.rows for span in spans), default=1))
    tiles: list[tuple[int, int]] = []
    for sequence, span in enumerate(spans):
        tiles.extend((sequence, first) for first in range(0, span.rows, rows))
    sequence_N, first_N = torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 2).T.contiguous()
    return QueryTiles(sequence_N, first_N, rows)


def _slots(pages: Pages, spans: Sequence[Span]) -> Tensor:
    """The slot of each new token."""
    sequences = [sequence for sequence, span in enumerate(spans) for _ in range(span.rows)]
    positions = [at for span in spans for at in range(span.context - span.rows, span.context)]
    sequence_T, position_T = torch.tensor([sequences, positions], device=pages.tables_BP.device)
    return pages.tables_BP[sequence_T, position_T // PAGE] * PAGE + position_T % PAGE
