"""Sequences in pages for the attention kernel alone: a cache full of random keys, queries, and where they lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.backends.cuda.kernels.attend import MAX_QUERIES, PAGE, QueryTiles, attend
from model.backends.cuda.places import query_tiles
from model.batch import Span
from model.shapes.attention import Attention
from model.step import MaskSpec


@dataclass(frozen=True, slots=True)
class Paged:
    """One step of several sequences over a cache of random keys and values."""

    shape: Attention
    q_THC: Tensor
    cache_PSGC: Tensor
    tables_BP: Tensor
    spans: tuple[Span, ...]

    @property
    def spans_B3(self) -> Tensor:
        """The spans on the device."""
        values = [(span.first, span.rows, span.context) for span in self.spans]
        return torch.tensor(values, device=self.q_THC.device)

    @property
    def longest(self) -> int:
        """Context."""
        return max(span.context for span in self.spans)

    def tiles(self, rows: int = MAX_QUERIES) -> QueryTiles:
        """The queries in tiles of at most so many tokens."""
        most = max(1, MAX_QUERIES // (self.shape.heads // self.shape.kv_heads))
        tiles, device = query_tiles(self.spans_B3.cpu(), min(rows, most)), self.q_THC.device
        return QueryTiles(tiles.sequence_N.to(device), tiles.first_N.to(device), tiles.rows)

    def run(self, spec: MaskSpec, rows: int = MAX_QUERIES, side_by_side: bool | None = None) -> Tensor:
        """Attention [T, H, C] of all queries; what is not written is not a number."""
        out_THC = torch.full_like(self.q_THC, torch.nan)
        places = (self.tables_BP, self.spans_B3, self.tiles(rows), self.longest)
        attend(self.q_THC, self.cache_PSGC, *places, spec, out_THC, side_by_side=side_by_side)
        return out_THC

    def prepared(self, spec: MaskSpec) -> Callable[[], None]:
        """The launch alone: everything else is made here."""
        out_THC = torch.empty_like(self.q_THC)
        places = (self.tables_BP, self.spans_B3, self.tiles(), self.longest)
        return partial(attend, self.q_THC, self.cache_PSGC, *places, spec, out_THC)

    def alone(self, sequence: int, last: int) -> "Paged":
        """The last tokens of one of the sequences as a step of its own."""
        span = self.spans[sequence]
        q_THC = self.q_THC[span.first + span.rows - last : span.first + span.rows]
        spans = (Span(0, last, span.context),)
        return Paged(self.shape, q_THC, self.cache_PSGC, self.tables_BP[sequence, None], spans)


def paged(
    shape: Attention, steps: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype, seed: int = 5
) -> Paged:
    """Sequences with so many new tokens and contexts each; blocks are handed out in random order."""
    generator = torch.Generator(device).manual_seed(seed)
    counts = [-(-context // PAGE) for _, context in steps]
    size = (2, sum(counts) * PAGE, shape.kv_heads, shape.head_width)
    cache_PSGC = torch.randn(size, generator=generator, device=device, dtype=dtype)
    free_N = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    tables_BP = torch.zeros(len(steps), max(counts), dtype=torch.int64)
    spans: list[Span] = []
    for sequence, (new, context) in enumerate(steps):
        used = sum(counts[:sequence])
        tables_BP[sequence, : counts[sequence]] = free_N[used : used + counts[sequence]]
        spans.append(Span(sum(span.rows for span in spans), new, context))
    tokens = sum(span.rows for span in spans)
    q_THC = torch.randn(tokens, shape.heads, shape.head_width, generator=generator, device=device, dtype=dtype)
    return Paged(shape, q_THC, cache_PSGC, tables_BP.to(device), tuple(spans))


def mask_of(shape: Attention, device: torch.device, window: int = 0) -> MaskSpec:
    """The mask of a layer, with sinks where it has them."""
    sinks_H = torch.linspace(-1, 1, shape.heads, device=device) if shape.sinks else None
    return MaskSpec(shape.head_width**-0.5, window, 0, sinks_H)
